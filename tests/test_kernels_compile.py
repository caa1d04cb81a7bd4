"""The compile gate passes: every shipped kernel configuration, on every target, spill-free and with matrix instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAULTY = """
import os, sys, tempfile
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
sys.path.insert(0, "tests")
import compile_gate as gate, compile_only, torch
from fused_losses.kernels import linear_softmax

def trouble(target, **change):
    with compile_only.patch.object(linear_softmax, "linear_softmax_fwd_config", lambda *args: config(*args)._replace(**change)):
        print(gate.check(*case, target)[0].trouble or "none")

config, case = linear_softmax.linear_softmax_fwd_config, next(gate.cases("sm_80"))
trouble("sm_80")
trouble("sm_80", num_warps=2)
trouble("sm_80", num_stages=12)
trouble("sm_80", block_k=24)
try:
    compile_only._check_launch(1, 2**16, 1)
except compile_only.CannotLaunch as error:
    print(error)
compile_only.TARGETS["sm_80"] = compile_only.TARGETS["sm_80"]._replace(matrix_instruction="HGMMA")
trouble("sm_80", num_stages=3)
"""


def python(*arguments):
    """In a process of its own, without the interpreter that these tests may run kernels in."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_shipped_configuration_compiles_well(tmp_path):
    done = python("tests/compile_gate.py", "--json", str(tmp_path / "gate.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "gate.json").read_text())
    assert {report["target"] for report in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert sum("combine" not in report["kernel"] for report in reports) <= 160, "the gate's budget is 160 compiles"
    matrix = [report["target"] for report in reports if report["matrix_instruction"] != "-"]
    assert all(matrix.count(target) >= 12 for target in ("sm_80", "sm_90", "sm_100", "gfx942")), matrix


def test_the_gate_sees_spills_shared_memory_and_missing_instructions():
    done = python("-c", FAULTY)
    good, spill, memory, tile, grid, instruction = done.stdout.splitlines() or [done.stderr]
    assert good == "none"
    assert "spills" in spill
    assert "shared memory" in memory
    assert "power of 2" in tile
    assert grid == "grid (1, 65536, 1)"
    assert "no matrix instruction HGMMA" in instruction

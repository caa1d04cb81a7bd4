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
import compile_gate as gate
good = next(config for config in gate.shipped("sm_80") if config.matrix)
target = gate.TARGETS["sm_80"]
print(gate.check(good, "sm_80").trouble or "none")
print(gate.check(good._replace(num_warps=2), "sm_80").trouble)
gate.TARGETS["sm_80"] = target._replace(matrix_instruction="HGMMA", shared_limit=1024)
print(gate.check(good, "sm_80").trouble)
print(gate.check(good._replace(arguments=good.arguments | {"BLOCK_K": 24}), "sm_80").trouble)
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
    assert len(reports) <= 160, "the gate's budget is 160 compiles"
    matrix = [report["target"] for report in reports if report["matrix_instruction"] != "-"]
    assert all(matrix.count(target) >= 12 for target in ("sm_80", "sm_90", "sm_100", "gfx942")), matrix


def test_the_gate_sees_spills_shared_memory_and_missing_instructions():
    done = python("-c", FAULTY)
    good, spill, other, error = done.stdout.splitlines() or [done.stderr]
    assert good == "none"
    assert "spills" in spill
    assert "shared memory" in other
    assert "no matrix instruction HGMMA" in other
    assert "power of 2" in error

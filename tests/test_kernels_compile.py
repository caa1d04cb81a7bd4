"""The compile gate passes: every shipped kernel configuration, on every target, spill-free and with matrix instructions."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import python

from fused_losses.kernels import configurations

ROOT = Path(__file__).parent.parent
# Instructions that sm_90 may spend on a logit (a pair of them in a divergence), how many logits a lane takes at a time, and in
# how many passes over the row. The larger figure of Triton 3.7 and 3.9.
PER_LOGIT = {
    "softmax_rows_fwd log-probs": (10.5, 32, 1),
    "softmax_rows_fwd entropy": (13, 32, 1),
    "softmax_rows_fwd_bwd log-probs": (23, 32, 2),
    "softmax_rows_bwd ac": (18, 32, 1),
    "softmax_rows_fwd rows": (38, 32, 1),
    "softmax_rows_bwd rows": (50, 32, 1),
    "divergence_rows forward_kl, gradients of student": (57, 8, 2),
    "divergence_rows jsd, gradients of student": (136, 8, 3),
    "divergence_rows forward_kl, gradients of both, every option": (256, 8, 3),
}
FAULTY = """
import os, tempfile
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
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
trouble("sm_90", num_stages=1)

class Unfused:
    def __getitem__(self, grid):
        return lambda *args, enable_fp_fusion, **named: kernel[grid](*args, **named)

kernel = linear_softmax._linear_softmax_fwd_kernel
with compile_only.patch.object(linear_softmax, "_linear_softmax_fwd_kernel", Unfused()):
    trouble("sm_80")
try:
    compile_only.check_launch(1, 2**16, 1)
except compile_only.CannotLaunch as error:
    print(error)
compile_only.TARGETS["sm_80"] = compile_only.TARGETS["sm_80"]._replace(matrix_instruction="HGMMA")
trouble("sm_80", num_stages=3)
"""

LOADS = """
import os, re, tempfile
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
import compile_gate as gate, compile_only

def places(run, fn, *args, **kwargs):
    kernel = run(fn, *args, **kwargs)
    code = compile_only._cuobjdump("--dump-sass", kernel.asm["cubin"])
    lines = re.findall(r"/\\*[0-9a-f]{4,}\\*/\\s+(.*?);", code)
    print(*(i for i, line in enumerate(lines) if "LDG.E.128" in line))

cases = dict(gate.cases("sm_90"))
with compile_only.pretended_gpu("sm_90", places):
    cases["softmax_rows_fwd log-probs"]()
    cases["softmax_rows_fwd entropy"]()
"""


def test_as_many_rows_are_in_flight_as_l2_has_room_for(monkeypatch):
    h200 = SimpleNamespace(multi_processor_count=132, L2_cache_size=60 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    in_flight = {
        V: configurations.rows_in_flight(torch.device("cuda"), 2 * V, 2**14) for V in (32000, 128256, 151936, 256000)
    }
    assert in_flight == {32000: 6 * 132, 128256: 3 * 132, 151936: 3 * 132, 256000: 2 * 132}
    assert configurations.rows_in_flight(torch.device("cuda"), 2 * 256000, 2**12) == 8 * 132  # smaller tiles: more


def test_every_shipped_configuration_compiles_well(tmp_path):
    done = python("tests/compile_gate.py", "--json", str(tmp_path / "gate.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "gate.json").read_text())
    assert {report["target"] for report in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert sum("combine" not in report["kernel"] for report in reports) <= 204, "the gate's budget"
    loops = {report["kernel"]: report["loops"].split() for report in reports if report["target"] == "sm_90"}
    spent = {kernel: sum(map(int, loops[kernel][:passes])) / n for kernel, (_, n, passes) in PER_LOGIT.items()}
    assert all(spent[kernel] <= allowed for kernel, (allowed, *_) in PER_LOGIT.items()), spent
    matrix = [report["target"] for report in reports if report["matrix_instruction"] != "-"]
    assert all(matrix.count(target) >= 12 for target in ("sm_80", "sm_90", "sm_100", "gfx942")), matrix


def test_the_loads_of_a_tile_are_under_way_together():
    done = python("-c", LOADS)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        places = [int(place) for place in line.split()]
        assert len(places) == 4, line
        assert places[-1] - places[0] < 32, line


@pytest.mark.slow
def test_every_shipped_configuration_compiles_well_for_other_cards():
    done = python("tests/compile_gate.py", "--target", "sm_75", "sm_89", "sm_120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("HMMA") > 30


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU, whose time is better spent")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_launch_of_the_tests_compiles(target):
    done = python("tests/compile_launches.py", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) kernels,", done.stdout)[1]) > 400


def test_the_launches_are_seen_that_do_not_compile(tmp_path):
    faulty = "tests/test_kernel_linear_softmax.py::test_column_weights_are_optional"
    copy = shutil.copytree(ROOT, tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns(".*", "demo", "build"))
    kernels = copy / "kernels" / "linear_softmax.py"
    text = kernels.read_text()
    guard = "if ids_ptr is not None:  # noqa: SIM102, a branch at compile time"
    assert guard in text
    kernels.write_text(text.replace(guard, "if True:"))
    done = python("tests/compile_launches.py", "sm_90", faulty, folder=copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search("_linear_softmax_fwd_kernel .*(CompilationError|AttributeError).*NoneType", done.stdout)
    assert re.search(r"[45] kernels, 0 of them spill, [12] cannot be launched", done.stdout)


def test_the_gate_sees_what_is_wrong():
    done = python("-c", FAULTY)
    good, spill, memory, tile, wait, fusion, grid, instruction = done.stdout.splitlines() or [done.stderr]
    assert good == "none"
    assert "spills" in spill
    assert "shared memory" in memory
    assert "power of 2" in tile
    assert "waits for each product" in wait
    assert "whether products fuse" in fusion
    assert grid == "grid (1, 65536, 1)"
    assert "no matrix instruction HGMMA" in instruction

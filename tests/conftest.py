"""One set of tests for both backends: PyTorch natively, Triton on a GPU or, without one, in Triton's interpreter.

``EMULATE=sm_90 pytest …`` (or ``sm_80``) runs only Triton, as emulated code of that GPU: see ``emulated_gpu.py``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# Read when torch is imported. A cached graph does not notice that an operator it calls has changed.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
import torch.distributed as dist

pytest.register_assert_rewrite("lazy_logits")

from fused_losses.bench.ranks import interpret

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = os.environ.get("EMULATE")
INTERPRETED = DEVICE == "cpu" and not EMULATED
if INTERPRETED:
    interpret()
    if importlib.util.find_spec("triton"):
        from interpreter_bounds import check_bounds

        check_bounds()


def python(*arguments, folder=Path(__file__).parent.parent, **environment):
    """Run Python in a process of its own, without Triton's interpreter, which these tests may run kernels in."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    paths = [str(folder), str(folder / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """``-n auto``: on a GPU each process keeps a context, half a GB, and its freed memory; a large host has 200 cores."""
    return min(8, os.cpu_count() or 1) if DEVICE == "cuda" else None


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True, scope="session")
def _emulated_gpu():
    if EMULATED:
        from emulated_gpu import launches_run

        with launches_run(EMULATED):
            yield
    else:
        yield


@pytest.fixture(params=["triton"] if EMULATED else ["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def no_entries(monkeypatch):
    """Fail if anything is computed entry by entry, the slower fallback where numbers per token do not suffice."""
    from fused_losses.lazy_elementwise import LazyElementwise

    monkeypatch.setattr(
        LazyElementwise, "__post_init__", lambda x: pytest.fail(f"{x.function.__name__} entry by entry")
    )


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks, slices and tiles so small that a small problem has several."""
    monkeypatch.setattr("fused_losses.planning.FEWEST_TOKENS", 4)
    monkeypatch.setattr("fused_losses.planning.FEWEST_COLUMNS", 16)
    monkeypatch.setattr("fused_losses.chunked.linear_softmax.TILE", 8)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Make unwritten memory show up: ``torch.empty`` and its kin return nan (or the largest integer)."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

"""One set of tests for both backends: PyTorch natively, Triton on a GPU or, without one, in Triton's interpreter."""

import contextlib
import os

# Read when torch is imported. A cached graph does not notice that an operator beneath it has changed.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import numpy as np
import pytest
import torch
import torch.distributed as dist

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a module with @triton.jit is imported
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import InterpreterBuilder

        # As on a GPU, whose maximum of a number and a nan is the number: the interpreter's would be the nan.
        InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
        InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


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
    """Memory nobody wrote shows up: ``torch.empty`` and its kin come filled with nan (or the largest integer)."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

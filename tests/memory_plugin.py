"""pytest's part of a test in ``test_memory.py``: a pretended GPU, on which kernels and products compute nothing.

What is allocated for them is counted as on a CPU, and is what a GPU's allocator would be asked for.
"""

import os
from unittest.mock import patch

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # xdist's workers inherit what conftest.py set

import compile_only

from fused_losses.kernels import divergence_rows, linear_softmax, softmax_rows  # noqa: F401


def product(exact):
    """Of CUDA's, which needs no copies of its factors."""

    def multiply(*arguments, out=None, out_dtype=None, **named):
        if out is None and out_dtype is None:
            return exact(*arguments, **named)
        return arguments[0].new_empty(len(arguments[0]), arguments[1].shape[1], dtype=out_dtype) if out is None else out

    return multiply


@pytest.fixture(autouse=True, scope="session")
def _pretended_gpu():
    os.environ.pop("TRITON_INTERPRET", None)  # again: too late for the kernels, which are here already
    idle = {name: product(getattr(torch, name)) for name in ("mm", "addmm", "mul")}
    with (
        compile_only.pretended_gpu("sm_90", lambda run, fn, *args, **kwargs: None),
        patch.multiple(torch, **idle, _assert_async=lambda *_: None),
        patch.object(softmax_rows, "rows_in_flight", lambda *_: 132),
    ):
        yield

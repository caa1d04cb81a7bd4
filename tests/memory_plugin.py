"""The pytest plugin of a test in ``test_memory.py``: a simulated GPU, on which kernels and products compute nothing.

Their allocations are counted as on a CPU: they are those that a GPU's allocator would be asked for.
"""

import os
from unittest.mock import patch

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # xdist's workers inherit the value that conftest.py set

import compile_only

from fused_losses.kernels import divergence_rows, linear_softmax, softmax_rows  # noqa: F401


def product(exact):
    """A product like CUDA's, which needs no copies of its factors."""

    def multiply(*arguments, out=None, out_dtype=None, **named):
        if out is None and out_dtype is None:
            return exact(*arguments, **named)
        return arguments[0].new_empty(len(arguments[0]), arguments[1].shape[1], dtype=out_dtype) if out is None else out

    return multiply


@pytest.fixture(autouse=True, scope="session")
def _pretended_gpu():
    os.environ.pop("TRITON_INTERPRET", None)  # conftest.py set it again, too late for the kernels imported above
    idle = {name: product(getattr(torch, name)) for name in ("mm", "addmm", "mul")}
    with (
        compile_only.pretended_gpu("sm_90", lambda run, fn, *args, **kwargs: None),
        patch.multiple(torch, **idle, _assert_async=lambda *_: None),
        patch.object(softmax_rows, "rows_in_flight", lambda *_: 132),
    ):
        yield

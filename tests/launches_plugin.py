"""pytest's part of ``compile_launches.py``: the tests' tensors count as a GPU's, and what they launch is only compiled."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # xdist's workers inherit what conftest.py set

import compile_only

from fused_losses.kernels import divergence_rows, linear_softmax, softmax_rows  # noqa: F401

reports: list[tuple[compile_only.Report, str]] = []


def product(exact):
    """A CPU has no products of 16-bit factors with an fp32 sum."""

    def multiply(*factors, out_dtype=None, **named):
        if out_dtype is not None:
            factors = [factor.to(out_dtype) for factor in factors]
        return exact(*factors, **named)

    return multiply


@pytest.fixture(autouse=True, scope="session")
def _pretended_gpu():
    os.environ.pop("TRITON_INTERPRET", None)  # again: too late for the kernels, which are here already

    def keep(report):
        reports.append((report, os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]))

    with (
        compile_only.launches_compile(os.environ["TARGET"], keep),
        patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
        patch.multiple(torch, mm=product(torch.mm), addmm=product(torch.addmm)),
        patch.multiple(torch.cuda, is_current_stream_capturing=lambda: False, synchronize=lambda: None),
    ):
        yield


def pytest_collection_modifyitems(items):
    options = ((item, getattr(item, "callspec", None)) for item in items)
    items[:] = [item for item, spec in options if spec is None or spec.params.get("backend") != "torch"]


def pytest_sessionfinish():
    found = [(*report, name) for report, name in reports]
    Path(os.environ["REPORTS"], f"{os.getpid()}.json").write_text(json.dumps(found))

"""The pytest plugin of ``compile_launches.py``: the tests' tensors count as a GPU's, and launched kernels are only compiled."""

import json
import os
from pathlib import Path

import pytest

os.environ.pop("TRITON_INTERPRET", None)  # xdist's workers inherit the value that conftest.py set

import compile_only

from fused_losses.kernels import divergence_rows, linear_softmax, softmax_rows  # noqa: F401

reports: list[tuple[compile_only.Report, str]] = []


@pytest.fixture(autouse=True, scope="session")
def _pretended_gpu():
    os.environ.pop("TRITON_INTERPRET", None)  # conftest.py set it again, too late for the kernels imported above

    def keep(report):
        reports.append((report, os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]))

    with compile_only.launches_compile(os.environ["TARGET"], keep):
        yield


def pytest_collection_modifyitems(items):
    options = ((item, getattr(item, "callspec", None)) for item in items)
    items[:] = [item for item, spec in options if spec is None or spec.params.get("backend") != "torch"]


def pytest_sessionfinish():
    found = [(*report, name) for report, name in reports]
    Path(os.environ["REPORTS"], f"{os.getpid()}.json").write_text(json.dumps(found))

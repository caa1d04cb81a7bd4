"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import fused_losses

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(fused_losses.__path__, "fused_losses.")
    if not m.name.startswith(("fused_losses.bench", "fused_losses.kernels"))
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(
        module,
        extraglobs={"torch": torch, "fused_losses": fused_losses},
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert failed == 0

"""Each primitive beside eager PyTorch, for pytest-benchmark: ``make bench`` runs them, the test suite skips them.

Read the figure in parentheses, the ratio within a group: the others say how busy the machine is. ``--benchmark-autosave`` and
``--benchmark-compare-fail=median:10%`` find what became slower since the last run.
"""

import importlib

import pytest
import torch

from fused_losses.bench.cli import CASES
from fused_losses.bench.measure import runnable, step
from fused_losses.bench.problem import Contender, Problem
from fused_losses.bench.shapes import SHAPES, Shape

PROBLEMS = {
    "cpu": (Shape("small", 8192, 256), 128, torch.float32),
    "cuda": (SHAPES["llama3-8b"], 4096, torch.bfloat16),
}


@pytest.mark.parametrize("who", ["eager", "fused_losses"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, who, device, benchmark):
    benchmark.group = name
    shape, tokens, dtype = PROBLEMS[device]
    case = importlib.import_module(f"fused_losses.bench.{name}")
    x = case.inputs(Problem(shape, tokens, dtype, "peaked", device))
    run = runnable(case, Contender("eager", case.eager) if who == "eager" else case.OURS[0], x, with_gradients=True)

    def call():
        step(run, run.prepare())
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=9, warmup_rounds=1)

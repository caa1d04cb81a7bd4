"""Cases of ``cross_entropy``: loss and gradient of logits that exist already. Bound by memory bandwidth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_entropy import cross_entropy
from ..reference import cross_entropy as specification
from .problem import Contender, Inputs, Problem, Work, peak

LEAVES, ROWS = ("logits",), ("logits", "target")
FLOOR, PARTS = "bytes", True


def inputs(problem: Problem) -> Inputs:
    """Logits ``(N, V)``: standard normal; ``peaked`` raises the target's by N(log V + 2, 4²)."""
    N, V = problem.tokens, problem.shape.vocab
    generator = torch.Generator(problem.device).manual_seed(problem.seed)
    logits = torch.randn(N, V, generator=generator, device=problem.device, dtype=problem.dtype)
    target = torch.randint(V, (N,), generator=generator, device=problem.device)
    if problem.distribution == "peaked":
        raised = peak(problem, torch.randn(N, 1, generator=generator, device=problem.device))
        logits.scatter_add_(1, target[:, None], raised.to(problem.dtype))
    return {"logits": logits, "target": target}


def eager(x: Inputs) -> Tensor:
    return F.cross_entropy(x["logits"], x["target"])


OURS = (
    Contender("fused_losses", lambda x: cross_entropy(x["logits"], x["target"])),
    Contender(
        "fused_losses in place",
        lambda x: cross_entropy(x["logits"], x["target"], inplace_backward=True),
        destroys=("logits",),
    ),
)


def reference(rows: Inputs, whole: Inputs) -> Any:
    return specification.cross_entropy(rows["logits"], rows["target"], reduction="sum") / whole["target"].numel()


def work(problem: Problem) -> tuple[Work, Work]:
    """Forward reads the logits once; backward reads them once more and writes as much. (Targets, losses: 20 bytes per row.)

    Operations: an exponential, a comparison and a sum per logit, and about as many in backward.
    """
    N, V, size = problem.tokens, problem.shape.vocab, problem.dtype.itemsize
    return Work(3 * N * V, N * V * size), Work(3 * N * V, 2 * N * V * size)

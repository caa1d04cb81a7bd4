"""Cases of ``linear_cross_entropy``: loss and both gradients from hidden states and the head. Bound by the products."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..linear_cross_entropy import linear_cross_entropy
from ..reference import cross_entropy as specification
from ..reference.linear_logits import linear_logits
from ..settings import gradient_filter
from .problem import Contender, Inputs, Problem, head_inputs, head_work

LEAVES, ROWS = ("hidden", "weight"), ("hidden", "target")
FLOOR, PARTS = "flops", False  # gradients are made in forward: only the sum of both has a floor


def inputs(problem: Problem) -> Inputs:
    return head_inputs(problem, (problem.tokens,))


def eager(x: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(x["hidden"], x["weight"]), x["target"])


def ours(name: str, **options: Any) -> Contender:
    return Contender(name, lambda x: linear_cross_entropy(x["hidden"], x["weight"], x["target"], **options))


def with_filter(x: Inputs) -> Tensor:
    with gradient_filter(2**-14):
        return linear_cross_entropy(x["hidden"], x["weight"], x["target"])


OURS = (
    ours("fused_losses"),  # as planned
    ours("fused_losses 1GiB", workspace="1GiB", route="gradients_in_forward"),
    ours("fused_losses 256MiB", workspace="256MiB", route="gradients_in_forward"),
    ours("fused_losses recompute", route="recompute"),
    ours("fused_losses 32MiB", workspace="32MiB", route="recompute"),
    Contender("fused_losses filter", with_filter, exact=False),
)


def reference(rows: Inputs, whole: Inputs) -> Any:
    logits = linear_logits(rows["hidden"], rows["weight"])
    return specification.cross_entropy(logits, rows["target"], reduction="sum") / whole["target"].numel()


work = head_work

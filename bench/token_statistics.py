"""Cases of ``token_statistics``: log-probabilities and entropy per token, from hidden states and the head.

Every token has an upstream gradient of its own, as in policy training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_logits import LinearLogits
from ..reference import token_statistics as specification
from ..reference.linear_logits import linear_logits
from ..token_statistics import token_statistics
from .problem import Contender, Inputs, Problem, head_inputs, head_work

LEAVES, ROWS = ("hidden", "weight"), ("hidden", "target", "upstream")
FLOOR, PARTS = "flops", True


def inputs(problem: Problem) -> Inputs:
    """``upstream`` ``(N, 2)``: standard normal gradients of the two outputs, divided by the number of tokens."""
    x = head_inputs(problem, (problem.tokens,))
    generator = torch.Generator(problem.device).manual_seed(problem.seed + 1)
    x["upstream"] = torch.randn(problem.tokens, 2, generator=generator, device=problem.device) / problem.tokens
    return x


def eager(x: Inputs) -> tuple[Tensor, Tensor]:
    """Upcast logits, their log-softmax, a gather and a sum: what trainers write."""
    logp = F.linear(x["hidden"], x["weight"]).float().log_softmax(-1)
    return logp.gather(-1, x["target"][:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def ours(name: str, workspace: str | None = None) -> Contender:
    def call(x: Inputs) -> tuple[Any, Any]:
        logits = LinearLogits(x["hidden"], x["weight"])
        found = token_statistics(logits, x["target"], ("log_probs", "entropy"), workspace=workspace)
        return found.log_probs, found.entropy

    return Contender(name, call)


OURS = (
    ours("fused_losses"),
    ours("fused_losses 2GiB", "2GiB"),  # saves logits for backward
    ours("fused_losses 32MiB", "32MiB"),
)


def reference(rows: Inputs, whole: Inputs) -> Any:
    found = specification.token_statistics(linear_logits(rows["hidden"], rows["weight"]), rows["target"])
    return found["log_probs"], found["entropy"]


work = head_work  # recomputing the logits in backward, a fourth product, is a choice, not the floor

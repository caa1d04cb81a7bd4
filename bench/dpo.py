"""Cases of a whole DPO step at the head: policy and reference log-probabilities of pairs, the loss, the policy's gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_logits import LinearLogits
from ..preference import dpo_loss
from ..reference import preference as specification
from ..reference.linear_logits import linear_logits
from ..reference.token_statistics import selective_log_softmax as reference_log_probs
from ..token_statistics import selective_log_softmax
from .problem import Contender, Inputs, Problem, Work, head_inputs, head_work

LEAVES, ROWS = ("hidden", "weight"), ("hidden", "reference_hidden", "target")
FLOOR, PARTS = "flops", False
ANSWER = 1024  # tokens, and at least four pairs


def pairs(problem: Problem) -> tuple[int, int]:
    """The number of pairs and of tokens per answer: the problem's tokens, rounded down to whole pairs."""
    count = max(4, problem.tokens // (2 * ANSWER))
    return count, max(1, problem.tokens // (2 * count))


def inputs(problem: Problem) -> Inputs:
    """Hidden states ``(B, 2, S, H)``, chosen and rejected; the reference's are the policy's plus a tenth of noise."""
    count, length = pairs(problem)
    x = head_inputs(problem, (count, 2, length))
    generator = torch.Generator(problem.device).manual_seed(problem.seed + 1)
    noise = torch.randn(x["hidden"].shape, generator=generator, device=problem.device, dtype=problem.dtype)
    return x | {"reference_hidden": x["hidden"] + 0.1 * noise}


def loss(log_probs: Tensor, reference_log_probs: Tensor, of: Any = dpo_loss, **options: Any) -> Tensor:
    """DPO of token log-probabilities ``(B, 2, S)``."""
    policy, reference = log_probs.sum(-1), reference_log_probs.sum(-1)
    return of(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=0.1, **options)[0]


def eager(x: Inputs) -> Tensor:
    """Upcast logits, their log-softmax and a gather: what trainers write."""

    def log_probs(hidden: Tensor) -> Tensor:
        logp = F.linear(hidden, x["weight"]).float().log_softmax(-1)
        return logp.gather(-1, x["target"][..., None])[..., 0]

    with torch.no_grad():
        reference = log_probs(x["reference_hidden"])
    return loss(log_probs(x["hidden"]), reference)


def ours(name: str, workspace: str | None = None) -> Contender:
    def call(x: Inputs) -> Tensor:
        policy, reference = (LinearLogits(x[hidden], x["weight"]) for hidden in ("hidden", "reference_hidden"))
        with torch.no_grad():
            reference_log_probs = selective_log_softmax(reference, x["target"], workspace=workspace)
        return loss(selective_log_softmax(policy, x["target"], workspace=workspace), reference_log_probs)

    return Contender(name, call)


OURS = (ours("fused_losses"), ours("fused_losses 32MiB", "32MiB"))


def reference(rows: Inputs, whole: Inputs) -> Any:
    weight = rows["weight"]
    policy = reference_log_probs(linear_logits(rows["hidden"], weight), rows["target"])
    with torch.no_grad():
        reference = reference_log_probs(linear_logits(rows["reference_hidden"], weight), rows["target"])
    return loss(policy, reference, specification.dpo_loss, reduction="sum") / whole["target"].shape[0]


def work(problem: Problem) -> tuple[Work, Work]:
    """Two products forward, the policy's and the reference's; two backward."""
    count, length = pairs(problem)
    forward, backward = head_work(problem, 2 * count * length)
    return forward + forward, backward

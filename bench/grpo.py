"""Cases of a GRPO step at the head: log-probabilities of sampled answers, the clipped loss over all tokens, both gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_logits import LinearLogits
from ..policy import grpo_loss
from ..reference import policy as specification
from ..reference.linear_logits import linear_logits
from ..reference.token_statistics import selective_log_softmax as reference_log_probs
from ..token_loss import token_loss
from ..token_statistics import selective_log_softmax
from .problem import Contender, Inputs, Problem, Work, head_inputs, head_work

LEAVES, ROWS = ("hidden", "weight"), ("hidden", "target", "old_log_probs", "advantages")
FLOOR, PARTS = "flops", False
ANSWER = 1024  # tokens
LOW, HIGH = 0.2, 0.28


def answers(problem: Problem) -> tuple[int, int]:
    count = max(2, problem.tokens // ANSWER)
    return count, max(1, problem.tokens // count)


def inputs(problem: Problem) -> Inputs:
    """Hidden states ``(B, S, H)``; old log-probabilities are the present ones plus N(0, 0.3²), so that both clips act on some
    tokens; advantages alternate in sign."""
    count, length = answers(problem)
    x = head_inputs(problem, (count, length))
    generator = torch.Generator(problem.device).manual_seed(problem.seed + 1)
    x["old_log_probs"] = torch.stack(
        [  # one answer at a time: all their logits at once may not fit
            F.linear(h, x["weight"]).float().log_softmax(-1).gather(-1, y[:, None])[:, 0]
            for h, y in zip(x["hidden"], x["target"], strict=True)
        ]
    )
    x["old_log_probs"] += 0.3 * torch.randn(count, length, generator=generator, device=problem.device)
    x["advantages"] = torch.linspace(0.5, 1.5, count, device=problem.device)
    x["advantages"][::2] *= -1
    return x


def loss(log_probs: Tensor, x: Inputs) -> Tensor:
    return grpo_loss(
        log_probs, x["old_log_probs"], x["advantages"], aggregation="token_mean", eps_low=LOW, eps_high=HIGH
    )[0]


def eager(x: Inputs) -> Tensor:
    """Upcast logits, their log-softmax and a gather: what trainers write."""
    logp = F.linear(x["hidden"], x["weight"]).float().log_softmax(-1)
    return loss(logp.gather(-1, x["target"][..., None])[..., 0], x)


def ours(name: str, workspace: str | None = None) -> Contender:
    def call(x: Inputs) -> Tensor:
        logits = LinearLogits(x["hidden"], x["weight"])
        return loss(selective_log_softmax(logits, x["target"], workspace=workspace), x)

    return Contender(name, call)


def per_token(statistics: Any, old_log_probs: Tensor, weighted_advantages: Tensor) -> Tensor:
    """The same loss, one token at a time, with the mean's denominator in the advantages."""
    ratio = (statistics.log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * weighted_advantages, ratio.clamp(1 - LOW, 1 + HIGH) * weighted_advantages)


def ours_in_forward(x: Inputs) -> Tensor:
    weighted = (x["advantages"][:, None] / x["target"].numel()).expand_as(x["old_log_probs"])
    logits = LinearLogits(x["hidden"], x["weight"])
    return token_loss(per_token, logits, x["target"], x["old_log_probs"], weighted)[0]


OURS = (
    ours("fused_losses"),
    ours("fused_losses 32MiB", "32MiB"),
    Contender("fused_losses token_loss", ours_in_forward),
)


def reference(rows: Inputs, whole: Inputs) -> Any:
    """Log-probabilities on the device of the logits, the loop over tokens on the CPU."""
    log_probs = reference_log_probs(linear_logits(rows["hidden"], rows["weight"]), rows["target"]).cpu()
    return specification.grpo_loss(
        log_probs,
        rows["old_log_probs"].cpu(),
        rows["advantages"].cpu(),
        torch.ones_like(log_probs),
        aggregation="token_mean",
        batch_num_tokens=whole["target"].numel(),
        eps_low=LOW,
        eps_high=HIGH,
    )[0].to(rows["weight"].device)


def work(problem: Problem) -> tuple[Work, Work]:
    """One product forward and two backward."""
    count, length = answers(problem)
    return head_work(problem, count * length)

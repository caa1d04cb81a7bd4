"""Cases of ``divergence``: forward KL of a teacher's head and a student's, the student's gradients. Bound by the products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import divergence
from ..linear_logits import LinearLogits
from ..reference import divergence as specification
from ..reference.linear_logits import linear_logits
from .problem import Contender, Inputs, Problem, Work, head_inputs, head_work

LEAVES, ROWS = ("hidden", "weight"), ("hidden", "teacher_hidden", "target")
FLOOR, PARTS = "flops", True


def inputs(problem: Problem) -> Inputs:
    """The teacher has a head of its own, of the student's size; head and hidden states are the student's plus a tenth of
    noise."""
    x = head_inputs(problem, (problem.tokens,))
    generator = torch.Generator(problem.device).manual_seed(problem.seed + 1)
    for name, of in (("teacher_hidden", "hidden"), ("teacher_weight", "weight")):
        noise = torch.randn(x[of].shape, generator=generator, device=problem.device, dtype=problem.dtype)
        x[name] = x[of] + 0.1 * x[of].std() * noise
    return x


def eager(x: Inputs) -> Tensor:
    student = F.linear(x["hidden"], x["weight"]).float().log_softmax(-1)
    teacher = F.linear(x["teacher_hidden"], x["teacher_weight"]).float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def ours(name: str, workspace: str | None = None) -> Contender:
    def call(x: Inputs) -> Any:
        student = LinearLogits(x["hidden"], x["weight"])
        teacher = LinearLogits(x["teacher_hidden"], x["teacher_weight"])
        return divergence(student, teacher, kind="forward_kl", workspace=workspace).mean()

    return Contender(name, call)


OURS = (
    ours("fused_losses"),
    ours("fused_losses 4GiB", "4GiB"),  # saves more gradients of logits for backward
    ours("fused_losses 64MiB", "64MiB"),
)


def reference(rows: Inputs, whole: Inputs) -> Any:
    student = linear_logits(rows["hidden"], rows["weight"])
    teacher = linear_logits(rows["teacher_hidden"], rows["teacher_weight"])
    return specification.divergence(student, teacher, "forward_kl").sum() / whole["hidden"].shape[0]


def work(problem: Problem) -> tuple[Work, Work]:
    """Two products forward, the student's and the teacher's; two backward, the student's gradients."""
    forward, backward = head_work(problem)
    return forward + forward, backward

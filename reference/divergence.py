"""What ``fused_losses.divergence`` computes, token by token, on whole logits, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    r""":math:`KL(p‖q) = \sum_j p_j \log(p_j/q_j)` of two distributions ``(V,)``, with 0·log 0 = 0."""
    there = p > 0
    return (p[there] * (p[there].log() - q[there].log())).sum()


def of_distributions(s: Tensor, t: Tensor, kind: str, beta: float) -> Tensor:
    """Divergence between a student's and a teacher's distribution ``(V,)``."""
    m = beta * t + (1 - beta) * s
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return relative_entropy(t, s)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return relative_entropy(s, t)
    if kind == "jsd":
        return beta * relative_entropy(t, m) + (1 - beta) * relative_entropy(s, m)
    if kind == "skewed_kl":
        return relative_entropy(t, m)
    if kind == "tvd":
        return (t - s).abs().sum() / 2
    if kind == "overlap":
        return torch.minimum(t, s).sum()
    raise ValueError(kind)


def divergence(
    student_logits: Tensor,  # (…, V)
    teacher_logits: Tensor,  # (…, V')
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # (…)
) -> Tensor:
    """One number per token, 0 where the mask is 0; both vocabularies are cut to the smaller."""
    V = min(student_logits.shape[-1], teacher_logits.shape[-1])
    students = student_logits[..., :V].reshape(-1, V)
    teachers = teacher_logits[..., :V].reshape(-1, V)
    counted = torch.ones(len(students), dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    found = []
    for student, teacher, counts in zip(students, teachers, counted, strict=True):
        if not counts:
            found.append(student.new_zeros(()))
            continue
        s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
        found.append(of_distributions(s, t, kind, beta))
    return (
        torch.stack(found).view(student_logits.shape[:-1])
        if found
        else student_logits.new_zeros(student_logits.shape[:-1])
    )

"""What ``fused_losses.distillation`` computes, token by token, on whole logits, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import divergence, of_distributions


def distillation_loss(
    student_logits: Tensor,  # (…, V)
    teacher_logits: Tensor,  # (…, V')
    labels: Tensor,  # (…), already shifted
    kind: str = "forward_kl",
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | None = None,
) -> Tensor:
    r"""``w_h·(−log p_y) + w_s·D(s_T, t_T)`` of each token with a label, ``D`` times ``T²`` if requested."""
    V = min(student_logits.shape[-1], teacher_logits.shape[-1])
    losses, count = [], 0
    for z_s, z_t, y in zip(
        student_logits[..., :V].reshape(-1, V),
        teacher_logits[..., :V].reshape(-1, V),
        labels.flatten().tolist(),
        strict=True,
    ):
        if y == ignore_index:
            losses.append(z_s.new_zeros(()))
            continue
        count += 1
        s, t = torch.softmax(z_s / temperature, -1), torch.softmax(z_t / temperature, -1)
        soft = of_distributions(s, t, kind, beta)
        if scale_by_temperature_squared:
            soft = soft * temperature**2
        losses.append(hard_weight * -torch.log_softmax(z_s, -1)[y] + soft_weight * soft)
    if reduction == "none":
        return torch.stack(losses).view(labels.shape)
    total = torch.stack(losses).sum()
    if reduction == "sum":
        return total
    return total / ((count if num_items_in_batch is None else num_items_in_batch) or 1)


def acceptance_rate(
    student_logits: Tensor,  # (…, V)
    teacher_logits: Tensor,  # (…, V')
    temperature: float = 1.0,
    mask: Tensor | None = None,  # (…)
) -> Tensor:
    r""":math:`\sum_j \min(t_j, s_j)` of each token."""
    return divergence(student_logits, teacher_logits, "overlap", temperature=temperature, mask=mask)


def kd_loss(logits: Tensor, teacher_logits: Tensor, label: Tensor, ignore_index: int = -100) -> Tensor:
    r""":math:`-\sum_j t_j \log s_j` over finite student logits, averaged over the tokens with a label; nan if there is none."""
    losses = []
    V = logits.shape[-1]
    for z_s, z_t, y in zip(logits.reshape(-1, V), teacher_logits.reshape(-1, V), label.flatten().tolist(), strict=True):
        if y != ignore_index:
            finite = z_s.isfinite()
            losses.append(-(torch.softmax(z_t, -1)[finite] * torch.log_softmax(z_s, -1)[finite]).sum())
    return torch.stack(losses).mean() if losses else logits.new_tensor(float("nan"))


def sparse_distillation_loss(
    student_logits: Tensor,  # (…, V)
    teacher_ids: Tensor,  # (…, K)
    teacher_log_probs: Tensor,  # (…, K)
    labels: Tensor | None = None,  # (…)
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: str = "bucket",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token ``(…)``: the divergence on the support, and the student's and the teacher's mass on it."""
    tokens, (V, K) = student_logits.shape[:-1], (student_logits.shape[-1], teacher_ids.shape[-1])
    y = torch.zeros(tokens.numel()) if labels is None else labels.flatten()
    found = []
    for z, ids, log_t, label in zip(
        student_logits.reshape(-1, V),
        teacher_ids.reshape(-1, K),
        teacher_log_probs.reshape(-1, K),
        y.tolist(),
        strict=True,
    ):
        if label == ignore_index:
            found.append(z.new_zeros(3))
            continue
        s, t = torch.softmax(z / temperature, -1)[ids], log_t.exp()
        masses = s.sum(), t.sum()
        if tail == "renormalize":
            s, t = s / s.sum(), t / t.sum()
        elif tail == "bucket":
            # Sum the other probabilities instead of taking 1 − Σ: accurate where the support holds nearly all of the mass.
            others = torch.ones_like(z, dtype=torch.bool).index_fill(0, ids, False)
            left = torch.softmax(z / temperature, -1)[others].sum()
            s = torch.cat([s, left.clamp(min=1e-7)[None]])
            t = torch.cat([t, (1 - t.sum()).clamp(min=1e-7)[None]])
        value = of_distributions(s, t, kind, beta)
        found.append(torch.stack([value.clamp(min=0) if tail == "ignore" else value, *masses]))
    loss, student_mass, teacher_mass = torch.stack(found).view(*tokens, 3).unbind(-1)
    return loss, student_mass, teacher_mass

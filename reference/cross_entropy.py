"""What ``fused_losses.cross_entropy`` computes, on whole logits, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    input: Tensor,  # (C), (N, C) or (N, C, d1, …)
    target: Tensor,  # indices (), (N) or (N, d1, …), or probabilities shaped like input
    weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""With labels ``t`` (one-hot for class indices), smoothed to :math:`t' = (1-ε)t + ε/C`,

    .. math:: \ell = -\sum_c w_c\,t'_c \log p_c + z\_loss·lse^2, \qquad p = softmax(softcap·\tanh(z/softcap))

    ``mean`` divides the first term by the sum of ``w_y`` (class indices) or by the number of positions (probabilities), and the
    second by the number of positions that are not ignored. It is nan if the weights of all targets are 0.
    """
    class_dim = 0 if input.ndim == 1 else 1
    z = input.movedim(class_dim, -1)  # (…, C)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    C = z.shape[-1]
    w = torch.ones(C, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    logp = z.log_softmax(-1)
    if target.shape == input.shape:
        t = target.to(z.dtype).movedim(class_dim, -1)
        counted = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device)
        share = counted.to(z.dtype)
    else:
        counted = target != ignore_index
        y = target.long().where(counted, 0)
        t = torch.nn.functional.one_hot(y, C).to(z.dtype)
        share = w[y] * counted
    labels = (1 - label_smoothing) * t + label_smoothing / C
    loss = -torch.where(labels * w == 0, 0, labels * w * logp).sum(-1).where(counted, 0)
    z_part = z_loss * z.logsumexp(-1).square().where(counted, 0)
    if reduction == "none":
        return loss + z_part
    if reduction == "sum":
        return loss.sum() + z_part.sum()
    mean = loss.sum() / share.sum() if share.sum() else loss.sum() * torch.nan
    return mean + z_part.sum() / counted.sum()

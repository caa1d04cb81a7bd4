"""Cross entropy of a linear head: first the logits, then every option in turn, one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: Tensor | None = None,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Hidden states ``(N, H)``, a head ``(C, H)``, targets ``(N,)`` of class indices or ``(N, C)`` of class probabilities.

    .. math::
        z = softcap·\tanh(scale·(h W^\top + u B^\top + b)/softcap)/T, \qquad
        \ell_n = \sum_c w_c\,t_{n,c}\,(lse_n - z_{n,c}), \qquad t = (1-ε)·target + ε/C

    plus ``z_loss·lse²``, all times the token's weight. With class indices the smoothed part keeps each class's weight, and the
    mean divides by the summed weights of the targets, except for the z-loss, whose mean is over the tokens that count. The mean
    is nan if the weights of all targets are 0.
    """
    x = input @ linear_weight.T
    if low_rank is not None:
        x = x + low_rank[0] @ low_rank[1].T
    if linear_bias is not None:
        x = x + linear_bias
    x = scale * x
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if temperature is not None:
        x = x / temperature[:, None]
    N, C = x.shape
    w = x.new_ones(C) if weight is None else weight
    losses, squares, shares, count = [], [], [], 0
    for n in range(N):
        hard = target.ndim == 1
        if hard and target[n] == ignore_index:
            losses.append(x.new_zeros(()))
            squares.append(x.new_zeros(()))
            shares.append(x.new_zeros(()))
            continue
        count += 1
        lse = torch.logsumexp(x[n], 0)
        t = torch.nn.functional.one_hot(target[n], C).to(x.dtype) if hard else target[n]
        t = (1 - label_smoothing) * t + label_smoothing / C
        factor = 1.0 if token_weights is None else token_weights[n]
        losses.append(factor * (w * t * (lse - x[n])).sum())
        squares.append(factor * z_loss * lse**2)
        shares.append(w[target[n]] if hard else x.new_ones(()))
    loss, square, share = (torch.stack(v) if N else x.new_zeros(0) for v in (losses, squares, shares))
    if reduction == "none":
        return loss + square
    if reduction == "sum":
        return (loss + square).sum()
    mean = loss.sum() / share.sum() if share.sum() else loss.sum() * torch.nan
    return mean + square.sum() / count if z_loss else mean

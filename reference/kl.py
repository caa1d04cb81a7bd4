"""KL estimators, token by token: ``d = log_prob − ref_log_prob``.

k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d, abs = |d|.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _estimate(d: Tensor, kind: str) -> Tensor:
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    if kind == "k3":
        return torch.exp(-d) - 1 + d
    return d if d >= 0 else -d


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kind: str = "k3",
    *,
    mask: Tensor | None = None,
    clamp: float | None = None,
    gradient: str = "own",
    old_log_probs: Tensor | None = None,
) -> Tensor:
    """Value: the estimate, clamped to ±clamp. Gradient: that of the clamped estimate, or of ``w·k2`` without the clamp.

    ``w = min(exp(log_prob − old_log_prob), 10)`` is a constant; 1 without ``old_log_probs``. Masked tokens give 0.
    """
    tokens = []
    for index in range(log_probs.numel()):
        logp = log_probs.reshape(-1)[index]
        d = logp - ref_log_probs.reshape(-1)[index]
        if mask is not None and mask.reshape(-1)[index] == 0:
            tokens.append(torch.zeros_like(d))
            continue
        estimate = _estimate(d, kind)
        if clamp is not None and estimate > clamp:
            estimate = torch.full_like(d, clamp)
        elif clamp is not None and estimate < -clamp:
            estimate = torch.full_like(d, -clamp)
        if gradient == "k2":
            weight = 1.0
            if old_log_probs is not None:
                weight = min(torch.exp(logp - old_log_probs.reshape(-1)[index]).item(), 10.0)
            through = weight * _estimate(d, "k2")
            estimate = estimate.detach() + (through - through.detach())
        tokens.append(estimate)
    return torch.stack(tokens).reshape(log_probs.shape)


def kl_biased(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean(d) over the tokens that count."""
    return kl_penalty(log_probs, ref_log_probs, "biased", mask)


def kl_unbiased(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean(exp(d) − 1 − d) over the tokens that count."""
    return kl_penalty(log_probs, ref_log_probs, "unbiased", mask)


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, mode: str = "unbiased", mask: Tensor | None = None) -> Tensor:
    """The mean, over the tokens that count, of d ("biased") or of exp(d) − 1 − d ("unbiased")."""
    total, count = log_probs.new_zeros(()), 0
    for index in range(log_probs.numel()):
        if mask is not None and mask.reshape(-1)[index] == 0:
            continue
        d = log_probs.reshape(-1)[index] - ref_log_probs.reshape(-1)[index]
        total = total + (d if mode == "biased" else torch.exp(d) - 1 - d)
        count += 1
    return total / max(count, 1)

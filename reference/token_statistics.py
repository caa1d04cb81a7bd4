"""What ``fused_losses.token_statistics`` computes, on whole logits, in the dtype it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def token_statistics(
    logits: Tensor, index: Tensor | None = None, temperature: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Every statistic of logits ``(…, V)`` for ids ``(…)`` or ``(…, K)``; tokens whose ids are all −100 give 0."""
    z = logits / (temperature[..., None] if isinstance(temperature, Tensor) and temperature.ndim else temperature)
    logp = z.log_softmax(-1)
    p = logp.exp()
    found = {
        "entropy": -torch.where(p == 0, 0, p * logp).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "max_logit": z.amax(-1),
    }
    if index is None:
        return found
    ids = index if index.ndim == logits.ndim else index[..., None]
    found["is_top1"] = z.argmax(-1) == ids[..., 0]
    skipped = (ids == -100).all(-1)
    found = {name: value.masked_fill(skipped, 0) for name, value in found.items()}
    log_probs = logp.gather(-1, ids.clamp(min=0)).masked_fill(ids == -100, 0)
    return found | {"log_probs": log_probs.view(index.shape)}


def selective_log_softmax(logits: Tensor, index: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    return token_statistics(logits, index, temperature)["log_probs"]

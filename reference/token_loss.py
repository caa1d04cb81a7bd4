"""A sum over tokens of a function of their statistics, on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def token_loss(
    fn: Callable[..., Any], logits: Tensor, index: Tensor, *per_token: Tensor
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """``Σ_n fn(statistics of row n, x_n)`` over the rows of ``logits`` ``(N, V)`` that have an id in ``index``.

    ``fn`` receives one row at a time, with every statistic there is, each ``(1,)`` (``log_probs`` ``(1, K)`` for an
    ``index`` ``(N, K)`` in place of ``(N,)``).
    """
    total = logits.new_zeros(())
    collected: dict[str, list[Tensor]] = {}
    for n, z in enumerate(logits):
        if bool((index[n] == -100).all()):
            continue
        logp = z - torch.logsumexp(z, 0)
        p = logp.exp()
        at = torch.stack([logp[i] if i != -100 else logp.new_zeros(()) for i in index[n].reshape(-1).tolist()])
        statistics = SimpleNamespace(
            log_probs=at.view(1, -1) if index.ndim == 2 else at,
            entropy=-(p * logp).sum().view(1),
            logsumexp=torch.logsumexp(z, 0).view(1),
            log_sum_sq_probs=p.square().sum().log().view(1),
            mean_logits=z.mean().view(1).detach(),
            max_logit=z.max().view(1).detach(),
            is_top1=(z.argmax() == index[n].reshape(-1)[0]).view(1),
        )
        result = fn(statistics, *(x[n : n + 1] for x in per_token))
        value, aux = result if isinstance(result, tuple) else (result, {})
        total = total + value.sum()
        for name, x in aux.items():
            collected.setdefault(name, []).append(x.detach())
    return total, collected

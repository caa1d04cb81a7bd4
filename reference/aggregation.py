"""Aggregation of one loss per token into one number, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tokens_of(mask: Tensor) -> list[list[int]]:
    return [[t for t in range(mask.shape[1]) if mask[b, t] != 0] for b in range(mask.shape[0])]


def mean_of(numbers: list) -> Any:
    return sum(numbers) / max(len(numbers), 1)


def aggregate(
    loss: Tensor,
    mask: Tensor | None = None,
    aggregation: str = "token_mean",
    *,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    dp_size: int = 1,
    loss_scale_factor: float | None = None,
    count_empty: bool = True,
) -> Tensor:
    """token_mean Σ/Σn, token_sum Σ/c; seq_mean_token_mean mean(Σ/n), seq_mean_token_sum mean(Σ), …_norm mean(Σ)/c."""
    rows = tokens_of(torch.ones_like(loss) if mask is None else mask)
    sums: Any = [sum((loss[b, t] for t in row), torch.zeros_like(loss[0, 0])) for b, row in enumerate(rows)]
    if aggregation == "token_sum":
        return sum(sums) / (loss_scale_factor or 1) * dp_size
    if aggregation == "token_mean":
        return sum(sums) / (batch_num_tokens or max(sum(map(len, rows)), 1)) * dp_size
    sequences = [b for b, row in enumerate(rows) if row or count_empty]
    if aggregation == "seq_mean_token_mean":
        total = sum(sums[b] / max(len(rows[b]), 1) for b in sequences)
    else:
        total = sum(sums[b] for b in sequences)
    if aggregation == "seq_mean_token_sum_norm":
        total = total / (loss_scale_factor or loss.shape[1])
    return total / (global_batch_size or max(len(sequences), 1)) * dp_size

"""Sums and means over the tokens of a sequence, one document and one token at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def borders_of(position_ids: list[int]) -> list[int]:
    """Where a packed row's documents start, and its length: a document starts at index 0 and at every position 0."""
    starts = [t for t, position in enumerate(position_ids) if t == 0 or position == 0]
    return [*starts, len(position_ids)]


def sums_and_counts(x: Tensor, borders: list[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""For each document ``i`` of ``(total,)`` tokens :math:`\sum_{t=b_i}^{b_{i+1}-1} m_t x_t` and :math:`\sum_t m_t`."""
    sums, counts = [], []
    for start, end in pairwise(borders):
        shown = [x[t] for t in range(start, end) if mask is None or mask[t]]
        sums.append(sum(shown, x.new_zeros(())))
        counts.append(len(shown))
    return torch.stack(sums), torch.tensor(counts)


def sequence_log_probs(token_logps: Tensor, mask: Tensor | None = None, average: bool = False) -> Tensor:
    r""":math:`\sum_t m_t \log p_{b,t}` for each row ``b`` of ``(B, S)``; with ``average`` divided by :math:`\sum_t m_t`."""
    rows = []
    for b in range(token_logps.shape[0]):
        shown = [token_logps[b, t] for t in range(token_logps.shape[1]) if mask is None or mask[b, t]]
        total = sum(shown, token_logps.new_zeros(()))
        rows.append(total * float("nan") if average and not shown else total / len(shown) if average else total)
    return torch.stack(rows)


def shift_labels(labels: Tensor, ignore_index: int = -100, borders: list[int] | None = None) -> Tensor:
    """``labels[b, t + 1]`` at ``[b, t]``; ``ignore_index`` at the last token of a row and of a document."""
    shifted = torch.full_like(labels, ignore_index)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if borders is None or t + 1 not in borders:
                shifted[b, t] = labels[b, t + 1]
    return shifted

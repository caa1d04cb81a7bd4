"""Supervised fine-tuning, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def dft(log_probs: Tensor) -> Tensor:
    r""":math:`-p \log p` of each token, with ``p`` a constant."""
    p = torch.tensor([math.exp(x) for x in log_probs.flatten().tolist()], dtype=log_probs.dtype)
    return -p.reshape(log_probs.shape) * log_probs


def next_tokens(labels: list[int], ignore_index: int, starts: list[int]) -> list[tuple[int, int]]:
    """``(t, labels[t + 1])`` wherever that label is trained on and does not start a document."""
    return [(t, labels[t + 1]) for t in range(len(labels) - 1) if labels[t + 1] != ignore_index and t + 1 not in starts]


def sft_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    num_items_in_batch: int | None = None,
    *,
    average: str = "token",
    loss_type: str = "nll",
    borders: list[int] | None = None,
) -> Tensor:
    r"""Mean over the labelled tokens of :math:`-\log p_t(y_{t+1})`, or mean of the sequences' means; 0 with no label.

    ``(B, S, V)`` logits and ``(B, S)`` labels. ``borders``: where the documents of the one packed row start and end; each
    is a sequence. ``num_items_in_batch`` replaces the number of terms as the divisor.
    """
    sequences: list[list[Tensor]] = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        starts = borders or [0]
        by_document: dict[int, list[Tensor]] = {}
        for t, token in next_tokens(y, ignore_index, starts):
            logp = z[t, token] - torch.logsumexp(z[t], 0)
            loss = dft(logp) if loss_type == "dft" else -logp
            by_document.setdefault(max(start for start in starts if start <= t), []).append(loss)
        sequences += by_document.values()
    if average == "sequence":
        terms = [torch.stack(losses).mean() for losses in sequences]
    else:
        terms = [loss for losses in sequences for loss in losses]
    total = sum(terms, torch.zeros((), dtype=logits.dtype))
    return total / ((len(terms) if num_items_in_batch is None else num_items_in_batch) or 1)


def sft_loss_numpy(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int = -100, num_items_in_batch: int | None = None
) -> float:
    """The token mean in NumPy, float64: shift, log-softmax, pick, average; 0 when nothing is left."""
    z, y = np.asarray(logits, dtype=np.float64)[:, :-1], np.asarray(labels)[:, 1:]
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    kept = y != ignore_index
    total = -np.take_along_axis(log_p, np.where(kept, y, 0)[..., None], -1)[..., 0][kept].sum()
    return float(total / max(kept.sum() if num_items_in_batch is None else num_items_in_batch, 1))

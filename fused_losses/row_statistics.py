"""The statistics that one pass over a row of logits yields, and how their gradients become the gradient of the row.

For a row ``z`` of ``V`` logits, ``logp = z − logsumexp(z)``, ``p = exp(logp)``. Every loss with hard labels is a
function of a few numbers of the row, and its gradient has one form:

    dz_j = p_j (a + b logp_j + e p_j) + Σ_k c_k 1[j = ids_k] + d w_j

with one number per row for each of ``a, b, e, d`` and one per id for ``c``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numerics import statistics_dtype, wide_dtype

READ_IN_BACKWARD = ("logsumexp", "entropy", "log_sum_sq_probs", "weight_sum")


def part_of(t: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if t is None else t[rows]


def slices(total: int, size: int) -> Iterator[slice]:
    for i in range(-(-total // size)):  # over a count, so that Dynamo need not recompile for another total
        yield slice(i * size, min((i + 1) * size, total))


# None where not asked for. Any, not None, which callers would have to rule out although they named the fields they read.
Statistic = Tensor | Any


class RowStatistics(NamedTuple):
    """Statistics of ``N`` rows; ``None`` where not asked for.

    The numbers that enter a row's gradient are float64: rounding ``logsumexp`` alone to fp32 would cause a relative error of
    |logsumexp|·6e-8 in every probability of the row.
    """

    log_probs: Statistic = None  # (N, K) fp32 (float64 for float64 logits): logp at each id, never positive
    logsumexp: Statistic = None  # (N,) float64
    entropy: Statistic = None  # (N,) float64, −Σ p logp
    log_sum_sq_probs: Statistic = None  # (N,) float64, log Σ p²
    sum_log_probs: Statistic = None  # (N,) float64, Σ w logp, w the column weights or 1; see label_weights
    weight_sum: Statistic = None  # (N,) float64, Σ w, where it differs by row or ranks share the vocabulary
    max_logit: Statistic = None  # (N,) fp32 (float64 for float64 logits)
    is_top1: Statistic = None  # (N,) bool: ids[:, 0] is the first of the largest logits

    def put(self, found: RowStatistics, rows: slice | Tensor) -> None:
        """Write the statistics ``found`` for the given rows."""
        for total, part in zip(self, found, strict=True):
            if total is not None and part is not None:
                total[rows] = part

    def for_backward(self) -> list[Tensor | None]:
        """Copies of the statistics that backward reads: the caller may modify the tensors it was given."""
        return [None if s is None else s.clone() for s in (getattr(self, name) for name in READ_IN_BACKWARD)]

    @classmethod
    def saved(cls, copies: Sequence[Tensor | None]) -> RowStatistics:
        """The statistics that :meth:`for_backward` copied."""
        return cls(**dict(zip(READ_IN_BACKWARD, copies, strict=True)))


def label_weights(
    column_weight: Tensor | None, probabilities: Tensor | None, label_smoothing: float, vocab: int
) -> Tensor | None:
    """``w``: column weights ``(V,)``, with class probabilities ``t`` ``(n, V)`` times ``(1 − ε) t + ε/V``; None means ones."""
    if probabilities is None:
        return column_weight
    w = ((1 - label_smoothing) * probabilities).add_(label_smoothing / vocab) if label_smoothing else probabilities
    return w if column_weight is None else w * column_weight


def total_weight(column_weight: Tensor | None, vocab: int) -> Tensor | float:
    """``Σ_j w_j`` of weights that are the same in every row."""
    return vocab if column_weight is None else column_weight.sum(dtype=wide_dtype(column_weight.device))


def empty_statistics(like: Tensor, rows: int, ids: Tensor | None, outputs: Collection[str]) -> RowStatistics:
    """Empty tensors for statistics of ``rows`` rows: ``outputs``, ``logsumexp``, and ``log_probs`` if there are ids."""
    dtype = statistics_dtype(like.dtype)
    dtypes = {"max_logit": dtype, "is_top1": torch.bool}
    found: dict[str, Tensor] = {
        name: like.new_empty(rows, dtype=dtypes.get(name, wide_dtype(like.device)))
        for name in RowStatistics._fields
        if name == "logsumexp" or (name in outputs and name != "log_probs")
    }
    if ids is not None:
        found["log_probs"] = like.new_empty(ids.shape, dtype=dtype)
    return RowStatistics(**found)


def only(found: Sequence[Tensor | None], outputs: Collection[str], ids: bool) -> RowStatistics:
    """Those of a :class:`RowStatistics` that were asked for, ``logsumexp`` and, with ids, ``log_probs``."""
    asked = {"logsumexp", "log_probs" if ids else "", *outputs}
    return RowStatistics(*(s if name in asked else None for name, s in zip(RowStatistics._fields, found, strict=True)))


class Coefficients(NamedTuple):
    """The per-row coefficients in the form of the gradient, ``(N,)`` each and ``c`` ``(N, K)``; ``None`` is zero."""

    a: Tensor | None = None
    b: Tensor | None = None
    e: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None


def skipped(ids: Tensor | None) -> Tensor | None:
    """Rows ``(N,)`` whose ids are all −100."""
    return None if ids is None else (ids == -100).all(-1)


def without_ignored(upstream: RowStatistics, ids: Tensor | None) -> RowStatistics:
    """Zeroes the gradient of the log-probability of an id −100 that stands beside others: it is the constant 0."""
    if ids is None or ids.shape[-1] == 1 or upstream.log_probs is None:
        return upstream
    return upstream._replace(log_probs=upstream.log_probs.masked_fill(ids == -100, 0))


def coefficients(
    upstream: RowStatistics, statistics: RowStatistics, vocab: int, column_weight: Tensor | None, dtype: torch.dtype
) -> Coefficients:
    """Turn gradients of the statistics into the coefficients of the rows' gradient.

    Args:
        upstream: a gradient per statistic, shaped like it; ``None`` where the loss does not use it.
        statistics: the statistics themselves; ``entropy``, ``log_sum_sq_probs`` and ``weight_sum`` are read.
        vocab: ``V``.
        column_weight: ``w`` ``(V,)``, or None for ones.
        dtype: of the coefficients, fp32 or float64.
    """
    a: Tensor | None = None
    b = c = d = e = None

    def plus(total: Tensor | None, term: Tensor) -> Tensor:
        return term if total is None else total + term

    if (g := upstream.log_probs) is not None:
        c, a = g, plus(a, -g.sum(-1))
    if (g := upstream.logsumexp) is not None:
        a = plus(a, g)
    if (g := upstream.entropy) is not None:
        a, b = plus(a, -g * statistics.entropy), -g
    if (g := upstream.log_sum_sq_probs) is not None:
        a, e = plus(a, -2 * g), 2 * g * torch.exp(-statistics.log_sum_sq_probs)
    if (g := upstream.sum_log_probs) is not None:
        total: Tensor | float | None = statistics.weight_sum
        if total is None:
            total = total_weight(column_weight, vocab)
        a, d = plus(a, -g * total), g
    return Coefficients(*(None if t is None else t.to(dtype).contiguous() for t in (a, b, e, c, d)))

"""Statistics of rows of logits, and their gradient, a chunk of rows at a time. See ``kernels/softmax_rows.py``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from ..numerics import statistics_dtype, wide_dtype, wide_sums
from ..row_statistics import RowStatistics, empty_statistics, label_weights, part_of, skipped, total_weight

LOG2_E = 1 / math.log(2)
CHUNK_ELEMENTS = 2**19  # fp32 elements of a chunk of rows and its copies together: 2 MiB, which stays in a core's cache


def copies_held(softcap: float | None, probabilities: bool = False) -> int:
    """How many copies of a chunk of rows are held at once: the rows, the softcap's slope, and the probabilities."""
    return 1 + (softcap is not None) + probabilities


def labels_held(
    probabilities: Tensor | None, column_weight: Tensor | None, label_smoothing: float, dtype: torch.dtype
) -> int:
    """How many copies of a chunk of rows it takes to make the :func:`label_weights`."""
    if probabilities is None:
        return 0
    return (probabilities.dtype != dtype) + (label_smoothing != 0) + (column_weight is not None)


def rows_at_once(rows: int, vocab: int, copies: int, device: torch.device) -> int:
    """How many rows a chunk has: all its copies together hold ``CHUNK_ELEMENTS``, or one row each.

    A GPU without Triton takes four times as many, so that a launch does not take longer than the work that it starts.
    """
    elements = CHUNK_ELEMENTS if device.type == "cpu" else 4 * CHUNK_ELEMENTS
    return max(1, math.ceil(min(rows, elements // max(vocab, 1)) / copies))


def row_chunks(logits: Tensor, *others: Tensor | None, copies: int = 1) -> Iterator[tuple[Any, ...]]:
    """Yield ``(rows, chunk, ...)``: a slice of the ``N = B·S`` rows, and the views ``(…, V)`` of each ``(B, V, S)`` tensor."""
    B, V, S = logits.shape
    n = rows_at_once(B * S, V, copies, logits.device)
    step_b, step_s = max(1, n // max(S, 1)), min(n, max(S, 1))
    for b in range(0, B, step_b):
        for s in range(0, S, step_s):
            part = (slice(b, b + step_b), slice(None), slice(s, s + step_s))
            views: list[Any] = [None if t is None else t[part].transpose(1, 2) for t in (logits, *others)]
            start = b * S + s
            yield slice(start, start + views[0].shape[:2].numel()), *views


def rows_buffer(logits: Tensor, copies: int = 1) -> Tensor:
    """A buffer ``(n, V)`` that all chunks share: fresh memory pages cost more than the arithmetic on them."""
    B, V, S = logits.shape
    return logits.new_empty(
        min(B * S, rows_at_once(B * S, V, copies, logits.device)), V, dtype=statistics_dtype(logits.dtype)
    )


def upcast_rows(chunk: Tensor, buffer: Tensor) -> Tensor:
    """The rows ``(n, V)`` of a chunk in the dtype of ``buffer``: copied there unless they have that dtype already."""
    x = chunk.reshape(-1, chunk.shape[-1])
    return x if x.dtype == buffer.dtype else buffer[: len(x)].copy_(x)


def exp_(x: Tensor) -> Tensor:
    """``exp(x)``, written over ``x``. PyTorch's exp is MKL's, which takes four times as long as its exp2 on an AMD CPU."""
    return x.mul_(LOG2_E).exp2_()


def floor(dtype: torch.dtype) -> float:
    """The initial running maximum: finite, so that −inf logits never make −inf − −inf, and no finite logit is less."""
    return torch.finfo(dtype).min


def transform(
    x: Tensor,
    temperature: Tensor | None,
    scale: float,
    softcap: float | None,
    out: Tensor | None = None,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor | float]:
    """``z = softcap·tanh(scale·x/softcap)/temperature`` of rows ``(n, V)``, and ``dz/dx`` if ``with_slope``.

    ``z`` is ``x`` itself if there is nothing to do; otherwise it is written to ``out``, which may be ``x``.
    """
    slope: Tensor | float = scale
    z = x
    if scale != 1.0:
        z = torch.mul(z, scale, out=out)
    if softcap is not None:
        t = torch.tanh(torch.div(z, softcap, out=out), out=out)
        slope = (t * t).neg_().add_(1).mul_(scale) if with_slope else slope
        z = torch.mul(t, softcap, out=out)
    if temperature is not None:
        t = temperature[:, None]
        z = torch.div(z, t, out=out)
        slope = slope.div_(t) if out is not None and isinstance(slope, Tensor) else slope / t
    return z, slope


def softmax_rows_fwd(
    logits: Tensor,  # (B, V, S), any strides
    ids: Tensor | None,  # (N, K) int64
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    *,
    probabilities: Tensor | None = None,  # (B, V, S), any strides
    label_smoothing: float = 0.0,  # of the probabilities
    scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str],
) -> RowStatistics:
    B, V, S = logits.shape
    out = empty_statistics(logits, B * S, ids, outputs)
    labels = labels_held(probabilities, column_weight, label_smoothing, statistics_dtype(logits.dtype))
    copies = copies_held(None, "entropy" in outputs) + labels
    buffer = rows_buffer(logits, copies)
    for rows, chunk, t in row_chunks(logits, probabilities, copies=copies):
        x = upcast_rows(chunk, buffer)
        z, _ = transform(x, part_of(temperature, rows), scale, softcap, buffer[: len(x)], with_slope=False)
        w = label_weights(column_weight, None if t is None else t.reshape(x.shape).to(x.dtype), label_smoothing, V)
        out.put(row_statistics(z, part_of(ids, rows), w, outputs, buffer), rows)
    return out


def row_statistics(
    z: Tensor, ids: Tensor | None, w: Tensor | None, outputs: Collection[str], buffer: Tensor | None = None
) -> RowStatistics:
    """The statistics of final logits ``(n, V)`` in the precision of statistics; differentiable if there is no ``buffer``."""
    V, wide = z.shape[1], wide_dtype(z.device)
    max_logit = z.detach().amax(-1, keepdim=True)
    top = z.argmax(-1) if "is_top1" in outputs else None
    # The maximum cancels out of every statistic but logsumexp.
    largest = max_logit.clamp(min=floor(z.dtype))
    shifted = z - largest if buffer is None else torch.sub(z, largest, out=buffer[: len(z)])
    label_shifted = None if ids is None else shifted.gather(-1, ids.clamp(0, V - 1))
    if "sum_log_probs" in outputs:
        if buffer is None:
            weighted = (shifted if w is None else shifted * w).sum(-1, dtype=wide)
        else:
            weighted = wide_sums(shifted, w)
    e = shifted.exp() if buffer is None or "entropy" in outputs else exp_(shifted)
    total = e.sum(-1).to(wide)
    log_total = total.log()
    skip = skipped(ids)

    def finish(value: Tensor, dtype: torch.dtype = z.dtype) -> Tensor:
        value = value.to(dtype)
        return value if skip is None else value.masked_fill(skip if value.ndim == 1 else skip[:, None], 0)

    found = {"logsumexp": finish(largest.squeeze(-1).to(wide) + log_total, wide)}
    if ids is not None and label_shifted is not None:
        inside = (ids >= 0) & (ids < V)
        log_probs = label_shifted - log_total[:, None]
        found["log_probs"] = finish(log_probs.masked_fill(~inside, 0))
    if "entropy" in outputs:
        e_log_e = e * shifted.masked_fill(e == 0, 0) if buffer is None else shifted.masked_fill_(e == 0, 0).mul_(e)
        found["entropy"] = finish(log_total - e_log_e.sum(-1) / total, wide)
    if "log_sum_sq_probs" in outputs:
        squares = e * e if buffer is None else e.square_()
        found["log_sum_sq_probs"] = finish(squares.sum(-1).to(wide).log() - 2 * log_total, wide)
    if "sum_log_probs" in outputs:
        if w is None:
            weight_sum = z.new_full((), V)
        else:
            weight_sum = w.sum(-1, dtype=wide) if buffer is None or w.ndim == 1 else wide_sums(w, None)
        found["sum_log_probs"] = finish(weighted - weight_sum * log_total, wide)
        if "weight_sum" in outputs:
            found["weight_sum"] = finish(weight_sum, wide)
    if "max_logit" in outputs:
        found["max_logit"] = finish(max_logit.squeeze(-1))
    if top is not None and ids is not None:
        found["is_top1"] = top == ids[:, 0]
    return RowStatistics(**found)


def softmax_rows_bwd(
    logits: Tensor,  # (B, V, S), any strides
    ids: Tensor | None,  # (N, K) int64
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    logsumexp: Tensor,  # (N,) float64
    a: Tensor | None,  # (N,)
    b: Tensor | None,  # (N,)
    e: Tensor | None,  # (N,)
    c: Tensor | None,  # (N, K)
    d: Tensor | None,  # (N,)
    *,
    probabilities: Tensor | None = None,  # (B, V, S), any strides
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_start: int = 0,
    out: Tensor | None = None,  # (B, V, S); may be logits itself
) -> Tensor:
    _, V, _ = logits.shape
    dtype = statistics_dtype(logits.dtype)
    out = torch.empty_like(logits) if out is None else out
    skip = skipped(ids)
    # float64 arithmetic once per row, not per logit: hi + lo is logsumexp.
    hi = logsumexp.to(dtype)
    lo = (logsumexp - hi.to(logsumexp.dtype)).to(dtype)
    labels = labels_held(probabilities, column_weight, label_smoothing, dtype)
    copies = copies_held(softcap, b is not None or e is not None) + labels
    buffer = rows_buffer(logits, copies)
    for rows, chunk, t, grad in row_chunks(logits, probabilities, out, copies=copies):
        x = upcast_rows(chunk, buffer)
        in_place = grad.is_contiguous() and grad.dtype == dtype
        logp = grad.view(x.shape) if in_place else buffer[: len(x)]
        z, slope = transform(x, part_of(temperature, rows), scale, softcap, out=logp)
        torch.sub(z, hi[rows, None], out=logp)
        if b is None and e is None:
            # p·a alone: lo, the rest of logsumexp, goes into the row's factor.
            dz = exp_(logp).mul_(0.0 if a is None else (a[rows] * (-lo[rows]).exp())[:, None])
        else:
            p = logp.sub_(lo[rows, None]).exp()
            dz = logp.zero_() if b is None else logp.masked_fill_(p == 0, 0).mul_(b[rows, None])
            if a is not None:
                dz += a[rows, None]
            if e is not None:
                dz.addcmul_(e[rows, None], p)
            dz.mul_(p)
            del p  # frees its memory for the next chunk
        w = label_weights(column_weight, None if t is None else t.reshape(x.shape).to(dtype), label_smoothing, V)
        local = None if ids is None else ids[rows] - vocab_start
        d_, c_, skip_ = (part_of(t, rows) for t in (d, c, skip))
        finish_gradient(dz, w, d_, local, c_, slope, skip_)
        if dz.data_ptr() != grad.data_ptr():
            grad.copy_(dz.view(grad.shape))
        del slope  # frees its memory for the next chunk
    return out


def finish_gradient(
    dz: Tensor,  # (n, V): p (a + b logp + e p), to which the rest is added in place
    w: Tensor | None,  # (V,) or (n, V)
    d: Tensor | None,  # (n,)
    ids: Tensor | None,  # (n, K)
    c: Tensor | None,  # (n, K)
    slope: Tensor | float,  # dz/dx
    skip: Tensor | None,  # (n,) rows whose gradient is 0
) -> None:
    if d is not None:
        dz = dz.add_(d[:, None]) if w is None else dz.addcmul_(d[:, None], w.to(dz.dtype))
    if ids is not None and c is not None:
        inside = (ids >= 0) & (ids < dz.shape[1])
        ids, values = ids.clamp(0, dz.shape[1] - 1), c.masked_fill(~inside, 0)
        for k in range(ids.shape[1]):  # one id at a time: repeated ids add in order
            dz.scatter_add_(-1, ids[:, k : k + 1], values[:, k : k + 1])
    if isinstance(slope, Tensor) or slope != 1.0:
        dz *= slope
    if skip is not None and (skip.device.type != "cpu" or skip.any()):  # on a GPU the check would wait
        dz.masked_fill_(skip[:, None], 0)


def softmax_rows_fwd_bwd(
    logits: Tensor,  # (N, V), overwritten with their gradient
    ids: Tensor,  # (N, 1) int64
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    of_log_probs: Tensor,  # (N,)
    of_sum_log_probs: Tensor | None,  # (N,)
    of_square: Tensor | None,  # (N,)
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str],
) -> RowStatistics:
    """Statistics, and the gradient of ``of_log_probs·logp + of_sum_log_probs·Σ_j w_j logp_j + of_square·logsumexp²``."""
    N, V = logits.shape
    out = empty_statistics(logits, N, ids, outputs)
    dtype, buffer = statistics_dtype(logits.dtype), rows_buffer(logits[..., None], copies_held(softcap))
    for rows, chunk in row_chunks(logits[..., None], copies=copies_held(softcap)):
        x = upcast_rows(chunk, buffer)
        z, slope = transform(x, part_of(temperature, rows), scale, softcap, out=x)
        found = row_statistics(z, ids[rows], column_weight, {*outputs, "max_logit"}, x)
        out.put(found, rows)
        assert found.max_logit is not None
        assert found.logsumexp is not None
        a = -of_log_probs[rows]
        if of_sum_log_probs is not None:
            a = a - of_sum_log_probs[rows] * total_weight(column_weight, V)
        if of_square is not None:
            a = a + 2 * of_square[rows] * found.logsumexp
        # x now holds exp(z − max)
        p_over_x = (found.max_logit.clamp(min=floor(dtype)) - found.logsumexp).exp()
        dz = x.mul_((a * p_over_x).to(dtype)[:, None])
        d = None if of_sum_log_probs is None else of_sum_log_probs[rows].to(dtype)
        finish_gradient(dz, column_weight, d, ids[rows], of_log_probs[rows, None].to(dtype), slope, skipped(ids[rows]))
        if dz.data_ptr() != chunk.data_ptr():
            chunk.copy_(dz.view(chunk.shape))
        del slope  # frees its memory for the next chunk
    return out

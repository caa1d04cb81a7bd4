"""Statistics of the rows of logits that a head would make, and the gradient of those logits, a tile at a time.

See ``kernels/linear_softmax.py``.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..numerics import statistics_dtype, wide_dtype, wide_sums
from ..products import add_product, product
from ..row_statistics import RowStatistics, part_of, skipped, slices, total_weight
from .softmax_rows import floor, softmax_rows_bwd, transform

LowRank = tuple[Tensor, Tensor]  # u (N, R), B (V, R)
TILE = 768  # tokens, and vocabulary entries, of a tile: 2.25 MiB in fp32; a few tiles are alive at once


def tile_side(device: torch.device) -> int:
    """Tokens, and entries, of a tile; twice as many of each on a GPU where PyTorch multiplies (T4): see ``rows_at_once``."""
    return TILE if device.type == "cpu" else 2 * TILE


def logits_tile(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, rows: slice, columns: slice
) -> Tensor:
    tile = product(hidden[rows], weight[columns])
    if low_rank is not None:
        add_product(tile, low_rank[0][rows], low_rank[1][columns].t(), first=False)
    if bias is not None:
        tile += bias[columns]
    return tile


def linear_softmax_fwd(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,
    ids: Tensor | None,  # (N, K) int64
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    outputs: Collection[str],
    saved_logits: Tensor | None = None,  # (N, v), written to: the first v logits of each row
) -> RowStatistics:
    N, V, dtype, wide = hidden.shape[0], weight.shape[0], statistics_dtype(hidden.dtype), wide_dtype(hidden.device)
    largest = hidden.new_full((N,), floor(dtype), dtype=dtype)
    total, weighted, squares, column_sum = hidden.new_zeros((4, N), dtype=wide)
    max_logit = hidden.new_full((N,), -torch.inf, dtype=dtype)
    top1 = torch.zeros(N, dtype=torch.int64, device=hidden.device)
    at_ids = None if ids is None else hidden.new_zeros(ids.shape, dtype=dtype)
    side = tile_side(hidden.device)
    for columns in slices(V, side):
        w = None if column_weight is None else column_weight[columns].to(wide)
        for rows in slices(N, side):
            x = logits_tile(hidden, weight, bias, low_rank, rows, columns)
            if saved_logits is not None and columns.start < saved_logits.shape[1]:
                part = saved_logits[rows, columns]
                part.copy_(x[:, : part.shape[1]])
            z, _ = transform(x, part_of(temperature, rows), scale, softcap, out=x, with_slope=False)
            if at_ids is not None and ids is not None:
                local = ids[rows] - columns.start
                inside = (local >= 0) & (local < z.shape[1])
                at_ids[rows] = torch.where(inside, z.gather(-1, local.clamp(0, z.shape[1] - 1)), at_ids[rows])
            if "max_logit" in outputs or "is_top1" in outputs:
                value, index = z.max(-1)
                top1[rows] = torch.where(value > max_logit[rows], index + columns.start, top1[rows])
                max_logit[rows] = torch.maximum(max_logit[rows], value)
            if "sum_log_probs" in outputs:
                column_sum[rows] += wide_sums(z, w)
            before = largest[rows]
            after = torch.maximum(before, z.amax(-1))
            shifted = z.sub_(after[:, None])
            e = shifted.exp() if "entropy" in outputs else shifted.exp_()
            decay = (before - after).to(wide).exp()
            if "entropy" in outputs:
                moved = weighted[rows] + (before - after).to(wide).masked_fill(total[rows] == 0, 0) * total[rows]
                weighted[rows] = decay * moved + shifted.masked_fill_(e == 0, 0).mul_(e).sum(-1).to(wide)
            total[rows] = decay * total[rows] + e.sum(-1).to(wide)
            if "log_sum_sq_probs" in outputs:
                squares[rows] = decay * decay * squares[rows] + e.square_().sum(-1).to(wide)
            largest[rows] = after
            del x, z, shifted, e  # frees their memory for the next tile
    log_total = total.log()
    skip = skipped(ids)

    def finished(value: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        if skip is not None:
            value = value.masked_fill(skip if value.ndim == 1 else skip[:, None], 0)
        return value.to(dtype)

    logsumexp = largest.to(wide) + log_total
    log_probs = None
    if at_ids is not None and ids is not None:
        log_probs = (at_ids - largest[:, None]) - log_total[:, None].to(dtype)
        log_probs = finished(log_probs.masked_fill((ids < 0) | (ids >= V), 0))
    return RowStatistics(
        log_probs=log_probs,
        logsumexp=finished(logsumexp, wide),
        entropy=finished(log_total - weighted / total, wide) if "entropy" in outputs else None,
        log_sum_sq_probs=finished(squares.log() - 2 * log_total, wide) if "log_sum_sq_probs" in outputs else None,
        sum_log_probs=finished(column_sum - total_weight(column_weight, V) * logsumexp, wide)
        if "sum_log_probs" in outputs
        else None,
        max_logit=finished(max_logit) if "max_logit" in outputs else None,
        is_top1=finished(top1 == ids[:, 0], torch.bool) if "is_top1" in outputs and ids is not None else None,
    )


def linear_softmax_d_logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H): a slice of the head, as bias, low_rank's B and column_weight are
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,
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
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_start: int = 0,
    out: Tensor | None = None,  # (N, V)
) -> Tensor:
    N, V = hidden.shape[0], weight.shape[0]
    out = hidden.new_empty(N, V) if out is None else out
    side = tile_side(hidden.device)
    for columns in slices(V, side):
        for rows in slices(N, side):
            tile = logits_tile(hidden, weight, bias, low_rank, rows, columns)
            softmax_rows_bwd(
                tile.unsqueeze(-1),
                part_of(ids, rows),
                part_of(column_weight, columns),
                part_of(temperature, rows),
                logsumexp[rows],
                *(part_of(coefficient, rows) for coefficient in (a, b, e, c, d)),
                scale=scale,
                softcap=softcap,
                vocab_start=vocab_start + columns.start,
                out=out[rows, columns].unsqueeze(-1),
            )
            del tile  # frees its memory for the next tile
    return out

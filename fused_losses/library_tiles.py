"""``kernels/linear_softmax.py`` for 32-bit heads on a GPU: the library multiplies a tile, then the row kernels read it.

Matrix instructions take fp32 as TF32, which is too coarse here; the library's IEEE product is as fast as any.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from .chunked.linear_softmax import LowRank
from .head import Head
from .planning import padded, tile_rows
from .row_statistics import RowStatistics, empty_statistics, part_of, slices


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
    from .kernels.softmax_rows import softmax_rows_fwd

    N, V = hidden.shape[0], weight.shape[0]
    head = Head(hidden, weight, bias, *(low_rank or (None, None)))
    out = empty_statistics(hidden, N, ids, outputs)
    n = min(N, tile_rows(V, hidden.dtype.itemsize))
    whole = saved_logits is not None and saved_logits.shape[1] >= V
    buffer = hidden.new_empty(0 if whole else n, padded(V))[:, :V]
    for rows in slices(N, max(n, 1)):
        tile = saved_logits[rows, :V] if saved_logits is not None and whole else buffer[: rows.stop - rows.start]
        logits = head.tokens(rows).write_logits(tile)
        if saved_logits is not None and not whole:
            saved_logits[rows] = logits[:, : saved_logits.shape[1]]
        found = softmax_rows_fwd(
            logits.unsqueeze(-1),
            part_of(ids, rows),
            column_weight,
            part_of(temperature, rows),
            scale=scale,
            softcap=softcap,
            outputs=outputs,
        )
        out.put(found, rows)
    return out


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
    out: Tensor,  # (N, V)
) -> Tensor:
    from .kernels.softmax_rows import softmax_rows_bwd

    logits = Head(hidden, weight, bias, *(low_rank or (None, None))).write_logits(out).unsqueeze(-1)
    softmax_rows_bwd(
        logits, ids, column_weight, temperature, logsumexp, a, b, e, c, d,
        scale=scale, softcap=softcap, vocab_start=vocab_start, out=logits,
    )  # fmt: skip
    return out

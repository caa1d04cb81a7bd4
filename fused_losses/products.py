"""Products of a gradient of the logits with a head's matrices, summed in fp32 or wider; of all columns, or of few."""

from __future__ import annotations

import torch
from torch import Tensor

GATHERED = 4096  # columns of a filtered product at a time
MOST = 0.75  # of the columns: beyond it gathering them costs about what it saves
BLOCK = 1024  # of a 16-bit matrix that is upcast, or of the vocabulary that is multiplied, at a time on a CPU


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``out = a b`` if ``first``, else ``out += a b``; an fp32 ``out`` of 16-bit factors sees no rounded product."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif out.is_cuda and first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        if first:
            out.zero_()
        for i in range(0, a.shape[0], BLOCK):
            for k in range(0, a.shape[1], BLOCK):
                out[i : i + BLOCK].addmm_(a[i : i + BLOCK, k : k + BLOCK].to(out.dtype), b[k : k + BLOCK].to(out.dtype))


def columns_to_multiply(d_logits: Tensor, gradient_filter: float) -> Tensor | None:
    """The columns of ``d_logits (n, V)`` with an element of at least ``gradient_filter`` times the largest; None: all.

    How many they are the host must know, so that it waits for the device.
    """
    n, V = d_logits.shape
    if not gradient_filter or not n or not V or torch.compiler.is_compiling():
        return None
    if d_logits.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if d_logits.is_cuda:
        largest = torch.linalg.vector_norm(d_logits, float("inf"), dim=0)
    else:  # twice as fast
        largest = torch.maximum(d_logits.amax(0), -d_logits.amin(0))
    below = largest < gradient_filter * largest.amax()
    columns = (~below).nonzero().squeeze(1)  # a nan is below nothing
    return columns if len(columns) <= MOST * V else None


def add_over_columns(
    out: Tensor,  # (n, H)
    d_logits: Tensor,  # (n, V)
    matrix: Tensor,  # (V, H)
    columns: Tensor | None,
    first: bool,
) -> None:
    """``out = d_logits matrix`` if ``first``, else ``out += d_logits matrix``: a sum over ``columns``, or over all."""
    if columns is None:
        return add_product(out, d_logits, matrix, first)
    total = out if out.dtype.itemsize > 2 else out.new_empty(out.shape, dtype=torch.float32)
    if first or total is not out:
        total.zero_()
    for part in columns.split(GATHERED):
        add_product(total, d_logits[:, part], matrix[part], first=False)
    if total is not out:
        out.copy_(total if first else total + out)
    return None


def add_at_columns(
    out: Tensor,  # (V, H)
    d_logits: Tensor,  # (n, V)
    x: Tensor,  # (n, H)
    columns: Tensor | None,
    first: bool,
) -> None:
    """``out = d_logitsᵀ x`` if ``first``, else ``out += d_logitsᵀ x``: in the rows at ``columns``, or in all."""
    if columns is None:
        return add_product(out, d_logits.t(), x, first)
    if first:
        out.zero_()
    for part in columns.split(GATHERED):
        rows = out[part]
        add_product(rows, d_logits[:, part].t(), x, first)
        out.index_copy_(0, part, rows)
    return None


def gathered_bytes(n: int, vocab: int, hidden: int, dtype: torch.dtype, sums: torch.dtype, on_cpu: bool) -> int:
    """What the products of some columns hold; ``sums``: of the weight's gradient."""
    columns = min(GATHERED, vocab)
    gathered = columns * (n * dtype.itemsize + hidden * max(dtype.itemsize, sums.itemsize))
    if dtype.itemsize > 2:
        return gathered
    upcast = 4 * BLOCK * (min(n, BLOCK) + hidden) if on_cpu else 0
    return gathered + 4 * n * hidden + upcast  # the sum over columns in fp32


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_cuda or x.dtype == dtype or x.shape[1] == 0:
        return x.sum(0, dtype=dtype)
    return torch.cat([x[:, i : i + BLOCK].sum(0, dtype=dtype) for i in range(0, x.shape[1], BLOCK)])

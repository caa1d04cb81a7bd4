"""Products with a head's matrices, summed in fp32 or wider; those of the logits' gradient take all its columns, or a few."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autodiff import host_may_read, traced
from .kernels.configurations import multiplies_matrices
from .numerics import statistics_dtype
from .row_statistics import slices

GATHERED = {"cpu": 2**22, "cuda": 2**25}  # bytes gathered at a time, of the logits' gradient and the weight
MOST = 0.5  # share of the columns beyond which gathering them may cost what it saves
BLOCK = 1024  # entries along a dimension that a CPU upcasts from 16 bits, or multiplies, at a time


def gives_fp32(x: Tensor) -> bool:
    """Whether PyTorch can multiply 16-bit factors like ``x`` with an fp32 result: on no CPU; in bfloat16 from sm_80 on; in
    float16 unless PyTorch is told to accumulate in float16."""
    if not x.is_cuda or traced(x):
        return x.is_cuda
    if x.dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return multiplies_matrices(x.device)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ`` with an accumulator that is never rounded to 16 bits."""
    dtype = statistics_dtype(x.dtype)
    if dtype == x.dtype:
        return x @ weight.t()
    if gives_fp32(x):
        return torch.mm(x, weight.t(), out_dtype=dtype)
    return x.to(dtype) @ weight.to(dtype).t()


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``out = a b`` if ``first``, else ``out += a b``; with 16-bit factors and an fp32 ``out`` no product is rounded."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif (in_fp32 := gives_fp32(a)) and first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif in_fp32 and traced(out):  # Inductor does not lower addmm to another dtype, torch 2.11 does not trace it
        out += torch.mm(a, b, out_dtype=out.dtype)
    elif in_fp32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        if first:
            out.zero_()
        for rows in slices(a.shape[0], BLOCK):
            for part in slices(a.shape[1], BLOCK):
                out[rows].addmm_(a[rows, part].to(out.dtype), b[part].to(out.dtype))


class FewColumns(NamedTuple):
    """A gradient of the logits as its large columns, and a rank-1 term in place of the others: ``size · rows sharesᵀ``."""

    columns: Tensor  # (k,), those in which some row has a large gradient
    rows: Tensor  # (n,) each row's sum over the small columns, divided by the largest such sum
    shares: Tensor  # (V,) each small column's sum of absolute values, divided by the largest; 0 at ``columns``
    size: Tensor  # ()


def few_columns(d_logits: Tensor, gradient_filter: float) -> FewColumns | None:
    """The columns of ``d_logits (n, V)`` with an element of at least ``gradient_filter`` times the largest; None: take all.

    The host must know their number, so it waits for the device.
    """
    n, V = d_logits.shape
    if not gradient_filter or not n or not V or not host_may_read(d_logits):
        return None
    largest, sizes = _column_sizes(d_logits)
    most = largest.amax()
    small = (largest < gradient_filter * most) & most.isfinite()
    columns = (~small).nonzero().squeeze(1)
    if len(columns) > MOST * V:
        return None
    rows = sizes.new_empty(n, 1)
    add_product(rows, d_logits, small.to(d_logits.dtype)[:, None], first=True)
    sizes *= small
    # Both are scaled to at most 1, since products may take them in 16 bits; their common size is kept in fp32.
    of_rows, shares = (torch.where(t.any(), t / t.abs().amax(), 0) for t in (rows[:, 0], sizes))
    size = rows.abs().amax() * (sizes.amax() / sizes.sum())
    return FewColumns(columns, of_rows, shares, torch.where(sizes.any(), size, 0))


def _column_sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest element of each column of ``|x|``, and the column's sum in fp32 or wider."""
    wide = statistics_dtype(x.dtype)
    if x.is_cuda:
        return (torch.linalg.vector_norm(x, float("inf"), dim=0), torch.linalg.vector_norm(x, 1, dim=0, dtype=wide))
    largest, sizes = x.new_empty(x.shape[1]), x.new_empty(x.shape[1], dtype=wide)
    width = max(16, BLOCK * BLOCK // (len(x) * x.itemsize))  # a MiB at a time stays in cache
    for columns in slices(x.shape[1], width):
        block = x[:, columns].abs()
        largest[columns], sizes[columns] = block.amax(0), block.sum(0, dtype=wide)
    return largest, sizes


def column_bytes(n: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of a gathered column ``(n,)`` of the logits' gradient, with its row ``(H,)`` of the weight or of its gradient."""
    return n * dtype.itemsize + hidden * statistics_dtype(dtype).itemsize


def at_a_time(n: int, hidden: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """How many columns are gathered at a time."""
    return max(256, GATHERED["cpu" if on_cpu else "cuda"] // column_bytes(n, hidden, dtype))


def add_over_columns(
    out: Tensor,  # (n, H); a 16-bit one is written once
    d_logits: Tensor,  # (n, V)
    matrix: Tensor,  # (V, H)
    few: FewColumns | None,
    first: bool,
) -> None:
    """``out = d_logits matrix`` if ``first``, else ``out += d_logits matrix``; over the ``few`` columns if given."""
    if few is None:
        return add_product(out, d_logits, matrix, first)
    total = out if out.dtype.itemsize > 2 else out.new_empty(out.shape, dtype=torch.float32)
    if first:
        total.zero_()
    others = total.new_empty(1, matrix.shape[1])
    add_product(others, few.shares.to(matrix.dtype)[None], matrix, first=True)
    total.addr_(few.rows, few.size * others[0])
    for part in few.columns.split(at_a_time(len(out), out.shape[1], matrix.dtype, not out.is_cuda)):
        add_product(total, d_logits[:, part], matrix[part], first=False)
    if total is not out:
        out.copy_(total)
    return None


def add_at_columns(
    out: Tensor,  # (V, H)
    d_logits: Tensor,  # (n, V)
    x: Tensor,  # (n, H)
    few: FewColumns | None,
    first: bool,
) -> None:
    """``out = d_logitsᵀ x`` if ``first``, else ``out += d_logitsᵀ x``; at the ``few`` columns if given."""
    if few is None:
        return add_product(out, d_logits.t(), x, first)
    if first:
        out.zero_()
    others = few.rows.new_empty(1, x.shape[1])
    add_product(others, few.rows.to(x.dtype)[None], x, first=True)
    out.addr_(few.shares.to(out.dtype), (few.size * others[0]).to(out.dtype))
    for part in few.columns.split(at_a_time(len(x), x.shape[1], x.dtype, not x.is_cuda)):
        rows = out[part]
        add_product(rows, d_logits[:, part].t(), x, first)
        out.index_copy_(0, part, rows)
    return None


def gathered_bytes(n: int, vocab: int, hidden: int, dtype: torch.dtype, d_hidden: torch.dtype, on_cpu: bool) -> int:
    """Bytes that products of few among ``vocab`` columns hold; ``d_hidden``: the dtype of the sum over the columns."""
    columns = min(at_a_time(n, hidden, dtype, on_cpu), int(MOST * vocab))
    held = columns * column_bytes(n, hidden, dtype) + 6 * statistics_dtype(dtype).itemsize * vocab
    if d_hidden.itemsize == 2:
        held += 4 * n * hidden
    return held + upcast_bytes(n, vocab, hidden, dtype) * on_cpu


def upcast_bytes(n: int, vocab: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of the blocks of 16-bit factors that :func:`add_product` upcasts to fp32 at a time on a CPU."""
    if dtype.itemsize > 2:
        return 0
    rows, columns = min(n, BLOCK), min(vocab, BLOCK)
    return 4 * (rows * columns + max(rows, columns) * hidden)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_cuda or x.dtype == dtype:
        return x.sum(0, dtype=dtype)
    out = x.new_zeros(x.shape[1], dtype=dtype)
    for columns in slices(x.shape[1], BLOCK):
        for rows in slices(x.shape[0], BLOCK // 2):  # PyTorch makes a copy in that dtype
            out[columns] += x[rows, columns].sum(0, dtype=dtype)
    return out

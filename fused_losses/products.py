"""Products with a head's matrices, summed in fp32 or wider; of a gradient of the logits by all its columns, or by few."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autodiff import host_may_read, traced
from .kernels.configurations import multiplies_matrices
from .numerics import statistics_dtype
from .row_statistics import slices

GATHERED = {"cpu": 2**22, "cuda": 2**25}  # bytes of columns of the logits' gradient and rows of the weight at a time
MOST = 0.5  # of the columns: beyond it gathering them may cost what it saves
BLOCK = 1024  # of a 16-bit matrix that is upcast, or of the vocabulary that is multiplied, at a time on a CPU


def gives_fp32(x: Tensor) -> bool:
    """Whether PyTorch has a product of 16-bit factors as ``x`` in fp32: on no CPU, in bfloat16 from sm_80 on, and in float16
    unless it is told to sum that in float16."""
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
    """``out = a b`` if ``first``, else ``out += a b``; an fp32 ``out`` of 16-bit factors sees no rounded product."""
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
    """A gradient of the logits as its large columns, and what stands for the others: ``size · rows sharesᵀ``."""

    columns: Tensor  # (k,), where some row has a large gradient
    rows: Tensor  # (n,) the sum of a row's small columns, over the largest such sum
    shares: Tensor  # (V,) the sizes in a small column, over the largest such column; 0 at ``columns``
    size: Tensor  # ()


def few_columns(d_logits: Tensor, gradient_filter: float) -> FewColumns | None:
    """``d_logits (n, V)`` by its columns with an element of ``gradient_filter`` times the largest or more; None: by all.

    How many those are the host must know, so that it waits for the device.
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
    # Of 1 at most each, since products may take them in 16 bits; the size of both is kept in fp32.
    of_rows, shares = (torch.where(t.any(), t / t.abs().amax(), 0) for t in (rows[:, 0], sizes))
    size = rows.abs().amax() * (sizes.amax() / sizes.sum())
    return FewColumns(columns, of_rows, shares, torch.where(sizes.any(), size, 0))


def _column_sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each column of ``|x|``, and its sum in fp32 or wider."""
    wide = statistics_dtype(x.dtype)
    if x.is_cuda:
        return (
            torch.linalg.vector_norm(x, float("inf"), dim=0),
            torch.linalg.vector_norm(x, 1, dim=0, dtype=wide),
        )
    largest, sizes = x.new_empty(x.shape[1]), x.new_empty(x.shape[1], dtype=wide)
    width = max(16, BLOCK * BLOCK // (len(x) * x.itemsize))  # a MiB at a time stays in cache
    for columns in slices(x.shape[1], width):
        block = x[:, columns].abs()
        largest[columns], sizes[columns] = block.amax(0), block.sum(0, dtype=wide)
    return largest, sizes


def column_bytes(n: int, hidden: int, dtype: torch.dtype) -> int:
    """Of a gathered column ``(n,)`` of the logits' gradient with its row ``(H,)`` of the weight or of its gradient."""
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
    """``out = d_logits matrix`` if ``first``, else ``out += d_logits matrix``; of ``few`` columns where given."""
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
    """``out = d_logitsᵀ x`` if ``first``, else ``out += d_logitsᵀ x``; of ``few`` columns where given."""
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
    """What the products of few among ``vocab`` columns hold; ``d_hidden``: the dtype of the sum over them."""
    columns = min(at_a_time(n, hidden, dtype, on_cpu), int(MOST * vocab))
    held = columns * column_bytes(n, hidden, dtype) + 6 * statistics_dtype(dtype).itemsize * vocab
    if d_hidden.itemsize == 2:
        held += 4 * n * hidden
    return held + upcast_bytes(n, vocab, hidden, dtype) * on_cpu


def upcast_bytes(n: int, vocab: int, hidden: int, dtype: torch.dtype) -> int:
    """Of the blocks of 16-bit factors that :func:`add_product` has in fp32 at once on a CPU."""
    if dtype.itemsize > 2:
        return 0
    rows, columns = min(n, BLOCK), min(vocab, BLOCK)
    return 4 * (rows * columns + max(rows, columns) * hidden)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_cuda or x.dtype == dtype:
        return x.sum(0, dtype=dtype)
    out = x.new_zeros(x.shape[1], dtype=dtype)
    for columns in slices(x.shape[1], BLOCK):
        for rows in slices(x.shape[0], BLOCK // 2):  # PyTorch sums a copy of that dtype
            out[columns] += x[rows, columns].sum(0, dtype=dtype)
    return out

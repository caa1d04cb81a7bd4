"""Products with a head's matrices, summed in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

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


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_cuda or x.dtype == dtype or x.shape[1] == 0:
        return x.sum(0, dtype=dtype)
    return torch.cat([x[:, i : i + BLOCK].sum(0, dtype=dtype) for i in range(0, x.shape[1], BLOCK)])

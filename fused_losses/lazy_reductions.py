"""What is read from lazy logits and their ``log_softmax``: numbers at given ids, sums and norms over the vocabulary, largest
entries."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autodiff import exporting, same_sizes, transforms_active, unknown
from .lazy_elementwise import beside, recorded
from .lazy_products import Dense, LazyStack, minimum
from .lazy_rows import of_rows
from .lazy_tensor import Derived, LazyTensor, answers, from_front, is_lazy, is_number, over_vocab, with_dim, wrap_dim
from .linear_logits import LinearLogits
from .log_softmax import LazyExpression
from .numerics import statistics_dtype, wide_sum


@answers("gather")
def gather(x: LazyTensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if index.ndim == 0 and x.ndim == 1:  # PyTorch takes it for (1,)
        found = gather(x, dim, index[None])
        return found if found is NotImplemented else found.squeeze(0)
    if index.ndim != x.ndim:
        raise RuntimeError(
            f"gather from {tuple(x.shape)} needs an index with as many dimensions, got {tuple(index.shape)}: write "
            "index.unsqueeze(-1) for one id per token"
        )
    if wrap_dim(x, dim) != x.vocab_dim:
        return _gathered_tokens(x, dim, index)
    ids = index.movedim(x.vocab_dim, -1)
    if not same_sizes(ids.shape[:-1], x.token_shape):
        return NotImplemented
    values = x.values_at(ids)
    if values is NotImplemented:
        return values
    values = values.to(x.dtype).movedim(-1, x.vocab_dim)
    x.remember(values, ids)
    return values


def _gathered_tokens(x: LazyTensor, dim: int, index: Tensor) -> Any:
    """Gather along another dimension, by an index that is the same for the whole vocabulary: ``expand`` made it."""
    at, V = x.vocab_dim, x.shape[x.vocab_dim]
    if index.shape[at] != V or (V != 1 and index.stride(at) != 0):
        return NotImplemented
    one = index.narrow(at, 0, 1)
    return x.mapped(
        lambda t: t.gather(dim, one.expand(*one.shape[:at], t.shape[at], *one.shape[at + 1 :])), at, view=False
    )


@answers("take_along_dim")
def take_along_dim(x: LazyTensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or indices.ndim != x.ndim:
        return NotImplemented
    at = wrap_dim(x, dim)
    indices = from_front(x, indices, at)
    if at != x.vocab_dim:  # the indices broadcast
        sizes = [n if d == at else x.shape[d] for d, n in enumerate(indices.shape)]
        if any(n not in (1, size) for n, size in zip(indices.shape, sizes, strict=True)):
            return NotImplemented
        indices = indices.expand(sizes)
    return gather(x, at, indices)


def _dims(x: LazyTensor, dim: Any) -> list[int]:
    dims = range(x.ndim) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    return [wrap_dim(x, d) for d in dims]


@answers("logsumexp", "special_logsumexp")
def logsumexp(x: LazyTensor, dim: Any, keepdim: bool = False) -> Any:
    if isinstance(x, LazyStack):
        return x.reduced(torch.logaddexp, _dims(x, dim), keepdim)
    if _dims(x, dim) != [x.vocab_dim] or not isinstance(x, (LinearLogits, LazyExpression)):
        return NotImplemented
    lse = x.statistic("logsumexp") if isinstance(x, LinearLogits) else x.log_total()
    if lse is NotImplemented:
        return lse
    lse = lse.to(x.dtype, copy=True)  # callers write into what they get
    if isinstance(x, LinearLogits):
        x.normalise_by(lse)
    return with_dim(lse, x, keepdim)


def _truncates(x: LazyTensor, dtype: Any) -> bool:
    """Whether a sum in ``dtype`` casts each entry to an integer."""
    return dtype is not None and x.dtype.is_floating_point and not dtype.is_floating_point


@answers("sum")
def sum_(x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = _dims(x, dim)
    if _truncates(x, dtype):
        return NotImplemented
    if isinstance(x, LazyStack):
        found = x.reduced(torch.add, dims, keepdim)
        return found if found is NotImplemented or dtype is None else found.to(dtype)
    total = x.vocab_sum() if x.vocab_dim in dims else NotImplemented
    if total is NotImplemented and x.vocab_dim in dims and isinstance(x, Derived):
        total = of_rows(lambda rows: wide_sum(rows, -1), x)
    return total if total is NotImplemented else _rest_of_sum(x, total, dims, keepdim, dtype)


def _rest_of_sum(x: LazyTensor, total: Tensor, dims: list[int], keepdim: bool, dtype: Any) -> Tensor:
    """The sum over ``dims``, which include the vocabulary's, from the sums over the vocabulary ``token_shape``."""
    whole = torch.int64 if x.dtype == torch.bool else x.dtype
    return total.unsqueeze(x.vocab_dim).sum(dims, keepdim).to(dtype or whole)


@answers("nansum")
def nansum(x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The sum without tokens whose hidden states have a nan, and so all their logits; a nan in the head stays in the sum."""
    dims = _dims(x, dim)
    if not isinstance(x, LinearLogits) or x.vocab_dim not in dims or _truncates(x, dtype):
        return NotImplemented
    return _rest_of_sum(x, x.vocab_sum().masked_fill(x.hidden.isnan().any(-1), 0), dims, keepdim, dtype)


@answers("mean")
def mean(x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not (dtype or x.dtype).is_floating_point:
        return NotImplemented  # PyTorch refuses that
    total = sum_(x, dim, keepdim, dtype=statistics_dtype(dtype or x.dtype))
    count = math.prod([x.shape[d] for d in _dims(x, dim)])
    return total if total is NotImplemented else (total / count).to(dtype or x.dtype)


def _extreme(x: LazyTensor, k: int, largest: bool) -> Any:
    """Values, differentiable, and ids of the largest or smallest entries, ``(*token_shape, k)``."""
    if isinstance(x, LazyExpression):
        monotone = x.form in ("logits", "log_softmax", "softmax") and is_number(x.factor) and x.factor > 0
        if not monotone:
            return NotImplemented
        values, ids = _extreme(x.base.with_dtype(x.wide), k, largest)
        factor, offset = x._coefficients(-1)
        values = values * factor + offset if x.form == "logits" else x.values_at(ids)
        return values.to(x.dtype), ids
    if not isinstance(x, LinearLogits) or unknown(x.token_shape.numel()):
        return NotImplemented
    values, ids = x.topk_ids(k, largest)
    # Ranks that share the vocabulary must all read the values, even where only one of them trains its rows. Under a transform,
    # and while exporting, x does not know that the weight trains.
    trains = x.requires_grad or x.shard is not None or transforms_active() or exporting()
    if torch.is_grad_enabled() and trains:
        same = x.values_at(ids)  # but for rounding, and for nan beside an infinite logit
        values = values.detach()  # drops the tangent, which no_grad keeps
        values = torch.where(same == values, same, values + (same - same.detach()).nan_to_num(0))
    return values.to(x.dtype), ids


@answers("argmax")
def argmax(x: LazyTensor, dim: Any = None, keepdim: bool = False, largest: bool = True) -> Any:
    if dim is None or wrap_dim(x, dim) != x.vocab_dim:
        return NotImplemented
    with torch.no_grad():
        found = _extreme(x, 1, largest)
    return found if found is NotImplemented else with_dim(found[1].squeeze(-1), x, keepdim)


@answers("argmin")
def argmin(x: LazyTensor, dim: Any = None, keepdim: bool = False) -> Any:
    return argmax(x, dim, keepdim, largest=False)


@answers("max")
def max_(x: LazyTensor, dim: Any = None, keepdim: bool = False, largest: bool = True) -> Any:
    found = _extreme(x, 1, largest) if over_vocab(x, dim) else NotImplemented
    if found is NotImplemented:
        return NotImplemented
    x.remember(*found)
    if dim is None:
        return found[0].max() if largest else found[0].min()
    values, ids = (with_dim(t.squeeze(-1), x, keepdim) for t in found)
    return torch.return_types.max((values, ids)) if largest else torch.return_types.min((values, ids))


@answers("min", anywhere=True)
def min_(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if is_lazy(dim):
        return minimum(input, dim)
    return max_(input, dim, keepdim, largest=False) if is_lazy(input) else NotImplemented


@answers("amax")
def amax(x: LazyTensor, dim: Any = (), keepdim: bool = False) -> Any:
    if dim == () and not keepdim:
        return max_(x)
    found = max_(x, *_dims(x, dim), keepdim) if len(_dims(x, dim)) == 1 else NotImplemented
    return found if found is NotImplemented else found.values


@answers("topk")
def topk(x: LazyTensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if wrap_dim(x, dim) != x.vocab_dim:
        return NotImplemented
    if not 0 <= k <= x.shape[x.vocab_dim]:
        raise RuntimeError(f"selected index k={k} out of range for {x.shape[x.vocab_dim]} entries")
    found = _extreme(x, k, largest)
    if found is NotImplemented:
        return NotImplemented
    x.remember(*found)
    values, ids = (t.movedim(-1, x.vocab_dim) for t in found)
    return torch.return_types.topk((values, ids))


@answers("linalg_vector_norm", "norm")
def norm(
    x: LazyTensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, p: Any = None, dtype: Any = None
) -> Any:
    ord, dims = ord if p is None else p, _dims(x, dim)
    ord = 2 if ord == "fro" else ord
    # The norm of norms is the norm of all entries; ord 0, the count of those that are not 0, is no norm.
    if x.vocab_dim not in dims or not is_number(ord) or ord == 0 or dtype is not None or not x.dtype.is_floating_point:
        return NotImplemented
    found = of_rows(lambda rows: torch.linalg.vector_norm(rows, ord, -1), x)
    if found is NotImplemented:
        return found
    return torch.linalg.vector_norm(found.unsqueeze(x.vocab_dim), ord, dims, keepdim).to(x.dtype)


@answers("var")
def var(
    x: LazyTensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> Any:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims, wide = _dims(x, dim), x.with_dtype(x.wide)
    centre = mean(wide, dims, True) if x.vocab_dim in dims and x.dtype.is_floating_point else NotImplemented
    each = NotImplemented if centre is NotImplemented else recorded(torch.square, "square", (wide - centre,), {})
    if each is NotImplemented:
        return each
    count = math.prod([x.shape[d] for d in dims])
    less = int(unbiased) if correction is None else correction
    return (sum_(each, dims, keepdim) / max(count - less, 0)).to(x.dtype)


@answers("std")
def std(x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    found = var(x.with_dtype(x.wide), *args, **kwargs) if x.dtype.is_floating_point else NotImplemented
    # The fill gives equal entries PyTorch's gradient, 0.
    return found if found is NotImplemented else found.masked_fill(found == 0, 0).sqrt().to(x.dtype)


@answers("cosine_similarity", anywhere=True)
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    x, y = (x1, x2) if is_lazy(x1) else (x2, x1)
    if wrap_dim(x, dim) != x.vocab_dim or not beside(y, x):
        return NotImplemented
    found = of_rows(lambda a, b: F.cosine_similarity(a, b, -1, eps), x, y if is_lazy(y) else Dense(y))
    return found if found is NotImplemented else found.to(torch.promote_types(x1.dtype, x2.dtype))

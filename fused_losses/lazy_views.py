"""Indexing, views and permutations of a lazy tensor: they move its tokens and leave the vocabulary whole.

The vocabulary may be any dimension. A new shape keeps it if it has a dimension of that size with as many elements before it as
in the old shape; an index that selects from the vocabulary selects rows of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autodiff import unknown
from .lazy_tensor import LazyTensor, answers, from_front, is_lazy, materialised, numel, wrap_dim


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


@answers("reshape")
def reshape(x: LazyTensor, *shape: Any, **kwargs: Any) -> Any:
    shape = shape or tuple(kwargs.values())  # view calls these size or dtype
    if isinstance(shape[0], torch.dtype):
        return NotImplemented
    new = list(_sizes(shape))
    if -1 in new:
        rest = math.prod([s for s in new if s != -1])
        new[new.index(-1)] = numel(x) // rest if rest else -1
    if math.prod(new) != numel(x) or any([s < 0 for s in new]):  # noqa: C419  Dynamo traces no generators
        raise RuntimeError(f"shape '{list(_sizes(shape))}' is invalid for {type(x).__name__} {tuple(x.shape)}")
    before, after = math.prod(x.shape[: x.vocab_dim]), math.prod(x.shape[x.vocab_dim + 1 :])
    V = x.shape[x.vocab_dim]
    places = [
        d
        for d, n in enumerate(new)
        if not unknown(n) and n == V and (math.prod(new[:d]), math.prod(new[d + 1 :])) == (before, after)
    ]
    if places:
        at = places[0]
        return x.mapped(lambda t: t.reshape(*new[:at], t.shape[x.vocab_dim], *new[at + 1 :]), at)
    return NotImplemented  # the vocabulary would share a dimension with tokens


@answers("view")
def view(x: LazyTensor, *shape: Any, **kwargs: Any) -> Any:
    found = reshape(x, *shape, **kwargs)
    shape = shape or tuple(kwargs.values())
    if found is not NotImplemented or isinstance(shape[0], torch.dtype):
        return found
    return materialised("view", x).reshape(_sizes(shape))  # not view: what contiguous() left as it was may have none


@answers("view_as", "reshape_as", anywhere=True)
def view_as(x: Any, other: Any) -> Any:
    return view(x, other.shape) if is_lazy(x) else x.reshape(other.shape)


@answers("flatten")
def flatten(x: LazyTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = wrap_dim(x, start_dim), wrap_dim(x, end_dim)
    if start == end:
        return x
    if start > end:
        raise RuntimeError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim} of {tuple(x.shape)}")
    return reshape(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


@answers("unflatten")
def unflatten(x: LazyTensor, dim: int, sizes: Sequence[int]) -> Any:
    dim = wrap_dim(x, dim)
    known = math.prod([s for s in sizes if s != -1])
    parts = [x.shape[dim] // known if s == -1 and known else s for s in sizes]
    if math.prod(parts) != x.shape[dim]:
        raise RuntimeError(f"unflatten: sizes {list(sizes)} do not multiply up to {x.shape[dim]}, the size of {dim}")
    return reshape(x, [*x.shape[:dim], *parts, *x.shape[dim + 1 :]])


@answers("squeeze")
def squeeze(x: LazyTensor, dim: int | Sequence[int] | None = None) -> Any:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d for d in (wrap_dim(x, d) for d in dims) if x.shape[d] == 1}
    return reshape(x, [s for d, s in enumerate(x.shape) if d not in gone])


@answers("unsqueeze")
def unsqueeze(x: LazyTensor, dim: int) -> Any:
    at = wrap_dim(x, dim, extra=1)
    return x.mapped(lambda t: t.unsqueeze(at), x.vocab_dim + (at <= x.vocab_dim))


@answers("expand", "broadcast_to")
def expand(x: LazyTensor, *args: Any, size: Any = (), implicit: bool = False) -> Any:
    sizes = _sizes(args or (size,))
    at = x.vocab_dim + len(sizes) - x.ndim
    if at < 0 or sizes[at] not in (-1, x.shape[x.vocab_dim]):
        return NotImplemented
    return x.mapped(lambda t: t.expand(*sizes[:at], -1, *sizes[at + 1 :]), at)


@answers("broadcast_tensors", anywhere=True)
def broadcast_tensors(*tensors: Any) -> Any:
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return tuple(t.expand(shape) for t in tensors)


@answers("permute")
def permute(x: LazyTensor, *args: Any, dims: Any = ()) -> Any:
    order = [wrap_dim(x, d) for d in _sizes(args or (dims,))]
    if len(order) != x.ndim or {*order} != {*range(x.ndim)}:  # sets, as Dynamo cannot sort symbols
        raise RuntimeError(f"permute: {order} does not name each dimension of {tuple(x.shape)} once")
    return x.mapped(lambda t: t.permute(order), order.index(x.vocab_dim))


@answers("transpose", "swapaxes", "swapdims")
def transpose(x: LazyTensor, dim0: int, dim1: int) -> Any:
    order = list(range(x.ndim))
    a, b = wrap_dim(x, dim0), wrap_dim(x, dim1)
    order[a], order[b] = b, a
    return permute(x, order)


@answers("t")
def t(x: LazyTensor) -> Any:
    if x.ndim > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, got {tuple(x.shape)}")
    return transpose(x, 0, -1)


@answers("movedim", "moveaxis")
def movedim(x: LazyTensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Any:
    sources, targets = ([wrap_dim(x, d) for d in ([v] if isinstance(v, int) else v)] for v in (source, destination))
    if not len(sources) == len(targets) == len(set(sources)) == len(set(targets)):
        raise RuntimeError(f"movedim: from {source} to {destination} some dimension of {tuple(x.shape)} is named twice")
    rest = iter(d for d in range(x.ndim) if d not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return permute(x, [moved[d] if d in moved else next(rest) for d in range(x.ndim)])


@answers("roll")
def roll(x: LazyTensor, shifts: Any, dims: Any = None) -> Any:
    among = [dims] if isinstance(dims, int) else list(dims or ())
    if not among or x.vocab_dim in [wrap_dim(x, d) for d in among]:
        return NotImplemented
    return x.mapped(lambda t: t.roll(shifts, dims), x.vocab_dim, view=False)


@answers("flip")
def flip(x: LazyTensor, *args: Any, dims: Any = ()) -> Any:
    among = _sizes(args or (dims,))
    if x.vocab_dim in [wrap_dim(x, d) for d in among]:
        return NotImplemented
    return x.mapped(lambda t: t.flip(among), x.vocab_dim, view=False)


# Indexing


@answers("__getitem__")
def index(x: LazyTensor, key: Any) -> Any:
    if isinstance(key, list) and len(key) < 32 and any([_is_entry(k) for k in key]):  # noqa: C419  as in reshape
        key = tuple(key)
    items = [_as_key(k) for k in (key if isinstance(key, tuple) else (key,))]
    if any(isinstance(k, bool) or (isinstance(k, Tensor) and k.ndim == 0 and k.dtype == torch.bool) for k in items):
        return NotImplemented
    if any(isinstance(k, LazyTensor) for k in items):  # a mask over tokens and vocabulary at once
        return NotImplemented
    taken = sum(_consumed(k) for k in items)
    if taken > x.ndim:
        raise IndexError(f"too many indices for {type(x).__name__} of dimension {x.ndim}")
    fill: list[Any] = [slice(None)] * (x.ndim - taken)
    at = next((i for i, k in enumerate(items) if k is Ellipsis), len(items))
    items[at : at + 1] = fill
    position, dim = 0, 0  # of the vocabulary: its place in items, its dimension
    while dim + _consumed(items[position]) <= x.vocab_dim:
        dim += _consumed(items[position])
        position += 1
    if dim != x.vocab_dim:
        return NotImplemented  # also a mask over tokens and vocabulary
    vocab_key, items[position] = items[position], slice(None)
    if isinstance(vocab_key, slice):
        return _index_tokens(x if vocab_key == slice(None) else x.columns(vocab_key), items, position)
    if _is_int(vocab_key):
        V = x.shape[x.vocab_dim]
        if isinstance(vocab_key, int) and not -V <= vocab_key < V:
            raise IndexError(f"index {vocab_key} is out of bounds for dimension {x.vocab_dim} with size {V}")
        # An integer is removed before index tensors are combined: those on its two sides are then adjacent.
        x, items = movedim(x, x.vocab_dim, -1), items[:position] + items[position + 1 :] + [slice(None)]
        return _index_tokens(x, items, len(items) - 1).column(vocab_key)
    vocab_key = vocab_key.to(x.device)  # an index may be on the CPU, as one made from a list is
    if any(isinstance(k, Tensor) for k in items):
        return _pointwise(x, items, position, vocab_key)
    return _index_tokens(x.columns(vocab_key) if vocab_key.ndim == 1 else NotImplemented, items, position)


def _is_entry(k: Any) -> bool:
    """Whether PyTorch takes a short list that contains ``k`` for a tuple, with an entry for each dimension."""
    return k is None or k is Ellipsis or isinstance(k, (Tensor, Sequence, slice)) or getattr(k, "ndim", 0) > 0


def _as_key(k: Any) -> Any:
    if isinstance(k, (list, tuple, range)):
        k = torch.as_tensor(k, device="cpu")  # whatever the default device is
        k = k.long() if k.is_floating_point() else k  # as an empty list gives
    elif type(k).__module__ == "numpy":
        k = torch.as_tensor(k, device="cpu")
    return k.bool() if isinstance(k, Tensor) and k.dtype == torch.uint8 else k  # uint8 is the old dtype of masks


def _is_int(k: Any) -> bool:
    return isinstance(k, (int, torch.SymInt)) or (isinstance(k, Tensor) and k.ndim == 0)


def _consumed(k: Any) -> int:
    """How many dimensions an index entry takes."""
    if isinstance(k, Tensor):
        return k.ndim if k.dtype == torch.bool else 1
    return int(k is not None and k is not Ellipsis)


def _index_tokens(x: Any, items: list[Any], position: int) -> Any:
    """``x[items]``, where ``items[position]`` is the vocabulary's ``:``."""
    if x is NotImplemented:
        return x
    if isinstance(x, Tensor):
        return x[tuple(items)]
    kept = [k for k in items[:position] if not _is_int(k)] + [None]
    rest = [k for k in items[position + 1 :] if not _is_int(k)]
    advanced = [i for i, k in enumerate(kept + rest) if isinstance(k, Tensor)]
    vocab_dim = len(kept) - 1
    if advanced:
        tensors = [k for k in kept + rest if isinstance(k, Tensor)]
        width = max(1 if k.dtype == torch.bool else k.ndim for k in tensors)
        adjacent = advanced[-1] - advanced[0] + 1 == len(advanced)
        vocab_dim -= sum(i < vocab_dim for i in advanced)
        # The shape of adjacent index tensors takes their place; the shape of others comes first.
        vocab_dim += width if not adjacent or advanced[0] < len(kept) else 0
    return x.mapped(lambda t: t[tuple(items)], vocab_dim, view=not advanced)


def _pointwise(x: LazyTensor, items: list[Any], position: int, ids: Tensor) -> Any:
    """``x[i, j, ids]``: one number for each entry of the index tensors."""
    if ids.dtype == torch.bool or any(
        not isinstance(k, (int, Tensor)) for k in items[:position] + items[position + 1 :]
    ):
        return NotImplemented
    picked = _index_tokens(x, items, position)
    try:
        shape = torch.broadcast_shapes(picked.token_shape, ids.shape)
    except RuntimeError as error:
        raise IndexError(f"index {tuple(ids.shape)} does not broadcast with {tuple(picked.token_shape)}") from error
    if shape != picked.token_shape:
        return NotImplemented
    return picked.value_at(from_front(x, ids))


def index_along(x: LazyTensor, dim: int, key: Any) -> Any:
    return x[(slice(None),) * wrap_dim(x, dim) + (key,)]


@answers("select")
def select(x: LazyTensor, dim: int, index: int) -> Any:
    return index_along(x, dim, index)


@answers("narrow")
def narrow(x: LazyTensor, dim: int, start: int, length: int) -> Any:
    n = x.shape[wrap_dim(x, dim)]
    start = start + n if start < 0 else start
    if not 0 <= start <= n:
        raise IndexError(f"start out of range (expected to be in range of [{-n}, {n}])")
    if not 0 <= start <= start + length <= n:
        raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({n}).")
    return index_along(x, dim, slice(start, start + length))


@answers("index_select")
def index_select(x: LazyTensor, dim: int, index: Tensor) -> Any:
    # PyTorch's index_select refuses an invalid index.
    index = torch.arange(x.shape[wrap_dim(x, dim)], device=index.device).index_select(0, index)
    return index_along(x, dim, index)


@answers("split", "split_with_sizes")
def split(x: LazyTensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> Any:
    n = x.shape[wrap_dim(x, dim)]
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        if sizes <= 0:
            raise RuntimeError(f"split expects a positive size, got {sizes}")
        sizes = [min(sizes, n - i) for i in range(0, n, sizes)] or [0]
    if sum(sizes) != n:
        raise RuntimeError(
            f"split sizes {list(sizes)} must sum to {n}, the size of dimension {dim} of {tuple(x.shape)}"
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(x, dim, start, size) for start, size in zip(starts, sizes, strict=True))


@answers("chunk")
def chunk(x: LazyTensor, chunks: int, dim: int = 0) -> Any:
    if chunks <= 0:
        raise RuntimeError(f"chunk expects a positive number of chunks, got {chunks}")
    n = x.shape[wrap_dim(x, dim)]
    return split(x, -(-n // chunks) or [0] * chunks, dim)


@answers("tensor_split")
def tensor_split(x: LazyTensor, indices_or_sections: Any, dim: int = 0) -> Any:
    n, at = x.shape[wrap_dim(x, dim)], indices_or_sections
    if isinstance(at, Tensor) or at == 0:
        return NotImplemented
    if isinstance(at, int):
        return split(x, [n // at + (i < n % at) for i in range(at)], dim)
    return tuple(index_along(x, dim, slice(a, b)) for a, b in zip((0, *at), (*at, n), strict=True))


@answers("repeat")
def repeat(x: LazyTensor, *repeats: Any) -> Any:
    sizes = _sizes(repeats)
    at = x.vocab_dim + len(sizes) - x.ndim
    return x.mapped(lambda t: t.repeat(*sizes), at, view=False) if at >= 0 and sizes[at] == 1 else NotImplemented


@answers("repeat_interleave")
def repeat_interleave(x: LazyTensor, repeats: Any, dim: int | None = None, *, output_size: int | None = None) -> Any:
    if dim is None or wrap_dim(x, dim) == x.vocab_dim:
        return NotImplemented
    at = wrap_dim(x, dim)
    return x.mapped(lambda t: t.repeat_interleave(repeats, at, output_size=output_size), x.vocab_dim, view=False)


@answers("unbind")
def unbind(x: LazyTensor, dim: int = 0) -> Any:
    dim = wrap_dim(x, dim)
    return NotImplemented if dim == x.vocab_dim else tuple(select(x, dim, i) for i in range(x.shape[dim]))

"""A tensor over a vocabulary that is known by its tokens, not by its elements.

What PyTorch is asked to do with such a tensor arrives in ``__torch_function__`` under the function's name, and
``HANDLERS`` says who answers. Here are the answers that concern the shape: indexing, views, permutations, joining all
act on the tokens and leave the vocabulary alone. Whatever has no handler, or a handler that says ``NotImplemented``,
is computed by PyTorch on the materialised tensor, with a warning.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import settings

HANDLERS: dict[str, Callable[..., Any]] = {}

_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]
_CHANGING = [f"__i{name}__" for name in _BINARY] + ["__setitem__"]
_IN_PLACE = {*_CHANGING, *(name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_"))}
_OPERATORS = _CHANGING + [f"__{r}{name}__" for name in [*_BINARY, "matmul"] for r in ("", "r")]
_OPERATORS += [
    "__neg__",
    "__pos__",
    "__abs__",
    "__invert__",
    "__and__",
    "__or__",
    "__xor__",
    "__lt__",
    "__le__",
    "__gt__",
]
_OPERATORS += ["__ge__", "__getitem__", "__len__", "__contains__", "__bool__", "__int__", "__float__", "__index__"]
_OPERATORS += ["__array__"]
# No storage, no gradient and no hooks of its own to speak of.
_MEANINGLESS = {"data_ptr", "storage", "untyped_storage", "register_hook", "retain_grad", "backward", "set_"}
_WARNED: set[tuple[str, int, str]] = set()
_INTERNAL = tuple(os.path.dirname(os.path.realpath(m.__file__ or "")) + os.sep for m in (torch, settings))


class LazyTensor:
    """Shape, metadata and dispatch; a subclass adds the tokens and the numbers."""

    vocab_dim: int
    dtype: torch.dtype
    shape: torch.Size
    token_shape: torch.Size
    device: torch.device
    requires_grad: bool

    def materialize(self) -> Tensor:
        """The tensor itself, differentiable, in ``dtype``."""
        raise NotImplementedError

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> Any:
        """The same with ``fn`` applied to everything held per token, which reaches ``fn`` with its own last dimension
        where the vocabulary stands; in the result it stands at ``vocab_dim``. ``view``: eager would alias, not copy."""
        raise NotImplementedError

    def with_dtype(self, dtype: torch.dtype) -> Any:
        """The same numbers under another label."""
        raise NotImplementedError

    def columns(self, key: slice | Tensor) -> Any:
        """A slice of the vocabulary, or the entries an index ``(n,)`` names."""
        return NotImplemented

    def scaled(self, factor: Any) -> Any:
        return NotImplemented

    def divided(self, divisor: Any) -> Any:
        return NotImplemented

    def shifted(self, offset: Any) -> Any:
        return NotImplemented

    def values_at(self, ids: Tensor) -> Any:
        """Values at ``ids (*token_shape, K)``, in the same shape."""
        return NotImplemented

    def column(self, at: int | Tensor) -> Any:
        """The values of one entry of the vocabulary, ``token_shape``."""
        ids = torch.as_tensor(at, device=self.device).expand(*self.token_shape, 1)
        return _cast(self.values_at(ids), self.dtype, lambda t: t.squeeze(-1))

    def vocab_sum(self) -> Any:
        """Sum over the vocabulary, ``token_shape``."""
        return NotImplemented

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        function = None if name.startswith("__") or name in _MEANINGLESS else getattr(Tensor, name, None)
        if not callable(function):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; materialize() gives the tensor")
        return lambda *args, **kwargs: dispatch(function, (self, *args), kwargs)

    def __eq__(self, other: object) -> Any:
        comparable = isinstance(other, (Tensor, LazyTensor, int, float))
        return dispatch(Tensor.__eq__, (self, other), {}, "eq") if comparable else NotImplemented

    def __ne__(self, other: object) -> Any:
        comparable = isinstance(other, (Tensor, LazyTensor, int, float))
        return dispatch(Tensor.__ne__, (self, other), {}, "ne") if comparable else NotImplemented

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.unbind(self))  # type: ignore[arg-type]

    @property
    def ndim(self) -> int:
        return len(self.token_shape) + 1

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_leaf(self) -> bool:
        return not self.requires_grad

    @property
    def T(self) -> Any:
        return permute(self, range(self.ndim)[::-1])

    @property
    def mT(self) -> Any:
        return transpose(self, -2, -1)


def _method(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def method(self: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return dispatch(function, (self, *args), kwargs, name)

    return method


for _name in _OPERATORS:
    setattr(LazyTensor, _name, _method(_name))


def answers(*names: str, anywhere: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler under PyTorch's names; ``anywhere``: the lazy tensor need not be the first argument."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        def first(input: Any, *args: Any, **kwargs: Any) -> Any:
            return handler(input, *args, **kwargs) if isinstance(input, LazyTensor) else NotImplemented

        for name in names:
            HANDLERS[name] = handler if anywhere else first
            if hasattr(Tensor, name) and not name.startswith("__"):
                setattr(LazyTensor, name, _method(name))
        return handler

    return register


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> Any:
    """What ``func(*args, **kwargs)`` is when some of the arguments are lazy."""
    name = name or func.__name__
    first = args[0] if args else None
    handler = HANDLERS.get(name)
    if isinstance(kwargs.get("out"), LazyTensor):
        raise RuntimeError(f"{name} cannot write into a {type(kwargs['out']).__name__}: it has no storage")
    if handler is not None and "out" not in kwargs:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if isinstance(first, LazyTensor) and name in _IN_PLACE:
        raise RuntimeError(
            f"{name} would change a {type(first).__name__} {tuple(first.shape)} in place; it is a value: only "
            "mul_ and div_ by a number or by one number per token are possible. Use the out-of-place form."
        )
    return func(*_materialised(name, args), **_materialised(name, kwargs))


def _materialised(name: str, arguments: Any) -> Any:
    found = {id(x): x for x in tree_leaves(arguments, is_leaf=is_lazy) if is_lazy(x)}
    for x in found.values():
        _report(name, x)
    tensors = {key: x.materialize() for key, x in found.items()}
    return tree_map(lambda x: tensors.get(id(x), x), arguments, is_leaf=is_lazy)


def is_lazy(x: Any) -> bool:
    return isinstance(x, LazyTensor)


def _report(name: str, x: LazyTensor) -> None:
    size = x.numel() * x.dtype.itemsize
    message = (
        f"{name} materialises {type(x).__name__} {tuple(x.shape)}: {size:,} bytes. Reduce over the vocabulary with one "
        "of the operations it answers, or call materialize() where this is meant."
    )
    if settings.strict.value:
        raise RuntimeError(message)
    _warn_once(name, message)


@torch._dynamo.assume_constant_result
def _warn_once(name: str, message: str) -> None:
    """Warn at the first frame outside this package and PyTorch, once for each line and operation."""
    frame: Any = sys._getframe()
    while frame.f_back is not None and os.path.realpath(frame.f_code.co_filename).startswith(_INTERNAL):
        frame = frame.f_back
    site = (frame.f_code.co_filename, frame.f_lineno, name)
    if site not in _WARNED:
        _WARNED.add(site)
        warnings.warn_explicit(message, UserWarning, *site[:2])


# Metadata


@answers("size")
def size(x: LazyTensor, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


@answers("dim", "ndimension")
def dim(x: LazyTensor) -> int:
    return x.ndim


@answers("numel", "nelement")
def numel(x: LazyTensor) -> int:
    return math.prod(x.shape)


@answers("element_size")
def element_size(x: LazyTensor) -> int:
    return x.dtype.itemsize


@answers("is_floating_point")
def is_floating_point(x: LazyTensor) -> bool:
    return True


@answers("is_complex")
def is_complex(x: LazyTensor) -> bool:
    return False


@answers("is_contiguous")
def is_contiguous(x: LazyTensor, **_: Any) -> bool:
    return x.vocab_dim == x.ndim - 1


@answers("get_device")
def get_device(x: LazyTensor) -> int:
    return -1 if x.device.index is None else x.device.index


@answers("__len__")
def length(x: LazyTensor) -> int:
    return x.shape[0]


@answers("contiguous")
def contiguous(x: LazyTensor, **_: Any) -> LazyTensor:
    return x


@answers("clone")
def clone(x: LazyTensor, **_: Any) -> LazyTensor:
    return x.mapped(torch.clone, x.vocab_dim, view=False)


@answers("to")
def to(x: LazyTensor, *args: Any, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    for a in args:
        if isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, (str, torch.device)):
            device = a
        elif is_lazy(a) or isinstance(a, Tensor):
            dtype, device = a.dtype, a.device
    if device is not None and not _same_device(torch.device(device), x.device):
        return NotImplemented
    dtype = dtype or x.dtype
    return (x if dtype == x.dtype else x.with_dtype(dtype)) if dtype.is_floating_point else NotImplemented


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index is None or a.index == b.index)


@answers("float")
def float_(x: LazyTensor, **_: Any) -> Any:
    return to(x, torch.float32)


@answers("double")
def double(x: LazyTensor, **_: Any) -> Any:
    return to(x, torch.float64)


@answers("half")
def half(x: LazyTensor, **_: Any) -> Any:
    return to(x, torch.half)


@answers("bfloat16")
def bfloat16(x: LazyTensor, **_: Any) -> Any:
    return to(x, torch.bfloat16)


@answers("type_as")
def type_as(x: LazyTensor, other: Any) -> Any:
    return to(x, other.device, other.dtype)


@answers("cpu")
def cpu(x: LazyTensor, **_: Any) -> Any:
    return to(x, "cpu")


@answers("cuda")
def cuda(x: LazyTensor, device: Any = None, **_: Any) -> Any:
    return to(x, "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device)


# Shape


def _dim(x: LazyTensor, dim: int, extra: int = 0) -> int:
    n = x.ndim + extra
    if not -n <= dim < n:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
    return dim % n


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


@answers("view", "reshape")
def reshape(x: LazyTensor, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or isinstance(shape[0], torch.dtype):
        (dtype,) = shape or kwargs.values()
        return NotImplemented if isinstance(dtype, torch.dtype) else reshape(x, dtype)
    new = list(_sizes(shape))
    if -1 in new:
        rest = math.prod([s for s in new if s != -1])
        new[new.index(-1)] = numel(x) // rest if rest else -1
    if math.prod(new) != numel(x) or min(new, default=0) < 0:
        raise RuntimeError(f"shape '{list(_sizes(shape))}' is invalid for {type(x).__name__} {tuple(x.shape)}")
    before, after = math.prod(x.shape[: x.vocab_dim]), math.prod(x.shape[x.vocab_dim + 1 :])
    V = x.shape[x.vocab_dim]
    places = [
        d for d, n in enumerate(new) if n == V and (math.prod(new[:d]), math.prod(new[d + 1 :])) == (before, after)
    ]
    if places:
        at = places[0]
        return x.mapped(lambda t: t.reshape(*new[:at], t.shape[x.vocab_dim], *new[at + 1 :]), at)
    return NotImplemented  # the vocabulary would share a dimension with tokens


@answers("view_as", "reshape_as")
def view_as(x: LazyTensor, other: Any) -> Any:
    return reshape(x, other.shape)


@answers("flatten")
def flatten(x: LazyTensor, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = _dim(x, start_dim), _dim(x, end_dim)
    return reshape(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


@answers("unflatten")
def unflatten(x: LazyTensor, dim: int, sizes: Sequence[int]) -> Any:
    dim = _dim(x, dim)
    known = math.prod([s for s in sizes if s != -1])
    parts = [x.shape[dim] // known if s == -1 and known else s for s in sizes]
    if math.prod(parts) != x.shape[dim]:
        raise RuntimeError(f"unflatten: sizes {list(sizes)} do not multiply up to {x.shape[dim]}, the size of {dim}")
    return reshape(x, [*x.shape[:dim], *parts, *x.shape[dim + 1 :]])


@answers("squeeze")
def squeeze(x: LazyTensor, dim: int | Sequence[int] | None = None) -> Any:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d for d in (_dim(x, d) for d in dims) if x.shape[d] == 1}
    return reshape(x, [s for d, s in enumerate(x.shape) if d not in gone])


@answers("unsqueeze")
def unsqueeze(x: LazyTensor, dim: int) -> Any:
    at = _dim(x, dim, extra=1)
    return x.mapped(lambda t: t.unsqueeze(at), x.vocab_dim + (at <= x.vocab_dim))


@answers("permute")
def permute(x: LazyTensor, *dims: Any) -> Any:
    order = [_dim(x, d) for d in _sizes(dims)]
    return x.mapped(lambda t: t.permute(order), order.index(x.vocab_dim))


@answers("transpose", "swapaxes", "swapdims")
def transpose(x: LazyTensor, dim0: int, dim1: int) -> Any:
    order = list(range(x.ndim))
    a, b = _dim(x, dim0), _dim(x, dim1)
    order[a], order[b] = b, a
    return permute(x, order)


@answers("t")
def t(x: LazyTensor) -> Any:
    return transpose(x, 0, -1)


@answers("movedim", "moveaxis")
def movedim(x: LazyTensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Any:
    sources, targets = ([_dim(x, d) for d in ([v] if isinstance(v, int) else v)] for v in (source, destination))
    rest = iter(d for d in range(x.ndim) if d not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return permute(x, [moved[d] if d in moved else next(rest) for d in range(x.ndim)])


@answers("roll")
def roll(x: LazyTensor, shifts: Any, dims: Any = None) -> Any:
    among = [dims] if isinstance(dims, int) else list(dims or ())
    if not among or x.vocab_dim in [_dim(x, d) for d in among]:
        return NotImplemented
    return x.mapped(lambda t: t.roll(shifts, dims), x.vocab_dim, view=False)


@answers("flip")
def flip(x: LazyTensor, *dims: Any) -> Any:
    among = _sizes(dims)
    if x.vocab_dim in [_dim(x, d) for d in among]:
        return NotImplemented
    return x.mapped(lambda t: t.flip(among), x.vocab_dim, view=False)


# Indexing


@answers("__getitem__")
def index(x: LazyTensor, key: Any) -> Any:
    items = [_as_key(k) for k in (key if isinstance(key, tuple) else (key,))]
    if any(isinstance(k, bool) or (isinstance(k, Tensor) and k.ndim == 0 and k.dtype == torch.bool) for k in items):
        return NotImplemented
    taken = sum(_consumed(k) for k in items)
    if taken > x.ndim:
        raise IndexError(f"too many indices for {type(x).__name__} of dimension {x.ndim}")
    fill: list[Any] = [slice(None)] * (x.ndim - taken)
    at = next((i for i, k in enumerate(items) if k is Ellipsis), len(items))
    items[at : at + 1] = fill
    position, dim = 0, 0  # of the vocabulary in items
    while items[position] is None or dim + _consumed(items[position]) <= x.vocab_dim:
        dim += _consumed(items[position])
        position += 1
    if dim != x.vocab_dim:
        return NotImplemented  # a mask over tokens and vocabulary at once
    vocab_key, items[position] = items[position], slice(None)
    if isinstance(vocab_key, slice):
        return _index_tokens(x if vocab_key == slice(None) else x.columns(vocab_key), items, position)
    if _is_int(vocab_key):
        V = x.shape[x.vocab_dim]
        if isinstance(vocab_key, int) and not -V <= vocab_key < V:
            raise IndexError(f"index {vocab_key} is out of bounds for dimension {x.vocab_dim} with size {V}")
        return _index_tokens(x, items, position).column(vocab_key % V)
    if any(isinstance(k, Tensor) for k in items):
        return _pointwise(x, items, position, vocab_key)
    picked = x.columns(vocab_key) if vocab_key.ndim == 1 else NotImplemented
    return picked[tuple(items)] if isinstance(picked, Tensor) else _index_tokens(picked, items, position)


def _as_key(k: Any) -> Any:
    return torch.as_tensor(k) if isinstance(k, (list, range)) or type(k).__module__ == "numpy" else k


def _is_int(k: Any) -> bool:
    return isinstance(k, (int, torch.SymInt)) or (isinstance(k, Tensor) and k.ndim == 0)


def _consumed(k: Any) -> int:
    """How many dimensions an index entry takes."""
    if isinstance(k, Tensor):
        return k.ndim if k.dtype in (torch.bool, torch.uint8) else 1
    return int(k is not None and k is not Ellipsis)


def _index_tokens(x: Any, items: list[Any], position: int) -> Any:
    """``x[items]``, where ``items[position]`` is the vocabulary's ``:``."""
    if x is NotImplemented:
        return x
    kept = [k for k in items[:position] if not _is_int(k)] + [None]
    rest = [k for k in items[position + 1 :] if not _is_int(k)]
    advanced = [i for i, k in enumerate(kept + rest) if isinstance(k, Tensor)]
    vocab_dim = len(kept) - 1
    if advanced:
        tensors = [k for k in kept + rest if isinstance(k, Tensor)]
        width = max(1 if k.dtype in (torch.bool, torch.uint8) else k.ndim for k in tensors)
        adjacent = advanced[-1] - advanced[0] + 1 == len(advanced)
        vocab_dim -= sum(i < vocab_dim for i in advanced)
        # Adjacent index tensors are replaced by their shape where they stand, others by their shape in front.
        vocab_dim += width if not adjacent or advanced[0] < len(kept) else 0
    return x.mapped(lambda t: t[tuple(items)], vocab_dim, view=not advanced)


def _pointwise(x: LazyTensor, items: list[Any], position: int, ids: Tensor) -> Any:
    """``x[i, j, ids]``: one number for each entry of the index tensors."""
    if ids.dtype == torch.bool or any(
        not isinstance(k, (int, Tensor)) for k in items[:position] + items[position + 1 :]
    ):
        return NotImplemented
    picked = _index_tokens(x, items, position)
    if torch.broadcast_shapes(picked.token_shape, ids.shape) != picked.token_shape:
        return NotImplemented
    ids = torch.where(ids < 0, ids + x.shape[x.vocab_dim], ids).expand(picked.token_shape).unsqueeze(-1)
    return _cast(picked.values_at(ids), x.dtype, lambda t: t.squeeze(-1))


def _cast(result: Any, dtype: torch.dtype, fn: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    return result if result is NotImplemented else fn(result).to(dtype)


def index_along(x: LazyTensor, dim: int, key: Any) -> Any:
    return x[(slice(None),) * _dim(x, dim) + (key,)]  # type: ignore[index]


@answers("select")
def select(x: LazyTensor, dim: int, index: int) -> Any:
    return index_along(x, dim, index)


@answers("narrow")
def narrow(x: LazyTensor, dim: int, start: int, length: int) -> Any:
    n = x.shape[_dim(x, dim)]
    start = start + n if start < 0 else start
    if not 0 <= start <= start + length <= n:
        raise RuntimeError(f"start ({start}) + length ({length}) exceeds dimension size ({n}).")
    return index_along(x, dim, slice(start, start + length))


@answers("index_select")
def index_select(x: LazyTensor, dim: int, index: Tensor) -> Any:
    return index_along(x, dim, index)


@answers("split", "split_with_sizes")
def split(x: LazyTensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> Any:
    n = x.shape[_dim(x, dim)]
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
    return split(x, max(1, -(-x.shape[_dim(x, dim)] // chunks)), dim)


@answers("unbind")
def unbind(x: LazyTensor, dim: int = 0) -> Any:
    dim = _dim(x, dim)
    return NotImplemented if dim == x.vocab_dim else tuple(select(x, dim, i) for i in range(x.shape[dim]))

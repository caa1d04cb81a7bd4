"""A lazy tensor over the vocabulary: it holds its tokens, not its elements.

Every PyTorch function called on such a tensor arrives in ``__torch_function__``, and ``HANDLERS`` maps the function's name to
a handler. Where there is no handler, or it returns ``NotImplemented``, PyTorch computes the function on the materialised
tensor, with a warning. The handlers here answer metadata and arithmetic with numbers. The others are in ``lazy_views.py``
(shapes), ``linear_logits.py`` and ``lazy_products.py`` (joining), ``lazy_masks.py`` (conditions and masks),
``log_softmax.py`` (softmaxes), ``lazy_elementwise.py`` (any other function of each probability), ``lazy_reductions.py``
(reductions) and ``lazy_losses.py`` (losses).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import settings
from .autodiff import host_may_read, no_gradient, same_sizes, unknown, while_compiling
from .numerics import on_device

HANDLERS: dict[str, Callable[..., Any]] = {}
_KEYWORDS: dict[str, set[str] | None] = {}  # the keywords that a handler knows; None: any
# PyTorch's other names for an argument.
_ALIASES = {
    **dict.fromkeys(("a", "x", "x1"), "input"),
    **dict.fromkeys(("split_size", "split_sizes"), "split_size_or_sections"),
    **{"x2": "other", "axis": "dim", "axis0": "dim0", "axis1": "dim1", "keepdims": "keepdim"},
}

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_ASSIGNED = {f"__i{name}__" for name in _BINARY}
_OTHERS = """radd rsub rmul rtruediv rfloordiv rmod rpow matmul rmatmul neg pos abs invert lt le gt ge
    getitem setitem len contains bool int float index array"""
# Python looks these up in the class, not in the instance; __eq__, __ne__ and __iter__ are written out below.
_OPERATORS = (*_ASSIGNED, *(f"__{name}__" for name in (*_BINARY, *_OTHERS.split())))
_IN_PLACE = {name for of in (Tensor, torch, F) for name in dir(of) if name.endswith("_") and not name.startswith("_")}
_IN_PLACE |= {*_ASSIGNED, "__setitem__"}
COMPARISONS = {f"{_}{name}{_}" for name in ("gt", "ge", "lt", "le", "eq", "ne") for _ in ("", "__")}
COMPARISONS |= {"greater", "greater_equal", "less", "less_equal", "not_equal"}
_FOREACH = {name for name in dir(torch) if name.startswith("_foreach_") and name.endswith("_")}
# Meaningless here: a lazy tensor has no storage, no gradient and no hooks of its own.
_MEANINGLESS = {"data_ptr", "storage", "untyped_storage", "register_hook", "retain_grad", "backward", "set_"}
_WARNED: set[tuple[str, int, str]] = set()
_INTERNAL = tuple(os.path.dirname(os.path.realpath(m.__file__ or "")) + os.sep for m in (torch, settings))


if TYPE_CHECKING:  # type checkers take it for a tensor: what is written against logits needs no change
    from torch import Tensor as _Tensor

    from .linear_logits import LinearLogits
else:
    _Tensor = object


class LazyTensor(_Tensor):
    """Shape, metadata and dispatch; a subclass adds the tokens and the numbers."""

    vocab_dim: int
    dtype: torch.dtype
    shape: torch.Size
    token_shape: torch.Size
    device: torch.device
    requires_grad: bool
    wide: torch.dtype  # the dtype its numbers are computed in, whatever its own dtype
    answered: frozenset[str] | None = None  # the names it answers; None: all in HANDLERS

    def materialize(self) -> Tensor:
        """The tensor itself, differentiable, in ``dtype``."""
        raise NotImplementedError

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> Any:
        """This tensor with ``fn`` applied to every tensor it holds per token. ``fn`` gets each with its last dimension moved
        to the vocabulary's place, and returns it with that dimension at ``vocab_dim``. ``view``: eager would alias, not
        copy."""
        raise NotImplementedError

    def _of_numbers(self, fn: Callable[[Tensor], Tensor], vocab_dim: int) -> Callable[[Any], Any]:
        """``fn`` of :meth:`mapped`, adapted to a tensor with one number per token; a Python number stays as it is."""
        return lambda t: fn(t.unsqueeze(self.vocab_dim)).squeeze(vocab_dim) if isinstance(t, Tensor) else t

    def with_dtype(self, dtype: torch.dtype) -> Any:
        """The same numbers, labelled with another dtype."""
        raise NotImplementedError

    def as_view(self) -> Any:
        """Itself or a view, where eager may return a copy: a change in place of either is detected."""
        return self

    def as_copy(self) -> Any:
        """A copy that a change in place of this one does not reach."""
        return self.with_dtype(self.dtype)

    def columns(self, key: slice | Tensor) -> Any:
        """A slice of the vocabulary, or the entries an index ``(n,)`` names."""
        return NotImplemented

    def scaled(self, factor: Any) -> Any:
        return NotImplemented

    def divided(self, divisor: Any) -> Any:
        """Divided by one number per token; for one number for all tokens, see :meth:`scaled`."""
        return NotImplemented

    def shifted(self, offset: Any) -> Any:
        return NotImplemented

    def times(self, other: LazyTensor) -> Any:
        return NotImplemented

    def plus(self, other: LazyTensor | Tensor, sign: float) -> Any:
        """``self + sign · other``, where ``other`` has an element for each of this one's."""
        return NotImplemented

    def normalised(self, offset: Tensor) -> Any:
        """``self − offset`` as a ``log_softmax``, where ``offset`` is the logsumexp that was read from this tensor."""
        return NotImplemented

    def become(self, new: Any) -> Any:
        """Change this tensor in place to the numbers of ``new``, and return it."""
        return NotImplemented

    def become_changed(self, name: str, change: Callable[[Tensor], Any]) -> Any:
        """Change this tensor in place as PyTorch's ``name`` changes its elements, if it can hold those, and return it."""
        return NotImplemented

    def values_at(self, ids: Tensor) -> Any:
        """Values at ``ids (*token_shape, K)``, in the same shape."""
        return NotImplemented

    def value_at(self, ids: Tensor) -> Any:
        """The value at one id per token, in ``dtype``; the ids broadcast to ``token_shape``."""
        values = self.values_at(ids.expand(self.token_shape).unsqueeze(-1))
        return values if values is NotImplemented else values.squeeze(-1).to(self.dtype)

    def column(self, at: int | Tensor) -> Any:
        """The values of one entry of the vocabulary, ``token_shape``."""
        return self.value_at(from_front(self, on_device(at, self.device)))

    def vocab_sum(self) -> Any:
        """Sum over the vocabulary, ``token_shape``."""
        return NotImplemented

    # Values read from this tensor, which must equal its elements where the two are compared

    def reads(self) -> list[tuple[Any, int | Tensor, Tensor]]:
        """The known reads, each as a weak reference to the values, their version or a copy, and the ids."""
        return []

    def remember(self, values: Tensor, ids: Tensor) -> None:
        """Record a read of the entries at ids ``(*token_shape, K)``: ``values`` are all of them, or a view of them."""
        if torch.compiler.is_compiling():
            return
        root = values if values._base is None else values._base
        if root.numel() != ids.numel() or not root.is_contiguous() or root.storage_offset():
            return
        reads = self.reads()
        reads[:] = [known for known in reads if known[0]() is not None]
        if root.is_inference():  # it has no version counter, and its views do not know their base
            reads.append((lambda: root, root.clone(), ids.clone()))
        else:
            reads.append((weakref.ref(root), root._version, ids.clone()))

    def reread(self, elements: Tensor, t: Tensor) -> Tensor:
        """``t``; read again from ``elements`` if it was read from this tensor and has not changed since."""
        root = t if t._base is None else t._base
        for known, made, ids in self.reads():
            read: Any = known()
            if isinstance(made, Tensor):
                same = t.is_inference() and t.untyped_storage().data_ptr() == read.untyped_storage().data_ptr()
            else:
                same = read is root and root._version == made
            if not same:
                continue
            again = elements.movedim(self.vocab_dim, -1).gather(-1, ids)
            if isinstance(made, Tensor):
                again, read, made = again.flatten(), read.flatten(), made.flatten()
                again = torch.where(read == made, again, read)
            return again.as_strided(t.shape, t.stride(), t.storage_offset())
        return t

    # What Python and PyTorch ask of a tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        function = None if name.startswith("__") or name in _MEANINGLESS else getattr(Tensor, name, None)
        if not callable(function):
            # An attribute of DTensor, which PyTorch's own parallel styles ask a module's output for.
            styled = name == "placements"
            instead = "parallelize_module with VocabParallelHead" if styled else "materialize() gives the tensor"
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; {instead}")
        return lambda *args, **kwargs: dispatch(function, (self, *args), kwargs)

    def __eq__(self, other: object) -> Tensor:
        return self._compared("eq", torch.eq, other)

    def __ne__(self, other: object) -> Tensor:
        return self._compared("ne", torch.ne, other)

    def _compared(self, name: str, function: Callable[..., Any], other: Any) -> Any:
        other = _unboxed(other)
        comparable = isinstance(other, (Tensor, LazyTensor, int, float))
        return dispatch(function, (self, other), {}, name) if comparable else NotImplemented

    __hash__ = object.__hash__
    grad = None
    layout = torch.strided
    is_sparse = is_nested = is_quantized = False
    __array_priority__ = 1000  # as a Tensor's: NumPy's numbers leave operations with a lazy tensor to it

    def __iter__(self) -> Iterator[Tensor]:
        if self.ndim == 1 and self.dtype == torch.bool:
            # p[mask] gets here: PyTorch would take a mask's entries for a tuple of masks, and select something else.
            raise TypeError(
                f"a lazy mask {tuple(self.shape)} cannot index a tensor or be iterated over: materialize() it"
            )
        return iter(torch.unbind(self))

    if not TYPE_CHECKING:  # type checkers read Tensor's own
        ndim = property(lambda self: len(self.token_shape) + 1)
        is_cuda = property(lambda self: self.device.type == "cuda")
        is_cpu = property(lambda self: self.device.type == "cpu")
        is_meta = property(lambda self: self.device.type == "meta")
        itemsize = property(lambda self: self.dtype.itemsize)
        nbytes = property(lambda self: numel(self) * self.dtype.itemsize)
        data = property(lambda self: torch.detach(self))
        real = property(lambda self: self)
        is_leaf = property(lambda self: not self.requires_grad)
        T = property(lambda self: torch.permute(self, tuple(range(self.ndim))[::-1]))
        mT = property(lambda self: torch.transpose(self, -2, -1))
        mH = property(lambda self: self.mT)


def held(x: Any) -> dict[str, Any]:
    """The attributes that a copy of ``x`` has too."""
    return {name: value for name, value in vars(x).items() if name not in ("family", "read")}


class Derived(LazyTensor):
    """A tensor made of lazy logits, with their shape, device and precision."""

    base: Any
    # The tensors that would alias this one in eager, which a change in place would have to reach; weak references, if not
    # compiled.
    family: Any = None
    read: Any = None  # reads of its own entries, not of a copy's

    def __getstate__(self) -> dict[str, Any]:
        return held(self)

    def reads(self) -> list[tuple[Any, int | Tensor, Tensor]]:
        self.read = [] if self.read is None else self.read
        return self.read

    def __copy__(self) -> Any:
        return self.mapped(lambda t: t, self.vocab_dim)

    def divided(self, divisor: Any) -> Any:
        fits = per_token_number(self, divisor) is not NotImplemented
        return self.scaled(1 / divisor.to(self.wide)) if fits else NotImplemented

    def aliasing(self, new: Any, view: bool = True) -> Any:
        """``new``, made of this tensor and, if ``view``, recorded as its alias: eager would alias, not copy."""
        if view and torch.compiler.is_compiling():
            self.family = new.family = True
        elif view:
            self.family = self.family or [weakref.ref(self)]
            self.family.append(weakref.ref(new))
            new.family = self.family
        return new

    @property
    def fixed(self) -> bool:
        """Whether a change in place would miss another view, or lose the gradient."""
        family = self.family or ()
        viewed = family is True or (torch.compiler.is_compiling() and len(family) > 0)
        viewed = viewed or any(x() is not None and x() is not self for x in family)
        return viewed or (self.requires_grad and no_gradient())

    def become(self, new: Any) -> Any:
        if type(new) is not type(self) or self.fixed:
            return NotImplemented
        new = new if new.dtype == self.dtype else new.with_dtype(self.dtype)
        self.read = None
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            setattr(self, field.name, getattr(new, field.name))
        return self

    vocab_dim = property(lambda self: self.base.vocab_dim)
    wide = property(lambda self: self.base.wide)
    token_shape = property(lambda self: self.base.token_shape)
    shape = property(lambda self: self.base.shape)
    device = property(lambda self: self.base.device)
    grad_fn = property(lambda self: self.base.grad_fn)


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

        parameters = inspect.signature(handler).parameters
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in names:
            HANDLERS[name] = handler if anywhere else first
            _KEYWORDS[name] = None if any_keyword else {*parameters, "input"}
            if hasattr(Tensor, name) and not name.startswith("__"):
                setattr(LazyTensor, name, _method(name))
        return handler

    return register


def answers_in_place(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler under the names of in-place functions: their first argument becomes what the handler returns."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        @answers(*names)
        @functools.wraps(handler)
        def change(x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
            return x.become(handler(x, *args, **kwargs))

        return handler

    return register


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> Any:
    """The result of ``func(*args, **kwargs)`` where some of the arguments are lazy."""
    from .lazy_elementwise import recorded

    name = name or func.__name__
    if name == "wrapped":  # the name these have when PyTorch 2.15 compiles them
        name = next((n for n in ("__rsub__", "__rdiv__", "__rpow__") if func is getattr(Tensor, n)), name)
    if not args and is_lazy(kwargs.get("input")) and name != "where":  # where's first argument is not input
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    args = tuple(map(_unboxed, args))
    kwargs = {key: _unboxed(value) for key, value in kwargs.items() if key != "out" or value is not None}
    if isinstance(kwargs.get("out"), LazyTensor):
        raise RuntimeError(f"{name} cannot write into {_called(kwargs['out'])}: it has no storage")
    first = args[0] if args else None
    found = _answer(func, first, args, kwargs, name) if "out" not in kwargs else NotImplemented
    if found is not NotImplemented:
        return found
    if isinstance(first, LazyTensor) and (name in _IN_PLACE or kwargs.get("inplace") is True):
        if name in _ASSIGNED and not is_number(args[1]) and not isinstance(args[1], (Tensor, LazyTensor)):
            return NotImplemented  # as a tensor's operators do
        return _changed(func, first, args[1:], kwargs, name)
    if name in _FOREACH:
        raise RuntimeError(
            f"{name} would change lazy logits in place, which have no elements to write to: materialize() them"
        )
    found = recorded(func, name, args, kwargs) if "out" not in kwargs else NotImplemented
    if found is not NotImplemented:
        return found
    if func is Tensor.matmul and not is_lazy(first) and torch.compiler.is_dynamo_compiling():  # it does so for z @ t
        raise RuntimeError("compiled code cannot tell z @ t from t @ z where z is lazy: write torch.matmul")
    if name in COMPARISONS and not kwargs:
        return func(*_comparable(name, *args))
    return func(*materialised(name, args), **materialised(name, kwargs))


def _answer(func: Callable[..., Any], first: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The result of the handler of that name; ``NotImplemented`` if there is none, if ``first`` does not answer that name, or
    if the handler does not know the keywords."""
    if name not in HANDLERS or func is torch.kl_div:  # its reduction is an integer, and none by default
        return NotImplemented
    if isinstance(first, LazyTensor) and first.answered is not None and name not in first.answered:
        return NotImplemented
    named, known = {_ALIASES.get(key, key): value for key, value in kwargs.items()}, _KEYWORDS[name]
    return HANDLERS[name](*args, **named) if known is None or known.issuperset(named) else NotImplemented


def _changed(func: Callable[..., Any], x: LazyTensor, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """``x`` after ``func`` changed its elements in place."""
    from .lazy_elementwise import changed

    done = x.become(changed(x, name, args, kwargs))
    if done is not NotImplemented:
        return done
    done = x.become_changed(name, lambda t: func(t, *materialised(name, args), **materialised(name, kwargs)))
    if done is not NotImplemented:
        return done
    why = "has no elements to write to, so its views would not follow"
    if x.requires_grad and no_gradient():
        why = "would lose its gradient under no_grad"
    if torch.compiler.is_compiling():
        why = "a compiled function cannot follow"
    raise RuntimeError(
        f"{name} would change {_called(x)} {tuple(x.shape)} in place, which {why}. Use the out-of-place form, or "
        "materialize() before."
    )


def _unboxed(x: Any) -> Any:
    """A NumPy number as the Python number that PyTorch takes it for, and a NumPy array as a tensor."""
    if type(x).__module__ != "numpy" or not hasattr(x, "ndim"):
        return x
    return torch.tensor(x) if x.ndim else x.item()


def materialised(name: str, arguments: Any) -> Any:
    found = {id(x): x for x in tree_leaves(arguments, is_leaf=is_lazy) if is_lazy(x)}
    for x in found.values():
        report(name, x)
    tensors = {key: x.materialize() for key, x in found.items()}
    return tree_map(lambda x: tensors[id(x)] if is_lazy(x) else x, arguments, is_leaf=is_lazy)


def _comparable(name: str, x: Any, y: Any) -> tuple[Any, Any]:
    """Both, materialised. If one was read from the other, it is read again from the other's elements, so that they are equal:
    other products round differently."""
    a, b = materialised(name, (x, y))
    if is_lazy(x) and isinstance(y, Tensor):
        b = x.reread(a, y)
    elif is_lazy(y) and isinstance(x, Tensor):
        a = y.reread(b, x)
    return a, b


def wrap_dim(x: LazyTensor, dim: int, extra: int = 0) -> int:
    """``dim`` counted from the front, in a tensor with ``extra`` more dimensions than ``x``."""
    n = x.ndim + extra
    if not -n <= dim < n:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {dim})")
    return dim % n


def over_vocab(x: LazyTensor, dim: Any) -> bool:
    """Whether a reduction over ``dim`` is over the vocabulary, or over all dimensions."""
    return dim is None or (isinstance(dim, int) and wrap_dim(x, dim) == x.vocab_dim)


def with_dim(t: Tensor, x: LazyTensor, keepdim: bool) -> Tensor:
    """``t (*token_shape)``, reduced over the vocabulary of ``x``, with a dimension of 1 there if ``keepdim``."""
    return t.unsqueeze(x.vocab_dim) if keepdim else t


def from_front(x: LazyTensor, ids: Tensor, dim: int | None = None) -> Tensor:
    """``ids`` along a dimension, by default the vocabulary's, with negative ones, which count from its end, made positive."""
    return torch.where(ids < 0, ids + x.shape[x.vocab_dim if dim is None else dim], ids)


def is_lazy(x: Any) -> TypeGuard[LinearLogits]:
    return isinstance(x, LazyTensor)


def check_is_logits(name: str, x: Any) -> None:
    """Raise TypeError unless ``x`` is a tensor or a LinearLogits."""
    if not isinstance(x, Tensor) and (not is_lazy(x) or isinstance(x, Derived)):
        made = f" {tuple(x.shape)}, made of one: materialize() it" if is_lazy(x) else ""
        raise TypeError(f"{name} must be a Tensor or a LinearLogits, got a {type(x).__name__}{made}")


def _called(x: LazyTensor) -> str:
    """The name of ``x`` in messages, whose readers know no class but LinearLogits."""
    return "a tensor made of LinearLogits" if isinstance(x, Derived) else "LinearLogits"


def report(name: str, x: LazyTensor) -> None:
    # Dynamic sizes have no values while a function is compiled.
    size = "" if torch.compiler.is_compiling() else f" {tuple(x.shape)}: {x.nbytes:,} bytes"
    message = (
        f"{name} materialises {_called(x)}{size}. Reduce over the vocabulary with an operation that stays lazy ('Lazy or not' "
        "in docs/losses.md says what to write instead), or call materialize() if this is intended."
    )
    if settings.strict.value:
        raise RuntimeError(message)
    _warn_once(name, message)


@while_compiling
def _warn_once(name: str, message: str) -> None:
    """Warn at the first frame outside this package and PyTorch, once for each line and operation."""
    frame: Any = sys._getframe()
    while frame.f_back is not None and os.path.realpath(frame.f_code.co_filename).startswith(_INTERNAL):
        frame = frame.f_back
    site = (frame.f_code.co_filename, frame.f_lineno, name)
    if site not in _WARNED:
        _WARNED.add(site)
        warnings.warn_explicit(message, UserWarning, *site[:2])


def _grad(outputs: Any, inputs: Any, *_: Any, **__: Any) -> Any:
    if any(map(is_lazy, tree_leaves(inputs, is_leaf=is_lazy))):
        raise RuntimeError(
            "lazy logits get no gradient of their own: ask for that of hidden and weight, or of materialize()"
        )
    return NotImplemented


# This answers torch.autograd.grad, not the attribute grad, which is None as for any tensor that is not a leaf.
HANDLERS["grad"], _KEYWORDS["grad"] = _grad, None


# Metadata


@answers("size")
def size(x: LazyTensor, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


@answers("dim", "ndimension")
def dim(x: LazyTensor) -> int:
    return x.ndim


@answers("stride")
def stride(x: LazyTensor, dim: int | None = None) -> Any:
    # As an expanded tensor's, because there is no storage: code that would read through a pointer declines.
    return (0,) * x.ndim if dim is None else 0 * wrap_dim(x, dim)


@answers("numel", "nelement")
def numel(x: LazyTensor) -> int:
    return math.prod(x.shape)


def _of_any_size(name: str) -> None:
    """Answer a method that depends on dtype and device alone, as a tensor without elements does."""
    function = getattr(Tensor, name)

    @answers(name)
    def answer(x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        return function(torch.empty(0, dtype=x.dtype, device=x.device), *args, **kwargs)


for _name in (
    "element_size", "is_complex", "is_conj", "is_floating_point", "is_signed", "new_empty", "new_full", "new_ones",
    "new_tensor", "new_zeros",
):  # fmt: skip
    _of_any_size(_name)


def _of_its_size(name: str) -> None:
    """Answer a function that returns a new tensor of the same size, whatever this one holds."""
    function = getattr(torch, name)

    @answers(name)
    def answer(x: LazyTensor, *args: Any, **kwargs: Any) -> Any:
        of = torch.empty(1, dtype=x.dtype, device=x.device).expand(x.shape)
        return function(of, *args, **{"memory_format": torch.contiguous_format, **kwargs})


for _name in ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"):
    _of_its_size(_name)


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
    return x.as_view()


@answers("clone")
def clone(x: LazyTensor, **_: Any) -> LazyTensor:
    return x.mapped(torch.clone, x.vocab_dim, view=False)


@answers("detach")
def detach(x: Any) -> Any:
    return x.detach()


def _stand_in(x: Any) -> Any:
    return torch.empty(0, dtype=x.dtype, device=x.device) if is_lazy(x) else x


@answers("to", anywhere=True)
def to(x: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_lazy(x):
        return x.to(*map(_stand_in, args), **{name: _stand_in(value) for name, value in kwargs.items()})
    flags = [a for a in args if isinstance(a, bool)]  # non_blocking, copy
    copy = kwargs.get("copy", flags[1:] == [True])
    dtype = device = None
    for a in (*args, *kwargs.values()):
        if isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, (str, torch.device, int)) and not isinstance(a, bool):
            device = a
        elif is_lazy(a) or isinstance(a, Tensor):
            dtype, device = a.dtype, a.device
    if device is not None and not _same_device(torch.device(device), x.device):
        return NotImplemented
    if dtype is None or dtype == x.dtype:
        return clone(x) if copy else x
    return x.with_dtype(dtype) if dtype.is_floating_point else NotImplemented


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index is None or a.index == b.index)


def _of_dtype(name: str) -> None:
    dtype = getattr(torch, name)

    @answers(name)
    def answer(x: LazyTensor, **_: Any) -> Any:
        return to(x, dtype)


for _name in ("float", "double", "half", "bfloat16"):
    _of_dtype(_name)


@answers("type")
def type_(x: LazyTensor, dtype: Any = None, **_: Any) -> Any:
    return to(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@answers("type_as", anywhere=True)
def type_as(x: Any, other: Any) -> Any:
    return to(x, other.device, other.dtype)


@answers("result_type", anywhere=True)
def result_type(*args: Any, **kwargs: Any) -> torch.dtype:
    return torch.result_type(*map(_stand_in, args), **{name: _stand_in(value) for name, value in kwargs.items()})


@answers("requires_grad_")
def requires_grad_(x: LazyTensor, requires_grad: bool = True) -> Any:
    if requires_grad != x.requires_grad:
        raise RuntimeError(f"lazy logits {tuple(x.shape)} get no gradient of their own: set it of hidden and weight")
    return x


@answers("expand_as", anywhere=True)
def expand_as(x: Any, other: Any) -> Any:
    return x.expand(other.shape)


@answers("cpu")
def cpu(x: LazyTensor, **_: Any) -> Any:
    return to(x, "cpu")


@answers("cuda")
def cuda(x: LazyTensor, device: Any = None, **_: Any) -> Any:
    return to(x, "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device)


# Arithmetic


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat))


def per_token_number(x: LazyTensor, t: Any) -> Any:
    """``t``, which broadcasts against ``x`` with one number per token, as a copy of ``token_shape`` in ``x.wide``."""
    if not isinstance(t, Tensor) or t.ndim > x.ndim or t.is_complex():
        return NotImplemented
    if (number := host_number(t)) is not NotImplemented:
        t = on_device(number, x.device, t.dtype)  # copying it would wait for the device
    t = t.reshape((1,) * (x.ndim - t.ndim) + t.shape)

    def fits(d: int) -> bool:
        n = t.shape[d]
        return (not unknown(n) and n == 1) or (d != x.vocab_dim and same_sizes(t.shape[d : d + 1], x.shape[d : d + 1]))

    if not all(map(fits, range(x.ndim))):
        return NotImplemented
    return t.squeeze(x.vocab_dim).to(x.device, x.wide, copy=True).expand(x.token_shape)


def coefficient(x: LazyTensor, t: Any) -> Any:
    """``t`` as a factor or an offset of ``x``: a number, or one per token."""
    number = host_number(t)
    return per_token_number(x, t) if number is NotImplemented else number


def multiplied(x: Any, y: Any) -> Any:
    """The product of two coefficients; a 1 leaves the other as it is, for :func:`number_of`."""
    return y if is_number(x) and x == 1 else x * y


def number_of(t: Any) -> Any:
    """The single number that the coefficient ``t`` holds for all tokens, read from its device."""
    if is_number(t):
        return t
    single = isinstance(t, Tensor) and all(n == 1 or step == 0 for n, step in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((), ()).item() if single and not t.requires_grad and host_may_read(t) else NotImplemented


def host_number(t: Any) -> Any:
    """``t`` as a Python number, if it is one or a tensor without dimensions on the CPU, which the host may read."""
    on_host = isinstance(t, Tensor) and t.ndim == 0 and t.is_cpu and not t.is_complex()
    return number_of(t) if on_host or is_number(t) else NotImplemented


def per_entry_number(x: LazyTensor, t: Any) -> Any:
    """``t``, which broadcasts against ``x`` with one number per entry of the vocabulary, as ``(V,)``."""
    if not isinstance(t, Tensor) or t.ndim > x.ndim or not t.is_floating_point():
        return NotImplemented
    shape = (1,) * (x.ndim - t.ndim) + t.shape
    fits = all(n == (x.shape[d] if d == x.vocab_dim else 1) for d, n in enumerate(shape))
    return t.reshape(-1) if fits else NotImplemented


def _as_large(x: LazyTensor, other: Any) -> bool:
    """Whether ``other`` has an element for each element of ``x``."""
    return is_lazy(other) or (isinstance(other, Tensor) and other.shape == x.shape and x.shape[x.vocab_dim] != 1)


def _promoted(result: Any, x: LazyTensor, other: Any) -> Any:
    """``result``, made of ``x`` and ``other``, in PyTorch's promoted dtype: a tensor without dimensions does not affect it."""
    if result is NotImplemented or not isinstance(other, Tensor) or other.ndim == 0:
        return result
    return to(result, torch.promote_types(x.dtype, other.dtype))


@answers_in_place("mul_", "multiply_", "__imul__")
@answers("mul", "multiply", "__mul__", "__rmul__", anywhere=True)
def mul(input: Any, other: Any) -> Any:
    if is_lazy(input) and is_lazy(other):
        return input.times(other)
    x, factor = (input, other) if is_lazy(input) else (other, input)
    return _promoted(x.scaled(factor), x, factor)


@answers_in_place("div_", "divide_", "true_divide_", "__itruediv__")
@answers("div", "divide", "true_divide", "__truediv__")
def div(x: LazyTensor, other: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None or is_lazy(other):
        return NotImplemented
    if is_number(other):
        return NotImplemented if other == 0 else x.scaled(1 / other)
    return _promoted(x.divided(other), x, other)


@answers("__rdiv__", "__rtruediv__", anywhere=True)
def rdiv(input: Any, other: Any) -> Any:
    return div(other, input) if is_lazy(other) else NotImplemented  # compiled code calls this to divide a lazy tensor


@answers("positive", "__pos__")
def positive(x: LazyTensor) -> LazyTensor:
    return x


@answers("neg", "negative", "__neg__")
def neg(x: LazyTensor) -> Any:
    return x.scaled(-1)


@answers_in_place("add_", "__iadd__")
@answers("add", "__add__", "__radd__", anywhere=True)
def add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if alpha != 1:
        return NotImplemented
    x, offset = (input, other) if is_lazy(input) else (other, input)
    found = x.plus(offset, 1.0) if _as_large(x, offset) else x.shifted(offset)
    return _promoted(found, x, offset)


@answers_in_place("sub_", "subtract_", "__isub__")
@answers("sub", "subtract", "__sub__", anywhere=True)
def sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    if alpha != 1:
        return NotImplemented
    normal = input.normalised(other) if is_lazy(input) and isinstance(other, Tensor) else NotImplemented
    if normal is not NotImplemented:
        return normal
    if is_lazy(input) and _as_large(input, other):
        return _promoted(input.plus(other, -1.0), input, other)
    if is_lazy(input):
        integers = isinstance(other, Tensor) and not other.is_floating_point()
        return _promoted(input.shifted(-(other.to(input.wide) if integers else other)), input, other)
    negated = other.scaled(-1)
    return negated if negated is NotImplemented else add(negated, input)


@answers("rsub", "__rsub__", anywhere=True)
def rsub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return sub(other, input, alpha=alpha)


@answers("lerp")
def lerp(x: LazyTensor, end: Any, weight: Any) -> Any:
    if not is_lazy(end) or not is_number(weight):
        return NotImplemented
    parts = x.scaled(1 - weight), end.scaled(weight)
    return NotImplemented if any(part is NotImplemented for part in parts) else parts[0].plus(parts[1], 1.0)

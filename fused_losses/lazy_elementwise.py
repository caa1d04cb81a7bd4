"""Any other function of the entries of lazy probabilities: recorded, and computed when it is summed over the vocabulary.

What a loss does to each entry by itself (``(p + 1e-9).log()``, ``sqrt``, ``where(p > 0, …)``, sums and products with a
teacher's probabilities that exist, the square of a difference of logits) needs whole rows for a moment only.
:class:`LazyElementwise` keeps the functions, and ``lazy_rows.py`` calls them on a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .autodiff import no_gradient, traced, transforms_active
from .lazy_masks import LazyMask
from .lazy_products import Dense, Elementwise, LazyMixture, LazyProducts, LazyStack
from .lazy_tensor import COMPARISONS, Derived, LazyTensor, held, is_lazy, is_number
from .linear_logits import LinearLogits
from .log_softmax import LazyExpression

DEEPEST = 64  # nested functions; Python's stack is limited

_NAMES = """
abs absolute add clamp clamp_max clamp_min clip div divide exp exp2 expm1 isfinite isinf isnan kl_div lerp log log10 log1p log2
logaddexp logical_and logical_not logical_or masked_fill maximum minimum mul multiply nan_to_num neg negative pow reciprocal
relu rsqrt rsub sigmoid softplus special_entr special_xlogy sqrt square sub subtract tanh true_divide where xlogy
__abs__ __add__ __and__ __invert__ __mul__ __neg__ __or__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__ __rtruediv__
__sub__ __truediv__
"""
DISTANCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
POINTWISE = {*_NAMES.split(), *COMPARISONS, *DISTANCES}
# Functions of logits are recorded only if a loss sums them. Any other, which a softmax may follow, is materialised at once, for
# all that read it.
_OF_LOGITS = {*DISTANCES, "abs", "absolute", "__abs__", "square", "pow", "__pow__", "sub", "subtract", "__sub__"}
IN_PLACE = {f"{name}_": name for name in POINTWISE}
IN_PLACE |= {f"__i{name}__": f"__{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or")}


@dataclass(eq=False, repr=False)
class LazyElementwise(Elementwise):
    """``function(*args, **kwargs)``, entry by entry, where some of the arguments are lazy."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # tensors among them are Dense
    kwargs: dict[str, Any]
    dtype: torch.dtype
    base = None  # this and the next are set from the arguments
    requires_grad = False

    def __post_init__(self) -> None:
        leaves = tree_leaves((self.args, self.kwargs), is_leaf=is_lazy)
        first = next(x for x in leaves if is_lazy(x))
        self.base = first if isinstance(first, LinearLogits) else first.base
        self.depth = 1 + max(getattr(x, "depth", 0) for x in leaves)
        self.requires_grad = self.dtype.is_floating_point and any(getattr(x, "requires_grad", False) for x in leaves)
        if self.requires_grad and no_gradient():
            vars(self).update(vars(self._detached()))

    def __repr__(self) -> str:
        return f"LazyElementwise({tuple(self.shape)}, {self.dtype}, {self.function.__name__} of {self.base})"

    def materialize(self) -> Tensor:
        """The elements themselves, differentiable, in ``dtype``; nothing is rounded to 16 bits on the way."""

        def elements(x: Any) -> Tensor:
            if isinstance(x, Dense):
                return self._widened(x.elements())
            if isinstance(x, LinearLogits):  # made once for all that read them
                return x.elements().to(torch.promote_types(x.dtype, self.wide))
            mask = x.dtype == torch.bool
            return (x if mask else x.with_dtype(torch.promote_types(x.dtype, self.wide))).materialize()

        return _fold(self, elements, _value).to(self.dtype)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyElementwise:
        def mapped(x: Any) -> Any:
            if not isinstance(x, Dense):
                return x.mapped(fn, vocab_dim, view=view)
            t = x.elements()
            return Dense(fn(expanded(t, self)) if t.ndim else t)

        return self.aliasing(_fold(self, mapped, _with_arguments), view)

    def with_dtype(self, dtype: torch.dtype) -> LazyElementwise:
        # A mask that is cast to a float passes no gradient.
        return replace(self if self.dtype.is_floating_point else self._detached(), dtype=dtype)

    def values_at(self, ids: Tensor) -> Any:
        """The function of the arguments' values at ``ids``."""

        def read(x: Any) -> Any:
            if not isinstance(x, Dense):
                return x.values_at(ids)
            t = vocab_last(x, self)
            return self._widened(t.gather(-1, ids) if t.ndim and t.shape[-1] == self.shape[self.vocab_dim] else t)

        def value(x: LazyElementwise, args: Any, kwargs: Any) -> Any:
            known = not any(y is NotImplemented for y in tree_leaves((args, kwargs)))
            return _value(x, args, kwargs) if known else NotImplemented

        return _fold(self, read, value)

    def _widened(self, t: Tensor) -> Tensor:
        """``t``, wide if it is floating-point: lerp does not mix dtypes, nor does the backward of some losses."""
        return t.to(torch.promote_types(t.dtype, self.wide)) if t.is_floating_point() else t

    def _detached(self) -> LazyElementwise:
        return _fold(
            self, lambda x: Dense(x.elements().detach()) if isinstance(x, Dense) else x.detach(), _with_arguments
        )

    def detach(self) -> LazyElementwise:
        return self.aliasing(self._detached())

    def become(self, new: Any) -> Any:
        done = super().become(new)
        if done is self and isinstance(self, LazyElementwise):
            self.__post_init__()  # depth and requires_grad are not dataclass fields
        return done


def _fold(x: Any, leaf: Callable[[Any], Any], make: Callable[[Any, Any, Any], Any], known: Any = None) -> Any:
    """``x`` rebuilt from the inside out: ``make`` takes each :class:`LazyElementwise` and its new arguments, ``leaf`` anything
    else that is lazy or dense; each is taken once, however often it is used."""
    known = {} if known is None else known
    if not isinstance(x, (LazyTensor, Dense)):
        return x
    if (key := key_of(x)) not in known:
        if isinstance(x, LazyElementwise):
            given = tree_map(lambda y: _fold(y, leaf, make, known), (x.args, x.kwargs), is_leaf=is_lazy)
            known[key] = make(x, *given)
        else:
            known[key] = leaf(x)
    return known[key]


def _value(x: LazyElementwise, args: Any, kwargs: Any) -> Tensor:
    """The function's result, wide; one that is not floating-point, such as a mask, in the dtype it was cast to since."""
    found = x.function(*args, **kwargs)
    if found.is_floating_point():
        return found
    return found.to(torch.promote_types(x.dtype, x.wide) if x.dtype.is_floating_point else x.dtype)


def _with_arguments(x: LazyElementwise, args: Any, kwargs: Any) -> LazyElementwise:
    return replace(x, args=args, kwargs=kwargs)


def expanded(t: Tensor, x: LazyTensor) -> Tensor:
    """``t``, which broadcasts to the shape of ``x``, expanded to all its tokens; the vocabulary keeps ``V`` entries or 1."""
    t = t.reshape((1,) * (x.ndim - t.ndim) + t.shape)
    return t.expand([-1 if d == x.vocab_dim else n for d, n in enumerate(x.shape)])


def vocab_last(x: Dense, like: LazyTensor) -> Tensor:
    """The numbers of ``x`` for the tokens of ``like``, the vocabulary last; a single number as it is."""
    t = x.elements()
    return expanded(t, like).movedim(like.vocab_dim, -1) if t.ndim > 0 else t


def recorded(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A :class:`LazyElementwise`, if ``function`` is one of each entry of probabilities and of what broadcasts to them."""
    if name not in POINTWISE or torch.compiler.is_compiling():
        return NotImplemented
    leaves = tree_leaves((args, kwargs), is_leaf=is_lazy)
    operands: list[Any] = [x for x in leaves if isinstance(x, (Tensor, LazyTensor))]
    lazy = [x for x in operands if is_lazy(x)]
    # A tensor filled with 0 where a lazy mask is True will be summed; filled with another value it may be meant for anything.
    emptied = name == "masked_fill" and is_number(args[-1]) and args[-1] == 0
    emptied = emptied and all(isinstance(x, LazyMask) for x in lazy)
    summed = name in _OF_LOGITS or any(map(_of_probabilities, lazy))
    if not (emptied or summed) or not computable(*lazy):
        return NotImplemented
    if max(getattr(y, "depth", 0) for y in lazy) >= DEEPEST:
        return NotImplemented
    if name in COMPARISONS and len(lazy) < len(operands):
        return NotImplemented  # the tensor may have been read from the lazy one, and must then equal it
    x = lazy[0]
    if not all(beside(y, x) for y in operands):
        return NotImplemented

    def entry(y: Any) -> Any:
        known = isinstance(y, (Tensor, LazyTensor))
        return torch.ones((1,) * y.ndim, dtype=y.dtype, device=y.device) if known else y

    def operand(y: Any) -> Any:  # a copy; a tensor of the full shape is not copied, and must not change
        if isinstance(y, Tensor):
            return Dense(y if y.shape == x.shape else y.clone())
        if isinstance(y, LinearLogits):
            return y.as_copy()
        return copy_with(y, lambda t: t) if isinstance(y, Derived) else y

    with torch.no_grad():  # for the dtype
        one = function(*tree_map(entry, args, is_leaf=is_lazy), **tree_map(entry, kwargs, is_leaf=is_lazy))
    if not isinstance(one, Tensor) or one.ndim != x.ndim:
        return NotImplemented  # a reduction
    args, kwargs = tree_map(operand, (args, kwargs), is_leaf=is_lazy)
    return LazyElementwise(function, args, kwargs, one.dtype)


def changed(x: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x`` after the change in place of that name, as :func:`recorded` gives it."""
    plain = IN_PLACE.get(name)
    if plain is None or not isinstance(x, Derived) or "inplace" in kwargs:
        return NotImplemented
    found = recorded(getattr(Tensor, plain), plain, (x, *args), kwargs)
    return found if found is NotImplemented or torch.can_cast(found.dtype, x.dtype) else NotImplemented


def _of_probabilities(x: Any) -> bool:
    if isinstance(x, LazyExpression):
        return x.form not in ("logits", "tanh")
    return isinstance(x, (LazyMixture, LazyProducts, LazyElementwise))


def beside(y: Any, x: LazyTensor) -> bool:
    """Whether ``y``, a lazy tensor or a tensor that broadcasts, can be combined with ``x`` entry by entry."""
    if y.device != x.device and y.ndim > 0:
        return False
    if is_lazy(y):
        return y.shape == x.shape and y.vocab_dim == x.vocab_dim
    sizes = (1,) * (x.ndim - y.ndim) + tuple(y.shape)
    return y.ndim <= x.ndim and all(n in (1, size) for n, size in zip(sizes, x.shape, strict=True))


def computable(*lazy: LazyTensor) -> bool:
    """Whether their elements may be made a few rows at a time."""
    bases = [x if isinstance(x, LinearLogits) else x.base for x in lazy if not isinstance(x, LazyStack)]
    own = len(bases) == len(lazy) and not torch.compiler.is_compiling() and not transforms_active()
    return own and all(z.shard is None and not traced(z.hidden) for z in bases)


def key_of(x: Any) -> Any:
    """A key that is equal for ``x`` and a copy of it, which holds the same objects."""
    return type(x), *map(id, held(x).values())


def copy_with(x: Derived, fn: Callable[[Any], Any]) -> Any:
    """A copy of ``x`` with ``fn`` applied to each attribute."""
    new = object.__new__(type(x))
    new.__dict__ = {name: fn(value) for name, value in held(x).items()}
    return new

"""Any other function of the entries of lazy probabilities: recorded, and computed when it is summed over the vocabulary.

What a loss does to each entry by itself (``(p + 1e-9).log()``, ``sqrt``, ``where(p > 0, …)``, sums and products with a
teacher's probabilities that exist, the square of a difference of logits) needs whole rows for a moment only.
:class:`LazyElementwise` keeps the functions, and :func:`row_sums` calls them on as many rows of logits as the workspace
holds, again in backward, where autograd gives the gradient of those rows' logits and route ``gradients_in_forward`` its
products: ``8NVH`` floating point operations for each sum, as ``recompute``. For that :func:`_flattened` puts slots where the
expression has logits and tensors, and :func:`_filled` some rows of them into the slots. Where the workspace holds all rows the
elements are made, once for all sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .autodiff import (
    check_differentiable,
    differentiable_gradients,
    in_plain_pytorch,
    no_gradient,
    save_for_backward,
    saved_tensors,
    traced,
    transforms_active,
)
from .chunked.softmax_rows import transform
from .gradients_in_forward import in_range, loss_and_gradients
from .head import INPUTS, Head, budget, head_of, ready, whole_logits
from .lazy_masks import LazyMask
from .lazy_products import Dense, Elementwise, LazyMixture, LazyProducts, LazyStack
from .lazy_tensor import COMPARISONS, Derived, LazyTensor, held, is_lazy, is_number
from .linear_logits import LinearLogits, same_logits
from .log_softmax import LazyExpression
from .numerics import full_precision, statistics_dtype, wide_dtype, wide_sum
from .settings import resolve_backend

DEEPEST = 64  # of functions of functions; Python's stack ends somewhere
COPIES = 2  # of a few rows of logits, for each function of them: what it makes, and autograd holds

_NAMES = """
abs absolute add clamp clamp_max clamp_min clip div divide exp exp2 expm1 isfinite isinf isnan kl_div lerp log log10 log1p log2
logaddexp logical_and logical_not logical_or masked_fill maximum minimum mul multiply nan_to_num neg negative pow reciprocal
relu rsqrt rsub sigmoid softplus special_entr special_xlogy sqrt square sub subtract tanh true_divide where xlogy
__abs__ __add__ __and__ __invert__ __mul__ __neg__ __or__ __pow__ __radd__ __rdiv__ __rmul__ __rpow__ __rsub__ __rtruediv__
__sub__ __truediv__
"""
DISTANCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
POINTWISE = {*_NAMES.split(), *COMPARISONS, *DISTANCES}
# Of logits only what a loss sums. What else a softmax may follow is made at once, for all that read it.
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
    base = None  # from here on as the arguments say
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
        """The elements themselves, differentiable, in ``dtype``; rounded to no 16 bits on the way."""

        def elements(x: Any) -> Tensor:
            if isinstance(x, Dense):  # wide too: before PyTorch 2.13 the backward of mse_loss takes no two dtypes
                t = x.elements()
                return t.to(torch.promote_types(t.dtype, self.wide)) if t.is_floating_point() else t
            if isinstance(x, LinearLogits):  # once for all that want them
                return x.elements().to(torch.promote_types(x.dtype, self.wide))
            mask = x.dtype == torch.bool
            return (x if mask else x.with_dtype(torch.promote_types(x.dtype, self.wide))).materialize()

        return _fold(self, elements, _value).to(self.dtype)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyElementwise:
        def mapped(x: Any) -> Any:
            if not isinstance(x, Dense):
                return x.mapped(fn, vocab_dim, view=view)
            t = x.elements()
            return Dense(fn(_expanded(t, self)) if t.ndim else t)

        return self.aliasing(_fold(self, mapped, _with_arguments), view)

    def with_dtype(self, dtype: torch.dtype) -> LazyElementwise:
        # A mask that is cast to a float passes no gradient.
        return replace(self if self.dtype.is_floating_point else self._detached(), dtype=dtype)

    def values_at(self, ids: Tensor) -> Any:
        """The function of the arguments' values there."""

        def read(x: Any) -> Any:
            if not isinstance(x, Dense):
                return x.values_at(ids)
            t = x.elements()
            t = _expanded(t, self).movedim(self.vocab_dim, -1) if t.ndim else t
            return t.gather(-1, ids) if t.ndim and t.shape[-1] == self.shape[self.vocab_dim] else t

        def value(x: LazyElementwise, args: Any, kwargs: Any) -> Any:
            known = not any(y is NotImplemented for y in tree_leaves((args, kwargs)))
            return _value(x, args, kwargs) if known else NotImplemented

        return _fold(self, read, value)

    def _detached(self) -> LazyElementwise:
        return _fold(
            self, lambda x: Dense(x.elements().detach()) if isinstance(x, Dense) else x.detach(), _with_arguments
        )

    def detach(self) -> LazyElementwise:
        return self.aliasing(self._detached())

    def become(self, new: Any) -> Any:
        done = super().become(new)
        if done is self and isinstance(self, LazyElementwise):
            self.__post_init__()  # depth and requires_grad are no fields
        return done


def _fold(x: Any, leaf: Callable[[Any], Any], make: Callable[[Any, Any, Any], Any], known: Any = None) -> Any:
    """``x`` made anew from the inside out: ``make`` of each :class:`LazyElementwise` and its new arguments, ``leaf`` of what
    else is lazy or dense; each once, however often it is used."""
    known = {} if known is None else known
    if not isinstance(x, (LazyTensor, Dense)):
        return x
    if (key := _key(x)) not in known:
        if isinstance(x, LazyElementwise):
            given = tree_map(lambda y: _fold(y, leaf, make, known), (x.args, x.kwargs), is_leaf=is_lazy)
            known[key] = make(x, *given)
        else:
            known[key] = leaf(x)
    return known[key]


def _value(x: LazyElementwise, args: Any, kwargs: Any) -> Tensor:
    """What the function gives, wide; what is no float, a mask say, in the dtype that it was cast to since."""
    found = x.function(*args, **kwargs)
    if found.is_floating_point() and x.dtype.is_floating_point:
        return found
    return found.to(torch.promote_types(x.dtype, x.wide) if x.dtype.is_floating_point else x.dtype)


def _with_arguments(x: LazyElementwise, args: Any, kwargs: Any) -> LazyElementwise:
    return replace(x, args=args, kwargs=kwargs)


def _expanded(t: Tensor, x: LazyTensor) -> Tensor:
    """``t``, which broadcasts to the shape of ``x``, with all its tokens and the vocabulary it has, of ``V`` entries or 1."""
    t = t.reshape((1,) * (x.ndim - t.ndim) + t.shape)
    return t.expand([-1 if d == x.vocab_dim else n for d, n in enumerate(x.shape)])


def recorded(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """:class:`LazyElementwise`, where ``function`` is one of each entry of probabilities and what is as large."""
    if name not in POINTWISE or torch.compiler.is_compiling():
        return NotImplemented
    leaves = tree_leaves((args, kwargs), is_leaf=is_lazy)
    operands: list[Any] = [x for x in leaves if isinstance(x, (Tensor, LazyTensor))]
    lazy = [x for x in operands if is_lazy(x)]
    # With 0 in entries that a mask names what exists is to be summed; with another value it may be meant for anything.
    emptied = name == "masked_fill" and is_number(args[-1]) and args[-1] == 0
    emptied = emptied and all(isinstance(x, LazyMask) for x in lazy)
    summed = name in _OF_LOGITS or any(map(_of_probabilities, lazy))
    if not (emptied or summed) or not _computable(*lazy):
        return NotImplemented
    if max(getattr(y, "depth", 0) for y in lazy) >= DEEPEST:
        return NotImplemented
    if name in COMPARISONS and len(lazy) < len(operands):
        return NotImplemented  # which may have been read from it, and be equal
    x = lazy[0]
    for y in operands:
        alike = y.shape == x.shape and y.vocab_dim == x.vocab_dim if is_lazy(y) else _broadcasts(y, x)
        if not alike or (y.device != x.device and y.ndim > 0):
            return NotImplemented

    def entry(y: Any) -> Any:
        known = isinstance(y, (Tensor, LazyTensor))
        return torch.ones((1,) * y.ndim, dtype=y.dtype, device=y.device) if known else y

    def operand(y: Any) -> Any:  # a copy; what is large may not change
        if isinstance(y, Tensor):
            return Dense(y if y.shape == x.shape else y.clone())
        return y.as_copy() if isinstance(y, LinearLogits) else _copy(y, lambda t: t) if is_lazy(y) else y

    with torch.no_grad():  # for the dtype
        one = function(*tree_map(entry, args, is_leaf=is_lazy), **tree_map(entry, kwargs, is_leaf=is_lazy))
    if not isinstance(one, Tensor) or one.ndim != x.ndim:
        return NotImplemented  # a reduction
    args, kwargs = tree_map(operand, (args, kwargs), is_leaf=is_lazy)
    return LazyElementwise(function, args, kwargs, one.dtype)


def changed(x: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x`` after the change in place of that name, as :func:`recorded` has it."""
    plain = IN_PLACE.get(name)
    if plain is None or not isinstance(x, Derived) or "inplace" in kwargs:
        return NotImplemented
    return recorded(getattr(Tensor, plain), plain, (x, *args), kwargs)


def _of_probabilities(x: Any) -> bool:
    if isinstance(x, LazyExpression):
        return x.form not in ("logits", "tanh")
    return isinstance(x, (LazyMixture, LazyProducts, LazyElementwise))


def _broadcasts(t: Tensor, x: LazyTensor) -> bool:
    sizes = (1,) * (x.ndim - t.ndim) + tuple(t.shape)
    return t.ndim <= x.ndim and all(n in (1, size) for n, size in zip(sizes, x.shape, strict=True))


def _computable(*lazy: LazyTensor) -> bool:
    bases = [x if isinstance(x, LinearLogits) else x.base for x in lazy if not isinstance(x, LazyStack)]
    own = len(bases) == len(lazy) and not torch.compiler.is_compiling() and not transforms_active()
    return own and all(z.shard is None and not traced(z.hidden) for z in bases)


class _Slot(NamedTuple):
    """Where the logits of a head stand in an expression, or a tensor with a row for each token."""

    of: str  # "logits", "tensor" or "dense"
    at: int


def _flattened(x: Any, z: list[LinearLogits], tensors: list[Tensor], known: dict[Any, Any]) -> Any:
    """``x`` with slots for its logits ``(N, V)``, added to ``z``, and its tensors ``(N, …)``, added to ``tensors``; what is one
    object, by ``known``, stays one."""
    if isinstance(x, LinearLogits):
        index = next((i for i, other in enumerate(z) if same_logits(other, x)), len(z))
        z += [x] * (index == len(z))
        return _Slot("logits", index)
    if (key := _key(x)) in known:
        return known[key]

    def part(y: Any) -> Any:
        if is_lazy(y):
            return _flattened(y, z, tensors, known)
        dense = isinstance(y, Dense)
        t = y.elements() if dense else y
        if t.ndim > 0 and dense:
            t = _expanded(t, x).movedim(x.vocab_dim, -1)
        if t.ndim > 0:
            t = t.reshape(-1, t.shape[-1]) if dense else t.reshape(-1)
        tensors.append(t)
        return _Slot("dense" if dense else "tensor", len(tensors) - 1)

    known[key] = _copy(x, lambda value: _inside(value, part))
    return known[key]


def _key(x: Any) -> Any:
    """Equal for ``x`` and a copy of it, which holds the same objects."""
    return type(x), *map(id, held(x).values())


def _copy(x: Derived, fn: Callable[[Any], Any]) -> Any:
    new = object.__new__(type(x))
    new.__dict__ = {name: fn(value) for name, value in held(x).items()}
    return new


def _inside(y: Any, fn: Callable[[Any], Any]) -> Any:
    """``y`` with ``fn`` of the lazy tensors, tensors and slots in it."""
    if isinstance(y, (LazyTensor, Dense, Tensor, _Slot)):
        return fn(y)
    if isinstance(y, tuple):
        parts = [_inside(part, fn) for part in y]
        return type(y)(*parts) if hasattr(y, "_fields") else tuple(parts)
    return {name: _inside(part, fn) for name, part in y.items()} if isinstance(y, dict) else y


def _filled(x: Any, z: Sequence[Any], tensors: Sequence[Tensor], known: dict[int, Any]) -> Any:
    """``x``, which :func:`_flattened` made, with logits and tensors of some rows in its slots."""
    if isinstance(x, _Slot):
        return z[x.at] if x.of == "logits" else Dense(tensors[x.at]) if x.of == "dense" else tensors[x.at]
    if id(x) not in known:
        known[id(x)] = _copy(x, lambda value: _inside(value, lambda y: _filled(y, z, tensors, known)))
    return known[id(x)]


class _MadeLogits(LinearLogits):
    """Logits ``(n, V)`` that exist."""

    def __init__(self, like: LinearLogits, z: Tensor, dtype: torch.dtype) -> None:
        bare: dict[str, Any] = {"weight": None, "bias": None, "low_rank": None, "all_tokens": None, "shards": {}}
        self.rest = like.rest.but(vocab_dim=1, dtype=dtype, temperature=1.0, **bare)
        self._hidden = z  # whose tokens it has

    def check(self) -> None:
        pass

    def elements(self) -> Tensor:
        return self._hidden

    def materialize(self) -> Tensor:
        return self._hidden.to(self.dtype)

    def with_dtype(self, dtype: torch.dtype) -> _MadeLogits:
        return _MadeLogits(self, self._hidden, dtype)

    def detach(self) -> _MadeLogits:
        return _MadeLogits(self, self._hidden.detach(), self.dtype)


class _Sums(NamedTuple):
    """The sums over the vocabulary of an expression, and their gradients, a few rows at a time.

    It holds no tensor of the expression: autograd does, and frees them.
    """

    expression: Any  # as _flattened made it
    logits: list[_MadeLogits]  # in its slots, without rows
    heads: list[Head]  # without their inputs
    room: int  # bytes
    at_once: int  # rows

    def of(self, z: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The sums ``(n,)`` of rows whose logits ``(n, V)`` and tensors ``(n, …)`` these are."""
        rows = [_MadeLogits(like, t, like.dtype) for like, t in zip(self.logits, z, strict=True)]
        elements = _filled(self.expression, rows, tensors, {}).materialize()
        return wide_sum(elements, -1)

    def split(self, tensors: Sequence[Any]) -> tuple[list[Head], list[Any]]:
        """The heads with their inputs, which come first among the tensors, and the other tensors."""
        inputs = [tensors[i * INPUTS : (i + 1) * INPUTS] for i in range(len(self.heads))]
        heads = [head.with_inputs(t) for head, t in zip(self.heads, inputs, strict=True)]
        return heads, list(tensors[INPUTS * len(heads) :])

    def pieces(self, start: int, stop: int) -> list[slice]:
        return [slice(i, min(i + self.at_once, stop)) for i in range(start, stop, self.at_once)]

    def value(self, tensors: Sequence[Any]) -> Tensor:
        heads, others = self.split(tensors)
        parts = [
            self.of([_logits(head, _raw(head, rows), rows) for head in heads], [_of_rows(t, rows) for t in others])
            for rows in self.pieces(0, len(heads[0].hidden))
        ]
        return torch.cat(parts) if parts else heads[0].hidden.new_zeros(0, dtype=wide_dtype(heads[0].hidden.device))

    def gradients(self, tensors: Sequence[Any], wanted: Sequence[bool], upstream: Tensor) -> list[Tensor | None]:
        """Those of :meth:`value`, a pass for each head that trains; of the other tensors in the last."""
        heads, others = self.split(tensors)
        heads = [head.detached() for head in heads]
        of_heads = [wanted[i * INPUTS : (i + 1) * INPUTS] for i in range(len(heads))]
        found: list[Tensor | None] = [None] * (INPUTS * len(heads))
        of_others = [
            torch.zeros_like(t) if want else None for t, want in zip(others, wanted[len(found) :], strict=True)
        ]
        trained = [i for i, want in enumerate(of_heads) if any(want)]

        def of_rows(i: int | None, rows: slice) -> Tensor | None:
            """The gradient of head ``i``'s logits ``(n, V)``, before scale, softcap and temperature."""
            totals = of_others if i is None or i == trained[-1] else [None] * len(others)
            raw = [_raw(head, rows).requires_grad_(i == j) for j, head in enumerate(heads)]
            parts = [
                _of_rows(t, rows).detach().requires_grad_(total is not None)
                for t, total in zip(others, totals, strict=True)
            ]
            with torch.enable_grad():
                sums = self.of([_logits(head, x, rows) for head, x in zip(heads, raw, strict=True)], parts)
            if not sums.requires_grad:
                return None
            leaves = [t for t in (*raw, *parts) if t.requires_grad]
            grads = list(torch.autograd.grad(sums, leaves, upstream[rows], allow_unused=True))
            of_logits = None if i is None else grads.pop(0)
            for total, grad in zip([t for t in totals if t is not None], grads, strict=True):
                if grad is not None:
                    _of_rows(total, rows).add_(grad)
            return of_logits

        for i in trained:
            backend = resolve_backend(heads[i].hidden, None)
            over_logits = functools.partial(self.over_logits, functools.partial(of_rows, i))
            found[i * INPUTS : (i + 1) * INPUTS] = loss_and_gradients(
                heads[i], None, None, False, over_logits, of_heads[i], self.room, None, backend, with_logits=False
            )
        if not trained:
            for rows in self.pieces(0, len(heads[0].hidden)):
                of_rows(None, rows)
        return found + of_others

    def over_logits(
        self, of_rows: Callable[[slice], Any], logits: Tensor, _: Head, __: None, rows: Any, factor: Any
    ) -> Any:
        """The gradient of a chunk's logits, over them: an ``OverLogits``."""
        pieces = self.pieces(rows.start, rows.stop)
        grads: Iterable[Tensor | None] = map(of_rows, pieces)  # one at a time
        if logits.dtype == torch.float16:
            grads = list(grads)  # all, for the factor
            alone = in_range([logits.new_ones(1, dtype=torch.float32), *grads])
            factor = alone if factor is None else torch.minimum(alone, factor)
        for piece, grad in zip(pieces, grads, strict=True):
            place = logits[piece.start - rows.start : piece.stop - rows.start]
            place.zero_() if grad is None else place.copy_(grad if factor is None else grad * factor)
        return factor


def _of_rows(t: Tensor, rows: slice) -> Tensor:
    return t[rows] if t.ndim > 0 else t


def _raw(head: Head, rows: slice) -> Tensor:
    """Logits ``(n, V)`` before scale, softcap and temperature, in fp32 or wider."""
    part = head.tokens(rows)
    out = part.hidden.new_empty(len(part.hidden), head.vocab, dtype=statistics_dtype(part.hidden.dtype))
    return part.write_logits(out) if len(out) else out


def _logits(head: Head, raw: Tensor, rows: slice) -> Tensor:
    temperature = None if head.temperature is None else head.temperature[rows]
    return transform(raw, temperature, head.scale, head.softcap, with_slope=False)[0]


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: _Sums, *tensors: Tensor | None) -> Tensor:
        ctx.sums = sums
        save_for_backward(ctx, *tensors)
        given = [None if t is None else t.detach() for t in tensors]
        with full_precision(sums.split(given)[0][0].hidden.device):
            return sums.value(given)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        sums, tensors, wanted = ctx.sums, saved_tensors(ctx), ctx.needs_input_grad[1:]
        with full_precision(upstream.device):
            if in_plain_pytorch(upstream):
                inputs = [t if want else None for t, want in zip(tensors, wanted, strict=True)]

                def fn(*given: Tensor | None) -> list[Tensor]:
                    heads, others = sums.split([t if g is None else g for t, g in zip(tensors, given, strict=True)])
                    check_differentiable(len(heads[0].hidden), heads[0].vocab, heads[0].hidden.dtype)
                    return [sums.of([whole_logits(head, None) for head in heads], others)]

                return None, *differentiable_gradients(fn, inputs, [upstream])
            return None, *sums.gradients(tensors, wanted, upstream)


def row_sums(x: Derived) -> Any:
    """``Σ_j x_j`` of each token, ``token_shape``, float64."""
    if not _computable(x):
        return NotImplemented
    logits: list[LinearLogits] = []
    tensors: list[Tensor] = []
    functions: dict[Any, Any] = {}
    expression = _flattened(x, logits, tensors, functions)
    if not _computable(*logits):
        return NotImplemented
    with ExitStack() as stack:
        for z in logits:
            stack.enter_context(z.gathered())
        heads = [ready(head_of(z), None)[0] for z in logits]
        # One half for the functions, one for a chunk's gradient.
        room = budget(heads[0], None, True, resolve_backend(heads[0].hidden, None)) // 2
        at_once = max(1, room // (COPIES * (len(heads) + len(functions)) * heads[0].vocab * 4))
        if 0 < len(heads[0].hidden) <= at_once:  # with room for all, whose logits other sums may want too
            return wide_sum(x.materialize(), x.vocab_dim)
        slots = [_MadeLogits(z, z.hidden.new_empty(0, z.rest.vocab, dtype=z.wide), z.dtype) for z in logits]
        sums = _Sums(expression, slots, [head.with_inputs([None] * INPUTS) for head in heads], room, at_once)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            found = _RowSums.apply(sums, *(t for head in heads for t in head.inputs), *tensors)
        for z in logits:
            found = z.gather_in_backward(found)
    return found.view(x.token_shape)

"""Numbers per token that can only be computed from the entries, such as a sum or norm of any expression of lazy logits: a few
rows at a time.

:func:`of_rows` computes the entries of as many rows as the workspace holds, and again in backward: there autograd gives the
gradient of those rows' logits, and route ``gradients_in_forward`` the products with it. Each number takes ``8NVH`` floating
point operations, as in ``recompute``. To take some rows of an expression, :func:`_flattened` replaces its logits and tensors by
slots, and :func:`_filled` puts those rows into the slots. Where the workspace holds all rows, the elements are materialised,
once for all numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .autodiff import check_differentiable, differentiable_gradients, in_plain_pytorch, save_for_backward, saved_values
from .chunked.softmax_rows import transform
from .gradients_in_forward import OverLogits, in_range, loss_and_gradients
from .head import INPUTS, Head, head_of, ready, whole_logits
from .lazy_elementwise import computable, copy_with, key_of, vocab_last
from .lazy_products import Dense
from .lazy_tensor import Derived, LazyTensor
from .linear_logits import LinearLogits, same_logits
from .numerics import full_precision, statistics_dtype, wide_dtype
from .row_statistics import slices
from .settings import resolve_backend

COPIES = 2  # of a few rows of logits, for each function of them: its result, and what autograd holds


class _Slot(NamedTuple):
    """A place in an expression for the logits of a head, or for a tensor with a row for each token."""

    of: str  # "logits", "tensor" or "dense"
    at: int


def _with_leaves(x: Any, leaf: Callable[[Any], Any], known: dict[Any, Derived]) -> Any:
    """``x`` with ``leaf`` applied to the logits, tensors and slots it is made of; an object used twice, by ``known``, stays
    one object."""
    if not isinstance(x, Derived):
        return leaf(x)
    leaves = (LazyTensor, Dense, Tensor, _Slot)

    def parts(value: Any) -> Any:
        return tree_map_only(leaves, lambda y: _with_leaves(y, leaf, known), value, lambda y: isinstance(y, leaves))

    if (key := key_of(x)) not in known:
        known[key] = copy_with(x, parts)
    return known[key]


def _flattened(x: LazyTensor, others: Sequence[Any]) -> tuple[list[Any], list[LinearLogits], list[Tensor], int]:
    """``x`` and the others, which broadcast to it, with slots in them; their logits ``(N, V)``; their tensors ``(N, …)``; the
    number of functions they are made of."""
    logits: list[LinearLogits] = []
    tensors: list[Tensor] = []
    functions: dict[Any, Derived] = {}

    def slot(y: LinearLogits | Dense | Tensor) -> _Slot:
        if isinstance(y, LinearLogits):
            index = next((i for i, z in enumerate(logits) if same_logits(z, y)), len(logits))
            if index == len(logits):
                logits.append(y)
            return _Slot("logits", index)
        t = _elements(y, x) if isinstance(y, Dense) else y
        if t.ndim > 0:
            t = t.reshape(-1, t.shape[-1]) if isinstance(y, Dense) else t.reshape(-1)
        tensors.append(t)
        return _Slot("dense" if isinstance(y, Dense) else "tensor", len(tensors) - 1)

    expressions = [_with_leaves(y, slot, functions) for y in (x, *others)]
    return expressions, logits, tensors, len(functions)


def _filled(expressions: Sequence[Any], logits: Sequence[_MadeLogits], tensors: Sequence[Tensor]) -> list[Any]:
    """The expressions with the logits and tensors of some rows in their slots."""

    def part(slot: _Slot) -> Any:
        if slot.of == "logits":
            return logits[slot.at]
        return Dense(tensors[slot.at]) if slot.of == "dense" else tensors[slot.at]

    known: dict[Any, Derived] = {}
    return [_with_leaves(x, part, known) for x in expressions]


def _elements(x: LazyTensor | Dense, like: LazyTensor) -> Tensor:
    """The elements of ``x``, which broadcasts to ``like``, with the vocabulary last."""
    if isinstance(x, Dense):
        return vocab_last(x, like)
    return (x.elements() if isinstance(x, LinearLogits) else x.materialize()).movedim(x.vocab_dim, -1)


class _MadeLogits(LinearLogits):
    """Logits ``(n, V)`` that exist."""

    def __init__(self, like: LinearLogits, z: Tensor, dtype: torch.dtype) -> None:
        bare: dict[str, Any] = {"weight": None, "bias": None, "low_rank": None, "all_tokens": None, "shards": {}}
        self.rest = like.rest.but(vocab_dim=1, dtype=dtype, temperature=1.0, **bare)
        self._hidden = z  # gives it its tokens

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


class _OfRows(NamedTuple):
    """A function of the rows of expressions, and its gradients, a few rows at a time.

    It holds no tensor of the expressions: autograd does, and frees them.
    """

    function: Callable[..., Tensor]  # of each expression's (n, V), gives (n,)
    expressions: list[Any]  # as _flattened made them
    logits: list[_MadeLogits]  # for the slots, without rows
    heads: list[Head]  # without their inputs
    room: int  # bytes
    at_once: int  # rows

    def of(self, z: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The numbers ``(n,)`` of rows with logits ``z (n, V)`` and ``tensors (n, …)``."""
        rows = [_MadeLogits(like, t, like.dtype) for like, t in zip(self.logits, z, strict=True)]
        return self.function(*(_elements(x, rows[0]) for x in _filled(self.expressions, rows, tensors)))

    def split(self, tensors: Sequence[Any]) -> tuple[list[Head], list[Any]]:
        """The heads with their inputs, which come first among the tensors, and the other tensors."""
        inputs = [tensors[i * INPUTS : (i + 1) * INPUTS] for i in range(len(self.heads))]
        heads = [head.with_inputs(t) for head, t in zip(self.heads, inputs, strict=True)]
        return heads, list(tensors[INPUTS * len(heads) :])

    def value(self, tensors: Sequence[Any]) -> Tensor:
        heads, others = self.split(tensors)
        parts = [
            self.of([_logits(head, _raw(head, rows), rows) for head in heads], [_part(t, rows) for t in others])
            for rows in slices(len(heads[0].hidden), self.at_once)
        ]
        return torch.cat(parts) if parts else heads[0].hidden.new_zeros(0, dtype=wide_dtype(heads[0].hidden.device))

    def gradients(self, tensors: Sequence[Any], wanted: Sequence[bool], upstream: Tensor) -> list[Tensor | None]:
        """The gradients of :meth:`value`: a pass for each head that trains; the last one also gives the other tensors'."""
        heads, others = self.split(tensors)
        heads = [head.detached() for head in heads]
        of_heads = [wanted[i * INPUTS : (i + 1) * INPUTS] for i in range(len(heads))]
        found: list[Tensor | None] = [None] * (INPUTS * len(heads))
        of_others = [
            torch.zeros_like(t) if want else None for t, want in zip(others, wanted[len(found) :], strict=True)
        ]
        trained = [i for i, want in enumerate(of_heads) if any(want)]
        last = trained[-1] if trained else None

        def d_logits(i: int | None, rows: slice) -> Tensor | None:
            """The gradient of head ``i``'s logits ``(n, V)``, before scale, softcap and temperature."""
            totals = of_others if i == last else [None] * len(others)
            raw = [_raw(head, rows).requires_grad_(i == j) for j, head in enumerate(heads)]
            parts = [
                _part(t, rows).detach().requires_grad_(total is not None)
                for t, total in zip(others, totals, strict=True)
            ]
            with torch.enable_grad():
                numbers = self.of([_logits(head, x, rows) for head, x in zip(heads, raw, strict=True)], parts)
            if not numbers.requires_grad:
                return None
            leaves = [t for t in (*raw, *parts) if t.requires_grad]
            grads = list(torch.autograd.grad(numbers, leaves, upstream[rows], allow_unused=True))
            of_logits = None if i is None else grads.pop(0)
            for total, grad in zip([t for t in totals if t is not None], grads, strict=True):
                if grad is not None:
                    _part(total, rows).add_(grad)
            return of_logits

        for i in trained:
            backend = resolve_backend(heads[i].hidden, None)
            over_logits = self.by_rows(functools.partial(d_logits, i))
            found[i * INPUTS : (i + 1) * INPUTS] = loss_and_gradients(
                heads[i], None, None, False, over_logits, of_heads[i], self.room, None, backend, with_logits=False
            )
        if not trained:
            for rows in slices(len(heads[0].hidden), self.at_once):
                d_logits(None, rows)
        return found + of_others

    def by_rows(self, gradient: Callable[[slice], Tensor | None]) -> OverLogits:
        """An ``OverLogits`` that writes the gradient that ``gradient`` returns for a few rows of logits."""

        def over_logits(
            logits: Tensor, chunk: Head, ids: Tensor | None, rows: Any, factor: Tensor | None
        ) -> Tensor | None:
            pieces = [*slices(len(logits), self.at_once)]
            among_all = (slice(rows.start + piece.start, rows.start + piece.stop) for piece in pieces)
            grads: Iterable[Tensor | None] = map(gradient, among_all)  # one at a time
            if logits.dtype == torch.float16:
                grads = list(grads)  # all of them, to find the factor
                alone = in_range([logits.new_ones(1, dtype=torch.float32), *grads])
                factor = alone if factor is None else torch.minimum(alone, factor)
            for piece, grad in zip(pieces, grads, strict=True):
                place = logits[piece]
                place.zero_() if grad is None else place.copy_(grad if factor is None else grad * factor)
            return factor

        return over_logits


def _part(t: Tensor, rows: slice) -> Tensor:
    return t[rows] if t.ndim > 0 else t


def _raw(head: Head, rows: slice) -> Tensor:
    """Logits ``(n, V)`` before scale, softcap and temperature, in fp32 or wider."""
    part = head.tokens(rows)
    out = part.hidden.new_empty(len(part.hidden), head.vocab, dtype=statistics_dtype(part.hidden.dtype))
    return part.write_logits(out) if len(out) else out


def _logits(head: Head, raw: Tensor, rows: slice) -> Tensor:
    temperature = None if head.temperature is None else head.temperature[rows]
    return transform(raw, temperature, head.scale, head.softcap, with_slope=False)[0]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_rows: _OfRows, *tensors: Tensor | None) -> Tensor:
        ctx.of_rows = of_rows
        save_for_backward(ctx, *tensors)
        given = [None if t is None else t.detach() for t in tensors]
        with full_precision(of_rows.split(given)[0][0].hidden.device):
            return of_rows.value(given)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        of_rows, tensors, wanted = ctx.of_rows, saved_values(ctx), ctx.needs_input_grad[1:]
        with full_precision(upstream.device):
            if in_plain_pytorch(upstream):
                inputs = [t if want else None for t, want in zip(tensors, wanted, strict=True)]

                def fn(*given: Tensor | None) -> list[Tensor]:
                    heads, others = of_rows.split([t if g is None else g for t, g in zip(tensors, given, strict=True)])
                    check_differentiable(len(heads[0].hidden), heads[0].vocab, heads[0].hidden.dtype)
                    return [of_rows.of([whole_logits(head, None) for head in heads], others)]

                return None, *differentiable_gradients(fn, inputs, [upstream])
            return None, *of_rows.gradients(tensors, wanted, upstream)


def of_rows(function: Callable[..., Tensor], x: LazyTensor, *others: LazyTensor | Dense) -> Any:
    """``function``, from ``(…, V)`` to ``(…)``, of the rows of ``x`` and of the others: numbers of ``token_shape``."""
    if not computable(x, *(y for y in others if not isinstance(y, Dense))):
        return NotImplemented
    expressions, logits, tensors, functions = _flattened(x, others)
    if not computable(*logits):
        return NotImplemented
    with ExitStack() as stack:
        for z in logits:
            stack.enter_context(z.gathered())
        heads = [ready(head_of(z)) for z in logits]
        N, backend = len(heads[0].hidden), resolve_backend(heads[0].hidden)
        # One half for the functions, one for a chunk's gradient.
        room = heads[0].plan(per_token=True, backend=backend).budget // 2
        at_once = max(1, room // (COPIES * (len(heads) + max(functions, 1)) * heads[0].vocab * 4))
        if 0 < N <= at_once:  # there is room for all rows, whose logits other numbers may read too
            found = function(*(_elements(y, x) for y in (x, *others)))
        else:
            slots = [_MadeLogits(z, z.hidden.new_empty(0, z.rest.vocab, dtype=z.wide), z.dtype) for z in logits]
            without = [head.with_inputs([None] * INPUTS) for head in heads]
            chunks = _OfRows(function, expressions, slots, without, room, at_once)
            with torch.set_grad_enabled(torch.is_grad_enabled() and any(y.requires_grad for y in (x, *others))):
                found = _Function.apply(chunks, *(t for head in heads for t in head.inputs), *tensors)
        for z in logits:  # a frozen teacher's weight too: a rank with other tokens may read it
            found = z.gather_in_backward(found)
    return found.view(x.token_shape)

"""Products of one head's ``softmax`` with another's ``log_softmax``, as in hand-written losses of distillation.

A student ``s`` learns from a teacher ``t`` by ``Σ_j t_j log s_j``, or by a difference of two such sums. :class:`LazyProducts`
holds ``factor · Σ_i c_i softmax(a_i) log_softmax(b_i)`` until it is summed over the vocabulary; without ``a_i`` a term is
``log_softmax(b_i)`` alone. The ``log_softmax`` may be replaced by the logarithm of a mixture
``m = w softmax(a) + v softmax(b)``, or by the distance or the smaller of two softmaxes, entry by entry. For a teacher whose
numbers exist, either factor of a term may be a tensor: probabilities ``P``, values ``L``. The sum is computed term by term:

=====================================  =====================================================
terms                                  summed over the vocabulary
=====================================  =====================================================
``softmax(a) (log a − log b)``         the KL divergence of a from b
``softmax(a) (log a − log m)``         the skewed KL divergence, less ``log(w + v)``
… and that of b, weighted as in m      their Jensen-Shannon divergence, in one pass
``softmax(a) (log a − L)``             the KL divergence of softmax(L) from a, less ``logsumexp(L)``
``softmax(a) log_softmax(b)``          −their cross entropy
``softmax(a) log_softmax(a)``          −entropy
``P log_softmax(b)``                   −the cross entropy with probabilities
``P L``, ``L``                         the sum itself
``|softmax(a) − softmax(b)|``          twice the total variation
``min(softmax(a), softmax(b))``        their overlap, 1 less the total variation
``log_softmax(b)``                     as in ``log_softmax.py``
=====================================  =====================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .autodiff import no_gradient, same_sizes
from .divergence import shared_vocabulary, token_divergence
from .lazy_tensor import (
    Derived,
    LazyTensor,
    answers,
    coefficient,
    is_lazy,
    is_number,
    multiplied,
    number_of,
    report,
    wrap_dim,
)
from .linear_logits import LinearLogits, same_logits
from .linear_logits_checks import Snapshot, refuse_autograd_function
from .numerics import wide_dtype, wide_sum
from .row_divergence import Divergence
from .token_statistics import token_statistics

LARGEST_LOG = 80.0  # of a mixture's weight, or of its inverse


def times_log(z: Tensor, dim: int) -> Tensor:
    """``softmax · log_softmax``, 0 where there is no mass."""
    return _p_log_p(z.log_softmax(dim))


def _p_log_p(logp: Tensor) -> Tensor:
    return torch.where(logp == -torch.inf, 0, logp.exp() * logp)


class Dense:
    """A tensor that exists and broadcasts to the logits. Eager would have read it at once, so it must not change."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach() if no_gradient() else tensor
        self.made = Snapshot(tensor=tensor)
        self.requires_grad = self.tensor.requires_grad

    def elements(self) -> Tensor:
        if self.made.changed(tensor=self.tensor) is not None:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} was modified in place after it was multiplied with lazy logits, or "
                "added to them; eager PyTorch's result would keep the old values. Compute that product or sum again."
            )
        return self.tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return Dense, (self.elements(),)


class _Term(NamedTuple):
    """``factor · probs · values``, entry by entry."""

    factor: float
    probs: LinearLogits | Dense | None  # logits stand for their softmax; None: 1
    values: LinearLogits | _Log | _Distance | _Smaller | Dense  # logits stand for their log_softmax

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad or (self.probs is not None and self.probs.requires_grad)


class Elementwise(Derived):
    """A lazy tensor that a change in place may turn into another class of these: a function of it, or a :class:`LazyProducts`
    of its elements."""

    def become(self, new: Any) -> Any:
        if type(new) is type(self) or not isinstance(new, Elementwise):
            return super().become(new)
        if self.fixed or torch.compiler.is_compiling():
            return NotImplemented
        self.__class__, self.__dict__ = type(new), vars(new.with_dtype(self.dtype))
        return self

    def become_changed(self, name: str, change: Callable[[Tensor], Any]) -> Any:
        return NotImplemented if self.fixed else self.become(changed_elements(self, name, change))


def changed_elements(x: LazyTensor, name: str, change: Callable[[Tensor], Any]) -> Any:
    """The elements of ``x`` after a change, as one :class:`LazyProducts` term without a softmax."""
    report(name, x)
    elements = x.materialize()
    change(elements)
    if elements.shape != x.shape:
        return NotImplemented
    if not torch.compiler.is_compiling():
        _ = elements.grad_fn  # reading a view's rebuilds it; PyTorch 2.11 crashes where FSDP2 adds a hook before that
    like = x if isinstance(x, LinearLogits) else x.base
    return LazyProducts((_Term(1.0, None, Dense(elements)),), x.dtype, like=like.as_copy())


@dataclass(eq=False, repr=False)
class LazyMixture(Elementwise):
    """``w softmax(a) + v softmax(b)``."""

    parts: tuple[tuple[float, LinearLogits], ...]  # two
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if no_gradient():
            self.parts = tuple((w, z.detach()) for w, z in self.parts)

    @property
    def base(self) -> LinearLogits:
        return self.parts[0][1]

    @property
    def requires_grad(self) -> bool:
        return any(z.requires_grad for _, z in self.parts)

    def __repr__(self) -> str:
        (w, a), (v, _) = self.parts
        return f"LazyMixture({tuple(self.shape)}, {self.dtype}, {w} and {v} of softmaxes like that of {a})"

    def elements(self) -> Tensor:
        (w, a), (v, b) = self.parts
        return w * a.elements().softmax(self.vocab_dim) + v * b.elements().softmax(self.vocab_dim)

    def materialize(self) -> Tensor:
        return self.elements().to(self.dtype)

    def each(self, fn: Callable[[LinearLogits], LinearLogits]) -> Any:
        return replace(self, parts=tuple((w, fn(z)) for w, z in self.parts))

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyMixture:
        return self.aliasing(self.each(lambda z: z.mapped(fn, vocab_dim, view=view)), view)

    def with_dtype(self, dtype: torch.dtype) -> LazyMixture:
        return replace(self, dtype=dtype)

    def detach(self) -> LazyMixture:
        return self.aliasing(self.each(lambda z: z.detach()))

    def scaled(self, factor: Any) -> Any:
        number = number_of(coefficient(self, factor))
        if number is NotImplemented or not abs(number) < math.inf:
            return NotImplemented
        return replace(self, parts=tuple((w * number, z) for w, z in self.parts))

    def values_at(self, ids: Tensor) -> Tensor:
        (w, a), (v, b) = self.parts
        return w * a.log_probs_at(ids).exp() + v * b.log_probs_at(ids).exp()

    def logarithm(self) -> Any:
        return self._as(_Log) if all(0 < w < math.inf for w, _ in self.parts) else NotImplemented

    def distance(self, smaller: bool = False) -> Any:
        (w, _), (v, _) = self.parts
        apart = w == -v and abs(w) < math.inf and (w > 0 or not smaller)
        return self._as(_Smaller if smaller else _Distance) if apart else NotImplemented

    def _as(self, function: type[_Log | _Distance | _Smaller]) -> LazyProducts:
        return LazyProducts((_Term(1.0, None, function(self.parts, self.dtype)),), self.dtype)


class _Log(LazyMixture):
    """The logarithm of a mixture whose weights are above 0."""

    def elements(self) -> Tensor:
        logs = (z.elements().log_softmax(self.vocab_dim) + math.log(w) for w, z in self.parts)
        return torch.logaddexp(*logs)

    def log_probs_at(self, ids: Tensor) -> Tensor:
        return torch.logaddexp(*(z.log_probs_at(ids) + math.log(w) for w, z in self.parts))


class _Distance(LazyMixture):
    """The absolute value of a mixture ``w softmax(a) − w softmax(b)``."""

    def elements(self) -> Tensor:
        return super().elements().abs()

    def vocab_sum(self) -> Tensor:
        (w, a), (_, b) = self.parts
        return 2 * abs(w) * _divergence(a, b, "tvd")


class _Smaller(LazyMixture):
    """The smaller of ``w softmax(a)`` and ``w softmax(b)``, w > 0, held as the mixture ``w softmax(a) − w softmax(b)``."""

    def elements(self) -> Tensor:
        (w, a), (_, b) = self.parts
        return w * torch.minimum(*(z.elements().softmax(self.vocab_dim) for z in (a, b)))

    def vocab_sum(self) -> Tensor:
        (w, a), (_, b) = self.parts
        return w * _divergence(a, b, "overlap")


@dataclass(eq=False, repr=False)
class LazyProducts(Elementwise):
    """``factor · Σ_i c_i softmax(a_i) log_softmax(b_i)``, the factor a number or one per token; see the module."""

    terms: tuple[_Term, ...]
    dtype: torch.dtype
    factor: Any = 1.0
    finite: tuple[LinearLogits, ...] = ()  # entries where one of these logits is infinite count as 0
    skipped: Tensor | None = None  # tokens whose entries all count as ``fill``
    fill: Any = 0.0  # or one number per token
    like: LinearLogits | None = None  # gives the shape where no term has logits

    def __post_init__(self) -> None:
        if self.requires_grad and no_gradient():
            bare = self._detached()
            self.terms, self.factor, self.finite = bare.terms, bare.factor, bare.finite

    @property
    def base(self) -> LinearLogits:
        first: Any = next(x for t in self.terms for x in (t.values, t.probs, self.like) if is_lazy(x))
        return first if isinstance(first, LinearLogits) else first.base

    @property
    def requires_grad(self) -> bool:
        trained = any(term.requires_grad for term in self.terms)
        return trained or (isinstance(self.factor, Tensor) and self.factor.requires_grad)

    def __repr__(self) -> str:
        return f"LazyProducts({tuple(self.shape)}, {self.dtype}, {len(self.terms)} terms of {self.base})"

    @property
    def _precision(self) -> torch.dtype:
        return torch.promote_types(self.wide, self.dtype)

    def materialize(self) -> Tensor:
        """The elements themselves, differentiable, in ``dtype``."""
        self._check()
        dim = self.vocab_dim
        total: Any = 0
        for c, a, b in self.terms:
            z = b.elements().to(self._precision)
            if _same(a, b):
                term = times_log(z, dim)
            else:
                term = z.log_softmax(dim) if isinstance(b, LinearLogits) else z
                weight = 1 if a is None else a.elements() if isinstance(a, Dense) else a.elements().softmax(dim)
                term = term * weight
            for masked in self.finite:
                term = term.masked_fill(masked.elements().isinf(), 0)
            total = total + c * term
        return self._filled(total, dim).to(self.dtype)

    def _filled(self, total: Tensor, dim: int | None = None) -> Tensor:
        """``total`` times the factor, but ``fill`` for skipped tokens; ``dim``: the vocabulary's dimension in ``total``, or
        None."""

        def beside(t: Any) -> Any:
            return t if dim is None or not isinstance(t, Tensor) else t.unsqueeze(dim)

        if self.skipped is None:
            return total * beside(self.factor)
        # The factor of skipped tokens is replaced: its gradient would be 0·∞.
        factor = self.factor.masked_fill(self.skipped, 0) if isinstance(self.factor, Tensor) else self.factor
        return torch.where(beside(self.skipped), beside(self.fill), total * beside(factor))

    def _each(
        self,
        fn: Callable[[LinearLogits], LinearLogits],
        of_dense: Callable[[Tensor], Tensor],
        of_tokens: Callable[[Any], Any],
    ) -> LazyProducts:
        """A copy with ``fn`` applied to logits (once to the same ones), ``of_dense`` to tensors that exist, and ``of_tokens``
        to numbers per token."""
        known: list[tuple[LinearLogits, LinearLogits]] = []

        def once(x: LinearLogits | _Log | _Distance | _Smaller | Dense | None) -> Any:
            if isinstance(x, Dense):
                return Dense(of_dense(x.elements()))
            if not isinstance(x, LinearLogits):
                return None if x is None else x.each(once)
            found = next((new for old, new in known if same_logits(old, x)), None)
            if found is None:
                found = fn(x)
                known.append((x, found))
            return found

        terms = tuple(_Term(c, once(a), once(b)) for c, a, b in self.terms)
        numbers = {name: of_tokens(getattr(self, name)) for name in ("factor", "skipped", "fill")}
        return replace(self, terms=terms, finite=tuple(map(once, self.finite)), like=once(self.like), **numbers)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyProducts:
        each = self._each(lambda x: x.mapped(fn, vocab_dim, view=view), fn, self._of_numbers(fn, vocab_dim))
        return self.aliasing(each, view)

    def with_dtype(self, dtype: torch.dtype) -> LazyProducts:
        return replace(self, dtype=dtype)

    def _detached(self) -> LazyProducts:
        return self._each(lambda z: z.detach(), Tensor.detach, lambda t: t.detach() if isinstance(t, Tensor) else t)

    def detach(self) -> LazyProducts:
        return self.aliasing(self._detached())

    def scaled(self, factor: Any) -> Any:
        if not self.dtype.is_floating_point:
            return NotImplemented  # elements after a change, whose product may have another dtype
        number = coefficient(self, factor)
        if number is not NotImplemented:
            if self.skipped is None:
                return replace(self, factor=multiplied(self.factor, number))
            zero = 0.0 * (number.detach() if isinstance(number, Tensor) else number)  # or nan
            return replace(self, factor=multiplied(self.factor, number), fill=self.fill + zero)
        if not alike(self, factor) or any(t.probs is not None for t in self.terms):
            return NotImplemented
        dense = Dense(factor)
        return replace(self, terms=tuple(t._replace(probs=dense) for t in self.terms))

    def shifted(self, offset: Any) -> Any:
        """``log m + offset`` for a mixture ``m``."""
        (c, probs, log), *others = self.terms
        plain = not others and probs is None and not self.finite and self.skipped is None and is_number(self.factor)
        plain = plain and c * self.factor == 1 and is_number(offset) and abs(offset) < LARGEST_LOG
        if not plain or not isinstance(log, _Log):
            return NotImplemented
        found = LazyMixture(log.parts, log.dtype).scaled(math.exp(offset)).logarithm()
        return found if found is NotImplemented else found.with_dtype(self.dtype)

    def _weighed(self, factor: float) -> tuple[_Term, ...]:
        return tuple(t._replace(factor=t.factor * factor) for t in self.terms)

    def plus(self, other: Any, sign: float) -> Any:
        if isinstance(other, Tensor):
            return self._plus_values(other, sign)
        found = as_products(other)
        if found is NotImplemented or not fit(self.base, found.base):
            return NotImplemented
        one_mask = len(self.finite) == len(found.finite) and all(map(_same, self.finite, found.finite))
        filled_with_0 = is_number(self.fill) and is_number(found.fill) and self.fill == found.fill == 0
        if not one_mask or self.skipped is not found.skipped or not filled_with_0:
            return NotImplemented
        mine, theirs = number_of(self.factor), number_of(found.factor)
        if mine is NotImplemented or theirs is NotImplemented:
            return NotImplemented
        dtype = torch.promote_types(self.dtype, found.dtype)
        return replace(self, terms=self._weighed(mine) + found._weighed(theirs * sign), factor=1.0, dtype=dtype)

    def _plus_values(self, values: Tensor, sign: float) -> Any:
        if not alike(self, values) or self.finite or self.skipped is not None or not is_number(self.factor):
            return NotImplemented
        return replace(self, terms=(*self._weighed(self.factor), _Term(sign, None, Dense(values))), factor=1.0)

    def times(self, other: LazyTensor) -> Any:
        """The product with a softmax."""
        softmax = isinstance(other, LazyExpression) and other.form == "softmax" and other.unshifted
        free = all(t.probs is None and not isinstance(t.values, (_Distance, _Smaller)) for t in self.terms)
        if not softmax or not free or self.skipped is not None or not fit(self.base, other.base):
            return NotImplemented
        terms = tuple(t._replace(probs=other.base) for t in self.terms)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return replace(self, terms=terms, factor=self.factor * other.factor, dtype=dtype)

    def _leaves_out_itself(self, masked: LinearLogits) -> bool:
        """Whether the sum is the same without the entries where these logits are infinite. Without a bias there are none; where
        a bias makes them −inf, their own softmax is 0; and a cross entropy that is the only term skips them."""
        alone = len(self.terms) == 1 and isinstance(self.terms[0].probs, LinearLogits)
        alone = alone and _same(self.terms[0].values, masked)
        return masked.rest.bias is None or alone or all(_same(t.probs, masked) for t in self.terms)

    def without_entries(self, mask: Any) -> Any:
        """With 0 where ``mask``, of the full shape, is True: written into the tensors that exist, if every term has one."""
        if not alike(self, mask) or mask.dtype != torch.bool:
            return NotImplemented
        for _, a, b in self.terms:
            finite = isinstance(b, LinearLogits) and b.rest.bias is None  # else 0·(−inf)
            if isinstance(a, LinearLogits) or not (isinstance(b, Dense) or (a is not None and finite)):
                return NotImplemented
        if not is_number(self.fill) or self.fill != 0:
            return NotImplemented

        def masked(x: Any) -> Any:
            return Dense(x.elements().masked_fill(mask, 0)) if isinstance(x, Dense) else x

        # Skip tokens that are masked whole, whose lazy part may hold a nan.
        whole = mask.all(self.vocab_dim)
        if self.skipped is not None:
            whole = whole | self.skipped
        terms = tuple(_Term(c, masked(a), masked(b)) for c, a, b in self.terms)
        return replace(self, terms=terms, skipped=whole)

    def _check(self) -> None:
        if self.requires_grad and no_gradient() and not torch.compiler.is_compiling():
            refuse_autograd_function(self)

    def vocab_sum(self) -> Any:
        self._check()
        if not all(map(self._leaves_out_itself, self.finite)):
            return NotImplemented
        alone, kls = _paired(self.terms, self.finite)
        if any(isinstance(a, LinearLogits) and isinstance(b, Dense) for _, a, b in alone):
            return NotImplemented  # before any other term is computed
        sums = [self._sum_alone(*term) for term in alone] + _kl_sums(kls)
        if any(found is NotImplemented for _, found in sums):
            return NotImplemented
        count = self.shape[self.vocab_dim]
        filled = self if is_number(self.fill) else replace(self, fill=self.fill * count)
        return filled._filled(sum(c * found for c, found in sums))

    def _sum_alone(self, c: float, a: Any, b: Any) -> tuple[float, Any]:
        """The sum of a term that is not part of a KL divergence, by the module's table, with the factor that multiplies it."""
        if isinstance(a, LinearLogits):
            return -c, a.statistic("entropy") if _same(a, b) else _divergence(b, a, "cross_entropy")
        if isinstance(b, Dense):
            weighed = b.elements() if a is None else a.elements() * b.elements().to(self._precision)
            return c, wide_sum(weighed, self.vocab_dim)
        if isinstance(b, LinearLogits):
            return c, b.sum_log_probs() if a is None else -cross_entropy_with(b, a.elements(), "none")
        return c, b.vocab_sum() if a is None else NotImplemented

    def values_at(self, ids: Tensor) -> Any:
        if self.finite or self.skipped is not None or not self.dtype.is_floating_point:
            return NotImplemented
        self._check()
        total: Any = 0
        for c, a, b in self.terms:
            if isinstance(b, (_Distance, _Smaller)):
                return NotImplemented
            term = self._there(b, ids) if isinstance(b, Dense) else b.log_probs_at(ids)
            if _same(a, b):
                term = _p_log_p(term)
            elif a is not None:
                term = term * (self._there(a, ids) if isinstance(a, Dense) else a.log_probs_at(ids).exp())
            total = total + c * term
        return self._filled(total, -1)

    def _there(self, x: Dense, ids: Tensor) -> Tensor:
        return x.elements().movedim(self.vocab_dim, -1).gather(-1, ids).to(self._precision)


def _flattened(x: LazyProducts) -> tuple[list[Any], Any]:
    """Its tensors, and what rebuilds it from them: a function, because comparing lazy tensors would materialise them."""
    held = [y for t in x.terms for y in (t.probs, t.values) if isinstance(y, Dense)]
    numbers = [t for t in (x.factor, x.fill) if isinstance(t, Tensor)]
    return [*(y.elements() for y in held), *numbers], functools.partial(_unflattened, x)


def _unflattened(x: LazyProducts, leaves: Any) -> Any:
    left = list(leaves)
    if not all(isinstance(t, Tensor) for t in left):
        return None if len(left) == 1 else tuple(left)  # tree_map gave no tensors

    def again(y: Any) -> Any:
        return Dense(left.pop(0)) if isinstance(y, Dense) else y

    terms = tuple(_Term(c, again(a), again(b)) for c, a, b in x.terms)
    factor, fill = (left.pop(0) if isinstance(t, Tensor) else t for t in (x.factor, x.fill))
    return replace(x, terms=terms, factor=factor, fill=fill)


# Like lazy logits themselves: DDP looks for tensors that train in a module's outputs.
pytree.register_pytree_node(
    LazyProducts,
    _flattened,
    lambda leaves, unflattened: unflattened(leaves),
    serialized_type_name="fused_losses.LazyProducts",
)


def cross_entropy_with(logits: LinearLogits, probabilities: Tensor, reduction: str) -> Tensor:
    """The cross entropy with ``probabilities``, in the wide dtype: a KL divergence is the small difference between it and
    their entropy."""
    from .linear_cross_entropy import linear_logits_cross_entropy

    p = probabilities if probabilities.is_floating_point() else probabilities.to(logits.wide)
    return linear_logits_cross_entropy(logits, p, reduction=reduction, out_dtype=wide_dtype(logits.device))


def _paired(terms: Sequence[_Term], finite: Sequence[LinearLogits]) -> tuple[list[_Term], list[Any]]:
    """The terms to be summed alone, and ``c, a, b`` for each ``c softmax(a) (log a − log b)``, a KL divergence."""
    alone: list[_Term] = []
    kls: list[Any] = []
    left = list(terms)
    while left:
        term = left.pop()
        c, a, b = term
        # Two terms with the same softmax(a) and opposite factors: one has log_softmax(a), the other another logarithm.
        own = _same(a, b)
        pairs = (t for t in left if t.factor == -c and _same(t.probs, a) and _same(t.values, a) != own)
        pair: Any = next(pairs, None)
        bounded = isinstance(b, LinearLogits) and (b.rest.bias is None or any(_same(b, x) for x in finite))
        if pair is not None:
            left = [t for t in left if t is not pair]
            kls.append((c, a, pair.values) if own else (-c, a, b))
        elif own or bounded or isinstance(b, Dense) or not isinstance(a, LinearLogits):
            alone.append(term)
        else:  # a mixture, or logits that a bias of −inf may make infinite where softmax(a) is not 0
            alone.append(_Term(c, a, a))
            kls.append((-c, a, b))
    return alone, kls


def _kl_sums(kls: list[Any]) -> list[Any]:
    """Factors and sums of ``c Σ a log(a/b)``; two that make a Jensen-Shannon divergence are computed as one."""
    sums: list[Any] = []
    while kls:
        c, a, b = kls.pop()
        if isinstance(b, LinearLogits):
            sums.append((c, _divergence(b, a, "forward_kl")))
            continue
        if isinstance(b, Dense):  # its exponentials need not sum to 1
            logits = b.elements().movedim(a.vocab_dim, -1)
            sums += [
                (c, _divergence(a, logits, "reverse_kl")),
                (-c, token_statistics(logits, outputs=("logsumexp",)).logsumexp),
            ]
            continue
        parts = next((p for p in (b.parts, b.parts[::-1]) if _same(p[0][1], a)), None)
        if parts is None:
            return [(c, NotImplemented)]
        (w, _), (v, other) = parts
        mates = (k for k in kls if _same(k[1], other) and _same(k[2], b))
        rounding = 16 * torch.finfo(b.wide).eps
        mate = next((k for k in mates if math.isclose(c * v, k[0] * w, rel_tol=rounding)), None)
        kls = [k for k in kls if k is not mate]
        c, kind = (c, "skewed_kl") if mate is None else (c * (w + v) / w, "jsd")
        sums.append((c, _divergence(other, a, kind, w / (w + v)) - math.log(w + v)))
    return sums


def _divergence(student: LinearLogits, teacher: Any, kind: str, beta: float = 0.5) -> Tensor:
    """``teacher``: logits that are never made, or that exist with the vocabulary last."""
    shards = shared_vocabulary(student, teacher, None)
    sides = student.vocab_last(), teacher.vocab_last() if isinstance(teacher, LinearLogits) else teacher
    return token_divergence(*sides, None, False, Divergence(kind, beta, 1.0), shards)[0].view(student.token_shape)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, _Log) and isinstance(y, _Log):
        return all(w == v and same_logits(a, b) for (w, a), (v, b) in zip(x.parts, y.parts, strict=True))
    return x is y or (isinstance(x, LinearLogits) and isinstance(y, LinearLogits) and same_logits(x, y))


def alike(x: LazyTensor, t: Any) -> bool:
    """Whether ``t`` is a tensor with a number for each element of ``x``."""
    return isinstance(t, Tensor) and t.shape == x.shape and t.device == x.device and not t.is_complex()


def fit(x: LinearLogits, y: LinearLogits) -> bool:
    """Whether they can be combined entry by entry; raises where their vocabularies have different sizes."""
    V, W = x.shape[x.vocab_dim], y.shape[y.vocab_dim]
    if V != W and 1 not in (V, W) and x.vocab_dim - x.ndim == y.vocab_dim - y.ndim:
        raise RuntimeError(
            f"the vocabularies of logits {tuple(x.shape)} and {tuple(y.shape)} have {V} and {W} entries: take "
            f"[..., :{min(V, W)}] of the larger before its softmax, or call divergence() on both, which does"
        )
    return same_sizes(x.shape, y.shape) and x.vocab_dim == y.vocab_dim and x.device == y.device and x.wide == y.wide


def mixture(x: Any, y: Any, sign: float) -> Any:
    """``x + sign · y`` of two softmaxes."""
    if not (x.unshifted and y.unshifted and fit(x.base, y.base)):
        return NotImplemented
    w, v = number_of(x.factor), number_of(y.factor)
    return NotImplemented if w is NotImplemented or v is NotImplemented else _mixed([(w, x), (v * sign, y)])


def _mixed(weighed: list[tuple[float, Any]]) -> LazyMixture:
    (_, x), (_, y) = weighed
    return LazyMixture(tuple((w, e.base) for w, e in weighed), torch.promote_types(x.dtype, y.dtype))


@answers("abs", "absolute", "__abs__")
def abs_(x: LazyTensor) -> Any:
    return x.distance() if isinstance(x, LazyMixture) else NotImplemented


@answers("minimum", anywhere=True)
def minimum(input: Any, other: Any) -> Any:
    """The smaller of two softmaxes, entry by entry."""
    apart = input.plus(other, -1.0) if isinstance(input, LazyTensor) and isinstance(other, LazyTensor) else None
    return apart.distance(smaller=True) if isinstance(apart, LazyMixture) else NotImplemented


@answers("logaddexp", anywhere=True)
def logaddexp(input: Any, other: Any) -> Any:
    """The logarithm of a mixture of two softmaxes, from their logarithms and those of the weights."""
    both = (input, other)
    if not all(isinstance(x, LazyExpression) and x.form == "log_softmax" and x.unscaled for x in both):
        return NotImplemented
    if not fit(input.base, other.base):
        return NotImplemented
    logs = [number_of(x.offset) for x in both]
    if any(w is NotImplemented or not abs(w) < LARGEST_LOG for w in logs):
        return NotImplemented
    return _mixed([(math.exp(w), x) for w, x in zip(logs, both, strict=True)]).logarithm()


@dataclass(eq=False, repr=False)
class LazyStack(Derived):
    """A stack of expressions of different heads, or of one and a tensor that exists: no logits are made until something other
    than a sum over the stack is asked for."""

    parts: tuple[Any, ...]  # Dense for a tensor that exists
    at: int  # the new dimension
    answered = frozenset({"logsumexp", "sum", "mean", "size", "dim", "numel", "is_floating_point"})

    @property
    def base(self) -> Any:
        return next(x for x in self.parts if is_lazy(x))

    @property
    def vocab_dim(self) -> int:
        return self.base.vocab_dim + (self.at <= self.base.vocab_dim)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.base.shape[: self.at], len(self.parts), *self.base.shape[self.at :]])

    @property
    def token_shape(self) -> torch.Size:
        return torch.Size([n for d, n in enumerate(self.shape) if d != self.vocab_dim])

    @property
    def dtype(self) -> torch.dtype:
        return functools.reduce(torch.promote_types, (x.dtype if is_lazy(x) else x.tensor.dtype for x in self.parts))

    @property
    def requires_grad(self) -> bool:
        return any(x.requires_grad for x in self.parts)

    def __repr__(self) -> str:
        return f"LazyStack({tuple(self.shape)}, {self.dtype}, of {list(self.parts)})"

    def materialize(self) -> Tensor:
        return torch.stack([x.materialize() if is_lazy(x) else x.elements() for x in self.parts], self.at)

    def reduced(self, fn: Callable[[Any, Any], Any], dims: list[int], keepdim: bool) -> Any:
        """``fn`` of the two parts, if ``dims`` is the dimension they are stacked along."""
        if dims != [self.at] or keepdim or len(self.parts) != 2:
            return NotImplemented
        return fn(*(x if is_lazy(x) else x.elements() for x in self.parts)).to(self.dtype)


@answers("stack", anywhere=True)
def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    if all(isinstance(x, LinearLogits) for x in tensors):
        return torch.cat([x.unsqueeze(dim) for x in tensors], dim)
    lazy: list[Any] = [x for x in tensors if is_lazy(x)]
    first, exist = lazy[0], [x for x in tensors if not is_lazy(x)]
    if not all(isinstance(x, LazyExpression) and fit(first.base, x.base) for x in lazy):
        return NotImplemented
    # A function of an expression and a tensor is recorded, which does not work in a compiled function.
    if exist and (len(tensors) != 2 or first.form not in ("log_softmax", "softmax") or torch.compiler.is_compiling()):
        return NotImplemented
    if not all(alike(first, x) and x.is_floating_point() for x in exist):
        return NotImplemented
    return LazyStack(tuple(x.as_copy() if is_lazy(x) else Dense(x) for x in tensors), wrap_dim(first, dim, extra=1))


def weighed_values(softmax: Any, values: Any) -> Any:
    """``softmax · L``."""
    if not softmax.unshifted or not alike(softmax, values):
        return NotImplemented
    return LazyProducts((_Term(1.0, softmax.base, Dense(values)),), softmax.dtype, softmax.factor)


def as_products(x: LazyTensor) -> Any:
    """``x`` as a :class:`LazyProducts`, if it is one, or a scaled ``log_softmax`` or ``softmax·log_softmax``."""
    if isinstance(x, LazyProducts):
        return x
    if not isinstance(x, LazyExpression) or x.form not in ("log_softmax", "p_log_p") or not x.unshifted:
        return NotImplemented
    softmax = x.base if x.form == "p_log_p" else None
    return LazyProducts((_Term(1.0, softmax, x.base),), x.dtype, x.factor)


from .log_softmax import LazyExpression  # noqa: E402  it imports LazyProducts, which are made of it

"""Products of one head's ``softmax`` with another's ``log_softmax``, as losses of distillation write them by hand.

A student ``s`` learns from a teacher ``t`` by ``Σ_j t_j log s_j``, or by a difference of two such sums. :class:`LazyProducts`
holds ``factor · Σ_i c_i softmax(a_i) log_softmax(b_i)`` until it is summed over the vocabulary; without ``a_i`` a term is
``log_softmax(b_i)`` alone, and in place of that may stand the logarithm of a mixture ``m = w softmax(a) + (1 − w) softmax(b)``.
The sum is answered term by term:

=====================================  =====================================================
terms                                  summed over the vocabulary
=====================================  =====================================================
``softmax(a) (log a − log b)``         the KL divergence of a from b
``softmax(a) (log a − log m)``         the skewed one
``softmax(a) log_softmax(b)``          −their cross entropy
``softmax(a) log_softmax(a)``          −entropy
``log_softmax(b)``                     as in ``log_softmax.py``
=====================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lazy_tensor import Derived, LazyTensor, answers, is_number, per_token_number
from .linear_logits import LinearLogits, same_logits


def times_log(z: Tensor, dim: int) -> Tensor:
    """``softmax · log_softmax``, 0 where there is no mass."""
    logp = z.log_softmax(dim)
    return torch.where(logp == -torch.inf, 0, logp.exp() * logp)


class _Term(NamedTuple):
    factor: float
    softmax: LinearLogits | None
    log_softmax: LinearLogits | LazyMixture

    @property
    def requires_grad(self) -> bool:
        return self.log_softmax.requires_grad or (self.softmax is not None and self.softmax.requires_grad)


@dataclass(eq=False, repr=False)
class LazyMixture(Derived):
    """``w softmax(a) + w' softmax(b)``."""

    parts: tuple[tuple[float, LinearLogits], tuple[float, LinearLogits]]
    dtype: torch.dtype

    @property
    def base(self) -> LinearLogits:
        return self.parts[0][1]

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return any(z.requires_grad for _, z in self.parts)

    def __repr__(self) -> str:
        (w, a), (v, _) = self.parts
        return f"LazyMixture({tuple(self.shape)}, {self.dtype}, {w} and {v} of softmaxes like that of {a})"

    def elements(self) -> Tensor:
        (w, a), (v, b) = self.parts
        return w * a.elements().softmax(self.vocab_dim) + v * b.elements().softmax(self.vocab_dim)

    def materialize(self) -> Tensor:
        return self.elements().to(self.dtype)

    def each(self, fn: Callable[[LinearLogits], LinearLogits]) -> LazyMixture:
        (w, a), (v, b) = self.parts
        return replace(self, parts=((w, fn(a)), (v, fn(b))))

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyMixture:
        return self.each(lambda z: z.mapped(fn, vocab_dim, view=view))

    def with_dtype(self, dtype: torch.dtype) -> LazyMixture:
        return replace(self, dtype=dtype)

    def detach(self) -> LazyMixture:
        return self.each(LinearLogits.detach)

    def scaled(self, factor: Any) -> Any:
        if not is_number(factor):
            return NotImplemented
        (w, a), (v, b) = self.parts
        return replace(self, parts=((w * factor, a), (v * factor, b)))

    def divided(self, divisor: Any) -> Any:
        return self.scaled(1 / divisor) if is_number(divisor) and divisor != 0 else NotImplemented

    def logarithm(self) -> Any:
        (w, _), (v, _) = self.parts
        whole = min(w, v) > 0 and abs(w + v - 1) < 1e-6
        return LazyProducts((_Term(1.0, None, self),), self.dtype) if whole else NotImplemented


@dataclass(eq=False, repr=False)
class LazyProducts(Derived):
    """``factor · Σ_i c_i softmax(a_i) log_softmax(b_i)``, the factor a number or one per token; see the module."""

    terms: tuple[_Term, ...]
    dtype: torch.dtype
    factor: Any = 1.0
    finite: tuple[LinearLogits, ...] = ()  # entries where one of these logits is infinite count as 0
    viewed: bool = False  # and may not change in place

    @property
    def base(self) -> LinearLogits:
        first = self.terms[0].log_softmax
        return first if isinstance(first, LinearLogits) else first.base

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        trained = any(term.requires_grad for term in self.terms)
        return trained or (isinstance(self.factor, Tensor) and self.factor.requires_grad)

    def __repr__(self) -> str:
        return f"LazyProducts({tuple(self.shape)}, {self.dtype}, {len(self.terms)} terms of {self.base})"

    def materialize(self) -> Tensor:
        """The elements themselves, differentiable, in ``dtype``."""
        total: Any = 0
        for c, a, b in self.terms:
            dim, z = self.vocab_dim, b.elements()
            if _same(a, b):
                term = times_log(z, dim)
            else:
                term = z.log() if isinstance(b, LazyMixture) else z.log_softmax(dim)
                term = term if a is None else a.elements().softmax(dim) * term
            total = total + c * (term.masked_fill(LazyMask(self.finite).materialize(), 0) if self.finite else term)
        factor = self.factor.unsqueeze(self.vocab_dim) if isinstance(self.factor, Tensor) else self.factor
        return (total * factor).to(self.dtype)

    def _each(self, fn: Callable[[LinearLogits], LinearLogits], factor: Any) -> LazyProducts:
        """With ``fn`` of all logits, the same of the same."""
        known: list[tuple[LinearLogits, LinearLogits]] = []

        def once(x: LinearLogits | LazyMixture | None) -> Any:
            if not isinstance(x, LinearLogits):
                return None if x is None else x.each(once)
            found = next((new for old, new in known if same_logits(old, x)), None)
            if found is None:
                found = fn(x)
                known.append((x, found))
            return found

        terms = tuple(_Term(c, once(a), once(b)) for c, a, b in self.terms)
        return replace(self, terms=terms, factor=factor, finite=tuple(map(once, self.finite)), viewed=False)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyProducts:
        factor = self.factor
        if isinstance(factor, Tensor):
            factor = fn(factor.unsqueeze(self.vocab_dim)).squeeze(vocab_dim)
        self.viewed = self.viewed or view
        return self._each(lambda x: x.mapped(fn, vocab_dim, view=view), factor)

    def with_dtype(self, dtype: torch.dtype) -> LazyProducts:
        return replace(self, dtype=dtype)

    def detach(self) -> LazyProducts:
        return self._each(LinearLogits.detach, self.factor.detach() if isinstance(self.factor, Tensor) else self.factor)

    def scaled(self, factor: Any) -> Any:
        factor = factor if is_number(factor) else per_token_number(self, factor)
        return NotImplemented if factor is NotImplemented else replace(self, factor=self.factor * factor)

    def divided(self, divisor: Any) -> Any:
        if is_number(divisor):
            return NotImplemented if divisor == 0 else self.scaled(1 / divisor)
        divisor = per_token_number(self, divisor)
        return NotImplemented if divisor is NotImplemented else self.scaled(1 / divisor)

    def plus(self, other: LazyTensor, sign: float) -> Any:
        found = products(other)
        if found is NotImplemented or not _fit(self.base, found.base):
            return NotImplemented
        alike = len(self.finite) == len(found.finite) and all(map(_same, self.finite, found.finite))
        if not alike or not (is_number(self.factor) and is_number(found.factor)):
            return NotImplemented
        terms = [t._replace(factor=t.factor * self.factor) for t in self.terms]
        terms += [t._replace(factor=t.factor * found.factor * sign) for t in found.terms]
        dtype = torch.promote_types(self.dtype, found.dtype)
        return replace(self, terms=tuple(terms), factor=1.0, dtype=dtype)

    def times(self, other: LazyTensor) -> Any:
        """With a softmax."""
        from .log_softmax import LazyExpression

        softmax = isinstance(other, LazyExpression) and other.form == "softmax" and other.unshifted
        if not softmax or not _fit(self.base, other.base) or any(t.softmax is not None for t in self.terms):
            return NotImplemented
        terms = tuple(t._replace(softmax=other.base) for t in self.terms)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return replace(self, terms=terms, factor=self.factor * other.factor, dtype=dtype)

    def _leaves_out_itself(self, masked: LinearLogits) -> bool:
        """Whether sums are 0 where these logits are infinite: without a bias they are finite, where a bias makes them −inf
        their own softmax is 0, and of a cross entropy alone those entries are left out."""
        alone = len(self.terms) == 1 and self.terms[0].softmax is not None and _same(self.terms[0].log_softmax, masked)
        return masked.rest.bias is None or alone or all(_same(t.softmax, masked) for t in self.terms)

    def vocab_sum(self) -> Any:
        if not all(map(self._leaves_out_itself, self.finite)):
            return NotImplemented
        total: Any = 0
        left = list(self.terms)
        while left:
            c, a, b = left.pop()
            if a is None:
                if isinstance(b, LazyMixture):
                    return NotImplemented
                total = total + c * b.sum_log_probs()
                continue
            # With what makes it a KL: of softmax(a) log_softmax(a) that of another b, and the other way round.
            own = _same(a, b)
            pairs = (t for t in left if t.factor == -c and _same(t.softmax, a) and _same(t.log_softmax, a) != own)
            pair = next(pairs, None)
            if pair is not None:
                left = [t for t in left if t is not pair]
                other, c = (pair.log_softmax, c) if own else (b, -c)
                found = _kl(a, other)
            elif own:
                found = -a.statistic("entropy")
            elif isinstance(b, LinearLogits) and (b.rest.bias is None or any(_same(b, x) for x in self.finite)):
                found = -_divergence(b, a, "cross_entropy")
            else:  # a bias of −inf makes it infinite where there is mass
                kl = _kl(a, b)
                found = kl if kl is NotImplemented else -(kl + a.statistic("entropy"))
            if found is NotImplemented:
                return NotImplemented
            total = total + c * found
        return total * self.factor


def _kl(a: LinearLogits, b: LinearLogits | LazyMixture) -> Any:
    """Of b from a, ``Σ a log(a/b)``; from a mixture of which a is a part."""
    if isinstance(b, LinearLogits):
        return _divergence(b, a, "forward_kl")
    for (w, x), (_, y) in (b.parts, b.parts[::-1]):
        if _same(a, x):
            return _divergence(y, a, "skewed_kl", w)
    return NotImplemented


def _divergence(student: LinearLogits, teacher: LinearLogits, kind: str, beta: float = 0.5) -> Tensor:
    from .divergence import Divergence, shared_vocabulary, token_divergence

    shards = shared_vocabulary(student, teacher, None)
    sides = student.vocab_last(), teacher.vocab_last()
    return token_divergence(*sides, None, False, Divergence(kind, beta, 1.0), shards)[0].view(student.token_shape)


def _same(x: Any, y: Any) -> bool:
    return x is y or (isinstance(x, LinearLogits) and isinstance(y, LinearLogits) and same_logits(x, y))


def _fit(x: LinearLogits, y: LinearLogits) -> bool:
    return x.shape == y.shape and x.vocab_dim == y.vocab_dim and x.device == y.device and x.wide == y.wide


def mixture(x: Any, y: Any) -> Any:
    """``x + y`` of two softmaxes."""
    if not all(e.unshifted and is_number(e.factor) for e in (x, y)) or not _fit(x.base, y.base):
        return NotImplemented
    return LazyMixture(((x.factor, x.base), (y.factor, y.base)), torch.promote_types(x.dtype, y.dtype))


def products(x: LazyTensor) -> Any:
    """``x`` as such, where it is one or a scaled ``log_softmax`` or ``softmax·log_softmax``."""
    from .log_softmax import LazyExpression

    if isinstance(x, LazyProducts):
        return x
    if not isinstance(x, LazyExpression) or x.form not in ("log_softmax", "p_log_p") or not x.unshifted:
        return NotImplemented
    softmax = x.base if x.form == "p_log_p" else None
    return LazyProducts((_Term(1.0, softmax, x.base),), x.dtype, x.factor)


@dataclass(eq=False, repr=False)
class LazyMask(Derived):
    """Where one of these logits is infinite."""

    of: tuple[LinearLogits, ...]
    dtype = torch.bool
    requires_grad = False

    @property
    def base(self) -> LinearLogits:
        return self.of[0]

    def __repr__(self) -> str:
        return f"LazyMask({tuple(self.shape)}, {len(self.of)} logits like {self.base})"

    def materialize(self) -> Tensor:
        masks = [z.elements().isinf() for z in self.of]
        return torch.stack(masks).any(0)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyMask:
        return LazyMask(tuple(z.mapped(fn, vocab_dim, view=view) for z in self.of))

    def with_dtype(self, dtype: torch.dtype) -> Any:
        return NotImplemented

    def detach(self) -> LazyMask:
        return self


@answers("isinf")
def isinf(x: LazyTensor) -> Any:
    # A copy, which mul_ and div_ of the given one do not change.
    return LazyMask((x.with_dtype(x.dtype),)) if isinstance(x, LinearLogits) else NotImplemented


@answers("__or__", "logical_or", "bitwise_or")
def or_(x: LazyTensor, other: Any) -> Any:
    both = isinstance(x, LazyMask) and isinstance(other, LazyMask) and _fit(x.base, other.base)
    return LazyMask(x.of + other.of) if both else NotImplemented


@answers("masked_fill")
def masked_fill(x: LazyTensor, mask: Any, value: Any) -> Any:
    """0 where logits are infinite, which ``0 · (−inf)`` is not."""
    found = products(x) if isinstance(mask, LazyMask) and is_number(value) and value == 0 else NotImplemented
    if found is NotImplemented or found.finite or not _fit(found.base, mask.base):
        return NotImplemented
    return replace(found, finite=mask.of)


@answers("sub_", "subtract_", "__isub__")
def sub_(x: LazyTensor, other: Any, *, alpha: Any = 1) -> Any:
    return _become(x, other, -1.0) if alpha == 1 else NotImplemented


@answers("add_", "__iadd__")
def add_(x: LazyTensor, other: Any, *, alpha: Any = 1) -> Any:
    return _become(x, other, 1.0) if alpha == 1 else NotImplemented


def _become(x: LazyTensor, other: Any, sign: float) -> Any:
    if not isinstance(x, LazyProducts) or not isinstance(other, LazyTensor) or x.viewed:
        return NotImplemented
    new = x.plus(other, sign)
    if new is NotImplemented:
        return NotImplemented
    vars(x).update(vars(new), dtype=x.dtype)
    return x


def elementwise_kl(input: LazyTensor, target: Any) -> Any:
    """``t (log t − log s)`` of a lazy ``log s`` and ``softmax`` ``t``, what ``F.kl_div(…, reduction="none")`` gives."""
    log_target = products(replace(target, form="log_softmax"))
    found = log_target.plus(input, -1.0)
    return found if found is NotImplemented else found.times(target)

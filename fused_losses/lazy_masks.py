"""Masks of where lazy logits are infinite, nan or masked, as in hand-written losses and ``torch.distributions``; and fills."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .autodiff import host_may_read
from .lazy_products import Dense, alike, as_products, fit
from .lazy_tensor import (
    Derived,
    LazyTensor,
    answers,
    answers_in_place,
    is_lazy,
    number_of,
    over_vocab,
    per_token_number,
    report,
    with_dim,
)
from .linear_logits import LinearLogits, same_logits
from .log_softmax import LazyExpression


class _Booleans(Derived):
    dtype = torch.bool
    requires_grad = False

    def with_dtype(self, dtype: torch.dtype) -> Any:
        return NotImplemented

    def detach(self) -> Any:
        return self


@dataclass(eq=False, repr=False)
class LazyMask(_Booleans):
    """True where one of ``infinite`` is infinite, one of ``nan`` is nan, or the mask ``dense`` is True."""

    infinite: tuple[LinearLogits, ...]
    nan: tuple[LinearLogits, ...] = ()
    dense: Dense | None = None
    like: LinearLogits | None = None  # gives the shape after a change in place

    @property
    def base(self) -> LinearLogits:
        return next(z for z in (*self.infinite, *self.nan, self.like) if z is not None)

    def __repr__(self) -> str:
        return f"LazyMask({tuple(self.shape)}, {len(self.infinite + self.nan)} logits like {self.base})"

    def materialize(self) -> Tensor:
        masks = [z.elements().isinf() for z in self.infinite] + [z.elements().isnan() for z in self.nan]
        masks += [] if self.dense is None else [self.dense.elements()]
        return functools.reduce(torch.logical_or, masks)

    def values_at(self, ids: Tensor) -> Any:
        if self.nan:
            return NotImplemented  # a nan anywhere in a row makes all that is gathered from it nan
        gathered = [z.detach().values_at(ids) for z in self.infinite]
        if any(not host_may_read(x) or x.isnan().any() for x in gathered):
            return NotImplemented  # so does a logit of +∞, and a row of −∞ alone
        masks = [x.isinf() for x in gathered]
        if self.dense is not None:
            masks.append(self.dense.elements().movedim(self.vocab_dim, -1).gather(-1, ids))
        return functools.reduce(torch.logical_or, masks)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyMask:
        infinite, nan = (tuple(z.mapped(fn, vocab_dim, view=view) for z in of) for of in (self.infinite, self.nan))
        dense = None if self.dense is None else Dense(fn(self.dense.elements()))
        like = None if self.like is None else self.like.mapped(fn, vocab_dim, view=view)
        return self.aliasing(LazyMask(infinite, nan, dense, like), view)

    def become_changed(self, name: str, change: Callable[[Tensor], Any]) -> Any:
        if self.fixed:
            return NotImplemented
        report(name, self)
        elements = self.materialize()
        change(elements)
        return self.become(LazyMask((), (), Dense(elements), self.base) if elements.shape == self.shape else None)

    def union(self, other: Any) -> Any:
        if isinstance(other, LazyMask) and fit(self.base, other.base):
            mask = LazyMask(self.infinite + other.infinite, self.nan + other.nan, self.dense, self.like)
            return mask if other.dense is None else mask.union(other.dense.elements())
        if not alike(self, other) or other.dtype != torch.bool:
            return NotImplemented
        return replace(self, dense=Dense(other if self.dense is None else self.dense.elements() | other))

    def emptied(self, z: LinearLogits) -> Any:
        """``z`` with 0 for all that is not finite. Without a bias that is a token's whole row, decided by its hidden states."""
        both = all(len(of) == 1 and same_logits(of[0], z) for of in (self.infinite, self.nan))
        plain = z.rest.bias is None and z.rest.low_rank is None and z.softcap is None
        if not both or not plain or self.dense is not None:
            return NotImplemented
        finite = z.hidden.isfinite().all(-1, keepdim=True)
        return z._but(z.hidden.masked_fill(~finite, 0))


@dataclass(eq=False, repr=False)
class LazyCondition(_Booleans):
    """True where ``x``, logits or an expression of them, is a number, not nan (``x == x``), or a finite one."""

    x: Any
    finite: bool

    @property
    def base(self) -> LinearLogits:
        return self.x if isinstance(self.x, LinearLogits) else self.x.base

    def __repr__(self) -> str:
        return f"LazyCondition({tuple(self.shape)}, where {'finite' if self.finite else 'a number'}, {self.x})"

    def materialize(self) -> Tensor:
        x = self.x.materialize()
        return x.isfinite() if self.finite else ~x.isnan()

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyCondition:
        return self.aliasing(replace(self, x=self.x.mapped(fn, vocab_dim, view=view)), view)

    def everywhere(self) -> Any:
        """Whether all entries of a token meet the condition, ``token_shape``."""
        x = self.x
        if self.finite:  # only logits come here; topk takes a nan for the largest
            largest, smallest = (x.topk_ids(1, largest)[0].squeeze(-1) for largest in (True, False))
            return largest.isfinite() & smallest.isfinite()
        if isinstance(x, LinearLogits):
            return ~x.statistic("max_logit").isnan()
        normal = x.form == "log_softmax" and x.bare
        return x.base.statistic("logsumexp").isfinite() if normal else NotImplemented


@answers("eq", "__eq__")
def eq(x: LazyTensor, other: Any) -> Any:
    """``x == x``, as ``torch.distributions`` looks for nan."""
    own = other is x and isinstance(x, (LinearLogits, LazyExpression))
    return LazyCondition(x.as_copy(), finite=False) if own else NotImplemented


@answers("isfinite")
def isfinite(x: LazyTensor) -> Any:
    return LazyCondition(x.as_copy(), finite=True) if isinstance(x, LinearLogits) else NotImplemented


@answers("all")
def all_(x: LazyTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    found = x.everywhere() if isinstance(x, LazyCondition) and over_vocab(x, dim) else NotImplemented
    if found is NotImplemented:
        return found
    return found.all() if dim is None else with_dim(found, x, keepdim)


@answers("isinf")
def isinf(x: LazyTensor) -> Any:
    return LazyMask((x.as_copy(),)) if isinstance(x, LinearLogits) else NotImplemented


@answers("isnan")
def isnan(x: LazyTensor) -> Any:
    return LazyMask((), (x.as_copy(),)) if isinstance(x, LinearLogits) else NotImplemented


@answers("any")
def any_(x: LazyTensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if not isinstance(x, LazyMask) or x.infinite or x.dense is not None or not over_vocab(x, dim):
        return NotImplemented
    found = torch.stack([z.detach().statistic("max_logit").isnan() for z in x.nan]).any(0)
    return found.any() if dim is None else with_dim(found, x, keepdim)


@answers_in_place("__ior__", "logical_or_", "bitwise_or_")
@answers("__or__", "logical_or", "bitwise_or", anywhere=True)
def or_(input: Any, other: Any) -> Any:
    mask, other = (input, other) if isinstance(input, LazyMask) else (other, input)
    return mask.union(other) if isinstance(mask, LazyMask) else NotImplemented


@answers_in_place("masked_fill_")
@answers("masked_fill")
def masked_fill(x: LazyTensor, mask: Any, value: Any) -> Any:
    """Fill with 0: where logits are infinite, since ``0 · (−inf)`` is not 0; whole tokens; or tensors beside lazy logits."""
    number = number_of(value) if not isinstance(value, Tensor) or value.ndim == 0 else NotImplemented
    if number is NotImplemented or number != 0:
        return NotImplemented
    if isinstance(x, LinearLogits):
        return mask.emptied(x) if isinstance(mask, LazyMask) else NotImplemented
    found = as_products(x)
    if found is NotImplemented:
        return NotImplemented
    if isinstance(mask, LazyMask):
        if found.finite or mask.nan or not fit(found.base, mask.base):
            return NotImplemented
        found = found if mask.dense is None else found.without_entries(mask.dense.elements())
        return found if found is NotImplemented else replace(found, finite=mask.infinite)
    tokens = per_token_number(found, mask)
    if tokens is NotImplemented:
        return found.without_entries(mask)
    return replace(found, skipped=tokens != 0) if found.skipped is None else NotImplemented


@answers("where", anywhere=True)
def where(*args: Any, **kwargs: Any) -> Any:
    """0 where a mask says so; called as a method, the condition is the second argument."""
    method = len(args) > 0 and is_lazy(args[0]) and not isinstance(args[0], LazyMask)
    names = ("input", "condition", "other") if method else ("condition", "input", "other")
    given: Any = kwargs | dict(zip(names, args, strict=False))
    condition, input, other = (given.get(name) for name in ("condition", "input", "other"))
    tokens = isinstance(condition, Tensor) and condition.dtype == torch.bool
    if not (tokens or isinstance(condition, LazyMask)) or is_lazy(input) == is_lazy(other):
        return NotImplemented
    if is_lazy(other):
        return masked_fill(other, condition, input)
    return masked_fill(input, ~condition, other) if tokens else NotImplemented

"""``log_softmax`` and ``softmax`` of logits that are never made, and what losses do with them.

A loss written in plain PyTorch takes ``log_softmax`` and then reads a few of its numbers: it gathers those of the labels, sums
over the vocabulary, or multiplies by the probabilities and sums to an entropy. :class:`LazyExpression` holds
``factor · f(z) + offset`` until one of these is asked for:

=============  =====================  =============  ==========================
f              f(z)                   at given ids   summed over the vocabulary
=============  =====================  =============  ==========================
logits         z                      logp + lse     V·mean(z)
log_softmax    z − lse                logp           V·(mean(z) − lse)
finite         max(z − lse, least)                   (times softmax: as log_softmax)
softmax        exp(z − lse)           exp(logp)      1
p_log_p        softmax·log_softmax                   −entropy
p_p            softmax²               exp(2 logp)    Σ p²
p_z            softmax·z                             lse − entropy
tanh           tanh(z)                               (becomes a softcap when multiplied)
=============  =====================  =============  ==========================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .autodiff import no_gradient
from .lazy_products import (
    LARGEST_LOG,
    Elementwise,
    LazyMixture,
    LazyProducts,
    as_products,
    mixture,
    times_log,
    weighed_values,
)
from .lazy_tensor import (
    LazyTensor,
    answers,
    answers_in_place,
    coefficient,
    from_front,
    is_lazy,
    is_number,
    multiplied,
    wrap_dim,
)
from .linear_logits import LinearLogits, same_logits
from .numerics import autocast_dtype


class _Form(NamedTuple):
    elements: Callable[[Tensor, int], Tensor]  # of whole logits
    at: Callable[[LinearLogits, Tensor], Tensor] | None  # (*token_shape, K)
    total: Callable[[LinearLogits], Tensor] | None  # token_shape


_FORMS = {
    "logits": _Form(lambda z, dim: z, LinearLogits.values_at, LinearLogits.vocab_sum),
    "log_softmax": _Form(lambda z, dim: z.log_softmax(dim), LinearLogits.log_probs_at, LinearLogits.sum_log_probs),
    "finite": _Form(lambda z, dim: z.log_softmax(dim).clamp(min=torch.finfo(z.dtype).min), None, None),
    "softmax": _Form(
        lambda z, dim: z.softmax(dim),
        lambda z, ids: z.log_probs_at(ids).exp(),
        lambda z: z.statistic("logsumexp") * 0 + 1,  # nan where eager's is, and a gradient of 0
    ),
    "p_log_p": _Form(times_log, None, lambda z: -z.statistic("entropy")),
    "p_p": _Form(
        lambda z, dim: z.softmax(dim).square(),
        lambda z, ids: (2 * z.log_probs_at(ids)).exp(),
        lambda z: z.statistic("log_sum_sq_probs").exp(),
    ),
    "p_z": _Form(lambda z, dim: z.softmax(dim) * z, None, lambda z: z.statistic("logsumexp") - z.statistic("entropy")),
    "tanh": _Form(lambda z, dim: z.tanh(), None, None),
}


# The form of a product with the softmax of the same logits.
_PRODUCTS = {"log_softmax": "p_log_p", "finite": "p_log_p", "softmax": "p_p", "logits": "p_z"}


@dataclass(eq=False, repr=False)
class LazyExpression(Elementwise):
    """``factor · f(base) + offset``: factor and offset are each a number, or one per token ``token_shape``; see the module."""

    base: LinearLogits
    form: str = "logits"
    factor: Any = 1.0
    offset: Any = 0.0
    label: Any = None  # dtype, base's if None

    def __post_init__(self) -> None:
        self.base = self.base.as_copy()
        if no_gradient():
            self.factor, self.offset = (t.detach() if isinstance(t, Tensor) else t for t in (self.factor, self.offset))

    @property
    def dtype(self) -> torch.dtype:
        return self.label or self.base.dtype

    @property
    def requires_grad(self) -> bool:
        return any(isinstance(t, (Tensor, LinearLogits)) and t.requires_grad for t in self._parts())

    def _parts(self) -> tuple[Any, ...]:
        return self.base, self.factor, self.offset

    def _coefficients(self, dim: int) -> Any:
        """``factor`` and ``offset``, with a dimension for the vocabulary."""
        return (t.unsqueeze(dim) if isinstance(t, Tensor) else t for t in (self.factor, self.offset))

    def __repr__(self) -> str:
        return f"LazyExpression({tuple(self.shape)}, {self.dtype}, {self.factor}·{self.form}(…) + {self.offset}, {self.base})"

    @property
    def unshifted(self) -> bool:
        return is_number(self.offset) and self.offset == 0

    @property
    def unscaled(self) -> bool:
        return is_number(self.factor) and self.factor == 1

    @property
    def bare(self) -> bool:
        return self.unshifted and self.unscaled

    def materialize(self) -> Tensor:
        """The elements themselves, differentiable, in ``dtype``."""
        z = self.base.elements()
        factor, offset = self._coefficients(self.vocab_dim)
        return (_FORMS[self.form].elements(z, self.vocab_dim) * factor + offset).to(self.dtype)

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LazyExpression:
        base, number = self.base.mapped(fn, vocab_dim, view=view), self._of_numbers(fn, vocab_dim)
        return self.aliasing(replace(self, base=base, factor=number(self.factor), offset=number(self.offset)), view)

    def with_dtype(self, dtype: torch.dtype) -> LazyExpression:
        return replace(self, label=dtype)

    def detach(self) -> LazyExpression:
        base, factor, offset = (t if is_number(t) else t.detach() for t in self._parts())
        return self.aliasing(replace(self, base=base, factor=factor, offset=offset))

    def columns(self, key: slice | Tensor) -> Any:
        if isinstance(key, slice) or key.dtype == torch.bool:
            return NotImplemented
        values = self.values_at(from_front(self, key).expand(*self.token_shape, -1))
        return values if values is NotImplemented else values.to(self.dtype).movedim(-1, self.vocab_dim)

    def scaled(self, factor: Any) -> Any:
        if self.form == "tanh" and self.bare:
            if not is_number(factor) or factor <= 0:
                return NotImplemented
            return self.base._but(self.base.hidden, scale=self.base.scale * factor, softcap=factor).with_dtype(
                self.dtype
            )
        number = coefficient(self, factor)
        if number is NotImplemented and self.form == "softmax":
            return weighed_values(self, factor)
        if number is NotImplemented:
            found = as_products(self)
            return found if found is NotImplemented else found.scaled(factor)
        offset = 0.0 if self.unshifted else self.offset * number
        return replace(self, factor=multiplied(self.factor, number), offset=offset)

    def shifted(self, offset: Any) -> Any:
        number = coefficient(self, offset)
        if number is NotImplemented:
            return NotImplemented
        return replace(self, offset=number if self.unshifted else self.offset + number)

    def plus(self, other: LazyTensor | Tensor, sign: float) -> Any:
        if isinstance(other, LazyExpression) and self.form == other.form == "softmax":
            return mixture(self, other, sign)
        found = as_products(self)
        return NotImplemented if found is NotImplemented else found.plus(other, sign)

    def values_at(self, ids: Tensor) -> Any:
        at = _FORMS[self.form].at
        if at is None:
            return NotImplemented
        factor, offset = self._coefficients(-1)
        return at(self.base, ids) * factor + offset

    def reads(self) -> list[tuple[Any, int | Tensor, Tensor]]:
        return self.base.known.reads.setdefault(self.form, []) if self.bare else super().reads()

    def vocab_sum(self) -> Any:
        total = _FORMS[self.form].total
        return NotImplemented if total is None else total(self.base) * self.factor + self.offset * self.base.rest.vocab

    def times(self, other: LazyTensor) -> Any:
        """The product with another lazy tensor, where that product is one of the forms, or one of two heads."""
        if isinstance(other, LazyProducts):
            return other.times(self)
        if not isinstance(other, (LazyExpression, LinearLogits)):
            return NotImplemented
        other = other if isinstance(other, LazyExpression) else LazyExpression(other)
        forms = {self.form: self, other.form: other}
        product = _PRODUCTS.get(next((f for f in forms if f != "softmax"), "softmax"))
        if "softmax" not in forms or product is None or not self.unshifted or not other.unshifted:
            return NotImplemented
        if not same_logits(self.base, other.base):
            found = as_products(forms["log_softmax"]) if "log_softmax" in forms else NotImplemented
            return NotImplemented if found is NotImplemented else found.times(forms["softmax"])
        dtype = torch.promote_types(self.dtype, other.dtype)
        return replace(self, form=product, factor=self.factor * other.factor, label=dtype)

    def _scaled_base(self) -> Any:
        """``factor · base`` as logits, which differ from this by one number per token."""
        if self.form not in ("logits", "log_softmax"):
            return NotImplemented
        factor, _ = self._coefficients(self.vocab_dim)
        return self.base if self.unscaled else self.base.scaled(factor)

    def up_to_shift(self) -> Any:
        """Logits that differ from this by one number per token, which does not change their ``log_softmax``."""
        base = self._scaled_base()
        if base is NotImplemented or (self.requires_grad and not base.requires_grad and not no_gradient()):
            return NotImplemented  # the result must require grad, with a gradient of 0
        return base.with_dtype(self.dtype)

    def log_total(self) -> Any:
        """``logsumexp`` over the vocabulary, ``token_shape``."""
        base = self._scaled_base()
        return base if base is NotImplemented else self._log_total(base)

    def _log_total(self, weighted: LinearLogits) -> Tensor:
        total = weighted.statistic("logsumexp")
        if self.form == "log_softmax":
            total = total - self.factor * self.base.statistic("logsumexp")
        return total + self.offset

    def exponential(self) -> Any:
        """``exp`` of log-probabilities, or of logits less one number per token: a softmax, times one number per token."""
        number = is_number(self.offset)
        if self.form == "log_softmax" and self.unscaled:
            if number and not abs(self.offset) < LARGEST_LOG:
                return NotImplemented
            factor = math.exp(self.offset) if number else self.offset.exp()
            return replace(self, form="softmax", factor=factor, offset=0.0)
        base = NotImplemented if self.form == "logits" and number else self._scaled_base()
        if base is NotImplemented:
            return NotImplemented
        return LazyExpression(base, "softmax", self._log_total(base).exp(), label=self.dtype)


def _expression(base: Any, factor: Any, offset: Any, form: str, label: Any) -> Any:
    return LazyExpression(base, form, factor, offset, label) if is_lazy(base) else base  # tree_map gave no logits


pytree.register_pytree_node(
    LazyExpression,
    lambda x: (list(x._parts()), (x.form, x.label)),
    lambda parts, rest: _expression(*parts, *rest),
    serialized_type_name="fused_losses.LazyExpression",
)


def logits_of(x: LazyTensor) -> Any:
    """Logits that have the same softmax as ``x``."""
    if isinstance(x, LinearLogits):
        return x
    return x.up_to_shift() if isinstance(x, LazyExpression) else NotImplemented


@answers("is_inference")
def is_inference(x: LazyTensor) -> bool:
    while not isinstance(x, LinearLogits):
        x = x.base
    return x.hidden.is_inference()


def _softmax(x: LazyTensor, form: str, dim: Any, stacklevel: Any, dtype: Any) -> Any:
    dtype = stacklevel if isinstance(stacklevel, torch.dtype) else dtype
    base = logits_of(x)
    if dim is None or wrap_dim(x, dim) != x.vocab_dim or base is NotImplemented:
        return NotImplemented
    if dtype is None and autocast_dtype(x.device):  # autocast's rule for softmax depends on the device
        dtype = torch.softmax(torch.empty(1, dtype=x.dtype, device=x.device), 0).dtype
    return LazyExpression(base, form, label=dtype or x.dtype)


@answers("log_softmax", "special_log_softmax")
def log_softmax(x: LazyTensor, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _softmax(x, "log_softmax", dim, _stacklevel, dtype)


@answers("softmax", "special_softmax")
def softmax(x: LazyTensor, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _softmax(x, "softmax", dim, _stacklevel, dtype)


@answers_in_place("exp_")
@answers("exp")
def exp(x: LazyTensor) -> Any:
    return x.exponential() if isinstance(x, LazyExpression) else NotImplemented


@answers("log")
def log(x: LazyTensor) -> Any:
    if isinstance(x, LazyMixture):
        return x.logarithm()
    softmax = isinstance(x, LazyExpression) and x.form == "softmax" and x.bare
    return replace(x, form="log_softmax") if softmax else NotImplemented  # type: ignore[type-var]


@answers("square")
def square(x: LazyTensor) -> Any:
    return x.times(x)


@answers("pow", "__pow__")
def pow_(x: LazyTensor, exponent: Any) -> Any:
    return x.times(x) if is_number(exponent) and exponent == 2 else NotImplemented


@answers("clamp", "clamp_min", "clip")
def clamp(x: LazyTensor, min: Any = None, max: Any = None) -> Any:
    """Log-probabilities without −∞, which ``torch.distributions.Categorical`` multiplies by the probabilities."""
    bare = isinstance(x, LazyExpression) and x.form == "log_softmax" and x.bare and x.dtype == x.wide
    least = max is None and is_number(min) and min == torch.finfo(x.dtype).min
    return replace(x, form="finite") if bare and least else NotImplemented  # type: ignore[type-var]


@answers("tanh")
def tanh(x: LazyTensor) -> Any:
    unbounded = isinstance(x, LinearLogits) and x.softcap is None and not isinstance(x.temperature, Tensor)
    return LazyExpression(x, "tanh") if unbounded else NotImplemented  # type: ignore[arg-type]

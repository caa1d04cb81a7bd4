"""``log_softmax`` and ``softmax`` of logits that are never made, and what losses do with them.

A loss written in plain PyTorch takes ``log_softmax`` and then reads a few of its numbers: gathers the labels', sums
over the vocabulary, multiplies by the probabilities and sums to an entropy. :class:`LazyExpression` holds
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
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .autodiff import transforms_active
from .lazy_products import (
    LARGEST_LOG,
    Elementwise,
    LazyMixture,
    LazyProducts,
    LazyStack,
    as_products,
    cross_entropy_with,
    elementwise_kl,
    fit,
    logaddexp,
    minimum,
    mixture,
    times_log,
    weighed_values,
)
from .lazy_tensor import (
    LazyTensor,
    answers,
    coefficient,
    from_front,
    is_lazy,
    is_number,
    kept,
    multiplied,
    over_vocab,
    wrap_dim,
)
from .linear_logits import LinearLogits, same_logits
from .linear_logits_checks import no_gradient
from .numerics import autocast_dtype, check_label_smoothing, check_reduction, statistics_dtype, upcast, wide_dtype


class _Form(NamedTuple):
    elements: Callable[[Tensor, int], Tensor]  # of whole logits
    at: Callable[[LinearLogits, Tensor], Tensor] | None  # (*token_shape, K)
    total: Callable[[LinearLogits], Tensor] | None  # token_shape


_FORMS = {
    "logits": _Form(lambda z, dim: z, LinearLogits.values_at, LinearLogits.vocab_sum),
    "log_softmax": _Form(
        lambda z, dim: z.log_softmax(dim),
        LinearLogits.log_probs_at,
        LinearLogits.sum_log_probs,
    ),
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


# With the softmax of the same logits.
_PRODUCTS = {"log_softmax": "p_log_p", "finite": "p_log_p", "softmax": "p_p", "logits": "p_z"}


@dataclass(eq=False, repr=False)
class LazyExpression(Elementwise):
    """``factor · f(base) + offset``, each a number or one per token ``token_shape``; see the module."""

    base: LinearLogits
    form: str = "logits"
    factor: Any = 1.0
    offset: Any = 0.0
    label: Any = None  # dtype, base's if None

    def __post_init__(self) -> None:
        self.base = self.base.with_dtype(self.base.dtype)  # which mul_ and div_ of the given one do not change
        if no_gradient():
            self.factor, self.offset = (t.detach() if isinstance(t, Tensor) else t for t in (self.factor, self.offset))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.label or self.base.dtype

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
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
        base, number = self.base.mapped(fn, vocab_dim, view=view), self._per_token(fn, vocab_dim)
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
        return self.base._reads.setdefault(self.form, []) if self.bare else []

    def vocab_sum(self) -> Any:
        total = _FORMS[self.form].total
        return NotImplemented if total is None else total(self.base) * self.factor + self.offset * self.base.rest.vocab

    def times(self, other: LazyTensor) -> Any:
        """The product with another lazy tensor, where it is one of the forms, or of two heads."""
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
        """Logits that differ from this by one number per token, which ``log_softmax`` does not see."""
        if self.requires_grad and not self.base.requires_grad and not no_gradient():
            return NotImplemented  # the result requires grad, with a gradient of 0
        base = self._scaled_base()
        return NotImplemented if base is NotImplemented else base.with_dtype(self.dtype)

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
    return LazyExpression(base, form, factor, offset, label) if is_lazy(base) else base  # what was mapped to no logits


pytree.register_pytree_node(
    LazyExpression,
    lambda x: (list(x._parts()), (x.form, x.label)),
    lambda parts, rest: _expression(*parts, *rest),
    serialized_type_name="fused_losses.LazyExpression",
)


def _logits(x: LazyTensor) -> Any:
    """The logits whose softmax ``x`` has."""
    if isinstance(x, LinearLogits):
        return x
    return x.up_to_shift() if isinstance(x, LazyExpression) else NotImplemented


@answers("is_inference")
def is_inference(x: LazyTensor) -> bool:
    return (x if isinstance(x, LinearLogits) else x.base).hidden.is_inference()


def _softmax(x: LazyTensor, form: str, dim: Any, stacklevel: Any, dtype: Any) -> Any:
    dtype = stacklevel if isinstance(stacklevel, torch.dtype) else dtype
    base = _logits(x)
    if dim is None or wrap_dim(x, dim) != x.vocab_dim or base is NotImplemented:
        return NotImplemented
    if dtype is None and autocast_dtype(x.device):  # whose rule for softmax depends on the device
        dtype = torch.softmax(torch.empty(1, dtype=x.dtype, device=x.device), 0).dtype
    return LazyExpression(base, form, label=dtype or x.dtype)


@answers("log_softmax", "special_log_softmax")
def log_softmax(x: LazyTensor, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _softmax(x, "log_softmax", dim, _stacklevel, dtype)


@answers("softmax", "special_softmax")
def softmax(x: LazyTensor, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    return _softmax(x, "softmax", dim, _stacklevel, dtype)


@answers("exp")
def exp(x: LazyTensor) -> Any:
    return x.exponential() if isinstance(x, LazyExpression) else NotImplemented


@answers("exp_")
def exp_(x: LazyTensor) -> Any:
    return x.become(exp(x))


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
    """Log-probabilities without −∞, as ``torch.distributions.Categorical`` multiplies them with the probabilities."""
    bare = isinstance(x, LazyExpression) and x.form == "log_softmax" and x.bare and x.dtype == x.wide
    least = max is None and is_number(min) and min == torch.finfo(x.dtype).min
    return replace(x, form="finite") if bare and least else NotImplemented  # type: ignore[type-var]


@answers("tanh")
def tanh(x: LazyTensor) -> Any:
    unbounded = isinstance(x, LinearLogits) and x.softcap is None and not isinstance(x.temperature, Tensor)
    return LazyExpression(x, "tanh") if unbounded else NotImplemented  # type: ignore[arg-type]


@answers("gather")
def gather(x: LazyTensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if index.ndim != x.ndim:
        raise RuntimeError(
            f"gather from {tuple(x.shape)} needs an index with as many dimensions, got {tuple(index.shape)}: write "
            "index.unsqueeze(-1) for one id per token"
        )
    if wrap_dim(x, dim) != x.vocab_dim:
        return _gathered_tokens(x, dim, index)
    ids = index.movedim(x.vocab_dim, -1)
    if ids.shape[:-1] != x.token_shape:
        return NotImplemented
    values = x.values_at(ids)
    if values is NotImplemented:
        return values
    values = values.to(x.dtype).movedim(-1, x.vocab_dim)
    x.remember(values, ids)
    return values


def _gathered_tokens(x: LazyTensor, dim: int, index: Tensor) -> Any:
    """Along another dimension, where the index is the same for all of the vocabulary: ``expand`` made it."""
    at, V = x.vocab_dim, x.shape[x.vocab_dim]
    if index.shape[at] != V or (V != 1 and index.stride(at) != 0):
        return NotImplemented
    one = index.narrow(at, 0, 1)
    return x.mapped(
        lambda t: t.gather(dim, one.expand(*one.shape[:at], t.shape[at], *one.shape[at + 1 :])), at, view=False
    )


@answers("take_along_dim")
def take_along_dim(x: LazyTensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or indices.ndim != x.ndim:
        return NotImplemented
    at = wrap_dim(x, dim)
    indices = from_front(x, indices, at)
    if at != x.vocab_dim:  # they broadcast
        sizes = [n if d == at else x.shape[d] for d, n in enumerate(indices.shape)]
        if any(n not in (1, size) for n, size in zip(indices.shape, sizes, strict=True)):
            return NotImplemented
        indices = indices.expand(sizes)
    return gather(x, at, indices)


def _dims(x: LazyTensor, dim: Any) -> list[int]:
    dims = range(x.ndim) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    return [wrap_dim(x, d) for d in dims]


@answers("logsumexp", "special_logsumexp")
def logsumexp(x: LazyTensor, dim: Any, keepdim: bool = False) -> Any:
    if isinstance(x, LazyStack):
        return x.reduced(logaddexp, _dims(x, dim), keepdim)
    if _dims(x, dim) != [x.vocab_dim] or not isinstance(x, (LinearLogits, LazyExpression)):
        return NotImplemented
    lse = x.statistic("logsumexp") if isinstance(x, LinearLogits) else x.log_total()
    if lse is NotImplemented:
        return lse
    lse = lse.to(x.dtype, copy=True)  # callers write into what they get
    if isinstance(x, LinearLogits):
        x.normalise_by(lse)
    return kept(lse, x, keepdim)


@answers("sum")
def sum_(x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = _dims(x, dim)
    if isinstance(x, LazyStack):
        found = x.reduced(lambda a, b: a.plus(b, 1.0), dims, keepdim)
        return found if found is NotImplemented or dtype is None else found.with_dtype(dtype)
    total = x.vocab_sum() if x.vocab_dim in dims else NotImplemented
    return total if total is NotImplemented else _rest_of_sum(x, total, dims, keepdim, dtype)


def _rest_of_sum(x: LazyTensor, total: Tensor, dims: list[int], keepdim: bool, dtype: Any) -> Tensor:
    """Of the sums over the vocabulary ``token_shape``, those over ``dims``, the vocabulary's among them."""
    return total.unsqueeze(x.vocab_dim).sum(dims, keepdim).to(dtype or x.dtype)


@answers("nansum")
def nansum(x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Without the tokens whose hidden states have a nan, and so all their logits; a nan in the head stays one."""
    dims = _dims(x, dim)
    if not isinstance(x, LinearLogits) or x.vocab_dim not in dims:
        return NotImplemented
    return _rest_of_sum(x, x.vocab_sum().masked_fill(x.hidden.isnan().any(-1), 0), dims, keepdim, dtype)


@answers("mean")
def mean(x: LazyTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    total = sum_(x, dim, keepdim, dtype=statistics_dtype(x.dtype))
    count = math.prod([x.shape[d] for d in _dims(x, dim)])
    return total if total is NotImplemented else (total / count).to(dtype or x.dtype)


def _extreme(x: LazyTensor, k: int, largest: bool) -> Any:
    """Values, differentiable, and ids of the largest or smallest entries, ``(*token_shape, k)``."""
    if isinstance(x, LazyExpression):
        monotone = x.form in ("logits", "log_softmax", "softmax") and is_number(x.factor) and x.factor > 0
        if not monotone:
            return NotImplemented
        values, ids = _extreme(x.base.with_dtype(x.wide), k, largest)
        factor, offset = x._coefficients(-1)
        values = values * factor + offset if x.form == "logits" else x.values_at(ids)
        return values.to(x.dtype), ids
    if not isinstance(x, LinearLogits):
        return NotImplemented
    values, ids = x.topk_ids(k, largest)
    if (x.requires_grad or transforms_active()) and torch.is_grad_enabled():
        same = x.values_at(ids)  # but for rounding, and nan beside an infinite logit
        values = torch.where(same == values, same, values + (same - same.detach()).nan_to_num(0))
    return values.to(x.dtype), ids


@answers("argmax")
def argmax(x: LazyTensor, dim: Any = None, keepdim: bool = False, largest: bool = True) -> Any:
    if dim is None or wrap_dim(x, dim) != x.vocab_dim:
        return NotImplemented
    with torch.no_grad():
        found = _extreme(x, 1, largest)
    return found if found is NotImplemented else kept(found[1].squeeze(-1), x, keepdim)


@answers("argmin")
def argmin(x: LazyTensor, dim: Any = None, keepdim: bool = False) -> Any:
    return argmax(x, dim, keepdim, largest=False)


@answers("max")
def max_(x: LazyTensor, dim: Any = None, keepdim: bool = False, largest: bool = True) -> Any:
    found = _extreme(x, 1, largest) if over_vocab(x, dim) else NotImplemented
    if found is NotImplemented:
        return NotImplemented
    x.remember(*found)
    if dim is None:
        return found[0].max() if largest else found[0].min()
    values, ids = (kept(t.squeeze(-1), x, keepdim) for t in found)
    return torch.return_types.max((values, ids)) if largest else torch.return_types.min((values, ids))


@answers("min", anywhere=True)
def min_(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if is_lazy(dim):
        return minimum(input, dim)
    return max_(input, dim, keepdim, largest=False) if is_lazy(input) else NotImplemented


@answers("amax")
def amax(x: LazyTensor, dim: Any = (), keepdim: bool = False) -> Any:
    if dim == () and not keepdim:
        return max_(x)
    found = max_(x, *_dims(x, dim), keepdim) if len(_dims(x, dim)) == 1 else NotImplemented
    return found if found is NotImplemented else found.values


@answers("topk")
def topk(x: LazyTensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if wrap_dim(x, dim) != x.vocab_dim:
        return NotImplemented
    if not 0 <= k <= x.shape[x.vocab_dim]:
        raise RuntimeError(f"selected index k={k} out of range for {x.shape[x.vocab_dim]} entries")
    found = _extreme(x, k, largest)
    if found is NotImplemented:
        return NotImplemented
    x.remember(*found)
    values, ids = (t.movedim(-1, x.vocab_dim) for t in found)
    return torch.return_types.topk((values, ids))


# Losses


@answers("cross_entropy")
def cross_entropy(x: LazyTensor, target: Tensor, weight: Any = None, *args: Any, **kwargs: Any) -> Any:
    from .cross_entropy import cross_entropy as fused

    logits = _logits(x)
    if logits is NotImplemented:
        return NotImplemented
    other_classes = x.vocab_dim != (0 if x.ndim == 1 else 1)
    if other_classes and target.shape in (x.shape, x.shape[:1] + x.shape[2:]):
        return NotImplemented
    if is_lazy(target):
        return _cross_entropy_with_softmax(logits, target, weight, *args, **kwargs)
    return fused(logits, target, weight, *args, **kwargs)


def _cross_entropy_with_softmax(
    x: LinearLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``−Σ t log p`` with the probabilities of another head."""
    from .cross_entropy import result_dtype

    softmax = isinstance(target, LazyExpression) and target.form == "softmax" and target.bare
    if weight is not None or ignore_index >= 0 or not softmax or not fit(x, target.base):
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    check_reduction(reduction)
    check_label_smoothing(label_smoothing)
    total = -LazyExpression(x, "log_softmax").times(target).vocab_sum()
    if label_smoothing:
        total = (1 - label_smoothing) * total - label_smoothing / x.rest.vocab * x.sum_log_probs()
    reduced = {"none": total, "sum": total.sum(), "mean": total.mean()}
    return reduced[reduction].to(result_dtype(x, target))


@answers("nll_loss")
def nll_loss(
    x: LazyTensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    log_probs = isinstance(x, LazyExpression) and x.form == "log_softmax"
    if not log_probs or not is_number(x.factor) or not is_number(x.offset) or x.offset != 0:
        return NotImplemented
    if target.is_floating_point():  # of which cross_entropy would take the soft labels' loss
        raise RuntimeError(
            f"nll_loss of {tuple(x.shape)} expects int64 or uint8 class indices, got {target.dtype} {tuple(target.shape)}; "
            "cross_entropy of the logits takes probabilities"
        )
    loss = cross_entropy(x.base.with_dtype(x.dtype), target, weight, size_average, ignore_index, reduce, reduction)
    return loss if loss is NotImplemented else loss * x.factor


@answers("kl_div", anywhere=True)
def kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """``Σ t (log t − log p)``: of probabilities that exist, the cross entropy with them less their entropy; of a lazy
    teacher, the divergence of two heads."""
    from .cross_entropy import result_dtype

    log_probs = isinstance(input, LazyProducts)
    log_probs = log_probs or (isinstance(input, LazyExpression) and input.form == "log_softmax" and input.bare)
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    if reduction != "batchmean":
        check_reduction(reduction)
    dense = isinstance(input, Tensor) and is_lazy(target) and input.is_floating_point()
    if log_probs and isinstance(target, LazyExpression):
        fit(input.base, target.base)
    if not (log_probs or dense) or target.shape != input.shape:
        return NotImplemented
    if is_lazy(target):
        form = "log_softmax" if log_target else "softmax"
        if not isinstance(target, LazyExpression) or target.form != form or not target.bare:
            return NotImplemented
        each = elementwise_kl(input, replace(target, form="softmax"))
        total = each if each is NotImplemented or reduction == "none" else each.vocab_sum()
    elif isinstance(input, LazyProducts) or not target.is_floating_point():
        return NotImplemented
    else:
        t = upcast(target.exp() if log_target else target)
        t_log_t = t * upcast(target) if log_target else torch.xlogy(t, t)
        if reduction == "none":
            total = as_products(input).scaled(-1).scaled(t)
            total = total if total is NotImplemented else total.plus(t_log_t, 1.0)
        else:
            total = t_log_t.sum(dtype=wide_dtype(t.device)) + cross_entropy_with(input.base, t, "sum")
    if total is NotImplemented:
        return NotImplemented
    if reduction == "none":
        return total.with_dtype(result_dtype(input, target))
    count = {"sum": 1, "batchmean": input.shape[0], "mean": math.prod(input.shape)}[reduction]
    return (total.sum() / count).to(result_dtype(input, target))

"""PyTorch's losses of lazy logits and their ``log_softmax``: ``cross_entropy``, ``nll_loss``, ``kl_div``, ``mse_loss``."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autodiff import differentiated
from .cross_entropy import cross_entropy as fused_cross_entropy
from .cross_entropy import result_dtype
from .lazy_elementwise import DISTANCES, recorded
from .lazy_products import LazyProducts, as_products, cross_entropy_with, fit
from .lazy_tensor import LazyTensor, answers, is_lazy, is_number
from .linear_logits import LinearLogits
from .log_softmax import LazyExpression, logits_of
from .numerics import SUM_OF_MANY, check_label_smoothing, check_reduction, reduction_of, upcast, wide_sum


@answers("cross_entropy")
def cross_entropy(x: LazyTensor, target: Tensor, weight: Any = None, *args: Any, **kwargs: Any) -> Any:
    logits = logits_of(x)
    if logits is NotImplemented:
        return NotImplemented
    other_classes = x.vocab_dim != (0 if x.ndim == 1 else 1)
    if other_classes and target.shape in (x.shape, x.shape[:1] + x.shape[2:]):
        return NotImplemented
    if is_lazy(target):
        return _cross_entropy_with_softmax(logits, target, weight, *args, **kwargs)
    return fused_cross_entropy(logits, target, weight, *args, **kwargs)


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
    """``−Σ t log p`` where ``t`` are another head's probabilities."""
    softmax = isinstance(target, LazyExpression) and target.form == "softmax" and target.bare
    if weight is not None or ignore_index >= 0 or not softmax or not fit(x, target.base):
        return NotImplemented
    reduction = reduction_of(reduction, size_average, reduce)
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
        return _nll_from_entries(x, target, weight, ignore_index, reduction_of(reduction, size_average, reduce))
    if target.is_floating_point():  # cross_entropy would take them for soft labels
        raise RuntimeError(
            f"nll_loss of {tuple(x.shape)} expects int64 or uint8 class indices, got {target.dtype} {tuple(target.shape)}; "
            "cross_entropy of the logits takes probabilities"
        )
    loss = cross_entropy(x.base.with_dtype(x.dtype), target, weight, size_average, ignore_index, reduce, reduction)
    return loss if loss is NotImplemented else loss * x.factor


def _nll_from_entries(x: LazyTensor, target: Tensor, weight: Any, ignore_index: int, reduction: str) -> Any:
    """``−x`` at the targets, where ``x`` is something else, such as the log of a mixture of softmaxes."""
    check_reduction(reduction)
    indices = target.shape == x.token_shape and target.dtype in (torch.int64, torch.uint8)
    if x.vocab_dim != (0 if x.ndim == 1 else 1) or not x.dtype.is_floating_point or not indices:
        return NotImplemented
    dtype = result_dtype(x, target)
    if weight is not None:
        fits = weight.shape == (x.shape[x.vocab_dim],) and result_dtype(weight, target) == dtype
        if not fits or differentiated(weight):
            return NotImplemented  # PyTorch raises
    ids = target.long()  # in uint8 −100 would be 156
    ignored = ids == ignore_index
    ids = ids.masked_fill(ignored, 0)
    found = x.with_dtype(x.wide).value_at(ids)
    if found is NotImplemented:
        return found
    weights = torch.ones_like(found) if weight is None else weight[ids].to(found.dtype)
    weights = weights.masked_fill(ignored, 0)
    loss = (-found * weights).masked_fill(ignored, 0)
    reduced = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / weights.sum()}
    return reduced[reduction].to(dtype)


@answers("kl_div", anywhere=True)
def kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """``Σ t (log t − log p)``."""
    log_probs = isinstance(input, LazyProducts)
    log_probs = log_probs or (isinstance(input, LazyExpression) and input.form == "log_softmax" and input.bare)
    reduction = reduction_of(reduction, size_average, reduce)
    if reduction != "batchmean":
        check_reduction(reduction)
    dense = isinstance(input, Tensor) and is_lazy(target) and input.is_floating_point()
    if log_probs and isinstance(target, LazyExpression):
        fit(input.base, target.base)  # raises where their vocabularies are of different sizes
    if target.shape != input.shape:
        return NotImplemented
    kl = _kl_from_lazy if is_lazy(target) else _kl_from_values
    found = kl(input, target, log_target, summed=reduction != "none") if log_probs or dense else NotImplemented
    if found is NotImplemented and reduction != "none":
        each = recorded(F.kl_div, "kl_div", (input, target), {"reduction": "none", "log_target": log_target})
        found = each if each is NotImplemented else each.with_dtype(each.wide).sum()
    if found is NotImplemented:
        return NotImplemented
    if reduction == "none":
        return found.with_dtype(result_dtype(input, target))
    count = {"sum": 1, "batchmean": input.shape[0], "mean": math.prod(input.shape)}[reduction]
    return (found.sum() / count).to(result_dtype(input, target))


def _kl_from_lazy(log_p: Any, target: Any, log_target: bool, summed: bool) -> Any:
    """``t (log t − log p)``, or its sums over the vocabulary, for a lazy teacher: the divergence of two heads."""
    form = "log_softmax" if log_target else "softmax"
    if not isinstance(target, LazyExpression) or target.form != form or not target.bare:
        return NotImplemented
    found = as_products(replace(target, form="log_softmax")).plus(log_p, -1.0)
    found = found if found is NotImplemented else found.times(replace(target, form="softmax"))
    return found.vocab_sum() if summed and found is not NotImplemented else found


def _kl_from_values(log_p: Any, target: Tensor, log_target: bool, summed: bool) -> Any:
    """The same, or its sum, for a teacher's probabilities that exist: the cross entropy with them less their entropy."""
    if isinstance(log_p, LazyProducts) or not target.is_floating_point():
        return NotImplemented

    def t_log_t(x: Tensor) -> Tensor:
        t = upcast(x.exp() if log_target else x)
        return t * upcast(x) if log_target else torch.xlogy(t, t)

    t = upcast(target.exp()) if log_target else target  # not upcast: backward would hold a wide copy
    if summed:
        # A few rows at a time: t_log_t of all rows is as large as fp32 logits. A compiled function makes no such copy.
        rows = max(1, SUM_OF_MANY // max(target.shape[-1], 1))
        parts = [target] if torch.compiler.is_compiling() else target.reshape(-1, target.shape[-1]).split(rows)
        return sum(wide_sum(t_log_t(part), -1).sum() for part in parts) + cross_entropy_with(log_p.base, t, "sum")
    found = as_products(log_p).scaled(-1).scaled(t)
    return found if found is NotImplemented else found.plus(t_log_t(target), 1.0)


def _distance(name: str) -> None:
    """Answer this loss with the sum or mean of its entries, which ``lazy_elementwise`` records."""
    function = getattr(F, name)
    signature = inspect.signature(function)

    @answers(name, anywhere=True)
    def answer(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["input"].shape != given["target"].shape or given.get("weight") is not None:
            return NotImplemented  # PyTorch warns of unequal shapes, and divides by the sum of the weights
        older = given.pop("size_average", None), given.pop("reduce", None)
        reduction = reduction_of(given.pop("reduction", "mean"), *older)
        check_reduction(reduction)
        each = NotImplemented if reduction == "none" else recorded(function, name, (), {**given, "reduction": "none"})
        return each if each is NotImplemented else each.sum() if reduction == "sum" else each.mean()


for _name in DISTANCES:
    _distance(_name)

"""Cross entropy with ``torch.nn.functional.cross_entropy``'s whole contract, in one pass over the logits.

The loss of a row is a short function of a few of its statistics, so the row operator of :mod:`fused_losses.token_statistics`
does the work, and this module implements PyTorch's contract.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autodiff import same_sizes
from .lazy_tensor import check_is_logits, is_lazy
from .numerics import autocast_dtype, check_scaling, reduction_of, statistics_dtype, wide_dtype
from .row_statistics import RowStatistics
from .settings import Backend
from .token_statistics import rows_statistics, target_ids
from .vocab_parallel import VocabShard, local_part, local_target, summed_in_backward

if TYPE_CHECKING:
    from .linear_logits import LinearLogits


def row_shares(ids: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of each id under ``mean``: that of its target class, or 1; 0 where the id is −100."""
    counted = ids != -100
    if weight is None:
        return counted.to(dtype)
    return torch.where(counted, weight.detach().to(dtype)[ids.clamp(min=0)], 0)


def denominators(
    shares: Tensor, counted: Tensor, weight: Tensor | None, z_loss: float, reduction: str
) -> tuple[Tensor, float | Tensor]:
    """What a mean divides by, and the z-loss factor, rescaled where its own mean has another denominator."""
    total = shares.sum(dtype=wide_dtype(shares.device))
    total = total.where(total != 0, torch.nan)  # where all targets have weight 0: 0/0, not the smoothing term over 0
    if z_loss and weight is not None and reduction == "mean":
        return total, z_loss * total / counted.sum()
    return total, z_loss


def hard_label_statistics(label_smoothing: float, top1: bool) -> tuple[str, ...]:
    """The row statistics that :func:`hard_label_loss` reads besides ``logsumexp``; and ``is_top1``, for metrics."""
    outputs = ("log_probs", "sum_log_probs") if label_smoothing else ("log_probs",)
    return (*outputs, "is_top1") if top1 else outputs


def hard_label_loss(
    statistics: RowStatistics, shares: Tensor, classes: int, label_smoothing: float, z_loss: float | Tensor
) -> Tensor:
    r"""Loss of each row ``(N,)`` from its statistics.

    .. math:: (1-ε)\,w_y·(-\log p_y) - \tfrac{ε}{C}\sum_c w_c \log p_c + z\_loss·lse^2
    """
    loss = -statistics.log_probs[:, 0] * shares
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing / classes * statistics.sum_log_probs.to(loss.dtype)
    return plus_z_loss(loss, statistics, z_loss)


def plus_z_loss(loss: Tensor, statistics: RowStatistics, z_loss: float | Tensor) -> Tensor:
    if isinstance(z_loss, float | int) and z_loss == 0:
        return loss
    return loss + z_loss * statistics.logsumexp.to(loss.dtype).square()


class CrossEntropyStatistics(NamedTuple):
    """For metrics, one number per position, detached; shaped like class-index targets."""

    log_probs: Tensor | None  # of the target; None with class probabilities
    logsumexp: Tensor
    is_top1: Tensor | None  # whether the target has the largest logit; None with class probabilities


def cross_entropy(
    input: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    return_statistics: bool = False,
    group: Any = None,
    backend: Backend | None = None,
) -> Any:
    r"""``torch.nn.functional.cross_entropy`` that keeps one number per row instead of a second tensor of logits.

    .. math::
        \ell_n = (1-ε)\,w_{y_n}\,(lse_n - z_{n,y_n}) + \frac{ε}{C} \sum_c w_c\,(lse_n - z_{n,c}) + z\_loss·lse_n^2

    with class indices ``y``, or :math:`\sum_c w_c ((1-ε) t_{n,c} + ε/C)(lse_n - z_{n,c})` with class probabilities ``t``.
    Source: PyTorch 2.13, whose values, gradients, dtypes and errors it matches; z-loss as in PaLM (arXiv:2204.02311) and
    Liger's ``lse_square_scale``; softcap as in Gemma 2 (arXiv:2408.00118).

    One difference: a row whose target is ``ignore_index`` gets the gradient 0 even where its logits are nan.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)``, any strides, float64, float32, bfloat16 or float16; or a
            :class:`LinearLogits` of such a shape.
        target: class indices ``()``, ``(N)`` or ``(N, d1, …, dk)``, int64 or uint8; or class probabilities shaped like
            ``input``.
        weight: one weight per class, ``(C)``. Under ``mean`` the sum is divided by the summed weights of the targets; with
            class probabilities by the number of positions.
        size_average: deprecated, see ``reduction``.
        ignore_index: a class index that contributes nothing; with class probabilities it must be negative.
        reduce: deprecated, see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A mean over nothing is nan.
        label_smoothing: ε in [0, 1].
        z_loss: adds ``z_loss·lse²`` for each position that is not ignored. It is not weighted by class: under ``mean`` this
            term is divided by the number of those positions.
        softcap: the logits become ``softcap·tanh(input/softcap)`` first.
        out_dtype: dtype of the result; None is PyTorch's: ``input.dtype``, rounded once, at the end (fp32 under autocast).
        inplace_backward: write the gradient over the logits. Anything else that still needs the logits in backward then
            raises, and so does a second backward of this loss. Ignored under ``torch.compile``.
        return_statistics: also return :class:`CrossEntropyStatistics`, for accuracy and perplexity without a second pass.
        group: the ranks that share the classes, a process group or a :class:`VocabParallel`; ``input`` (and class
            probabilities) are then this rank's shard along the class dimension; everything else is that of all classes.
        backend: ``"triton"`` or ``"torch"``; by default the one that serves the device.

    Returns:
        The loss, or ``(loss, CrossEntropyStatistics)``.

    Raises:
        IndexError: a class index outside ``[0, C)``, on a CPU; on a GPU the device's next synchronisation fails.
        RuntimeError, ValueError: as PyTorch does for shapes and dtypes that do not fit.
        TypeError: an input that is neither a tensor nor a :class:`LinearLogits`.

    Example:
        >>> cross_entropy(torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, -100]))
        tensor(0.1698)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_scaling(softcap)
    check_is_logits("input", input)
    class_dim, given = 0 if input.ndim == 1 else 1, input.shape
    input, shard = local_part(input, group, class_dim)
    target = local_target(target)
    if shard is not None and group is not None and target.shape == given:  # padded like the input
        target = target.narrow(class_dim, 0, shard.size)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    if is_lazy(input):
        from .linear_cross_entropy import linear_logits_cross_entropy

        if input.vocab_dim != class_dim:
            raise ValueError(
                f"the classes of input {tuple(given)} are to stand at dimension {class_dim}, its vocabulary stands at "
                f"{input.vocab_dim}: pass input.flatten(0, -2) and target.flatten(), or input.movedim(-1, 1)"
            )
        indices = not target.is_floating_point()
        if weight is not None and indices and result_dtype(weight, target) != result_dtype(input, target):
            raise RuntimeError(f"logits are {input.dtype} and weight is {weight.dtype}: cast one")
        return linear_logits_cross_entropy(
            input,
            target,
            weight,
            z_loss=z_loss,
            softcap=softcap,
            return_statistics=return_statistics,
            backend=backend,
            out_dtype=out_dtype or result_dtype(input, target, weight),
            **options,
        )
    positions = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if not _understood(input, target, weight, shard, positions, **options):
        extras = z_loss != 0 or softcap is not None or out_dtype is not None or return_statistics
        return _pytorchs_own(input, target, weight, shard, extras, **options)

    C = input.shape[class_dim] if shard is None else shard.vocab
    of_columns = weight if weight is None or shard is None else summed_in_backward(weight, shard)[shard.part]
    probabilities = flatten_positions(target) if target.shape == input.shape else None
    ids = target_ids(target.reshape(-1, 1), C, ignore_index) if probabilities is None else None
    statistics = rows_statistics(
        flatten_positions(input),
        ids,
        of_columns,
        probabilities=probabilities,
        label_smoothing=label_smoothing if ids is None else 0.0,
        softcap=softcap,
        outputs=("sum_log_probs",) if ids is None else hard_label_statistics(label_smoothing, return_statistics),
        inplace_backward=inplace_backward,
        backend=backend,
        shard=shard,
    )
    dtype = statistics_dtype(input.dtype)
    if ids is None:
        loss = plus_z_loss(-statistics.sum_log_probs.to(dtype), statistics, z_loss)
        total: Tensor | int = loss.numel()
    else:
        shares = row_shares(ids[:, 0], weight, dtype)
        total, square = denominators(shares, ids != -100, weight, z_loss, reduction)
        loss = hard_label_loss(statistics, shares, C, label_smoothing, square)
    if reduction == "none":
        loss = loss.view(positions)
    else:
        loss = loss.sum(dtype=wide_dtype(input.device))
        loss = loss if reduction == "sum" else loss / total
    loss = loss.to(out_dtype or result_dtype(input, target, weight))
    if not return_statistics:
        return loss
    return loss, CrossEntropyStatistics(
        None if statistics.log_probs is None else statistics.log_probs.detach().view(positions),
        statistics.logsumexp.detach().to(dtype).view(positions),
        None if statistics.is_top1 is None else statistics.is_top1.view(positions),
    )


def flatten_positions(x: Tensor) -> Tensor:
    """``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)`` as ``(B, V, S)``: a view if the strides allow it."""
    if x.ndim == 1:
        return x[None, :, None]
    return x.unsqueeze(-1) if x.ndim == 2 else x.flatten(2)


def _understood(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard | None,
    positions: torch.Size,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> bool:
    """Whether the shapes and dtypes satisfy the documented contract."""
    if reduction not in ("none", "mean", "sum") or not 0.0 <= label_smoothing <= 1.0:
        return False
    if input.ndim == 0 or not input.is_floating_point() or input.device != target.device:
        return False
    classes = input.shape[0 if input.ndim == 1 else 1] if shard is None else shard.vocab
    if classes == 0 or (weight is not None and (weight.shape != (classes,) or weight.device != input.device)):
        return False
    if target.shape == input.shape:
        return target.is_floating_point() and ignore_index < 0
    # Under autocast PyTorch accepts an fp32 weight with 16-bit logits.
    same_dtype = weight is None or result_dtype(weight, target) == result_dtype(input, target)
    return same_sizes(target.shape, positions) and target.dtype in (torch.int64, torch.uint8) and same_dtype


def _pytorchs_own(
    input: Tensor, target: Tensor, weight: Tensor | None, shard: VocabShard | None, extras: bool, **options: Any
) -> Tensor:
    """For input outside the documented contract: PyTorch's error or, if PyTorch accepts the input, PyTorch's result."""
    if shard is not None:
        raise ValueError(
            f"a shard of {shard.size} of {shard.vocab} classes needs input (C_r), (N, C_r) or (N, C_r, d1, …), class "
            "indices or probabilities of the shard's classes, and a weight for all classes; got input "
            f"{input.dtype} {tuple(input.shape)}, target {target.dtype} {tuple(target.shape)}, weight "
            f"{None if weight is None else tuple(weight.shape)}, reduction {options['reduction']!r}, label_smoothing "
            f"{options['label_smoothing']}"
        )
    loss = F.cross_entropy(input, target, weight, **options)
    if extras:
        raise ValueError(
            "z_loss, softcap, out_dtype and return_statistics need logits (C), (N, C) or (N, C, d1, …), a matching target, a "
            f"weight (C) if any and label_smoothing in [0, 1]; got input {tuple(input.shape)} {input.dtype}, target "
            f"{tuple(target.shape)} {target.dtype}, weight {None if weight is None else tuple(weight.shape)} and "
            f"label_smoothing {options['label_smoothing']}"
        )
    return loss


def result_dtype(input: Any, target: Any, weight: Tensor | None = None) -> torch.dtype:
    """The dtype that PyTorch returns: the promoted one, where autocast upcasts 16-bit tensors to fp32 first."""
    autocast = autocast_dtype(input.device) is not None
    dtypes = [t.dtype for t in (input, target, weight) if t is not None and t.is_floating_point()]
    if not dtypes:
        return input.dtype  # a weight of integers, which PyTorch refuses
    return functools.reduce(torch.promote_types, (statistics_dtype(d) if autocast else d for d in dtypes))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on :func:`cross_entropy`, with its keyword-only extras except ``return_statistics``.

    Example:
        >>> CrossEntropyLoss(label_smoothing=0.1)(torch.zeros(2, 4), torch.tensor([1, 3]))
        tensor(1.3863)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        out_dtype: torch.dtype | None = None,
        inplace_backward: bool = False,
        group: Any = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.out_dtype = z_loss, softcap, out_dtype
        self.inplace_backward, self.group, self.backend = inplace_backward, group, backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            out_dtype=self.out_dtype,
            inplace_backward=self.inplace_backward,
            group=self.group,
            backend=self.backend,
        )

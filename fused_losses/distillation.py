r"""Distillation: a student learns a teacher's distribution over the vocabulary, not only the token that followed.

The soft loss is a divergence between the two distributions of each token (:mod:`fused_losses.divergence`); the hard loss is
the cross entropy with the label. A teacher may be

- dense: its logits, or :class:`~fused_losses.linear_logits.LinearLogits` of its hidden states and head, on the same device.
  Both heads' logits then exist one workspace at a time, and one pass over the student's serves both losses;
- sparse: the ids and log-probabilities of its ``K`` likeliest tokens (:func:`teacher_topk`), made elsewhere or beforehand.
  The rest of its distribution is one number, the tail.

Labels are already shifted: ``labels[b, t]`` is what the logits at ``t`` are trained on, and tokens without a label are neither
read nor projected.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autodiff import same_sizes, traced, transforms_active
from .chunked.softmax_rows import transform
from .divergence import (
    as_head,
    check_logits,
    check_sides,
    chosen_divergence,
    gathered,
    left_out,
    masked_divergence,
    shared_vocabulary,
    summed_divergence,
    token_divergence,
)
from .lazy_tensor import check_is_logits, is_lazy
from .linear_logits import LinearLogits
from .numerics import (
    check_choice,
    check_reduction,
    check_scaling,
    full_precision,
    log1mexp,
    on_device,
    statistics_dtype,
    upcast,
    wide_dtype,
)
from .row_divergence import Divergence, of_log_probs
from .row_statistics import slices
from .sequences import at_least_one, check_tensors
from .settings import Backend, Route
from .settings import route as route_setting
from .settings import workspace as workspace_setting
from .token_loss import token_loss
from .token_statistics import TokenStatistics, integer_ids, selective_log_softmax, target_ids, with_ids
from .two_heads import budget
from .vocab_parallel import VocabShard, local_part


class DistillationStatistics(NamedTuple):
    """For metrics: one number per token, detached and not weighted; 0 for a token that does not count."""

    divergence: Tensor | None  # (…) at the temperature, not multiplied by its square; None without a soft weight
    nll: Tensor | None  # (…) −log p of the label; None without a hard weight


def distillation_loss(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    labels: Tensor,
    *,
    kind: str = "forward_kl",
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
    group: Any = None,
    backend: Backend | None = None,
    route: Route | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
    return_statistics: bool = False,
) -> Any:
    r"""Cross entropy with the labels and divergence from the teacher, weighted, in one pass over the student's logits.

    .. math:: L = \frac1n \sum_{y_i \ne \text{ignore}} w_h\,(-\log p_{y_i}) + w_s\,[T^2]\,D_i(s_T, t_T)

    The hard loss is taken at temperature 1, the divergence :math:`D` (see :func:`fused_losses.divergence.divergence`) at
    :math:`T`. With a mean or a sum, the gradients of a head are made in forward.

    Source: Hinton et al. (arXiv:1503.02531). Liger and TRL 1.16 do not scale by :math:`T^2`; their ``weight_hard_loss`` and
    ``weight_soft_loss`` are the two weights here, as are ``1 - alpha`` and ``alpha`` elsewhere.

    Args:
        student_logits: ``(…, V)``, a Tensor or a :class:`LinearLogits`.
        teacher_logits: ``(…, V')`` of the same tokens; gets a gradient where it requires one. Where the vocabularies are padded
            to different sizes, both are cut to the smaller before either softmax, also in the hard loss.
        labels: ``(…)`` token ids, already shifted.
        kind, beta: as for :func:`fused_losses.divergence.divergence`.
        hard_weight: weight of the cross entropy; 0 leaves it out, and labels then only say which tokens count.
        soft_weight: weight of the divergence.
        temperature: of the divergence.
        scale_by_temperature_squared: multiply the divergence by ``temperature²``, which keeps the size of its gradient.
        ignore_index: the label of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count (0 where there are none), ``"sum"``, or ``"none"``.
        num_items_in_batch: replaces the mean's count, for a batch split over several calls.
        group, backend, workspace, drop_ignored: as for :func:`fused_losses.divergence.divergence`.
        route: ``"recompute"`` makes a head's gradients in backward, for a mean or sum too.
        return_statistics: also return :class:`DistillationStatistics`, to log both losses separately without a second pass: for
            a mean, ``statistics.nll.sum() / (labels != ignore_index).sum()``, and ``statistics.divergence`` likewise.

    Returns:
        Scalar, or ``(…)`` with ``reduction="none"``, or ``(loss, DistillationStatistics)``; fp32, or float64 for a float64
        student.

    Raises:
        IndexError: a label outside the vocabulary, on a CPU, with a hard weight.
        TypeError: logits that are neither a tensor nor a :class:`LinearLogits`, or a DTensor.
        ValueError: shapes or options that do not fit.

    Example:
        >>> student, teacher = torch.zeros(2, 4), torch.eye(4)[:2]
        >>> distillation_loss(student, teacher, torch.tensor([0, -100]), hard_weight=0.25, soft_weight=1.0)
        tensor(0.4646)
    """
    check_reduction(reduction)
    route, workspace = route_setting.parse(route), workspace_setting.parse(workspace)
    which = chosen_divergence(kind, beta, temperature)
    without_soft, with_nll = left_out(soft_weight), not left_out(hard_weight)
    if without_soft:  # 0 times an infinite divergence is nan; total variation is bounded
        which = which._replace(kind="tvd")
    check_sides(student_logits, teacher_logits, labels.shape)
    shards = shared_vocabulary(student_logits, teacher_logits, group)
    if without_soft and not teacher_logits.requires_grad:  # any logits will do: zeros that take no memory
        columns = teacher_logits.shape[-1] if shards[1] is None else shards[1].size
        like = student_logits.hidden if is_lazy(student_logits) else student_logits
        teacher_logits = like.detach().new_zeros(()).expand(*labels.shape, columns)
    soft = soft_weight * temperature**2 if scale_by_temperature_squared else soft_weight
    how: dict[str, Any] = {"backend": backend, "workspace": workspace, "drop_ignored": drop_ignored}
    ids = _counted(labels, ignore_index)
    if with_nll:
        vocab = min(student_logits.shape[-1], teacher_logits.shape[-1]) if shards[0] is None else shards[0].vocab
        ids = target_ids(labels.reshape(-1), vocab, ignore_index)
    if reduction == "none":
        found, nll = token_divergence(student_logits, teacher_logits, ids, with_nll, which, shards, **how)
        loss = (soft * found if nll is None else soft * found + hard_weight * nll).view(labels.shape)
    else:
        divisor = _count(ids != -100, num_items_in_batch) if reduction == "mean" else 1
        loss, found, nll = summed_divergence(
            student_logits, teacher_logits, ids, soft, hard_weight, which, shards, divisor, route=route, **how
        )
    if not return_statistics:
        return loss
    parts = (None if without_soft else found, nll)
    return loss, DistillationStatistics(*(None if t is None else t.detach().view(labels.shape) for t in parts))


def kd_loss(
    logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    label: Tensor,
    ignore_index: int = -100,
    *,
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
) -> Tensor:
    r"""Cross entropy of the student under the teacher's distribution: forward KL plus the teacher's entropy.

    .. math:: -\frac1n \sum_{y_i \ne \text{ignore}}\; \sum_{j:\, z_{ij} > -\infty} t_{ij} \log s_{ij}

    Its gradient in the student is that of the forward KL. Entries that the student masks with −inf contribute 0.

    Source: OpenRLHF's ``KDLoss``. As there, nothing is shifted, and the mean over no tokens is nan.

    Args:
        logits: the student's, ``(…, V)``, a Tensor or a :class:`LinearLogits`.
        teacher_logits: ``(…, V)`` of the same tokens.
        label: ``(…)``; it only matters which tokens have one.
        ignore_index: the label of tokens that do not count.
        group, backend, workspace: as for :func:`fused_losses.divergence.divergence`.

    Returns:
        Scalar, fp32, or float64 for a float64 student.

    Example:
        >>> kd_loss(torch.zeros(1, 4), torch.eye(4)[:1], torch.tensor([0]))
        tensor(1.3863)
    """
    check_sides(logits, teacher_logits, label.shape)
    workspace = workspace_setting.parse(workspace)
    ids = _counted(label, ignore_index)
    which = Divergence("cross_entropy", 0.5, 1.0)
    shards = shared_vocabulary(logits, teacher_logits, group)
    count = (ids != -100).sum()
    loss, *_ = summed_divergence(
        logits, teacher_logits, ids, 1.0, 0.0, which, shards, count.clamp(min=1), backend=backend, workspace=workspace
    )
    return loss.masked_fill(count == 0, math.nan)  # nan over no tokens, with a gradient of 0


def acceptance_rate(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
) -> Tensor:
    r"""The share of the student's tokens that speculative decoding accepts where the student drafts for the teacher.

    .. math:: α = \sum_j \min(t_j, s_j) = 1 - \tfrac12 \sum_j |t_j - s_j|

    A draft model is trained on ``-acceptance_rate(draft, target).log().mean()``, or on the total variation ``1 - α``
    (:func:`fused_losses.divergence.divergence`, ``kind="tvd"``); small rates are as accurate as large ones.

    Source: Leviathan et al. (arXiv:2211.17192), Corollary 3.6. SpecForge and vLLM's speculators log it and train on it.

    Args:
        student_logits: of the draft model, ``(…, V)``, a Tensor or a :class:`LinearLogits`.
        teacher_logits: of the target model, ``(…, V')`` of the same tokens; both are cut to the smaller vocabulary before the
            softmax.
        temperature: of both, the one they are sampled at.
        mask: ``(…)``; tokens where it is 0 are neither read nor projected and give 0.
        group, backend, workspace, drop_ignored: as for :func:`fused_losses.divergence.divergence`.

    Returns:
        ``(…)`` in [0, 1], fp32, or float64 for a float64 student, differentiable in both.

    Raises:
        TypeError: as for :func:`divergence`.
        ValueError: shapes, devices or shares of the vocabulary that do not fit, a temperature that is not positive.

    Example:
        >>> acceptance_rate(torch.zeros(1, 4), torch.eye(4)[:1])
        tensor([0.7746])
    """
    check_scaling(temperature=temperature)
    which = Divergence("overlap", 0.5, float(temperature))
    return masked_divergence(
        student_logits,
        teacher_logits,
        which,
        mask,
        group,
        backend=backend,
        workspace=workspace,
        drop_ignored=drop_ignored,
    )


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    return torch.where(integer_ids(labels).reshape(-1) != ignore_index, 0, -100)  # in uint8 −100 would be 156


def _count(counted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is None:
        return at_least_one(counted.sum())
    return at_least_one(on_device(num_items_in_batch, counted.device).reshape(()))  # raises for several numbers


class TopK(NamedTuple):
    """The likeliest tokens of a distribution, likeliest first."""

    ids: Tensor  # (…, K) int64
    log_probs: Tensor  # (…, K) fp32, or float64


def teacher_topk(
    logits: Tensor | LinearLogits,
    k: int,
    *,
    temperature: float = 1.0,
    group: Any = None,
    workspace: int | str | None = None,
) -> TopK:
    r"""Ids and log-probabilities of each token's ``k`` likeliest continuations: what a teacher has to send.

    .. math:: \log t_j = z_j/T - \log \sum_i e^{z_i/T}

    It takes one projection, one workspace of logits at a time, and returns ``12·k`` bytes per token instead of ``V`` logits.

    Args:
        logits: ``(…, V)``, a Tensor or a :class:`LinearLogits`; gets no gradient.
        k: how many, at most ``V``.
        temperature: of the distribution.
        group: as for :func:`fused_losses.divergence.divergence`; the ids are those of the whole vocabulary, and every rank
            sends ``k`` of its own.
        workspace: bytes of logits that may exist at a time, of a :class:`LinearLogits`.

    Returns:
        :class:`TopK`. Among equal logits any may be taken.

    Raises:
        TypeError: as for :func:`divergence`.
        ValueError: ``k`` outside ``[1, V]``, or a temperature that is not positive.

    Example:
        >>> teacher_topk(torch.tensor([0.0, 2.0, 1.0]), 2)
        TopK(ids=tensor([1, 2]), log_probs=tensor([-0.4076, -1.4076]))
    """
    check_logits("logits", logits)
    check_scaling(temperature=temperature)
    tokens, shard = logits.shape[:-1], local_part(logits, group)[1]
    V = logits.shape[-1] if shard is None else shard.vocab
    if not 1 <= k <= V:
        raise ValueError(f"k must be between 1 and the vocabulary {V} of logits {tuple(logits.shape)}, got {k}")
    with torch.no_grad(), gathered(logits), full_precision(logits.device):
        if not is_lazy(logits):
            mine = logits.detach() if shard is None else logits.detach()[..., : shard.size]
            _, found = _top(mine.reshape(tokens.numel(), mine.shape[-1]), k, shard)
            found = found.view(*tokens, k)
            options: dict[str, Any] = {"temperature": temperature, "group": group, "workspace": workspace}
            return TopK(found, selective_log_softmax(logits.detach(), found, **options))
        head, dtype = as_head(logits.detach(), shard), statistics_dtype(logits.hidden.dtype)
        N = len(head.hidden)
        per_token = 3 * head.planned_vocab * dtype.itemsize  # logits, scaled logits, exponentials
        n = max(1, min(N, budget([head], workspace) // per_token))
        ids = head.hidden.new_empty(N, k, dtype=torch.int64)
        log_probs = head.hidden.new_empty(N, k, dtype=dtype)
        for rows in slices(N, n):
            chunk = head.tokens(rows)
            z = chunk.write_logits(chunk.hidden.new_empty(len(chunk.hidden), len(head.weight), dtype=dtype))
            z = transform(z, chunk.temperature, head.scale, head.softcap)[0].div_(temperature)
            values, ids[rows] = _top(z, k, shard)
            total = z.logsumexp(-1)
            if shard is not None:
                total = shard.gather_checked(total.to(wide_dtype(z.device))).logsumexp(0).to(dtype)
            log_probs[rows] = (values - total[:, None]).clamp_(max=0)
    return TopK(ids.view(*tokens, k), log_probs.view(*tokens, k))


def _top(z: Tensor, k: int, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of the whole vocabulary and their ids, ``(N, k)``, from this rank's columns ``(N, V)``."""
    values, ids = z.topk(min(k, z.shape[1]))
    if shard is None:
        return values, ids
    missing = k - values.shape[1]
    return shard.topk(F.pad(values, (0, missing), value=-math.inf), F.pad(ids, (0, missing), value=-1), largest=True)


class SparseDistillation(NamedTuple):
    loss: Tensor  # scalar, or (…) with reduction="none"
    student_mass: Tensor  # (…) the student's probability of the K ids together; detached, 0 where there is no label
    teacher_mass: Tensor  # (…) the teacher's


Tail = Literal["bucket", "renormalize", "ignore"]
LARGEST_LOG_MASS = -1e-7  # of K ids, so that something is left for the bucket


def sparse_distillation_loss(
    student_logits: Tensor | LinearLogits,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: Tail = "bucket",
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | int | None = None,
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
) -> SparseDistillation:
    r"""Divergence from a teacher of which only ``K`` log-probabilities per token are known.

    With :math:`S` the ``K`` ids, :math:`M_t = \sum_{j\in S} t_j` and :math:`M_s` likewise, the distributions compared are

    =============== ================================================================ ====================================
    tail            over                                                             in use as
    =============== ================================================================ ====================================
    ``bucket``      :math:`t_j` for :math:`j \in S`, and :math:`1 - M_t` as one more  TRL's tail
    ``renormalize`` :math:`t_j / M_t` and :math:`s_j / M_s` for :math:`j \in S`       a teacher that is sampled top-K
    ``ignore``      :math:`t_j` for :math:`j \in S`; then :math:`\max(\cdot, 0)`      verl's ``forward_kl_topk``
    =============== ================================================================ ====================================

    The support need not be the teacher's top ``K``: for the student's, pass ``teacher_topk(student, k).ids`` and the teacher's
    log-probabilities there, :func:`fused_losses.selective_log_softmax`.

    Args:
        student_logits: ``(…, V)``, a Tensor or a :class:`LinearLogits`.
        teacher_ids: ``(…, K)``, distinct; −100 for a missing entry.
        teacher_log_probs: ``(…, K)``, nats, already at the temperature wanted; get a gradient where they require one.
        labels: ``(…)``, already shifted; tokens with ``ignore_index`` are not read or projected. None: all count.
        kind, beta: as for :func:`fused_losses.divergence.divergence`.
        temperature: of the student.
        tail: from the table.
        ignore_index: the label of tokens that do not count.
        reduction: ``"mean"`` over the tokens that count (0 where there are none), ``"sum"``, or ``"none"``.
        num_items_in_batch: replaces the mean's count.
        group, backend, workspace: as for :func:`fused_losses.divergence.divergence`.

    Returns:
        :class:`SparseDistillation`: the loss, never negative, and both masses, fp32 or float64.

    Raises:
        IndexError: an id outside the vocabulary, on a CPU.
        TypeError, ValueError: shapes or options that do not fit; on a CPU, a teacher's mass above 1.

    Example:
        >>> teacher = torch.tensor([[0.0, 2.0, 1.0]])
        >>> top = teacher_topk(teacher, 2)
        >>> sparse_distillation_loss(torch.zeros(1, 3), top.ids, top.log_probs)
        SparseDistillation(loss=tensor(0.2662), student_mass=tensor([0.6667]), teacher_mass=tensor([0.9100]))
    """
    check_choice(("forward_kl", "reverse_kl", "jsd"), kind=kind)
    check_choice(("bucket", "renormalize", "ignore"), tail=tail)
    check_reduction(reduction)
    check_tensors(teacher_ids=teacher_ids, teacher_log_probs=teacher_log_probs)
    check_is_logits("student_logits", student_logits)
    tokens = student_logits.shape[:-1]
    if not same_sizes(teacher_ids.shape, teacher_log_probs.shape) or not same_sizes(teacher_ids.shape[:-1], tokens):
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} need teacher_ids and teacher_log_probs {with_ids(tokens)}, got "
            f"{tuple(teacher_ids.shape)} and {tuple(teacher_log_probs.shape)}"
        )
    if labels is not None and not same_sizes(labels.shape, tokens):
        raise ValueError(f"labels must be {tuple(tokens)}, got {tuple(labels.shape)}")
    which = chosen_divergence(kind, beta, temperature)
    ids = integer_ids(teacher_ids)
    missing = ids == -100
    log_t = upcast(teacher_log_probs).masked_fill(missing, -math.inf)
    if labels is not None:
        ignored = (integer_ids(labels) == ignore_index)[..., None]
        ids, log_t = ids.masked_fill(ignored, -100), log_t.masked_fill(ignored, -math.inf)
    counted = (ids != -100).any(-1)
    if tail != "renormalize" and log_t.is_cpu and not traced(log_t) and not transforms_active():
        mass = log_t.detach().exp().sum(-1).masked_fill((log_t == 0).all(-1), 0)  # rows of zeros are padding
        if bool((mass > 1.1).any()):  # 1, plus what rounding to 16 bits adds
            raise ValueError(
                "teacher_log_probs must be log-probabilities of distinct ids, which have a mass of at most 1, got "
                f"{mass.max()}"
            )

    def of_token(found: TokenStatistics, log_t: Tensor, there: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_s = found.log_probs.masked_fill(~there, -math.inf)
        # A token without ids gets log-probabilities of 0, so that nothing about it is infinite or nan.
        some = there.any(-1, keepdim=True)
        log_s, log_t = log_s.masked_fill(~some, 0), log_t.to(log_s.dtype).masked_fill(~some, 0)
        masses = {"student_mass": log_s.exp().sum(-1), "teacher_mass": log_t.exp().sum(-1)}
        value = _on_support(log_s, log_t, which, tail)
        return value.masked_fill(~some[..., 0], 0), {k: m.masked_fill(~some[..., 0], 0) for k, m in masses.items()}

    needs_teacher = teacher_log_probs.requires_grad and torch.is_grad_enabled()
    if isinstance(student_logits, LinearLogits) and reduction != "none" and not needs_teacher:
        lazy: Any = student_logits
        at_temperature = lazy if temperature == 1 else lazy / temperature
        loss, masses = token_loss(
            of_token, at_temperature, ids, log_t, ids != -100, group=group, backend=backend, workspace=workspace
        )
    else:
        log_s = selective_log_softmax(
            student_logits, ids, temperature=temperature, group=group, backend=backend, workspace=workspace
        )
        loss, masses = of_token(TokenStatistics(log_s), log_t, ids != -100)
        loss = loss if reduction == "none" else loss.sum()
    if reduction == "mean":
        loss = loss / _count(counted, num_items_in_batch)
    return SparseDistillation(loss, masses["student_mass"].detach(), masses["teacher_mass"].detach())


def _on_support(log_s: Tensor, log_t: Tensor, which: Divergence, tail: Tail) -> Tensor:
    """Divergence ``(…)`` of log-probabilities ``(…, K)``."""
    if tail == "renormalize":
        log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)
    elif tail == "bucket":
        log_s, log_t = (torch.cat([x, _log_tail(x)], -1) for x in (log_s, log_t))
    value = of_log_probs(log_s, log_t, which.kind, which.beta)
    if tail == "ignore":
        return value.clamp(min=0)
    # Both distributions sum to one, so a value below 0 is rounding: clamp the value and keep the gradient.
    return value + (value.clamp(min=0) - value).detach().nan_to_num(0, 0, 0)


def _log_tail(log_p: Tensor) -> Tensor:
    """``log(1 − Σ p)``, ``(…, 1)``."""
    # Not logsumexp, which does not compile for tokens that a mask takes. The sum is at least 1 unless all p are 0.
    top = log_p.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(log_p.dtype).min)
    log_mass = (log_p - top).exp().sum(-1, keepdim=True).clamp(min=1).log() + top
    return log1mexp(log_mass.clamp(max=LARGEST_LOG_MASS))

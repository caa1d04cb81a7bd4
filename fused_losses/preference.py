r"""Learning from comparisons: which of two answers is better, or whether one answer is good.

Everything builds on the log-ratio :math:`lr = \log\pi(y) - \log\pi_{ref}(y)` of a whole answer. DPO's observation is that
:math:`\beta\,lr` is the reward under which the policy is already optimal, so a reward model's loss can train the policy
directly. The losses differ in two choices only:

- what is compared: chosen with rejected (``lr_w − lr_l``, DPO and most others), each with a baseline (KTO's KL, BCO's
  running mean, APO's 0), whole sorted batches (AOT), or log-probabilities without a reference (SimPO, CPO, ORPO);
- the curve the difference goes through: logistic, hinge, squared, or a mixture.

Each loss type of :func:`dpo_loss` is one small function below, in :data:`LOSS_TYPES`; to add one, write it and list it there.

Answers come as summed log-probabilities ``(B,)``, as :func:`sequence_log_probs` returns for padded and packed rows, or
per token ``(B, S)`` with a mask; the reference may come in the other form. Losses that depend on lengths need token counts
beside sums. An answer without tokens has log-probability 0, as a sum and as a mean, and trains nothing.

==============================================  =================================================================
elsewhere                                       here
==============================================  =================================================================
TRL ``ipo``                                     ``ipo_norm``; OpenRLHF's ``ipo=True`` is ``ipo``
TRL 0.25 ``aot_pair``                           ``aot_unpaired``
TRL 1.16 ``sigmoid`` under ``label_smoothing``  ``label_smoothing=0``: TRL ignores the setting there
TRL ``use_weighting``                           ``weight=wpo_weight(...)``; TRL 0.25: with ``max_weight=1``
TRL 0.25 ``alpha_divergence`` with ``a``        ``f_alpha_divergence_coef = 1 − a``, so 0 for its default
TRL 0.25 ``exo_pair`` without smoothing         ``label_smoothing=1e-3``
TRL 0.25 rewards of several loss types          ``weighted_rewards=True``
TRL 0.25 ``bco_pair``, ``BCOTrainer``           ``running_mean=RunningMean()``; TRL 1.16 ``bco_pair``: without
OpenRLHF ``nll_loss_coef``                      ``rpo_alpha``, with ``nll_loss`` the mean of per-sequence means
TRL CPO ``simpo``, ``alphapo``                  :func:`simpo_loss` with ``cpo_alpha=1``; ``cpo_alpha=0, alpha=…``
TRL TPO                                         :func:`cpo_loss` with the gold answers' ``nll_loss``, ``cpo_alpha`` its
                                                ``tpo_alpha``; ``tpo-l`` is ``simpo``
==============================================  =================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .numerics import check_between, check_choice, check_reduction, log1mexp, upcast
from .sequences import check_tensors, if_logits, masked_mean, same_shape, sums_and_counts
from .sharded_weight import is_distributed
from .token_statistics import TokenStatistics

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs as a loss type sees it; tensors are ``(B,)`` in fp32 or float64."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    score: Callable[[Tensor], Tensor]  # the f-divergence's map of a log-ratio; the identity for reverse KL
    beta: float
    label_smoothing: float
    discopop_tau: float
    running_mean: RunningMean | None
    nll_loss: Tensor | None  # ()

    @property
    def chosen(self) -> Tensor:
        """Log-ratio of the chosen answers."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected(self) -> Tensor:
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        return self.score(self.chosen) - self.score(self.rejected)

    @property
    def margin_per_token(self) -> Tensor:
        chosen, rejected = self.score(self.chosen), self.score(self.rejected)
        return _mean(chosen, self.chosen_lengths) - _mean(rejected, self.rejected_lengths)


def _smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    loss = -F.logsigmoid(x)
    # Without smoothing the second term is left out: where a rejected answer is impossible, x is inf and the term 0 · inf.
    return loss * (1 - label_smoothing) - F.logsigmoid(-x) * label_smoothing if label_smoothing else loss


def _half_over(beta: float) -> float:
    if not isinstance(beta, Tensor) and beta <= 0:
        raise ValueError(f"this loss divides by beta, which must be positive, got {beta}")
    return 0.5 / beta


def sigmoid(p: Pairs) -> Tensor:
    """−(1−e)·ls(βd) − e·ls(−βd). DPO (2305.18290); with e > 0 conservative DPO, where a share e of the labels is wrong."""
    return _smoothed_logistic(p.beta * p.margin, p.label_smoothing)


def sigmoid_norm(p: Pairs) -> Tensor:
    """−ls(β(lr_w/n_w − lr_l/n_l)): DPO per token, so that length earns nothing. TRL 1.16."""
    return -F.logsigmoid(p.beta * p.margin_per_token)


def hinge(p: Pairs) -> Tensor:
    """relu(1 − βd): nothing to learn once the margin is reached. SLiC (2305.10425)."""
    return F.relu(1 - p.beta * p.margin)


def ipo(p: Pairs) -> Tensor:
    """(d − 1/(2β))²: a margin to meet, not to exceed. IPO (2310.12036), on sums as in OpenRLHF."""
    return (p.margin - _half_over(p.beta)).square()


def ipo_norm(p: Pairs) -> Tensor:
    """(lr_w/n_w − lr_l/n_l − 1/(2β))²: IPO per token, TRL's ``ipo``."""
    return (p.margin_per_token - _half_over(p.beta)).square()


def exo_pair(p: Pairs) -> Tensor:
    """KL of (σ(βd), σ(−βd)) from the smoothed label (1−e, e); needs e > 0. EXO (2402.00856)."""
    x, e = p.beta * p.margin, p.label_smoothing
    return x.sigmoid() * (F.logsigmoid(x) - math.log1p(-e)) + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(e))


def robust(p: Pairs) -> Tensor:
    """(−(1−e)·ls(βd) + e·ls(−βd))/(1−2e): DPO without the bias of labels flipped with probability e (2403.00409)."""
    x, e = p.beta * p.margin, p.label_smoothing
    return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


def discopop(p: Pairs) -> Tensor:
    """−ls(x)(1−q) + e^{−x}q, x = βd, q = σ(x/τ): found by search over programs. DiscoPOP (2406.08414)."""
    x = p.beta * p.margin
    log_q = F.logsigmoid(x / p.discopop_tau)
    # e^{−x}q as one exponential: as two factors it is inf · 0.
    return -F.logsigmoid(x) * (1 - log_q.exp()) + (log_q - x).exp()


def nca_pair(p: Pairs) -> Tensor:
    """−ls(β lr_w) − ½ls(−β lr_w) − ½ls(−β lr_l): the chosen's own likelihood counts. NCA (2402.05369)."""
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(p: Pairs) -> Tensor:
    """−ls(β lr_w − δ) − ls(δ − β lr_l), δ the mean reward so far, or 0. BCO (2404.04656)."""
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    delta = 0 if p.running_mean is None else p.running_mean(torch.cat([chosen, rejected]))
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def sppo_hard(p: Pairs) -> Tensor:
    """(lr_w − 1/(2β))² + (lr_l + 1/(2β))²: each side has a target of its own. SPPO (2405.00675), hard labels."""
    return (p.chosen - _half_over(p.beta)).square() + (p.rejected + _half_over(p.beta)).square()


def _sorted(x: Tensor) -> Tensor:
    return x.sort(stable=True).values  # stable, so that ties send their gradients to the same pairs everywhere


def aot(p: Pairs) -> Tensor:
    """DPO on sort(π_w − π_l) − sort(ref_w − ref_l): one distribution of margins over another. AOT (2406.05882)."""
    policy, reference = p.policy_chosen - p.policy_rejected, p.reference_chosen - p.reference_rejected
    return _smoothed_logistic(p.beta * (_sorted(policy) - _sorted(reference)), p.label_smoothing)


def aot_unpaired(p: Pairs) -> Tensor:
    """DPO on sort(lr_w) − sort(lr_l): the distribution of the chosen over that of the rejected. AOT (2406.05882)."""
    return _smoothed_logistic(p.beta * (_sorted(p.chosen) - _sorted(p.rejected)), p.label_smoothing)


def apo_zero(p: Pairs) -> Tensor:
    """1 − σ(β lr_w) + σ(β lr_l): chosen up, rejected down, for chosen better than the model. APO (2408.06266)."""
    return (-p.beta * p.chosen).sigmoid() + (p.beta * p.rejected).sigmoid()


def apo_down(p: Pairs) -> Tensor:
    """σ(β lr_w) + 1 − σ(β(lr_w − lr_l)): both down, rejected further, for chosen worse than the model (2408.06266)."""
    return (p.beta * p.chosen).sigmoid() + (-p.beta * (p.chosen - p.rejected)).sigmoid()


def sft(p: Pairs) -> Tensor:
    """The token mean of −log π over the chosen answers, one number for every pair."""
    assert p.nll_loss is not None
    return p.nll_loss.expand_as(p.chosen)


LOSS_TYPES: dict[str, Callable[[Pairs], Tensor]] = {
    f.__name__: f
    for f in (sigmoid, sigmoid_norm, hinge, ipo, ipo_norm, exo_pair, robust, discopop, nca_pair, bco_pair, sppo_hard)
    + (aot, aot_unpaired, apo_zero, apo_down, sft)
}
_USE_LABEL_SMOOTHING = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}
_ALLOW_F_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_norm", "exo_pair", "robust", "discopop", "sft"}


def _score(log_ratio: Tensor, f_divergence_type: str, alpha: float) -> Tensor:
    """f′ of the probability ratio: replaces the log-ratio when another divergence holds the policy near the reference."""
    if f_divergence_type == "forward_kl":
        return -torch.expm1(-log_ratio)
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    if f_divergence_type == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80)) / (alpha - 1)
    return log_ratio


def _sequence(
    logps: Tensor, mask: Tensor | None, lengths: Tensor | None, ld_weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Summed log-probabilities ``(B,)`` and token counts of answers given as sums or per token."""
    logps = upcast(logps)
    if logps.dim() == 1:
        return logps, lengths
    return sums_and_counts(logps if ld_weight is None else logps * ld_weight, mask)


def _mean(sums: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        raise ValueError(
            "this loss is on means over tokens: pass token log-probs (B, S) with chosen_mask and rejected_mask, or "
            "chosen_lengths and rejected_lengths with the sums"
        )
    return sums / lengths.clamp(min=1)


def _nll(chosen_sums: Tensor, chosen_lengths: Tensor | None) -> Tensor:
    """Token mean over all chosen answers of the batch."""
    if chosen_lengths is None:
        raise ValueError(
            "the negative log-likelihood of the chosen answers is a mean over tokens: pass token log-probs (B, S) with "
            "chosen_mask, chosen_lengths with the sums, or nll_loss itself"
        )
    return -chosen_sums.sum() / chosen_lengths.sum().clamp(min=1)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    check_reduction(reduction)
    return losses if reduction == "none" else getattr(losses, reduction)()


def _check_side(
    side: str, policy: Tensor, mask: Tensor | None, lengths: Tensor | None, reference: Tensor | None = None
) -> None:
    """Raise for a mask without per-token log-probs or lengths without sums."""
    names = (f"policy_{side}_logps", f"reference_{side}_logps")
    given = {name: x for name, x in zip(names, (policy, reference), strict=True) if x is not None}
    sums, tokens = ({name: x for name, x in given.items() if x.dim() == dim} for dim in (1, 2))
    if mask is not None and not tokens:
        raise ValueError(
            f"{side}_mask {tuple(mask.shape)} hides tokens, but the log-probs are sums {tuple(policy.shape)}: pass them "
            "per token (B, S), or the sums that sequence_log_probs(token_logps, mask) makes without a mask"
        )
    if lengths is not None and policy.dim() == 2:
        raise ValueError(
            f"{side}_lengths {tuple(lengths.shape)} go with sums (B,), but the log-probs are per token "
            f"{tuple(policy.shape)}: pass {side}_mask of that shape instead"
        )
    same_shape(**tokens, **{f"{side}_mask": mask})
    same_shape(**sums, **{f"{side}_lengths": lengths})
    if len(sums) + len(tokens) < len(given) or any(len(x) != len(policy) for x in given.values()):
        shapes = " and ".join(str(tuple(x.shape)) for x in given.values())
        raise ValueError(f"{' and '.join(given)} must be (B,) sums or (B, S) per token, got {shapes}")


def _check_scalars(**scalars: Tensor | float | None) -> None:
    for name, x in scalars.items():
        if isinstance(x, Tensor) and x.shape not in ((), (1,)):
            raise ValueError(f"{name} must be a scalar, one number for the batch, got {tuple(x.shape)}")


def _answers(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor | None,
    rejected_mask: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    **scalars: Tensor | float | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Sums ``(B,)`` and token counts of the chosen, then of the rejected answers, after checking that all shapes fit."""
    check_tensors(chosen=chosen, rejected=rejected)
    if chosen.dim() not in (1, 2) or rejected.dim() not in (1, 2) or chosen.shape[0] != rejected.shape[0]:
        raise ValueError(
            "chosen and rejected log-probs must be (B,) sums or (B, S) per token, with the same B, got "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}{if_logits(chosen)}"
        )
    _check_side("chosen", chosen, chosen_mask, chosen_lengths, reference_chosen)
    _check_side("rejected", rejected, rejected_mask, rejected_lengths, reference_rejected)
    _check_scalars(**scalars)
    return *_sequence(chosen, chosen_mask, chosen_lengths), *_sequence(rejected, rejected_mask, rejected_lengths)


def _log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    """Log-ratios ``(B,)`` of unpaired answers, whose log-probs must be sums."""
    check_tensors(policy=policy, reference=reference)
    if policy.dim() != 1 or policy.shape != reference.shape:
        raise ValueError(
            "the policy's and the reference's log-probs of a side must both be sums (B,), which "
            f"sequence_log_probs(token_logps, mask) makes, got {tuple(policy.shape)} and {tuple(reference.shape)}"
        )
    return upcast(policy) - upcast(reference)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float | Sequence[float] = 0.0,
    reference_free: bool = False,
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
    rpo_alpha: float | None = None,
    nll_loss: Tensor | None = None,
    weight: Tensor | None = None,
    aux_loss: Tensor | None = None,
    aux_loss_coef: float = 0.001,
    running_mean: RunningMean | None = None,
    discopop_tau: float = 0.05,
    weighted_rewards: bool = False,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Direct preference optimisation, any of its loss types, or several at once.

    .. math::
        \sum_k w_k\,\ell_k(\beta d), \qquad d = s(lr_w) - s(lr_l), \qquad lr = \log\pi - \log\pi_{ref}

    with :math:`\ell` = :math:`-\log\sigma` for the default loss type and the score :math:`s(lr) = lr` for reverse KL.
    Then, in this order: plus ``rpo_alpha`` times the chosen answers' negative log-likelihood, times ``weight``, plus
    ``aux_loss_coef`` times ``aux_loss``.

    Source: Rafailov et al., "Direct Preference Optimization" (2305.18290); each loss type's function names its own. As in
    TRL 1.16 and OpenRLHF 0.11; where they differ, the module's docstring lists which arguments give whose numbers.

    Args:
        policy_chosen_logps: log-probabilities of the chosen answers, nats: sums ``(B,)`` or per token ``(B, S)``.
        policy_rejected_logps: of the rejected answers, in either form; ``S`` may differ.
        reference_chosen_logps: of the chosen under the reference; may be left out with ``reference_free``.
        reference_rejected_logps: of the rejected under the reference.
        beta: how closely the policy is held to the reference.
        loss_type: a name in ``LOSS_TYPES``, or several.
        loss_weights: one per loss type; default all 1.
        label_smoothing: the share ``e`` of labels taken to be wrong, one for all loss types or one for each. Used by
            ``sigmoid``, ``aot``, ``aot_unpaired``, ``robust`` (``e < ½``) and ``exo_pair`` (``e > 0``).
        reference_free: leave the reference out of the loss. Rewards still subtract it where it is given.
        f_divergence_type: the divergence that holds the policy near the reference; it maps each log-ratio before they
            are subtracted; not for ``nca_pair``, ``bco_pair``, ``sppo_hard``, ``aot*`` and ``apo*``. Scores are ``lr``
            (reverse KL), ``1 − e^{−lr}`` (forward KL), ``log 2 + ls(lr)`` (JS) and ``(e^{(α−1)lr} − 1)/(α − 1)``, the
            exponent at most 80 (alpha). Rewards stay ``beta·lr``.
        f_alpha_divergence_coef: ``α``; 1 is reverse KL. TRL 0.25 has ``1 − α``, default 1.
        chosen_mask: ``(B, S)``, nonzero for the tokens that count, where log-probs are per token; default all, including
            those for which :func:`~fused_losses.selective_log_softmax` gave 0.
        rejected_mask: as ``chosen_mask``.
        chosen_lengths: token counts ``(B,)``, only where log-probs are sums. ``ipo_norm`` and ``sigmoid_norm`` need both
            counts, ``sft`` and ``rpo_alpha`` the chosen's.
        rejected_lengths: as ``chosen_lengths``.
        ld_alpha: LD-DPO (2409.06411): weight of the tokens beyond the shorter answer's length, under policy and
            reference (TRL 1.16; TRL 0.25: pass the reference as sums, which are not weighted). Needs the policy
            per token.
        rpo_alpha: RPO (2404.19733): coefficient of the chosen's negative log-likelihood added to each pair.
        nll_loss: that negative log-likelihood, for ``rpo_alpha`` and ``sft``; default the mean over all chosen tokens.
        weight: ``(B,)``, multiplies each pair's loss: :func:`wpo_weight`. Not with ``aot`` and ``aot_unpaired``, whose
            terms belong to no pair.
        aux_loss: scalar, a mixture of experts' load balancing loss.
        aux_loss_coef: its coefficient.
        running_mean: δ of ``bco_pair``: a :class:`RunningMean`, which adds this batch's rewards first. Default δ = 0.
        discopop_tau: temperature ``τ`` of ``discopop``.
        weighted_rewards: multiply rewards by the sum of ``loss_weights``, as TRL 0.25; default ``beta·lr``.
        reduction: over pairs: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: scalar or ``(B,)``, and two ``(B,)``, detached, ``beta·lr``. fp32
        (float64 for float64).

    Raises:
        ValueError: an unknown name; smoothing, ``weight``, ``running_mean``, ``nll_loss`` or an f-divergence that no loss
            type of the call uses; a missing number or tensor that a loss type needs; the reference of one side only; a mask
            without log-probs per token; lengths with them; or shapes that do not match. Lengths, coefficients and
            ``discopop_tau`` may be given without effect.

    Example:
        >>> policy_w, policy_l = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -10.0])
        >>> ref_w, ref_l = torch.tensor([-11.0, -12.0]), torch.tensor([-11.0, -12.0])
        >>> dpo_loss(policy_w, policy_l, ref_w, ref_l, beta=0.5)
        (tensor(0.8937), tensor([0.5000, 0.0000]), tensor([0., 1.]))
        >>> loss, *rewards = dpo_loss(policy_w, policy_l, ref_w, ref_l, loss_type=["sigmoid", "hinge"])
        >>> loss
        tensor(1.7713)
    """
    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    smoothing = (
        list(label_smoothing) if isinstance(label_smoothing, Sequence) else [float(label_smoothing)] * len(types)
    )
    loss_weights = [1.0] * len(types) if loss_weights is None else list(loss_weights)
    _check_options(types, loss_weights, smoothing, f_divergence_type, weight)
    if running_mean is not None and "bco_pair" not in types:
        raise ValueError(f"running_mean has no effect on {', '.join(types)}: leave it out")
    if nll_loss is not None and rpo_alpha is None and "sft" not in types:
        raise ValueError(f"nll_loss has no effect on {', '.join(types)} without rpo_alpha: leave it out")
    if (reference_chosen_logps is None) != (reference_rejected_logps is None):
        raise ValueError("pass the reference's log-probs of both sides, or of neither; got one")
    chosen, n_chosen, rejected, n_rejected = _answers(
        policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, chosen_lengths, rejected_lengths,
        reference_chosen_logps, reference_rejected_logps, beta=beta, nll_loss=nll_loss, aux_loss=aux_loss,
    )  # fmt: skip
    if nll_loss is None and (rpo_alpha is not None or "sft" in types):
        nll_loss = _nll(chosen, n_chosen)
    ld_chosen = ld_rejected = None
    if ld_alpha is not None:
        ld_chosen, ld_rejected = _ld_weights(
            policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, ld_alpha
        )
        chosen, _ = _sequence(policy_chosen_logps, chosen_mask, None, ld_chosen)
        rejected, _ = _sequence(policy_rejected_logps, rejected_mask, None, ld_rejected)
    reference_chosen, reference_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
    if reference_chosen_logps is not None and reference_rejected_logps is not None:
        reference_chosen, _ = _sequence(reference_chosen_logps, chosen_mask, None, ld_chosen)
        reference_rejected, _ = _sequence(reference_rejected_logps, rejected_mask, None, ld_rejected)
    elif not reference_free:
        raise ValueError("the reference's log-probs are missing: pass them, or reference_free=True")
    reward_scale = beta * (sum(loss_weights) if weighted_rewards else 1)
    chosen_rewards = reward_scale * (chosen - reference_chosen).detach()
    rejected_rewards = reward_scale * (rejected - reference_rejected).detach()

    pairs = Pairs(
        policy_chosen=chosen,
        policy_rejected=rejected,
        reference_chosen=torch.zeros_like(chosen) if reference_free else reference_chosen,
        reference_rejected=torch.zeros_like(rejected) if reference_free else reference_rejected,
        chosen_lengths=n_chosen,
        rejected_lengths=n_rejected,
        score=partial(_score, f_divergence_type=f_divergence_type, alpha=f_alpha_divergence_coef),
        beta=beta,
        label_smoothing=0.0,
        discopop_tau=discopop_tau,
        running_mean=running_mean,
        nll_loss=nll_loss,
    )
    losses = torch.zeros_like(chosen)
    for name, loss_weight, e in zip(types, loss_weights, smoothing, strict=True):
        losses = losses + loss_weight * LOSS_TYPES[name](replace(pairs, label_smoothing=e))
    if rpo_alpha is not None:
        assert nll_loss is not None
        losses = losses + rpo_alpha * nll_loss
    if weight is not None:
        same_shape(losses=losses, weight=weight)
        losses = losses * weight.to(losses.dtype)
    if aux_loss is not None:
        losses = losses + aux_loss_coef * aux_loss
    return _reduce(losses, reduction), chosen_rewards, rejected_rewards


def _check_options(
    types: list[str], loss_weights: list[float], smoothing: list[float], f_divergence_type: str, weight: Tensor | None
) -> None:
    if not types:
        raise ValueError("loss_type needs the name of one loss type or more, got []")
    for name in types:
        check_choice(LOSS_TYPES, loss_type=name)
    if not len(types) == len(loss_weights) == len(smoothing):
        raise ValueError(
            f"loss_weights and label_smoothing need one number per loss type, got {len(loss_weights)} and "
            f"{len(smoothing)} for {len(types)}"
        )
    for e in smoothing:
        check_between(0, 1, label_smoothing=e)
    if any(smoothing) and not _USE_LABEL_SMOOTHING & set(types):
        raise ValueError(f"label_smoothing has no effect on {', '.join(types)}: leave it at 0")
    for name, e in zip(types, smoothing, strict=True):
        if name == "exo_pair" and not 0 < e < 1:
            raise ValueError(f"exo_pair takes the logarithm of label_smoothing: it must lie in (0, 1), got {e}")
        if name == "robust" and not 0 <= e < 0.5:
            raise ValueError(f"robust divides by 1 − 2·label_smoothing: it must lie in [0, 0.5), got {e}")
    f_divergences = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    check_choice(f_divergences, f_divergence_type=f_divergence_type)
    if f_divergence_type != "reverse_kl" and (others := sorted(set(types) - _ALLOW_F_DIVERGENCE)):
        raise ValueError(f"f_divergence_type={f_divergence_type!r} is not defined for {', '.join(others)}")
    if weight is not None and {"aot", "aot_unpaired"} & set(types):
        raise ValueError("aot and aot_unpaired sort over the batch, so a weight per pair has no term to go to")


def _ld_weights(
    chosen: Tensor, rejected: Tensor, chosen_mask: Tensor | None, rejected_mask: Tensor | None, ld_alpha: float
) -> list[Tensor]:
    """For each side ``(B, S)``: 1 up to the token count of the shorter answer of the pair, ``ld_alpha`` after it."""
    if chosen.dim() == 1 or rejected.dim() == 1:
        raise ValueError(
            "ld_alpha weights tokens: pass policy log-probs per token (B, S), got "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    sides = (chosen, chosen_mask), (rejected, rejected_mask)
    counted = [torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0 for x, mask in sides]
    shared = torch.minimum(counted[0].sum(-1), counted[1].sum(-1)).unsqueeze(-1)
    one = upcast(chosen.new_ones(()))
    return [torch.where(c.cumsum(-1) <= shared, one, ld_alpha) for c in counted]


def wpo_weight(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_log_sum_sq_probs: Tensor,
    rejected_log_sum_sq_probs: Tensor,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    max_weight: float | None = None,
) -> Tensor:
    r"""WPO's weight of each pair: how likely the policy is to write these two answers, relative to what it would expect.

    .. math:: \exp(\bar a_w)\exp(\bar a_l), \qquad a_t = \log\pi(y_t) - \log\sum_v \pi(v)^2

    Source: Zhou et al., "WPO" (2406.11827), as TRL 1.16 (``use_weighting``).

    Args:
        chosen_logps: log-probabilities per token ``(B, S)``, nats.
        rejected_logps: of the rejected answers; ``S`` may differ.
        chosen_log_sum_sq_probs: ``log_sum_sq_probs`` of :func:`token_statistics` at the same tokens.
        rejected_log_sum_sq_probs: of the rejected answers.
        chosen_mask: ``(B, S)``, nonzero for the tokens that count; default all.
        rejected_mask: as ``chosen_mask``.
        max_weight: bound on the weight; default none, TRL 0.25 has 1.

    Returns:
        ``(B,)``, fp32 (float64 for float64), detached; an answer without tokens contributes the factor 1.

    Example:
        >>> logps, others = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -1.5]])
        >>> wpo_weight(logps, logps, others, others)
        tensor([0.6065])
    """
    sides = (
        (chosen_logps, chosen_log_sum_sq_probs, chosen_mask),
        (rejected_logps, rejected_log_sum_sq_probs, rejected_mask),
    )
    for a, b, mask in sides:
        same_shape(logps=a, log_sum_sq_probs=b, mask=mask)
    chosen, rejected = (masked_mean((upcast(a) - upcast(b)).detach(), mask, -1) for a, b, mask in sides)
    weight = (chosen + rejected).exp()
    return weight if max_weight is None else weight.clamp(max=max_weight)


class RunningMean(nn.Module):
    """Mean of all rewards given to it so far: the baseline δ of BCO.

    A call in training mode first adds the rewards, those of all ranks where a process group is initialised; in evaluation
    mode it only returns the mean. It stays in float64 when the model that contains it is cast. TRL 0.25's ``bco_pair``
    gives each batch's mean the same weight, which differs where batches differ in size.

    Source: Jung et al., "Binary Classifier Optimization" (2404.04656); ``RunningMoments`` of TRL 0.25, not in 1.16.

    Example:
        >>> delta = RunningMean()
        >>> delta(torch.tensor([1.0, 2.0])), delta(torch.tensor([6.0]))
        (tensor(1.5000), tensor(3.))
    """

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMean:
        """Move with the model that contains it, but do not cast: in bfloat16 a count stops at 256."""

        def moved(buffer: Tensor) -> Tensor:
            result = fn(buffer)
            return result if result.dtype == buffer.dtype else buffer.to(result.device)

        return super()._apply(moved, recurse)

    def forward(self, rewards: Tensor) -> Tensor:
        """The mean so far, ``()`` in the dtype of ``rewards``, detached; in training ``rewards``, of any shape, count first."""
        rewards = rewards.detach()
        if self.training:
            batch = torch.stack([rewards.double().sum(), self.count.new_full((), rewards.numel())])
            if is_distributed():
                dist.all_reduce(batch)
            total, count = batch
            self.count += count
            self.mean += (total - count * self.mean) / self.count.clamp(min=1)
        return self.mean.to(rewards.dtype, copy=True)


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    simpo_gamma: float = 0.5,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    nll_loss: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Contrastive preference optimisation: DPO with a uniform reference, plus likelihood of the chosen answers.

    .. math::
        \ell(d) + \alpha_{cpo}\,NLL_w, \qquad d = \log\pi(y_w) - \log\pi(y_l)

    ``sigmoid``: :math:`-\log\sigma(\beta d)`, smoothed as DPO's; ``hinge``: relu(1 − βd); ``ipo``: (d − 1/(2β))² on means
    over tokens; ``simpo``: the sigmoid of ``d − simpo_gamma/β`` on means over tokens. With ``alpha ≠ 0`` (AlphaPO) each
    log-probability ``x`` becomes ``(1 − e^{−alpha·x})/alpha`` first.

    Source: Xu et al., "CPO" (2401.08417); Gupta et al., "AlphaPO" (2501.03884); TRL 1.16.

    Args:
        policy_chosen_logps: log-probabilities of the chosen answers, nats: sums ``(B,)`` or per token ``(B, S)``.
        policy_rejected_logps: of the rejected answers.
        beta: scale of the difference.
        loss_type: ``"sigmoid"``, ``"hinge"``, ``"ipo"`` or ``"simpo"``.
        label_smoothing: share of labels taken to be wrong; ``sigmoid`` and ``simpo`` only.
        cpo_alpha: coefficient of the negative log-likelihood; default 1, TRL's.
        alpha: AlphaPO's exponent; default 0, which leaves log-probabilities as they are.
        simpo_gamma: the margin that ``simpo`` asks for.
        chosen_mask, rejected_mask, chosen_lengths, rejected_lengths: as for :func:`dpo_loss`; ``ipo`` and ``simpo`` need
            both counts, ``cpo_alpha`` the chosen's unless ``nll_loss`` is given.
        nll_loss: scalar, the negative log-likelihood; default the mean over all chosen tokens of the batch.
        reduction: over pairs: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: scalar or ``(B,)``, and two ``(B,)``, detached: β times each side of the
        difference in the loss, before the margin. fp32 (float64 for float64).

    Raises:
        ValueError: an unknown name, smoothing where it has no effect, missing counts, or as for :func:`dpo_loss`.

    Example:
        >>> chosen, rejected = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
        >>> cpo_loss(chosen, rejected, beta=1.0)
        (tensor(1.8133), tensor([-3.]), tensor([-4.]))
    """
    check_choice(("sigmoid", "hinge", "ipo", "simpo"), loss_type=loss_type)
    if label_smoothing and loss_type in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing has no effect on {loss_type}: leave it at 0")
    check_between(0, 1, label_smoothing=label_smoothing)
    chosen, n_chosen, rejected, n_rejected = _answers(
        policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, chosen_lengths, rejected_lengths,
        beta=beta, nll_loss=nll_loss,
    )  # fmt: skip
    if nll_loss is None and cpo_alpha:
        nll_loss = _nll(chosen, n_chosen)
    if loss_type in ("ipo", "simpo"):
        chosen, rejected = _mean(chosen, n_chosen), _mean(rejected, n_rejected)
    if alpha:
        chosen, rejected = (-torch.expm1(-alpha * x) / alpha for x in (chosen, rejected))
    d = chosen - rejected
    if loss_type == "hinge":
        losses = F.relu(1 - beta * d)
    elif loss_type == "ipo":
        losses = (d - _half_over(beta)).square()
    else:
        losses = _smoothed_logistic(beta * d - (simpo_gamma if loss_type == "simpo" else 0), label_smoothing)
    if nll_loss is not None:
        losses = losses + cpo_alpha * nll_loss
    return _reduce(losses, reduction), beta * chosen.detach(), beta * rejected.detach()


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    alpha: float = 0.0,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    nll_loss: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""SimPO: the mean log-probability is the reward, with a margin and without a reference.

    .. math:: -\log\sigma(\beta(\bar\pi_w - \bar\pi_l) - \gamma) + \alpha_{cpo}\,NLL_w

    Source: Meng et al., "SimPO" (2405.14734); TRL 1.16's ``CPOTrainer`` with ``loss_type="simpo"``, whose ``beta`` is 0.1
    and ``cpo_alpha`` 1 by default (0 here, as in the paper); ``"alphapo"`` there is ``alpha ≠ 0`` with ``cpo_alpha=0``.

    Args and Raises: as :func:`cpo_loss`.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: scalar or ``(B,)``, and two ``(B,)``, detached, β times the mean
        log-probability. fp32 (float64 for float64).

    Example:
        >>> chosen, rejected = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]])
        >>> simpo_loss(chosen, rejected, beta=1.0)
        (tensor(0.6931), tensor([-1.5000]), tensor([-2.]))
    """
    return cpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        beta=beta,
        loss_type="simpo",
        label_smoothing=label_smoothing,
        cpo_alpha=cpo_alpha,
        alpha=alpha,
        simpo_gamma=simpo_gamma,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        nll_loss=nll_loss,
        reduction=reduction,
    )


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    nll_loss: Tensor,
    *,
    beta: float = 0.1,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""ORPO: supervised fine-tuning, with a preference for the odds of the chosen answer over those of the rejected.

    .. math::
        NLL - \operatorname{mean}(\beta\log\sigma(o)), \qquad
        o = \log\frac{P_w}{1 - P_w} - \log\frac{P_l}{1 - P_l}, \qquad \log P = \bar\pi

    Source: Hong et al., "ORPO" (2403.07691); TRL 1.16. The log-odds stay finite, with a finite gradient, where a mean
    log-probability reaches 0.

    Args:
        policy_chosen_logps: log-probabilities of the chosen answers, nats: sums ``(B,)`` or per token ``(B, S)``.
        policy_rejected_logps: of the rejected answers.
        nll_loss: scalar, the chosen rows' negative log-likelihood. In ORPO the mean over prompt *and* answer, e.g.
            ``-masked_mean(chosen_token_logps, chosen_attention_mask)``.
        beta: coefficient of the preference term.
        chosen_mask, rejected_mask, chosen_lengths, rejected_lengths: as for :func:`dpo_loss`; counts are needed.
        reduction: over pairs: ``"mean"``, ``"sum"`` or ``"none"``; ``nll_loss`` is part of each pair's loss.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards, log_odds_ratio, log_odds_chosen)``: scalar or ``(B,)``; two ``(B,)``,
        β times the mean log-probability; and the means of :math:`\log\sigma(o)` and of :math:`o`. All but the loss
        detached. fp32 (float64 for float64).

    Raises:
        ValueError: missing counts, or as for :func:`dpo_loss`.

    Example:
        >>> chosen, rejected = torch.tensor([[-0.5, -1.0]]), torch.tensor([[-2.0, -2.0]])
        >>> loss, *_, log_odds = orpo_loss(chosen, rejected, nll_loss=-chosen.mean())
        >>> loss, log_odds
        (tensor(0.7661), tensor(1.7439))
    """
    chosen, n_chosen, rejected, n_rejected = _answers(
        policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, chosen_lengths, rejected_lengths,
        beta=beta, nll_loss=nll_loss,
    )  # fmt: skip
    chosen, rejected = _mean(chosen, n_chosen), _mean(rejected, n_rejected)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    log_odds_ratio = F.logsigmoid(log_odds)
    return (
        _reduce(nll_loss - beta * log_odds_ratio, reduction),
        beta * chosen.detach(),
        beta * rejected.detach(),
        log_odds_ratio.detach().mean(),
        log_odds.detach().mean(),
    )


def kto_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    policy_KL_logps: Tensor | None,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    reference_KL_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    group: dist.ProcessGroup | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Kahneman-Tversky optimisation: answers that are simply good or bad, judged against how far the policy has moved.

    .. math::
        \lambda_D\,(1 - \sigma(\beta(lr_w - KL))), \qquad \lambda_U\,(1 - \sigma(\beta(KL - lr_l))), \qquad
        KL = \max(\operatorname{mean}(\log\pi_{KL} - \log\pi_{ref,KL}), 0)

    with one mean over both sides together. ``apo_zero_unpaired`` is the same with 0 instead of KL.

    Source: Ethayarajh et al., "KTO" (2402.01306); D'Oosterlinck et al., "APO" (2408.06266); TRL 1.16, OpenRLHF 0.8.

    Args:
        policy_chosen_logps: summed log-probabilities ``(B_w,)`` of desirable answers, nats; may be empty.
        policy_rejected_logps: of undesirable answers ``(B_l,)``; may be empty.
        policy_KL_logps: of prompts, each with another prompt's answer, ``(B_KL,)``; ``None`` for ``apo_zero_unpaired``.
        reference_chosen_logps, reference_rejected_logps, reference_KL_logps: the same three under the reference.
        beta: how closely the policy is held to the reference.
        loss_type: ``"kto"`` or ``"apo_zero_unpaired"``.
        desirable_weight: multiplies the desirable answers' losses.
        undesirable_weight: multiplies the undesirable answers' losses.
        group: the ranks whose KL is averaged before it is clamped; default all, where a process group is initialised.
        reduction: over both sides concatenated: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards, KL)``: scalar or ``(B_w + B_l,)``, detached ``β·lr`` for each side, and
        the detached KL ``()``. fp32 (float64 for float64). The mean over two empty sides is nan, and so is the KL of no
        rows.

    Raises:
        ValueError: an unknown name, missing KL log-probabilities, or log-probabilities that are not sums
            ``(B,)`` of one shape under policy and reference: :func:`sequence_log_probs` sums tokens.

    Example:
        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-11.0, -12.0])
        >>> kto_loss(chosen + 1, rejected, chosen + 0.5, chosen, rejected, chosen, beta=1.0)
        (tensor(0.3775), tensor([1.]), tensor([0., 0.]), tensor(0.5000))
    """
    check_choice(("kto", "apo_zero_unpaired"), loss_type=loss_type)
    _check_scalars(beta=beta)
    chosen = _log_ratio(policy_chosen_logps, reference_chosen_logps)
    rejected = _log_ratio(policy_rejected_logps, reference_rejected_logps)
    if loss_type == "kto":
        if policy_KL_logps is None or reference_KL_logps is None:
            raise ValueError("kto needs policy_KL_logps and reference_KL_logps; apo_zero_unpaired does without")
        kl = _log_ratio(policy_KL_logps, reference_KL_logps).detach().mean()
        if is_distributed():
            dist.all_reduce(kl, group=group)
            kl = kl / dist.get_world_size(group)
        kl = kl.clamp(min=0)
    else:
        kl = chosen.new_zeros(())
    losses = torch.cat(
        [desirable_weight * (beta * (kl - chosen)).sigmoid(), undesirable_weight * (beta * (rejected - kl)).sigmoid()]
    )
    return _reduce(losses, reduction), beta * chosen.detach(), beta * rejected.detach(), kl


def vanilla_kto_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""KTO for even sampling: each side's KL is the other side's baseline, and takes gradient.

    .. math::
        1 - \sigma(\beta(lr_w - KL_l)), \qquad 1 - \sigma(\beta(KL_w - lr_l)), \qquad KL = \max(\operatorname{mean}(lr), 0)

    with one mean over both sides together, the KL of this rank only, and no weights.

    Source: Ethayarajh et al., "KTO" (2402.01306), their code's ``KTO`` for paired data; OpenRLHF 0.8's ``VanillaKTOLoss``.

    Args:
        policy_chosen_logps: summed log-probabilities ``(B_w,)`` of desirable answers, nats.
        policy_rejected_logps: of undesirable answers ``(B_l,)``.
        reference_chosen_logps, reference_rejected_logps: the same under the reference.
        beta: how closely the policy is held to the reference.
        reduction: over both sides concatenated: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards)``: scalar or ``(B_w + B_l,)``, and detached ``β·lr`` for each side. fp32
        (float64 for float64). An empty side has no KL: nan.

    Raises:
        ValueError: wrong shapes, as for :func:`kto_loss`.

    Example:
        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-11.0])
        >>> vanilla_kto_loss(chosen + 1, rejected, chosen, rejected, beta=1.0)
        (tensor(0.2689), tensor([1.]), tensor([0.]))
    """
    _check_scalars(beta=beta)
    chosen = _log_ratio(policy_chosen_logps, reference_chosen_logps)
    rejected = _log_ratio(policy_rejected_logps, reference_rejected_logps)
    kl_chosen, kl_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    losses = torch.cat([(beta * (kl_rejected - chosen)).sigmoid(), (beta * (rejected - kl_chosen)).sigmoid()])
    return _reduce(losses, reduction), beta * chosen.detach(), beta * rejected.detach()


def bco_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    running_mean: RunningMean | None = None,
    rejected_weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Binary classifier optimisation, unpaired: is the reward of this answer above or below the average reward?

    .. math:: -\log\sigma(\beta\,lr_w - \delta), \qquad -u\log\sigma(\delta - \beta\,lr_l)

    with one mean over both sides together; :math:`\delta` is the mean of all rewards so far, this batch's included; :math:`u`
    is 1, or how much more likely the prompt is among desirable answers than among undesirable ones.

    Source: Jung et al., "Binary Classifier Optimization" (2404.04656); the ``BCOTrainer`` of TRL 0.25 to 1.9
    (1.16 has none), whose density ratio is ``rejected_weight``.

    Args:
        policy_chosen_logps: summed log-probabilities ``(B_w,)`` of desirable answers, nats; may be empty.
        policy_rejected_logps: of undesirable answers ``(B_l,)``; may be empty.
        reference_chosen_logps, reference_rejected_logps: the same under the reference.
        beta: how closely the policy is held to the reference.
        running_mean: keeps δ between calls; default δ = 0.
        rejected_weight: ``u`` ``(B_l,)``, which gets no gradient: ``p/(1 − p)`` for a classifier's probability ``p`` that the
            prompt belongs to a desirable answer; default 1.
        reduction: over both sides concatenated: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        ``(loss, chosen_rewards, rejected_rewards, delta)``: scalar or ``(B_w + B_l,)``, detached ``β·lr`` for each side,
        and δ ``()``. fp32 (float64 for float64).

    Raises:
        ValueError: wrong shapes, as for :func:`kto_loss`.

    Example:
        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-11.0])
        >>> bco_loss(chosen + 1, rejected, chosen, rejected, beta=1.0, running_mean=RunningMean())
        (tensor(0.4741), tensor([1.]), tensor([0.]), tensor(0.5000))
    """
    _check_scalars(beta=beta)
    chosen = beta * _log_ratio(policy_chosen_logps, reference_chosen_logps)
    rejected = beta * _log_ratio(policy_rejected_logps, reference_rejected_logps)
    same_shape(policy_rejected_logps=rejected, rejected_weight=rejected_weight)
    delta = chosen.new_zeros(()) if running_mean is None else running_mean(torch.cat([chosen, rejected]))
    rejected_losses = -F.logsigmoid(delta - rejected)
    if rejected_weight is not None:
        rejected_losses = upcast(rejected_weight.detach()) * rejected_losses
    losses = torch.cat([-F.logsigmoid(chosen - delta), rejected_losses])
    return _reduce(losses, reduction), chosen.detach(), rejected.detach(), delta


def preference_metrics(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    chosen_logps: Tensor | None = None,
    rejected_logps: Tensor | None = None,
    chosen_statistics: TokenStatistics | None = None,
    rejected_statistics: TokenStatistics | None = None,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What trainers log beside a preference loss, as detached scalars on the device.

    ``rewards/chosen``, ``rewards/rejected``, their difference ``rewards/margins`` and, for pairs, ``rewards/accuracies``,
    the share where the chosen reward is strictly larger; with log-probs, ``logps/*``; with token statistics, where they
    were computed, ``logits/*``, ``entropy`` and, over the chosen answers, ``mean_token_accuracy`` and ``nll_loss``: all
    means over the tokens that count.

    Source: TRL 1.16's names.

    Args:
        chosen_rewards: ``(B_w,)``, as a loss returns them. A side without rows is left out.
        rejected_rewards: ``(B_l,)``; taken as the other half of pairs where the counts agree.
        chosen_logps: summed log-probabilities ``(B_w,)``, or ``(B_w, S)`` with ``chosen_mask``.
        rejected_logps: of the rejected answers.
        chosen_statistics: :func:`token_statistics` of the chosen answers, each ``(B_w, S)``.
        rejected_statistics: of the rejected answers.
        chosen_mask: ``(B_w, S)``, nonzero for the tokens that count; default all.
        rejected_mask: as ``chosen_mask``.

    Returns:
        Names to scalars.

    Example:
        >>> preference_metrics(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]))["rewards/accuracies"]
        tensor(0.5000)
    """
    metrics: dict[str, Tensor] = {}
    sides = (
        ("chosen", chosen_rewards, chosen_logps, chosen_statistics, chosen_mask),
        ("rejected", rejected_rewards, rejected_logps, rejected_statistics, rejected_mask),
    )
    entropies, shown = [], []
    for side, rewards, logps, statistics, mask in sides:
        if rewards.shape[0] == 0:
            continue
        metrics[f"rewards/{side}"] = rewards.mean()
        if logps is not None:
            metrics[f"logps/{side}"] = _sequence(logps, mask, None)[0].mean()
        if statistics is None:
            continue
        if statistics.mean_logits is not None:
            metrics[f"logits/{side}"] = masked_mean(statistics.mean_logits, mask)
        if statistics.entropy is not None:
            entropies.append(statistics.entropy.flatten())
            shown.append(torch.ones_like(entropies[-1]) if mask is None else mask.flatten())
        if side == "chosen" and statistics.is_top1 is not None:
            metrics["mean_token_accuracy"] = masked_mean(statistics.is_top1.float(), mask)
        if side == "chosen" and statistics.log_probs is not None:
            metrics["nll_loss"] = -masked_mean(statistics.log_probs, mask)
    if entropies:
        metrics["entropy"] = masked_mean(torch.cat(entropies), torch.cat(shown))
    if chosen_rewards.shape[0] and rejected_rewards.shape[0]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if chosen_rewards.shape[0] == rejected_rewards.shape[0] > 0:
        metrics["rewards/accuracies"] = (chosen_rewards > rejected_rewards).float().mean()
    return {name: value.detach() for name, value in metrics.items()}

"""Preference losses, one pair at a time.

For a pair with chosen answer ``w`` and rejected answer ``l``: ``π`` the policy's summed log-probability, ``π̄`` its mean
over the answer's ``n`` tokens, ``ref`` the reference's, ``lr = π − ref``, ``d = lr_w − lr_l``, ``b`` beta, ``e`` label
smoothing, ``σ`` the sigmoid, ``ls = log σ``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def sg(x: Tensor) -> Tensor:
    return x.detach()


def σ(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def ls(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def _tokens(logps: Tensor, mask: Tensor | None, row: int) -> list[Tensor]:
    """The log-probabilities of the row's unmasked tokens."""
    return [logps[row, t] for t in range(logps.shape[1]) if mask is None or mask[row, t] != 0]


def _total(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return sum(values, start=torch.zeros((), dtype=like.dtype, device=like.device))


def _answers(
    logps: Tensor, mask: Tensor | None, lengths: Tensor | None, keep: Sequence[int] | None = None, ld_alpha: float = 1
) -> tuple[list[Tensor], list[int]]:
    """Sum and token count of every answer; tokens after the first ``keep`` have the weight ``ld_alpha``."""
    if logps.dim() == 1:
        counts = [0] * len(logps) if lengths is None else [int(n) for n in lengths]
        return list(logps), counts
    sums, counts = [], []
    for row in range(len(logps)):
        tokens = _tokens(logps, mask, row)
        n = len(tokens) if keep is None else keep[row]
        sums.append(_total(tokens[:n], logps) + ld_alpha * _total(tokens[n:], logps))
        counts.append(len(tokens))
    return sums, counts


def _nll(sums: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    return -_total(sums, sums[0]) / max(sum(counts), 1)


def _reduce(losses: Sequence[Tensor], reduction: str, like: Tensor) -> Tensor:
    stacked = torch.stack(list(losses)) if losses else like.new_zeros(0)
    return {"none": stacked, "sum": stacked.sum(), "mean": stacked.mean()}[reduction]


def _stack(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)).detach() if values else like.new_zeros(0)


class RunningMean:
    """The mean of all rewards it has ever received, all of which it keeps."""

    def __init__(self) -> None:
        self.rewards: list[Tensor] = []

    def __call__(self, rewards: Sequence[Tensor]) -> Tensor:
        self.rewards += [sg(r) for r in rewards]
        return _total(self.rewards, self.rewards[0]) / len(self.rewards)


def f_divergence_score(lr: Tensor, f_divergence_type: str, alpha: float) -> Tensor:
    """f′(u) at u = exp(lr): log u, 1 − 1/u, log(2u/(1 + u)), (u^(α−1) − 1)/(α − 1)."""
    if f_divergence_type == "forward_kl":
        return 1 - torch.exp(-lr)
    if f_divergence_type == "js_divergence":
        return math.log(2) + lr - torch.logaddexp(lr, torch.zeros_like(lr))
    if f_divergence_type == "alpha_divergence" and alpha != 1:
        exponent = (alpha - 1) * lr
        if exponent > 80:
            exponent = torch.full_like(exponent, 80)
        return (torch.exp(exponent) - 1) / (alpha - 1)
    return lr


def _sorted(values: Sequence[Tensor]) -> list[Tensor]:
    return sorted(values, key=lambda x: x.item())


def _loss_type(
    name: str,
    π_w: list[Tensor],
    π_l: list[Tensor],
    ref_w: list[Tensor],
    ref_l: list[Tensor],
    n_w: list[int],
    n_l: list[int],
    score: Callable[[Tensor], Tensor],
    b: float,
    e: float,
    τ: float,
    nll: Tensor | None,
    running_mean: RunningMean | None,
) -> list[Tensor]:
    """One loss per pair."""
    B = range(len(π_w))
    lrs_w, lrs_l = [π_w[i] - ref_w[i] for i in B], [π_l[i] - ref_l[i] for i in B]
    ds = [score(lrs_w[i]) - score(lrs_l[i]) for i in B]
    δ: Tensor | float = 0.0
    if name == "bco_pair" and running_mean is not None:
        δ = running_mean([b * r for r in lrs_w + lrs_l])
    if name.endswith("_norm"):
        ds = [score(lrs_w[i]) / max(n_w[i], 1) - score(lrs_l[i]) / max(n_l[i], 1) for i in B]
    if name == "aot":
        policy, reference = _sorted([π_w[i] - π_l[i] for i in B]), _sorted([ref_w[i] - ref_l[i] for i in B])
        ds = [policy[i] - reference[i] for i in B]
    if name == "aot_unpaired":
        chosen, rejected = _sorted(lrs_w), _sorted(lrs_l)
        ds = [chosen[i] - rejected[i] for i in B]

    def pair(d: Tensor, lr_w: Tensor, lr_l: Tensor) -> Tensor:
        if name in ("sigmoid", "aot", "aot_unpaired"):
            return -ls(b * d) * (1 - e) - ls(-b * d) * e
        if name == "sigmoid_norm":
            return -ls(b * d)
        if name == "hinge":
            return 1 - b * d if b * d < 1 else 0 * d
        if name in ("ipo", "ipo_norm"):
            return (d - 1 / (2 * b)) ** 2
        if name == "exo_pair":
            return σ(b * d) * (ls(b * d) - math.log(1 - e)) + σ(-b * d) * (ls(-b * d) - math.log(e))
        if name == "nca_pair":
            return -ls(b * lr_w) - ls(-b * lr_w) / 2 - ls(-b * lr_l) / 2
        if name == "robust":
            return (-(1 - e) * ls(b * d) + e * ls(-b * d)) / (1 - 2 * e)
        if name == "bco_pair":
            return -ls(b * lr_w - δ) - ls(-(b * lr_l - δ))
        if name == "sppo_hard":
            return (lr_w - 0.5 / b) ** 2 + (lr_l + 0.5 / b) ** 2
        if name == "apo_zero":
            return 1 - σ(b * lr_w) + σ(b * lr_l)
        if name == "apo_down":
            return σ(b * lr_w) + 1 - σ(b * (lr_w - lr_l))
        if name == "discopop":
            q = σ(b * d / τ)
            return -ls(b * d) * (1 - q) + torch.exp(-b * d) * q
        assert name == "sft"
        assert nll is not None
        return nll

    return [pair(*of_pair) for of_pair in zip(ds, lrs_w, lrs_l, strict=True)]


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
    f_divergence_type: str = "reverse_kl",
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
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """``(Σ_k weight_k·loss_k + rpo_alpha·NLL)·weight + aux_loss_coef·aux_loss`` per pair; rewards ``b·lr``."""
    like = policy_chosen_logps
    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0 for _ in types] if loss_weights is None else list(loss_weights)
    e = [label_smoothing for _ in types] if isinstance(label_smoothing, float) else list(label_smoothing)

    π_w, n_w = _answers(policy_chosen_logps, chosen_mask, chosen_lengths)
    π_l, n_l = _answers(policy_rejected_logps, rejected_mask, rejected_lengths)
    if nll_loss is None:
        nll_loss = _nll(π_w, n_w)
    keep = None
    if ld_alpha is not None:
        keep = [min(pair) for pair in zip(n_w, n_l, strict=True)]
        π_w, _ = _answers(policy_chosen_logps, chosen_mask, None, keep, ld_alpha)
        π_l, _ = _answers(policy_rejected_logps, rejected_mask, None, keep, ld_alpha)
    zeros = [torch.zeros_like(x) for x in π_w]
    ref_w = ref_l = zeros
    if reference_chosen_logps is not None and reference_rejected_logps is not None:
        ref_w, _ = _answers(reference_chosen_logps, chosen_mask, None, keep, ld_alpha or 0)
        ref_l, _ = _answers(reference_rejected_logps, rejected_mask, None, keep, ld_alpha or 0)
    times = sum(weights) if weighted_rewards else 1
    chosen_rewards = _stack([beta * times * (π - ref) for π, ref in zip(π_w, ref_w, strict=True)], like)
    rejected_rewards = _stack([beta * times * (π - ref) for π, ref in zip(π_l, ref_l, strict=True)], like)
    if reference_free:
        ref_w = ref_l = zeros

    losses = zeros
    for name, loss_weight, smoothing in zip(types, weights, e, strict=True):
        terms = _loss_type(
            name, π_w, π_l, ref_w, ref_l, n_w, n_l,
            lambda lr: f_divergence_score(lr, f_divergence_type, f_alpha_divergence_coef),
            beta, smoothing, discopop_tau, nll_loss, running_mean,
        )  # fmt: skip
        losses = [loss + loss_weight * term for loss, term in zip(losses, terms, strict=True)]
    if rpo_alpha is not None:
        losses = [loss + rpo_alpha * nll_loss for loss in losses]
    if weight is not None:
        losses = [loss * weight[i] for i, loss in enumerate(losses)]
    if aux_loss is not None:
        losses = [loss + aux_loss_coef * aux_loss for loss in losses]
    return _reduce(losses, reduction, like), chosen_rewards, rejected_rewards


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
    """``exp(mean_t(logp_w − lssp_w))·exp(mean_t(logp_l − lssp_l))``, at most ``max_weight``; a constant."""
    weights = []
    for row in range(len(chosen_logps)):
        weight = torch.ones_like(chosen_logps[row, 0])
        for logps, expected, mask in (
            (chosen_logps, chosen_log_sum_sq_probs, chosen_mask),
            (rejected_logps, rejected_log_sum_sq_probs, rejected_mask),
        ):
            excess = _tokens(logps - expected, mask, row)
            weight = weight * torch.exp(_total(excess, logps) / max(len(excess), 1))
        weights.append(weight if max_weight is None or weight < max_weight else torch.full_like(weight, max_weight))
    return _stack(weights, chosen_logps)


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    simpo_gamma: float = 0.5,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    nll_loss: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss(x_w − x_l) + cpo_alpha·NLL_w``; rewards ``b·x``.

    ``x = π``, for ipo and simpo ``π̄``; AlphaPO: ``(1 − exp(−alpha·π))/alpha`` of that.
    """
    w, n_w = _answers(policy_chosen_logps, chosen_mask, chosen_lengths)
    l, n_l = _answers(policy_rejected_logps, rejected_mask, rejected_lengths)  # noqa: E741
    if nll_loss is None:
        nll_loss = _nll(w, n_w)
    losses, chosen_rewards, rejected_rewards = [], [], []
    for i in range(len(w)):
        x_w, x_l = w[i], l[i]
        if loss_type in ("ipo", "simpo"):
            x_w, x_l = x_w / max(n_w[i], 1), x_l / max(n_l[i], 1)
        if alpha != 0:
            x_w, x_l = (1 - torch.exp(-alpha * x_w)) / alpha, (1 - torch.exp(-alpha * x_l)) / alpha
        d = x_w - x_l
        if loss_type == "simpo":
            d = d - simpo_gamma / beta
        if loss_type == "hinge":
            loss = 1 - beta * d if beta * d < 1 else 0 * d
        elif loss_type == "ipo":
            loss = (d - 1 / (2 * beta)) ** 2
        else:
            loss = -ls(beta * d) * (1 - label_smoothing) - ls(-beta * d) * label_smoothing
        losses.append(loss + cpo_alpha * nll_loss)
        chosen_rewards.append(beta * x_w)
        rejected_rewards.append(beta * x_l)
    like = policy_chosen_logps
    return _reduce(losses, reduction, like), _stack(chosen_rewards, like), _stack(rejected_rewards, like)


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float = 2.0,
    cpo_alpha: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``−ls(b(π̄_w − π̄_l) − gamma)``."""
    return cpo_loss(
        policy_chosen_logps, policy_rejected_logps, loss_type="simpo", beta=beta, cpo_alpha=cpo_alpha, **options
    )


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 − exp(x))``, element by element."""
    return torch.stack(
        [torch.log(-torch.expm1(v)) if v > -math.log(2) else torch.log1p(-torch.exp(v)) for v in x.flatten()]
    ).reshape(x.shape)


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
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``NLL − b·ls(o)``, ``o = log(P_w/(1 − P_w)) − log(P_l/(1 − P_l))``, ``log P = π̄``."""
    like = policy_chosen_logps
    w, n_w = _answers(policy_chosen_logps, chosen_mask, chosen_lengths)
    l, n_l = _answers(policy_rejected_logps, rejected_mask, rejected_lengths)  # noqa: E741
    mean_w = torch.stack([x / max(n, 1) for x, n in zip(w, n_w, strict=True)])
    mean_l = torch.stack([x / max(n, 1) for x, n in zip(l, n_l, strict=True)])
    odds = [(mean_w[i] - log1mexp(mean_w)[i]) - (mean_l[i] - log1mexp(mean_l)[i]) for i in range(len(mean_w))]
    losses = [nll_loss - beta * ls(o) for o in odds]
    return (
        _reduce(losses, reduction, like),
        beta * mean_w.detach(),
        beta * mean_l.detach(),
        _stack([ls(o) for o in odds], like).mean(),
        _stack(odds, like).mean(),
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
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen ``1 − σ(b(lr_w − KL))``, rejected ``1 − σ(b(KL − lr_l))``, ``KL = max(mean(π_KL − ref_KL), 0)`` a constant.

    ``apo_zero_unpaired``: chosen ``1 − σ(b lr_w)``, rejected ``σ(b lr_l)``.
    """
    like = policy_chosen_logps
    kl = like.new_zeros(())
    if loss_type == "kto":
        assert policy_KL_logps is not None
        assert reference_KL_logps is not None
        kl = sg(policy_KL_logps - reference_KL_logps).mean()
        kl = kl if not kl < 0 else torch.zeros_like(kl)
    losses, chosen_rewards, rejected_rewards = [], [], []
    for π, ref in zip(policy_chosen_logps, reference_chosen_logps, strict=True):
        losses.append(desirable_weight * (1 - σ(beta * (π - ref - kl))))
        chosen_rewards.append(beta * (π - ref))
    for π, ref in zip(policy_rejected_logps, reference_rejected_logps, strict=True):
        term = 1 - σ(beta * (kl - (π - ref))) if loss_type == "kto" else σ(beta * (π - ref))
        losses.append(undesirable_weight * term)
        rejected_rewards.append(beta * (π - ref))
    return _reduce(losses, reduction, like), _stack(chosen_rewards, like), _stack(rejected_rewards, like), kl


def vanilla_kto_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen ``1 − σ(b(lr_w − KL_l))``, rejected ``1 − σ(b(KL_w − lr_l))``, ``KL = max(mean(lr), 0)`` with its gradient."""
    like = policy_chosen_logps
    lr_w = [π - ref for π, ref in zip(policy_chosen_logps, reference_chosen_logps, strict=True)]
    lr_l = [π - ref for π, ref in zip(policy_rejected_logps, reference_rejected_logps, strict=True)]
    kl_w, kl_l = _total(lr_w, like) / len(lr_w), _total(lr_l, like) / len(lr_l)
    kl_w, kl_l = (kl if kl > 0 else 0 * kl for kl in (kl_w, kl_l))
    losses = [1 - σ(beta * (lr - kl_l)) for lr in lr_w] + [1 - σ(beta * (kl_w - lr)) for lr in lr_l]
    return (
        _reduce(losses, reduction, like),
        _stack([beta * lr for lr in lr_w], like),
        _stack([beta * lr for lr in lr_l], like),
    )


def bco_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    running_mean: RunningMean | None = None,
    rejected_weight: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen ``−ls(b lr_w − δ)``, rejected ``−u·ls(−(b lr_l − δ))``, δ the mean of all rewards so far, a constant."""
    like = policy_chosen_logps
    chosen = [beta * (π - ref) for π, ref in zip(policy_chosen_logps, reference_chosen_logps, strict=True)]
    rejected = [beta * (π - ref) for π, ref in zip(policy_rejected_logps, reference_rejected_logps, strict=True)]
    δ = like.new_zeros(()) if running_mean is None else running_mean(chosen + rejected)
    weights = [1.0] * len(rejected) if rejected_weight is None else rejected_weight
    losses = [-ls(r - δ) for r in chosen] + [-u * ls(-(r - δ)) for u, r in zip(weights, rejected, strict=True)]
    return _reduce(losses, reduction, like), _stack(chosen, like), _stack(rejected, like), δ

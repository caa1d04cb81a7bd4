r"""Policy-gradient losses on the log-probabilities of sampled tokens: PPO, GRPO and what grew out of them.

The advantage :math:`A` tells a policy how much better than expected a sequence that it sampled was; the policy moves
probability towards the sequence or away. The losses differ only in how far one batch may move it. With
:math:`\rho = \log\pi - \log\pi_{old}` of a token and :math:`r = e^\rho`, each loss per token is one row:

==============  ================================================================================  =============
``loss_type``   loss of a token                                                                   used by
==============  ================================================================================  =============
``ppo``         :math:`-\min(rA,\ \mathrm{clip}(r, 1-\epsilon_l, 1+\epsilon_h) A)`                all
``gspo``        the same, :math:`r = e^{\mathrm{mean}_t \rho}`                                    TRL, OpenRLHF
``gspo-token``  the same, :math:`r = sg(e^{\mathrm{mean}_t \rho})\,\pi / sg(\pi)`                 verl
``rloo``        the same, :math:`r = e^{\sum_t \rho}`                                             TRL
``gmpo``        :math:`-A\,e^{\mathrm{mean}_t c}`, :math:`c` is :math:`\rho`, clipped to          TRL, verl
                :math:`[-\epsilon_l, \epsilon_h]` where that lowers :math:`cA`
``cispo``       :math:`-sg(\min(r, r_{max}))\,A \log\pi`                                          TRL, verl
``sapo``        :math:`-\frac{4}{\tau}\,\sigma(\tau (r - 1))\,A`                                  TRL, verl
``vespo``       :math:`-sg(e^{\lambda + k s - \lambda e^s})\,A \log\pi`, :math:`s = \sum_t \rho`  TRL
``dppo_tv``     :math:`-sg(r)\,A \log\pi`, 0 where :math:`\pi` is above                           verl
                :math:`\pi_{old} + \epsilon_h` for :math:`A > 0`, else below
                :math:`\pi_{old} - \epsilon_l`
``dppo_kl``     the same, with the binary KL as their distance                                    verl
``kl_cov``      :math:`-rA`, and :math:`+ c\,|\rho|` for the share of tokens where                verl
                :math:`A` and :math:`\log\pi` are highest together
``clip_cov``    as ``ppo``, 0 for a share of tokens drawn from those where                        verl
                :math:`A` and :math:`\log\pi` are high together
``reinforce``   :math:`-A \log\pi`                                                                verl
``dro``         :math:`-A \log\pi + \frac{\beta}{2} \rho^2`                                       verl
==============  ================================================================================  =============

Some differ only in their aggregation, a separate argument: TRL's ``grpo``, ``dr_grpo`` and ``luspo`` from ``ppo``,
verl's ``gpg`` from ``reinforce``; TRL's ``bnpo`` and ``dapo`` are ``ppo``. Each row is one small function below, and
``LOSS_TYPES`` has its defaults; to add a loss type, write its function and list it there.

==========================================  ====================================================================
elsewhere                                   here
==========================================  ====================================================================
TRL ``epsilon``, ``epsilon_high``           ``eps_low``, ``eps_high``; in cispo ``epsilon_high`` is ``cispo_max``
TRL ``importance_sampling_level``           the same name; ``gspo`` is grpo with ``"sequence"``
TRL, tokens with ``|ρ| > 20``               ``log_ratio_clamp=None``, as for DeepSpeed-Chat
OpenRLHF, verl                              ``count_empty=False, use_bias_correction_kl=False``
OpenRLHF KL, entropy                        ``kl_aggregation`` and ``entropy_aggregation="token_mean"``
OpenRLHF ``gspo``                           ``gspo`` with ``log_ratio_clamp=None``
verl KL, entropy                            ``kl_aggregation`` and ``entropy_aggregation`` its ``loss_agg_mode``
verl ``vanilla``                            ``ppo`` with ``dual_clip=3.0``
verl ``gspo``                               ``gspo-token`` with ``log_ratio_clamp=(None, 10.0)``; from 0.9.1 its
                                            ``aggregation`` is ``loss_agg_mode``, by default ``"token_mean"``
verl ``geo_mean``                           ``gmpo`` with ``log_ratio_clamp=None, count_empty=True``
verl ``cispo``                              ``cispo`` with ``cispo_max=None``
verl ``dppo_tv``, ``dppo_kl``               the same with ``delta=clip_ratio_c``
verl ``dro``, ``kl_cov``, ``clip_cov``      the same with ``log_ratio_clamp=None``
verl ``bypass_mode``                        ``ppo`` with the rollout as ``old_log_probs``; its ``reinforce``: ``gpg`` with
                                            ``mismatch_weight(log_probs, rollout_log_probs, …)``
DeepSpeed-Chat ``actor_loss_fn``            ``ppo``, or :func:`ppo_loss`
==========================================  ====================================================================

Shapes: token tensors are ``(B, S)`` with a mask, or packed ``(1, total)`` with ``cu_seqlens``
(``document_borders(position_ids)`` makes them); advantages are one per sequence or one per token.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, nan
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .aggregation import aggregate
from .autodiff import trains
from .kl import kl_estimate
from .numerics import check_between, check_choice, upcast, wide_dtype
from .rollouts import entropy_mask, off_policy_mask
from .sequences import Sequences, masked_mean

Level = Literal["token", "sequence", "sequence_token", "sequence_sum"]
LEVELS = get_args(Level)
Bounds = tuple[float | None, float | None] | None


class Tokens(NamedTuple):
    """What a surrogate reads: tensors ``(B, S)``, 0 where masked, or tensors that broadcast with ``(B, S)``."""

    log_probs: Tensor
    old_log_probs: Tensor  # a constant, as are A and weight
    A: Tensor
    log_ratio: Tensor  # per token or per sequence, depending on the level
    r: Tensor
    mask: Tensor
    kept: Tensor  # the tokens that the entropy mask keeps
    weight: Tensor | None  # the mismatch weight; (B,) for one per sequence
    sequences: Sequences
    one_each: bool  # one ratio and one advantage per sequence
    count_empty: bool

    def share(self, x: Tensor) -> Tensor:
        return self.sequences.average(x, self.one_each, self.count_empty)


class Surrogate(NamedTuple):
    """What a surrogate returns."""

    loss: Tensor  # per token, or broadcastable with the tokens
    metrics: dict[str, Tensor]
    weight: Tensor | None = None  # still to apply, where the loss uses the given one itself; None: the given one
    averaged: bool = False  # a mean over the kept tokens: not masked again, and the KL is not multiplied by the ratio


def _clamp(x: Tensor, bounds: Bounds) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)


def _at_most(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(max=bound)


def _log_ratio(
    log_probs: Tensor, old_log_probs: Tensor, sequences: Sequences, level: Level, bounds: Bounds
) -> tuple[Tensor, Tensor, bool]:
    """ρ per token; log r per token or per sequence, broadcastable with the tokens; whether log r is per sequence."""
    rho = log_probs - old_log_probs
    if level == "sequence_token":
        log_ratio = sequences.spread(sequences.mean(rho).detach()) + log_probs - log_probs.detach()
        return rho, _clamp(log_ratio, bounds), False
    rho = _clamp(rho, bounds)
    if level == "sequence":
        return rho, sequences.spread(sequences.mean(rho)), True
    if level == "sequence_sum":
        return rho, _clamp(sequences.spread(sequences.sum(rho)), bounds), True
    check_choice(LEVELS, importance_sampling_level=level)
    return rho, rho, False


def _clip_ratios(t: Tokens, held: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Shares that a clip of ``held`` to ``low … high`` holds: below where A is negative, above where it is positive."""
    below, above = (held < low) & (t.A < 0), (held > high) & (t.A > 0)
    empty = ~(t.sequences.nonempty() | (t.one_each and t.count_empty))
    below_of_each, above_of_each = (t.sequences.mean(upcast(x).expand_as(t.mask)) for x in (below, above))
    # Padded with one number, so that a batch without sequences has an extreme.
    low_min = F.pad(below_of_each.masked_fill(empty, 1), (0, 1), value=1.0).amin()
    high_max = F.pad(above_of_each, (0, 1)).amax()  # 0 where empty
    return {
        "clip_ratio/low_mean": t.share(below),
        "clip_ratio/high_mean": t.share(above),
        "clip_ratio/region_mean": t.share(below | above),
        "clip_ratio/low_min": low_min.masked_fill(empty.all(), nan),
        "clip_ratio/high_max": high_max.masked_fill(empty.all(), nan),
    }


def _clip(
    t: Tokens, *, eps_low: float, eps_high: float, delta: float | None, dual_clip: float | None, **_: Any
) -> Surrogate:
    """−min(rA, clip(r, 1−ε_l, 1+ε_h)·A): nothing is gained by moving beyond the clip. PPO (1707.06347).

    The loss of a token with negative advantage still grows with ``r`` without bound; TRL's ``delta`` bounds ``r`` before
    the minimum, ``dual_clip`` (1912.09729) bounds the minimum.
    """
    check_between(0, inf, eps_low=eps_low, eps_high=eps_high, delta=delta)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip bounds the ratio from above and must be more than 1, got {dual_clip}")
    low, high, held = 1 - eps_low, 1 + eps_high, _at_most(t.r, delta)
    surrogate = torch.min(held * t.A, t.r.clamp(low, high) * t.A)
    metrics = _clip_ratios(t, held, low, high)
    if dual_clip is not None:
        surrogate = torch.where(t.A < 0, torch.max(surrogate, dual_clip * t.A), surrogate)
        metrics["clip_ratio/dual_mean"] = t.share((held > dual_clip) & (t.A < 0))
    return Surrogate(-surrogate, metrics)


def _gmpo(t: Tokens, *, eps_low: float, eps_high: float, log_ratio_clamp: Bounds, **_: Any) -> Surrogate:
    """−A·e^{mean c}, c = ρ, clipped to [−ε_l, ε_h] where that lowers cA. GMPO (2507.20673).

    PPO's clip in log space, then the geometric mean, which an outlier moves less. The weights are averaged in the same way.
    """
    check_between(0, inf, eps_low=eps_low, eps_high=eps_high)
    rho = _clamp(t.log_probs - t.old_log_probs, log_ratio_clamp)
    sign = t.A.sign()  # a token with advantage 0 enters the mean as 0
    c = sign * torch.min(sign * rho, sign * rho.clamp(-eps_low, eps_high))
    weight = t.weight
    if weight is not None and weight.dim() == 2:
        weight = t.sequences.mean((weight + 1e-10).log()).exp()
    metrics = _clip_ratios(t, rho, -eps_low, eps_high)
    return Surrogate(-t.A * t.sequences.spread(t.sequences.mean(c, t.kept)).exp(), metrics, weight, averaged=True)


def _cispo(t: Tokens, *, eps_low: float, eps_high: float, cispo_max: float | None, **_: Any) -> Surrogate:
    """−sg(min(r, r_max))·A·log π: bounds the ratio, and still trains every token. CISPO (2506.13585)."""
    check_between(0, inf, eps_low=eps_low, eps_high=eps_high, cispo_max=cispo_max)
    low, high = (1 - eps_low, 1 + eps_high) if cispo_max is None else (-inf, cispo_max)
    return Surrogate(-t.r.detach().clamp(low, high) * t.A * t.log_probs, _clip_ratios(t, t.r, low, high))


def _sapo(t: Tokens, *, sapo_temperature_pos: float, sapo_temperature_neg: float, **_: Any) -> Surrogate:
    """−4/τ·σ(τ(r − 1))·A: a soft gate, sharper for bad tokens; its slope at r = 1 is 1. SAPO (2511.20347)."""
    for temperature in (sapo_temperature_pos, sapo_temperature_neg):
        if not temperature > 0:
            raise ValueError(f"sapo_temperature_pos and sapo_temperature_neg must be positive, got {temperature}")
    tau = torch.full_like(t.A, sapo_temperature_neg).masked_fill(t.A > 0, sapo_temperature_pos)
    return Surrogate(-4 / tau * torch.sigmoid(tau * (t.r - 1)) * t.A, {})


def _vespo(t: Tokens, *, vespo_pos: tuple[float, float], vespo_neg: tuple[float, float], **_: Any) -> Surrogate:
    """−sg(φ)·A·log π, φ = e^{λ + ks − λe^s}, s = Σ_t ρ and the log of the weight. VESPO (2602.10693).

    φ is 1 where the sequence has not moved and falls smoothly on both sides of its peak, e^s = k/λ; λ is at least 1e-4 (TRL).
    """
    floor = log(1e-8)
    s = t.sequences.sum((t.log_probs - t.old_log_probs).detach().clamp(-20, 20))
    if t.weight is not None:
        log_weight = t.weight.log().clamp(floor, 20)
        s = s + (log_weight if t.weight.dim() == 1 else t.sequences.sum(log_weight))
    s = t.sequences.spread(s.clamp(floor, 20))
    k, lam = (torch.full_like(t.A, n).masked_fill(t.A >= 0, p) for p, n in zip(vespo_pos, vespo_neg, strict=True))
    lam = lam.clamp(min=1e-4)
    phi = (lam + k * s - lam * s.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)
    return Surrogate(-phi * t.A * t.log_probs, {}, weight=torch.ones_like(t.A))


def _dppo(t: Tokens, distance: Tensor, *, eps_low: float, eps_high: float, delta: float | None, **_: Any) -> Surrogate:
    """−sg(r)·A·log π, 0 where π has moved further than ε from π_old in the direction of A. DPPO (2602.04879).

    ``distance`` is the total variation or binary KL between the token's probability and its old one; negative where it fell.
    """
    check_between(0, inf, eps_low=eps_low, eps_high=eps_high, delta=delta)
    trusted = torch.where(t.A > 0, distance <= eps_high, distance >= -eps_low)
    loss = -_at_most(t.r, delta).detach() * t.A * t.log_probs
    return Surrogate(loss.where(trusted, 0), _clip_ratios(t, distance, -eps_low, eps_high))


def _dppo_tv(t: Tokens, **options: Any) -> Surrogate:
    """DPPO with the total variation, π − π_old."""
    return _dppo(t, t.log_probs.detach().exp() - t.old_log_probs.exp(), **options)


def _dppo_kl(t: Tokens, **options: Any) -> Surrogate:
    """DPPO with the binary KL(π_old ‖ π)."""
    log_p, log_q = t.log_probs.detach(), t.old_log_probs
    p, q = log_p.exp(), log_q.exp()
    not_p, not_q = (1 - p).clamp(min=0), (1 - q).clamp(min=0)  # rounded log-probabilities may lie above 0
    kl = q * (log_q - log_p) + not_q * ((not_q + 1e-8) / (not_p + 1e-8)).log()
    return _dppo(t, torch.where(p < q, -kl, kl), **options)


def _covariance(t: Tokens) -> Tensor:
    """How much training on each token lowers the policy's entropy (2505.22617); ``(B, S)``."""
    A, logp = t.A.expand_as(t.mask), t.log_probs.detach()
    return (A - masked_mean(A, t.mask)) * (logp - masked_mean(logp, t.mask))


def _count_of_share(mask: Tensor, ratio: float) -> Tensor:
    """``ratio`` times the number of tokens that count, rounded down, at least one."""
    return (mask.sum(dtype=wide_dtype(mask.device)) * ratio).long().clamp(min=1)


def _kl_cov(t: Tokens, *, kl_cov_ratio: float, kl_cov_coef: float, **_: Any) -> Surrogate:
    """−rA, + c·∣log r∣ for the share of tokens with the highest covariance. KL-Cov (2505.22617)."""
    check_between(0, 1, kl_cov_ratio=kl_cov_ratio)
    check_between(0, inf, kl_cov_coef=kl_cov_coef)
    order = _covariance(t).masked_fill(~t.mask, -inf).flatten().argsort(descending=True, stable=True)
    highest = torch.arange(len(order), device=order.device) < _count_of_share(t.mask, kl_cov_ratio)
    highest = torch.zeros_like(highest).scatter(0, order, highest).view_as(t.mask)
    return Surrogate(-t.r * t.A + (kl_cov_coef * t.log_ratio.abs()).where(highest, 0), {})


def _clip_cov(
    t: Tokens,
    *,
    delta: float | None,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
    generator: torch.Generator | None,
    **options: Any,
) -> Surrogate:
    """PPO's loss, but 0 for some tokens that no clip holds and with covariance between two bounds. Clip-Cov (2505.22617).

    They are the first such tokens in a random order of all positions, at most a share of the tokens.
    """
    check_between(0, 1, clip_cov_ratio=clip_cov_ratio)
    check_between(-inf, clip_cov_ub, clip_cov_lb=clip_cov_lb)
    loss, metrics, *_ = _clip(t, delta=delta, **options)
    covariance = _covariance(t)
    free = loss == -_at_most(t.r, delta) * t.A
    candidates = (covariance > clip_cov_lb) & (covariance < clip_cov_ub) & free & t.mask
    order = torch.randperm(candidates.numel(), generator=generator, device=candidates.device)
    shuffled = candidates.flatten()[order]
    drawn = shuffled & (shuffled.cumsum(0) <= _count_of_share(t.mask, clip_cov_ratio))
    drawn = torch.zeros_like(drawn).scatter(0, order, drawn).view_as(candidates)
    return Surrogate(loss.where(~drawn, 0), metrics | {"clip_ratio/cov_mean": t.sequences.average(drawn)})


def _dro(t: Tokens, *, dro_beta: float, log_ratio_clamp: Bounds, **_: Any) -> Surrogate:
    """−A·log π + β/2·ρ²: held near the old policy by a square instead of a clip. DRO (2405.19107)."""
    check_between(0, inf, dro_beta=dro_beta)
    pull = -t.A * t.log_probs
    return Surrogate(pull + dro_beta / 2 * _clamp(t.log_probs - t.old_log_probs, log_ratio_clamp).square(), {})


def _reinforce(t: Tokens, **_: Any) -> Surrogate:
    """−A·log π: the plain policy gradient, with no ratio. GPG (2504.02546)."""
    return Surrogate(-t.A * t.log_probs, {})


class LossType(NamedTuple):
    surrogate: Callable[..., Surrogate]
    level: Level
    aggregation: str


LOSS_TYPES = {
    "grpo": LossType(_clip, "token", "seq_mean_token_mean"),  # 2402.03300
    "bnpo": LossType(_clip, "token", "token_mean"),
    "ppo": LossType(_clip, "token", "token_mean"),
    "dapo": LossType(_clip, "token", "token_mean"),  # 2503.14476, which has eps_high=0.28
    "dr_grpo": LossType(_clip, "token", "seq_mean_token_sum_norm"),  # 2503.20783
    "luspo": LossType(_clip, "token", "seq_mean_token_sum"),  # 2602.05261
    "gspo": LossType(_clip, "sequence", "seq_mean_token_mean"),  # 2507.18071
    "gspo-token": LossType(_clip, "sequence_token", "seq_mean_token_mean"),
    "rloo": LossType(_clip, "sequence_sum", "seq_mean_token_mean"),  # 2402.14740
    "gmpo": LossType(_gmpo, "token", "seq_mean_token_mean"),
    "cispo": LossType(_cispo, "token", "token_mean"),
    "sapo": LossType(_sapo, "token", "seq_mean_token_mean"),
    "vespo": LossType(_vespo, "token", "token_mean"),
    "reinforce": LossType(_reinforce, "token", "seq_mean_token_sum"),
    "gpg": LossType(_reinforce, "token", "token_mean"),
    "dppo_tv": LossType(_dppo_tv, "token", "token_mean"),
    "dppo_kl": LossType(_dppo_kl, "token", "token_mean"),
    "dro": LossType(_dro, "token", "token_mean"),
    "kl_cov": LossType(_kl_cov, "token", "token_mean"),
    "clip_cov": LossType(_clip_cov, "token", "token_mean"),
}
_USE_DUAL_CLIP = {_clip, _clip_cov}
_USE_DELTA = {_clip, _clip_cov, _dppo_tv, _dppo_kl}


def _check_options(
    loss_type: str,
    level: Level | None,
    delta: float | None,
    dual_clip: float | None,
    log_ratio_clamp: Bounds,
    off_policy_mask_threshold: float | None,
    rollout_log_probs: Tensor | None,
) -> None:
    check_choice(LOSS_TYPES, loss_type=loss_type)
    surrogate = LOSS_TYPES[loss_type].surrogate
    ignored = {
        "delta": delta is not None and surrogate not in _USE_DELTA,
        "dual_clip": dual_clip is not None and surrogate not in _USE_DUAL_CLIP,
        "importance_sampling_level": level is not None and surrogate is _gmpo,
    }
    if names := [name for name, given in ignored.items() if given]:
        raise ValueError(f"{' and '.join(names)} has no effect on {loss_type}: leave it out")
    if rollout_log_probs is not None and off_policy_mask_threshold is None:
        raise ValueError(
            "rollout_log_probs has no effect without off_policy_mask_threshold: leave it out, or pass mismatch_weight(…)"
        )
    if log_ratio_clamp is not None:
        pair = tuple(log_ratio_clamp) if isinstance(log_ratio_clamp, tuple | list) else ()
        known = [x for x in pair if x is not None]
        if len(pair) != 2 or not known or not known[0] <= known[-1]:
            raise ValueError(
                "log_ratio_clamp must be (low, high) with low ≤ high, of which one may be None, or None for no clamp; got "
                f"{log_ratio_clamp!r}"
            )


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss_type: str = "grpo",
    importance_sampling_level: Level | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: Bounds = (-20.0, 20.0),
    cispo_max: float | None = 5.0,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_pos: tuple[float, float] = (2.0, 3.0),
    vespo_neg: tuple[float, float] = (3.0, 2.0),
    dro_beta: float = 1.0,
    kl_cov_ratio: float = 0.0002,
    kl_cov_coef: float = 0.1,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    generator: torch.Generator | None = None,
    rollout_log_probs: Tensor | None = None,
    off_policy_mask_threshold: float | None = None,
    mismatch_weight: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    beta: float | None = None,
    kl_estimator: Callable[[Tensor, Tensor], Tensor] = kl_estimate,
    use_bias_correction_kl: bool = True,
    kl_aggregation: str | None = None,
    entropy: Tensor | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    entropy_aggregation: str | None = None,
    group: dist.ProcessGroup | None = None,
    aggregation: str | None = None,
    cu_seqlens: Tensor | None = None,
    batch_num_tokens: Tensor | float | None = None,
    global_batch_size: Tensor | float | None = None,
    dp_size: int = 1,
    loss_scale_factor: float | None = None,
    count_empty: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The policy loss of every trainer: a loss type per token, masks and weights, KL, an aggregation, entropy.

    .. math:: \mathrm{aggregate}\big(l \cdot weights + \beta\,k_3\,(r)\big) - c_H \cdot \mathrm{mean}\,H

    The module's docstring has the table of loss types and their names in the trainers. The steps, in order:

    1. the loss per token, times the detached masks and weights: ``off_policy_mask_threshold``,
       ``top_entropy_quantile``, ``mismatch_weight``. Denominators do not change. Two types use them inside the loss: vespo
       includes the mismatch weight in :math:`s`; gmpo takes the weight's geometric mean, and that of the ratios over the
       tokens that the entropy mask keeps;
    2. ``+ beta · KL``. With ``use_bias_correction_kl`` the KL is multiplied by :math:`r`, before any clip and including the
       gradient of :math:`r` (not in gmpo);
    3. :func:`aggregate`;
    4. ``− entropy_coef ·`` the mean entropy of the tokens that the entropy mask keeps (TRL), or, with
       ``entropy_aggregation``, the entropy aggregated as a loss is: tokens that the mask drops are 0, and denominators do
       not change.

    Source: TRL 1.16 ``GRPOTrainer``, ``RLOOTrainer``, ``GMPOTrainer``; verl 0.9 ``core_algos``; OpenRLHF 0.11
    ``PolicyLoss``. The papers are named beside each entry of ``LOSS_TYPES`` or in its function.

    Args:
        log_probs: ``(B, S)``, or packed ``(1, total)``: of the sampled tokens under the policy, nats.
        old_log_probs: the same under the policy that sampled them; ``None``: the policy itself, :math:`sg(\log\pi)`.
        advantages: one per sequence ``(B,)`` or ``(B, 1)``, or one per token ``(B, S)``.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all. What it hides may be nan or inf.
        loss_type: a row of the module's table.
        importance_sampling_level: ``"token"``, ``"sequence"`` (the ratio of the geometric means, one per sequence),
            ``"sequence_token"`` (the same value, with each token's own gradient) or ``"sequence_sum"`` (the product);
            ``None``: the loss type's own. LUSPO's authors want ``"sequence"``; TRL's default is ``"token"``.
        eps_low, eps_high: the clip, ``1 − eps_low … 1 + eps_high``; gmpo clips in log space, where 0.4 is usual; dppo clips
            total variation or KL.
        delta: bound on the ratio itself before the clip's minimum is taken (TRL), and on dppo's ratio; default none.
        dual_clip: bound on the ratio of a token with negative advantage; default none, verl 3.0. Must be above 1.
        log_ratio_clamp: bounds of each token's :math:`\rho`, applied before any mean, and to sums also after
            (``gspo-token``: only to the sum of its two exponents). Default ±20, OpenRLHF 0.11 and verl; ``None``: TRL.
        cispo_max: cispo's bound on the ratio itself: TRL's ``epsilon_high`` there; default 5.0. ``None``: the ratio is
            clipped to ``1 − eps_low … 1 + eps_high``, as verl.
        sapo_temperature_pos, sapo_temperature_neg: SAPO's :math:`\tau` for ``A > 0``, and otherwise.
        vespo_pos, vespo_neg: VESPO's :math:`(k, \lambda)` for ``A ≥ 0``, and for negative advantages; a :math:`\lambda`
            below 1e-4 is 1e-4, as in TRL.
        dro_beta: DRO's :math:`\beta`; verl has no default.
        kl_cov_ratio: the share of this batch's tokens that kl_cov holds near the old policy.
        kl_cov_coef: its :math:`c`, verl's ``ppo_kl_coef``.
        clip_cov_ratio: the share of this batch's tokens, at least one, that clip_cov draws and does not train.
        clip_cov_lb, clip_cov_ub: clip_cov draws from the tokens that the clip does not hold and whose
            :math:`(A - \mathrm{mean}\,A)(\log\pi - \mathrm{mean}\log\pi)` is between the two; it draws all of them if they
            are fewer than the share. The paper's runs have ``eps_low=eps_high=1``.
        generator: the draw's random generator, on the tokens' device; ``None``: PyTorch's own, which ``torch.compile``
            requires. Ranks that share the tokens must draw the same ones.
        rollout_log_probs: the inference engine's, for the off-policy mask; ``None``: ``old_log_probs``.
        off_policy_mask_threshold: see :func:`off_policy_mask`; default off.
        mismatch_weight: per sequence or per token; the first result of :func:`mismatch_weight`.
        ref_log_probs: as ``log_probs`` under the reference; needed where ``beta`` is not 0, and rejected without ``beta``.
        beta: weight of the KL term; None: 0.
        kl_estimator: from ``(log_probs, ref_log_probs)`` to KL per token. Default k3, TRL; verl and OpenRLHF clamp it:
            ``functools.partial(kl_estimate, clamp=10)``.
        use_bias_correction_kl: weight the KL by the ratio, so that its gradient is unbiased off the policy. Default
            True, TRL 1.16; False for TRL up to 1.9, verl and OpenRLHF.
        kl_aggregation: how the KL is aggregated; ``None``: with the loss (TRL). OpenRLHF: ``"token_mean"``.
        entropy: ``(B, S)`` per token, nats; ``entropy_coef`` needs it with its gradient.
        top_entropy_quantile: share of tokens that train, those with the highest entropy; see :func:`entropy_mask`.
        entropy_coef: weight of the entropy bonus. TRL's gradient accumulation divides the bonus by the steps under every
            loss type: divide ``entropy_coef`` by them where the loss is not divided (see :func:`aggregate`).
        entropy_aggregation: how the entropy is aggregated; ``None``: the mean over those tokens of this batch that
            ``top_entropy_quantile`` keeps (TRL); no count below is their number over all ranks. OpenRLHF: ``"token_mean"``
            with its global count; verl: the loss's own aggregation. A named aggregation divides by the counts, which are
            of all tokens: under a quantile of 0.2 the bonus is about a fifth of TRL's.
        group: the ranks of the entropy mask's quantile, see :func:`entropy_mask`.
        aggregation: a row of the table at :func:`aggregate`; ``None``: the loss type's own.
        cu_seqlens: ``(n + 1,)``, the borders of a packed row's sequences.
        batch_num_tokens, global_batch_size, dp_size, loss_scale_factor, count_empty: as for :func:`aggregate`.

    Returns:
        The loss, a scalar in fp32 (float64 for float64), differentiable in ``log_probs`` and ``entropy``; and metrics
        of this batch, detached: ``ratio_mean``, ``ppo_kl`` (the token mean of :math:`-\rho`, clamped), ``kl`` (as it was
        weighted), ``entropy``, ``clip_ratio/{low,high,region}_mean`` (share of tokens, or of sequences where there is
        one ratio and advantage for each, that the clip holds below, above, either), ``clip_ratio/low_min`` and
        ``clip_ratio/high_max`` (extremes among the sequences; nan, as in TRL, where none has a token),
        ``clip_ratio/dual_mean`` and ``clip_ratio/cov_mean`` (share of tokens that clip_cov drew). With ``count_empty`` a
        share of sequences includes the fully masked ones, which no clip holds.

    Raises:
        ValueError: an unknown name, shapes that do not match, an input that an option needs is missing, a number without
            meaning (a bound below 0, a share that is not from 0 to 1), or an option without effect: ``delta``, ``dual_clip``
            or ``importance_sampling_level`` on a loss type that does not use it, ``rollout_log_probs`` without a
            threshold. Options whose default is a number may be given without effect.

    Example:
        >>> new, old = torch.tensor([[-1.0, -1.0], [-0.5, -2.0]]), torch.tensor([[-1.0, -2.0], [-1.0, -1.0]])
        >>> loss, metrics = grpo_loss(new, old, torch.tensor([1.0, -1.0]), loss_type="grpo")
        >>> loss, metrics["clip_ratio/high_mean"], metrics["clip_ratio/low_mean"]
        (tensor(0.0622), tensor(0.2500), tensor(0.2500))
    """
    _check_options(
        loss_type,
        importance_sampling_level,
        delta,
        dual_clip,
        log_ratio_clamp,
        off_policy_mask_threshold,
        rollout_log_probs,
    )
    if beta is None and ref_log_probs is not None:
        raise ValueError("ref_log_probs has no effect without beta, the weight of its KL: pass it, or leave them out")
    beta = beta or 0.0
    if beta != 0 and ref_log_probs is None:
        raise ValueError("beta needs ref_log_probs")
    check_between(0, 1, top_entropy_quantile=top_entropy_quantile)
    if entropy is None and (entropy_coef != 0 or top_entropy_quantile < 1):
        raise ValueError("entropy_coef and top_entropy_quantile need entropy")
    if entropy_coef != 0 and entropy is not None and trains(log_probs) and not entropy.requires_grad:
        raise ValueError("entropy_coef trains nothing, as entropy has no gradient: compute it outside of no_grad")
    if isinstance(mismatch_weight, tuple):
        raise ValueError("mismatch_weight must be a tensor: pass the first of the two that the function returns")
    surrogate, level, own_aggregation = LOSS_TYPES[loss_type]
    sequences = Sequences("log_probs", log_probs, mask, cu_seqlens)
    mask = sequences.mask
    log_probs = sequences.hide("log_probs", log_probs)
    old_log_probs = log_probs if old_log_probs is None else sequences.hide("old_log_probs", old_log_probs)
    old_log_probs = old_log_probs.detach()
    advantages = sequences.constant("advantages", advantages)
    A = sequences.spread(advantages)
    level = importance_sampling_level or level
    rho, log_ratio, one_ratio = _log_ratio(log_probs, old_log_probs, sequences, level, log_ratio_clamp)
    r = log_ratio.exp()
    weight = None if mismatch_weight is None else sequences.constant("mismatch_weight", mismatch_weight)
    kept = mask
    if entropy is not None and top_entropy_quantile < 1:
        kept = entropy_mask(entropy, top_entropy_quantile, mask, group=group)
    one_each = one_ratio and advantages.dim() == 1
    counts: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size,
        "dp_size": dp_size,
        "loss_scale_factor": loss_scale_factor,
        "count_empty": count_empty,
    }

    result = surrogate(
        Tokens(log_probs, old_log_probs, A, log_ratio, r, mask, kept, weight, sequences, one_each, count_empty),
        eps_low=eps_low,
        eps_high=eps_high,
        delta=delta,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        cispo_max=cispo_max,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_pos=vespo_pos,
        vespo_neg=vespo_neg,
        dro_beta=dro_beta,
        kl_cov_ratio=kl_cov_ratio,
        kl_cov_coef=kl_cov_coef,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_lb=clip_cov_lb,
        clip_cov_ub=clip_cov_ub,
        generator=generator,
    )
    loss = result.loss
    if off_policy_mask_threshold is not None:
        sampling = old_log_probs
        if rollout_log_probs is not None:
            sampling = sequences.hide("rollout_log_probs", rollout_log_probs)
        worth = off_policy_mask(log_probs, sampling, A, off_policy_mask_threshold, mask, cu_seqlens=cu_seqlens)
        loss = loss.where(worth, 0)
    if not result.averaged:
        loss = loss.where(kept, 0)
    weight = weight if result.weight is None else result.weight
    if weight is not None:
        loss = loss * sequences.spread(weight)
    metrics = {"ratio_mean": sequences.average(r, one_ratio), "ppo_kl": -sequences.average(rho)} | result.metrics

    penalty: Tensor | float = 0.0
    if beta != 0 and ref_log_probs is not None:
        kl = kl_estimator(log_probs, sequences.hide("ref_log_probs", ref_log_probs.detach()))
        if use_bias_correction_kl and not result.averaged:
            kl = kl * r
        if kl_aggregation is None:
            loss = loss + beta * kl
        else:
            penalty = beta * aggregate(kl, mask, kl_aggregation, **counts)
        metrics["kl"] = sequences.average(kl)

    total = aggregate(loss.expand_as(mask), mask, aggregation or own_aggregation, **counts) + penalty

    if entropy is not None:
        entropy = sequences.hide("entropy", entropy)
        metrics["entropy"] = sequences.average(entropy)
        if entropy_coef != 0:
            if entropy_aggregation is None:
                bonus = masked_mean(entropy, kept)
            else:
                bonus = aggregate(entropy.where(kept, 0), mask, entropy_aggregation, **counts)
            total = total - entropy_coef * bonus
    return total, {name: metric.detach() for name, metric in metrics.items()}


def ppo_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The actor's loss in PPO: :func:`grpo_loss` with ``loss_type="ppo"``, whose ``options`` it takes.

    .. math:: \frac{\sum m\,\max(-rA,\ -\mathrm{clip}(r, 1-\epsilon_l, 1+\epsilon_h)A)}{\sum m}

    Source: PPO (1707.06347); DeepSpeed-Chat ``actor_loss_fn``; OpenRLHF 0.11 ``PolicyLoss``; verl ``vanilla``
    (``dual_clip=3.0``).

    Args:
        log_probs: ``(B, S)`` of the sampled tokens under the policy, nats.
        old_log_probs: the same under the policy that sampled them.
        advantages: ``(B, S)`` or ``(B,)``.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all.
        options: of :func:`grpo_loss`.

    Returns:
        The loss and metrics, as :func:`grpo_loss`.

    Example:
        >>> ppo_loss(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[1.0]]))[0]
        tensor(-1.2000)
    """
    return grpo_loss(log_probs, old_log_probs, advantages, mask, loss_type="ppo", **options)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip_eps: float | None = None,
    aggregation: str = "token_mean",
    cu_seqlens: Tensor | None = None,
    batch_num_tokens: Tensor | float | None = None,
    global_batch_size: Tensor | float | None = None,
    dp_size: int = 1,
    loss_scale_factor: float | None = None,
    count_empty: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The critic's loss in PPO: half the squared error, the worse of plain and clipped.

    .. math:: \tfrac12 \max\big((v_c - R)^2, (v - R)^2\big), \qquad v_c = \mathrm{clamp}(v, v_{old} \pm \epsilon)

    Source: OpenRLHF 0.11 ``ValueLoss``; verl 0.9 ``compute_value_loss``; DeepSpeed-Chat ``critic_loss_fn``. OpenRLHF's
    first version has ``aggregation="seq_mean_token_mean"``.

    Args:
        values: ``(B, S)`` of the critic, or packed ``(1, total)``.
        old_values: the critic's values when the tokens were sampled; only ``clip_eps`` needs them.
        returns: ``(B, S)``.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all.
        clip_eps: how far a value may move before the clip; ``None`` (default): no clip.
        aggregation: a row of the table at :func:`aggregate`.
        cu_seqlens: ``(n + 1,)``, the borders of a packed row's sequences.
        batch_num_tokens, global_batch_size, dp_size, loss_scale_factor, count_empty: as for :func:`aggregate`.

    Returns:
        The loss, a scalar in fp32 (float64 for float64), differentiable in ``values``; and ``{"clip_ratio"}``, the
        share of tokens that the clip holds, detached.

    Raises:
        ValueError: ``clip_eps`` without ``old_values`` or below 0, or shapes that do not match.

    Example:
        >>> value_loss(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), clip_eps=0.2)[0]
        tensor(0.5000)
    """
    check_between(0, inf, clip_eps=clip_eps)
    sequences = Sequences("values", values, mask, cu_seqlens)
    values, returns = sequences.hide("values", values), sequences.hide("returns", returns.detach())
    error = (values - returns).square()
    held = torch.zeros_like(error, dtype=torch.bool)
    if clip_eps is not None:
        if old_values is None:
            raise ValueError("clip_eps needs old_values")
        old_values = sequences.hide("old_values", old_values.detach())
        # A value inside the clip stays exactly the same, so that rounding does not count as clipping.
        clipped = (values.clamp(old_values - clip_eps, old_values + clip_eps) - returns).square()
        held = clipped > error
        error = torch.max(clipped, error)
    loss = aggregate(
        0.5 * error,
        sequences.mask,
        aggregation,
        cu_seqlens=cu_seqlens,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        dp_size=dp_size,
        loss_scale_factor=loss_scale_factor,
        count_empty=count_empty,
    )
    return loss, {"clip_ratio": sequences.average(held)}


def a2po_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 1e-3,
    cu_seqlens: Tensor | None = None,
    global_batch_size: Tensor | float | None = None,
    dp_size: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""A*-PO: regress the policy's implicit reward on the advantage over the best policy's value; one answer per prompt.

    .. math:: \Big(\beta \sum_t (\log\pi - \log\pi_{ref}) - A\Big)^2, \qquad A = R - V^*

    Source: Brantley et al., "A*-PO" (2505.20686); TRL 1.16's ``A2POTrainer``, whose ``beta2`` is ``beta``.

    Args:
        log_probs: ``(B, S)`` of the policy, or packed ``(1, total)``.
        ref_log_probs: the same under the reference.
        advantages: ``(B,)``: rewards less :func:`optimal_values`.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all.
        beta: scale of the implicit reward.
        cu_seqlens: ``(n + 1,)``, the borders of a packed row's sequences.
        global_batch_size, dp_size: as for :func:`aggregate`.

    Returns:
        The mean over sequences, a scalar in fp32 (float64 for float64), differentiable in ``log_probs``; and the means
        ``{"implicit_reward", "advantage"}``, detached.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> a2po_loss(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -2.0]]), torch.tensor([0.5]), beta=0.1)[0]
        tensor(0.0900)
    """
    sequences = Sequences("log_probs", log_probs, mask, cu_seqlens)
    log_ratio = sequences.hide("log_probs", log_probs) - sequences.hide("ref_log_probs", ref_log_probs.detach())
    implicit_reward = beta * sequences.sum(log_ratio)
    if advantages.shape != implicit_reward.shape:
        raise ValueError(f"advantages must be one per sequence ({sequences.number},), got {tuple(advantages.shape)}")
    advantages = upcast(advantages.detach())
    loss = aggregate(
        (implicit_reward - advantages).square().unsqueeze(1),
        aggregation="seq_mean_token_sum",
        global_batch_size=global_batch_size,
        dp_size=dp_size,
    )
    return loss, {"implicit_reward": implicit_reward.detach().mean(), "advantage": advantages.mean()}

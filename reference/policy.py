"""Policy losses, sequence by sequence and token by token.

Each loss type is one function of one sequence's tokens, those where its mask is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .aggregation import aggregate, mean_of, tokens_of
from .kl import kl_estimate
from .rollouts import at, entropy_mask, off_policy_mask

Bounds = tuple[float | None, float | None]


class Token(NamedTuple):
    logp: Tensor
    old: Tensor
    rho: Tensor  # logp − old
    r: Tensor  # exp(rho), or the ratio of the sequence
    A: Tensor
    weight: float  # mismatch weight
    kept: bool  # by the entropy mask
    penalised: bool  # by kl_cov


class Surrogate(NamedTuple):
    """The result of a loss type for one sequence."""

    loss: list[Tensor]  # one per token
    held: list | None = None  # the numbers that the clip keeps between low and high; None: there is no clip
    low: float = -math.inf
    high: float = math.inf
    weight: list[float] | None = None  # one per token, in place of Token.weight where the loss already contains that


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """``x``; beyond a bound a constant, whose gradient is 0."""
    if low is not None and x < low:
        return torch.full_like(x, low)
    if high is not None and x > high:
        return torch.full_like(x, high)
    return x


def _ratio(rho: list[Tensor], logp: list[Tensor], level: str, bounds: Bounds) -> list[Tensor]:
    """r at each token of one sequence."""
    if level == "sequence_token":
        mean = mean_of([x.detach() for x in rho])
        return [_clamp(mean + x - x.detach(), *bounds).exp() for x in logp]
    rho = [_clamp(x, *bounds) for x in rho]
    if level == "sequence":
        return [torch.exp(mean_of(rho))] * len(rho)
    if level == "sequence_sum":
        return [_clamp(sum(rho[1:], rho[0]), *bounds).exp()] * len(rho)
    return [x.exp() for x in rho]


def _clip(
    tokens: list[Token], *, eps_low: float, eps_high: float, delta: float | None, dual_clip: float | None, **_: Any
) -> Surrogate:
    """−min(min(r, δ)A, clip(r)A): for A > 0 the ratio is bounded above; for A < 0 below, and above by δ or the dual clip c."""
    low, high = 1 - eps_low, 1 + eps_high
    loss = []
    for t in tokens:
        if t.A >= 0:
            r = _clamp(t.r, None, high if delta is None else min(delta, high))
        else:
            r = _clamp(t.r, low, None if delta is None else max(delta, high))
            r = _clamp(r, None, dual_clip)
        loss.append(-t.A * r)
    return Surrogate(loss, [_clamp(t.r, None, delta) for t in tokens], low, high)


def _gmpo(
    tokens: list[Token], *, eps_low: float, eps_high: float, bounds: Bounds, weight_per_token: bool, **_: Any
) -> Surrogate:
    """−A·exp(mean c), c = ρ, bounded above for A > 0 and below for A < 0; times the geometric mean of the weights."""
    rho, c = [_clamp(t.rho, *bounds) for t in tokens], []
    for t, x in zip(tokens, rho, strict=True):
        if t.A == 0:
            c.append(torch.zeros_like(x))
        else:
            c.append(_clamp(x, None, eps_high) if t.A > 0 else _clamp(x, -eps_low, None))
    mean = torch.as_tensor(mean_of([x for x, t in zip(c, tokens, strict=True) if t.kept]))
    weight = [t.weight for t in tokens]
    if weight_per_token:
        weight = [math.exp(mean_of([math.log(x + 1e-10) for x in weight]))] * len(tokens)
    return Surrogate([-t.A * torch.exp(mean) for t in tokens], rho, -eps_low, eps_high, weight)


def _cispo(tokens: list[Token], *, eps_low: float, eps_high: float, cispo_max: float | None, **_: Any) -> Surrogate:
    """−sg(min(r, r_max))·A·logp."""
    low, high = (1 - eps_low, 1 + eps_high) if cispo_max is None else (-math.inf, cispo_max)
    loss = [-_clamp(t.r, low, high).detach() * t.A * t.logp for t in tokens]
    return Surrogate(loss, [t.r for t in tokens], low, high)


def _sapo(tokens: list[Token], *, sapo_temperature_pos: float, sapo_temperature_neg: float, **_: Any) -> Surrogate:
    """−4/τ·σ(τ(r − 1))·A."""
    loss = []
    for t in tokens:
        tau = sapo_temperature_pos if t.A > 0 else sapo_temperature_neg
        loss.append(-4 / tau / (1 + torch.exp(-tau * (t.r - 1))) * t.A)
    return Surrogate(loss)


def _vespo(
    tokens: list[Token],
    *,
    vespo_pos: tuple[float, float],
    vespo_neg: tuple[float, float],
    weight_per_token: bool,
    **_: Any,
) -> Surrogate:
    """−φ·A·logp, φ = exp(λ + k s − λ e^s), s = Σ ρ of the sequence plus the log of its mismatch weight."""
    s = sum(min(max(t.rho.item(), -20.0), 20.0) for t in tokens)
    weights = [t.weight for t in (tokens if weight_per_token else tokens[:1])]
    s += sum(math.log(min(max(x, 1e-8), math.exp(20))) for x in weights)
    s = min(max(s, math.log(1e-8)), 20.0)
    loss = []
    for t in tokens:
        k, lam = vespo_pos if t.A >= 0 else vespo_neg
        lam = max(lam, 1e-4)
        loss.append(-math.exp(lam + k * s - lam * math.exp(s)) * t.A * t.logp)
    return Surrogate(loss, weight=[1.0] * len(tokens))


def _dppo(
    tokens: list[Token], moved: list[float], *, eps_low: float, eps_high: float, delta: float | None, **_: Any
) -> Surrogate:
    """−sg(min(r, δ))·A·logp, 0 where the token's probability has ``moved`` too far in the direction of A."""
    loss = []
    for t, x in zip(tokens, moved, strict=True):
        too_far = x > eps_high if t.A > 0 else x < -eps_low
        weight = 0.0 if too_far else _clamp(t.r.detach(), None, delta)
        loss.append(-weight * t.A * t.logp)
    return Surrogate(loss, moved, -eps_low, eps_high)


def _dppo_tv(tokens: list[Token], **options: Any) -> Surrogate:
    """``_dppo`` with moved = p − q, p = exp(logp), q = exp(old)."""
    return _dppo(tokens, [math.exp(t.logp.item()) - math.exp(t.old.item()) for t in tokens], **options)


def _dppo_kl(tokens: list[Token], **options: Any) -> Surrogate:
    """``_dppo`` with moved = ±the binary KL(q ‖ p), negative where p < q."""
    moved = []
    for t in tokens:
        p, q = math.exp(t.logp.item()), math.exp(t.old.item())
        not_p, not_q = max(1 - p, 0), max(1 - q, 0)
        kl = q * math.log(q / p) + not_q * math.log((not_q + 1e-8) / (not_p + 1e-8))
        moved.append(kl if p > q else -kl)
    return _dppo(tokens, moved, **options)


def _dro(tokens: list[Token], *, dro_beta: float, bounds: Bounds, **_: Any) -> Surrogate:
    """β/2·ρ² − A·logp."""
    return Surrogate([dro_beta * _clamp(t.rho, *bounds) ** 2 / 2 - t.A * t.logp for t in tokens])


def _kl_cov(tokens: list[Token], *, kl_cov_coef: float, **_: Any) -> Surrogate:
    """−rA, plus c·|log r| for the tokens of highest covariance."""
    return Surrogate([-t.r * t.A + kl_cov_coef * t.r.log().abs() if t.penalised else -t.r * t.A for t in tokens])


def _reinforce(tokens: list[Token], **_: Any) -> Surrogate:
    """−A·logp."""
    return Surrogate([-t.A * t.logp for t in tokens])


# The loss function, the level of its ratio, the aggregation.
LOSS_TYPES: dict[str, tuple[Callable[..., Surrogate], str, str]] = {
    "grpo": (_clip, "token", "seq_mean_token_mean"),
    "bnpo": (_clip, "token", "token_mean"),
    "ppo": (_clip, "token", "token_mean"),
    "dapo": (_clip, "token", "token_mean"),
    "dr_grpo": (_clip, "token", "seq_mean_token_sum_norm"),
    "luspo": (_clip, "token", "seq_mean_token_sum"),
    "gspo": (_clip, "sequence", "seq_mean_token_mean"),
    "gspo-token": (_clip, "sequence_token", "seq_mean_token_mean"),
    "rloo": (_clip, "sequence_sum", "seq_mean_token_mean"),
    "gmpo": (_gmpo, "token", "seq_mean_token_mean"),
    "cispo": (_cispo, "token", "token_mean"),
    "sapo": (_sapo, "token", "seq_mean_token_mean"),
    "vespo": (_vespo, "token", "token_mean"),
    "reinforce": (_reinforce, "token", "seq_mean_token_sum"),
    "gpg": (_reinforce, "token", "token_mean"),
    "dppo_tv": (_dppo_tv, "token", "token_mean"),
    "dppo_kl": (_dppo_kl, "token", "token_mean"),
    "dro": (_dro, "token", "token_mean"),
    "kl_cov": (_kl_cov, "token", "token_mean"),
    "clip_cov": (_clip, "token", "token_mean"),  # grpo_loss sets the loss of some tokens, drawn at random, to 0
}


def _covariances(log_probs: Tensor, advantages: Tensor, rows: list[list[int]]) -> dict[tuple[int, int], float]:
    """(A − mean A)(logp − mean logp) of each token, by its place (b, t)."""
    A = {(b, t): at(advantages, b, t).item() for b, row in enumerate(rows) for t in row}
    logp = {place: log_probs[place].item() for place in A}
    mean_A, mean_logp = mean_of(list(A.values())), mean_of(list(logp.values()))
    return {place: (A[place] - mean_A) * (logp[place] - mean_logp) for place in A}


def _average(lists: list[list], per_sequence: bool) -> Any:
    """The mean over all tokens, or over the sequences' means."""
    return mean_of([mean_of(x) for x in lists] if per_sequence else [x for each in lists for x in each])


def _clip_ratios(below: list[list[float]], above: list[list[float]], per_sequence: bool) -> dict[str, Any]:
    low, high = _average(below, per_sequence), _average(above, per_sequence)
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "clip_ratio/low_min": min((mean_of(x) for x in below), default=math.nan),
        "clip_ratio/high_max": max((mean_of(x) for x in above), default=math.nan),
    }


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    loss_type: str = "grpo",
    importance_sampling_level: str | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: tuple[float | None, float | None] | None = (-20.0, 20.0),
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
    ref_log_probs: Any = None,
    beta: float = 0.0,
    kl_estimator: Any = kl_estimate,
    use_bias_correction_kl: bool = True,
    kl_aggregation: str | None = None,
    entropy: Any = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    entropy_aggregation: str | None = None,
    aggregation: str | None = None,
    **counts: Any,
) -> tuple[Tensor, dict[str, float]]:
    """aggregate(loss per token × masks and weights + beta·KL·r) − entropy_coef·mean(H)."""
    surrogate, own_level, own_aggregation = LOSS_TYPES[loss_type]
    level, aggregation = importance_sampling_level or own_level, aggregation or own_aggregation
    bounds = log_ratio_clamp or (None, None)
    weight_per_token = mismatch_weight is not None and mismatch_weight.dim() == 2 and mismatch_weight.shape[1] > 1
    mask = torch.ones_like(log_probs) if mask is None else mask
    rows = tokens_of(mask)
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    keep = mask != 0 if top_entropy_quantile == 1 else entropy_mask(entropy, top_entropy_quantile, mask)
    worth = torch.ones_like(keep)
    if off_policy_mask_threshold is not None:
        sampling = old if rollout_log_probs is None else rollout_log_probs
        worth = off_policy_mask(log_probs, sampling, advantages, off_policy_mask_threshold, mask)
    covariances = _covariances(log_probs, advantages, rows)
    highest = sorted(covariances, key=covariances.__getitem__, reverse=True)
    penalised = highest[: max(int(len(highest) * kl_cov_ratio), 1)]

    zero = log_probs.new_zeros(())
    loss = [[zero] * mask.shape[1] for _ in rows]
    kl = [[zero] * mask.shape[1] for _ in rows]
    ratios, drift, free = [], [], []
    below, above, beyond = [], [], []  # tokens that a clip holds; like ratios, one list per sequence with tokens
    for b, row in enumerate(rows):
        if not row:
            continue
        logp = [log_probs[b, t] for t in row]
        rho = [log_probs[b, t] - old[b, t] for t in row]
        r = _ratio(rho, logp, level, bounds)
        tokens = [
            Token(
                logp=logp[i],
                old=old[b, t],
                rho=rho[i],
                r=r[i],
                A=at(advantages, b, t),
                weight=1.0 if mismatch_weight is None else at(mismatch_weight, b, t).item(),
                kept=bool(keep[b, t]),
                penalised=(b, t) in penalised,
            )
            for i, t in enumerate(row)
        ]
        found = surrogate(
            tokens, eps_low=eps_low, eps_high=eps_high, delta=delta, dual_clip=dual_clip, bounds=bounds,
            cispo_max=cispo_max, sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
            vespo_pos=vespo_pos, vespo_neg=vespo_neg, dro_beta=dro_beta, kl_cov_coef=kl_cov_coef,
            weight_per_token=weight_per_token,
        )  # fmt: skip
        weight = found.weight or [x.weight for x in tokens]
        for i, t in enumerate(row):
            if worth[b, t] and (keep[b, t] or surrogate is _gmpo):
                loss[b][t] = found.loss[i] * weight[i]
            if beta != 0:
                estimate = kl_estimator(log_probs[b, t], ref_log_probs[b, t])
                kl[b][t] = estimate * r[i] if use_bias_correction_kl and surrogate is not _gmpo else estimate
        ratios.append(r)
        drift += [-_clamp(x, *(bounds if level != "sequence_token" else (None, None))) for x in rho]
        if found.held is not None:
            held = list(zip(found.held, tokens, strict=True))
            below.append([float(x < found.low and t.A < 0) for x, t in held])
            above.append([float(x > found.high and t.A > 0) for x, t in held])
            beyond.append([float(dual_clip is not None and x > dual_clip and t.A < 0) for x, t in held])
            held_by = zip(row, below[-1], above[-1], beyond[-1], strict=True)
            free += [(b, t) for t, *clipped in held_by if not any(clipped)]

    if loss_type == "clip_cov":  # the first candidates among all places in a random order
        places = [divmod(n, mask.shape[1]) for n in torch.randperm(mask.numel(), generator=generator).tolist()]
        drawn = [place for place in places if place in free and clip_cov_lb < covariances[place] < clip_cov_ub]
        drawn = drawn[: max(int(len(covariances) * clip_cov_ratio), 1)]
        for b, t in drawn:
            loss[b][t] = zero

    def table(rows: list) -> Tensor:
        return torch.stack([torch.stack(row) for row in rows])

    total = aggregate(table(loss), mask, aggregation, **counts)
    total = total + beta * aggregate(table(kl), mask, kl_aggregation or aggregation, **counts)
    if entropy_coef:
        if entropy_aggregation is None:
            bonus = aggregate(entropy, mask * keep)
        else:
            bonus = aggregate(torch.where(keep, entropy, zero), mask, entropy_aggregation, **counts)
        total = total - entropy_coef * bonus

    one_ratio = level in ("sequence", "sequence_sum")
    metrics = {"ratio_mean": _average(ratios, one_ratio), "ppo_kl": mean_of(drift)}
    if beta != 0:
        metrics["kl"] = mean_of([kl[b][t] for b, row in enumerate(rows) for t in row])
    if entropy is not None:
        metrics["entropy"] = mean_of([entropy[b, t] for b, row in enumerate(rows) for t in row])
    if surrogate in (_clip, _gmpo, _cispo, _dppo_tv, _dppo_kl):
        one_each = one_ratio and surrogate is not _gmpo and (advantages.dim() == 1 or advantages.shape[1] == 1)
        if one_each and counts.get("count_empty", True):  # a sequence without tokens counts as one that no clip holds
            for clips in (below, above, beyond):
                clips += [[0.0]] * (len(rows) - len(clips))
        metrics |= _clip_ratios(below, above, one_each)
        if surrogate is _clip and dual_clip is not None:
            metrics["clip_ratio/dual_mean"] = _average(beyond, one_each)
    if loss_type == "clip_cov":
        metrics["clip_ratio/cov_mean"] = len(drawn) / max(len(covariances), 1)
    return total, {name: float(torch.as_tensor(x).detach()) for name, x in metrics.items()}


def ppo_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, dict[str, float]]:
    """Σ m max(−rA, −clip(r)A) / Σ m."""
    return grpo_loss(log_probs, old_log_probs, advantages, mask, loss_type="ppo", **options)


def value_loss(
    values: Tensor,
    old_values: Any,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip_eps: float | None = None,
    aggregation: str = "token_mean",
    **counts: Any,
) -> tuple[Tensor, dict[str, float]]:
    """½ max((v_c − R)², (v − R)²), v_c = clamp(v, old_v − clip_eps, old_v + clip_eps)."""
    mask = torch.ones_like(values) if mask is None else mask
    loss, held = [[values.new_zeros(())] * mask.shape[1] for _ in mask], []
    for b, row in enumerate(tokens_of(mask)):
        for t in row:
            error = (values[b, t] - returns[b, t]) ** 2
            if clip_eps is not None:
                clipped = _clamp(values[b, t], old_values[b, t] - clip_eps, old_values[b, t] + clip_eps)
                clipped = (clipped - returns[b, t]) ** 2
                held.append(float(clipped > error))
                error = clipped if clipped > error else error
            loss[b][t] = error / 2
    return aggregate(torch.stack([torch.stack(row) for row in loss]), mask, aggregation, **counts), {
        "clip_ratio": mean_of(held)
    }


def a2po_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 1e-3,
    **counts: Any,
) -> tuple[Tensor, dict[str, float]]:
    """(β Σ_t (log π − log π_ref) − A)², averaged over sequences."""
    mask = torch.ones_like(log_probs) if mask is None else mask
    implicit = []
    for b, row in enumerate(tokens_of(mask)):
        implicit.append(beta * sum((log_probs[b, t] - ref_log_probs[b, t] for t in row), log_probs.new_zeros(())))
    losses = torch.stack([(reward - A) ** 2 for reward, A in zip(implicit, advantages, strict=True)])
    metrics = {"implicit_reward": mean_of([x.item() for x in implicit]), "advantage": float(advantages.mean())}
    return aggregate(losses[:, None], torch.ones_like(losses[:, None]), "seq_mean_token_sum", **counts), metrics

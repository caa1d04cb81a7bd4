"""Policy losses, sequence by sequence and token by token.

Throughout, ρ = logp − old of a token and r = exp(ρ); a sequence's tokens are those its mask shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .aggregation import aggregate, mean_of, tokens_of
from .kl import kl_estimate
from .rollouts import at, entropy_mask, off_policy_mask

LEVELS = {"gspo": "sequence", "gspo-token": "sequence_token", "rloo": "sequence_sum"}  # else "token"
AGGREGATIONS = {  # else "seq_mean_token_mean"
    **dict.fromkeys(("bnpo", "ppo", "dapo", "cispo", "vespo", "gpg", "dro"), "token_mean"),
    **dict.fromkeys(("dppo_tv", "dppo_kl", "kl_cov", "clip_cov"), "token_mean"),
    **dict.fromkeys(("luspo", "reinforce"), "seq_mean_token_sum"),
    "dr_grpo": "seq_mean_token_sum_norm",
}


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Beyond a bound a constant: its gradient is 0."""
    if low is not None and x < low:
        return torch.full_like(x, low)
    if high is not None and x > high:
        return torch.full_like(x, high)
    return x


def _ratio(rho: list, logp: list[Tensor], level: str, bounds: tuple[float | None, float | None]) -> list[Tensor]:
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


def _clipped(r: Tensor, a: Tensor, low: float, high: float, delta: float | None, dual_clip: float | None) -> Tensor:
    """−min(min(r, δ)A, clip(r)A): for A > 0 the ratio is bounded above; for A < 0 below, by δ or c also above."""
    if a >= 0:
        return -a * _clamp(r, None, high if delta is None else min(delta, high))
    r = _clamp(r, low, None if delta is None else max(delta, high))
    return -a * _clamp(r, None, dual_clip)


def _vespo(
    logp: list[Tensor], rho: list[Tensor], a: list[Tensor], weight: list[float] | float | None, k_lambda: list
) -> list[Tensor]:
    """−φ A logp, φ = exp(λ + k s − λ e^s), s = Σ ρ of the sequence, plus the log of its mismatch weight."""

    def log_weight(x: float) -> float:
        return math.log(min(max(x, 1e-8), math.exp(20)))

    total = sum(min(max(x.item(), -20.0), 20.0) for x in rho)
    if isinstance(weight, list):
        total += sum(log_weight(x) for x in weight)
    elif weight is not None:
        total += log_weight(weight)
    total = min(max(total, math.log(1e-8)), 20.0)
    losses = []
    for x, advantage in zip(logp, a, strict=True):
        k, lam = k_lambda[0] if advantage >= 0 else k_lambda[1]
        lam = max(lam, 1e-4)
        losses.append(-math.exp(lam + k * total - lam * math.exp(total)) * advantage * x)
    return losses


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
    aggregation = aggregation or AGGREGATIONS.get(loss_type, "seq_mean_token_mean")
    level = importance_sampling_level or LEVELS.get(loss_type, "token")
    bounds = log_ratio_clamp or (None, None)
    low, high = 1 - eps_low, 1 + eps_high

    mask = torch.ones_like(log_probs) if mask is None else mask
    rows = tokens_of(mask)
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    keep = mask != 0 if top_entropy_quantile == 1 else entropy_mask(entropy, top_entropy_quantile, mask)
    worth = torch.ones_like(keep)
    if off_policy_mask_threshold is not None:
        sampling = old if rollout_log_probs is None else rollout_log_probs
        worth = off_policy_mask(log_probs, sampling, advantages, off_policy_mask_threshold, mask)

    tokens = [(b, t) for b, row in enumerate(rows) for t in row]
    mean_a = mean_of([at(advantages, b, t).item() for b, t in tokens])
    mean_logp = mean_of([log_probs[b, t].item() for b, t in tokens])

    def covariance(token: tuple[int, int]) -> float:
        return (at(advantages, *token).item() - mean_a) * (log_probs[token].item() - mean_logp)

    penalised = sorted(tokens, key=covariance, reverse=True)[: max(int(len(tokens) * kl_cov_ratio), 1)]

    zero = log_probs.new_zeros(())
    loss = [[zero] * mask.shape[1] for _ in rows]
    kl = [[zero] * mask.shape[1] for _ in rows]
    ratios, low_clips, high_clips, dual_clips, drift, free = [], [], [], [], [], []
    for b, row in enumerate(rows):
        logp = [log_probs[b, t] for t in row]
        rho = [log_probs[b, t] - old[b, t] for t in row]
        a = [at(advantages, b, t) for t in row]
        r = _ratio(rho, logp, level, bounds) if row else []
        weight = [1.0 if mismatch_weight is None else at(mismatch_weight, b, t).item() for t in row]
        held: list[Any] = r
        lower, upper = low, high

        if loss_type == "cispo":
            lower, upper = (low, high) if cispo_max is None else (-math.inf, cispo_max)
            policy = [-_clamp(r[i], lower, upper).detach() * a[i] * logp[i] for i in range(len(row))]
        elif loss_type == "sapo":
            policy = []
            for i in range(len(row)):
                tau = sapo_temperature_pos if a[i] > 0 else sapo_temperature_neg
                policy.append(-4 / tau / (1 + torch.exp(-tau * (r[i] - 1))) * a[i])
        elif loss_type == "vespo":
            given: Any = weight if mismatch_weight is not None else None
            if mismatch_weight is not None and (mismatch_weight.dim() == 1 or mismatch_weight.shape[1] == 1):
                given = mismatch_weight[b].item()
            policy = _vespo(logp, rho, a, given, [vespo_pos, vespo_neg])
            weight = [1.0] * len(row)
        elif loss_type == "gmpo":
            held, lower, upper = [_clamp(x, *bounds) for x in rho], -eps_low, eps_high
            c = []
            for x, advantage in zip(held, a, strict=True):
                bound = _clamp(x, None, eps_high) if advantage > 0 else _clamp(x, -eps_low, None)
                c.append(bound if advantage != 0 else torch.zeros_like(x))
            mean = mean_of([x for x, t in zip(c, row, strict=True) if keep[b, t]])
            policy = [-advantage * torch.exp(torch.as_tensor(mean)) for advantage in a]
            if mismatch_weight is not None and mismatch_weight.dim() == 2 and mismatch_weight.shape[1] > 1:
                weight = [math.exp(mean_of([math.log(x + 1e-10) for x in weight]))] * len(row)
        elif loss_type in ("dppo_tv", "dppo_kl"):
            # How far the token's coin moved towards where the advantage pulls it, against the bound on that side.
            lower, upper = -eps_low, eps_high
            held, policy = [], []
            for i, t in enumerate(row):
                p, q = math.exp(logp[i].item()), math.exp(old[b, t].item())
                moved = abs(p - q)
                if loss_type == "dppo_kl":
                    not_p, not_q = max(1 - p, 0), max(1 - q, 0)
                    moved = q * math.log(q / p) + not_q * math.log((not_q + 1e-8) / (not_p + 1e-8))
                held.append(moved if p > q else -moved)
                too_far = (p > q and moved > eps_high) if a[i] > 0 else (p < q and moved > eps_low)
                weight_of_it = 0.0 if too_far else _clamp(r[i].detach(), None, delta)
                policy.append(-weight_of_it * a[i] * logp[i])
        elif loss_type == "dro":
            policy = [dro_beta * _clamp(rho[i], *bounds) ** 2 / 2 - a[i] * logp[i] for i in range(len(row))]
        elif loss_type == "kl_cov":
            policy = [-r[i] * a[i] for i in range(len(row))]
            for i, t in enumerate(row):
                if (b, t) in penalised:
                    policy[i] = policy[i] + kl_cov_coef * r[i].log().abs()
        elif loss_type in ("reinforce", "gpg"):
            policy = [-advantage * x for advantage, x in zip(a, logp, strict=True)]
        else:
            held = [_clamp(x, None, delta) for x in r]
            policy = [_clipped(r[i], a[i], low, high, delta, dual_clip) for i in range(len(row))]

        for i, t in enumerate(row):
            if worth[b, t] and (keep[b, t] or loss_type == "gmpo"):
                loss[b][t] = policy[i] * weight[i]
            if beta != 0:
                estimate = kl_estimator(log_probs[b, t], ref_log_probs[b, t])
                kl[b][t] = estimate * r[i] if use_bias_correction_kl and loss_type != "gmpo" else estimate
        if row:
            ratios.append(r)
            drift += [-_clamp(x, *(bounds if level != "sequence_token" else (None, None))) for x in rho]
            low_clips.append([float(x < lower and y < 0) for x, y in zip(held, a, strict=True)])
            high_clips.append([float(x > upper and y > 0) for x, y in zip(held, a, strict=True)])
            dual_clips.append(
                [float(dual_clip is not None and x > dual_clip and y < 0) for x, y in zip(held, a, strict=True)]
            )
            clipped = zip(low_clips[-1], high_clips[-1], dual_clips[-1], strict=True)
            free += [(b, t) for t, clips in zip(row, clipped, strict=True) if not any(clips)]

    if loss_type == "clip_cov":  # all places in a random order, of which the first that are candidates
        places = [divmod(n, mask.shape[1]) for n in torch.randperm(mask.numel(), generator=generator).tolist()]
        drawn = [place for place in places if place in free and clip_cov_lb < covariance(place) < clip_cov_ub]
        drawn = drawn[: max(int(len(tokens) * clip_cov_ratio), 1)]
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

    def flat(lists: list[list]) -> list:
        return [x for each in lists for x in each]

    one_ratio = level in ("sequence", "sequence_sum")
    one_each = one_ratio and loss_type != "gmpo" and (advantages.dim() == 1 or advantages.shape[1] == 1)

    def average(lists: list[list], per_sequence: bool = one_each) -> Tensor | float:
        return mean_of([mean_of(x) for x in lists]) if per_sequence else mean_of(flat(lists))

    if one_each and counts.get("count_empty", True):  # a sequence without tokens is one that no clip holds
        for clips in (low_clips, high_clips, dual_clips):
            clips += [[0.0]] * (len(rows) - len(clips))
    metrics = {"ratio_mean": average(ratios, one_ratio), "ppo_kl": mean_of(drift)}
    if beta != 0:
        metrics["kl"] = mean_of([kl[b][t] for b, row in enumerate(rows) for t in row])
    if entropy is not None:
        metrics["entropy"] = mean_of([entropy[b, t] for b, row in enumerate(rows) for t in row])
    if loss_type not in ("sapo", "vespo", "reinforce", "gpg", "dro", "kl_cov"):
        metrics["clip_ratio/low_mean"] = average(low_clips)
        metrics["clip_ratio/high_mean"] = average(high_clips)
        metrics["clip_ratio/region_mean"] = average(low_clips) + average(high_clips)
        metrics["clip_ratio/low_min"] = min((mean_of(x) for x in low_clips), default=math.nan)
        metrics["clip_ratio/high_max"] = max((mean_of(x) for x in high_clips), default=math.nan)
        if loss_type not in ("cispo", "gmpo", "dppo_tv", "dppo_kl") and dual_clip is not None:
            metrics["clip_ratio/dual_mean"] = average(dual_clips)
    if loss_type == "clip_cov":
        metrics["clip_ratio/cov_mean"] = len(drawn) / max(len(tokens), 1)
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
    """(β Σ_t (log π − log π_ref) − A)², a mean over sequences."""
    mask = torch.ones_like(log_probs) if mask is None else mask
    implicit = []
    for b, row in enumerate(tokens_of(mask)):
        implicit.append(beta * sum((log_probs[b, t] - ref_log_probs[b, t] for t in row), log_probs.new_zeros(())))
    losses = torch.stack([(reward - A) ** 2 for reward, A in zip(implicit, advantages, strict=True)])
    metrics = {"implicit_reward": mean_of([x.item() for x in implicit]), "advantage": float(advantages.mean())}
    return aggregate(losses[:, None], torch.ones_like(losses[:, None]), "seq_mean_token_sum", **counts), metrics

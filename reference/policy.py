"""Policy losses, sequence by sequence and token by token.

Throughout, ρ = logp − old of a token and r = exp(ρ); a sequence's tokens are those its mask shows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .kl import kl_estimate


def _tokens(mask: Tensor) -> list[list[int]]:
    return [[t for t in range(mask.shape[1]) if mask[b, t] != 0] for b in range(mask.shape[0])]


def _mean(numbers: list) -> Any:
    return sum(numbers) / max(len(numbers), 1)


def _at(x: Tensor, b: int, t: int) -> Tensor:
    """One per sequence, (B,) or (B, 1), or one per token, (B, S)."""
    return x[b] if x.dim() == 1 else x[b, t if x.shape[1] > 1 else 0]


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Beyond a bound a constant: its gradient is 0."""
    if low is not None and x < low:
        return torch.full_like(x, low)
    if high is not None and x > high:
        return torch.full_like(x, high)
    return x


def aggregate(
    loss: Tensor,
    mask: Tensor | None = None,
    aggregation: str = "token_mean",
    *,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    dp_size: int = 1,
    loss_scale_factor: float | None = None,
    count_empty: bool = True,
) -> Tensor:
    """token_mean Σ/Σn, token_sum Σ/c; seq_mean_token_mean mean(Σ/n), seq_mean_token_sum mean(Σ), …_norm mean(Σ)/c."""
    rows = _tokens(torch.ones_like(loss) if mask is None else mask)
    sums: Any = [sum((loss[b, t] for t in row), torch.zeros_like(loss[0, 0])) for b, row in enumerate(rows)]
    if aggregation == "token_sum":
        return sum(sums) / (loss_scale_factor or 1) * dp_size
    if aggregation == "token_mean":
        return sum(sums) / (batch_num_tokens or max(sum(map(len, rows)), 1)) * dp_size
    sequences = [b for b, row in enumerate(rows) if row or count_empty]
    if aggregation == "seq_mean_token_mean":
        total = sum(sums[b] / max(len(rows[b]), 1) for b in sequences)
    else:
        total = sum(sums[b] for b in sequences)
    if aggregation == "seq_mean_token_sum_norm":
        total = total / (loss_scale_factor or loss.shape[1])
    return total / (global_batch_size or max(len(sequences), 1)) * dp_size


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    scale: str = "group",
    weights: list[float] | None = None,
    leave_one_out: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """(R − mean of the group)/(std + eps); a group of one, and a sequence without a reward, get 0."""

    def moments(numbers: list[float]) -> tuple[float, float]:
        numbers = [x for x in numbers if not math.isnan(x)]
        if not numbers:
            return 0.0, 0.0
        mean = sum(numbers) / len(numbers)
        return mean, math.sqrt(sum((x - mean) ** 2 for x in numbers) / max(len(numbers) - 1, 1))

    table = [[x] if isinstance(x, float) else x for x in rewards.double().tolist()]  # B × K
    groups = [range(start, start + num_generations) for start in range(0, len(table), num_generations)]
    functions = range(len(table[0]))
    weights = weights or [1.0] * len(functions)
    scores = [row[:] for row in table]
    if scale == "normalize_then_sum":
        for group in groups:
            for k in functions:
                mean, std = moments([table[i][k] for i in group])
                for i in group:
                    scores[i][k] = (table[i][k] - mean) / (std + eps)
    total = []
    for row in scores:
        known = [weights[k] * row[k] for k in functions if not math.isnan(row[k])]
        total.append(sum(known) if known else math.nan)
    batch_mean, batch_std = moments(total)
    advantages = []
    for group in groups:
        mean, std = moments([total[i] for i in group])
        known = [total[i] for i in group if not math.isnan(total[i])]
        for i in group:
            if scale == "normalize_then_sum":
                advantage = (total[i] - batch_mean) / (batch_std + eps)
            elif leave_one_out and len(known) > 1:
                advantage = total[i] - (sum(known) - total[i]) / (len(known) - 1)
            else:
                advantage = total[i] - mean
            if scale in ("group", "batch"):
                advantage /= (std if scale == "group" else batch_std) + eps
            advantages.append(0.0 if math.isnan(advantage) else advantage)
    return torch.tensor(advantages, dtype=torch.float64)


def off_policy_mask(
    log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor, threshold: float, mask: Tensor | None = None
) -> Tensor:
    """(B, S): A ≥ 0, or the mean of sampling − logp over the sequence is at most the threshold (nan counts as 0)."""
    rows = _tokens(torch.ones_like(log_probs) if mask is None else mask)
    keep = torch.zeros_like(log_probs, dtype=torch.bool)
    for b, row in enumerate(rows):
        drifts = [(sampling_log_probs[b, t] - log_probs[b, t]).item() for t in row]
        drift = _mean([0.0 if math.isnan(x) else x for x in drifts])
        for t in range(log_probs.shape[1]):
            keep[b, t] = bool(_at(advantages, b, t) >= 0 or drift <= threshold)
    return keep


def entropy_mask(entropy: Tensor, top_entropy_quantile: float, mask: Tensor | None = None) -> Tensor:
    """(B, S): at least the quantile of all shown tokens, linear between neighbours."""
    rows = _tokens(torch.ones_like(entropy) if mask is None else mask)
    numbers = sorted(entropy[b, t].item() for b, row in enumerate(rows) for t in row)
    place = (1 - top_entropy_quantile) * (len(numbers) - 1)
    below = math.floor(place)
    above = min(below + 1, len(numbers) - 1)
    threshold = numbers[below] + (place - below) * (numbers[above] - numbers[below])
    keep = torch.zeros_like(entropy, dtype=torch.bool)
    for b, row in enumerate(rows):
        for t in row:
            keep[b, t] = entropy[b, t] >= threshold
    return keep


def mismatch_weight(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    mode: str = "truncate",
    gate: str = "ratio",
    low: float | None = None,
    high: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """e^x with x = old − rollout (nan → 0), or e^(Σx) per sequence: truncated to [low, high], or 0 where gated out."""
    rows = _tokens(torch.ones_like(old_log_probs) if mask is None else mask)
    weights = torch.zeros_like(old_log_probs, dtype=torch.float64)
    outside: list[float] = []
    divergence: list[float] = []
    for b, row in enumerate(rows):
        differences, statistics = [], []
        for t in row:
            old, rollout = old_log_probs[b, t].item(), rollout_log_probs[b, t].item()
            rollout = old if math.isnan(rollout) else rollout
            differences.append(old - rollout)
            p, q = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (rollout, old))
            if gate == "ratio":
                statistics.append(differences[-1])
            elif gate == "tv":
                statistics.append(abs(p - q))
            else:
                statistics.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        divergence += [-x for x in differences]
        if level == "sequence_sum":
            differences = statistics = [sum(differences)] * len(row)
        elif level == "sequence_mean":
            statistics = [_mean(statistics)] * len(row)
        if gate == "ratio":
            statistics = [math.exp(x) for x in statistics]
        out = [(low is not None and x < low) or (high is not None and x > high) for x in statistics]
        outside += out if level == "token" else out[:1]
        for t, x, is_out in zip(row, differences, out, strict=True):
            weight = math.exp(x)
            if mode == "mask":
                weights[b, t] = 0.0 if is_out else weight
            else:
                weights[b, t] = min(
                    max(weight, low if low is not None else 0.0), high if high is not None else math.inf
                )
    return weights, {"mismatch_kl": _mean(divergence), "filter_fraction": _mean(outside)}


def _ratio(rho: list, logp: list[Tensor], level: str, bounds: tuple[float | None, float | None]) -> list[Tensor]:
    """r at each token of one sequence."""
    if level == "sequence_token":
        mean = _mean([x.detach() for x in rho])
        return [_clamp(mean + x - x.detach(), *bounds).exp() for x in logp]
    rho = [_clamp(x, *bounds) for x in rho]
    if level == "sequence":
        return [torch.exp(_mean(rho))] * len(rho)
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
    default_aggregation = {
        "bnpo": "token_mean",
        "ppo": "token_mean",
        "dapo": "token_mean",
        "cispo": "token_mean",
        "vespo": "token_mean",
        "gpg": "token_mean",
        "dppo_tv": "token_mean",
        "dppo_kl": "token_mean",
        "dro": "token_mean",
        "kl_cov": "token_mean",
        "clip_cov": "token_mean",
        "dr_grpo": "seq_mean_token_sum_norm",
        "luspo": "seq_mean_token_sum",
        "reinforce": "seq_mean_token_sum",
    }.get(loss_type, "seq_mean_token_mean")
    level = importance_sampling_level or {
        "gspo": "sequence",
        "gspo-token": "sequence_token",
        "rloo": "sequence_sum",
    }.get(loss_type, "token")
    bounds = log_ratio_clamp or (None, None)
    low, high = 1 - eps_low, 1 + eps_high

    mask = torch.ones_like(log_probs) if mask is None else mask
    rows = _tokens(mask)
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    keep = mask != 0 if top_entropy_quantile == 1 else entropy_mask(entropy, top_entropy_quantile, mask)
    worth = torch.ones_like(keep)
    if off_policy_mask_threshold is not None:
        sampling = old if rollout_log_probs is None else rollout_log_probs
        worth = off_policy_mask(log_probs, sampling, advantages, off_policy_mask_threshold, mask)

    tokens = [(b, t) for b, row in enumerate(rows) for t in row]
    mean_a = _mean([_at(advantages, b, t).item() for b, t in tokens])
    mean_logp = _mean([log_probs[b, t].item() for b, t in tokens])

    def covariance(token: tuple[int, int]) -> float:
        return (_at(advantages, *token).item() - mean_a) * (log_probs[token].item() - mean_logp)

    penalised = sorted(tokens, key=covariance, reverse=True)[: max(int(len(tokens) * kl_cov_ratio), 1)]

    zero = log_probs.new_zeros(())
    loss = [[zero] * mask.shape[1] for _ in rows]
    kl = [[zero] * mask.shape[1] for _ in rows]
    ratios, low_clips, high_clips, dual_clips, drift, free = [], [], [], [], [], []
    for b, row in enumerate(rows):
        logp = [log_probs[b, t] for t in row]
        rho = [log_probs[b, t] - old[b, t] for t in row]
        a = [_at(advantages, b, t) for t in row]
        r = _ratio(rho, logp, level, bounds) if row else []
        weight = [1.0 if mismatch_weight is None else _at(mismatch_weight, b, t).item() for t in row]
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
            mean = _mean([x for x, t in zip(c, row, strict=True) if keep[b, t]])
            policy = [-advantage * torch.exp(torch.as_tensor(mean)) for advantage in a]
            if mismatch_weight is not None and mismatch_weight.dim() == 2 and mismatch_weight.shape[1] > 1:
                weight = [math.exp(_mean([math.log(x + 1e-10) for x in weight]))] * len(row)
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

    aggregation = aggregation or default_aggregation

    def table(rows: list) -> Tensor:
        return torch.stack([torch.stack(row) for row in rows])

    total = aggregate(table(loss), mask, aggregation, **counts)
    total = total + beta * aggregate(table(kl), mask, kl_aggregation or aggregation, **counts)
    if entropy_coef:
        shown = mask * keep
        local = {} if entropy_aggregation is None else counts
        total = total - entropy_coef * aggregate(entropy, shown, entropy_aggregation or "token_mean", **local)

    def flat(lists: list[list]) -> list:
        return [x for each in lists for x in each]

    one_ratio = level in ("sequence", "sequence_sum")
    one_each = one_ratio and loss_type != "gmpo" and (advantages.dim() == 1 or advantages.shape[1] == 1)

    def average(lists: list[list], per_sequence: bool = one_each) -> Tensor | float:
        return _mean([_mean(x) for x in lists]) if per_sequence else _mean(flat(lists))

    if one_each and counts.get("count_empty", True):  # a sequence without tokens is one that no clip holds
        for clips in (low_clips, high_clips, dual_clips):
            clips += [[0.0]] * (len(rows) - len(clips))
    metrics = {"ratio_mean": average(ratios, one_ratio), "ppo_kl": _mean(drift)}
    if beta != 0:
        metrics["kl"] = _mean([kl[b][t] for b, row in enumerate(rows) for t in row])
    if entropy is not None:
        metrics["entropy"] = _mean([entropy[b, t] for b, row in enumerate(rows) for t in row])
    if loss_type not in ("sapo", "vespo", "reinforce", "gpg", "dro", "kl_cov"):
        metrics["clip_ratio/low_mean"] = average(low_clips)
        metrics["clip_ratio/high_mean"] = average(high_clips)
        metrics["clip_ratio/region_mean"] = average(low_clips) + average(high_clips)
        metrics["clip_ratio/low_min"] = min((_mean(x) for x in low_clips), default=1.0)
        metrics["clip_ratio/high_max"] = max((_mean(x) for x in high_clips), default=0.0)
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
    """½ max((v_c − R)², (v − R)²), v_c = old_v + clamp(v − old_v, ±clip_eps)."""
    mask = torch.ones_like(values) if mask is None else mask
    loss, held = [[values.new_zeros(())] * mask.shape[1] for _ in mask], []
    for b, row in enumerate(_tokens(mask)):
        for t in row:
            error = (values[b, t] - returns[b, t]) ** 2
            if clip_eps is not None:
                clipped = old_values[b, t] + _clamp(values[b, t] - old_values[b, t], -clip_eps, clip_eps)
                clipped = (clipped - returns[b, t]) ** 2
                held.append(float(clipped > error))
                error = clipped if clipped > error else error
            loss[b][t] = error / 2
    return aggregate(torch.stack([torch.stack(row) for row in loss]), mask, aggregation, **counts), {
        "clip_ratio": _mean(held)
    }

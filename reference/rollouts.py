"""Advantages, masks and weights of sampled sequences, sequence by sequence and token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .aggregation import mean_of, tokens_of


def at(x: Tensor, b: int, t: int) -> Tensor:
    """The entry for token (b, t): ``x`` has one per sequence, (B,) or (B, 1), or one per token, (B, S)."""
    return x[b] if x.dim() == 1 else x[b, t if x.shape[1] > 1 else 0]


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


def optimal_values(rewards: Tensor, num_generations: int, *, beta: float = 0.5) -> Tensor:
    """V* = β log of the group's mean of exp(R/β)."""
    groups = rewards.double().split(num_generations)
    return torch.stack([beta * torch.log(torch.exp(group / beta).mean()) for group in groups])


def off_policy_mask(
    log_probs: Tensor, sampling_log_probs: Tensor, advantages: Tensor, threshold: float, mask: Tensor | None = None
) -> Tensor:
    """(B, S): A ≥ 0, or the mean of sampling − logp over the sequence is at most the threshold (nan counts as 0)."""
    rows = tokens_of(torch.ones_like(log_probs) if mask is None else mask)
    keep = torch.zeros_like(log_probs, dtype=torch.bool)
    for b, row in enumerate(rows):
        drifts = [(sampling_log_probs[b, t] - log_probs[b, t]).item() for t in row]
        drift = mean_of([0.0 if math.isnan(x) else x for x in drifts])
        for t in range(log_probs.shape[1]):
            keep[b, t] = bool(at(advantages, b, t) >= 0 or drift <= threshold)
    return keep


def entropy_mask(entropy: Tensor, top_entropy_quantile: float, mask: Tensor | None = None) -> Tensor:
    """(B, S): whether the entropy reaches the quantile over all unmasked tokens, linear between neighbours."""
    rows = tokens_of(torch.ones_like(entropy) if mask is None else mask)
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
    """e^x with x = old − rollout (nan → 0), or e^(Σx) per sequence: truncated to [low, high], or 0 where the gate rejects."""
    rows = tokens_of(torch.ones_like(old_log_probs) if mask is None else mask)
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
            statistics = [mean_of(statistics)] * len(row)
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
    return weights, {"mismatch_kl": mean_of(divergence), "filter_fraction": mean_of(outside)}

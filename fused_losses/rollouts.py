"""Sampled sequences before the loss: how much better than expected each was, which tokens train, and with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, nan
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .numerics import check_between, check_choice, on_device, upcast, wide_dtype
from .sequences import Sequences, same_shape
from .sharded_weight import is_distributed


def _nanstd(x: Tensor) -> Tensor:
    """Unbiased standard deviation along dimension 1, over the numbers that are not nan; 0 for a single number."""
    deviation = (x - x.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (deviation / ((~x.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    scale: Literal["group", "batch", "none", "normalize_then_sum"] = "group",
    weights: Sequence[float] | Tensor | None = None,
    leave_one_out: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantages of sequences sampled from the same prompt: how much better than its siblings each one was.

    .. math:: A = \frac{R - \mathrm{mean}_{group} R}{\mathrm{std} R + \epsilon}

    with the unbiased std of the group, of the whole batch, or none. ``normalize_then_sum`` (GDPO) normalises each reward
    function by its mean and std in the group, sums the functions, and normalises the sum by its mean and std in the batch.
    nan rewards (a function that does not apply) are left out of sums, means and stds; a sequence without any reward gets
    0, as does a group of one.

    Source: GRPO (2402.03300), Dr. GRPO (2503.20783) ``scale="none"``, RLOO (2402.14740) ``leave_one_out``, GDPO
    (2601.05242); TRL 1.16's ``scale_rewards`` (True is ``group``, False is ``none``) and ``multi_objective_aggregation``.

    Args:
        rewards: ``(B,)``, or ``(B, K)`` of K reward functions; the ``num_generations`` siblings are adjacent.
        num_generations: sequences per prompt; divides B.
        scale: ``"group"`` (default), ``"batch"``, ``"none"`` or ``"normalize_then_sum"``.
        weights: ``(K,)``, one per reward function; ``None``: all 1.
        leave_one_out: the mean of the *other* siblings instead of all of them, i.e. :math:`R - \mathrm{mean}` times
            :math:`G/(G-1)`. RLOO has ``scale="none"``; not with ``normalize_then_sum``.
        eps: added to the std. Default 1e-4, TRL's; verl has 1e-6, OpenRLHF 1e-9.

    Returns:
        ``(B,)``, fp32 (float64 for float64).

    Raises:
        ValueError: B is not a multiple of ``num_generations``, ``weights`` are not ``(K,)``, or an unknown ``scale``.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), 2, scale="none")
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    check_choice(("group", "batch", "none", "normalize_then_sum"), scale=scale)
    if scale == "normalize_then_sum" and leave_one_out:
        raise ValueError("leave_one_out is about the mean of a group, which normalize_then_sum takes before the sum")
    if rewards.dim() not in (1, 2) or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(f"rewards must be (B,) or (B, K) in groups of {num_generations}, got {tuple(rewards.shape)}")
    rewards = upcast(rewards if rewards.dim() == 2 else rewards.unsqueeze(1))
    dtype = rewards.dtype
    # In fp32 equal rewards may differ from their mean, by more than eps.
    rewards = rewards.to(wide_dtype(rewards.device))
    rewards = rewards.unflatten(0, (len(rewards) // num_generations, num_generations))  # (groups, G, K)
    unscored = rewards.isnan().all(-1)
    if scale == "normalize_then_sum":
        rewards = (rewards - rewards.nanmean(1, keepdim=True)) / (_nanstd(rewards) + eps)
    if weights is not None:
        listed = (len(weights),) if isinstance(weights, Sequence) else ()  # a number has neither shape nor length
        given = tuple(getattr(weights, "shape", listed))
        if given != rewards.shape[-1:]:
            raise ValueError(f"weights must be one per reward function {tuple(rewards.shape[-1:])}, got {given}")
        weights = torch.stack([on_device(w, rewards.device, rewards.dtype) for w in weights])
        rewards = rewards * weights
    total = rewards.nansum(-1).masked_fill(unscored, nan)  # (groups, G)
    batch_std = _nanstd(total.view(1, -1))
    if scale == "normalize_then_sum":
        advantages = (total - total.nanmean()) / (batch_std + eps)
    else:
        advantages = total - total.nanmean(1, keepdim=True)
        if leave_one_out:
            siblings = (~total.isnan()).sum(1, keepdim=True)
            advantages = advantages * siblings / (siblings - 1).clamp(min=1)
        if scale != "none":
            advantages = advantages / ((_nanstd(total) if scale == "group" else batch_std) + eps)
    return advantages.masked_fill(advantages.isnan(), 0).flatten().to(dtype)


def optimal_values(rewards: Tensor, num_generations: int, *, beta: float = 0.5) -> Tensor:
    r"""What a prompt is worth to the best policy near the reference, estimated from answers that the reference sampled.

    .. math:: V^* = \beta \log \mathrm{mean}_{group}\, e^{R/\beta}

    Source: Brantley et al., "A*-PO" (2505.20686); TRL 1.16's ``A2POTrainer``, whose ``beta1`` this is.

    Args:
        rewards: ``(B,)``; the ``num_generations`` answers to a prompt are adjacent.
        num_generations: answers per prompt; divides B.
        beta: how close the best policy stays to the reference: near 0 the value is the largest reward, far from 0 their mean.

    Returns:
        ``(B / num_generations,)``, fp32 (float64 for float64).

    Raises:
        ValueError: B is not a multiple of ``num_generations``, or ``beta`` is not positive.

    Example:
        >>> optimal_values(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2)
        tensor([0.7169, 0.0000])
    """
    if rewards.dim() != 1 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(f"rewards must be (B,) in groups of {num_generations}, got {tuple(rewards.shape)}")
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    scaled = upcast(rewards).unflatten(0, (len(rewards) // num_generations, num_generations)) / beta
    return beta * (scaled.logsumexp(1) - log(num_generations))


def off_policy_mask(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantages: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Keep a sequence that was worth sampling, or from which the policy has not moved far since.

    .. math:: A \ge 0 \;\lor\; \mathrm{mean}_t(\log\pi_{sampling} - \log\pi) \le threshold

    Source: DeepSeek-V3.2 (2512.02556); TRL 1.16 ``off_policy_mask_threshold``.

    Args:
        log_probs: ``(B, S)`` of the policy, or packed ``(1, total)``.
        sampling_log_probs: the same under the policy that sampled the tokens: the inference engine's where it is known,
            else the old policy's. nan (a token that was not scored) counts as no difference.
        advantages: ``(B,)`` or ``(B, S)``.
        threshold: in nats per token.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all.
        cu_seqlens: ``(n + 1,)``, the borders of a packed row's sequences.

    Returns:
        bool, ``(B, 1)``, or a tensor per token for advantages per token or packed rows.

    Example:
        >>> old, new = torch.tensor([[-1.0], [-1.0], [-1.0]]), torch.tensor([[-3.0], [-3.0], [-1.1]])
        >>> off_policy_mask(new, old, torch.tensor([1.0, -1.0, -1.0]), threshold=0.5).squeeze(1)
        tensor([ True, False,  True])
    """
    sequences = Sequences("log_probs", log_probs, mask, cu_seqlens)
    drift = sequences.hide("sampling_log_probs", sampling_log_probs.detach()) - sequences.hide(
        "log_probs", log_probs.detach()
    )
    drift = sequences.mean(drift.masked_fill(drift.isnan(), 0))
    return (sequences.spread(sequences.constant("advantages", advantages)) >= 0) | sequences.spread(drift <= threshold)


def entropy_mask(
    entropy: Tensor, top_entropy_quantile: float, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Keep the tokens where the policy was least certain: the given share of them, over all ranks.

    Source: "Beyond the 80/20 rule" (2506.01939); TRL 1.16 ``top_entropy_quantile``.

    Args:
        entropy: ``(B, S)`` per token, nats.
        top_entropy_quantile: the share to keep, 0 to 1: 0.2 keeps the fifth with the highest entropy.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all.
        group: the ranks over whose tokens the quantile is taken; ``None``: all, where ``torch.distributed`` runs.
            Several ranks exchange their numbers of tokens, which waits for the device.

    Returns:
        bool ``(B, S)``, False where masked.

    Example:
        >>> entropy_mask(torch.tensor([[0.1, 2.0, 0.5, 1.0]]), 0.5)
        tensor([[False,  True, False,  True]])
    """
    check_between(0, 1, top_entropy_quantile=top_entropy_quantile)
    same_shape(entropy=entropy, mask=mask)
    shown = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask != 0
    entropy = upcast(entropy.detach())
    values = F.pad(entropy.masked_fill(~shown, nan).flatten(), (0, 1), value=nan)  # never empty
    if is_distributed() and dist.get_world_size(group) > 1:
        longest = on_device(len(values), values.device, torch.int64)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group)  # torch.compile traces no collective of objects
        values = F.pad(values, (0, int(longest) - len(values)), value=nan)
        everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, values, group)
        values = torch.cat(everyone)
    # torch.nanquantile by hand, as older versions of torch.compile do not trace it: interpolate the values around the rank.
    rank = (1 - top_entropy_quantile) * ((~values.isnan()).sum() - 1).clamp(min=0).to(wide_dtype(values.device))
    around = torch.stack([rank.floor(), rank.ceil()]).long()
    low, high = values.sort().values.gather(0, around)  # nan sorts last
    return (entropy >= torch.lerp(low, high, (rank - rank.floor()).to(low.dtype))) & shown


def mismatch_weight(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    level: Literal["token", "sequence_sum", "sequence_mean"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    gate: Literal["ratio", "binary_kl", "tv"] = "ratio",
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Importance weight that corrects for an inference engine whose probabilities differ from the trainer's.

    .. math:: \pi_{old} / \pi_{rollout}

    A statistic is kept within ``[low, high]``: the weight itself is truncated, or a weight whose statistic is outside is 0.

    ====================================================  ==============================================================
    elsewhere                                             here
    ====================================================  ==============================================================
    TRL ``token_truncate``, ``token_mask``                ``level="token"``, ``mode="truncate"`` or ``"mask"``
    TRL ``sequence_truncate``, ``sequence_mask``          ``level="sequence_sum"``, the same two modes
    verl ``rollout_is="token"``, ``"sequence"``           ``level="token"``, ``"sequence_sum"`` with ``high`` alone; its
                                                          ``"low_high"`` thresholds are ``mode="mask"``
    verl ``rollout_is_batch_normalize``                   ``weight / masked_mean(weight, mask).clamp(min=1e-8)``, of a
                                                          weight ``(B,)`` with ``mask.sum(-1)``; verl takes the mean over
                                                          all ranks
    OpenRLHF ``is_correction_level="token"``              ``level="token"``, mode ``clip`` is ``"truncate"``
    OpenRLHF ``is_correction_level="seq"``                ``level="sequence_mean", mode="mask"``
    OpenRLHF ``is_correction_gating``                     ``gate``
    OpenRLHF ``gspo`` with a correction                   no weight: pass the rollout as ``old_log_probs``
    ====================================================  ==============================================================

    Source: TRL 1.16 ``vllm_importance_sampling_mode``; verl 0.9 ``rollout_is``; OpenRLHF 0.11 ``is_correction_*``.

    Args:
        old_log_probs: ``(B, S)`` under the old policy, computed by the trainer; or packed ``(1, total)``.
        rollout_log_probs: the same as the inference engine reported them. nan (not scored) counts as equal to the old.
        mask: ``(B, S)``, nonzero for the tokens that count; ``None``: all.
        level: what the statistic is of: a ``"token"``, the whole sequence (``"sequence_sum"``: the product of its token
            ratios, which is then also the weight), or its tokens' average (``"sequence_mean"``: the geometric mean
            decides, the weights stay per token).
        mode: ``"truncate"`` or ``"mask"``.
        gate: which statistic: the ``"ratio"``, or with ``mode="mask"`` the divergence between the two
            probabilities of the sampled token: the binary KL (``"binary_kl"``) or the absolute difference (``"tv"``).
        low, high: the bounds; ``None``: no bound. Exponents are kept within ±20 in any case.
        cu_seqlens: ``(n + 1,)``, the borders of a packed row's sequences.

    Returns:
        The weight, detached, ``(B, S)``, for ``"sequence_sum"`` ``(B,)``; fp32 (float64 for float64); pass it as
        ``mismatch_weight``; and metrics: ``mismatch_kl``, the token mean of :math:`\log\pi_{rollout} - \log\pi_{old}`,
        and ``filter_fraction``, the share of tokens, or of sequences, outside the bounds.

    Raises:
        ValueError: a combination without meaning, or ``low`` above ``high``.

    Example:
        >>> old, rollout = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> mismatch_weight(old, rollout, high=2.0)[0]
        tensor([[1., 2.]])
        >>> mismatch_weight(old, rollout, mode="mask", high=2.0)[0]
        tensor([[1., 0.]])
    """
    check_choice(("token", "sequence_sum", "sequence_mean"), level=level)
    check_choice(("truncate", "mask"), mode=mode)
    check_choice(("ratio", "binary_kl", "tv"), gate=gate)
    no_truncation = gate != "ratio" or level == "sequence_mean"
    if (mode == "truncate" and no_truncation) or (gate != "ratio" and level == "sequence_sum"):
        raise ValueError(
            f"level={level!r}, mode={mode!r}, gate={gate!r} do not go together: only a ratio that is itself the weight "
            "can be truncated, and a divergence is a token's or a sequence_mean"
        )
    check_between(0, inf, high=high)
    check_between(-inf, inf if high is None else high, low=low)
    sequences = Sequences("old_log_probs", old_log_probs, mask, cu_seqlens)
    old = sequences.hide("old_log_probs", old_log_probs.detach())
    rollout = sequences.hide("rollout_log_probs", rollout_log_probs.detach())
    rollout = torch.where(rollout.isnan(), old, rollout)
    log_weight = old - rollout
    if level == "sequence_sum":
        log_weight = sequences.sum(log_weight)
    weight = log_weight.clamp(-20, 20).exp()
    if gate == "ratio":
        statistic = sequences.spread(sequences.mean(log_weight)).exp() if level == "sequence_mean" else weight
    else:
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        statistic = (p - q).abs() if gate == "tv" else p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if level == "sequence_mean":
            statistic = sequences.spread(sequences.mean(statistic))
    low, high = (-inf if low is None else low), (inf if high is None else high)
    outside = (statistic < low) | (statistic > high)
    weight = weight.clamp(low, high) if mode == "truncate" else weight.masked_fill(outside, 0)
    if level == "sequence_sum":
        outside = sequences.spread(outside)
    metrics = {
        "mismatch_kl": sequences.average(rollout - old),
        "filter_fraction": sequences.average(outside, per_sequence=level != "token"),
    }
    return weight, metrics

"""Losses of reward models, one pair and one token at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_sigmoid(x: Tensor) -> Tensor:
    r""":math:`\log\sigma(x) = -\log(1 + e^{-x})` of one number, in the form that does not overflow."""
    return -torch.log1p(torch.exp(-x)) if x > 0 else x - torch.log1p(torch.exp(x))


def pairwise_reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | float | None = None,
    *,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    r""":math:`\frac1B\sum_i -\log\sigma(c_i - r_i - m_i) + \lambda\,\frac1B\sum_i (c_i + r_i)^2`."""
    margins = torch.zeros_like(chosen_rewards) if margin is None else torch.zeros_like(chosen_rewards) + margin
    total = torch.zeros((), dtype=chosen_rewards.dtype)
    for c, r, m in zip(chosen_rewards.flatten(), rejected_rewards.flatten(), margins.flatten(), strict=True):
        total = total - log_sigmoid(c - r - m)
        if center_rewards_coefficient is not None:
            total = total + center_rewards_coefficient * (c + r) ** 2
    return total / chosen_rewards.numel()


def log_exp_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    r""":math:`\frac1B\sum_i \log(1 + e^{r_i - c_i})`."""
    pairs = zip(chosen_rewards, rejected_rewards, strict=True)
    return torch.stack([torch.log(1 + torch.exp(r - c)) for c, r in pairs]).mean()


def end_of(ids: list[int], pad_id: int, num_padding_at_beginning: int = 0, prompt_length: int = 0) -> int:
    """Index of pad number ``num_padding_at_beginning + 1`` (counted from ``prompt_length``), else the length."""
    pads = [t for t, token in enumerate(ids) if token == pad_id and t >= prompt_length]
    return pads[num_padding_at_beginning] if len(pads) > num_padding_at_beginning else len(ids)


def divergence_pairwise_loss(
    rewards: Tensor, input_ids: Tensor, pad_id: int, *, num_padding_at_beginning: int = 0
) -> dict[str, Tensor]:
    r"""For each pair the mean of :math:`-\log\sigma(c_t - r_t)` from the first differing id to the later end.

    Chosen rows come before rejected ones. Identical pairs compare the last column, with the chosen's end for both. The scores
    are the rewards at each side's own ``end − 1``, where −1 is the last column.
    """
    B, S = len(rewards) // 2, rewards.shape[1]
    losses, chosen_scores, rejected_scores = [], [], []
    for c, r, c_ids, r_ids in zip(
        rewards[:B], rewards[B:], input_ids[:B].tolist(), input_ids[B:].tolist(), strict=True
    ):
        c_end, r_end = (end_of(ids, pad_id, num_padding_at_beginning) for ids in (c_ids, r_ids))
        if c_ids == r_ids:
            start, end, r_end = S - 1, S, c_end
        else:
            start = next(t for t in range(S) if c_ids[t] != r_ids[t])
            end = max(c_end, r_end)
        if start == 0:
            raise ValueError("the sequences of a pair must share their first token")
        compared = [-log_sigmoid(c[t] - r[t]) for t in range(start, end)]
        losses.append(torch.stack(compared).mean() if compared else torch.tensor(math.nan, dtype=rewards.dtype))
        chosen_scores.append(c[c_end - 1])
        rejected_scores.append(r[r_end - 1])
    return {
        "loss": torch.stack(losses).mean(),
        "chosen_mean_scores": torch.stack(chosen_scores),
        "rejected_mean_scores": torch.stack(rejected_scores),
    }


def end_scores(values: Tensor, input_ids: Tensor, pad_id: int, prompt_length: int) -> Tensor:
    """For each row the value before the first pad at or after ``prompt_length``, else the last value."""
    ends = [end_of(ids, pad_id, prompt_length=prompt_length) for ids in input_ids.tolist()]
    return torch.stack([row[end - 1] for row, end in zip(values, ends, strict=True)])


def prm_loss(
    inputs: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    placeholder_token_id: int,
    reward_token_ids: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean over placeholder positions of :math:`-\sum_c q_c \log p_c`, and the share of them predicted correctly.

    ``p`` is the softmax over ``reward_token_ids`` (over the vocabulary without them). ``q`` is one-hot at a hard label
    and :math:`(q, 1-q)` over the two ids for a soft one. A label of −100 has no loss and counts as a wrong prediction.
    """
    losses, right, positions = [], 0, 0
    for b, t in (inputs == placeholder_token_id).nonzero().tolist():
        positions += 1
        label = labels[b, t].item()
        if label == -100:
            continue
        ids = list(range(logits.shape[-1])) if reward_token_ids is None else list(reward_token_ids)
        z = logits[b, t, ids]
        log_p = z - torch.logsumexp(z, 0)
        if labels.is_floating_point():
            q = [label, 1 - label]
        else:
            q = [1.0 if token == label else 0.0 for token in ids]
        losses.append(-sum(share * lp for share, lp in zip(q, log_p, strict=True)))
        right += int(z.argmax()) == q.index(max(q))
    loss = torch.stack(losses).mean() if losses else torch.tensor(math.nan, dtype=logits.dtype)
    return loss, torch.tensor(right / positions if positions else math.nan)

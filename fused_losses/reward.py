r"""Losses of reward models: which of two answers people prefer, and which steps of an answer are right.

Bradley–Terry: a human prefers answer :math:`w` to :math:`l` with probability :math:`\sigma(r_w - r_l)`, so the reward
model maximises :math:`\log\sigma(r_w - r_l)`. With one reward per answer that is :func:`pairwise_reward_loss`; with a
reward per token, compared wherever the two answers differ, :func:`divergence_pairwise_loss`. Only differences matter,
so the level of the rewards drifts unless ``center_rewards_coefficient`` holds it.

A process reward model has no head of its own: at each placeholder token it says, with the language model's own
vocabulary, whether the step before was right. :func:`prm_loss` computes those logits and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy import cross_entropy
from .linear_logits import LinearLogits
from .numerics import statistics_dtype, upcast
from .sequences import masked_sum, same_shape, split_pairs


def pairwise_reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | float | None = None,
    *,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    r"""Bradley–Terry loss of a reward model, by how much the chosen answer beats the rejected one.

    .. math:: L = \frac{1}{B}\sum_i -\log\sigma(r^w_i - r^l_i - m_i) + \frac{\lambda}{B}\sum_i (r^w_i + r^l_i)^2

    Source: Ouyang et al., "Training language models to follow instructions" (2022); margin: Touvron et al., "Llama 2"
    (2023); centering: Eisenstein et al., "Helping or Herding?" (2023). OpenRLHF's ``PairWiseLoss``, TRL 1.16's
    ``RewardTrainer``.

    Args:
        chosen_rewards: reward of each chosen answer, any shape.
        rejected_rewards: reward of each rejected answer, same shape.
        margin: :math:`m`, by how much the chosen answer should win, one number or a tensor that broadcasts to the
            rewards' shape; ``None`` is 0.
        center_rewards_coefficient: :math:`\lambda`; ``None`` leaves the term out.

    Returns:
        Scalar mean, fp32 (float64 for float64); nan over no pair.

    Raises:
        ValueError: the rewards' shapes differ, or the margin's does not fit.

    Example:
        >>> pairwise_reward_loss(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    chosen, rejected = upcast(chosen_rewards), upcast(rejected_rewards)
    advantage = chosen - rejected
    if margin is not None:
        if isinstance(margin, Tensor):
            try:
                margin = margin.expand_as(chosen)
            except RuntimeError:
                raise ValueError(
                    f"margin must broadcast to the rewards' shape {tuple(chosen.shape)}, got {tuple(margin.shape)}"
                ) from None
        advantage = advantage - margin
    loss = -F.logsigmoid(advantage).mean()
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square().mean()
    return loss


def log_exp_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | float | None = None) -> Tensor:
    r"""The pairwise loss as first written down; ``margin`` is accepted and ignored, as in OpenRLHF.

    .. math:: L = \frac{1}{B}\sum_i \log(1 + e^{r^l_i - r^w_i})

    This equals :func:`pairwise_reward_loss` without a margin and is computed as that, which does not overflow where the
    exponential would.

    Source: Bai et al., "Training a Helpful and Harmless Assistant" (2022); OpenRLHF's ``LogExpLoss``.

    Args:
        chosen_rewards: reward of each chosen answer, any shape.
        rejected_rewards: reward of each rejected answer, same shape.
        margin: ignored.

    Returns:
        Scalar mean, fp32 (float64 for float64).

    Example:
        >>> log_exp_loss(torch.tensor([0.0]), torch.tensor([200.0]))
        tensor(200.)
    """
    return pairwise_reward_loss(chosen_rewards, rejected_rewards)


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """What trainers log beside the loss: accuracy (the chosen reward strictly larger), margin, mean, min, max.

    Source: TRL 1.16's ``RewardTrainer``.

    Example:
        >>> reward_metrics(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))["accuracy"]
        tensor(0.5000)
    """
    same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    chosen, rejected = upcast(chosen_rewards).detach(), upcast(rejected_rewards).detach()
    both = torch.stack([chosen, rejected])
    return {
        "accuracy": (chosen > rejected).to(chosen.dtype).mean(),
        "margin": (chosen - rejected).mean(),
        "mean_reward": both.mean(),
        "min_reward": both.amin(),
        "max_reward": both.amax(),
    }


class DivergencePairwiseLoss(TypedDict):
    loss: Tensor
    chosen_mean_scores: Tensor
    rejected_mean_scores: Tensor


def _first(where: Tensor, otherwise: int) -> Tensor:
    """``(B,)`` column of the first True in each row of ``(B, S)``, ``otherwise`` where there is none."""
    return torch.where(where.any(-1), where.int().argmax(-1), otherwise)


def _value_before(values: Tensor, end: Tensor) -> Tensor:
    """``values[b, end[b] − 1]``; end 0 wraps to the last column, as Python's index −1 does."""
    return values.gather(-1, ((end - 1) % values.shape[-1]).unsqueeze(-1)).squeeze(-1)


def divergence_pairwise_loss(
    rewards: Tensor,
    input_ids: Tensor,
    pad_id: int,
    *,
    num_padding_at_beginning: int = 0,
    compute_fp32_loss: bool = True,
) -> DivergencePairwiseLoss:
    r"""Pairwise loss over every token from where two answers diverge to where the longer one ends.

    .. math:: L = \frac{1}{B}\sum_i \frac{1}{e_i - s_i} \sum_{t=s_i}^{e_i - 1} -\log\sigma(r^w_{i,t} - r^l_{i,t})

    :math:`s_i` is the first column whose ids differ; :math:`e_i` the later of the two ends, so that pads of the shorter
    answer count. An answer ends at its pad number ``num_padding_at_beginning + 1``, or else at ``S``. Two identical
    answers are compared in the last column, and both end where the chosen one does. A pair that ends before it diverges
    gives the mean over nothing, nan, as in DeepSpeed-Chat (left padding needs ``num_padding_at_beginning``).

    Source: DeepSpeed-Chat's ``RewardModel.forward``, here without its loop over pairs.

    Args:
        rewards: ``(2B, S)`` reward per token, chosen answers over rejected ones.
        input_ids: ``(2B, S)`` their token ids.
        pad_id: the id that ends an answer.
        num_padding_at_beginning: number of pads that each row starts with (1 for OPT's tokenizer).
        compute_fp32_loss: ``False`` computes in the rewards' dtype, as DeepSpeed-Chat does by default.

    Returns:
        A dict: ``loss``, a scalar; ``chosen_mean_scores`` and ``rejected_mean_scores``, ``(B,)``, the reward before
        each answer's own end, detached, in the rewards' dtype.

    Raises:
        ValueError: shapes that are not ``(2B, S)``.
        RuntimeError: a pair differs in its first column already: there is no prompt in front. On a GPU the check does
            not wait, and makes the next synchronisation fail.

    Example:
        >>> ids = torch.tensor([[5, 1, 2, 0], [5, 1, 3, 4]])
        >>> rewards = torch.tensor([[9.0, 9.0, 1.0, 0.0], [9.0, 9.0, 1.0, 0.0]])
        >>> divergence_pairwise_loss(rewards, ids, pad_id=0)["loss"]
        tensor(0.6931)
    """
    if rewards.dim() != 2 or rewards.shape != input_ids.shape:
        raise ValueError(
            f"rewards and input_ids must both be (2B, S), got {tuple(rewards.shape)} and {tuple(input_ids.shape)}"
        )
    S = rewards.shape[1]
    (chosen_ids, rejected_ids), (chosen, rejected) = split_pairs(input_ids), split_pairs(rewards)

    def ends(ids: Tensor) -> Tensor:
        is_pad = ids == pad_id
        return _first(is_pad & (is_pad.cumsum(-1) == num_padding_at_beginning + 1), S)

    differs = chosen_ids != rejected_ids
    identical = ~differs.any(-1)
    start = _first(differs, S - 1)
    torch._assert_async((start > 0).all(), "a chosen and a rejected sequence differ in column 0; put the prompt first")
    chosen_end, rejected_end = ends(chosen_ids), ends(rejected_ids)
    end = torch.where(identical, S, torch.maximum(chosen_end, rejected_end))

    column = torch.arange(S, device=rewards.device)
    compared = (column >= start.unsqueeze(-1)) & (column < end.unsqueeze(-1))
    difference = upcast(chosen) - upcast(rejected) if compute_fp32_loss else chosen - rejected
    # Masked before the logsigmoid too, whose derivative would carry a nan back.
    losses = -F.logsigmoid(difference.masked_fill(~compared, 0))
    per_pair = masked_sum(losses, compared, -1) / compared.sum(-1)
    return {
        "loss": per_pair.mean(),
        "chosen_mean_scores": _value_before(chosen.detach(), chosen_end),
        "rejected_mean_scores": _value_before(rejected.detach(), rejected_end),
    }


def end_scores(values: Tensor, input_ids: Tensor, pad_id: int, prompt_length: int) -> Tensor:
    r"""Value at the last token of each answer: before the first pad at or after ``prompt_length``, or else the last.

    Pads before ``prompt_length``, those of a left-padded prompt, are ignored.

    Source: DeepSpeed-Chat's ``RewardModel.forward_value``, there ``chosen_end_scores``.

    Args:
        values: ``(B, S)``, one number per token.
        input_ids: ``(B, S)`` token ids, prompt and answer.
        pad_id: the id that ends an answer.
        prompt_length: number of columns that the (padded) prompts take up, at least 2.

    Returns:
        ``(B,)`` in the dtype of ``values``, differentiable in them.

    Raises:
        ValueError: ``prompt_length`` is not above 1, or the shapes differ.

    Example:
        >>> end_scores(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0, 7, 8, 0]]), pad_id=0, prompt_length=2)
        tensor([3.])
    """
    if prompt_length <= 1:
        raise ValueError(f"prompt_length must be greater than 1, got {prompt_length}")
    if values.dim() != 2 or values.shape != input_ids.shape:
        raise ValueError(
            f"values and input_ids must both be (B, S), got {tuple(values.shape)} and {tuple(input_ids.shape)}"
        )
    answer_pad = (input_ids == pad_id) & (torch.arange(values.shape[1], device=values.device) >= prompt_length)
    return _value_before(values, _first(answer_pad, values.shape[1]))


def prm_loss(
    inputs: Tensor,
    logits: Tensor | LinearLogits,
    labels: Tensor,
    *,
    placeholder_token_id: int,
    reward_token_ids: Sequence[int] | None = None,
    ignore_index: int = -100,
    return_acc: bool = False,
) -> Any:
    r"""Cross entropy of a process reward model at the placeholder tokens, over the reward tokens.

    .. math:: L = \frac{1}{P} \sum_{(b,t):\ \text{input}_{b,t} = \text{placeholder}} -\sum_c q_{b,t,c} \log p_{b,t,c}

    :math:`p` is the softmax over ``reward_token_ids``, or over the whole vocabulary if they are None. :math:`q` is one-hot at
    a hard label; a soft label is the probability of the first of two reward tokens. Nothing is shifted. With
    :class:`LinearLogits`, only the positions that count and the reward tokens' rows of the head are multiplied.

    Source: OpenRLHF's ``PRMLoss``. Two corner cases differ on purpose: all labels are mapped to reward tokens at once (there
    a label mapped to an index can be mapped again), and a soft label of −100 is ignored (there it is the target (−100, 101)).

    The number of positions that count is on the device, so selecting them waits for it, and ``torch.compile`` breaks the
    graph here.

    Args:
        inputs: ``(B, S)`` token ids, which contain the placeholders.
        logits: ``(B, S, V)``.
        labels: ``(B, S)``: token ids, or soft labels in [0, 1] of any floating dtype.
        placeholder_token_id: the id that marks a step's end.
        reward_token_ids: ids of the judgements, say of ``+`` and ``-``; soft labels need exactly two.
        ignore_index: the label of a placeholder that does not count.
        return_acc: also return the accuracy.

    Returns:
        Scalar mean over the placeholders that have a label, fp32 (float64 for float64); nan if there are none. With
        ``return_acc`` also the share of all placeholders at which the largest logit is the (likelier) label's, fp32,
        detached; those without a label count as wrong.

    Raises:
        ValueError: soft labels without two reward tokens, a hard label that is not a reward token, or labels that are not
            shaped like ``inputs``.

    Example:
        >>> inputs, labels = torch.tensor([[5, 9, 6, 9]]), torch.tensor([[-100, 1, -100, 2]])
        >>> logits = torch.zeros(1, 4, 10)
        >>> prm_loss(inputs, logits, labels, placeholder_token_id=9, reward_token_ids=[1, 2], return_acc=True)
        (tensor(0.6931), tensor(0.5000))
    """
    soft = labels.is_floating_point()
    if soft and (reward_token_ids is None or len(reward_token_ids) != 2):
        raise ValueError(f"soft labels need two reward_token_ids, got {reward_token_ids}")
    same_shape(inputs=inputs, labels=labels)
    labels = labels if soft else labels.long()  # in uint8 −100 would be 156
    is_placeholder = inputs == placeholder_token_id
    counted = is_placeholder & (labels != ignore_index)
    z: Any = logits[counted]
    z, target = z.to(statistics_dtype(z.dtype)), labels[counted]
    if reward_token_ids is not None:
        ids = torch.tensor(reward_token_ids, device=labels.device)
        z = z[..., ids]
        if not soft:
            is_id = target.unsqueeze(-1) == ids
            if not is_id.any(-1).all():
                allowed = f"{list(reward_token_ids)} or {ignore_index}"
                raise ValueError(f"labels must be among reward_token_ids {allowed}, got {target}")
            target = is_id.int().argmax(-1)
    if soft:
        target = target.to(z.dtype)
        target = torch.stack([target, 1 - target], -1)
    loss = cross_entropy(z, target)
    if not return_acc:
        return loss
    right = z.detach().argmax(-1) == (target.argmax(-1) if soft else target)
    return loss, right.sum() / is_placeholder.sum()

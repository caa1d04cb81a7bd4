"""The losses as modules, with the names, constructors and forwards that OpenRLHF's users have.

``from openrlhf.models import GPTLMLoss`` becomes ``from fused_losses import GPTLMLoss``. Where a module takes ``logits`` it
takes :class:`~fused_losses.linear_logits.LinearLogits`. The functions behind them say more, and can do more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .linear_logits import LinearLogits
from .reward import log_exp_loss, pairwise_reward_loss, prm_loss
from .sft import sft_loss


class GPTLMLoss(nn.Module):
    """Next-token cross entropy, :func:`~fused_losses.sft.sft_loss`; nan where no token has a label.

    With a ring-attention group, ``logits`` are the rank's own slice of the sequence and ``labels`` are whole. Each rank
    shifts inside its slice, so the token at a seam is predicted by nobody; the loss is the mean of the ranks' means, where
    a rank without labels counts as 0. As in OpenRLHF, the gradient is that of the rank's own share of it.

    Args:
        ring_attn_group: process group of the ranks that share a sequence.

    Example:
        >>> GPTLMLoss()(torch.zeros(1, 4, 10), torch.tensor([[7, 8, -100, 9]]))
        tensor(2.3026)
    """

    def __init__(self, ring_attn_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.ring_attn_group = ring_attn_group

    def forward(self, logits: Tensor | LinearLogits, labels: Tensor) -> Tensor:
        if self.ring_attn_group is None:
            return sft_loss(logits, labels, nan_when_empty=True)
        world_size = dist.get_world_size(self.ring_attn_group)
        share = labels.shape[-1] // world_size
        loss = sft_loss(logits, labels.narrow(-1, dist.get_rank(self.ring_attn_group) * share, share)) / world_size
        with torch.no_grad():
            dist.all_reduce(loss, group=self.ring_attn_group)
        return loss


class PairWiseLoss(nn.Module):
    """Mean of ``−log σ(chosen − rejected − margin)``: :func:`~fused_losses.reward.pairwise_reward_loss`.

    Example:
        >>> PairWiseLoss()(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        return pairwise_reward_loss(chosen_reward, reject_reward, margin)


class LogExpLoss(nn.Module):
    """Mean of ``log(1 + exp(rejected − chosen))``: :func:`~fused_losses.reward.log_exp_loss`. Ignores ``margin``.

    Example:
        >>> LogExpLoss()(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        return log_exp_loss(chosen_reward, reject_reward, margin)


class PRMLoss(nn.Module):
    """Cross entropy at the placeholder tokens of a process reward model: :func:`~fused_losses.reward.prm_loss`.

    Args:
        placeholder_token_id: the id that marks a step's end.
        reward_token_ids: ids of the judgements; None trains the whole vocabulary.

    Example:
        >>> loss = PRMLoss(placeholder_token_id=9, reward_token_ids=[1, 2])
        >>> loss(torch.tensor([[5, 9]]), torch.zeros(1, 2, 10), torch.tensor([[-100, 1]]))
        tensor(0.6931)
    """

    def __init__(self, placeholder_token_id: int, reward_token_ids: Sequence[int] | None = None) -> None:
        super().__init__()
        self.placeholder_token_id = placeholder_token_id
        self.reward_token_ids = reward_token_ids

    def forward(
        self, inputs: Tensor, logits: Tensor | LinearLogits, labels: Tensor, *, return_acc: bool = False
    ) -> Any:
        return prm_loss(
            inputs,
            logits,
            labels,
            placeholder_token_id=self.placeholder_token_id,
            reward_token_ids=self.reward_token_ids,
            return_acc=return_acc,
        )

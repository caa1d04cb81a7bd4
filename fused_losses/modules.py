"""The losses as modules, with the names, constructors and forwards of OpenRLHF's loss classes.

``from openrlhf.models import GPTLMLoss`` becomes ``from fused_losses import GPTLMLoss``. Where a module takes ``logits`` it
takes :class:`~fused_losses.linear_logits.LinearLogits`. The functions behind them document more and can do more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .aggregation import aggregate
from .distillation import kd_loss
from .linear_logits import LinearLogits
from .numerics import check_choice, upcast
from .policy import grpo_loss, value_loss
from .preference import dpo_loss, kto_loss, vanilla_kto_loss
from .reward import log_exp_loss, pairwise_reward_loss, prm_loss
from .rollouts import mismatch_weight
from .sequences import masked_mean
from .sft import sft_loss


class GPTLMLoss(nn.Module):
    """Next-token cross entropy, :func:`~fused_losses.sft.sft_loss`; nan where no token has a label.

    With a ring-attention group, ``logits`` are the rank's own slice of the sequence and ``labels`` are whole. Each rank
    shifts inside its slice, so no position predicts the first token of a slice; the loss is the mean of the ranks' means, where
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


class SFTLoss(nn.Module):
    """Negative log-likelihood of the tokens that count, from log-probabilities: :func:`~fused_losses.aggregation.aggregate`.

    Args:
        token_level_loss: mean over tokens; otherwise the mean over sequences of their token means.

    Example:
        >>> SFTLoss()(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1, 1, 0]]))
        tensor(1.5000)
    """

    def __init__(self, token_level_loss: bool = True) -> None:
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self,
        per_token_logps: Tensor,
        loss_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        return aggregate(
            -per_token_logps,
            loss_mask,
            "token_mean" if self.token_level_loss else "seq_mean_token_mean",
            count_empty=False,
            dp_size=dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
        )


class DPOLoss(nn.Module):
    """DPO, conservative with ``label_smoothing``, or IPO on sums: :func:`~fused_losses.preference.dpo_loss`.

    Returns ``(loss, chosen_rewards, rejected_rewards)``. IPO takes no smoothing, as in OpenRLHF.

    Args:
        beta: how closely the policy is held to the reference.
        label_smoothing: share of labels taken to be wrong.
        ipo: use IPO's squared loss instead.

    Example:
        >>> chosen, rejected = torch.tensor([-1.0]), torch.tensor([-3.0])
        >>> DPOLoss(beta=0.5)(chosen, rejected, chosen - 1, rejected)
        (tensor(0.4741), tensor([0.5000]), tensor([0.]))
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            loss_type="ipo" if self.ipo else "sigmoid",
            label_smoothing=0.0 if self.ipo else self.label_smoothing,
        )


class VanillaKTOLoss(nn.Module):
    """KTO for even sampling: :func:`~fused_losses.preference.vanilla_kto_loss`.

    Returns ``(loss, chosen_rewards, rejected_rewards)``.

    Args:
        beta: how closely the policy is held to the reference.

    Example:
        >>> chosen, rejected = torch.tensor([-1.0]), torch.tensor([-3.0])
        >>> VanillaKTOLoss(beta=0.5)(chosen, rejected, chosen - 1, rejected)
        (tensor(0.3775), tensor([0.5000]), tensor([0.]))
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return vanilla_kto_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=self.beta
        )


class KTOLoss(nn.Module):
    """KTO for uneven sampling: :func:`~fused_losses.preference.kto_loss`. Either side may be empty.

    Returns ``(loss, chosen_rewards, rejected_rewards, KL)``. The KL is averaged over the process group where one is
    initialised, and works without one.

    Args:
        beta: how closely the policy is held to the reference.
        desirable_weight, undesirable_weight: multiply the losses of the chosen and of the rejected side.
        world_size, device: OpenRLHF's arguments, not used: the process group and the inputs say the same.

    Example:
        >>> chosen, rejected = torch.tensor([-1.0]), torch.tensor([])
        >>> loss = KTOLoss(0.5, 1.0, 1.0, world_size=1, device=chosen.device)
        >>> loss(chosen, rejected, chosen, chosen - 1, rejected, chosen - 0.5)
        (tensor(0.4378), tensor([0.5000]), tensor([]), tensor(0.5000))
    """

    def __init__(
        self, beta: float, desirable_weight: float, undesirable_weight: float, world_size: int, device: torch.device
    ) -> None:
        super().__init__()
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.world_size = world_size
        self.device = device

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        policy_KL_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_KL_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return kto_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            policy_KL_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            reference_KL_logps,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


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


class PolicyLoss(nn.Module):
    """PPO's or GSPO's actor loss: :func:`~fused_losses.policy.grpo_loss`. Returns what OpenRLHF's returns.

    That is ``loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio``, the last two None without a correction. Constructed with
    the arguments of OpenRLHF before 0.11.1, ``enable_vllm_is_correction`` and so on, it returns the first four, as OpenRLHF
    does from 0.8.11.

    Args:
        clip_eps_low, clip_eps_high: the ratio is clipped to ``1 − clip_eps_low … 1 + clip_eps_high``.
        dual_clip: bound on the ratio of tokens with a negative advantage, above 1.
        token_level_loss: mean over tokens; otherwise, and always for GSPO, the mean over sequences of their token means.
        policy_loss_type: ``"ppo"`` or ``"gspo"``.
        is_correction_level, is_correction_mode, is_correction_gating, is_correction_threshold: importance weight against
            the inference engine, :func:`~fused_losses.rollouts.mismatch_weight`: ``"off"``, ``"token"`` or ``"seq"``;
            ``"mask"`` or, for a token's ratio, ``"clip"``; ``"ratio"``, ``"binary_kl"`` or ``"tv"``; ``(low, high)``, whose
            ``low`` must be 0 except for the ratio. GSPO instead takes its ratio against the rollout.
        enable_vllm_is_correction, vllm_is_truncated_threshold, vllm_is_correction_type: the older arguments for the
            same: ``"tis"`` (clip), ``"icepop"`` (mask) or ``"seq-mask-tis"``; the threshold ``(low, high)`` or ``high``.

    Raises:
        ValueError: an unknown name, a combination without meaning, or ``dual_clip`` of at most 1.

    Example:
        >>> loss, clip_ratio, *_ = PolicyLoss()(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
        >>> loss
        tensor(-0.3679)
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
        *,
        enable_vllm_is_correction: bool | None = None,
        vllm_is_truncated_threshold: float | Sequence[float] | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        low_high: Any = is_correction_threshold
        if enable_vllm_is_correction is not None:
            kinds = {"tis": ("token", "clip"), "icepop": ("token", "mask"), "seq-mask-tis": ("seq", "mask")}
            check_choice(kinds, vllm_is_correction_type=vllm_is_correction_type)
            is_correction_level, is_correction_mode = kinds[vllm_is_correction_type]
            low_high = vllm_is_truncated_threshold
            low_high = low_high if isinstance(low_high, Sequence) else (None, low_high)
        check_choice(("ppo", "gspo"), policy_loss_type=policy_loss_type)
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"dual_clip bounds the ratio from above and must be more than 1, got {dual_clip}")
        levels = {"off": "token", "token": "token", "seq": "sequence_mean"}
        modes = {"mask": "mask", "clip": "truncate"}
        check_choice(levels, is_correction_level=is_correction_level)
        check_choice(modes, is_correction_mode=is_correction_mode)
        check_choice(("ratio", "binary_kl", "tv"), is_correction_gating=is_correction_gating)
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode='clip' clips the ratio of a token, not with "
                f"is_correction_level={is_correction_level!r} and is_correction_gating={is_correction_gating!r}: use 'mask'"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and (low_high[0] or 0) > 0:
            raise ValueError(
                f"is_correction_gating={is_correction_gating!r} is 0 where nothing differs: its is_correction_threshold "
                f"is (0, high), got {tuple(low_high)}"
            )
        self.corrected = is_correction_level != "off" and enable_vllm_is_correction is not False
        self.returns = 5 if enable_vllm_is_correction is None else 4
        self.correction: dict[str, Any] = {
            "level": levels[is_correction_level],
            "mode": modes[is_correction_mode],
            "gate": is_correction_gating,
            "low": low_high[0],
            "high": low_high[1],
        }
        self.options: dict[str, Any] = {
            "loss_type": policy_loss_type,
            "eps_low": clip_eps_low,
            "eps_high": clip_eps_high,
            "dual_clip": dual_clip,
            "log_ratio_clamp": (-20.0, 20.0) if policy_loss_type == "ppo" else None,
            "aggregation": "token_mean" if token_level_loss and policy_loss_type == "ppo" else "seq_mean_token_mean",
            "count_empty": False,
        }

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor | None, ...]:
        weight: Tensor | None = None
        correction: dict[str, Tensor] = {}
        behaviour = old_log_probs
        if self.corrected:
            if rollout_log_probs is None:
                raise ValueError("the correction needs rollout_log_probs")
            if self.options["loss_type"] == "gspo":
                behaviour = rollout_log_probs
            else:
                weight, correction = mismatch_weight(old_log_probs, rollout_log_probs, action_mask, **self.correction)
        loss, metrics = grpo_loss(
            log_probs,
            behaviour,
            advantages,
            action_mask,
            mismatch_weight=weight,
            dp_size=dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
            **self.options,
        )
        results = (
            loss,
            metrics["clip_ratio/region_mean"],
            masked_mean(upcast(old_log_probs.detach()) - upcast(log_probs.detach()), action_mask),
            correction.get("mismatch_kl"),
            correction.get("filter_fraction"),
        )
        return results[: self.returns]


class ValueLoss(nn.Module):
    """PPO's critic loss, half the clipped squared error: :func:`~fused_losses.policy.value_loss`.

    Args:
        clip_eps: how far a value may move from the old one before the clip; None: no clip.
        token_level_loss: mean over tokens; otherwise the mean over sequences of their token means.

    Example:
        >>> ValueLoss(clip_eps=0.2)(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        tensor(0.5000)
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        return value_loss(
            values,
            old_values,
            returns,
            action_mask,
            clip_eps=self.clip_eps,
            aggregation="token_mean" if self.token_level_loss else "seq_mean_token_mean",
            count_empty=False,
            dp_size=dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
        )[0]


class KDLoss(nn.Module):
    """Cross entropy of the student under the teacher's distribution: :func:`~fused_losses.distillation.kd_loss`.

    Example:
        >>> KDLoss()(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """

    def forward(self, logits: Tensor | LinearLogits, teacher_logits: Tensor | LinearLogits, label: Tensor) -> Tensor:
        return kd_loss(logits, teacher_logits, label)

"""Language-model training losses that never hold ``tokens × vocabulary`` logits.

:class:`LinearLogits` is a logits tensor that is never materialised: write a loss against logits, get the fused one. Three
primitives stand beneath every loss: :func:`token_statistics`, :func:`cross_entropy` and :func:`divergence`; the losses are
short plain PyTorch on top, one family per module.
"""

import torch.compiler.config

from .aggregation import aggregate
from .cross_entropy import CrossEntropyLoss, cross_entropy
from .data_parallel import count_per_rank
from .distillation import acceptance_rate, distillation_loss, kd_loss, sparse_distillation_loss, teacher_topk
from .divergence import divergence
from .kl import k1, k2, k3, kl_biased, kl_estimate, kl_penalty, kl_unbiased
from .linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from .linear_head import LinearHead
from .linear_logits import LinearLogits
from .modules import (
    DPOLoss,
    GPTLMLoss,
    KDLoss,
    KTOLoss,
    LogExpLoss,
    PairWiseLoss,
    PolicyLoss,
    PRMLoss,
    SFTLoss,
    ValueLoss,
    VanillaKTOLoss,
)
from .planning import Plan, plan
from .policy import a2po_loss, grpo_loss, ppo_loss, value_loss
from .preference import (
    RunningMean,
    bco_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    preference_metrics,
    simpo_loss,
    vanilla_kto_loss,
    wpo_weight,
)
from .reward import divergence_pairwise_loss, end_scores, log_exp_loss, pairwise_reward_loss, prm_loss, reward_metrics
from .rollouts import entropy_mask, group_advantages, mismatch_weight, off_policy_mask, optimal_values
from .sequences import (
    concatenate_pairs,
    masked_mean,
    masked_sum,
    packed_mean,
    packed_sum,
    sequence_log_probs,
    shift_labels,
    split_pairs,
)
from .settings import backend, drop_ignored, gradient_filter, route, strict, workspace
from .sft import dft, sft_loss
from .token_loss import token_loss
from .token_statistics import TokenStatistics, selective_log_softmax, token_statistics
from .vocab_parallel import VocabParallel

__version__ = "0.1.0"

# torch.compile's caches on disk identify an operator by its name: this keeps graphs of another version from being found.
torch.compiler.config.cache_key_tag += f"fused-losses-{__version__}"

__all__ = [
    "CrossEntropyLoss",
    "DPOLoss",
    "GPTLMLoss",
    "KDLoss",
    "KTOLoss",
    "LinearCrossEntropyLoss",
    "LinearHead",
    "LinearLogits",
    "LogExpLoss",
    "PRMLoss",
    "PairWiseLoss",
    "Plan",
    "PolicyLoss",
    "RunningMean",
    "SFTLoss",
    "TokenStatistics",
    "ValueLoss",
    "VanillaKTOLoss",
    "VocabParallel",
    "a2po_loss",
    "acceptance_rate",
    "aggregate",
    "backend",
    "bco_loss",
    "concatenate_pairs",
    "count_per_rank",
    "cpo_loss",
    "cross_entropy",
    "dft",
    "distillation_loss",
    "divergence",
    "divergence_pairwise_loss",
    "dpo_loss",
    "drop_ignored",
    "end_scores",
    "entropy_mask",
    "gradient_filter",
    "group_advantages",
    "grpo_loss",
    "k1",
    "k2",
    "k3",
    "kd_loss",
    "kl_biased",
    "kl_estimate",
    "kl_penalty",
    "kl_unbiased",
    "kto_loss",
    "linear_cross_entropy",
    "log_exp_loss",
    "masked_mean",
    "masked_sum",
    "mismatch_weight",
    "off_policy_mask",
    "optimal_values",
    "orpo_loss",
    "packed_mean",
    "packed_sum",
    "pairwise_reward_loss",
    "plan",
    "ppo_loss",
    "preference_metrics",
    "prm_loss",
    "reward_metrics",
    "route",
    "selective_log_softmax",
    "sequence_log_probs",
    "sft_loss",
    "shift_labels",
    "simpo_loss",
    "sparse_distillation_loss",
    "split_pairs",
    "strict",
    "teacher_topk",
    "token_loss",
    "token_statistics",
    "value_loss",
    "vanilla_kto_loss",
    "workspace",
    "wpo_weight",
]

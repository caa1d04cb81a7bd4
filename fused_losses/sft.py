r"""Supervised fine-tuning: the next-token cross entropy over the tokens that have a label.

The logits at a position predict the token that follows it, so labels are shifted by one against them. Here the labels
move and the logits stay whole, in place and uncopied: a token that cannot be predicted (the first of a row, and with
packed rows the first of every document) is simply no position's label.

The choice of average changes the gradient of a batch and nothing else: ``"token"`` weighs every token the same, so long
answers pull more; ``"sequence"`` weighs every answer the same. With gradient accumulation a mean per micro-batch is not
the mean of the batch: trainers count the whole batch's tokens first and pass ``num_items_in_batch``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .autodiff import same_sizes
from .lazy_tensor import is_lazy
from .linear_cross_entropy import linear_logits_cross_entropy
from .linear_logits import LinearLogits
from .numerics import check_choice, on_device, statistics_dtype, upcast
from .sequences import at_least_one, shift_labels, sums_and_counts
from .token_statistics import check_vocab_last, selective_log_softmax, target_ids
from .vocab_parallel import local_target


def dft(log_probs: Tensor) -> Tensor:
    r"""Dynamic fine-tuning's loss per token: the nll, weighted by the probability the token already has.

    .. math:: -\operatorname{sg}(e^{\log p}) \log p

    The gradient of the nll carries a factor :math:`1/p`, which makes unlikely tokens loudest; the weight cancels it.

    Source: Wu et al., "On the Generalization of SFT" (2025); TRL 1.16's ``loss_type="dft"``.

    Args:
        log_probs: log-probabilities of the labels, any shape, nats.

    Returns:
        Tensor of the same shape, fp32 (float64 for float64), differentiable in ``log_probs`` except through the weight.

    Example:
        >>> dft(torch.tensor([0.5]).log())
        tensor([0.3466])
    """
    log_probs = upcast(log_probs)
    return -log_probs.detach().exp() * log_probs


def sft_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | int | None = None,
    *,
    average: Literal["token", "sequence"] = "token",
    loss_type: Literal["nll", "dft"] = "nll",
    nan_when_empty: bool = False,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_sequences: int | None = None,
    context_group: dist.ProcessGroup | None = None,
    zigzag: bool = False,
) -> Tensor:
    r"""Cross entropy of each token given those before it; the shift by one happens inside.

    .. math:: L = \frac{1}{n} \sum_b w_b \sum_{t:\, y_{b,t+1} \ne \text{ignore}} -\log p_{b,t}(y_{b,t+1})

    ``average="token"``: :math:`w = 1`, and :math:`n` is the number of labels counted. ``"sequence"``: :math:`w_b` is one
    over the number of labels of sequence :math:`b`, and :math:`n` the number of sequences that have any.

    Source: transformers' ``ForCausalLMLoss``, TRL 1.16's ``SFTTrainer``, OpenRLHF's ``GPTLMLoss``. With nothing to train
    on the loss is 0, as in TRL, and has a gradient of 0; ``nan_when_empty`` makes it nan, as in the other two.

    Args:
        logits: ``(B, S, V)``, or ``(S, V)``.
        labels: ``(B, S)``, or ``(S,)``: token ids, not shifted.
        ignore_index: the label of tokens that are not trained on.
        num_items_in_batch: replaces :math:`n` for a batch split over several calls: the sum of their losses is then the
            batch's loss. Over ranks whose gradients are averaged, pass :func:`count_per_rank` of the labels counted.
        average: see above.
        loss_type: ``"dft"`` weighs each token as :func:`dft` does.
        nan_when_empty: nan instead of 0 where :math:`n` is 0.
        cu_seqlens: for packed rows ``(1, total)``, see :func:`fused_losses.sequences.sums_and_counts`: labels never cross a
            document's end, and each document is a sequence.
        position_ids: as ``labels``, instead of ``cu_seqlens``. Rows ``(B, S)`` hold whole documents, and count as one long row.
        num_sequences: with ``position_ids`` and ``average="sequence"``: the number of documents, so that the host need not
            wait for the device to count them.
        context_group: the ranks that each hold a part of every sequence, in ``logits`` and ``labels`` alike, see
            :func:`shift_labels`; :math:`n` and :math:`w_b` are then those of whole sequences, and the result is this rank's
            share of the loss: the sum over ranks is the loss. Packed rows do not support ``average="sequence"`` then.
        zigzag: which parts those are, see :func:`shift_labels`.

    Returns:
        Scalar, fp32 (float64 for float64), differentiable in ``logits``.

    Raises:
        TypeError: ``logits`` are neither a tensor nor a :class:`LinearLogits`.
        ValueError: ``labels`` are not shaped like the tokens of ``logits``, an unknown name, or as for :func:`shift_labels`.

    Example:
        >>> sft_loss(torch.zeros(1, 4, 10), torch.tensor([[7, 8, -100, 9]]))
        tensor(2.3026)
    """
    check_vocab_last("logits", logits)
    if labels.dim() not in (1, 2) or not same_sizes(logits.shape[:-1], labels.shape):
        raise ValueError(
            f"logits (B, S, V) need labels (B, S), got {tuple(logits.shape)} and {tuple(labels.shape)}; do not shift them"
        )
    check_choice(("token", "sequence"), average=average)
    check_choice(("nll", "dft"), loss_type=loss_type)
    if context_group is not None and average == "sequence" and (cu_seqlens is not None or position_ids is not None):
        raise ValueError("average='sequence' of packed rows that are split over a context_group is not supported")
    labels = local_target(labels)
    packing: dict[str, Any] = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
    target = shift_labels(labels, ignore_index, **packing, context_group=context_group, zigzag=zigzag)
    counted = target != ignore_index
    count = counted.sum()
    if num_items_in_batch is not None:
        count = on_device(num_items_in_batch, target.device).reshape(())  # raises for several numbers
    elif context_group is not None and average == "token":
        dist.all_reduce(count, group=context_group)
    if average == "token" and loss_type == "nll" and is_lazy(logits):
        # A sum over tokens makes its gradients in forward and divides them there. fp32 costs lazy logits nothing.
        wide: Any = logits.to(statistics_dtype(logits.dtype))
        share = at_least_one(count).to(wide.dtype).reciprocal().expand(target.shape)
        loss = linear_logits_cross_entropy(
            wide, target, ignore_index=ignore_index, reduction="sum", token_weights=share
        )
    else:
        log_probs = selective_log_softmax(logits, target_ids(target, logits.shape[-1], ignore_index))
        losses = dft(log_probs) if loss_type == "dft" else -log_probs
        if average == "sequence":
            sums, counts = sums_and_counts(losses, counted, **packing, num_sequences=num_sequences)
            if context_group is not None:
                dist.all_reduce(counts, group=context_group)
            losses = sums / counts.clamp(min=1)
            if num_items_in_batch is None:
                count = (counts > 0).sum()
        loss = losses.sum() / at_least_one(count)
    return loss.masked_fill(count == 0, torch.nan) if nan_when_empty else loss

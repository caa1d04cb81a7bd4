"""From one loss per token to one number: how much a long sequence weighs."""

from __future__ import annotations

from torch import Tensor

from .numerics import upcast
from .sequences import Sequences, at_least_one, masked_sum

AGGREGATIONS = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def aggregate(
    loss: Tensor,
    mask: Tensor | None = None,
    aggregation: str = "token_mean",
    *,
    cu_seqlens: Tensor | None = None,
    batch_num_tokens: Tensor | float | None = None,
    global_batch_size: Tensor | float | None = None,
    dp_size: int = 1,
    loss_scale_factor: float | None = None,
    count_empty: bool = True,
) -> Tensor:
    r"""One number from one loss per token: the aggregation decides how much a long sequence weighs.

    ============================  ===================================================  ==============================
    ``aggregation``               with :math:`n` unmasked tokens in a sequence         elsewhere
    ============================  ===================================================  ==============================
    ``token_mean``                :math:`\sum \ell / \sum n`                           TRL bnpo, dapo; verl
                                                                                       ``token-mean``; OpenRLHF
                                                                                       ``token_level_loss=True``
    ``token_sum``                 :math:`\sum \ell / c`                                verl ``token-sum``
    ``seq_mean_token_mean``       :math:`\mathrm{mean}_B(\sum_t \ell / n)`             TRL grpo, sapo; verl
                                                                                       ``seq-mean-token-mean``
    ``seq_mean_token_sum``        :math:`\mathrm{mean}_B(\sum_t \ell)`                 TRL luspo; verl
                                                                                       ``seq-mean-token-sum``
    ``seq_mean_token_sum_norm``   :math:`\mathrm{mean}_B(\sum_t \ell) / c`             TRL dr_grpo, c its
                                                                                       ``max_completion_length``; verl
                                                                                       ``seq-mean-token-sum-norm``
    ============================  ===================================================  ==============================

    verl's hyphenated names work too. Where gradients are averaged over ranks, pass the counts of the global batch to get the
    gradient of one process with the whole batch: either their sum over ranks together with ``dp_size``, or their average,
    :func:`count_per_rank`, without it. The same holds for micro-batches, whose losses are then added. For TRL's gradient
    accumulation, divide the result by the steps; dapo, cispo and vespo instead take ``batch_num_tokens = num_items_in_batch ·
    accumulation / steps_per_generation`` and ``dp_size = num_processes``, with :func:`grpo_loss`'s ``entropy_coef`` divided
    by the steps.

    Source: TRL 1.16 ``GRPOTrainer``; verl 0.9 ``agg_loss``; OpenRLHF 0.11 ``aggregate_loss``.

    Args:
        loss: ``(B, S)``, or packed ``(1, total)``.
        mask: as ``loss``, nonzero for the tokens that count; ``None``: all.
        aggregation: a row of the table.
        cu_seqlens: ``(n + 1,)``, the borders of a packed row's sequences.
        batch_num_tokens: for ``token_mean``, the number of unmasked tokens in the global batch; ``None``: in this one.
        global_batch_size: for ``seq_mean_*``, the number of sequences in the global batch; ``None``: in this one.
        dp_size: number of ranks the gradient will be averaged over; only with a global count, or ``token_sum``.
        loss_scale_factor: the constant ``c``; ``None``: 1 for ``token_sum``, ``S`` for ``seq_mean_token_sum_norm``. Pass it
            where ranks or micro-batches are padded to different lengths.
        count_empty: whether a fully masked sequence counts, as 0, in :math:`\mathrm{mean}_B` (default, TRL) or is left
            out of it (verl, OpenRLHF 0.11).

    Returns:
        Scalar, fp32 (float64 for float64); 0 where nothing is unmasked.

    Raises:
        ValueError: an unknown ``aggregation``, shapes that do not match, ``dp_size`` without the global count, or only the
            count that this aggregation does not use.

    Example:
        >>> loss, mask = torch.tensor([[1.0, 2.0, 3.0], [9.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> [round(aggregate(loss, mask, a).item(), 2) for a in ("token_mean", "seq_mean_token_mean", "token_sum")]
        [3.75, 5.5, 15.0]
    """
    kind = aggregation.replace("-", "_")
    if kind not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; choose from {', '.join(AGGREGATIONS)}")
    sequences = Sequences("loss", loss, mask, cu_seqlens)
    loss = upcast(loss)
    counts = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
    needed, other = counts if kind == "token_mean" else reversed(counts)
    global_count = counts[needed]
    if global_count is None and kind != "token_sum":
        if dp_size > 1:
            raise ValueError(f"{aggregation} with dp_size={dp_size} needs {needed}, the count over all ranks")
        if counts[other] is not None:
            raise ValueError(f"{other} has no effect on {aggregation}, which divides by {needed}: pass that")

    count: Tensor | float
    if kind == "token_sum":
        total, count = masked_sum(loss, sequences.mask), 1 if loss_scale_factor is None else loss_scale_factor
    elif kind == "token_mean":
        total, count = masked_sum(loss, sequences.mask), sequences.mask.sum()
    else:
        total = (sequences.mean(loss) if kind == "seq_mean_token_mean" else sequences.sum(loss)).sum()
        count = sequences.number if count_empty else sequences.nonempty().sum()
        if kind == "seq_mean_token_sum_norm":
            if loss_scale_factor is None and cu_seqlens is not None:
                raise ValueError("seq_mean_token_sum_norm of a packed row needs loss_scale_factor: it has no S")
            total = total / (at_least_one(loss.shape[1]) if loss_scale_factor is None else loss_scale_factor)
    if global_count is not None and kind != "token_sum":
        count = global_count
    return total / at_least_one(count) * dp_size

r"""What to divide by where a batch is spread over ranks, or over several backward passes.

DDP and FSDP2 average the gradients of their ranks. Where each rank takes the mean over its own tokens, a token of a rank with
few of them weighs more than others, and the average is not the gradient of the whole batch. To get the full-batch gradient,
every rank divides its *sum* by the same number: the mean count per rank, which :func:`count_per_rank` makes.

.. math:: \frac1R \sum_r \frac{s_r}{\bar n} = \frac{\sum_r s_r}{\sum_r n_r}, \qquad \bar n = \frac1R \sum_r n_r

A rank that has nothing to train on must still take part, with a sum of 0. With gradient accumulation the counts of all
micro-batches are added first, and no loss is divided by the number of micro-batches. Which argument of which loss takes the
number, and what other trainers call it, is in docs/distributed.md, "Data parallel and normalisers".
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .numerics import wide_dtype
from .sequences import check_tensors
from .sharded_weight import is_distributed


def count_per_rank(count: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    r"""The average of a count over ranks: what each of them divides its sum by where gradients are averaged.

    .. math:: \bar n = \frac1R \sum_r n_r

    Source: verl 0.9's ``batch_num_tokens / dp_size``; TRL 1.16's and transformers' ``num_items_in_batch``, over processes.

    Args:
        count: this rank's count, over all its micro-batches, on the device of the group's backend; a scalar, or several
            counts in one tensor.
        group: the ranks that gradients are averaged over; ``None``: all, where ``torch.distributed`` runs.

    Returns:
        Shaped as ``count``, fp32, without gradient, the same bits on all ranks. One all-reduce; nothing waits for the device.

    Example:
        >>> labels = torch.tensor([[5, 6, -100, 8]])
        >>> count_per_rank((labels[:, 1:] != -100).sum())
        tensor(2.)
    """
    check_tensors(count=count)
    total, ranks = count.detach().to(wide_dtype(count.device), copy=True), 1  # ranks may have different dtypes
    if is_distributed():
        ranks = dist.get_world_size(group)
        dist.all_reduce(total, group=group)
    return (total / ranks).to(torch.float32)

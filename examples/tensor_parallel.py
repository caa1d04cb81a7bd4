"""Fine-tuning with the head's vocabulary shared by pairs of ranks and the batch split between the pairs:

torchrun --nproc-per-node 4 examples/tensor_parallel.py

The losses are those of one process, and no rank holds the logits or the head's whole weight.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from tiny_transformer import TinyTransformer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from fused_losses import count_per_rank, sft_loss
from fused_losses.tensor_parallel import VocabParallelHead


def make_batch() -> Tensor:
    ids = torch.randint(1, 64, (4, 12))
    ids[1, 5:] = ids[3, 9:] = 0  # padding: the halves of the batch have different numbers of labels
    return ids


def shard(model: TinyTransformer, mesh: DeviceMesh) -> TinyTransformer:
    parallelize_module(model, mesh["tp"], {"head": VocabParallelHead()})
    return fully_shard(model, mesh=mesh["dp"])


def step(model: TinyTransformer, optimizer: torch.optim.Optimizer, ids: Tensor, dp: dist.ProcessGroup) -> Tensor:
    mine = ids.chunk(dist.get_world_size(dp))[dist.get_rank(dp)]
    labels = mine.masked_fill(mine == 0, -100)
    count = count_per_rank((labels[:, 1:] != -100).sum(), dp)
    loss = sft_loss(model(mine), labels, num_items_in_batch=count)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    whole = loss.detach().clone()
    dist.all_reduce(whole, group=dp)
    return whole / dist.get_world_size(dp)


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    tp = 2 if dist.get_world_size() % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))
    model, ids = TinyTransformer(), make_batch()
    optimizer = torch.optim.SGD(shard(model, mesh).parameters(), lr=0.1)
    for i in range(5):
        loss = step(model, optimizer, ids, mesh.get_group("dp"))
        if dist.get_rank() == 0:
            print(f"step {i}: loss {loss:.4f}")
    dist.destroy_process_group()

"""Run a function in real processes that form a process group: NCCL where each has a GPU, else gloo."""

import datetime
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)

needs_ranks = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def _process(rank, ranks, folder, fn, args, together):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= ranks
    if not gpus:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a module with @triton.jit is imported
    if gpus:
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    torch.save(fn(torch.device("cuda", rank) if gpus else torch.device("cpu"), *args), f"{folder}/{rank}")
    if together:
        dist.barrier()
        dist.destroy_process_group()


def run(fn, ranks, *args, together=True):
    """What ``fn(device, *args)``, a function of a module, returns on each of ``ranks`` processes; ``together``: none ends
    before the others."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, folder, fn, args, together), nprocs=ranks)
        return [torch.load(f"{folder}/{rank}", map_location="cpu", weights_only=False) for rank in range(ranks)]

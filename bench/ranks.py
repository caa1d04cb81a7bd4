"""Run a function in real processes that form a process group: NCCL where each has a GPU, and gloo for tensors on the CPU."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)
# Importing torch takes longer than most functions run: without a GPU, ranks are forked from one process that has imported it.
# With one, Triton, imported there too, would not see what ``_process`` sets.
START = "spawn" if torch.cuda.is_available() else "forkserver"
multiprocessing.set_forkserver_preload(["torch._dynamo"])
SENT = {  # collectives, and the position of the argument that a rank sends
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,
    "all_gather": 1,
    "all_reduce": 0,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
}


def interpret() -> None:
    """Let Triton's interpreter run the kernels; call it before they are imported."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when a module with @triton.jit is imported
    with suppress(ImportError):
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        # As on a GPU, where the maximum of a number and a nan is the number: in the interpreter it would be the nan.
        interpreter.InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
        interpreter.InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
        splat = interpreter.InterpreterBuilder.create_splat

        def splat_mask(self: Any, ret_ty: Any, arg: Any) -> Any:
            """A comparison's result holds bools under its operands' type; Triton 3.9 would splat it to numbers of that type."""
            found = splat(self, ret_ty, arg)
            found.data = found.data.astype(arg.data.dtype)
            return found

        interpreter.InterpreterBuilder.create_splat = splat_mask
        patch_tensor = interpreter._patch_lang_tensor

        def patch_index(tensor: Any, *scope: Any) -> None:
            """Before Triton 3.7 a loop's end is read from an array of one element, which NumPy 2.4 refuses."""
            patch_tensor(tensor, *scope)
            tensor.__index__ = lambda self: self.handle.data.item()

        interpreter._patch_lang_tensor = patch_index
        patch_lang = interpreter._patch_lang

        def patch_once(fn: Any) -> Any:
            """A launch patches the language; each call of a helper inside it patched again, which took half of all the time."""
            langs = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
            return patch_lang(fn) if any(tl.core.is_builtin(lang.load) for lang in langs) else None

        interpreter._patch_lang = patch_once


def _process(rank: int, ranks: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...], together: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= ranks
    if gpus:
        torch.cuda.set_device(rank)
    else:
        interpret()
    store = dist.FileStore(f"{folder}/store", ranks)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    torch.save(fn(torch.device("cuda", rank) if gpus else torch.device("cpu"), *args), f"{folder}/{rank}")
    if together:
        dist.barrier()
        dist.destroy_process_group()


def run(fn: Callable[..., Any], ranks: int, *args: Any, together: bool = True) -> list[Any]:
    """Run ``fn(device, *args)``, ``fn`` being a function of a module, in ``ranks`` processes and return the result of each;
    ``together``: none ends before the others."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (ranks, folder, fn, args, together), nprocs=ranks, start_method=START)
        return [torch.load(f"{folder}/{rank}", map_location="cpu", weights_only=False) for rank in range(ranks)]


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """The name of each collective called inside, and the bytes this rank handed to it."""
    calls: list[tuple[str, int]] = []

    def counted(name: str, at: int) -> Callable[..., Any]:
        collective = getattr(dist, name)

        @functools.wraps(collective)
        def call(*tensors: Any, **options: Any) -> Any:
            calls.append((name, tensors[at].numel() * tensors[at].element_size()))
            return collective(*tensors, **options)

        return call

    originals = {name: getattr(dist, name) for name in SENT if hasattr(dist, name)}
    for name in originals:
        setattr(dist, name, counted(name, SENT[name]))
    try:
        yield calls
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)

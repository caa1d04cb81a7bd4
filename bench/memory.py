"""Exact peak memory of a call.

On a CPU every allocation and every free is read from the profiler and summed in the order of time: a dispatch mode would miss
what is allocated inside custom operators. On CUDA the caching allocator counts the bytes requested and the bytes allocated: a
block may be 1 MiB larger than requested, depending on what was freed before.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler's library writes a line to stderr for each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(call: Callable[[], Any], device: str = "cpu", counted: str = "requested") -> int:
    """Largest number of bytes ``call`` held at once beyond what was allocated before it, results included.

    On CUDA ``call`` runs once before it is measured, so that library workspaces exist already; ``counted="allocated"`` there
    gives what ``torch.cuda.max_memory_allocated`` reports.
    """
    if device == "cuda":
        call()
    gc.collect()  # an earlier call's reference cycles, if freed during this one, would lower its peak
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()[f"{counted}_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()[f"{counted}_bytes.all.peak"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = largest = 0
    for change in changes:
        held += change.nbytes()
        largest = max(largest, held)
    del kept
    return largest

"""Time of several calls, interleaved: each round runs every call once, so that all of them see the same machine.

On CUDA, events around the call are read; the host queues the call while the GPU overwrites L2 and sleeps. On a CPU, a clock is
read, for ratios only: another program's load moves both sides of a ratio, and no absolute figure of a shared machine means
anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


class Sample(NamedTuple):
    forward: float  # seconds
    backward: float

    @property
    def full(self) -> float:
        return self.forward + self.backward


class Run(NamedTuple):
    """One call, in the parts that are timed separately. ``prepare`` is not timed; its result goes to ``forward``."""

    name: str
    prepare: Callable[[], Any]
    forward: Callable[[Any], Any]
    backward: Callable[[Any, Any], Any] | None  # takes prepare's and forward's results


FLUSH_BYTES = 512 * 2**20  # several times any L2
HOST_CYCLES = 10_000_000  # 5 ms at 2 GHz, in which the host queues any call
WARM_UP = {"cuda": 3, "cpu": 1}
LEAST_ROUNDS, MOST_ROUNDS = 3, 100


def once(run: Run, device: str, flush: torch.Tensor | None) -> Sample:
    prepared = run.prepare()
    if device == "cpu":
        marks = [time.perf_counter()]
        out = run.forward(prepared)
        marks.append(time.perf_counter())
        if run.backward is not None:
            run.backward(prepared, out)
        marks.append(time.perf_counter())
        return Sample(marks[1] - marks[0], marks[2] - marks[1])
    assert flush is not None
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    flush.zero_()
    torch.cuda._sleep(HOST_CYCLES)  # so that the time is not that of the launches
    start.record()
    out = run.forward(prepared)
    middle.record()
    if run.backward is not None:
        run.backward(prepared, out)
    end.record()
    torch.cuda.synchronize()
    return Sample(start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3)


def interleave(runs: Sequence[Run], device: str, seconds: float) -> Iterator[dict[str, Sample]]:
    """Rounds of one sample per run, after the warm-up, until ``seconds`` have passed.

    At least 3 rounds and at most 100, each starting with another run. A caller that is interrupted keeps the rounds it has.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    for _ in range(WARM_UP[device]):
        for run in runs:
            once(run, device, flush)
    end = time.perf_counter() + seconds
    for round in range(MOST_ROUNDS):
        if round >= LEAST_ROUNDS and time.perf_counter() > end:
            return
        shift = round % len(runs)
        yield {run.name: once(run, device, flush) for run in (*runs[shift:], *runs[:shift])}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and the middle half: spread without the outliers."""
    low, median, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    return {"median": median, "low": low, "high": high}

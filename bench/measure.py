"""One problem, all contenders: check each against float64, count its bytes, then time those that passed.

A row is a plain dict, ready for JSON. Its ``status``:

- ``ok``;
- ``failed``: ours outside the tolerance rule, or any that computes another function; red, never timed;
- ``inaccurate``: a peer, or ours with a gradient filter, outside our tolerance that still computes the same function (within
  ``SAME_FUNCTION``): timed anyway;
- ``oom``, ``error``, ``skipped``: with a ``reason``;
- ``interrupted``: checked, but not timed to the end.

On a CPU a row has ratios to eager in the same run, never a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.tolerance import assert_accurate
from .environment import clocks
from .memory import peak_bytes
from .problem import Contender, Inputs, Problem, Row, Work, reason
from .timing import Run, Sample, interleave, quartiles

# Relative error in the norm, of every result and gradient, beyond which a peer computes something else.
SAME_FUNCTION = 1e-2
TIMED = ("ok", "inaccurate")
MODES = ("forward", "full", "memory")
DRAWS, DRAWN_VOCAB, DRAWN_HIDDEN = 8, 1024, 256  # small problems beside the real one, to judge a loss by
EXACT_ELEMENTS = 2**25  # logits at a time in float64
COMPARED_ELEMENTS = 2**22  # of each tensor; of a larger one, evenly spaced rows
FLOOR_ELEMENTS = 2**30  # logits in the bare products that measure the floor


def measure(
    case: ModuleType,
    problem: Problem,
    contenders: Sequence[Contender],
    modes: Sequence[str],
    seconds: float,
    rows: list[Row],
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Append one row per mode and contender to ``rows`` as each begins, so that an exception leaves those done before it."""
    device = problem.device
    with out_of_memory():
        progress("inputs")
        x = case.inputs(problem)
        progress("float64 reference")
        yardstick, checked = eager_results(case, x)
        exact = exact_results(case, x, checked, problem.shape.vocab)
        total = x[case.ROWS[0]].shape[0]
        draws = small_draws(case, problem, problem.tokens * checked // total) if "loss" in exact else []
    for mode in modes:
        with_gradients = mode != "forward"
        group = []
        runs = []
        for contender in contenders:
            progress(f"{mode}: {contender.name}")
            row = problem.row(case.__name__.rpartition(".")[2], mode, contender.name, "ok")
            rows.append(row)
            group.append(row)
            run = runnable(case, contender, x, with_gradients)
            try:
                got = results(case, runnable(case, contender, cut(case, x, 0, checked), with_gradients))
                row["errors"] = {name: relative_error(got[name], exact[name]) for name in got}
                row["rows_checked"] = [checked, total]
                row |= judged(
                    pooled(got, [loss(case, contender, draw.x, with_gradients) for draw in draws]),
                    pooled(yardstick, [draw.eager for draw in draws]),
                    pooled(exact, [draw.exact for draw in draws]),
                    contender,
                )
                del got
                if row["status"] == "failed":
                    continue
                row["peak_bytes"] = peak_bytes(functools.partial(step, run, run.prepare()), device, "allocated")
                runs.append(run)
            except torch.OutOfMemoryError:
                row |= {"status": "oom", "reason": "out of memory"}
            except KeyboardInterrupt:
                row |= {"status": "interrupted", "reason": "interrupted while it was checked"}
                raise
            except Exception as failure:  # a peer may fail in any way; the others go on
                row |= {"status": "error", "reason": reason(failure)}
        if mode != "memory":
            time_rows(case, problem, runs, group, seconds, progress)


class Draw(NamedTuple):
    x: Inputs
    eager: Tensor
    exact: Tensor


def small_draws(case: ModuleType, problem: Problem, most_tokens: int) -> list[Draw]:
    """More losses to judge one by: on a single number eager PyTorch can be exact by luck.

    Each is over as many tokens as are checked: a sum over more is rounded more, and the largest error is what counts.
    """
    shape = problem.shape
    shape = shape._replace(vocab=min(shape.vocab, DRAWN_VOCAB), hidden=min(shape.hidden, DRAWN_HIDDEN))
    small = dataclasses.replace(problem, shape=shape, tokens=max(1, most_tokens))
    found = []
    for seed in range(2, 2 * DRAWS + 1, 2):
        x = case.inputs(dataclasses.replace(small, seed=seed))
        eager = loss(case, Contender("eager", case.eager), x, False)
        found.append(Draw(x, eager, exact_results(case, x, x[case.ROWS[0]].shape[0], shape.vocab)["loss"]))
    return found


def loss(case: ModuleType, contender: Contender, x: Inputs, with_gradients: bool) -> Tensor:
    run = runnable(case, contender, x, with_gradients)
    with out_of_memory():
        return run.forward(run.prepare()).detach()


def pooled(found: dict[str, Tensor], more: list[Tensor]) -> dict[str, Tensor]:
    """``found``, with the losses of the small draws beside its loss."""
    return found | {"loss": torch.stack([found["loss"], *more])} if more else found


def is_ours(contender: str) -> bool:
    return contender.startswith("fused_losses")


def judged(got: dict[str, Tensor], yardstick: dict[str, Tensor], exact: dict[str, Tensor], contender: Contender) -> Row:
    """The status of what a contender computed; eager is the yardstick itself."""
    try:
        if contender.name != "eager":
            for name, value in got.items():
                assert_accurate(value.to(yardstick[name].dtype), yardstick[name], exact[name], name)
        return {"status": "ok"}
    except AssertionError as failure:
        promised = is_ours(contender.name) and contender.exact
        same = all(relative_error(value, exact[name]) <= SAME_FUNCTION for name, value in got.items())
        return {"status": "inaccurate" if same and not promised else "failed", "reason": str(failure)}


def time_rows(
    case: ModuleType,
    problem: Problem,
    runs: list[Run],
    group: list[Row],
    seconds: float,
    progress: Callable[[str], None],
) -> None:
    """Time ``runs`` and the floor, interleaved, and write what was found into the rows of ``group``."""
    mode = group[0]["mode"]
    floor, floor_work = floor_run(case.FLOOR, problem)
    samples: dict[str, list[Sample]] = {run.name: [] for run in (*runs, floor)}
    forward, backward = case.work(problem)
    work = forward if mode == "forward" else forward + backward
    try:
        for number, round in enumerate(interleave([*runs, floor], problem.device, seconds)):
            progress(f"{mode}: round {number + 1}")
            for name, sample in round.items():
                samples[name].append(sample)
    except torch.OutOfMemoryError:
        for row in group:  # each fit when checked alone; beside the buffers of the floor, one does not
            if row["status"] in TIMED and not samples[row["contender"]]:
                row |= {"status": "oom", "reason": "out of memory while timed"}
    finally:
        warm = clocks() if problem.device == "cuda" else None
        floor_rate = None
        if samples[floor.name]:
            floor_rate = floor_work / quartiles([s.full for s in samples[floor.name]])["median"]
        eager = samples.get("eager", [])
        for row in group:
            if row["status"] not in TIMED:
                continue
            found = samples[row["contender"]]
            if not found:
                row |= {"status": "interrupted", "reason": "interrupted before it was timed"}
                continue
            row |= figures(found, eager, "full", work, case.FLOOR, floor_rate, problem.device)
            if problem.device == "cuda":
                row["clocks"] = warm
            if case.PARTS and mode == "full":
                row["parts"] = {
                    part: figures(found, eager, part, its_work, case.FLOOR, floor_rate, problem.device)
                    for part, its_work in (("forward", forward), ("backward", backward))
                }


def figures(
    found: list[Sample],
    eager: list[Sample],
    part: str,  # of a sample
    work: Work,
    bound: str,
    floor_rate: float | None,
    device: str,
) -> Row:
    """A row's figures from its samples; on a CPU no time and no rate."""
    times = [getattr(s, part) for s in found]
    seconds = quartiles(times)
    row: Row = {"rounds": len(found)}
    if eager:
        row["to_eager"] = quartiles([t / getattr(e, part) for t, e in zip(times, eager, strict=False)])
    if floor_rate is not None:
        row["of_floor"] = getattr(work, bound) / floor_rate / seconds["median"]
    if device == "cuda":
        row["ms"] = {name: value * 1e3 for name, value in seconds.items()}
        row["tflops"] = work.flops / seconds["median"] / 1e12
        row["gbps"] = work.bytes / seconds["median"] / 1e9
    return row


def floor_run(bound: str, problem: Problem) -> tuple[Run, float]:
    """A run of the bare work, three products or a copy, and how much work that is."""
    V, H, dtype, device = problem.shape.vocab, problem.shape.hidden, problem.dtype, problem.device
    N = min(problem.tokens, max(1, FLOOR_ELEMENTS // V))
    if bound == "bytes":
        source = torch.randn(N, V, device=device, dtype=dtype)
        target = torch.empty_like(source)
        return Run("floor", lambda: None, lambda _: target.copy_(source), None), 2 * source.nbytes
    hidden, weight = torch.randn(N, H, device=device, dtype=dtype), torch.randn(V, H, device=device, dtype=dtype)
    logits = torch.empty(N, V, device=device, dtype=dtype)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products(_: Any) -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return Run("floor", lambda: None, products, None), 6 * N * V * H


def measured_rates(problem: Problem) -> tuple[float, float]:
    """TFLOP/s of bare products and GB/s of a copy, measured as the floor is; takes a second on a GPU."""
    found = []
    for bound in ("flops", "bytes"):
        run, work = floor_run(bound, problem)
        seconds = [round["floor"].full for round in interleave([run], problem.device, 0)]
        found.append(work / quartiles(seconds)["median"])
    return found[0] / 1e12, found[1] / 1e9


def runnable(case: ModuleType, contender: Contender, x: Inputs, with_gradients: bool) -> Run:
    def prepare() -> Inputs:
        fresh = {name: v.clone() if name in contender.destroys else v for name, v in x.items()}
        return fresh | {name: fresh[name].detach().requires_grad_(with_gradients) for name in case.LEAVES}

    def forward(fresh: Inputs) -> Any:
        with torch.set_grad_enabled(with_gradients):
            return contender.call(fresh)

    return Run(contender.name, prepare, forward, functools.partial(gradients, case) if with_gradients else None)


def gradients(case: ModuleType, x: Inputs, out: Any) -> tuple[Tensor, ...]:
    """Gradients of all leaves; the upstream gradients are the columns of ``upstream``, one per result, or 1 for a loss."""
    upstream = x["upstream"].to(out[0].dtype).unbind(-1) if "upstream" in x else None
    return torch.autograd.grad(out, [x[name] for name in case.LEAVES], upstream)


def step(run: Run, prepared: Inputs) -> Any:
    with out_of_memory():
        out = run.forward(prepared)
        return out, run.backward(prepared, out) if run.backward is not None else ()


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Raise OutOfMemoryError on every device: the CPU's allocator raises a plain RuntimeError."""
    try:
        yield
    except RuntimeError as failure:
        if "can't allocate memory" in str(failure):
            raise torch.OutOfMemoryError(str(failure)) from None
        raise


def results(case: ModuleType, run: Run) -> dict[str, Tensor]:
    """Results and gradients of one call, by name."""
    return named(case, *step(run, run.prepare()))


def named(case: ModuleType, out: Any, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    outs = {"loss": out} if isinstance(out, Tensor) else {f"result {i}": t for i, t in enumerate(out)}
    found = outs | {f"d_{name}": t for name, t in zip(case.LEAVES, grads, strict=False)}
    return {name: sampled(t.detach()) for name, t in found.items()}


def sampled(t: Tensor) -> Tensor:
    """Evenly spaced rows of a large tensor."""
    if t.numel() <= COMPARED_ELEMENTS:
        return t.clone()
    count = max(2, COMPARED_ELEMENTS // t[0].numel())
    return t[torch.linspace(0, t.shape[0] - 1, count, device=t.device, dtype=torch.float64).long()]


def cut(case: ModuleType, x: Inputs, start: int, stop: int) -> Inputs:
    return {name: v[start:stop] if name in case.ROWS else v for name, v in x.items()}


def eager_results(case: ModuleType, x: Inputs) -> tuple[dict[str, Tensor], int]:
    """Plain PyTorch's results on the first rows, as many as fit into memory, and how many those are."""
    rows = x[case.ROWS[0]].shape[0]
    while True:
        try:
            return results(case, runnable(case, Contender("eager", case.eager), cut(case, x, 0, rows), True)), rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2


def exact_results(case: ModuleType, x: Inputs, rows: int, vocab: int) -> dict[str, Tensor]:
    """The reference in float64 on the first ``rows`` rows, a few at a time: losses and the head's gradients add up."""
    whole = cut(case, x, 0, rows)
    positions = x[case.ROWS[0]][0].numel() // x[case.ROWS[0]].shape[-1]
    few = max(1, EXACT_ELEMENTS // (vocab * positions))
    outs: list[Any] = []
    grads: dict[str, list[Tensor]] = {name: [] for name in case.LEAVES}
    for start in range(0, rows, few):
        part = {
            name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for name, v in cut(case, whole, start, start + few).items()
        }
        part |= {name: part[name].detach().requires_grad_() for name in case.LEAVES}
        out = case.reference(part, whole)
        for name, gradient in zip(case.LEAVES, gradients(case, part, out), strict=True):
            if name in case.ROWS or not grads[name]:
                grads[name].append(gradient)
            else:
                grads[name][0] += gradient
        outs.append(out.detach() if isinstance(out, Tensor) else [t.detach() for t in out])
    if isinstance(outs[0], Tensor):
        result: Any = torch.stack(outs).sum()
    else:
        result = [torch.cat(each) for each in zip(*outs, strict=True)]
    return named(case, result, [torch.cat(each) if len(each) > 1 else each[0] for each in grads.values()])


def relative_error(t: Tensor, exact: Tensor) -> float:
    """``‖t − exact‖/‖exact‖``; the numerator alone where ``exact`` is 0."""
    error, size = torch.linalg.vector_norm(t.double() - exact).item(), torch.linalg.vector_norm(exact).item()
    return error / size if size else error

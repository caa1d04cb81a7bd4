"""``fused-losses check``: every primitive on this device against float64, over dtypes, odd shapes and options.

A check has a function of ours, the same function in plain PyTorch by ``fused_losses.reference``, and inputs. Plain PyTorch
runs twice: in the dtype under test with its logits upcast, the yardstick of the tolerance rule, and in float64, the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import settings
from ..cross_entropy import cross_entropy
from ..divergence import KINDS, divergence
from ..linear_cross_entropy import linear_cross_entropy
from ..linear_logits import LinearLogits
from ..numerics import upcast
from ..reference import cross_entropy as cross_entropy_specification
from ..reference import divergence as divergence_specification
from ..reference import token_statistics as token_statistics_specification
from ..reference.tolerance import assert_accurate
from ..token_statistics import token_statistics
from .measure import relative_error
from .problem import Inputs, reason

Function = Callable[[Inputs], Any]
STATISTICS = ("log_probs", "entropy", "logsumexp", "log_sum_sq_probs")
# (N, V) and (N, V, H) around every tile size: prime V, odd H / 8, a real vocabulary. The last of each is for a GPU.
ROW_SHAPES = ((1, 1), (3, 17), (37, 129), (5, 4097), (2, 50_257), (130, 50_257))
HEAD_SHAPES = ((1, 5, 8), (37, 129, 24), (19, 1031, 72), (67, 4097, 136))
POOLED, FEWEST_DRAWS, MOST_DRAWS = 2**18, 4, 64  # logits of a check over all draws of its inputs; how many draws
LARGEST = {"cuda": 2**23, "cpu": 110_000, "interpreter": 21_000}  # most logits of a check


class Check(NamedTuple):
    primitive: str
    name: str
    logits: int  # their number
    inputs: Callable[[], Inputs]
    leaves: tuple[str, ...]
    ours: Function
    plain: Function

    @classmethod
    def of(
        cls,
        primitive: str,
        name: str,
        inputs: Callable[..., Inputs],
        sizes: tuple[int, ...],  # arguments of inputs: N, V, …
        leaves: tuple[str, ...],
        *pair: Callable[..., Any],  # ours, plain
        **how: Any,
    ) -> Check:
        ours, plain = (functools.partial(function, **how) for function in pair)
        return cls(primitive, name, sizes[0] * sizes[1], functools.partial(inputs, *sizes), leaves, ours, plain)


def normal(*shape: int) -> Tensor:
    """Inputs are drawn on the CPU, so that every device checks the same numbers."""
    return torch.randn(shape, dtype=torch.float64)


def rows(N: int, V: int) -> Inputs:
    """Logits ``(N, V)`` with peaks, targets with an ignored one where there are several, class weights."""
    target = torch.randint(V, (N,))
    logits = 3 * normal(N, V)
    logits[torch.arange(N), target] += 4 * normal(N)
    if N > 2:
        target[1] = -100
    return {"logits": logits, "target": target, "class_weight": torch.rand(V, dtype=torch.float64) + 0.5}


def head(N: int, V: int, H: int) -> Inputs:
    target = torch.randint(V, (N,))
    weight = normal(V, H) / H**0.5
    hidden = normal(N, H) + (4 + 2 * normal(N, 1)) * weight[target]
    if N > 2:
        target[1] = -100
    x = {"hidden": hidden, "weight": weight, "bias": normal(V), "target": target}
    return x | {"class_weight": torch.rand(V, dtype=torch.float64) + 0.5, "low": normal(N, 3), "rank": normal(V, 3)}


def logits_of(x: Inputs, hidden: str = "hidden", weight: str = "weight", bias: str | None = None) -> Tensor:
    """Plain logits, in the dtype of the inputs and then upcast."""
    if "logits" in x:
        return upcast(x["logits"])
    return upcast(F.linear(x[hidden], x[weight], x[bias] if bias else None))


def row_checks() -> Iterator[Check]:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "label smoothing, class weights": {"label_smoothing": 0.1, "weight": True},
        "z-loss, softcap": {"z_loss": 1e-3, "softcap": 5.0},
        "sum": {"reduction": "sum"},
        "per token": {"reduction": "none"},
        "all options, per token": {"label_smoothing": 0.1, "weight": True, "z_loss": 1e-3, "reduction": "none"},
    }

    def ours(x: Inputs, weight: bool = False, **how: Any) -> Any:
        return cross_entropy(x["logits"], x["target"], x["class_weight"] if weight else None, **how)

    def plain(x: Inputs, weight: bool = False, **how: Any) -> Any:
        logits = logits_of(x)
        class_weight = x["class_weight"].to(logits.dtype) if weight else None
        return cross_entropy_specification.cross_entropy(logits, x["target"], class_weight, **how)

    for N, V in ROW_SHAPES:
        for name, how in options.items():
            # With one class the gradient is 0 but for rounding errors, which happen to cancel in plain PyTorch.
            if V == 1 and len(how) > 1:
                continue
            yield Check.of("cross_entropy", f"({N}, {V}), {name}", rows, (N, V), ("logits",), ours, plain, **how)
    yield Check("cross_entropy", "(9, 300), a third of the logits -inf", 2700, infinite, ("logits",), ours, plain)
    yield Check("cross_entropy", "(7, 33, 5), class dimension not last", 1155, images, ("logits",), ours, plain)
    yield Check("cross_entropy", "(37, 129), class probabilities", 4773, soft, ("logits",), ours, plain)
    for N, V in ROW_SHAPES:
        name = f"logits ({N}, {V})"
        yield Check.of("token_statistics", name, rows, (N, V), ("logits",), statistics, plain_statistics)


def infinite() -> Inputs:
    x = rows(9, 300)
    x["logits"][:, ::3] = -torch.inf
    x["target"] = torch.arange(9) * 3 + 1
    return x


def soft() -> Inputs:
    return rows(37, 129) | {"target": normal(37, 129).softmax(-1)}


def images() -> Inputs:
    return {"logits": 3 * normal(7, 33, 5), "target": torch.randint(33, (7, 5))}


def statistics(x: Inputs, low_rank: bool = False, **how: Any) -> Any:
    if low_rank:
        how["low_rank"] = x["low"], x["rank"]
    logits = x["logits"] if "logits" in x else LinearLogits(x["hidden"], x["weight"], x["bias"], **how)
    found = token_statistics(logits, x["target"], STATISTICS)
    return tuple(getattr(found, name) for name in STATISTICS)


def plain_statistics(
    x: Inputs, scale: float = 1.0, softcap: float | None = None, temperature: Any = 1.0, low_rank: bool = False
) -> Any:
    z = scale * logits_of(x, bias="bias")
    if low_rank:
        z = z + upcast(F.linear(x["low"], x["rank"]))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    found = token_statistics_specification.token_statistics(z, x["target"], temperature)
    return tuple(found[name] for name in STATISTICS)


def head_checks() -> Iterator[Check]:
    leaves = ("hidden", "weight", "bias")
    options: dict[str, dict[str, Any]] = {
        "gradients in forward": {"route": "gradients_in_forward"},
        "recompute": {"route": "recompute"},
        "several chunks": {"route": "gradients_in_forward", "workspace": 100_000},
        "several slices": {"route": "recompute", "workspace": 100_000},
        "label smoothing, class weights": {"label_smoothing": 0.1, "weight": True},
        "z-loss, softcap, scale": {"z_loss": 1e-3, "softcap": 5.0, "scale": 0.7},
        "per token": {"reduction": "none"},
    }
    of_logits: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap, scale": {"softcap": 5.0, "scale": 0.7},
        "temperature": {"temperature": 0.6},
        "low rank": {"low_rank": True},
    }

    def ours(x: Inputs, weight: bool = False, **how: Any) -> Any:
        if weight:
            how["weight"] = x["class_weight"]
        return linear_cross_entropy(x["hidden"], x["weight"], x["target"], linear_bias=x["bias"], **how)

    def plain(x: Inputs, scale: float = 1.0, weight: bool = False, **how: Any) -> Any:
        for ours_alone in ("route", "workspace"):
            how.pop(ours_alone, None)
        logits = scale * logits_of(x, bias="bias")
        class_weight = x["class_weight"].to(logits.dtype) if weight else None
        return cross_entropy_specification.cross_entropy(logits, x["target"], class_weight, **how)

    for N, V, H in HEAD_SHAPES:
        for name, how in options.items():
            name = f"({N}, {V}, {H}), {name}"
            yield Check.of("linear_cross_entropy", name, head, (N, V, H), leaves, ours, plain, **how)
        for name, how in of_logits.items():
            wanted = (*leaves, "low", "rank") if "low_rank" in how else leaves
            name = f"head ({N}, {V}, {H}), {name}"
            yield Check.of("token_statistics", name, head, (N, V, H), wanted, statistics, plain_statistics, **how)


def divergence_checks() -> Iterator[Check]:
    def ours(x: Inputs, kind: str) -> Any:
        if "logits" in x:
            return divergence(x["logits"], x["teacher_logits"], kind=kind)
        student = LinearLogits(x["hidden"], x["weight"])
        return divergence(student, LinearLogits(x["teacher_hidden"], x["teacher_weight"]), kind=kind)

    def plain(x: Inputs, kind: str) -> Any:
        teacher = upcast(x["teacher_logits"]) if "logits" in x else logits_of(x, "teacher_hidden", "teacher_weight")
        return divergence_specification.divergence(logits_of(x), teacher, kind)

    for kind in KINDS:
        for N, V in ROW_SHAPES[1:]:
            name = f"logits ({N}, {V}), {kind}"
            yield Check.of("divergence", name, two_rows, (N, V), ("logits",), ours, plain, kind=kind)
        for N, V, H in HEAD_SHAPES[1:]:
            name = f"heads ({N}, {V}, {H}), {kind}"
            yield Check.of("divergence", name, two_heads, (N, V, H), ("hidden", "weight"), ours, plain, kind=kind)


def two_rows(N: int, V: int) -> Inputs:
    x = rows(N, V)
    return x | {"teacher_logits": x["logits"] + normal(N, V)}


def two_heads(N: int, V: int, H: int) -> Inputs:
    x = head(N, V, H)
    return x | {"teacher_hidden": x["hidden"] + 0.3 * normal(N, H), "teacher_weight": x["weight"] + 0.1 * normal(V, H)}


def checks() -> Iterator[Check]:
    yield from row_checks()
    yield from head_checks()
    yield from divergence_checks()


def run(function: Function, check: Check, x: Inputs) -> dict[str, Tensor]:
    """Results, and gradients under upstream gradients that differ per result and per token."""
    x = x | {name: x[name].detach().requires_grad_() for name in check.leaves}
    out = function(x)
    outs = {"loss": out} if isinstance(out, Tensor) else dict(zip(STATISTICS, out, strict=True))
    upstream = [
        torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape).to(t.device, t.dtype)
        for t in outs.values()
    ]
    grads = torch.autograd.grad(list(outs.values()), [x[name] for name in check.leaves], upstream)
    found = outs | {f"d_{name}": g for name, g in zip(check.leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def verdict(
    check: Check, dtype: torch.dtype, device: str, backend: settings.Backend, most: int = MOST_DRAWS
) -> tuple[float, float, str]:
    """The largest relative errors against float64, ours and plain PyTorch's, and what is wrong, if anything.

    They are over several draws, for small shapes ``most``: on a few numbers plain PyTorch can be exact by luck, and is then no
    yardstick.
    """
    pooled: dict[str, list[tuple[Tensor, ...]]] = {}
    try:
        for seed in range(min(most, max(FEWEST_DRAWS, POOLED // check.logits))):
            torch.manual_seed(seed)
            x = {name: v.to(device, dtype if v.is_floating_point() else v.dtype) for name, v in check.inputs().items()}
            exact = run(check.plain, check, {n: v.double() if v.is_floating_point() else v for n, v in x.items()})
            yardstick = run(check.plain, check, x)
            with settings.backend(backend):
                got = run(check.ours, check, x)
            for name, value in got.items():
                assert value.shape == exact[name].shape, f"{name}: {tuple(value.shape)}, not {tuple(exact[name].shape)}"
                of_draw = (value, yardstick[name].to(value.dtype), exact[name])
                pooled.setdefault(name, []).append(tuple(t.flatten() for t in of_draw))
    except Exception as failure:
        return float("nan"), float("nan"), reason(failure)
    found = {name: [torch.cat(part) for part in zip(*draws, strict=True)] for name, draws in pooled.items()}
    error, plain_error = (max(relative_error(parts[i], parts[2]) for parts in found.values()) for i in (0, 1))
    try:
        for name, (ours, plain, truth) in found.items():
            assert_accurate(ours, plain, truth, name)
    except AssertionError as failure:
        return error, plain_error, str(failure)
    return error, plain_error, ""


def large_check(device: str, backend: settings.Backend, N: int = 2**31 // 128_256 + 65, V: int = 128_256) -> str:
    """Check the first and last rows of more than 2³¹ logits, where a 32-bit offset wraps; returns what is wrong, if any."""
    logits = torch.empty(N, V, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(V, (N,), device=device)
    with settings.backend(backend):
        loss = cross_entropy(logits, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)

    def plain(rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = logits[rows].detach().to(dtype).requires_grad_()
        found = F.cross_entropy(x, target[rows], reduction="none")
        return found.detach(), torch.autograd.grad(found.sum(), x)[0]

    try:
        for rows in (slice(0, 16), slice(N - 16, N)):
            (eager, d_eager), (exact, d_exact) = plain(rows, torch.bfloat16), plain(rows, torch.float64)
            assert_accurate(loss[rows].detach(), eager, exact, "loss")
            assert_accurate(gradient[rows], d_eager, d_exact, "d_logits")
    except AssertionError as failure:
        return str(failure)
    return ""

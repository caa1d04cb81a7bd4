"""Checks of the parts of a :class:`LinearLogits`, and how it detects that one of them changed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakTensorKeyDictionary

from .autodiff import while_compiling
from .numerics import autocast_dtype, statistics_dtype


class Snapshot:
    """The versions of some tensors when this was taken: how often each had been changed in place. Inference tensors have none.

    A compiled function takes an empty snapshot, which the first comparison outside it fills.
    """

    def __init__(self, **tensors: Tensor | None) -> None:
        self.versions = _versions(tensors)

    def changed(self, **tensors: Tensor | None) -> tuple[str, int, int] | None:
        """The first of the same tensors that has changed since: its name, its version then and now."""
        now = _versions(tensors)
        if not self.versions:
            self.versions = now
            watch(*tensors.values())
        return next(((name, self.versions[name], n) for name, n in now.items() if n != self.versions[name]), None)


def _versions(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    if torch.compiler.is_compiling():
        return {}
    return {name: t._version for name, t in tensors.items() if t is not None and not t.is_inference()}


def version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


_watched = WeakTensorKeyDictionary()  # the tensors of heads, some of which an optimizer may change


def watch(*parameters: Tensor | None) -> None:
    """Make an optimizer's step change the versions of these: a fused optimizer, PyTorch's or another's, does not."""
    if not torch.compiler.is_compiling():
        for t in parameters:
            if t is not None and not t.is_inference():
                _watched[t if t._base is None else t._base] = None


def _memory(t: Tensor) -> int:
    """A key that is the same for all tensors in one memory."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # it has none
        return id(t)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Increment the versions of the watched tensors that this step wrote to. They are recognised by their memory, since a head
    may hold a detached parameter, which is another tensor."""
    if len(_watched) > 0:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        written = {_memory(p) for p in parameters if p.grad is not None}
        watched = [ref() for ref in _watched.keyrefs()]  # a list: other threads make heads meanwhile
        increment_version([t for t in watched if t is not None and _memory(t) in written])


register_optimizer_step_post_hook(_after_step)


def check_tensors(hidden: Any, weight: Any, bias: Any) -> None:
    named = {"hidden (…, H)": hidden, "weight (V, H)": weight} | ({} if bias is None else {"bias (V,)": bias})
    for name, t in named.items():
        if not isinstance(t, Tensor):
            head = isinstance(t, torch.nn.Module)
            instead = ": pass its weight and bias, or replace it by LinearHead.from_linear" if head else ""
            raise TypeError(f"{name} must be a tensor, got a {type(t).__name__}{instead}")


def check_whereabouts(weight: Any, module: Any) -> None:
    if hasattr(weight, "ds_id") and weight.ndim == 1:
        raise ValueError(
            f"the head's weight {tuple(weight.ds_shape)} is partitioned by ZeRO-3 outside its module's forward: make the "
            "LinearLogits inside that forward (LinearHead does) or inside GatheredParameters, and pass module=<that module>"
        )
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel cannot join LinearLogits from several devices; use DistributedDataParallel, or compute the "
            "loss inside the module"
        )


def check_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None, B: Tensor | None, *, empty: bool = False
) -> None:
    """``empty``: a rank may hold no rows of the head."""
    if not hidden.is_floating_point():
        raise TypeError(f"hidden {tuple(hidden.shape)} must be of a floating dtype, got {hidden.dtype}")
    shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected hidden (…, H) and weight (V, H) of one H, got {shapes}")
    if weight.shape[0] == 0 and not empty:
        raise ValueError(f"expected a weight (V, H) with rows, got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if u is not None and B is not None and (u.shape[:-1], B.shape) != (hidden.shape[:-1], (len(weight), u.shape[-1])):
        raise ValueError(f"expected low_rank (…, R) and (V, R), got {tuple(u.shape)} and {tuple(B.shape)} for {shapes}")
    for name, t in (("weight", weight), ("bias", bias), ("low_rank[0]", u), ("low_rank[1]", B)):
        if t is not None and t.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device}, {name} {tuple(t.shape)} on {t.device}: move one of them")
        if t is not None and t.dtype != hidden.dtype:
            raise TypeError(
                f"hidden is {hidden.dtype}, {name} {tuple(t.shape)} is {t.dtype}: cast one, or use autocast"
            )


def autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    dtype = autocast_dtype(hidden.device)
    if dtype is None:
        return hidden, *others
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (hidden, *others)
    )


def per_token_temperature(temperature: float | Tensor, hidden: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return temperature
    if temperature.requires_grad:
        shape = tuple(temperature.shape)
        raise ValueError(f"temperature {shape} gets no gradient here: detach it, or divide LinearLogits by it")
    tokens = hidden.shape[:-1]
    if temperature.ndim == hidden.ndim and temperature.shape[-1] == 1:
        temperature = temperature.squeeze(-1)
    try:
        return temperature.to(hidden.device, statistics_dtype(hidden.dtype), copy=True).expand(tokens)
    except RuntimeError:
        raise ValueError(
            f"expected temperature with one number per token {tuple(tokens)}, got {tuple(temperature.shape)}"
        ) from None


def callers() -> Iterator[Any]:
    """The frames of the caller and of its callers, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def _autograd_function(code: CodeType) -> Any:
    """The ``torch.autograd.Function`` whose ``forward`` this is, if any."""
    if code.co_name != "forward":
        return None
    classes = [torch.autograd.Function]
    for cls in classes:
        classes += cls.__subclasses__()
    return next((cls for cls in classes if getattr(inspect.unwrap(cls.forward), "__code__", None) is code), None)


def refuse_autograd_function(logits: Any) -> None:
    """Raise in a ``torch.autograd.Function`` that was given ``logits``: it passes gradients on to tensors only. Checkpointing
    that was also given a tensor that requires grad may take them: it runs forward again."""
    for frame in callers():
        function = _autograd_function(frame.f_code)
        if function is None:
            continue
        names, varargs, _, values = inspect.getargvalues(frame)
        args = [values.get(name) for name in names] + list(values[varargs] if varargs else ())
        again = function is CheckpointFunction and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if not again and any(a is logits or getattr(a, "base", None) is logits for a in args):
            raise RuntimeError(
                f"LinearLogits {tuple(logits.shape)} given to {function.__name__}.apply would get no gradient, which an "
                "autograd Function passes on to tensors only: give it materialize(), or detach() where no gradient is "
                "wanted; to checkpoint, pass use_reentrant=False"
            )


@while_compiling  # the callers are those who compile the function
def _in_reentrant_checkpoint() -> bool:
    return any(frame.f_code is CheckpointFunction.forward.__code__ for frame in callers())


def refuse_reentrant_checkpoint() -> None:
    """Raise in reentrant checkpointing, which runs a function without gradients and connects only the tensors it returns."""
    if _in_reentrant_checkpoint():
        raise RuntimeError(
            "LinearLogits made inside reentrant activation checkpointing would get no gradient: pass "
            "use_reentrant=False to checkpoint, or leave the head out of it"
        )

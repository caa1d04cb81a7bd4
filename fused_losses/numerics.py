"""What all losses have in common: the precision they compute in, and the checks of the options they share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .autodiff import host_may_read

SUM_ELEMENTS = 2**15  # elements of fp32 rows that are summed in float64 at a time
SUM_OF_MANY = 2**21  # … of tensors as large as logits: 16 MiB of float64; 8 times as many on a GPU, for fewer launches


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16- and 32-bit inputs, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, in which a row's partial results are combined after the pass over it; fp32 on a device without float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide_sums(x: Tensor, w: Tensor | None, elements: int = SUM_ELEMENTS) -> Tensor:
    """``Σ_j w_j x_j`` of rows ``(n, V)`` in float64, a few rows at a time: PyTorch makes a copy in that dtype."""
    wide, size = wide_dtype(x.device), max(1, elements // max(x.shape[1], 1))
    parts = x.split(size)
    if w is None:
        return torch.cat([part.sum(-1, dtype=wide) for part in parts])
    of_parts = w.split(size) if w.ndim == 2 else [w] * len(parts)
    return torch.cat([(part * v).sum(-1, dtype=wide) for part, v in zip(parts, of_parts, strict=True)])


def wide_sum(x: Tensor, dim: int) -> Tensor:
    """:func:`wide_sums` over any dimension of a tensor as large as logits."""
    dtype = wide_dtype(x.device)
    if x.dtype == dtype or x.numel() == 0 or torch.compiler.is_compiling():
        return x.sum(dim, dtype=dtype)
    rows = x.movedim(dim, -1)
    elements = SUM_OF_MANY if x.is_cpu else 8 * SUM_OF_MANY
    return wide_sums(rows.reshape(-1, rows.shape[-1]), None, elements).view(rows.shape[:-1])


def sum_of_losses(losses: Tensor) -> Tensor:
    """The sum of ``losses``, in float64 and rounded once."""
    return losses.sum(dtype=wide_dtype(losses.device)).to(losses.dtype)


def upcast(x: Tensor) -> Tensor:
    """``x`` in the precision in which statistics are computed; not copied if it already has that."""
    return x.to(statistics_dtype(x.dtype))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on ``device``; None where autocast is off, or unknown, as on ``meta``."""
    # Compares the device's type: older versions of Dynamo do not trace torch.amp.is_autocast_available.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast is off."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check_scaling(softcap: float | None = None, temperature: float | Tensor | None = None) -> None:
    """Raise if the logits would have no distribution. A tensor's value is not checked: that would wait for the device."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive, or None for no bound, got {softcap}")
    if temperature is not None and not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def reduction_of(reduction: str, size_average: Any, reduce: Any) -> str:
    """The reduction, from PyTorch's deprecated arguments if one is given."""
    older = size_average is not None or reduce is not None
    return nn._reduction.legacy_get_string(size_average, reduce) if older else reduction


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction; use 'mean', 'sum' or 'none'")


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")


def check_masks(**masks: Tensor | None) -> None:
    """Raise if an entry is below 0, as in labels or an additive mask: each would count as a token. On a GPU the device's next
    synchronisation fails instead."""
    for name, mask in masks.items():
        if mask is None or mask.dtype in (torch.bool, torch.uint8) or not host_may_read(mask):
            continue
        message = (
            f"{name} {tuple(mask.shape)} has entries below 0, a mask is 0 or 1: of labels it is labels != ignore_index"
        )
        if mask.device.type != "cpu":
            torch._assert_async((mask >= 0).all(), message)
        elif not (mask >= 0).all():
            raise ValueError(message)


def check_between(low: float, high: float, /, **options: float | None) -> None:
    """Raise if an option is out of range. A tensor's value is not checked: that would wait for the device."""
    for name, x in options.items():
        if x is not None and not isinstance(x, Tensor) and not low <= x <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {x}")


def check_choice(choices: Collection[str], /, **options: str) -> None:
    """Raise if an option is none of the choices."""
    for name, x in options.items():
        if x not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {x!r}")


def on_device(x: Tensor | float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` as a tensor on ``device``; a number is filled in there, since a copy from the host would wait for the device."""
    return x.to(device, dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def log1mexp(x: Tensor) -> Tensor:
    r""":math:`\log(1 - e^x)` for :math:`x \le 0`, accurate at both ends and finite, with finite gradient, at 0.

    Source: Mächler, "Accurately computing log(1 − exp(−|a|))" (2012). At 0, where the limit is −∞, the value is that of
    the largest negative number and the gradient 0.

    Example:
        >>> log1mexp(torch.tensor([-50.0, -0.6931472, -1e-10, 0.0]))
        tensor([-1.9287e-22, -6.9315e-01, -2.3026e+01, -8.7337e+01])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    split = -math.log(2)
    # Each branch sees only its own side: where() passes zero to the other, and zero times an infinite slope is nan.
    return torch.where(x < split, torch.log1p(-x.clamp(max=split).exp()), (-torch.expm1(x.clamp(min=split))).log())

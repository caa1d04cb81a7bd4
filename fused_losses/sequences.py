"""Sums and means over the tokens a mask selects.

What a mask hides is replaced before it is summed, never multiplied by zero: a nan or inf there reaches neither the
value nor the gradient.
"""

from __future__ import annotations

from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Sum of ``x`` where ``mask`` is nonzero (everywhere without a mask), over ``dim`` or over everything.

    Example:
        >>> masked_sum(torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([1, 0, 1]))
        tensor(3.)
    """
    if mask is not None:
        x = x.masked_fill(mask == 0, 0)
    return x.sum() if dim is None else x.sum(dim)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` is nonzero; 0 where nothing is selected.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [0, 0]]), dim=-1)
        tensor([2., 0.])
    """
    if mask is None:
        return x.mean() if dim is None else x.mean(dim)
    count = (mask != 0).sum() if dim is None else (mask != 0).sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)

r"""The logits that a head computes from hidden states.

.. math:: z_{nj} = \frac{c}{T_n}\tanh\Big(\frac{s}{c}\big(\sum_k h_{nk} W_{jk} + \sum_r u_{nr} B_{jr} + b_j\big)\Big)
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The whole logits: scale first, then softcap, then temperature.

    Args:
        hidden: ``(…, H)``.
        weight: ``(V, H)``.
        bias: ``(V,)``.
        scale: :math:`s`.
        softcap: :math:`c`; None for no bound, ``z = s·(…)/T``.
        temperature: :math:`T`, a number or one per token ``(…)``.
        low_rank: ``(u, B)``, ``(…, R)`` and ``(V, R)``.

    Returns:
        ``(…, V)``.
    """
    z = torch.einsum("...k,jk->...j", hidden, weight)
    if low_rank is not None:
        z = z + torch.einsum("...r,jr->...j", *low_rank)
    if bias is not None:
        z = z + bias
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)

"""A gradient made in forward, times the upstream gradient of its loss: ``kernels/scale.py`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import BLOCK


def scale(gradient: Tensor, upstream: Tensor, out: Tensor) -> None:
    """``out = gradient·upstream``, multiplied in fp32 or wider and rounded once; ``out`` may be ``gradient``."""
    if out is gradient and gradient.is_cpu and upstream == 1:  # another device: the host would wait
        return
    if out.dtype.itemsize > 2 or (gradient.dtype != out.dtype and gradient.is_cuda):
        torch.mul(gradient, upstream, out=out)
    elif gradient.dtype != out.dtype:
        for i in range(0, len(gradient), BLOCK):
            out[i : i + BLOCK] = gradient[i : i + BLOCK] * upstream
    else:
        if out is not gradient:
            out.copy_(gradient)
        # A GPU would round a 0-dim factor to 16 bits; a 1-dim one makes it multiply in fp32, for which a CPU makes copies.
        for piece in out.view(-1).split(max(1, out.numel() if out.is_cuda else 256 * BLOCK)):
            piece.mul_(upstream.reshape(1))

"""Logits that are never made: the hidden states and the head that would make them.

A language model's logits are ``tokens × vocabulary``, the largest tensor of a training step, and a loss reads only a
few numbers per token from them. :class:`LinearLogits` stands for that tensor: it has its shape and its gradients, and
what a loss does with it is answered from ``hidden`` and ``weight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.numerics import statistics_dtype, upcast


class Rows(NamedTuple):
    """The tokens of a :class:`LinearLogits`, one row each, in the order of its token dimensions."""

    hidden: Tensor  # (N, H)
    temperature: Tensor | None  # (N,), fp32 (float64 for float64); None: 1 everywhere
    low_rank: tuple[Tensor, Tensor] | None  # (N, R) and (V, R)


class _Identity(torch.autograd.Function):
    """``hidden``, with the head's parameters among its ancestors: DDP looks there for what a step uses."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor | None) -> Tensor:
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in ctx.needs_input_grad[1:])


class _Rest:
    """What a :class:`LinearLogits` holds beside ``hidden``.

    Neither tuple, dict nor dataclass: FSDP2 casts and DDP counts the tensors it finds in those, and the weight is not
    an output.
    """

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@dataclass(eq=False, init=False, repr=False)
class LinearLogits:
    r"""A tensor of logits that is never materialised.

    .. math:: z = c \tanh(s\,(h W^\top + u B^\top + b) / c) / T

    What the fused operations read:

    - ``rows()``: the tokens as ``Rows(hidden (N, H), temperature (N,) | None, low_rank ((N, R), (V, R)) | None)``, after
      checking that nothing changed since construction. Results shaped ``(N,)`` go back with ``.view(token_shape)``.
    - ``weight (V, H)``, ``bias (V,) | None``: already cast (autocast) and cut to the rows selected; detached where the
      logits need no gradient.
    - ``scale``: float; ``softcap``: float or None; ``group``, ``module``: as given.
    - ``dtype``: the label: what functions with PyTorch's name round their result to. Not the dtype of ``hidden``.
    - ``token_shape``: ``shape`` without the vocabulary; ``vocab_dim``: where the vocabulary stands in ``shape``, ≥ 0;
      ``hidden`` is always ``(*token_shape, H)``, with the vocabulary's dimension taken out and H put last.
    - ``with logits.gathered():`` around everything that reads the weight in forward, and
      ``logits.gather_in_backward(output)`` on each differentiable result: with ``module``, they make the weight whole
      there. Both do nothing without it.

    Args:
        hidden: hidden states, ``(…, H)``.
        weight: the head's rows, ``(V, H)``, of the same dtype (under autocast both are cast).
        bias: ``(V,)``.
        scale: multiplies the products.
        softcap: bound ``c`` of the logits; None: no bound.
        temperature: a number, or a tensor with one number per token, which gets no gradient.
        low_rank: ``(u, B)``, ``(…, R)`` and ``(V, R)``: a LoRA update, ``u = s·dropout(h)Aᵀ``.
        group: process group whose ranks hold equal consecutive shares of the vocabulary.
        module: the module that owns the weight, where it is sharded between uses (FSDP2, ZeRO-3).
    """

    hidden: Tensor
    rest: Any

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float | Tensor = 1.0,
        low_rank: tuple[Tensor, Tensor] | None = None,
        group: Any = None,
        module: Any = None,
        rest: Any = None,
    ) -> None:
        if rest is None:
            assert weight is not None
            rest = _Rest(
                weight=weight,
                bias=bias,
                scale=scale,
                softcap=softcap,
                temperature=temperature,
                low_rank=low_rank,
                group=group,
                module=module,
                vocab_dim=hidden.ndim - 1,
                dtype=hidden.dtype,
            )
            hidden = _Identity.apply(hidden, weight, bias, *(low_rank or ()))
        self.hidden = hidden
        self.rest = rest

    @property
    def weight(self) -> Tensor:
        return self.rest.weight

    @property
    def bias(self) -> Tensor | None:
        return self.rest.bias

    @property
    def scale(self) -> float:
        return self.rest.scale

    @property
    def softcap(self) -> float | None:
        return self.rest.softcap

    @property
    def temperature(self) -> float | Tensor:
        """A number, or a tensor of ``token_shape``."""
        return self.rest.temperature

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.rest.low_rank

    @property
    def group(self) -> Any:
        return self.rest.group

    @property
    def module(self) -> Any:
        return self.rest.module

    @property
    def vocab_dim(self) -> int:
        return self.rest.vocab_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.rest.dtype

    @property
    def token_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def shape(self) -> torch.Size:
        tokens = self.token_shape
        return torch.Size([*tokens[: self.vocab_dim], self.weight.shape[0], *tokens[self.vocab_dim :]])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad

    def rows(self) -> Rows:
        """The tokens, flattened; see the class."""
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        temperature = self.temperature
        if not isinstance(temperature, Tensor):
            temperature = (
                None if temperature == 1 else hidden.new_full((), temperature, dtype=statistics_dtype(hidden.dtype))
            )
        if temperature is not None:
            temperature = temperature.expand(self.token_shape).reshape(-1)
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = (low_rank[0].reshape(-1, low_rank[0].shape[-1]), low_rank[1])
        return Rows(hidden, temperature, low_rank)

    def materialize(self) -> Tensor:
        """The logits themselves, differentiable, in ``dtype``."""
        hidden, temperature, low_rank = self.rows()
        with self.gathered():
            z = F.linear(upcast(hidden), upcast(self.weight), None if self.bias is None else upcast(self.bias))
        if low_rank is not None:
            z = z + upcast(low_rank[0]) @ upcast(low_rank[1]).T
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if temperature is not None:
            z = z / temperature.unsqueeze(-1)
        return z.to(self.dtype).view(*self.token_shape, -1).movedim(-1, self.vocab_dim)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The weight is whole inside."""
        yield

    def gather_in_backward(self, output: Tensor) -> Tensor:
        """``output``, whose backward finds the weight whole."""
        return output

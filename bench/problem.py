"""What a cases file is made of.

A cases file (``bench/linear_cross_entropy.py`` is the shortest) is a module with

- ``inputs(problem)``: the tensors, by name; ``LEAVES``: those that get a gradient; ``ROWS``: those with one entry per row, so
  that the check can take a few rows at a time;
- ``OURS``: contenders of this package; ``eager``: plain PyTorch, the yardstick of every ratio and every tolerance;
- ``reference(rows, whole)``: what these rows contribute to the result, by ``fused_losses.reference``: called in float64;
- ``work(problem)``: the fewest operations and bytes of forward and of backward; ``FLOOR``: which of them bounds the time;
  ``PARTS``: whether forward and backward have a floor each, or only their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import Shape

Inputs = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    shape: Shape
    tokens: int
    dtype: torch.dtype
    distribution: str  # "random", "peaked" or "zipf"
    device: str
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.shape.name} (V {self.shape.vocab}, H {self.shape.hidden})"
        return f"{shape}, {self.tokens} tokens, {dtype}, {self.distribution} inputs"

    def as_row(self) -> Row:
        """The entries of a row of results that describe the problem."""
        return {
            "shape": self.shape.name,
            "vocab": self.shape.vocab,
            "hidden": self.shape.hidden,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            "inputs": self.distribution,
        }

    def row(self, case: str, mode: str, contender: str, status: str) -> Row:
        return {"case": case, **self.as_row(), "mode": mode, "contender": contender, "status": status}


def reason(failure: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]


class Contender(NamedTuple):
    name: str
    call: Callable[[Inputs], Any]  # tensors by name -> a loss, or a tuple of results
    destroys: tuple[str, ...] = ()  # inputs it overwrites: it gets a fresh copy each time, made outside the clock
    exact: bool = True  # whether it must keep the tolerance rule


class Work(NamedTuple):
    """The fewest operations and bytes that a correct implementation needs."""

    flops: float
    bytes: float

    def __add__(self, other: Any) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def head_inputs(problem: Problem, tokens: tuple[int, ...]) -> Inputs:
    r"""Hidden states ``(*tokens, H)``, a head ``(V, H)`` and targets ``(*tokens)``.

    ``random``: standard normal hidden states and a head with entries N(0, 1/H), so that logits are N(0, 1) and every token is
    about as likely as any other. ``peaked``: the target's row of the head, times N(log V + 2, 4²), is added to the hidden
    state, which raises the target's logit by as much: as in a trained model most targets are likely and some are not, and the
    mean loss is a few nats. ``zipf``: the same, with token frequencies as in a text, ``1/(rank + 2.7)``, in the distributions
    and among the targets: most of the vocabulary is unlikely everywhere.
    """
    V, H = problem.shape.vocab, problem.shape.hidden
    generator = torch.Generator(problem.device).manual_seed(problem.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=problem.device)

    weight = normal(V, H) / math.sqrt(H)
    target = torch.randint(V, tokens, generator=generator, device=problem.device)
    hidden = normal(*tokens, H)
    frequency = 1 / (torch.arange(V, device=problem.device) + 2.7)
    if problem.distribution == "zipf":
        drawn = torch.rand(tokens, generator=generator, device=problem.device) * frequency.sum()
        target = torch.searchsorted(frequency.cumsum(0), drawn).clamp(max=V - 1)
    if problem.distribution != "random":
        hidden += peak(problem, normal(*tokens))[..., None] * weight[target]
    if problem.distribution == "zipf":  # log frequency, through a component that all tokens share
        hidden[..., 0] = math.sqrt(H)
        weight[:, 0] = (frequency / frequency.sum()).log() / math.sqrt(H)
    return {"hidden": hidden.to(problem.dtype), "weight": weight.to(problem.dtype), "target": target}


def peak(problem: Problem, normal: Tensor) -> Tensor:
    """How far the logit of each target is raised."""
    return math.log(problem.shape.vocab) + 2 + 4 * normal


def head_work(problem: Problem, tokens: int | None = None) -> tuple[Work, Work]:
    """Forward and backward of a loss over a head: one product ``(N, H) x (H, V)``, then two for the gradients.

    Bytes: hidden states and head are read in forward; in backward they are read again and their gradients written.
    """
    N, V, H = tokens or problem.tokens, problem.shape.vocab, problem.shape.hidden
    factors = (N + V) * H * problem.dtype.itemsize
    return Work(2 * N * V * H, factors), Work(4 * N * V * H, 2 * factors)

"""Tokens and the head that would turn them into logits: the input of both routes and of the comparison of two heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autodiff import check_differentiable, constant, host_may_read, trains
from .chunked.linear_softmax import TILE, logits_tile
from .chunked.softmax_rows import row_statistics, transform
from .numerics import full_precision, statistics_dtype
from .planning import Plan, plan
from .products import add_product
from .row_statistics import RowStatistics, part_of, skipped, slices
from .settings import drop_ignored as drop_ignored_setting
from .settings import gradient_filter as gradient_filter_setting
from .vocab_parallel import VocabShard, packed

if TYPE_CHECKING:
    from .linear_logits import LinearLogits


INPUTS: Final = 5  # the first fields of a head, those that may get a gradient


class Head(NamedTuple):
    """Tokens and the head that would turn them into logits ``softcap·tanh(scale·(h Wᵀ + u Bᵀ + bias)/softcap)/temperature``."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H); None: hidden holds logits (N, V)
    bias: Tensor | None = None  # (V,)
    u: Tensor | None = None  # (N, R)
    B: Tensor | None = None  # (V, R)
    temperature: Tensor | None = None  # (N,)
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None  # the part of the vocabulary that weight, bias and B hold; None: all of it
    gradient_filter: float = 0.0  # see the setting

    @property
    def columns_here(self) -> int:
        """How many columns of logits this rank makes, padding included."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def vocab(self) -> int:
        """The size of the whole vocabulary."""
        return self.columns_here if self.shard is None else self.shard.vocab

    @property
    def planned_vocab(self) -> int:
        """The vocabulary size to plan with, the same on all ranks that share a vocabulary: they must plan alike."""
        return self.columns_here if self.shard is None else self.shard.even_size

    @property
    def steepest(self) -> Tensor | float:
        """The largest change of a final logit when the product of hidden and weight changes by 1."""
        return abs(self.scale) if self.temperature is None else (self.scale / self.temperature).abs().amax()

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self[:INPUTS]

    @property
    def trained(self) -> list[bool]:
        """Which of the inputs need a gradient."""
        return [trains(t) for t in self.inputs]

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return None if self.u is None or self.B is None else (self.u, self.B)

    def with_inputs(self, inputs: Iterable[Tensor | None]) -> Head:
        values: dict[str, Any] = dict(zip(self._fields, inputs, strict=False))
        return self._replace(**values)

    def packed(self) -> dict[str, Any]:
        """The operators' keyword arguments, by the names of its fields."""
        return self._replace(shard=packed(self.shard))._asdict()  # type: ignore[arg-type]

    def detached(self) -> Head:
        return self.with_inputs(None if t is None else t.detach() for t in self.inputs)

    def empty_gradients(
        self, wanted: Sequence[bool], dtypes: Sequence[torch.dtype], written: Sequence[bool]
    ) -> list[Tensor | None]:
        """Buffers for the inputs' gradients, None if not ``wanted``; zeroed unless the first write covers all (``written``)."""
        return [
            None if t is None or not want else (t.new_empty if all_of else t.new_zeros)(t.shape, dtype=dtype)
            for t, want, dtype, all_of in zip(self.inputs, wanted, dtypes, written, strict=True)
        ]

    def tokens(self, rows: slice | Tensor, ignored: Tensor | None = None) -> Head:
        """The tokens at ``rows``, with ``ignored`` ones ``(n,)`` zeroed: a nan there must not reach ``d_weight``."""

        # No helper function for the three: Dynamo would treat the rows it closes over as constants.
        hidden, u = self.hidden[rows], None if self.u is None else self.u[rows]
        temperature = None if self.temperature is None else self.temperature[rows]
        if ignored is not None:
            hidden = hidden.masked_fill(ignored[:, None], 0)
            u = None if u is None else u.masked_fill(ignored[:, None], 0)
        return self._replace(hidden=hidden, u=u, temperature=temperature)

    def columns(self, part: slice) -> Head:
        """The vocabulary entries at ``part``."""
        bias, B = part_of(self.bias, part), part_of(self.B, part)
        return self._replace(weight=self.weight[part], bias=bias, B=B)

    def plan(self, keep: Tensor | None = None, zero_ignored: bool = False, **options: Any) -> Plan:
        """:func:`fused_losses.plan` for its tokens, or those that :func:`kept_tokens` keeps."""
        N, H = self.hidden.shape
        M = N if keep is None else keep.shape[0]
        return plan(
            M,
            self.planned_vocab,
            H,
            self.hidden.dtype,
            ignored=None if zero_ignored else N - M,
            shared=self.shard is not None,
            gradient_filter=self.gradient_filter,
            **options,
        )

    def write_logits(self, out: Tensor) -> Tensor:
        """Write the logits before scale, softcap and temperature to ``out (n, V)``; not rounded to 16 bits if it is wider."""
        hidden, weight, bias = self[:3]
        if out.dtype == hidden.dtype:
            if torch.compiler.is_compiling():  # compiled, out= may not have padded rows
                out.copy_(F.linear(hidden, weight, bias))
            elif bias is None:
                torch.mm(hidden, weight.t(), out=out)
            else:
                torch.addmm(bias, hidden, weight.t(), out=out)
            return out if self.low_rank is None else out.addmm_(self.low_rank[0], self.low_rank[1].t())
        if not hidden.is_cuda:
            for columns in slices(out.shape[1], TILE):
                out[:, columns] = logits_tile(hidden, weight, bias, self.low_rank, slice(None), columns)
            return out
        add_product(out, hidden, weight.t(), first=True)
        if self.low_rank is not None:
            add_product(out, self.low_rank[0], self.low_rank[1].t(), first=False)
        return out if bias is None else out.add_(bias)


def head_of(logits: LinearLogits) -> Head:
    rows = logits.rows()
    u, B = rows.low_rank or (None, None)
    shard = None if logits.shard is None else logits.shard.of_head(rows.hidden, u)
    head = Head(
        rows.hidden, logits.weight, logits.bias, u, B, rows.temperature, logits.scale, logits.softcap, shard,
        gradient_filter_setting.value,
    )  # fmt: skip
    check_head(head)
    return head


def check_head(head: Head) -> None:
    hidden, weight = head.hidden, head.weight
    if hidden.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, other in (("linear_weight", weight), ("linear_bias", head.bias), ("u", head.u), ("B", head.B)):
        if other is None:
            continue
        if other.device != hidden.device:
            raise RuntimeError(
                f"input is on {hidden.device} and {name} {tuple(other.shape)} on {other.device}: move one"
            )
        if other.dtype != hidden.dtype:
            raise RuntimeError(
                f"input {tuple(hidden.shape)} is {hidden.dtype} and {name} {tuple(other.shape)} is {other.dtype}: "
                "cast one, or use autocast"
            )
    if not hidden.dtype.is_floating_point:
        raise RuntimeError(f"expected floating point input, got {hidden.dtype} {tuple(hidden.shape)}")


def ready(head: Head) -> Head:
    """The head as the operators need it: contiguous, and its temperature a constant."""
    temperature = constant("temperature", head.temperature, statistics_dtype(head.hidden.dtype))
    inputs = (None if t is None else t.contiguous() for t in head.inputs)
    return head.with_inputs(inputs)._replace(temperature=temperature)


def kept_tokens(ids: Tensor | None, drop_ignored: bool | None) -> tuple[Tensor | None, bool]:
    """Which tokens to project, and whether ignored ones among them must be zeroed.

    Counting them is a host synchronisation; where that is impossible (``torch.compile``, ``vmap``, graph capture) or unwanted
    (``drop_ignored=False``), every token is projected.
    """
    if ids is None:
        return None, False
    if not drop_ignored_setting.chosen(drop_ignored) or not host_may_read(ids):
        return None, True
    keep = (ids != -100).any(-1).nonzero().squeeze(1)
    return (None if keep.numel() == ids.shape[0] else keep), False


def differentiable_product(head: Head) -> Tensor:
    """Logits ``(N, V)`` before scale, softcap and temperature, recorded by autograd; in the inputs' dtype despite autocast."""
    with full_precision(head.hidden.device):
        x = head.hidden if head.weight is None else F.linear(head.hidden, head.weight, head.bias)
        return x if head.low_rank is None else x + head.low_rank[0] @ head.low_rank[1].t()


def whole_logits(head: Head, skip: Tensor | None) -> Tensor:
    """Final logits in plain differentiable PyTorch, fp32 or wider; ``skip`` ``(N,)``: tokens to zero, since they may be nan."""
    dtype = statistics_dtype(head.hidden.dtype)
    head = head.tokens(slice(None), skip)
    head = head.with_inputs(None if t is None else t.to(dtype) for t in head.inputs)
    return transform(differentiable_product(head), head.temperature, head.scale, head.softcap)[0]


def differentiable_statistics(
    head: Head, ids: Tensor | None, column_weight: Tensor | None, outputs: Sequence[str]
) -> RowStatistics:
    """The statistics in plain differentiable PyTorch on whole logits."""
    check_differentiable(head.hidden.shape[0], head.weight.shape[0], head.hidden.dtype)
    return row_statistics(whole_logits(head, skipped(ids)), ids, column_weight, outputs)

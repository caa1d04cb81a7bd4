"""Cross entropy of a head with class probabilities, which are as large as its logits: a chunk of tokens at a time.

It needs ``Σ_j w_j logp_j`` for each token, with ``w`` from the token's row of probabilities. :func:`label_loss` is a sum over
tokens, and makes the gradients of the head in forward: ``6NVH`` floating point operations. :func:`label_statistics` returns
numbers per token, differentiable in the labels too: backward recomputes a chunk's logits, ``8NVH`` in all. Both write a chunk's
gradient over its logits and add its products, as :mod:`fused_losses.gradients_in_forward` does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autodiff import (
    constant,
    differentiable_gradients,
    for_inputs,
    in_plain_pytorch,
    present,
    refuse_shard,
    transforms_active,
)
from .chunked.softmax_rows import CHUNK_ELEMENTS
from .gradients_in_forward import loss_and_gradients, times_factor, with_gradients
from .head import INPUTS, Head, differentiable_product, ready
from .numerics import full_precision, statistics_dtype
from .row_statistics import (
    Coefficients,
    RowStatistics,
    coefficients,
    empty_statistics,
    label_weights,
    only,
    part_of,
    slices,
)
from .settings import Backend, resolve_backend
from .token_statistics import d_label_weights, differentiable_softmax_rows, softmax_rows, softmax_rows_grad
from .vocab_parallel import VocabShard, packed

OUTPUTS = ("sum_log_probs", "weight_sum")
GRADIENTS = INPUTS + 2  # of the head's inputs, the column weights and the probabilities


def label_statistics(
    head: Head,
    probabilities: Tensor,  # (N, V)
    column_weight: Tensor | None,  # (V,)
    label_smoothing: float,
    *,
    workspace: int | str | None = None,
    backend: Backend | None = None,
) -> RowStatistics:
    """``sum_log_probs``, ``weight_sum`` and ``logsumexp`` ``(N,)``; see :func:`~fused_losses.row_statistics.label_weights`.

    Differentiable in the head's inputs, the column weights and the probabilities.
    """
    if column_weight is not None:
        column_weight = column_weight.to(statistics_dtype(head.hidden.dtype)).contiguous()
    if transforms_active():
        refuse_shard(packed(head.shard), (head.hidden.shape[0], head.weight.shape[0]))
        return _differentiable(head, column_weight, probabilities, label_smoothing)
    head, backend = ready(head), resolve_backend(head.hidden, backend)
    # Fixed in forward: settings may have changed by the time backward runs.
    room = head.plan(route="gradients_in_forward", workspace=workspace, backend=backend).budget
    sum_log_probs, weight_sum, logsumexp = linear_probabilities(
        **head.packed(),
        column_weight=column_weight,
        probabilities=probabilities,
        label_smoothing=label_smoothing,
        workspace=room,
        backend=backend,
    )
    return RowStatistics(sum_log_probs=sum_log_probs, weight_sum=weight_sum, logsumexp=logsumexp)


def label_loss(
    head: Head,
    probabilities: Tensor,  # (N, V)
    column_weight: Tensor | None,  # (V,)
    label_smoothing: float,
    of_sum_log_probs: Tensor,  # (N,)
    of_square: Tensor | None,  # (N,)
    workspace: int,
    accumulate: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``Σ_n of_sum_log_probs·sum_log_probs + of_square·logsumexp²``, with gradients for the head's inputs; and ``logsumexp``
    ``(N,)``."""
    dtype, wanted = statistics_dtype(head.hidden.dtype), head.trained
    column_weight, head = constant("weight", column_weight, dtype), ready(head)
    chunks = _Chunks(column_weight, probabilities, label_smoothing, backend)
    found = empty_statistics(head.hidden, head.hidden.shape[0], None, OUTPUTS)

    def over_logits(logits: Tensor, chunk: Head, _: Any, rows: Any, factor: Tensor | None) -> Tensor | None:
        statistics = chunks.statistics(logits, chunk, rows)
        found.put(statistics, rows)
        upstream = RowStatistics(sum_log_probs=of_sum_log_probs[rows])
        if of_square is not None:
            upstream = upstream._replace(logsumexp=2 * of_square[rows] * statistics.logsumexp)
        terms = coefficients(upstream, statistics, head.vocab, None, dtype)
        return chunks.write_gradient(logits, chunk, rows, statistics.logsumexp, terms, factor)

    with torch.no_grad(), full_precision(head.hidden.device):
        gradients = loss_and_gradients(
            head.detached(), None, None, False, over_logits, wanted, workspace, accumulate, backend
        )
        loss = (of_sum_log_probs * found.sum_log_probs).sum()
        if of_square is not None:
            loss += (of_square * found.logsumexp.square()).sum()
    return with_gradients(loss, gradients, head.inputs, backend), found.logsumexp


def _differentiable(
    head: Head, column_weight: Tensor | None, probabilities: Tensor, label_smoothing: float
) -> RowStatistics:
    """The same in plain differentiable PyTorch on whole logits."""
    return differentiable_softmax_rows(
        differentiable_product(head).unsqueeze(-1), None, column_weight, head.temperature, probabilities.unsqueeze(-1),
        label_smoothing, head.scale, head.softcap, OUTPUTS,
    )  # fmt: skip


class _Chunks(NamedTuple):
    """Computes statistics and gradient of a chunk's logits ``(n, V)``, those of the tokens at ``rows``."""

    column_weight: Tensor | None  # (V,)
    probabilities: Tensor  # (N, V)
    label_smoothing: float
    backend: str

    def of(self, rows: slice, shard: VocabShard | None) -> tuple[Tensor, Tensor | None, float]:
        """A chunk's ``w`` as the kernels take it: probabilities ``(n, V, 1)``, column weights, smoothing."""
        p, column_weight, smoothing = self.probabilities[rows], self.column_weight, self.label_smoothing
        if shard is not None and smoothing:  # kernels would smooth over the shard's columns
            w = label_weights(column_weight, p, smoothing, shard.vocab)
            assert w is not None
            p, column_weight, smoothing = w, None, 0.0
        return p.unsqueeze(-1), column_weight, smoothing

    def statistics(self, logits: Tensor, chunk: Head, rows: slice) -> RowStatistics:
        p, w, smoothing = self.of(rows, chunk.shard)
        seen = (logits.unsqueeze(-1), None, w, chunk.temperature, p, smoothing, chunk.scale, chunk.softcap)
        return only(softmax_rows(*seen, ",".join(OUTPUTS), False, self.backend, packed(chunk.shard)), OUTPUTS, False)

    def write_gradient(
        self, logits: Tensor, chunk: Head, rows: slice, logsumexp: Tensor, terms: Coefficients, factor: Tensor | None
    ) -> Tensor | None:
        """Write the gradient over the logits, in float16 times a factor, which is returned and no larger than the last one."""
        if logits.dtype == torch.float16:
            terms, factor = times_factor(terms, chunk, factor)
        if logits.shape[1]:
            p, w, smoothing = self.of(rows, chunk.shard)
            softmax_rows_grad(
                logits.unsqueeze(-1), None, w, chunk.temperature, logsumexp, *terms, p, smoothing, chunk.scale,
                chunk.softcap, self.backend, logits.unsqueeze(-1),
            )  # fmt: skip
        return factor


@torch.library.custom_op("fused_losses::linear_probabilities", mutates_args=())
def linear_probabilities(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    u: Tensor | None,  # (N, R)
    B: Tensor | None,  # (V, R)
    column_weight: Tensor | None,  # (V,)
    probabilities: Tensor,  # (N, V)
    temperature: Tensor | None,  # (N,)
    *,
    scale: float,
    softcap: float | None,
    shard: str,  # a VocabShard
    gradient_filter: float,  # used in backward
    label_smoothing: float,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_log_probs``, ``weight_sum``, ``logsumexp``: ``(N,)`` float64."""
    head = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard))
    found = empty_statistics(hidden, hidden.shape[0], None, OUTPUTS)
    chunks = _Chunks(column_weight, probabilities, label_smoothing, backend)

    def over_logits(logits: Tensor, chunk: Head, _: Any, rows: Any, __: Any) -> None:
        found.put(chunks.statistics(logits, chunk, rows), rows)

    with full_precision(hidden.device):
        loss_and_gradients(head, None, None, False, over_logits, [False] * INPUTS, workspace, None, backend)
    return found.sum_log_probs, found.weight_sum, found.logsumexp


@linear_probabilities.register_fake
def _(hidden: Tensor, *_tensors: Any, **_: Any) -> tuple[Tensor, ...]:
    found = empty_statistics(hidden, hidden.shape[0], None, OUTPUTS)
    return found.sum_log_probs, found.weight_sum, found.logsumexp


@torch.library.custom_op("fused_losses::linear_probabilities_grad", mutates_args=())
def linear_probabilities_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    B: Tensor | None,
    column_weight: Tensor | None,
    probabilities: Tensor,
    temperature: Tensor | None,
    logsumexp: Tensor,  # (N,) float64
    a: Tensor,  # (N,)
    d: Tensor,  # (N,)
    *,
    scale: float,
    softcap: float | None,
    shard: str,
    gradient_filter: float,
    label_smoothing: float,
    wanted: list[bool],
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first seven arguments, 0-dim where absent or not ``wanted``."""
    head = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard), gradient_filter)
    labels = (column_weight, probabilities)
    chunks = _Chunks(*labels, label_smoothing, backend)
    d_column_weight, d_probabilities = (
        torch.zeros_like(t) if t is not None and want else None for t, want in zip(labels, wanted[INPUTS:], strict=True)
    )

    def over_logits(logits: Tensor, chunk: Head, _: Any, rows: Any, factor: Tensor | None) -> Tensor | None:
        of_labels = d_column_weight is not None or d_probabilities is not None
        # A few rows at a time, since their copies are fp32 or wider; more rows on a GPU, for fewer launches.
        few = max(1, CHUNK_ELEMENTS * (1 if logits.is_cpu else 8) // max(logits.shape[1], 1))
        for part in slices(len(logits) if of_labels else 0, few):
            some = slice(rows.start + part.start, rows.start + part.stop)
            temperature = part_of(chunk.temperature, part)
            d_w = d_label_weights(logits[part], temperature, scale, softcap, logsumexp[some], d[some])
            if d_column_weight is not None:
                w = label_weights(None, probabilities[some], label_smoothing, head.vocab)
                assert w is not None
                d_column_weight.add_((d_w * w).sum(0))
            if d_probabilities is not None:
                d_w *= 1 - label_smoothing
                d_probabilities[some] = (d_w if column_weight is None else d_w * column_weight).to(
                    d_probabilities.dtype
                )
        if not any(wanted[:INPUTS]):
            return None
        return chunks.write_gradient(logits, chunk, rows, logsumexp[rows], Coefficients(a=a[rows], d=d[rows]), factor)

    with full_precision(hidden.device):
        found = loss_and_gradients(head, None, None, False, over_logits, wanted[:INPUTS], workspace, None, backend)
    gradients = [None if g is None else g.to(hidden.dtype) for g in found]
    return tuple(present(g, hidden) for g in (*gradients, d_column_weight, d_probabilities))  # type: ignore[return-value]


@linear_probabilities_grad.register_fake
def _(*tensors: Any, wanted: list[bool], **_: Any) -> tuple[Tensor, ...]:
    made = (torch.empty_like(t) if t is not None and want else None for t, want in zip(tensors, wanted, strict=False))
    return tuple(present(t, tensors[0]) for t in made)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, weight_sum, logsumexp = output
    ctx.mark_non_differentiable(weight_sum)
    ctx.how = keyword_only_inputs
    # A copy: the caller may modify the tensor it was given.
    ctx.save_for_backward(*inputs, weight_sum, logsumexp.clone())


def _backward(ctx: Any, g_sum: Tensor | None, _: None, g_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    if g_sum is None and g_logsumexp is None:
        return for_inputs(ctx)
    *inputs, temperature, weight_sum, logsumexp = ctx.saved_tensors
    if in_plain_pytorch(g_sum, g_logsumexp):
        refuse_shard(ctx.how["shard"], (inputs[0].shape[0], inputs[1].shape[0]))

        def fn(*of: Any) -> list[Tensor]:
            head = Head(*of[:INPUTS], temperature, ctx.how["scale"], ctx.how["softcap"])  # type: ignore[call-arg]
            found = _differentiable(head, of[-2], of[-1], ctx.how["label_smoothing"])
            return [found.sum_log_probs, found.logsumexp]

        return for_inputs(ctx, *differentiable_gradients(fn, inputs, (g_sum, g_logsumexp)))
    g_sum = torch.zeros_like(weight_sum) if g_sum is None else g_sum
    upstream = RowStatistics(sum_log_probs=g_sum, logsumexp=g_logsumexp)
    terms = coefficients(upstream, RowStatistics(weight_sum=weight_sum), 0, None, statistics_dtype(inputs[0].dtype))
    wanted = list(ctx.needs_input_grad[:GRADIENTS])
    gradients = linear_probabilities_grad(*inputs, temperature, logsumexp, terms.a, terms.d, wanted=wanted, **ctx.how)
    return for_inputs(ctx, *(None if g.ndim == 0 else g for g in gradients))


linear_probabilities.register_autograd(_backward, setup_context=_setup)

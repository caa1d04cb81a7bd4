"""Route ``gradients_in_forward``: a loss that is a sum over tokens, and its gradients, in one pass over the tokens.

For one chunk of tokens at a time it computes the logits, their statistics, the loss, the gradient of the logits (written over
the logits), and the products of that gradient with weight and hidden. Backward multiplies by the upstream gradient, unless that
is 1. With ``N`` tokens, ``V`` vocabulary and ``H`` hidden this costs ``6NVH`` floating point operations, as in eager PyTorch.
Recomputing the forward (activation checkpointing) doubles the cost.

:func:`loss_and_gradients` is the pass, :func:`linear_loss` the operator for losses that are linear in the log-probabilities and
quadratic in the logsumexp, :func:`with_gradients` the operator for gradients that other code has made in forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autodiff import (
    absent,
    batched,
    check_differentiable,
    differentiable_again,
    differentiable_gradients,
    for_inputs,
    in_plain_pytorch,
    present,
    read_again,
    refuse_shard,
    traced,
)
from .chunked.softmax_rows import CHUNK_ELEMENTS
from .head import INPUTS, Head, differentiable_statistics
from .numerics import full_precision, statistics_dtype, wide_dtype
from .planning import padded
from .products import BLOCK, add_at_columns, add_over_columns, column_sums, few_columns
from .row_statistics import Coefficients, RowStatistics, coefficients, empty_statistics, only, part_of, skipped, slices
from .token_statistics import rows_module, softmax_rows, softmax_rows_grad
from .vocab_parallel import VocabShard, packed, with_weight_sum

HEADROOM = 2.0**10  # target for float16 gradients of the logits: far above the smallest number, far below the largest


def per_token_dtype(dtype: torch.dtype, shard: VocabShard | None) -> torch.dtype:
    """The dtype of a per-token gradient made in forward: wide for float16 (scale not known yet) and where ranks sum it."""
    return statistics_dtype(dtype) if dtype == torch.float16 or shard is not None else dtype


def total_dtypes(head: Head, sums: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """The dtypes in which a head's input gradients are made; ``sums``: of weight's and B's over chunks (None: their own)."""
    dtype = head.hidden.dtype
    wide = statistics_dtype(dtype)
    per_token = dtype if head.weight is None else per_token_dtype(dtype, head.shard)
    sums = wide if dtype == torch.float16 else sums or dtype
    return per_token, sums, wide, per_token, sums


# Turns a chunk's logits (n, V) into their gradient, in place: (logits, chunk, ids, rows, factor) → factor. In float16 the
# gradient is multiplied by a factor that keeps it in range; the factor never grows from one chunk to the next.
OverLogits = Callable[[Tensor, Head, Tensor | None, slice | Tensor, Tensor | None], Tensor | None]


def by_coefficients(
    of_chunk: Callable[[RowStatistics, slice | Tensor], Coefficients],
    outputs: Sequence[str],
    column_weight: Tensor | None,  # (V,)
    backend: str,
    in_float16: bool,
) -> OverLogits:
    """For any loss: ``of_chunk(statistics, rows)`` gives a chunk's gradient coefficients; ``outputs`` names its statistics."""

    def over_logits(
        logits: Tensor, chunk: Head, ids: Tensor | None, rows: slice | Tensor, factor: Tensor | None
    ) -> Tensor | None:
        seen = (logits.unsqueeze(-1), ids, column_weight, chunk.temperature)
        transform = (None, 0.0, chunk.scale, chunk.softcap)
        names = with_weight_sum(outputs, chunk.shard)
        found = softmax_rows(*seen, *transform, ",".join(names), False, backend, packed(chunk.shard))
        statistics = only(found, names, ids is not None)
        terms = of_chunk(statistics, rows)
        if in_float16:
            terms, factor = times_factor(terms, chunk, factor)
        if logits.shape[1]:
            softmax_rows_grad(*seen, statistics.logsumexp, *terms, *transform, backend, logits.unsqueeze(-1))
        return factor

    return over_logits


class Factors(NamedTuple):
    """The factors by which :func:`linear_loss` multiplies each token's statistics."""

    of_log_probs: Tensor  # (N,)
    of_sum_log_probs: Tensor | None  # (N,)
    of_square: Tensor | None  # (N,)


def in_one_pass(
    of: Factors,
    outputs: Sequence[str],
    column_weight: Tensor | None,  # (V,)
    backend: str,
    found: RowStatistics,  # of all tokens, written to
) -> OverLogits:
    """For :func:`linear_loss`: one kernel reads a row of logits and writes its gradient."""

    def over_logits(
        logits: Tensor, chunk: Head, ids: Tensor | None, rows: slice | Tensor, factor: Tensor | None
    ) -> None:
        statistics = rows_module(backend).softmax_rows_fwd_bwd(
            logits,
            ids,
            column_weight,
            chunk.temperature,
            *(part_of(t, rows) for t in of),
            scale=chunk.scale,
            softcap=chunk.softcap,
            outputs=outputs,
        )
        found.put(statistics, rows)

    return over_logits


class HeadGradients:
    """The gradients of a head's inputs, each None if not ``wanted``; every chunk of tokens adds its share.

    ``all_tokens`` and ``all_columns`` say that the chunks cover every token and every column: then the first write covers the
    whole buffer, which need not be zeroed.
    """

    def __init__(
        self,
        head: Head,
        wanted: Sequence[bool],
        dtypes: Sequence[torch.dtype],
        all_tokens: bool,
        all_columns: bool,
        main_grad: Tensor | None = None,  # (V, H), to which the gradient of the weight is added
    ) -> None:
        self.head, self.main_grad = head, main_grad
        written = (all_tokens, all_columns, False, all_tokens, all_columns)
        self.totals = head.empty_gradients(wanted, dtypes, written)
        # The last chunk's all-reduces in flight: how to end one, the total, the rows of it, and the product being summed.
        self.begun: list[tuple[Callable[[], Any], Tensor, slice | Tensor, Tensor]] = []

    def add(
        self, d_logits: Tensor, chunk: Head, rows: slice | Tensor, first: bool, factor: Tensor | None = None
    ) -> None:
        """Add a chunk's gradients, from the gradient ``(n, V)`` of its logits, which in float16 is multiplied by ``factor``."""
        self.finished()  # otherwise the products of all chunks would be held
        d_hidden, d_weight, d_bias, d_u, d_B = self.totals
        V, few = d_logits.shape[1], few_columns(d_logits, self.head.gradient_filter)
        for total, matrix in ((d_hidden, chunk.weight), (d_u, chunk.B)):
            if total is not None and matrix is not None:
                product = total[rows] if isinstance(rows, slice) else total.new_empty(len(d_logits), matrix.shape[1])
                add_over_columns(product, d_logits, matrix, few, first=True)
                if factor is not None:
                    product /= factor
                if self.head.shard is not None:
                    self.begun.append((self.head.shard.begin_sum(product), total, rows, product))
                elif not isinstance(rows, slice):
                    total.index_copy_(0, rows, product)
        for total, matrix in ((d_weight, chunk.hidden), (d_B, chunk.u)):
            if total is not None and matrix is not None:
                add_at_columns(total[:V], d_logits, matrix, few, first=first)
        if self.main_grad is not None:
            add_at_columns(self.main_grad, d_logits, chunk.hidden, few, first=False)
        if d_bias is not None:
            d_bias[:V] += column_sums(d_logits, d_bias.dtype)

    def finished(self) -> list[Tensor | None]:
        """The totals, once the pending all-reduces have ended."""
        for end_sum, total, rows, product in self.begun:
            end_sum()
            if not isinstance(rows, slice):
                total.index_copy_(0, rows, product)
        self.begun = []
        return self.totals


def loss_and_gradients(
    head: Head,
    ids: Tensor | None,  # (N, K)
    keep: Tensor | None,  # (M,) tokens to project; None: all
    zero_ignored: bool,  # hidden states of skipped tokens are zeroed, since a nan there would reach d_weight
    over_logits: OverLogits,
    wanted: Sequence[bool],  # gradients of head.inputs
    workspace: int | str | None,
    accumulate: str | None,
    backend: str,
    main_grad: Tensor | None = None,  # (V, H) fp32, to which the gradient of the weight is added
    with_logits: bool = True,  # False: over_logits computes the logits itself
) -> list[Tensor | None]:
    """Route ``gradients_in_forward``: the gradient of each of ``head.inputs``, or None, in its own dtype or a wider one.

    ``over_logits`` sees each chunk once, in order.
    """
    N, V = head.hidden.shape[0], head.weight.shape[0]
    M = N if keep is None else keep.shape[0]
    how: dict[str, Any] = {"workspace": workspace, "accumulate": accumulate, "backend": backend}
    planned = head.plan(keep, zero_ignored, route="gradients_in_forward", **how)
    wanted = [want and (i != 1 or main_grad is None) for i, want in enumerate(wanted)]
    gradients = HeadGradients(head, wanted, total_dtypes(head, planned.accumulate), M == N > 0, M > 0, main_grad)
    _, d_weight, d_bias, _, d_B = gradients.totals
    summed = [t for t in (d_weight, d_bias, d_B) if t is not None]  # over tokens
    logits_buffer = head.hidden.new_empty(min(planned.chunk, M), padded(V))[:, :V]
    factor: Tensor | None = None  # of the chunks so far, fp16 only: their gradients carry it
    local_ids = ids if ids is None or head.shard is None else head.shard.local(ids)
    for part in slices(M, max(planned.chunk, 1)):
        rows: slice | Tensor = part if keep is None else keep[part]
        of_ids = part_of(local_ids, rows)
        # The head with this chunk's tokens, at most planned.chunk of them.
        chunk = head.tokens(rows, skipped(of_ids) if zero_ignored else None)
        logits = logits_buffer[: part.stop - part.start]
        # On a CPU the logits are made in pieces, a third faster: each piece stays in cache.
        whole = logits.is_cuda or torch.compiler.is_compiling()
        width = max(V, 1) if whole else max(BLOCK, CHUNK_ELEMENTS // len(logits))
        for piece in slices(V, width) if with_logits else ():
            chunk.columns(piece).write_logits(logits[:, piece])
        before, factor = factor, over_logits(logits, chunk, of_ids, rows, factor)
        if before is not None and factor is not None:  # rescale the sums so far to the new factor
            for total in summed:
                total *= factor / before
        gradients.add(logits, chunk, rows, part.start == 0, factor)
        del chunk  # frees its copy of the tokens before the next chunk makes one
    if factor is not None:
        for total in summed:
            total /= factor
    return gradients.finished()


def in_range(factors: Iterable[Tensor | None]) -> Tensor:
    """The power of two at which float16 gradients with these factors neither underflow nor overflow. A factor that is not
    finite does not count: it spoils its own token alone."""
    finite = [t.abs().nan_to_num(0.0, 0.0).amax() for t in factors if t is not None]
    largest = torch.stack(finite).amax().clamp(2.0**-60, 2.0**60)
    return HEADROOM * torch.exp2(-torch.ceil(torch.log2(largest)))


def times_factor(terms: Coefficients, chunk: Head, factor: Tensor | None) -> tuple[Coefficients, Tensor]:
    """A chunk's coefficients times the factor that keeps its float16 gradients in range, no larger than the last chunk's."""
    alone = in_range(None if t is None else t * chunk.steepest for t in terms)
    factor = alone if factor is None else torch.minimum(alone, factor)
    return Coefficients(*(None if t is None else t * factor for t in terms)), factor


def loss_of_head(
    head: Head,
    of: Factors,
    *,
    ids: Tensor,
    column_weight: Tensor | None,
    keep: Tensor | None,
    zero_ignored: bool,
    top1: bool,
    wanted: Sequence[bool],
    workspace: int,
    accumulate: str | None,
    backend: str,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, RowStatistics, list[Tensor | None]]:
    """The loss of :func:`linear_loss`, the statistics of its rows, and the gradient of each of ``head.inputs`` or None; where
    ``main_grad`` ``(V, H)`` is given, the gradient of the weight is added to it."""
    of_log_probs, of_sum_log_probs, of_square = of
    dtype = statistics_dtype(head.hidden.dtype)
    outputs = ["log_probs"] + ["sum_log_probs"] * (of_sum_log_probs is not None) + ["is_top1"] * top1
    found = empty_statistics(head.hidden, head.hidden.shape[0], ids, outputs)
    for t in found:
        if t is not None:
            t.zero_()

    def of_chunk(statistics: RowStatistics, rows: slice | Tensor) -> Coefficients:
        found.put(statistics, rows)
        upstream = RowStatistics(log_probs=of_log_probs[rows, None])
        if of_sum_log_probs is not None:
            upstream = upstream._replace(sum_log_probs=of_sum_log_probs[rows])
        if of_square is not None:
            upstream = upstream._replace(logsumexp=2 * of_square[rows] * statistics.logsumexp.to(dtype))
        return coefficients(upstream, statistics, head.vocab, column_weight, dtype)

    in_float16 = head.hidden.dtype == torch.float16
    if in_float16 or head.shard is not None:  # the gradient waits for the coefficients' size, or for other ranks
        over_logits = by_coefficients(of_chunk, outputs, column_weight, backend, in_float16 and main_grad is None)
    else:
        over_logits = in_one_pass(of, outputs, column_weight, backend, found)
    with full_precision(head.hidden.device):
        gradients = loss_and_gradients(
            head, ids, keep, zero_ignored, over_logits, wanted, workspace, accumulate, backend, main_grad
        )
    loss = of_log_probs.to(wide_dtype(of_log_probs.device)) * found.log_probs[:, 0]
    if of_sum_log_probs is not None:
        loss += of_sum_log_probs * found.sum_log_probs
    if of_square is not None:
        loss += of_square * found.logsumexp.to(dtype).square()
    return torch.where(ids[:, 0] == -100, 0, loss).sum().to(dtype), found, gradients


@torch.library.custom_op("fused_losses::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    u: Tensor | None,  # (N, R)
    B: Tensor | None,  # (V, R)
    temperature: Tensor | None,  # (N,)
    ids: Tensor,  # (N, 1)
    column_weight: Tensor | None,  # (V,)
    of_log_probs: Tensor,  # (N,)
    of_sum_log_probs: Tensor | None,  # (N,)
    of_square: Tensor | None,  # (N,)
    keep: Tensor | None,  # (M,)
    *,
    scale: float,
    softcap: float | None,
    shard: str,  # a VocabShard; ids are those of the whole vocabulary
    gradient_filter: float,
    zero_ignored: bool,
    top1: bool,
    wanted: list[bool],
    workspace: int,
    accumulate: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``Σ_n of_log_probs·logp + of_sum_log_probs·Σ_j w_j logp_j + of_square·logsumexp²``, and its gradients.

    Returns:
        the loss, ``log_probs (N, 1)``, ``logsumexp (N,)`` float64, ``is_top1 (N,)``, and the gradient of each of the first
        five arguments; 0-dim where absent or not ``wanted``.
    """
    head = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard), gradient_filter)
    loss, found, gradients = loss_of_head(
        head, Factors(of_log_probs, of_sum_log_probs, of_square), ids=ids, column_weight=column_weight, keep=keep,
        zero_ignored=zero_ignored, top1=top1, wanted=wanted, workspace=workspace, accumulate=accumulate, backend=backend,
    )  # fmt: skip
    results = (found.log_probs, found.logsumexp, found.is_top1, *gradients)
    return loss, *(present(t, loss) for t in results)  # type: ignore[return-value]


@linear_loss.register_fake
def _(
    *tensors: Any, scale: float, softcap: float | None, shard: str, gradient_filter: float, zero_ignored: bool, top1: bool,
    wanted: list[bool], **how: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *inputs, temperature, _ids, _column_weight, of_log_probs, _of_sum_log_probs, _of_square, keep = tensors
    head = Head(*inputs, temperature, scale, softcap, VocabShard.unpacked(shard), gradient_filter)  # type: ignore[call-arg]
    N, planned = head.hidden.shape[0], head.plan(keep, zero_ignored, route="gradients_in_forward", **how)
    return (
        of_log_probs.new_empty(()),
        of_log_probs.new_empty(N, 1),
        of_log_probs.new_empty(N, dtype=wide_dtype(of_log_probs.device)),
        of_log_probs.new_empty(N, dtype=torch.bool) if top1 else absent(of_log_probs),
        *(
            t.new_empty(t.shape, dtype=d) if t is not None and want else absent(of_log_probs)
            for t, d, want in zip(head.inputs, total_dtypes(head, planned.accumulate), wanted, strict=True)
        ),
    )


def _linear_loss_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    _loss, _log_probs, _logsumexp, _is_top1, *gradients = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.how = keyword_only_inputs
    pairs = zip(inputs[:INPUTS], ctx.how["wanted"], strict=True)
    ctx.dtypes = [None if t is None or not want else t.dtype for t, want in pairs]
    *tensors, _keep = inputs
    (N, _), (V, _), dtype = inputs[0].shape, inputs[1].shape, inputs[0].dtype
    ctx.of_logits = (N, V, dtype)
    # A second derivative is computed from the inputs, so they are saved where one is supported.
    ctx.save_for_backward(*gradients, *(tensors if differentiable_again(*ctx.of_logits) else ()))


def _linear_loss_backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return for_inputs(ctx)
    stored = ctx.saved_tensors  # read once: checkpointing unpacks once
    gradients, tensors = stored[:INPUTS], stored[INPUTS:]
    if in_plain_pytorch():
        refuse_shard(ctx.how["shard"], ctx.of_logits[:2])
        check_differentiable(*ctx.of_logits)
        *inputs, temperature, ids, column_weight, of_log_probs, of_sum_log_probs, of_square = tensors

        def fn(*of: Any) -> list[Tensor]:
            head = Head(*of, temperature, ctx.how["scale"], ctx.how["softcap"])  # type: ignore[call-arg]
            outputs = ["log_probs", "sum_log_probs"]
            s = differentiable_statistics(head, ids, column_weight, outputs)
            total = (of_log_probs * s.log_probs[:, 0]).sum()
            if of_sum_log_probs is not None:
                total = total + (of_sum_log_probs * s.sum_log_probs).sum()
            if of_square is not None:
                total = total + (of_square * s.logsumexp.to(total.dtype).square()).sum()
            return [total]

        return for_inputs(ctx, *differentiable_gradients(fn, inputs, [g]))
    return for_inputs(ctx, *scale_gradients(gradients, ctx.dtypes, g, ctx.how["backend"]))


linear_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool, backend: str) -> Tensor:
    """``gradient·scale`` in ``dtype``, rounded once; ``in_place`` writes over ``gradient``, and does nothing if scale is 1."""
    gradient = gradient.contiguous()  # it was saved contiguous, but a hook may have changed that
    out = gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if backend == "triton":
        from .kernels.scale import scale as multiply  # Triton is imported only where it runs
    else:
        from .chunked.scale import scale as multiply
    multiply(gradient, scale, out)
    return out


def traced_scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in pointwise operations: Inductor fuses them, and writes over ``gradient`` if nothing reads that again."""
    return (gradient.to(statistics_dtype(gradient.dtype)) * scale).to(dtype)


def scale_gradients(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype | None], upstream: Tensor, backend: str
) -> list[Tensor | None]:
    """Gradients made in forward, times the upstream gradient, in the given dtypes; None where the dtype is None.

    This happens in place where the graph is about to be freed: nothing reads them again, and memory is not doubled.
    """
    eager = functools.partial(scaled, in_place=not read_again(upstream), backend=backend)
    multiply = traced_scaled if traced(upstream) or batched(upstream) else eager
    pairs = zip(gradients, dtypes, strict=True)
    return [None if dtype is None else multiply(g, upstream, dtype) for g, dtype in pairs]


@torch.library.custom_op("fused_losses::with_gradients", mutates_args=())
def _with_gradients(loss: Tensor, gradients: list[Tensor], inputs: list[Tensor], backend: str) -> Tensor:
    return loss.clone()


@_with_gradients.register_fake
def _(loss: Tensor, gradients: list[Tensor], inputs: list[Tensor], backend: str) -> Tensor:
    return torch.empty_like(loss)


def _with_gradients_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _loss, gradients, of, ctx.backend = inputs
    ctx.dtypes = [t.dtype for t in of]
    ctx.save_for_backward(*gradients)


def _with_gradients_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    if in_plain_pytorch():
        raise RuntimeError(
            "gradients made in forward cannot be differentiated again: compute the loss of token_statistics, or under "
            "fused_losses.route('recompute'), in float64 or of few tokens; got gradients of "
            f"{[tuple(t.shape) for t in ctx.saved_tensors]}"
        )
    gradients = scale_gradients(ctx.saved_tensors, ctx.dtypes, g, ctx.backend)
    return None, [None] * len(gradients), gradients, None


_with_gradients.register_autograd(_with_gradients_backward, setup_context=_with_gradients_setup)


def with_gradients(
    loss: Tensor, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None], backend: str
) -> Tensor:
    """``loss ()``, whose gradient for each of ``inputs`` is the given gradient, if any, times the upstream gradient."""
    pairs = [(g, t) for g, t in zip(gradients, inputs, strict=True) if g is not None and t is not None]
    return _with_gradients(loss, [g for g, _ in pairs], [t for _, t in pairs], backend)

"""Route ``recompute``: per-token statistics, whose backward recomputes the logits.

Forward saves a few numbers per token. Backward takes one slice of the vocabulary at a time, and computes the gradient of its
logits and the products of that with weight and hidden. In all: ``8NVH`` floating point operations for ``N`` tokens, ``V``
vocabulary and ``H`` hidden. Forward saves as many logits as the workspace holds, and these are not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import library_tiles
from .autodiff import (
    absent,
    constant,
    differentiable_gradients,
    for_inputs,
    in_plain_pytorch,
    may_save,
    present,
    read_again,
    refuse_shard,
    transforms_active,
)
from .chunked import linear_softmax as chunked_linear_softmax
from .head import INPUTS, Head, differentiable_statistics, head_of, kept_tokens, ready
from .numerics import full_precision, statistics_dtype
from .planning import padded
from .products import add_at_columns, add_over_columns, column_sums, few_columns
from .row_statistics import (
    RowStatistics,
    coefficients,
    empty_statistics,
    only,
    part_of,
    skipped,
    slices,
    total_weight,
    without_ignored,
)
from .settings import Backend, resolve_backend
from .token_statistics import rows_module
from .vocab_parallel import VocabShard, merged_statistics, packed, with_weight_sum

if TYPE_CHECKING:
    from .linear_logits import LinearLogits


def linear_module(backend: str, hidden: Tensor) -> ModuleType:
    """The module that implements ``linear_softmax_fwd`` and ``linear_softmax_d_logits``."""
    if backend == "torch":
        return chunked_linear_softmax
    if hidden.dtype.itemsize > 2:
        return library_tiles
    from .kernels import configurations, linear_softmax  # Triton is imported only where it runs

    # Where Triton has no matrix instructions, the library multiplies the tiles.
    return linear_softmax if configurations.multiplies_matrices(hidden.device) else chunked_linear_softmax


def saved_columns(head: Head, keep: Tensor | None, zero_ignored: bool, workspace: int, backend: str) -> int:
    """How many columns of logits forward saves; 0 if no backward follows."""
    if not any(head.trained) or not may_save(head.hidden):
        return 0
    planned = head.plan(keep, zero_ignored, route="recompute", workspace=workspace, backend=backend)
    return min(planned.saved, head.weight.shape[0])


def _buffer_to_save(hidden: Tensor, tokens: int, columns: int) -> Tensor | None:
    return hidden.new_empty(tokens, padded(columns), dtype=statistics_dtype(hidden.dtype)) if columns else None


def begin_sums(shard: VocabShard, *tensors: Tensor | None) -> list[Callable[[], Any]]:
    return [shard.begin_sum(t) for t in tensors if t is not None]


def _projected(head: Head, ids: Tensor | None, keep: Tensor | None, zero_ignored: bool) -> tuple[Head, Tensor | None]:
    """The head and the ids of the tokens whose logits are made; see :func:`kept_tokens`."""
    if keep is not None:
        return head.tokens(keep), part_of(ids, keep)
    return (head.tokens(slice(None), skipped(ids)) if zero_ignored else head), ids


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=())
def linear_rows(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    u: Tensor | None,  # (N, R)
    B: Tensor | None,  # (V, R)
    temperature: Tensor | None,  # (N,)
    ids: Tensor | None,  # (N, K)
    column_weight: Tensor | None,  # (V,)
    keep: Tensor | None,  # (M,)
    main_grad: Tensor | None,  # (V, H) fp32, to which backward adds the gradient of the weight
    *,
    scale: float,
    softcap: float | None,
    shard: str,  # a VocabShard; ids are local to it
    gradient_filter: float,  # used in backward
    zero_ignored: bool,
    outputs: str,  # names of RowStatistics, separated by commas
    columns: int,  # how many columns of logits are saved for backward
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`RowStatistics`, and the first ``columns`` of the logits (padded: a few more); 0-dim where not asked for."""
    head = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard))
    head, ids_kept = _projected(head, ids, keep, zero_ignored)
    M = head.hidden.shape[0]
    saved_logits = _buffer_to_save(hidden, M, columns)

    def statistics_of(outputs: Collection[str]) -> RowStatistics:
        with full_precision(hidden.device):
            return linear_module(backend, hidden).linear_softmax_fwd(
                head.hidden,
                weight,
                bias,
                head.low_rank,
                ids_kept,
                column_weight,
                head.temperature,
                scale=scale,
                softcap=softcap,
                outputs=outputs,
                saved_logits=saved_logits,
            )

    names = outputs.split(",")
    if head.shard is None:
        found = statistics_of(names)
    else:
        weight_sum = total_weight(column_weight, weight.shape[0])
        found = merged_statistics(statistics_of, hidden, M, ids_kept, weight_sum, names, head.shard, "recompute")
    if keep is not None:
        N = hidden.shape[0]
        found = RowStatistics(
            *(None if s is None else s.new_zeros(N, *s.shape[1:]).index_copy_(0, keep, s) for s in found)
        )
    return tuple(present(s, hidden) for s in (*found, saved_logits))  # type: ignore[return-value]


@linear_rows.register_fake
def _(hidden: Tensor, *tensors: Any, outputs: str, columns: int, **_: Any) -> tuple[Tensor, ...]:
    _weight, _bias, _u, _B, _temperature, ids, _column_weight, keep, _main_grad = tensors
    statistics = empty_statistics(hidden, hidden.shape[0], ids, outputs.split(","))
    M = hidden.shape[0] if keep is None else keep.shape[0]
    saved_logits = _buffer_to_save(hidden, M, columns)
    return tuple(present(s, hidden) for s in (*statistics, saved_logits))


@torch.library.custom_op("fused_losses::linear_rows_grad", mutates_args={"main_grad", "saved_logits"})
def linear_rows_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    B: Tensor | None,
    temperature: Tensor | None,
    ids: Tensor | None,
    column_weight: Tensor | None,
    keep: Tensor | None,
    main_grad: Tensor,  # (V, H) fp32, or 0-dim
    saved_logits: Tensor,  # (M, v) the first v logits of each row, overwritten; or 0-dim
    logsumexp: Tensor,  # (N,) float64
    a: Tensor | None,  # (N,)
    b: Tensor | None,  # (N,)
    e: Tensor | None,  # (N,)
    c: Tensor | None,  # (N, K)
    d: Tensor | None,  # (N,)
    *,
    scale: float,
    softcap: float | None,
    shard: str,
    gradient_filter: float,
    zero_ignored: bool,
    wanted: list[bool],
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first five arguments, 0-dim where absent or not ``wanted``; a slice of the vocabulary at a time."""
    N, V, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    wide = statistics_dtype(dtype)
    whole = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard), gradient_filter)
    head, ids = _projected(whole, ids, keep, zero_ignored)
    M = head.hidden.shape[0]
    per_row = [t if keep is None else part_of(t, keep) for t in (logsumexp, a, b, e, c, d)]

    wanted = [want and (i != 1 or main_grad.ndim == 0) for i, want in enumerate(wanted)]
    dtypes, written = (wide, dtype, dtype, wide, dtype), [M > 0 and V > 0] * INPUTS
    d_hidden, d_weight, d_bias, d_u, d_B = head.empty_gradients(wanted, dtypes, written)
    planned = whole.plan(keep, zero_ignored, route="recompute", workspace=workspace, backend=backend)
    chunk = max(planned.chunk, 1)
    in_place = saved_logits.ndim > 0 and saved_logits.dtype == dtype
    slice_buffer = saved_logits if in_place else hidden.new_empty(M, padded(min(chunk, V)))
    with full_precision(hidden.device):
        pending = [] if V or not M or head.shard is None else begin_sums(head.shard, d_hidden, d_u)
        for part in slices(V if M else 0, chunk):
            piece = head.columns(part)
            d_logits = slice_buffer[:, : part.stop - part.start]
            part_weight = part_of(column_weight, part)
            how: dict[str, Any] = {"scale": scale, "softcap": softcap, "vocab_start": part.start}
            if saved_logits.ndim and part.stop <= saved_logits.shape[1]:
                rows_module(backend).softmax_rows_bwd(
                    saved_logits[:, part, None],
                    ids,
                    part_weight,
                    piece.temperature,
                    *per_row,
                    **how,
                    out=d_logits[..., None],
                )
            else:
                linear_module(backend, hidden).linear_softmax_d_logits(
                    piece.hidden, piece.weight, piece.bias, piece.low_rank, ids, part_weight, piece.temperature, *per_row,
                    **how, out=d_logits,
                )  # fmt: skip
            few = few_columns(d_logits, gradient_filter)
            for total, matrix in ((d_hidden, piece.weight), (d_u, piece.B)):
                if total is not None and matrix is not None:
                    add_over_columns(total, d_logits, matrix, few, first=part.start == 0)
            if head.shard is not None and part.stop == V:  # start the all-reduces, which overlap the products below
                pending = begin_sums(head.shard, d_hidden, d_u)
            for total, matrix in ((d_weight, piece.hidden), (d_B, piece.u)):
                if total is not None and matrix is not None:
                    add_at_columns(total[part], d_logits, matrix, few, first=True)
            if main_grad.ndim:
                add_at_columns(main_grad[part], d_logits, piece.hidden, few, first=False)
            if d_bias is not None:
                d_bias[part] = column_sums(d_logits, wide)
    for end_sum in pending:
        end_sum()
    if M and V:
        del d_logits, piece
    del slice_buffer, head  # freed before d_hidden is made in its own dtype, for all tokens

    def returned(t: Tensor | None) -> Tensor:
        if t is None:
            return absent(hidden)
        t = t.to(dtype)
        return t if keep is None else t.new_zeros(N, *t.shape[1:]).index_copy_(0, keep, t)

    d_hidden_out, d_u_out = returned(d_hidden), returned(d_u)
    return d_hidden_out, present(d_weight, hidden), present(d_bias, hidden), d_u_out, present(d_B, hidden)


@linear_rows_grad.register_fake
def _(hidden: Tensor, *tensors: Any, wanted: list[bool], **_: Any) -> tuple[Tensor, ...]:
    weight, bias, u, B, _temperature, _ids, _column_weight, _keep, main_grad, *_others = tensors
    inputs = (hidden, weight, bias, u, B)
    return tuple(
        absent(hidden) if t is None or not want or (i == 1 and main_grad.ndim) else torch.empty_like(t)
        for i, (t, want) in enumerate(zip(inputs, wanted, strict=True))
    )


def _linear_rows_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    *statistics, saved_logits = output
    found = RowStatistics(*statistics)
    ctx.mark_non_differentiable(found.weight_sum, found.max_logit, found.is_top1, saved_logits)
    # main_grad is not saved for backward: other backward passes may modify it in between.
    *tensors, ctx.main_grad = inputs
    ctx.outputs = keyword_only_inputs["outputs"].split(",")
    ctx.how = {name: x for name, x in keyword_only_inputs.items() if name not in ("outputs", "columns")}
    *_, ids, _column_weight, _keep = tensors
    found = only(found, ctx.outputs, ids is not None)
    ctx.save_for_backward(*tensors, *found.for_backward(), saved_logits)


def _linear_rows_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = grads[:-1]
    if all(g is None for g in grads):
        return for_inputs(ctx)
    stored = ctx.saved_tensors  # read once: checkpointing unpacks once
    inputs, (temperature, ids, column_weight, keep, *copies, saved_logits) = stored[:INPUTS], stored[INPUTS:]
    found, logsumexp = RowStatistics.saved(copies), copies[0]
    (N, _), V, dtype = inputs[0].shape, inputs[1].shape[0], statistics_dtype(inputs[0].dtype)
    if in_plain_pytorch(*grads):
        refuse_shard(ctx.how["shard"], (N, V))

        def fn(*of: Any) -> list[Tensor]:
            head = Head(*of, temperature, ctx.how["scale"], ctx.how["softcap"])  # type: ignore[call-arg]
            statistics = differentiable_statistics(head, ids, column_weight, ctx.outputs)
            return [present(s, logsumexp) for s in statistics]

        return for_inputs(ctx, *differentiable_gradients(fn, inputs, grads))
    upstream = only(grads, ctx.outputs, ids is not None)  # a compiled graph passes zeros for the other outputs
    terms = coefficients(without_ignored(upstream, ids), found, V, column_weight, dtype)
    if saved_logits.ndim == 0:
        saved_logits = absent(saved_logits)  # a new tensor: the compiler would take forward's for overwritten
    elif read_again(saved_logits):
        saved_logits = saved_logits.clone()
    gradients = linear_rows_grad(
        *inputs,
        temperature=temperature,
        ids=ids,
        column_weight=column_weight,
        keep=keep,
        main_grad=present(ctx.main_grad, logsumexp),
        saved_logits=saved_logits,
        logsumexp=logsumexp,
        **terms._asdict(),
        wanted=list(ctx.needs_input_grad[:INPUTS]),
        **ctx.how,
    )
    return for_inputs(ctx, *(None if g.ndim == 0 else g for g in gradients))


linear_rows.register_autograd(_linear_rows_backward, setup_context=_linear_rows_setup)


def linear_statistics(
    head: Head,
    ids: Tensor | None,
    column_weight: Tensor | None = None,
    *,
    outputs: Sequence[str],
    kept: tuple[Tensor | None, bool] | None = None,
    workspace: int | str | None = None,
    backend: Backend | None = None,
    main_grad: Tensor | None = None,
) -> RowStatistics:
    """Differentiable :class:`RowStatistics` of the tokens of a head, on route ``recompute``; ids ``(N, K)``.

    ``kept``: the result of :func:`kept_tokens` for the ids, if known. If the head is a shard, the column weights are those of
    its columns, and the ids are those of the whole vocabulary.
    """
    if transforms_active():
        refuse_shard(packed(head.shard), head.hidden.shape)
        return differentiable_statistics(head, ids, column_weight, outputs)
    column_weight = constant("weight", column_weight, statistics_dtype(head.hidden.dtype))
    head = ready(head)
    keep, zero_ignored = kept or kept_tokens(ids, None)
    backend = resolve_backend(head.hidden, backend)
    outputs = with_weight_sum(outputs, head.shard)
    if head.shard is not None and ids is not None:
        ids = head.shard.local(ids)
    # Fixed in forward: settings may have changed by the time backward runs.
    room = head.plan(keep, zero_ignored, per_token=True, workspace=workspace, backend=backend).budget
    found = linear_rows(
        **head.packed(),
        ids=None if ids is None else ids.contiguous(),
        column_weight=column_weight,
        keep=keep,
        main_grad=main_grad,
        zero_ignored=zero_ignored,
        outputs=",".join(outputs),
        columns=saved_columns(head, keep, zero_ignored, room, backend),
        workspace=room,
        backend=backend,
    )
    return only(found[:-1], outputs, ids is not None)


def linear_logits_statistics(logits: LinearLogits, ids: Tensor | None, **options: Any) -> RowStatistics:
    """:class:`RowStatistics` of the tokens of a :class:`LinearLogits`, on route ``recompute``; ids ``(N, K)``."""
    with logits.gathered():
        found = linear_statistics(head_of(logits), ids, **options)
    logits.gather_in_backward(found.logsumexp)  # all outputs come from the same autograd node
    return found

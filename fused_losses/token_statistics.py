"""Per-token statistics of logits: log-probabilities of given ids, entropy and more, differentiable.

Most losses are built on this primitive. Forward reads a tensor of logits once; backward reads it once and writes its gradient
once. The logits of a :class:`LinearLogits` are never made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .autodiff import (
    check_differentiable,
    constant,
    differentiable_gradients,
    differentiated,
    for_inputs,
    in_plain_pytorch,
    refuse_shard,
    same_sizes,
    transforms_active,
)
from .chunked import softmax_rows as chunked_softmax_rows
from .lazy_tensor import check_is_logits, is_lazy
from .numerics import check_masks, check_scaling, on_device, statistics_dtype
from .row_statistics import (
    RowStatistics,
    Statistic,
    coefficients,
    empty_statistics,
    label_weights,
    only,
    skipped,
    total_weight,
    without_ignored,
)
from .settings import Backend, resolve_backend
from .settings import workspace as workspace_setting
from .vocab_parallel import VocabShard, local_part, local_target, merged_statistics, packed, with_weight_sum

if TYPE_CHECKING:
    from .linear_logits import LinearLogits


class TokenStatistics(NamedTuple):
    """Each field has one number per token (``log_probs``: one per id), or is ``None`` where not asked for."""

    log_probs: Statistic = None
    entropy: Statistic = None
    logsumexp: Statistic = None
    log_sum_sq_probs: Statistic = None
    mean_logits: Statistic = None
    max_logit: Statistic = None
    is_top1: Statistic = None


def check_names(argument: str, names: Collection[str]) -> None:
    """Raise unless they are names of :class:`TokenStatistics`."""
    if isinstance(names, str):
        raise TypeError(f"{argument} must be a sequence of names, got {names!r}: write ({names!r},)")
    unknown = set(names) - set(TokenStatistics._fields)
    if unknown:
        raise ValueError(f"unknown {argument} {sorted(unknown)}; choose from {', '.join(TokenStatistics._fields)}")


def with_ids(tokens: torch.Size) -> str:
    """The shape of ``K`` ids per token, as errors print it."""
    return f"({', '.join(map(str, (*tokens, 'K')))})"


def row_names(names: Collection[str]) -> list[str]:
    """The names of the :class:`RowStatistics` that :func:`of_rows` needs to compute ``names``."""
    return ["sum_log_probs" if name == "mean_logits" else name for name in names]


def of_rows(found: RowStatistics, names: Collection[str], vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values of :class:`TokenStatistics`, ``(N,)`` or ``(N, K)``, in ``dtype``, computed from row statistics."""

    def value(name: str) -> Tensor:
        if name != "mean_logits":
            return getattr(found, name)
        return (found.sum_log_probs / vocab + found.logsumexp).detach()  # mean logit = mean log-probability + logsumexp

    values = {name: value(name) for name in names}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in values.items()}


def ids_of(index: Tensor, logits: Any, vocab: int) -> Tensor:
    """``index``, one or ``K`` for each token of ``logits``, as ids ``(N, K)``."""
    tokens = logits.shape[:-1]
    if not any(same_sizes(index.shape, shape) for shape in (tokens, tokens + index.shape[-1:])):
        raise ValueError(
            f"logits {tuple(logits.shape)} need an index {tuple(tokens)} or {with_ids(tokens)}, got {tuple(index.shape)}"
        )
    K = index.shape[-1] if index.ndim > len(tokens) else 1
    if K == 0:
        raise ValueError(f"index {tuple(index.shape)} has no id per token; give one or more")
    return target_ids(index.reshape(-1, K), vocab, -100)


def check_vocab_last(name: str, logits: Tensor | LinearLogits) -> None:
    check_is_logits(name, logits)
    if is_lazy(logits) and logits.vocab_dim != logits.ndim - 1:
        raise ValueError(
            f"the vocabulary of {name} {tuple(logits.shape)} must stand last, it is dimension {logits.vocab_dim}"
        )


def rows_module(backend: str) -> ModuleType:
    """The module that implements ``softmax_rows_fwd`` and ``softmax_rows_bwd``."""
    if backend == "torch":
        return chunked_softmax_rows
    from .kernels import softmax_rows  # Triton is imported only where it runs

    return softmax_rows


def integer_ids(target: Tensor) -> Tensor:
    """``target`` as int64; raises rather than truncate a floating point or bool tensor."""
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"token ids must be an integer tensor, got {target.dtype} {tuple(target.shape)}")
    return target.to(torch.int64)


@torch.library.custom_op("fused_losses::target_ids", mutates_args=())
def target_ids(target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """``target`` as int64 ids with −100 where it is ``ignore_index``.

    An id outside ``[0, vocab)`` raises ``IndexError`` on a CPU; elsewhere it fails the device's next synchronisation.
    """
    ids = integer_ids(target)
    ignored = ids == ignore_index
    outside = ((ids < 0) | (ids >= vocab)) & ~ignored
    if target.device.type != "cpu":
        torch._assert_async(~outside.any())
    elif outside.any():
        raise IndexError(f"Target {ids[outside][0].item()} is out of bounds for {vocab} classes.")
    return torch.where(ignored, -100, ids)


@target_ids.register_fake
def _(target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    return torch.empty_like(integer_ids(target))


@target_ids.register_vmap
def _(info: Any, in_dims: Any, target: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, int]:
    # Elementwise, so one call does; without this rule PyTorch loops over the samples, and warns at every call.
    return target_ids(target, vocab, ignore_index), in_dims[0]


@torch.library.custom_op("fused_losses::softmax_rows", mutates_args=())
def softmax_rows(
    logits: Tensor,  # (B, V, S), any strides
    ids: Tensor | None,  # (N, K) int64, N = B·S
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    probabilities: Tensor | None,  # (B, V, S), any strides
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    outputs: str,  # names of RowStatistics, separated by commas
    inplace_backward: bool,
    backend: str,
    shard: str,  # a VocabShard; ids are local to it
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`RowStatistics`; an empty tensor stands for one that was not asked for, and needs no kernel to make."""

    def statistics_of(outputs: Collection[str]) -> RowStatistics:
        return rows_module(backend).softmax_rows_fwd(
            logits,
            ids,
            column_weight,
            temperature,
            probabilities=probabilities,
            label_smoothing=label_smoothing,
            scale=scale,
            softcap=softcap,
            outputs=outputs,
        )

    names, part = outputs.split(","), VocabShard.unpacked(shard)
    if part is None:
        statistics = statistics_of(names)
    else:
        weight_sum = None if probabilities is not None else total_weight(column_weight, logits.shape[1])
        rows = logits.shape[0] * logits.shape[2]
        statistics = merged_statistics(statistics_of, logits, rows, ids, weight_sum, names, part)
    return tuple(logits.new_empty(0) if s is None else s for s in statistics)  # type: ignore[return-value]


@softmax_rows.register_fake
def _(logits: Tensor, ids: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, outputs, _inplace_backward, _backend, _shard = rest
    room = empty_statistics(logits, logits.shape[0] * logits.shape[2], ids, outputs.split(","))
    return tuple(logits.new_empty(0) if s is None else s for s in room)


@torch.library.custom_op("fused_losses::softmax_rows_grad", mutates_args={"out"})
def softmax_rows_grad(
    logits: Tensor,  # (B, V, S), any strides
    ids: Tensor | None,  # (N, K)
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    logsumexp: Tensor,  # (N,) float64
    a: Tensor | None,  # (N,)
    b: Tensor | None,  # (N,)
    e: Tensor | None,  # (N,)
    c: Tensor | None,  # (N, K)
    d: Tensor | None,  # (N,)
    probabilities: Tensor | None,  # (B, V, S)
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    backend: str,
    out: Tensor,  # (B, V, S), may be logits itself
) -> None:
    rows_module(backend).softmax_rows_bwd(
        logits, ids, column_weight, temperature, logsumexp, a, b, e, c, d, probabilities=probabilities,
        label_smoothing=label_smoothing, scale=scale, softcap=softcap, out=out,
    )  # fmt: skip


def differentiable_softmax_rows(
    logits: Tensor,
    ids: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    probabilities: Tensor | None,
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    outputs: Collection[str],
) -> RowStatistics:
    """:func:`softmax_rows` as plain differentiable PyTorch on whole logits."""
    B, V, S = logits.shape
    check_differentiable(B * S, V, logits.dtype)

    def rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(-1, V).to(statistics_dtype(logits.dtype))

    x, skip = rows(logits), skipped(ids)
    if skip is not None:  # a nan in a skipped row must not reach a gradient
        x = x.masked_fill(skip[:, None], 0)
    z, _ = chunked_softmax_rows.transform(x, temperature, scale, softcap)
    w = label_weights(column_weight, None if probabilities is None else rows(probabilities), label_smoothing, V)
    return chunked_softmax_rows.row_statistics(z, ids, w, outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        logits,
        ids,
        column_weight,
        temperature,
        probabilities,
        *ctx.options,
        ctx.inplace_backward,
        ctx.backend,
        ctx.shard,
    ) = inputs
    ctx.set_materialize_grads(False)
    found = RowStatistics(*output)
    ctx.mark_non_differentiable(found.weight_sum, found.max_logit, found.is_top1)
    found = only(found, ctx.options[-1].split(","), ids is not None)
    ctx.save_for_backward(logits, ids, column_weight, temperature, probabilities, *found.for_backward())


def shares_memory(x: Tensor) -> bool:
    """Whether two elements may share one memory location, as in an expanded tensor or overlapping windows."""
    reach = 1  # extent of the dimensions with smaller strides
    for stride, n in sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride < reach:
            return True
        reach += (n - 1) * stride
    return False


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, ids, column_weight, temperature, probabilities, *copies = ctx.saved_tensors
    label_smoothing, scale, softcap, outputs = ctx.options
    if in_plain_pytorch(*grads):
        refuse_shard(ctx.shard, logits.shape)

        def statistics(x: Tensor, t: Tensor | None) -> list[Tensor]:
            found = differentiable_softmax_rows(
                x, ids, column_weight, temperature, t, label_smoothing, scale, softcap, outputs.split(",")
            )
            return [x.new_empty(0) if s is None else s for s in found]

        d_logits, d_probabilities = differentiable_gradients(statistics, [logits, probabilities], grads)
        return for_inputs(ctx, d_logits, None, None, None, d_probabilities)
    dtype = statistics_dtype(logits.dtype)
    found, logsumexp = RowStatistics.saved(copies), copies[0]
    upstream = only(grads, outputs.split(","), ids is not None)  # a compiled graph passes zeros for the other outputs
    terms = coefficients(without_ignored(upstream, ids), found, logits.shape[1], column_weight, dtype)
    d_logits = d_probabilities = None
    if ctx.needs_input_grad[4] and upstream.sum_log_probs is not None:
        B, V, S = logits.shape
        x = logits.transpose(1, 2).reshape(B * S, V)
        of_rows = upstream.sum_log_probs * (1 - label_smoothing)
        d_t = d_label_weights(x, temperature, scale, softcap, logsumexp, of_rows.to(dtype))
        d_t = d_t if column_weight is None else d_t * column_weight
        d_probabilities = d_t.to(probabilities.dtype).view(B, S, V).transpose(1, 2)
    if ctx.needs_input_grad[0]:
        d_logits = logits.detach() if ctx.inplace_backward and not shares_memory(logits) else torch.empty_like(logits)
        if logits.shape[1]:  # an empty shard has no gradient to write
            softmax_rows_grad(
                logits, ids, column_weight, temperature, logsumexp, *terms, probabilities, label_smoothing, scale, softcap,
                ctx.backend, d_logits,
            )  # fmt: skip
    return for_inputs(ctx, d_logits, None, None, None, d_probabilities)


def d_label_weights(
    logits: Tensor,  # (n, V)
    temperature: Tensor | None,  # (n,)
    scale: float,
    softcap: float | None,
    logsumexp: Tensor,  # (n,) float64
    d_sum: Tensor,  # (n,)
) -> Tensor:
    """The gradient ``(n, V)`` of the weights ``w`` in ``Σ_j w_j logp_j``, from ``d_sum``, the sum's gradient, in its dtype."""
    z, _ = chunked_softmax_rows.transform(logits.to(d_sum.dtype), temperature, scale, softcap, with_slope=False)
    return d_sum[:, None] * (z - logsumexp[:, None]).to(d_sum.dtype)


softmax_rows.register_autograd(_backward, setup_context=_setup_context)


def rows_statistics(
    logits: Tensor,
    ids: Tensor | None,
    column_weight: Tensor | None = None,
    temperature: Tensor | None = None,
    *,
    probabilities: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    outputs: Sequence[str],
    inplace_backward: bool = False,
    backend: Backend | None = None,
    shard: VocabShard | None = None,
) -> RowStatistics:
    """Differentiable :class:`RowStatistics` of logits ``(B, V, S)``; rows are ``n = b·S + s``, ids ``(N, K)``.

    With a ``shard`` the logits, column weights and probabilities are those of its columns; the ids and the statistics are those
    of the whole vocabulary.

    With class probabilities ``(B, V, S)``, ``w`` is ``column_weight·((1 − label_smoothing)·probabilities + label_smoothing/V)``
    in each row, and ``weight_sum`` is returned too.
    """
    if probabilities is not None and (differentiated(column_weight) or (shard is not None and label_smoothing)):
        # PyTorch differentiates class weights only with class probabilities; kernels smooth over a shard's columns alone.
        vocab = logits.shape[1] if shard is None else shard.vocab
        w = None if column_weight is None else column_weight[:, None]
        probabilities = label_weights(w, probabilities, label_smoothing, vocab)
        column_weight, label_smoothing = None, 0.0
    dtype = statistics_dtype(logits.dtype)
    column_weight = constant("column_weight", column_weight, dtype)
    temperature = constant("temperature", temperature, dtype)
    outputs = with_weight_sum(outputs, shard) if probabilities is None else (*outputs, "weight_sum")
    if shard is not None:
        ids = None if ids is None else shard.local(ids)
    if transforms_active():
        refuse_shard(packed(shard), logits.shape)
        return differentiable_softmax_rows(
            logits, ids, column_weight, temperature, probabilities, label_smoothing, 1.0, softcap, outputs
        )
    found = softmax_rows(
        logits,
        None if ids is None else ids.contiguous(),
        column_weight,
        temperature,
        probabilities,
        label_smoothing,
        1.0,  # scale
        softcap,
        ",".join(outputs),
        inplace_backward and not torch.compiler.is_compiling(),
        resolve_backend(logits, backend),
        packed(shard),
    )
    return only(found, outputs, ids is not None)


def token_statistics(
    logits: Tensor | LinearLogits,
    index: Tensor | None = None,
    outputs: Collection[str] = ("log_probs",),
    *,
    temperature: float | Tensor = 1.0,
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
) -> TokenStatistics:
    r"""Per-token statistics of ``logits``; only those asked for are computed.

    With :math:`z` the logits over the temperature, :math:`lse = \log\sum_j e^{z_j}` and :math:`p = softmax(z)`:

    ==================== ========================================= ==============
    output               value                                     differentiable
    ==================== ========================================= ==============
    ``log_probs``        :math:`z_y - lse`, never positive         yes
    ``entropy``          :math:`lse - \sum_j p_j z_j`, nats        yes
    ``logsumexp``        :math:`lse`                               yes
    ``log_sum_sq_probs`` :math:`\log\sum_j p_j^2`                  yes
    ``mean_logits``      :math:`\frac{1}{V}\sum_j z_j`             no
    ``max_logit``        :math:`\max_j z_j`                        no
    ``is_top1``          whether ``index`` is the first maximum    no
    ==================== ========================================= ==============

    Source: the outputs of TRL 1.16's chunked log-prob function; ``log_sum_sq_probs`` is WPO's (arXiv:2406.11827).

    Args:
        logits: ``(…, V)``, any strides, a Tensor or a :class:`LinearLogits`.
        index: ids in ``[0, V)``, ``(…)`` or ``(…, K)`` for K ids per token. A token whose ids are all −100 is not read and,
            for a :class:`LinearLogits`, not projected: it gives 0 with gradient 0, whatever its logits are. A −100 beside other
            ids gives 0 in its place. Without an index, ``log_probs`` and ``is_top1`` cannot be asked for.
        outputs: names from the table.
        temperature: a number, or one number per token ``(…)``; it gets no gradient.
        group: the ranks that share the vocabulary, a process group or a :class:`VocabParallel`; ``logits`` is then this
            rank's shard ``(…, V_r)``; index and results are those of the whole vocabulary. A :class:`LinearLogits` has its own
            group.
        backend: ``"triton"`` or ``"torch"``; by default the one that serves the device.
        workspace: bytes that may be held beside inputs and results, for a :class:`LinearLogits`.

    Returns:
        A named tuple of tensors ``(…)``; ``log_probs`` is shaped like ``index``. They are fp32, or float64 for float64 logits,
        except ``is_top1``, which is bool (for the first of K ids). None where not asked for.

    Raises:
        IndexError: an id outside ``[0, V)``, on a CPU; on a GPU the device's next synchronisation fails.
        ValueError, TypeError: shapes, dtypes or options that do not fit, or an unknown output.

    Example:
        >>> found = token_statistics(torch.zeros(2, 4), torch.tensor([1, 3]), outputs=("log_probs", "entropy"))
        >>> found.log_probs, found.entropy
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    check_vocab_last("logits", logits)
    check_names("outputs", outputs)
    check_scaling(temperature=temperature)
    workspace = workspace_setting.parse(workspace)
    logits, shard = local_part(logits, group)
    index = index if index is None else local_target(index)
    tokens, V = logits.shape[:-1], logits.shape[-1] if shard is None else shard.vocab
    if index is None and {"log_probs", "is_top1"} & set(outputs):
        raise ValueError(f"log_probs and is_top1 need an index, {tuple(tokens)} or {with_ids(tokens)}; got None")
    logits, per_token = _at_temperature(logits, temperature, tokens)
    ids = None if index is None else ids_of(index, logits, V)
    if not is_lazy(logits):
        found = rows_statistics(
            rows_of(logits), ids, None, per_token, outputs=row_names(outputs), backend=backend, shard=shard
        )
    else:
        from .recompute import linear_logits_statistics  # a circular import: it uses the operators above

        found = linear_logits_statistics(logits, ids, outputs=row_names(outputs), backend=backend, workspace=workspace)
    values = of_rows(found, outputs, V, statistics_dtype(logits.dtype))
    shapes = {"log_probs": tokens if index is None else index.shape}
    return TokenStatistics(**{name: t.view(shapes.get(name, tokens)) for name, t in values.items()})


def selective_log_softmax(
    logits: Tensor | LinearLogits,
    index: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
) -> Tensor:
    r"""Log-probabilities of the tokens at ``index``, fp32 and differentiable.

    .. math:: \log p_y = z_y - \log\sum_j e^{z_j}, \qquad z = logits/temperature

    Source: TRL's ``selective_log_softmax``, OpenRLHF's ``log_probs_from_logits``, verl's ``logprobs_from_logits``,
    DeepSpeed-Chat's ``gather_log_probs``.

    Args:
        logits: ``(…, V)``, a Tensor or a :class:`LinearLogits`.
        index: ``(…)``, or ``(…, K)`` for K ids per token; −100 gives 0 with gradient 0.
        temperature: a number, or one number per token ``(…)``.
        row_mask: ``(…)``; tokens where it is 0 are neither read nor projected and give 0.
        group, backend, workspace: as for :func:`token_statistics`.

    Returns:
        Log-probabilities shaped like ``index``, never positive; fp32, or float64 for float64 logits.

    Example:
        >>> selective_log_softmax(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, -100]))
        tensor([-0.1269,  0.0000])
    """
    if row_mask is not None:
        tokens = logits.shape[:-1]
        if not same_sizes(row_mask.shape, tokens) or not same_sizes(index.shape[: len(tokens)], tokens):
            raise ValueError(
                f"logits {tuple(logits.shape)} need an index {tuple(tokens)} or {with_ids(tokens)} and a row_mask "
                f"{tuple(tokens)}, got {tuple(index.shape)} and {tuple(row_mask.shape)}"
            )
        check_masks(row_mask=row_mask)
        keep = row_mask != 0
        index = integer_ids(index).masked_fill(~(keep if index.ndim == keep.ndim else keep[..., None]), -100)
    return token_statistics(
        logits, index, ("log_probs",), temperature=temperature, group=group, backend=backend, workspace=workspace
    ).log_probs


def _at_temperature(logits: Any, temperature: float | Tensor, tokens: torch.Size) -> tuple[Any, Tensor | None]:
    """``logits`` and one temperature per row ``(N,)``; a :class:`LinearLogits` absorbs it instead."""
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        if not same_sizes(temperature.shape, tokens):
            raise ValueError(
                f"temperature {tuple(temperature.shape)} must be a number or have one per token {tuple(tokens)}"
            )
    elif not isinstance(temperature, Tensor) and temperature == 1.0:
        return logits, None
    if is_lazy(logits):
        return logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature), None
    return logits, on_device(temperature, logits.device, statistics_dtype(logits.dtype)).expand(tokens).reshape(-1)


def rows_of(logits: Tensor) -> Tensor:
    """``(…, V)`` as ``(B, V, S)``: a view if the strides allow it."""
    if logits.ndim <= 2:
        return logits.reshape(logits.shape[:-1].numel(), logits.shape[-1]).unsqueeze(-1)
    return logits.flatten(0, -3).transpose(1, 2)

"""Cross entropy of a linear head, without its logits: ``cross_entropy(linear(input, weight, bias), target)``.

Sums and means make their gradients in forward, a chunk of tokens at a time (:mod:`fused_losses.gradients_in_forward`);
``reduction="none"`` recomputes the logits in backward (:mod:`fused_losses.recompute`). Class probabilities take
:mod:`fused_losses.class_probabilities`. :func:`fused_losses.plan` predicts the memory of both routes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .autodiff import constant, differentiable_again, differentiated, same_sizes, trains, transforms_active
from .class_probabilities import label_loss, label_statistics
from .cross_entropy import (
    CrossEntropyStatistics,
    denominators,
    hard_label_loss,
    hard_label_statistics,
    plus_z_loss,
    row_shares,
)
from .gradients_in_forward import Factors, linear_loss, loss_of_head, with_gradients
from .head import Head, check_head, head_of, kept_tokens, ready
from .linear_logits import LinearLogits
from .numerics import (
    autocast_dtype,
    check_label_smoothing,
    check_reduction,
    check_scaling,
    on_device,
    statistics_dtype,
    sum_of_losses,
)
from .recompute import linear_statistics
from .settings import Backend, Route, resolve_backend
from .settings import gradient_filter as gradient_filter_setting
from .settings import route as route_setting
from .token_statistics import target_ids
from .vocab_parallel import is_dtensor, local_target, summed_in_backward, vocab_shard


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor | None = None,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    group: Any = None,
    backend: Backend | None = None,
    route: Route | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
    accumulate: str | None = None,
    main_grad: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
) -> Any:
    r"""``torch.nn.functional.linear_cross_entropy`` that never holds ``tokens × vocabulary`` logits.

    .. math::
        \ell_n = τ_n \Big[ (1-ε)\,w_{y_n}\,(lse_n - z_{n,y_n}) + \frac{ε}{C} \sum_c w_c\,(lse_n - z_{n,c})
        + z\_loss·lse_n^2 \Big], \qquad z = softcap·\tanh(scale·(h W^\top + b)/softcap)/T

    Source: PyTorch 2.13 to 2.15, whose values, gradients, dtypes and errors it matches; z-loss as in PaLM (arXiv:2204.02311)
    and Liger's ``lse_square_scale``; softcap as in Gemma 2 (arXiv:2408.00118). It supports what PyTorch's chunked path refuses:
    smoothing, class probabilities (refused before 2.15), K dimensions, a second backward through the graph, and
    ``torch.compile`` without a graph break.

    Under ``mean`` and ``sum`` the gradients are made in forward if :func:`fused_losses.plan` finds room. Activation
    checkpointing around this call then doubles its cost; under ``no_grad`` it costs one product. Ignored tokens are not
    projected. That needs their count on the host, which is the one synchronisation: see ``drop_ignored``.

    Args:
        input: hidden states ``(H)``, ``(N, H)`` or ``(…, H)``, float64, float32, bfloat16 or float16.
        linear_weight: ``(C, H)``, or ``(C, d1, …, dk, H)`` with input ``(N, H)``.
        target: class indices, int64 or uint8, shaped ``input.shape[:-1]`` (``(N, d1, …, dk)``); or class probabilities shaped
            like the logits, ``(…, C)`` (``(N, C, d1, …, dk)``).
        linear_bias: ``(C)`` or ``(C, d1, …, dk)``.
        weight: one weight per class, ``(C)``. Under ``mean`` the sum is divided by the summed weights of the targets; with
            class probabilities by the number of positions.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. A mean over nothing is nan.
        ignore_index: a class index that contributes nothing; None is −100. An error with class probabilities.
        label_smoothing: ε in [0, 1].
        options: PyTorch's chunking options, accepted and ignored: :func:`fused_losses.plan` chooses the chunks.
        scale: multiplies the products.
        softcap: bound of the logits; None: no bound.
        temperature: a number, or one per token shaped ``input.shape[:-1]``; gets no gradient.
        z_loss: adds ``z_loss·lse²`` for each position that is not ignored. It is not weighted by class: under ``mean`` this
            term is divided by the number of those positions.
        token_weights: τ, one factor per position, shaped like class indices. They do not change what ``mean`` divides by.
        out_dtype: dtype of the result; None is PyTorch's: ``input.dtype``, rounded once, at the end (fp32 under autocast). A
            sum or mean that trains reads a 16-bit head's logits in 16 bits, as eager does; on ``route="recompute"`` in fp32.
        return_statistics: also return :class:`CrossEntropyStatistics`.
        group: the ranks that share the vocabulary, a process group or a :class:`VocabParallel`; ``linear_weight`` and
            ``linear_bias`` (and class probabilities) are then this rank's shard; everything else is that of the whole
            vocabulary. For DTensors the placements give the group: see :mod:`fused_losses.tensor_parallel`.
        backend: ``"triton"`` or ``"torch"``; by default the one that serves the device.
        route: ``"gradients_in_forward"`` or ``"recompute"``; by default the fastest that fits.
        workspace: bytes or ``"256MiB"`` that may be held beside inputs, outputs and gradients.
        drop_ignored: take ignored tokens out before the products (True), or zero them, without a synchronisation (False).
        accumulate: ``"fp32"`` sums the weight's gradient over chunks in fp32, however few the chunks.
        main_grad: fp32 ``(C, H)``; the weight's gradient is added to it in backward instead of being returned. Route
            ``recompute``, unless ``grad_scale`` is given.
        grad_scale: a promise of what the upstream gradient of the result will be. Route ``gradients_in_forward`` can then add
            to ``main_grad`` in forward, and backward does not apply the upstream gradient to it. In float16 it should include
            the loss scale, without which small gradients underflow. A tensor may not be 0.

    Returns:
        The loss, or ``(loss, CrossEntropyStatistics)``.

    Raises:
        IndexError: a class index outside ``[0, C)``, on a CPU; on a GPU the device's next synchronisation fails.
        RuntimeError, ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> hidden, head = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> linear_cross_entropy(hidden, head, torch.tensor([0, -100]))
        tensor(0.1698, grad_fn=<WhereBackward0>)
    """
    check_scaling(softcap, temperature)
    if is_dtensor(input) or is_dtensor(linear_weight):
        from .tensor_parallel import local_head

        input, linear_weight, linear_bias, _, _, group = local_head(input, linear_weight, linear_bias, group=group)
        target = local_target(target)
    _check_shapes(input, linear_weight, linear_bias)
    tokens, C, dims = input.shape[:-1], linear_weight.shape[0], linear_weight.shape[1:-1]
    shard = vocab_shard(group, C)
    if shard is not None:  # rows beyond shard.size are padding
        if target.shape == (*tokens, C, *dims):
            target = target.narrow(len(tokens), 0, shard.size)
        main_grad = None if main_grad is None else main_grad[: shard.size]
        C, linear_weight = shard.size, linear_weight[: shard.size]
        linear_bias = None if linear_bias is None else linear_bias[: shard.size]
    result_dtype = input.dtype
    if (cast := autocast_dtype(input.device)) is not None:
        result_dtype = statistics_dtype(cast)
        input, linear_weight = input.to(cast), linear_weight.to(cast)
        linear_bias = None if linear_bias is None else linear_bias.to(cast)
    D = math.prod(dims)
    hidden = input.reshape(tokens.numel(), input.shape[-1])
    if temperature is not None:
        temperature = on_device(temperature, input.device, statistics_dtype(input.dtype)).expand(tokens).reshape(-1)
    weights: Sequence[Tensor] = linear_weight.reshape(C, D, input.shape[-1]).unbind(1) if dims else [linear_weight]
    biases: Sequence[Tensor | None] = [linear_bias]
    if dims:
        biases = [None] * D if linear_bias is None else linear_bias.reshape(C, D).unbind(1)
    shard = None if shard is None else shard.of_head(hidden, None)
    heads = [
        Head(hidden, w, b, None, None, temperature, scale, softcap, shard, gradient_filter_setting.value)
        for w, b in zip(weights, biases, strict=True)
    ]
    for head in heads:
        check_head(head)
    probabilities = target.shape == (*tokens, C, *dims)
    if probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if dims and probabilities:
        target = target.movedim(1, -1)
    loss, statistics, _ = heads_cross_entropy(
        heads,
        target,
        probabilities=probabilities,
        positions=torch.Size((*tokens, *dims)),
        weight=weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        token_weights=token_weights,
        return_statistics=return_statistics,
        backend=backend,
        route=route,
        workspace=workspace,
        drop_ignored=drop_ignored,
        accumulate=accumulate,
        main_grad=main_grad,
        grad_scale=grad_scale,
    )
    for other in (target, weight):
        if other is not None and other.is_floating_point():
            result_dtype = torch.promote_types(result_dtype, other.dtype)
    loss = loss.to(out_dtype or result_dtype)
    return (loss, statistics) if return_statistics else loss


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """PyTorch's checks, in its words."""
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or more, got {input.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    tokens, dims = input.shape[:-1], linear_weight.shape[1:-1]
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if dims and len(tokens) != 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got {'unbatched ' if not tokens else ''}input with shape {tuple(input.shape)}"
        )


def linear_logits_cross_entropy(
    logits: LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    out_dtype: torch.dtype | None = None,
    return_statistics: bool = False,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    backend: Backend | None = None,
) -> Any:
    """:func:`fused_losses.cross_entropy` of lazy logits, whichever dimension is their vocabulary."""
    if softcap is not None and logits.softcap is not None:
        raise ValueError(f"the logits already have a softcap of {logits.softcap}; got another, {softcap}")
    if softcap is not None and logits.rows().temperature is not None:
        raise ValueError("a softcap after a temperature is not a LinearLogits: give the softcap to LinearLogits")
    start, stop = logits.vocab_range
    here = list(logits.shape)
    here[logits.vocab_dim] = stop - start
    probabilities = target.shape == torch.Size(here)
    if probabilities:
        if ignore_index >= 0:
            raise RuntimeError(f"ignore_index is not supported for floating point target; got {ignore_index}")
        target = target.movedim(logits.vocab_dim, -1)
    bare = weight is None and softcap is None and not (label_smoothing or z_loss or return_statistics or backend)
    if bare and reduction == "none" and not target.is_floating_point() and same_sizes(target.shape, logits.token_shape):
        log_probs = logits.log_probs_at(target.unsqueeze(-1), ignore_index).squeeze(-1)
        return (0 - log_probs).to(out_dtype or logits.dtype)  # 0 − x, since negating a 0 gives −0
    with logits.gathered():
        head = head_of(logits)._replace(softcap=softcap or logits.softcap)
        loss, statistics, made = heads_cross_entropy(
            [head],
            target,
            probabilities=probabilities,
            positions=logits.token_shape,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            token_weights=token_weights,
            return_statistics=return_statistics,
            backend=backend,
        )
    loss = logits.gather_in_backward(loss, made).to(out_dtype or logits.dtype)
    return (loss, statistics) if return_statistics else loss


def heads_cross_entropy(
    heads: Sequence[Head],  # one per position of a token, D
    target: Tensor,  # indices shaped positions, or probabilities (*positions, C)
    *,
    probabilities: bool,
    positions: torch.Size,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    return_statistics: bool = False,
    backend: Backend | None = None,
    route: Route | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
    accumulate: str | None = None,
    main_grad: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
) -> tuple[Tensor, CrossEntropyStatistics | None, bool]:
    """The reduced loss in fp32 or wider, its statistics, and whether its gradients were made in forward on a route that the
    user asked for. A route that was only planned does not count: a rank with more tokens may plan the other one."""
    hidden, C = heads[0].hidden, heads[0].vocab
    N, D, dtype = hidden.shape[0], len(heads), statistics_dtype(hidden.dtype)
    _check_arguments(
        heads, target, probabilities, positions, weight, reduction, label_smoothing, token_weights, main_grad, grad_scale,
    )  # fmt: skip
    if token_weights is not None:
        token_weights = token_weights.to(dtype).reshape(N, D)
    if isinstance(grad_scale, (int, float)) and grad_scale == 0:
        grad_scale = None  # the loss, multiplied by it, could not be divided by it again
    asked = route_setting.chosen(route) == "gradients_in_forward"

    how: dict[str, Any] = {"backend": backend, "workspace": workspace}
    if probabilities:
        loss, logsumexp, in_forward = _of_probabilities(
            heads, target, weight, label_smoothing, z_loss, token_weights, reduction, route, accumulate, **how
        )
        statistics = CrossEntropyStatistics(None, logsumexp.detach().to(dtype).view(positions), None)
        loss = loss.view(positions) if reduction == "none" else loss
        return loss, statistics if return_statistics else None, in_forward and asked
    if weight is not None and differentiated(weight):
        raise RuntimeError(
            f"the derivative for weight {tuple(weight.shape)} is not implemented with class indices; detach it"
        )
    ids = target_ids(target.reshape(N, D), C, ignore_index)
    shares = row_shares(ids, weight, dtype)
    counted = ids != -100
    total, square = denominators(shares, counted, weight, z_loss, reduction)
    divisor: Tensor | int = 1
    if reduction != "none":
        some = counted.any()
        divisor = torch.where(some, total.to(dtype), 1) if reduction == "mean" else 1
    if token_weights is not None:
        token_weights = token_weights.masked_fill(~counted, 0)
    columns = slice(None) if heads[0].shard is None else heads[0].shard.part
    column_weight = weight[columns] if weight is not None and label_smoothing else None
    values, found = [], []
    for i, head in enumerate(heads):
        value, statistics_of_head, in_forward = _hard(
            head,
            ids[:, i : i + 1],
            shares[:, i],
            None if token_weights is None else token_weights[:, i],
            column_weight,
            label_smoothing,
            square,
            summed=reduction != "none",
            top1=return_statistics,
            route=route,
            drop_ignored=drop_ignored,
            accumulate=accumulate,
            main_grad=main_grad,
            divisor=divisor,
            promised=grad_scale,
            **how,
        )
        values.append(value)
        found.append(statistics_of_head)
    loss = torch.stack(values, -1)
    if reduction == "none":
        loss = loss.view(positions)
    else:  # without tokens 0 or nan, with gradient 0 and not 0·∞: callers divide by a count
        loss = torch.where(some, loss.sum(), torch.nan if reduction == "mean" else 0)
    if not return_statistics:
        return loss, None, in_forward and asked
    log_probs, logsumexp, is_top1 = (torch.stack(list(part), -1).view(positions) for part in zip(*found, strict=True))
    return loss, CrossEntropyStatistics(log_probs.detach(), logsumexp.detach().to(dtype), is_top1), in_forward and asked


def _check_arguments(
    heads: Sequence[Head],
    target: Tensor,
    probabilities: bool,
    positions: torch.Size,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    token_weights: Tensor | None,
    main_grad: Tensor | None,
    grad_scale: float | Tensor | None,
) -> None:
    hidden, C, D = heads[0].hidden, heads[0].vocab, len(heads)
    dtype = statistics_dtype(hidden.dtype)
    check_reduction(reduction)
    check_label_smoothing(label_smoothing)
    if not probabilities and not same_sizes(target.shape, positions):
        raise ValueError(
            f"Expected a target of class indices {tuple(positions)} or of class probabilities, got {tuple(target.shape)} "
            f"for {hidden.shape[0] * D} positions of {C} classes"
            + ("" if heads[0].shard is None else f"; of a shared vocabulary, of this rank's {heads[0].shard.size}")
        )
    if not (target.is_floating_point() if probabilities else target.dtype in (torch.int64, torch.uint8)):
        raise RuntimeError(
            f"Expected int64 or uint8 class indices {tuple(positions)}, or floating point class probabilities; got "
            f"{target.dtype} {tuple(target.shape)}"
        )
    if target.device != hidden.device:
        raise RuntimeError(f"input is on {hidden.device} and target on {target.device}: move one")
    if weight is not None and (weight.shape != (C,) or weight.device != hidden.device):
        raise RuntimeError(
            f"weight tensor should be defined either for all {C} classes or no classes but got weight tensor of shape "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if token_weights is not None and token_weights.shape != positions:
        raise ValueError(f"expected token_weights {tuple(positions)}, got {tuple(token_weights.shape)}")
    if main_grad is not None and (
        D > 1 or probabilities or main_grad.shape != heads[0].weight.shape or main_grad.dtype != dtype
    ):
        raise ValueError(
            f"main_grad takes the gradient of a (C, H) weight from class indices in {dtype}; got {main_grad.dtype} "
            f"{tuple(main_grad.shape)} for {D} weight(s) {tuple(heads[0].weight.shape)}"
        )
    if grad_scale is not None and (main_grad is None or reduction == "none"):
        raise ValueError(
            "grad_scale promises the upstream gradient of a mean or sum for main_grad=; there is none here"
        )


def _of_probabilities(
    heads: Sequence[Head],
    target: Tensor,  # (…, C)
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    token_weights: Tensor | None,  # (N, D)
    reduction: str,
    route: Route | None,
    accumulate: str | None,
    *,
    workspace: int | str | None,
    backend: Backend | None,
) -> tuple[Tensor, Tensor, bool]:
    """The loss with class probabilities, reduced or ``(N, D)``; ``logsumexp (N, D)``; whether forward made the gradients."""
    head, shard = heads[0], heads[0].shard
    N, D, V = head.hidden.shape[0], len(heads), head.weight.shape[0]
    # If D is 1, unbind() is avoided: its backward would copy the gradient.
    targets = target.reshape(N, D, V).unbind(1) if D > 1 else [target.reshape(N, V)]
    weight = weight if weight is None or shard is None else summed_in_backward(weight, shard)[shard.part]
    backend = resolve_backend(head.hidden, backend)
    planned = head.plan(
        per_token=reduction == "none", route=route, workspace=workspace, accumulate=accumulate, backend=backend
    )
    # Gradients made in forward cannot be differentiated again: where that is supported, the route must be asked for.
    asked = route_setting.chosen(route) == "gradients_in_forward" or shard is not None
    alone = any(head.trained) and not any(trains(t) for t in (target, weight, token_weights))
    in_forward = planned.route == "gradients_in_forward" and alone and not transforms_active()
    in_forward = in_forward and (asked or not differentiable_again(N, V, head.hidden.dtype))
    if token_weights is None:
        token_weights = head.hidden.new_ones(N, D, dtype=statistics_dtype(head.hidden.dtype))
    if in_forward and reduction == "mean":  # divided now, as for class indices
        token_weights = token_weights / max(N * D, 1)
    losses, logsumexps = [], []
    for of_head, t, tau in zip(heads, targets, token_weights.unbind(1), strict=True):
        if in_forward:
            loss, logsumexp = label_loss(
                of_head, t, weight, label_smoothing, -tau, z_loss * tau if z_loss else None, planned.budget, accumulate,
                backend,
            )  # fmt: skip
        else:
            found = label_statistics(of_head, t, weight, label_smoothing, workspace=workspace, backend=backend)
            loss, logsumexp = plus_z_loss(-found.sum_log_probs, found, z_loss) * tau, found.logsumexp
            loss = loss if reduction == "none" else loss.sum()
        losses.append(loss)
        logsumexps.append(logsumexp)
    loss = torch.stack(losses, -1)
    if reduction != "none":
        loss = loss.sum()
        if in_forward and N == 0:  # nan or 0, with gradient 0 and not 0·∞
            loss = loss.masked_fill(loss == 0, torch.nan if reduction == "mean" else 0)
        elif reduction == "mean" and not in_forward:
            loss = loss / (N * D)
    return loss, torch.stack(logsumexps, 1), in_forward


def _hard(
    head: Head,
    ids: Tensor,  # (N, 1)
    shares: Tensor,  # (N,)
    token_weights: Tensor | None,  # (N,)
    column_weight: Tensor | None,  # (V,), only with label smoothing: shares already include the targets' weights
    label_smoothing: float,
    z_loss: float | Tensor,
    *,
    summed: bool,
    top1: bool,
    route: Route | None,
    backend: Backend | None,
    workspace: int | str | None,
    drop_ignored: bool | None,
    accumulate: str | None,
    main_grad: Tensor | None,
    divisor: Tensor | int,
    promised: float | Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], bool]:
    """The loss with class indices, summed or per token, the sum divided by ``divisor``; ``(log_probs, logsumexp, is_top1)``;
    and whether gradients were made in forward.

    ``promised``: the upstream gradient of the loss, if the caller promises it.
    """
    C, wanted, backend = head.vocab, head.trained, resolve_backend(head.hidden, backend)
    # For all tokens: the route may not depend on the number of ignored ones, which differs between ranks.
    chosen = head.plan(per_token=not summed, route=route, workspace=workspace, accumulate=accumulate, backend=backend)
    keep, zero_ignored = kept_tokens(ids, drop_ignored)
    known = token_weights is None or not token_weights.requires_grad
    if main_grad is not None:  # if only the weight trains, no gradient would be left for backward
        known = known and promised is not None and (wanted[0] or any(wanted[2:]))
    known = known and not transforms_active()
    if chosen.route == "gradients_in_forward" and known and any(wanted):
        column_weight, head = constant("weight", column_weight, shares.dtype), ready(head)
        tau = (ids[:, 0] != -100).to(shares.dtype) if token_weights is None else token_weights.detach()
        tau = tau / divisor  # divided now, so that the upstream gradient is 1 and backward has nothing to multiply
        of = Factors(
            -(1 - label_smoothing) * shares * tau,
            -label_smoothing / C * tau if label_smoothing else None,
            z_loss * tau if isinstance(z_loss, Tensor) or z_loss else None,
        )
        room = head.plan(keep, zero_ignored, route=chosen.route, workspace=workspace, backend=backend).budget
        how: dict[str, Any] = {
            "ids": ids.contiguous(),
            "column_weight": column_weight,
            "keep": keep,
            "zero_ignored": zero_ignored,
            "top1": top1,
            "wanted": wanted,
            "workspace": room,
            "accumulate": accumulate,
            "backend": backend,
        }
        if main_grad is None:
            loss, log_probs, logsumexp, is_top1, *_ = linear_loss(**head.packed(), **of._asdict(), **how)
        else:
            assert promised is not None
            with torch.no_grad():
                of = Factors(*(None if t is None else t * promised for t in of))  # type: ignore[arg-type]
                value, found, gradients = loss_of_head(head.detached(), of, **how, main_grad=main_grad)
            loss = with_gradients(value, gradients, head.inputs, backend) / promised
            log_probs, logsumexp, is_top1 = found.log_probs, found.logsumexp, found.is_top1
        return loss, (log_probs[:, 0], logsumexp, is_top1), True
    statistics = linear_statistics(
        head,
        ids,
        column_weight,
        outputs=hard_label_statistics(label_smoothing, top1),
        kept=(keep, zero_ignored),
        workspace=workspace,
        backend=backend,
        main_grad=main_grad,
    )
    loss = hard_label_loss(statistics, shares, C, label_smoothing, z_loss)
    if token_weights is not None:
        loss = loss * token_weights
    loss = sum_of_losses(loss) / divisor if summed else loss
    return loss, (statistics.log_probs[:, 0], statistics.logsumexp, statistics.is_top1), False


class LinearCrossEntropyLoss(nn.Module):
    r"""A linear head and :func:`linear_cross_entropy` of its output, like ``torch.nn.LinearCrossEntropyLoss``.

    Args:
        in_features: ``H``.
        num_classes: ``C``.
        out_features: ``(d1, …, dk)`` positions per token.
        bias: whether the head has one.
        weight: one weight per class.
        reduction, ignore_index, label_smoothing, options: as for the function.
        device, dtype: of the head.
        extras: further keyword-only arguments of the function.

    Raises:
        TypeError: an extra that the function does not take.

    Example:
        >>> loss = LinearCrossEntropyLoss(4, 7)
        >>> loss(torch.zeros(2, 4), torch.tensor([1, 3])).shape
        torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **extras: Any,
    ) -> None:
        super().__init__()
        inspect.signature(linear_cross_entropy).bind(None, None, None, linear_bias=None, **extras)
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        # One matrix, as in torch.nn.LinearCrossEntropyLoss, so that checkpoints are compatible.
        rows = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.extras = options, extras

    def forward(self, input: Tensor, target: Tensor) -> Any:
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            linear_weight = linear_weight.view(self.num_classes, *self.out_features, -1)
            linear_bias = None if linear_bias is None else linear_bias.view(self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.extras,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
            + "".join(f", {name}={value}" for name, value in self.extras.items())
        )

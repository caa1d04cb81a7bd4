"""Any loss that is a sum over tokens of a function of a few numbers per token, with its gradients made in forward.

Over a :class:`LinearLogits` this costs three products, where :func:`token_statistics` costs four. For a chunk of tokens at a
time it computes statistics, the user's function and its derivative, the gradient of the logits, and its products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .autodiff import exporting, hooks_on_saved, same_sizes, seeks_nan, trains, transforms_active
from .gradients_in_forward import by_coefficients, loss_and_gradients, with_gradients
from .head import Head, head_of, kept_tokens, ready
from .lazy_tensor import is_lazy
from .linear_logits import LinearLogits
from .numerics import full_precision, sum_of_losses
from .row_statistics import Coefficients, RowStatistics, coefficients, empty_statistics, without_ignored
from .settings import Backend, resolve_backend
from .settings import route as route_setting
from .token_statistics import (
    TokenStatistics,
    check_names,
    check_vocab_last,
    ids_of,
    of_rows,
    row_names,
    token_statistics,
)
from .vocab_parallel import local_part, local_target

DIFFERENTIABLE = ("log_probs", "entropy", "logsumexp", "log_sum_sq_probs")


def token_loss(
    fn: Callable[..., Any],
    logits: Tensor | LinearLogits,
    index: Tensor,
    *per_token: Tensor,
    statistics: Sequence[str] = ("log_probs",),
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
    accumulate: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Sum over tokens of ``fn`` of their statistics, at the price of a cross entropy.

    .. math:: L = \sum_n fn(\log p_n, H_n, …;\ x_n)

    It equals ``fn(token_statistics(logits, index, statistics), *per_token).sum()`` over the tokens that have an index, and is
    cheaper: ``6NVH`` floating point operations for loss and gradients instead of ``8NVH``. Express a mean as a weight per
    token. It falls back to :func:`token_statistics` if no chunk fits the workspace, under saved-tensor hooks (activation
    checkpointing) and, when compiled, under ``detect_anomaly``.

    Args:
        fn: ``fn(statistics, *per_token) -> (n,)``, or ``((n,), {name: (n,)})``: PyTorch on ``n`` tokens at a time, each token
            on its own. ``statistics`` is a :class:`TokenStatistics` with the fields asked for, ``log_probs`` ``(n,)`` or
            ``(n, K)``. If ``logits`` are lazy, no other tensor that it reads may require grad.
        logits: ``(…, V)``, a Tensor or a :class:`LinearLogits`.
        index: ids in ``[0, V)``, ``(…)`` or ``(…, K)``. Tokens whose ids are all −100 do not reach ``fn``. (With
            ``drop_ignored=False`` and under ``torch.compile`` they do, with statistics of 0, and their loss counts as 0.)
        per_token: tensors ``(…)`` or ``(…, m)``, indexed by the tokens that ``fn`` sees. They get no gradient.
        statistics: names of :class:`TokenStatistics`.
        group: as for :func:`token_statistics`.
        backend, workspace, drop_ignored, accumulate: as for :func:`linear_cross_entropy`.

    Returns:
        ``(loss, aux)``: the scalar loss, fp32 or wider, differentiable in the logits; and ``fn``'s dictionary, detached, each
        entry ``(…)`` with 0 where there is no index.

    Raises:
        TypeError: an index or ``per_token`` that is not a tensor, ``logits`` that are neither one nor a :class:`LinearLogits`,
            or an ``fn`` that does not return a tensor.
        ValueError: ``per_token`` of another shape, or that requires grad; an ``fn`` that reads another tensor that does.

    Example:
        >>> advantages = torch.tensor([1.0, -1.0])
        >>> loss, _ = token_loss(lambda s, a: -a * s.log_probs.exp(), torch.zeros(2, 4), torch.tensor([1, 3]), advantages)
        >>> loss
        tensor(0.)
    """
    check_vocab_last("logits", logits)
    logits, shard = local_part(logits, group)
    for name, x in (("index", index), *(("per_token", x) for x in per_token)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a tensor with a number for each token {tuple(logits.shape[:-1])}, got {x!r}")
    index = local_target(index)
    tokens, V = logits.shape[:-1], logits.shape[-1] if shard is None else shard.vocab
    for x in per_token:
        if not same_sizes(x.shape[: len(tokens)], tokens) or x.ndim > len(tokens) + 1:
            raise ValueError(
                f"per_token tensors are {tuple(tokens)} or {(*tokens, 'm')} as the logits {tuple(logits.shape)}, got "
                f"{tuple(x.shape)}"
            )
        if trains(x):
            raise ValueError(
                f"per_token tensors get no gradient, and one {tuple(x.shape)} requires it: detach it, or use token_statistics"
            )
    check_names("statistics", statistics)
    single = index.ndim == len(tokens)
    N = tokens.numel()
    flat = tuple(x.reshape(N, *x.shape[len(tokens) :]) for x in per_token)
    ids = ids_of(index, logits, V)
    keep, zero_ignored = kept_tokens(ids, drop_ignored)
    loss_of = _PerToken(fn, flat, ids, zero_ignored, single, statistics, V)

    if is_lazy(logits) and logits.requires_grad and torch.is_grad_enabled() and not transforms_active():
        with logits.gathered():
            head = head_of(logits)
            backend = resolve_backend(head.hidden, backend)
            planned = head.plan(workspace=workspace, accumulate=accumulate, backend=backend)
            # torch.func, which differentiates fn, refuses saved-tensor hooks, and torch.export does not trace it.
            in_forward = planned.route == "gradients_in_forward" and not exporting() and not hooks_on_saved()
            in_forward = in_forward and not (torch.compiler.is_compiling() and seeks_nan())
            if in_forward:
                head = ready(head)
                loss = _made_in_forward(loss_of, head, keep, zero_ignored, workspace, accumulate, backend)
            else:
                found = token_statistics(logits, index, statistics, backend=backend, workspace=workspace)
        if in_forward:
            asked = route_setting.value == "gradients_in_forward"  # otherwise a rank with more tokens may plan another
            return logits.gather_in_backward(loss, made=asked), loss_of.aux_at(tokens)
    else:
        group = None if is_lazy(logits) else shard
        found = token_statistics(logits, index, statistics, group=group, backend=backend, workspace=workspace)
    part: slice | Tensor = slice(None) if keep is None else keep
    parts = (None if s is None else s.reshape(len(ids), *s.shape[len(tokens) :])[part] for s in found)
    value = loss_of(TokenStatistics(*parts), part)
    return sum_of_losses(value), loss_of.aux_at(tokens)


def _made_in_forward(
    loss_of: _PerToken,
    head: Head,
    keep: Tensor | None,  # (M,)
    zero_ignored: bool,
    workspace: int | str | None,
    accumulate: str | None,
    backend: Backend,
) -> Tensor:
    """The sum of the losses of a head's tokens, with its gradients."""
    ids, wanted = loss_of.ids, head.trained
    with torch.no_grad(), full_precision(head.hidden.device):
        in_float16 = head.hidden.dtype == torch.float16
        over_logits = by_coefficients(loss_of.coefficients, loss_of.outputs, None, backend, in_float16)
        gradients = loss_and_gradients(
            head.detached(), ids, keep, zero_ignored, over_logits, wanted, workspace, accumulate, backend
        )
        if loss_of.loss is None:  # there was no token: call fn on none, to learn what it returns
            nothing = empty_statistics(head.hidden, 0, ids[:0], loss_of.outputs)
            loss_of.coefficients(nothing, slice(0, 0))
    assert loss_of.loss is not None
    loss = with_gradients(sum_of_losses(loss_of.loss), gradients, head.inputs, backend)
    return torch.where((ids != -100).any(), loss, 0)  # without tokens 0, with gradient 0 and not 0·∞


class _PerToken:
    """The user's function, applied to some tokens at a time, and the losses and aux that it returned for all of them."""

    def __init__(
        self,
        fn: Callable[..., Any],
        per_token: Sequence[Tensor],
        ids: Tensor,  # (N, K)
        zero_ignored: bool,
        single: bool,
        statistics: Sequence[str],
        vocab: int,
    ) -> None:
        self.fn, self.per_token, self.ids, self.single, self.vocab = fn, per_token, ids, single, vocab
        self.counted = (ids != -100).any(-1) if zero_ignored else None
        self.statistics = tuple(statistics)
        self.outputs = row_names(statistics)
        self.loss: Tensor | None = None
        self.aux: dict[str, Tensor] = {}

    def __call__(self, found: TokenStatistics, rows: slice | Tensor) -> Tensor:
        """Loss of the tokens at ``rows``, differentiable, 0 where ignored; keeps aux."""
        value, aux = self.split(found, self.cut(rows))
        self.store(aux, rows)
        return value if self.counted is None else torch.where(self.counted[rows], value, 0)

    def cut(self, rows: slice | Tensor) -> list[Tensor]:
        parts = []
        for x in self.per_token:  # no comprehension: Dynamo would treat the rows it closes over as constants
            parts.append(x[rows])
        return parts

    def split(self, found: TokenStatistics, per_token: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            result = self.fn(found, *per_token)
        except (AttributeError, TypeError) as error:
            if None not in found:
                raise
            raise type(error)(
                f"{error} (fn is given the statistics {self.statistics}, and None for others: name what it reads in "
                "statistics=)"
            ) from error
        value, aux = result if isinstance(result, tuple) else (result, {})
        n = next(s for s in found if s is not None).shape[:1]
        for name, x in (("fn", value), *((f"fn's {name!r}", x) for name, x in aux.items())):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must return one number per token, a tensor {tuple(n)}, got {x!r}")
            if x.shape != n:
                raise ValueError(f"{name} must return one number per token, {tuple(n)}, got {tuple(x.shape)}")
        return value, {name: x.detach() for name, x in aux.items()}

    def store(self, aux: dict[str, Tensor], rows: slice | Tensor) -> None:
        for name, x in aux.items():
            if self.counted is not None:
                x = x.masked_fill(~self.counted[rows], 0)
            if name not in self.aux:
                self.aux[name] = x.new_zeros(len(self.ids))
            self.aux[name][rows] = x

    def coefficients(self, found: RowStatistics, rows: slice | Tensor) -> Coefficients:
        """The coefficients of the gradient of a chunk's logits; keeps the loss and aux."""
        dtype = found.log_probs.dtype
        seen = TokenStatistics(**of_rows(found, self.statistics, self.vocab, dtype))
        if seen.log_probs is not None and self.single:
            seen = seen._replace(log_probs=seen.log_probs[:, 0])
        names = [name for name in DIFFERENTIABLE if name in self.statistics]
        per_token = self.cut(rows)

        def of(*differentiable: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.split(seen._replace(**dict(zip(names, differentiable, strict=True))), per_token)

        primals = [getattr(seen, name) for name in names]
        with torch.enable_grad():  # otherwise a tensor that fn closes over and that requires grad would go unnoticed
            value, pullback, aux = torch.func.vjp(of, *primals, has_aux=True)  # type: ignore[misc]
            if value.requires_grad:
                raise ValueError(
                    "fn reads a tensor that requires grad, beside its arguments, and that would get none: detach it, or use "
                    "token_statistics"
                )
            gradients = dict(zip(names, pullback(torch.ones_like(value)), strict=True))
        self.store(aux, rows)
        if self.counted is not None:
            here = self.counted[rows]
            value = torch.where(here, value, 0)
            gradients = {name: torch.where(here.view(-1, *[1] * (g.ndim - 1)), g, 0) for name, g in gradients.items()}
        if self.loss is None:
            self.loss = value.new_zeros(len(self.ids))
        self.loss[rows] = value
        if "log_probs" in gradients and self.single:
            gradients["log_probs"] = gradients["log_probs"][:, None]
        upstream = without_ignored(RowStatistics(**gradients), self.ids[rows])
        return coefficients(upstream, found, self.vocab, None, dtype)

    def aux_at(self, tokens: torch.Size) -> dict[str, Tensor]:
        return {name: x.view(tokens) for name, x in self.aux.items()}

"""The two routes from hidden states and a head's weight to a loss and its gradients, without the logits.

With ``N`` tokens, ``V`` vocabulary and ``H`` hidden, one product over the logits is ``2NVH`` floating point operations.

- ``gradients_in_forward`` (:func:`loss_and_gradients`, ``6NVH``): for a loss that is a sum over tokens. A chunk of tokens at a
  time: logits, statistics, loss, gradient of the logits over the logits, and its products with weight and hidden. Backward
  multiplies by the upstream gradient. Recomputing the forward (activation checkpointing) doubles its cost.
- ``recompute`` (:func:`linear_statistics`, ``8NVH``): for per-token results. Forward keeps a few numbers per token;
  backward makes the logits' gradient again, a slice of the vocabulary at a time. The logits that fit the room this
  takes are saved in it by forward, and not made again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import library_tiles
from .autodiff import SMALL, check_differentiable, differentiable_gradients, refuse_shard, transforms_active
from .chunked import linear_softmax as chunked_linear_softmax
from .chunked.linear_softmax import slices
from .chunked.softmax_rows import CHUNK_ELEMENTS, row_statistics, skipped, transform
from .numerics import full_precision, statistics_dtype
from .planning import Plan, plan
from .row_statistics import (
    Coefficients,
    RowStatistics,
    coefficients,
    empty_statistics,
    total_weight,
    where_ids_stand,
)
from .settings import Backend, resolve_backend
from .settings import drop_ignored as drop_ignored_setting
from .token_statistics import rows_module, softmax_rows, softmax_rows_grad
from .vocab_parallel import VocabShard, merged_statistics, packed, with_weight_sum

if TYPE_CHECKING:
    from .linear_logits import LinearLogits

BLOCK = 1024  # of a 16-bit matrix that is upcast, or of the vocabulary that is multiplied, at a time on a CPU
HEADROOM = 2.0**10  # of a float16 gradient of the logits: far above its smallest numbers, far below its largest


class Head(NamedTuple):
    """Tokens and the head that would turn them into logits ``softcap·tanh(scale·(h Wᵀ + u Bᵀ + bias)/softcap)/temperature``."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    u: Tensor | None = None  # (N, R)
    B: Tensor | None = None  # (V, R)
    temperature: Tensor | None = None  # (N,)
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None  # whose rows weight, bias and B are; None: the whole vocabulary's

    @property
    def vocab(self) -> int:
        """The size of the whole vocabulary."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    @property
    def planned_vocab(self) -> int:
        """The rows that a plan counts on; all ranks that share a vocabulary must plan alike."""
        return self.weight.shape[0] if self.shard is None else self.shard.even_size

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be asked of."""
        return self[:5]

    def with_inputs(self, inputs: Iterable[Tensor | None]) -> Head:
        values: dict[str, Any] = dict(zip(self._fields, inputs, strict=False))
        return self._replace(**values)

    def detached(self) -> Head:
        return self.with_inputs(None if t is None else t.detach() for t in self.inputs)

    def tokens(self, rows: slice | Tensor, ignored: Tensor | None = None) -> Head:
        """The tokens at ``rows``, those that are ``ignored`` ``(n,)`` zeroed: a nan there must not reach ``d_weight``."""

        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        hidden, u = self.hidden[rows], of(self.u)
        if ignored is not None:
            hidden = hidden.masked_fill(ignored[:, None], 0)
            u = None if u is None else u.masked_fill(ignored[:, None], 0)
        return self._replace(hidden=hidden, u=u, temperature=of(self.temperature))

    def columns(self, part: slice) -> Head:
        """The vocabulary entries at ``part``."""
        bias, B = (None if t is None else t[part] for t in (self.bias, self.B))
        return self._replace(weight=self.weight[part], bias=bias, B=B)

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return None if self.u is None or self.B is None else (self.u, self.B)


def head_of(logits: LinearLogits) -> Head:
    rows = logits.rows()
    u, B = rows.low_rank or (None, None)
    return Head(
        rows.hidden, logits.weight, logits.bias, u, B, rows.temperature, logits.scale, logits.softcap, logits.shard
    )


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


def linear_module(backend: str, dtype: torch.dtype) -> ModuleType:
    """Where ``linear_softmax_fwd`` and ``linear_softmax_d_logits`` come from."""
    if backend == "torch":
        return chunked_linear_softmax
    if dtype.itemsize > 2:
        return library_tiles
    from .kernels import linear_softmax  # Triton is imported only where it runs

    return linear_softmax


def traced(t: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode((t,)) is not None or t.is_meta


def hooks_take_saved() -> bool:
    """Whether hooks take what forward saves: checkpointing makes it again, under settings that may have changed, and logits
    are sooner made again than moved to another memory and back."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def kept_tokens(ids: Tensor | None, drop_ignored: bool | None) -> tuple[Tensor | None, bool]:
    """Which tokens to project, and whether ignored ones among them must be zeroed.

    Counting them is a host synchronisation; where that cannot be (``torch.compile``, ``vmap``, graph capture) or must not
    (``drop_ignored=False``) every token is projected.
    """
    if ids is None:
        return None, False
    if drop_ignored is None:
        drop_ignored = drop_ignored_setting.value
    if traced(ids) or transforms_active():
        drop_ignored = False
    if not drop_ignored or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None, True
    keep = (ids != -100).any(-1).nonzero().squeeze(1)
    return (None if keep.numel() == ids.shape[0] else keep), False


def budget(head: Head, workspace: int | str | None, per_token: bool, backend: Backend) -> int:
    """The workspace in bytes, fixed in forward: settings may have changed by the time backward runs."""
    (N, H), V = head.hidden.shape, head.planned_vocab
    return plan(N, V, H, head.hidden.dtype, workspace=workspace, per_token=per_token, backend=backend).budget


def forward_plan(head: Head, tokens: int, workspace: int, accumulate: str | None, backend: str) -> Plan:
    """Chunks for the ``tokens`` of a head that are projected, on route ``gradients_in_forward``."""
    how: dict[str, Any] = {"workspace": workspace, "accumulate": accumulate, "backend": backend}
    V, H, dtype = head.planned_vocab, head.hidden.shape[1], head.hidden.dtype
    return plan(tokens, V, H, dtype, route="gradients_in_forward", **how)


def recompute_plan(head: Head, tokens: int, workspace: int, backend: str) -> Plan:
    V, H, dtype = head.planned_vocab, head.hidden.shape[1], head.hidden.dtype
    return plan(tokens, V, H, dtype, route="recompute", workspace=workspace, backend=backend)


def saved_columns(head: Head, tokens: int, workspace: int, backend: str) -> int:
    """How many columns of logits forward saves; none where no backward follows, or none whose shapes are known yet, or
    where hooks take them."""
    if (
        traced(head.hidden)
        or not torch.is_grad_enabled()
        or not any(t is not None and t.requires_grad for t in head.inputs)
        or hooks_take_saved()
    ):
        return 0
    return min(recompute_plan(head, tokens, workspace, backend).saved, head.weight.shape[0])


def room_of_logits(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows that a kernel can write in whole words: up to 15 columns more."""
    return like.new_empty(rows, -(-columns // 16) * 16, dtype=dtype)


def per_token_dtype(dtype: torch.dtype, shard: VocabShard | None) -> torch.dtype:
    """Of a gradient of hidden made in forward: as wide as its scale, which is unknown yet, or its sum over ranks asks for."""
    return statistics_dtype(dtype) if dtype == torch.float16 or shard is not None else dtype


def begin_sums(shard: VocabShard, *tensors: Tensor | None) -> list[Callable[[], Any]]:
    return [shard.begin_sum(t) for t in tensors if t is not None]


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``out = a b`` if ``first``, else ``out += a b``; an fp32 ``out`` of 16-bit factors sees no rounded product."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif out.is_cuda and first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        if first:
            out.zero_()
        for i in range(0, a.shape[0], BLOCK):
            for k in range(0, a.shape[1], BLOCK):
                out[i : i + BLOCK].addmm_(a[i : i + BLOCK, k : k + BLOCK].to(out.dtype), b[k : k + BLOCK].to(out.dtype))


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_cuda or x.dtype == dtype or x.shape[1] == 0:
        return x.sum(0, dtype=dtype)
    return torch.cat([x[:, i : i + BLOCK].sum(0, dtype=dtype) for i in range(0, x.shape[1], BLOCK)])


def loss_and_gradients(
    head: Head,
    ids: Tensor | None,  # (N, K)
    column_weight: Tensor | None,  # (V,)
    keep: Tensor | None,  # (M,) tokens to project; None: all
    zero_ignored: bool,
    outputs: Sequence[str],
    of_chunk: Callable[[RowStatistics, slice | Tensor], Coefficients],
    wanted: Sequence[bool],  # gradients of head.inputs
    workspace: int,
    accumulate: str | None,
    backend: str,
    main_grad: Tensor | None = None,  # (V, H) fp32, the gradient of the weight is added here
) -> list[Tensor | None]:
    """Route ``gradients_in_forward``: the gradient of each of ``head.inputs``, or None, in its own dtype or a wider one.

    ``of_chunk(statistics, rows)`` sees each chunk once, in order, and says how its loss depends on its statistics.
    """
    hidden, weight, dtype = head.hidden, head.weight, head.hidden.dtype
    N, V, wide = hidden.shape[0], weight.shape[0], statistics_dtype(hidden.dtype)
    M = N if keep is None else keep.shape[0]
    chosen = forward_plan(head, M, workspace, accumulate, backend)
    sums = wide if dtype == torch.float16 else chosen.accumulate or dtype
    per_token = per_token_dtype(dtype, head.shard)

    def room(i: int, dtype: torch.dtype) -> Tensor | None:
        like = head.inputs[i]
        if not wanted[i] or like is None:
            return None
        whole = M == N and N > 0
        return like.new_empty(like.shape, dtype=dtype) if whole else like.new_zeros(like.shape, dtype=dtype)

    d_hidden, d_u, d_B = room(0, per_token), room(3, per_token), room(4, sums)
    d_weight = main_grad if main_grad is not None else room(1, sums)
    d_bias = room(2, wide)
    logits_room = hidden.new_empty(min(chosen.chunk, M), V)
    factor: Tensor | None = None  # of the chunks so far, fp16 only: their gradients carry it
    local_ids = ids if ids is None or head.shard is None else head.shard.local(ids)
    pending: list[tuple[Callable[[], Any], Callable[[], Any] | None]] = []  # sums over ranks, and what follows
    for start in range(0, M, max(chosen.chunk, 1)):
        part = slice(start, min(start + chosen.chunk, M))
        rows: slice | Tensor = part if keep is None else keep[part]
        of_ids = None if local_ids is None else local_ids[rows]
        chunk = head.tokens(rows, skipped(of_ids) if zero_ignored else None)
        logits = logits_room[: part.stop - part.start]
        # On a CPU a third faster: the result stays in cache.
        for columns in slices(V, max(V, 1) if logits.is_cuda else max(BLOCK, CHUNK_ELEMENTS // len(logits))):
            piece = chunk.columns(columns)
            if piece.bias is None:
                torch.mm(chunk.hidden, piece.weight.t(), out=logits[:, columns])
            else:
                torch.addmm(piece.bias, chunk.hidden, piece.weight.t(), out=logits[:, columns])
            if chunk.u is not None and piece.B is not None:
                logits[:, columns].addmm_(chunk.u, piece.B.t())
        seen = (logits.unsqueeze(-1), of_ids, column_weight, chunk.temperature)
        names = with_weight_sum(outputs, head.shard)
        found = softmax_rows(
            *seen, None, 0.0, head.scale, head.softcap, ",".join(names), False, backend, packed(head.shard)
        )
        statistics = only(found, names, ids is not None)
        assert statistics.logsumexp is not None
        terms = of_chunk(statistics, rows)
        if dtype == torch.float16 and main_grad is None:
            terms, factor = _away_from_zero(terms, factor, [d_weight, d_bias, d_B])
        a, b, e, c, d = (None if t is None else t.contiguous() for t in terms)
        if V:
            softmax_rows_grad(
                *seen,
                statistics.logsumexp,
                a,
                b,
                e,
                c,
                d,
                None,
                0.0,
                head.scale,
                head.softcap,
                backend,
                logits.unsqueeze(-1),
            )
        first = start == 0
        for total, matrix in ((d_hidden, weight), (d_u, head.B)):
            if total is not None and matrix is not None:
                product = total[part] if keep is None else total.new_empty(len(logits), matrix.shape[1])
                add_product(product, logits, matrix, first=True)
                if factor is not None:
                    product /= factor
                place: Callable[[], Any] | None = None
                if keep is not None:
                    place = functools.partial(total.index_copy_, 0, keep[part], product)
                if head.shard is not None:
                    pending.append((head.shard.begin_sum(product), place))
                elif place is not None:
                    place()
        for total, matrix in ((d_weight, chunk.hidden), (d_B, chunk.u)):
            if total is not None and matrix is not None:
                add_product(total, logits.t(), matrix, first=first and total is not main_grad)
        if d_bias is not None:
            partial = column_sums(logits, wide)
            d_bias = partial if first else d_bias.add_(partial)
    for end_sum, then in pending:
        end_sum()
        if then is not None:
            then()
    if factor is not None:
        for total in (d_weight, d_bias, d_B):
            if total is not None:
                total /= factor
    return [d_hidden, None if main_grad is not None else d_weight, d_bias, d_u, d_B]


def _away_from_zero(
    terms: Coefficients, factor: Tensor | None, totals: Sequence[Tensor | None]
) -> tuple[Coefficients, Tensor]:
    """Scale the coefficients by a power of two at which float16 gradients neither vanish nor overflow.

    Where a chunk's coefficients are larger than all before it, what was summed so far is brought to its factor.
    """
    present = [t for t in terms if t is not None]
    largest = torch.stack([t.abs().amax() for t in present]).amax().clamp(2.0**-60, 2.0**60)
    mine = HEADROOM * torch.exp2(-torch.ceil(torch.log2(largest)))
    if factor is not None:
        mine = torch.minimum(mine, factor)
        for total in totals:
            if total is not None:
                total *= mine / factor
    return Coefficients(*(None if t is None else t * mine for t in terms)), mine


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """``gradient·scale`` in ``dtype``, multiplied in fp32 or wider and rounded once; over ``gradient`` if ``in_place``."""
    if gradient.dtype != dtype:
        out = torch.empty_like(gradient, dtype=dtype)
        for i in range(0, max(len(gradient), 1), BLOCK):
            out[i : i + BLOCK] = gradient[i : i + BLOCK] * scale
        return out
    if not in_place:
        gradient = gradient.clone()
    if dtype.itemsize > 2:
        return gradient.mul_(scale)
    # A GPU would round a 0-dim factor to 16 bits; with a dimension it makes the product fp32. A CPU copies its factors then.
    for piece in gradient.view(-1).split(max(1, gradient.numel() if gradient.is_cuda else BLOCK * BLOCK)):
        piece.mul_(scale.reshape(1))
    return gradient


def read_again(saved: Tensor) -> bool:
    """Whether another backward may follow this one and read what forward saved."""
    return traced(saved) or torch._C._autograd._get_current_graph_task_keep_graph()


@torch.library.custom_op("fused_losses::scaled_gradient", mutates_args=())
def scaled_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled(gradient, scale, dtype, in_place=False)


@scaled_gradient.register_fake
def _(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def scale_gradients(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype | None], upstream: Tensor
) -> list[Tensor | None]:
    """Gradients that a forward made, times the upstream gradient, in their dtypes; None where the dtype is None.

    In place where the graph is about to be freed: they are read this once, and memory is not doubled.
    """
    if traced(upstream):
        pairs = zip(gradients, dtypes, strict=True)
        return [None if dtype is None else scaled_gradient(g, upstream, dtype) for g, dtype in pairs]
    in_place = not read_again(upstream)
    pairs = zip(gradients, dtypes, strict=True)
    return [None if dtype is None else scaled(g, upstream, dtype, in_place) for g, dtype in pairs]


def differentiable_statistics(
    head: Head, ids: Tensor | None, column_weight: Tensor | None, outputs: Sequence[str]
) -> RowStatistics:
    """The statistics as plain differentiable PyTorch on whole logits."""
    N, V, dtype = head.hidden.shape[0], head.weight.shape[0], statistics_dtype(head.hidden.dtype)
    check_differentiable(N, V, head.hidden.dtype)
    skip = skipped(ids)
    hidden, weight, bias, u, B = (None if t is None else t.to(dtype) for t in head.inputs)
    assert hidden is not None
    assert weight is not None
    if skip is not None:
        hidden = hidden.masked_fill(skip[:, None], 0)
        u = None if u is None else u.masked_fill(skip[:, None], 0)
    x = hidden @ weight.t()
    if u is not None and B is not None:
        x = x + u @ B.t()
    if bias is not None:
        x = x + bias
    z, _ = transform(x, head.temperature, head.scale, head.softcap)
    return row_statistics(z, ids, column_weight, outputs)


def only(found: Sequence[Tensor | None], outputs: Sequence[str], ids: bool) -> RowStatistics:
    """What was asked for of a :class:`RowStatistics`, ``logsumexp`` and, with ids, ``log_probs``."""
    asked = {"logsumexp", "log_probs" if ids else "", *outputs}
    return RowStatistics(*(s if name in asked else None for name, s in zip(RowStatistics._fields, found, strict=True)))


def _absent(like: Tensor) -> Tensor:
    return like.new_zeros(())


def _present(t: Tensor | None, like: Tensor) -> Tensor:
    return _absent(like) if t is None else t


def loss_of_head(
    head: Head,
    ids: Tensor,
    column_weight: Tensor | None,
    of: tuple[Tensor, Tensor | None, Tensor | None],
    keep: Tensor | None,
    zero_ignored: bool,
    top1: bool,
    wanted: Sequence[bool],
    workspace: int,
    accumulate: str | None,
    backend: str,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`linear_loss`; with ``main_grad`` ``(V, H)`` the gradient of the weight is added there."""
    of_log_probs, of_sum_log_probs, of_square = of
    dtype = statistics_dtype(head.hidden.dtype)
    outputs = ["log_probs"] + ["sum_log_probs"] * (of_sum_log_probs is not None) + ["is_top1"] * top1
    found = empty_statistics(head.hidden, head.hidden.shape[0], ids, outputs)
    for t in found:
        if t is not None:
            t.zero_()
    loss = torch.zeros_like(of_log_probs, dtype=torch.float64)

    def of_chunk(statistics: RowStatistics, rows: slice | Tensor) -> Coefficients:
        for total, part in zip(found, statistics, strict=True):
            if total is not None and part is not None:
                total[rows] = part
        assert statistics.log_probs is not None
        assert statistics.logsumexp is not None
        value = of_log_probs[rows].double() * statistics.log_probs[:, 0]
        upstream = RowStatistics(log_probs=of_log_probs[rows, None])
        if of_sum_log_probs is not None:
            assert statistics.sum_log_probs is not None
            value += of_sum_log_probs[rows] * statistics.sum_log_probs
            upstream = upstream._replace(sum_log_probs=of_sum_log_probs[rows])
        if of_square is not None:
            lse = statistics.logsumexp.to(dtype)
            value += of_square[rows] * lse.square()
            upstream = upstream._replace(logsumexp=2 * of_square[rows] * lse)
        loss[rows] = value
        return coefficients(upstream, statistics, head.vocab, column_weight, dtype)

    with full_precision(head.hidden.device):
        gradients = loss_and_gradients(
            head, ids, column_weight, keep, zero_ignored, outputs, of_chunk, wanted, workspace, accumulate, backend,
            main_grad,
        )  # fmt: skip
    assert found.log_probs is not None
    assert found.logsumexp is not None
    return (
        loss.sum().to(dtype),
        found.log_probs,
        found.logsumexp,
        _present(found.is_top1, of_log_probs),
        *(_present(g, of_log_probs) for g in gradients),
    )  # type: ignore[return-value]


# Route gradients_in_forward, for the losses that are linear in the log-probabilities and quadratic in logsumexp.


@torch.library.custom_op("fused_losses::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    u: Tensor | None,  # (N, R)
    B: Tensor | None,  # (V, R)
    ids: Tensor,  # (N, 1)
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    of_log_probs: Tensor,  # (N,)
    of_sum_log_probs: Tensor | None,  # (N,)
    of_square: Tensor | None,  # (N,)
    keep: Tensor | None,  # (M,)
    zero_ignored: bool,
    scale: float,
    softcap: float | None,
    top1: bool,
    wanted: list[bool],
    workspace: int,
    accumulate: str | None,
    backend: str,
    shard: str = "",  # a VocabShard; ids are those of the whole vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``Σ_n of_log_probs·logp + of_sum_log_probs·Σ_j u_j logp_j + of_square·logsumexp²``, and its gradients.

    Returns:
        the loss, ``log_probs (N, 1)``, ``logsumexp (N,)`` float64, ``is_top1 (N,)``, and the gradient of each of the first
        five arguments; 0-dim where absent or not ``wanted``.
    """
    head = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard))
    return loss_of_head(
        head, ids, column_weight, (of_log_probs, of_sum_log_probs, of_square), keep, zero_ignored, top1, wanted, workspace,
        accumulate, backend,
    )  # fmt: skip


@linear_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    B: Tensor | None,
    ids: Tensor,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    of_log_probs: Tensor,
    of_sum_log_probs: Tensor | None,
    of_square: Tensor | None,
    keep: Tensor | None,
    zero_ignored: bool,
    scale: float,
    softcap: float | None,
    top1: bool,
    wanted: list[bool],
    workspace: int,
    accumulate: str | None,
    backend: str,
    shard: str = "",
) -> tuple[Tensor, ...]:
    dtype = hidden.dtype
    wide = statistics_dtype(dtype)
    N = hidden.shape[0]
    head = Head(hidden, weight, shard=VocabShard.unpacked(shard))
    chosen = forward_plan(head, N if keep is None else keep.shape[0], workspace, accumulate, backend)
    sums = wide if dtype == torch.float16 else chosen.accumulate or dtype
    per_token = per_token_dtype(dtype, head.shard)
    dtypes = (per_token, sums, wide, per_token, sums)
    return (
        of_log_probs.new_empty(()),
        of_log_probs.new_empty(N, 1),
        of_log_probs.new_empty(N, dtype=torch.float64),
        of_log_probs.new_empty(N, dtype=torch.bool) if top1 else _absent(of_log_probs),
        *(
            t.new_empty(t.shape, dtype=d) if t is not None and want else _absent(of_log_probs)
            for t, d, want in zip((hidden, weight, bias, u, B), dtypes, wanted, strict=True)
        ),
    )


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    hidden, weight = inputs[:2]
    ctx.head_inputs = [
        None if t is None or not want else t.dtype for t, want in zip(inputs[:5], inputs[16], strict=True)
    ]
    N, V = hidden.shape[0], weight.shape[0]
    # A second derivative starts again from the inputs, so they are saved where it is offered.
    saved = inputs[:11] if hidden.dtype == torch.float64 or N * V <= SMALL else ()
    ctx.rest = (N, V, hidden.dtype, inputs[13], inputs[14], inputs[20])
    ctx.save_for_backward(*output[4:], *saved)


def _linear_loss_backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 16
    if g is None:
        return (None,) * 21
    stored = ctx.saved_tensors  # read once: checkpointing unpacks once
    gradients, inputs = stored[:5], stored[5:]
    N, V, dtype, scale, softcap, shard = ctx.rest
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        refuse_shard(shard, (N, V))
        check_differentiable(N, V, dtype)
        ids, column_weight, temperature, of_log_probs, of_sum_log_probs, of_square = inputs[5:]

        def fn(*of: Tensor) -> list[Tensor]:
            head = Head(inputs[0], inputs[1], temperature=temperature, scale=scale, softcap=softcap).with_inputs(of)
            outputs = ["log_probs", "sum_log_probs"]
            s = differentiable_statistics(head, ids, column_weight, outputs)
            total = (of_log_probs * s.log_probs[:, 0]).sum()  # type: ignore[index]
            if of_sum_log_probs is not None:
                total = total + (of_sum_log_probs * s.sum_log_probs).sum()
            if of_square is not None:
                total = total + (of_square * s.logsumexp.to(total.dtype).square()).sum()  # type: ignore[union-attr]
            return [total]

        return *differentiable_gradients(fn, inputs[:5], [g]), *rest
    return *scale_gradients(gradients, ctx.head_inputs, g), *rest


linear_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)


# Gradients that something else made in forward.


@torch.library.custom_op("fused_losses::with_gradients", mutates_args=())
def with_gradients(loss: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """``loss ()``, whose gradient for each of ``inputs`` is the given one times the upstream gradient."""
    return loss.clone()


@with_gradients.register_fake
def _(loss: Tensor, gradients: list[Tensor], inputs: list[Tensor]) -> Tensor:
    return torch.empty_like(loss)


def _with_gradients_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtypes = [t.dtype for t in inputs[2]]
    ctx.save_for_backward(*inputs[1])


def _with_gradients_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "gradients made in forward cannot be differentiated again: compute the loss from token_statistics instead, "
            f"in float64 or for small inputs; got gradients of {[tuple(t.shape) for t in ctx.saved_tensors]}"
        )
    gradients = scale_gradients(ctx.saved_tensors, ctx.dtypes, g)
    return None, [None] * len(gradients), gradients


with_gradients.register_autograd(_with_gradients_backward, setup_context=_with_gradients_setup)


# Route recompute.


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=())
def linear_rows(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    u: Tensor | None,  # (N, R)
    B: Tensor | None,  # (V, R)
    ids: Tensor | None,  # (N, K)
    column_weight: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,)
    keep: Tensor | None,  # (M,)
    main_grad: Tensor | None,  # (V, H) fp32, backward adds the gradient of the weight to it
    zero_ignored: bool,
    scale: float,
    softcap: float | None,
    outputs: str,  # names of RowStatistics, separated by commas
    columns: int,  # of logits that are saved for backward
    workspace: int,
    backend: str,
    shard: str = "",  # a VocabShard; ids are local to it
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:class:`RowStatistics`, and the first ``columns`` or a few more of the logits; 0-dim where not asked for."""
    head = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard))
    head, ids_kept = _projected(head, ids, keep, zero_ignored)
    M = head.hidden.shape[0]
    saved_logits = room_of_logits(hidden, M, columns, statistics_dtype(hidden.dtype)) if columns else None

    def statistics_of(outputs: Collection[str]) -> RowStatistics:
        with full_precision(hidden.device):
            return linear_module(backend, hidden.dtype).linear_softmax_fwd(
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
        found = merged_statistics(statistics_of, hidden, M, ids_kept, weight_sum, names, head.shard)
    if keep is not None:
        N = hidden.shape[0]
        found = RowStatistics(
            *(None if s is None else s.new_zeros(N, *s.shape[1:]).index_copy_(0, keep, s) for s in found)
        )
    return tuple(_present(s, hidden) for s in (*found, saved_logits))  # type: ignore[return-value]


def _projected(head: Head, ids: Tensor | None, keep: Tensor | None, zero_ignored: bool) -> tuple[Head, Tensor | None]:
    if keep is not None:
        return head.tokens(keep), None if ids is None else ids[keep]
    return (head.tokens(slice(None), skipped(ids)) if zero_ignored else head), ids


@linear_rows.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    B: Tensor | None,
    ids: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    keep: Tensor | None,
    main_grad: Tensor | None,
    zero_ignored: bool,
    scale: float,
    softcap: float | None,
    outputs: str,
    columns: int,
    workspace: int,
    backend: str,
    shard: str = "",
) -> tuple[Tensor, ...]:
    room = empty_statistics(hidden, hidden.shape[0], ids, outputs.split(","))
    M = hidden.shape[0] if keep is None else keep.shape[0]
    saved_logits = room_of_logits(hidden, M, columns, statistics_dtype(hidden.dtype)) if columns else None
    return tuple(_present(s, hidden) for s in (*room, saved_logits))


@torch.library.custom_op("fused_losses::linear_rows_grad", mutates_args={"main_grad", "saved_logits"})
def linear_rows_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor | None,
    B: Tensor | None,
    ids: Tensor | None,
    column_weight: Tensor | None,
    temperature: Tensor | None,
    keep: Tensor | None,
    main_grad: Tensor | None,
    saved_logits: Tensor | None,  # (M, v) the first logits of each row, written over
    logsumexp: Tensor,  # (N,) float64
    a: Tensor | None,  # (N,)
    b: Tensor | None,  # (N,)
    e: Tensor | None,  # (N,)
    c: Tensor | None,  # (N, K)
    d: Tensor | None,  # (N,)
    zero_ignored: bool,
    scale: float,
    softcap: float | None,
    wanted: list[bool],
    workspace: int,
    backend: str,
    shard: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first five arguments, 0-dim where absent or not ``wanted``: slices of the vocabulary in turn."""
    N, V, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    wide = statistics_dtype(dtype)
    whole = Head(hidden, weight, bias, u, B, temperature, scale, softcap, VocabShard.unpacked(shard))
    head, ids = _projected(whole, ids, keep, zero_ignored)
    M = head.hidden.shape[0]

    def of(t: Tensor | None) -> Tensor | None:
        return t if t is None or keep is None else t[keep]

    logsumexp, terms = logsumexp if keep is None else logsumexp[keep], [of(t) for t in (a, b, e, c, d)]

    def room(i: int, rows: int, dtype: torch.dtype) -> Tensor | None:
        like = head.inputs[i]
        if like is None or not wanted[i]:
            return None
        shape = (rows, *like.shape[1:])
        return like.new_empty(shape, dtype=dtype) if M and V else like.new_zeros(shape, dtype=dtype)

    d_hidden, d_u = room(0, M, wide), room(3, M, wide)
    d_weight, d_bias, d_B = None if main_grad is not None else room(1, V, dtype), room(2, V, dtype), room(4, V, dtype)
    chunk = max(recompute_plan(whole, M, workspace, backend).chunk, 1)
    in_place = saved_logits is not None and saved_logits.dtype == dtype
    slice_room = saved_logits if in_place else room_of_logits(hidden, M, min(chunk, V), dtype)
    assert slice_room is not None
    with full_precision(hidden.device):
        pending = [] if V or not M or head.shard is None else begin_sums(head.shard, d_hidden, d_u)
        for start in range(0, V if M else 0, chunk):
            part = slice(start, min(start + chunk, V))
            piece = head.columns(part)
            d_logits = slice_room[:, : part.stop - start]
            u_part = None if column_weight is None else column_weight[part]
            how: dict[str, Any] = {"scale": scale, "softcap": softcap, "vocab_start": start}
            if saved_logits is not None and part.stop <= saved_logits.shape[1]:
                rows_module(backend).softmax_rows_bwd(
                    saved_logits[:, part, None],
                    ids,
                    u_part,
                    piece.temperature,
                    logsumexp,
                    *terms,
                    **how,
                    out=d_logits[..., None],
                )
            else:
                linear_module(backend, hidden.dtype).linear_softmax_d_logits(
                    piece.hidden, piece.weight, piece.bias, piece.low_rank, ids, u_part, piece.temperature, logsumexp,
                    *terms, **how, out=d_logits,
                )  # fmt: skip
            for total, matrix in ((d_hidden, piece.weight), (d_u, piece.B)):
                if total is not None and matrix is not None:
                    add_product(total, d_logits, matrix, first=start == 0)
            if head.shard is not None and part.stop == V:  # while the products below run
                pending = begin_sums(head.shard, d_hidden, d_u)
            for total, matrix in ((d_weight, piece.hidden), (d_B, piece.u)):
                if total is not None and matrix is not None:
                    add_product(total[part], d_logits.t(), matrix, first=True)
            if main_grad is not None:
                add_product(main_grad[part], d_logits.t(), piece.hidden, first=False)
            if d_bias is not None:
                d_bias[part] = column_sums(d_logits, wide)
    del slice_room
    for end_sum in pending:
        end_sum()

    def returned(t: Tensor | None) -> Tensor:
        if t is None:
            return _absent(hidden)
        t = t.to(dtype)
        return t if keep is None else t.new_zeros(N, *t.shape[1:]).index_copy_(0, keep, t)

    d_hidden_out, d_u_out = returned(d_hidden), returned(d_u)
    return d_hidden_out, _present(d_weight, hidden), _present(d_bias, hidden), d_u_out, _present(d_B, hidden)


@linear_rows_grad.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor | None, B: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    main_grad, wanted = rest[4], rest[15]
    inputs = (hidden, weight, bias, u, B)
    return tuple(
        _absent(hidden) if t is None or not want or (i == 1 and main_grad is not None) else torch.empty_like(t)
        for i, (t, want) in enumerate(zip(inputs, wanted, strict=True))
    )


def _linear_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *statistics, saved_logits = output
    found = RowStatistics(*statistics)
    ctx.mark_non_differentiable(found.weight_sum, found.max_logit, found.is_top1, saved_logits)
    # Not a saved tensor: other backwards add to it in between.
    ctx.main_grad = inputs[9]
    ctx.rest, (ctx.outputs, _, ctx.workspace, ctx.backend, ctx.shard) = inputs[10:13], inputs[13:]
    # Copies of what backward reads: the caller may write into what it was given.
    own = (found.logsumexp, found.entropy, found.log_sum_sq_probs, found.weight_sum)
    ctx.save_for_backward(*inputs[:9], *(s.clone() for s in own if s is not None), saved_logits)


def _linear_rows_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 13
    grads = grads[:-1]
    if all(g is None for g in grads):
        return (None,) * 18
    stored = ctx.saved_tensors  # read once: checkpointing unpacks once
    saved, (logsumexp, entropy, log_sum_sq_probs, weight_sum, saved_logits) = stored[:9], stored[9:]
    inputs, (ids, column_weight, temperature, _) = saved[:5], saved[5:]
    _, scale, softcap = ctx.rest
    dtype = statistics_dtype(inputs[0].dtype)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        refuse_shard(ctx.shard, (inputs[0].shape[0], inputs[1].shape[0]))

        def fn(*of: Tensor) -> list[Tensor]:
            head = Head(inputs[0], inputs[1], temperature=temperature, scale=scale, softcap=softcap).with_inputs(of)
            found = differentiable_statistics(head, ids, column_weight, ctx.outputs.split(","))
            return [_present(s, logsumexp) for s in found]

        return *differentiable_gradients(fn, inputs, grads), *nothing
    found = RowStatistics(
        logsumexp=logsumexp,
        entropy=entropy,
        log_sum_sq_probs=log_sum_sq_probs,
        weight_sum=weight_sum if weight_sum.ndim else None,
    )
    upstream = only(grads, ctx.outputs.split(","), ids is not None)  # a compiled graph sends zeros for the others
    terms = coefficients(where_ids_stand(upstream, ids), found, inputs[1].shape[0], column_weight, dtype)
    a, b, e, c, d = (None if t is None else t.contiguous() for t in terms)
    if saved_logits.ndim == 0:
        saved_logits = None
    elif read_again(saved_logits):
        saved_logits = saved_logits.clone()
    gradients = linear_rows_grad(
        *saved,
        ctx.main_grad,
        saved_logits,
        logsumexp,
        a,
        b,
        e,
        c,
        d,
        *ctx.rest,
        list(ctx.needs_input_grad[:5]),
        ctx.workspace,
        ctx.backend,
        ctx.shard,
    )
    return *(None if g.ndim == 0 else g for g in gradients), *nothing


linear_rows.register_autograd(_linear_rows_backward, setup_context=_linear_rows_setup)


def linear_statistics(
    head: Head,
    ids: Tensor | None,
    column_weight: Tensor | None = None,
    *,
    outputs: Sequence[str],
    drop_ignored: bool | None = None,
    workspace: int | str | None = None,
    backend: Backend | None = None,
    main_grad: Tensor | None = None,
) -> RowStatistics:
    """Differentiable :class:`RowStatistics` of the tokens of a head, on route ``recompute``; ids ``(N, K)``.

    Of a shard, column weights are its columns' and ids those of the whole vocabulary.
    """
    if transforms_active():
        refuse_shard(packed(head.shard), head.hidden.shape)
        return differentiable_statistics(head, ids, column_weight, outputs)
    head, column_weight = ready(head, column_weight)
    keep, zero_ignored = kept_tokens(ids, drop_ignored)
    chosen = resolve_backend(head.hidden, backend)
    outputs = with_weight_sum(outputs, head.shard)
    if head.shard is not None and ids is not None:
        ids = head.shard.local(ids)
    M = head.hidden.shape[0] if keep is None else keep.shape[0]
    room = budget(head, workspace, True, chosen)
    found = linear_rows(
        *head.inputs,
        None if ids is None else ids.contiguous(),
        column_weight,
        head.temperature,
        keep,
        main_grad,
        zero_ignored,
        head.scale,
        head.softcap,
        ",".join(outputs),
        saved_columns(head, M, room, chosen),
        room,
        chosen,
        packed(head.shard),
    )
    return only(found[:-1], outputs, ids is not None)


def ready(head: Head, column_weight: Tensor | None) -> tuple[Head, Tensor | None]:
    """The head and the column weights as the operators read them."""
    for name, constant in (("weight", column_weight), ("temperature", head.temperature)):
        if constant is not None and constant.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"the derivative for {name} {tuple(constant.shape)} is not implemented; detach it")
    dtype = statistics_dtype(head.hidden.dtype)
    temperature = None if head.temperature is None else head.temperature.detach().to(dtype).contiguous()
    column_weight = None if column_weight is None else column_weight.detach().to(dtype).contiguous()
    inputs = (None if t is None else t.contiguous() for t in head.inputs)
    return head.with_inputs(inputs)._replace(temperature=temperature), column_weight

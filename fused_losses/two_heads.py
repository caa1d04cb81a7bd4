"""From a student's and a teacher's hidden states and heads to the divergence of their logits, a chunk of tokens at a time.

Both chunks of logits are made by the library's products, in fp32 for 16-bit heads, and met by one pass over the rows
(``kernels/divergence_rows.py``), which can also write the gradient of either. With ``2NVH`` floating point operations for one
product over a side's logits:

- a sum over tokens (:func:`two_heads_loss`) makes its gradients in forward: ``6NVH`` for a side that trains, ``2NVH`` for one
  that does not. Backward multiplies by the upstream gradient.
- per-token results (:func:`two_heads_rows`) keep nothing but the inputs, and backward makes the logits again: ``2NVH`` more.

A side may also be a tensor of logits: a :class:`Head` whose ``hidden`` is them and whose ``weight`` is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autodiff import check_differentiable, differentiable_gradients
from .chunked.divergence_rows import differentiable_rows
from .chunked.linear_softmax import TILE, logits_tile, slices
from .chunked.softmax_rows import CHUNK_ELEMENTS, transform
from .numerics import statistics_dtype, wide_dtype
from .planning import FEWEST_TOKENS, MANY_CHUNKS
from .routes import HEADROOM, Head, add_product, column_sums, full_precision, scale_gradients
from .settings import workspace as workspace_setting

DEFAULT_BUDGET = 2**29  # or the gradients, whichever is larger
ROW_TEMPORARIES = 16  # copies of a chunk of rows that the PyTorch row primitive holds at once


class Divergence(NamedTuple):
    """Which divergence, as the row primitive takes it."""

    kind: str
    beta: float
    temperature: float

    def of(self, student: Head, teacher: Head) -> dict[str, Any]:
        return {
            **self._asdict(),
            "student_scale": student.scale,
            "student_softcap": student.softcap,
            "teacher_scale": teacher.scale,
            "teacher_softcap": teacher.softcap,
        }


def divergence_module(backend: str) -> Any:
    """Where ``divergence_rows`` comes from."""
    if backend == "torch":
        from .chunked import divergence_rows
    else:
        from .kernels import divergence_rows  # type: ignore[no-redef]  # Triton is imported only where it runs
    return divergence_rows


def vocab_of(head: Head) -> int:
    return head.hidden.shape[1] if head.weight is None else head.weight.shape[0]


class Chunks(NamedTuple):
    tokens: int  # in a chunk
    sums: tuple[torch.dtype, torch.dtype]  # of each side's weight gradient over the chunks


def budget(heads: Sequence[Head], workspace: int | str | None) -> int:
    """The workspace in bytes, fixed in forward: settings may have changed by the time backward runs."""
    found = workspace_setting.parse(workspace if workspace is not None else workspace_setting.value)
    if found is not None:
        return found
    inputs = [t for head in heads if head.weight is not None for t in head.inputs if t is not None and t.requires_grad]
    return max(DEFAULT_BUDGET, sum(t.numel() * t.element_size() for t in inputs))


def chunks_of(heads: tuple[Head, Head], M: int, wanted: Sequence[bool], workspace: int, backend: str) -> Chunks:
    """Cut ``M`` tokens into few chunks whose logits and gradients fit the workspace."""
    V = min(vocab_of(head) for head in heads)
    per_token = extra = fixed = 0
    for head, side in zip(heads, (wanted[:5], wanted[5:]), strict=True):
        if head.weight is None:
            continue
        dtype, H = head.hidden.dtype, head.hidden.shape[1]
        wide = statistics_dtype(dtype)
        per_token += V * wide.itemsize
        if wide != dtype:
            per_token += V * dtype.itemsize * any(side)
            extra += V * H * wide.itemsize * side[1]  # the gradient of the weight is summed in fp32 beside itself
            if not head.hidden.is_cuda:
                per_token += (H + TILE) * wide.itemsize
                fixed = max(fixed, TILE * H * wide.itemsize)  # a tile of the weight, upcast
    if backend == "torch":
        itemsize = statistics_dtype(heads[0].hidden.dtype).itemsize
        fixed += ROW_TEMPORARIES * itemsize * min(max(CHUNK_ELEMENTS, V), M * V)

    def tokens(held: int) -> int:
        most = max((workspace - held) // max(per_token, 1), FEWEST_TOKENS)
        if most >= M:
            return M
        even = math.ceil(M / math.ceil(M / most))
        rounded = math.ceil(even / 32) * 32
        return rounded if rounded <= most else even

    n = tokens(fixed)
    many = -(-M // max(n, 1)) > MANY_CHUNKS
    if many or any(head.hidden.dtype == torch.float16 for head in heads):
        n = tokens(fixed + extra)
    dtypes = (head.hidden.dtype for head in heads)
    sums = tuple(statistics_dtype(dtype) if many or dtype == torch.float16 else dtype for dtype in dtypes)
    return Chunks(n, sums)  # type: ignore[arg-type]


def project(head: Head, out: Tensor) -> Tensor:
    """The products of a head's tokens ``(n, V)``, before scale, softcap and temperature, never rounded to 16 bits."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return out if head.low_rank is None else out.addmm_(head.low_rank[0], head.low_rank[1].t())
    if not hidden.is_cuda:
        for columns in slices(out.shape[1], TILE):
            out[:, columns] = logits_tile(hidden, weight, bias, head.low_rank, slice(None), columns)
        return out
    add_product(out, hidden, weight.t(), first=True)
    if head.low_rank is not None:
        add_product(out, head.low_rank[0], head.low_rank[1].t(), first=False)
    return out if bias is None else out.add_(bias)


class _Side:
    """One head: room for a chunk of its logits and their gradient, and for the gradients of its inputs."""

    def __init__(self, head: Head, V: int, n: int, wanted: Sequence[bool], sums: torch.dtype) -> None:
        self.head, self.V, self.wanted = head, V, any(wanted)
        hidden = head.hidden
        dtype, wide = hidden.dtype, statistics_dtype(hidden.dtype)
        self.direct = head.weight is None
        self.cut = head if self.direct or vocab_of(head) == V else head.columns(slice(0, V))
        self.room = None if self.direct else hidden.new_empty(n, V, dtype=wide)
        in_place = self.direct or wide == dtype
        self.d_room = self.room if in_place or not self.wanted else hidden.new_empty(n, V)
        per_token = wide if dtype == torch.float16 and not self.direct else dtype
        dtypes = (per_token, sums, wide, per_token, sums)
        self.totals: list[Tensor | None] = [
            like.new_zeros(like.shape, dtype=t) if want and like is not None else None
            for like, t, want in zip(head.inputs, dtypes, wanted, strict=True)
        ]

    def logits(self, rows: slice | Tensor, ignored: Tensor | None) -> Tensor:
        self.chunk = self.cut.tokens(rows, None if self.direct else ignored)
        if self.direct:
            return self.chunk.hidden
        assert self.room is not None
        return project(self.chunk, self.room[: len(self.chunk.hidden)])

    def d_logits(self, logits: Tensor, rows: slice | Tensor) -> Tensor | None:
        """Where the gradient of ``logits`` is to be written, ``(n, V)``."""
        if not self.wanted:
            return None
        if self.direct:
            total = self.totals[0]
            assert total is not None
            return total[rows, : self.V] if isinstance(rows, slice) else logits.new_empty(len(logits), self.V)
        assert self.d_room is not None
        return self.d_room[: len(logits)]

    def add(self, d_logits: Tensor | None, rows: slice | Tensor, first: bool) -> None:
        """Take a chunk's gradient into the gradients of the inputs."""
        if d_logits is None:
            return
        d_hidden, d_weight, d_bias, d_u, d_B = self.totals
        if self.direct:
            if not isinstance(rows, slice) and d_hidden is not None:
                d_hidden[:, : self.V].index_copy_(0, rows, d_logits)
            return
        for total, matrix in ((d_hidden, self.cut.weight), (d_u, self.cut.B)):
            if total is not None and matrix is not None:
                if isinstance(rows, slice):
                    add_product(total[rows], d_logits, matrix, first=True)
                else:
                    product = total.new_empty(len(d_logits), matrix.shape[1])
                    add_product(product, d_logits, matrix, first=True)
                    total.index_copy_(0, rows, product)
        for total, matrix in ((d_weight, self.chunk.hidden), (d_B, self.chunk.u)):
            if total is not None and matrix is not None:
                add_product(total[: self.V], d_logits.t(), matrix, first=first)
        if d_bias is not None:
            d_bias[: self.V] += column_sums(d_logits, d_bias.dtype)


def both_heads(
    student: Head,
    teacher: Head,
    ids: Tensor | None,  # (N,), −100: skipped
    keep: Tensor | None,  # (M,) tokens to project; None: all
    zero_ignored: bool,
    soft: Tensor | None,  # (N,) factors of the divergences' gradients
    hard: Tensor | None,  # (N,) and of those of −log p
    labels: bool,
    which: Divergence,
    wanted: Sequence[bool],  # gradients of the inputs of either head
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """``divergence (N,)``, ``−log p (N,)`` of the student, and the gradient of each input or None, its dtype or a wider one."""
    heads = (student, teacher)
    N, V, dtype = student.hidden.shape[0], min(map(vocab_of, heads)), statistics_dtype(student.hidden.dtype)
    M = N if keep is None else keep.shape[0]
    cut = chunks_of(heads, M, wanted, workspace, backend)
    parts = (wanted[:5], wanted[5:])
    sides = [_Side(h, V, min(cut.tokens, M), w, s) for h, w, s in zip(heads, parts, cut.sums, strict=True)]
    factor: Tensor | None = None  # at which float16 gradients neither vanish nor overflow
    if any(s.wanted and s.head.hidden.dtype == torch.float16 for s in sides) and N:
        largest = torch.stack([t.abs().amax() for t in (soft, hard) if t is not None]).amax().clamp(2.0**-60, 2.0**60)
        factor = HEADROOM * torch.exp2(-torch.ceil(torch.log2(largest)))
        soft, hard = (None if t is None else t * factor for t in (soft, hard))
    divergence = student.hidden.new_zeros(N, dtype=dtype)
    nll = student.hidden.new_zeros(N, dtype=dtype) if labels else None

    def of(t: Tensor | None, rows: slice | Tensor) -> Tensor | None:
        return None if t is None else t[rows]

    with full_precision(student.hidden.device):
        for start in range(0, M, max(cut.tokens, 1)):
            part = slice(start, min(start + cut.tokens, M))
            rows: slice | Tensor = part if keep is None else keep[part]
            of_ids = of(ids, rows)
            ignored = of_ids == -100 if zero_ignored and of_ids is not None else None
            logits = [side.logits(rows, ignored) for side in sides]
            d_logits = [side.d_logits(x, rows) for side, x in zip(sides, logits, strict=True)]
            found, found_nll = divergence_module(backend).divergence_rows(
                *(x.unsqueeze(-1) for x in logits),
                of_ids,
                *(side.chunk.temperature for side in sides),
                **which.of(*heads),
                labels=labels,
                soft=of(soft, rows),
                hard=of(hard, rows),
                d_student=None if d_logits[0] is None else d_logits[0].unsqueeze(-1),
                d_teacher=None if d_logits[1] is None else d_logits[1].unsqueeze(-1),
            )
            divergence[rows] = found
            if nll is not None:
                nll[rows] = found_nll
            for side, d in zip(sides, d_logits, strict=True):
                side.add(d, rows, first=start == 0)
    totals = [total for side in sides for total in side.totals]
    if factor is not None:
        totals = [None if t is None else t.div_(factor) for t in totals]
    return divergence, nll, totals


def differentiable_two_heads(
    student: Head, teacher: Head, ids: Tensor | None, labels: bool, which: Divergence
) -> tuple[Tensor, Tensor | None]:
    """Divergence and −log p ``(N,)`` as plain differentiable PyTorch on whole logits."""
    dtype = statistics_dtype(student.hidden.dtype)
    V = min(vocab_of(student), vocab_of(teacher))
    check_differentiable(student.hidden.shape[0], V, student.hidden.dtype)
    skip = None if ids is None else (ids == -100)[:, None]

    def final(head: Head) -> Tensor:
        hidden, weight, bias, u, B = (None if t is None else t.to(dtype) for t in head.inputs)
        assert hidden is not None
        hidden = hidden if skip is None else hidden.masked_fill(skip, 0)
        x = hidden[:, :V] if weight is None else hidden @ weight[:V].t()
        if u is not None and B is not None:
            x = x + (u if skip is None else u.masked_fill(skip, 0)) @ B[:V].t()
        x = x if bias is None else x + bias[:V]
        return transform(x, head.temperature, head.scale, head.softcap)[0]

    return differentiable_rows(final(student), final(teacher), ids, labels=labels, **which._asdict())


Options = list[float]  # scales, softcaps (0: none) of student and teacher; beta, temperature


def pack_options(student: Head, teacher: Head, which: Divergence) -> Options:
    of = (student.scale, student.softcap or 0.0, teacher.scale, teacher.softcap or 0.0, which.beta, which.temperature)
    return [float(x) for x in of]


def _unpack(
    inputs: Sequence[Tensor | None], temperatures: Sequence[Tensor | None], kind: str, options: Options
) -> tuple[Head, Head, Divergence]:
    s_scale, s_softcap, t_scale, t_softcap, beta, temperature = options
    student = Head(*inputs[:5], temperature=temperatures[0], scale=s_scale, softcap=s_softcap or None)  # type: ignore
    teacher = Head(*inputs[5:], temperature=temperatures[1], scale=t_scale, softcap=t_softcap or None)  # type: ignore
    return student, teacher, Divergence(kind, beta, temperature)


def _present(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()) if t is None else t


# A sum over tokens: the gradients are made in forward.


@torch.library.custom_op("fused_losses::two_heads_loss", mutates_args=())
def two_heads_loss(
    s_hidden: Tensor,  # (N, H), or logits (N, V) without a weight
    s_weight: Tensor | None,  # (V, H)
    s_bias: Tensor | None,  # (V,)
    s_u: Tensor | None,  # (N, R)
    s_B: Tensor | None,  # (V, R)
    t_hidden: Tensor,  # as the student's, of sizes of its own
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    t_u: Tensor | None,
    t_B: Tensor | None,
    s_temperature: Tensor | None,  # (N,)
    t_temperature: Tensor | None,  # (N,)
    ids: Tensor | None,  # (N,)
    keep: Tensor | None,  # (M,)
    zero_ignored: bool,
    kind: str,
    options: list[float],
    soft: float,
    hard: float,
    labels: bool,
    wanted: list[bool],
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``Σ_n soft·divergence + hard·(−log p)``, and the gradient of each of the first ten arguments, 0-dim where absent or not
    ``wanted``."""
    inputs = (s_hidden, s_weight, s_bias, s_u, s_B, t_hidden, t_weight, t_bias, t_u, t_B)
    student, teacher, which = _unpack(inputs, (s_temperature, t_temperature), kind, options)
    dtype = statistics_dtype(s_hidden.dtype)
    per_token = [s_hidden.new_full((len(s_hidden),), x, dtype=dtype) for x in (soft, hard)]
    divergence, nll, gradients = both_heads(
        student, teacher, ids, keep, zero_ignored, per_token[0], per_token[1] if labels else None, labels, which, wanted,
        workspace, backend,
    )  # fmt: skip
    total = soft * divergence if nll is None else soft * divergence + hard * nll
    loss = total.sum(dtype=wide_dtype(total.device)).to(dtype)
    return loss, *(_present(g, loss) for g in gradients)  # type: ignore[return-value]


@two_heads_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, (s_temperature, t_temperature, _, keep, _, kind, options) = args[:10], args[10:17]
    wanted, workspace, backend = args[20:]
    student, teacher, _ = _unpack(inputs, (s_temperature, t_temperature), kind, options)
    N = len(student.hidden)
    M = N if keep is None else keep.shape[0]
    loss = student.hidden.new_empty((), dtype=statistics_dtype(student.hidden.dtype))
    gradients: list[Tensor] = []
    for head, sums in zip(
        (student, teacher), chunks_of((student, teacher), M, wanted, workspace, backend).sums, strict=True
    ):
        dtype, wide = head.hidden.dtype, statistics_dtype(head.hidden.dtype)
        per_token = wide if dtype == torch.float16 and head.weight is not None else dtype
        for like, dtype in zip(head.inputs, (per_token, sums, wide, per_token, sums), strict=True):
            given = like is not None and wanted[len(gradients)]
            gradients.append(torch.empty_like(like, dtype=dtype) if given else loss.new_zeros(()))  # type: ignore
    return loss, *gradients


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if t is None or not want else t.dtype for t, want in zip(inputs[:10], inputs[20], strict=True)]
    ctx.kind, ctx.options, ctx.soft, ctx.hard, ctx.labels = inputs[15:20]
    # A second derivative starts again from the inputs, so they are kept where it is offered.
    small = inputs[0].dtype == torch.float64
    ctx.save_for_backward(*output[1:], *(inputs[:13] if small else ()))


def _loss_backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 13
    if g is None:
        return (None,) * 23
    gradients, inputs = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if not inputs:
            raise RuntimeError(
                "gradients made in forward can be differentiated again in float64 only; got "
                f"{[tuple(t.shape) for t in gradients if t.ndim]}. Use divergence() per token, for small inputs"
            )

        def fn(*of: Tensor) -> list[Tensor]:
            student, teacher, which = _unpack(of, inputs[10:12], ctx.kind, ctx.options)
            divergence, nll = differentiable_two_heads(student, teacher, inputs[12], ctx.labels, which)
            return [(ctx.soft * divergence if nll is None else ctx.soft * divergence + ctx.hard * nll).sum()]

        return *differentiable_gradients(fn, inputs[:10], [g]), *rest
    return *scale_gradients(gradients, ctx.dtypes, g), *rest


two_heads_loss.register_autograd(_loss_backward, setup_context=_loss_setup)


# Per-token results: backward makes the logits again.


@torch.library.custom_op("fused_losses::two_heads_rows", mutates_args=())
def two_heads_rows(
    s_hidden: Tensor,  # as for two_heads_loss
    s_weight: Tensor | None,
    s_bias: Tensor | None,
    s_u: Tensor | None,
    s_B: Tensor | None,
    t_hidden: Tensor,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    t_u: Tensor | None,
    t_B: Tensor | None,
    s_temperature: Tensor | None,
    t_temperature: Tensor | None,
    ids: Tensor | None,
    keep: Tensor | None,
    zero_ignored: bool,
    kind: str,
    options: list[float],
    labels: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``divergence (N,)`` and ``−log p (N,)``, 0-dim without labels."""
    inputs = (s_hidden, s_weight, s_bias, s_u, s_B, t_hidden, t_weight, t_bias, t_u, t_B)
    student, teacher, which = _unpack(inputs, (s_temperature, t_temperature), kind, options)
    divergence, nll, _ = both_heads(
        student, teacher, ids, keep, zero_ignored, None, None, labels, which, [False] * 10, workspace, backend
    )
    return divergence, _present(nll, divergence)


@two_heads_rows.register_fake
def _(s_hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    found = s_hidden.new_empty(len(s_hidden), dtype=statistics_dtype(s_hidden.dtype))
    return found, torch.empty_like(found) if args[16] else found.new_zeros(())


@torch.library.custom_op("fused_losses::two_heads_rows_grad", mutates_args=())
def two_heads_rows_grad(
    s_hidden: Tensor,
    s_weight: Tensor | None,
    s_bias: Tensor | None,
    s_u: Tensor | None,
    s_B: Tensor | None,
    t_hidden: Tensor,
    t_weight: Tensor | None,
    t_bias: Tensor | None,
    t_u: Tensor | None,
    t_B: Tensor | None,
    s_temperature: Tensor | None,
    t_temperature: Tensor | None,
    ids: Tensor | None,
    keep: Tensor | None,
    soft: Tensor,  # (N,)
    hard: Tensor | None,  # (N,)
    zero_ignored: bool,
    kind: str,
    options: list[float],
    wanted: list[bool],
    workspace: int,
    backend: str,
) -> list[Tensor]:
    """The gradients of the first ten arguments, 0-dim where absent or not ``wanted``."""
    inputs = (s_hidden, s_weight, s_bias, s_u, s_B, t_hidden, t_weight, t_bias, t_u, t_B)
    student, teacher, which = _unpack(inputs, (s_temperature, t_temperature), kind, options)
    *_, gradients = both_heads(
        student, teacher, ids, keep, zero_ignored, soft, hard, hard is not None, which, wanted, workspace, backend
    )
    pairs = zip(gradients, inputs, strict=True)
    return [_present(None if g is None or t is None else g.to(t.dtype), soft) for g, t in pairs]


@two_heads_rows_grad.register_fake
def _(*args: Any) -> list[Tensor]:
    inputs, soft, wanted = args[:10], args[14], args[19]
    return [
        soft.new_zeros(()) if t is None or not want else torch.empty_like(t)
        for t, want in zip(inputs, wanted, strict=True)
    ]


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.zero_ignored, ctx.kind, ctx.options, ctx.labels, ctx.workspace, ctx.backend = inputs[14:]
    ctx.save_for_backward(*inputs[:14])


def _rows_backward(ctx: Any, d_divergence: Tensor | None, d_nll: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 10
    if d_divergence is None and d_nll is None:
        return (None,) * 20
    inputs, (s_temperature, t_temperature, ids, keep) = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():

        def fn(*of: Tensor) -> list[Tensor]:
            student, teacher, which = _unpack(of, (s_temperature, t_temperature), ctx.kind, ctx.options)
            divergence, nll = differentiable_two_heads(student, teacher, ids, ctx.labels, which)
            return [divergence, _present(nll, divergence)]

        return *differentiable_gradients(fn, inputs, (d_divergence, d_nll)), *rest
    hard = d_nll if ctx.labels else None
    soft = torch.zeros_like(d_nll) if d_divergence is None and d_nll is not None else d_divergence
    assert soft is not None
    gradients = two_heads_rows_grad(
        *inputs, s_temperature, t_temperature, ids, keep, soft.contiguous(), None if hard is None else hard.contiguous(),
        ctx.zero_ignored, ctx.kind, ctx.options, list(ctx.needs_input_grad[:10]), ctx.workspace, ctx.backend,
    )  # fmt: skip
    return *(None if g.ndim == 0 else g for g in gradients), *rest


two_heads_rows.register_autograd(_rows_backward, setup_context=_rows_setup)

"""The divergence of a student's and a teacher's logits, from their hidden states and heads, a chunk of tokens at a time.

The library multiplies both chunks of logits, in fp32 for 16-bit heads. One call of the row primitive
(``kernels/divergence_rows.py``) compares them, and can also write the gradient of either. With ``2NVH`` floating point
operations for one product over a side's logits:

- a sum over tokens (:func:`two_heads_loss`) makes its gradients in forward: ``6NVH`` for a side that trains, ``2NVH`` for one
  that does not. Backward multiplies by the upstream gradient.
- per-token results (:func:`two_heads_rows`) recompute the logits in backward, ``2NVH`` more for each side. For one chunk,
  forward instead saves the gradient of the logits for upstream gradients of 1, and backward only multiplies it.

A side may also be a tensor of logits: a :class:`Head` whose ``hidden`` holds the logits and whose ``weight`` is None.

Where ranks share the vocabulary, each makes its own slice of the logits. They exchange the normalizers and sums of each token's
slices (:func:`~fused_losses.row_divergence.compare_rows`), and all-reduce the gradients of hidden and u.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autodiff import (
    absent,
    check_differentiable,
    differentiable_gradients,
    for_inputs,
    in_plain_pytorch,
    may_save,
    present,
    read_again,
    refuse_shard,
    save_for_backward,
    saved_values,
    unknown,
)
from .chunked.divergence_rows import BUFFERS
from .chunked.linear_softmax import TILE
from .chunked.softmax_rows import CHUNK_ELEMENTS
from .gradients_in_forward import HeadGradients, in_range, per_token_dtype, scale_gradients, total_dtypes
from .head import INPUTS, Head, whole_logits
from .numerics import full_precision, statistics_dtype, sum_of_losses
from .planning import DEFAULT_BUDGET, FEWEST_TOKENS, MANY_CHUNKS, padded
from .products import gathered_bytes
from .row_divergence import Divergence, compare_rows, differentiable_rows
from .row_statistics import part_of, slices
from .settings import workspace as workspace_setting
from .vocab_parallel import VocabShard, packed

# The slope of these in the teacher's logits is unbounded, and so is that of reverse_kl in the student's.
LOG_OF_STUDENT = ("forward_kl", "cross_entropy")
STEEPEST = 64.0  # the slope that float16 leaves room for there
TRANSFORM_TEMPORARIES = 7  # further copies of a chunk of rows, where logits have a scale, a softcap or a temperature


def compared_vocab(student: Head, teacher: Head) -> int:
    """How many columns of logits this rank compares."""
    return min(student.columns_here, teacher.columns_here) if student.shard is None else student.shard.size


class Problem(NamedTuple):
    """Two heads, and how to compare the logits of their tokens."""

    student: Head
    teacher: Head
    ids: Tensor | None  # (N,), −100: skipped
    keep: Tensor | None  # (M,) tokens to project; None: all
    zero_ignored: bool
    which: Divergence

    @property
    def heads(self) -> tuple[Head, Head]:
        return self.student, self.teacher

    @property
    def projected(self) -> int:
        return self.student.hidden.shape[0] if self.keep is None else self.keep.shape[0]

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.student.inputs + self.teacher.inputs

    def packed(self) -> tuple[Any, ...]:
        """The arguments of the operators: see ``ARGUMENTS``."""
        s, t = self.heads
        return (
            *s.inputs,
            *t.inputs,
            s.temperature, s.scale, s.softcap, packed(s.shard), s.gradient_filter,
            t.temperature, t.scale, t.softcap, packed(t.shard), t.gradient_filter,
            self.ids, self.keep, self.zero_ignored, *self.which,
        )  # fmt: skip

    @classmethod
    def unpacked(cls, arguments: Sequence[Any]) -> Problem:
        (
            *inputs,
            s_temperature, s_scale, s_softcap, s_shard, s_filter,
            t_temperature, t_scale, t_softcap, t_shard, t_filter,
            ids, keep, zero_ignored, kind, beta, temperature,
        ) = arguments  # fmt: skip
        s_shard, t_shard = VocabShard.unpacked(s_shard), VocabShard.unpacked(t_shard)
        student = Head(*inputs[:INPUTS], s_temperature, s_scale, s_softcap, s_shard, s_filter)  # type: ignore[call-arg]
        teacher = Head(*inputs[INPUTS:], t_temperature, t_scale, t_softcap, t_shard, t_filter)  # type: ignore[call-arg]
        return cls(student, teacher, ids, keep, zero_ignored, Divergence(kind, beta, temperature))

    def differentiable(self, inputs: Sequence[Tensor | None], with_nll: bool) -> tuple[Tensor, Tensor | None]:
        """Divergence and −log p for other ``inputs``, by :func:`differentiable_two_heads`."""
        student, teacher = self.student.with_inputs(inputs[:INPUTS]), self.teacher.with_inputs(inputs[INPUTS:])
        return differentiable_two_heads(student, teacher, self.ids, with_nll, self.which)


ARGUMENTS = """
    Tensor s_hidden, Tensor? s_weight, Tensor? s_bias, Tensor? s_u, Tensor? s_B,
    Tensor t_hidden, Tensor? t_weight, Tensor? t_bias, Tensor? t_u, Tensor? t_B,
    Tensor? s_temperature, float s_scale, float? s_softcap, str s_shard, float s_gradient_filter,
    Tensor? t_temperature, float t_scale, float? t_softcap, str t_shard, float t_gradient_filter,
    Tensor? ids, Tensor? keep, bool zero_ignored, str kind, float beta, float temperature
"""
OF_BOTH = 2 * INPUTS


class Chunks(NamedTuple):
    tokens: int  # in a chunk, at most all of them
    sums: tuple[torch.dtype, torch.dtype]  # in which each side's weight gradient is summed over the chunks


def budget(heads: Sequence[Head], workspace: int | str | None) -> int:
    """The workspace in bytes, fixed in forward: settings may have changed by the time backward runs."""
    found = workspace_setting.chosen(workspace)
    if found is not None:
        return found
    gradients = 0
    for head in heads:
        for t in head.inputs if head.weight is not None else ():
            if t is not None and t.requires_grad:
                of_tokens = t is head.hidden or t is head.u
                rows = t.shape[0] if of_tokens or head.shard is None else head.shard.even_size
                if of_tokens and unknown(rows):
                    continue
                gradients += rows * t.shape[1:].numel() * t.element_size()
    return max(DEFAULT_BUDGET, gradients)


def chunks_of(heads: tuple[Head, Head], M: int, wanted: Sequence[bool], workspace: int, backend: str) -> Chunks:
    """Cut ``M`` tokens into few chunks whose logits and gradients fit the workspace."""
    V = min(head.planned_vocab for head in heads)
    per_token = extra = fixed = at_a_time = 0
    for head, side in zip(heads, (wanted[:INPUTS], wanted[INPUTS:]), strict=True):
        if head.weight is None:
            continue
        dtype, (N, H) = head.hidden.dtype, head.hidden.shape
        wide, made = statistics_dtype(dtype), per_token_dtype(dtype, head.shard)
        of_hidden = int(side[0])  # PyTorch 2.11 multiplies no symbolic size by a truth value
        per_token += padded(V) * wide.itemsize
        if M < N:  # a copy of a chunk's hidden states, and their gradient before it is scattered to the tokens' rows
            per_token += H * (dtype.itemsize + made.itemsize * of_hidden)
        fixed += N * H * (made.itemsize - dtype.itemsize) * of_hidden
        if any(side) and head.gradient_filter:
            most = min(M, workspace // max(padded(V) * dtype.itemsize, 1))
            gathered = gathered_bytes(most, V, H, dtype, made, not head.hidden.is_cuda)
            at_a_time = max(at_a_time, gathered)
        if wide != dtype:
            per_token += padded(V) * dtype.itemsize * any(side)
            extra += V * H * wide.itemsize * side[1]  # the weight's gradient is summed in an fp32 copy
            if not head.hidden.is_cuda:
                per_token += (H + TILE) * wide.itemsize
                at_a_time = max(at_a_time, TILE * H * wide.itemsize)  # a tile of the weight, upcast
    if backend == "torch":
        itemsize = statistics_dtype(heads[0].hidden.dtype).itemsize
        changed = any(h.scale != 1 or h.softcap is not None or h.temperature is not None for h in heads)
        upcast = sum(h.weight is None and h.hidden.element_size() < itemsize for h in heads)
        copies = BUFFERS + TRANSFORM_TEMPORARIES * changed + upcast
        fixed += copies * itemsize * min(max(CHUNK_ELEMENTS, V), M * V)

    fixed += at_a_time

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


class _Side:
    """One head: buffers for a chunk of its logits and their gradient, and the gradients of its inputs."""

    buffer: Tensor | None = None  # (n, padded V): a chunk's logits, allocated at first use
    d_buffer: Tensor | None = None

    def __init__(self, head: Head, V: int, n: int, wanted: Sequence[bool], sums: torch.dtype) -> None:
        self.head, self.V, self.n, self.wanted, self.sums = head, V, n, wanted, sums
        self.trains, self.direct = any(wanted), head.weight is None
        self.cut = head if self.direct or head.columns_here == V else head.columns(slice(0, V))
        dtype = head.hidden.dtype
        self.in_place = statistics_dtype(dtype) == dtype  # the gradient is written over the logits

    @functools.cached_property
    def gradients(self) -> HeadGradients:
        """Allocated when the first one is added: a forward that only saves for backward needs none."""
        dtypes, all_columns = total_dtypes(self.head, self.sums), self.n > 0 and self.cut is self.head
        return HeadGradients(self.head, self.wanted, dtypes, False, all_columns)

    def take(self, rows: slice | Tensor, ignored: Tensor | None) -> None:
        self.rows, self.chunk = rows, self.cut.tokens(rows, None if self.direct else ignored)

    def logits(self) -> Tensor:
        if self.direct:
            return self.chunk.hidden[:, : self.V]
        hidden = self.chunk.hidden
        if self.buffer is None:
            self.buffer = hidden.new_empty(self.n, padded(self.V), dtype=statistics_dtype(hidden.dtype))
        return self.chunk.write_logits(self.buffer[: len(hidden), : self.V])

    def d_logits(self, logits: Tensor) -> Tensor | None:
        """The tensor ``(n, V)`` to write the gradient of ``logits`` to, or None."""
        if not self.trains:
            return None
        if self.direct:
            total = self.gradients.totals[0]
            assert total is not None
            return total[self.rows, : self.V] if isinstance(self.rows, slice) else logits.new_empty(len(logits), self.V)
        if self.d_buffer is None:
            self.d_buffer = self.buffer if self.in_place else self.head.hidden.new_empty(self.n, padded(self.V))
        assert self.d_buffer is not None
        return self.d_buffer[: len(logits), : self.V]

    def add(self, d_logits: Tensor | None, first: bool) -> None:
        """Add a chunk's gradient to the gradients of the inputs."""
        if d_logits is None:
            return
        if not self.direct:
            self.gradients.add(d_logits, self.chunk, self.rows, first)
        elif not isinstance(self.rows, slice) and (d_hidden := self.gradients.totals[0]) is not None:
            d_hidden[:, : self.V].index_copy_(0, self.rows, d_logits)


def float16_factor(sides: list[_Side], which: Divergence, soft: Tensor | None, hard: Tensor | None) -> Tensor | None:
    """The factor at which float16 gradients neither underflow nor overflow; None if there are no such gradients."""
    if not any(side.trains and side.n and side.head.hidden.dtype == torch.float16 for side in sides):
        return None
    student, teacher = sides
    steep = student.trains if which.kind == "reverse_kl" else teacher.trains and which.kind in LOG_OF_STUDENT
    of_logits = (None if soft is None else soft * ((STEEPEST if steep else 1) / which.temperature), hard)
    return in_range(None if t is None else t * side.head.steepest for t in of_logits for side in sides)


class BothHeads:
    """A pass over the tokens of both heads, a chunk at a time; each of the last three methods is one."""

    def __init__(
        self,
        problem: Problem,
        with_nll: bool,
        wanted: Sequence[bool],  # gradients of the inputs of either head
        workspace: int,
        backend: str,
    ) -> None:
        heads, M, hidden = problem.heads, problem.projected, problem.student.hidden
        shard, teacher_shard = (head.shard for head in heads)
        if shard is not None and teacher_shard is not None:
            shard = shard.beside(teacher_shard)
        self.problem, self.with_nll, self.backend, self.shard = problem, with_nll, backend, shard
        self.ids = problem.ids if problem.ids is None or shard is None else shard.local(problem.ids)
        V, cut = compared_vocab(*heads), chunks_of(heads, M, wanted, workspace, backend)
        self.parts = [*slices(M, max(cut.tokens, 1))]
        sides = zip(heads, (wanted[:INPUTS], wanted[INPUTS:]), cut.sums, strict=True)
        self.sides = [_Side(head, V, cut.tokens, of_inputs, sums) for head, of_inputs, sums in sides]
        # The results: the divergence and the student's −log p (N,).
        self.divergence = hidden.new_zeros(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
        self.nll = torch.zeros_like(self.divergence) if with_nll else None

    def take(self, part: slice) -> None:
        """Set the chunk that ``compare`` and ``add`` work on."""
        keep = self.problem.keep
        self.first, self.rows = part.start == 0, part if keep is None else keep[part]
        self.of_ids = part_of(self.ids, self.rows)
        ignored = self.of_ids == -100 if self.problem.zero_ignored and self.of_ids is not None else None
        for side in self.sides:
            side.take(self.rows, ignored)

    def compare(self, soft: Tensor | None, hard: Tensor | None = None) -> list[Tensor | None]:
        """Compute the chunk's results, and with ``soft`` ``(N,)`` the gradients of its logits ``(n, V)`` where wanted."""
        logits = [side.logits() for side in self.sides]
        d_logits = [None if soft is None else side.d_logits(x) for side, x in zip(self.sides, logits, strict=True)]
        d_student, d_teacher = (None if d is None else d.unsqueeze(-1) for d in d_logits)
        found, found_nll = compare_rows(
            self.backend,
            self.shard,
            *(x.unsqueeze(-1) for x in logits),
            self.of_ids,
            *(side.chunk.temperature for side in self.sides),
            **self.problem.which.of(*self.problem.heads),
            with_nll=self.with_nll,
            soft=part_of(soft, self.rows),
            hard=part_of(hard, self.rows),
            d_student=d_student,
            d_teacher=d_teacher,
        )
        self.divergence[self.rows] = found
        if self.nll is not None and found_nll is not None:
            self.nll[self.rows] = found_nll
        return d_logits

    def add(self, d_logits: Sequence[Tensor | None]) -> None:
        for side, d in zip(self.sides, d_logits, strict=True):
            side.add(d, self.first)

    def finished(self) -> list[Tensor | None]:
        """The gradient of each input or None, in its dtype or a wider one."""
        return [total for side in self.sides for total in side.gradients.finished()]

    def gradients(self, soft: Tensor | None, hard: Tensor | None) -> list[Tensor | None]:
        """Those of the inputs; ``soft`` and ``hard`` ``(N,)`` multiply the gradients of the divergences and of −log p."""
        factor = float16_factor(self.sides, self.problem.which, soft, hard)
        if factor is not None:
            soft, hard = (None if t is None else t * factor for t in (soft, hard))
        with full_precision(self.divergence.device):
            for part in self.parts:
                self.take(part)
                self.add(self.compare(soft, hard))
        found = self.finished()
        return found if factor is None else [None if t is None else t.div_(factor) for t in found]

    def saved(self) -> list[Tensor | None]:
        """For each side that trains, the gradient of the first chunk's logits, for upstream gradients of 1; not in float16, see
        :func:`saved_tokens`."""
        unit = torch.ones_like(self.divergence)
        with full_precision(unit.device):
            for part in reversed(self.parts):  # the first chunk last: its gradient is what is left in the buffers
                self.take(part)
                self.compare(unit if self.first else None)
        return [side.d_buffer if side.trains else None for side in self.sides]

    def gradients_from(self, saved: Sequence[Tensor | None], soft: Tensor) -> list[Tensor | None]:
        """The gradients of :meth:`gradients`, from the result of :meth:`saved`, which is overwritten; the other chunks' logits
        are recomputed."""
        for side, d in zip(self.sides, saved, strict=True):
            side.buffer, side.d_buffer = (d, None) if side.in_place else (None, d)
        with full_precision(soft.device):
            for part in self.parts:
                self.take(part)
                if self.first:
                    for side, d in zip(self.sides, saved, strict=True):
                        side.add(None if d is None else multiply_rows(d[:, : side.V], soft[self.rows]), self.first)
                else:
                    self.add(self.compare(soft))
        return self.finished()


def multiply_rows(x: Tensor, by: Tensor) -> Tensor:
    """``x (n, V)`` times ``by (n,)``, in place. A row of zeros stays zero whatever its factor, which is nan where a later
    operation is masked. A few rows at a time, since a CPU copies 16-bit factors."""
    n = len(x) if x.is_cuda else max(1, CHUNK_ELEMENTS // max(x.shape[1], 1))
    for part, factors in zip(x.split(max(n, 1)), by.split(max(n, 1)), strict=True):
        zero = torch.linalg.vector_norm(part, 1, dim=1) == 0
        part.mul_(factors.masked_fill(zero, 0)[:, None])
    return x


def saved_tokens(
    heads: tuple[Head, Head], M: int, wanted: Sequence[bool], with_nll: bool, workspace: int, backend: str
) -> int:
    """For how many tokens forward saves the gradient of the logits: 0 if a row has two upstream gradients, if no backward
    follows, if that gradient is itself a result, or in float16, which can be kept in range only with the upstream gradient
    known."""
    if with_nll or not any(wanted) or not may_save(heads[0].hidden):
        return 0
    trained = [head for head, side in zip(heads, (wanted[:INPUTS], wanted[INPUTS:]), strict=True) if any(side)]
    if any(head.weight is None or head.hidden.dtype == torch.float16 for head in trained):
        return 0
    return chunks_of(heads, M, wanted, workspace, backend).tokens


def differentiable_two_heads(
    student: Head, teacher: Head, ids: Tensor | None, with_nll: bool, which: Divergence
) -> tuple[Tensor, Tensor | None]:
    """Divergence and −log p ``(N,)`` as plain differentiable PyTorch on whole logits."""
    V = compared_vocab(student, teacher)
    check_differentiable(student.hidden.shape[0], V, student.hidden.dtype)
    skip = None if ids is None else ids == -100

    def compared(head: Head) -> Head:
        return head._replace(hidden=head.hidden[:, :V]) if head.weight is None else head.columns(slice(0, V))

    z_student, z_teacher = whole_logits(compared(student), skip), whole_logits(compared(teacher), skip)
    return differentiable_rows(z_student, z_teacher, ids, with_nll=with_nll, **which._asdict())


# A sum over tokens: the gradients are made in forward.


@torch.library.custom_op(
    "fused_losses::two_heads_loss",
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor soft, Tensor? hard, *, bool[] wanted, int workspace, str backend) -> "
    f"({', '.join(['Tensor'] * (3 + OF_BOTH))})",
)
def two_heads_loss(*arguments: Any, wanted: list[bool], workspace: int, backend: str) -> tuple[Tensor, ...]:
    """``Σ_n soft·divergence + hard·(−log p)``; divergence and −log p, ``(N,)`` each, the latter 0-dim without ``hard``; and the
    gradient of each input, 0-dim where absent or not ``wanted``. ``soft`` and ``hard`` are 0-dim."""
    *of_problem, soft, hard = arguments
    problem = Problem.unpacked(of_problem)
    both = BothHeads(problem, hard is not None, wanted, workspace, backend)
    per_token = (None if t is None else t.repeat(len(problem.student.hidden)) for t in (soft, hard))
    gradients = both.gradients(*per_token)
    loss = sum_of_losses(soft * both.divergence if both.nll is None else soft * both.divergence + hard * both.nll)
    return loss, both.divergence, *(present(t, loss) for t in (both.nll, *gradients))


@two_heads_loss.register_fake
def _(*arguments: Any, wanted: list[bool], workspace: int, backend: str) -> tuple[Tensor, ...]:
    *of_problem, _soft, hard = arguments
    problem = Problem.unpacked(of_problem)
    hidden = problem.student.hidden
    divergence = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
    loss = divergence.new_empty(())
    sums = chunks_of(problem.heads, problem.projected, wanted, workspace, backend).sums
    dtypes = [dtype for head, s in zip(problem.heads, sums, strict=True) for dtype in total_dtypes(head, s)]
    gradients = (
        torch.empty_like(like, dtype=dtype) if want and like is not None else None
        for like, dtype, want in zip(problem.inputs, dtypes, wanted, strict=True)
    )
    nll = None if hard is None else torch.empty_like(divergence)
    return loss, divergence, *(present(t, loss) for t in (nll, *gradients))


def _loss_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    problem = Problem.unpacked(inputs[:-2])
    ctx.shard, ctx.backend = packed(problem.student.shard), keyword_only_inputs["backend"]
    wanted = keyword_only_inputs["wanted"]
    ctx.dtypes = [None if t is None or not want else t.dtype for t, want in zip(problem.inputs, wanted, strict=True)]
    # A second derivative is computed from the inputs, so they are saved where one is supported.
    small = problem.student.hidden.dtype == torch.float64
    _loss, _divergence, _nll, *gradients = output
    save_for_backward(ctx, *gradients, *(inputs if small else ()))


def _loss_backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if g is None:
        return for_inputs(ctx)
    stored = saved_values(ctx)
    gradients, arguments = stored[:OF_BOTH], stored[OF_BOTH:]
    if in_plain_pytorch():
        refuse_shard(ctx.shard, gradients[0].shape)
        if not arguments:
            raise RuntimeError(
                "gradients made in forward can be differentiated again in float64 only; got "
                f"{[tuple(t.shape) for t in gradients if t.ndim]}. Use divergence() per token, for small inputs"
            )
        *of_problem, soft, hard = arguments
        problem = Problem.unpacked(of_problem)

        def fn(*inputs: Tensor) -> list[Tensor]:
            divergence, nll = problem.differentiable(inputs, hard is not None)
            return [(soft * divergence if nll is None else soft * divergence + hard * nll).sum()]

        return for_inputs(ctx, *differentiable_gradients(fn, problem.inputs, [g]))
    return for_inputs(ctx, *scale_gradients(gradients, ctx.dtypes, g, ctx.backend))


two_heads_loss.register_autograd(_loss_backward, setup_context=_loss_setup)


# Per-token results: backward recomputes the logits.


@torch.library.custom_op(
    "fused_losses::two_heads_rows",
    mutates_args=(),
    schema=f"({ARGUMENTS}, *, bool with_nll, bool[] wanted, int tokens, int workspace, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def two_heads_rows(
    *arguments: Any, with_nll: bool, wanted: list[bool], tokens: int, workspace: int, backend: str
) -> tuple[Tensor, ...]:
    """``divergence (N,)``; ``−log p (N,)``, 0-dim without with_nll; and the saved gradients of the first ``tokens``' logits."""
    problem = Problem.unpacked(arguments)
    both = BothHeads(problem, with_nll, wanted if tokens else [False] * OF_BOTH, workspace, backend)
    if tokens:
        s_saved, t_saved = both.saved()
    else:
        s_saved = t_saved = None
        both.gradients(None, None)
    return both.divergence, *(present(t, both.divergence) for t in (both.nll, s_saved, t_saved))


@two_heads_rows.register_fake
def _(*arguments: Any, with_nll: bool, wanted: list[bool], tokens: int, **_: Any) -> tuple[Tensor, ...]:
    problem = Problem.unpacked(arguments)
    hidden, V = problem.student.hidden, compared_vocab(*problem.heads)
    found = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
    saved = [
        head.hidden.new_empty(tokens, padded(V)) if tokens and any(side) else None
        for head, side in zip(problem.heads, (wanted[:INPUTS], wanted[INPUTS:]), strict=True)
    ]
    return found, *(present(t, found) for t in (torch.empty_like(found) if with_nll else None, *saved))


@torch.library.custom_op(
    "fused_losses::two_heads_rows_grad",
    mutates_args=("s_saved", "t_saved"),
    schema=f"(Tensor soft, Tensor? hard, Tensor(a!) s_saved, Tensor(b!) t_saved, {ARGUMENTS}, *, bool[] wanted, "
    f"int workspace, str backend) -> ({', '.join(['Tensor'] * OF_BOTH)})",
)
def two_heads_rows_grad(
    soft: Tensor,  # (N,) factors of the divergences' gradients
    hard: Tensor | None,  # (N,) and of those of −log p
    s_saved: Tensor,  # what forward saved, overwritten; or 0-dim
    t_saved: Tensor,
    *arguments: Any,
    wanted: list[bool],
    workspace: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """The gradients of the inputs, 0-dim where absent or not ``wanted``."""
    problem = Problem.unpacked(arguments)
    saved = [t if t.ndim else None for t in (s_saved, t_saved)]
    both = BothHeads(problem, hard is not None, wanted, workspace, backend)
    gradients = both.gradients_from(saved, soft) if any(t is not None for t in saved) else both.gradients(soft, hard)
    pairs = zip(gradients, problem.inputs, strict=True)
    return tuple(present(None if g is None or t is None else g.to(t.dtype), soft) for g, t in pairs)


@two_heads_rows_grad.register_fake
def _(soft: Tensor, _hard: Any, _s: Any, _t: Any, *arguments: Any, wanted: list[bool], **_: Any) -> tuple[Tensor, ...]:
    return tuple(
        absent(soft) if t is None or not want else torch.empty_like(t)
        for t, want in zip(Problem.unpacked(arguments).inputs, wanted, strict=True)
    )


def row_factors(d_divergence: Tensor | None, d_nll: Tensor | None, with_nll: bool) -> tuple[Tensor, Tensor | None]:
    """The factors of the gradients of the divergences and of −log p: the upstream gradients, of which at most one is None."""
    hard = d_nll.contiguous() if with_nll and d_nll is not None else None
    if d_divergence is not None:
        return d_divergence.contiguous(), hard
    assert hard is not None
    return torch.zeros_like(hard), hard


def _rows_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.how = keyword_only_inputs
    save_for_backward(ctx, *inputs, *output[2:])


def _rows_backward(ctx: Any, d_divergence: Tensor | None, d_nll: Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_divergence is None and d_nll is None:
        return for_inputs(ctx)
    *arguments, s_saved, t_saved = saved_values(ctx)
    with_nll = ctx.how["with_nll"]
    if in_plain_pytorch(d_divergence, d_nll):
        problem = Problem.unpacked(arguments)
        refuse_shard(packed(problem.student.shard), problem.student.hidden.shape)

        def fn(*inputs: Tensor) -> list[Tensor]:
            divergence, nll = problem.differentiable(inputs, with_nll)
            return [divergence, present(nll, divergence)]

        return for_inputs(ctx, *differentiable_gradients(fn, problem.inputs, (d_divergence, d_nll)))
    soft, hard = row_factors(d_divergence, d_nll, with_nll)
    wanted = list(ctx.needs_input_grad[:OF_BOTH])
    same = wanted == list(ctx.how["wanted"])  # otherwise the chunks differ from forward's
    saved = (absent(soft) if t.ndim == 0 or not same else t.clone() if read_again(t) else t for t in (s_saved, t_saved))
    how = {name: ctx.how[name] for name in ("workspace", "backend")}
    gradients = two_heads_rows_grad(soft, hard, *saved, *arguments, wanted=wanted, **how)
    return for_inputs(ctx, *(None if g.ndim == 0 else g for g in gradients))


two_heads_rows.register_autograd(_rows_backward, setup_context=_rows_setup)

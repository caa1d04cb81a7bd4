r"""How far a student's distribution over the vocabulary is from a teacher's: one number per token.

With :math:`t` the teacher's and :math:`s` the student's probabilities and :math:`m = βt + (1-β)s`:

=============== ================================================== ==============================================
kind            value                                              what the student is pulled to
=============== ================================================== ==============================================
``forward_kl``  :math:`KL(t‖s) = \sum_j t_j \log(t_j/s_j)`         cover all that the teacher finds likely
``reverse_kl``  :math:`KL(s‖t)`                                    say only what the teacher finds likely
``jsd``         :math:`β\,KL(t‖m) + (1-β)\,KL(s‖m)`                in between; bounded
``skewed_kl``   :math:`KL(t‖m)`                                    forward KL that stays finite where s is 0
``tvd``         :math:`\tfrac12 \sum_j |t_j - s_j|`                the largest gap in the probability of an event
=============== ================================================== ==============================================

A divergence reads two sets of logits, each ``tokens × vocabulary``, which take most of distillation's memory. Here both may be
:class:`~fused_losses.linear_logits.LinearLogits`, each with its own hidden size and head, and neither is materialised.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .autodiff import (
    absent,
    differentiable_gradients,
    differentiated,
    for_inputs,
    in_plain_pytorch,
    present,
    refuse_shard,
    same_sizes,
    save_for_backward,
    saved_values,
    transforms_active,
    unknown,
)
from .head import Head, head_of, kept_tokens, ready
from .lazy_tensor import is_lazy
from .numerics import check_choice, check_masks, check_scaling, on_device, statistics_dtype
from .row_divergence import Divergence, compare_rows
from .settings import Backend, Route, resolve_backend
from .settings import route as route_setting
from .settings import workspace as workspace_setting
from .token_statistics import check_vocab_last, rows_of
from .two_heads import (
    Problem,
    budget,
    differentiable_two_heads,
    row_factors,
    saved_tokens,
    two_heads_loss,
    two_heads_rows,
)
from .vocab_parallel import VocabShard, is_dtensor, local_part, packed

if TYPE_CHECKING:
    from .linear_logits import LinearLogits

KINDS = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "tvd")
MOST_PADDING = 1024  # vocabulary entries: padding is to a multiple of 64 or of 512, for each of a few ranks


# Two tensors of logits, read where they are.


@torch.library.custom_op("fused_losses::divergence_rows", mutates_args=())
def divergence_rows(
    student: Tensor,  # (B, V, S), any strides
    teacher: Tensor,  # (B, V', S), any strides
    ids: Tensor | None,  # (N,) int64, N = B·S; −100: skipped
    *,
    with_nll: bool,
    kind: str,
    beta: float,
    temperature: float,
    backend: str,
    shard: str,  # a VocabShard that owns columns [0, size) of the logits; ids are those of the whole vocabulary
) -> tuple[Tensor, Tensor]:
    """``divergence (N,)`` and the student's ``−log p (N,)`` at ids, 0-dim without with_nll."""
    found, nll = compare_rows(
        backend, *_of_shard(shard, student, teacher, ids), None, None, kind=kind, beta=beta, temperature=temperature,
        with_nll=with_nll,
    )  # fmt: skip
    return found, present(nll, found)


def _of_shard(
    shard: str, student: Tensor, teacher: Tensor, ids: Tensor | None
) -> tuple[VocabShard | None, Tensor, Tensor, Tensor | None]:
    part = VocabShard.unpacked(shard)
    if part is None:
        return None, student, teacher, ids
    return part, student[:, : part.size], teacher[:, : part.size], None if ids is None else part.local(ids)


@divergence_rows.register_fake
def _(student: Tensor, *_tensors: Any, with_nll: bool, **_: Any) -> tuple[Tensor, Tensor]:
    found = student.new_empty(student.shape[0] * student.shape[2], dtype=statistics_dtype(student.dtype))
    return found, torch.empty_like(found) if with_nll else absent(found)


@torch.library.custom_op("fused_losses::divergence_rows_grad", mutates_args=())
def divergence_rows_grad(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    soft: Tensor,  # (N,)
    hard: Tensor | None,  # (N,)
    *,
    kind: str,
    beta: float,
    temperature: float,
    wanted: list[bool],
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of student and teacher, 0-dim where not ``wanted``."""
    part, *logits, ids = _of_shard(shard, student, teacher, ids)
    V = min(x.shape[1] for x in logits)
    whole = [torch.empty_like(x) if want else None for x, want in zip((student, teacher), wanted, strict=True)]
    for x in whole:
        if x is not None:
            x[:, V:] = 0
    d_student, d_teacher = (None if x is None else x[:, :V] for x in whole)
    compare_rows(
        backend, part, *logits, ids, None, None, kind=kind, beta=beta, temperature=temperature, with_nll=hard is not None,
        soft=soft, hard=hard, d_student=d_student, d_teacher=d_teacher,
    )  # fmt: skip
    first, second = (present(x, soft) for x in whole)
    return first, second


@divergence_rows_grad.register_fake
def _(student: Tensor, teacher: Tensor, *_tensors: Any, wanted: list[bool], **_: Any) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.empty_like(x) if want else absent(x) for x, want in zip((student, teacher), wanted, strict=True)
    )
    return first, second


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.with_nll = keyword_only_inputs["with_nll"]
    ctx.how = {name: x for name, x in keyword_only_inputs.items() if name != "with_nll"}
    save_for_backward(ctx, *inputs)


def _backward(ctx: Any, d_divergence: Tensor | None, d_nll: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_divergence is None and d_nll is None:
        return for_inputs(ctx)
    student, teacher, ids = saved_values(ctx)
    if in_plain_pytorch(d_divergence, d_nll):
        refuse_shard(ctx.how["shard"], student.shape)
        which = Divergence(*(ctx.how[name] for name in Divergence._fields))

        def fn(*sides: Tensor) -> list[Tensor]:
            first, second = (as_head(x.transpose(1, 2)) for x in sides)
            found, nll = differentiable_two_heads(first, second, ids, ctx.with_nll, which)
            return [found, present(nll, found)]

        return for_inputs(ctx, *differentiable_gradients(fn, [student, teacher], (d_divergence, d_nll)))
    soft, hard = row_factors(d_divergence, d_nll, ctx.with_nll)
    wanted = list(ctx.needs_input_grad[:2])
    gradients = divergence_rows_grad(student, teacher, ids, soft, hard, wanted=wanted, **ctx.how)
    return for_inputs(ctx, *(None if g.ndim == 0 else g for g in gradients))


divergence_rows.register_autograd(_backward, setup_context=_setup_context)


# Tensors or lazy logits on either side.


def as_head(logits: Tensor | LinearLogits, shard: VocabShard | None = None) -> Head:
    """Logits as a :class:`Head`; with a ``shard``, they are the columns of that shard."""
    if not is_lazy(logits):
        rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
        return Head(rows, None, shard=shard)  # type: ignore[arg-type]
    head = head_of(logits)
    return ready(head._replace(shard=shard and shard.of_head(head.hidden, head.u)))


Shards = tuple[VocabShard | None, VocabShard | None]


def shared_vocabulary(student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, group: Any) -> Shards:
    """The shard of the vocabulary that each side holds, cut to the smaller vocabulary; None where they hold all of it."""
    sides = (student, teacher)
    both_lazy = is_lazy(student) and is_lazy(teacher)
    found = [local_part(x, group if both_lazy or not is_lazy(x) else None)[1] for x in sides]
    first, second = found
    if first is None and second is None:
        V, W = student.shape[-1], teacher.shape[-1]
        if abs(V - W) > MOST_PADDING:
            raise ValueError(
                f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} have vocabularies that no "
                f"padding makes different: where ids mean the same tokens, take [..., :{min(V, W)}] of the larger"
            )
        return None, None
    if first is not None and second is not None:
        V = min(first.vocab, second.vocab)
        first, second = (s._replace(start=min(s.start, V), stop=min(s.stop, V), vocab=V) for s in (first, second))
        if first[:5] == second[:5]:  # the other fields, on the gradient of hidden, may differ
            return first.of_sides(student, teacher), second
    names = [
        f"{name} {tuple(x.shape)} "
        + ("whole" if s is None else f"ids {(s.start, s.stop)} of {s.vocab} in group {s.group!r}")
        for name, x, s in zip(("student_logits", "teacher_logits"), sides, found, strict=True)
    ]
    raise ValueError(
        f"both sides must share the vocabulary alike, this rank holds {' and '.join(names)}: pass group= for tensors, with "
        "VocabParallel(vocab_range=, vocab_size=) where shards are uneven"
    )


def chosen_divergence(kind: str, beta: float, temperature: float) -> Divergence:
    """The divergence, checked; at the ends of its mixture ``jsd`` becomes one of the KLs."""
    check_choice(KINDS, kind=kind)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is the teacher's share of the mixture, in [0, 1], got {beta}")
    check_scaling(temperature=temperature)
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    elif kind == "skewed_kl" and beta == 0:
        kind = "forward_kl"
    return Divergence(kind, float(beta), float(temperature))


def check_logits(name: str, logits: Any) -> None:
    check_vocab_last(name, logits)
    if not logits.ndim or not logits.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point (…, V), got {logits.dtype} {tuple(logits.shape)}")
    if is_dtensor(logits):
        raise TypeError(
            f"{name} {tuple(logits.shape)} is a DTensor, {logits.placements}: pass to_local(), and group= where the "
            "vocabulary is shared"
        )


def check_sides(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, tokens: torch.Size | None
) -> torch.Size:
    """The token shape of both sides; raises if they do not match each other or ``tokens``."""
    check_logits("student_logits", student)
    check_logits("teacher_logits", teacher)
    found = student.shape[:-1]
    if not same_sizes(teacher.shape[:-1], found) or not (tokens is None or same_sizes(tokens, found)):
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must have the same tokens"
            + ("" if tokens is None else f" as labels or mask {tuple(tokens)}")
        )
    if teacher.device != student.device:
        raise ValueError(f"student_logits are on {student.device} and teacher_logits on {teacher.device}: move one")
    return found


def token_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
    ids: Tensor | None,  # (N,) int64, −100: skipped
    with_nll: bool,
    which: Divergence,
    shards: Shards,
    *,
    backend: Backend | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Divergences ``(N,)`` and, with ``with_nll``, the student's ``−log p`` at ids; differentiable in both sides."""
    if transforms_active():
        refuse_shard(packed(shards[0]), student.shape)
        with gathered(student), gathered(teacher):
            return differentiable_two_heads(as_head(student), as_head(teacher), ids, with_nll, which)
    if not (is_lazy(student) or is_lazy(teacher)):
        found, nll = divergence_rows(
            rows_of(student), rows_of(teacher), ids, with_nll=with_nll, **which._asdict(),
            backend=resolve_backend(student, backend), shard=packed(shards[0]),
        )  # fmt: skip
        return found, nll if with_nll else None
    keep, zero_ignored = kept_tokens(None if ids is None else ids[:, None], drop_ignored)
    with gathered(student), gathered(teacher):
        heads = (as_head(student, shards[0]), as_head(teacher, shards[1]))
        problem, wanted = Problem(*heads, ids, keep, zero_ignored, which), heads[0].trained + heads[1].trained
        how: dict[str, Any] = {
            "with_nll": with_nll,
            "wanted": wanted,
            "workspace": budget(heads, workspace),
            "backend": resolve_backend(heads[0].hidden, backend),
        }
        found, nll, *_ = two_heads_rows(*problem.packed(), tokens=saved_tokens(heads, problem.projected, **how), **how)
    _gather_in_backward(found, student, teacher)
    return found, nll if with_nll else None


def left_out(weight: float | Tensor) -> bool:
    """Whether a term with this weight is left out: not if the weight is learned, since it has a gradient at 0 too."""
    return not weight and not (isinstance(weight, Tensor) and differentiated(weight))


def summed_divergence(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits,
    ids: Tensor,  # (N,) int64, −100: skipped
    soft: float | Tensor,
    hard: float | Tensor,
    which: Divergence,
    shards: Shards,
    divisor: Tensor | int,
    *,
    backend: Backend | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
    route: Route | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``Σ_n soft·divergence + hard·(−log p)`` over ``divisor``, for a head with gradients made in forward; the divergences
    ``(N,)``; and −log p ``(N,)``, None where it has no weight."""
    how: dict[str, Any] = {"backend": backend, "workspace": workspace, "drop_ignored": drop_ignored}
    tensors = not (is_lazy(student) or is_lazy(teacher))
    learned = isinstance(soft, Tensor) or isinstance(hard, Tensor)  # weights that may require grad
    learned = learned or (isinstance(divisor, Tensor) and divisor.requires_grad)
    recompute = route_setting.chosen(route) == "recompute" or unknown(math.prod(student.shape[:-1]))
    if tensors or learned or recompute or transforms_active():
        found, nll = token_divergence(student, teacher, ids, not left_out(hard), which, shards, **how)
        loss = soft * found.sum() if nll is None else (soft * found + hard * nll).sum()
        return loss / divisor, found, nll
    keep, zero_ignored = kept_tokens(ids[:, None], drop_ignored)
    with gathered(student), gathered(teacher):
        heads = (as_head(student, shards[0]), as_head(teacher, shards[1]))
        # Divided now, so that the upstream gradient is 1 and backward has nothing to multiply; but not in float16, where the
        # gradients of the logits would underflow before the loss scale multiplies them.
        now, later = (1, divisor) if torch.float16 in (student.dtype, teacher.dtype) else (divisor, 1)
        share = on_device(now, student.device).to(statistics_dtype(heads[0].hidden.dtype)).reciprocal()
        loss, found, nll, *_ = two_heads_loss(
            *Problem(*heads, ids, keep, zero_ignored, which).packed(),
            soft * share,
            hard * share if hard else None,
            wanted=heads[0].trained + heads[1].trained,
            workspace=budget(heads, workspace),
            backend=resolve_backend(heads[0].hidden, backend),
        )
    return _gather_in_backward(loss, student, teacher, made=True) / later, found, nll if hard else None


def gathered(logits: Tensor | LinearLogits) -> Any:
    return logits.gathered() if is_lazy(logits) else contextlib.nullcontext()


def _gather_in_backward(output: Tensor, *sides: Tensor | LinearLogits, made: bool = False) -> Tensor:
    for logits in sides:
        if is_lazy(logits):
            output = logits.gather_in_backward(output, made)
    return output


def divergence(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    group: Any = None,
    backend: Backend | None = None,
    workspace: int | str | None = None,
    drop_ignored: bool | None = None,
) -> Tensor:
    r"""Divergence between student and teacher, one number per token, differentiable in both.

    .. math:: KL(t‖s),\quad KL(s‖t),\quad β\,KL(t‖m) + (1-β)\,KL(s‖m),\quad KL(t‖m),\quad \tfrac12\sum_j|t_j - s_j|

    with :math:`t, s` the softmax of the logits over the temperature and :math:`m = βt + (1-β)s`. Two tensors are read in place,
    without a copy. The logits of a :class:`LinearLogits` exist only as far as the workspace holds them, and backward recomputes
    them. The teacher gets a gradient if it requires one.

    Source: Hinton et al. (arXiv:1503.02531); generalised JSD: Agarwal et al. (arXiv:2306.13649), TRL 1.16, Liger; skewed KL:
    Ko et al. (arXiv:2402.03898). As in TRL and Liger, ``jsd`` is the forward KL at ``beta=0`` and the reverse KL at ``beta=1``.

    Args:
        student_logits: ``(…, V)``, any strides, a Tensor or a :class:`LinearLogits`.
        teacher_logits: ``(…, V')`` of the same tokens, with a dtype, hidden size and head of its own. If the vocabularies are
            padded to different sizes, both are cut to the smaller before the softmax.
        kind: from the table at the top of the module.
        beta: the teacher's share of the mixture, for ``jsd`` and ``skewed_kl``.
        temperature: of both sides; the result is not multiplied by ``temperature²`` to undo its effect on the gradient.
        mask: ``(…)``; tokens where it is 0 are neither read nor projected and give 0.
        group: the ranks that share the vocabulary, a process group or a :class:`VocabParallel`; tensors of logits are then
            this rank's columns. A :class:`LinearLogits` has its own group. Both sides must be sharded alike; ranks exchange
            a few numbers per token, and every result is the same on all of them.
        backend: ``"triton"`` or ``"torch"``; by default the one that serves the device.
        workspace: bytes that may be held beside inputs and results, for a :class:`LinearLogits`.
        drop_ignored: take masked tokens out before the products (True), or zero them, without a synchronisation (False).

    Returns:
        ``(…)``, nats (``tvd``: in [0, 1]), fp32, or float64 for a float64 student; never negative. A KL is infinite if the
        second side's logit is −inf where the first has mass; then the gradient of the first side is 0 in that row.

    Raises:
        TypeError: logits that are neither a tensor nor a :class:`LinearLogits`, or a DTensor.
        ValueError: shapes, devices or shards that do not fit each other, an unknown kind, ``beta`` outside [0, 1].

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> divergence(student, teacher, kind="jsd", beta=0.5)
        tensor([0.0285])
    """
    which = chosen_divergence(kind, beta, temperature)
    return masked_divergence(
        student_logits,
        teacher_logits,
        which,
        mask,
        group,
        backend=backend,
        workspace=workspace,
        drop_ignored=drop_ignored,
    )


def masked_divergence(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    which: Divergence,
    mask: Tensor | None,
    group: Any,
    *,
    workspace: int | str | None,
    **how: Any,
) -> Tensor:
    """The divergence ``(…)``, of any kind that the kernels support; 0 where the mask is 0."""
    tokens = check_sides(student_logits, teacher_logits, None if mask is None else mask.shape)
    check_masks(mask=mask)
    ids = None if mask is None else torch.where(mask.reshape(-1) != 0, 0, -100)
    how["workspace"] = workspace_setting.parse(workspace)
    shards = shared_vocabulary(student_logits, teacher_logits, group)
    found, _ = token_divergence(student_logits, teacher_logits, ids, False, which, shards, **how)
    return found.view(tokens)

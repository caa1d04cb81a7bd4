"""The divergence of two rows of logits, on either backend and over a vocabulary shared by ranks; and in plain PyTorch."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .numerics import statistics_dtype, wide_dtype
from .vocab_parallel import VocabShard

if TYPE_CHECKING:
    from .head import Head


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
    """The module that implements ``divergence_rows``."""
    if backend == "torch":
        from .chunked import divergence_rows
    else:
        from .kernels import divergence_rows  # type: ignore[no-redef]  # Triton is imported only where it runs
    return divergence_rows


def compare_rows(
    backend: str,
    shard: VocabShard | None,
    student: Tensor,  # (B, V, S), the whole vocabulary or the shard's slice of it
    teacher: Tensor,  # (B, V, S)
    ids: Tensor | None,  # (N,), relative to the slice's first column
    *temperatures: Tensor | None,  # (N,), of student and teacher
    soft: Tensor | None = None,
    hard: Tensor | None = None,
    d_student: Tensor | None = None,
    d_teacher: Tensor | None = None,
    **which: Any,
) -> tuple[Tensor, Tensor | None]:
    """``divergence_rows`` over the whole vocabulary, also where ranks share it."""
    rows = functools.partial(divergence_module(backend).divergence_rows, student, teacher, ids, *temperatures, **which)
    gradients = {"soft": soft, "hard": hard, "d_student": d_student, "d_teacher": d_teacher}
    if shard is None:
        return rows(**gradients)
    N, dtype, wide = student.shape[0] * student.shape[2], statistics_dtype(student.dtype), wide_dtype(student.device)
    slopes = (d_student is not None, d_teacher is not None)
    with_nll = which["with_nll"]
    normalizers = student.new_empty(6 if with_nll and which["temperature"] != 1 else 4, N, dtype=wide)
    rows(step="normalizers", normalizers=normalizers)
    normalizers = whole_normalizers(shard.gather_checked(normalizers, rows=N, ids=ids))
    sums = student.new_zeros(4, N, dtype=wide)
    rows(step="sums", normalizers=normalizers, sums=sums, slopes=slopes)
    sums = shard.gather(sums if any(slopes) else sums[:2]).sum(0)
    if any(slopes):
        rows(step="gradients", normalizers=normalizers, sums=sums, **gradients)
    return sums[0].to(dtype, copy=True), sums[1].to(dtype, copy=True) if with_nll else None


def whole_normalizers(of_slices: Tensor) -> Tensor:
    """The normalizers of rows ``(4 or 6, N)`` from those of their slices ``(R, 4 or 6, N)``."""
    largest, log_total = of_slices[:, ::2], of_slices[:, 1::2]
    whole = torch.empty_like(of_slices[0])
    whole[::2] = largest.amax(0)
    whole[1::2] = (log_total.exp() * (largest - whole[::2]).exp()).sum(0).log()
    return whole


def of_log_probs(log_s: Tensor, log_t: Tensor, kind: str, beta: float) -> Tensor:
    """The divergence ``(…)`` of log-probabilities ``(…, V)``, as plain PyTorch."""
    s, t = log_s.exp(), log_t.exp()

    def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))).sum(-1)

    if kind == "forward_kl":
        return kl(t, log_t, log_s)
    if kind == "reverse_kl":
        return kl(s, log_s, log_t)
    if kind == "cross_entropy":
        return -(t * log_s.masked_fill(log_s == -math.inf, 0)).sum(-1)
    if kind == "tvd":
        return 0.5 * (t - s).abs().sum(-1)
    if kind == "overlap":
        return torch.minimum(t, s).sum(-1)
    m = beta * t + (1 - beta) * s
    log_m = m.masked_fill(m == 0, 1).log()
    of_teacher = kl(t, log_t, log_m)
    return of_teacher if kind == "skewed_kl" else beta * of_teacher + (1 - beta) * kl(s, log_s, log_m)


def differentiable_rows(
    z_student: Tensor,  # (n, V): final logits, before the divergence's temperature
    z_teacher: Tensor,  # (n, V)
    ids: Tensor | None,  # (n,)
    *,
    kind: str,
    beta: float,
    temperature: float,
    with_nll: bool,
) -> tuple[Tensor, Tensor | None]:
    """The divergence and ``−log p`` in plain PyTorch, which has every derivative."""
    skip = None if ids is None else ids == -100
    if skip is not None:  # before, too: a bias of −∞ may make them infinite, and 0 times that is nan
        z_student, z_teacher = (z.masked_fill(skip[:, None], 0) for z in (z_student, z_teacher))
    log_s, log_t = ((z / temperature).log_softmax(-1) for z in (z_student, z_teacher))
    value = of_log_probs(log_s, log_t, kind, beta)
    nll = None
    if with_nll and ids is not None:
        y = ids.clamp(0, z_student.shape[1] - 1)
        nll = -z_student.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    if skip is not None:
        value, nll = value.masked_fill(skip, 0), None if nll is None else nll.masked_fill(skip, 0)
    return value, nll

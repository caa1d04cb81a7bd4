"""Divergence between rows of two logits, and its gradient, a chunk of rows at a time. See ``kernels/divergence_rows.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import statistics_dtype, wide_dtype
from .softmax_rows import floor, row_chunks, transform

G_WEIGHED = ("forward_kl", "cross_entropy")
H_WEIGHED = ("reverse_kl",)


def excess(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """``a r − a + b ≥ 0`` for ``b = a exp(−r)``."""
    near = 0.25 if r.dtype == torch.float32 else 0.02  # where the polynomial is exact to the dtype
    polynomial = r / -5040
    for factorial in (720, 120, 24, 6, 2):
        polynomial = polynomial.add_(1 / factorial).mul_(-r)
    far = (r - 1).mul_(a).add_(b).clamp_(min=0)
    value = torch.where(r.abs() < near, polynomial.mul_(-r).mul_(a), far)
    return torch.where(a == 0, b, value)


def of_kind(
    s: Tensor, t: Tensor, log_s: Tensor, log_t: Tensor, beta: float, kind: str, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Element by element: the term of the divergence, and of g and h those wanted, each up to a constant of the row and 0 at
    probability 0; ``s g`` instead of g for the kinds in ``G_WEIGHED``, ``t h`` instead of h for those in ``H_WEIGHED``."""
    of_student, of_teacher = wanted
    g = h = None
    if kind == "cross_entropy":
        infinite = log_s == -math.inf
        minus_log_s = -log_s.masked_fill(infinite, 0)
        g = -t.masked_fill(infinite, 0) if of_student else None
        h = minus_log_s.masked_fill(t == 0, 0) if of_teacher else None
        return t * minus_log_s, g, h
    d = (log_t - log_s).masked_fill_((s == 0) & (t == 0), 0)
    if kind == "tvd":
        h = d.sign().mul_(0.5)
        return _difference(s, t, d)[0].abs_().mul_(0.5), -h, h
    if kind == "forward_kl":
        g = -_difference(s, t, d)[0] if of_student else None
        h = d.masked_fill(t == 0, 0) if of_teacher else None
        return excess(t, s, d), g, h
    if kind == "reverse_kl":
        g = -d.masked_fill(s == 0, 0) if of_student else None
        h = _difference(s, t, d)[0] if of_teacher else None
        return excess(s, t, -d), g, h
    difference, w, teacher_larger = _difference(s, t, d)
    m = beta * t + (1 - beta) * s
    larger = (
        torch.where(teacher_larger, (1 - beta) * w, beta * w).log1p_().neg_()
    )  # log of the larger of t and s, over m
    t_over_m = torch.where(teacher_larger, larger, d + larger)
    if kind == "skewed_kl":
        if of_student:
            g = ((beta - 1) * (t / m)).masked_fill_(s == 0, 0)
        if of_teacher:
            h = (t_over_m - beta * (1 - beta) * difference.div_(m)).masked_fill_(t == 0, 0)
        return excess(t, m, t_over_m), g, h
    s_over_m = torch.where(teacher_larger, larger - d, larger)
    value = beta * excess(t, m, t_over_m) + (1 - beta) * excess(s, m, s_over_m)
    g = s_over_m.mul_(1 - beta).masked_fill_(s == 0, 0) if of_student else None
    h = t_over_m.mul_(beta).masked_fill_(t == 0, 0) if of_teacher else None
    return value, g, h


def _difference(s: Tensor, t: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``t − s``, and what it is made of: ``expm1(−|d|)``, and where ``t > s``."""
    teacher_larger = d > 0
    w = d.abs().neg_().expm1_()
    return torch.where(teacher_larger, -t, s).mul_(w), w, teacher_larger


def _log_softmax(z: Tensor, temperature: float, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of rows ``(n, V)``; and each row's maximum and the log of its sum ``(n, 1)``, unless they are known,
    ``(2, n)``."""
    z = z if temperature == 1 else z / temperature
    if known is None:
        largest = z.amax(-1, keepdim=True).clamp_(min=floor(z.dtype))
        shifted = z - largest
        log_total = shifted.exp().sum(-1, keepdim=True).to(wide_dtype(z.device)).log_()
    else:
        largest, log_total = known[0, :, None].to(z.dtype), known[1, :, None]
        shifted = z - largest
    hi = log_total.to(z.dtype)
    return shifted.sub_(hi).sub_((log_total - hi).to(z.dtype)), largest, log_total


def _slope_sum(slope: Tensor, p: Tensor, weighed: bool) -> Tensor:
    """``Σ p g`` from g, or from ``p g``."""
    return (slope if weighed else p * slope).sum(-1, keepdim=True)


def _gradient(slope: Tensor, p: Tensor, mean: Tensor, soft: Tensor, weighed: bool) -> Tensor:
    """``soft·p_j (g_j − Σ p g)`` from g, or from ``p g``."""
    dz = slope - p * mean if weighed else p * (slope - mean)
    return dz.mul_(soft).masked_fill_(mean.isinf(), 0)  # an infinite divergence has no slope there


def divergence_rows(
    student: Tensor,  # (B, ≥ V, S), any strides
    teacher: Tensor,  # (B, ≥ V, S), any strides; V is the smaller of the two sizes
    ids: Tensor | None,  # (N,) int64; rows whose id is −100 are not read and give 0
    student_temperature: Tensor | None,  # (N,)
    teacher_temperature: Tensor | None,  # (N,)
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,  # of the divergence, after all else; the labels' loss does not see it
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    labels: bool = False,  # also return −log p of the student at ids
    soft: Tensor | None = None,  # (N,) what the gradients of the divergence are multiplied by
    hard: Tensor | None = None,  # (N,) and those of −log p
    d_student: Tensor | None = None,  # (B, V, S) to write the gradient to; may be student itself
    d_teacher: Tensor | None = None,  # (B, V, S)
    # For a slice of the vocabulary; "normalizers" and "sums" write what is the slice's, "gradients" takes those of the whole
    step: str = "all",
    normalizers: Tensor
    | None = None,  # (4, N) float64: largest logit and log Σ exp(z − largest) of the student, then of
    # the teacher, over the temperature; (6, N) with labels and a temperature: then of the student at temperature 1
    sums: Tensor
    | None = None,  # (4, N) float64: divergence, −log p at the slice's ids, Σ p g of the student, Σ p h of the
    # teacher
    slopes: tuple[bool, bool] = (False, False),  # which of the last two to make
) -> tuple[Tensor | None, Tensor | None]:
    V = min(student.shape[1], teacher.shape[1])
    N, dtype = student.shape[0] * student.shape[2], statistics_dtype(student.dtype)
    divergence = student.new_empty(N, dtype=dtype) if step == "all" else None
    nll = student.new_empty(N, dtype=dtype) if labels and step == "all" else None
    wanted = (d_student is not None or slopes[0], d_teacher is not None or slopes[1])
    if V == 0:  # a slice of nothing
        if step == "normalizers" and normalizers is not None:
            normalizers[::2], normalizers[1::2] = floor(dtype), -math.inf
        elif step == "sums" and sums is not None:
            sums.zero_()
        return divergence, nll

    def of(x: Tensor | None, rows: slice) -> Tensor | None:
        return None if x is None else x[..., rows]

    for rows, s_rows, t_rows, s_out, t_out in row_chunks(student[:, :V], teacher[:, :V], d_student, d_teacher):
        skip = None if ids is None else (ids[rows] == -100)[:, None]
        z_s, s_slope = transform(
            s_rows.reshape(-1, V).to(dtype), of(student_temperature, rows), student_scale, student_softcap
        )
        z_t, t_slope = transform(
            t_rows.reshape(-1, V).to(dtype), of(teacher_temperature, rows), teacher_scale, teacher_softcap
        )
        known = of(normalizers, rows) if step in ("sums", "gradients") else None
        log_s, s_largest, s_log_total = _log_softmax(z_s, temperature, None if known is None else known[:2])
        log_t, t_largest, t_log_total = _log_softmax(z_t, temperature, None if known is None else known[2:4])
        del z_t
        if step == "normalizers":
            assert normalizers is not None
            found = [s_largest, s_log_total, t_largest, t_log_total]
            if labels and temperature != 1:
                found += _log_softmax(z_s, 1)[1:]
            for room, value in zip(normalizers, found, strict=True):
                room[rows] = value.squeeze(-1)
            continue
        s, t = log_s.exp(), log_t.exp()
        value, g, h = of_kind(s, t, log_s, log_t, beta, kind, wanted)
        total = value.sum(-1)
        del log_s, log_t, value
        p = s
        if labels and ids is not None:
            if temperature != 1:
                log_p, s_largest, s_log_total = _log_softmax(z_s, 1, None if known is None else known[4:])
                p = log_p.exp_()
            y = ids[rows, None]
            inside = (y >= 0) & (y < V)
            at_label = s_log_total - (z_s.gather(-1, y.clamp(0, V - 1)) - s_largest)
            at_label = at_label.masked_fill(~inside, 0).squeeze(-1)
        if step != "gradients":
            total = total if skip is None else total.masked_fill(skip[:, 0], 0)
            if divergence is not None:
                divergence[rows] = total
            if nll is not None:
                nll[rows] = at_label.to(dtype)
        if step == "sums":
            assert sums is not None
            sums[0, rows] = total.to(sums.dtype)
            if labels:
                sums[1, rows] = at_label
            for room, slope, weights, weighed in (
                (sums[2], g, s, kind in G_WEIGHED),
                (sums[3], h, t, kind in H_WEIGHED),
            ):
                if slope is not None:
                    room[rows] = _slope_sum(slope, weights, weighed).squeeze(-1).to(sums.dtype)
            del slope, weights
        if s_out is not None:
            assert soft is not None
            assert g is not None
            weighed = kind in G_WEIGHED
            mean = _slope_sum(g, s, weighed) if sums is None else sums[2, rows, None].to(dtype)
            dz = _gradient(g, s, mean, soft[rows, None] / temperature, weighed)
            if hard is not None and ids is not None:
                dz += hard[rows, None] * p
                dz.scatter_add_(-1, y.clamp(0, V - 1), -hard[rows, None].masked_fill(~inside, 0))
            dz *= s_slope
            s_out.copy_((dz if skip is None else dz.masked_fill_(skip, 0)).view(s_out.shape))
            del dz
        if t_out is not None:
            assert soft is not None
            assert h is not None
            weighed = kind in H_WEIGHED
            mean = _slope_sum(h, t, weighed) if sums is None else sums[3, rows, None].to(dtype)
            dz = _gradient(h, t, mean, soft[rows, None] / temperature, weighed).mul_(t_slope)
            t_out.copy_((dz if skip is None else dz.masked_fill_(skip, 0)).view(t_out.shape))
            del dz
        del z_s, s, t, p, g, h  # the next chunk needs their room
    return divergence, nll


def whole_normalizers(of_slices: Tensor) -> Tensor:
    """The normalizers of rows ``(4 or 6, N)`` from those of their slices ``(R, 4 or 6, N)``."""
    largest, log_total = of_slices[:, ::2], of_slices[:, 1::2]
    whole = torch.empty_like(of_slices[0])
    whole[::2] = largest.amax(0)
    whole[1::2] = (log_total.exp() * (largest - whole[::2]).exp()).sum(0).log()
    return whole


def differentiable_rows(
    z_student: Tensor,  # (n, V): final logits but for the temperature
    z_teacher: Tensor,  # (n, V)
    ids: Tensor | None,  # (n,)
    *,
    kind: str,
    beta: float,
    temperature: float,
    labels: bool,
) -> tuple[Tensor, Tensor | None]:
    """The divergence and ``−log p`` as plain PyTorch, for any derivative."""
    skip = None if ids is None else ids == -100
    if skip is not None:
        z_student, z_teacher = (z.masked_fill(skip[:, None], 0) for z in (z_student, z_teacher))
    log_s, log_t = ((z / temperature).log_softmax(-1) for z in (z_student, z_teacher))
    s, t = log_s.exp(), log_t.exp()

    def finite(log_p: Tensor, p: Tensor) -> Tensor:
        return log_p.masked_fill(p == 0, 0)

    def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (p * (finite(log_p, p) - finite(log_q, p))).sum(-1)

    if kind == "forward_kl":
        value = kl(t, log_t, log_s)
    elif kind == "reverse_kl":
        value = kl(s, log_s, log_t)
    elif kind == "cross_entropy":
        value = -(t * log_s.masked_fill(log_s == -math.inf, 0)).sum(-1)
    elif kind == "tvd":
        value = 0.5 * (t - s).abs().sum(-1)
    else:
        m = beta * t + (1 - beta) * s
        log_m = m.masked_fill(m == 0, 1).log()
        value = kl(t, log_t, log_m)
        if kind == "jsd":
            value = beta * value + (1 - beta) * kl(s, log_s, log_m)
    nll = None
    if labels and ids is not None:
        y = ids.clamp(0, z_student.shape[1] - 1)
        nll = -z_student.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    if skip is not None:
        value, nll = value.masked_fill(skip, 0), None if nll is None else nll.masked_fill(skip, 0)
    return value, nll

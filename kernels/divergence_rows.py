"""Divergence between two rows of logits, and its gradient in both, read from memory once and from cache after.

With ``t`` the teacher's and ``s`` the student's probabilities, ``m = β t + (1 − β) s`` and ``d = log t − log s``, one number
per row:

    forward_kl  Σ t log(t/s)            reverse_kl  Σ s log(s/t)          skewed_kl  Σ t log(t/m)
    jsd         β Σ t log(t/m) + (1 − β) Σ s log(s/m)                     tvd        ½ Σ |t − s|
    cross_entropy  −Σ t log s over the entries whose student logit is finite

One program per row goes over it twice, three times with gradients: both maxima and sums; then the divergence and the mean
slope of either side; then the gradients, ``s_j (g_j − Σ s g)`` and ``t_j (h_j − Σ t h)`` with ``g = ∂/∂s`` and ``h = ∂/∂t``.
Where ranks share the vocabulary these are three steps, and between them the ranks put together what each found in its slice.

Never negative, and accurate where ``t ≈ s``, by what is summed: ``Σ a log(a/b)`` as ``Σ (a r − a + b)`` with ``r = log(a/b)``,
the same number since both rows sum to 1. Each term is ≥ 0 (clamped there against its rounding), a polynomial in r near 0, and
an error in a row's logsumexp cancels to first order. ``t − s`` is ``max(t, s)·expm1(∓|d|)``, and ``log(t/m)``, ``log(s/m)`` are
``log1p`` of ``expm1(−|d|)``, so that none of them is a difference of nearly equal numbers.

An entry that is −inf on both sides counts as equal; −inf on one side gives 0·(−inf) = 0, or an infinite KL where the other
side has mass there, whose gradient in the row with the mass is then 0.

Bytes per row of V logits, b and c bytes each: V·(b + c) read, and as much written with both gradients; the later passes
find the row in L2.
"""

import torch
import triton
import triton.language as tl

from .common import FLOOR, SKIP, exp, final_logits, final_logits_slope
from .configurations import divergence_rows_config, on_its_device

NEAR = tl.constexpr(0.25)  # where the polynomials below are exact to fp32


@triton.jit
def _expm1_of_negative(x):
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -NEAR, near, tl.exp(x) - 1)


@triton.jit
def _log1p_of_negative(y, one_plus_y):
    # 2 artanh(y/(2 + y)); from −¼ down log has nothing to cancel, and near −1 nothing is left of y.
    w = y / (2 + y)
    square = w * w
    near = 2 * w * (1 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9)))))
    return tl.where(y > -NEAR, near, tl.log(one_plus_y))


@triton.jit
def _excess(a, b, r):
    """``a r − a + b ≥ 0`` for ``b = a exp(−r)``."""
    near = a * r * r * (1.0 / 2 - r * (1.0 / 6 - r * (1.0 / 24 - r * (1.0 / 120 - r * (1.0 / 720 - r * (1.0 / 5040))))))
    far = tl.maximum(a * (r - 1) + b, 0.0)
    return tl.where(a == 0, b, tl.where(tl.abs(r) < NEAR, near, far))


@triton.jit
def _of_kind(s, t, log_s, log_t, beta, KIND: tl.constexpr):
    """Element by element: the term of the divergence, and g and h, each up to a constant of the row and 0 at probability 0;
    as ``s g`` or ``t h`` where :func:`_gradient` is told so."""
    d = tl.where((s == 0) & (t == 0), 0.0, log_t - log_s)
    w = _expm1_of_negative(-tl.abs(d))
    difference = tl.where(d > 0, -t, s) * w  # t − s
    if KIND == "forward_kl":
        value = _excess(t, s, d)
        g = -difference
        h = tl.where(t == 0, 0.0, d)
    if KIND == "reverse_kl":
        value = _excess(s, t, -d)
        g = tl.where(s == 0, 0.0, -d)
        h = difference
    if KIND == "cross_entropy":
        finite = log_s != float("-inf")
        value = tl.where(finite, -t * log_s, 0.0)
        g = tl.where(finite, -t, 0.0)
        h = tl.where(finite & (t > 0), -log_s, 0.0)
    if KIND == "tvd":
        value = 0.5 * tl.abs(difference)
        h = tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, d))  # d is 0 or nan
        g = -h
    if KIND == "jsd" or KIND == "skewed_kl":
        m = beta * t + (1 - beta) * s
        E = tl.exp(-tl.abs(d))  # the smaller of t and s over the larger
        over = tl.where(d > 0, beta + (1 - beta) * E, (1 - beta) + beta * E)
        larger = -_log1p_of_negative(tl.where(d > 0, 1 - beta, beta) * w, over)  # log of the larger of t and s, over m
        t_over_m = tl.where(d > 0, larger, d + larger)
        s_over_m = tl.where(d > 0, larger - d, larger)
        if KIND == "jsd":
            value = beta * _excess(t, m, t_over_m) + (1 - beta) * _excess(s, m, s_over_m)
            g = tl.where(s == 0, 0.0, (1 - beta) * s_over_m)
            h = tl.where(t == 0, 0.0, beta * t_over_m)
        else:
            value = _excess(t, m, t_over_m)
            g = tl.where(m == 0, 0.0, (beta - 1) * (t / m))
            h = tl.where((t == 0) | (m == 0), 0.0, t_over_m - beta * (1 - beta) * (difference / m))
    return value, g, h


@triton.jit
def _weighed(slope, p, WEIGHED: tl.constexpr):
    return slope if WEIGHED else p * slope


@triton.jit
def _gradient(slope, p, mean, WEIGHED: tl.constexpr):
    """``p_j (g_j − Σ p g)`` from g, or from ``p g``."""
    return slope - p * mean if WEIGHED else p * (slope - mean)


@triton.jit
def _final(x, scale, softcap, row_temperature, HAS_SOFTCAP: tl.constexpr, HAS_ROW_TEMPERATURE: tl.constexpr):
    z = final_logits(x, scale, softcap, HAS_SOFTCAP)
    if HAS_ROW_TEMPERATURE:
        z = z / row_temperature
    return z


@triton.jit
def _over(z, temperature, HAS_TEMPERATURE: tl.constexpr):
    if HAS_TEMPERATURE:
        z = z / temperature
    return z


@triton.jit
def _advance(z, largest, total, LANES: tl.constexpr, VEC: tl.constexpr):
    """Take a tile ``(BLOCK_V,)`` into each lane's maximum and sum of exponentials."""
    z = tl.reshape(z, (LANES, VEC))
    now = tl.maximum(largest, tl.max(z, 1))
    total = total * exp(largest - now) + tl.sum(exp(z - now[:, None]), 1)
    return now, total


@triton.jit
def _meet(largest, total):
    """The lanes' maxima and sums become the row's maximum and the logarithm of its sum, in float64."""
    row_largest = tl.max(largest, 0)
    return row_largest, tl.log(tl.sum((total * exp(largest - row_largest)).to(tl.float64), 0))


@triton.jit
def _folded(x, LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.sum(tl.reshape(x, (LANES, VEC)), 1)


@triton.jit
def _mean_slope(total):
    """``Σ p g`` of a row, and whether it is infinite, as the divergence then is."""
    slope = total.to(tl.float32)
    return slope, tl.abs(slope) == float("inf")


@triton.jit
def _divergence_rows_kernel(
    student_ptr,  # (B, ≥ V, S)
    teacher_ptr,  # (B, ≥ V, S)
    ids_ptr,  # (N,) int64
    student_temperature_ptr,  # (N,)
    teacher_temperature_ptr,  # (N,)
    soft_ptr,  # (N,)
    hard_ptr,  # (N,)
    divergence_ptr,  # (N,)
    nll_ptr,  # (N,)
    normalizers_ptr,  # (4 or 6, N) float64
    sums_ptr,  # (4, N) float64
    d_student_ptr,  # (B, V, S), may be student_ptr: each element is read by the lane that writes it
    d_teacher_ptr,  # (B, V, S), may be teacher_ptr
    V,
    S,
    student_stride_b,
    student_stride_v,
    student_stride_s,
    teacher_stride_b,
    teacher_stride_v,
    teacher_stride_s,
    d_student_stride_b,
    d_student_stride_v,
    d_student_stride_s,
    d_teacher_stride_b,
    d_teacher_stride_v,
    d_teacher_stride_s,
    temperature,
    beta,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    STEP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_HARD: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_STUDENT_TEMPERATURE: tl.constexpr,
    HAS_TEACHER_TEMPERATURE: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    D_STUDENT: tl.constexpr,
    D_TEACHER: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK_V // VEC
    G_WEIGHED: tl.constexpr = KIND == "forward_kl" or KIND == "cross_entropy"
    H_WEIGHED: tl.constexpr = KIND == "reverse_kl"
    row, N = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    y = row
    if HAS_IDS:
        y = tl.load(ids_ptr + row)
    active = y != SKIP
    b, at = row // S, row % S
    student_row = student_ptr + b * student_stride_b + at * student_stride_s
    teacher_row = teacher_ptr + b * teacher_stride_b + at * teacher_stride_s
    student_temperature = 1.0
    teacher_temperature = 1.0
    if HAS_STUDENT_TEMPERATURE:
        student_temperature = tl.load(student_temperature_ptr + row).to(tl.float32)
    if HAS_TEACHER_TEMPERATURE:
        teacher_temperature = tl.load(teacher_temperature_ptr + row).to(tl.float32)

    v_end = tl.where(active, V, 0)  # a skipped row reads nothing
    if STEP == "sums" or STEP == "gradients":
        s_max = tl.load(normalizers_ptr + row).to(tl.float32)
        s_log_total = tl.load(normalizers_ptr + N + row)
        t_max = tl.load(normalizers_ptr + 2 * N + row).to(tl.float32)
        t_log_total = tl.load(normalizers_ptr + 3 * N + row)
        hard_max, hard_log_total = s_max, s_log_total
        if HAS_HARD and HAS_TEMPERATURE:
            hard_max = tl.load(normalizers_ptr + 4 * N + row).to(tl.float32)
            hard_log_total = tl.load(normalizers_ptr + 5 * N + row)
    else:
        s_largest = tl.full((LANES,), FLOOR, tl.float32)
        t_largest = tl.full((LANES,), FLOOR, tl.float32)
        hard_largest = tl.full((LANES,), FLOOR, tl.float32)
        s_total = tl.zeros((LANES,), tl.float32)
        t_total = tl.zeros((LANES,), tl.float32)
        hard_total = tl.zeros((LANES,), tl.float32)  # of the student at temperature 1
        for v_start in range(0, v_end, BLOCK_V):
            v = (v_start + tl.arange(0, BLOCK_V)).to(tl.int64)
            inside = v < V
            x = tl.load(student_row + v * student_stride_v, mask=inside, other=0.0).to(tl.float32)
            z = _final(
                x, student_scale, student_softcap, student_temperature, HAS_STUDENT_SOFTCAP, HAS_STUDENT_TEMPERATURE
            )
            z = tl.where(inside, z, float("-inf"))
            if HAS_HARD and HAS_TEMPERATURE:
                hard_largest, hard_total = _advance(z, hard_largest, hard_total, LANES, VEC)
            s_largest, s_total = _advance(_over(z, temperature, HAS_TEMPERATURE), s_largest, s_total, LANES, VEC)
            x = tl.load(teacher_row + v * teacher_stride_v, mask=inside, other=0.0).to(tl.float32)
            z = _final(
                x, teacher_scale, teacher_softcap, teacher_temperature, HAS_TEACHER_SOFTCAP, HAS_TEACHER_TEMPERATURE
            )
            z = tl.where(inside, _over(z, temperature, HAS_TEMPERATURE), float("-inf"))
            t_largest, t_total = _advance(z, t_largest, t_total, LANES, VEC)
        s_max, s_log_total = _meet(s_largest, s_total)
        t_max, t_log_total = _meet(t_largest, t_total)
        hard_max, hard_log_total = s_max, s_log_total
        if HAS_HARD and HAS_TEMPERATURE:
            hard_max, hard_log_total = _meet(hard_largest, hard_total)
    if STEP == "normalizers":
        tl.store(normalizers_ptr + row, s_max.to(tl.float64))
        tl.store(normalizers_ptr + N + row, s_log_total)
        tl.store(normalizers_ptr + 2 * N + row, t_max.to(tl.float64))
        tl.store(normalizers_ptr + 3 * N + row, t_log_total)
        if HAS_HARD and HAS_TEMPERATURE:
            tl.store(normalizers_ptr + 4 * N + row, hard_max.to(tl.float64))
            tl.store(normalizers_ptr + 5 * N + row, hard_log_total)
    s_hi = s_log_total.to(tl.float32)
    s_lo = (s_log_total - s_hi.to(tl.float64)).to(tl.float32)
    t_hi = t_log_total.to(tl.float32)
    t_lo = (t_log_total - t_hi.to(tl.float64)).to(tl.float32)

    if STEP == "gradients":
        s_slope = tl.load(sums_ptr + 2 * N + row)
        t_slope = tl.load(sums_ptr + 3 * N + row)
    if STEP == "all" or STEP == "sums":
        values = tl.zeros((LANES,), tl.float32)
        s_slopes = tl.zeros((LANES,), tl.float32)
        t_slopes = tl.zeros((LANES,), tl.float32)
        for v_start in range(0, v_end, BLOCK_V):
            v = (v_start + tl.arange(0, BLOCK_V)).to(tl.int64)
            inside = v < V
            x = tl.load(student_row + v * student_stride_v, mask=inside, other=0.0).to(tl.float32)
            z = _final(
                x, student_scale, student_softcap, student_temperature, HAS_STUDENT_SOFTCAP, HAS_STUDENT_TEMPERATURE
            )
            log_s = tl.where(inside, ((_over(z, temperature, HAS_TEMPERATURE) - s_max) - s_hi) - s_lo, float("-inf"))
            x = tl.load(teacher_row + v * teacher_stride_v, mask=inside, other=0.0).to(tl.float32)
            z = _final(
                x, teacher_scale, teacher_softcap, teacher_temperature, HAS_TEACHER_SOFTCAP, HAS_TEACHER_TEMPERATURE
            )
            log_t = tl.where(inside, ((_over(z, temperature, HAS_TEMPERATURE) - t_max) - t_hi) - t_lo, float("-inf"))
            s = tl.exp(log_s)
            t = tl.exp(log_t)
            value, g, h = _of_kind(s, t, log_s, log_t, beta, KIND)
            values += _folded(value, LANES, VEC)
            if D_STUDENT:
                s_slopes += _folded(_weighed(g, s, G_WEIGHED), LANES, VEC)
            if D_TEACHER:
                t_slopes += _folded(_weighed(h, t, H_WEIGHED), LANES, VEC)
        divergence = tl.sum(values.to(tl.float64), 0)
        s_slope = tl.sum(s_slopes.to(tl.float64), 0)
        t_slope = tl.sum(t_slopes.to(tl.float64), 0)
        if STEP == "all":
            tl.store(divergence_ptr + row, tl.where(active, divergence.to(tl.float32), 0.0))
        else:
            tl.store(sums_ptr + row, tl.where(active, divergence, 0.0))
            tl.store(sums_ptr + 2 * N + row, s_slope)
            tl.store(sums_ptr + 3 * N + row, t_slope)
        if HAS_HARD:
            found = (y >= 0) & (y < V)
            x_y = tl.load(student_row + y * student_stride_v, mask=found, other=0.0).to(tl.float32)
            z_y = _final(
                x_y, student_scale, student_softcap, student_temperature, HAS_STUDENT_SOFTCAP, HAS_STUDENT_TEMPERATURE
            )
            nll = hard_log_total - (z_y - hard_max).to(tl.float64)
            if STEP == "all":
                tl.store(nll_ptr + row, tl.where(found, nll.to(tl.float32), 0.0))
            else:
                tl.store(sums_ptr + N + row, tl.where(found, nll, 0.0))

    if (D_STUDENT or D_TEACHER) and (STEP == "all" or STEP == "gradients"):
        soft = tl.load(soft_ptr + row) / temperature
        s_mean, s_infinite = _mean_slope(s_slope)
        t_mean, t_infinite = _mean_slope(t_slope)
        hard = 0.0
        hard_hi = hard_log_total.to(tl.float32)
        hard_lo = (hard_log_total - hard_hi.to(tl.float64)).to(tl.float32)
        if HAS_HARD:
            hard = tl.load(hard_ptr + row)
        for v_start in range(0, V, BLOCK_V):
            v = (v_start + tl.arange(0, BLOCK_V)).to(tl.int64)
            inside = v < V
            read = inside & active
            x_s = tl.load(student_row + v * student_stride_v, mask=read, other=0.0).to(tl.float32)
            z_s = _final(
                x_s, student_scale, student_softcap, student_temperature, HAS_STUDENT_SOFTCAP, HAS_STUDENT_TEMPERATURE
            )
            log_s = ((_over(z_s, temperature, HAS_TEMPERATURE) - s_max) - s_hi) - s_lo
            x_t = tl.load(teacher_row + v * teacher_stride_v, mask=read, other=0.0).to(tl.float32)
            z_t = _final(
                x_t, teacher_scale, teacher_softcap, teacher_temperature, HAS_TEACHER_SOFTCAP, HAS_TEACHER_TEMPERATURE
            )
            log_t = ((_over(z_t, temperature, HAS_TEMPERATURE) - t_max) - t_hi) - t_lo
            s = tl.exp(log_s)
            t = tl.exp(log_t)
            value, g, h = _of_kind(s, t, log_s, log_t, beta, KIND)
            if D_STUDENT:
                dz = tl.where(s_infinite, 0.0, soft * _gradient(g, s, s_mean, G_WEIGHED))
                if HAS_HARD:
                    p = s
                    if HAS_TEMPERATURE:
                        p = tl.exp(((z_s - hard_max) - hard_hi) - hard_lo)
                    dz += hard * (p - tl.where(v == y, 1.0, 0.0))
                slope = final_logits_slope(x_s, student_scale, student_softcap, HAS_STUDENT_SOFTCAP)
                dx = tl.where(active, dz * (slope / student_temperature), 0.0)
                out = d_student_ptr + b * d_student_stride_b + at * d_student_stride_s + v * d_student_stride_v
                tl.store(out, dx.to(d_student_ptr.dtype.element_ty), mask=inside)
            if D_TEACHER:
                dz = tl.where(t_infinite, 0.0, soft * _gradient(h, t, t_mean, H_WEIGHED))
                slope = final_logits_slope(x_t, teacher_scale, teacher_softcap, HAS_TEACHER_SOFTCAP)
                dx = tl.where(active, dz * (slope / teacher_temperature), 0.0)
                out = d_teacher_ptr + b * d_teacher_stride_b + at * d_teacher_stride_s + v * d_teacher_stride_v
                tl.store(out, dx.to(d_teacher_ptr.dtype.element_ty), mask=inside)


@on_its_device
def divergence_rows(
    student,  # (B, ≥ V, S), any strides
    teacher,  # (B, ≥ V, S), any strides; V is the smaller of the two sizes
    ids,  # (N,) int64 or None; rows whose id is −100 are not read and give 0
    student_temperature,  # (N,) or None
    teacher_temperature,  # (N,) or None
    *,
    kind,
    beta=0.5,
    temperature=1.0,  # of the divergence, after all else; −log p does not see it
    student_scale=1.0,
    student_softcap=None,
    teacher_scale=1.0,
    teacher_softcap=None,
    with_nll=False,  # also return −log p of the student at ids
    soft=None,  # (N,) what the gradients of the divergence are multiplied by
    hard=None,  # (N,) and those of −log p
    d_student=None,  # (B, V, S) to write the gradient to; may be student itself
    d_teacher=None,  # (B, V, S)
    # For a slice of the vocabulary; "normalizers" and "sums" write what is the slice's, "gradients" takes those of the whole
    step="all",
    normalizers=None,  # (4, N) float64: largest logit and log Σ exp(z − largest) of the student, then of the teacher, over
    # the temperature; (6, N) with −log p and a temperature: then of the student at temperature 1
    sums=None,  # (4, N) float64: divergence, −log p at the slice's ids, Σ p g of the student, Σ p h of the teacher
    slopes=(False, False),  # which of the last two to make
):
    B, V, S = student.shape[0], min(student.shape[1], teacher.shape[1]), student.shape[2]
    N = B * S
    divergence = student.new_empty(N, dtype=torch.float32) if step == "all" else None
    nll = student.new_empty(N, dtype=torch.float32) if with_nll and step == "all" else None
    if N == 0:
        return divergence, nll
    if kind == "jsd":
        beta = min(beta, 1 - 2**-24)  # in fp32 too the student has a share of the mixture
    BLOCK_V, VEC, num_warps = divergence_rows_config()
    _divergence_rows_kernel[(N,)](
        student,
        teacher,
        ids,
        student_temperature,
        teacher_temperature,
        soft,
        hard,
        divergence,
        nll,
        normalizers,
        sums,
        d_student,
        d_teacher,
        V,
        S,
        *student.stride(),
        *teacher.stride(),
        *(student if d_student is None else d_student).stride(),
        *(teacher if d_teacher is None else d_teacher).stride(),
        temperature,
        beta,
        student_scale,
        student_softcap or 1.0,
        teacher_scale,
        teacher_softcap or 1.0,
        STEP=step,
        KIND=kind,
        HAS_IDS=ids is not None,
        HAS_HARD=with_nll,
        HAS_TEMPERATURE=temperature != 1.0,
        HAS_STUDENT_TEMPERATURE=student_temperature is not None,
        HAS_TEACHER_TEMPERATURE=teacher_temperature is not None,
        HAS_STUDENT_SOFTCAP=student_softcap is not None,
        HAS_TEACHER_SOFTCAP=teacher_softcap is not None,
        D_STUDENT=d_student is not None or slopes[0],
        D_TEACHER=d_teacher is not None or slopes[1],
        BLOCK_V=BLOCK_V,
        VEC=VEC,
        num_warps=num_warps,
    )
    return divergence, nll

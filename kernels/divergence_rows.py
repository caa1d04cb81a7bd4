"""Divergence between two rows of logits, and its gradient in both.

With ``t`` the teacher's and ``s`` the student's probabilities, ``m = β t + (1 − β) s`` and ``d = log t − log s``, one number
per row:

    forward_kl  Σ t log(t/s)            reverse_kl  Σ s log(s/t)          skewed_kl  Σ t log(t/m)
    jsd         β Σ t log(t/m) + (1 − β) Σ s log(s/m)                     tvd        ½ Σ |t − s|
    cross_entropy  −Σ t log s over the entries whose student logit is finite                 overlap    Σ min(t, s)

One program per row makes two passes over it, three with gradients: first both maxima and sums; then the divergence and the mean
slope of each side; then the gradients, ``s_j (g_j − Σ s g)`` and ``t_j (h_j − Σ t h)`` with ``g = ∂/∂s`` and ``h = ∂/∂t``. For
``forward_kl`` ``Σ s g`` is known in advance, so the student's gradient alone takes no third pass.
Where ranks share the vocabulary, these are three steps, between which the ranks combine the results of their slices.

In the code logarithms of probabilities and ``d`` are to base 2, as the hardware takes exponentials. Negation is written as
a multiplication by −1, which costs nothing, while Triton's ``−x`` costs a subtraction.

The divergence is never negative, and accurate where ``t ≈ s``, because ``Σ a log(a/b)`` is summed as ``Σ (a r − a + b)`` with
``r = log(a/b)``, the same number since both rows sum to 1. Each term is ≥ 0, and an error in a row's logsumexp cancels to
first order; in ``jsd`` so does one in ``log m``. The logarithm of ``m`` over the larger of t and s, and ``d``, give
``log(m/t)`` and ``log(m/s)`` without a difference of nearly equal numbers, for values and gradients alike.

An entry that is −inf on both sides counts as equal. −inf on one side gives 0·(−inf) = 0, or an infinite KL if the other
side has mass there; the gradient of the side with the mass is then 0 in that row.

Bytes per row of V logits, b and c bytes each: each pass reads V·(b + c), except what L2 still holds from the pass before; both
gradients together write as much.
"""

import torch
import triton
import triton.language as tl

from .common import FLOOR, SKIP, exp, final_logits, final_logits_and_slope, row_scales
from .configurations import divergence_rows_config, loaded_singly, on_its_device

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FARTHEST = tl.constexpr(100.0)  # for a larger |d| the smaller of t and s is negligible


@triton.jit
def _log2(x):
    """log2 of a normal positive x, in fewer instructions than ``tl.log2``; the polynomial's relative error is 3e-8."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # times 2²³; √½ ≤ 1 + f < √2
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1
    p = 0.28791624 + f * (-0.23894483 + f * (0.2157156 + f * (-0.20726973 + f * 0.12583701)))
    p = 1.442695 + f * (-0.72134733 + f * (0.48091063 + f * (-0.36070368 + f * p)))
    return exponent.to(tl.float32) * 2**-23 + f * p


@triton.jit
def _excess(a, b, u):
    """``a log(a/b) − a + b ≥ 0`` for ``b = a 2ᵘ``; a polynomial (relative error 2e-8) where they are nearly equal."""
    near = a * u * u * (0.24022651 + u * (0.05550403 + u * (0.00961814 + u * (0.00133583 + u * 0.00015411))))
    far = b - a * (u * LN2 + 1)
    return tl.where(tl.abs(u) < 0.36, near, far)


@triton.jit
def _unless_none(p, x):
    """``x`` where p has mass, elsewhere a finite number, so that 0·∞ becomes 0."""
    return tl.where(p == 0, 1.0, x)


@triton.jit
def _apart(d):
    """``|d|``, but finite where one side is −inf, or where both are and d is nan."""
    return tl.where(tl.abs(d) < FARTHEST, tl.abs(d), FARTHEST)


@triton.jit
def _below_one(u):
    """``1 − 2⁻ᵘ`` for u ≥ 0; a polynomial (relative error 1e-8) where that is small."""
    near = u * (0.69314717 - u * (0.24022564 - u * (0.05549041 - u * (0.00954128 - u * 0.00115445))))
    return tl.where(u < 0.5, near, 1 - tl.exp2(u * -1.0))


@triton.jit
def _mixture(d, beta):
    """``log(m/s)`` and ``log(m/t)``, to base 2, then ``s/m`` and ``t/m``."""
    apart = _apart(d)
    ratio = tl.exp2(apart * -1.0)  # the smaller of s and t over the larger
    over = ratio + tl.where(d > 0, beta, 1 - beta) * (1 - ratio)  # m over the larger
    log_m_over_s = _log2(over) + tl.where(d > 0, apart, 0.0)
    log_m_over_t = _log2(over) + tl.where(d > 0, 0.0, apart)
    return log_m_over_s, log_m_over_t, tl.where(d > 0, ratio, 1.0) / over, tl.where(d > 0, 1.0, ratio) / over


@triton.jit
def _term(s, t, log_s, d, beta, KIND: tl.constexpr):
    """The terms of the divergence, elementwise."""
    if KIND == "forward_kl":
        value = _excess(t, s, _unless_none(t, d * -1.0))
    if KIND == "reverse_kl":
        value = _excess(s, t, _unless_none(s, d))
    if KIND == "cross_entropy":
        value = t * tl.where(log_s == float("-inf"), 0.0, log_s * -LN2)
    if KIND == "tvd":
        value = 0.5 * tl.maximum(s, t) * _below_one(_apart(d))
    if KIND == "overlap":
        value = tl.minimum(s, t)
    if KIND == "jsd" or KIND == "skewed_kl":
        m = beta * t + (1 - beta) * s
        log_m_over_s, log_m_over_t, _, _ = _mixture(d, beta)
        value = _excess(t, m, log_m_over_t)
        if KIND == "jsd":
            value = beta * value + (1 - beta) * _excess(s, m, log_m_over_s)
    return value


@triton.jit
def _slopes(s, t, log_s, d, beta, KIND: tl.constexpr):
    """g and h, elementwise, each up to a constant per row; or ``s g`` and ``t h`` for the kinds that the kernel marks so."""
    if KIND == "forward_kl":
        g = s - t
        h = _unless_none(t, d * LN2)
    if KIND == "reverse_kl":
        g = _unless_none(s, d * -LN2)
        h = t - s
    if KIND == "cross_entropy":
        g = tl.where(log_s == float("-inf"), 0.0, t * -1.0)
        h = tl.where(log_s == float("-inf"), 0.0, log_s * -LN2)
    if KIND == "tvd":
        h = tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, 0.0))
        g = -h
    if KIND == "overlap":  # 0 where the other is smaller: its mean is as small as the overlap
        g = tl.where(d > 0, 1.0, tl.where(d < 0, 0.0, 0.5))
        h = 1 - g
    if KIND == "jsd":
        log_m_over_s, log_m_over_t, _, _ = _mixture(d, beta)
        g = log_m_over_s * ((beta - 1) * LN2)
        h = log_m_over_t * (beta * -LN2)
    if KIND == "skewed_kl":
        _, log_m_over_t, s_over_m, t_over_m = _mixture(d, beta)
        g = (beta - 1) * t_over_m
        h = log_m_over_t * -LN2 + (1 - beta) * (s_over_m - 1)
    return g, h


@triton.jit
def _weighed(slope, p, WEIGHED: tl.constexpr):
    return slope if WEIGHED else p * slope


@triton.jit
def _by_lane(x, VEC: tl.constexpr, SINGLY: tl.constexpr):
    """A tile ``(BLOCK_V,)`` as ``(LANES, VEC)``: see :func:`~.common.by_lane`, which would take it as one row, and move that
    through shared memory (933 instructions for 561 in the first pass of ``forward_kl``, sm_90)."""
    if SINGLY:
        x = tl.trans(tl.reshape(x, (VEC, x.shape[0] // VEC)))
    else:
        x = tl.reshape(x, (x.shape[0] // VEC, VEC))
    return x


@triton.jit
def _advance(z, largest, total, VEC: tl.constexpr, SINGLY: tl.constexpr):
    """Update each lane's maximum and sum of exponentials with a tile ``(BLOCK_V,)``."""
    z = _by_lane(z, VEC, SINGLY)
    now = tl.maximum(largest, tl.max(z, 1))
    total = total * exp(largest - now) + tl.sum(exp(z - now[:, None]), 1)
    return now, total


@triton.jit
def _meet(largest, total):
    """Combine the lanes' maxima and sums into the row's maximum and the logarithm of its sum, in float64."""
    row_largest = tl.max(largest, 0)
    return row_largest, tl.log(tl.sum((total * exp(largest - row_largest)).to(tl.float64), 0))


@triton.jit
def _log_softmax(z, largest, log_total):
    """Log-softmax to base 2, from the row's maximum and the float64 logarithm of its sum."""
    log_total = log_total * LOG2E
    hi = log_total.to(tl.float32)
    lo = (log_total - hi.to(tl.float64)).to(tl.float32)
    return ((z - largest) * LOG2E - hi) - lo


@triton.jit
def _load(row_ptr, stride_v, v, inside, EVICTION: tl.constexpr):
    at = row_ptr + v.to(tl.int64) * stride_v
    return tl.load(at, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def _folded(x, VEC: tl.constexpr, SINGLY: tl.constexpr):
    return tl.sum(_by_lane(x, VEC, SINGLY), 1)


@triton.jit
def _gradient(slope, p, mean, factor, WEIGHED: tl.constexpr, KIND: tl.constexpr):
    """``factor p (g − Σ p g)`` from g, or from ``p g``; 0 where a KL is infinite, which shows in an infinite mean slope."""
    dz = factor * (slope - p * mean if WEIGHED else p * (slope - mean))
    if not WEIGHED and (KIND == "forward_kl" or KIND == "reverse_kl"):
        dz = tl.where(tl.abs(mean) == float("inf"), 0.0, dz)
    return dz


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
    temperature,  # or None
    beta,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    STEP: tl.constexpr,
    KIND: tl.constexpr,
    WITH_NLL: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    D_STUDENT: tl.constexpr,
    D_TEACHER: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    SINGLY: tl.constexpr,
):
    LANES: tl.constexpr = BLOCK_V // VEC
    HARD_APART: tl.constexpr = WITH_NLL and temperature is not None  # −log p has a softmax of its own
    G_WEIGHED: tl.constexpr = KIND == "forward_kl" or KIND == "cross_entropy"
    H_WEIGHED: tl.constexpr = KIND == "reverse_kl"
    GRADIENTS: tl.constexpr = (D_STUDENT or D_TEACHER) and (STEP == "all" or STEP == "gradients")
    # The mean slope of forward_kl in the student is 0: the value and the gradient take one pass.
    AT_ONCE: tl.constexpr = STEP == "all" and KIND == "forward_kl" and D_STUDENT and not D_TEACHER
    # Each pass runs in the reverse direction of the one before: the tiles read last are still in L2, provided that tiles read
    # for the last time are evicted first.
    SECOND: tl.constexpr = "" if GRADIENTS else "evict_first"
    row, N = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    y = row  # any number but SKIP
    if ids_ptr is not None:
        y = tl.load(ids_ptr + row)
    active = y != SKIP
    b, at = row // S, row % S
    student_row = student_ptr + b * student_stride_b + at * student_stride_s
    teacher_row = teacher_ptr + b * teacher_stride_b + at * teacher_stride_s
    rows = row + tl.arange(0, 1)
    s_inner, s_outer = row_scales(
        student_temperature_ptr, rows, active, student_scale, student_softcap, HAS_STUDENT_SOFTCAP, temperature
    )
    t_inner, t_outer = row_scales(
        teacher_temperature_ptr, rows, active, teacher_scale, teacher_softcap, HAS_TEACHER_SOFTCAP, temperature
    )
    hard_inner, hard_outer = row_scales(
        student_temperature_ptr, rows, active, student_scale, student_softcap, HAS_STUDENT_SOFTCAP
    )

    v_end = tl.where(active, V, 0)  # a skipped row is not read
    if STEP == "sums" or STEP == "gradients":
        s_max = tl.load(normalizers_ptr + row).to(tl.float32)
        s_log_total = tl.load(normalizers_ptr + N + row)
        t_max = tl.load(normalizers_ptr + 2 * N + row).to(tl.float32)
        t_log_total = tl.load(normalizers_ptr + 3 * N + row)
        hard_max, hard_log_total = s_max, s_log_total
        if HARD_APART:
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
            v = v_start + tl.arange(0, BLOCK_V)
            inside = v < V
            x = _load(student_row, student_stride_v, v, inside, "")
            z = final_logits(x, s_inner, s_outer, HAS_STUDENT_SOFTCAP)
            s_largest, s_total = _advance(tl.where(inside, z, float("-inf")), s_largest, s_total, VEC, SINGLY)
            if HARD_APART:
                z = final_logits(x, hard_inner, hard_outer, HAS_STUDENT_SOFTCAP)
                z = tl.where(inside, z, float("-inf"))
                hard_largest, hard_total = _advance(z, hard_largest, hard_total, VEC, SINGLY)
            x = _load(teacher_row, teacher_stride_v, v, inside, "")
            z = final_logits(x, t_inner, t_outer, HAS_TEACHER_SOFTCAP)
            t_largest, t_total = _advance(tl.where(inside, z, float("-inf")), t_largest, t_total, VEC, SINGLY)
        s_max, s_log_total = _meet(s_largest, s_total)
        t_max, t_log_total = _meet(t_largest, t_total)
        hard_max, hard_log_total = s_max, s_log_total
        if HARD_APART:
            hard_max, hard_log_total = _meet(hard_largest, hard_total)
    if STEP == "normalizers":
        tl.store(normalizers_ptr + row, s_max.to(tl.float64))
        tl.store(normalizers_ptr + N + row, s_log_total)
        tl.store(normalizers_ptr + 2 * N + row, t_max.to(tl.float64))
        tl.store(normalizers_ptr + 3 * N + row, t_log_total)
        if HARD_APART:
            tl.store(normalizers_ptr + 4 * N + row, hard_max.to(tl.float64))
            tl.store(normalizers_ptr + 5 * N + row, hard_log_total)

    # Spread a nan to both sides.
    s_log_total, t_log_total = s_log_total + 0 * t_log_total, t_log_total + 0 * s_log_total
    if STEP == "gradients":
        s_slope = tl.load(sums_ptr + 2 * N + row)
        t_slope = tl.load(sums_ptr + 3 * N + row)
    values = tl.zeros((LANES,), tl.float32)
    if AT_ONCE:
        s_slope = 0 * s_log_total
        t_slope = s_slope
    if (STEP == "all" or STEP == "sums") and not AT_ONCE:
        s_slopes = tl.zeros((LANES,), tl.float32)
        t_slopes = tl.zeros((LANES,), tl.float32)
        for v_stop in range(tl.cdiv(v_end, BLOCK_V) * BLOCK_V, 0, -BLOCK_V):
            v = v_stop - BLOCK_V + tl.arange(0, BLOCK_V)
            inside = v < V
            x = _load(student_row, student_stride_v, v, inside, SECOND)
            z = final_logits(x, s_inner, s_outer, HAS_STUDENT_SOFTCAP)
            log_s = tl.where(inside, _log_softmax(z, s_max, s_log_total), float("-inf"))
            x = _load(teacher_row, teacher_stride_v, v, inside, SECOND)
            z = final_logits(x, t_inner, t_outer, HAS_TEACHER_SOFTCAP)
            log_t = tl.where(inside, _log_softmax(z, t_max, t_log_total), float("-inf"))
            s, t, d = tl.exp2(log_s), tl.exp2(log_t), log_t - log_s
            values += _folded(_term(s, t, log_s, d, beta, KIND), VEC, SINGLY)
            g, h = _slopes(s, t, log_s, d, beta, KIND)
            if D_STUDENT:
                s_slopes += _folded(_weighed(g, s, G_WEIGHED), VEC, SINGLY)
            if D_TEACHER:
                t_slopes += _folded(_weighed(h, t, H_WEIGHED), VEC, SINGLY)
        s_slope = tl.sum(s_slopes.to(tl.float64), 0)
        t_slope = tl.sum(t_slopes.to(tl.float64), 0)
        divergence = tl.sum(values.to(tl.float64), 0)
        if STEP == "all":
            tl.store(divergence_ptr + row, tl.where(active, divergence.to(tl.float32), 0.0))
        else:
            tl.store(sums_ptr + row, tl.where(active, divergence, 0.0))
            tl.store(sums_ptr + 2 * N + row, s_slope)
            tl.store(sums_ptr + 3 * N + row, t_slope)
    if WITH_NLL and (STEP == "all" or STEP == "sums"):
        found = (y >= 0) & (y < V)
        x_y = tl.load(student_row + y * student_stride_v, mask=found, other=0.0).to(tl.float32)
        z_y = final_logits(x_y, hard_inner, hard_outer, HAS_STUDENT_SOFTCAP)
        # Compilers may fuse the products and sums of a tanh differently here: z_y could exceed the maximum.
        nll = hard_log_total - tl.minimum(z_y - hard_max, 0.0).to(tl.float64)
        nll = tl.sum(tl.where(found, nll, 0.0), 0)
        if STEP == "all":
            tl.store(nll_ptr + row, nll.to(tl.float32))
        else:
            tl.store(sums_ptr + N + row, nll)

    if GRADIENTS:
        # All numbers of a skipped row are set to 0, so its gradient is 0 too.
        soft = tl.load(soft_ptr + row, mask=active, other=0.0).to(tl.float32)
        s_max, s_log_total = tl.where(active, s_max, 0.0), tl.where(active, s_log_total, 0.0)
        t_max, t_log_total = tl.where(active, t_max, 0.0), tl.where(active, t_log_total, 0.0)
        s_mean, t_mean = tl.where(active, s_slope, 0.0).to(tl.float32), tl.where(active, t_slope, 0.0).to(tl.float32)
        if WITH_NLL:
            hard = tl.load(hard_ptr + row, mask=active, other=0.0).to(tl.float32)
            if temperature is not None:
                hard *= temperature  # s_scale is already divided by it
            hard_max, hard_log_total = tl.where(active, hard_max, 0.0), tl.where(active, hard_log_total, 0.0)
            label = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
        tl.debug_barrier()  # every lane has read what any will overwrite
        for v_start in range(0, V, BLOCK_V):
            v = (tl.cdiv(V, BLOCK_V) * BLOCK_V - BLOCK_V - v_start if AT_ONCE else v_start) + tl.arange(0, BLOCK_V)
            inside = v < V
            x = _load(student_row, student_stride_v, v, inside & active, "evict_first")
            z, s_scale = final_logits_and_slope(x, s_inner, s_outer, HAS_STUDENT_SOFTCAP)
            log_s = _log_softmax(z, s_max, s_log_total)
            x_t = _load(teacher_row, teacher_stride_v, v, inside & active, "evict_first")
            z, t_scale = final_logits_and_slope(x_t, t_inner, t_outer, HAS_TEACHER_SOFTCAP)
            log_t = _log_softmax(z, t_max, t_log_total)
            if AT_ONCE:
                log_s, log_t = tl.where(inside, log_s, float("-inf")), tl.where(inside, log_t, float("-inf"))
            s, t, d = tl.exp2(log_s), tl.exp2(log_t), log_t - log_s
            if AT_ONCE:
                values += _folded(_term(s, t, log_s, d, beta, KIND), VEC, SINGLY)
            g, h = _slopes(s, t, log_s, d, beta, KIND)
            if D_STUDENT:
                dx = _gradient(g, s, s_mean, soft * s_scale, G_WEIGHED, KIND)
                if WITH_NLL:
                    p = s
                    if HARD_APART:
                        z = final_logits(x, hard_inner, hard_outer, HAS_STUDENT_SOFTCAP)
                        p = tl.exp2(_log_softmax(z, hard_max, hard_log_total))
                    dx += hard * s_scale * tl.where(v == label, p - 1, p)
                out = d_student_ptr + b * d_student_stride_b + at * d_student_stride_s
                dx = dx.to(d_student_ptr.dtype.element_ty)
                tl.store(out + v.to(tl.int64) * d_student_stride_v, dx, mask=inside)
            if D_TEACHER:
                out = d_teacher_ptr + b * d_teacher_stride_b + at * d_teacher_stride_s
                dx = _gradient(h, t, t_mean, soft * t_scale, H_WEIGHED, KIND).to(d_teacher_ptr.dtype.element_ty)
                tl.store(out + v.to(tl.int64) * d_teacher_stride_v, dx, mask=inside)
    if AT_ONCE:
        tl.store(divergence_ptr + row, tl.where(active, tl.sum(values.to(tl.float64), 0).to(tl.float32), 0.0))


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
    temperature=1.0,  # of the divergence, applied last; not applied to −log p
    student_scale=1.0,
    student_softcap=None,
    teacher_scale=1.0,
    teacher_softcap=None,
    with_nll=False,  # also return −log p of the student at ids
    soft=None,  # (N,) factors of the gradients of the divergence
    hard=None,  # (N,) and of those of −log p
    d_student=None,  # (B, V, S) to write the gradient to; may be student itself
    d_teacher=None,  # (B, V, S)
    # For a slice of the vocabulary: "normalizers" and "sums" write the slice's, "gradients" reads the whole vocabulary's
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
        beta = min(beta, 1 - 2**-24)  # keeps the student's share of the mixture above 0 in fp32
    BLOCK_V, VEC, num_warps = divergence_rows_config(student.dtype)
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
        None if temperature == 1.0 else temperature,
        beta,
        student_scale,
        student_softcap or 1.0,
        teacher_scale,
        teacher_softcap or 1.0,
        STEP=step,
        KIND=kind,
        WITH_NLL=with_nll,
        HAS_STUDENT_SOFTCAP=student_softcap is not None,
        HAS_TEACHER_SOFTCAP=teacher_softcap is not None,
        D_STUDENT=d_student is not None or slopes[0],
        D_TEACHER=d_teacher is not None or slopes[1],
        BLOCK_V=BLOCK_V,
        VEC=VEC,
        SINGLY=loaded_singly(student),
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return divergence, nll

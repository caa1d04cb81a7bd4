"""Statistics of rows of logits that exist, and the gradient of any function of those statistics.

Forward, one read of the logits: with ``m = max_j z_j`` and ``s = Σ_j exp(z_j − m)``,

    logsumexp = m + log s        logp_y = (z_y − m) − log s        entropy = log s − Σ_j exp(z_j − m)(z_j − m)/s
    Σ_j w_j logp_j = Σ_j w_j (z_j − m) − log s·Σ_j w_j             log Σ_j p_j² = log Σ_j exp(2(z_j − m)) − 2 log s

Everything is kept relative to the running maximum, so ``logp ≤ 0`` holds by construction and a constant added to a row costs
no accuracy. Each lane keeps its own running maximum, over its ``VEC`` logits of each tile, and the lanes are combined once, at
the end: no barrier and 1 + 1/VEC exponentials per logit in the loop. The initial maximum is the finite ``FLOOR``, so that −inf
logits never make −inf − −inf.

Backward, one read and one write (in place if asked): see ``fused_losses/row_statistics.py`` for the one form

    dz_j = p_j (a + b logp_j + e p_j) + Σ_k c_k 1[j = ids_k] + d w_j

Class probabilities ``t`` enter through the weights, ``w_j = weight_j ((1 − ε) t_j + ε/V)``: their cross entropy is −Σ w logp.

Both at once, for a loss that is linear in its statistics, so that the gradient depends on nothing outside its row: a program
reads its row and then, from the end, reads it again and writes the gradient over it. The programs take row after row, and are
few enough that their rows fit L2, or nearly: the second read mostly hits L2.

Bytes per row of V logits in b bytes each: forward reads V·b; backward reads and writes 2·V·b; both at once 2·V·b and the part
of the second read that misses L2; everything else is O(K).
"""

import torch
import triton
import triton.language as tl

from ..row_statistics import empty_statistics
from .common import FLOOR, SKIP, by_lane, exp, final_logits, final_logits_and_slope, row_scales, rows_skipped
from .configurations import (
    all_registers,
    loaded_singly,
    on_its_device,
    rows_in_flight,
    softmax_rows_bwd_config,
    softmax_rows_fwd_config,
)


@triton.jit
def _lane_sums(
    row_ptr,  # (BLOCK_N,) pointers
    stride_v,
    active,  # (BLOCK_N,) rows to read
    inner,  # (BLOCK_N,), see row_scales
    outer,  # (BLOCK_N,)
    column_weight_ptr,  # (V,)
    t_row_ptr,  # (BLOCK_N,) pointers
    t_stride_v,
    V,
    readable,  # columns of a row that may be read, V or more
    label_smoothing,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    SUM_LOG_PROBS: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    IS_TOP1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    SINGLY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Read rows once; each lane's sums ``(BLOCK_N, LANES)``, relative to its own maximum."""
    LANES: tl.constexpr = BLOCK_V // VEC
    largest = tl.full((BLOCK_N, LANES), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_N, LANES), tl.float32)
    total_shifted = tl.zeros((BLOCK_N, LANES), tl.float32)  # Σ exp(z − largest)·(z − largest)
    total_sq = tl.zeros((BLOCK_N, LANES), tl.float32)
    weighted = tl.zeros((BLOCK_N, LANES), tl.float32)  # Σ w·(z − largest)
    weight_seen = tl.zeros((BLOCK_N, LANES), tl.float32)
    top = tl.zeros((BLOCK_N, LANES), tl.int32)
    nans = tl.zeros((BLOCK_N, LANES), tl.int32)
    v_end = V * tl.max(active.to(tl.int32), 0)  # a block of skipped rows is not read
    for v_start in tl.range(0, v_end, BLOCK_V, num_stages=STAGES):
        v = v_start + tl.arange(0, BLOCK_V)
        inside = active[:, None] & (v < V)[None, :]
        x = tl.load(
            row_ptr[:, None] + v.to(tl.int64)[None, :] * stride_v,
            mask=active[:, None] & (v < readable)[None, :],
            other=0.0,
        ).to(tl.float32)
        z = final_logits(x, inner[:, None], outer[:, None], HAS_SOFTCAP)
        z = tl.where(inside, z, float("-inf"))  # only now: a scale may be negative, a cap is finite
        z = by_lane(z, VEC, SINGLY)
        tile_largest = tl.max(z, 2)
        now_largest = tl.maximum(largest, tile_largest)
        moved = tl.maximum(largest - now_largest, FLOOR)  # finite, since total may be 0
        shifted = z - now_largest[:, :, None]
        e = exp(shifted)
        rescale = exp(moved)
        if ENTROPY:
            total_shifted += tl.maximum(moved * total, FLOOR)  # finite, since rescale may be 0
            total_shifted = rescale * total_shifted + tl.sum(e * tl.maximum(shifted, FLOOR), 2)
        total = total * rescale + tl.sum(e, 2)
        if LOG_SUM_SQ_PROBS:
            total_sq = total_sq * (rescale * rescale) + tl.sum(e * e, 2)
        if SUM_LOG_PROBS:
            w = tl.where(inside, 1.0, 0.0)
            if t_row_ptr is not None:
                t = tl.load(t_row_ptr[:, None] + v.to(tl.int64)[None, :] * t_stride_v, mask=inside, other=0.0).to(
                    tl.float32
                )
                w *= (1 - label_smoothing) * t + label_smoothing / V
            if column_weight_ptr is not None:
                w *= tl.load(column_weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
            inside3 = by_lane(inside, VEC, SINGLY)
            w = by_lane(w, VEC, SINGLY)
            weighted += moved * weight_seen + tl.sum(tl.where(inside3, w * shifted, 0.0), 2)
            weight_seen += tl.sum(w, 2)
        if IS_TOP1:
            column = by_lane(tl.broadcast_to(v[None, :], (BLOCK_N, BLOCK_V)), VEC, SINGLY)
            first = tl.min(tl.where(z == tile_largest[:, :, None], column, V), 2)
            top = tl.where(tile_largest > largest, first, top)
        if MAX_LOGIT:
            nans += tl.sum((z != z).to(tl.int32), 2)
        largest = now_largest
    return largest, total, total_shifted, total_sq, weighted, weight_seen, top, nans


@triton.jit
def _row_total(largest, total):
    """Combine the lanes: their factors, and each row's maximum, ``Σ exp(z − max)`` and its logarithm, in float64."""
    row_largest = tl.max(largest, 1)
    moved = tl.maximum(largest - row_largest[:, None], FLOOR)
    rescale = exp(moved)
    row_total = tl.sum((total * rescale).to(tl.float64), 1)
    return moved, rescale, row_largest, row_total, tl.log(row_total)


@triton.jit
def _row_sum_log_probs(moved, weighted, weight_seen, log_total):
    """``Σ w logp`` and ``Σ w`` of rows."""
    moved_weight = moved.to(tl.float64) * weight_seen.to(tl.float64)
    row_weight = tl.sum(weight_seen.to(tl.float64), 1)
    return tl.sum(weighted.to(tl.float64) + moved_weight, 1) - log_total * row_weight, row_weight


@triton.jit
def _log_prob(x, inner, outer, row_largest, log_total, HAS_SOFTCAP: tl.constexpr):
    """``logp`` of one logit per row. Compilers may fuse a tanh differently here: z could exceed the maximum."""
    z = final_logits(x, inner, outer, HAS_SOFTCAP)
    return (tl.minimum(z - row_largest, 0.0).to(tl.float64) - log_total).to(tl.float32)


@triton.jit
def _row_is_top1(largest, row_largest, top, first_id, V):
    return tl.min(tl.where(largest == row_largest[:, None], top, V), 1) == first_id


@triton.jit(do_not_specialize=["N"])
def _softmax_rows_fwd_kernel(
    logits_ptr,  # (B, V, S)
    ids_ptr,  # (N, K) int64
    column_weight_ptr,  # (V,)
    temperature_ptr,  # (N,)
    probabilities_ptr,  # (B, V, S)
    log_probs_ptr,  # (N, K)
    logsumexp_ptr,  # (N,) float64
    entropy_ptr,  # (N,) float64
    log_sum_sq_probs_ptr,  # (N,) float64
    sum_log_probs_ptr,  # (N,) float64
    weight_sum_ptr,  # (N,) float64
    max_logit_ptr,  # (N,)
    is_top1_ptr,  # (N,) bool
    N,
    V,
    S,
    K,
    logits_stride_b,
    logits_stride_v,
    logits_stride_s,
    probabilities_stride_b,
    probabilities_stride_v,
    probabilities_stride_s,
    label_smoothing,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    SINGLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < N
    skipped = row < 0
    if ids_ptr is not None:
        skipped = rows_skipped(ids_ptr, row, row_inside, K)
    active = row_inside & ~skipped
    row_ptr = logits_ptr + (row // S) * logits_stride_b + (row % S) * logits_stride_s  # (BLOCK_N,)
    t_row_ptr = probabilities_ptr
    if probabilities_ptr is not None:
        t_row_ptr += (row // S) * probabilities_stride_b + (row % S) * probabilities_stride_s
    inner, outer = row_scales(temperature_ptr, row, row_inside, scale, softcap, HAS_SOFTCAP)

    largest, total, total_shifted, total_sq, weighted, weight_seen, top, nans = _lane_sums(
        row_ptr, logits_stride_v, active, inner, outer, column_weight_ptr, t_row_ptr, probabilities_stride_v, V, V,
        label_smoothing, HAS_SOFTCAP, entropy_ptr is not None, log_sum_sq_probs_ptr is not None,
        sum_log_probs_ptr is not None, max_logit_ptr is not None, is_top1_ptr is not None, BLOCK_N, BLOCK_V, VEC, SINGLY, 1,
    )  # fmt: skip

    # From here on there are a few numbers per row, combined in float64 and rounded once.
    moved, rescale, row_largest, row_total, log_total = _row_total(largest, total)
    logsumexp = row_largest.to(tl.float64) + log_total
    tl.store(logsumexp_ptr + row, tl.where(skipped, 0.0, logsumexp), mask=row_inside)
    if entropy_ptr is not None:
        row_shifted = tl.sum((rescale * (total_shifted + tl.maximum(moved * total, FLOOR))).to(tl.float64), 1)
        entropy = log_total - row_shifted / row_total
        tl.store(entropy_ptr + row, tl.where(skipped, 0.0, entropy), mask=row_inside)
    if log_sum_sq_probs_ptr is not None:
        row_sq = tl.sum((total_sq * (rescale * rescale)).to(tl.float64), 1)
        log_sum_sq = tl.log(row_sq) - 2 * log_total
        tl.store(log_sum_sq_probs_ptr + row, tl.where(skipped, 0.0, log_sum_sq), mask=row_inside)
    if sum_log_probs_ptr is not None:
        sum_log_probs, row_weight = _row_sum_log_probs(moved, weighted, weight_seen, log_total)
        tl.store(sum_log_probs_ptr + row, tl.where(skipped, 0.0, sum_log_probs), mask=row_inside)
        if probabilities_ptr is not None:
            tl.store(weight_sum_ptr + row, row_weight, mask=row_inside)
    if max_logit_ptr is not None:
        max_logit = tl.where(tl.sum(nans, 1) > 0, float("nan"), row_largest)
        max_logit = tl.where(row_total == 0, float("-inf"), max_logit)
        tl.store(max_logit_ptr + row, tl.where(skipped, 0.0, max_logit), mask=row_inside)
    if is_top1_ptr is not None:
        first_id = tl.load(ids_ptr + row * K, mask=row_inside, other=-1)
        is_top1 = _row_is_top1(largest, row_largest, top, first_id, V)
        tl.store(is_top1_ptr + row, is_top1 & ~skipped, mask=row_inside)
    if ids_ptr is not None:
        for k in range(K):
            y = tl.load(ids_ptr + row * K + k, mask=active, other=-1)
            found = (y >= 0) & (y < V)
            x_y = tl.load(row_ptr + y * logits_stride_v, mask=found, other=0.0).to(tl.float32)
            log_prob = _log_prob(x_y, inner, outer, row_largest, log_total, HAS_SOFTCAP)
            tl.store(log_probs_ptr + row * K + k, tl.where(found, log_prob, 0.0), mask=row_inside)


@on_its_device
def softmax_rows_fwd(
    logits,  # (B, V, S), any strides
    ids,  # (N, K) int64 or None
    column_weight,  # (V,) or None
    temperature,  # (N,) or None
    *,
    probabilities=None,  # (B, V, S), any strides
    label_smoothing=0.0,  # of the probabilities
    scale=1.0,
    softcap=None,
    outputs,
):
    B, V, S = logits.shape
    N = B * S
    out = empty_statistics(logits, N, ids, outputs)
    if N == 0:
        return out
    options = column_weight is not None or probabilities is not None
    options = options or not {"log_sum_sq_probs", "sum_log_probs", "max_logit", "is_top1"}.isdisjoint(outputs)
    BLOCK_N, BLOCK_V, VEC, num_warps = softmax_rows_fwd_config(logits.dtype, logits.stride(1) == 1, options)
    _softmax_rows_fwd_kernel[(triton.cdiv(N, BLOCK_N),)](
        logits,
        ids,
        column_weight,
        temperature,
        probabilities,
        *out,
        N,
        V,
        S,
        0 if ids is None else ids.shape[1],
        *logits.stride(),
        *(logits if probabilities is None else probabilities).stride(),
        label_smoothing,
        scale,
        softcap or 1.0,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        VEC=VEC,
        SINGLY=BLOCK_N == 1 and loaded_singly(logits),
        num_warps=num_warps,
        enable_fp_fusion=True,
        **all_registers(logits.device),
    )
    return out


@triton.jit
def _log_softmax(x, inner, outer, logsumexp, HAS_SOFTCAP: tl.constexpr):
    """``logp`` and ``dz/dx`` of a tile ``(BLOCK_N, BLOCK_V)`` of logits, from its rows' scales and float64 logsumexp."""
    z, slope = final_logits_and_slope(x, inner[:, None], outer[:, None], HAS_SOFTCAP)
    # float64 arithmetic once per row, not per logit: hi + lo is logsumexp.
    hi = logsumexp.to(tl.float32)
    lo = (logsumexp - hi.to(tl.float64)).to(tl.float32)
    return (z - hi[:, None]) - lo[:, None], slope


@triton.jit(do_not_specialize=["N"])
def _softmax_rows_bwd_kernel(
    logits_ptr,  # (B, V, S)
    ids_ptr,  # (N, K) int64
    column_weight_ptr,  # (V,)
    temperature_ptr,  # (N,)
    probabilities_ptr,  # (B, V, S)
    logsumexp_ptr,  # (N,) float64
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    e_ptr,  # (N,)
    c_ptr,  # (N, K)
    d_ptr,  # (N,)
    out_ptr,  # (B, V, S), may be logits_ptr: each element is read by the lane that writes it
    N,
    V,
    S,
    K,
    logits_stride_b,
    logits_stride_v,
    logits_stride_s,
    probabilities_stride_b,
    probabilities_stride_v,
    probabilities_stride_s,
    label_smoothing,
    out_stride_b,
    out_stride_v,
    out_stride_s,
    vocab_start,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    v_blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // v_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = (tl.program_id(0) % v_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside = row < N
    inside = row_inside[:, None] & (v < V)[None, :]
    active = row_inside
    if ids_ptr is not None:
        active = row_inside & ~rows_skipped(ids_ptr, row, row_inside, K)
    v64 = v.to(tl.int64)[None, :]
    x = tl.load(
        logits_ptr + ((row // S) * logits_stride_b + (row % S) * logits_stride_s)[:, None] + v64 * logits_stride_v,
        mask=inside & active[:, None],
        other=0.0,
    ).to(tl.float32)
    inner, outer = row_scales(temperature_ptr, row, active, scale, softcap, HAS_SOFTCAP)
    # All numbers of a skipped row are set to 0, so its gradient is 0 too.
    logsumexp = tl.load(logsumexp_ptr + row, mask=active, other=0.0)
    logp, slope = _log_softmax(x, inner, outer, logsumexp, HAS_SOFTCAP)
    p = exp(logp)
    factor = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if a_ptr is not None:
        factor += tl.load(a_ptr + row, mask=active, other=0.0)[:, None]
    if b_ptr is not None:
        factor += tl.load(b_ptr + row, mask=active, other=0.0)[:, None] * tl.where(p == 0, 0.0, logp)
    if e_ptr is not None:
        factor += tl.load(e_ptr + row, mask=active, other=0.0)[:, None] * p
    dz = p * factor
    if d_ptr is not None:
        d = tl.load(d_ptr + row, mask=active, other=0.0)[:, None]
        if probabilities_ptr is not None:
            t = tl.load(
                probabilities_ptr
                + ((row // S) * probabilities_stride_b + (row % S) * probabilities_stride_s)[:, None]
                + v64 * probabilities_stride_v,
                mask=inside & active[:, None],
                other=0.0,
            ).to(tl.float32)
            d = d * ((1 - label_smoothing) * t + label_smoothing / V)
        if column_weight_ptr is not None:
            d = d * tl.load(column_weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
            d = tl.where(active[:, None], d, 0.0)
        dz += d
    if c_ptr is not None:
        for k in range(K):
            y = tl.load(ids_ptr + row * K + k, mask=row_inside, other=-1) - vocab_start
            c = tl.load(c_ptr + row * K + k, mask=active, other=0.0)
            y = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)
            dz += tl.where(v[None, :] == y[:, None], c[:, None], 0.0)
    tl.store(
        out_ptr + ((row // S) * out_stride_b + (row % S) * out_stride_s)[:, None] + v64 * out_stride_v,
        (dz * slope).to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@on_its_device
def softmax_rows_bwd(
    logits,  # (B, V, S), any strides
    ids,  # (N, K) int64 or None
    column_weight,  # (V,) or None
    temperature,  # (N,) or None
    logsumexp,  # (N,) float64
    a,  # (N,) or None
    b,  # (N,) or None
    e,  # (N,) or None
    c,  # (N, K) or None
    d,  # (N,) or None
    *,
    probabilities=None,  # (B, V, S), any strides
    label_smoothing=0.0,
    scale=1.0,
    softcap=None,
    vocab_start=0,
    out=None,  # (B, V, S); may be logits itself
):
    B, V, S = logits.shape
    N = B * S
    out = torch.empty_like(logits) if out is None else out
    if N == 0:
        return out
    options = any(x is not None for x in (b, e, d))
    BLOCK_N, BLOCK_V, num_warps = softmax_rows_bwd_config(logits.dtype, logits.stride(1) == 1, options)
    _softmax_rows_bwd_kernel[(triton.cdiv(N, BLOCK_N) * triton.cdiv(V, BLOCK_V),)](
        logits,
        ids,
        column_weight,
        temperature,
        probabilities,
        logsumexp,
        a,
        b,
        e,
        c,
        d,
        out,
        N,
        V,
        S,
        0 if ids is None else ids.shape[1],
        *logits.stride(),
        *(logits if probabilities is None else probabilities).stride(),
        label_smoothing,
        *out.stride(),
        vocab_start,
        scale,
        softcap or 1.0,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_V=BLOCK_V,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return out


@triton.jit(do_not_specialize=["N"])
def _softmax_rows_fwd_bwd_kernel(
    logits_ptr,  # (N, V), overwritten with the gradient; the padding between its rows is overwritten with anything
    ids_ptr,  # (N, 1) int64
    column_weight_ptr,  # (V,)
    temperature_ptr,  # (N,)
    of_log_probs_ptr,  # (N,)
    of_sum_log_probs_ptr,  # (N,)
    of_square_ptr,  # (N,)
    log_probs_ptr,  # (N, 1)
    logsumexp_ptr,  # (N,) float64
    sum_log_probs_ptr,  # (N,) float64
    is_top1_ptr,  # (N,) bool
    N,
    V,
    logits_stride_n,  # V or more; the padding between rows is read and overwritten too
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,  # 2: the next tile is under way while one is worked on
):
    for item in range(tl.program_id(0), N, tl.num_programs(0)):
        row = item + tl.arange(0, 1).to(tl.int64)
        row_ptr = logits_ptr + row * logits_stride_n  # (1,)
        y = tl.load(ids_ptr + row)
        active = y != SKIP
        found = (y >= 0) & (y < V)
        x_y = tl.load(row_ptr + y, mask=found, other=0.0).to(tl.float32)
        inner, outer = row_scales(temperature_ptr, row, active, scale, softcap, HAS_SOFTCAP)
        largest, total, _, _, weighted, weight_seen, top, _ = _lane_sums(
            row_ptr, 1, active, inner, outer, column_weight_ptr, None, 1, V, logits_stride_n, 0.0, HAS_SOFTCAP, False, False,
            of_sum_log_probs_ptr is not None, False, is_top1_ptr is not None, 1, BLOCK_V, VEC, False, STAGES,
        )  # fmt: skip
        moved, _, row_largest, _, log_total = _row_total(largest, total)
        # All numbers of a skipped row are set to 0, so its gradient is 0 too.
        logsumexp = tl.where(active, row_largest.to(tl.float64) + log_total, 0.0)
        log_prob = _log_prob(x_y, inner, outer, row_largest, log_total, HAS_SOFTCAP)
        tl.store(log_probs_ptr + row, tl.where(found, log_prob, 0.0))
        c = tl.load(of_log_probs_ptr + row, mask=active, other=0.0).to(tl.float32)
        a = -c
        d = tl.zeros((1,), tl.float32)
        if of_sum_log_probs_ptr is not None:
            sum_log_probs, row_weight = _row_sum_log_probs(moved, weighted, weight_seen, log_total)
            tl.store(sum_log_probs_ptr + row, tl.where(active, sum_log_probs, 0.0))
            d = tl.load(of_sum_log_probs_ptr + row, mask=active, other=0.0).to(tl.float32)
            a -= (d * row_weight).to(tl.float32)
        if of_square_ptr is not None:
            a += (2 * tl.load(of_square_ptr + row, mask=active, other=0.0) * logsumexp).to(tl.float32)
        if is_top1_ptr is not None:
            tl.store(is_top1_ptr + row, _row_is_top1(largest, row_largest, top, y, V) & active)

        # The gradient at the id is stored last: to test for the id in the loop would cost four instructions per logit.
        logp_y, slope_y = _log_softmax(x_y[:, None], inner, outer, logsumexp, HAS_SOFTCAP)
        dz_y = exp(logp_y) * a[:, None] + c[:, None]
        if of_sum_log_probs_ptr is not None:
            if column_weight_ptr is not None:
                dz_y += d[:, None] * tl.load(column_weight_ptr + y, mask=found, other=0.0).to(tl.float32)[:, None]
            else:
                dz_y += d[:, None]
        dx_y = (dz_y * slope_y).to(logits_ptr.dtype.element_ty)

        tl.debug_barrier()  # every lane has read what any will overwrite
        # Backwards: the tiles read last are still in L2, and stay there longer since overwritten ones are evicted first.
        for v_end in tl.range(tl.cdiv(logits_stride_n, BLOCK_V) * BLOCK_V, 0, -BLOCK_V, num_stages=STAGES):
            v = v_end - BLOCK_V + tl.arange(0, BLOCK_V)
            inside = (v < logits_stride_n)[None, :]
            at = row_ptr[:, None] + v[None, :]
            x = tl.load(at, mask=inside & active[:, None], other=0.0, eviction_policy="evict_first").to(tl.float32)
            logp, slope = _log_softmax(x, inner, outer, logsumexp, HAS_SOFTCAP)
            dz = exp(logp) * a[:, None]
            if of_sum_log_probs_ptr is not None:
                if column_weight_ptr is not None:
                    weight = tl.load(
                        (column_weight_ptr + v)[None, :], mask=(v < V)[None, :] & active[:, None], other=0.0
                    )
                    dz += d[:, None] * weight.to(tl.float32)
                else:
                    dz += d[:, None]
            dx = (dz * slope).to(logits_ptr.dtype.element_ty)
            tl.store(at, dx, mask=inside, eviction_policy="evict_first")
        tl.store(logsumexp_ptr + row, logsumexp)
        tl.debug_barrier()
        tl.store((row_ptr + y)[:, None], dx_y, mask=found[:, None])


@on_its_device
def softmax_rows_fwd_bwd(
    logits,  # (N, V), rows of one block of memory; overwritten with the gradient, and with anything beyond column V
    ids,  # (N, 1) int64
    column_weight,  # (V,) or None
    temperature,  # (N,) or None
    of_log_probs,  # (N,)
    of_sum_log_probs,  # (N,) or None
    of_square,  # (N,) or None
    *,
    scale=1.0,
    softcap=None,
    outputs,
):
    """Statistics, and the gradient of ``of_log_probs·logp + of_sum_log_probs·Σ_j w_j logp_j + of_square·logsumexp²``."""
    N, V = logits.shape
    out = empty_statistics(logits, N, ids, outputs)
    if N == 0:
        return out
    options = column_weight is not None or not {"sum_log_probs", "is_top1"}.isdisjoint(outputs)
    _, BLOCK_V, VEC, num_warps = softmax_rows_fwd_config(logits.dtype, True, options)
    rows = rows_in_flight(logits.device, V * logits.element_size(), BLOCK_V * logits.element_size())
    _softmax_rows_fwd_bwd_kernel[(min(N, rows),)](
        logits,
        ids,
        column_weight,
        temperature,
        of_log_probs,
        of_sum_log_probs,
        of_square,
        out.log_probs,
        out.logsumexp,
        out.sum_log_probs,
        out.is_top1,
        N,
        V,
        logits.stride(0),
        scale,
        softcap or 1.0,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_V=BLOCK_V,
        VEC=VEC,
        STAGES=1 if options else 2,  # with options there are smaller tiles and more programs
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return out

"""Statistics of the rows of ``hidden weightᵀ`` without the logits, and the gradient of a slice of the vocabulary's logits.

With ``x = h Wᵀ + u Bᵀ + bias`` (``u Bᵀ`` the head's low-rank term) and ``z =
softcap·tanh(scale·x/softcap)/temperature``, the statistics and the one form of the gradient are those of
``softmax_rows.py``; here a logit lives only in registers.

Forward: 2·N·V·H FLOP. Reads hidden and weight (from L2 as often as the tiling asks), writes 2, 3 or 6 fp32 numbers per
row and split of the vocabulary. Gradient of a slice of V columns: 2·N·V·H FLOP again, writes N·V logit gradients in
hidden's dtype.

How it is meant to be fast (reasoned from the machine code for sm_90; no speed is measured yet). A 128×256 tile over K
of 64 keeps wgmma at 80 bytes of shared memory per clock, below the 128 there are. The loop over vocabulary tiles and
the loop over K are one loop, so that the copy engine is two or three stages into the next tile before the epilogue
starts: the epilogue costs its own instructions and no drained pipeline. Per logit those are one exponential (16 a
clock, the bottleneck: 2 050 clocks a tile) and five cheap instructions (scale and mask in one, maximum, difference, the
exponential's base, sum), which hide behind it, as most of the entropy's two do: about 3 % of the tile's matrix time at
H 4096, 6 % at 2048. A row's maximum and sums stay within four lanes (two shuffles). The logit at an id is looked for
only in tiles that hold an id of their rows, and is written by the one tile that has it. Programs run side by side over
GROUP_N row tiles × neighbouring splits, so hidden stays in L2 while the weight streams through it once per group.

A row's bits do not depend on the rest of the batch: its splits of the vocabulary, their tiles and the order of every sum
depend on V, H and the device alone; nothing is added atomically. Everything is kept relative to the running maximum, so
that a constant added to a row costs no accuracy and ``logp = (z_y − max) − log s ≤ 0`` by construction: the maximum's
own term in ``s`` is exactly 1, and nothing relies on the compiler fusing a multiplication with an addition. ``FLOOR`` is
the initial maximum; columns beyond V and true −inf logits are −inf and are only compared with finite maxima.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..row_statistics import RowStatistics, empty_statistics, part_of
from ..settings import triton_interpreted
from .common import FLOOR, exp, final_logits, final_logits_and_tanh, row_scales, rows_skipped
from .configurations import (
    architecture,
    linear_softmax_d_logits_config,
    linear_softmax_fwd_config,
    on_its_device,
    programs,
)

ROWS_PER_LAUNCH = 8192  # bounds the partial statistics; with 33 splits 16 full waves of 132 programs


@triton.jit
def _load_tile(
    matrix,  # (x, rows, columns, stride_row, stride_column), x a descriptor or a pointer
    row,
    column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    x, rows, columns, stride_row, stride_column = matrix
    if TMA:
        tile = x.load([row, column])
    else:
        # Rows beyond the last read the last row again: their results are dropped, and the mask needs only columns.
        r = tl.minimum(row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
        c = column + tl.arange(0, BLOCK_K)
        pointers = x + r[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_column
        tile = tl.load(pointers, mask=(c < columns)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _add_product(acc, left, right, row, v_start, k, BLOCK_K: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr):
    """``acc`` ``(BLOCK_N, BLOCK_V)`` plus ``left rightᵀ`` over BLOCK_K columns; ``left`` has N rows, ``right`` V."""
    h = _load_tile(left, row, k, acc.shape[0], BLOCK_K, TMA, UPCAST)
    w = _load_tile(right, v_start, k, acc.shape[1], BLOCK_K, TMA, UPCAST)
    return tl.dot(h, w.T, acc, input_precision="ieee")


@triton.jit
def _part(x, PART: tl.constexpr, PARTS: tl.constexpr):
    """Part ``PART`` of ``PARTS`` (1, 2 or 4) of the columns of ``x`` ``(BLOCK_N, BLOCK_V)``: fewer registers at a time."""
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        if PART < PARTS // 2:
            x = _part(left, PART, PARTS // 2)
        else:
            x = _part(right, PART - PARTS // 2, PARTS // 2)
    return x


@triton.jit
def _with_bias(acc, bias_ptr, v_start, V, PART: tl.constexpr, PARTS: tl.constexpr):
    """The columns of one part, and their logits before scale and softcap."""
    x = _part(acc, PART, PARTS)
    v = v_start + PART * x.shape[1] + tl.arange(0, x.shape[1])
    if bias_ptr is not None:
        x += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    return v, x


@triton.jit
def _place(item, row_tiles, columns, GROUP_N: tl.constexpr):
    """The row tile, and which of the ``columns`` (splits or tiles of the vocabulary), GROUP_N row tiles side by side."""
    group = item // (GROUP_N * columns)
    group_rows = tl.minimum(row_tiles - group * GROUP_N, GROUP_N)
    place = item % (GROUP_N * columns)
    return group * GROUP_N + place % group_rows, place // group_rows


@triton.jit(do_not_specialize=["N"])
def _linear_softmax_fwd_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    low_rank_u,  # (N, R)
    low_rank_b,  # (V, R)
    bias_ptr,  # (V,)
    ids_ptr,  # (N, K) int64
    column_weight_ptr,  # (V,)
    temperature_ptr,  # (N,)
    logits_at_ids_ptr,  # (N, K), written where the id is a column
    partials_ptr,  # (2, 3 or 6; SPLITS; N): largest, total, total_shifted, total_sq, weighted, top
    split_weight_ptr,  # (SPLITS,) Σ w over a split's columns
    saved_logits_ptr,  # (N, saved_columns), written: logits before scale and softcap
    N,
    V,
    H,
    R,
    K,
    saved_columns,
    saved_stride_n,
    hidden_stride_n,
    hidden_stride_h,
    weight_stride_v,
    weight_stride_h,
    u_stride_n,
    u_stride_r,
    b_stride_v,
    b_stride_r,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALL: tl.constexpr,
    SAVE_LOGITS: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    h = (hidden, N, H, hidden_stride_n, hidden_stride_h)
    w = (weight, V, H, weight_stride_v, weight_stride_h)
    h_low = (low_rank_u, N, R, u_stride_n, u_stride_r)
    w_low = (low_rank_b, V, R, b_stride_v, b_stride_r)
    row_tiles = tl.cdiv(N, BLOCK_N)
    v_tiles = tl.cdiv(V, BLOCK_V)
    k_tiles = tl.cdiv(H, BLOCK_K)
    for item in range(tl.program_id(0), row_tiles * SPLITS, tl.num_programs(0)):
        row_tile, split = _place(item, row_tiles, SPLITS, GROUP_N)
        # Each group of row tiles starts at another split: otherwise the same programs would get the longer ones every time.
        split = (split + item // (GROUP_N * SPLITS)) % SPLITS
        first_tile, end_tile = split * v_tiles // SPLITS, (split + 1) * v_tiles // SPLITS
        row = row_tile * BLOCK_N
        n = row + tl.arange(0, BLOCK_N)
        inside = n < N
        inner, outer = row_scales(temperature_ptr, n, inside, scale, softcap, HAS_SOFTCAP)
        largest = tl.full((BLOCK_N,), FLOOR, tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        total_shifted = tl.zeros((BLOCK_N,), tl.float32)  # Σ exp(shifted)·shifted, shifted = z − largest
        total_sq = tl.zeros((BLOCK_N,), tl.float32)
        weighted = tl.zeros((BLOCK_N,), tl.float32)  # Σ w·shifted
        weight_seen = 0.0
        top = tl.zeros((BLOCK_N,), tl.int32)

        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        v_start = first_tile * BLOCK_V
        k = 0
        for _ in range((end_tile - first_tile) * k_tiles):
            acc = _add_product(acc, h, w, row, v_start, k, BLOCK_K, TMA, UPCAST)
            last = k + BLOCK_K >= H
            if last:
                if low_rank_u is not None:
                    for r in tl.range(0, R, BLOCK_K, num_stages=1):
                        acc = _add_product(acc, h_low, w_low, row, v_start, r, BLOCK_K, TMA, UPCAST)
                ids_here = 0  # few tiles hold an id of their rows: one check spares the others the matching
                if ids_ptr is not None:
                    for j in range(K):
                        y = tl.load(ids_ptr + n.to(tl.int64) * K + j, mask=inside, other=-1)
                        ids_here += tl.max(((y >= v_start) & (y < v_start + BLOCK_V)).to(tl.int32), 0)
                for part in tl.static_range(PARTS):
                    v, x = _with_bias(acc, bias_ptr, v_start, V, part, PARTS)
                    if SAVE_LOGITS:  # noqa: SIM102, a branch at compile time
                        if v_start < saved_columns:
                            # One 64-bit address per tile; the offsets within it fit 32 bits.
                            tile = saved_logits_ptr + row.to(tl.int64) * saved_stride_n
                            within = tl.arange(0, BLOCK_N)[:, None] * saved_stride_n + v[None, :]
                            tl.store(tile + within, x, mask=inside[:, None] & (v < saved_columns)[None, :])
                    beyond = tl.where(v < V, 0.0, float("-inf"))[None, :]
                    z = final_logits(x, inner[:, None], outer[:, None], HAS_SOFTCAP, beyond)
                    if ids_ptr is not None:  # noqa: SIM102, a branch at compile time
                        if ids_here > 0:
                            for j in range(K):
                                at = n.to(tl.int64) * K + j
                                y = tl.load(ids_ptr + at, mask=inside, other=-1)
                                start = v_start + part * (BLOCK_V // PARTS)
                                here = (y >= start) & (y < tl.minimum(start + BLOCK_V // PARTS, V))
                                if tl.max(here.to(tl.int32), 0) > 0:
                                    match = v[None, :] == tl.where(here, y, -1).to(tl.int32)[:, None]
                                    tl.store(logits_at_ids_ptr + at, tl.sum(tl.where(match, z, 0.0), 1), mask=here)
                    tile_largest = tl.max(z, 1)
                    now = tl.maximum(largest, tile_largest)
                    moved = tl.maximum(largest - now, FLOOR)  # finite, since it multiplies sums of 0
                    rescale = exp(moved)
                    if ENTROPY:
                        # tl.maximum avoids 0·(−inf), here and below; a nan that it drops is in total already.
                        total_shifted = rescale * tl.maximum(total_shifted + moved * total, FLOOR)
                    shifted = z - now[:, None]
                    e = exp(shifted)
                    total = rescale * total + tl.sum(e, 1)
                    if ENTROPY:
                        total_shifted += tl.sum(e * tl.maximum(shifted, FLOOR), 1)
                    if ALL:
                        total_sq = rescale * rescale * total_sq + tl.sum(e * e, 1)
                        column_weight = tl.where(v < V, 1.0, 0.0)
                        if column_weight_ptr is not None:
                            column_weight *= tl.load(column_weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)
                        w_shifted = tl.where((v < V)[None, :], column_weight[None, :] * shifted, 0.0)
                        weighted += moved * weight_seen + tl.sum(w_shifted, 1)
                        weight_seen += tl.sum(column_weight, 0)
                        first = tl.min(tl.where(z == tile_largest[:, None], v[None, :], V), 1)
                        top = tl.where(tile_largest > largest, first, top)
                    largest = now
                acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            # Outside the branch, so that the next tile's loads can start before this one's epilogue.
            k = tl.where(last, 0, k + BLOCK_K)
            v_start = tl.where(last, v_start + BLOCK_V, v_start)

        partial = partials_ptr + split * N + n
        tl.store(partial, largest, mask=inside)
        tl.store(partial + SPLITS * N, total, mask=inside)
        if ENTROPY:
            tl.store(partial + 2 * SPLITS * N, total_shifted, mask=inside)
        if ALL:
            tl.store(partial + 3 * SPLITS * N, total_sq, mask=inside)
            tl.store(partial + 4 * SPLITS * N, weighted, mask=inside)
            tl.store(partial + 5 * SPLITS * N, top.to(tl.float32, bitcast=True), mask=inside)
            tl.store(split_weight_ptr + split, weight_seen, mask=row == 0)


@triton.jit(do_not_specialize=["N"])
def _combine_splits_kernel(
    partials_ptr,  # (2, 3 or 6; SPLITS; N)
    split_weight_ptr,  # (SPLITS,)
    ids_ptr,  # (N, K) int64
    log_probs_ptr,  # (N, K): holds the logits at the ids
    logsumexp_ptr,  # (N,) float64
    entropy_ptr,  # (N,) float64
    log_sum_sq_probs_ptr,  # (N,) float64
    sum_log_probs_ptr,  # (N,) float64
    max_logit_ptr,  # (N,)
    is_top1_ptr,  # (N,) bool
    N,
    V,
    K,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    skipped = n < 0
    if ids_ptr is not None:
        skipped = rows_skipped(ids_ptr, n, inside, K)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    here = (split < SPLITS) & inside[None, :]
    partial = partials_ptr + split * N + n[None, :]
    split_largest = tl.load(partial, mask=here, other=FLOOR)
    split_total = tl.load(partial + SPLITS * N, mask=here, other=0.0)
    largest = tl.max(split_largest, 0)
    moved = tl.maximum(split_largest - largest[None, :], FLOOR)
    rescale = exp(moved)
    total = tl.sum(rescale * split_total, 0)
    log_total = tl.log(total.to(tl.float64))
    logsumexp = largest.to(tl.float64) + log_total
    tl.store(logsumexp_ptr + n, tl.where(skipped, 0.0, logsumexp), mask=inside)
    if ids_ptr is not None:
        for k in range(K):
            at = n.to(tl.int64) * K + k
            y = tl.load(ids_ptr + at, mask=inside, other=-1)
            z_y = tl.load(log_probs_ptr + at, mask=inside, other=0.0)
            log_prob = ((z_y - largest).to(tl.float64) - log_total).to(tl.float32)
            tl.store(log_probs_ptr + at, tl.where((y >= 0) & (y < V), log_prob, 0.0), mask=inside)
    if entropy_ptr is not None:
        shifted = tl.load(partial + 2 * SPLITS * N, mask=here, other=0.0)
        mean_shifted = tl.sum(rescale * (shifted + tl.maximum(moved * split_total, FLOOR)), 0) / total
        entropy = log_total - mean_shifted.to(tl.float64)
        tl.store(entropy_ptr + n, tl.where(skipped, 0.0, entropy), mask=inside)
    if log_sum_sq_probs_ptr is not None:
        total_sq = tl.sum(rescale * rescale * tl.load(partial + 3 * SPLITS * N, mask=here, other=0.0), 0)
        log_sum_sq = tl.log(total_sq.to(tl.float64)) - 2 * log_total
        tl.store(log_sum_sq_probs_ptr + n, tl.where(skipped, 0.0, log_sum_sq), mask=inside)
    if sum_log_probs_ptr is not None:
        split_weight = tl.load(split_weight_ptr + split, mask=split < SPLITS, other=0.0).to(tl.float64)
        weighted = tl.load(partial + 4 * SPLITS * N, mask=here, other=0.0).to(tl.float64)
        weighted += moved.to(tl.float64) * split_weight
        row_weighted = tl.sum(weighted, 0) - log_total * tl.sum(split_weight)
        tl.store(sum_log_probs_ptr + n, tl.where(skipped, 0.0, row_weighted), mask=inside)
    if max_logit_ptr is not None:
        max_logit = tl.where(total == 0, float("-inf"), largest)
        max_logit = tl.where((total != total) & (largest < float("inf")), float("nan"), max_logit)
        tl.store(max_logit_ptr + n, tl.where(skipped, 0.0, max_logit), mask=inside)
    if is_top1_ptr is not None:
        split_top = tl.load(partial + 5 * SPLITS * N, mask=here, other=0.0).to(tl.int32, bitcast=True)
        top = tl.min(tl.where(here & (split_largest == largest[None, :]), split_top, V), 0)
        y = tl.load(ids_ptr + n.to(tl.int64) * K, mask=inside, other=-1)
        tl.store(is_top1_ptr + n, (top == y) & ~skipped, mask=inside)


def _checked(hidden, weight, bias, low_rank):
    """The head's checked matrices ``(hidden, weight, u, B)``, the last two None without ``low_rank``."""
    u, b = low_rank or (None, None)
    shapes = f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the streaming kernels take bfloat16 and float16: {shapes}; make fp32 and fp64 logits with the library's "
            "matrix product, a tile at a time, and give them to softmax_rows"
        )
    if weight.dtype != hidden.dtype or any(x is not None and x.dtype != hidden.dtype for x in (u, b)):
        raise ValueError(f"hidden, weight and low_rank must have one dtype: {shapes}; cast them first")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(f"hidden must be (N, H) and weight (V, H) with V and H at least 1: {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,): {tuple(bias.shape)} for {shapes}")
    if u is not None and (u.shape[0] != hidden.shape[0] or b.shape != (weight.shape[0], u.shape[1])):
        raise ValueError(f"low_rank must be u (N, R) and B (V, R): {tuple(u.shape)}, {tuple(b.shape)} for {shapes}")
    return hidden, weight, u, b


def _odd_rows(*matrices):
    """Whether some rows do not start at multiples of 16 elements."""
    return any(x.stride(0) % 16 for x in matrices if x is not None)


def _tma_fits(arch, *matrices):
    """Whether the copy engine can read and write them: adjacent columns, 16-byte-aligned rows."""
    return arch in ("sm_90", "sm_100", "interpreter") and all(
        x.stride(1) == 1
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.shape[1] > 0
        for x in matrices
        if x is not None
    )


def _dense(*vectors):
    """The vectors, made contiguous: a gradient that autograd expanded, for example, has stride 0."""
    return [None if x is None else x.contiguous() for x in vectors]


def _operand(x, block, tma):
    if x is None or not tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def _strides(*matrices):
    return [stride for x in matrices for stride in ((0, 0) if x is None else x.stride())]


@on_its_device
def linear_softmax_fwd(
    hidden,  # (N, H) bf16 or fp16
    weight,  # (V, H)
    bias,  # (V,) or None
    low_rank,  # (u (N, R), B (V, R)) or None
    ids,  # (N, K) int64 or None
    column_weight,  # (V,) or None
    temperature,  # (N,) fp32 or None
    *,
    scale=1.0,
    softcap=None,
    outputs,
    saved_logits=None,  # (N, v) fp32, written to: the first v logits of each row, before scale and softcap
):
    hidden, weight, u, b = _checked(hidden, weight, bias, low_rank)
    out = empty_statistics(hidden, hidden.shape[0], ids, outputs)
    bias, ids, column_weight, temperature = _dense(bias, ids, column_weight, temperature)
    statistics_all = not {"log_sum_sq_probs", "sum_log_probs", "is_top1"}.isdisjoint(outputs)
    statistics_entropy = statistics_all or "entropy" in outputs
    arch = architecture(hidden.device)
    tma = _tma_fits(arch, hidden, weight, u, b)
    odd_rows = _odd_rows(hidden, weight, u, b)
    save_logits = saved_logits is not None
    config = linear_softmax_fwd_config(arch, tma, low_rank is not None, statistics_all, odd_rows)
    V, H = weight.shape
    K = 0 if ids is None else ids.shape[1]
    rows = min(max(hidden.shape[0], 1), ROWS_PER_LAUNCH)
    slots = 6 if statistics_all else 3 if statistics_entropy else 2
    partials = hidden.new_empty(slots * config.splits * rows, dtype=torch.float32)
    split_weight = hidden.new_empty(config.splits, dtype=torch.float32)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        h, h_u, part_out = hidden[part], part_of(u, part), RowStatistics(*(part_of(x, part) for x in out))
        N = h.shape[0]
        items = triton.cdiv(N, config.block_n) * config.splits
        _linear_softmax_fwd_kernel[(min(items, programs(hidden.device)) if tma else items,)](
            _operand(h, (config.block_n, config.block_k), tma),
            _operand(weight, (config.block_v, config.block_k), tma),
            _operand(h_u, (config.block_n, config.block_k), tma),
            _operand(b, (config.block_v, config.block_k), tma),
            bias,
            part_of(ids, part),
            column_weight,
            part_of(temperature, part),
            part_out.log_probs,
            partials,
            split_weight,
            part_of(saved_logits, part),
            N,
            V,
            H,
            0 if u is None else u.shape[1],
            K,
            min(saved_logits.shape[1], V) if save_logits else None,
            saved_logits.stride(0) if save_logits else None,
            *_strides(h, weight, h_u, b),
            scale,
            softcap or 1.0,
            HAS_SOFTCAP=softcap is not None,
            ENTROPY=statistics_entropy,
            ALL=statistics_all,
            SAVE_LOGITS=save_logits,
            TMA=tma,
            UPCAST=triton_interpreted(),
            SPLITS=config.splits,
            GROUP_N=config.group_n,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            BLOCK_K=config.block_k,
            PARTS=config.parts,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        _combine_splits_kernel[(triton.cdiv(N, 64),)](
            partials,
            split_weight,
            part_of(ids, part),
            part_out.log_probs,
            part_out.logsumexp,
            part_out.entropy,
            part_out.log_sum_sq_probs,
            part_out.sum_log_probs,
            part_out.max_logit,
            part_out.is_top1,
            N,
            V,
            K,
            SPLITS=config.splits,
            BLOCK_SPLITS=triton.next_power_of_2(config.splits),
            BLOCK_N=64,
            enable_fp_fusion=True,
        )
    return out


@triton.jit(do_not_specialize=["N"])
def _linear_softmax_d_logits_kernel(
    hidden,  # (N, H)
    weight,  # (V, H)
    low_rank_u,  # (N, R)
    low_rank_b,  # (V, R)
    out,  # (N, V)
    bias_ptr,  # (V,)
    ids_ptr,  # (N, K) int64
    column_weight_ptr,  # (V,)
    temperature_ptr,  # (N,)
    logsumexp_ptr,  # (N,) float64
    a_ptr,  # (N,)
    b_ptr,  # (N,)
    e_ptr,  # (N,)
    c_ptr,  # (N, K)
    d_ptr,  # (N,)
    N,
    V,
    H,
    R,
    K,
    hidden_stride_n,
    hidden_stride_h,
    weight_stride_v,
    weight_stride_h,
    u_stride_n,
    u_stride_r,
    b_stride_v,
    b_stride_r,
    out_stride_n,
    out_stride_v,
    vocab_start,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    h = (hidden, N, H, hidden_stride_n, hidden_stride_h)
    w = (weight, V, H, weight_stride_v, weight_stride_h)
    h_low = (low_rank_u, N, R, u_stride_n, u_stride_r)
    w_low = (low_rank_b, V, R, b_stride_v, b_stride_r)
    row_tiles = tl.cdiv(N, BLOCK_N)
    v_tiles = tl.cdiv(V, BLOCK_V)
    k_tiles = tl.cdiv(H, BLOCK_K)
    # Programs take single tiles, since a slice has few per row and larger shares would be uneven; all tiles are in one loop
    # over K, so that the next tile's loads run during this one's epilogue.
    item = tl.program_id(0) - tl.num_programs(0)
    k, row, v_start = H, 0, 0
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for _ in range(tl.cdiv(row_tiles * v_tiles - tl.program_id(0), tl.num_programs(0)) * k_tiles):
        k += BLOCK_K
        if k >= H:
            k = 0
            item += tl.num_programs(0)
            row_tile, v_tile = _place(item, row_tiles, v_tiles, GROUP_N)
            row, v_start = row_tile * BLOCK_N, v_tile * BLOCK_V
        acc = _add_product(acc, h, w, row, v_start, k, BLOCK_K, TMA, UPCAST)
        last = k + BLOCK_K >= H
        if last:
            if low_rank_u is not None:
                for r in tl.range(0, R, BLOCK_K, num_stages=1):
                    acc = _add_product(acc, h_low, w_low, row, v_start, r, BLOCK_K, TMA, UPCAST)
            n = row + tl.arange(0, BLOCK_N)
            inside = n < N
            # All numbers of a skipped row are set to 0, so its gradient is 0 too.
            active = inside
            if ids_ptr is not None:
                active = inside & ~rows_skipped(ids_ptr, n, inside, K)
            inner, outer = row_scales(temperature_ptr, n, active, scale, softcap, HAS_SOFTCAP)
            slope = inner  # without the factor of the softcap's tanh
            if HAS_SOFTCAP:
                slope = inner * outer
            # logp = (z − hi) + lo; exp(lo) is folded into the per-row coefficients.
            logsumexp = tl.load(logsumexp_ptr + n, mask=active, other=0.0)
            hi = logsumexp.to(tl.float32)
            lo = (hi.to(tl.float64) - logsumexp).to(tl.float32)
            p_unit = exp(lo)
            a = tl.zeros((BLOCK_N,), tl.float32)
            b = tl.zeros((BLOCK_N,), tl.float32)
            e = tl.zeros((BLOCK_N,), tl.float32)
            d = tl.zeros((BLOCK_N,), tl.float32)
            if a_ptr is not None:
                a = tl.load(a_ptr + n, mask=active, other=0.0) * p_unit * slope
            if b_ptr is not None:
                b = tl.load(b_ptr + n, mask=active, other=0.0) * p_unit * slope
                a += b * lo
            if e_ptr is not None:
                e = tl.load(e_ptr + n, mask=active, other=0.0) * p_unit * p_unit * slope
            if d_ptr is not None:
                d = tl.load(d_ptr + n, mask=active, other=0.0) * slope
            for part in tl.static_range(PARTS):
                v, x = _with_bias(acc, bias_ptr, v_start, V, part, PARTS)
                x = tl.where(active[:, None], x, 0.0)
                z, capped = final_logits_and_tanh(x, inner[:, None], outer[:, None], HAS_SOFTCAP)
                logp = z - hi[:, None]
                p = exp(logp)
                bracket = tl.broadcast_to(a[:, None], (BLOCK_N, BLOCK_V // PARTS))
                if b_ptr is not None:
                    bracket += b[:, None] * tl.maximum(logp, -1e30)  # finite, since p may be 0
                if e_ptr is not None:
                    bracket += e[:, None] * p
                dx = p * bracket
                if d_ptr is not None:
                    if column_weight_ptr is not None:
                        column_weight = tl.load(column_weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)
                        dx += tl.where(active[:, None], d[:, None] * column_weight[None, :], 0.0)
                    else:
                        dx += d[:, None]
                if c_ptr is not None:
                    for j in range(K):
                        at = n.to(tl.int64) * K + j
                        y = tl.load(ids_ptr + at, mask=inside, other=-1) - vocab_start
                        c = tl.load(c_ptr + at, mask=active, other=0.0) * slope
                        here = (y >= v_start) & (y < v_start + BLOCK_V)
                        if tl.max(here.to(tl.int32), 0) > 0:
                            match = v[None, :] == tl.where(here, y, -1).to(tl.int32)[:, None]
                            dx += tl.where(match, c[:, None], 0.0)
                if HAS_SOFTCAP:
                    dx *= 1 - capped * capped
                if TMA:
                    out.store([row, v_start + part * (BLOCK_V // PARTS)], dx.to(out.dtype))
                else:
                    pointers = out + n.to(tl.int64)[:, None] * out_stride_n + v.to(tl.int64)[None, :] * out_stride_v
                    tl.store(pointers, dx.to(out.dtype.element_ty), mask=inside[:, None] & (v < V)[None, :])
            acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)


@on_its_device
def linear_softmax_d_logits(
    hidden,  # (N, H) bf16 or fp16
    weight,  # (V, H): a slice of the head's rows, as bias, low_rank's B and column_weight are
    bias,  # (V,) or None
    low_rank,  # (u (N, R), B (V, R)) or None
    ids,  # (N, K) int64 or None, of the whole vocabulary
    column_weight,  # (V,) or None
    temperature,  # (N,) fp32 or None
    logsumexp,  # (N,) float64
    a,  # (N,) or None
    b,  # (N,) or None
    e,  # (N,) or None
    c,  # (N, K) or None
    d,  # (N,) or None
    *,
    scale=1.0,
    softcap=None,
    vocab_start=0,
    out=None,  # (N, V) in hidden's dtype; best with 16-byte-aligned rows, which None allocates
):
    hidden, weight, low_rank_u, low_rank_b = _checked(hidden, weight, bias, low_rank)
    (N, H), V = hidden.shape, weight.shape[0]
    if out is None:
        out = hidden.new_empty(N, triton.cdiv(V, 16) * 16)[:, :V]
    if N == 0:
        return out
    bias, ids, column_weight, temperature = _dense(bias, ids, column_weight, temperature)
    logsumexp, a, b, e, c, d = _dense(logsumexp, a, b, e, c, d)
    arch = architecture(hidden.device)
    tma = _tma_fits(arch, hidden, weight, low_rank_u, low_rank_b, out)
    options = any(x is not None for x in (bias, softcap, column_weight, low_rank))
    odd_rows = _odd_rows(hidden, weight, low_rank_u, low_rank_b, out)
    config = linear_softmax_d_logits_config(arch, tma, options, odd_rows)
    tiles = triton.cdiv(N, config.block_n) * triton.cdiv(V, config.block_v)
    _linear_softmax_d_logits_kernel[(min(tiles, programs(hidden.device)) if tma else tiles,)](
        _operand(hidden, (config.block_n, config.block_k), tma),
        _operand(weight, (config.block_v, config.block_k), tma),
        _operand(low_rank_u, (config.block_n, config.block_k), tma),
        _operand(low_rank_b, (config.block_v, config.block_k), tma),
        _operand(out, (config.block_n, config.block_v // config.parts), tma),
        bias,
        ids,
        column_weight,
        temperature,
        logsumexp,
        a,
        b,
        e,
        c,
        d,
        N,
        V,
        H,
        0 if low_rank_u is None else low_rank_u.shape[1],
        0 if ids is None else ids.shape[1],
        *_strides(hidden, weight, low_rank_u, low_rank_b, out),
        vocab_start,
        scale,
        softcap or 1.0,
        HAS_SOFTCAP=softcap is not None,
        TMA=tma,
        UPCAST=triton_interpreted(),
        GROUP_N=config.group_n,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_K=config.block_k,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return out

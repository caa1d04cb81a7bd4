"""What the kernels share: skipped rows, and final logits (scale first, then softcap, then temperature)."""

import triton
import triton.language as tl

# The least finite fp32, with which trainers also mask: the initial running maximum.
FLOOR = tl.constexpr(-3.4028234663852886e38)
SKIP = tl.constexpr(-100)  # a row whose ids are all this is skipped


@triton.jit
def rows_skipped(
    ids_ptr,  # (N, K) int64
    row,  # (BLOCK_N,)
    inside,  # (BLOCK_N,) whether the index is that of a row
    K,
):
    skipped = inside
    for k in range(K):
        skipped = skipped & (tl.load(ids_ptr + row.to(tl.int64) * K + k, mask=inside, other=0) == SKIP)
    return skipped


@triton.jit
def by_lane(x, VEC: tl.constexpr, SINGLY: tl.constexpr):
    """A tile ``(BLOCK_N, BLOCK_V)`` as ``(BLOCK_N, LANES, VEC)``, with the VEC columns of a lane in one thread: adjacent ones,
    as a thread loads 16 bytes at once, or LANES apart where it loads logits singly."""
    LANES: tl.constexpr = x.shape[1] // VEC
    if SINGLY:
        x = tl.permute(tl.reshape(x, (x.shape[0], VEC, LANES)), (0, 2, 1))
    else:
        x = tl.reshape(x, (x.shape[0], LANES, VEC))
    return x


@triton.jit
def exp(x):
    """exp, but 0 for results below 2⁻¹²⁶, which change no sum here; for those tl.exp spends three more instructions."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    # libdevice has no tanh in the interpreter. Near 0 a polynomial (relative error 7e-9) keeps the accuracy that
    # 1 − 2q/(1 + q), q = exp(−2|x|), loses to cancellation.
    s = x * x
    near = x * s * (-0.3333326 + s * (0.1333083 + s * (-0.05368802 + s * (0.02046942 - s * 0.00551516)))) + x
    q = tl.exp2(-2.8853900817779268 * tl.abs(x))
    r = tl.rsqrt(1 + q)
    r = r * r  # 1/(1 + q): as a division it would take nine instructions instead of two
    far = 1 - 2 * q * r
    return tl.where(tl.abs(x) < 0.65, near, tl.where(x < 0, -far, far))


@triton.jit
def row_scales(
    temperature_ptr,  # (N,) or None
    row,  # (BLOCK_N,)
    inside,  # (BLOCK_N,) rows whose temperature is read
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    times=None,  # a factor for every temperature
):
    """``inner`` and ``outer`` of :func:`final_logits_and_tanh`, one of each per row, so that no logit needs a division."""
    HAS_TEMPERATURE: tl.constexpr = temperature_ptr is not None or times is not None
    temperature = tl.full(row.shape, 1.0, tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row, mask=inside, other=1.0).to(tl.float32)
    if times is not None:
        temperature *= times
    inner = scale
    outer = softcap
    if HAS_SOFTCAP:
        inner = tl.div_rn(scale, softcap)
    if HAS_TEMPERATURE and HAS_SOFTCAP:
        outer = tl.div_rn(softcap, temperature)
    elif HAS_TEMPERATURE:
        inner = tl.div_rn(scale, temperature)
    return tl.broadcast_to(inner, row.shape), tl.broadcast_to(outer, row.shape)


@triton.jit
def final_logits_and_tanh(x, inner, outer, HAS_SOFTCAP: tl.constexpr, offset=0.0):
    """``z = softcap·tanh(scale·x/softcap)/temperature``, or ``scale·x/temperature`` without softcap; and the tanh.

    ``offset`` (0 or −∞) is added, so that the product is rounded here. Compilers fuse a bare product with a later subtraction
    in one pass and not in another: a probability would then belong to another logit than its logsumexp.
    """
    capped = x
    if HAS_SOFTCAP:
        capped = tanh(x * inner)
        z = tl.fma(capped, outer, offset)
    else:
        z = tl.fma(x, inner, offset)
    return z, capped


@triton.jit
def final_logits_and_slope(x, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Final logits and their slope ``dz/dx``."""
    z, capped = final_logits_and_tanh(x, inner, outer, HAS_SOFTCAP)
    slope = inner
    if HAS_SOFTCAP:
        slope = inner * outer * (1 - capped * capped)
    return z, slope


@triton.jit
def final_logits(x, inner, outer, HAS_SOFTCAP: tl.constexpr, offset=0.0):
    z, _ = final_logits_and_tanh(x, inner, outer, HAS_SOFTCAP, offset)
    return z

"""What the kernels share: which rows are skipped, and final logits, element by element: scale first, then softcap.

Temperature is the caller's.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(
    -3.4028234663852886e38
)  # the least fp32, with which trainers mask: stands for the maximum of nothing
SKIP = tl.constexpr(-100)  # a row whose ids are all this is skipped


@triton.jit
def rows_skipped(
    ids_ptr,  # (N, K) int64
    row,  # (BLOCK_N,)
    inside,  # (BLOCK_N,) whether it is a row
    K,
):
    skipped = inside
    for k in range(K):
        skipped = skipped & (tl.load(ids_ptr + row.to(tl.int64) * K + k, mask=inside, other=0) == SKIP)
    return skipped


@triton.jit
def exp(x):
    """0 for results below 2⁻¹²⁶, which no sum here can see and on which tl.exp spends three more instructions."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    # libdevice has no tanh in the interpreter. Near 0 a polynomial (relative error 7e-9) keeps the accuracy that
    # 1 − 2q/(1 + q) loses to cancellation; one division.
    s = x * x
    near = x * s * (-0.3333326 + s * (0.1333083 + s * (-0.05368802 + s * (0.02046942 - s * 0.00551516)))) + x
    q = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(−2|x|): tl.exp takes three more instructions for results near 0
    far = 1 - 2 * q / (1 + q)
    return tl.where(tl.abs(x) < 0.65, near, tl.where(x < 0, -far, far))


@triton.jit
def final_logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """``z = softcap·tanh(scale·x/softcap)``, or ``scale·x`` without softcap."""
    z = x * scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def final_logits_slope(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """``dz/dx``: ``scale·(1 − tanh²)``, with ``1 − tanh² = 4q/(1 + q)²``, which nears 0 without cancellation."""
    slope = scale
    if HAS_SOFTCAP:
        q = tl.exp(-2 * tl.abs(x * scale / softcap))
        slope = scale * (4 * q / ((1 + q) * (1 + q)))
    return slope

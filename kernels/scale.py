"""A gradient made in forward, times the upstream gradient of its loss, multiplied in fp32 and rounded once.

In place there is nothing to do if the upstream gradient is 1, as under ``loss.backward()``: each program checks that itself, so
the host need not wait for the value. Otherwise every element is read and written once.
"""

import torch
import triton
import triton.language as tl

from .configurations import on_its_device, programs, scale_config


@triton.jit
def _scale_kernel(
    gradient_ptr,  # (size,)
    upstream_ptr,  # ()
    out_ptr,  # (size,), may be gradient_ptr
    size,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr).to(tl.float32)
    blocks = (size - 1) // BLOCK + 1  # tl.cdiv would add BLOCK to a size that may be nearly 2**31
    if IN_PLACE:
        blocks = tl.where(upstream == 1, 0, blocks)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (gradient * upstream).to(out_ptr.dtype.element_ty), mask=at < size)


@on_its_device
def scale(
    gradient,  # any shape, contiguous
    upstream,  # ()
    out: torch.Tensor,  # as gradient, in its dtype or another; may be gradient itself
):
    if gradient.numel() == 0:
        return
    BLOCK, num_warps, each = scale_config()
    grid = min(triton.cdiv(gradient.numel(), BLOCK), each * programs(gradient.device))
    _scale_kernel[(grid,)](
        gradient, upstream, out, gradient.numel(), IN_PLACE=out is gradient, BLOCK=BLOCK,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip

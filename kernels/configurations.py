"""The shipped configurations: one small function per kernel with its reason, nothing tuned at run time.

To add a kernel, write its function here and, in ``tests/compile_gate.py``, the calls of its launcher that ask for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class MatrixTile(NamedTuple):
    block_n: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # the epilogue takes the tile in this many equal parts: fewer registers
    group_n: int = 16  # row tiles side by side: 16 of 128 rows and H 4096 are 16 MiB, which L2 keeps
    splits: int = 1  # into how many the forward kernel cuts the vocabulary; a program takes one at a time


# A quarter of the multiprocessors (132, 148, 108; an eighth of 304): row tiles of N = 1024·2^i times splits then fill whole
# waves of one program per multiprocessor.
SPLITS = {"interpreter": 3, "sm_90": 33, "sm_100": 37, "sm_80": 27, "gfx942": 38}


def architecture(device: torch.device) -> str:
    """The target whose configurations ``device`` uses."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # Consumer Blackwell (12.x) has Ampere's matrix instructions and its amount of shared memory.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def multiplies_matrices(device: torch.device) -> bool:
    """Whether Triton has matrix instructions for it: before sm_80 (T4) ``tl.dot`` becomes scalar products, and spills."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def all_registers(device: torch.device) -> dict[str, int]:
    """The launch option that lets NVIDIA's assembler use every register a thread can have. Without it, it saves registers for
    more programs per multiprocessor, and issues each load of a tile only when the one before has arrived."""
    return {} if architecture(device) in ("interpreter", "gfx942") else {"maxnreg": 255}


def loaded_singly(logits: torch.Tensor) -> bool:
    """Whether Triton loads each logit of ``(B, V, S)`` by itself: those of a row are not adjacent, or it cannot know that every
    row starts at a multiple of 16 bytes. Rows a multiple of V apart are summed like those that are V apart: they may be a
    slice of them, or one row expanded, and a row's bits do not depend on the rows beside it."""
    B, V, S = logits.shape
    apart = logits.stride(2) if S > 1 else logits.stride(0)
    starts = (logits.data_ptr(), logits.stride(0) if B > 1 else 0, apart, V if apart % max(V, 1) == 0 else 0)
    return logits.stride(1) != 1 or any(x % 16 for x in starts)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make the first argument's device current: Triton launches on the current device, wherever the tensors are."""

    @functools.wraps(launch)
    def launched(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *args, **kwargs)

    return launched


def programs(device: torch.device) -> int:
    """Programs of a persistent grid: one per multiprocessor; two in the interpreter, so that each has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def rows_in_flight(device: torch.device, row_bytes: int, tile_bytes: int) -> int:
    """Programs of a persistent grid, each of which reads a row, a tile at a time, and then again from its end.

    As many as there are rows that fit L2, counting half a row each, since on average half is still to be read again; at most 6
    per multiprocessor. But at least as many as keep 32 KiB of loads in flight there: an H200's 4.3 TB/s at 0.7 µs take 23.
    """
    each = programs(device)
    room = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return each * max(2**15 // tile_bytes, min(6, room // (row_bytes * each)))


def softmax_rows_fwd_config(
    dtype: torch.dtype, vocabulary_contiguous: bool, options: bool
) -> tuple[int, int, int, int]:
    """``BLOCK_N, BLOCK_V, VEC, num_warps``, also for the kernel that does forward and backward at once; ``options``: weights,
    or statistics beyond log-probabilities and entropy.

    One row per program if its logits are adjacent: each lane loads 16 bytes (VEC logits) four times before it uses any (see
    :func:`all_registers`), or 8 logits with options. If rows are adjacent instead (``(N, C, d)`` input), 32 rows side by side
    keep the loads coalesced; with every option, 4 warps spill 368 bytes.
    """
    if not vocabulary_contiguous:
        return 32, 64, 8, 8
    if options:
        return 1, 2048, 2, 8
    return (1, 4096, 4, 8) if dtype == torch.float32 else (1, 8192, 8, 8)


def softmax_rows_bwd_config(dtype: torch.dtype, vocabulary_contiguous: bool, options: bool) -> tuple[int, int, int]:
    """``BLOCK_N, BLOCK_V, num_warps``: as in forward, with half the tile, since each program writes as much as it reads.

    ``options``: coefficients beyond those of log-probabilities. On 4 warps these spill 16 to 160 bytes.
    """
    if not vocabulary_contiguous:
        return 32, 64, 8 if options else 4
    return 1, 2048 if dtype == torch.float32 else 4096, 8 if options else 4


def divergence_rows_config(dtype: torch.dtype) -> tuple[int, int, int]:
    """``BLOCK_V, VEC, num_warps``: 16 bytes of each row per lane, since about ten numbers per logit are alive at once."""
    return (1024, 4, 8) if dtype == torch.float32 else (2048, 8, 8)


def scale_config() -> tuple[int, int, int]:
    """``BLOCK``, ``num_warps``, programs per multiprocessor: 64 KiB of 16-bit loads in flight on each, twice what its share of
    4.3 TB/s at 0.7 µs needs."""
    return 8192, 8, 4


def odd_rows_config(splits: int = 1) -> MatrixTile:
    """If rows do not start at multiples of 16 elements, each element is loaded singly, with the registers of a larger tile.

    128 rows on 8 warps then spill 8 to 200 bytes, 64 on 4 warps up to 272.
    """
    return MatrixTile(64, 64, 32, 8, 3, splits=splits)


def linear_softmax_fwd_config(arch: str, tma: bool, low_rank: bool, all_statistics: bool, odd_rows: bool) -> MatrixTile:
    """The streaming tile: the widest that compiles without a spill. The choice among those is reasoned, not yet measured.

    With the copy engine 128×256×64 over 4 stages, taken by the epilogue 64 columns at a time: all at once, it spills 192 bytes
    with every option, 120 with none. The low-rank product takes a stage of shared memory of its own, and on sm_100 a second
    accumulator in tensor memory, which then holds two tiles of 128 columns but not two of 256. Without the copy engine
    128×128×32; all statistics take half the tile, which otherwise spills: 96 bytes on sm_80, 12 to 392 on gfx942, 120 on
    sm_100, and on sm_90 32 where logits are saved and 120 with bias, softcap and column weights and a vocabulary that is no
    multiple of 16; on sm_100 with the copy engine a quarter (192 bytes otherwise, with every option and logits saved). On
    gfx942 2 stages: with 64 of hidden at a time they spill 32 bytes where entropy is asked for and logits are saved.

    The tile must depend neither on N nor on whether logits are saved, so that no token's numbers depend on these.
    """
    splits = SPLITS[arch]
    if arch == "interpreter":
        return MatrixTile(16, 64, 32, 4, 2, parts=2 if tma else 1, group_n=2, splits=splits)
    block_v = 64 if all_statistics else 128
    if odd_rows and not tma:
        return odd_rows_config(splits)
    if arch == "gfx942":
        return MatrixTile(128, block_v, 32, 8, 2, splits=splits)
    if not tma:
        return MatrixTile(128, block_v, 32, 8, 4, parts=block_v // 64, splits=splits)
    if all_statistics and arch == "sm_100":
        return MatrixTile(128, 64, 64, 8, 4, splits=splits)
    if all_statistics or (low_rank and arch == "sm_100"):
        return MatrixTile(128, 128, 64, 8, 4, parts=2, splits=splits)
    return MatrixTile(128, 256, 64, 8, 3 if low_rank else 4, parts=4, splits=splits)


def linear_softmax_d_logits_config(arch: str, tma: bool, options: bool, odd_rows: bool) -> MatrixTile:
    """The tile for recomputed logits, chosen like the streaming one; ``options`` are bias, softcap, column weights, low rank.

    With the copy engine 128×256×64 over 3 stages, written 64 columns (128 bytes) at a time. With options it is half as wide:
    otherwise it would spill (8 to 72 bytes on sm_80, sm_90 and sm_100, 32 to 260 on gfx942) or not fit tensor memory (sm_100).
    """
    if arch == "interpreter":
        return MatrixTile(16, 64, 32, 4, 2, parts=2 if tma else 1, group_n=2)
    if odd_rows and not tma:
        return odd_rows_config()
    block_v = 128 if tma and options else 256 if tma else 64 if options else 128
    if arch == "gfx942":
        return MatrixTile(128, block_v, 64, 8, 2)
    if not tma:
        return MatrixTile(128, block_v, 32, 8, 4, parts=block_v // 64)
    return MatrixTile(128, block_v, 64, 8, 3, parts=block_v // 64)

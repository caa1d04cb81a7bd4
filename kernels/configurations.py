"""The tile shapes that are shipped, one small function per kernel; nothing is tuned at run time."""

import torch


def softmax_rows_fwd_config(dtype: torch.dtype, vocabulary_contiguous: bool) -> tuple[int, int, int, int]:
    """``BLOCK_N, BLOCK_V, VEC, num_warps``.

    One row per program where its logits are adjacent: each lane loads 16 bytes (VEC logits) four times before it uses any.
    Where rows are adjacent instead (``(N, C, d)`` input), 32 rows side by side keep the loads coalesced.
    """
    if not vocabulary_contiguous:
        return 32, 64, 8, 4
    return (1, 4096, 4, 8) if dtype == torch.float32 else (1, 8192, 8, 8)


def softmax_rows_bwd_config(dtype: torch.dtype, vocabulary_contiguous: bool) -> tuple[int, int, int]:
    """``BLOCK_N, BLOCK_V, num_warps``: as forward, with half the tile, since each program writes as much as it reads."""
    if not vocabulary_contiguous:
        return 32, 64, 4
    return (1, 2048, 4) if dtype == torch.float32 else (1, 4096, 4)

"""The configurations that are shipped: one small function per kernel with its reason, nothing tuned at run time.

:func:`shipped` lists what those functions can return, and the compile gate (``tests/compile_gate.py``) walks it. To add a
kernel, write its function here and, below, a generator that yields one :class:`Shipped` per configuration: the kernel,
``arguments`` (every parameter by name) and what the launcher passes as ``num_warps`` and ``num_stages``. An argument that is a
string is a Triton type, with ``:16`` where the launcher's value is divisible by 16 (every aligned pointer, most sizes), since
Triton compiles another kernel for it; anything else is the value of a constexpr, of a size that is 1, or ``None`` for a pointer
that is absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Shipped(NamedTuple):
    name: str
    fn: Any  # the @triton.jit function
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool = False  # whether it multiplies matrices, so that its machine code must show the matrix instruction


class MatrixTile(NamedTuple):
    block_n: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # the epilogue takes the tile in this many halves: fewer registers
    group_n: int = 16  # row tiles side by side: 16 of 128 rows and H 4096 are 16 MiB, which L2 keeps
    splits: int = 1  # of the vocabulary: what one program takes of it at a time


# A quarter of the multiprocessors (132, 148, 108; an eighth of 304): row tiles of N = 1024·2^i times splits then fill whole
# waves of one program per multiprocessor.
SPLITS = {"interpreter": 3, "sm_90": 33, "sm_100": 37, "sm_80": 27, "gfx942": 38}


def architecture(device: torch.device) -> str:
    """The target whose configurations ``device`` takes."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # Consumer Blackwell (12.x) has Ampere's matrix instructions and its amount of shared memory.
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, wherever the tensors are: make that the device of the first argument."""

    @functools.wraps(launch)
    def launched(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return launch(first, *args, **kwargs)

    return launched


def programs(device: torch.device) -> int:
    """Programs of a persistent grid: one per multiprocessor; two in the interpreter, so that each has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def softmax_rows_fwd_config(
    dtype: torch.dtype, vocabulary_contiguous: bool, options: bool
) -> tuple[int, int, int, int]:
    """``BLOCK_N, BLOCK_V, VEC, num_warps``, also of both at once; ``options``: weights, or statistics beyond
    log-probabilities and entropy.

    One row per program where its logits are adjacent: each lane loads 16 bytes (VEC logits) four times before it uses any.
    With options a row that starts anywhere would spill so (112 to 1352 bytes), and takes 8 logits a lane. Where rows are
    adjacent instead (``(N, C, d)`` input), 32 rows side by side keep the loads coalesced; every option on 4 warps spills
    368 bytes.
    """
    if not vocabulary_contiguous:
        return 32, 64, 8, 8
    if options:
        return 1, 2048, 2, 8
    return (1, 4096, 4, 8) if dtype == torch.float32 else (1, 8192, 8, 8)


def softmax_rows_bwd_config(dtype: torch.dtype, vocabulary_contiguous: bool, options: bool) -> tuple[int, int, int]:
    """``BLOCK_N, BLOCK_V, num_warps``: as forward, with half the tile, since each program writes as much as it reads.

    ``options``: coefficients beyond those of log-probabilities. On 4 warps they spill 16 to 160 bytes.
    """
    if not vocabulary_contiguous:
        return 32, 64, 8 if options else 4
    return 1, 2048 if dtype == torch.float32 else 4096, 8 if options else 4


def divergence_rows_config() -> tuple[int, int, int]:
    """``BLOCK_V, VEC, num_warps``: 16 bytes of either row per lane, since about ten numbers per logit are alive at once."""
    return 1024, 4, 8


def odd_rows_config(splits: int) -> MatrixTile:
    """Where rows do not start at multiples of 16 elements each is read by itself: that takes the registers of a larger tile.

    128 rows on 8 warps spill 8 to 200 bytes so, 64 on 4 warps up to 272.
    """
    return MatrixTile(64, 64, 32, 8, 3, splits=splits)


def linear_softmax_fwd_config(
    arch: str, tma: bool, low_rank: bool, options: bool, all_statistics: bool, odd_rows: bool
) -> MatrixTile:
    """The streaming tile: the widest that compiles without a spill. The choice among those is reasoned, not yet measured.

    With the copy engine 128×256×64 over 4 stages, taken by the epilogue 64 columns at a time: whole, it spills 192 bytes with
    every option, and 120 plain. The low-rank product takes a stage of shared memory of its own, and on sm_100 a second
    accumulator in tensor memory, which then holds two tiles of 128 columns but not two of 256. Without the copy engine
    128×128×32; all statistics take half the tile, which otherwise spills: 96 bytes on sm_80, 228 on gfx942, 120 on sm_100, and
    on sm_90 32 where logits are saved and 120 with bias, softcap and column weights and a vocabulary that is no multiple of
    16; on sm_100 with the copy engine a quarter (192 bytes otherwise, with every option and logits saved).

    It must depend neither on N nor on whether logits are saved, so that no token's numbers do.
    """
    splits = SPLITS[arch]
    if arch == "interpreter":
        return MatrixTile(16, 64, 32, 4, 2, parts=2 if tma else 1, group_n=2, splits=splits)
    block_v = 64 if all_statistics else 128
    if odd_rows and not tma:
        return odd_rows_config(splits)
    if arch == "gfx942":
        return MatrixTile(128, block_v, 64, 8, 2, splits=splits)
    if not tma:
        return MatrixTile(128, block_v, 32, 8, 4, parts=block_v // 64, splits=splits)
    if all_statistics and arch == "sm_100":
        return MatrixTile(128, 64, 64, 8, 4, splits=splits)
    if all_statistics or (low_rank and arch == "sm_100"):
        return MatrixTile(128, 128, 64, 8, 4, parts=2, splits=splits)
    return MatrixTile(128, 256, 64, 8, 3 if low_rank else 4, parts=4, splits=splits)


def linear_softmax_d_logits_config(arch: str, tma: bool, options: bool, odd_rows: bool) -> MatrixTile:
    """The recomputed tile, chosen as the streaming one is; ``options`` are bias, softcap, column weights and low rank.

    With the copy engine 128×256×64 over 3 stages, written 64 columns (128 bytes) at a time. With options it is half as wide:
    it would spill (8 to 72 bytes on sm_80, sm_90 and sm_100, 104 to 156 on gfx942) or not fit tensor memory (sm_100).
    """
    splits = SPLITS[arch]
    if arch == "interpreter":
        return MatrixTile(16, 64, 32, 4, 2, parts=2 if tma else 1, group_n=2, splits=splits)
    if odd_rows and not tma:
        return odd_rows_config(splits)
    block_v = 128 if tma and options else 256 if tma else 64 if options else 128
    if arch == "gfx942":
        return MatrixTile(128, block_v, 64, 8, 2, splits=splits)
    if not tma:
        return MatrixTile(128, block_v, 32, 8, 4, parts=block_v // 64, splits=splits)
    return MatrixTile(128, block_v, 64, 8, 3, parts=block_v // 64, splits=splits)


def shipped(arch: str) -> Iterator[Shipped]:
    """Every configuration for ``arch``: one of sm_80, sm_90, sm_100, gfx942."""
    yield from _linear_softmax(arch)
    yield from _softmax_rows()
    yield from _divergence_rows()


def _linear_softmax(arch: str) -> Iterator[Shipped]:
    from . import linear_softmax as module  # which reads its configurations from this file

    def common(
        tma: bool, tile: MatrixTile, options: bool, low_rank: bool, odd_rows: bool, odd_vocab: bool, dtype: str = "bf16"
    ) -> dict[str, Any]:
        size = "i32" if odd_rows else "i32:16"

        def matrix(block: int) -> str:
            return f"tensordesc<{dtype}[{block}, {tile.block_k}]>" if tma else f"*{dtype}:16"

        optional = {"bias_ptr": f"*{dtype}:16", "column_weight_ptr": "*fp32:16"}
        return dict(
            hidden=matrix(tile.block_n),
            weight=matrix(tile.block_v),
            low_rank_u=matrix(tile.block_n) if low_rank else None,
            low_rank_b=matrix(tile.block_v) if low_rank else None,
            **(optional if options else dict.fromkeys(optional)),
            temperature_ptr="*fp32:16",
            ids_ptr="*i64:16",
            N="i32",
            V="i32" if odd_vocab else "i32:16",
            H=size,
            R=size,
            K="i32" if options else 1,
            hidden_stride_n=size,
            hidden_stride_h=1,
            weight_stride_v=size,
            weight_stride_h=1,
            u_stride_n=size,
            u_stride_r=1 if low_rank else "i32:16",
            b_stride_v=size,
            b_stride_r=1 if low_rank else "i32:16",
            scale="fp32",
            softcap="fp32",
            HAS_LOW_RANK=low_rank,
            HAS_BIAS=options,
            HAS_IDS=True,
            HAS_COLUMN_WEIGHT=options,
            HAS_TEMPERATURE=True,
            HAS_SOFTCAP=options,
            TMA=tma,
            UPCAST=False,
            SPLITS=tile.splits,
            GROUP_N=tile.group_n,
            BLOCK_N=tile.block_n,
            BLOCK_V=tile.block_v,
            BLOCK_K=tile.block_k,
            PARTS=tile.parts,
        )

    # (options, low rank, level of statistics and coefficients). A vocabulary that is no multiple of 16 asks for more registers:
    # it is what is compiled but for the two plainest. Odd rows are all that pointers are for beside a copy engine.
    choices = [
        (False, False, 0),
        (False, False, 1),
        (False, False, 2),
        (True, False, 2),
        (True, True, 0),
        (True, True, 2),
    ]
    few = [(False, False, 1), (True, False, 2), (True, True, 2)]
    saved_names = ("saved_logits_ptr", "saved_columns", "saved_stride_n")
    of_saved = ("*fp32:16", "i32", "i32:16")
    saving = {(False, False, 1), (False, False, 2), (True, False, 2), (True, True, 2)}
    has_tma = arch in ("sm_90", "sm_100")
    variants = (
        [(True, False, choices), (False, True, few)] if has_tma else [(False, False, choices), (False, True, few[2:])]
    )
    for tma, odd_rows, (options, low_rank, level) in [(*v[:2], choice) for v in variants for choice in v[2]]:
        odd_vocab = odd_rows or options or level == 2
        label = "TMA" if tma else "pointers, odd rows" if odd_rows else "pointers"
        label += (", bias softcap weights" if options else "") + (" low-rank" if low_rank else "")
        tile = linear_softmax_fwd_config(arch, tma, low_rank, options, level == 2, odd_rows)
        for save_logits in (False, True) if not odd_rows and (options, low_rank, level) in saving else (False,):
            outputs = ("log-probs", "entropy", "all")[level]
            yield Shipped(
                f"linear_softmax_fwd {outputs}, {label}{', saving logits' if save_logits else ''}",
                module._linear_softmax_fwd_kernel,
                common(tma, tile, options, low_rank, odd_rows, odd_vocab)
                | {f"{x}_ptr": "*fp32:16" for x in ("logits_at_ids", "partials", "split_weight")}
                | dict(zip(saved_names, of_saved if save_logits else (None,) * 3, strict=True))
                | {"ENTROPY": level >= 1, "ALL": level == 2, "SAVE_LOGITS": save_logits},
                tile.num_warps,
                tile.num_stages,
                matrix=True,
            )
        tile = linear_softmax_d_logits_config(arch, tma, options, odd_rows)
        used = ("ac", "abc", "abecd")[level]
        yield Shipped(
            f"linear_softmax_d_logits {used}, {label}",
            module._linear_softmax_d_logits_kernel,
            common(tma, tile, options, low_rank, odd_rows, odd_vocab)
            | {f"{x}_ptr": "*fp32:16" if x in used else None for x in "abecd"}
            | {f"HAS_{x.upper()}": x in used for x in "abecd"}
            | {
                "out": f"tensordesc<bf16[{tile.block_n}, {tile.block_v // tile.parts}]>" if tma else "*bf16:16",
                "logsumexp_ptr": "*fp64:16",
                "out_stride_n": "i32:16",
                "out_stride_v": 1,
                "vocab_start": "i32:16",
            },
            tile.num_warps,
            tile.num_stages,
            matrix=True,
        )
    tile = linear_softmax_fwd_config(arch, False, False, False, False, False)
    scalars = {"N": "i32", "V": "i32:16", "K": "i32", "HAS_IDS": True, "ENTROPY": True}
    row_sums = ("logsumexp", "entropy", "log_sum_sq_probs", "sum_log_probs")
    sizes = {"SPLITS": tile.splits, "BLOCK_SPLITS": 1 << (tile.splits - 1).bit_length(), "BLOCK_N": 64}
    floats = ("partials", "split_weight", "log_probs", "max_logit")
    for everything in (False, True):
        yield Shipped(
            f"linear_softmax combine, {'all' if everything else 'entropy'}",
            module._combine_splits_kernel,
            {f"{name}_ptr": "*fp32:16" for name in floats}
            | {
                "ids_ptr": "*i64:16",
                **dict.fromkeys((f"{name}_ptr" for name in row_sums), "*fp64:16"),
                "is_top1_ptr": "*i1:16",
            }
            | dict.fromkeys(("LOG_SUM_SQ_PROBS", "SUM_LOG_PROBS", "MAX_LOGIT", "IS_TOP1"), everything)
            | scalars
            | sizes,
            num_warps=4,
            num_stages=3,
        )


def _softmax_rows() -> Iterator[Shipped]:
    from . import softmax_rows as module

    flags = ("COLUMN_WEIGHT", "TEMPERATURE", "PROBABILITIES", "SOFTCAP")
    statistics = ("ENTROPY", "LOG_SUM_SQ_PROBS", "SUM_LOG_PROBS", "MAX_LOGIT", "IS_TOP1")
    for vocabulary_contiguous, everything in ((True, False), (True, True), (False, True)):
        dtype = torch.bfloat16 if vocabulary_contiguous else torch.float32
        logits = f"*{'bf16' if vocabulary_contiguous else 'fp32'}:16"
        label = f"{'rows' if vocabulary_contiguous else 'columns'}{', every option' if everything else ''}"
        common = {
            "logits_ptr": logits,
            "ids_ptr": "*i64:16",
            "logsumexp_ptr": "*fp64:16",
            "temperature_ptr": "*fp32:16",
            "column_weight_ptr": "*fp32:16" if everything else None,
            "probabilities_ptr": logits if everything else None,
            **dict.fromkeys(
                ("N", "V"), "i32"
            ),  # rows that start anywhere, as those of 50 257 logits do, ask for most registers
            "S": 1 if vocabulary_contiguous else "i32",
            "K": "i32" if everything else 1,
            **{f"{x}_stride_{dim}": "i32" for x in ("logits", "probabilities") for dim in "bvs"},
            f"logits_stride_{'v' if vocabulary_contiguous else 's'}": 1,
            f"probabilities_stride_{'v' if vocabulary_contiguous else 's'}": 1,
            **dict.fromkeys(("label_smoothing", "scale", "softcap"), "fp32"),
            "HAS_IDS": True,
            **{f"HAS_{flag}": everything or flag in ("TEMPERATURE", "SOFTCAP") for flag in flags},
        }
        BLOCK_N, BLOCK_V, VEC, num_warps = softmax_rows_fwd_config(dtype, vocabulary_contiguous, everything)
        yield Shipped(
            f"softmax_rows_fwd {label}",
            module._softmax_rows_fwd_kernel,
            common
            | dict.fromkeys(("log_probs_ptr", "max_logit_ptr"), "*fp32:16")
            | dict.fromkeys(("entropy_ptr", "log_sum_sq_probs_ptr", "sum_log_probs_ptr", "weight_sum_ptr"), "*fp64:16")
            | {"is_top1_ptr": "*i1:16"}
            | dict.fromkeys(statistics, everything)
            | {"ENTROPY": True}
            | {"BLOCK_N": BLOCK_N, "BLOCK_V": BLOCK_V, "VEC": VEC},
            num_warps,
            num_stages=3,
        )
        BLOCK_N, BLOCK_V, num_warps = softmax_rows_bwd_config(dtype, vocabulary_contiguous, everything)
        used = "abecd" if everything else "ac"
        yield Shipped(
            f"softmax_rows_bwd {label}",
            module._softmax_rows_bwd_kernel,
            common
            | {f"{x}_ptr": "*fp32:16" if x in used else None for x in "abecd"}
            | {f"HAS_{x.upper()}": x in used for x in "abecd"}
            | {"out_ptr": logits, "vocab_start": "i32:16", "BLOCK_N": BLOCK_N, "BLOCK_V": BLOCK_V}
            | {f"out_stride_{dim}": common[f"logits_stride_{dim}"] for dim in "bvs"},
            num_warps,
            num_stages=3,
        )

    for everything in (False, True):
        _, BLOCK_V, VEC, num_warps = softmax_rows_fwd_config(torch.bfloat16, True, everything)
        yield Shipped(
            f"softmax_rows_fwd_bwd{' every option' if everything else ''}",
            module._softmax_rows_fwd_bwd_kernel,
            {"logits_ptr": "*bf16:16", "ids_ptr": "*i64:16", "logsumexp_ptr": "*fp64:16"}
            | dict.fromkeys(("temperature_ptr", "of_log_probs_ptr", "of_square_ptr", "log_probs_ptr"), "*fp32:16")
            | dict.fromkeys(("column_weight_ptr", "of_sum_log_probs_ptr"), "*fp32:16" if everything else None)
            | {"sum_log_probs_ptr": "*fp64:16", "is_top1_ptr": "*i1:16"}
            | {"V": "i32", "logits_stride_n": "i32:16", "scale": "fp32", "softcap": "fp32"}
            | dict.fromkeys(("HAS_TEMPERATURE", "HAS_SOFTCAP", "SQUARE"), True)
            | dict.fromkeys(("HAS_COLUMN_WEIGHT", "SUM_LOG_PROBS", "IS_TOP1"), everything)
            | {"BLOCK_V": BLOCK_V, "VEC": VEC},
            num_warps,
            num_stages=3,
        )


def _divergence_rows() -> Iterator[Shipped]:
    import triton.language as tl

    from . import divergence_rows as module  # which reads its configurations from this file

    BLOCK_V, VEC, num_warps = divergence_rows_config()
    optional = dict.fromkeys(("student_temperature_ptr", "teacher_temperature_ptr", "hard_ptr", "nll_ptr"), "*fp32:16")
    flags = ("HARD", "TEMPERATURE", "STUDENT_TEMPERATURE", "TEACHER_TEMPERATURE", "STUDENT_SOFTCAP", "TEACHER_SOFTCAP")
    kinds = ("forward_kl", "reverse_kl", "jsd", "skewed_kl", "tvd", "cross_entropy")
    # jsd is the one with most to hold
    choices = [("jsd", "all", False), *((kind, "all", True) for kind in kinds)]
    choices += [("jsd", step, True) for step in ("normalizers", "sums", "gradients")]
    for kind, step, everything in choices:
        strides = {
            f"{x}_stride_{dim}": 1 if dim == "v" else "i32" if dim == "b" else 0
            for x in ("student", "teacher", "d_student", "d_teacher")
            for dim in "bvs"
        }
        whole, writes = step == "all", step in ("all", "gradients")
        yield Shipped(
            f"divergence_rows {kind}, "
            + (
                f"{step} of a slice"
                if not whole
                else f"gradients of {'both, every option' if everything else 'student'}"
            ),
            module._divergence_rows_kernel,
            strides
            | (optional if everything else dict.fromkeys(optional))
            | dict(
                student_ptr="*fp32:16",
                teacher_ptr="*fp32:16",
                ids_ptr="*i64:16",
                soft_ptr="*fp32:16" if writes else None,
                divergence_ptr="*fp32:16" if whole else None,
                normalizers_ptr=None if whole else "*fp64:16",
                sums_ptr=None if whole or step == "normalizers" else "*fp64:16",
                d_student_ptr="*bf16:16" if writes else None,
                d_teacher_ptr="*bf16:16" if writes and everything else None,
                V="i32",
                S=1,
                temperature="fp32",
                beta="fp32",
                student_scale="fp32",
                student_softcap="fp32",
                teacher_scale="fp32",
                teacher_softcap="fp32",
                STEP=tl.constexpr(step),  # a bare string would be a type
                KIND=tl.constexpr(kind),
                HAS_IDS=True,
                **{f"HAS_{flag}": everything for flag in flags},
                D_STUDENT=True,
                D_TEACHER=everything,
                BLOCK_V=BLOCK_V,
                VEC=VEC,
            ),
            num_warps=num_warps,
            num_stages=3,
        )

"""Compile every shipped kernel configuration for every target, without a GPU, and read what the compilers report.

``python tests/compile_gate.py [--json FILE] [--only TEXT] [--target TARGET …]`` prints a table and exits with 1 where a
configuration spills registers, wants more shared memory than the target has, or multiplies matrices without the target's
matrix instruction. Run it without ``TRITON_INTERPRET``: the interpreter's kernels have nothing to compile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_losses.kernels.configurations import Shipped, shipped


class Target(NamedTuple):
    gpu: GPUTarget
    shared_limit: int  # bytes one program may use
    matrix_instruction: str  # as the disassembler prints it


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, r"\bHMMA\b"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, r"\bHGMMA\b"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, r"\bUTC\w*MMA\b"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, r"\bv_mfma_\w+"),
}

# (configuration, target) -> bytes it may spill, the more of what Triton 3.6 and 3.7 do. On gfx942 these are scalar registers
# in lanes of vector registers: the private segment is 0 bytes, so no memory is touched. On sm_90 Triton 3.6 stores one
# register once a program and loads it once a row tile and split, outside both loops (its machine code).
ALLOWED: dict[tuple[str, str], int] = {
    ("linear_softmax_fwd log-probs, pointers, bias softcap weights low-rank", "gfx942"): 608,
    ("linear_softmax_fwd all, pointers", "gfx942"): 40,
    ("linear_softmax_fwd entropy, TMA, saving logits", "sm_90"): 8,
    ("linear_softmax_fwd entropy, pointers, saving logits", "gfx942"): 16,
    ("linear_softmax_fwd all, pointers, saving logits", "gfx942"): 100,
    ("linear_softmax_fwd all, pointers, bias softcap weights, saving logits", "gfx942"): 172,
    ("linear_softmax_fwd all, pointers, bias softcap weights low-rank, saving logits", "gfx942"): 232,
    ("linear_softmax_fwd all, pointers, bias softcap weights", "gfx942"): 140,
    ("linear_softmax_fwd all, pointers, bias softcap weights low-rank", "gfx942"): 212,
    ("linear_softmax_fwd all, pointers, odd rows, bias softcap weights low-rank", "gfx942"): 132,
    ("linear_softmax_d_logits abecd, pointers, bias softcap weights", "gfx942"): 116,
    ("linear_softmax_d_logits ac, pointers, bias softcap weights low-rank", "gfx942"): 128,
    ("linear_softmax_d_logits abecd, pointers, bias softcap weights low-rank", "gfx942"): 172,
    ("linear_softmax_d_logits abecd, pointers, odd rows, bias softcap weights low-rank", "gfx942"): 104,
    ("softmax_rows_fwd columns, every option", "gfx942"): 120,
}


class Report(NamedTuple):
    kernel: str
    target: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str  # "" where none was found, "-" where none is wanted
    trouble: str


def compiled(config: Shipped, target: Target):
    names = config.fn.arg_names
    types = {name: value for name, value in config.arguments.items() if isinstance(value, str)}
    missing = set(names) ^ set(config.arguments)
    assert not missing, f"{config.name}: {missing} are arguments of the kernel or of its configuration, not of both"
    return triton.compile(
        ASTSource(
            config.fn,
            {name: types[name].removesuffix(":16") if name in types else "constexpr" for name in names},
            {name: value for name, value in config.arguments.items() if name not in types},
            {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.endswith(":16")},
        ),
        target=target.gpu,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def nvidia_report(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled bytes and machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                for flag in ("--dump-resource-usage", "--dump-sass")]  # fmt: skip
    usage, code = dump
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, code


def amd_report(assembly: str) -> tuple[int, int, str]:
    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    spilled = max(4 * (count("vgpr_spill_count") + count("sgpr_spill_count")), count("private_segment_fixed_size"))
    return count("vgpr_count"), spilled, assembly


def check(config: Shipped, target_name: str) -> Report:
    target = TARGETS[target_name]
    try:
        kernel = compiled(config, target)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__  # below the compiler's listing stands the reason
        reason = (str(error).strip().splitlines() or [""])[-1]
        return Report(
            config.name, target_name, config.num_warps, config.num_stages, 0, 0, 0, "", reason[:200] or repr(error)
        )
    report = nvidia_report(kernel.asm["cubin"]) if target.gpu.backend == "cuda" else amd_report(kernel.asm["amdgcn"])
    registers, spilled, code = report
    shared, trouble = kernel.metadata.shared, []
    found = re.search(target.matrix_instruction, code)
    instruction = (found[0] if found else "") if config.matrix else "-"
    if spilled > ALLOWED.get((config.name, target_name), 0):
        trouble.append(f"spills {spilled} bytes")
    if shared > target.shared_limit:
        trouble.append(f"{shared} bytes of shared memory, limit {target.shared_limit}")
    if getattr(kernel.metadata, "tmem_size", 0) > 512:
        trouble.append(f"{kernel.metadata.tmem_size} columns of tensor memory, limit 512")
    if not instruction:
        trouble.append(f"no matrix instruction {target.matrix_instruction}")
    return Report(config.name, target_name, config.num_warps, config.num_stages, registers, spilled, shared,
                  instruction, "; ".join(trouble))  # fmt: skip


def check_shipped(index: int, target_name: str) -> Report:
    """Check the configuration at ``index`` of ``shipped(target_name)``; in a cache of its own, so that changes are seen."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=os.environ["GATE_SCRATCH"])
    return check(list(shipped(target_name))[index], target_name)


def run(only: str = "", targets: tuple[str, ...] = tuple(TARGETS)) -> list[Report]:
    """The report of every configuration whose name contains ``only``."""
    jobs = [(i, t) for t in targets for i, config in enumerate(shipped(t)) if only in config.name]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["GATE_SCRATCH"] = scratch
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # quicker, and the same machine code
        # The heaviest kernels come first, so that no core is left with one at the end; spawned, since torch has threads.
        jobs.sort(key=lambda job: not list(shipped(job[1]))[job[0]].matrix)
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            return sorted(
                pool.map(check_shipped, *zip(*jobs, strict=True)),
                key=lambda r: (r.kernel, list(TARGETS).index(r.target)),
            )


def table(reports: list[Report]) -> str:
    head = ("kernel", "target", "warps", "stages", "registers", "spilled", "shared", "matrix", "trouble")
    rows = [head, *(tuple(str(field) for field in report) for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = [i in range(2, 7) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration without a GPU.")
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write the reports here too")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter's kernels have nothing to compile")
    reports = run(args.only, tuple(args.target))
    print(f"triton {triton.__version__}")
    print(table(reports))
    troubled = [report for report in reports if report.trouble]
    print(f"{len(reports)} configurations, {len(troubled)} with trouble")
    if args.json:
        args.json.write_text(json.dumps([report._asdict() for report in reports], indent=1))
    return 1 if troubled else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every shipped kernel configuration for every target, without a GPU, and read what the compilers report.

``python tests/compile_gate.py [--json FILE] [--only TEXT] [--target TARGET …]`` calls the launchers on a pretended GPU
(``compile_only.py``), prints a table and exits with 1 where a kernel cannot be launched, spills registers, needs more shared
memory than the target has, multiplies matrices without the target's matrix instruction, or on sm_90 one product at a time.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("unset TRITON_INTERPRET: the interpreter's kernels have nothing to compile")

import torch
import triton
from compile_only import SHIPPED, TARGETS, Report, launches_compile

from fused_losses.divergence import KINDS
from fused_losses.kernels.divergence_rows import divergence_rows
from fused_losses.kernels.linear_softmax import linear_softmax_d_logits, linear_softmax_fwd
from fused_losses.kernels.scale import scale
from fused_losses.kernels.softmax_rows import softmax_rows_bwd, softmax_rows_fwd, softmax_rows_fwd_bwd
from fused_losses.row_statistics import RowStatistics

# (case, target) -> bytes it may spill: the most that Triton 3.6, 3.7 or 3.9 spills. Each was checked in the machine code: one
# or two registers, stored once per program, or once per row tile and split, and loaded once there or once per tile; in
# softmax_rows two or four, once per program, by which Triton 3.9's assembler stays at 128 or 64 registers.
ALLOWED = {
    ("linear_softmax_fwd entropy, saving logits", "sm_90"): 8,
    ("linear_softmax_fwd all, bias softcap weights low-rank, saving logits", "sm_90"): 8,
    ("softmax_rows_bwd columns, every option", "sm_75"): 8,
    ("softmax_rows_bwd columns, every option", "sm_120"): 16,
    ("divergence_rows jsd, 32 bits, gradients of both, every option", "sm_75"): 8,
    ("divergence_rows reverse_kl, gradients of both, every option", "sm_100"): 8,
    ("divergence_rows skewed_kl, gradients of both, every option", "sm_120"): 8,
}

N, V, ODD_V, H, R = 17, 256, 131, 64, 16  # only their divisibility is compiled, not their values
OUTPUTS = (("log_probs", "logsumexp"), ("log_probs", "logsumexp", "entropy"), RowStatistics._fields)
WITHOUT_IDS = ("logsumexp", "entropy", "log_sum_sq_probs", "sum_log_probs", "max_logit")
COEFFICIENTS = ("ac", "abc", "abecd")


def cases(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls, by name, that together launch every kernel shipped for ``target``."""
    if TARGETS[target].matrix_instruction:
        yield from _linear_softmax(TARGETS[target].like or target)
    yield from _softmax_rows()
    yield from _divergence_rows()
    yield from _scale()


def _coefficients(used: str, ids: torch.Tensor) -> list[torch.Tensor | None]:
    zeros = {x: torch.zeros(ids.shape if x == "c" else len(ids)) for x in used}
    return [zeros.get(x) for x in "abecd"]


def _linear_softmax(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    def head(options: bool, low_rank: bool, odd_rows: bool, odd_vocab: bool):
        """The first arguments of both launchers, and the keywords that both take."""
        v, h, r = ODD_V if odd_vocab else V, H + 6 * odd_rows, R - 6 * odd_rows

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16)

        ids = torch.zeros(N, 2 if options else 1, dtype=torch.int64)
        tensors = [
            zeros(N, h),
            zeros(v, h),
            zeros(v) if options else None,
            (zeros(N, r), zeros(v, r)) if low_rank else None,
            ids,
            torch.ones(v) if options else None,
            torch.ones(N),
        ]
        return tensors, {"softcap": 30.0 if options else None}

    # (options, low rank, level of statistics and coefficients). A vocabulary that is not a multiple of 16 needs more registers:
    # all but the two plainest are compiled with one. Where there is a copy engine, only odd rows are read through pointers.
    choices = [
        (False, False, 0),
        (False, False, 1),
        (False, False, 2),
        (True, False, 2),
        (True, True, 0),
        (True, True, 2),
    ]
    odd = [(False, False, 1), (True, False, 2), (True, True, 2)]
    saving = {(False, False, 1), (False, False, 2), (True, False, 2), (True, True, 2)}
    if target in ("sm_80", "gfx942"):
        odd = odd[2:]
    logsumexp = torch.zeros(N, dtype=torch.float64)
    for odd_rows, (options, low_rank, level) in [(False, c) for c in choices] + [(True, c) for c in odd]:
        tensors, named = head(options, low_rank, odd_rows, odd_rows or options or level == 2)
        label = ", odd rows" if odd_rows else ""
        label += (", bias softcap weights" if options else "") + (" low-rank" if low_rank else "")
        statistics = ("log-probs", "entropy", "all")[level] + label
        for save in (False, True) if not odd_rows and (options, low_rank, level) in saving else (False,):
            saved = torch.zeros(N, 112)[:, :100] if save else None

            fwd = partial(linear_softmax_fwd, *tensors, **named, outputs=OUTPUTS[level], saved_logits=saved)
            yield f"linear_softmax_fwd {statistics}{', saving logits' if save else ''}", fwd
        used = COEFFICIENTS[level]
        d_logits = partial(linear_softmax_d_logits, *tensors, logsumexp, *_coefficients(used, tensors[4]), **named)
        yield f"linear_softmax_d_logits {used}{label}", d_logits

    plain = [*head(False, False, False, True)[0][:2], *[None] * 5]
    yield "linear_softmax_fwd all, nothing optional", partial(linear_softmax_fwd, *plain, outputs=WITHOUT_IDS)
    sums = _coefficients("bd", torch.zeros(N, 1))
    yield "linear_softmax_d_logits bd, nothing optional", partial(linear_softmax_d_logits, *plain, logsumexp, *sums)


def _softmax_rows() -> Iterator[tuple[str, Callable[[], object]]]:
    """Unaligned rows, such as those of 50 257 logits, need the most registers."""
    for contiguous, everything in ((True, False), (True, True), (False, True)):
        logits = torch.zeros(N, ODD_V, 1, dtype=torch.bfloat16) if contiguous else torch.zeros(2, ODD_V, N)
        rows = logits.shape[0] * logits.shape[2]
        ids = torch.zeros(rows, 2 if everything else 1, dtype=torch.int64)
        tensors = [logits, ids, torch.ones(ODD_V) if everything else None, torch.ones(rows)]
        named = {"softcap": 30.0} | ({"probabilities": logits, "label_smoothing": 0.1} if everything else {})
        label = f"{'rows' if contiguous else 'columns'}{', every option' if everything else ''}"
        outputs, coefficients = OUTPUTS[2 if everything else 1], _coefficients("abecd" if everything else "ac", ids)
        logsumexp = torch.zeros(rows, dtype=torch.float64)
        yield f"softmax_rows_fwd {label}", partial(softmax_rows_fwd, *tensors, **named, outputs=outputs)
        yield f"softmax_rows_bwd {label}", partial(softmax_rows_bwd, *tensors, logsumexp, *coefficients, **named)

    # The usual call: rows of a vocabulary that is a multiple of 16.
    logits, ids, row = torch.zeros(N, V, 1, dtype=torch.bfloat16), torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N)
    logsumexp, of_log_probs = torch.zeros(N, dtype=torch.float64), _coefficients("ac", ids)
    plain = [logits, ids, None, None]
    for label, outputs in zip(("log-probs", "entropy"), OUTPUTS[:2], strict=True):
        yield f"softmax_rows_fwd {label}", partial(softmax_rows_fwd, *plain, outputs=outputs)
    yield "softmax_rows_bwd ac", partial(softmax_rows_bwd, *plain, logsumexp, *of_log_probs)
    whole = (logits[..., 0], ids, None, None, row, None, None)
    yield "softmax_rows_fwd_bwd log-probs", partial(softmax_rows_fwd_bwd, *whole, outputs=OUTPUTS[0])

    bare, sums = (torch.zeros(N, ODD_V, 1), None, None, None), _coefficients("bd", ids)
    yield "softmax_rows_fwd nothing optional", partial(softmax_rows_fwd, *bare, outputs=WITHOUT_IDS)
    yield "softmax_rows_bwd nothing optional", partial(softmax_rows_bwd, *bare, logsumexp, *sums)

    for everything in (False, True):
        unaligned = torch.zeros(N, 144, dtype=torch.bfloat16)[:, :ODD_V]
        weight, of_sum, wide = (
            (torch.ones(ODD_V), row, ("sum_log_probs", "is_top1")) if everything else (None, None, ())
        )
        tensors = [unaligned, ids, weight, row, row, of_sum, row]
        call = partial(softmax_rows_fwd_bwd, *tensors, softcap=30.0, outputs=(*OUTPUTS[0], *wide))
        yield f"softmax_rows_fwd_bwd{' every option' if everything else ''}", call


def _divergence_rows() -> Iterator[tuple[str, Callable[[], object]]]:
    # (kind, step, everything, bits of the logits): every kind, and the steps of jsd, which holds the most
    choices = [(kind, "all", False, 16) for kind in ("forward_kl", "jsd")]
    choices += [(kind, "all", True, 16) for kind in (*KINDS, "cross_entropy", "overlap")]
    choices += [("jsd", step, True, 32) for step in ("all", "normalizers", "sums", "gradients")]
    for kind, step, everything, bits in choices:
        whole = step == "all"
        row = torch.ones(N)
        gradient = torch.zeros(N, ODD_V if everything else V, 1, dtype=torch.bfloat16)
        logits = gradient.float() if bits == 32 else gradient
        named = {"kind": kind, "step": step}
        if everything:
            named |= {
                "temperature": 2.0,
                "with_nll": True,
                "hard": row,
                "student_softcap": 30.0,
                "teacher_softcap": 30.0,
            }
        if step in ("all", "gradients"):
            named |= {"soft": row, "d_student": gradient, "d_teacher": gradient if everything else None}
        else:
            named |= {"slopes": (True, everything)}
        if not whole:
            named |= {"normalizers": torch.zeros(6, N, dtype=torch.float64)}
            named |= {"sums": torch.zeros(4, N, dtype=torch.float64)} if step != "normalizers" else {}
        temperatures = (row, row) if everything else (None, None)
        call = partial(divergence_rows, logits, logits, torch.zeros(N, dtype=torch.int64), *temperatures, **named)
        made = f"gradients of {'both, every option' if everything else 'student'}" if whole else f"{step} of a slice"
        yield f"divergence_rows {kind}{', 32 bits' if bits == 32 else ''}, {made}", call


def _scale() -> Iterator[tuple[str, Callable[[], object]]]:
    gradient, odd, one = torch.zeros(N, V, dtype=torch.bfloat16), torch.zeros(N, ODD_V), torch.ones(())
    yield "scale in place", partial(scale, gradient, one, gradient)
    yield "scale 32 bits to 16, odd size", partial(scale, odd, one, odd.bfloat16())


def check(case: str, call: Callable[[], object], target: str) -> list[Report]:
    """One report for each kernel that ``call`` launches."""
    reports: list[Report] = []
    with launches_compile(target, reports.append):
        try:
            call()
        except Exception as error:
            if not any(report.trouble for report in reports):
                reports.append(Report(case, target, "", trouble=repr(error)))
    return [judged(report, case) for report in reports]


def judged(report: Report, case: str) -> Report:
    trouble = [report.trouble] if report.trouble else []
    if report.spilled_bytes > ALLOWED.get((case, report.target), 0):
        trouble.append(f"spills {report.spilled_bytes} bytes")
    # The kernel that combines the splits is launched by many cases, and is the same in most.
    name = report.kernel if "combine" in report.kernel else case
    return report._replace(kernel=name, trouble="; ".join(trouble))


def check_case(index: int, target: str) -> list[Report]:
    return check(*list(cases(target))[index], target)


def run(only: str = "", targets: tuple[str, ...] = SHIPPED) -> list[Report]:
    """The reports of every case whose name contains ``only``."""
    jobs = [(i, target) for target in targets for i, (case, _) in enumerate(cases(target)) if only in case]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch  # for this run only, so that changes are seen
        jobs.sort()  # the first cases are the heaviest kernels: so no core is left with one at the end
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            reports = {report for found in pool.map(check_case, *zip(*jobs, strict=True)) for report in found}
    return sorted(reports, key=lambda r: (r.kernel, list(TARGETS).index(r.target)))


def table(reports: list[Report]) -> str:
    head = ("kernel", "target", "warps", "stages", "registers", "spilled", "shared", "loops", "matrix", "trouble")
    rows = [head, *(tuple(str(x) for x in (*r[:2], *r[3:])) for r in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = [i in range(2, 8) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every shipped kernel configuration without a GPU.")
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--target", nargs="+", default=list(SHIPPED), choices=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write the reports here too")
    args = parser.parse_args()
    reports = run(args.only, tuple(args.target))
    print(f"triton {triton.__version__}")
    print(table(reports))
    troubled = [report for report in reports if report.trouble]
    print(f"{len(reports)} kernels, {len(troubled)} with trouble")
    if args.json:
        args.json.write_text(json.dumps([report._asdict() for report in reports], indent=1))
    return 1 if troubled else 0


if __name__ == "__main__":
    sys.exit(main())

"""``fused-losses``: bench, check, plan, report, compare. ``fused-losses COMMAND --help`` says what each takes."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import settings
from ..planning import Plan, plan
from . import shapes
from .console import Progress, show_table
from .environment import device_name, environment
from .measure import MODES, Row, is_ours, measure, measured_rates
from .peers import PEERS
from .problem import Contender, Problem, reason
from .report import COLUMNS, cells, compare, reasons, report
from .shapes import Shape

CASES = ("cross_entropy", "linear_cross_entropy", "token_statistics", "divergence", "dpo", "grpo")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
DISTRIBUTIONS = ("random", "peaked", "zipf")
# Real heads, small enough for two cores; on a GPU the three of the published comparisons.
CPU_SHAPES, CPU_TOKENS = "smollm2-135m", 1024
QUICK_SHAPES, QUICK_TOKENS = "stories15m", 64
GPU_SHAPES = "llama3-8b,gemma2-2b,qwen3-1.7b"
# TFLOP/s of products, GB/s of copies. The rate of 32-bit products is from the specification, without TF32.
H200 = {torch.bfloat16: 790.0, torch.float16: 790.0, torch.float32: 67.0}, 4300.0
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    if argv is None:  # as a command: `timeout` interrupts it as Ctrl-C does, and finished rows are kept
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        argv = sys.argv[1:]
    argv = list(argv)
    if argv and argv[0] in (*CASES, "all"):
        argv.insert(0, "bench")
    args = parser().parse_args(argv, argparse.Namespace(argv=argv))
    try:
        return args.run(args)
    except (ValueError, OSError) as failure:
        print(f"fused-losses {args.command}: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fused-losses {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("fused-losses", description="Checks, plans and benchmarks of fused losses.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "bench", run_bench, "check and time this package, eager PyTorch and each installed peer, with the floor"
    )
    sub.add_argument("case", nargs="+", choices=[*CASES, "all"], metavar="CASE", help=", ".join([*CASES, "all"]))
    head_arguments(sub)
    sub.add_argument(
        "--dtype", help="bfloat16, float16 or float32, several with commas; default bfloat16, on a CPU float32"
    )
    sub.add_argument(
        "--mode", help=f"{', '.join(MODES)}, with commas; default forward,full; memory is full without timing"
    )
    sub.add_argument(
        "--inputs", default="random,peaked", help=f"{', '.join(DISTRIBUTIONS)}, with commas; default random,peaked"
    )
    sub.add_argument("--peers", default="all", help="all, none, or names with commas")
    sub.add_argument(
        "--backend", choices=("triton", "torch"), help="this package's; default triton on a GPU, torch elsewhere"
    )
    sub.add_argument("--device", choices=("cuda", "cpu"), help="default cuda if there is a GPU")
    sub.add_argument("--seconds", type=float, help="seconds of timing per mode; default 10, with --quick 1")
    sub.add_argument(
        "--quick", action="store_true", help="a short run with few tokens: under a minute at the default shapes"
    )
    sub.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results, with command, commit, device and versions"
    )
    sub.add_argument("--resume", action="store_true", help="skip what --json FILE already has")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory, PNG")

    sub = command(
        "check", run_check, "compare every primitive on this device with float64, over dtypes, odd shapes and options"
    )
    sub.add_argument("--backend", choices=("triton", "torch"), help="default: all that run here")
    sub.add_argument("--primitive", choices=CASES[:4], help="default: all")
    sub.add_argument(
        "--largest",
        type=int,
        metavar="N",
        help="skip checks of more than N logits and draw fewer inputs: for sanitizers",
    )

    sub = command(
        "plan", run_plan, "show route, chunk, predicted memory and time of a head, and the largest batch that fits"
    )
    head_arguments(sub)
    sub.add_argument("--dtype", default="bfloat16")
    sub.add_argument("--budget", metavar="4GiB", help="memory available above the inputs, gradients included")
    sub.add_argument("--per-token", action="store_true", help="log-probabilities per token, as in policy training")
    sub.add_argument("--backend", choices=("triton", "torch"), default="triton", help="default triton, the GPU's")
    sub.add_argument("--tflops", type=float, help="rate of matrix products; default: measured, without a GPU an H200's")
    sub.add_argument("--gbps", type=float, help="rate of copies, bytes read plus written; default: likewise")

    sub = command("report", run_report, "render results into Markdown and PNG")
    sub.add_argument("results", nargs="+", type=Path, help="JSON files of bench, or folders of them")
    sub.add_argument("--out", type=Path, help="folder for report.md and pictures; default beside the results")
    sub.add_argument("--into", type=Path, metavar="README.md", help="replace the text between its report markers")

    sub = command("compare", run_compare, "compare two result files: what became slower, larger, or is missing")
    sub.add_argument("before", type=Path)
    sub.add_argument("after", type=Path)
    sub.add_argument("--threshold", type=float, default=0.05, help="largest growth tolerated; default 0.05, 5 %%")
    return top


def head_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--shape", help=f"heads by model, several with commas: {', '.join([*shapes.ALIASES, *shapes.SHAPES])}"
    )
    sub.add_argument("--vocab", type=int, help="with --hidden: a head of your own")
    sub.add_argument("--hidden", type=int)
    sub.add_argument("--tokens", help="several with commas; default: the shape's own")


def heads(args: argparse.Namespace, default: str) -> list[Shape]:
    if (args.vocab is None) != (args.hidden is None):
        raise ValueError("--vocab and --hidden belong together")
    if args.vocab is not None:
        if args.shape is not None:
            raise ValueError("give --shape, or --vocab and --hidden, not both")
        if min(args.vocab, args.hidden) < 1:
            raise ValueError(f"--vocab and --hidden must be positive, got {args.vocab} and {args.hidden}")
        return [Shape(f"{args.vocab}x{args.hidden}", args.vocab, args.hidden)]
    return [shapes.find(name) for name in (args.shape or default).split(",")]


def numbers(text: str | None) -> list[int]:
    try:
        found = [int(n) for n in (text or "").split(",") if n]
    except ValueError:
        raise ValueError(f"--tokens takes whole numbers with commas, got {text!r}") from None
    if any(n < 1 for n in found):
        raise ValueError(f"--tokens must be positive, got {text!r}")
    return found


def memory(option: str, text: str | None) -> int | None:
    try:
        return settings.workspace.parse(text)
    except ValueError:
        raise ValueError(f"{option} takes a size such as 4GiB, 4GB or 512MiB, got {text!r}") from None


def not_negative(option: str, number: float) -> float:
    if not 0 <= number < math.inf:
        raise ValueError(f"{option} takes a number, 0 or more, got {number:g}")
    return number


def one_of(option: str, text: str, choices: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in choices:
            raise ValueError(f"unknown {option} {name!r}; choose from {', '.join(choices)}")
    return names


def problems(args: argparse.Namespace, device: str) -> list[Problem]:
    """Every combination of the shapes, numbers of tokens, dtypes and distributions asked for."""
    cpu = device == "cpu"
    return [
        Problem(shape, tokens, DTYPES[dtype], distribution, device)
        for shape in heads(args, QUICK_SHAPES if args.quick else CPU_SHAPES if cpu else GPU_SHAPES)
        for tokens in numbers(args.tokens) or [QUICK_TOKENS if args.quick else CPU_TOKENS if cpu else shape.tokens]
        for dtype in one_of("--dtype", args.dtype or ("float32" if cpu else "bfloat16"), list(DTYPES))
        for distribution in one_of("--inputs", "peaked" if args.quick else args.inputs, DISTRIBUTIONS)
    ]


def begun(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """A result without rows; with ``--resume``, with the rows of the file that were measured to the end."""
    if args.resume and args.json is None:
        raise ValueError("--resume needs --json FILE")
    result: dict[str, Any] = {"command": "fused-losses " + shlex.join(args.argv), **environment(device)}
    result |= {"complete": False, "unfinished": 0, "rows": []}
    if args.resume and args.json.exists():
        before = json.loads(args.json.read_text())
        result["rows"] = before["rows"][: len(before["rows"]) - before["unfinished"]]
    return result


def run_bench(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here that PyTorch can use; leave it out to bench the CPU")
    names = list(CASES) if "all" in args.case else args.case
    wanted = [(name, problem) for name in names for problem in problems(args, device)]
    modes = one_of("--mode", args.mode or ("full" if args.quick else "forward,full"), MODES)
    result = begun(args, device)
    rows: list[Row] = result["rows"]
    done = {(row["case"], *problem_key(row)) for row in rows}
    seconds = not_negative("--seconds", args.seconds if args.seconds is not None else 1 if args.quick else 10)
    interrupted = False
    if args.backend:
        check_backend(args.backend, device)
    settings.backend(args.backend)
    with Progress(len(wanted)) as progress:
        for name, problem in wanted:
            title = f"{name}: {problem}"
            progress.now(title)
            if (name, *problem_key(problem.as_row())) in done:
                with progress.away():
                    print(f"{title}: in {args.json} already")
                progress.advance()
                continue
            case = importlib.import_module(f"{__package__}.{name}")
            start = len(rows)
            skipped: list[tuple[str, str]] = []
            try:
                contenders, skipped = lineup(case, name, args, device)
                measure(case, problem, contenders, modes, seconds, rows, progress.now)
            except KeyboardInterrupt:
                interrupted = True
            except torch.OutOfMemoryError:
                rows.append(problem.row(name, "", "all", "oom"))
            rows += [problem.row(name, "", peer, "skipped") | {"reason": why} for peer, why in skipped]
            if interrupted:
                result["unfinished"] = len(rows) - start  # kept, and measured again by --resume
            with progress.away():
                show_table(title, COLUMNS, [cells(row) for row in rows[start:]], [is_red(row) for row in rows[start:]])
                print("".join(f"  {line}\n" for line in reasons(rows[start:])), end="", flush=True)
            save(result, args.json)
            if interrupted:
                break
            progress.advance()
    if interrupted:
        kept = f"kept in {args.json}" if args.json else "printed above; --json FILE would keep them"
        print(f"interrupted: {len(rows)} rows {kept}", file=sys.stderr)
    else:
        result["complete"] = True
        save(result, args.json)
    if args.plot is not None:
        from .plot import frontier

        for picture in frontier(rows, args.plot):
            print(picture)
    if interrupted:
        return INTERRUPTED
    return int(any(is_red(row) and is_ours(row["contender"]) for row in rows))


def problem_key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "tokens", "dtype", "inputs"))


def is_red(row: Row) -> bool:
    return row["status"] in ("failed", "error")


def save(result: dict[str, Any], file: Path | None) -> None:
    """Write the file whole or not at all: an interrupt during the write leaves the previous version."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)


def lineup(
    case: ModuleType, name: str, args: argparse.Namespace, device: str
) -> tuple[list[Contender], list[tuple[str, str]]]:
    """Eager, ours and the peers that can run, and the peers that cannot, with the reason."""
    peers = {peer.name: peer for peer in PEERS.get(name, ())}
    chosen = {"all": ["torch.compile", *peers], "none": []}.get(args.peers)
    if chosen is None:
        everyone = {"torch.compile", *(peer.name for each in PEERS.values() for peer in each)}
        chosen = [p for p in one_of("--peers", args.peers, sorted(everyone)) if p in ("torch.compile", *peers)]
    contenders = [Contender("eager", case.eager), *case.OURS]
    skipped = []
    if "torch.compile" in chosen:
        if args.quick and args.peers == "all":
            skipped.append(("torch.compile", "compiling takes longer than --quick has; name it in --peers"))
        else:
            contenders.append(Contender("torch.compile", torch.compile(case.eager, dynamic=False)))
    for peer in (peers[p] for p in chosen if p in peers):
        if peer.gpu and device == "cpu":
            skipped.append((peer.name, "runs on a GPU only"))
            continue
        try:
            contenders.append(Contender(peer.name, peer.build(), peer.destroys))
        except Exception as failure:  # an import may fail in any way
            skipped.append((peer.name, reason(failure)))
    return contenders, skipped


def run_plan(args: argparse.Namespace) -> int:
    dtype = DTYPES[one_of("--dtype", args.dtype, list(DTYPES))[0]]
    budget = memory("--budget", args.budget)
    how = {"per_token": args.per_token, "backend": args.backend}
    (tflops, gbps), whose = rates(args, dtype)
    for shape in heads(args, "llama3-8b"):
        for tokens in numbers(args.tokens) or [shape.tokens]:
            found = plan(
                tokens,
                shape.vocab,
                shape.hidden,
                dtype,
                **how,
                workspace=None if budget is None else max(0, budget - gradient_bytes(shape, tokens, dtype)),
            )
            print(f"{'shape':<22}{shape.name}\n{found}")
            products, passes = found.flops / tflops / 1e9, moved_bytes(found) / gbps / 1e6
            print(f"{'time':<22}{products + passes:.1f} ms predicted on {whose}")
            print(f"{'  products':<22}{products:.1f} ms at {tflops:g} TFLOP/s")
            print(f"{'  passes':<22}{passes:.1f} ms at {gbps:g} GB/s")
        if budget is not None:
            most = largest_batch(shape, dtype, budget, **how) or "no"
            print(f"{'largest batch':<22}{most} tokens in {budget / 2**30:.2f} GiB above the inputs")
        print()
    return 0


def rates(args: argparse.Namespace, dtype: torch.dtype) -> tuple[tuple[float, float], str]:
    """TFLOP/s and GB/s, and the device they belong to."""
    if args.tflops and args.gbps:
        return (args.tflops, args.gbps), "a device of these rates"
    if torch.cuda.is_available():
        problem = Problem(shapes.find("llama3-8b"), 4096, dtype, "random", "cuda")
        found, whose = measured_rates(problem), f"this {device_name('cuda')}"
    else:
        found, whose = (H200[0][dtype], H200[1]), "an H200; --tflops and --gbps say another device's rates"
    return (args.tflops or found[0], args.gbps or found[1]), whose


def moved_bytes(found: Plan) -> int:
    """Bytes moved beside the products: an in-place pass over the logits, the sum of the weight's gradient over chunks and its
    rounding; or, to recompute, a pass over saved logits and the sums of ``d_hidden``. The upstream gradient is 1."""
    N, V, H, own = found.tokens, found.vocab, found.hidden, found.dtype.itemsize
    if found.route == "recompute":
        return 2 * found.chunks * N * H * 4 + N * found.saved * (2 * 4 + own)
    size = (found.accumulate or found.dtype).itemsize
    rounding = size + own if size != own else 0
    return 2 * N * V * own + (2 * (found.chunks - 1) * size + rounding) * V * H


def gradient_bytes(shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    return (tokens + shape.vocab) * shape.hidden * dtype.itemsize


def largest_batch(shape: Shape, dtype: torch.dtype, budget: int, **how: Any) -> int:
    """The most tokens whose planned peak, gradients included, stays within ``budget`` bytes."""

    def fits(tokens: int) -> bool:
        free = budget - gradient_bytes(shape, tokens, dtype)
        if free < 0:
            return False
        return plan(tokens, shape.vocab, shape.hidden, dtype, workspace=free, **how).peak <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run_report(args: argparse.Namespace) -> int:
    for file in report(args.results, args.out, args.into):
        print(file)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    not_negative("--threshold", args.threshold)
    table, worse = compare(args.before, args.after, args.threshold)
    columns = ("case, shape, tokens, dtype, inputs, mode, contender", "time", "memory", "status")
    show_table(f"{args.before} -> {args.after}", columns, table, worse)
    print(f"{sum(worse)} of {len(table)} missing, broken or worse by more than {args.threshold:.0%}")
    return int(any(worse))


def check_backend(backend: settings.Backend, device: str) -> None:
    """Say now, not once per row, that a backend cannot run here, and why."""
    try:
        settings.resolve_backend(torch.empty(0, device=device), backend)
    except RuntimeError as failure:
        raise ValueError(failure) from None


def run_check(args: argparse.Namespace) -> int:
    from .check import FEWEST_DRAWS, LARGEST, MOST_DRAWS, checks, large_check, verdict

    device = "cuda" if torch.cuda.is_available() else "cpu"
    interpreted = device == "cpu" and settings.triton_interpreted()
    everything = [check for check in checks() if args.primitive in (None, check.primitive)]
    todo: list[Any] = []
    backends: list[settings.Backend] = ["torch"] if device == "cpu" and not interpreted else ["triton", "torch"]
    for backend in [args.backend] if args.backend else backends:
        check_backend(backend, device)
        slow = interpreted and backend == "triton"
        dtypes = [torch.float32, torch.float16]
        dtypes += [] if slow else [torch.bfloat16]  # which the interpreter gets wrong
        largest = min(LARGEST["interpreter" if slow else device], args.largest or 2**63)
        draws = FEWEST_DRAWS if args.largest or slow else MOST_DRAWS  # a sanitizer is slow too
        todo += [(check, dtype, backend, draws) for check in everything if check.logits <= largest for dtype in dtypes]
    table, wrong = [], []
    interrupted = False
    try:
        with Progress(len(todo)) as progress:
            for check, dtype, backend, draws in todo:
                title = f"{check.primitive} {check.name}"
                progress.now(f"{title}, {dtype}, {backend}")
                error, plain_error, problem = verdict(check, dtype, device, backend, draws)
                name = str(dtype).removeprefix("torch.")
                errors = f"{error:.1e}", f"{plain_error:.1e}"
                table.append([title, name, backend, *errors, "FAILED" if problem else "ok"])
                wrong.append(problem)
                progress.advance()
        if (
            device == "cuda"
            and args.primitive in (None, CASES[0])
            and not args.largest
            and torch.cuda.mem_get_info()[0] > 24 * 2**30
        ):
            problem = large_check(device, todo[0][2])
            table.append(["cross_entropy, 2³¹ logits", "bfloat16", todo[0][2], "", "", "FAILED" if problem else "ok"])
            wrong.append(problem)
    except KeyboardInterrupt:
        interrupted = True
    columns = ("check", "dtype", "backend", "error", "plain PyTorch's", "status")
    show_table(f"check on {device}", columns, table, [bool(p) for p in wrong])
    skipped = f"; interrupted, {len(todo) - len(table)} not run" if interrupted else ""
    print(f"\n{len(table)} checks, {sum(map(bool, wrong))} failed{skipped}")
    if any(wrong):
        found = environment(device)
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        print("Please report these lines:")
        print(f"  {found['device']}; {versions}; Python {found['python']}; commit {found['commit']}")
        for row, problem in zip(table, wrong, strict=True):
            if problem:
                print(f"  {', '.join(row[:3])}: {problem}")
    return INTERRUPTED if interrupted else int(any(wrong))

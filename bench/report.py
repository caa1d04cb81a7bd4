"""Results as text: a row as table cells, whole files as Markdown, two files compared. Every figure comes from the rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import plot
from .measure import TIMED, Row, is_ours
from .shapes import ALIASES

MiB = 2**20
COLUMNS = ("contender", "mode", "time", "rate", "of floor", "peak MiB", "loss error", "gradient error", "status")
BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"
WAITING = "not measured yet"
HEAD = "linear_cross_entropy"
GOALS = (  # label, case, contender, mode, part, its floor over that of the case, wanted fraction of its floor
    ("cross entropy of logits, of 6NV bytes copied", "cross_entropy", "fused_losses", "full", "", 1, 0.92),
    ("gradients in forward, of 6NVH", "linear_cross_entropy", "fused_losses", "full", "", 1, 0.93),
    ("recompute: forward, of 2NVH", "linear_cross_entropy", "fused_losses recompute", "forward", "", 1, 0.90),
    ("recompute: backward, of 6NVH", "token_statistics", "fused_losses", "full", "backward", 1.5, 0.90),
    ("divergence, of 8NVH", "divergence", "fused_losses", "full", "", 1, 0.80),
)


def spread(x: dict[str, float], digits: int = 3) -> str:
    return f"{x['median']:.{digits}g} ({x['low']:.{digits}g}–{x['high']:.{digits}g})"


def time_cell(row: Row) -> str:
    """Milliseconds on a GPU, the ratio to eager on a CPU, with the middle half of the samples."""
    if "ms" in row:
        return f"{spread(row['ms'], 4)} ms"
    return f"{spread(row['to_eager'])} of eager" if "to_eager" in row else ""


def cells(row: Row) -> list[str]:
    """One table row, as in ``COLUMNS``."""
    errors = row.get("errors", {})
    of_results = [error for name, error in errors.items() if not name.startswith("d_")]
    of_gradients = [error for name, error in errors.items() if name.startswith("d_")]
    rate = ""
    if "tflops" in row:
        rate = f"{row['gbps']:.0f} GB/s" if row["case"] == "cross_entropy" else f"{row['tflops']:.0f} TFLOP/s"
    floor = [f"{row['of_floor']:.2f}"] if "of_floor" in row else []
    if "parts" in row:
        floor.append("/".join(f"{part['of_floor']:.2f}" for part in row["parts"].values() if "of_floor" in part))
    return [
        row["contender"],
        row["mode"],
        time_cell(row),
        rate,
        " = ".join(floor),
        f"{row['peak_bytes'] / MiB:.1f}" if "peak_bytes" in row else "",
        f"{max(of_results):.1e}" if of_results else "",
        f"{max(of_gradients):.1e}" if of_gradients else "",
        row["status"].upper() if row["status"] in ("failed", "inaccurate", "oom", "error") else row["status"],
    ]


def reasons(rows: Sequence[Row]) -> list[str]:
    """The reasons why rows have no figures or a bad status, each once."""
    return list(dict.fromkeys(f"{r['contender']}: {r['status']}, {r['reason']}" for r in rows if "reason" in r))


def load(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The results in files, and in the files of folders.

    Raises:
        ValueError: there are none, or one is not a result of ``fused-losses bench``.
    """
    files = [file for path in paths for file in (sorted(path.glob("**/*.json")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"no JSON files in {', '.join(map(str, paths))}")
    found = []
    for file in files:
        try:
            result = json.loads(file.read_text())
            result["rows"], result["device"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{file} is not a result of fused-losses bench") from None
        found.append(result | {"file": file})
    return found


def groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of one table: the same case on the same problem."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("case", "shape", "vocab", "hidden", "tokens", "dtype", "inputs"))
        found.setdefault(key, []).append(row)
    return found


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = (result["commit"] or "unknown commit")[:12] + (" with changes" if result.get("modified") else "")
    unfinished = "" if result["complete"] else " (not complete)"
    return (
        f"{result['device']}; {versions}; commit {commit}, {result['date'][:10]}{unfinished}. "
        f"`{result['command']}`" + (f" Clocks, power, temperature: {result['clocks']}." if result.get("clocks") else "")
    )


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One line per problem, on peaked inputs: ours as called by default, the least memory of ours, eager and the fastest peer.

    Problems whose memory was measured but not their time have a table of their own, each with the most tokens.
    """
    lines: dict[tuple[Any, ...], list[str]] = {}
    for result in results:
        for (case, shape, _, _, tokens, dtype, inputs), rows in sorted(groups(result["rows"]).items()):
            full = [row for row in rows if row["mode"] in ("full", "memory") and row["status"] in TIMED]
            by_name = {row["contender"]: row for row in full}
            if inputs != "peaked" or "fused_losses" not in by_name:
                continue
            ours, eager = by_name["fused_losses"], by_name.get("eager")
            least = min(row["peak_bytes"] for row in full if is_ours(row["contender"]))
            peers = [r for r in full if r is not eager and not is_ours(r["contender"]) and speed(r) < math.inf]
            rival = min(peers, key=speed, default=None)
            timed = ours["mode"] == "full"
            lines[(result["device"], case, shape, dtype, tokens if timed else 0)] = [
                f"{case}, {shape}, {tokens} tokens, {dtype}",
                f"{ours['peak_bytes'] / MiB:.0f}",
                f"{least / MiB:.0f}",
                f"{eager['peak_bytes'] / MiB:.0f}" if eager else "out of memory",
                time_cell(ours),
                f"{ours['of_floor']:.2f}" if "of_floor" in ours else "",
                f"{rival['contender']}: {time_cell(rival)}, {rival['peak_bytes'] / MiB:.0f} MiB" if rival else "",
            ]
    columns = ("loss and gradients", "peak MiB", "least MiB", "eager's MiB", "time", "of the floor", "fastest peer")
    tables = []
    for device in dict.fromkeys(key[0] for key in lines):
        made = made_with([result for result in results if result["device"] == device])
        tables.append(
            f"{device}, {made}. Peaks are above the inputs and include the gradients. The least peak is that of the "
            "smallest workspace tried, or of a gradient written over the logits. Times are of the default settings. The floor "
            "is the least number of operations (or bytes) over the rate measured in the same run, without exponentials; "
            '"of the floor" is the floor divided by our time, 1 at best.'
        )
        weighed = [line[:4] for key, line in lines.items() if key[0] == device and not line[4]]
        timed = [line for key, line in lines.items() if key[0] == device and line[4]]
        tables += [markdown_table(columns[:4], weighed)] if weighed else []
        tables += [markdown_table(columns[:2] + columns[3:], [line[:2] + line[3:] for line in timed])] if timed else []
    if not any("clocks" in result for result in results):
        tables.append(f"On a GPU: {WAITING}. On a CPU times are given only as ratios to eager PyTorch in the same run.")
    return "\n\n".join(tables)


def made_with(results: Sequence[dict[str, Any]]) -> str:
    """The versions and commits of one device's results, each once."""
    versions = {
        f"{name} {r['versions'][name]}" for r in results for name in ("torch", "triton") if name in r["versions"]
    }
    commits = dict.fromkeys((r["commit"] or "unknown")[:7] for r in sorted(results, key=lambda r: r["date"]))
    *all_but_last, last = commits
    names = f"commits {', '.join(all_but_last)} and {last}" if all_but_last else f"commit {last}"
    return ", ".join([*sorted(versions), names])


def speed(row: Row) -> float:
    if "ms" in row:
        return row["ms"]["median"]
    return row["to_eager"]["median"] if "to_eager" in row else math.inf


def goals(results: Sequence[dict[str, Any]]) -> str:
    """On shapes A, B and C, peaked bf16: wanted and measured fractions of the floor, and peers no worse in time and memory."""
    tables = []
    for device in dict.fromkeys(r["device"] for r in results if "clocks" in r) or [f"On a GPU: {WAITING}"]:
        timed = {
            (row["case"], row["shape"], row["mode"], row["contender"]): row
            for result in results
            if result["device"] == device
            for row in result["rows"]
            if (row["dtype"], row["inputs"]) == ("bfloat16", "peaked") and row["status"] in TIMED and "ms" in row
        }
        lines = []
        for what, case, contender, mode, part, floors, goal in GOALS:
            rows = [timed.get((case, shape, mode, contender), {}) for shape in ALIASES.values()]
            fractions = [(row.get("parts", {}).get(part, {}) if part else row).get("of_floor") for row in rows]
            cells = [f"{f * floors:.2f}{'' if f * floors >= goal else ' missed'}" if f else WAITING for f in fractions]
            lines.append([what, f"{goal:.2f}", *cells])
        heads = [
            [row for (case, of, mode, _), row in timed.items() if (case, of, mode) == (HEAD, shape, "full")]
            for shape in ALIASES.values()
        ]
        lines.append(["peers at or below a point of ours, head's cross entropy", "none", *map(rivals, heads)])
        tables.append(f"{device}\n\n" + markdown_table(("fraction of the floor", "wanted", *ALIASES), lines))
    return "\n\n".join(tables)


def rivals(rows: Sequence[Row]) -> str:
    """The peers at least as fast and as small as one of ours."""
    by_us = [row for row in rows if is_ours(row["contender"])]
    ours = [row for row in by_us if row["status"] == "ok"]
    peers = [row for row in rows if row not in by_us]
    if not ours or not peers:
        return WAITING
    return ", ".join(p["contender"] for p in peers if any(no_worse(p, row) for row in ours)) or "none"


def no_worse(a: Row, b: Row) -> bool:
    return speed(a) <= speed(b) and a["peak_bytes"] <= b["peak_bytes"]


def report(paths: Sequence[Path], out: Path | None, into: Path | None) -> list[Path]:
    """Write ``report.md`` and its pictures; returns the files written."""
    results = load(paths)
    out = out or (paths[0] if paths[0].is_dir() else paths[0].parent)
    out.mkdir(parents=True, exist_ok=True)
    pictures = plot.all_pictures(results, out)
    parts = ["# Results", summary(results)]
    parts += ["## Goals on a GPU", goals(results)]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    for result in results:
        parts += [f"## {result['file'].stem}", heading(result)]
        for key, rows in groups(result["rows"]).items():
            case, shape, vocab, hidden, tokens, dtype, inputs = key
            parts.append(f"### {case}: {shape} (V {vocab}, H {hidden}), {tokens} tokens, {dtype}, {inputs} inputs")
            parts.append(markdown_table(COLUMNS, [cells(row) for row in rows if row["status"] != "skipped"]))
            if why := reasons(rows):
                parts.append("\n".join(f"- {reason}" for reason in why))
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    written = [out / "report.md", *pictures]
    if into is not None:
        text = into.read_text()
        if BEGIN not in text or END not in text:
            raise ValueError(f"{into} has no lines {BEGIN} and {END} to write between")
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        links = [
            f'<img src="{os.path.relpath(picture, into.parent)}" width="49%">'
            for picture in pictures
            if picture.name.startswith(("memory-", "frontier-")) and f"-{HEAD}-" in picture.name
        ]
        into.write_text("\n".join([before, summary(results), *(["", *links] if links else []), after]))
        written.append(into)
    return written


def compare(before: Path, after: Path, threshold: float) -> tuple[list[list[str]], list[bool]]:
    """Rows of both files side by side, and which of them grew in time or memory by more than ``threshold``, broke, or are gone.

    Times of a GPU are compared as they are, those of a CPU as ratios to eager.

    Raises:
        ValueError: they are not two files, are of different devices, or have no rows in common.
    """
    for path in (before, after):
        if path.is_dir():
            raise ValueError(f"compare takes two files of results, {path} is a folder")
    first, second = load([before, after])
    if first["device"] != second["device"]:
        raise ValueError(f"{before} is of {first['device']}, {after} of {second['device']}: not comparable")
    old = {row_key(row): row for row in first["rows"] if row["status"] in TIMED}
    new = {row_key(row): row for row in second["rows"]}
    if not old.keys() & new.keys():
        raise ValueError(f"{before} and {after} have no rows in common")
    table, worse = [], []
    for key, a in old.items():
        if key not in new:
            table.append([", ".join(map(str, key)), "", "", "missing"])
            worse.append(True)
            continue
        b = new[key]
        changes = []
        for measure_of in (speed, lambda row: row.get("peak_bytes", math.inf)):
            x, y = measure_of(a), measure_of(b)
            changes.append(y / x - 1 if 0 < x < math.inf and y < math.inf else 0.0)
        regressed = b["status"] not in TIMED or max(changes) > threshold
        status = b["status"] if b["status"] not in TIMED else "worse" if regressed else "ok"
        table.append([", ".join(map(str, key)), *(f"{change:+.1%}" for change in changes), status])
        worse.append(regressed)
    return table, worse


def row_key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("case", "shape", "tokens", "dtype", "inputs", "mode", "contender"))

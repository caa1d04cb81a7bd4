"""Pictures of results. Without matplotlib there are none, and one line says so."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .environment import slug
from .measure import TIMED, Row, is_ours

MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
GiB = 2**30
FILLED, THIN = "osD^vP*<>X", "x+1234|_"  # markers of ours and of peers


def axes(title: str, x: str, y: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    return figure, ax


def finish(figure: Any, file: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def drawing() -> bool:
    if not MATPLOTLIB:
        print("no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    return MATPLOTLIB


def problem(row: Row) -> str:
    return f"{row['case']}, {row['shape']}, {row['tokens']} tokens, {row['dtype']}"


def frontier(rows: Sequence[Row], file: Path) -> list[Path]:
    """Time against memory, lower left is better; one picture per problem, named after it where there are several."""
    if not drawing():
        return []
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] == "full" and row["status"] in TIMED and ("ms" in row or "to_eager" in row):
            found.setdefault(problem(row), []).append(row)
    if not found:
        print("no picture of time and memory: it shows loss and gradients, timed (--mode full)", file=sys.stderr)
    written = []
    for name, points in found.items():
        points = [row for row in points if row["inputs"] == "peaked"] or points
        on_gpu = "ms" in points[0]
        parts = (str(points[0][key]) for key in ("case", "shape", "tokens", "dtype"))
        its_file = file.with_stem("-".join([file.stem, *parts])) if len(found) > 1 else file
        figure, ax = axes(name, "ms" if on_gpu else "time, ratio to eager in the same run", "peak above inputs, GiB")
        for i, row in enumerate(sorted(points, key=lambda row: is_ours(row["contender"]))):
            x = row["ms" if on_gpu else "to_eager"]["median"]
            marker = FILLED[i % len(FILLED)] if is_ours(row["contender"]) else THIN[i % len(THIN)]
            ax.plot(x, row["peak_bytes"] / GiB, marker, color=f"C{i % 10}", label=row["contender"], clip_on=False)
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        written.append(finish(figure, its_file))
    return written


def fraction_of_floor(rows: Sequence[Row], file: Path) -> Path:
    rows = [row for row in rows if row["mode"] == "full" and "of_floor" in row and row["inputs"] == "peaked"]
    figure, ax = axes("Fraction of the floor, loss and gradients", "floor measured in the same run / time", "")
    names = [f"{problem(row)}: {row['contender']}" for row in rows]
    figure.set_size_inches(8, 1.5 + 0.2 * len(rows))
    ax.barh(
        names, [row["of_floor"] for row in rows], color=["C3" if is_ours(row["contender"]) else "C0" for row in rows]
    )
    ax.axvline(1, color="black", linewidth=0.8)
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    return finish(figure, file)


def memory_against_tokens(rows: Sequence[Row], file: Path) -> list[Path]:
    """Per case and head with several numbers of tokens: peaks above inputs, with both gradients."""
    found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["inputs"] == "zipf":  # its memory is that of other inputs
            continue
        if row["mode"] in ("full", "memory") and "peak_bytes" in row and row["status"] in (*TIMED, "interrupted"):
            lines = found.setdefault((row["case"], row["shape"], row["dtype"]), {})
            lines.setdefault(row["contender"], {})[row["tokens"]] = row["peak_bytes"] / GiB
    written = []
    for (case, shape, dtype), lines in found.items():
        if max(len(line) for line in lines.values()) < 2:
            continue
        figure, ax = axes(f"{case}, {shape}, {dtype}: loss and gradients", "tokens", "peak above inputs, GiB")
        for i, (name, line) in enumerate(lines.items()):
            tokens = sorted(line)
            # Hollow markers, each of its own shape and size, so that lines that coincide can be told apart.
            style = f"-{FILLED[i % len(FILLED)]}" if is_ours(name) else "--x"
            ax.plot(tokens, [line[n] for n in tokens], style, fillstyle="none", markersize=5 + i, label=name)
        ax.legend(fontsize=8)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        written.append(finish(figure, file.with_stem(f"{file.stem}-{case}-{shape}-{dtype}")))
    return written


def all_pictures(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    if not drawing():
        return []
    written = []
    for device in dict.fromkeys(result["device"] for result in results):
        rows = [row for result in results if result["device"] == device for row in result["rows"]]
        where = slug(device) if any("ms" in row for row in rows) else "cpu"
        written += memory_against_tokens(rows, folder / f"memory-{where}.png")
        if any(row["mode"] == "full" for row in rows):
            written += frontier(rows, folder / f"frontier-{where}.png")
        if any("of_floor" in row for row in rows):
            written.append(fraction_of_floor(rows, folder / f"floor-{where}.png"))
    return written

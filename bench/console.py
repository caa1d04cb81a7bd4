"""Tables and progress in a terminal: with rich where it is installed, plain text otherwise and in pipes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

RICH = importlib.util.find_spec("rich") is not None


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], red: Sequence[bool]) -> None:
    """Print ``rows``, those marked in ``red`` in colour where this is a terminal; their words tell them apart everywhere."""
    if RICH and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row, is_red in zip(rows, red, strict=True):
            table.add_row(*row, style="red" if is_red else None)
        Console().print(table)
        return
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row, is_red in zip([columns, *rows], [False, *red], strict=True):
        line = "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        print(f"\033[31m{line}\033[0m" if is_red and sys.stdout.isatty() else line)
    sys.stdout.flush()


class Progress:
    """A bar over problems with the current step, on stderr; nothing where stderr is not a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar: Any = None
        self.shown = sys.stderr.isatty()
        if RICH and self.shown:
            from rich.console import Console
            from rich.progress import Progress as Bar

            # Rich would otherwise send output meant for a file or a pipe to the terminal of the bar.
            self.bar = Bar(console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Hide the bar while something else is printed."""
        self.__exit__()
        yield
        self.__enter__()

    def now(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        elif self.shown:
            print(f"\r\033[K[{self.done}/{self.total}] {text}", end="", file=sys.stderr, flush=True)

    def advance(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.advance(self.task)

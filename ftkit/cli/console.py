"""The screen: results on stdout, everything else on stderr; the only importer of rich."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ftkit.errors import visible
from ftkit.progress import Bar, Curves
from ftkit.report.braille import chart

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
FIRST_LINE_AFTER_SECONDS, PLAIN_LINE_EVERY_SECONDS = 5.0, 60.0
BAR_COLUMNS = 60  # that a bar takes without the words beside it
BAR_WIDTH, FEWEST_BAR_COLUMNS = 24, 4  # of the bar itself: without room for the fewest there is none
BESIDE_COLUMNS = 12  # that it has beside it: spaces, and 100%
CHART_ROWS, CHART_COLUMNS = 8, 90  # of the curves, at most
FEWEST_ROWS, FEWEST_COLUMNS = 4, 50  # at least
OTHER_ROWS = 12  # of a terminal, that stay for what was said before


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool = True) -> None:
    """A table on stdout; the first column is text, the others are figures or, without `figures`, text too. Nothing is read as markup."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # in a file no path is folded
    console.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    table = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number and figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
    console.print(table)


def say(text: str = "") -> None:
    """A line of the result on stdout."""
    click.echo(visible(text))


def show_marked(pieces: Sequence[tuple[str, bool]]) -> None:
    """Pieces of text apart from each other by │, the marked ones in ⟦ ⟧ and, on a terminal, in colour."""
    console, marked, text = Console(highlight=False, soft_wrap=True), False, Text()
    for number, (piece, mark) in enumerate(pieces):
        between = ("⟧" if marked else "") + ("⟦" if mark else "") if mark != marked else "│" if number else ""
        text.append(between, style="dim" if mark == marked else "bold")
        text.append(visible(piece), style="bold green" if mark else "")
        marked = mark
    text.append("⟧" if marked else "")
    console.print(text)


class _Picture(Progress):
    """A bar; below it the words that would not fit beside it; above it the curves, where the terminal has room for them."""

    words: Sequence[str] = ()
    total = 0.0
    curves: Curves | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        size = stderr.size
        left, width = size.height - OTHER_ROWS, min(size.width, CHART_COLUMNS) - 1
        curves = list(self.curves.items()) if self.curves and stderr.encoding.startswith("utf") and size.width >= FEWEST_COLUMNS else []
        for drawn in (curves[:2], [("", ()), *curves[2:3]]):
            if (rows := min(CHART_ROWS, left)) >= FEWEST_ROWS and (lines := chart(dict(drawn), self.total, width, rows)):
                yield Text("\n".join(lines), no_wrap=True, overflow="crop")
                left -= len(lines)
        yield from super().get_renderables()
        line = ""
        for word in self.words:
            if line and len(line) + len(word) + 4 > size.width:
                yield Text(f"  {line}", no_wrap=False, overflow="fold")
                line = ""
            line += f"  {word}" if line else word
        yield from [Text(f"  {line}", no_wrap=False, overflow="fold")] if line else []


class _TerminalBar:
    def __init__(self, progress: _Picture, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, done: float, *, curves: Curves | None = None, **fields: str) -> None:
        words = [f"{k} {v}" for k, v in fields.items()]
        beside = "  ".join(words)
        fits = len(beside) <= stderr.width - BAR_COLUMNS
        self._progress.words, self._progress.curves = () if fits else words, curves
        self._progress.update(self._task, completed=done, fields=beside if fits else "")


class _PlainBar:
    """Without a terminal: a line soon, so that a person sees that it works, one a minute, and one at the end."""

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total, self._next = label, total, time.monotonic() + FIRST_LINE_AFTER_SECONDS

    def update(self, done: float, *, curves: Curves | None = None, **fields: str) -> None:
        if done >= self._total or time.monotonic() > self._next:
            self._next = time.monotonic() + PLAIN_LINE_EVERY_SECONDS
            words = "".join(f", {k} {v}" for k, v in fields.items())
            click.echo(f"  {self._label}: {done:g}/{self._total:g}{words}", err=True)


class ConsoleReporter:
    """Shows what the core reports, on stderr."""

    def step(self, text: str) -> None:
        stderr.print(f"[bold]›[/bold] {escape(visible(text))}")

    def note(self, text: str) -> None:
        stderr.print(f"  {escape(visible(text))}")

    def warn(self, text: str) -> None:
        stderr.print(f"[yellow]Warning:[/yellow] {escape(visible(text))}")

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        if not sys.stderr.isatty():
            yield _PlainBar(label, total)
            return
        room = stderr.width - len(label) - len(f"{total:.0f}/{total:.0f}") - BESIDE_COLUMNS
        columns = (
            TextColumn("  {task.description}", markup=False),
            *([BarColumn(bar_width=min(BAR_WIDTH, room))] if room >= FEWEST_BAR_COLUMNS else []),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[fields]}", markup=False),
        )
        with _Picture(*columns, console=stderr) as progress:
            progress.total = total
            yield _TerminalBar(progress, progress.add_task(label, total=total, fields=""))

"""The screen: results on stdout, everything else on stderr; the only importer of rich."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ftkit.errors import visible
from ftkit.progress import Bar

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_LINE_EVERY_SECONDS = 15.0


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


class _TerminalBar:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def update(self, done: float, **fields: str) -> None:
        self._progress.update(self._task, completed=done, fields="  ".join(f"{k} {v}" for k, v in fields.items()))


class _PlainBar:
    """Without a terminal: a line now and then, and one at the end."""

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total, self._last = label, total, time.monotonic()

    def update(self, done: float, **fields: str) -> None:
        if done >= self._total or time.monotonic() - self._last > PLAIN_LINE_EVERY_SECONDS:
            self._last = time.monotonic()
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
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[fields]}", markup=False),
        )
        with Progress(*columns, console=stderr) as progress:
            yield _TerminalBar(progress, progress.add_task(label, total=total, fields=""))

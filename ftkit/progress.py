"""How long work tells what it is doing: the Reporter protocol, and one that says nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Curves = Mapping[
    str, Sequence[tuple[float, float]]
]  # (done, value) by name: the first a line, a second as marks, a third beneath as marks on its own scale


class Bar(Protocol):
    """One running piece of work."""

    def update(self, done: float, *, curves: Curves | None = None, **fields: str) -> None:
        """Set what is done so far, words to show beside it (loss, speed, memory), and curves to draw where there is room."""


class Reporter(Protocol):
    """Where the core sends what a person would like to see; the command line shows it on stderr."""

    def step(self, text: str) -> None:
        """A step of the line begins."""

    def note(self, text: str) -> None:
        """Something worth knowing about the step."""

    def warn(self, text: str) -> None:
        """Something that may spoil the result."""

    def bar(self, label: str, total: float) -> AbstractContextManager[Bar]:
        """A context that yields a Bar over `total` units."""


class _SilentBar:
    def update(self, done: float, *, curves: Curves | None = None, **fields: str) -> None:
        pass


class SilentReporter:
    """The default: nothing is shown."""

    def step(self, text: str) -> None:
        pass

    note = warn = step

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        yield _SilentBar()


SILENT: Reporter = SilentReporter()

"""`metrics.jsonl`: what a training tells of itself while it runs, a line a step and a line an evaluation, for any program to read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ftkit.files import write_atomically
from ftkit.progress import Reporter
from ftkit.train.curve import Point

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Metrics:
    """A line. Of an evaluation it has a validation loss, of a step the others; a loss that is no number is null."""

    step: int
    epoch: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    right_percent: float | None = None  # of the validation answers, where they were asked for
    reward_accuracy: float | None = None  # of preferences, as in the curve
    reward_margin: float | None = None
    reward_chosen: float | None = None
    tokens: int = 0  # trained on up to here
    learnt_tokens: int = 0  # of them
    seconds: float = 0.0  # of training and evaluating up to here
    peak_bytes: int = 0  # up to here: allocated on the GPU, or held in RAM

    @property
    def point(self) -> Point:
        return Point(**{field.name: getattr(self, field.name) for field in fields(Point)})


def read_metrics(folder: Path) -> list[Metrics]:
    """The lines in a training's folder; none where there is no file. A line that a kill left half-written is none."""
    found = []
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(Metrics(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


class MetricsFile:
    """Appends to a training's file. That a disk does not take a line is said once, and does not end the training."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self._path, self._reporter, self._lost = folder / METRICS, reporter, False

    def go_on_after(self, step: int) -> None:
        """Drop what is told of later steps, which are done again."""
        kept = [_line(metrics) for metrics in read_metrics(self._path.parent) if metrics.step <= step]
        try:
            write_atomically(self._path, "".join(kept).encode())
        except OSError as error:
            self._say(error)

    def add(self, metrics: Metrics) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(metrics))
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._lost:
            self._lost = True
            self._reporter.warn(f"{self._path} lacks some lines: {error.strerror or error}")


def _line(metrics: Metrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"

"""How a training went, or goes, as one page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftkit.data.lengths import TokenCounts
from ftkit.report.card import dotted, shown
from ftkit.report.chart import HEIGHT, WIDTH, Chart, line_chart
from ftkit.report.parts import share, tied
from ftkit.report.ship_page import KEPT_IN_TEXTS, MOST_ANSWERS, MOST_POINTS, Answer
from ftkit.report.write import PAGE_SUFFIXES, check, page_environment, write
from ftkit.train.curve import MEASURES, Measure, Point, smoothed, thinned
from ftkit.train.verdict import Verdict
from ftkit.units import bytes_text, seconds_text

CAPTIONS = {  # by a measure's key
    "right_percent": "Percent of the validation rows that are asked while training. A few more or fewer of them say nothing.",
    "reward_accuracy": "Percent of the validation pairs whose chosen answer gained more than the other one.",
    "reward_margin": "How much more the chosen answers of the validation pairs gained than the others, on average, times beta.",
}
HOW = {"finished": "went", "running": "goes", "stopped": "went so far"}  # by state


@dataclass(frozen=True)
class Memory:
    """What was planned for a device, and what was measured there; None: not known."""

    planned_for: str
    planned_bytes: int
    room_bytes: int  # that the plan was held against
    peak_bytes: int | None
    peak_is: str


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """All that the page shows. What is None or empty is not known of this run."""

    name: str
    state: str  # finished, running, or stopped
    step: int
    steps: int | None  # that it was to be
    best_step: int | None
    verdict: Verdict
    curve: Sequence[Point]
    seconds: float | None
    trained_tokens: int | None
    memory: Memory | None
    tokens: TokenCounts | None
    answers: Sequence[Answer] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_page(page: RunPage, path: Path) -> None:
    """Write it as one HTML file without scripts, fonts or pictures from elsewhere; texts of rows and models are escaped.

    The same page gives the same bytes. Raises RecipeError for another suffix than .html or a folder that cannot be written.
    """
    check(path, PAGE_SUFFIXES)
    environment = page_environment(KEPT_IN_TEXTS)
    environment.filters |= {"bytes": bytes_text, "seconds": seconds_text, "loss": _loss_text}
    environment.globals |= {"width": WIDTH, "height": HEIGHT}
    validation = [point for point in page.curve if point.evaluated]
    measures = [measure for measure in MEASURES if measure.points(page.curve)]
    text = environment.get_template("run_page.html.j2").render(
        title=f"{page.name}: how the training {HOW[page.state]}",
        page=page,
        answer=tied(headline(page)),
        look={"learning": "", "levelled off": "", "too few to tell": " open"}.get(page.verdict.kind, " no"),
        validation=validation,
        best=next((point for point in validation if point.step == page.best_step), None),
        measures=measures,
        measured=[(measure.name, _measure_chart(page, measure), measure.percents, CAPTIONS[measure.key]) for measure in measures],
        speed=page.trained_tokens / page.seconds if page.trained_tokens and page.seconds else None,
        losses=loss_chart(page),
        rate=_chart(page.curve, "learning_rate", "rate"),
        norms=_chart(page.curve, "gradient_norm", "norm", smooth=True),
        memory=page.memory and _bars(page.memory),
        cut_share=share(page.tokens.cut, page.tokens.rows) if page.tokens else "",
        answers=page.answers[:MOST_ANSWERS],
        right={who: sum(one.right.get(who, False) for one in page.answers) for who in ("before", "trained")},
        settings=[(key, shown(value)) for key, value in dotted(page.settings)],
    )
    write(path, text.encode())


def headline(page: RunPage) -> str:
    """The answer in one sentence."""
    words = str(page.verdict)
    how = (
        f"of {page.steps:,} steps {page.step:,} are trained"
        if page.steps and page.step < page.steps
        else f"{page.step:,} steps are trained"
    )
    stand = {"running": "; it runs", "stopped": "; it was stopped, and the same command goes on"}.get(page.state, "")
    return f"{words[:1].upper()}{words[1:]}. {how[:1].upper()}{how[1:]}{stand}."


def loss_chart(page: RunPage) -> Chart | None:
    """Every step's loss, its trend, and the validation loss; upright lines where the best step lies and since when the verdict holds."""
    training = [(float(p.step), p.loss) for p in page.curve if not p.evaluated and p.loss is not None]
    trend = list(zip((step for step, _ in training), smoothed([loss for _, loss in training]), strict=True))
    series = {
        "each step": thinned(training, MOST_POINTS),
        "smoothed": thinned(trend, MOST_POINTS),
        "validation": [(float(p.step), p.validation_loss) for p in page.curve if p.evaluated and p.validation_loss is not None],
    }
    notes = {float(page.best_step): "best"} if page.best_step else {}
    if page.verdict.since_step:
        since = float(page.verdict.since_step)
        notes[since] = f"best; {page.verdict.kind} since" if since in notes else f"{page.verdict.kind} since"
    found = {name: points for name, points in series.items() if points}
    return line_chart(found, faint=("each step",), notes=notes) if found else None


def _loss_text(point: Point) -> str:
    return "no number" if point.validation_loss is None else f"{point.validation_loss:.4f}"


def _measure_chart(page: RunPage, measure: Measure) -> Chart:
    notes = {float(page.best_step): "best"} if page.best_step else {}
    return line_chart({"validation": measure.points(page.curve)}, notes=notes, linear=True, around=(0, 100) if measure.percents else ())


def _chart(curve: Sequence[Point], key: str, name: str, *, smooth: bool = False) -> Chart | None:
    points = [(float(point.step), value) for point in curve if not point.evaluated and (value := getattr(point, key)) is not None]
    if not points:
        return None
    if not smooth:
        return line_chart({name: thinned(points, MOST_POINTS)}, linear=True)
    trend = zip((step for step, _ in points), smoothed([value for _, value in points]), strict=True)
    return line_chart({"each step": thinned(points, MOST_POINTS), "smoothed": thinned(list(trend), MOST_POINTS)}, faint=("each step",))


def _bars(memory: Memory) -> list[tuple[str, int, float]]:
    """What the bars say: words, bytes, and percent of the longest."""
    found = [("planned peak", memory.planned_bytes), ("measured peak", memory.peak_bytes), ("room", memory.room_bytes)]
    known = [(words, size) for words, size in found if size]
    longest = max((size for _, size in known), default=1)
    return [(words, size, 100 * size / longest) for words, size in known]

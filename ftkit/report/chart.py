"""Small pictures of a page: lines and labelled points laid out in a box, which a template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

WIDTH, HEIGHT = 480, 280  # of the whole picture; the page makes it as wide as the screen allows
LEFT, RIGHT, TOP, BOTTOM = 58, 96, 12, 42  # around the box; on the right are the lines' names
LETTER, LINE = 7, 15  # width and height of the text, about
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # what tells lines apart without colour, beside their names
MOST_MARKS = 40  # points of a line that are marked, each

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line and its name, which stands at its end."""

    name: str
    dash: str
    path: str
    marks: list[tuple[float, float]]
    at: tuple[float, float]  # of its name
    number: int = 0  # of its colour
    faint: bool = False


@dataclass(frozen=True)
class Spot:
    """A point, its name, and the interval that it stands for, as heights."""

    name: str
    x: float
    y: float
    at: tuple[float, float]  # of its name
    anchor: str  # of its name: start, middle or end
    hollow: bool
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """What is drawn, in the picture's own units."""

    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    right: float  # where the box ends
    logarithmic: bool
    lines: list[Line]
    spots: list[Spot]
    notes: list[tuple[float, float, str]] = field(default_factory=list)  # upright lines: where, the height of their words, the words


@dataclass(frozen=True)
class Mark:
    """A point to be drawn, in its own units."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def line_chart(
    series: Mapping[str, Points],
    *,
    faint: Collection[str] = (),
    notes: Mapping[float, str] | None = None,
    linear: bool = False,
    around: Sequence[float] = (),
) -> Chart:
    """Lines over one axis, by name; logarithmic where the largest value is more than ten times the smallest, unless `linear`.

    A logarithm is only of what is above zero: other values are left out there. A faint line is plain and has the next one's colour.
    `notes`: words at an upright line, by where it stands. `around`: heights that are within the picture too.
    """
    values = [*around, *(y for points in series.values() for _, y in points)]
    above = [y for y in values if y > 0]
    logarithmic = not linear and len(above) > 0.9 * len(values) and max(above) > 10 * min(above)
    ticks = _log_ticks(min(above), max(above)) if logarithmic else _ticks(min(values), max(values))
    steps = [x for points in series.values() for x, _ in points]
    across, up = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT), _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, logarithmic)
    found: list[Line] = []
    for name, points in series.items():
        number = sum(not line.faint for line in found)
        placed = [(across(x), up(y)) for x, y in points if y > 0 or not logarithmic]
        if placed:
            marks = placed if len(placed) <= MOST_MARKS and name not in faint else []
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
            dash = "" if name in faint else DASHES[number % len(DASHES)]
            found.append(Line(name, dash, path, marks, (placed[-1][0] + 8, placed[-1][1] + 4), number, name in faint))
    upright = [(across(x), TOP + LINE * (n + 1) - 3.0, words) for n, (x, words) in enumerate(sorted((notes or {}).items()))]
    x_ticks = [(across(step), f"{step:,.0f}") for step in _ticks(min(steps), max(steps), inside=True) if step == int(step)]
    return Chart(x_ticks, [(up(tick), f"{tick:g}") for tick in ticks], WIDTH - RIGHT, logarithmic, _apart(found), [], upright)


def spot_chart(
    marks: Sequence[Mark], x_text: Callable[[float], str], y_text: Callable[[float], str], *, unit: float = 1, around: Sequence[float] = ()
) -> Chart:
    """Points with names that do not cover each other, from zero on the x axis, whose ticks are multiples of `unit`.

    `around`: heights that are within the picture too, so that what hardly differs does not look far apart.
    """
    heights = [*around, *(y for mark in marks for y in (mark.y, mark.low, mark.high) if y is not None)]
    y_ticks, x_ticks = _ticks(min(heights), max(heights)), [unit * tick for tick in _ticks(0, max(mark.x for mark in marks) / unit)]
    right = WIDTH - 16
    across, up = _scale(0, x_ticks[-1], LEFT, right), _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    taken = [(across(mark.x) - 6, up(mark.y) - 6, across(mark.x) + 6, up(mark.y) + 6) for mark in marks]
    spots = []
    for mark in sorted(marks, key=lambda mark: (mark.x, mark.y, mark.name)):
        x, y = across(mark.x), up(mark.y)
        at, anchor, box = _room(mark.name, x, y, taken, right)
        taken.append(box)
        interval = (up(mark.low), up(mark.high)) if mark.low is not None and mark.high is not None else None
        spots.append(Spot(mark.name, x, y, at, anchor, mark.hollow, interval))
    return Chart(
        [(across(tick), x_text(tick)) for tick in x_ticks], [(up(tick), y_text(tick)) for tick in y_ticks], right, False, [], spots
    )


Box = tuple[float, float, float, float]


def _room(name: str, x: float, y: float, taken: Sequence[Box], right: float) -> tuple[tuple[float, float], str, Box]:
    """Where a point's name has room: beside it, above or below; beside it where there is none."""
    wide = LETTER * len(name)
    tried = []
    for away in (0, LINE, -LINE, 2 * LINE, -2 * LINE, 3 * LINE, -3 * LINE):
        tried += [(x + 9, y + 4 + away, "start", x + 9), (x - 9, y + 4 + away, "end", x - 9 - wide)]
        if away:
            tried.append((x, y + 4 + away, "middle", x - wide / 2))
    boxes = [(begin, bottom - 11, begin + wide, bottom + 3) for _, bottom, _, begin in tried]
    for (left, bottom, anchor, _), box in zip(tried, boxes, strict=True):
        inside = box[0] >= LEFT and box[2] <= right + 12 and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return (left, bottom), anchor, box
    return (tried[0][0], tried[0][1]), tried[0][2], boxes[0]


def _apart(found: Sequence[Line]) -> list[Line]:
    """The lines, with their names moved so that none covers another."""
    names: dict[str, float] = {}
    least = float("-inf")
    for line in sorted(found, key=lambda line: line.at[1]):
        least = names[line.name] = max(line.at[1], least + LINE)
    over = max(0.0, least - (HEIGHT - BOTTOM)) if names else 0.0
    return [replace(line, at=(line.at[0], names[line.name] - over)) for line in found]


def _scale(low: float, high: float, begin: float, end: float, logarithmic: bool = False) -> Callable[[float], float]:
    if logarithmic:
        linear = _scale(math.log(low), math.log(high), begin, end)
        return lambda value: linear(math.log(value))
    span = high - low or 1.0
    return lambda value: begin + (end - begin) * (value - low) / span


def _ticks(low: float, high: float, *, inside: bool = False) -> list[float]:
    """Round numbers around what is shown, or within it; at least two."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * times for times in (1, 2, 5, 10) if span / (size * times) <= 5)
    first, last = (math.ceil(low / step), math.floor(high / step)) if inside else (math.floor(low / step), math.ceil(high / step))
    return [round(number * step, 12) for number in range(first, max(last, first if inside else first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around what is shown, or where there are few also 2 and 5 times those."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 2:
        return [float(f"1e{power}") for power in range(first, last + 1)]
    fine = [float(f"{times}e{power}") for power in range(first, last + 1) for times in (1, 2, 5)]
    begin = max(n for n, tick in enumerate(fine) if tick <= low)
    return fine[begin : next(n for n, tick in enumerate(fine) if tick >= high) + 1]

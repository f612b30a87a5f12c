"""Curves as lines of text: braille dots for a line, a mark for each point of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

BLANK = 0x2800  # the braille character without dots
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a character, by row and column
MARK = "◆"


def drawn(
    line: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]], total: float, columns: int, rows: int
) -> tuple[list[str], float, float]:
    """A picture of so many characters, from 0 to `total` across, and the highest and lowest value in it."""
    heights = [y for _, y in (*line, *marks)]
    high, low = max(heights), min(heights)
    span, far = high - low or 1.0, total or 1.0

    def across(x: float, size: int) -> int:
        return min(size - 1, int(x / far * size))

    def down(y: float, size: int) -> int:
        return min(size - 1, int((high - y) / span * size))

    cells = [[BLANK] * columns for _ in range(rows)]
    placed = [(across(x, 2 * columns), down(y, 4 * rows)) for x, y in line]
    for (x0, y0), (x1, y1) in zip(placed, [*placed[1:], *placed[-1:]], strict=True):
        for n in range(steps := max(abs(x1 - x0), abs(y1 - y0), 1)):
            right, below = x0 + round(n * (x1 - x0) / steps), y0 + round(n * (y1 - y0) / steps)
            cells[below // 4][right // 2] |= DOTS[below % 4][right % 2]
    shown = [[chr(cell) if cell != BLANK else " " for cell in row] for row in cells]
    for x, y in marks:
        shown[down(y, rows)][across(x, columns)] = MARK
    return ["".join(row) for row in shown], high, low


def chart(curves: Mapping[str, Sequence[tuple[float, float]]], total: float, width: int, rows: int) -> list[str]:
    """The first curve as a line, the second as marks, with the values beside and the names below; nothing of no points."""
    (line_name, line), (mark_name, marks) = (*curves.items(), ("", ()), ("", ()))[:2]
    if not line and not marks:
        return []
    picture, high, low = drawn(line, marks, total, width - 10, rows)
    labels = {0: f"{high:.3g}", rows - 1: f"{low:.3g}"}
    names = "   ".join(f"{sign} {name}" for sign, name, points in (("⠤⠤", line_name, line), (MARK, mark_name, marks)) if points)
    return [f"{labels.get(n, ''):>7} │{row}".rstrip() for n, row in enumerate(picture)] + [f"{'':>7} └ {names}"]

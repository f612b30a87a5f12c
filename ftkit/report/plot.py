"""A plan as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.plan.plan import RESERVE, MemoryPlan
from ftkit.report.parts import BEYOND, LEAST_SHARE, METHOD_WORDS, SMALL_SHARE, Slice, coarse, margin_words, parts_of, tied
from ftkit.report.words import answer, plain, verdict, why
from ftkit.report.write import PLOT_SUFFIXES, check, write
from ftkit.units import bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_plot(plan: MemoryPlan, path: Path) -> None:
    """Draw what the peak is made of against the device's memory, and the three methods; `.svg` or `.png`.

    The same plan gives the same bytes. Raises RecipeError for another suffix or a folder that cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check(path, PLOT_SUFFIXES)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.hashsalt": "ftkit", "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "hatch.linewidth": 0.6}
        )
        figure = Figure(figsize=(8, 4), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        draw(plan, figure.add_axes((0, 0, 1, 1)))
        written = BytesIO()
        if path.suffix.lower() == ".svg":
            about = {"Title": plain(f"{answer(plan)} {why(plan)}"), "Creator": "ftkit", "Date": None}
            figure.savefig(written, format="svg", metadata=about)
        else:
            figure.savefig(written, format="png", dpi=200, metadata={"Software": None, "Title": "ftkit plan"})
    write(path, written.getvalue())


def draw(plan: MemoryPlan, axes: Axes) -> None:
    """Lay the picture out in pixels, from the top: the answer, the device's memory, the chosen step with its labels, the methods."""
    import textwrap

    left, right, width = 74.0, 640.0, 800.0
    fit, total = plan.chosen, max(plan.device.total_bytes, plan.chosen.budget_bytes)
    span = axis_bytes(plan)

    def at(size: float, whole: float = span) -> float:
        return left + (right - left) * min(size / whole, 1.0)

    limit, budget = at(fit.limit_bytes), at(fit.budget_bytes)
    beside = max(right, budget + 8) + 8
    axes.set_axis_off()
    axes.set_xlim(0, width)

    def text(x: float, y: float, words: str, size: float = 9, **how: Any) -> Any:
        return axes.text(x, y, plain(words, "\n"), fontsize=size, **{"va": "center", "ha": "left", "color": "#111111", **how})

    def wide(words: str, size: float) -> float:
        probe = text(0, 0, words, size)
        found = float(probe.get_window_extent().width)
        probe.remove()
        return found

    def bar(slices: Sequence[Slice], y: float, height: float, whole: float = span) -> list[tuple[float, float]]:
        """Draw a stack around `y`; where each slice begins and ends. What runs out of the picture ends in a torn edge."""
        found, base = [], 0
        for part in slices:
            a, b = at(base, whole), at(base + part.bytes, whole)
            hatch = "////" if part.kind == RESERVE else None
            axes.bar(
                a,
                height,
                b - a,
                y - height / 2,
                align="edge",
                color=part.colour,
                edgecolor="#999999" if hatch else "white",
                linewidth=0.8,
                hatch=hatch,
            )
            found.append((a, b))
            base += part.bytes
        if base > whole:
            teeth = [(right - 6 * (n % 2), y - height / 2 - 1 + (height + 2) * n / 8) for n in range(9)]
            axes.fill(
                [*(x for x, _ in teeth), right + 4, right + 4], [*(v for _, v in teeth), teeth[-1][1], teeth[0][1]], color="white", zorder=3
            )
        return found

    def inside(words: Sequence[str], a: float, b: float, y: float, size: float, ink: str, lines: bool) -> bool:
        """Write the first of the texts that has room between a and b, clear of the budget's lines."""
        rooms = [(a, b)]
        if lines and a < budget and limit < b:
            rooms = sorted([(a, max(a, limit)), (min(b, budget), b)], key=lambda room: room[0] - room[1])
        for candidate in words:
            needed = wide(candidate, size) + 6
            for start, end in rooms:
                if needed < end - start:
                    text((start + end) / 2, y, candidate, size, ha="center", color=ink)
                    return True
        return False

    y = 22.0
    for line in textwrap.wrap(tied(answer(plan)), 92):
        text(16, y, line, 10.5, weight="bold")
        y += 18
    for line in textwrap.wrap(tied(why(plan)), 118):
        text(16, y, line, 9, color="#444444")
        y += 15

    # What the device has: free, of that the margin, and what is in use already.
    near = limit - left < 260  # then both labels go to the right, one above the other
    y += 24 if near else 18
    text(limit + (4 if near else -4), y - (6 if near else -8), margin_words(fit), 8, color="#444444", ha="left" if near else "right")
    free = f"{bytes_text(fit.budget_bytes)} free"
    if total - fit.budget_bytes >= LEAST_SHARE * total:
        free += f" of {bytes_text(total)}"
    text(budget + 5, y + 8, free, 8, weight="bold")
    y += 20
    tops = (y - (20 if near else 12), y - 8)
    for a, b, colour, hatch in ((left, limit, "#CFCFCF", ""), (limit, budget, "#F3F3F3", ""), (budget, at(total), "#FFFFFF", "xxxx")):
        axes.bar(a, 5, b - a, y - 2.5, align="edge", color=colour, edgecolor="#777777", linewidth=0.5, hatch=hatch)
    text(left - 8, y, "memory", 8, ha="right", color="#444444")

    # The chosen step: to scale, and once more at full width where that leaves no room for labels.
    small = fit.peak.device_bytes < SMALL_SHARE * span
    slices = parts_of(plan, fit)
    y += 24 if small else 34
    spans = bar(slices, y, 26 if small else 46)
    text(left - 8, y, "this\nstep", 9, ha="right", weight="bold")
    text(beside, y, f"{bytes_text(fit.peak.device_bytes)}\n{verdict(fit)}", 9, weight="bold")
    cut = y + (13 if small else 23)
    if small:
        axes.fill([left, spans[-1][1], right, left], [cut + 2, cut + 2, cut + 24, cut + 24], color="#EDEDED")
        y = cut + 24 + 23
        spans = bar(slices, y, 46, fit.peak.device_bytes)
        text(left - 8, y, "the same,\nlarger", 8, ha="right", color="#444444")
    outside = []
    for part, (a, b) in zip(slices, spans, strict=True):
        name, size = part.words, bytes_text(part.bytes)
        broken = "\n".join(textwrap.wrap(name, max(map(len, name.split())) + 2))
        if not inside([f"{name}\n{size}", *([f"{broken}\n{size}"] if broken.count("\n") < 2 else [])], a, b, y, 8, part.ink, not small):
            outside.append(((a + b) / 2, f"{name} {size}"))
    # Labels hang on lines from their slices, each reading to the right; one stands lower than all whose lines it passes under.
    hung: list[tuple[float, int]] = []
    for x, words in reversed(outside):
        end = x + wide(words, 8) + 10
        tier = 1 + max((t for other, t in hung if other < end), default=-1)
        hung.append((x, tier))
        low = y + 36 + 15 * tier
        axes.plot([x, x], [y + 23, low + 4], color="#777777", linewidth=0.7)
        text(x + 4, low, words, 8)
    y += 23 + 15 * (1 + max((tier for _, tier in hung), default=-1)) + 16
    again = y + 8
    for other in plan.methods:
        y += 22
        kinds = coarse(plan, other)
        for part, (a, b) in zip(kinds, bar(kinds, y, 17), strict=True):
            inside([part.words], a, b, y, 7, part.ink, True)
        text(left - 8, y, METHOD_WORDS[other.inventory.method], 9, ha="right", weight="bold" if other == fit else "normal")
        text(beside, y, f"{bytes_text(other.peak.device_bytes)}, {verdict(other)}", 8)
    for x, style, top in ((limit, (0, (3, 2)), tops[0]), (budget, "solid", tops[1])):
        for start, end in ((top, cut + 4), (again, y + 13)):
            axes.plot([x, x], [start, end], color="#111111", linewidth=1.1, linestyle=style, zorder=4)
    axes.set_ylim(y + 25, 0)
    axes.get_figure(root=True).set_size_inches(width / 100, (y + 25) / 100)  # type: ignore[union-attr]


def axis_bytes(plan: MemoryPlan) -> float:
    """What a bar of full width stands for: a little more than the device's memory or the chosen step, whichever is larger."""
    return BEYOND * max(plan.device.total_bytes, plan.chosen.budget_bytes, plan.chosen.peak.device_bytes)

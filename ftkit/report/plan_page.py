"""A plan as one page that needs no other file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftkit.data.lengths import TokenCounts
from ftkit.plan.cost import Cost, disk_by_place
from ftkit.plan.plan import MARGIN, RESERVE, MemoryPlan
from ftkit.report.parts import (
    KINDS,
    LEAST_SHARE,
    METHOD_WORDS,
    SMALL_SHARE,
    coarse,
    kinds_of,
    margin_words,
    parts_of,
    share,
    slice_of,
    stacked,
    tied,
)
from ftkit.report.plot import axis_bytes
from ftkit.report.words import PHASES, answer, command_for, padding, peak_words, phase_of, reach, runs, sixteen_bits, time_words, why
from ftkit.report.write import PAGE_SUFFIXES, check, page_environment, write
from ftkit.units import bytes_text, count_text, seconds_text


def write_page(
    plan: MemoryPlan,
    costs: Sequence[Cost],
    tokens: TokenCounts | None,
    path: Path,
    *,
    title: str = "Fine-tuning plan",
    asked: str = "ftkit plan",
) -> None:
    """Write the plan as one HTML file without scripts, fonts or pictures from elsewhere.

    `costs` are those of the steps; `tokens` where there is a dataset; `asked`: the command line that the plan was asked for with.

    The same plan gives the same bytes. Raises RecipeError for another suffix than .html or a folder that cannot be written.
    """
    check(path, PAGE_SUFFIXES)
    environment = page_environment()
    environment.filters |= {"bytes": bytes_text, "count": count_text, "seconds": seconds_text, "command": command_for, "tied": tied}
    environment.globals |= {
        "share": share,
        "parts_of": parts_of,
        "kinds_of": kinds_of,
        "coarse": coarse,
        "METHOD_WORDS": METHOD_WORDS,
        "KINDS": KINDS,
        "RESERVE": RESERVE,
    }
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    fit = plan.chosen
    text = environment.from_string(source).render(
        title=title,
        asked=asked,
        plan=plan,
        fit=fit,
        costs=costs,
        disk_bytes=sum(disk_by_place(costs).values()),
        tokens=tokens,
        answer=tied(answer(plan)),
        why=tied(why(plan)),
        time_words=tied(time_words(plan)),
        peak_words=tied(peak_words(plan)),
        notes=[tied(words) for words in (reach(plan), sixteen_bits(plan)) if words],
        margin=tied(f"{100 * MARGIN:g} %"),
        margin_words=tied(margin_words(fit)),
        least=tied(f"{100 * LEAST_SHARE:g} %"),
        small=fit.peak.device_bytes < SMALL_SHARE * axis_bytes(plan),
        used_kinds={kind for other in plan.methods for kind in kinds_of(plan, other)},
        limit_bytes=fit.limit_bytes,
        span=axis_bytes(plan),
        total_bytes=max(plan.device.total_bytes, fit.budget_bytes),
        timeline=timeline(plan),
        padding=padding(plan.batching) if plan.batching else None,
        on_gpu=plan.device.kind == "cuda",
    )
    write(path, text.encode())


def timeline(plan: MemoryPlan) -> dict[str, Any]:
    """The traced step as stacked outlines in a box of `width` × 1000, its phases, its peak, and the texts of every point."""
    series = plan.timeline.series
    totals = [sum(values) for values in zip(*series.values(), strict=True)]
    highest = max(totals)
    peak = totals.index(highest)
    budget = plan.chosen.budget_bytes
    shows_budget = budget <= 1.6 * highest
    top = 1.1 * max(highest, budget if shows_budget else 0)

    order = stacked((slice_of(name, max(values)) for name, values in series.items()), highest)
    names = {slice_of(name, 0).words: name for name in series}
    curves = []
    for part in order:
        members = [series[names[words]] for words in (part.holds or (part.words,))]
        curves.append([sum(values) for values in zip(*members, strict=True)])
    # Each outline reaches down to zero and is painted over by those below it.
    outlines = []
    height = [0] * len(totals)
    for part, curve in zip(order, curves, strict=True):
        height = [a + b for a, b in zip(height, curve, strict=True)]
        outlines.append({"part": part, "path": outline([round(1000 * size / top) for size in height]), "at_peak": curve[peak]})

    starts = [first for _, first in plan.timeline.phases]
    phase_at = [plan.timeline.phases[max(0, bisect_right(starts, n) - 1)][0] for n in range(len(totals))]
    texts: dict[str, int] = {}

    def number(words: str) -> int:
        return texts.setdefault(words, len(texts))

    readout = {
        "phase": [number(name) for name in phase_at],
        "total": [number(bytes_text(size)) for size in totals],
        "parts": [[number(bytes_text(size)) for size in curve] for curve in reversed(curves)],
    }
    step = 1 << max(0, int(top / 4).bit_length() - 1)
    return {
        "width": len(totals),
        "outlines": outlines[::-1],
        "highest": highest,
        "peak": peak,
        "peak_height": highest / top,
        "budget_height": budget / top if shows_budget else None,
        "ticks": [(size, size / top) for size in range(0, int(top) + 1, step)],
        "phases": runs([PHASES.get(phase_of(name), name) for name in phase_at]),
        "micro_batches": runs(
            [
                "optimizer" if name.startswith("optimizer") else "a later micro-batch" if "later" in name else "first micro-batch"
                for name in phase_at
            ]
        ),
        "readout": {**readout, "texts": list(texts)},
    }


def outline(heights: Sequence[int]) -> str:
    """An SVG path under a stair of one unit a point, from the bottom of a box 1000 high."""
    path = [f"M0 1000V{1000 - heights[0]}"]
    level, run = heights[0], 0
    for height in heights:
        if height != level:
            path.append(f"h{run}v{level - height}")
            level, run = height, 0
        run += 1
    return "".join([*path, f"h{run}V1000z"])

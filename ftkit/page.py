"""A plan to look at: one picture as SVG or PNG, and the whole plan as an HTML page that needs nothing else."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data import Batching, TokenCounts
from ftkit.errors import RecipeError
from ftkit.memory.plan import CONTEXT, MARGIN, PROBED, PROCESS, RESERVE, Change, Fit, MemoryPlan
from ftkit.run import write_atomically
from ftkit.units import bytes_text, count_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD_WORDS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
ACTIVATIONS, OTHER = "activations", "other"
# Kinds in stacking order, what is there all the time first. Okabe and Ito's colours, which colour-blind readers tell apart;
# neighbours differ in brightness too.
KINDS = {
    "weights": "#0072B2", "optimizer states": "#009E73", "adapter": "#8FD9C0", "gradients": "#7B4FA3", ACTIVATIONS: "#D55E00",
    "loss head": "#CC79A7", "workspaces": "#8C8C8C", OTHER: "#BDBDBD", RESERVE: "#E3E3E3", CONTEXT: "#5A5A5A",
    PROBED: "#3D3D3D", PROCESS: "#5A5A5A",
}  # fmt: skip
# Kind and colour of the parts that memory.step names; what is not here are activations.
PARTS = {
    "4-bit weights": ("weights", "#0072B2"), "weights": ("weights", "#0072B2"), "weights that stay 16-bit": ("weights", "#56B4E9"),
    "weights that stay 32-bit": ("weights", "#56B4E9"), "buffers": ("weights", "#A9D8F5"), "optimizer states": ("optimizer states", "#009E73"),
    "adapter": ("adapter", "#8FD9C0"), "gradients": ("gradients", "#7B4FA3"), "gradients in flight": ("gradients", "#BBA1D6"),
    "loss head": ("loss head", "#CC79A7"), "cuBLAS workspace": ("workspaces", "#8C8C8C"), "kernel workspaces": ("workspaces", "#A6A6A6"),
    "optimizer temporaries": ("workspaces", "#757575"),
}  # fmt: skip
ACTIVATION_COLOURS = {"MLP": "#D55E00", "attention": "#E69F00", "norms": "#F0E442", "layers": "#A6761D"}
PLOT_SUFFIXES, PAGE_SUFFIXES = (".svg", ".png"), (".html", ".htm")
LEAST_SHARE = 0.01  # of the whole; what is smaller is told together
BEYOND = 1.06  # of the device's memory: what the bars' axis shows
SMALL_SHARE = 0.45  # of the axis; a smaller step is drawn once more, larger
NO_BREAK = "\u00a0"
PHASES = {"forward": "forward", "loss": "loss", "backward pass of the loss": "loss", "backward": "backward", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Slice:
    """A share of a bar or of the timeline; `holds` names what was put together in it."""

    words: str
    kind: str
    colour: str
    bytes: int
    holds: tuple[str, ...] = ()

    @property
    def ink(self) -> str:
        """The text colour that reads best on it (WCAG's relative luminance; 0.18 is where black and white are equal)."""
        parts = [int(self.colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"


def slice_of(name: str, size: int) -> Slice:
    """A part under the name that memory.step gives it."""
    if name in PARTS:
        kind, colour = PARTS[name]
        return Slice(name, kind, colour, size)
    return Slice(
        "activations: " + ("layer inputs" if name == "layers" else name), ACTIVATIONS, ACTIVATION_COLOURS.get(name, "#F6C9A0"), size
    )


def stacked(slices: Iterable[Slice], whole: int) -> list[Slice]:
    """In stacking order, what is below LEAST_SHARE of the whole put together."""
    order = list(KINDS)
    known = list(PARTS)
    ranked = sorted(
        (s for s in slices if s.bytes > 0),
        key=lambda s: (order.index(s.kind), known.index(s.words) if s.words in known else 0, -s.bytes, s.words),
    )
    small = [s for s in ranked if s.bytes < LEAST_SHARE * whole]
    if len(small) < 2:
        return ranked
    rest = Slice(OTHER, OTHER, KINDS[OTHER], sum(s.bytes for s in small), tuple(s.words for s in small))
    return sorted([*(s for s in ranked if s not in small), rest], key=lambda s: order.index(s.kind))


def parts_of(plan: MemoryPlan, fit: Fit) -> list[Slice]:
    """What the device holds at the peak: the tensors by what they are for, and what is beside them."""
    tensors = (slice_of(part.name, part.bytes) for part in fit.peak.parts)
    beside = (Slice(name, name, KINDS[name], size) for name, size in plan.beside_tensors(fit).items())
    return stacked([*tensors, *beside], fit.peak.device_bytes)


def kinds_of(plan: MemoryPlan, fit: Fit) -> dict[str, int]:
    """Bytes of each kind at the peak; they add up to `device_bytes`."""
    sums = dict.fromkeys(KINDS, 0)
    for part in fit.peak.parts:
        sums[slice_of(part.name, 0).kind] += part.bytes
    sums |= plan.beside_tensors(fit)
    return {kind: size for kind, size in sums.items() if size > 0}


def coarse(plan: MemoryPlan, fit: Fit) -> list[Slice]:
    """`kinds_of` as slices of a bar."""
    return stacked((Slice(kind, kind, KINDS[kind], size) for kind, size in kinds_of(plan, fit).items()), fit.peak.device_bytes)


# What the plan says, in sentences.


def place(plan: MemoryPlan) -> str:
    return f"on {plan.device.name}" if plan.device.kind == "cuda" else "in this machine’s RAM"


def margin_words(fit: Fit) -> str:
    return f"{100 * MARGIN:g} % margin from {bytes_text(fit.limit_bytes)}"


def tied(text: str) -> str:
    """Numbers and their units stay on one line."""
    return re.sub(r"(?<=\d) (?=[KMG]iB|B\b|%)", NO_BREAK, text)


def share(part: float, whole: float) -> str:
    """`0.714` → `71 %`; small shares with a decimal."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.1f} %"


def answer(plan: MemoryPlan) -> str:
    """Whether it fits, and by how much."""
    fit = plan.chosen
    needs = f"{METHOD_WORDS[fit.inventory.method]}{' fine-tuning' if fit.inventory.method == 'full' else ''} needs {bytes_text(fit.peak.device_bytes)}"
    spare = fit.budget_bytes - fit.peak.device_bytes
    margin = f"the {100 * MARGIN:g} % kept free as a margin"
    if fit.fits:
        return (
            f"It fits: {needs} of the {bytes_text(fit.budget_bytes)} free {place(plan)} and leaves {bytes_text(spare)}, more than {margin}."
        )
    if spare >= 0:
        return f"It does not fit safely: {needs} of the {bytes_text(fit.budget_bytes)} free {place(plan)} and leaves {bytes_text(spare)}, less than {margin}."
    times = fit.peak.device_bytes / fit.budget_bytes
    return f"It does not fit: {needs}, {bytes_text(-spare)} more than the {bytes_text(fit.budget_bytes)} free {place(plan)}" + (
        f": {times:.1f} times as much." if times >= 2 else "."
    )


def why(plan: MemoryPlan) -> str:
    """Batch × accumulation, and how it was found."""
    fit = plan.chosen
    faster = len(plan.batches) - 1
    if not fit.fits:
        reason = (
            f"the smallest of the {faster + 1} choices looked at, and too large" if faster else "the only choice that the recipe leaves"
        )
    elif faster:
        reason = f"the fastest choice that fits; {f'the {faster} faster ones do' if faster > 1 else 'the only faster one does'} not"
    else:
        reason = "no allowed choice is faster"
    return f"{choice(plan)}: {reason}."


def choice(plan: MemoryPlan) -> str:
    fit = plan.chosen
    return (
        f"Batch {fit.per_device_train_batch_size} × accumulation {fit.gradient_accumulation_steps}, gradient checkpointing "
        f"{'on' if fit.gradient_checkpointing else 'off'}, rows of up to {plan.max_length:,} tokens"
    )


def peak_words(plan: MemoryPlan) -> str:
    """When the peak comes, why then, and what most of it is."""
    fit = plan.chosen
    phase = fit.peak.phase
    kept = "its input alone" if fit.gradient_checkpointing else "what its backward pass will need"
    reasons = {
        "forward": f"Every layer keeps {kept}, so memory climbs layer by layer",
        "loss": "All layers’ kept activations are there, and the hidden states are scored against the vocabulary",
        "backward pass of the loss": "All layers’ kept activations are still there, and the loss head’s gradients come on top",
        "backward": "A layer is computed a second time, and its activations and gradients are there together"
        if fit.gradient_checkpointing
        else "Gradients are made while most of the kept activations are still there",
        "optimizer": "All gradients are complete, and what the optimizer works with comes on top",
    }
    reason = reasons.get(phase_of(phase), "All of it is there at once")
    if "later micro-batch" in phase:
        reason += "; the gradients of an earlier micro-batch are there already"
    largest = sorted(kinds_of(plan, fit).items(), key=lambda entry: -entry[1])[:2]
    most = " and ".join(f"{kind} ({bytes_text(size)}, {share(size, fit.peak.device_bytes)})" for kind, size in largest)
    return f"The peak comes in the {phase}. {reason}. Most of it: {most}."


def phase_of(name: str) -> str:
    """The key in PHASES of a phase's name."""
    return next((start for start in sorted(PHASES, key=len, reverse=True) if name.startswith(start)), "")


def command(change: Change, asked: str = "ftkit plan") -> str:
    """What to type: the command that the plan was asked for with, and the change."""
    import shlex

    return " ".join([asked, *(f"--set {shlex.quote(setting)}" for setting in change.settings)])


# The picture.


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
                a, height, b - a, y - height / 2, align="edge", color=part.colour,
                edgecolor="#999999" if hatch else "white", linewidth=0.8, hatch=hatch,
            )  # fmt: skip
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


def verdict(fit: Fit) -> str:
    return "fits" if fit.fits else "does not fit"


# The page.


def write_page(
    plan: MemoryPlan, tokens: TokenCounts | None, path: Path, title: str = "Fine-tuning plan", asked: str = "ftkit plan"
) -> None:
    """Write the plan as one HTML file without scripts, fonts or pictures from elsewhere.

    `tokens` where there is a dataset; `asked`: the command line that the plan was asked for with.

    The same plan gives the same bytes. Raises RecipeError for another suffix than .html or a folder that cannot be written.
    """
    import jinja2

    check(path, PAGE_SUFFIXES)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        finalize=lambda value: plain(value) if isinstance(value, str) else value,
    )  # fmt: skip
    environment.filters |= {"bytes": bytes_text, "count": count_text, "seconds": seconds_text, "command": command, "tied": tied}
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
        title=title, asked=asked, plan=plan, fit=fit, tokens=tokens, answer=tied(answer(plan)), why=tied(why(plan)), peak_words=tied(peak_words(plan)),
        margin=tied(f"{100 * MARGIN:g} %"), margin_words=tied(margin_words(fit)), least=tied(f"{100 * LEAST_SHARE:g} %"),
        small=fit.peak.device_bytes < SMALL_SHARE * axis_bytes(plan),
        used_kinds={kind for other in plan.methods for kind in kinds_of(plan, other)}, limit_bytes=fit.limit_bytes, span=axis_bytes(plan), total_bytes=max(plan.device.total_bytes, fit.budget_bytes),
        timeline=timeline(plan), padding=padding(plan.batching) if plan.batching else None, on_gpu=plan.device.kind == "cuda",
    )  # fmt: skip
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
        "width": len(totals), "outlines": outlines[::-1], "highest": highest, "peak": peak, "peak_height": highest / top,
        "budget_height": budget / top if shows_budget else None, "ticks": [(size, size / top) for size in range(0, int(top) + 1, step)],
        "phases": runs([PHASES.get(phase_of(name), name) for name in phase_at]),
        "micro_batches": runs(
            ["optimizer" if name.startswith("optimizer") else "a later micro-batch" if "later" in name else "first micro-batch" for name in phase_at]
        ),
        "readout": {**readout, "texts": list(texts)},
    }  # fmt: skip


def runs(names: Sequence[str]) -> list[tuple[str, float, float]]:
    """(name, start, width) of each run of one name, as shares of the whole."""
    cuts = [n for n in range(len(names)) if n == 0 or names[n] != names[n - 1]]
    return [(names[a], a / len(names), (b - a) / len(names)) for a, b in zip(cuts, [*cuts[1:], len(names)], strict=True)]


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


def padding(batching: Batching) -> dict[str, Any]:
    """Tokens computed in an epoch by how rows are put together, and the sizes of the batches as ftkit trains."""
    sizes = sorted(batching.grouped_batch_tokens)
    bins = [0] * 12
    for size in sizes:
        bins[min(len(bins) - 1, size * len(bins) // (sizes[-1] + 1))] += 1
    ways = {
        "rows of like length together (as ftkit trains)": batching.grouped_tokens,
        "rows in random order": batching.random_tokens,
        "rows packed end to end": batching.packed_tokens,
    }
    return {
        "ways": ways,
        "most": max(ways.values()),
        "smallest": sizes[0],
        "median": sizes[len(sizes) // 2],
        "largest": sizes[-1],
        "bins": bins,
    }


# Files.


def plain(text: str, keep: str = "") -> str:
    """Without control characters, which neither SVG nor HTML can hold. Markup stays markup."""
    return type(text)("".join(c if c.isprintable() or c in NO_BREAK + keep else " " for c in text))


def check(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises RecipeError for a suffix that is not among these and for a folder that is not there."""
    if path.suffix.lower() not in suffixes:
        raise RecipeError(f"{path} does not end in {' or '.join(suffixes)}.", f"name it {path.stem or 'plan'}{suffixes[0]}")
    if not path.parent.is_dir():
        raise RecipeError(f"There is no folder {path.parent}.", f"mkdir -p '{path.parent}'")


def write(path: Path, content: bytes) -> None:
    """Put a file in place as a whole. Raises RecipeError where that is refused."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RecipeError(f"Cannot write {path}: {error.strerror or error}.", "choose another folder or name") from None

"""A plan's bytes, put together for a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ftkit.plan.plan import CONTEXT, MARGIN, PROBED, PROCESS, RESERVE, Candidate, MemoryPlan
from ftkit.units import bytes_text

NO_BREAK = "\u00a0"
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
    "weights that stay 32-bit": ("weights", "#56B4E9"), "buffers": ("weights", "#A9D8F5"),
    "weights gathered to compute": ("weights", "#2E8BC0"),
    "optimizer states": ("optimizer states", "#009E73"),
    "adapter": ("adapter", "#8FD9C0"), "gradients": ("gradients", "#7B4FA3"), "gradients in flight": ("gradients", "#BBA1D6"),
    "loss head": ("loss head", "#CC79A7"), "cuBLAS workspace": ("workspaces", "#8C8C8C"), "kernel workspaces": ("workspaces", "#A6A6A6"),
    "optimizer temporaries": ("workspaces", "#757575"),
}  # fmt: skip
ACTIVATION_COLOURS = {"MLP": "#D55E00", "attention": "#E69F00", "norms": "#F0E442", "layers": "#A6761D"}
LEAST_SHARE = 0.01  # of the whole; what is smaller is told together
BEYOND = 1.06  # of the device's memory: what the bars' axis shows
SMALL_SHARE = 0.45  # of the axis; a smaller step is drawn once more, larger


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


def parts_of(plan: MemoryPlan, fit: Candidate) -> list[Slice]:
    """What the device holds at the peak: the tensors by what they are for, and what is beside them."""
    tensors = (slice_of(part.name, part.bytes) for part in fit.peak.parts)
    beside = (Slice(name, name, KINDS[name], size) for name, size in plan.beside_tensors(fit).items())
    return stacked([*tensors, *beside], fit.peak.device_bytes)


def kinds_of(plan: MemoryPlan, fit: Candidate) -> dict[str, int]:
    """Bytes of each kind at the peak; they add up to `device_bytes`."""
    sums = dict.fromkeys(KINDS, 0)
    for part in fit.peak.parts:
        sums[slice_of(part.name, 0).kind] += part.bytes
    sums |= plan.beside_tensors(fit)
    return {kind: size for kind, size in sums.items() if size > 0}


def coarse(plan: MemoryPlan, fit: Candidate) -> list[Slice]:
    """`kinds_of` as slices of a bar."""
    return stacked((Slice(kind, kind, KINDS[kind], size) for kind, size in kinds_of(plan, fit).items()), fit.peak.device_bytes)


def place(plan: MemoryPlan) -> str:
    return f"on {plan.device.name}" if plan.device.kind == "cuda" else "in this machine’s RAM"


def margin_words(fit: Candidate) -> str:
    return f"{100 * MARGIN:g} % margin from {bytes_text(fit.limit_bytes)}"


def tied(text: str) -> str:
    """Numbers and their units stay on one line."""
    return re.sub(r"(?<=\d) (?=[KMG]iB|B\b|%)", NO_BREAK, text)


def share(part: float, whole: float) -> str:
    """`0.714` → `71 %`; small shares with a decimal."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.1f} %"

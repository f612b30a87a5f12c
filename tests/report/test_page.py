"""The picture and the page hold the plan's numbers, are whole, safe and the same each time."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftkit.data.lengths import TokenCounts, batching
from ftkit.errors import RecipeError
from ftkit.gguf.types import GgufModel
from ftkit.machine.device import Device
from ftkit.memory.model import Inventory
from ftkit.memory.replay import Part, Peak, Timeline
from ftkit.plan.cost import Cost
from ftkit.plan.plan import Candidate, MemoryPlan, Remedy, Workload
from ftkit.report import parts as report_parts
from ftkit.report import plan_page, plot
from ftkit.report.parts import ACTIVATION_COLOURS, KINDS, Slice, kinds_of, parts_of
from ftkit.report.words import answer, command_for, peak_words, plain, reach, why
from ftkit.units import GIB, MIB, bytes_text

NASTY = 'a "card" <script>alert(1)</script> & $x^2$ \x00\x1b[31m'
COSTS = (Cost("merge", 13 * GIB, 0, 15 * GIB, "the run folder", 16 * GIB), Cost("ask", 0, 20 * GIB, 0, "the run folder", GIB))
PARTS = {  # in GiB
    "4-bit weights": 3.5, "weights that stay 16-bit": 2.0, "optimizer states": 0.5, "adapter": 0.25, "gradients": 0.25,
    "MLP": 8.0, "attention": 4.0, "norms": 1.0, "buffers": 1 / 1024, "inputs": 1 / 1024,
}  # fmt: skip
RESERVE_BYTES, CONTEXT_BYTES = GIB, 500 * MIB
LENGTHS = [100] * 30 + [900] * 10
TOKENS = TokenCounts(rows=40, total=sum(LENGTHS), median=100, p95=900, p99=900, longest=1433, cut=3, dropped=0)


def fit(
    method: Any = "qlora", *, parts: dict[str, float] = PARTS, budget: float = 24, times: float = 1, cuda: bool = True, phase: str = ""
) -> Candidate:
    sized = tuple(Part(name, int(times * size * GIB)) for name, size in sorted(parts.items(), key=lambda entry: -entry[1]))
    allocated = sum(part.bytes for part in sized)
    reserved = allocated + (RESERVE_BYTES if cuda else 0)
    device = reserved + CONTEXT_BYTES  # on a CPU: the process itself
    inventory = Inventory(
        method,
        8_030_000_000,
        {"MLP": 1},
        7_000_000_000,
        41_943_040,
        41_943_040,
        {"q_proj": 1},
        7_000_000_000,
        {"mlp.router": 70_000_000},
        1,
        1,
        1,
        1,
    )
    return Candidate(
        inventory,
        2,
        4,
        False,
        Peak(allocated, reserved, device, phase or "forward pass of a later micro-batch, layer 2 of 2", sized),
        int(budget * GIB),
    )


def plan(*, chosen: Candidate | None = None, device: Device | None = None, **changes: Any) -> MemoryPlan:
    """A step of two layers and two micro-batches on a 24 GiB card."""
    chosen = chosen or fit()
    fixed = {"4-bit weights": 3.5, "weights that stay 16-bit": 2.0, "optimizer states": 0.5, "adapter": 0.25}
    climb = [0.0, 0.5, 1.0, 0.9, 0.5, 0.0] * 2 + [0.0]
    series = {
        **{name: tuple(int(size * GIB) for _ in climb) for name, size in fixed.items()},
        "gradients": tuple(int((n >= 6) * 0.25 * GIB) for n in range(len(climb))),
        **{name: tuple(int(PARTS[name] * share * GIB) for share in climb) for name in ("MLP", "attention", "norms")},
        "optimizer temporaries": (*(0 for _ in climb[1:]), GIB),
    }
    again = " of a later micro-batch"
    phases = (
        ("forward pass, layer 1 of 2", 1), ("forward pass, layer 2 of 2", 2), ("loss head", 3), ("backward pass of the loss head", 3),
        ("backward pass, layer 2 of 2", 4), ("backward pass, layer 1 of 2", 5), (f"forward pass{again}, layer 1 of 2", 7),
        (f"forward pass{again}, layer 2 of 2", 8), (f"loss head{again}", 9), (f"backward pass of the loss head{again}", 9),
        (f"backward pass{again}, layer 2 of 2", 10), (f"backward pass{again}, layer 1 of 2", 11), ("optimizer step", 12),
    )  # fmt: skip
    made = MemoryPlan(
        device=device or Device("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, (8, 9)),
        max_length=1024, labelled_share=1.0, compute_dtype="bfloat16", attention="sdpa", chosen=chosen,
        methods=(fit("full", times=8), fit("lora", times=2), chosen), untraced={"full": "<i>why</i>"},
        batches=((4, False, 40 * GIB, False), (2, False, chosen.peak.device_bytes, chosen.fits)),
        changes=(), batching=batching(LENGTHS, 2, 4, 1024, 42), work=Workload(100, 2.0, 90_000, None, None),
        extra_bytes=0, timeline=Timeline(series, phases),
        gguf=GgufModel("llama", {"token_embd.weight": (32768, 4096)}, frozenset(), 1, 32768, 4096, 1, 0, None),
    )  # fmt: skip
    return replace(made, **changes)


def too_large() -> MemoryPlan:
    """Ten times what there is."""
    change = Remedy(("training.method=qlora", "training.max_length=512"), "QLoRA <b>", 10 * GIB, True)
    return plan(chosen=fit("full", times=12, phase="optimizer step"), changes=(change,), batching=None)


def on_cpu() -> MemoryPlan:
    chosen = fit(cuda=False, budget=200, phase="loss head")
    return plan(chosen=chosen, methods=(fit("full", cuda=False, times=8), chosen), device=Device("cpu", "CPU", 256 * GIB, 200 * GIB))


PLANS: dict[str, Callable[[], MemoryPlan]] = {"fits": plan, "too large": too_large, "on a CPU": on_cpu}


def parsed(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()  # noqa: S314 (the test wrote it)


def page_text(path: Path) -> str:
    """What a reader sees, on one line, numbers and units with plain spaces between them."""
    root = parsed(path)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "script"):
                parent.remove(child)
    return " ".join(" ".join(root.itertext()).split())


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_the_same_each_time_and_nothing_is_left_beside_it(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"plan{suffix}"
    plot.write_plot(PLANS[name](), path)
    first = path.read_bytes()
    plot.write_plot(PLANS[name](), path)
    assert path.read_bytes() == first
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert first.startswith(b"\x89PNG\r\n" if suffix == ".png" else b"<?xml")


@pytest.mark.parametrize("name", PLANS)
def test_the_svg_holds_every_number_of_the_bar(tmp_path: Path, name: str) -> None:
    made = PLANS[name]()
    plot.write_plot(made, tmp_path / "plan.svg")
    root = parsed(tmp_path / "plan.svg")
    text = " ".join(" ".join(root.itertext()).replace("\u00a0", " ").split())
    for size in (made.chosen.peak.device_bytes, made.chosen.budget_bytes, *(other.peak.device_bytes for other in made.methods)):
        assert bytes_text(size) in text
    for part in parts_of(made, made.chosen):
        assert bytes_text(part.bytes) in text
    assert ("does not fit" in text.split(" memory ")[1]) or made.chosen.fits


def test_the_parts_add_up_to_the_peak_and_small_ones_stand_together() -> None:
    made = plan()
    chosen = made.chosen
    parts = parts_of(made, chosen)
    assert sum(part.bytes for part in parts) == chosen.peak.device_bytes
    assert sum(kinds_of(made, chosen).values()) == chosen.peak.device_bytes
    assert [part.words for part in parts] == [
        "4-bit weights", "weights that stay 16-bit", "optimizer states", "adapter", "gradients", "activations: MLP",
        "activations: attention",
        "activations: norms", "other", "allocator’s reserve", "CUDA context",
    ]  # fmt: skip
    other = next(part for part in parts if part.words == "other")
    assert other.holds == ("buffers", "activations: inputs")
    assert other.bytes == 2 * MIB


def test_text_on_a_part_can_be_read() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        return sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        )

    for colour in {*KINDS.values(), *(colour for _, colour in report_parts.PARTS.values()), *ACTIVATION_COLOURS.values()}:
        light, dark = sorted((luminance(colour), luminance(Slice("", "", colour, 0).ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (fit(), "It fits: QLoRA needs 20.99 GiB of the 24.00 GiB free on NVIDIA GeForce RTX 4090 and leaves 3.01 GiB, more than the 4 %"),
        (fit(budget=21.5), "It does not fit safely: QLoRA needs 20.99 GiB of the 21.50 GiB free"),
        (fit(budget=20), f"It does not fit: QLoRA needs 20.99 GiB, {512 + 2 + 500:.1f} MiB more than the 20.00 GiB free on NVIDIA"),
        (fit("full", budget=10), "It does not fit: full fine-tuning needs 20.99 GiB, 10.99 GiB more than the 10.00 GiB free"),
    ],
)  # fmt: skip
def test_the_answer(chosen: Candidate, said: str) -> None:
    assert chosen.peak.device_bytes == round((3.5 + 2 + 0.5 + 0.25 + 0.25 + 8 + 4 + 1) * GIB) + 2 * MIB + RESERVE_BYTES + CONTEXT_BYTES
    assert answer(plan(chosen=chosen)).startswith(said)


def test_ten_times_too_large_is_said_so() -> None:
    assert answer(too_large()).endswith(" times as much.")


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("forward pass, layer 2 of 2", "memory climbs layer by layer"),
        ("loss head", "scored against the vocabulary"),
        (
            "backward pass of the loss head of a later micro-batch",
            "the loss head’s gradients come on top; the gradients of an earlier micro-batch",
        ),
        ("backward pass, layer 1 of 2", "Gradients are made while most"),
        ("optimizer step", "what the optimizer works with"),
    ],
)
def test_the_peak_is_explained(phase: str, said: str) -> None:
    words = peak_words(plan(chosen=fit(phase=phase)))
    assert words.startswith(f"The peak comes in the {phase}. ")
    assert said in words
    assert "activations (13.00 GiB, 62 %) and weights (5.50 GiB, 26 %)" in words


@pytest.mark.parametrize("name", PLANS)
def test_the_page_is_the_same_each_time_whole_and_complete(tmp_path: Path, name: str) -> None:
    made, path = PLANS[name](), tmp_path / "plan.html"
    plan_page.write_page(made, COSTS, TOKENS, path)
    first = path.read_bytes()
    plan_page.write_page(MemoryPlan.load(json.loads(json.dumps(made.record()))), COSTS, TOKENS, path)  # as recorded
    assert path.read_bytes() == first
    assert [found.name for found in tmp_path.iterdir()] == ["plan.html"]
    text = page_text(path)
    sizes = [
        made.chosen.budget_bytes,
        *(other.peak.device_bytes for other in made.methods),
        *(part.bytes for part in parts_of(made, made.chosen)),
    ]
    sizes += [size for _, _, size, _ in made.batches] + list(made.gguf_bytes.values())
    sizes += [size for step in COSTS for size in (step.peak_ram_bytes, step.vram_bytes, step.disk_bytes, step.read_bytes) if size]
    sizes += [change.peak_bytes for change in made.changes]
    for size in sizes:
        assert bytes_text(size) in text
    for words in (answer(made), why(made), peak_words(made), "1,433", "3 rows are longer"):
        assert words in text
    assert ("CUDA" in text) == (made.device.kind == "cuda")


def test_the_page_asks_nothing_of_the_network_and_stands_in_html_too(tmp_path: Path) -> None:
    plan_page.write_page(plan(), COSTS, TOKENS, tmp_path / "plan.html")
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
            if tag not in ("meta", "br", "input"):
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("meta", "br", "input", "path")  # others would stay open in HTML

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    source = (tmp_path / "plan.html").read_text(encoding="utf-8")
    Reader().feed(source)
    assert not opened
    assert set(re.findall(r"https?://[^\"]+", source)) == {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}
    assert "url(" not in source
    assert "@import" not in source


def test_text_from_elsewhere_is_only_text(tmp_path: Path) -> None:
    made = replace(too_large(), device=Device("cuda", NASTY, 24 * GIB, 24 * GIB))
    plan_page.write_page(made, COSTS, None, tmp_path / "plan.html", title=NASTY)
    plot.write_plot(made, tmp_path / "plan.svg")
    plot.write_plot(made, tmp_path / "plan.png")
    source = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<script>alert" not in source
    assert "QLoRA &lt;b&gt;" in source
    assert "full is left out: &lt;i&gt;why&lt;/i&gt;" in source
    root = parsed(tmp_path / "plan.html")
    assert root.findtext(".//{*}h1") == plain(NASTY) == 'a "card" <script>alert(1)</script> & $x^2$   [31m'
    svg = parsed(tmp_path / "plan.svg")
    assert not [element for element in svg.iter() if str(element.tag).endswith("script")]
    assert "$x^2$" in "".join(svg.itertext())


def test_what_adapters_reach_is_said() -> None:
    assert reach(plan()) == "Adapters reach 99 % of the weights in the text model’s layers; without one: mlp.router (1.0 %)."
    whole = replace(fit(), inventory=replace(fit().inventory, method="full"))
    assert reach(plan(chosen=whole)) is None


def test_a_change_comes_with_its_command(tmp_path: Path) -> None:
    plan_page.write_page(too_large(), COSTS, None, tmp_path / "plan.html")
    assert "ftkit plan --set training.method=qlora --set training.max_length=512" in page_text(tmp_path / "plan.html")
    assert command_for(Remedy(("data.train=a b.jsonl",), "", 0, True)) == "ftkit plan --set 'data.train=a b.jsonl'"
    plan_page.write_page(replace(too_large(), changes=()), COSTS, None, tmp_path / "plan.html")
    assert "a smaller model or a larger device is needed" in page_text(tmp_path / "plan.html")


def test_the_timeline_is_stacked_to_the_peak_and_its_phases_cover_it() -> None:
    drawn = plan_page.timeline(plan())
    assert drawn["highest"] == (3.5 + 2 + 0.5 + 0.25 + 0.25 + 8 + 4 + 1) * GIB
    assert drawn["peak"] == 8
    assert [name for name, _, _ in drawn["phases"]] == ["forward", "loss", "backward", "forward", "loss", "backward", "optimizer"]
    assert sum(width for _, _, width in drawn["phases"]) == pytest.approx(1)
    assert [name for name, _, _ in drawn["micro_batches"]] == ["first micro-batch", "a later micro-batch", "optimizer"]
    words = [entry["part"].words for entry in drawn["outlines"]]  # from the top
    assert words[-2:] == ["weights that stay 16-bit", "4-bit weights"]
    assert (
        words.index("optimizer temporaries")
        < words.index("activations: norms")
        < words.index("activations: MLP")
        < words.index("gradients")
    )
    texts = drawn["readout"]["texts"]
    assert texts[drawn["readout"]["total"][8]] == "19.50 GiB"
    assert texts[drawn["readout"]["phase"][8]] == "forward pass of a later micro-batch, layer 2 of 2"
    assert [texts[values[8]] for values in drawn["readout"]["parts"]] == [bytes_text(entry["at_peak"]) for entry in drawn["outlines"]]


def test_an_outline_is_a_stair() -> None:
    assert plan_page.outline([10, 10, 30, 0]) == "M0 1000V990h2v-20h1v30h1V1000z"


@pytest.mark.parametrize("write", [plot.write_plot, lambda made, path: plan_page.write_page(made, COSTS, TOKENS, path)])
@pytest.mark.parametrize("name", ["plan.pdf", "plan", "missing/plan"])
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, write: Callable[[MemoryPlan, Path], None], name: str) -> None:
    path = tmp_path / name
    if name.startswith("missing"):
        path = path.with_suffix(".svg" if write is plot.write_plot else ".html")
    with pytest.raises(RecipeError) as refused:
        write(plan(), path)
    assert refused.value.hint
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match="No space left"):
        plan_page.write_page(plan(), COSTS, TOKENS, path)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["plan.html"]

"""What was shipped and proved, as one page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ftkit.proof.record import Record
from ftkit.report.card import dotted, shown
from ftkit.report.chart import HEIGHT, WIDTH, Chart, Mark, line_chart, spot_chart
from ftkit.report.parts import tied
from ftkit.report.write import PAGE_SUFFIXES, check, page_environment, write
from ftkit.train.curve import Point
from ftkit.units import GIB, KIB, MIB, bytes_text, seconds_text

MOST_ANSWERS = 200  # that are shown
MOST_WORDS = 2000  # of an answer, that are compared word by word
MOST_POINTS = 240  # of a curve, that are drawn
AS_TRAINED = (99, 100)  # percent: what is nearer to each other is drawn as near
KEPT_IN_TEXTS = "\n\t\u200c\u200d"  # of what is not printable: some scripts are not read without the last two


@dataclass(frozen=True)
class Answer:
    """A question, and what was said to it, by who said it: before, trained, shipped."""

    question: str
    expected: str
    said: Mapping[str, str]
    right: Mapping[str, bool]

    @property
    def differs(self) -> str:
        """How the shipped answer differs from the trained one, in words; empty: in nothing, or the trained model was not asked."""
        trained, shipped = self.said.get("trained"), self.said.get("shipped")
        if trained is None or shipped is None or trained == shipped:
            return ""
        if self.right.get("trained") != self.right.get("shipped"):
            return "differs, and was right as trained" if self.right.get("trained") else "differs, and was wrong as trained"
        return "differs" if trained.split() != shipped.split() else "differs in white space alone"

    @property
    def order(self) -> int:
        """Those that differ come first, before them those of which one alone is right."""
        return 2 if not self.differs else 1 if self.right.get("trained") == self.right.get("shipped") else 0


@dataclass(frozen=True)
class Sized:
    """A file's size, and what it keeps of the training, in percent."""

    name: str
    bytes: int
    percent: float
    low: float | None = None
    high: float | None = None
    chosen_by: bool = False  # on the rows by which the type is chosen, not on those by which it is proved
    fails: str | None = None  # what the proof of it said, where it does not ship for that


@dataclass(frozen=True, kw_only=True)
class ShipPage:
    """All that the page shows."""

    record: Record
    held_out: bool  # whether the questions were surely not trained on
    files: Sequence[tuple[str, int, str]]  # that are handed on: name, bytes, SHA-256
    answers: Sequence[Answer] = ()
    sizes: Sequence[Sized] = ()
    curve: Sequence[Point] = ()
    divergence: Mapping[str, Sequence[float]] = field(default_factory=dict)  # KL at the first, second, … token of an answer


def write_page(page: ShipPage, path: Path) -> None:
    """Write it as one HTML file without scripts, fonts or pictures from elsewhere; texts of rows and models are escaped.

    The same page gives the same bytes. Raises RecipeError for another suffix than .html or a folder that cannot be written.
    """
    check(path, PAGE_SUFFIXES)
    environment = page_environment(KEPT_IN_TEXTS)
    environment.filters |= {"bytes": bytes_text, "seconds": seconds_text}
    record, proof = page.record, page.record.proof
    shipped = record.file.quantization
    table = proof["scores"].get(shipped, {}).get("confusion")
    curve, taken = curve_chart(page.curve)
    apart = {name: list(enumerate(values, 1)) for name, values in page.divergence.items() if values}
    text = environment.get_template("ship_page.html.j2").render(
        title=f"{record.name}: what was shipped and proved",
        answer=tied(headline(page)),
        proved=all(one["outcome"] == "passed" for one in proof["checks"]),
        unproven=[one for one in proof["checks"] if one["outcome"] != "passed"],
        record=record,
        proof=proof,
        shipped=shipped,
        questions="held-out questions" if page.held_out else "questions",
        scores=score_rows(proof["scores"]),
        confusion=table,
        said=[*table, *sorted({name for row in table.values() for name in row} - table.keys())] if table else [],
        divergence=line_chart(apart) if apart else None,
        sizes=sorted(page.sizes, key=lambda one: (one.bytes, one.percent, one.name)),
        sizes_chart=sizes_chart(page.sizes) if len({one.bytes for one in page.sizes}) > 1 else None,
        curve=curve,
        taken=taken,
        answers=[shown_answer(one) for one in sorted(page.answers, key=lambda one: one.order)[:MOST_ANSWERS]],
        count=len(page.answers),
        differing=sum(bool(one.differs) for one in page.answers),
        asked_trained=any("trained" in one.said for one in page.answers),
        settings=[(key, shown(value)) for key, value in dotted(record.settings)],
        system=record.settings["ship"]["system"],
        versions=versions(record.versions),
        files=page.files,
        origins=origins(record),
        width=WIDTH,
        height=HEIGHT,
    )
    write(path, text.encode())


def headline(page: ShipPage) -> str:
    """The answer in one sentence: what is not proved, what ships, how many right of how many, and what it keeps."""
    file, proof = page.record.file, page.record.proof
    by = {outcome: [one["name"] for one in proof["checks"] if one["outcome"] == outcome] for outcome in ("failed", "not made", "passed")}
    parts = [f"failed: {_listed(by['failed'])}"] if by["failed"] else []
    parts += [f"not proved: {_listed(by['not made'])}"] if by["not made"] else []
    score, trained = (proof["scores"].get(name) for name in (file.quantization, "trained"))
    kept = proof["forms"].get(file.quantization, {}).get("kept")
    which = "held-out questions" if page.held_out else "questions"
    said = f"answers {score['right']} of {score['rows']} {which} right" if score else "was asked no questions"
    if score:
        said += f", {trained['right']} as trained" if trained else ", and the trained model was not asked"
    gain = f" and keeps {kept['percent']:.1f} % of what training gained" if kept else "; what it keeps of the training was not measured"
    count = len(by["passed"])
    checks = "check" if count == 1 else f"{count} checks"
    proved = f"the other {checks} passed" if parts else f"{'its one' if count == 1 else 'all'} {checks} passed"
    if not count:
        proved = "nothing else was proved of it" if parts else "nothing was checked of it"
    sentence = "; ".join([*parts, f"{file.name} ({bytes_text(file.size_bytes)}) ships: it {said}{',' if kept else ''}{gain}", proved])
    return sentence[0].upper() + sentence[1:] + "." if parts else f"{sentence}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def score_rows(scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, int, str]]:
    """Form, right, percent, not readable, and the share of keys that are right; of what no form has, all are empty."""
    return [
        (
            name,
            f"{one['right']} of {one['rows']}",
            f"{one['percent']:.1f} %",
            one.get("unreadable", 0),
            f"{100 * one['keys_right'] / one['keys']:.1f} %" if one.get("keys") and one.get("keys_right") is not None else "",
        )
        for name, one in scores.items()
    ]


def sizes_chart(sizes: Iterable[Sized]) -> Chart:
    """What each file keeps over its size."""
    marks = [Mark(one.name, one.bytes, one.percent, one.low, one.high, one.chosen_by) for one in sizes]
    largest = max(mark.x for mark in marks)
    unit, name = next(((unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if largest >= 2 * unit), (1, "B"))
    return spot_chart(marks, lambda size: f"{size / unit:g} {name}", lambda percent: f"{percent:g} %", unit=unit, around=AS_TRAINED)


def curve_chart(curve: Sequence[Point]) -> tuple[Chart | None, int]:
    """Training and validation loss over steps, and of how many steps a drawn point of the former is the mean."""
    training = [(point.step, point.loss) for point in curve if not point.evaluated and point.loss is not None]
    taken = -(-len(training) // MOST_POINTS) or 1
    groups = [training[begin : begin + taken] for begin in range(0, len(training), taken)]
    series = {
        "training": [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups],
        "validation": [(point.step, point.validation_loss) for point in curve if point.evaluated and point.validation_loss is not None],
    }
    found: dict[str, Any] = {name: points for name, points in series.items() if points}
    return (line_chart(found) if found else None), taken


def shown_answer(answer: Answer) -> dict[str, Any]:
    """With the words that the trained and the shipped answer do not share marked in both."""
    said = {name: [(text, False)] for name, text in answer.said.items() if text}
    if answer.differs:
        said["trained"], said["shipped"] = differing(answer.said["trained"], answer.said["shipped"])
    return {"answer": answer, "said": [(name, said.get(name, []), answer.right.get(name)) for name in answer.said]}


Pieces = list[tuple[str, bool]]


def differing(first: str, second: str) -> tuple[Pieces, Pieces]:
    """Two texts in pieces, and whether a piece is in that text alone."""
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    if max(len(a), len(b)) > MOST_WORDS:
        same = next((n for n, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
        spans = [("equal", 0, same, 0, same), ("replace", same, len(a), same, len(b))]
    else:
        spans = list(SequenceMatcher(None, a, b, autojunk=False).get_opcodes())
    found: tuple[Pieces, Pieces] = ([], [])
    for what, a_begin, a_end, b_begin, b_end in spans:
        for pieces, text in zip(found, ("".join(a[a_begin:a_end]), "".join(b[b_begin:b_end])), strict=True):
            if text:
                pieces.append((text, what != "equal"))
    return found


def versions(by_step: Mapping[str, Mapping[str, str | None]]) -> list[tuple[str, str, str]]:
    """Name, version, and in which steps."""
    found: dict[tuple[str, str], list[str]] = {}
    for step, made_with in by_step.items():
        for name, version in made_with.items():
            if version:
                found.setdefault((name, version), []).append(step)
    return [(name, version, ", ".join(steps)) for (name, version), steps in found.items()]


def origins(record: Record) -> list[tuple[str, str, str]]:
    """What it was made from: which part, the file's name, its SHA-256."""
    base = record.base
    found = [("base", base["reference"], f"commit {base['revision']}" if base["revision"] else "")] if not base["sha256"] else []
    found += [("base", name, digest) for name, digest in base["sha256"].items()]
    found += [("trained", name, digest) for name, digest in record.trained["sha256"].items()]
    return found + [(f"data, {purpose}", file["name"], file["sha256"] or "") for purpose, files in record.data.items() for file in files]

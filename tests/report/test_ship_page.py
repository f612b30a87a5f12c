"""The page about what shipped: it says what is not proved first, holds the figures, and no text from elsewhere is more than text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import shipped

from ftkit.errors import RecipeError
from ftkit.proof.record import Record
from ftkit.report.chart import HEIGHT, LETTER, LINE, WIDTH, Mark, line_chart, spot_chart
from ftkit.report.ship_page import MOST_ANSWERS, MOST_POINTS, MOST_WORDS, Answer, ShipPage, Sized, differing, headline, write_page
from ftkit.train.curve import Point

NASTY = "a <script>alert(1)</script> \"q\" 'q' & ]]> <!-- {{ 1 }} \x00\x1b[31m\u202e"
CHECK = {"name": "answers", "outcome": "passed", "detail": "9 of 10 right"}
SCORE = {"right": 9, "rows": 10, "unreadable": 0, "keys_right": None, "keys": None, "confusion": None, "percent": 90.0}
SIZES = [Sized("Q2_K", 800, 71.5, chosen_by=True), Sized("F32", 4000, 99.5, 98.0, 101.0)]
CURVE = [Point(n, n / 10, loss=4.0 / n, learning_rate=1e-4) for n in range(1, 11)] + [Point(10, 1.0, validation_loss=0.5)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    made = shipped.record(shipped.make_file(tmp_path_factory.mktemp("page") / shipped.FILE, shipped.tokenizer()))
    return replace(made, trained={**made.trained, "seconds": 60.0})


def proof(record: Record, **changes: Any) -> Record:
    return replace(record, proof={**record.proof, **changes})


def answer(trained: str, given: str, *, question: str = "q", right: tuple[bool, bool] = (True, True)) -> Answer:
    said = {"before": "?", "trained": trained, "shipped": given}
    return Answer(question, "e", said, {"before": False, "trained": right[0], "shipped": right[1]})


def written(page: ShipPage, folder: Path) -> tuple[str, ElementTree.Element]:
    """The page as text, and as XML."""
    write_page(page, folder / "ship.html")
    text = (folder / "ship.html").read_text(encoding="utf-8")
    return text, ElementTree.parse(folder / "ship.html").getroot()  # noqa: S314 (the test wrote it)


def words_of(root: ElementTree.Element) -> str:
    return " ".join("".join(root.itertext()).split())


def marked(root: ElementTree.Element) -> list[str]:
    return ["".join(found.itertext()) for found in root.iterfind(".//{*}section//{*}mark")]


def test_it_holds_the_figures_in_order_and_is_the_same_each_time(record: Record, tmp_path: Path) -> None:
    table = {"YES": {"YES": 6, "NO": 1}, "NO": {"NO": 3, "none of them": 0}}
    scores = {"before": {**SCORE, "right": 1, "percent": 10.0}, "trained": SCORE, "F32": {**SCORE, "confusion": table}}
    page = ShipPage(
        record=proof(record, scores=scores),
        held_out=True,
        files=[(shipped.FILE, 4000, "9" * 64)],
        answers=[answer("one two", "one three")],
        sizes=SIZES,
        curve=CURVE,
        divergence={"before": [1.0, 2.0], "shipped": [0.01, 0.02]},
    )
    text, root = written(page, tmp_path)
    assert written(page, tmp_path)[0] == text
    assert [found.text for found in root.iterfind(".//{*}h2")] == [
        "Right answers", "Token by token", "Expected, and what F32 says", "Size against gain kept", "Training",
        "Answers side by side", "What was checked", "Settings and versions", "Files",
    ]  # fmt: skip
    assert len(list(root.iterfind(".//{*}svg"))) == 3
    said = words_of(root)
    for figure in ("9 of 10", "99.5 % (98.0 to 101.0)", "0.01", "18.25", "71.5 %", "none of them", "9" * 64, "2" * 64):
        assert figure in said, figure
    assert ("training.seed", "42") in [tuple("".join(cell.itertext()) for cell in row) for row in root.iterfind(".//{*}tr")]
    for elsewhere in ("http:", "https:", "url(", "@import", "<script", "<link", "<img", "src="):
        assert elsewhere not in text.replace("http://www.w3.org/", "")


def test_texts_from_elsewhere_stay_texts(record: Record, tmp_path: Path) -> None:
    form = record.proof["forms"]["F32"]
    plainly = ShipPage(record=record, held_out=True, files=[("f", 1, "")], answers=[answer("a", "b")], sizes=SIZES, divergence={"x": [1.0]})
    hostile = replace(
        plainly,
        record=replace(
            proof(
                record,
                checks=[{"name": NASTY, "outcome": "failed", "detail": NASTY}],
                scores={NASTY: SCORE, "F32": {**SCORE, "confusion": {NASTY: {NASTY: 1}}}},
                forms={NASTY: form},
                right_by=NASTY,
            ),
            name=NASTY,
            merged_onto=NASTY,
            trained={**record.trained, "verdict": NASTY, "sha256": {NASTY: NASTY}},
            base={**record.base, "sha256": {NASTY: NASTY}},
            data={NASTY: [{"name": NASTY, "sha256": None}]},
            versions={NASTY: {NASTY: NASTY}},
            settings={**record.settings, "model": NASTY, "ship": {**record.settings["ship"], "system": NASTY}},
        ),
        files=[(NASTY, 1, NASTY)],
        answers=[replace(answer(NASTY, f"{NASTY} x", question=f"{NASTY}\nline"), expected=NASTY)],
        sizes=[replace(one, name=NASTY) for one in SIZES],
        divergence={NASTY: [1.0]},
        curve=CURVE,
    )
    text, root = written(hostile, tmp_path)
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    kinds = {found.tag.rpartition("}")[2] for found in root.iter()}
    assert "script" not in kinds
    assert kinds - {found.tag.rpartition("}")[2] for found in written(plainly, tmp_path)[1].iter()} == {"ul", "li", "b"}
    said = "".join(root.itertext())
    assert said.count("<script>alert(1)</script>") > 20
    assert "]]> <!-- {{ 1 }}" in said
    questions = [found.text or "" for found in root.iterfind(".//{*}section/{*}p")]
    assert [text.splitlines()[1] for text in questions] == ["line"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"scores": {"trained": SCORE, "F32": {**SCORE, "right": 8}}},
            "FILE ships: it answers 8 of 10 held-out questions right, 9 as trained, and keeps 99.5 % of what training gained; "
            "its one check passed.",
        ),
        (
            {"checks": [CHECK, {**CHECK, "outcome": "not made", "name": "prompts"}, {**CHECK, "outcome": "failed", "name": "stops"}]},
            "Failed: stops; not proved: prompts; FILE ships: it was asked no questions, and keeps 99.5 % of what training gained; "
            "the other check passed.",
        ),
        (
            {"forms": {}, "scores": {"F32": SCORE}, "checks": []},
            "FILE ships: it answers 9 of 10 held-out questions right, and the trained model was not asked; "
            "what it keeps of the training was not measured; nothing was checked of it.",
        ),
    ],
)
def test_the_answer_in_one_sentence(record: Record, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    page = ShipPage(record=proof(record, **changes), held_out=True, files=[])
    assert re.sub(r"tiny-F32\.gguf \(.*?\)", "FILE", headline(page)) == said
    _, root = written(page, tmp_path)
    first = root.find(".//{*}p")
    assert first is not None
    proved = all(check["outcome"] == "passed" for check in page.record.proof["checks"])
    assert first.get("class") == ("answer" if proved else "answer no")


def test_what_was_not_looked_at_is_said(record: Record, tmp_path: Path) -> None:
    empty = proof(record, scores={}, forms={}, weighed=[])
    text, root = written(ShipPage(record=empty, held_out=False, files=[], sizes=SIZES[:1]), tmp_path)
    assert "<svg" not in text
    said = words_of(root)
    for words in ("It was asked no questions.", "It was not looked at token by token.", "No curve is known of this training."):
        assert words in said
    without_base = {"shipped": "b"}
    page = ShipPage(record=record, held_out=False, files=[], answers=[Answer("q", "e", without_base, {})])
    assert "The trained model was not asked." in words_of(written(page, tmp_path)[1])


def test_answers_that_differ_come_first_and_what_is_cut_is_said(record: Record, tmp_path: Path) -> None:
    answers = [answer("same", "same", question=f"q{n}") for n in range(MOST_ANSWERS)]
    answers += [answer("a b c", "a x c", question="other"), answer("a b", "a  b", question="white")]
    answers += [answer("a b", "a c", question="lost", right=(True, False))]
    _, root = written(ShipPage(record=record, held_out=True, files=[], answers=answers), tmp_path)
    asked = [found.text for found in root.iterfind(".//{*}section/{*}p")]
    assert asked[:4] == ["lost", "other", "white", "q0"]
    assert len(asked) == MOST_ANSWERS
    badges = [found.text for found in root.iterfind(".//{*}h3/{*}span")]
    assert badges == ["differs, and was right as trained", "differs", "differs in white space alone"]
    assert marked(root) == ["b", "c", "b", "x", " ", "  "]
    assert f"Shown are {MOST_ANSWERS} of {len(answers)}." in words_of(root)


def test_texts_of_any_length_are_told_apart_whole() -> None:
    for first, second in (("a b", "a c d"), ("", "x"), ("a, b\n", "a. b"), ("w " * MOST_WORDS + "x", "w " * MOST_WORDS + "y z")):
        for text, pieces in zip((first, second), differing(first, second), strict=True):
            assert "".join(piece for piece, _ in pieces) == text
        shared = ["".join(text for text, other in pieces if not other) for pieces in differing(first, second)]
        assert shared[0] == shared[1] != second


def test_names_of_points_do_not_cover_each_other() -> None:
    crowd = [Mark(f"Q{n}_K_M", 1000 + 3 * n, 99 + n / 50) for n in range(6)]
    chart = spot_chart([*crowd, Mark("F16", 4000, 99.5, 99.0, 100.0)], str, str, unit=100)
    starts = {"start": 0.0, "middle": 0.5, "end": 1.0}
    boxes = []
    for spot in chart.spots:
        wide = LETTER * len(spot.name)
        left = spot.at[0] - starts[spot.anchor] * wide
        boxes.append((left, spot.at[1], left + wide))
        assert left >= 0
        assert left + wide <= WIDTH
        assert 0 < spot.at[1] < HEIGHT
    for (left, y, right), (other_left, other_y, other_right) in combinations(boxes, 2):
        assert abs(y - other_y) >= LINE - 1 or right <= other_left or other_right <= left
    assert chart.x_ticks[0][1] == "0"
    interval = chart.spots[-1].interval
    assert interval
    assert interval[0] > chart.spots[-1].y > interval[1]  # the y axis of a picture goes down


def test_lines_stay_in_their_box_whatever_the_values() -> None:
    for series in (
        {"a": [(1.0, 4.0), (2.0, 0.01)], "b": [(1.0, 0.5)]},
        {"a": [(1.0, 0.0)]},
        {"a": [(1.0, -1e-9), (2.0, 1e-3)]},
        {"a": [(n, 5.0) for n in range(100)], "b": [(n, 5.0) for n in range(100)]},
    ):
        chart = line_chart(series)
        for line in chart.lines:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", line.path)]
            assert all(0 <= number <= WIDTH for number in numbers[::2])
            assert all(0 <= number <= HEIGHT for number in numbers[1::2])
        assert len({line.dash for line in chart.lines}) == len(chart.lines)
        heights = sorted(line.at[1] for line in chart.lines)
        assert all(after - before >= LINE for before, after in pairwise(heights))
        assert len(chart.y_ticks) >= 2
    assert line_chart({"a": [(1.0, 4.0), (2.0, 0.01)]}).logarithmic
    assert not line_chart({"a": [(1.0, 4.0), (2.0, 1.0)]}).logarithmic


def test_a_long_curve_is_drawn_in_means_and_that_is_said(record: Record, tmp_path: Path) -> None:
    curve = [Point(n, 0.0, loss=1.0 + n % 2, learning_rate=1e-4) for n in range(4 * MOST_POINTS)]
    text, _ = written(ShipPage(record=record, held_out=True, files=[], curve=curve), tmp_path)
    assert "the mean of 4 steps" in text
    (path,) = re.findall(r'<path class="line line0" d="(.*?)"', text)
    assert path.count("L") == MOST_POINTS - 1


def test_a_page_that_could_not_be_written_is_refused(record: Record, tmp_path: Path) -> None:
    page = ShipPage(record=record, held_out=True, files=[])
    for path, said in ((tmp_path / "ship.pdf", "does not end in"), (tmp_path / "nowhere" / "ship.html", "There is no folder")):
        with pytest.raises(RecipeError, match=said):
            write_page(page, path)
    if Path("/proc").is_dir():  # which root cannot write either
        with pytest.raises(RecipeError, match="Cannot write into"):
            write_page(page, Path("/proc/ship.html"))
    assert not list(tmp_path.iterdir())

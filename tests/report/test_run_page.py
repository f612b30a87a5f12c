"""The page about a training: the verdict first, the figures there are, and no text from elsewhere is more than text."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.data.lengths import TokenCounts
from ftkit.line.job import make_job
from ftkit.line.run_page import run_page
from ftkit.line.step import fingerprint_of
from ftkit.line.train import TRAIN
from ftkit.machine import ranks
from ftkit.recipe import Recipe
from ftkit.report.run_page import Memory, RunPage, loss_chart, write_page
from ftkit.report.ship_page import MOST_POINTS, Answer
from ftkit.run import Run
from ftkit.train.curve import Point, thinned
from ftkit.train.metrics import METRICS, Metrics
from ftkit.train.verdict import Verdict
from ftkit.units import bytes_text

NASTY = "a <script>alert(1)</script> \"q\" 'q' & ]]> <!-- {{ 1 }} \x00\x1b[31m\u202e"
CURVE = [Point(n, n / 10, loss=4.0 / n, learning_rate=1e-4, gradient_norm=1.0 / n) for n in range(1, 31)]
CURVE += [Point(n, n / 10, validation_loss=loss) for n, loss in ((10, 0.5), (20, 0.4), (30, 0.6))]
PAGE = RunPage(
    name="mine",
    state="finished",
    step=30,
    steps=None,
    best_step=20,
    verdict=Verdict("over-fitting", "since step 20 it rose", 20, "ftkit train --set training.num_train_epochs=2"),
    curve=CURVE,
    seconds=10.0,
    trained_tokens=5000,
    memory=Memory("a card", 1000 << 20, 4000 << 20, 1100 << 20, "allocated on the GPU"),
    tokens=TokenCounts(rows=100, total=5000, median=40, p95=80, p99=90, longest=99, cut=7, dropped=2),
    answers=[Answer("q", "e", {"before": "x", "trained": "e"}, {"before": False, "trained": True})],
    settings={"training": {"learning_rate": 1e-4}},
)


def written(page: RunPage, folder: Path) -> tuple[str, ElementTree.Element]:
    write_page(page, folder / "run.html")
    text = (folder / "run.html").read_text(encoding="utf-8")
    return text, ElementTree.fromstring(text)  # noqa: S314 (the test wrote it)


def words_of(root: ElementTree.Element) -> str:
    return " ".join("".join(root.itertext()).split())


def test_it_holds_the_figures_and_is_the_same_each_time(tmp_path: Path) -> None:
    text, root = written(PAGE, tmp_path)
    assert written(PAGE, tmp_path)[0] == text
    charts = [found.get("aria-label") for found in root.iterfind(".//{*}svg")]
    assert [str(label).split()[0] for label in charts] == ["Training", "Learning", "Gradient"]
    said = words_of(root)
    for figure in (
        "Over-fitting: since step 20", "30 steps are trained.", "num_train_epochs=2", "500 tokens/s",
        "best step20", "validation loss there0.4000",
        "+10.0 % of the plan", bytes_text(1000 << 20), bytes_text(1100 << 20),
        "7 (7.0 %) were longer than training.max_length and cut; 2 of them left out",
        "0 of 1 right before, 1 of 1 right as trained.", "best; over-fitting since",
    ):  # fmt: skip
        assert figure in said, figure
    for elsewhere in ("http:", "https:", "url(", "@import", "<script", "<link", "<img", "src="):
        assert elsewhere not in text.replace("http://www.w3.org/", "")


@pytest.mark.parametrize(("state", "words"), [("running", "of 90 steps 30 are trained; it runs."), ("stopped", "the same command goes on")])
def test_a_training_that_is_not_finished_says_so(state: str, words: str, tmp_path: Path) -> None:
    assert words.lower() in words_of(written(replace(PAGE, state=state, steps=90), tmp_path)[1]).lower()


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    nothing = Verdict("too few to tell", "no evaluation so far")
    bare = RunPage(
        name="mine", state="running", step=0, steps=None, best_step=None, verdict=nothing, curve=[], seconds=None,
        trained_tokens=None, memory=None, tokens=None,
    )  # fmt: skip
    text, root = written(bare, tmp_path)
    assert "<svg" not in text
    for words in ("No step is known yet.", "No plan is recorded", "were not counted", "are asked by ftkit ship"):
        assert words in words_of(root)


def test_texts_from_elsewhere_stay_texts(tmp_path: Path) -> None:
    hostile = replace(
        PAGE,
        name=NASTY,
        verdict=Verdict("learning", NASTY, None, NASTY),
        memory=Memory(NASTY, 1, 1, 1, NASTY),
        answers=[Answer(NASTY, NASTY, {"before": NASTY, "trained": NASTY}, {})],
        settings={"model": NASTY},
    )
    text, root = written(hostile, tmp_path)
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    assert "script" not in {found.tag.rpartition("}")[2] for found in root.iter()}
    assert "".join(root.itertext()).count("<script>alert(1)</script>") >= 9


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(float(n), float(n % 2)) for n in range(10 * MOST_POINTS)]
    few = thinned(points, MOST_POINTS)
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert len(few) == MOST_POINTS + 2
    assert {y for _, y in few[1:-1]} == {0.5}


def test_the_best_step_and_the_verdict_stand_at_upright_lines() -> None:
    apart = loss_chart(replace(PAGE, verdict=replace(PAGE.verdict, since_step=10)))
    assert apart
    assert [words for _, _, words in apart.notes] == ["over-fitting since", "best"]
    assert [(line.name, line.faint, line.number) for line in apart.lines] == [
        ("each step", True, 0), ("smoothed", False, 0), ("validation", False, 1),
    ]  # fmt: skip


def charts_of(root: ElementTree.Element) -> list[str]:
    return [str(found.get("aria-label")) for found in root.iterfind(".//{*}svg")]


def test_right_answers_are_drawn_beside_the_loss_and_said_of_the_best_step(tmp_path: Path) -> None:
    """Asked at two of the evaluations; the best step is not that of the least loss."""
    right = {10: 50.0, 30: 75.0}
    curve = [replace(point, right_percent=right.get(point.step)) if point.evaluated else point for point in CURVE]
    _, root = written(replace(PAGE, curve=curve, best_step=30), tmp_path)
    assert charts_of(root)[1] == "Right answers of each evaluation, in percent, over steps"
    said = words_of(root)
    for words in ("best step30", "validation loss there0.6000", "right answers there75 %", "303.000.600075 %best", "202.000.4000–"):
        assert words.replace(" ", "") in said.replace(" ", ""), words
    assert "preferred" not in said


def test_of_preferences_accuracy_and_margin_are_drawn(tmp_path: Path) -> None:
    rewards = {10: (0.5, 0.01), 20: (0.75, 0.5), 30: (0.625, -0.25)}
    curve = [
        replace(point, reward_accuracy=rewards[point.step][0], reward_margin=rewards[point.step][1]) if point.evaluated else point
        for point in CURVE
    ]
    _, root = written(replace(PAGE, curve=curve), tmp_path)
    assert [label.split(" of")[0] for label in charts_of(root)[1:3]] == ["Preferred", "Margin"]
    said = words_of(root).replace(" ", "")
    for words in ("preferred there75 %", "margin there0.500", "202.000.400075 %0.500best", "303.000.600062 %-0.250"):
        assert words.replace(" ", "") in said, words
    assert "rightanswers" not in said


@pytest.mark.parametrize(("metric", "best"), [("eval_loss", 4), ("right", 2)])
def test_the_best_step_so_far_is_the_one_that_training_follows(metric: str, best: int, model: Path, tmp_path: Path) -> None:
    chosen = {"evaluate": {"every": 1}, "training": {"metric_for_best_model": metric, "method": "lora"}}
    with Run(tmp_path / "run") as run:
        job = make_job(Recipe.model_validate({"model": str(model), **chosen}), model, run, has_data=False)
        partial = run.partial(TRAIN.name, fingerprint_of(job, TRAIN))
        partial.mkdir(parents=True)
        told = [Metrics(n, n / 10, validation_loss=3.0 - n / 2, right_percent=right) for n, right in ((1, 0), (2, 50), (3, 50), (4, 25))]
        (partial / METRICS).write_text("".join(json.dumps(asdict(line)) + "\n" for line in told), encoding="utf-8")
        page = run_page(job)
    assert page.best_step == best
    assert [point.right_percent for point in page.curve] == [0, 50, 50, 25]


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_page_of_a_finished_and_of_a_stopped_and_of_a_running_training(
    tmp_path: Path, rows: list[Any], write_rows: Any, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    tiny.make_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\ntraining: {method: lora, max_steps: 4, effective_batch_size: 2, max_length: 128}\nlora: {r: 4}\n", encoding="utf-8"
    )
    page = tmp_path / "run.html"
    refused = ftkit("status", "runs/recipe", "--html", page)
    assert refused.exit_code != 0
    done = ftkit("train", "--html", page, "--json")
    assert done.exit_code == 0, done.stderr
    first = page.read_text(encoding="utf-8")
    assert "4 steps are trained." in first
    assert "planned peak" in first
    assert ftkit("status", "runs/recipe", "--html", page).exit_code == 0
    assert page.read_text(encoding="utf-8") == first

    folder = Path(json.loads(done.stdout)["folder"])
    partial = folder.with_name(f".{folder.name}.partial")
    manifest = folder.parent / "manifest.json"
    index = json.loads(manifest.read_text(encoding="utf-8"))
    del index["steps"]["train"]
    manifest.write_text(json.dumps(index), encoding="utf-8")
    partial.mkdir()
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    (partial / METRICS).write_text("".join(lines[:2]) + lines[2][:9], encoding="utf-8")  # as a kill leaves it
    shutil.rmtree(folder)
    assert ftkit("status", "runs/recipe", "--html", page).exit_code == 0
    assert re.search(r"2 are trained; it was stopped", page.read_text(encoding="utf-8"))
    told: list[None] = []
    monkeypatch.setattr(ranks, "tell", told.append)
    with Run(folder.parent):
        meanwhile = ftkit("train", "--html", page)
    assert meanwhile.exit_code == 0
    assert told == [None]  # for other processes would wait for a plan
    assert "Another ftkit works in" in meanwhile.stdout
    assert re.search(r"2 are trained; it runs", page.read_text(encoding="utf-8"))

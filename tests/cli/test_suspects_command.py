"""`ftkit data --suspects` as it is typed: the rows that stand out in a training, as text, JSON, page and a file to correct."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from conftest import conversations

from ftkit.data.read import read_rows
from ftkit.train.dynamics import SEEN

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Ftkit = Callable[..., Result]


def test_the_rows_that_stand_out_are_listed_and_written(
    tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], ftkit: Ftkit, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    tiny.make_model(tmp_path / "model")
    asked = [{"prompt": "What is 2  PLUS 2?", "completion": "It is <b>5</b>."}, {"prompt": "What is 2 plus 2?", "completion": "It is 4."}]
    write_rows(tmp_path / "train.jsonl", [*conversations()[3:], *asked, {"text": "Two and two are four."}])
    write_rows(tmp_path / "validation.jsonl", conversations()[:2])
    recipe = {
        "model": "model",
        "data": {"validation": "validation.jsonl"},
        "training": {"method": "lora", "num_train_epochs": 2, "effective_batch_size": 4, "max_length": 128, "learning_rate": 1e-2},
        "ship": {"max_new_tokens": 4},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    untrained = ftkit("data", "--suspects", "recipe.yaml")
    assert untrained.exit_code == 1
    assert "holds no training of the recipe and the data as they are now" in untrained.stderr
    assert "Hint: ftkit train" in untrained.stderr
    assert ftkit("train").exit_code == 0
    shown = ftkit("data", "--suspects", "--write", "suspects.jsonl", "--html", "data.html")
    assert shown.exit_code == 0, shown.output
    assert "asking the trained model: 10/10" in shown.stderr or "asking the trained model: 9/9" in shown.stderr
    assert "of 14 rows are likely mislabelled, 10 are listed." in shown.stdout
    first, second = (f"train.jsonl, line {line}" for line in (10, 11))
    assert f"{first}: the same question has another answer in {second}" in shown.stdout
    told = json.loads(ftkit("data", "runs/recipe", "--suspects", "--json").stdout)
    assert told["from_training"]
    scores = [each["score"] for each in told["suspects"]]
    assert scores == sorted(scores, reverse=True)
    assert {first, second} == {each["place"] for each in told["suspects"] if each["contradicts"]}
    assert {first, second} == {each["place"] for each in told["suspects"][:2]}
    assert all(len(each["probabilities"]) == 2 for each in told["suspects"])  # two epochs, and an evaluation in each
    assert [each["answer"] is None for each in told["suspects"]] == [each["label"].startswith("Two") for each in told["suspects"]]
    written = [json.loads(line) for line in (tmp_path / "suspects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["suspect"]["place"] for row in written] == [each["place"] for each in told["suspects"]]
    assert asked[0] in [{key: row[key] for key in row if key != "suspect"} for row in written]
    assert len(read_rows(tmp_path / "suspects.jsonl")) == 10  # they are rows still
    page = (tmp_path / "data.html").read_text(encoding="utf-8")
    assert "<b>5" not in page
    assert page.count("same question, another answer") == 2
    (tmp_path / "suspects.jsonl").write_text("corrected", encoding="utf-8")
    again = ftkit("data", "--suspects", "--write", "suspects.jsonl")
    assert again.exit_code == 2
    assert "suspects.jsonl is there, and may hold your corrections" in again.stderr
    assert (tmp_path / "suspects.jsonl").read_text(encoding="utf-8") == "corrected"
    (seen,) = tmp_path.glob(f"runs/recipe/train-*/{SEEN}")
    seen.unlink()  # as ftkit trained before it kept any
    earlier = ftkit("data", "--suspects", "--set", "ship.max_new_tokens=3", "--show", "4")
    assert "its best checkpoint reads the rows once" in earlier.stderr
    assert "10 are listed, of which 4 are shown" in earlier.stdout
    assert "Its training kept nothing of what it saw" in earlier.stdout


@pytest.mark.slow
def test_a_run_s_folder_stands_for_what_was_trained_with_set(small_project: Path, ftkit: Ftkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_project)
    recipe = {"model": "model", "training": {"method": "lora", "max_length": 128}, "ship": {"max_new_tokens": 4}}
    (small_project / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert ftkit("train", "--set", "training.max_steps=2", "--set", "data.date=2024-01-02").exit_code == 0
    by_recipe = ftkit("data", "--suspects", "recipe.yaml")
    assert (by_recipe.exit_code, "ftkit data --suspects" in by_recipe.stderr) == (1, True)
    by_run = ftkit("data", "--suspects", "runs/recipe", "--json")
    assert by_run.exit_code == 0, by_run.stderr
    assert ftkit("status", "runs/recipe", "--html", "run.html").exit_code == 0
    assert "2024-01-02" in (small_project / "run.html").read_text(encoding="utf-8")
    assert "Next: ftkit ship runs/recipe" in ftkit("status", "runs/recipe").stdout


def test_what_does_not_go_together_is_said(small_project: Path, ftkit: Ftkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_project)
    assert "--write is of --suspects" in ftkit("data", "--write", "x.jsonl").stderr
    assert "x.txt does not end in .jsonl" in ftkit("data", "--suspects", "--write", "x.txt").stderr
    assert ftkit("data", "--suspects").exit_code == 2  # no recipe


def test_of_preferences_none_is_called_mislabelled(small_project: Path, ftkit: Ftkit, write_rows: Any, private_cache: Path) -> None:
    tiny.make_model(small_project / "model")
    write_rows(small_project / "train.jsonl", [{"prompt": "What?", "chosen": "This.", "rejected": "That."}])
    (small_project / "recipe.yaml").write_text("model: model\ntraining: {objective: dpo}\n", encoding="utf-8")
    refused = ftkit("data", small_project, "--suspects")
    assert (refused.exit_code, "training.objective: of preferences no row is called mislabelled" in refused.stderr) == (2, True)

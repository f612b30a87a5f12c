"""The dataset is tokenised once: what the plan wrote down is what the training reads, and only where it still follows from the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit.data.lengths import Tally, tally
from ftkit.data.mask import KINDS, cut, learnt
from ftkit.data.store import storing
from ftkit.engines import hf
from ftkit.line import tokens
from ftkit.line.job import Job, make_job, read_data, tokenizer_of
from ftkit.recipe import Recipe
from ftkit.run import Run


@pytest.fixture
def job(model: Path, rows: list[Any], write_rows: Callable[[Path, list[Any]], Path], tmp_path: Path) -> Iterator[Job]:
    long = {"messages": [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 200}]}
    recipe = _recipe(model, write_rows(tmp_path / "train.jsonl", [*rows, long]))
    with Run(tmp_path / "run") as run:
        yield make_job(recipe, tmp_path, run)


def _recipe(model: Path, train: Path, **training: Any) -> Recipe:
    recipe = tiny.recipe(model, **training)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": str(train)})})


def with_other(job: Job, **training: Any) -> Job:
    recipe = job.recipe.model_copy(update={"training": job.recipe.training.model_copy(update=training)})
    return make_job(recipe, job.folder, job.run)


def plan(job: Job, tokenizer: Any, *inputs: Any) -> tuple[Tally, ...]:
    """What the plan does with the dataset, by itself."""
    counted: list[tuple[Tally, ...]] = []

    def make(folder: Path) -> dict[str, Any]:
        counted.append(tokens.count(job, tokenizer, read_data(job), folder))
        return {}

    job.run.ensure("plan", inputs, make)
    return counted[0]


def tokenised(job: Job, tokenizer: Any) -> list[list[dict[str, Any]]]:
    rows, length = read_data(job), job.recipe.training.max_length
    return [
        [{"input_ids": each.input_ids, "labels": each.labels} for each in cut(learnt(tokenizer, part, "sft"), length)]
        for part in (rows.train, rows.validation)
    ]


def test_the_training_takes_what_the_plan_wrote_down(job: Job, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(job, job.source.folder or tmp_path, base=True)
    counted, rows = plan(job, tokenizer), read_data(job)
    assert counted == tuple(tally(learnt(tokenizer, part, "sft"), 128) for part in (rows.train, rows.validation))
    assert sum(length > 128 for each in counted for length in each.lengths) == 1
    expected = tokenised(job, tokenizer)
    assert [list(part) for part in tokens.take(job, None, rows, tmp_path / "examples")] == expected  # without a tokenizer
    assert [list(part) for part in tokens.take(job, None, rows, tmp_path / "examples")] == expected  # and again, after a kill
    assert not list(job.run.folder.rglob("*.arrow"))  # they lie on the disk once


def test_another_plan_of_the_same_rows_counts_nothing_again(job: Job, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(job, job.source.folder or tmp_path, base=True)
    counted = plan(job, tokenizer)
    assert plan(with_other(job, learning_rate=1e-5), None, "another rate") == counted
    (kept,) = job.run.folder.glob("plan-*/tokens")  # of the last plan
    assert {path.name for path in kept.iterdir()} == {"train.arrow", "validation.arrow", "tokens.json"}


@pytest.mark.parametrize("change", [{"max_length": 64}, {"seed": 7}])
def test_what_follows_from_something_else_is_tokenised_anew(change: dict[str, Any], job: Job, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(job, job.source.folder or tmp_path, base=True)
    plan(job, tokenizer)
    other = with_other(job, **change)
    assert [list(part) for part in tokens.take(other, tokenizer, read_data(other), tmp_path / "examples")] == tokenised(other, tokenizer)
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "more", "completion": "of it"}) + "\n")
    more = make_job(job.recipe, job.folder, job.run)
    assert sum(map(len, tokens.take(more, tokenizer, read_data(more), tmp_path / "examples"))) == 14


def test_what_has_no_room_is_counted_all_the_same(job: Job, small_files: Callable[[int], Any], tmp_path: Path) -> None:
    tokenizer, path = tokenizer_of(job, job.source.folder or tmp_path, base=True), tmp_path / "full.arrow"
    examples = list(learnt(tokenizer, read_data(job).train, "sft")) * 200
    assert list(storing(examples, path, KINDS["sft"], 128, most_bytes=1000)) == examples
    assert not path.exists()
    with small_files(1000):
        assert list(storing(examples, path, KINDS["sft"], 128, most_bytes=1 << 30)) == examples
    assert not path.exists()


def test_a_tokenizer_is_kept_until_its_files_change_and_is_nobody_s_to_spoil(job: Job, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(model, folder)
    first = tokenizer_of(job, folder)
    first.eos_token, first.chat_template = first.convert_ids_to_tokens(0), "spoilt"
    again = tokenizer_of(job, folder)
    assert again.backend_tokenizer is first.backend_tokenizer
    assert (again.eos_token, again.chat_template) != (first.eos_token, first.chat_template)
    assert again.eos_token == hf.load_tokenizer(model).eos_token
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} anew", encoding="utf-8")
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    assert tokenizer_of(job, folder).chat_template == "{{ messages[0].content }} anew"

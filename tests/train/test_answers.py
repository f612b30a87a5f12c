"""Answers are scored while training: shown, in the curve, and the best checkpoint may follow them; what is learnt stays the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from conftest import conversations

from ftkit.data.rows import Example
from ftkit.engines import hf
from ftkit.errors import InterruptedRunError, RecipeError
from ftkit.files import file_fingerprint
from ftkit.line.job import make_job
from ftkit.line.plan import training_inputs
from ftkit.progress import SilentReporter
from ftkit.recipe import Evaluate, Recipe, make_recipe
from ftkit.run import Run
from ftkit.train.answers import Asked
from ftkit.train.training import train

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


QUESTIONS = [[{"role": "user", "content": f"What is {n} plus {n}?"}] for n in range(3)]


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def adapter_hash(folder: Path) -> str:
    return file_fingerprint(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "checkpointing"), [("qlora", True), ("lora", False)])
def test_answers_are_scored_and_the_weights_stay_the_same_bits(
    method: str, checkpointing: bool, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    """With dropout, so that one number drawn for an answer would be seen."""
    import torch

    torch.set_num_threads(1)
    recipe = tiny.recipe(model, method=method, max_steps=4)
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"lora_dropout": 0.1})})
    settings, reporter = replace(tiny.SETTINGS, gradient_checkpointing=checkpointing), Notes()
    arguments = (recipe, settings, model, tokenizer, examples[2:], examples[:2])
    without = train(*arguments, tmp_path / "without")
    trained = hf.load_adapted(model, tmp_path / "without" / "adapter", recipe.training.method, dtype="float32", cuda=False)
    expected = ["no such answer", *hf.answer(trained, tokenizer, QUESTIONS[1:], 8)]
    asked = Asked(QUESTIONS, expected, Evaluate(every=2), 8)
    scored = train(*arguments, tmp_path / "scored", reporter, asked)
    assert adapter_hash(tmp_path / "without") == adapter_hash(tmp_path / "scored")
    evaluated = [point for point in scored.curve if point.evaluated]
    assert [point.step for point in evaluated] == [2, 4]
    assert [point.right_percent is None for point in evaluated] == [True, False]  # each second evaluation
    assert [replace(point, right_percent=None) for point in scored.curve] == without.curve
    assert sum(", right " in note and " of 3 (asked in " in note for note in reporter.notes) == 1
    assert json.loads((tmp_path / "scored" / "curve.json").read_text(encoding="utf-8")) == scored.record()["curve"]


@pytest.mark.slow
def test_the_best_checkpoint_follows_right_answers(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    """What is said after four steps is expected: after six the loss is less, the answers are others. An interruption changes nothing."""
    import torch

    torch.set_num_threads(1)
    settings: dict[str, Any] = {"method": "lora", "learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_share": 0}
    four_steps = tiny.recipe(model, **settings, max_steps=4, evaluations_per_epoch=1)
    train(four_steps, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path / "four")
    after_four = hf.load_adapted(model, tmp_path / "four" / "adapter", "lora", dtype="float32", cuda=False)
    asked = Asked(QUESTIONS, hf.answer(after_four, tokenizer, QUESTIONS, 12), Evaluate(every=1), 12)
    recipe = tiny.recipe(model, **settings, max_steps=6, save_minutes=1e-6)
    follows = recipe.training.model_copy(update={"metric_for_best_model": "right"})
    recipe = recipe.model_copy(update={"training": follows, "evaluate": asked.rule})

    class StopsAtSix(SilentReporter):
        def note(self, text: str) -> None:
            if text.startswith("step 6:"):
                raise KeyboardInterrupt

    arguments = (recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path)
    with pytest.raises(InterruptedRunError):
        train(*arguments, StopsAtSix(), asked)
    result = train(*arguments, Notes(), asked)
    evaluated = {point.step: point for point in result.curve if point.evaluated}
    assert result.resumed_from_step == 5
    assert result.best_step == 4
    assert result.best_right_percent == evaluated[4].right_percent == 100
    assert evaluated[2].right_percent == evaluated[6].right_percent == 0
    assert result.best_validation_loss == evaluated[4].validation_loss
    assert (evaluated[6].validation_loss or 9) < result.best_validation_loss
    assert adapter_hash(tmp_path) == adapter_hash(tmp_path / "four")


def inputs(model: Path, **changes: Any) -> list[Any]:
    recipe = make_recipe([(key.replace("__", "."), value) for key, value in changes.items()], {"model": str(model)})
    return training_inputs(make_job(recipe, model, Run(model / "run"), has_data=False))


def test_a_training_follows_from_what_is_asked_only_where_its_best_step_does(model: Path) -> None:
    plain = inputs(model)
    assert plain == inputs(model, evaluate__every=1, evaluate__rows=8)
    right = inputs(model, evaluate__every=1, training__metric_for_best_model="right")
    assert right != plain
    assert right != inputs(model, evaluate__every=1, evaluate__rows=8, training__metric_for_best_model="right")
    assert right != inputs(model, evaluate__every=1, evaluate__by="last_line", training__metric_for_best_model="right")


@pytest.mark.parametrize("every", [0, 2])
def test_right_answers_of_each_evaluation_are_needed_where_the_best_follows_them(every: int) -> None:
    with pytest.raises(RecipeError, match=r"\n  training.metric_for_best_model: right needs .* set evaluate.every to 1"):
        make_recipe([("evaluate.every", every), ("training.metric_for_best_model", "right")], {"model": "x"})
    assert Recipe(model="x").evaluate.every == 0


@pytest.mark.slow
def test_what_no_answer_could_be_is_said_before_training(
    model: Path,
    tmp_path: Path,
    write_rows: Callable[[Path, list[Any]], Path],
    ftkit: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_rows(tmp_path / "train.jsonl", conversations())
    write_rows(tmp_path / "validation.jsonl", conversations()[:2])
    write_rows(tmp_path / "text.jsonl", [{"text": "Two and two are four."}])
    text = {
        "model": str(model),
        "data": {"validation": "validation.jsonl"},
        "training": {"method": "lora", "max_steps": 2, "effective_batch_size": 2, "max_length": 128, "evaluations_per_epoch": 6},
        "ship": {"max_new_tokens": 4},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(text), encoding="utf-8")
    on = ("--set", "evaluate.every=1")
    labels = ("--set", "evaluate.by=labels", "--set", "evaluate.labels=[true it is, wrong it is]", "--set", "data.test=text.jsonl")
    unreadable = ftkit("train", tmp_path, *on, *labels)
    assert unreadable.exit_code == 2, unreadable.output
    assert f"the expected answer in {tmp_path / 'validation.jsonl'}, line 1 names none of the labels" in unreadable.stderr
    nothing = ftkit("train", tmp_path, *on, "--set", "data.validation=text.jsonl", "--set", "training.metric_for_best_model=right")
    assert nothing.exit_code == 2
    assert "no validation row asks anything" in nothing.stderr
    done = ftkit("train", tmp_path, *on)
    assert done.exit_code == 0, done.stderr
    assert "step 1: validation loss 5." in done.stderr
    assert "right 0 of 2 (asked in 0 s)" in done.stderr
    assert ", 0 % of its answers right)" in done.stdout

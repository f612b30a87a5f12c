"""A step as a value: made once for what it follows from, typed, and never made before its time."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.errors import RecipeError, RunError
from ftkit.line import line
from ftkit.line.job import Job, make_job
from ftkit.line.plan import training_inputs
from ftkit.line.step import Made, Step, ensure, find, fingerprint_of
from ftkit.run import Run

Ftkit = Callable[..., Result]


@dataclass(frozen=True)
class Grown:
    words: tuple[str, ...]


class Garden:
    """Three steps on an open run: `tree` comes after `seed`; `water` is needed to make it, and it does not follow from it."""

    def __init__(self, folder: Path) -> None:
        self.made: list[str] = []
        self.kind = "oak"
        recipe = tiny.recipe(tiny.make_model(folder / "model"))
        self.job = make_job(recipe, folder, Run(folder / "run"), has_data=False)
        shared: dict[str, Any] = {"does": "", "command": "ftkit ship", "result": Grown}
        self.seed = Step(name="seed", follows_from=lambda job: [self.kind], make=self.make("seed"), **shared)
        self.water = Step(name="water", make=self.make("water"), **shared)
        self.weed = Step(name="weed", make=self.make("weed"), applies=lambda job: job.onto == "dequantised", **shared)
        self.tree = Step(name="tree", after=(self.seed, self.weed), needs=(self.water,), make=self.make("tree"), **shared)

    def make(self, name: str) -> Callable[..., Grown]:
        def make(job: Job, folder: Path, *before: Made[Any]) -> Grown:
            self.made.append(name)
            (folder / "file").write_text(self.kind, encoding="utf-8")
            return Grown((name, *(made.name for made in before)))

        return make


@pytest.fixture
def garden(tmp_path: Path) -> Any:
    garden = Garden(tmp_path)
    with garden.job.run:
        yield garden


def test_what_comes_before_is_made_first_and_once(garden: Garden) -> None:
    tree = ensure(garden.job, garden.tree)
    assert garden.made == ["seed", "water", "tree"]
    assert (tree.result, tree.fresh) == (Grown(("tree", "seed", "water")), True)
    again = ensure(garden.job, garden.tree)
    assert garden.made == ["seed", "water", "tree"]
    assert again == replace(tree, fresh=False, seconds=again.seconds)
    assert find(garden.job, garden.tree) == again


def test_what_a_step_held_is_given_back_before_the_next(garden: Garden, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trainer and its watcher, which hold each other; and torch keeps what a GPU gave it."""
    held: list[weakref.ref[Any]] = []

    class Part:
        other: Any = None

    def hold(job: Job, folder: Path, *_: Made[Any]) -> Grown:
        gc.disable()
        one, other = Part(), Part()
        one.other, other.other = other, one
        held.append(weakref.ref(one))
        return Grown(())

    def look(job: Job, folder: Path, *_: Made[Any]) -> Grown:
        assert [part() for part in held] == [None]
        return Grown(())

    monkeypatch.setitem(sys.modules, "torch", importlib.import_module("torch"))
    try:
        ensure(garden.job, replace(garden.tree, after=(replace(garden.seed, make=hold),), make=look))
    finally:
        gc.enable()


def test_what_it_follows_from_makes_it_again_and_what_it_needs_does_not(garden: Garden) -> None:
    first = ensure(garden.job, garden.tree)
    for path in ensure(garden.job, garden.water).folder.iterdir():
        path.unlink()
    ensure(garden.job, garden.water).folder.rmdir()
    ensure(garden.job, garden.tree)
    assert garden.made == ["seed", "water", "tree"]  # it is there, so nothing that it would need is made
    garden.kind = "elm"
    second = ensure(garden.job, garden.tree)
    assert garden.made[3:] == ["seed", "water", "tree"]
    assert second.fingerprint != first.fingerprint
    assert not first.folder.exists()


def test_a_step_that_does_not_apply_is_left_out(garden: Garden) -> None:
    other = replace(garden.job, onto="dequantised")
    assert fingerprint_of(other, garden.tree) != fingerprint_of(garden.job, garden.tree)
    assert ensure(other, garden.tree).result == Grown(("tree", "seed", "weed", "water"))


def test_what_another_version_recorded_is_named_with_what_to_type(garden: Garden) -> None:
    made = garden.job.run.ensure("seed", [garden.kind], lambda folder: {"wards": []})
    with pytest.raises(RunError, match=r"another version of ftkit \(words: ") as refused:
        ensure(garden.job, garden.seed)
    assert str(made.folder) in str(refused.value.hint)
    assert "ftkit ship" in str(refused.value.hint)


def test_the_line_is_in_order_and_its_names_are_known_as_ftkits_own() -> None:
    names = [step.name for step in line.LINE]
    assert len({*names}) == len(names)
    assert all(name.isalpha() for name in names)
    for number, step in enumerate(line.LINE):
        assert {before.name for before in (*step.after, *step.needs)} <= {*names[:number]}


@pytest.fixture
def trained(tmp_path: Path, rows: list[Any], write_rows: Callable[[Path, list[Any]], Path]) -> Path:
    """A recipe whose training is on record, and nothing after it."""
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny.make_model(tmp_path / 'model')}\nship: {{quantization: Q8_0}}\n", encoding="utf-8")
    job = line_job(recipe)
    with job.run:
        job.run.ensure("train", training_inputs(job), lambda folder: tiny.TRAINED, keep=True)
    return recipe


def test_a_training_without_a_rate_is_the_one_that_was_made_with_the_methods(trained: Path) -> None:
    """Runs from before the rate followed the method name the one that stood there by itself."""
    from ftkit.line.job import open_job

    def inputs(**training: Any) -> list[Any]:
        return training_inputs(open_job(trained, [(f"training.{key}", value) for key, value in training.items()]))

    for method, rate in (("qlora", 2e-4), ("lora", 2e-4), ("full", 2e-5)):
        assert inputs(method=method) == inputs(method=method, learning_rate=rate) != inputs(method=method, learning_rate=1e-3)
        assert inputs(method=method)[-2]["learning_rate"] == rate


def line_job(recipe: Path) -> Job:
    from ftkit.line.job import open_job

    return open_job(recipe)


def test_a_dry_run_shows_every_step_and_makes_none(trained: Path, ftkit: Ftkit) -> None:
    before = sorted(trained.parent.rglob("*"))
    shown = ftkit("ship", trained, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    lines = [text.split() for text in shown.stdout.splitlines()]
    states = {words[0]: " ".join(words) for words in lines if words and words[0] in {step.name for step in line.LINE}}
    assert list(states) == ["plan", "train", "ask", "merge", "gguf", "reask", "prove", "register"]  # Q8_0 is not quantised
    assert [name for name, text in states.items() if " done " in text] == ["train"]
    assert sorted(trained.parent.rglob("*")) == before
    assert ftkit("build", trained, "--dry-run", "--run-dir", trained.parent / "other").exit_code == 0
    assert not (trained.parent / "other").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "prove"), "`prove` comes after `merge`, which is not finished"),
        (("--only", "quantise"), "is no step of this recipe"),
        (("--only", "register"), "keeps nothing in the run"),
        (("--only", "mrege"), "There is no step `mrege`"),
        (("--from", "train"), "--from train"),
        (("--from", "ask", "--only", "ask"), "Give one of"),
    ],
)
def test_a_part_that_cannot_be_walked_is_refused(trained: Path, ftkit: Ftkit, words: tuple[str, ...], said: str) -> None:
    refused = ftkit("ship", trained, *words)
    assert refused.exit_code in (RecipeError.exit_code, RunError.exit_code)
    assert said in refused.stderr
    assert "Hint: " in refused.stderr or "Give one of" in said


def test_from_throws_away_that_step_and_what_follows(trained: Path) -> None:
    job = line_job(trained)
    with job.run:
        for name in ("ask", "merge"):
            step = line.named(name)
            inputs = [fingerprint_of(job, line.named("train")), *step.follows_from(job)]
            result = {"onto": "the 16-bit source", "stops": [1]} if name == "merge" else {}
            job.run.ensure(name, inputs, lambda folder, result=result: result)  # type: ignore[misc]
            assert find(job, step)
        line.start_from(job, "merge")
        assert [state.step.name for state in line.states(job) if state.done] == ["train", "ask"]

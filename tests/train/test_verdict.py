"""Curves of each kind are read as that kind, made ones with noise and real ones, and where it cannot be known nothing is said."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from curves import KINDS, made

from ftkit.data.mask import tokenise
from ftkit.data.rows import Example, Row
from ftkit.engines import hf
from ftkit.recipe import Training
from ftkit.train.curve import Point, smoothed
from ftkit.train.training import TrainResult, train
from ftkit.train.verdict import Verdict, read_curve

SEEDS = 60
NEVER = {"diverged", "over-fitting"}  # of a curve in which nothing happens


def named(verdict: Verdict) -> str:
    """The kind, and of an oscillating curve its cause."""
    if verdict.kind == "diverged":
        return "spike"
    if verdict.kind == "oscillating":
        return "rate" if "rate is too high" in verdict.words else "noise"
    return verdict.kind


def test_made_curves_of_each_kind_are_read_as_that_kind(report_figures: Callable[[str], None]) -> None:
    found = {kind: Counter(named(read_curve(made(kind, seed), Training())) for seed in range(SEEDS)) for kind in KINDS}
    for kind, said in found.items():
        report_figures(f"made curves, {kind}: {', '.join(f'{name} {count}' for name, count in said.most_common())} of {SEEDS}")
        if kind != "flat":
            assert said[kind] >= 0.95 * SEEDS, (kind, said)
    assert not NEVER & {"diverged" if name == "spike" else name for name in found["flat"]}


@pytest.mark.slow
def test_a_neutral_curve_is_never_called_diverged_or_over_fitting() -> None:
    kinds = Counter(read_curve(made(kind, seed), Training()).kind for kind in ("flat", "levelled off") for seed in range(1000, 1500))
    assert not NEVER & kinds.keys(), kinds


def validated(*losses: float | None) -> list[Point]:
    return [Point(step=10 * n, epoch=n, validation_loss=loss) for n, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("curve", "kind", "since"),
    [
        ([], "too few to tell", None),
        (validated(2.0), "too few to tell", None),
        (validated(2.0, 1.0, 1.5), "over-fitting", 20),
        (validated(2.0, 1.99, 1.99), "not learning", None),
        (validated(2.0, 1.5, 1.0), "learning", None),
        (validated(2.0, 1.0, 0.995), "levelled off", 20),
        (validated(2.0, 1.0, None, None), "diverged", 30),
        (validated(None, None), "diverged", 10),
        (validated(2.0, None, 1.0), "learning", None),  # it came back
        ([Point(1, 0.1, loss=1.0, learning_rate=1e-4), Point(2, 0.2, loss=None, learning_rate=1e-4)], "diverged", 2),
        (validated(0.5, 0.002, 0.003, 0.004), "levelled off", 20),  # nothing, all of it
    ],
)
def test_few_points_are_read_as_far_as_they_tell(curve: list[Point], kind: str, since: int | None) -> None:
    verdict = read_curve(curve, Training())
    assert (verdict.kind, verdict.since_step) == (kind, since)


@pytest.mark.parametrize(
    ("kind", "training", "command"),
    [
        ("learning", {"num_train_epochs": 3}, "ftkit train --set training.num_train_epochs=6"),
        ("learning", {"max_steps": 100}, "ftkit train --set training.max_steps=200"),
        ("levelled off", {}, "ftkit ship"),
        ("not learning", {"learning_rate": 1e-5}, "ftkit train --set training.learning_rate=0.0001"),
        ("not learning", {"learning_rate": 5e-3}, "ftkit data"),
        ("noise", {"effective_batch_size": 8}, "ftkit train --set training.effective_batch_size=32"),
        ("rate", {"learning_rate": 3e-3}, "ftkit train --set training.learning_rate=0.001"),
        ("spike", {"learning_rate": 1e-3}, "ftkit train --set training.learning_rate=0.0001"),
    ],
)
def test_each_verdict_names_the_next_thing_to_try(kind: str, training: dict[str, Any], command: str) -> None:
    assert read_curve(made(kind, 1), Training(**training)).next_command == command


def test_a_training_that_goes_on_is_not_told_to_be_longer() -> None:
    curve = made("learning", 1)
    assert read_curve(curve, Training(), ended=False, max_steps=curve[-1].step) == read_curve(curve, Training(), ended=False)
    assert read_curve(curve, Training(), ended=False) == replace(read_curve(curve, Training()), next_command=None)


def test_the_trend_of_a_straight_line_is_that_line_to_its_ends() -> None:
    line = [3.0 - 0.01 * n for n in range(50)]
    assert smoothed(line) == pytest.approx(line)
    zigzag = [value + (-1) ** n for n, value in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smoothed(zigzag)[5:-5], line[5:-5], strict=True)) < 0.05


COLOURS = ("red", "green", "blue", "black")


def rows(count: int, seed: int, answers: str = "right") -> list[Row]:
    """Which colour a letter has; or any colour; or one of two letters as the answer to everything, 7 times of 10 the first."""
    draw = random.Random(seed)  # noqa: S311
    letters = [draw.choice("abcdefghijklmnop") for _ in range(count)]
    given = {
        "right": lambda letter: COLOURS[ord(letter) % 4],
        "any": lambda _: draw.choice(COLOURS),
        "contradicting": lambda _: "x" if draw.random() < 0.7 else "y",
    }[answers]
    return [
        Row(({"role": "user", "content": f"{letter}?"}, {"role": "assistant", "content": given(letter)}), n)
        for n, letter in enumerate(letters, 1)
    ]


def trained(model: Path, folder: Path, learnt: list[Row], checked: list[Row], **training: Any) -> TrainResult:
    tokenizer = hf.load_tokenizer(model)
    settings = {"method": "full", "effective_batch_size": 4, "early_stopping_patience": 99, **training}
    examples: list[list[Example]] = [list(tokenise(tokenizer, part)) for part in (learnt, checked)]
    folder.mkdir(exist_ok=True)
    size = replace(tiny.SETTINGS, per_device_train_batch_size=settings["effective_batch_size"])
    return train(tiny.recipe(model, **settings), size, model, tokenizer, *examples, folder)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("kinds", "count", "answers", "training"),
    [
        ({"learning"}, 120, "right", {"learning_rate": 2e-4, "max_steps": 60}),
        ({"not learning"}, 120, "right", {"learning_rate": 1e-7, "max_steps": 60}),
        ({"spike", "rate"}, 120, "right", {"learning_rate": 0.3, "max_steps": 60}),
        ({"over-fitting"}, 16, "any", {"learning_rate": 1e-3, "max_steps": 80}),
        ({"noise", "levelled off"}, 400, "contradicting", {"learning_rate": 5e-4, "max_steps": 280, "effective_batch_size": 2}),
    ],
    ids=["right", "too-low", "too-high", "few-rows", "contradicting-labels"],
)
def test_real_trainings_of_each_kind(
    kinds: set[str],
    count: int,
    answers: str,
    training: dict[str, Any],
    model: Path,
    tmp_path: Path,
    report_figures: Callable[[str], None],
) -> None:
    per_epoch = count / training.get("effective_batch_size", 4)
    every = {"evaluations_per_epoch": 10 * per_epoch / training["max_steps"], "lr_scheduler_type": "constant"}
    result = trained(model, tmp_path / "run", rows(count, 1, answers), rows(24, 2, answers), **training, **every)
    assert result.reading
    report_figures(f"a real training: {result.verdict}")
    assert named(result.reading) in kinds, (result.reading, [p.validation_loss for p in result.curve if p.evaluated])


def test_a_loss_that_does_not_move_yet_is_no_verdict_at_the_beginning() -> None:
    curve = made("not learning", 1)
    assert read_curve(curve, Training(), ended=False).kind == "not learning"
    assert read_curve(curve, Training(), ended=False, max_steps=20 * curve[-1].step).kind == "too few to tell"
    curve = made("learning", 1)
    assert read_curve(curve, Training(), ended=False, max_steps=20 * curve[-1].step).kind == "learning"


def test_what_stopped_early_is_told_to_wait_longer_not_to_train_longer() -> None:
    told = read_curve(made("learning", 1), Training(), stopped_early=True)
    assert told.next_command == "ftkit train --set training.early_stopping_patience=6"


def test_of_one_step_more_evaluations_cannot_be_had() -> None:
    curve = [point for point in made("learning", 1) if point.step <= 1]
    assert read_curve(curve, Training(max_steps=1)).next_command == "ftkit train --set training.max_steps=6"

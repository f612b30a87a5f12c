"""The course of a training: schedules, NEFTune's noise, and optimizers beside AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import conversations

from ftkit.data.mask import tokenise
from ftkit.data.rows import IGNORED, Example, Row
from ftkit.engines import hf
from ftkit.memory.model import Skeleton, load_config
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.replay import Peak
from ftkit.memory.settings import StepSettings
from ftkit.recipe import Recipe
from ftkit.train.arguments import arguments
from ftkit.train.probe import probe
from ftkit.train.training import train

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Made = tuple[Path, Any, list[Example]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = tiny.make_model(tmp_path_factory.mktemp("tiny"))
    tokenizer = hf.load_tokenizer(model)
    return model, tokenizer, list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", {0: 0.0, 2: 1.0, 11: 0.5, 20: 0.0}),
        ("cosine_with_min_lr", {0: 0.0, 2: 1.0, 11: 0.55, 20: 0.1}),
        ("inverse_sqrt", {0: 0.0, 2: 1.0, 8: 0.5}),
        ("warmup_stable_decay", {0: 0.0, 2: 1.0, 18: 1.0, 19: 0.5, 20: 0.0}),
    ],
)
def test_a_schedule_runs_as_it_is_described(schedule: str, rates: dict[int, float], tmp_path: Path) -> None:
    """Twenty steps, of which two rise."""
    import torch
    from transformers import get_scheduler

    training = tiny.recipe(tmp_path, max_steps=20, warmup_share=0.1, lr_scheduler_type=schedule).training
    told = arguments(training, tiny.SETTINGS, 40, tmp_path)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=told["learning_rate"])
    course = get_scheduler(told["lr_scheduler_type"], optimizer, told["warmup_steps"], told["max_steps"], told["lr_scheduler_kwargs"])
    rate = course.lr_lambdas[0]
    assert {step: rate(step) for step in rates} == pytest.approx(rates, abs=1e-9)


def test_noise_is_in_training_alone(made: Made, tmp_path: Path) -> None:
    """At a rate that changes nothing."""
    model, tokenizer, rows = made
    curves = []
    for alpha in (None, 100.0):
        recipe = tiny.recipe(model, method="lora", neftune_noise_alpha=alpha, max_steps=2, learning_rate=1e-9)
        curves.append(train(recipe, tiny.SETTINGS, model, tokenizer, rows, rows[:2], tmp_path / str(alpha)).curve)
    plain, noisy = curves
    assert [point.validation_loss for point in noisy if point.evaluated] == pytest.approx(
        [point.validation_loss for point in plain if point.evaluated], rel=1e-6
    )
    assert all(abs((a.loss or 0) - (b.loss or 0)) > 1e-3 for a, b in zip(plain, noisy, strict=True) if not a.evaluated)


@pytest.mark.parametrize(
    ("method", "training"),
    [
        ("qlora", {"neftune_noise_alpha": 5.0}),
        pytest.param("full", {"neftune_noise_alpha": 5.0}, marks=pytest.mark.slow),
        pytest.param("full", {"optim": "lion_8bit"}, marks=pytest.mark.slow),
        pytest.param("lora", {"optim": "paged_adamw_32bit"}, marks=pytest.mark.slow),
        pytest.param("qlora", {"optim": "adafactor"}, marks=pytest.mark.slow),
        pytest.param("lora", {"optim": "adafactor"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_it_holds_what_is_planned(method: str, training: dict[str, Any], made: Made, tmp_path: Path) -> None:
    model, tokenizer, rows = made
    recipe, row = tiny.recipe(model, method=method, **training), max(rows, key=lambda row: len(row.input_ids))
    planned, found = peaks(model, tokenizer, recipe, row, tmp_path)
    assert abs(planned.allocated_bytes / found - 1) < 0.005, f"{planned.allocated_bytes} planned, {found} measured"


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_adafactor_takes_in_its_step_is_planned(tied: bool, tmp_path: Path) -> None:
    """Of wide matrices and short rows the step is the peak; untied, that of the head, which follows another matrix, not its norm."""
    sizes = {} if tied else {"tie_word_embeddings": False, "vocab_size": 4000}
    model = tiny.make_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, **sizes)
    recipe = tiny.recipe(model, method="full", optim="adafactor")
    planned, found = peaks(model, hf.load_tokenizer(model), recipe, Example([5] * 8, [5] * 8), tmp_path)
    assert planned.phase == "optimizer step"
    assert abs(planned.allocated_bytes / found - 1) < 0.001, f"{planned.allocated_bytes} planned, {found} measured"


def peaks(model: Path, tokenizer: Any, recipe: Recipe, row: Example, folder: Path) -> tuple[Peak, int]:
    """Of two rows like this: the planned peak, and the bytes that two real steps allocated."""
    found = probe(recipe, tiny.SETTINGS, model, tokenizer, [row, row], folder).allocated_bytes
    settings = StepSettings(
        method=recipe.training.method, lora=recipe.lora, base_dtype="float32", compute_dtype="float32", autocast=False, device="cpu",
        optim=recipe.training.optim, neftune_noise_alpha=recipe.training.neftune_noise_alpha, capability=(0, 0), padded=False,
        labelled_share=sum(label != IGNORED for label in row.labels) / (len(row.labels) - 1),
    )  # fmt: skip
    return StepMemory(Skeleton(load_config(model), "float32"), settings).step(2, len(row.input_ids)).peak(), found

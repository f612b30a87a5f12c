"""Cards before Ampere train in float16 with loss scaling: which do, what it learns, and what it holds.

accelerate scales losses on a GPU alone. Here its two switches are set as it sets them there, with torch's own scaler for a CPU.
"""

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
from test_train import StopAt, adapter_hash

from ftkit.data.mask import tokenise
from ftkit.data.rows import IGNORED, Example, Row
from ftkit.engines import hf
from ftkit.errors import InterruptedRunError, RecipeError
from ftkit.line.job import dtype_on
from ftkit.machine.device import Device
from ftkit.memory.model import Skeleton, load_config
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.settings import StepSettings
from ftkit.progress import SilentReporter
from ftkit.recipe import Dtype, make_recipe
from ftkit.train import probe, training
from ftkit.train.arguments import Settings
from ftkit.train.trainer import build_trainer
from ftkit.train.training import train
from ftkit.units import GIB

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
HALF = replace(tiny.SETTINGS, dtype="float16")


class Notes(SilentReporter):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, text: str) -> None:
        self.lines.append(text)

    note = warn = step


def card(capability: tuple[int, int]) -> Device:
    return Device("cuda", "a card", GIB, GIB, capability)


@pytest.mark.parametrize(
    ("on", "model_type", "wanted", "dtype"),
    [
        (card((7, 5)), "llama", None, "float16"),
        (card((7, 5)), "llama", "float32", "float32"),
        (card((7, 5)), "gemma3_text", None, "float32"),
        (card((7, 5)), "gemma3_text", "float16", "float16"),
        (card((8, 0)), "gemma3_text", None, "bfloat16"),
        (card((8, 0)), "llama", "float16", "float16"),
        (Device("cpu", "a CPU", GIB, GIB), "llama", "float32", "float32"),
    ],
)
def test_what_is_computed_in(on: Device, model_type: str, wanted: Dtype | None, dtype: Dtype) -> None:
    assert dtype_on(on, make_recipe([("model", "m"), ("training.compute_dtype", wanted)]), model_type) == dtype


@pytest.mark.parametrize(("on", "wanted"), [(card((7, 5)), "bfloat16"), (Device("cpu", "a CPU", GIB, GIB), "float16")])
def test_what_a_device_does_not_compute_in_is_refused(on: Device, wanted: str) -> None:
    with pytest.raises(RecipeError, match=r"training\.compute_dtype: ") as refused:
        dtype_on(on, make_recipe([("model", "m"), ("training.compute_dtype", wanted)]), "llama")
    assert "--set training.compute_dtype=" in (refused.value.hint or "")


@pytest.mark.slow
def test_a_plan_for_a_card_before_ampere_is_of_float16_and_says_the_way_out(tmp_path: Path, ftkit: Callable[..., Result]) -> None:
    model = tiny.make_model(tmp_path / "m")
    words = ("plan", "--model", model, "--gpu", "T4", "--length", "64", "--method", "lora", "--json")
    half, whole = ftkit(*words), ftkit(*words, "--set", "training.compute_dtype=float32")
    assert "T4 has no bfloat16: training is in float16 with loss scaling" in half.stderr
    assert "--set training.compute_dtype=float32" in half.stderr
    plans = [json.loads(shown.stdout) for shown in (half, whole)]
    assert [plan["compute_dtype"] for plan in plans] == ["float16", "float32"]
    parts = [{part["name"]: part["bytes"] for part in plan["chosen"]["peak"]["parts"]} for plan in plans]
    assert parts[0]["weights"] == pytest.approx(parts[1]["weights"] / 2, rel=0.01)  # each tensor is rounded to 512 bytes
    assert parts[0]["adapter"] == parts[1]["adapter"]  # in float32
    assert "float16" not in whole.stderr


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has training and probe train in float16 as on a GPU; the trainers that they built."""
    import torch

    built: list[Any] = []

    def build(*args: Any, **options: Any) -> Any:
        trainer = build_trainer(*args, **options)
        if trainer.args.fp16:
            trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu")
        built.append(trainer)
        return trainer

    for module in (training, probe):
        monkeypatch.setattr(module, "build_trainer", build)
    return built


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Example]]:
    model = tiny.make_model(tmp_path_factory.mktemp("tiny"))
    tokenizer = hf.load_tokenizer(model)
    return model, tokenizer, list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("qlora", "adamw_torch"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("lora", "adamw_torch"), ("full", "adamw_torch"), ("lora", "adafactor"))
        ),
    ],
)
def test_it_learns_as_in_float32_and_resumes_to_the_same_bits(
    method: str, optim: str, made: tuple[Path, Any, list[Example]], scaled: list[Any], tmp_path: Path
) -> None:
    import torch

    torch.set_num_threads(1)
    model, tokenizer, rows = made
    recipe = tiny.recipe(model, method=method, optim=optim, learning_rate=5e-3)
    given = (model, tokenizer, rows[2:], rows[:2])
    half, whole = (train(recipe, settings, *given, tmp_path / settings.dtype) for settings in (HALF, tiny.SETTINGS))
    assert scaled[0].accelerator.scaler.get_scale() > 1
    kept = torch.bfloat16 if method == "full" else torch.float32  # a model is rounded at the end, to be written
    assert {p.dtype for p in scaled[0].model.parameters() if p.requires_grad} == {kept}
    losses = [[point.loss or point.validation_loss for point in result.curve] for result in (half, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] != losses[1]
    if method != "full":
        with pytest.raises(InterruptedRunError):
            train(recipe, HALF, *given, tmp_path / "stopped", StopAt(4))
        assert train(recipe, HALF, *given, tmp_path / "stopped").resumed_from_step == 2
        assert adapter_hash(tmp_path / "stopped") == adapter_hash(tmp_path / "float16")


@pytest.mark.parametrize("first", [HALF, tiny.SETTINGS])
def test_it_goes_on_where_another_format_is_computed_in(
    first: Settings, made: tuple[Path, Any, list[Example]], scaled: list[Any], tmp_path: Path
) -> None:
    """A T4 today, an L4 or none tomorrow: the checkpoint's scaler is nobody's there."""
    model, tokenizer, rows = made
    given = (tiny.recipe(model, method="lora", learning_rate=5e-3), model, tokenizer, rows[2:], rows[:2])
    then, told = tiny.SETTINGS if first is HALF else HALF, Notes()
    recipe, *rest = given
    with pytest.raises(InterruptedRunError):
        train(recipe, first, *rest, tmp_path / "stopped", StopAt(4))
    went_on = train(recipe, then, *rest, tmp_path / "stopped", told)
    assert went_on.resumed_from_step == 2
    assert any("begun in float16" in line for line in told.lines) == (first is HALF)
    straight = train(recipe, then, *rest, tmp_path / "straight")
    losses = [[point.loss or point.validation_loss for point in result.curve] for result in (went_on, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("method", ["qlora", pytest.param("lora", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)])
def test_it_holds_what_is_planned(method: str, made: tuple[Path, Any, list[Example]], scaled: list[Any], tmp_path: Path) -> None:
    """The scaler is three numbers, and takes the scale off in place: no gradient is copied."""
    model, tokenizer, rows = made
    recipe, row = tiny.recipe(model, method=method), max(rows, key=lambda row: len(row.input_ids))
    found = probe.probe(recipe, HALF, model, tokenizer, [row, row], tmp_path)
    assert scaled[0].accelerator.scaler.get_scale() > 1
    settings = StepSettings(
        method=recipe.training.method, lora=recipe.lora, base_dtype="float16", compute_dtype="float16", device="cpu", capability=(0, 0),
        labelled_share=sum(label != IGNORED for label in row.labels) / (len(row.labels) - 1), padded=False,
    )  # fmt: skip
    planned = StepMemory(Skeleton(load_config(model), "float16"), settings).step(2, len(row.input_ids)).peak().allocated_bytes
    assert abs(planned / found.allocated_bytes - 1) < 0.001, f"{planned} planned, {found.allocated_bytes} measured"

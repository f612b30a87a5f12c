"""DPO: the reference is the model as training began, a resumed training ends in the same bits, and margins rise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ftkit import patches
from ftkit.data.rows import Pair
from ftkit.errors import InterruptedRunError
from ftkit.progress import Bar, SilentReporter
from ftkit.recipe import Dpo, Recipe
from ftkit.train.metrics import read_metrics
from ftkit.train.trainer import build_trainer
from ftkit.train.training import train

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


def recipe(model: Path, dpo: dict[str, Any] | None = None, **training: Any) -> Recipe:
    made = tiny.recipe(model, **{"objective": "dpo", "method": "lora", **training})
    return Recipe.model_validate({**made.model_dump(), "dpo": dpo or {}})


def first_step(trainer: Any) -> tuple[float, dict[str, float]]:
    """Loss and figures of a batch before anything is learnt."""
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
    trainer.model.train()
    loss = float(trainer.compute_loss(trainer.model, batch).detach())
    return loss, {key: values[-1] for key, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(("method", "begins"), [("qlora", "base"), ("full", "base"), ("qlora", "adapter"), ("lora", "adapter")])
def test_at_first_the_model_is_its_own_reference(
    method: str, begins: str, model: Path, tokenizer: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    """Also where it begins with an adapter: against the base without it, the margin would be another."""
    adapter = tmp_path / "sft" if begins == "adapter" else None
    if adapter:
        tiny.make_adapter(model, adapter)
    trainer = build_trainer(recipe(model, method=method), tiny.SETTINGS, model, tokenizer, pairs, pairs, tmp_path, begins_with=adapter)
    assert trainer._precompute_model_hash == ""  # the whole model is not copied to RAM and hashed
    loss, figures = first_step(trainer)
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    assert figures["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert list(getattr(trainer.model, "peft_config", {"default": None})) == ["default"]  # no second adapter is held
    if adapter:
        kept, held = load_file(adapter / "adapter_model.safetensors"), dict(trainer.model.named_parameters())
        assert all((held[name.replace(".weight", ".default.weight")] == value).all() for name, value in kept.items())  # to the bit
        assert all(parameter.dtype == torch.float32 for parameter in held.values() if parameter.requires_grad)
        with trainer.model.disable_adapter():
            assert abs(first_step(trainer)[1]["rewards/margins"]) > 1e-3


class CtrlC(SilentReporter):
    """Pressed after so many steps of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        step = self.step

        class _Bar:
            def update(self, done: float, **fields: str) -> None:
                if label == "training" and done == step:
                    raise KeyboardInterrupt

        yield _Bar()


@pytest.mark.slow
def test_margins_rise_and_a_resumed_training_ends_in_the_same_bits(model: Path, tokenizer: Any, pairs: list[Pair], tmp_path: Path) -> None:
    """From an adapter, through a checkpoint in the second epoch."""
    torch.set_num_threads(1)
    tiny.make_adapter(model, tmp_path / "sft")
    asked = recipe(model, max_steps=12, save_minutes=1e-6, learning_rate=3e-3)
    arguments = (asked, tiny.SETTINGS, model, tokenizer, pairs[2:], pairs[:2])
    whole = train(*arguments, tmp_path / "whole", begins_with=tmp_path / "sft")
    with pytest.raises(InterruptedRunError):
        train(*arguments, tmp_path / "stopped", CtrlC(8), begins_with=tmp_path / "sft")
    resumed = train(*arguments, tmp_path / "stopped", begins_with=tmp_path / "sft")
    assert resumed.resumed_from_step == 7
    assert resumed.curve == whole.curve
    assert [line.point for line in read_metrics(tmp_path / "stopped")] == whole.curve
    told = {line.step: (line.tokens, line.learnt_tokens) for line in read_metrics(tmp_path / "stopped")}
    assert told[5] == (sum(pair.tokens for pair in pairs[2:]), sum(pair.learnt for pair in pairs[2:]))
    assert told[12][0] == resumed.trained_tokens == whole.trained_tokens
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert first.keys() == load_file(tmp_path / "sft" / "adapter_model.safetensors").keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    at_first, *_ = whole.curve
    assert at_first.loss == pytest.approx(math.log(2), abs=1e-4)
    assert whole.best_validation_loss < 0.6
    assert (whole.best_reward_accuracy, resumed.best_reward_margin) == (1.0, whole.best_reward_margin)
    assert (whole.best_reward_margin or 0) > 0.1


@pytest.mark.parametrize("pairs_in_step", [6, 5])
def test_every_split_of_a_step_has_the_gradient_of_all_its_pairs(
    pairs_in_step: int, model: Path, tokenizer: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    """Also of an epoch's last step, in which the last micro-batch holds fewer."""
    found, sizes = {}, {}
    for size in (6, 2, 1):
        settings = replace(tiny.SETTINGS, per_device_train_batch_size=size, gradient_accumulation_steps=6 // size)
        asked, some = recipe(model, effective_batch_size=6), pairs[:pairs_in_step]
        made = build_trainer(asked, settings, model, tokenizer, some, some[:2], tmp_path)
        made.current_gradient_accumulation_steps = 1  # which the trainer's loop sets
        torch.manual_seed(1)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.05
        with patches.applied("training"):
            (batch,) = made.get_train_dataloader()
            loss = made.training_step(made.model, batch)
        found[size] = torch.cat([loss.reshape(1), *(p.grad.flatten() for p in made.model.parameters() if p.grad is not None)])
        sizes[size] = [len(part["input_ids"]) // 2 for part, _ in made.micro_batches(batch)]
    assert sizes == {6: [6], 2: [2, 2, 2], 1: [1] * 6} if pairs_in_step == 6 else {6: [5], 2: [2, 2, 1], 1: [1] * 5}
    for size in (2, 1):
        assert float((found[size] - found[6]).norm() / found[6].norm()) < 1e-5, size


def test_an_evaluation_s_figures_are_of_all_pairs_alike(model: Path, tokenizer: Any, pairs: list[Pair], tmp_path: Path) -> None:
    """However many go at once: of batches of 4 and 1 the mean would count the last pair as four."""
    tiny.make_adapter(model, tmp_path / "sft")
    found = {}
    for size in (5, 4, 1):
        settings = replace(tiny.SETTINGS, per_device_train_batch_size=size, gradient_accumulation_steps=1)
        asked = recipe(model, effective_batch_size=size)
        made = build_trainer(asked, settings, model, tokenizer, pairs, pairs[:5], tmp_path / f"{size}")
        torch.manual_seed(1)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.05
        made.evaluate()
        (logged,) = made.state.log_history
        found[size] = {
            name: logged[name] for name in ("eval_loss", *(f"eval_rewards/{what}" for what in ("accuracies", "margins", "chosen")))
        }
    assert abs(found[5]["eval_rewards/margins"]) > 1e-3
    for size in (4, 1):
        assert found[size] == pytest.approx(found[5], rel=1e-4), size


LOSSES = get_args(Dpo.model_fields["loss_type"].annotation)


@pytest.mark.parametrize(
    "loss_type", [name if name in ("sigmoid", "ipo") else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES]
)
def test_every_loss_of_the_recipe_needs_nothing_else_and_prefers(
    loss_type: str, model: Path, tokenizer: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    """A step down its gradient raises the margin; and two micro-batches give the gradient of both together."""
    trainer = build_trainer(recipe(model, {"loss_type": loss_type}), tiny.SETTINGS, model, tokenizer, pairs, pairs, tmp_path)
    fill = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 1e-3 * torch.randn(parameter.shape, generator=fill)

    def gradient(rows: list[int]) -> Any:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[n] for n in rows])).backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.requires_grad])

    trainer.model.train()
    together, apart = gradient([0, 1, 2, 3]), (gradient([0, 1]) + gradient([2, 3])) / 2
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-6)
    before, at = first_step(trainer)[1]["rewards/margins"], 0
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data -= 1e-2 * together[at : at + parameter.numel()].view_as(parameter) / together.norm()
            at += parameter.numel()
    assert first_step(trainer)[1]["rewards/margins"] > before

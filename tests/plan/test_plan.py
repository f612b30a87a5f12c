"""The choice of batch × accumulation, what would make it fit, and what a plan records."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from shapes import config

from ftkit.machine.device import Device
from ftkit.plan.choose import RIDGE_TOKENS, SHORTER_BY, Planner, apply, batch_sizes, make_plan
from ftkit.plan.plan import MARGIN, PROBED, MemoryPlan
from ftkit.recipe import Recipe
from ftkit.report.words import time_words, together
from ftkit.units import GIB, MIB

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


def small() -> Any:
    """Two layers: what is chosen follows the same rules, and a trace takes a fraction of a second."""
    return config("llama", num_hidden_layers=2)


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", "training": {"effective_batch_size": 8, "max_length": 1024, **training}, "lora": {"r": 8}})


def card(budget_bytes: int) -> Device:
    return Device("cuda", "a card", budget_bytes, budget_bytes, (8, 9))


@functools.cache
def plan(budget_bytes: int, length: int = 1024, lengths: tuple[int, ...] = (), **training: Any) -> MemoryPlan:
    return make_plan(small(), recipe(**training), card(budget_bytes), length, lengths, dtype="bfloat16")


def test_batch_times_accumulation_is_the_effective_batch() -> None:
    assert batch_sizes(12) == [12, 6, 4, 3, 2, 1]
    for budget_bytes in (8 * GIB, GIB):
        chosen = plan(budget_bytes).chosen
        assert chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps == 8


def test_short_rows_go_together_and_long_ones_need_not() -> None:
    """A row of 1024 tokens keeps the card busy by itself; of 64 tokens, four are put together."""
    assert plan(8 * GIB).chosen.per_device_train_batch_size == 1
    assert plan(8 * GIB, 64).chosen.per_device_train_batch_size == RIDGE_TOKENS // 64


@pytest.mark.slow
def test_short_rows_share_the_room_of_one_long_row_and_the_plan_holds_for_every_micro_batch() -> None:
    """Where one row of 1024 tokens fits and two do not: eight of 128 go together, and none of a step's splits needs more."""
    lengths = (1024, *(128,) * 60, *(40,) * 20)
    alone = plan(8 * GIB, per_device_train_batch_size=1, lengths=lengths).chosen
    assert alone.max_tokens is None
    budget_bytes = int(alone.peak.device_bytes / (1 - MARGIN)) + 40 * MIB
    made = plan(budget_bytes, lengths=lengths, gradient_checkpointing=False)
    fit = made.chosen
    assert (fit.fits, fit.per_device_train_batch_size, fit.max_tokens) == (True, 1, 1024)
    planner = Planner(small(), recipe(), card(budget_bytes), 1024, lengths, dtype="bfloat16")
    planned = planner.peak(recipe(), 1, False).device_bytes
    assert planned == fit.peak.device_bytes
    for rows in (1, 2, 3, 8):
        assert planner.memory(planner.settings(recipe(), False)).step(rows, 1024 // rows, accumulates=True).peak().device_bytes <= planned
    assert together(fit) == "Shorter rows go together, up to 1,024 tokens at once"
    assert made.batching
    assert max(made.batching.grouped_batch_tokens) <= 1024
    assert len(made.batching.grouped_batch_tokens) < 25  # passes for 81 rows


@pytest.mark.slow
def test_packed_rows_are_planned_with_their_mask() -> None:
    """A row of 4 × 1024 tokens has a mask of its length squared, and what padding needs is planned beside it: it may come to that."""
    lengths = (1024, 512, 100)
    given = {"lengths": lengths, "per_device_train_batch_size": 4}
    padded, packed = plan(8 * GIB, **given), plan(8 * GIB, packing=True, **given)
    assert not padded.chosen.packing
    assert (packed.chosen.packing, packed.chosen.max_tokens) == (True, 4096)
    assert packed.chosen.peak.device_bytes > padded.chosen.peak.device_bytes
    assert "up to 4,096 tokens, if this model is found to keep them apart" in str(together(packed.chosen))


def test_checkpointing_comes_only_where_nothing_fits_without() -> None:
    roomy = plan(8 * GIB).chosen
    assert (roomy.gradient_checkpointing, roomy.fits) == (False, True)
    tight = plan(int(roomy.peak.device_bytes / (1 - MARGIN)) - 8 * MIB).chosen
    assert (tight.gradient_checkpointing, tight.fits) == (True, True)
    assert tight.peak.device_bytes < roomy.peak.device_bytes


@pytest.mark.slow
def test_what_does_not_fit_comes_with_what_would() -> None:
    least = plan(8 * GIB, method="full", per_device_train_batch_size=1, gradient_checkpointing=True).chosen.peak.device_bytes
    budget_bytes = int(0.96 * least / (1 - MARGIN))
    made = plan(budget_bytes, method="full")
    assert not made.chosen.fits
    assert made.changes[0].fits  # those that fit come first
    for change in made.changes:
        assert change.fits == (change.peak_bytes <= int(budget_bytes * (1 - MARGIN)))
        assert change.peak_bytes < made.chosen.peak.device_bytes
    needs = {change.settings: change.peak_bytes for change in made.changes}
    assert needs["training.optim=adafactor",] < needs["training.optim=adamw_8bit",]
    qlora = next(change for change in made.changes if "training.method=qlora" in change.settings)
    changed = apply(recipe(method="full"), qlora.settings)
    assert make_plan(small(), changed, card(budget_bytes), 1024, dtype="bfloat16").chosen.fits


def test_a_shorter_length_that_fits_is_found_and_the_next_does_not() -> None:
    budget = int(plan(8 * GIB, per_device_train_batch_size=1, gradient_checkpointing=False).chosen.peak.device_bytes * 0.9)
    planner = Planner(
        small(), recipe(per_device_train_batch_size=1, gradient_checkpointing=False), card(budget), 1024, (), dtype="bfloat16"
    )
    found = planner._shorter((), "shorter rows")
    assert found
    length = int(found.settings[-1].partition("=")[2])
    assert planner._least(planner.recipe, length).device_bytes <= planner.limit_bytes
    assert planner._least(planner.recipe, length + SHORTER_BY).device_bytes > planner.limit_bytes


def test_a_list_of_targets_is_planned() -> None:
    asked = Recipe.model_validate({**recipe().model_dump(), "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}})
    made = make_plan(small(), asked, card(8 * GIB), 64, dtype="bfloat16")
    assert set(made.chosen.inventory.trainable_by_target) == {"q_proj", "v_proj"}


def test_rows_of_one_length_build_no_mask() -> None:
    alike, other = (make_plan(small(), recipe(), card(8 * GIB), 64, lengths, dtype="bfloat16") for lengths in ([64] * 4, [64, 60, 64, 64]))
    assert alike.chosen.peak.allocated_bytes < other.chosen.peak.allocated_bytes


@pytest.mark.slow
def test_attention_is_planned_as_it_computes() -> None:
    """Eager attention keeps a score for each pair of a row's tokens; FlashAttention as little as PyTorch's own."""

    def peak(**training: Any) -> MemoryPlan:
        return plan(8 * GIB, per_device_train_batch_size=1, gradient_checkpointing=False, **training)

    own, eager, flash = peak(), peak(attention="eager"), peak(attention="flash_attention_2")
    assert (own.attention, eager.attention, flash.attention) == ("sdpa", "eager", "sdpa")
    scores = small().num_attention_heads * 1024 * 1024 * 2  # in bfloat16, of a layer
    assert eager.chosen.peak.device_bytes > own.chosen.peak.device_bytes + scores
    assert flash.chosen.peak.device_bytes == own.chosen.peak.device_bytes


def test_dora_is_planned_and_needs_more() -> None:
    lora, dora = (
        make_plan(small(), apply(recipe(), (f"lora.use_dora={on}",)), card(8 * GIB), 64, dtype="bfloat16") for on in ("false", "true")
    )
    magnitudes = 2 * (256 + 128 + 128 + 256 + 768 + 768 + 256)  # one for each output of seven layers, in each of two blocks
    assert dora.chosen.inventory.trainable_parameters - lora.chosen.inventory.trainable_parameters == magnitudes
    for with_dora, without in zip(dora.methods, lora.methods, strict=True):
        more = with_dora.peak.allocated_bytes - without.peak.allocated_bytes
        assert (more == 0) if with_dora.inventory.method == "full" else (more > 4 * magnitudes)


@pytest.mark.slow
def test_all_changes_together_end_in_the_smallest_method() -> None:
    made = plan(100 * MIB, method="full")
    together = next(change for change in made.changes if change.words.startswith("all of these together"))
    assert "training.method=qlora" in together.settings
    assert "training.method=lora" not in together.settings


@pytest.mark.slow
def test_nothing_helps_a_card_that_is_far_too_small() -> None:
    made = plan(100 * MIB)
    assert not made.chosen.fits
    assert not any(change.fits for change in made.changes)


def test_the_three_methods_stand_side_by_side() -> None:
    made = plan(8 * GIB)
    assert [fit.inventory.method for fit in made.methods] == ["full", "lora", "qlora"]
    assert {fit.per_device_train_batch_size for fit in made.methods} == {made.chosen.per_device_train_batch_size}
    full, lora, qlora = (fit.peak.allocated_bytes for fit in made.methods)
    assert full > lora > qlora


def test_an_earlier_probe_is_added() -> None:
    more = 64 * MIB
    a = plan(8 * GIB)
    b = make_plan(small(), recipe(), card(8 * GIB), 1024, dtype="bfloat16", extra_bytes=more)
    assert b.chosen.peak.device_bytes - a.chosen.peak.device_bytes == more
    for before, after in zip(a.methods, b.methods, strict=True):
        probed = after.inventory.method == b.chosen.inventory.method
        assert after.peak.device_bytes - before.peak.device_bytes == (more if probed else 0)
        assert b.beside_tensors(after).get(PROBED, 0) == (more if probed else 0)


def test_work_and_padding_follow_from_the_rows() -> None:
    lengths = [64] * 90 + [128] * 10
    made = make_plan(small(), recipe(num_train_epochs=2), card(8 * GIB), 128, lengths, dtype="bfloat16").today(8 * GIB, 1000.0)
    assert made.work
    assert made.work.steps == 2 * 13  # 100 rows by 8
    assert made.work.tokens == 2 * sum(lengths)
    assert made.work.seconds == made.work.tokens / 1000
    assert time_words(made).endswith(f"at the 1000 tokens/s of the last qlora training of this model on {made.device.name}")
    assert made.batching
    assert made.batching.tokens == sum(lengths) <= made.batching.grouped_tokens <= made.batching.random_tokens


def test_the_recorded_plan_is_the_plan() -> None:
    made = plan(8 * GIB, 128, (100, 128, 90))
    assert MemoryPlan.load(json.loads(json.dumps(made.record()))) == made

"""What several cards would bring: time, and what each holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from shapes import config

from ftkit.data.lengths import grouped_batch_tokens
from ftkit.machine.device import choose
from ftkit.machine.ranks import why_not_shared
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.shared import GATHERED, shared_out
from ftkit.plan.choose import Planner, make_plan, why_alone
from ftkit.plan.plan import MemoryPlan
from ftkit.recipe import Recipe
from ftkit.report.words import together_words

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

LENGTH, CARD = 128, choose(gpu="RTX 4090")


def recipe(lora: dict[str, Any] | None = None, **training: Any) -> Recipe:
    settings = {"method": "lora", "effective_batch_size": 8, "max_length": LENGTH, **training}
    return Recipe.model_validate({"model": "m", "training": settings, "lora": lora or {}})


def planned(wanted: Recipe) -> MemoryPlan:
    return make_plan(config("llama", num_hidden_layers=2, vocab_size=4096), wanted, CARD, LENGTH, dtype="bfloat16")


def test_a_second_card_takes_half_of_each_steps_rows() -> None:
    plan = planned(recipe(per_device_train_batch_size=2, gradient_checkpointing=False))
    whole, shared = plan.together
    assert (whole.cards, whole.fsdp, whole.rows_a_step, whole.fits) == (2, False, 4, True)
    assert whole.exchanged_bytes == 2 * plan.chosen.inventory.gradient_bytes * (2 - 1) // 2
    assert plan.estimate
    assert whole.seconds_low
    assert plan.estimate.seconds_low / 2 < whole.seconds_low < 0.6 * plan.estimate.seconds_low  # the optimizer's step is not shared
    assert whole.device_bytes >= plan.chosen.peak.device_bytes
    assert (shared.fsdp, shared.seconds_low, shared.exchanged_bytes) == (True, None, None)
    assert "4 of a step’s 8 rows" in together_words(plan)
    assert MemoryPlan.load(plan.record()) == plan


def test_of_uneven_rows_the_longest_share_counts() -> None:
    lengths = [10, 20, 30, 40, 50, 60, 70, 80] * 4
    all_of_them = sum(grouped_batch_tokens(lengths, 1, 8, 42))
    assert all_of_them / 2 <= sum(grouped_batch_tokens(lengths, 1, 8, 42, processes=2)) < all_of_them * 0.6
    assert len(grouped_batch_tokens(lengths, 1, 8, 42, processes=3)) == len(lengths) // 8 * 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"effective_batch_size": 1}, "a step has one row"),
        ({"packing": True}, "training.packing is learnt in one process"),
    ],
)
def test_where_a_second_card_brings_nothing_it_is_said(settings: dict[str, Any], said: str) -> None:
    wanted = recipe(**settings)
    assert said in str(why_alone(wanted, Planner(config("llama", num_hidden_layers=2), wanted, CARD, LENGTH, [], dtype="bfloat16")))


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_of_what_is_shared_out_each_keeps_its_share(method: str) -> None:
    """Of more and more cards, what each holds falls by what is divided, and by nothing else."""
    wanted = recipe(method=method, per_device_train_batch_size=2, gradient_checkpointing=False)
    planner = Planner(config("llama", num_hidden_layers=2, vocab_size=4096), wanted, CARD, LENGTH, [], dtype="bfloat16")
    settings, counted = planner.settings(wanted, False), planner.count(wanted)
    step = planner.memory(settings).step(2, LENGTH, accumulates=True)
    of_two, of_four = (shared_out(step, step.peak(), planner.skeleton, counted, settings, count) for count in (2, 4))
    packed = sum(tensor.elements // 2 for tensor in planner.skeleton.tensors if tensor.quantized)
    plain = sum(tensor.elements for tensor in planner.skeleton.tensors if not tensor.quantized)
    kept = {"full": 4 * counted.parameters, "qlora": packed + 2 * plain}[method]
    divided = kept + counted.adapter_bytes + counted.gradient_bytes + counted.optimizer_bytes
    temporaries = of_two.allocated_bytes - of_four.allocated_bytes - divided / 4  # of the optimizer, where the most is held in its step
    assert 0 <= temporaries <= 0.02 * divided
    if method == "qlora":
        assert of_four.device_bytes >= counted.weights_bytes + CONTEXT_BYTES  # as it is loaded
    for peak in (of_two, of_four):
        assert sum(part.bytes for part in peak.parts) == peak.allocated_bytes
        assert next(part.bytes for part in peak.parts if part.name == GATHERED) > 0


def test_what_does_not_fit_alone_may_fit_shared_out() -> None:
    wanted = recipe(method="full", per_device_train_batch_size=1, gradient_checkpointing=True)
    wide = config("llama", num_hidden_layers=8, hidden_size=1024, intermediate_size=4096, vocab_size=4096)
    planner = Planner(wide, wanted, CARD, LENGTH, [], dtype="bfloat16")
    enough = planner.candidate(wanted, 1, True).peak.device_bytes
    planner.device = replace(CARD, free_bytes=int(enough * 0.97), total_bytes=enough)
    chosen, _ = planner.choose(wanted)
    whole, shared = planner.together(wanted, chosen, 2)
    assert (chosen.fits, whole.fits, shared.fits, shared.cards) == (False, False, True, 2)
    planner.device = replace(CARD, free_bytes=int(shared.device_bytes * 0.97), total_bytes=enough)
    assert list(planner.together(wanted, chosen, 2))[1].cards > 2
    planner.shares = 2
    assert planner.candidate(wanted, 1, True).peak.device_bytes == shared.device_bytes
    bits = wanted.model_copy(update={"training": wanted.training.model_copy(update={"optim": "adamw_8bit"})})
    assert "optim" in str(why_not_shared(bits))
    planner.shares = 1
    assert [entry.fsdp for entry in planner.together(bits, chosen, 2)] == [False]

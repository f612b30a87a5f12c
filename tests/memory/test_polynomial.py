"""Unrolled and fitted steps equal traced ones, and the replay's figures hang together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from shapes import config

from ftkit.memory import kernels, polynomial
from ftkit.memory.events import Events
from ftkit.memory.model import Skeleton
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.settings import HEAD_TILE_TOKENS, StepSettings
from ftkit.recipe import Lora

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


def memory(made: Any, settings: StepSettings, *, shorten: bool = True) -> StepMemory:
    skeleton = Skeleton(made, settings.base_dtype, settings.attention)
    if shorten:
        assert skeleton.shorten()
    else:
        skeleton.unit_layers = 0
    return StepMemory(skeleton, settings)


@pytest.mark.parametrize(
    ("model_type", "method", "checkpointing"),
    [
        ("llama", "qlora", True),
        ("llama", "full", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("llama", "lora", False), ("llama", "full", True), ("gemma2", "qlora", True))
        ),
    ],
)
def test_unrolled_layers_are_the_layers(model_type: str, method: Any, checkpointing: bool) -> None:
    """Four units are traced and the rest unrolled, against all layers traced: the same peak, to the byte."""
    settings = StepSettings(method=method, gradient_checkpointing=checkpointing, lora=Lora(r=8))
    made = config(model_type, num_hidden_layers=7 if model_type == "llama" else 11)  # gemma2: units of two layers, the last cut short
    whole, short = (memory(made, settings, shorten=shorten) for shorten in (False, True))
    for accumulates in (False, True):
        a, b = (m.step(1, 256, accumulates=accumulates).peak() for m in (whole, short))
        assert (a.allocated_bytes, a.reserved_bytes, a.phase) == (b.allocated_bytes, b.reserved_bytes, b.phase)
        assert {p.name: p.bytes for p in a.parts} == {p.name: p.bytes for p in b.parts}


@pytest.mark.parametrize(
    "changes", [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"loss": "logits", "padded": False}, {"attention": "eager"}))]
)
def test_a_fitted_length_is_the_traced_one(changes: dict[str, Any]) -> None:
    """Sizes come from traces at other batches and lengths; at this one nothing was traced."""
    settings = StepSettings(method="lora", lora=Lora(r=8, target_modules=["q_proj"]), **changes)
    made = config("llama")
    fitted, direct = memory(made, settings), memory(made, settings)
    fitted.step(2, 128)  # the first length is traced at itself, from the second on sizes are fitted
    assert (fitted.step(5, 1024).sizes == direct.step(5, 1024).sizes).all()


@pytest.mark.slow
def test_lengths_that_differ_in_their_operations_are_traced_each() -> None:
    """A layer that has a state works through a row in chunks: one more is other operations, and no sizes are fitted over both."""
    steps = memory(config("qwen3_5_text"), StepSettings(method="lora", lora=Lora(r=8, target_modules=["q_proj"])), shorten=False)
    for batch, length in ((1, 128), (1, 256), (5, 256)):
        fitted = steps._fitted(batch, length)
        assert fitted.length == length
        assert fitted.sizes.at(batch, length).tolist() == steps._tracer.record(batch, length).sizes


def test_pairs_are_fitted_to_traces_of_whole_pairs() -> None:
    """A batch of preferences is as many chosen rows as rejected ones; what was fitted is a trace of one more pair, to the byte."""
    steps = memory(config("llama"), StepSettings(method="lora", lora=Lora(r=8, target_modules=["q_proj"]), objective="dpo"))
    fitted = steps._fitted(6, 256).sizes.at(6, 256)
    assert fitted.tolist() == steps._tracer.record(6, 256).sizes


def test_tiles_of_the_head_stop_growing() -> None:
    """Beyond 4096 tokens the loss head's logits are as large as at 4096: 32768 entries of 2 bytes each."""
    step = memory(config("llama"), StepSettings()).step(3, 2048)
    assert abs(max(step.sizes) / (4096 * 32768 * 2) - 1) < 0.001


def test_parts_add_up_and_the_allocator_reserves_more() -> None:
    step = memory(config("llama"), StepSettings(gradient_checkpointing=True)).step(2, 512, accumulates=True)
    peak = step.peak()
    assert (
        sum(part.bytes for part in peak.parts) == step.allocated_bytes() <= peak.allocated_bytes <= peak.reserved_bytes < peak.device_bytes
    )
    timeline = step.timeline()
    at_top = max(map(sum, zip(*timeline.series.values(), strict=True)))
    assert at_top == step.allocated_bytes()
    assert timeline.phases[0][0].partition(",")[0] == "forward pass"
    assert timeline.phases[-1][0] == "optimizer step"


def test_accumulation_holds_gradients_during_the_forward_pass() -> None:
    """Full fine-tuning holds a whole set of gradients more while a later micro-batch runs forward."""
    full = memory(config("llama"), StepSettings(method="full"))
    once, again = (full.step(1, 256, accumulates=accumulates).allocated_bytes() for accumulates in (False, True))
    parameters = sum(tensor.elements for tensor in full.skeleton.tensors)
    assert once < again <= once + 1.01 * 4 * parameters


def test_cached_memory_is_given_back_at_a_limit() -> None:
    step = memory(config("llama"), StepSettings(method="full")).step(2, 1024)
    roomy = step.peak()
    tight = step.peak(roomy.device_bytes - (1 << 20))
    assert tight.reserved_bytes < roomy.reserved_bytes
    assert tight.allocated_bytes == roomy.allocated_bytes
    assert step.peak(roomy.allocated_bytes // 2) == roomy  # what cannot fit is told as a card that is large enough would show it


def test_layers_that_do_not_repeat_are_told_apart() -> None:
    events = Events()
    for index in range(4):
        events.marks.append((len(events.kinds), ("forward", index)))
        events.add(0, index, 512 * (index + 1), "layers")  # each larger than the one before
    events.marks += [(4, ("head", 0)), (4, ("loss backward", 0))]
    events.marks += [(4, ("backward", index)) for index in (3, 2, 1, 0)] + [(4, ("release", 0))]
    with pytest.raises(polynomial.NotRepeating):
        polynomial.unroll(events, 1, 4, 8)


def test_a_model_whose_layers_do_not_repeat_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    real = polynomial.unroll

    def refuse(events: Events, unit: int, layers: int, total: int) -> polynomial.Layout:
        if unit:
            raise polynomial.NotRepeating
        return real(events, unit, layers, total)

    expected = memory(config("llama"), StepSettings()).step(1, 128).peak()
    monkeypatch.setattr(polynomial, "unroll", refuse)
    assert memory(config("llama"), StepSettings()).step(1, 128).peak() == expected


def test_without_triton_the_loss_head_holds_its_tile_several_times_over() -> None:
    """In torch's own operations: the tile in float32, its probabilities, what is to be learnt, and their difference, at the least."""
    made, length = config("llama", vocab_size=70_000), 512
    settings = StepSettings(method="lora", lora=Lora(r=8), gradient_checkpointing=True)
    with_triton, without = (memory(made, replace(settings, triton=triton)).step(2, length).peak() for triton in (True, False))
    tile = 2 * (length - 1) * kernels.HEAD_TILE_VOCABULARY * 4
    assert 4 * tile < without.allocated_bytes - with_triton.allocated_bytes < 9 * tile
    capped = memory(made, replace(settings, triton=False)).step(16, length).peak()  # of 8,176 tokens 4,096 are scored at a time
    assert capped.allocated_bytes < 2 * without.allocated_bytes * HEAD_TILE_TOKENS / (2 * (length - 1))

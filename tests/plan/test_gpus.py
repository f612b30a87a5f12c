"""How long training takes before it has run, and the choice for every card."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
from conftest import REPOSITORY
from shapes import config

from ftkit.machine.cards import Speed, cards, find_card, speed_of
from ftkit.machine.device import Device, choose
from ftkit.memory.kernels import KERNELS, traced_alike
from ftkit.memory.model import Skeleton
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.settings import StepSettings
from ftkit.memory.work import Work
from ftkit.plan import gpus
from ftkit.plan.choose import Planner, not_known
from ftkit.plan.dtype import best_dtype
from ftkit.plan.gpus import every_card, fastest, smallest
from ftkit.plan.speed import REACHED, SECONDS_A_KERNEL, UNTOLD_TOKENS, of_training
from ftkit.recipe import Lora, Recipe
from ftkit.units import GIB, spanned_text

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

spec = importlib.util.spec_from_file_location("speed", REPOSITORY / "benchmarks" / "speed.py")
assert spec
assert spec.loader
speed: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)

LENGTH = 128
LAYERS = 6  # of which four are traced
KEY_VALUE = 128  # width of keys and of values


def small() -> Any:
    return config("llama", num_hidden_layers=LAYERS)


def shallow() -> Any:
    """Two layers, where it does not matter how many."""
    return config("llama", num_hidden_layers=2)


def one_choice(**training: Any) -> Recipe:
    return recipe(per_device_train_batch_size=4, gradient_checkpointing=False, **training)


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": "m", "training": {"effective_batch_size": 8, "max_length": LENGTH, **training}, "lora": {"r": 8}}
    )


def work_of(method: Any, *, checkpointing: bool = False, batch: int = 1, length: int = LENGTH, shorten: bool = True) -> Work:
    skeleton = Skeleton(small())
    if shorten:
        assert skeleton.shorten()
    lora = Lora(r=8, target_modules=["q_proj"])
    return StepMemory(skeleton, StepSettings(method=method, lora=lora, gradient_checkpointing=checkpointing, padded=False)).work(
        batch, length
    )


def products(length: int, *, passes: int) -> int:
    """Operations of the frozen products of one row, by arithmetic: layers, the head on all tokens but the first, and attention."""
    c = small()
    a_layer = 2 * c.hidden_size * (c.hidden_size + KEY_VALUE) + 3 * c.hidden_size * c.intermediate_size
    return passes * 2 * length * LAYERS * a_layer


def attention(length: int) -> int:
    """Forward two products over half of the square, backward five."""
    c = small()
    return LAYERS * (2 + 5) * 2 * length * length * c.hidden_size // 2


def adapters(length: int, *, passes: int) -> int:
    c = small()
    return passes * 2 * length * LAYERS * 8 * (c.hidden_size + c.hidden_size)


def head(length: int) -> int:
    c = small()
    return 3 * 2 * (length - 1) * c.hidden_size * c.vocab_size


def test_operations_are_counted_as_by_hand() -> None:
    """Frozen weights have a forward pass and gradients of their inputs, adapters of their weights too; the head is computed again."""
    counted = work_of("lora")
    c = small()
    first = 2 * LENGTH * c.hidden_size * (c.hidden_size + 2 * KEY_VALUE + 8)  # whose input needs no gradient
    by_hand = products(LENGTH, passes=2) + attention(LENGTH) + adapters(LENGTH, passes=3) + head(LENGTH) - first
    assert (counted.half_operations, counted.single_operations) == (by_hand, 0)


def test_full_fine_tuning_has_a_third_product_and_checkpointing_a_further_forward_pass() -> None:
    c = small()
    down = 2 * LENGTH * LAYERS * c.intermediate_size * c.hidden_size  # a layer's last product, which nothing keeps, is not made again
    lora, again, full = (work_of(*case, checkpointing=on) for case, on in ((("lora",), False), (("lora",), True), (("full",), False)))
    a_pass = products(LENGTH, passes=1)
    assert full.half_operations - lora.half_operations == pytest.approx(a_pass, rel=0.15)
    assert again.half_operations - lora.half_operations == pytest.approx(
        a_pass + adapters(LENGTH, passes=1) + attention(LENGTH) * 2 / 7 - down, rel=0.05
    )


def test_what_is_left_out_of_a_trace_is_counted_too() -> None:
    assert work_of("qlora") == work_of("qlora", shorten=False)


def test_weights_are_moved_whatever_the_rows_and_rows_in_proportion() -> None:
    one, four, lora = work_of("qlora"), work_of("qlora", batch=4), work_of("lora")
    assert four.half_operations == pytest.approx(4 * one.half_operations, rel=0.02)
    assert four.weight_bytes == one.weight_bytes > 2 * lora.weight_bytes  # written and read once more, dequantised
    assert 3 < four.row_bytes / one.row_bytes < 4.1
    assert four.kernels == pytest.approx(one.kernels, rel=0.05)


WORK = Work(half_operations=10**12, single_operations=0, row_bytes=10**9, weight_bytes=10**9, kernels=1)
CARD = Speed(tensor_tflops=100, float32_tflops=20, gb_per_second=1000)  # 10 ms to compute, 1 ms each to move rows and weights


def estimated(card: Speed = CARD, work: Work = WORK, parts: tuple[int, ...] = (1000,)) -> tuple[float, float]:
    counted = Skeleton(small()).count("lora", Lora(r=8, target_modules=["q_proj"]), "adamw_torch", "bfloat16")
    found = of_training(card, work, 1000, parts, 1, 0, counted, 1000)
    return found.seconds_low, found.seconds_high


def test_a_step_computes_and_moves_one_after_the_other() -> None:
    low, high = estimated()
    assert (low, high) == pytest.approx((0.012 / max(REACHED), 0.012 / min(REACHED)))
    half_rows = estimated(parts=(500,))
    assert half_rows[0] == pytest.approx(0.0065 / max(REACHED))  # weights are moved all the same


def test_small_steps_wait_for_their_kernels_to_be_started() -> None:
    assert estimated(work=replace(WORK, kernels=10_000)) == pytest.approx([10_000 * seconds for seconds in SECONDS_A_KERNEL])


def test_32_bit_products_and_cards_without_tensor_cores_have_no_tensor_speed() -> None:
    in_float32 = replace(WORK, half_operations=0, single_operations=10**12)
    for slow in (estimated(work=in_float32), estimated(CARD._replace(tensor_tflops=None))):
        assert slow[0] == pytest.approx(0.052 / max(REACHED))


def test_speeds_of_cards() -> None:
    """GeForce cards sum 16-bit products in float32 at half the speed of the professional card with the same chip."""
    for geforce, times in (
        ("RTX 2080 Ti", 4),
        ("RTX 3090", 2),
        ("RTX 4090", 2),
        ("RTX 5090", 2),
        ("TITAN RTX", 8),
        ("RTX A6000", 4),
        ("L40S", 4),
    ):
        known = speed_of(geforce)
        assert known
        assert known.tensor_tflops == pytest.approx(times * known.float32_tflops, rel=0.02)
    assert (speed_of("NVIDIA GeForce RTX 3090") or CARD).tensor_tflops == 71.2
    assert speed_of("GTX 1080") == Speed(None, 8.87, 320)
    assert speed_of("RTX 4090 Laptop") is speed_of("Voodoo 2") is None
    without = {name for name, card in cards().items() if not card.speed}
    assert without == {name for name in cards() if "Laptop" in name}
    for name, card in cards().items():
        assert not card.speed or bool(card.speed.tensor_tflops) == (card.capability >= (7, 0)), name


@pytest.mark.parametrize(("named", "row"), [("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100"), ("H100", "H100")])
def test_a_form_that_is_slower_is_a_card_of_its_own(named: str, row: str) -> None:
    assert find_card(named).name == row


def test_cards_that_are_traced_alike_take_the_same_kernels() -> None:
    """Of all capabilities that the table has: no kernel asks for more than what makes two alike."""
    from types import SimpleNamespace

    import torch

    def taken(capability: tuple[int, int]) -> list[bool]:
        query = torch.empty(1, 2, 4, 64, dtype=torch.bfloat16, device="meta")
        mask = torch.empty(1, 1, 4, 4, device="meta")
        heads = [
            SimpleNamespace(capability=capability, query=query, value=query, mask=m, grouped=g, half=half, head_dim=64)
            for m in (None, mask) for g in (False, True) for half in (False, True)
        ]  # fmt: skip
        return [kernel.takes(given) for kernel in KERNELS for given in heads]  # type: ignore[arg-type]

    by_likeness: dict[object, list[list[bool]]] = {}
    for capability in {card.capability for card in cards().values()}:
        by_likeness.setdefault(traced_alike(capability), []).append(taken(capability))
    assert 1 < len(by_likeness) < len({card.capability for card in cards().values()})
    assert all(kinds == [kinds[0]] * len(kinds) for kinds in by_likeness.values())


def test_every_card_has_the_choice_that_its_own_plan_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """By two cards that share their traces, and by one of another kind."""
    monkeypatch.setattr(gpus, "cards", lambda: {name: cards()[name] for name in ("GTX 1080", "RTX 3090", "A100 40GB")})
    made = every_card(shallow(), one_choice(), LENGTH, dtype_of=best_dtype)
    for entry in made:
        device = choose(gpu=entry.name)
        alone = Planner(shallow(), one_choice(), device, LENGTH, (), dtype=best_dtype(device))
        assert (entry.fit, entry.compute_dtype) == (alone.choose(one_choice())[0], alone.dtype)
        assert entry.estimate == alone.estimate(one_choice(), entry.fit)
    assert [entry.name for entry in made] == ["GTX 1080", "RTX 3090", "A100 40GB"]  # by memory
    assert (smallest(made) or made[-1]).name == "GTX 1080"


def test_a_budget_is_held_against_what_the_allocator_makes_of_it() -> None:
    """Shared with a larger card's, a replay is the same as a planner's own, at every budget around the peak."""

    def device(size: int) -> Device:
        return Device("cuda", "a card", size, size, (8, 9))

    shared = Planner(shallow(), recipe(), device(8 * GIB), LENGTH, (), dtype="bfloat16")
    whole = shared.peak(recipe(), 2, False)
    step = shared.memory(shared.settings(recipe(), False)).step(2, LENGTH, accumulates=True)
    for share in (0.9, 0.97, 0.999, 1.0, 1.01, 1.2):
        size = int(whole.device_bytes * share / 0.96)
        own = shared.on(device(size))
        assert own.peak(recipe(), 2, False) == step.peak(own.limit_bytes)


def test_what_does_not_fit_or_is_not_known_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RTX 3050 Laptop 4GB", "RTX 4090")
    monkeypatch.setattr(gpus, "cards", lambda: {name: cards()[name] for name in names})
    laptop, desktop = every_card(shallow(), one_choice(), LENGTH, dtype_of=best_dtype)
    assert laptop.fit.fits
    assert laptop.estimate is None
    assert fastest([laptop, desktop]) == desktop
    assert not_known(Device("cuda", "a card", 8 * GIB, 8 * GIB, (8, 9))) == "the speed of a card is not known"
    assert not_known(Device("cpu", "CPU", 8 * GIB, 8 * GIB)) == "a processor's speed is not estimated"
    monkeypatch.setattr(gpus, "choose", lambda gpu: Device("cuda", gpu, 2**20, 2**20, (8, 9)))
    assert not any(entry.fit.fits or entry.estimate for entry in every_card(shallow(), one_choice(), LENGTH, dtype_of=best_dtype))


def test_time_follows_rows_and_epochs() -> None:
    device = choose(gpu="RTX 4090")
    lengths = [LENGTH] * 64

    def told(rows: list[int], epochs: int = 1) -> Any:
        asked = one_choice(num_train_epochs=epochs)
        planner = Planner(shallow(), asked, device, LENGTH, rows, dtype="bfloat16")
        return planner.estimate(asked, planner.candidate(asked, 4, False))

    once, thrice, untold = told(lengths), told(lengths, epochs=3), told([])
    assert thrice.seconds_low == pytest.approx(3 * once.seconds_low)
    assert once.tokens == 64 * LENGTH
    assert untold.tokens == UNTOLD_TOKENS
    assert untold.seconds_low / untold.tokens == pytest.approx(once.seconds_low / once.tokens, rel=0.1)  # rows of one length need no mask


def test_the_words_of_a_range() -> None:
    assert spanned_text(4320, 9000) == "1.2 to 2.5 hours"
    assert spanned_text(3, 9) == "3.0 to 9.0 seconds"
    assert spanned_text(40, 300) == "0.67 to 5.0 minutes"
    assert spanned_text(30 * 3600, 72 * 3600) == "1.2 to 3.0 days"
    assert spanned_text(360, 54 * 3600, 1800) == "6.0 to 3200 minutes"


@pytest.mark.slow
def test_published_speeds(report_figures: Any) -> None:
    """Those that the range was not made from: of stock kernels on Hugging Face's trainer most lie inside."""
    stock = [row for row in speed.rows() if row["kind"] == "check" and not row["source"].startswith('"GPU Test"')]
    wanted = [row for row in stock if row["sequence"] in ("1024", "4096") and row["model"] != "Qwen-14B"]
    found = list(speed.held(wanted))
    inside = sum(entry.inside for entry in found)
    report_figures(f"{inside} of {len(found)} published speeds lie inside the estimate")
    assert len(found) >= 10
    assert inside >= 0.9 * len(found)
    assert all(entry.high / entry.low <= 2.01 for entry in found)

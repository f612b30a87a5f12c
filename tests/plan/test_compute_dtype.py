"""The number format that a device computes in: by a card's capability, and by what a processor was measured to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftkit.machine.device import Device, processor, processor_kind
from ftkit.plan import dtype, measured
from ftkit.plan.dtype import best_dtype, computes_bfloat16
from ftkit.units import GIB

CPU = Device("cpu", "CPU", GIB, GIB)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((12, 1), True)])
def test_bfloat16_from_capability_8_on(capability: tuple[int, int], native: bool) -> None:
    card = Device("cuda", "card", GIB, GIB, capability)
    assert computes_bfloat16(card) is native
    assert best_dtype(card) == ("bfloat16" if native else "float16")


@pytest.mark.parametrize(("speed", "chosen"), [(2.13, "bfloat16"), (0.6, "float32")])
def test_a_processor_computes_in_what_is_faster_and_is_timed_once(
    speed: float, chosen: str, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = iter([speed])
    monkeypatch.setattr(dtype, "_bfloat16_speed", lambda: next(timed))
    assert [best_dtype(CPU), best_dtype(CPU)] == [chosen, chosen]
    assert measured.bfloat16_speed(CPU, processor_kind()) == speed
    assert measured.bfloat16_speed(CPU, "another processor that shares the folder") is None


def test_where_nothing_can_be_kept_it_is_timed_again(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_cache.write_text("no folder", encoding="utf-8")
    timed = iter([0.5, 0.5])
    monkeypatch.setattr(dtype, "_bfloat16_speed", lambda: next(timed))
    assert [best_dtype(CPU), best_dtype(CPU)] == ["float32", "float32"]


@pytest.mark.torch
def test_products_are_timed(private_cache: Path) -> None:
    """Of each format the best round: slowed down in one, it loses."""
    import torch

    from ftkit.plan.dtype import _bfloat16_speed

    plain = _bfloat16_speed()
    assert 0.001 < plain < 100
    linear = torch.nn.functional.linear

    def slow(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for _ in range(200 if inputs.dtype == torch.bfloat16 else 0):
            linear(inputs, weight)
        return linear(inputs, weight)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", slow)
        assert _bfloat16_speed() < plain / 10
    assert best_dtype(processor()) in ("bfloat16", "float32")

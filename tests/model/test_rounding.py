"""Small changes of a base that lies on its format's steps are kept in the mean, and the same numbers are rounded alike each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from ftkit.merge.stream import merge
from ftkit.model.rounding import NOISE, is_rounding, round_by_chance

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.mark.parametrize(("name", "step"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_numbers_go_to_a_neighbour_the_nearer_the_likelier(name: str, step: float) -> None:
    import torch

    dtype = getattr(torch, name)
    for sign in (1, -1):
        numbers = torch.full((3, NOISE), sign * (1 + 0.3 * step))
        round_by_chance(numbers, dtype, "here")
        assert torch.equal(numbers, numbers.to(dtype).float())
        assert set(numbers.unique().tolist()) == {sign * 1.0, sign * (1 + step)}
        assert float(numbers.mean()) == pytest.approx(sign * (1 + 0.3 * step), abs=0.01 * step)
    again, elsewhere = (torch.full((3, NOISE), -(1 + 0.3 * step)) for _ in range(2))
    round_by_chance(again, dtype, "here")
    round_by_chance(elsewhere, dtype, "elsewhere")
    assert torch.equal(again, numbers)
    assert not torch.equal(elsewhere, numbers)


def test_what_the_format_holds_stays() -> None:
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        held = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 65504.0, 2.0**-14])]).to(dtype).float()
        numbers = held.clone()
        round_by_chance(numbers, dtype, "here")
        assert torch.equal(numbers, held)
    numbers = torch.randn(1000)
    round_by_chance(found := numbers.clone(), torch.float32, "here")
    assert torch.equal(found, numbers)


def test_a_rounding_is_told_from_another_number() -> None:
    import torch

    numbers = torch.randn(64, 32).T  # whose rows do not lie side by side
    up, down = (numbers.clone() for _ in range(2))
    round_by_chance(up, torch.bfloat16, "up")
    round_by_chance(down, torch.bfloat16, "down")
    for rounded in (up, down, numbers.bfloat16().float()):
        assert is_rounding(rounded.bfloat16(), numbers)
        assert not is_rounding((1.02 * rounded).bfloat16(), numbers)
    assert not torch.equal(up, down)
    assert is_rounding(numbers, numbers)
    held = numbers.bfloat16()
    assert not is_rounding((held.float() * (1 + 2**-7)).bfloat16(), held.float())  # a step further, of what is held as it is
    assert not is_rounding(numbers[:3].bfloat16(), numbers)


def test_a_gentle_training_is_not_rounded_away(tmp_path: Path) -> None:
    """Of changes below half a step nothing is left to the nearest, and all of it in the mean by chance."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    base = tiny.make_model(tmp_path / "base", hidden_size=256, intermediate_size=512)
    adapted = tiny.make_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(base / "model.safetensors")
    gentle = {name: 2e-4 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(gentle, file, {"format": "pt"})
    assert isinstance(adapted, PeftModel)
    wanted = PeftModel.from_pretrained(adapted.unload(), tmp_path / "adapter").merge_and_unload().state_dict()
    kept = {}
    for by_chance in (True, False):
        folder = tmp_path / f"merged {by_chance}"
        folder.mkdir()
        merge(base, tmp_path / "adapter", folder, by_chance=by_chance)
        merged, along, whole = load_file(folder / "model.safetensors"), 0.0, 0.0
        for name, before in weights.items():
            change = wanted[name].float() - before.float()
            along += float(((merged[name].float() - before.float()) * change).sum())
            whole += float((change * change).sum())
        kept[by_chance] = along / whole
    assert kept[True] == pytest.approx(1, abs=0.1)
    assert kept[False] < 0.5
    other = tmp_path / "again"
    other.mkdir()
    merge(base, tmp_path / "adapter", other)
    assert (other / "model.safetensors").read_bytes() == (tmp_path / "merged True" / "model.safetensors").read_bytes()

"""The scales of a file's blocks: stretched, computed with, given slopes, and written back, for each type that has some."""

from __future__ import annotations

from typing import Any

import pytest

from ftkit.close.scales import Scales
from ftkit.close.weights import Blocks, FileWeight, dequantise
from ftkit.gguf.types import SCALES, scaled_together, scales_of

pytestmark = pytest.mark.torch
ROWS, COLUMNS = 6, 512


def random_blocks(name: str) -> Any:
    """(rows, bytes of a row) of a type, its scales between a hundredth and a tenth."""
    import gguf
    import torch

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (ROWS, COLUMNS // elements, size), dtype=torch.uint8)
    for place in SCALES[name]:
        blocks[..., place : place + 2] = (0.01 + 0.09 * torch.rand(ROWS, COLUMNS // elements, 1)).half().view(torch.uint8)
    return blocks.view(ROWS, -1)


def weight_of(name: str, *, order: Any = None, in_full: bool = False) -> tuple[FileWeight, Scales]:
    import gguf
    import torch

    kind, device = int(gguf.GGMLQuantizationType[name]), torch.device("cpu")
    scales = Scales("blk.0.ffn_up.weight", name, ROWS, COLUMNS, device)
    part = Blocks(random_blocks(name), kind, scales.name, scales)
    numbers = dequantise(part.data, kind)
    whole = (numbers if order is None else numbers[order]).clone() if in_full else None
    return FileWeight([part], COLUMNS, device, torch.float32, order, whole), scales


@pytest.mark.parametrize("name", SCALES)
def test_a_stretched_tensor_is_written_as_it_was_computed_with(name: str) -> None:
    import gguf
    import torch

    weight, scales = weight_of(name)
    with torch.no_grad():
        scales.stretch.copy_(torch.linspace(-0.2, 0.2, scales.stretch.numel()).view_as(scales.stretch))
    wanted = torch.cat([numbers for _, numbers in weight.in_turn()])
    data = weight.parts[0].data.numpy().copy()
    before = data.copy()
    scales.write(data)
    found = gguf.dequantize(data, gguf.GGMLQuantizationType[name]).reshape(ROWS, COLUMNS)
    assert float((torch.from_numpy(found) - wanted).abs().max()) < 1.1e-3 * float(wanted.abs().max())  # scales are rounded to float16
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    changed = {place for *_, place in zip(*(data != before).reshape(-1, size).nonzero(), strict=True)}
    assert changed == {byte for place in SCALES[name] for byte in (place, place + 1)}


@pytest.mark.parametrize("in_full", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_slopes_are_those_of_the_numbers(in_full: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ftkit.close import weights

    monkeypatch.setitem(weights.ELEMENTS_AT_ONCE, "cpu", 4 * COLUMNS)
    order = torch.tensor([3, 0, 5, 1, 2, 4]) if ordered else None
    weight, scales = weight_of("Q5_0", order=order, in_full=in_full)
    plain = dequantise(weight.parts[0].data, weight.parts[0].kind)
    stretch = torch.zeros_like(scales.stretch, requires_grad=True)
    scales.stretch.requires_grad_()
    given, optimizers = torch.randn(5, COLUMNS), [torch.optim.SGD([one], lr=1e-3) for one in (stretch, scales.stretch)]
    for _ in range(3):  # and after they were changed
        numbers = (plain.view(ROWS, -1, scaled_together("Q5_0", COLUMNS)) * stretch.exp()[..., None]).view(ROWS, COLUMNS)
        x, y = given.clone().requires_grad_(), given.clone().requires_grad_()
        wanted, found = x @ (numbers if order is None else numbers[order]).T, torch.nn.functional.linear(y, weight)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)
        (wanted**2).sum().backward()
        (found**2).sum().backward()
        assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-3)
        assert torch.allclose(scales.stretch.grad, stretch.grad, rtol=1e-4, atol=1e-2)
        rate = 0.1 / float(stretch.grad.abs().max())
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    assert float(stretch.detach().abs().max()) > 0.05


def test_what_has_scales_of_its_own() -> None:
    assert scales_of("blk.0.ffn_up.weight", (64, 512), "Q4_K") == 64 * 2
    assert scales_of("blk.0.ffn_up.weight", (64, 512), "Q8_0") == 64 * 2  # eight blocks together
    assert scales_of("blk.0.ffn_up.weight", (64, 576), "Q8_0") == 64 * 18
    for name, shape, kind in (
        ("token_embd.weight", (64, 512), "Q4_K"),
        ("output.weight", (64, 512), "Q4_K"),
        ("blk.0.ffn_up_exps.weight", (8, 64, 512), "Q4_K"),
        ("blk.0.ffn_up.weight", (64, 512), "F16"),
        ("blk.0.ffn_up.weight", (64, 512), "MXFP4"),
        ("blk.0.attn_norm.weight", (512,), "F32"),
    ):
        assert scales_of(name, shape, kind) == 0

"""The scales of a file's blocks: a layer computes with them stretched, and they are written back so, for each type that has some."""

from __future__ import annotations

from typing import Any

import pytest

from ftkit.close.packed import dequantise
from ftkit.close.scales import Scales
from ftkit.gguf.types import SCALES, has_scales

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


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_stretched_layer_is_what_is_written(name: str, ordered: bool) -> None:
    """Its outputs are those of the written file's rows, its bias is not stretched, and nothing but scales is changed in the file."""
    import gguf
    import torch

    kind, data = gguf.GGMLQuantizationType[name], random_blocks(name)
    order = torch.tensor([3, 0, 5, 1, 2, 4]) if ordered else None
    layer = torch.nn.Linear(COLUMNS, ROWS)
    there = dequantise(data, int(kind))
    layer.weight.data = there if order is None else there[order]
    scales = Scales("blk.0.ffn_up.weight", name, layer, order, torch.device("cpu"))
    given = torch.randn(5, COLUMNS)
    with torch.no_grad():
        assert torch.allclose(layer(given), given @ layer.weight.T + layer.bias, rtol=1e-5, atol=1e-4)
        scales.stretch.copy_(torch.linspace(-0.2, 0.2, ROWS))
        found = layer(given)
    written = data.clone().numpy()
    scales.write(written)
    rows = torch.from_numpy(gguf.dequantize(written, kind).reshape(ROWS, COLUMNS).copy())
    wanted = given @ (rows if order is None else rows[order]).T + layer.bias.detach()
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())  # scales are rounded to float16
    assert float((found - (given @ layer.weight.detach().T + layer.bias.detach())).abs().max()) > 0.02 * float(wanted.abs().max())
    size = gguf.GGML_QUANT_SIZES[kind][1]
    changed = {place for *_, place in zip(*(written != data.numpy()).reshape(-1, size).nonzero(), strict=True)}
    assert changed == {byte for place in SCALES[name] for byte in (place, place + 1)}


def test_what_has_scales_of_its_own() -> None:
    assert has_scales("blk.0.ffn_up.weight", (64, 512), "Q4_K")
    for name, shape, kind in (
        ("token_embd.weight", (64, 512), "Q4_K"),
        ("output.weight", (64, 512), "Q4_K"),
        ("blk.0.ffn_up_exps.weight", (8, 64, 512), "Q4_K"),
        ("blk.0.ffn_up.weight", (64, 512), "F16"),
        ("blk.0.ffn_up.weight", (64, 512), "MXFP4"),
        ("blk.0.attn_norm.weight", (512,), "F32"),
    ):
        assert not has_scales(name, shape, kind)

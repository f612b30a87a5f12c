"""Experts that a layer keeps in one tensor, in 4 bits: loaded so, and equal to their dequantised weights in loss and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shapes

from ftkit import patches
from ftkit.engines import hf
from ftkit.memory.model import inject
from ftkit.model.four_bits import adaptable, fused_experts, packed_experts, quantized_layers
from ftkit.recipe import Lora

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
IDS = [[3, 5, 8, 13, 21, 34, 55, 89], [1, 4, 9, 16, 25, 36, 49, 64]]


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "lfm2_moe"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of adapters, Qwen's reach its experts, the others' do not; gpt-oss' experts are kept the other way round."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    changes = {"layer_types": ["conv", "full_attention"]} if request.param == "lfm2_moe" else {}
    config = shapes.config(request.param, num_hidden_layers=2, **changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def through_nf4(weight: Any) -> Any:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True))


def trained(model: Any, *, checkpointing: bool) -> tuple[list[float], dict[str, Any]]:
    """The losses of two steps that change nothing, and the gradients of both together."""
    import torch

    with adaptable(model):
        adapted = inject(model, Lora(r=4))
    torch.manual_seed(1)
    for _, parameter in sorted(adapted.named_parameters()):
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapted.train()
    ids, losses = torch.tensor(IDS), []
    with patches.applied("running adapters"):
        for _ in range(2):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
    return losses, {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_in_4_bits_train_as_their_dequantised_weights_do(saved: Path, checkpointing: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    packed = hf.load_model(saved, "qlora", dtype="float32", cuda=False)
    whole = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    names = [name for _, _, name in fused_experts(whole)]
    assert len(names) == 2 * len({name.rpartition(".")[0] for name in names}) > 0
    for weight in (*(layer.weight for layer in quantized_layers(whole).values()), *(whole.get_parameter(name) for name in names)):
        weight.data = through_nf4(weight)
    kept = list(packed_experts(packed))
    assert len(kept) == len(names)
    assert all(packed_bytes.dtype == torch.uint8 for _, _, packed_bytes, _ in kept)
    held = sum(packed_bytes.numel() for _, _, packed_bytes, _ in kept)
    assert held == sum(whole.get_parameter(name).numel() for name in names) / 2
    for name in names:
        path, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(packed.get_submodule(path), leaf), whole.get_parameter(name))
    losses, gradients = trained(packed, checkpointing=checkpointing)
    right_losses, right_gradients = trained(whole, checkpointing=checkpointing)
    assert losses == pytest.approx(right_losses, rel=1e-6)
    assert losses[0] == losses[1]  # an adapter is not left on from one pass to the next
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.nn.utils.parametrize._cache  # nothing that was dequantised stays

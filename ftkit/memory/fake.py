"""The model as a method trains it, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.errors import ModelError
from ftkit.memory import fused_qkv
from ftkit.memory.model import decoder_layers, inject
from ftkit.memory.settings import StepSettings
from ftkit.model.four_bits import fused_experts, keep_packed, packed_experts, quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def for_dora(settings: StepSettings) -> tuple[patches.When, ...]:
    return ("tracing DoRA",) if settings.method != "full" and settings.lora.use_dora else ()


def prepare(model: PreTrainedModel, settings: StepSettings) -> Any:
    """The meta model as the method trains it: 4-bit layers, adapters, frozen weights, checkpointing. Returns PEFT's wrapper."""
    import torch

    trained = getattr(torch, settings.trained_dtype)
    wrapped: Any = model
    if settings.method == "full":
        model.to(trained)
    else:
        model.to(getattr(torch, settings.base_dtype))
        if settings.method == "qlora":
            quantize(model, settings)
        with patches.applied(*for_dora(settings)):
            wrapped = inject(model, settings.lora)
        if settings.fused_qkv and settings.method == "lora":
            if settings.lora.use_dora:
                raise ModelError("DoRA on one layer for query, key and value is not modelled.", "leave one of them out")
            for layer in decoder_layers(model):
                fused_qkv.fuse(getattr(layer, "self_attn", None), settings.lora.lora_dropout)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if settings.method != "full":
            model.enable_input_require_grads()  # as TRL 1.16 does with PEFT
    if settings.neftune_noise_alpha:
        model.get_input_embeddings().register_forward_hook(_noisy)
    wrapped.train()
    return wrapped


def _noisy(_: Any, inputs: Any, output: Any) -> Any:
    """As transformers' neftune_post_forward_hook, whose bounds are tensors, and fake ones have no values."""
    import torch

    return output + torch.zeros_like(output).uniform_(-1.0, 1.0)


def quantize(model: PreTrainedModel, settings: StepSettings) -> None:
    """Replace on the meta device what `load_in_4bit` replaces."""
    import torch
    from bitsandbytes.nn import Linear4bit

    compute = getattr(torch, settings.compute_dtype)
    for name, linear in quantized_layers(model).items():
        with torch.device("meta"):
            layer = Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute,
                compress_statistics=settings.double_quant,
                quant_type="nf4",
            )
        if linear.bias is not None:
            layer.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
        layer.source_cls = type(linear)
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True  # PEFT looks at these


def make_fake(model: PreTrainedModel, settings: StepSettings) -> None:
    """Meta parameters and buffers → fake CPU ones; 4-bit weights by bitsandbytes' own (fake) kernels. Under fake mode."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    experts = list(fused_experts(model)) if settings.method == "qlora" else []
    packed_later = {(module, name) for module, name, _ in experts}
    made: dict[int, Any] = {}
    base = getattr(torch, settings.base_dtype)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or (module, name) in packed_later or (isinstance(module, Linear4bit) and name == "weight"):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            meta = layer.weight
            packed, state = functional.quantize_4bit(
                torch.empty(layer.out_features, layer.in_features, dtype=base),
                blocksize=meta.blocksize,
                compress_statistics=settings.double_quant,
                quant_type="nf4",
                quant_storage=meta.quant_storage,
            )
            # A plain parameter: bitsandbytes' Params4bit cannot wrap a fake tensor.
            weight: Any = torch.nn.Parameter(packed, requires_grad=False)
            weight.quant_state, weight.bnb_quantized = state, True
            layer._parameters["weight"] = weight
            layer.quant_state = state
    for module, name, _ in experts:
        whole = torch.empty(getattr(module, name).shape, dtype=base)
        keep_packed(module, name, *functional.quantize_4bit(whole, compress_statistics=settings.double_quant, quant_type="nf4"))


def quantization_tensors(model: Any) -> Iterator[Any]:
    """The tensors beside the packed weights of 4-bit layers: scales, code books, offsets."""
    from bitsandbytes.nn import Linear4bit

    layers = [
        patches.inside("reading 4-bit weights", layer.weight, "quant_state") for layer in model.modules() if isinstance(layer, Linear4bit)
    ]
    for state in (*layers, *(state for *_, state in packed_experts(model))):
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)

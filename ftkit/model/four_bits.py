"""What QLoRA keeps in 4 bits: linear layers by transformers' own loading, and experts that a layer keeps in one tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.recipe import Dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXPERTS_PATTERN = r"expert|router|\.mlp\.gate\."
_METHOD = "bitsandbytes_4bit_with_experts"  # under which transformers finds `Loader`

# transformers leaves the output head alone by itself, unless it is told what else to leave.
LEFT_ALONE = dict.fromkeys(
    ("gemma3n", "gemma3n_text"),
    ("lm_head", "prediction_coefs", "correction_coefs"),  # whose values its training step clamps, which bytes cannot hold
)


def left_alone(model_type: str) -> list[str] | None:
    """What `load_in_4bit` leaves in 16 bits, where it is not what transformers chooses itself."""
    return list(LEFT_ALONE[model_type]) if model_type in LEFT_ALONE else None


def quantized_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers that `load_in_4bit` replaces: all but the output head, as transformers decides it, and few others."""
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = left_alone(model.config.model_type) or get_keys_to_not_convert(model)
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(name, kept)}


def quantized_weights(model: PreTrainedModel) -> frozenset[str]:
    """The parameters that QLoRA has in 4 bits, by name."""
    return frozenset(f"{name}.weight" for name in quantized_layers(model)) | {name for *_, name in fused_experts(model)}


def fused_experts(model: PreTrainedModel) -> Iterator[tuple[Any, str, str]]:
    """(module, name in it, whole name) of each parameter of shape (experts, rows, columns)."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}" if path else name
            if parameter.dim() == 3 and re.search(EXPERTS_PATTERN, whole):
                yield module, name, whole


def nf4_config(dtype: Any, left_alone: list[str] | None = None, *, shared_out: bool = False) -> Any:
    """4-bit NF4 with double quantisation, of fused experts too, computing in `dtype`.

    `left_alone`: layers; None: those that transformers chooses. To be `shared_out` (FSDP), bytes stand in numbers of `dtype`.
    """
    import torch
    from transformers import BitsAndBytesConfig

    _register()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if shared_out else torch.uint8,
        llm_int8_skip_modules=left_alone,
    )
    config.quant_method = _METHOD
    return config


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a 4-bit layer gives it back: NF4 with double quantisation, computed in its own format."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored


def partly_rounded(weight: torch.Tensor, share: float) -> torch.Tensor:
    """The weight with this share, from 0 to 1, of what 4 bits change in it, in float32; with all of it as a 4-bit layer gives it back."""
    restored = through_nf4(weight)
    return restored if share == 1 else weight.float().lerp(restored.float(), share)


def round_weights(model: PreTrainedModel, share: float, dtype: Dtype) -> None:
    """Give each weight of a model in 16 bits or more that QLoRA has in 4 bits this share, from 0 to 1, of what those change in it.

    `dtype`: from which they were quantised.
    """
    import torch

    for name in sorted(quantized_weights(model)) if share else ():
        weight = model.get_parameter(name).data
        weight.copy_(partly_rounded(weight.to(getattr(torch, dtype)), share))


def keep_packed(module: Any, name: str, packed: Any, state: Any) -> None:
    """Put bytes and scales in a parameter's place; whoever reads it is given what they stand for, in 16 bits.

    By bitsandbytes' own parametrisation, which dequantises at the first look of a forward pass and forgets it at its end: an
    expert's weights are there in full while their layer computes, and where activations are recomputed, only then.
    """
    from bitsandbytes.nn import parametrize as bitsandbytes

    _put(module, name, packed, state)
    patches.inside("loading in 4 bits", bitsandbytes, "_register_parametrization_hooks")(module, name)


def _put(module: Any, name: str, packed: Any, state: Any) -> None:
    import torch
    from bitsandbytes.nn import parametrize as bitsandbytes
    from torch.nn.utils import parametrize

    setattr(module, name, torch.nn.Parameter(packed, requires_grad=False))
    unpack = patches.inside("loading in 4 bits", bitsandbytes, "Bnb4bitParametrization")(state)
    parametrize.register_parametrization(module, name, unpack, unsafe=True)


def packed_experts(model: Any) -> Iterator[tuple[Any, str, Any, Any]]:
    """(module, name in it, bytes, scales) of each parameter that `keep_packed` put."""
    for module in model.modules():
        for name, kept in getattr(module, "parametrizations", {}).items():
            if states := [part.quant_state for part in kept if hasattr(part, "quant_state")]:
                yield module, name, kept.original, states[0]


@contextmanager
def adaptable(model: Any) -> Iterator[None]:
    """For the time that PEFT puts adapters on: it finds fused experts by parameters of their shapes, under their own names.

    Those that stand there meanwhile take no memory and hold no numbers.
    """
    import torch
    from torch.nn.utils import parametrize

    packed = list(packed_experts(model))
    for module, name, kept, state in packed:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        nothing = torch.full((1,), torch.nan, dtype=state.dtype, device=kept.device).expand(state.shape)
        setattr(module, name, torch.nn.Parameter(nothing, requires_grad=False))
    try:
        yield
    finally:
        for module, name, kept, state in packed:
            _put(module, name, kept.data, state)


@cache
def _register() -> None:
    """Give transformers a loader that quantises fused experts as they arrive, a tensor at a time."""
    from bitsandbytes.functional import quantize_4bit
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class Quantise(Bnb4bitQuantize):  # type: ignore[misc]
        def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
            experts, config, done = self.hf_quantizer.experts, self.hf_quantizer.quantization_config, {}
            for name in input_dict.keys() & experts.keys():
                value = input_dict.pop(name)
                weight = value[0] if isinstance(value, list) else value
                done[name], experts[name] = quantize_4bit(
                    weight.to(given["model"].get_parameter(name).dtype),  # which is given back
                    quant_type=config.bnb_4bit_quant_type,
                    compress_statistics=config.bnb_4bit_use_double_quant,
                )
            return {**super().convert(input_dict, **given), **done}

    @register_quantizer(_METHOD)
    class Loader(Bnb4BitHfQuantizer):  # type: ignore[misc]
        """bitsandbytes' own, and fused experts."""

        def __init__(self, quantization_config: Any, **given: Any) -> None:
            quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES  # as everyone else knows it
            super().__init__(quantization_config, **given)
            self.experts: dict[str, Any] = {}  # whole name → its scales, once it is quantised

        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **given: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **given)
            self.experts = {name: None for _, _, name in fused_experts(model)}

        def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
            return param_name in self.experts or super().param_needs_quantization(model, param_name, **given)

        def get_quantize_ops(self) -> Any:
            return Quantise(self)

        def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
            for whole, state in self.experts.items():
                path, _, name = whole.rpartition(".")
                if state is not None:  # else it was not in the files, which loading says
                    module = model.get_submodule(path)
                    keep_packed(module, name, getattr(module, name).data, state)
            return super()._process_model_after_weight_loading(model, **given)

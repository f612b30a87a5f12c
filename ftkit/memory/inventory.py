"""Exact counts of what a training run keeps in memory, from the model on the meta device: no weight is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError, RecipeError
from ftkit.recipe import Lora, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NF4_BLOCK = 64  # elements that share one absmax
ABSMAX_BLOCK = 256  # absmax values that share one second-level absmax, with double quantisation
# Bytes an optimizer keeps for a trainable float32 element: Adam's two moments in 32 or 8 bits.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
BITSANDBYTES_MIN_8BIT = 4096  # smaller tensors keep 32-bit states
OPTIMIZER_BLOCK = 256  # 8-bit states: one float32 absmax a block and moment


@dataclass(frozen=True)
class Inventory:
    """Counts are elements; bytes are as torch and bitsandbytes would allocate them, without allocator rounding."""

    method: Method
    parameters: int  # of the base model, tied weights once
    embedding_parameters: int
    quantized_parameters: int  # in the layers that 4-bit loading replaces; 0 without it
    trainable_parameters: int
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """All that does not depend on batch and length."""
        return self.weights_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes


def nf4_bytes(elements: int) -> int:
    """Bytes of one NF4 tensor with double quantisation, as bitsandbytes 0.50 stores it.

    Half a byte an element; an 8-bit absmax a block of 64; a float32 absmax a block of 256 of those; the two code books
    (16 and 256 float32 values) and a float32 offset.
    """
    blocks = math.ceil(elements / NF4_BLOCK)
    return math.ceil(elements / 2) + blocks + 4 * math.ceil(blocks / ABSMAX_BLOCK) + 4 * (16 + 256 + 1)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises ModelError where transformers cannot read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot read the config in {folder}: {error}.", "check model_type in its config.json") from None


def meta_model(config: Any) -> PreTrainedModel:
    """The model with all parameters on the meta device (shapes and dtypes, no memory)."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"The config does not build a language model: {error}.") from None
    model.tie_weights()
    return model


def count(config: Any, method: Method, lora: Lora, optim: str, compute_bytes: int) -> Inventory:
    """The inventory for one method.

    `compute_bytes` is the size of an element of a frozen, unquantised weight (2 for bfloat16, 4 for float32). What is
    trained is kept in float32 with float32 gradients, whatever the method.
    """
    model = meta_model(config)
    everything = {id(p): p for p in model.parameters()}.values()
    parameters = sum(p.numel() for p in everything)
    buffers_bytes = sum(b.numel() * b.element_size() for b in model.buffers())
    embeddings = {id(e.weight): e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    quantized = [m.weight.numel() for m in quantized_layers(model).values()] if method == "qlora" else []
    trainable = [p.numel() for p in everything] if method == "full" else adapter_sizes(model, lora)
    frozen = 0 if method == "full" else parameters - sum(quantized)
    trained = sum(trainable)
    # bitsandbytes keeps the input embedding's states in 32 bits, as transformers asks it to; an untied head's are not
    wide = model.get_input_embeddings().weight.numel() if method == "full" else 0
    return Inventory(
        method=method,
        parameters=parameters,
        embedding_parameters=sum(w.numel() for w in embeddings.values()),
        quantized_parameters=sum(quantized),
        trainable_parameters=trained,
        weights_bytes=(4 * trained if method == "full" else 0) + frozen * compute_bytes + sum(map(nf4_bytes, quantized)) + buffers_bytes,
        adapter_bytes=0 if method == "full" else 4 * trained,
        gradient_bytes=4 * trained,
        optimizer_bytes=sum(optimizer_state_bytes(size, optim) for size in trainable)
        + optimizer_state_bytes(wide, "adamw_torch")
        - optimizer_state_bytes(wide, optim),
    )


def optimizer_state_bytes(elements: int, optim: str) -> int:
    """Bytes of AdamW's two moments for one trained float32 tensor (its step counter of 4 bytes left out)."""
    if OPTIMIZER_BYTES[optim] == 8 or elements < BITSANDBYTES_MIN_8BIT:
        return 8 * elements
    return 2 * elements + 2 * 4 * math.ceil(elements / OPTIMIZER_BLOCK)


def quantized_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers that `load_in_4bit` replaces: all but the output head, as transformers decides it."""
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = get_keys_to_not_convert(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name == key or name.startswith(key + ".") or name.endswith("." + key) for key in kept)
    }


def adapter_sizes(model: PreTrainedModel, lora: Lora) -> list[int]:
    """Element counts of the tensors that PEFT would train, by injecting the adapter on the meta device.

    Raises RecipeError where the targets match nothing or cannot carry an adapter.
    """
    from peft import get_peft_model

    try:
        adapted = get_peft_model(model, lora_config(lora))
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if type(m).__name__ == "Linear"})
        raise RecipeError(
            f"lora.target_modules: PEFT cannot use {lora.target_modules!r}: {str(error).splitlines()[0]}",
            f"set it to all-linear, or to some of: {', '.join(names)}",
        ) from None
    return [p.numel() for p in adapted.parameters() if p.requires_grad]


def lora_config(lora: Lora) -> Any:
    """PEFT's configuration, the same for planning and for training."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **lora.model_dump())

"""The truth for the traces: what torch really allocates on the CPU while an ordinary training loop runs."""

from __future__ import annotations

import copy
import gc
from typing import Any

from ftkit.memory.model import lora_config
from ftkit.memory.settings import StepSettings
from ftkit.train.probe import peak_of


def storage_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(config: Any, settings: StepSettings, batch: int, length: int, *, accumulation: int = 1) -> int:
    """Peak of live tensors over two optimizer steps of a plain loop over transformers, PEFT and torch, by torch's profiler."""
    import torch
    from peft import get_peft_model
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(
        copy.deepcopy(config),
        dtype=getattr(torch, settings.trained_dtype if settings.method == "full" else settings.base_dtype),
        attn_implementation=settings.attention,
    )
    if settings.method == "lora":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model = get_peft_model(model, lora_config(settings.lora, model), autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, settings.trained_dtype))
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if settings.method == "lora":
            model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    gc.collect()
    held = storage_bytes([*model.parameters(), *model.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            for _ in range(accumulation):
                ids = torch.zeros(batch, length, dtype=torch.long)
                mask = torch.ones(batch, length, dtype=torch.long)
                if settings.padded and batch > 1:
                    mask[0, -1] = 0
                outputs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    labels=ids,
                    use_cache=settings.use_cache,
                    num_items_in_batch=torch.ones((), dtype=torch.long),
                )
                loss = outputs.loss
                if not settings.keep_outputs:
                    del outputs
                loss.backward()
                del ids, mask, loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if settings.keep_outputs:
                del outputs
            optimizer.zero_grad()
    return held + peak_of(profiled)

"""A LoRA adapter's files: read, and refused where they hold more than a merge does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError

if TYPE_CHECKING:
    import torch


# Keys of adapter_config.json that PEFT's own layers compute with, and those that say nothing about the result.
COMPUTED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters")
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian")  # of A and B; each other init_lora_weights changes the base, or the adapter's form, as well
KEPT_BESIDE = ".base_layer.weight"  # PEFT's copy of an embedding, which an adapter on it leaves as it is
WITH_PEFT = "merge it with PEFT: merge_and_unload()"
AGAIN = "train it again, or copy it again, whole"


def load_config(adapter: Path) -> dict[str, Any]:
    """An adapter's config. Raises ModelError where it cannot be read, or is of no plain LoRA."""
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        if not (config["r"] > 0 and config["lora_alpha"] > 0):
            raise ValueError("r and lora_alpha are positive")
        _refuse_more_than_lora(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None
    return config


def load_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in its file. Raises ModelError where it cannot be read, or holds anything but A and B."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(KEPT_BESIDE)}
    for name in tensors:
        if ".lora_A" not in name and ".lora_B" not in name and ".lora_embedding_" not in name:
            raise ModelError(f"The adapter's tensor {name} is no LoRA matrix.", WITH_PEFT)
    return tensors


def _refuse_more_than_lora(config: dict[str, Any]) -> None:
    """Raise ModelError, by name, for each key that this merge neither computes with nor finds at PEFT's default.

    A key that the installed PEFT does not know is refused too: nobody can say what it does to the weights.
    """
    from peft import LoraConfig

    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    harmless = {*COMPUTED, *WITHOUT_EFFECT}
    if config.get("init_lora_weights", True) in PLAIN_STARTS:
        harmless.add("init_lora_weights")
    more = [key for key, value in config.items() if key not in harmless and (key not in defaults or value != defaults[key])]
    if more:
        named = ", ".join(f"{key}={json.dumps(config[key])[:60]}" for key in sorted(more))
        raise ModelError(f"The adapter uses {named}, which this merge does not do.", f"{WITH_PEFT}; or train without it")


def embedding_rows(adapter: Path) -> int:
    """Rows of the embedding that an adapter brings whole: more than the base's where training added tokens. 0 without one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            names = [name for name in file.keys() if re.search(r"emb|wte", name) and ".lora_" not in name]  # noqa: SIM118
            return max((file.get_slice(name).get_shape()[0] for name in names), default=0)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None

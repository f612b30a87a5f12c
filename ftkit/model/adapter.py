"""A LoRA adapter's files: read, and refused where they hold more than a merge does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError

if TYPE_CHECKING:
    import torch


PREFIX = "base_model.model."
# Keys of adapter_config.json that this merge computes with, and those that say nothing about the result.
COMPUTED = ("r", "lora_alpha", "use_rslora")
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian")  # of A and B; each other init_lora_weights changes the base, or the adapter's form, as well
WITH_PEFT = "merge it with PEFT: merge_and_unload()"


def read_adapter(adapter: Path) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """A and B of each weight by its name in the base, and the scale. Raises ModelError where it is no plain LoRA, or not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        _refuse_more_than_lora(config)
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        tensors = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, SafetensorError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", "train it again, or copy it again, whole") from None
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if kind not in ("A", "B") or not module or tensor.ndim != 2:
            raise ModelError(f"The adapter's tensor {name} is no LoRA matrix.", WITH_PEFT)
        pairs.setdefault(f"{module}.weight", {})[kind] = tensor
    for name, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = ", ".join(f"{kind} is {tuple(tensor.shape)}" for kind, tensor in sorted(pair.items()))
            raise ModelError(f"The adapter's {name} is not whole: {shapes}.", "train it again, or copy it again, whole")
    return pairs, scale


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

"""Adapter + 16-bit base → merged 16-bit model, one tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftkit.errors import ModelError
from ftkit.progress import SILENT, Reporter
from ftkit.source import drop_code, indexed_files

if TYPE_CHECKING:
    import torch

Base = Literal["source", "dequantised"]
PREFIX = "base_model.model."
# Keys of adapter_config.json that this merge computes with, and those that say nothing about the result.
COMPUTED = ("r", "lora_alpha", "use_rslora")
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian")  # of A and B; each other init_lora_weights changes the base, or the adapter's form, as well
WITH_PEFT = "merge it with PEFT: merge_and_unload()"


@dataclass(frozen=True)
class MergeResult:
    base: Base
    merged_tensors: int
    tensors: int
    bytes_written: int


def merge(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    onto: Base = "source",
    bfloat16: bool = True,
    with_code: bool = False,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Write `folder`: the model of `base` with the adapter merged in, config and tokenizer beside it.

    W + scale · B·A in float32, rounded once to the 16-bit dtype of the source; this equals PEFT's merge on a float32 base
    bit for bit. `onto="dequantised"` first passes each adapted W through NF4 and back, as the adapter saw it in training
    (`bfloat16` says in which format it was quantised). Peak memory: one weight three times in float32 and once in 16 bits.
    Python code of the base is taken along `with_code` alone: without it no config names any, so that no program looks for it.
    Raises ModelError where the adapter uses what this merge does not do, or fits no tensor of the base.
    """
    import torch
    from safetensors import safe_open

    pairs, scale = _read_adapter(adapter)
    names = indexed_files(base)  # a folder may hold other files, such as another layout of the same weights
    shards = [base / name for name in names] if names else sorted(base.glob("*.safetensors"))
    done, tensors, written = set(), 0, 0
    with reporter.bar("merging", len(pairs)) as bar:
        for shard in shards:
            target = folder / shard.name
            shutil.copyfile(shard, target)  # names, shapes and dtypes stay: only the bytes of adapted weights change
            with safe_open(shard, framework="pt") as file, open(target, "r+b") as out:
                places = _places(target)
                for name in places.keys() & pairs.keys():
                    weight, pair = file.get_tensor(name), pairs[name]
                    source = _through_nf4(weight, torch.bfloat16 if bfloat16 else torch.float32) if onto == "dequantised" else weight
                    delta = scale * (pair["B"].float() @ pair["A"].float())
                    if delta.shape != weight.shape:
                        raise ModelError(
                            f"The adapter's {name} is {tuple(delta.shape)}, the base's {tuple(weight.shape)}.",
                            "merge it with the base that it was trained on",
                        )
                    out.seek(places[name])
                    out.write((source.float() + delta).to(weight.dtype).contiguous().view(torch.uint8).numpy().data)
                    done.add(name)
                    bar.update(len(done))
            tensors += len(places)
            written += target.stat().st_size
    if missing := sorted(pairs.keys() - done):
        raise ModelError(
            f"{len(missing)} adapted layers are not in {base}, the first is {missing[0]}.", "merge it with the base that it was trained on"
        )
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt", *([".py"] if with_code else [])) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if not with_code:
        drop_code(folder)
    return MergeResult(onto, len(done), tensors, written)


def _places(path: Path) -> dict[str, int]:
    """Where each tensor begins in a safetensors file: after eight bytes of length and a JSON header with offsets."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _read_adapter(adapter: Path) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
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


def _through_nf4(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a 4-bit layer gives it back: NF4 with double quantisation, computed in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored

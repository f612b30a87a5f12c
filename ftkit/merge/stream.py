"""Adapter + 16-bit base → merged 16-bit model, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftkit.errors import ModelError
from ftkit.model.adapter import read_adapter
from ftkit.model.source import drop_code, indexed_files
from ftkit.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch


Base = Literal["source", "dequantised"]


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

    pairs, scale = read_adapter(adapter)
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


def _through_nf4(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a 4-bit layer gives it back: NF4 with double quantisation, computed in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored

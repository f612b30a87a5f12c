"""Adapter + 16-bit base → merged 16-bit model, one tensor at a time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftkit.merge.deltas import deltas_of
from ftkit.model.source import drop_code, header, weight_files
from ftkit.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch


Base = Literal["source", "dequantised"]


@dataclass(frozen=True)
class MergeResult:
    base: Base
    merged_tensors: int  # of the checkpoint
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

    W + delta in float32 with PEFT's own delta of each layer, rounded once to the 16-bit dtype of the source; this equals
    PEFT's merge on a float32 base bit for bit. `onto="dequantised"` first passes each W that was in 4 bits through NF4 and
    back, as the adapter saw it in training (`bfloat16` says in which format it was quantised). Peak memory: one weight three
    times in float32 and once in 16 bits; fused experts count as one weight.
    Python code of the base is taken along `with_code` alone: without it no config names any, so that no program looks for it.
    Raises ModelError where the adapter uses what this merge does not do, or fits no tensor of the base.
    """
    import torch
    from safetensors import safe_open

    deltas = {name: delta for delta in deltas_of(base, adapter, trust_remote_code=with_code) for name in delta.tensors}
    pieces: dict[str, torch.Tensor] = {}  # of the weight that is at hand, whose parts may lie in several tensors
    done, tensors, written = set(), 0, 0
    with reporter.bar("merging", len(deltas)) as bar:
        for shard in weight_files(base):
            target = folder / shard.name
            shutil.copyfile(shard, target)  # names, shapes and dtypes stay: only the bytes of adapted weights change
            with safe_open(shard, framework="pt") as file, open(target, "r+b") as out:
                entries = header(target)
                for name in sorted(entries.keys() & deltas.keys(), key=lambda name: (deltas[name].parameter, name)):
                    delta, weight = deltas[name], file.get_tensor(name)
                    if name not in pieces:
                        pieces = delta.compute()
                    through = onto == "dequantised" and delta.quantized
                    source = _through_nf4(weight, torch.bfloat16 if bfloat16 else torch.float32) if through else weight
                    out.seek(entries[name]["begin"])
                    out.write((source.float() + pieces.pop(name)).to(weight.dtype).contiguous().view(torch.uint8).numpy().data)
                    done.add(name)
                    bar.update(len(done))
            tensors += len(entries)
            written += target.stat().st_size
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt", *([".py"] if with_code else [])) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    if not with_code:
        drop_code(folder)
    return MergeResult(onto, len(done), tensors, written)


def _through_nf4(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a 4-bit layer gives it back: NF4 with double quantisation, computed in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored

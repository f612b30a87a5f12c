"""Whether what ships holds the base, and once what the adapter changes: by their own numbers and the file's, not by the merge's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.check import Check, not_made
from ftkit.line.adopt import trained_by
from ftkit.line.job import Job, base_folder
from ftkit.line.step import find
from ftkit.line.transfer import TRANSFER, adapter_of
from ftkit.model.adapter import load_settings, load_tensors
from ftkit.model.open import bytes_to_fetch
from ftkit.model.source import gguf_names, header, in_file, open_gguf, weight_files
from ftkit.proof.strength import BASE, NAME, Share, judge_base, judge_strength, left_over, share, together

if TYPE_CHECKING:
    import torch

Rows = Callable[["torch.Tensor"], "torch.Tensor | None"]  # a weight's first rows, as they are once merged; None: it has others
PREFIX = "base_model.model."
LORA, SAVED, EMBEDDING = "adapters", "modules that were trained whole", "embedding"
MOST_TENSORS, MOST_ELEMENTS = 8, 1 << 18  # of each kind, evenly through the layers, and of each its first rows
LEAST_SAVED = 4e-3  # of a module's length: what is saved beside an adapter and was not trained is rounded at most
REORDERED = ("attn_q.", "attn_k.", "attn_qkv.")  # llama.cpp has their rows in another order for some architectures


def strength(job: Job, converted: Path, shipped: Path) -> list[Check]:
    """Of the finest file that was converted, and of the one that ships; none where no adapter was merged. Nothing is fetched for it."""
    trained = find(job, trained_by(job))
    fitted = find(job, TRANSFER) if TRANSFER.applies(job) else None
    if not trained or not (adapter := adapter_of(trained, fitted)).is_dir():
        return []
    if bytes_to_fetch(job.source):
        return [not_made(name, "the base's weights are not here any more") for name in (NAME, BASE)]
    base = base_folder(job)
    found = find_merged(converted, base, adapter)
    adapted_left = None if job.rounding else found.adapted_left  # what is merged into otherwise rounded weights is apart by that
    return [
        judge_strength(found.shares, {} if shipped == converted else find_merged(shipped, base, adapter).shares),
        judge_base(adapted_left, found.embedding_left),
    ]


@dataclass(frozen=True)
class Found:
    """Of a file, a model's folder and what was merged into it: how much of that it holds, and what is neither that nor the base."""

    shares: dict[str, Share]  # by adapters, and in modules that were trained whole
    adapted_left: float | None  # the least of the tensors with adapters
    embedding_left: float | None


def find_merged(path: Path, base: Path, adapter: Path) -> Found:
    """Both of the same rows, read once."""
    groups: dict[str, list[Share]] = {}
    left: dict[str, list[float]] = {}
    for what, numbers, before, after in _compared(path, base, adapter):
        if what == EMBEDDING:
            left.setdefault(what, []).append(left_over(numbers, after))
            continue
        left.setdefault(what, []).append(left_over(numbers, before, after - before))
        if one := share(numbers, before, after - before):
            groups.setdefault(what, []).append(one)
    adapted, embedding = (min(left.get(what, ()), default=None) for what in (LORA, EMBEDDING))
    return Found({what: together(found) for what, found in groups.items()}, adapted, embedding)


def _compared(path: Path, base: Path, adapter: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """What it is, and in float64 the first rows of a tensor in the file, in the base, and as they are once merged."""
    from safetensors import safe_open

    reader, shards = open_gguf(path), {name: shard for shard in weight_files(base) for name in header(shard)}
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    for what, changes in _changes(adapter, reader, tensors, shards).items():
        named = [(name, there, change) for name, there, change in changes if name in shards]
        for name, there, change in named[:: -(-len(named) // MOST_TENSORS)] if named else ():
            with safe_open(shards[name], "pt") as file:
                own = file.get_slice(name)
                shape = tuple(own.get_shape())
                if len(shape) != 2 or tuple(map(int, tensors[there].shape[::-1])) != shape:  # a norm may be trained whole, too
                    continue
                rows = max(1, min(shape[0], MOST_ELEMENTS // shape[1]))
                before = own[:rows]
            after, numbers = change(before.float()), _numbers(tensors[there], rows)
            if after is None or numbers is None:
                continue
            yield what, numbers, before.double().numpy(), after.double().numpy()


def _changes(adapter: Path, reader: Any, tensors: dict[str, Any], base: Iterable[str]) -> dict[str, list[tuple[str, str, Rows]]]:
    """By kind: (the base's name of a tensor, the file's, what becomes of its first rows), in order of the layers."""
    settings, held, names = load_settings(adapter), load_tensors(adapter), gguf_names(reader)
    found: dict[str, list[tuple[str, str, Rows]]] = {LORA: [], SAVED: [], EMBEDDING: []}
    for name, tensor in held.items():
        module = name.removeprefix(PREFIX)
        if module.endswith(".lora_A.weight"):
            path = module.removesuffix(".lora_A.weight")
            if f"{PREFIX}{path}.lora_magnitude_vector" in held or (other := held.get(f"{PREFIX}{path}.lora_B.weight")) is None:
                continue  # DoRA's lengths change the rest of the weight too
            kind, change = LORA, _with_product(tensor, other, _scaling(settings, path, len(tensor)))
        elif module.endswith(".weight") and "lora_" not in module and "token_adapter" not in module:
            path, kind, change = module.removesuffix(".weight"), SAVED, _instead(tensor)
        else:
            continue
        there = in_file(f"{path}.weight", names)
        if there in tensors and not there.rpartition("blk.")[2].partition(".")[2].startswith(REORDERED):
            found[kind].append((f"{path}.weight", there, change))
    for name in base:
        path = name.removesuffix(".weight")
        if in_file(name, names) == "token_embd.weight" in tensors:
            inside = [key for key in held if key.startswith(f"{PREFIX}{path}.")]
            if inside in ([], [f"{PREFIX}{name}"]):  # else some of its rows were trained, or it has an adapter
                found[EMBEDDING].append((name, "token_embd.weight", _put(held[inside[0]]) if inside else _left))
    return found


def _left(before: torch.Tensor) -> torch.Tensor:
    return before


def _put(saved: torch.Tensor) -> Rows:
    def merged(before: torch.Tensor) -> torch.Tensor | None:
        rows = saved[: len(before)].float()
        return rows if rows.shape == before.shape else None

    return merged


def _with_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> Rows:
    def merged(before: torch.Tensor) -> torch.Tensor | None:
        added = b[: len(before)].float() @ a.float() * scaling
        return before + added if added.shape == before.shape else None

    return merged


def _instead(saved: torch.Tensor) -> Rows:
    def merged(before: torch.Tensor) -> torch.Tensor | None:
        rows = saved[: len(before)].float()
        known = rows.shape == before.shape and (rows - before).norm() > LEAST_SAVED * before.norm()
        return rows if known else None

    return merged


def _scaling(settings: Any, path: str, r: int) -> float:
    """By which an adapter's product is multiplied, as PEFT says it."""
    from peft.utils.other import get_pattern_key

    patterns = settings.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), settings.lora_alpha)
    return float(alpha) / (r**0.5 if settings.use_rslora else r)


def _numbers(tensor: Any, rows: int) -> Any:
    """A tensor's first rows in float64; None of a type that gguf does not read."""
    import gguf

    try:
        return gguf.dequantize(tensor.data[:rows], tensor.tensor_type).astype("float64")
    except NotImplementedError:
        return None

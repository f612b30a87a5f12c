"""Which tensors of a quantised file get more bits than its type gives them, and how llama-quantize is told."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ftkit.gguf.types import FALLBACKS, block
from ftkit.model.source import open_gguf

MORE_BYTES = 0.03  # of the plain file, at most
# What a tensor of a type gets instead: the next one up. Two steps at once gain less for their bytes (docs/internals.md).
FINER = {
    **dict.fromkeys(("IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "TQ1_0", "TQ2_0"), "Q3_K"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "Q3_K"), "Q4_K"),
    **dict.fromkeys(("IQ4_XS", "IQ4_NL", "MXFP4", "Q4_K"), "Q5_K"),
    "Q4_0": "Q5_0", "Q4_1": "Q5_1", "Q5_0": "Q5_1", "Q5_1": "Q8_0", "Q5_K": "Q6_K", "Q6_K": "Q8_0",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its type, its bytes, and the elements of a row."""

    kind: str
    size_bytes: int
    row: int


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Those of a file, by name."""
    return {str(t.name): Tensor(t.tensor_type.name, int(t.n_bytes), int(t.shape[0])) for t in open_gguf(path).tensors}


def finer_types(plain: Mapping[str, Tensor]) -> dict[str, str]:
    """The type that each tensor would get, where there is one that is worth its bytes."""
    found = {}
    for name, tensor in plain.items():
        if kind := FINER.get(tensor.kind):
            kind = FALLBACKS.get(kind, kind) if tensor.row % block(kind)[0] else kind
            if tensor.row % block(kind)[0] == 0 and kind != tensor.kind:
                found[name] = kind
    return found


def worth_most(gains: Mapping[str, float], more_bytes: Mapping[str, int], room_bytes: int) -> list[str]:
    """The tensors to give more bits: those that gain most for a byte, as long as there is room."""
    by_worth = sorted((name for name in gains if gains[name] > 0), key=lambda name: -gains[name] / more_bytes[name])
    return _fitting(by_worth, more_bytes, room_bytes)


def at_random(more_bytes: Mapping[str, int], room_bytes: int) -> list[str]:
    """Tensors of up to as many bytes that nothing chose but a hash of their names: what a choice has to be better than."""
    return _fitting(sorted(more_bytes, key=lambda name: hashlib.sha256(name.encode()).digest()), more_bytes, room_bytes)


def _fitting(names: Iterable[str], more_bytes: Mapping[str, int], room_bytes: int) -> list[str]:
    chosen = []
    for name in names:
        if more_bytes[name] <= room_bytes:
            chosen.append(name)
            room_bytes -= more_bytes[name]
    return chosen


def type_file(types: Mapping[str, str]) -> str:
    """For llama-quantize's `--tensor-type-file`: a pattern and a type a line, of which the first that fits counts.

    Every quantised tensor is named: llama-quantize counts layers without those that are, and would give the others other types.
    """
    return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in types.items())

"""What a GGUF file says of itself and of its tensors, in few words: what a record of it keeps, and what another file is held against."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftkit.check import Check, failed, passed

if TYPE_CHECKING:
    from gguf import GGUFReader

FEW = 5  # entries that a check names one by one
LONGEST = 64  # characters of a text that is kept as it is; a longer one, one that may be a path, and a list are known by their hash
# Which key of the metadata belongs to which check: (check, the key's beginning, its end), the first that fits; and what it is
# where another stands there. ARCHITECTURE stands for the file's own name.
ARCHITECTURE = "{}."
KINDS: tuple[tuple[str, str, str, str], ...] = (
    ("chat template", "tokenizer.chat_template", "", "servers would ask it otherwise than it was trained"),
    ("special tokens", "tokenizer.", "_token_id", "answers would begin or end otherwise than in training"),
    ("special tokens", "tokenizer.ggml.add_", "_token", "answers would begin or end otherwise than in training"),
    ("tokenizer", "tokenizer.", "", "texts would become other tokens than in training"),
    ("context length", ARCHITECTURE, ".context_length", "it would take more or fewer tokens than the model was made for"),
    ("architecture", "general.architecture", "", "it would be computed as another model"),
    ("architecture", ARCHITECTURE, "", "it would be computed as another model"),
    ("other metadata", "", "", "no answer follows from it"),
)


def says(reader: GGUFReader) -> dict[str, Any]:
    """The metadata by key."""
    return {name: _short(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def _short(field: Any) -> Any:
    from gguf import GGUFValueType

    kind = field.types[0]
    value = None if kind is GGUFValueType.ARRAY else field.contents()
    if value is None or (isinstance(value, str) and (len(value) > LONGEST or set(value) & set("/\\"))):
        return "sha256:" + hashlib.sha256(b"".join(part.tobytes() for part in field.parts)).hexdigest()
    return value if isinstance(value, (str, bool, int)) else float(value)


def compare_says(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Check]:
    """A check of each kind of metadata."""
    name = str(recorded.get("general.architecture"))
    kinds: dict[str, list[str]] = {}
    wrong: dict[str, tuple[str, str]] = {}
    for key in {**recorded, **found}:
        check, _, _, means = next(row for row in KINDS if key.startswith(row[1].replace(ARCHITECTURE, f"{name}.")) and key.endswith(row[2]))
        kinds.setdefault(check, []).append(key)
        if (key in recorded, recorded.get(key)) != (key in found, found.get(key)):
            wrong.setdefault(check, (_differs(key, recorded, found), means))
    return [
        failed(check, "; ".join(wrong[check])) if check in wrong else passed(check, _told(kinds[check], found))
        for check in dict.fromkeys(row[0] for row in KINDS)
        if check in kinds
    ]


def _told(keys: list[str], found: Mapping[str, Any]) -> str:
    if len(keys) > FEW:
        return f"{len(keys)} entries, as recorded"
    return ", ".join(f"{key.rpartition('.')[2]} {'as recorded' if _is_hash(found[key]) else found[key]}" for key in keys)


def _differs(key: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    there, was = found.get(key), recorded.get(key)
    if key not in found:
        return f"{key} is missing" + ("" if _is_hash(was) else f", recorded is {was!r}")
    if key not in recorded:
        return f"{key} was put in" + ("" if _is_hash(there) else f": {there!r}")
    return f"{key} is another than was recorded" if _is_hash(was) or _is_hash(there) else f"{key} is {there!r}, recorded is {was!r}"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")


def tensors(reader: GGUFReader) -> dict[str, list[Any]]:
    """Of each tensor its type, its shape and the SHA-256 of its bytes."""
    return {
        str(tensor.name): [
            tensor.tensor_type.name,
            [int(size) for size in tensor.shape],
            hashlib.sha256(tensor.data.tobytes() if not tensor.data.flags.c_contiguous else tensor.data).hexdigest(),
        ]
        for tensor in reader.tensors
    }


def types_of(reader: GGUFReader) -> dict[str, int]:
    """How many tensors are of which type."""
    names = [tensor.tensor_type.name for tensor in reader.tensors]
    return {name: names.count(name) for name in sorted(set(names))}


def compare_types(recorded: Mapping[str, int], found: Mapping[str, int]) -> Check:
    """Whether as many tensors are of each type."""
    told = [", ".join(f"{count} {name}" for name, count in types.items()) for types in (found, recorded)]
    if dict(recorded) == dict(found):
        return passed("tensor types", told[0])
    return failed("tensor types", f"{told[0]}; recorded are {told[1]}: it was quantised again")


def compare_tensors(recorded: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> Check:
    """Whether each tensor holds the same numbers."""
    name = "tensors"
    if recorded.keys() != found.keys():
        lost, more = sorted(recorded.keys() - found.keys()), sorted(found.keys() - recorded.keys())
        return failed(name, "; ".join(f"{words}: {_some(names)}" for words, names in (("missing", lost), ("put in", more)) if names))
    retyped = [key for key in recorded if list(recorded[key][:2]) != found[key][:2]]
    if retyped:
        first = retyped[0]
        return failed(
            name,
            f"{len(retyped)} of {len(found)} have another type or shape: {first} is {_kind(found[first])}, was {_kind(recorded[first])}",
        )
    changed = [key for key in recorded if recorded[key][2] != found[key][2]]
    if changed:
        return failed(name, f"{len(changed)} of {len(found)} hold other numbers than recorded: {_some(changed)}")
    return passed(name, f"all {len(found)} hold the numbers that were recorded")


def _kind(entry: list[Any]) -> str:
    return f"{entry[0]} {' × '.join(map(str, entry[1]))}"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""The record of a shipped file: what it was made from, what was proven of it, and what it is held against later and elsewhere.

It lies beside the file: RECORD for a person and for programs, PROBES with the long lists. Both say nothing of the machine that
they were written on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftkit.data.rows import Message, has_tools
from ftkit.errors import ModelError
from ftkit.files import file_fingerprint, write_atomically

RECORD, PROBES, CARD = "ship.json", "probes.json", "README.md"
FORMAT = 1  # of RECORD; a later ftkit reads it, or says that it does not
OWN_HASH = "sha256_of_this_record"  # of all its other keys: it shows that something was changed, not by whom


@dataclass(frozen=True)
class ShippedFile:
    """The GGUF file."""

    name: str
    sha256: str
    size_bytes: int
    quantization: str
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that is known of a shipped file. What only a person reads is a mapping, JSON-able."""

    format: int = FORMAT
    name: str  # of the model, as in Ollama
    file: ShippedFile
    says: dict[str, Any]  # the file's metadata, long entries by their hash
    tensor_types: dict[str, int]
    stops: list[dict[str, Any]]  # id and token: what ends an answer
    base: dict[str, Any]
    trained: dict[str, Any]  # method, steps, losses, hashes of the adapter's files
    data: dict[str, Any]  # by purpose
    settings: dict[str, Any]  # the recipe
    versions: dict[str, Any]  # of what it was made with, by step
    merged_onto: str
    closed: dict[str, Any] | None
    proof: dict[str, Any]  # limits, checks, scores, forms
    # SHA-256 of PROBES, unless an earlier ftkit proved it, which made none; of CARD as it was written; and of an adapter's files
    beside: dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A conversation, as it is rendered and read before the model answers; or a text, as it is read."""

    messages: list[Message] | None  # None: a text alone
    text: str
    ids: list[int]

    @property
    def has_tools(self) -> bool:
        """Whether tools may be called in it, are called or have given something."""
        return has_tools(self.messages or ())


@dataclass(frozen=True)
class GivenIds:
    """Ids that a model was given, and what the shipped file thought of those at `places`: -log of their probability, in nats."""

    ids: list[int]
    places: list[int]
    losses: list[float]


@dataclass(frozen=True)
class Probes:
    """What llama.cpp made of the file when it shipped. The texts are ftkit's own, unless `ship.record_rows` adds held-out rows."""

    engine: str
    prompts: list[Prompt]
    stops: list[int]
    texts: list[GivenIds]
    rows: list[GivenIds]  # of the held-out rows, as many as the user wants to hand on
    tensors: dict[str, list[Any]] = field(default_factory=dict)  # type, shape and SHA-256


def probes_text(probes: Probes) -> bytes:
    """One line a list, since there are many numbers."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(probes).items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def write_probes(path: Path, probes: Probes) -> None:
    write_atomically(path, probes_text(probes))


def read_probes(path: Path) -> Probes:
    """Raises ModelError for what holds none."""
    found: Probes = _validated(Probes, _load(path), path)
    return found


def write_record(path: Path, record: Record) -> None:
    """With its own hash."""
    kept = asdict(record)
    write_atomically(path, (json.dumps({OWN_HASH: _own_hash(kept), **kept}, indent=1, ensure_ascii=False) + "\n").encode())


def read_record(path: Path) -> tuple[Record, bool]:
    """The record, and whether it is as it was written. Raises ModelError for what is none."""
    loaded = _load(path)
    own = loaded.pop(OWN_HASH, None)
    if isinstance(loaded.get("format"), int) and loaded["format"] > FORMAT:
        raise ModelError(f"{path} was written by a newer ftkit.", "pip install --upgrade ftkit")
    return _validated(Record, loaded, path), own == _own_hash(loaded)


def probes_beside(path: Path, record: Record) -> tuple[Probes | None, str | None]:
    """The probes of a record at `path`; without them why."""
    probes = path.with_name(PROBES)
    if PROBES not in record.beside:
        return None, "it was proven by an earlier ftkit; to have it: ftkit ship --from prove"
    if not probes.is_file():
        return None, f"{PROBES} is not beside {path.name}"
    if file_fingerprint(probes) != record.beside[PROBES]:
        return None, f"{PROBES} is another than {path.name} names"
    return read_probes(probes), None


def _own_hash(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        words = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {words}.", "ftkit ship writes it again; or copy it again, whole") from None
    return loaded


def _validated(kind: Any, loaded: dict[str, Any], path: Path) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path} is no record of a shipped file: {where}: {first['msg']}.", "ftkit ship writes it again") from None

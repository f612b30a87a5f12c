"""What a model reference was found to be, and which files belong to it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftkit import patches
from ftkit.beside import broken
from ftkit.errors import FtkitError, ModelError, first_line

if TYPE_CHECKING:
    from gguf import GGUFReader

    from ftkit.recipe import Dtype

SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several
MOST_HEADER_BYTES = 100_000_000  # as safetensors itself has it
CONVERT_PICKLES = "convert them once: https://huggingface.co/spaces/safetensors/convert"
DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # by safetensors' names


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    `folder` holds config, tokenizer and safetensors. Of a hub model and a `.gguf` it is unknown until opened; of a bare
    config it is where that lies, and nothing else in it belongs to the model.
    """

    reference: str
    kind: str  # "hub", "directory", "config" or "gguf"
    fingerprint: str  # of a hub model the commit
    folder: Path | None = None
    gguf: Path | None = None
    with_code: bool = False  # its Python code may run, and is fetched with the config


def only_pickles(where: str) -> ModelError:
    return ModelError(f"{where} holds only pickle weights (*.bin), which can run code when they are loaded.", CONVERT_PICKLES)


def refuse_adapter(folder: Path, reference: str) -> None:
    """Raise ModelError for a model with an adapter's config beside it: transformers would load that into it, or look for it in vain."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{reference} holds a model and an adapter's {ADAPTER_CONFIG}, by which transformers would load that adapter into it.",
            f"move {ADAPTER_CONFIG} and the adapter out of {folder}; to go on with it: --set training.adapter=FOLDER",
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: the one of the usual name, else those that the index names.

    A folder may hold other files: another layout of the same weights, an older save, an adapter.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = indexed_files(folder)
    return [folder / name for name in names] if names else sorted(folder.glob("*.safetensors"))


Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


@dataclass(frozen=True)
class Shard:
    """One of a model's weight files."""

    name: str
    size_bytes: int
    shapes: Shapes
    path: Path | None  # None: it is not here, and fetched when its turn comes


def shards_of(folder: Path, names: Sequence[str] | None = None) -> list[Shard]:
    """The weight files of a folder, or some of them. Raises ModelError for one that is damaged or cut short."""
    shards = []
    for path in weight_files(folder) if names is None else [folder / name for name in names]:
        entries, size = header(path), path.stat().st_size
        if size != max((entry["end"] for entry in entries.values()), default=size):
            raise ModelError(f"{path} does not end with its last tensor.", "fetch or copy the model again, whole")
        shards.append(Shard(path.name, size, {name: tuple(entry["shape"]) for name, entry in entries.items()}, path))
    return shards


def shapes_of(folder: Path) -> Shapes:
    """The shape of every tensor in a model's files, from their headers."""
    return {name: shape for shard in shards_of(folder) for name, shape in shard.shapes.items()}


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors: after eight bytes of length JSON, whose offsets count from behind it (here: from 0).

    Raises ModelError where it is none.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(min(length, MOST_HEADER_BYTES)))
        entries.pop("__metadata__", None)
        for entry in entries.values():
            entry["begin"], entry["end"] = (8 + length + offset for offset in entry["data_offsets"])
            entry["shape"] = [int(size) for size in entry["shape"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path} is no whole safetensors file.", "fetch or copy the model again, whole") from None
    return entries


def stored_dtype(folder: Path) -> Dtype:
    """The format that most bytes of a model's weights are in, whatever its config says: float32 where it is none of the three."""
    sizes = Counter[str]()
    for path in weight_files(folder):
        for entry in header(path).values():
            sizes[entry["dtype"]] += entry["end"] - entry["begin"]
    return DTYPES.get(max(sizes, key=lambda name: sizes[name], default=""), "float32")


def open_gguf(path: Path, mode: Literal["r", "r+"] = "r") -> GGUFReader:
    """A GGUF file's metadata and tensors, mapped; with "r+" to be written to. Raises ModelError where it is none, or is cut short."""
    from gguf import GGUFReader

    try:
        with patches.applied("reading GGUF files"):
            return GGUFReader(path, mode)
    except (OSError, ValueError, LookupError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ModelError(
            f"{path.name} is not a whole GGUF file: {first_line(error)}.", "make or download it again, with enough space on the disk"
        ) from None


def gguf_architecture(reader: GGUFReader) -> str:
    """As llama.cpp names it."""
    field = reader.get_field("general.architecture")
    return str(field.contents()) if field else ""


def gguf_names(reader: GGUFReader) -> Any:
    """The map from transformers' names of a file's tensors to llama.cpp's; None of an architecture that gguf does not know."""
    import gguf

    name = gguf_architecture(reader)
    architecture = next((key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    layers = reader.get_field(f"{name}.block_count")
    return gguf.get_tensor_name_map(architecture, int(layers.contents())) if architecture is not None and layers else None


def in_file(name: str, names: Any) -> str:
    """A parameter's name as a GGUF file would have it, by `gguf_names`."""
    owner, _, kind = re.sub(r"\b(language|text)_model\.", "", name).rpartition(".")
    return f"{names.get_name(owner) if names else None}.{kind}"


def indexed_files(folder: Path) -> list[str] | None:
    """The weight files that a model's index names, None without an index.

    Raises ModelError where the index cannot be read or names anything but safetensors files beside it.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        elsewhere = sorted(name for name in names if name != Path(name).name or not name.endswith(".safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}.", "fetch or copy the model again") from None
    if elsewhere:
        hint = CONVERT_PICKLES if elsewhere[0].endswith(".bin") else "take the model from where it was first published"
        raise ModelError(f"{index} names {elsewhere[0]!r}, which is no safetensors file beside it.", hint)
    return sorted(names)


QUANTISED = re.compile(  # at the end of a repository's name
    r"[-_.](unsloth[-_.])?(bnb[-_.]?)?((?P<four>4[-_.]?bit|int4|nf4|gptq|awq)|8[-_.]?bit|int8|fp8|hqq|aqlm|mxfp4|nvfp4)([-_.].*)?$",
    re.IGNORECASE,
)


def sixteen_bits_of(folder: Path) -> str | None:
    """Where the 16-bit model is that a quantised one was made from: by its card, else, of a hub model, by its name; None: unknown."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        made_from = (metadata_load(folder / "README.md") or {}).get("base_model")
    except (OSError, ValueError, yaml.YAMLError):
        made_from = None
    named = made_from[0] if isinstance(made_from, list) and made_from else made_from
    if isinstance(named, str):
        return f"its card names {named}: --model {named}"
    hub = re.search(r"models--([^/]+)--([^/]+)/snapshots", folder.as_posix())
    if hub and (name := QUANTISED.sub("", hub[2])) != hub[2]:
        return f"by its name that may be --model {hub[1]}/{name}"
    return None


def from_files(trust_remote_code: bool = False) -> dict[str, Any]:
    """What every `from_pretrained` of a model's folder is called with. Left unset, transformers asks on stdin and obeys."""
    return {"local_files_only": True, "trust_remote_code": trust_remote_code}


def not_its_files(folder: Path, error: BaseException) -> FtkitError | None:
    """The error to raise where transformers cannot load a model that is whole: it would have to run the model's own Python code, or a
    package that it loads besides is broken."""
    if "trust_remote_code" not in str(error):
        return broken(error)
    return ModelError(
        f"{folder} needs Python code that comes with the model, and ftkit does not run it by itself: it can do all that you can.",
        "take a model that transformers knows; or read that code and, if you trust its author: --trust-remote-code",
    )


def drop_code(folder: Path) -> None:
    """Take `auto_map` out of the configs in a folder that ftkit made: it names Python code, and other programs run it unasked."""

    def without(value: Any) -> Any:
        return {key: without(entry) for key, entry in value.items() if key != "auto_map"} if isinstance(value, dict) else value

    for path in folder.glob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if (dropped := without(config)) != config:
            path.write_text(json.dumps(dropped, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_body(model: Any) -> None:
    """Have `base_model` be the model without its head. Llama 4's names a part of the multimodal model, which is not there."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"

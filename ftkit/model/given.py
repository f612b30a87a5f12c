"""What was trained with another tool: an adapter, a checkpoint or a GGUF, told apart by its files, and what it says of its base."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ftkit.errors import ModelError
from ftkit.files import file_fingerprint, fingerprint, user_path
from ftkit.model.hub import CONFIG_FILES, fetch, locate_hub, names_of
from ftkit.model.locate import HUB_ID, locate
from ftkit.model.source import ADAPTER_CONFIG, QUANTISED, Source, open_gguf

Kind = Literal["adapter", "checkpoint", "gguf"]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# By what other libraries name a tokenizer's files, in an adapter's folder as in a model's.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model")
UNQUANTISED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Given:
    """A finished training that was made elsewhere."""

    kind: Kind
    path: Path  # a folder, or the .gguf
    fingerprint: str
    base: str | None = None  # of an adapter: what it says that it was trained on
    quantization: str | None = None  # of a GGUF
    hub: Source | None = None  # where it comes from the hub; of a whole model the weights are fetched once they are needed

    @property
    def on_four_bits(self) -> bool:
        """Whether the base that an adapter names is a 4-bit one, by its name or by its config."""
        if not self.base:
            return False
        named = QUANTISED.search(self.base.partition("@")[0])
        return bool(named and named["four"]) or quantised_by(_read(Path(self.base) / "config.json")) is not None


def look_at(reference: str, relative_to: Path) -> Given:
    """Raises ModelError for what is none of the three, for pickles, and for what other tools keep in another form."""
    if reference.startswith("ollama:"):
        gguf = locate(reference, relative_to).gguf
        assert gguf
        return _gguf(gguf)
    path = user_path(reference)
    path = (path if path.is_absolute() else relative_to / path).resolve()
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if path.is_file():
        raise ModelError(f"{path} is no adapter, checkpoint or GGUF.", f"give the folder that it lies in: ftkit ship {path.parent}")
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1)
    meant = f"did you mean {path.parent / near[0]}?" if near else None
    if HUB_ID.fullmatch(reference) and not reference.endswith(".gguf"):
        try:
            return _hub(locate_hub(reference))
        except ModelError as error:
            if not meant:
                raise
            raise ModelError(f"There is nothing at {path}. {error.message}", f"{meant} Otherwise: {error.hint}") from None
    raise ModelError(f"There is nothing at {path}.", meant or "give a folder or a .gguf file that is there, or a hub id (org/name)")


def _hub(source: Source) -> Given:
    """Of a repository: its adapter, which is fetched at once, or its whole model, of which so far the config is."""
    folder = fetch(source, CONFIG_FILES, ("*/*", ADAPTER_CONFIG))
    names = names_of(source)
    if ADAPTER_CONFIG in names and (ADAPTER_WEIGHTS in names or "adapter_model.bin" in names):
        folder = fetch(source, (*CONFIG_FILES, ADAPTER_WEIGHTS), ("*/*",))
        return replace(_adapter(folder, _read(folder / ADAPTER_CONFIG), source.reference, names), hub=source)
    if (folder / "config.json").is_file():
        _refuse_quantised(config_of(folder), source.reference)
        return Given("checkpoint", folder, source.fingerprint, hub=source)
    repository = source.reference.partition("@")[0]
    files = sorted(name for name in names if name.endswith(".gguf"))
    fetch_one = f"hf download {repository} {files[0]} --local-dir ." if files else ""
    raise ModelError(
        f"{source.reference} holds no adapter and no model" + (f", and {len(files)} GGUF files." if files else "."),
        f"fetch one, and ship it: {fetch_one}; ftkit ship {files[0]}"
        if files
        else "an adapter has adapter_config.json, a model config.json",
    )


def four_bits(adapter: str, base: str, what: str) -> ModelError:
    """The error to raise for an adapter that would be merged into a quantised base."""
    repository = QUANTISED.sub("", base.partition("@")[0])
    known = repository if repository != base and "/" in repository and not Path(base).exists() else "org/name"
    return ModelError(
        f"{adapter} was trained on {base}, which {what}: merged into that, it would be rounded to a few bits once more.",
        f"name the 16-bit model that this was made of, and it is merged into it: ftkit ship {adapter} --base {known}",
    )


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """What a model's config says that its weights were quantised with; None: they are not."""
    settings = config.get("quantization_config") or config.get("quantization")  # the other is MLX's
    if not settings:
        return None
    return str(settings.get("quant_method", "another tool")) if isinstance(settings, dict) else str(settings)


def config_of(folder: Path) -> dict[str, Any]:
    """A model's config; empty where there is none that can be read, which loading will say."""
    return _read(folder / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _folder(path: Path) -> Given:
    weights = [file for file in path.glob("*.safetensors") if file.name not in (ADAPTER_WEIGHTS, "adapters.safetensors")]
    config = _read(path / ADAPTER_CONFIG)
    if (path / "adapters.safetensors").exists() or {"fine_tune_type", "lora_parameters"} & config.keys():
        raise ModelError(
            f"{path} is an adapter of MLX, whose layers have other names and shapes than PEFT's.",
            f"fuse it where MLX is, and ship that: mlx_lm.fuse --model BASE --adapter-path {path} --save-path fused; ftkit ship fused",
        )
    if (path / ADAPTER_CONFIG).exists() and ((path / ADAPTER_WEIGHTS).exists() or not weights):
        if (path / ADAPTER_WEIGHTS).exists() and (path / "config.json").exists() and weights:
            raise ModelError(
                f"{path} holds an adapter and a whole model ({weights[0].name}).", "put one of them into a folder of its own, and ship that"
            )
        return _adapter(path, config, str(path), {file.name for file in path.iterdir()})
    if (path / "config.json").exists():
        source = locate(str(path), path)
        _refuse_quantised(config_of(path), str(path))
        return Given("checkpoint", path, source.fingerprint)
    inside = [file.parent for file in (*path.glob(f"*/{ADAPTER_CONFIG}"), *path.glob("*/config.json"))]
    files = sorted(path.glob("*.gguf"))
    if inside:
        newest = max(inside, key=lambda folder: (int((re.findall(r"\d+$", folder.name) or [-1])[0]), folder.name))
        hint = f"did you mean {newest}?"
    elif files:
        hint = f"did you mean {files[0]}?"
    else:
        hint = "an adapter's folder has adapter_config.json, a model's has config.json; a recipe: ftkit init"
    raise ModelError(f"{path} holds no recipe, no adapter and no model.", hint)


def _refuse_quantised(config: Mapping[str, Any], what: str) -> None:
    if (method := quantised_by(config)) is not None:
        raise ModelError(
            f"The weights in {what} are quantised ({method}), and what is made of them is rounded twice.",
            "save the trained model in 16 bits, or its adapter, and ship that",
        )


def _adapter(path: Path, config: Mapping[str, Any], named_as: str, names: Collection[str]) -> Given:
    """Of a folder with these files in it, or of those of them that were fetched."""
    kind = config.get("peft_type")
    if kind != "LORA":
        what = f"is an adapter of the kind {kind}, and LoRA alone is merged" if kind else f"has no {ADAPTER_CONFIG} that can be read"
        raise ModelError(
            f"{named_as} {what}.", "merge it with PEFT, merge_and_unload() and save_pretrained(FOLDER), then: ftkit ship FOLDER"
        )
    if ADAPTER_WEIGHTS not in names:
        if "adapter_model.bin" in names:
            raise ModelError(
                f"{named_as} holds only pickle weights (adapter_model.bin), which can run code when they are loaded.",
                "save it again where it was trained: model.save_pretrained(FOLDER, safe_serialization=True)",
            )
        raise ModelError(f"{named_as} has no {ADAPTER_WEIGHTS}.", "copy the adapter again, whole")
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    base = str(named) if named else None
    if base and revision and HUB_ID.fullmatch(base) and "@" not in base and not Path(base).exists():
        base = f"{base}@{revision}"
    files = [path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS, *tokenizer_files(path)]
    return Given("adapter", path, fingerprint([[file.name, file_fingerprint(file)] for file in files]), base)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files of a folder, by name; none where it has no tokenizer of its own."""
    found = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    return found if any(file.name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json") for file in found) else []


def _gguf(path: Path) -> Given:
    from gguf import LlamaFileType

    source = locate(str(path), path.parent)
    path = source.gguf or path  # joined, where it is one of several files
    fields = open_gguf(path).fields

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    if value("general.type") == "adapter":
        raise ModelError(
            f"{path} is an adapter as GGUF, and not merged.",
            f"run it beside its base: llama-server -m BASE.gguf --lora {path}; or ship its PEFT folder",
        )
    if (value("split.count") or 1) > 1:
        raise ModelError(
            f"{path} is one of {value('split.count')} files of a model, and its name does not say which.",
            f"give all of them the names that they had: NAME-00001-of-{value('split.count'):05}.gguf",
        )
    if "tokenizer.ggml.tokens" not in fields:
        raise ModelError(f"{path} has no tokenizer.", "convert it again from a folder that has one; or ship that folder")
    try:
        kind = LlamaFileType(value("general.file_type")).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        raise ModelError(f"{path} does not say of which type it is (general.file_type).", "make it again with llama-quantize") from None
    return Given("gguf", path, source.fingerprint, quantization=kind)

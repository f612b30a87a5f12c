"""A model reference – hub id, directory, `.gguf` file or `ollama:NAME` – to its config, tokenizer and 16-bit weights."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from ftkit.errors import ModelError, ToolMissingError
from ftkit.progress import SILENT, Reporter
from ftkit.run import file_fingerprint, fingerprint
from ftkit.tools import cache_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")

# GGUF names a pre-tokenizer instead of carrying it, and transformers does not rebuild these from the name.
# The steps follow llama.cpp's table (src/llama-vocab.cpp); `parity.compare_tokens` checks the result against llama.cpp itself.
PRE_TOKENIZERS_WITH_SINGLE_DIGITS = ("smollm",)


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `folder` holds config, tokenizer and safetensors; for a `.gguf` it is made by `open_weights`."""

    reference: str
    kind: str  # "hub", "directory" or "gguf"
    fingerprint: str
    folder: Path | None = None
    gguf: Path | None = None


def locate(reference: str, relative_to: Path) -> Source:
    """Find a model without loading anything heavy.

    Raises ModelError where there is no such model, or where its weights are pickle files.
    """
    if reference.startswith("ollama:"):
        return replace(_locate_gguf(_ollama_file(reference.removeprefix("ollama:"))), reference=reference)
    path = Path(reference).expanduser()
    path = path if path.is_absolute() else relative_to / path
    if path.is_dir():
        return _locate_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return _locate_gguf(path)
    if path.exists():
        raise ModelError(f"{path} is no model.", "a model is a folder with config.json, a .gguf file, or a hub id such as org/name")
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1)
    if HUB_ID.fullmatch(reference) and not reference.endswith(".gguf") and not near:
        return Source(reference, "hub", fingerprint("hub", reference))
    raise ModelError(
        f"There is no model at {path}.",
        f"did you mean {path.parent / near[0]}?" if near else "give a folder, a .gguf file, a hub id (org/name) or ollama:NAME",
    )


def _locate_folder(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json.", "give the folder that holds config.json, the tokenizer and *.safetensors")
    weights = sorted(path.glob("*.safetensors"))
    if not weights and any(path.glob("*.bin")):
        raise ModelError(
            f"{path} holds only pickle weights (*.bin), which can run code when they are loaded.",
            "convert them once: https://huggingface.co/spaces/safetensors/convert",
        )
    parts: list[object] = [(path / "config.json").read_text(encoding="utf-8")]
    for file in (*weights, *sorted(path.glob("*.jinja")), *sorted(path.glob("tokenizer*"))):
        stat = file.stat()
        parts.append([file.name, stat.st_size, stat.st_mtime_ns])
    return Source(str(path), "directory", fingerprint(parts), folder=path.resolve())


def _locate_gguf(path: Path) -> Source:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file.", "download it again: it may be an error page or cut short")
    return Source(str(path), "gguf", file_fingerprint(path)[:16], gguf=path.resolve())


def _ollama_file(name: str) -> Path:
    """The GGUF behind a model of the local Ollama server, as `ollama show --modelfile` names it."""
    import ollama

    try:
        with ollama.Client() as client:
            modelfile = client.show(name).modelfile or ""
    except ConnectionError:
        raise ToolMissingError("No Ollama server answers.", "start it: ollama serve") from None
    except ollama.ResponseError as error:
        raise ModelError(f"Ollama does not have {name}: {error.error}.", "see what it has: ollama list") from None
    found = re.search(r"(?m)^FROM (/.+|[A-Za-z]:\\.+)$", modelfile)
    if not found or not Path(found[1]).is_file():
        raise ModelError(f"Ollama keeps the file of {name} where ftkit cannot read it.", "give the .gguf file itself")
    return Path(found[1])


def open_config(source: Source, reporter: Reporter = SILENT) -> Source:
    """The source with a `folder` that holds at least config and tokenizer; of a hub model only those are fetched."""
    if source.kind == "hub":
        return _fetch(source, CONFIG_FILES)
    return source if source.folder else open_weights(source, reporter)


def open_weights(source: Source, reporter: Reporter = SILENT) -> Source:
    """The source with a `folder` of config, tokenizer and 16-bit safetensors; fetches or dequantises where needed."""
    if source.kind == "hub":
        return _fetch(source, (*CONFIG_FILES, "*.safetensors"))
    if source.kind == "gguf" and source.folder is None:
        return replace(source, folder=_dequantise(source, reporter))
    if source.folder and not any(source.folder.glob("*.safetensors")):
        raise ModelError(f"{source.folder} has no *.safetensors.", "a config alone is enough for `ftkit plan` only")
    return source


def _fetch(source: Source, patterns: tuple[str, ...]) -> Source:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(huggingface_hub.snapshot_download(source.reference, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise ModelError(
            f"{source.reference} is gated.", f"accept its terms at https://huggingface.co/{source.reference}, then: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"The hub has no model {source.reference} (or it is private).", "check the spelling, or: hf auth login") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError):
        raise ModelError(
            f"{source.reference} is not on this machine and the hub cannot be reached.",
            "check the spelling and the network, or give a local folder or .gguf file with --model",
        ) from None
    return replace(source, folder=folder, fingerprint=fingerprint("hub", source.reference, folder.name))


def _dequantise(source: Source, reporter: Reporter) -> Path:
    """A bfloat16 checkpoint and tokenizer of a GGUF, kept in the private folder under the file's hash.

    What was quantised stays as coarse as it was; only the storage is 16-bit.
    """
    assert source.gguf
    final = cache_folder() / "models" / f"gguf-{source.fingerprint}"
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_suffix(".lock")):
        if final.is_dir():
            return final
        reporter.step(f"dequantising {source.gguf.name} to a 16-bit checkpoint")
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            _write_checkpoint(source.gguf, partial)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_checkpoint(path: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **where)
    except (ValueError, NotImplementedError, KeyError, ImportError) as error:
        raise ModelError(
            f"transformers cannot read {path.name} back: {error}.", "use the model's original safetensors instead: --model org/name"
        ) from None
    fields = GGUFReader(path).fields
    pre_tokenizer = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if pre_tokenizer in PRE_TOKENIZERS_WITH_SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

"""A model reference – hub id, directory, `config.json`, `.gguf` file or `ollama:NAME` – to its config, tokenizer and 16-bit weights."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftkit.errors import ModelError, RunError, ToolMissingError, first_line
from ftkit.progress import SILENT, Reporter
from ftkit.run import disk_fault, file_fingerprint, fingerprint
from ftkit.tools import cache_folder, make_cache_folder, user_path
from ftkit.units import bytes_text

HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[\w.-]+(@(?!.*\.\.)[\w.-]+(/[\w.-]+)*)?", re.ASCII | re.IGNORECASE)  # org/name, org/name@revision
CONFIG_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
INDEX = "model.safetensors.index.json"  # which file holds which tensor, where there are several
CONVERT_PICKLES = "convert them once: https://huggingface.co/spaces/safetensors/convert"

# GGUF names a pre-tokenizer instead of carrying it, and transformers does not rebuild these from the name.
# The steps follow llama.cpp's table (src/llama-vocab.cpp); `parity.compare_tokens` checks the result against llama.cpp itself.
PRE_TOKENIZERS_WITH_SINGLE_DIGITS = ("smollm",)


DEQUANTISED = "gguf-1"  # begins the name of what `_dequantise` keeps; another number once it would write other files


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


def locate(reference: str, relative_to: Path) -> Source:
    """Find a model without loading anything heavy; of a hub model only its commit is asked for.

    Raises ModelError where there is no such model, or where its weights are pickle files.
    """
    if reference.startswith("ollama:"):
        return replace(_locate_gguf(_ollama_file(reference.removeprefix("ollama:"))), reference=reference)
    path = user_path(reference)
    path = path if path.is_absolute() else relative_to / path
    if path.is_dir():
        return _locate_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return _locate_gguf(path)
    if path.is_file() and path.name == "config.json":
        return _locate_config(path)
    if path.exists():
        raise ModelError(
            f"{path} is no model.",
            "a model is a folder with config.json, that file alone to plan, a .gguf file, or a hub id such as org/name",
        )
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1)
    meant = f"did you mean {path.parent / near[0]}?" if near else None
    if HUB_ID.fullmatch(reference) and not reference.endswith(".gguf"):
        try:
            return _locate_hub(reference)
        except ModelError as error:
            if not meant:
                raise
            raise ModelError(f"There is no model at {path}. {error.message}", f"{meant} Otherwise: {error.hint}") from None
    raise ModelError(f"There is no model at {path}.", meant or "give a folder, a .gguf file, a hub id (org/name) or ollama:NAME")


def _locate_hub(reference: str) -> Source:
    """The commit that the revision names today; what the cache remembers of it where the hub is not reached."""
    from huggingface_hub import HfApi, is_offline_mode

    repository, _, revision = reference.partition("@")
    with _hub_errors(reference):
        commit = HfApi().resolve_revision(repository, revision=revision or None, local_files_only=is_offline_mode()).resolved
    return Source(reference, "hub", commit)


def _locate_folder(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json.", "give the folder that holds config.json, the tokenizer and *.safetensors")
    weights = sorted(path.glob("*.safetensors"))
    if not weights and any(path.glob("*.bin")):
        raise _only_pickles(str(path))
    parts: list[object] = [(path / "config.json").read_text(encoding="utf-8", errors="replace")]
    for file in (*weights, *sorted(path.glob("*.jinja")), *sorted(path.glob("tokenizer*")), *sorted(path.glob("*.py"))):
        stat = file.stat()
        parts.append([file.name, stat.st_size, stat.st_mtime_ns])
    return Source(str(path), "directory", fingerprint(parts), folder=path.resolve())


def _only_pickles(where: str) -> ModelError:
    return ModelError(f"{where} holds only pickle weights (*.bin), which can run code when they are loaded.", CONVERT_PICKLES)


def _locate_config(path: Path) -> Source:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if not isinstance(json.loads(text), dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no config: {error}.", "on the model's page open config.json and take its download link") from None
    return Source(str(path), "config", fingerprint("config", text), folder=path.parent.resolve())


def _locate_gguf(path: Path) -> Source:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file.", "download it again: it may be an error page or cut short")
    return Source(str(path), "gguf", file_fingerprint(path)[:16], gguf=path.resolve())


def _ollama_file(name: str) -> Path:
    """The GGUF behind a model of the local Ollama server, as `ollama show --modelfile` names it."""
    import httpx
    import ollama

    try:
        with ollama.Client(timeout=30) as client:
            modelfile = client.show(name).modelfile or ""
    except (ConnectionError, httpx.HTTPError, ValueError):  # ValueError: OLLAMA_HOST is no address, or what answers speaks no JSON
        raise ToolMissingError("No Ollama server answers.", "start it: ollama serve; ftkit env shows where it is looked for") from None
    except ollama.ResponseError as error:
        raise ModelError(f"Ollama does not have {name}: {error.error}.", "see what it has: ollama list") from None
    found = re.search(r"(?m)^FROM (/.+|[A-Za-z]:\\.+)$", modelfile)
    if not found or not Path(found[1]).is_file():
        raise ModelError(f"Ollama keeps the file of {name} where ftkit cannot read it.", "give the .gguf file itself")
    return Path(found[1])


def open_config(source: Source, reporter: Reporter = SILENT) -> Source:
    """The source with a `folder` that holds at least config and tokenizer (a bare config: config.json); nothing else is fetched."""
    if source.kind == "hub":
        folder = _fetch(source, (*CONFIG_FILES, *(["*.py"] if source.with_code else [])), ("*/*",))
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{source.reference} has no config.json: it is no base model.",
                f"of a repository of GGUF files fetch one and give that: hf download {source.reference.partition('@')[0]} FILE.gguf",
            )
        return replace(source, folder=folder)
    return source if source.folder else open_weights(source, reporter)


def open_weights(source: Source, reporter: Reporter = SILENT) -> Source:
    """The source with a `folder` of config, tokenizer and 16-bit safetensors; fetches or dequantises where needed."""
    if source.kind == "hub":
        return _open_hub_weights(source, reporter)
    if source.kind == "gguf" and source.folder is None:
        return replace(source, folder=_dequantise(source, reporter))
    if source.kind == "config":
        raise ModelError(
            f"{source.reference} is a config without weights: enough to plan, not to train.",
            "give the model itself with --model: a folder, a .gguf file, a hub id (org/name) or ollama:NAME",
        )
    if source.folder:
        if not any(source.folder.glob("*.safetensors")):
            raise ModelError(f"{source.folder} has no *.safetensors.", "a config alone is enough for `ftkit plan` only")
        if missing := [name for name in indexed_files(source.folder) or () if not (source.folder / name).is_file()]:
            raise ModelError(f"{source.folder} has no {missing[0]}, which its {INDEX} names.", "fetch or copy the model again, whole")
    return source


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


def _open_hub_weights(source: Source, reporter: Reporter) -> Source:
    """Fetch the weights that transformers loads – those in the index, or the one file – and no second copy beside them."""
    opened = open_config(source)
    missing = _missing_weights(opened)
    if missing:
        size = bytes_text(sum(missing.values()))
        reporter.step(f"fetching the weights of {source.reference}: {size} in {len(missing)} file{'s' * (len(missing) > 1)}")
        _fetch(source, list(missing))
    return opened


def bytes_to_fetch(source: Source) -> int:
    """Bytes of the hub's weights that are not on this machine yet; 0 for every other source, and where it cannot be told."""
    try:
        return sum(_missing_weights(open_config(source)).values()) if source.kind == "hub" else 0
    except ModelError:  # said once they are wanted; a plan does without
        return 0


def hub_cache() -> Path:
    """Where the hub's files are kept (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _missing_weights(opened: Source) -> dict[str, int]:
    """Name and bytes of each weight file that is not in the cache. Raises ModelError where the hub has no such file."""
    from huggingface_hub import get_cached_repo_tree

    assert opened.folder
    names = indexed_files(opened.folder) or ["model.safetensors"]
    missing = [name for name in names if not (opened.folder / name).is_file()]
    if not missing:
        return {}
    with _hub_errors(opened.reference):
        sizes = {file.path: file.size for file in get_cached_repo_tree(opened.reference.partition("@")[0], revision=opened.fingerprint)}
    if absent := [name for name in missing if name not in sizes]:
        if any(name.endswith(".bin") for name in sizes):
            raise _only_pickles(opened.reference)
        raise ModelError(f"{opened.reference} has no {absent[0]}.", "give a model with its weights in safetensors files")
    return {name: sizes[name] for name in missing}


def from_files(trust_remote_code: bool = False) -> dict[str, Any]:
    """What every `from_pretrained` of a model's folder is called with. Left unset, transformers asks on stdin and obeys."""
    return {"local_files_only": True, "trust_remote_code": trust_remote_code}


def needs_code(folder: Path, error: BaseException) -> ModelError | None:
    """The error to raise where transformers refuses a model because it would have to run the model's own Python code."""
    if "trust_remote_code" not in str(error):
        return None
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


def _fetch(source: Source, patterns: Sequence[str], without: Sequence[str] = ()) -> Path:
    """The snapshot folder of the source's commit, with the files that match; asks nothing where they are all there."""
    import huggingface_hub

    with _hub_errors(source.reference):
        folder = huggingface_hub.snapshot_download(
            source.reference.partition("@")[0],
            revision=source.fingerprint,
            allow_patterns=list(patterns),
            ignore_patterns=list(without),
        )
    return Path(folder)


@contextmanager
def _hub_errors(reference: str) -> Iterator[None]:
    """Say huggingface_hub's errors as ModelError, each with the way out."""
    from huggingface_hub import constants, errors, is_offline_mode

    repository, _, revision = reference.partition("@")
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{repository} is gated: its terms must be accepted first.",
            f"accept them at {page}, then: hf auth login; or, only to plan, download config.json there and: ftkit plan --config config.json",
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"The hub has no model {repository} (or it is private).", "check the spelling, or: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repository} has no revision {revision}.", f"see its branches and tags: {page}/tree/main") from None
    except errors.HFValidationError as error:
        raise ModelError(f"{reference} is no hub id: {first_line(error)}", "a hub id is org/name, or org/name@revision") from None
    except (
        errors.HTTPError,  # type: ignore[attr-defined]  # httpx's or, in newer versions, httpx2's
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
        OSError,
        RuntimeError,  # hf_xet's
    ) as error:
        cause = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__ or error
        if is_offline_mode():
            raise ModelError(
                f"HF_HUB_OFFLINE is set, and {reference} is not (or not whole) in the hub's cache at {constants.HF_HUB_CACHE}.",
                f"unset it and fetch the model once: hf download {repository}{f' --revision {revision}' if revision else ''}",
            ) from None
        if isinstance(cause, errors.HfHubHTTPError):
            status, said = cause.response.status_code, cause.server_message
            raise ModelError(
                f"The hub answers {status} for {reference}{f': {said.splitlines()[0]}' if said else '.'}",
                "HF_TOKEN or the login is not valid any more: hf auth login"
                if status == 401
                else "try again later, or give a local folder",
            ) from None
        if isinstance(cause, OSError) and cause.strerror:
            raise ModelError(
                f"{reference} cannot be kept in {constants.HF_HUB_CACHE}: {cause.strerror}.",
                "make space there, or set HF_HOME to another folder",
            ) from None
        raise ModelError(
            f"{reference} cannot be fetched from {constants.ENDPOINT}: {first_line(cause)}",
            "check the network and give the same command again (whole files are kept), or give a local folder or .gguf file",
        ) from None


def _dequantise(source: Source, reporter: Reporter) -> Path:
    """A bfloat16 checkpoint and tokenizer of a GGUF, kept in the private folder under the file's hash.

    What was quantised stays as coarse as it was; only the storage is 16-bit.
    """
    from safetensors import SafetensorError

    assert source.gguf
    final = make_cache_folder(cache_folder() / "models") / f"{DEQUANTISED}-{source.fingerprint}"
    with FileLock(final.with_suffix(".lock")):
        if final.is_dir():
            return final
        reporter.step(f"dequantising {source.gguf.name} to a 16-bit checkpoint")
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            _write_checkpoint(source.gguf, partial)
            partial.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (fault := disk_fault(error)):
                raise
            raise RunError(
                f"{source.gguf.name} cannot be dequantised into {final.parent}: {fault}.",
                "free some space there, or choose another: FTKIT_CACHE_DIR=FOLDER",
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def outdated() -> list[Path]:
    """Dequantised models of an older form, which nothing reads any more."""
    folders = sorted((cache_folder() / "models").glob("gguf-*/"))
    return [folder for folder in folders if not folder.name.startswith(f"{DEQUANTISED}-") and not folder.is_symlink()]


def _write_checkpoint(path: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": path.name, **from_files()}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **where)
        fields = GGUFReader(path).fields
    except (
        ValueError, LookupError, ImportError, struct.error, OSError, TypeError, AttributeError, ArithmeticError, NotImplementedError
    ) as error:  # fmt: skip
        raise ModelError(
            f"transformers cannot read {path.name} back: {first_line(error)}.",
            "download it again, whole; or use the model's original safetensors instead: --model org/name",
        ) from None
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

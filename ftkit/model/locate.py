"""A model reference → what it names: a folder, a file, a hub id, a model of Ollama's."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from pathlib import Path

from ftkit.errors import ModelError, ToolMissingError, proxy_fault
from ftkit.files import file_fingerprint, fingerprint, user_path
from ftkit.model.hub import locate_hub
from ftkit.model.source import Source, only_pickles, refuse_adapter
from ftkit.model.split import joined, parts_of

HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[\w.-]+(@(?!.*\.\.)[\w.-]+(/[\w.-]+)*)?", re.ASCII | re.IGNORECASE)  # org/name, org/name@revision


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
            return locate_hub(reference)
        except ModelError as error:
            if not meant:
                raise
            raise ModelError(f"There is no model at {path}. {error.message}", f"{meant} Otherwise: {error.hint}") from None
    raise ModelError(f"There is no model at {path}.", meant or "give a folder, a .gguf file, a hub id (org/name) or ollama:NAME")


def _locate_folder(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json.", "give the folder that holds config.json, the tokenizer and *.safetensors")
    refuse_adapter(path, str(path))
    weights = sorted(path.glob("*.safetensors"))
    if not weights and any(path.glob("*.bin")):
        raise only_pickles(str(path))
    parts: list[object] = [(path / "config.json").read_text(encoding="utf-8", errors="replace")]
    for file in (*weights, *sorted(path.glob("*.jinja")), *sorted(path.glob("tokenizer*")), *sorted(path.glob("*.py"))):
        stat = file.stat()
        parts.append([file.name, stat.st_size, stat.st_mtime_ns])
    return Source(str(path), "directory", fingerprint(parts), folder=path.resolve())


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
    if parts := parts_of(path):
        known = fingerprint([file_fingerprint(part) for part in parts])
        return Source(str(path), "gguf", known, gguf=joined(parts, known))
    return Source(str(path), "gguf", file_fingerprint(path)[:16], gguf=path.resolve())


def _ollama_file(name: str) -> Path:
    """The GGUF behind a model of the local Ollama server, as `ollama show --modelfile` names it."""
    import httpx

    nobody = ToolMissingError("No Ollama server answers.", "start it: ollama serve; ftkit env shows where it is looked for")
    try:
        import ollama  # makes a client of its own at once
    except (ImportError, ValueError) as error:  # a SOCKS proxy's package; a proxy or an OLLAMA_HOST that is none
        raise (proxy_fault(error) if isinstance(error, ImportError) or "proxy" in str(error) else nobody) from None
    try:
        with ollama.Client(timeout=30, trust_env=False) as client:  # on this machine, where no proxy leads
            modelfile = client.show(name).modelfile or ""
    except (ConnectionError, httpx.HTTPError, ValueError):  # ValueError: what answers speaks no JSON
        raise nobody from None
    except ollama.ResponseError as error:
        raise ModelError(f"Ollama does not have {name}: {error.error}.", "see what it has: ollama list") from None
    found = re.search(r"(?m)^FROM (/.+|[A-Za-z]:\\.+)$", modelfile)
    if not found or not Path(found[1]).is_file():
        raise ModelError(f"Ollama keeps the file of {name} where ftkit cannot read it.", "give the .gguf file itself")
    return Path(found[1])

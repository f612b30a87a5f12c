"""A model's card: the licence that a source names, and the card of a model that is made here, which llama.cpp's converter reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ftkit import __version__
from ftkit.errors import ModelError
from ftkit.model.hub import fetch
from ftkit.model.open import open_config
from ftkit.model.source import Source, open_gguf

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")  # in the header of a card; in a GGUF general.license and .name, .link


def licence(source: Source) -> dict[str, str]:
    """What a base says of its licence, in its GGUF or its folder; of the hub's the card is fetched, where it can be."""
    if source.gguf:
        return licence_of(source.gguf)
    if source.kind == "hub":
        with suppress(ModelError):  # offline, of a model that was fetched without it: it says nothing then
            fetch(source, [CARD])
    folder = open_config(source).folder
    assert folder
    return licence_beside(folder)


def licence_of(gguf: Path) -> dict[str, str]:
    """What a GGUF's metadata say of its licence; else nothing."""
    reader = open_gguf(gguf)
    fields = {key: reader.get_field(f"general.{key.replace('_', '.')}") for key in LICENCE_KEYS}
    return {key: str(field.contents()) for key, field in fields.items() if field}


def licence_beside(folder: Path) -> dict[str, str]:
    """What a model's folder says of its licence: in the header of its card, or by a file of that name; else nothing."""
    found = _header(folder)
    said = {key: found[key] for key in LICENCE_KEYS if isinstance(found.get(key), str)}
    files = [path.name for path in sorted(folder.glob("LICEN[CS]E*")) if path.is_file()]
    return {**said, **({"file": files[0]} if files else {})}


def reference_of(source: Source) -> str:
    """What a model is called, without its place on this machine."""
    named = source.kind == "hub" or source.reference.startswith("ollama:")
    return source.reference if named else (source.gguf or source.folder or Path(source.reference)).name


def write_card(folder: Path, source: Source, *, has_base: bool) -> None:
    """Into a merged model's folder: licence, base model and this ftkit, under names that llama.cpp's converter takes over.

    `has_base`: the source is what the model was made of, and not the model itself.
    """
    said = {key: text for key, text in licence(source).items() if key in LICENCE_KEYS}
    header = {**said, **({"base_models": [base_model(source)]} if has_base else {}), "description": f"Made with ftkit {__version__}"}
    text = yaml.safe_dump(header, allow_unicode=True, sort_keys=False)
    (folder / CARD).write_text(f"---\n{text}---\n", encoding="utf-8")


def base_model(source: Source) -> dict[str, str]:
    """Name, and of a hub model organization and address."""
    name = reference_of(source)
    if source.kind != "hub":
        return {"name": name}
    organization, _, name = name.partition("@")[0].rpartition("/")
    return {"name": name, "organization": organization, "repo_url": f"https://huggingface.co/{organization}/{name}"}


def in_gguf(folder: Path) -> dict[str, str]:
    """What the card of a merged model says, by the keys of a GGUF's metadata; nothing of one that an earlier ftkit merged."""
    header = _header(folder)
    said = {f"general.{key.replace('_', '.')}": text for key, text in header.items() if key in (*LICENCE_KEYS, "description")}
    models = header.get("base_models") or []
    return {**said, **{f"general.base_model.{n}.{key}": text for n, model in enumerate(models) for key, text in model.items()}}


def _header(folder: Path) -> Mapping[str, Any]:
    found: Any = {}
    if (folder / CARD).is_file():
        header = re.match(r"---\n(.*?)\n---\s*(\n|\Z)", (folder / CARD).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            found = yaml.safe_load(header[1]) if header else {}
    return found if isinstance(found, dict) else {}

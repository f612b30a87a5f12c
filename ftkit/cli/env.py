"""`ftkit env`: versions, GPU and tools, and the command that brings what is missing."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import json_option, training_stack

if TYPE_CHECKING:
    from ftkit.check import Check
    from ftkit.machine.llama_cpp import Found

PACKAGES = ("ftkit", "gguf", "xllamacpp", "ollama")  # and those of the extra `train`
PROGRAMS = ("llama-quantize", "llama-server", "llama-imatrix", "llama-perplexity")


@click.command(epilog="\b\nExamples:\n  ftkit env\n  ftkit env mymodel/recipe.yaml\n  ftkit env --json")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@json_option
def command(recipe: Path | None, as_json: bool) -> None:
    """Show what ftkit has to work with, for RECIPE with its own llama.cpp. Nothing is installed or changed."""
    from ftkit.cli.console import print_json, print_table
    from ftkit.units import bytes_text

    found = look(recipe)
    if as_json:
        print_json(found)
        return
    print_table(
        "Packages",
        ["", ""],
        [[name, version or "missing: pip install 'ftkit[train]'"] for name, version in found["packages"].items()],
        figures=False,
    )
    rows = [*([["GPUs", found["gpus_not_told"]]] if found["gpus_not_told"] else []), *([d["name"], d["memory"]] for d in found["devices"])]
    rows += [["", d["not_used"]] for d in found["devices"] if d["not_used"]]
    print_table("\nDevice", ["", ""], rows, figures=False)
    rows = [
        [name, f"{entry['path']} ({entry['found_by']})" if entry["path"] else f"missing: {entry['bring']}"]
        for name, entry in found["tools"].items()
    ]
    print_table("\nTools", ["", ""], [*rows, ["of one build", found["one_build"]["words"]]], figures=False)
    if found["outdated"]:
        rows = [[folder["path"], bytes_text(folder["size_bytes"])] for folder in found["outdated"]]
        print_table("\nOf earlier versions: remove what no recipe of yours names", ["", ""], rows, figures=False)


def look(recipe: Path | None = None) -> dict[str, Any]:
    """What is here, without importing any of it."""
    from ftkit.errors import RecipeError
    from ftkit.files import cache_folder, size_bytes
    from ftkit.machine import device, llama_cpp, packages, torch_cuda
    from ftkit.model import dequantise
    from ftkit.recipe import load_recipe
    from ftkit.units import bytes_text

    try:
        devices = device.find_gpus()
        not_told = None if devices else device.unused_gpu()
    except RecipeError as error:  # GPUs that cannot be told apart, or slices of one
        devices, not_told = [], f"{error.message} {error.hint}."
    own = llama_cpp.named_llama_cpp(load_recipe(recipe).tools.llama_cpp_dir, recipe.parent) if recipe else None
    places = {"convert_hf_to_gguf.py": llama_cpp.find_converter(own), **{name: llama_cpp.find_program(name, own) for name in PROGRAMS}}
    entries: dict[str, Any] = {}
    for name, found in places.items():
        bring = "ftkit setup converter" if name.endswith(".py") else "ftkit setup llama.cpp"
        entries[name] = {"path": str(found.path) if found else None, "found_by": found.where if found else None, "bring": bring}
    one_build = of_one_build(places)
    entries["Ollama server"] = _ollama()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {**{name: metadata.version(name) for name in PACKAGES}, **training_stack()},
        "devices": [
            {
                "name": d.name,
                "total_bytes": d.total_bytes,
                "free_bytes": d.free_bytes,
                "memory": f"{bytes_text(d.free_bytes)} free of {bytes_text(d.total_bytes)}",
                "not_used": f"{doubt.message} {doubt.hint}" if (doubt := torch_cuda.doubt(d)) else None,
            }
            for d in devices or [device.processor()]
        ],
        "gpus_not_told": not_told,
        "tools": entries,
        "one_build": {"outcome": one_build.outcome, "words": one_build.detail},
        "cache_folder": str(cache_folder()),
        "outdated": [{"path": str(folder), "size_bytes": size_bytes(folder)} for folder in (*packages.outdated(), *dequantise.outdated())],
    }


def of_one_build(places: dict[str, Found | None]) -> Check:
    """Whether the converter and the programs that are here are of one llama.cpp; a checkout does not tell its version."""
    from ftkit.check import not_made, passed

    name = "converter and programs of one build"
    builds: dict[str, list[str]] = {}
    for tool, found in places.items():
        if found:
            builds.setdefault(found.build, []).append(tool)
    if not builds:
        return not_made(name, "none of them is here")
    if len(builds) == 1:
        return passed(name, f"yes: {next(iter(builds))}")
    return not_made(name, "not known: " + "; ".join(f"{', '.join(those)} from {build}" for build, those in builds.items()))


def _ollama() -> dict[str, str | None]:
    import os
    import urllib.request

    from ftkit.engines import ollama
    from ftkit.errors import RecipeError, ToolMissingError

    try:
        address = ollama.address()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/api/version", timeout=2):
            return {"path": address, "found_by": "OLLAMA_HOST" if os.environ.get("OLLAMA_HOST") else "default", "bring": None}
    except (RecipeError, ToolMissingError) as error:
        return {"path": None, "found_by": None, "bring": f"{error.message} {error.hint}"}
    except (OSError, ValueError):
        return {"path": None, "found_by": None, "bring": "https://ollama.com/download, then: ollama serve"}

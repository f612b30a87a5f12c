"""`ftkit env`: versions, GPU and tools, and the command that brings what is missing."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import click

from ftkit.cli.common import json_option, training_stack

PACKAGES = ("ftkit", "gguf", "xllamacpp", "ollama")  # and those of the extra `train`
PROGRAMS = ("llama-quantize", "llama-server", "llama-imatrix", "llama-perplexity")


@click.command(epilog="\b\nExamples:\n  ftkit env\n  ftkit env --json")
@json_option
def command(as_json: bool) -> None:
    """Show what ftkit has to work with. Nothing is installed or changed."""
    from ftkit.cli.console import print_json, print_table

    found = look()
    if as_json:
        print_json(found)
        return
    print_table(
        "Packages",
        ["", ""],
        [[name, version or "missing: pip install 'ftkit[train]'"] for name, version in found["packages"].items()],
        figures=False,
    )
    print_table("\nDevice", ["", ""], [[d["name"], d["memory"]] for d in found["devices"]], figures=False)
    rows = [
        [name, f"{entry['path']} ({entry['found_by']})" if entry["path"] else f"missing: {entry['bring']}"]
        for name, entry in found["tools"].items()
    ]
    print_table("\nTools", ["", ""], rows, figures=False)


def look() -> dict[str, Any]:
    """What is here, without importing any of it."""
    from ftkit import device, tools
    from ftkit.units import bytes_text

    devices = device.find_gpus() or [device.processor()]
    entries: dict[str, Any] = {}
    for name, bring in (("convert_hf_to_gguf.py", "ftkit setup converter"), *((program, "ftkit setup llama.cpp") for program in PROGRAMS)):
        found = tools.find_converter() if name.endswith(".py") else tools.find_program(name)
        entries[name] = {"path": str(found.path) if found else None, "found_by": found.where if found else None, "bring": bring}
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
            }
            for d in devices
        ],
        "tools": entries,
        "cache_folder": str(tools.cache_folder()),
    }


def _ollama() -> dict[str, str | None]:
    import os
    import urllib.request

    from ftkit import ollama
    from ftkit.errors import RecipeError

    try:
        address = ollama.address()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/api/version", timeout=2):
            return {"path": address, "found_by": "OLLAMA_HOST" if os.environ.get("OLLAMA_HOST") else "default", "bring": None}
    except RecipeError as error:
        return {"path": None, "found_by": None, "bring": f"{error.message} {error.hint}"}
    except (OSError, ValueError):
        return {"path": None, "found_by": None, "bring": "https://ollama.com/download, then: ollama serve"}

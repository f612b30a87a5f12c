"""Where the starter recipes are: at the root of a checkout, inside the package in a wheel."""

from __future__ import annotations

from pathlib import Path


def root() -> Path:
    """The folder that holds `templates/` and `Modelfile.j2`."""
    here = Path(__file__).parent
    return here / "_data" if (here / "_data").is_dir() else here.parent


def folder() -> Path:
    """The folder of starter recipes."""
    return root() / "templates"

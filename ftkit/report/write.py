"""Check a report's path before the work, and write it whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ftkit.errors import RecipeError
from ftkit.files import write_atomically

PLOT_SUFFIXES, PAGE_SUFFIXES = (".svg", ".png"), (".html", ".htm")


def check(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises RecipeError for a suffix that is not among these, and for a folder that is not there or cannot be written."""
    if path.suffix.lower() not in suffixes:
        raise RecipeError(f"{path} does not end in {' or '.join(suffixes)}.", f"name it {path.stem or 'plan'}{suffixes[0]}")
    if not path.parent.is_dir():
        raise RecipeError(f"There is no folder {path.parent}.", f"mkdir -p '{path.parent}'")
    try:
        with tempfile.TemporaryFile(dir=path.parent):  # nobody else says it of every disk
            pass
    except OSError as error:
        raise RecipeError(f"Cannot write into {path.parent}: {error.strerror or error}.", "choose another folder") from None


def write(path: Path, content: bytes) -> None:
    """Put a file in place as a whole. Raises RecipeError where that is refused."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RecipeError(f"Cannot write {path}: {error.strerror or error}.", "choose another folder or name") from None

"""Check a report's path before the work, and write it whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.errors import RecipeError
from ftkit.files import write_atomically
from ftkit.report.words import plain

if TYPE_CHECKING:
    from jinja2 import Environment

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


def page_environment(keep: str = "") -> Environment:
    """What renders a page: texts escaped, and without control characters but for those in `keep`."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: plain(value, keep) if isinstance(value, str) else value,
    )


def write(path: Path, content: bytes) -> None:
    """Put a file in place as a whole. Raises RecipeError where that is refused."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RecipeError(f"Cannot write {path}: {error.strerror or error}.", "choose another folder or name") from None

"""Where the starters are, and what each is for: at the root of a checkout, inside the package in a wheel."""

from __future__ import annotations

from pathlib import Path

DEFAULT_TASK = "c-vulnerabilities"


def root() -> Path:
    """The folder that holds `templates/`, `docs/recipe.md` and `Modelfile.j2`."""
    here = Path(__file__).parent
    return here / "_data" if (here / "_data").is_dir() else here.parent


def folder() -> Path:
    """The folder of starters: one each, with a recipe and its rows."""
    return root() / "templates"


def tasks() -> dict[str, str]:
    """Every starter's name → what goes in and what comes out, as the first line of its recipe says."""
    recipes = sorted(folder().glob("*/recipe.yaml"))
    return {path.parent.name: path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for path in recipes}

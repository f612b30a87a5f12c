"""`ftkit schema`: the recipe as a JSON schema, for editors; shapes from ftkit/recipe.py, words from docs/recipe.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

FILE = "recipe.schema.json"  # beside the recipe, so that it is found offline and wherever the folder goes
NAMED = f"# yaml-language-server: $schema={FILE}\n"  # the first line of a recipe, by which editors find it
DRAFT = "http://json-schema.org/draft-07/schema#"  # that every editor reads; nothing newer is used
ROW = re.compile(r"(?m)^\| `([a-z_.]+)` \| .+? \| (.+) \| (.+) \|$")  # of a table of keys: default, meaning, allowed


@click.command(epilog="\b\nExamples:\n  ftkit schema\n  ftkit schema --write recipe.schema.json")
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it there.")
def command(write: Path | None) -> None:
    """Print the recipe's JSON schema: every key with its type, default and meaning.

    `ftkit init` writes it beside the recipe, whose first line names it. For a recipe of your own, write it there and begin with:

    \b
    # yaml-language-server: $schema=recipe.schema.json
    """
    from ftkit.cli.console import say
    from ftkit.report import write as writing

    if write is None:
        click.echo(text(), nl=False)
        return
    writing.check(write, (".json",))
    writing.write(write, text().encode())
    say(f"Wrote {write}.")


def text() -> str:
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def schema() -> dict[str, Any]:
    """pydantic's, with what a recipe may hold beside it: groups without keys."""
    from ftkit.recipe import GROUPS, Recipe

    made = Recipe.model_json_schema()
    meanings = _meanings()
    for group in GROUPS:
        reference = made["properties"][group]["$ref"]
        part = made["$defs"][reference.rpartition("/")[2]]
        made["properties"][group] = {"anyOf": [{"$ref": reference}, {"type": "null"}], "description": part.pop("description", group)}
        _describe(part["properties"], f"{group}.", meanings)
    _describe({name: part for name, part in made["properties"].items() if name not in GROUPS}, "", meanings)
    return {"$schema": DRAFT, **made, "title": "A recipe of ftkit", "description": "What to train, on which data, how, and what to ship."}


def _describe(properties: dict[str, Any], prefix: str, meanings: dict[str, str]) -> None:
    for name, part in properties.items():
        part.pop("title", None)  # the name again, in capitals
        if prefix + name in meanings:
            part["description"] = meanings[prefix + name]


def _meanings() -> dict[str, str]:
    """Every key → what docs/recipe.md says of it; links as their text."""
    from ftkit.templates import root

    rows = ROW.findall((root() / "docs" / "recipe.md").read_text(encoding="utf-8"))
    return {key: re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", f"{meaning} – {allowed}") for key, meaning, allowed in rows}

"""The documents name what the code has: recipe keys with their defaults, commands, exit codes and rooms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftkit.cli import COMMANDS
from ftkit.data.read import read_rows
from ftkit.data.rows import CALLS
from ftkit.errors import FtkitError
from ftkit.line.line import LINE
from ftkit.recipe import Recipe

ROOT = Path(__file__).parent.parent
RECIPE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def keys(part: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the recipe, dotted, with its field; groups themselves left out."""
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def dotted(loaded: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of a recipe as read from YAML."""
    return set().union(
        *(dotted(value, f"{prefix}{key}.") if value and isinstance(value, dict) else {prefix + key} for key, value in loaded.items())
    )


def exit_codes(kind: type[FtkitError] = FtkitError) -> set[int]:
    return {kind.exit_code}.union(*map(exit_codes, kind.__subclasses__()))


def blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", RECIPE)


def rooms() -> list[str]:
    """Modules and packages directly under ftkit/."""
    found = [path.stem for path in (ROOT / "ftkit").glob("*.py") if not path.stem.startswith("__")]
    return sorted([*found, *(path.parent.name for path in (ROOT / "ftkit").glob("*/__init__.py"))])


@pytest.mark.parametrize(("key", "field"), list(keys()), ids=[key for key, _ in keys()])
def test_every_recipe_key_is_described_with_its_default(key: str, field: FieldInfo) -> None:
    row = re.search(rf"(?m)^\| `{re.escape(key)}` \| (.+?) \| .+ \| .+ \|$", RECIPE)
    assert row, f"docs/recipe.md has no row for {key}"
    if field.is_required():
        assert row[1] == "required"
    else:
        assert (None if row[1] == "–" else yaml.safe_load(row[1].strip("`"))) == field.default


def test_no_key_is_described_that_does_not_exist() -> None:
    groups = set(Recipe.model_fields)
    named = set(re.findall(rf"`((?:{'|'.join(groups)})\.\w+)", RECIPE))
    assert named <= {key for key, _ in keys()}


def test_the_whole_recipe_is_whole_and_holds_the_defaults() -> None:
    (text,) = blocks("yaml")
    loaded = yaml.safe_load(text)
    assert dotted(loaded) == {key for key, _ in keys()}
    assert Recipe.model_validate(loaded) == Recipe(model=loaded["model"])


def test_every_dataset_example_is_read(tmp_path: Path) -> None:
    examples = blocks("json")
    assert [set(json.loads(text)) for text in examples] == [
        {"messages"},
        {"prompt", "completion"},
        {"question", "answer"},
        {"instruction", "input", "output"},
        {"instruction", "context", "response"},
        {"conversations"},
        {"text", "label"},
        {"chat"},
        {"prompt", "chosen", "rejected"},
        {"text"},
        {"tools", "messages"},
        {"query", "tools", "answers"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(json.loads(text)) + "\n" for text in examples), encoding="utf-8")
    assert {row.answer for row in read_rows(path) if not row.is_text and CALLS not in row.messages[-1]} == {"It is 4."}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stands_in_the_documents(command: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    assert any(re.search(rf"\bftkit {command}\b", text) for text in texts)


def test_every_exit_code_stands_in_the_table() -> None:
    table = RECIPE.partition("## Exit codes")[2]
    assert {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", table)} == {0, *exit_codes()}


def test_the_picture_of_the_line_is_the_line() -> None:
    picture = ARCHITECTURE[ARCHITECTURE.index("model ──┐") :].split("\n\n")[0]
    drawn = [word for word in re.findall(r"[a-z]+", picture.replace("data ", "")) if word in {step.name for step in LINE}]
    assert drawn[: len(LINE)] == [step.name for step in LINE]


@pytest.mark.parametrize("room", rooms())
def test_every_room_stands_in_the_architecture(room: str) -> None:
    assert re.search(rf"(?m)^\| `{room}` \| .+ \| .+ \|$", ARCHITECTURE)

"""`ftkit schema`: it takes what ftkit takes, marks what ftkit refuses, and says of each key what the document says."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_docs
import yaml
from click.testing import Result

from ftkit import templates
from ftkit.cli.schema import FILE, schema

Ftkit = Callable[..., Result]

KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict, "null": type(None)}
WORDS = {"$schema", "$defs", "title", "description", "default"}  # which allow and forbid nothing


def faults(part: dict[str, Any], value: Any, whole: dict[str, Any], where: str = "") -> Iterator[str]:
    """What the schema finds wrong with a value: each keyword that it uses, as JSON Schema's draft 7 reads it. Others fail."""
    for word, wanted in part.items():
        match word:
            case "$ref":
                assert set(part) == {"$ref"}  # draft 7 reads nothing beside it
                yield from faults(whole["$defs"][wanted.removeprefix("#/$defs/")], value, whole, where)
            case "anyOf":
                if all(any(faults(each, value, whole, where)) for each in wanted):
                    found = [list(faults(each, value, whole, where)) for each in wanted if each != {"type": "null"}]
                    yield from found[0] if len(found) == 1 else [f"{where}: none of them"]
            case "type":
                is_bool = isinstance(value, bool)
                if not isinstance(value, KINDS[wanted]) or (is_bool and wanted in ("integer", "number")):  # type: ignore[arg-type]
                    yield f"{where}: no {wanted}"
            case "properties":
                for name, each in wanted.items():
                    if isinstance(value, dict) and name in value:
                        yield from faults(each, value[name], whole, f"{where}.{name}".lstrip("."))
            case "additionalProperties":
                for name in value if isinstance(value, dict) else ():
                    if wanted is False and name not in part["properties"]:
                        yield f"{where}: unknown {name}"
                    elif isinstance(wanted, dict):
                        yield from faults(wanted, value[name], whole, f"{where}.{name}")
            case "required":
                yield from (f"{where}: no {name}" for name in wanted if isinstance(value, dict) and name not in value)
            case "enum":
                if value not in wanted:
                    yield f"{where}: not in the list"
            case "items":
                for each in value if isinstance(value, list) else ():
                    yield from faults(wanted, each, whole, where)
            case "minItems":
                if isinstance(value, list) and len(value) < wanted:
                    yield f"{where}: too few"
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                good = {"minimum": "__ge__", "maximum": "__le__", "exclusiveMinimum": "__gt__", "exclusiveMaximum": "__lt__"}[word]
                if isinstance(value, (int, float)) and not getattr(float(value), good)(float(wanted)):
                    yield f"{where}: {word}"
            case _:
                assert word in WORDS, f"a keyword that this test does not know: {word}"


def found(text: str) -> list[str]:
    return list(faults(schema(), yaml.safe_load(text), schema()))


@pytest.mark.parametrize(
    "text",
    [
        "model: org/name",
        "model: a\ntraining:\nlora: ~",  # groups without keys
        "model: a\nbudget: {vram: 24}",
        "model: a\nbudget: {vram: 24 GiB, gpu: RTX 4090}",
        "model: a\nevaluate: {by: labels, labels: [1, 2]}",
        "model: a\ndata: {train: [a.jsonl, b.jsonl], columns: {prompt: q}, test: null}",
        "model: a\nlora: {target_modules: [q_proj], lora_alpha: 8}",
        "model: a\nship: {quantization: smallest}",
        *(path.read_text(encoding="utf-8") for path in sorted(templates.folder().glob("*/recipe.yaml"))),
        *test_docs.blocks("yaml"),
    ],
)
def test_it_takes_what_a_recipe_may_hold(text: str) -> None:
    assert found(text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data: {}", ": no model"),
        ("model: a\ntrainning: {}", ": unknown trainning"),
        ("model: a\ntraining: {max_lenght: 8}", "training: unknown max_lenght"),
        ("model: a\ntraining: {max_length: 7}", "training.max_length: minimum"),
        ("model: a\ntraining: {learning_rate: 1}", "training.learning_rate: exclusiveMaximum"),
        ("model: a\ntraining: {method: qlra}", "training.method: not in the list"),
        ("model: a\nlora: {target_modules: 5}", "lora.target_modules: none of them"),
        ("model: a\ndata: {train: []}", "data.train: none of them"),
        ("model: a\nship: {quantization: Q4KM}", "ship.quantization: not in the list"),
        ("model: 5", "model: no string"),
        ("model: a\ntraining: 5", "training: no object"),
    ],
)
def test_it_marks_what_ftkit_refuses(text: str, fault: str) -> None:
    assert found(text) == [fault]


def test_every_key_says_what_the_document_says() -> None:
    made = schema()
    every = dict(test_docs.keys())
    assert len(every) > 50
    for key in every:
        group, _, name = key.rpartition(".")
        part = made["properties"][group]["anyOf"][0]["$ref"].rpartition("/")[2] if group else ""
        described = (made["$defs"][part] if group else made)["properties"][name]["description"]
        row = re.search(rf"(?m)^\| `{re.escape(key)}` \| .+? \| (.+) \| .+ \|$", test_docs.RECIPE)
        assert row, key
        assert re.sub(r"\]\([^)]*\)", "", row[1]).replace("[", "") == described.partition(" – ")[0].replace("[", ""), key


def test_it_is_printed_or_written(ftkit: Ftkit, tmp_path: Path) -> None:
    printed = ftkit("schema")
    assert json.loads(printed.stdout) == schema()
    assert ftkit("schema", "--write", tmp_path / FILE).exit_code == 0
    assert (tmp_path / FILE).read_text(encoding="utf-8") == printed.stdout


def test_an_installed_ftkit_has_what_it_says(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(templates.root())).build(directory=str(tmp_path), versions=["standard"])
    held = set(zipfile.ZipFile(wheel).namelist())
    starters = {f"templates/{task}/{name}" for task in templates.tasks() for name in ("recipe.yaml", "train.jsonl", "test.jsonl")}
    assert {f"ftkit/_data/{name}" for name in starters | {"docs/recipe.md", "templates/colab.ipynb", "Modelfile.j2"}} <= held


def test_a_folder_that_is_not_there(ftkit: Ftkit, tmp_path: Path) -> None:
    refused = ftkit("schema", "--write", tmp_path / "none" / FILE)
    assert refused.exit_code == 2
    assert "Hint: mkdir" in refused.stderr

"""The starter dataset is what its generator writes, is large and varied enough, and holds nothing out that it trains on."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from ftkit import templates
from ftkit.data.read import read_rows
from ftkit.data.rows import Row

FOLDER = templates.folder() / "c-vulnerabilities"
SPLITS = ("train", "test")
ANSWER = re.compile(r"(\S[^\n]*) – [^\n]+\n(SAFE|VULNERABLE — (CWE-\d+))")  # the deciding line and why, then the verdict


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec
    assert spec.loader
    module = sys.modules["generate"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return {split: read_rows(FOLDER / f"{split}.jsonl") for split in SPLITS}


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_generator_writes_the_committed_bytes(tmp_path: Path, hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path], check=True, env=environment)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_there_are_enough_rows(splits: dict[str, list[Row]]) -> None:
    assert len(splits["train"]) >= 600
    assert len(splits["test"]) >= 120


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_a_verdict_and_a_reason(splits: dict[str, list[Row]], split: str) -> None:
    assert [row.line for row in splits[split] if not ANSWER.fullmatch(row.answer)] == []


def verdicts(rows: list[Row]) -> Counter[str]:
    return Counter(row.answer.split("\n")[-1] for row in rows)


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_eight_classes_and_no_verdict_that_always_wins(splits: dict[str, list[Row]], split: str) -> None:
    counted = verdicts(splits[split])
    assert len([verdict for verdict in counted if verdict.startswith("VULNERABLE — CWE-")]) >= 8
    assert 0.2 < counted["SAFE"] / counted.total() < 0.6


def test_what_is_asked_was_trained(splits: dict[str, list[Row]]) -> None:
    assert verdicts(splits["test"]).keys() <= verdicts(splits["train"]).keys()


@pytest.mark.parametrize("split", SPLITS)
def test_the_quoted_line_stands_in_the_function(split: str, splits: dict[str, list[Row]]) -> None:
    assert [row.line for row in splits[split] if row.answer.rpartition(" – ")[0] not in code_of(row)] == []


def code_of(row: Row) -> str:
    return row.question[-1]["content"].split("\n\n", 1)[1]


def test_no_shape_comes_twice_within_or_across_the_files(splits: dict[str, list[Row]], generator: ModuleType) -> None:
    shapes = Counter(generator.shape(code_of(row)) for rows in splits.values() for row in rows)
    assert [shape for shape, times in shapes.items() if times > 1] == []


def test_every_place_of_an_idiom_is_filled_and_every_brace_closed(splits: dict[str, list[Row]]) -> None:
    for rows in splits.values():
        for row in rows:
            assert not re.search(r"[⟨¦⟩]|\{\w+\}", row.answer + code_of(row))
            assert code_of(row).count("{") == code_of(row).count("}")


COPY = 'void copy_name(char *src) {\n  char buf[16];\n  strcpy(buf, src);\n  puts("done");\n}'


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (COPY.replace("buf", "out").replace("src", "in").replace("copy_name", "load"), True),
        (COPY.replace("16", "0x40"), True),
        (COPY.replace('"done"', '"a \\" b"'), True),
        (COPY.replace("\n  ", " "), True),
        (COPY.replace("strcpy(buf, src)", "strcpy(src, buf)"), False),
        (COPY.replace("char buf[16]", "int buf[16]"), False),
        (COPY.replace("strcpy(buf, src);", "if (!src) strcpy(buf, src);"), False),
    ],
)
def test_a_shape_is_blind_to_names_numbers_and_strings_alone(generator: ModuleType, other: str, same: bool) -> None:
    assert other != COPY
    assert (generator.shape(other) == generator.shape(COPY)) is same

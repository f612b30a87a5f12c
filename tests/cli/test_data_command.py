"""`ftkit data` as it is typed: what was recognised, what is odd, which tokens are learnt; as text, JSON and page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.data.read import read_rows, split_validation

pytestmark = pytest.mark.torch
Ftkit = Callable[..., Result]
WriteRows = Callable[[Path, list[Any]], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def pair(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **more}


def recipe(here: Path, model: Path, **data: Any) -> Path:
    path = here / "recipe.yaml"
    text = {"model": str(model), "data": {"train": "train.jsonl", "validation": "validation.jsonl", **data}, "training": {"max_length": 64}}
    path.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    return path


def test_a_model_and_a_file_are_enough(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "rows.jsonl", [pair(f"{n} + 1?", f"{n + 1}", system="Be brief.") for n in range(20)])
    shown = ftkit("data", "--model", model, "--data", "rows.jsonl", "--show", "1")
    assert shown.exit_code == 0, shown.output
    assert "20 examples to train and validate" in shown.stdout
    assert "prompt and completion" in shown.stdout
    assert "Nothing comes twice, contradicts or is cut." in shown.stdout
    assert shown.stdout.count("rows.jsonl, line ") == 1
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]  # nothing is left beside


def test_each_token_is_shown_with_what_is_learnt(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    rows = [{"messages": [
        {"role": "user", "content": "ä?"}, {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b?"}, {"role": "assistant", "content": "yes"},
    ]}] * 2  # fmt: skip
    write_rows(here / "rows.jsonl", rows)
    found = json.loads(ftkit("data", "--model", model, "--data", "rows.jsonl", "--json").stdout)
    tokens = found["rows"][0]["tokens"]
    assert {tuple(token) for token in tokens} == {("id", "text", "learnt")}
    assert "".join(token["text"] for token in tokens if token["learnt"]) == "yes<|im_end|>"
    before = "<|im_start|>user\nä?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(token["text"] for token in tokens if not token["learnt"]) == before
    assert found["parts"]["train"]["unlearnt"] == 1
    shown = ftkit("data", "--model", model, "--data", "rows.jsonl", "--show", "1").stdout
    assert "⟦y│e│s│<|im_end|>⟧" in shown  # without colour too
    assert shown.count("⟦") == 1


def test_what_a_person_may_not_have_meant_is_found(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    train = [pair("a", "1"), pair("b", "2"), pair("a", "1"), pair(" b ", "3"), pair("c", "x" * 100), pair("d" * 100, "4"), pair("e", "1")]
    write_rows(here / "train.jsonl", train)
    write_rows(here / "validation.jsonl", [pair("a", "1"), pair("e", "5"), pair("new", "6")])
    write_rows(here / "test.jsonl", [pair("b", "2")])
    found = json.loads(ftkit("data", recipe(here, model, test="test.jsonl"), "--json").stdout)
    findings = {
        finding["what"]: (finding["count"], [place.rpartition(" ")[2] for place in finding["places"]]) for finding in found["findings"]
    }
    assert findings == {
        "rows that come twice": (1, ["3"]),
        "questions that come again with another answer": (1, ["4"]),
        "validation rows that are trained on too": (1, ["1"]),
        "validation questions that are trained on with another answer": (1, ["2"]),
        "test rows that are trained on too": (1, ["1"]),
        "rows cut at training.max_length, whose end is not learnt": (1, ["5"]),
        "rows left out: their answer lies beyond training.max_length": (1, ["6"]),
    }
    shown = ftkit("data", here / "recipe.yaml").stdout
    assert f"1 rows that come twice: {here / 'train.jsonl'}, line 3\n" in shown


def test_the_figures_are_those_of_the_rows(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "rows.jsonl", rows := [pair("q", "a" * n) for n in (1, 9, 30, 30, 30)])
    found = json.loads(ftkit("data", "--model", model, "--data", "rows.jsonl", "--json", "--show", "0").stdout)
    around = len("?user\nq??\n?assistant\n?".replace("??", "?"))  # a special token is one token, as is a byte
    lengths = [around + n for n in (1, 9, 30, 30, 30)]
    assert found["tokens"]["total"] == sum(lengths)
    assert found["learnt_tokens"] == sum(n + 1 for n in (1, 9, 30, 30, 30))
    assert sum(entry["examples"] for entry in found["histogram"]) == len(rows)
    assert found["rows"] == []
    train, validation = split_validation(read_rows(here / "rows.jsonl"), 0.1, 42)
    assert (found["parts"]["train"]["rows"], found["parts"]["validation"]["rows"]) == (len(train), len(validation))


def test_the_page_holds_the_rows_and_no_markup_of_theirs(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "rows.jsonl", [pair("<script>alert(1)</script>", f"</p>{n}") for n in range(4)])
    assert ftkit("data", "--model", model, "--data", "rows.jsonl", "--html", "data.html").exit_code == 0
    page = (here / "data.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count('class="row"') == 3
    assert 'class="learnt"' in page


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "has no rows"),
        ('{"prompt": "x", "completion": "y"}\n{"text": ""}\n', "rows.jsonl, line 2: `text` is empty"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [1]}]}',
            "message 2: 1 calls no function by name",
        ),
        ('{"prompt": "x", "completion": "y"}', "One row cannot be split"),
    ],
)
def test_bad_rows_are_said_before_anything(here: Path, model: Path, ftkit: Ftkit, content: str, fault: str) -> None:
    (here / "rows.jsonl").write_text(content, encoding="utf-8")
    shown = ftkit("data", "--model", model, "--data", "rows.jsonl")
    assert shown.exit_code == 1
    assert fault in shown.stderr


def test_a_config_has_no_tokenizer(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "rows.jsonl", [pair("a", "b")] * 3)
    shown = ftkit("data", "--model", model / "config.json", "--data", "rows.jsonl")
    assert shown.exit_code == 1
    assert "no tokenizer" in shown.stderr


def test_rows_that_are_all_too_long_are_said(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "rows.jsonl", [pair(f"{n}" * 100, "a") for n in range(8)])
    shown = ftkit("data", "--model", model, "--data", "rows.jsonl", "--set", "training.max_length=64")
    assert shown.exit_code == 0, shown.output
    assert "8 rows left out: their answer lies beyond training.max_length" in shown.stdout


def test_several_files_follow_one_another(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "a.jsonl", [pair("a", "1"), pair("b", "2")])
    (here / "b.csv").write_text("prompt,completion\nc,3\na,1\n", encoding="utf-8")
    write_rows(here / "validation.jsonl", [pair("d", "4")])
    found = json.loads(ftkit("data", recipe(here, model, train=["a.jsonl", "b.csv"]), "--json").stdout)
    assert found["parts"]["train"]["rows"] == 4
    (twice,) = found["findings"]
    assert twice["places"] == [f"{here / 'b.csv'}, line 3"]
    refused = ftkit("data", recipe(here, model, train=["a.jsonl", "c.csv"]))
    assert refused.exit_code == 1
    assert f"There is no dataset at {here / 'c.csv'}" in refused.stderr
    assert ftkit("data", recipe(here, model, train=[])).exit_code == 2


def test_what_was_not_read_is_listed(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(
        here / "train.jsonl", [{"text": f"row {n}", "label": n % 2, "source": "web", "score": None} for n in range(8)] + [{"text": "x"}, 7]
    )
    write_rows(here / "validation.jsonl", [{"text": "row", "label": 1}])
    asked = recipe(here, model)
    refused = ftkit("data", asked)
    assert refused.exit_code == 1
    assert "train.jsonl, line 10: a row is an object, not int" in refused.stderr
    assert "--set data.skip_faulty=true" in refused.stderr
    shown = ftkit("data", asked, "--set", "data.skip_faulty=true", "--html", "data.html")
    assert shown.exit_code == 0, shown.output
    assert "Columns that are not read: source." in shown.stdout  # one that is empty says nothing
    assert "1 rows that cannot be read, left out: " in shown.stdout
    assert "Columns of train that are not read: source." in (here / "data.html").read_text(encoding="utf-8")


def test_classes_without_names_are_told(here: Path, model: Path, ftkit: Ftkit, write_rows: WriteRows) -> None:
    write_rows(here / "train.jsonl", [{"text": f"row {n}", "label": n % 2} for n in range(8)])
    write_rows(here / "validation.jsonl", [{"text": "row", "label": 1}])
    told = "8 answers that are numbers alone: data.labels gives classes names"
    assert told in ftkit("data", recipe(here, model)).stdout
    assert told not in ftkit("data", recipe(here, model, labels=["ham", "spam"])).stdout

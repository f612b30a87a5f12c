"""Every starter that `ftkit init --task` offers: written by its generator, nothing odd in it, and taught what it is asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import llama_cpp
import pytest
import tiny
from click.testing import Result

from ftkit import templates
from ftkit.data.read import read_rows
from ftkit.data.rows import CALLS, Row
from ftkit.data.turns import expected
from ftkit.proof.score import score
from ftkit.recipe import Recipe, load_recipe

TASKS = list(templates.tasks())
MADE = [task for task in TASKS if task != templates.DEFAULT_TASK]  # test_dataset.py looks at that one's rows
SPLITS = ("train", "test")
MOST_BYTES = 350_000  # of one starter
FAMILY = families.FAMILIES[0]  # whose template writes tools


def rows_of(task: str) -> dict[str, list[Row]]:
    return {split: list(read_rows(templates.folder() / task / f"{split}.jsonl")) for split in SPLITS}


def recipe_of(task: str) -> Recipe:
    return load_recipe(templates.folder() / task / "recipe.yaml")


@pytest.fixture(scope="module")
def real_tokens(made: Callable[..., Path]) -> Path:
    """A model with a family's own vocabulary."""
    return made(FAMILY)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    families.make_tokenizer(FAMILY, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with that family's template. Its tokens are bytes."""
    folder = tiny.make_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    template = (llama_cpp.models() / "templates" / f"{FAMILY.template}.jinja").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("task", MADE)
def test_the_generator_writes_the_committed_bytes(task: str, tmp_path: Path) -> None:
    folder = templates.folder() / task
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-S", folder / "generate.py", tmp_path], check=True, env=environment)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (folder / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_there_are_enough_rows_and_not_too_many_bytes(task: str) -> None:
    rows = rows_of(task)
    assert len(rows["train"]) >= 300
    assert len(rows["test"]) >= 60
    assert sum(path.stat().st_size for path in (templates.folder() / task).iterdir() if path.is_file()) < MOST_BYTES


@pytest.mark.parametrize("task", MADE)
def test_every_place_is_filled_and_the_text_is_tidy(task: str) -> None:
    """Nothing of the generator's own signs is left, and `a` and `an` suit what was filled in."""
    for rows in rows_of(task).values():
        for message in (message for row in rows for message in row.messages):
            assert not re.search(r"[⟨¦⟩]|\{\w+\}|\ba [aeio]|\ban (?!hour)[^aeiou0-9]", message["content"]), message["content"]
            assert message["content"] == message["content"].strip()


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_trained_and_held_out(task: str) -> None:
    asked = {split: [json.dumps(row.question) for row in rows] for split, rows in rows_of(task).items()}
    assert not set(asked["train"]) & set(asked["test"])
    assert max(Counter(asked["test"]).values()) == 1


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("task", TASKS)
def test_ftkit_data_has_nothing_to_complain_of(task: str, real_tokens: Path, ftkit: Callable[..., Result]) -> None:
    shown = ftkit("data", templates.folder() / task, "--model", real_tokens, "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["findings"] == []


@pytest.mark.torch
@pytest.mark.parametrize("task", TASKS)
def test_the_expected_answers_are_all_right_by_the_recipes_own_rule_and_short_enough(task: str, tokenizer: Any) -> None:
    recipe, rows = recipe_of(task), rows_of(task)["test"]
    answers = [expected(tokenizer, row) for row in rows]
    assert score(answers, answers, recipe.evaluate).right == len(rows)
    others = [*answers[1:], answers[0]]
    assert score(answers, others, recipe.evaluate).right < len(rows) / 2  # one answer is not as right as another
    assert max(len(tokenizer(answer)["input_ids"]) for answer in answers) < recipe.ship.max_new_tokens


def test_a_departments_labels_are_those_of_the_rule() -> None:
    labels = recipe_of("classify").evaluate.labels
    for rows in rows_of("classify").values():
        counted = Counter(row.answer for row in rows)
        assert counted.keys() == set(labels or ())
        assert max(counted.values()) - min(counted.values()) <= 1


def test_what_an_invoice_says_stands_in_it() -> None:
    for rows in rows_of("extract").values():
        for row in rows:
            said, document = json.loads(row.answer), row.question[-1]["content"].partition("\n\n")[2]
            assert said["seller"] in document
            assert said["invoice_number"] in document
            assert f"{said['total']:,.2f}" in document
            for date in filter(None, (said["date"], said["due_date"])):
                assert date[:4] in document
            if said["due_date"] is None:
                assert not re.search(r"(?i)\bdue:|due on|by \d|later than", document), document
    sellers = [{json.loads(row.answer)["seller"] for row in rows} for rows in rows_of("extract").values()]
    assert not sellers[0] & sellers[1]


def test_no_call_to_the_house_is_trained_and_held_out() -> None:
    calls = Counter(row.answer for rows in rows_of("json").values() for row in rows)
    assert max(calls.values()) == 1
    assert {json.loads(call)["action"] for call in calls} >= {"light", "alarm", "timer", "shopping", "reminder"}


def test_tools_are_called_with_what_they_take() -> None:
    kinds = {"string": str, "integer": int}
    ends: Counter[str] = Counter()
    for rows in rows_of("tools").values():
        for row in rows:
            given = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.messages[0]["tools"]}
            for call in (call["function"] for message in row.messages for call in message.get(CALLS, ())):
                parameters = given[call["name"]]
                assert list(call["arguments"]) == parameters["required"]
                assert all(type(value) is kinds[parameters["properties"][name]["type"]] for name, value in call["arguments"].items())
            ends[f"{len(row.messages)} messages, {'a call' if CALLS in row.messages[-1] else 'an answer'}"] += 1
    assert ends.keys() == {"2 messages, a call", "2 messages, an answer", "4 messages, an answer"}
    assert min(ends.values()) > 40


def test_the_help_desk_says_one_thing_to_one_question() -> None:
    """A held-out conversation ends with words that training never saw, or asks on after such."""
    said: dict[str, set[str]] = {}
    for rows in rows_of("chat").values():
        for row in rows:
            for before, message in zip(row.messages, row.messages[1:], strict=False):
                if message["role"] == "assistant":
                    said.setdefault(
                        re.sub(r"^(Hello! |Hi, a question: |Good evening\. |One more thing: )", "", before["content"]), set()
                    ).add(message["content"])
    assert {question: answers for question, answers in said.items() if len(answers) > 1} == {}
    trained = {message["content"] for row in rows_of("chat")["train"] for message in row.messages if message["role"] == "user"}
    for row in rows_of("chat")["test"]:
        assert any(message["content"] not in trained for message in row.question[-3:] if message["role"] == "user")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("task", TASKS)
def test_every_starter_trains(task: str, model: Path, tmp_path: Path, ftkit: Callable[..., Result]) -> None:
    """Two steps of a few of its rows, which are learnt to where an answer ends."""
    folder = tmp_path / task
    assert ftkit("init", folder, "--task", task, "--model", model).exit_code == 0
    for split, rows in (("train", 12), ("test", 2)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    few = ("training.max_steps=2", "training.effective_batch_size=2", "training.max_length=2048", "lora.r=2")
    settings = [word for setting in few for word in ("--set", setting)]
    shown = json.loads(ftkit("data", folder, *settings, "--show", "1", "--json").stdout)["rows"][0]["tokens"]
    assert "".join(token["text"] for token in shown if token["learnt"]).endswith(FAMILY.ends)
    assert ftkit("plan", folder, *settings, "--gpu", "RTX 3060").exit_code == 0  # a card is traced otherwise than this machine
    trained = ftkit("train", folder, *settings, "--json")
    assert trained.exit_code == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 2

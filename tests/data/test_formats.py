"""Data as people have it: every form is read for what it means, and what is not read is refused by name."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ftkit.data.formats import CHAT, FORMS, PREFERENCE, UNREAD, UNREAD_IN_MESSAGES, UNREAD_KEY, conversation_of
from ftkit.data.mask import tokenise
from ftkit.data.read import read_rows
from ftkit.data.rows import IGNORED, Row
from ftkit.errors import DataError

ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
REJECTED = {"role": "assistant", "content": "B"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(*contents: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents))


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"question": "Q", "answer": "A"}, said("Q", "A")),
        ({"instruction": "Add.", "context": "2 and 2", "response": "4", "category": "qa"}, said("Add.\n\n2 and 2", "4")),
        ({"instruction": "Spam?", "output": 1}, said("Spam?", "1")),
        ({"instruction": "Spam?", "output": True}, said("Spam?", "true")),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, (ASKED, ANSWERED)),
        ({"Question": "Q", "Answer": "A", "ID": 1}, (ASKED, ANSWERED)),
        ({"messages": json.dumps([ASKED, ANSWERED])}, (ASKED, ANSWERED)),
        ({"prompt": [SYSTEM, ASKED], "completion": "A"}, (SYSTEM, ASKED, ANSWERED)),
        ({"messages": [{"role": "developer", "content": "Be brief."}, ASKED, ANSWERED]}, (SYSTEM, ASKED, ANSWERED)),
        ({"messages": [{"role": "User", "content": "Q"}, {"role": "model", "content": "A"}]}, (ASKED, ANSWERED)),
        ({"conversations": [{"from": "user", "value": "Q"}, {"from": "ai", "value": "A"}]}, (ASKED, ANSWERED)),
        (
            {"system": "Be brief.", "conversations": [{"from": "human", "value": "Q"}, {"from": "bot", "value": "A"}]},
            (SYSTEM, ASKED, ANSWERED),
        ),
        ({"system": "", "prompt": "Q", "completion": "A"}, (ASKED, ANSWERED)),
        (
            {"instruction": "Q2", "input": "", "output": "A2", "system": "Be brief.", "history": [["Q", "A"]]},
            (SYSTEM, *said("Q", "A", "Q2", "A2")),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "2"}]}, ANSWERED]},
            said("Q2", "A"),
        ),
        (
            {"messages": [ASKED, {**ANSWERED, "reasoning_content": "R"}], "tools": None, "images": []},
            (ASKED, {**ANSWERED, "reasoning_content": "R"}),
        ),
        ({"messages": [ASKED, {**ANSWERED, "reasoning": "R"}]}, (ASKED, {**ANSWERED, "reasoning_content": "R"})),
    ],
)
def test_a_form_becomes_messages(value: dict[str, Any], messages: tuple[dict[str, str], ...]) -> None:
    read = conversation_of(value)
    assert read.messages == messages
    assert read.unlearnt == frozenset()


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("loss", False, None)])
def test_an_answer_that_is_not_to_be_learnt_is_not(key: str, no: Any, yes: Any) -> None:
    draft, good = {"from": "gpt", "value": "draft", key: no}, {"from": "gpt", "value": "good", key: yes}
    asked = [{"from": "human", "value": text, key: no} for text in ("Q1", "Q2", "Q3")]
    read = conversation_of({"conversations": [asked[0], draft, asked[1], good, asked[2], draft]})
    assert read.messages == said("Q1", "draft", "Q2", "good")  # what follows the last learnt answer teaches nothing
    assert read.unlearnt == {1}
    with pytest.raises(ValueError, match="no answer is learnt"):
        conversation_of({"conversations": [asked[0], draft]})


def test_only_the_learnt_answers_have_labels() -> None:
    from test_turns import Words

    model: Any = Words(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    read = conversation_of(
        {"messages": [ASKED, {"role": "assistant", "content": "draft", "weight": 0}, ASKED, {"role": "assistant", "content": "good"}]}
    )
    (example,) = tokenise(model, [Row(read.messages, 1, unlearnt=read.unlearnt)])
    assert model.decode([label for label in example.labels if label != IGNORED]) == "good<|end|>"
    assert model.decode(example.input_ids) == "<|user|>Q<|end|><|assistant|>draft<|end|><|user|>Q<|end|><|assistant|>good<|end|>"


def test_a_greeting_that_nobody_asked_for_is_not_learnt() -> None:
    read = conversation_of(
        {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    )
    assert read.messages == ({"role": "assistant", "content": "Hello!"}, ASKED, ANSWERED)
    assert read.unlearnt == {0}


def test_of_messages_in_a_prompt_none_is_learnt() -> None:
    read = conversation_of({"prompt": [*said("Q1", "A1"), ASKED], "completion": [ANSWERED]})
    assert read.messages == said("Q1", "A1", "Q", "A")
    assert read.unlearnt == {1}


@pytest.mark.parametrize("key", sorted(UNREAD_IN_MESSAGES))
def test_a_key_that_changes_the_meaning_is_refused_by_name(key: str) -> None:
    if key in UNREAD:
        with pytest.raises(ValueError, match=f"`{key}` is not read"):
            conversation_of({"messages": [ASKED, ANSWERED], key: ["x"]})
    else:  # said of a whole row it is its own affair
        assert conversation_of({"messages": [ASKED, ANSWERED], key: "x"}).messages == (ASKED, ANSWERED)
    assert conversation_of({"messages": [{**ASKED, key: "[]"}, ANSWERED], key: "[]"}).messages == (ASKED, ANSWERED)
    with pytest.raises(ValueError, match=f"message 1: `{key}` is not read"):
        conversation_of({"messages": [{**ASKED, key: ["x"]}, ANSWERED]})


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "message 2: `weight` is 0.5; an answer is learnt"),
        ({"messages": [ASKED, {**ANSWERED, "train": "no"}]}, "message 2: `train` is 'no'"),
        ({"messages": [ASKED, ANSWERED], "weight": 0.5}, "`weight` of a whole row is not read"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}, ANSWERED]},
            "message 2: {} calls no function by name",
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}, ASKED, ANSWERED]}, "no answer: the message 2 is empty"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "observation", "value": "x"}]}, "message 2 is what a tool gave"),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "`history` is not a list of"),
        ({"prompt": "Q", "completion": "A", "system": SYSTEM}, "message 1 has no text"),
        ({"system": "Be brief.", "messages": [SYSTEM, ASKED, ANSWERED]}, "two system messages, one after the other"),
        ({"prompt": "Q", "completion": float("nan")}, "message 2 has no text"),
        ({"prompt": ["a", "b"], "completion": ["1", "2"]}, "`prompt` is a list of 2; a row is one question"),
        ({"prompt": "Q", "completion": "<think>\nR\n</think>\n\n"}, "no answer: the last message is empty"),
        ({"messages": "[{"}, "`messages` is a text that is not JSON"),
        ({"prompt": "Q", "chosen": "A"}, "`chosen` is not read: a preference has `rejected` beside it"),
        ({"chosen": "A", "rejected": "B"}, "no prompt: `chosen` holds the answer alone"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A "}, "`chosen` and `rejected` are the same answer"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "no answer: `rejected` is empty"),
        ({"prompt": "Q", "chosen": "", "rejected": "B"}, "no answer: the last message is empty"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [SYSTEM, ASKED, REJECTED]}, "do not answer the same prompt: message 1 is another"),
        (
            {"chosen": [ASKED, ANSWERED, ASKED, ANSWERED], "rejected": [ASKED, REJECTED, ASKED, REJECTED]},
            "do not answer the same prompt: message 2 is another",
        ),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ASKED]}, "the last message of `rejected` is the user's"),
        ({"prompt": "P", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, REJECTED]}, "`prompt` is not what `chosen` answers"),
    ],
)
def test_what_is_not_read_is_said(value: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        conversation_of(value)


CHOICE = {"chosen": "A", "rejected": "B"}
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "question": {"question": "Q", "chosen": "A", "rejected": "B"},
    "messages": {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [REJECTED]},
    "whole conversations": {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, REJECTED]},
    "with the prompt once more": {"prompt": "Q", "messages": [ASKED, ANSWERED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, REJECTED]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_preferences_are_read_in_each_of_their_forms(row: dict[str, Any]) -> None:
    read = conversation_of(row)
    assert (read.form, read.messages, read.rejected, read.unlearnt) == (PREFERENCE, (ASKED, ANSWERED), REJECTED, frozenset())


def test_of_a_preference_the_last_answer_alone_is_compared() -> None:
    read = conversation_of({"system": "Be brief.", "history": [["Q1", "A1"]], "instruction": "Add.", "input": "1 and 1", **CHOICE})
    assert [message["content"] for message in read.messages] == ["Be brief.", "Q1", "A1", "Add.\n\n1 and 1", "A"]
    assert read.unlearnt == {2}


def test_a_chosen_answer_is_learnt_alone_where_columns_say_so() -> None:
    read = conversation_of({"prompt": "Q", **CHOICE}, {"completion": "chosen"})
    assert (read.form, read.messages, read.rejected) == ("prompt and completion", (ASKED, ANSWERED), None)
    read = conversation_of(PAIRS["whole conversations"], {"messages": "chosen"})
    assert (read.form, read.messages) == ("messages", (ASKED, ANSWERED))
    assert conversation_of({"q": "Q", "good": "A", "bad": "B"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}).rejected == REJECTED


def test_columns_are_named_and_labels_have_names() -> None:
    assert conversation_of({"q": "Q", "a": "A", "x": 1}, {"prompt": "q", "completion": "a"}).messages == (ASKED, ANSWERED)
    with pytest.raises(ValueError, match=r"no `q`, which data.columns names \(keys: Q\)"):
        conversation_of({"Q": "Q"}, {"prompt": "q", "completion": "a"})
    assert conversation_of({"text": "win", "label": 1}, labels=["ham", "spam"]).messages == said("win", "spam")
    assert conversation_of({"text": "win", "label": "1"}, labels=["ham", "spam"]).messages == said("win", "spam")  # of a CSV
    assert conversation_of({"text": "win", "label": 1}).messages == said("win", "1")
    assert conversation_of({"text": "win", "label": "spam"}, labels=["ham", "spam"]).messages == said("win", "spam")
    with pytest.raises(ValueError, match=r"label 2 has no name: data.labels names 2, from 0"):
        conversation_of({"text": "win", "label": 2}, labels=["ham", "spam"])


def test_each_form_has_an_example_that_is_read() -> None:
    for form in FORMS:
        row = {key: [ASKED, ANSWERED] if form.keys in (("messages",), ("conversations",), ("conversation",)) else "x" for key in form.keys}
        if form.name == PREFERENCE:
            row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
        if form.keys == (CHAT,):
            row = {CHAT: "### Human: Q### Assistant: A"}
        if "answers" in form.keys:
            row = {"query": "Q", "answers": '[{"name": "add", "arguments": {"a": 1}}]', "tools": '[{"name": "add"}]'}
        assert conversation_of(row).form == form.name


ROWS = [{"prompt": "2 + 2?", "completion": "4"}, {"prompt": "lines\nin “it” ä", "completion": "6"}]
CSV = 'prompt,completion\n2 + 2?,4\n"lines\nin “it” ä",6\n'


def written(folder: Path, kind: str) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    contents: dict[str, bytes] = {
        "rows.jsonl": lines.encode(),
        "rows.json": json.dumps(ROWS, indent=1).encode(),
        "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "pretty.json": json.dumps({"data": ROWS}, indent=2).encode(),
        "rows.jsonl.gz": gzip.compress(lines.encode(), mtime=0),
        "rows.csv": CSV.encode("utf-8-sig"),
        "semicolons.csv": CSV.replace(",", ";").encode(),
        "rows.tsv": CSV.replace(",", "\t").encode("utf-16"),
        "rows.csv.gz": gzip.compress(CSV.replace("\n", "\r\n").encode(), mtime=0),
    }
    path = folder / kind
    if kind == "rows.parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(contents[kind])
    return path


KINDS = ("rows.jsonl", "rows.json", "wrapped.json", "pretty.json", "rows.jsonl.gz", "rows.csv", "semicolons.csv", "rows.tsv", "rows.csv.gz",
         "rows.parquet")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_any_kind_has_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = read_rows(written(tmp_path, kind))
    assert [row.messages for row in rows] == [said("2 + 2?", "4"), said("lines\nin “it” ä", "6")]
    assert [row.answer for row in rows] == ["4", "6"]
    assert all(row.where.startswith(str(tmp_path)) for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", b"prompt,completion\nx,4,5\n", "line 2: more values than the header has columns (2)"),
        ("a.csv", b"prompt,completion\nok,1\nx\n", "line 3: fewer values than the header"),
        ("a.csv", b'prompt,completion\n"a\nb",1\n,2\n', "line 4: "),  # an empty field is none
        ("a.csv", b'prompt,completion\n"a" b,1\n', "line 2: not CSV"),
        ("a.csv", b"q,a\nx,4\n", "line 2: no known form (keys: q, a)"),
        ("a.csv", b"prompt,completion\ncaf\xe9,1\n", "line 2: not UTF-8 text"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.csv", b"prompt,prompt,completion\na,b,c\n", "line 1: two columns are named 'prompt'"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}', mtime=0)[:-9], "Cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}', mtime=0), "line 1: no known form (keys: prompt)"),
        ("a.json", b'{"data": [{"prompt": "x", "completion": "y"}, {"prompt": "x"}]}', "row 2: no known form"),
        ("a.json", b'[{"prompt": "x", "completion": "y"},\n {"prompt": "x", "comp', "line 2: not JSON: Unterminated string"),
        ("a.json", b'{"data": [\n {"prompt": "x", "completion": "y"},\n', "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\nnull\n', "line 2: a row is an object, not NoneType"),
        ("a.parquet", b"PAR1" + bytes(40) + b"PAR1", "is a Parquet file that cannot be read"),
    ],
)
def test_a_fault_is_said_with_its_place(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in caught.value.message
    assert fault in caught.value.message
    assert caught.value.hint


def test_a_nul_in_a_csv_and_a_wide_field_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na\0b," + b"x" * 300_000 + b"\n")
    (row,) = read_rows(path)
    assert row.messages == said("ab", "x" * 300_000)


def test_fuzzed_files_end_in_rows_or_in_a_fault_that_is_said(tmp_path: Path) -> None:
    rng = random.Random(7)  # noqa: S311
    for kind in KINDS:
        whole = written(tmp_path, kind).read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(content))
                content[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
            path = tmp_path / f"fuzzed-{kind}"
            path.write_bytes(bytes(content[: rng.randrange(len(content))] if rng.random() < 0.3 else content))
            try:
                assert read_rows(path)
            except DataError as error:
                assert str(path) in error.message  # noqa: PT017


WHICH: dict[str, Any] = {"question": "Which?", "answer": "B"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (WHICH | {"choices": ["A", "B"]}, "`choices` is not read: put what can be chosen into the question"),  # MMLU
        (WHICH | {"article": "Once …"}, r"data.columns=\{context: article\}"),  # RACE
        ({"text": "Hello", "labels": [3]}, r"data.columns=\{label: labels\}"),  # GoEmotions
        ({"text": "A bill …", "summary": "Taxes."}, r"data.columns=\{prompt: text, completion: summary\}"),  # BillSum
        ({"text": "Hi", "role": "prompter", "message_tree_id": "7"}, "one message of a tree"),  # OpenAssistant
        ({"prompt": "Hi", "completion": "Go away.", "label": False}, "this answer is a bad one"),  # KTO
        ({"prompt": "Hi", "completion": [{"role": "assistant", "content": "Go away."}], "label": False}, "a bad one"),
    ],
)  # fmt: skip
def test_what_changes_a_row_of_its_form_is_refused_and_may_be_left_out(row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        conversation_of(row)
    beside = next(key for key in ("choices", "article", "labels", "summary", "message_tree_id", "label") if key in row)
    assert conversation_of(row, {UNREAD_KEY: beside}).messages


def test_several_labels_are_one_answer() -> None:
    row = {"text": "Hello", "labels": [0, 2]}
    assert conversation_of(row, {"label": "labels"}, ["joy", "fear", "love"]).messages[-1]["content"] == "joy, love"


def test_a_good_answer_of_kto_is_learnt() -> None:
    assert conversation_of({"prompt": "Hi", "completion": "Hello!", "label": True}).messages[-1]["content"] == "Hello!"


def test_an_answer_that_begins_with_its_question_is_not_asked_twice() -> None:
    whole = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    row = {"prompt": "Hi", "chosen": whole, "rejected": [whole[0], {"role": "assistant", "content": "No."}]}
    with pytest.raises(ValueError, match=r"begin with the question again: data.columns=\{messages"):
        conversation_of(row, {"completion": "chosen"})
    assert [message["content"] for message in conversation_of(row, {"messages": "chosen"}).messages] == ["Hi", "Hello!"]


def test_columns_take_keys_that_a_form_has() -> None:
    with pytest.raises(ValueError, match=r"names `sytem`, which no form has; did you mean system\?"):
        conversation_of({"question": "Which?", "response": "B", "told": "Be brief."}, {"sytem": "told"})
    with pytest.raises(ValueError, match=r"data\.labels names the numbers of a classification"):
        conversation_of({"premise": "A", "hypothesis": "B", "label": 0}, {"question": "premise", "answer": "label"}, ["yes", "no"])


@pytest.mark.parametrize("keys", [("question", "response"), ("problem", "solution"), ("query", "answer")])
def test_a_row_s_system_prompt_and_reasoning_are_its_own(keys: tuple[str, str]) -> None:
    row = {keys[0]: "Which?", keys[1]: "B", "system_prompt": "detailed thinking on", "reasoning": "Not A."}
    system, _, answer = conversation_of(row).messages
    assert (system["role"], system["content"]) == ("system", "detailed thinking on")
    assert (answer["content"], answer["reasoning_content"]) == ("B", "Not A.")
    whole = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "B"}], "system_prompt": "of a tool"}
    assert len(conversation_of(whole).messages) == 2

"""Datasets: every known form becomes the same messages, every fault is named by file and line, only answers are learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ftkit.data import store, template
from ftkit.data.formats import conversation_of
from ftkit.data.lengths import count_tokens, tally
from ftkit.data.mask import cut, tokenise
from ftkit.data.read import only_held_out, read_rows, split_validation
from ftkit.data.rows import IGNORED, Example, Row
from ftkit.data.store import StoredRows, store_rows
from ftkit.data.turns import turns_of
from ftkit.errors import DataError, ModelError

WriteRows = Callable[[Path, list[Any]], Path]

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": [{**ASKED, "name": None}, {**ANSWERED, "weight": 1}], "id": 7},
        {"prompt": "2 + 2?", "completion": "4"},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_every_form_becomes_the_same_messages(tmp_path: Path, write_rows: WriteRows, value: Any) -> None:
    assert list(read_rows(write_rows(tmp_path / "a.jsonl", [value]))) == [Row((ASKED, ANSWERED), 1)]


def test_an_alpaca_input_follows_its_instruction(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "2 and 2", "output": "4"}])
    assert read_rows(path)[0].question == [{"role": "user", "content": "Add.\n\n2 and 2"}]


def test_a_row_is_question_and_answer(rows: list[dict[str, Any]], tmp_path: Path, write_rows: WriteRows) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [system, ASKED, ANSWERED, ASKED, ANSWERED]}, *rows])
    first, *others = read_rows(path)
    assert first.question == [system, ASKED, ANSWERED, ASKED]
    assert first.answer == "4"
    assert [row.line for row in others] == list(range(2, 2 + len(rows)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_blank_lines_windows_line_ends_and_line_separators(tmp_path: Path, encoding: str) -> None:
    text = json.dumps({"prompt": "ä\u2028b", "completion": "ü"}, ensure_ascii=False)
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"\r\n{text}\r\n\r\n{text}".encode(encoding))
    assert [(row.question[0]["content"], row.line) for row in read_rows(path)] == [("ä\u2028b", 2), ("ä\u2028b", 4)]


def test_a_json_list_is_read_too(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert [list(row.messages) for row in read_rows(path)] == [row["messages"] for row in rows]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({}, "no known form (keys: none)"),
        ({"review": "x", "label": 1}, "no known form (keys: review, label)"),
        ({"text": "x", "system": "y"}, "a plain `text` takes nothing beside it"),
        ({"text": " "}, "`text` is empty"),
        ({"prompt": "x"}, "no known form (keys: prompt)"),
        ([1], "a row is an object, not list"),
        ("x", "a row is an object, not str"),
        (None, "a row is an object, not NoneType"),
        ({"messages": []}, "no messages"),
        ({"messages": "x"}, "no messages"),
        ({"messages": ["x"]}, "no answer: the last message is the user's"),
        ({"messages": ["x", 1]}, "message 1 has role 'x'"),
        ({"messages": [ASKED, {"role": "tool", "content": "4"}]}, "message 2 is what a tool gave, and nothing called it"),
        ({"messages": [{"role": "user", "content": None}, ANSWERED]}, "message 1 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]}, "message 1 has a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": []}, ANSWERED]}, "message 1 has no text"),
        ({"messages": [ASKED]}, "no answer: the last message is the user's; it must be the assistant's"),
        ({"messages": [ASKED, ANSWERED, ASKED, ASKED]}, "no answer: the last message is the user's"),
        ({"messages": [ASKED, {**ANSWERED, "content": " \n"}]}, "no answer: the last message is empty"),
        ({"messages": [{"role": ["x" * 9] * 999, "content": "x"}, ANSWERED]}, "message 1 has role ['xxxxxxxxx', 'xxxxxxxxx', "),
        ({"messages": [ANSWERED]}, "no question"),
        ({"prompt": {}, "completion": "4"}, "message 1 has no text"),
        ({"instruction": {}, "input": "x", "output": "4"}, "message 1 has no text"),
        ({"conversations": "x"}, "`conversations` is not a list of objects"),
        ({"conversations": [{"from": "owl", "value": "x"}]}, "message 1 has role 'owl'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "message 1 has role ['human']"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(
    tmp_path: Path, write_rows: WriteRows, rows: list[dict[str, Any]], value: Any, fault: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [rows[0], rows[1], value, rows[2]])
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.message.startswith(f"{path}, line 3: {fault}")


def test_only_the_first_faults_are_shown(tmp_path: Path, write_rows: WriteRows) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write_rows(tmp_path / "a.jsonl", [{}] * 5000))
    assert [line.split(":")[0].split(", ")[-1] for line in caught.value.message.splitlines()[:-1]] == [f"line {n}" for n in range(1, 6)]
    assert caught.value.message.endswith(f"\n… and {5000 - 5} more")


def test_a_fault_in_a_json_list_is_not_put_on_another_line(tmp_path: Path) -> None:
    """The second row of this file stands on line 3, so no message may say line 2."""
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "x",\n  "completion": "y"},\n {"prompt": "x"}]', encoding="utf-8")
    with pytest.raises(DataError, match="no known form") as caught:
        read_rows(path)
    assert "line 2" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b"[]", "has no rows"),
        (b'[{"prompt": "x"},\n{"prompt"]', "line 2: not JSON"),
        (b'{"prompt": "x", "completion": "y"}\n{"prompt": "caf\xe9"}\n', "line 2: not UTF-8 text"),
        ('{"prompt": "x"}'.encode("utf-16")[:-1], "begins as UTF-16(-LE)? text, and is not"),
        (b'{"prompt": "x", "completion": "y"}\n' + b"[" * 100_000, "line 2: nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: not JSON: Exceeds the limit"),
        (b"PAR1", "is a Parquet file that cannot be read"),
        (b"\x1f\x8b\x08", "Cannot read"),
        (b"PK\x03\x04", "is a zip archive"),
    ],
)
def test_a_file_that_is_no_dataset(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig"])
def test_text_as_windows_writes_it(tmp_path: Path, encoding: str) -> None:
    text = json.dumps({"prompt": "ä 2 + 2?", "completion": "4 €"}, ensure_ascii=False)
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{text}\r\n{text}\r\n".encode(encoding))
    assert [(row.question[0]["content"], row.answer, row.line) for row in read_rows(path)] == [("ä 2 + 2?", "4 €", n) for n in (1, 2)]


def make_rows(count: int) -> StoredRows:
    return store_rows(Row(({"role": "user", "content": str(n)}, ANSWERED), n) for n in range(1, count + 1))


def test_validation_rows_are_held_out_of_training() -> None:
    rows = make_rows(50)
    train, validation = split_validation(rows, 0.1, seed=1)
    assert len(validation) == 50 * 0.1
    assert sorted(row.line for row in (*train, *validation)) == [row.line for row in rows]
    assert [[*part] for part in (train, validation)] == [[*part] for part in split_validation(rows, 0.1, seed=1)]
    assert [*validation] != [*split_validation(rows, 0.1, seed=2)[1]]


@pytest.mark.parametrize(("count", "share"), [(2, 0.01), (2, 0.99), (10, 0.999), (10, 0.001)])
def test_a_row_stays_on_each_side(count: int, share: float) -> None:
    train, validation = split_validation(make_rows(count), share, seed=1)
    assert train
    assert validation
    assert len(train) + len(validation) == count


@pytest.mark.parametrize(
    ("training", "validation", "missing"),
    [
        (["yes", "no", "yes", "no"], ["no", "perhaps", "perhaps"], [6]), (["yes", "yes", "no"], ["no"], []),
        (["a", "b", "c", "d"], ["e"], []), (["yes", "yes", "yes"], ["no", "no", "never"], [4, 6]),
    ],
)  # fmt: skip
def test_kinds_of_answers_that_validation_took_whole_are_found(training: list[str], validation: list[str], missing: list[int]) -> None:
    rows = [
        Row(({"role": "user", "content": "?"}, {"role": "assistant", "content": word}), n)
        for n, word in enumerate([*training, *validation], 1)
    ]
    assert [row.line for row in only_held_out(rows[: len(training)], rows[len(training) :], str.strip)] == missing


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="One row"):
        split_validation(make_rows(1), 0.1, seed=1)


class Characters:
    """The least that `data` asks of a tokenizer: ChatML-like text, one id a character; ⏏ ends a turn."""

    chat_template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}⏏\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    special_tokens_map: ClassVar[dict[str, str]] = {}
    eos_token, eos_token_id = "⏏", ord("⏏")
    all_special_tokens = ("⏏",)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def text_of(ids: Sequence[int]) -> str:
    return "".join("·" if n == IGNORED else chr(n) for n in ids)


def test_only_the_answer_and_its_end_are_learned() -> None:
    (example,) = tokenise(Characters(), [Row((ASKED, ANSWERED), 1)])  # type: ignore[arg-type]
    prompt = "<u>2 + 2?⏏\n<a>"
    assert text_of(example.input_ids) == f"{prompt}4⏏"  # the line break after the last end of turn is left out
    assert text_of(example.labels) == "·" * len(prompt) + "4⏏"


def test_every_answer_of_a_conversation_is_learned() -> None:
    (example,) = tokenise(Characters(), [Row((ASKED, ANSWERED, {"role": "user", "content": "Sure?"}, ANSWERED), 1)])  # type: ignore[arg-type]
    first, second = "<u>2 + 2?⏏\n<a>", "\n<u>Sure?⏏\n<a>"
    assert text_of(example.input_ids) == f"{first}4⏏{second}4⏏"
    assert text_of(example.labels) == "·" * len(first) + "4⏏" + "·" * len(second) + "4⏏"


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = Characters()
    tokenizer.chat_template = ""
    with pytest.raises(ModelError, match="no chat template") as caught:
        template.render(tokenizer, [ASKED], ask=True)  # type: ignore[arg-type]
    assert "Instruct" in str(caught.value.hint)


def test_a_template_that_changes_the_prompt_afterwards_gives_an_example_for_each_answer() -> None:
    class Counting(Characters):
        chat_template = "{{ messages | length }}" + Characters.chat_template

    row = Row((ASKED, ANSWERED, {"role": "user", "content": "Sure?"}, ANSWERED), 7)
    examples = list(tokenise(Counting(), [row]))  # type: ignore[arg-type]
    assert [text_of(example.input_ids) for example in examples] == [
        "1<u>2 + 2?⏏\n<a>4⏏",
        "3<u>2 + 2?⏏\n<a>4⏏\n<u>Sure?⏏\n<a>4⏏",
    ]
    assert [text_of(example.labels).strip("·") for example in examples] == ["4⏏", "4⏏"]


def test_a_template_that_changes_the_answer_is_refused() -> None:
    row = Row((ASKED, {"role": "assistant", "content": " four"}), 7, "a.jsonl, line 7")

    def tokenised(content: str) -> Any:
        class Changing(Characters):
            chat_template = Characters.chat_template.replace("{{ m.content }}", content)

        return list(tokenise(Changing(), [row]))  # type: ignore[arg-type]

    with pytest.raises(DataError, match=r"^a.jsonl, line 7, message 2: the chat template renders the prompt differently"):
        tokenised("{{ m.content }}{{ messages | length }}")
    with pytest.raises(DataError, match=r"^a.jsonl, line 7, message 2: the chat template changes the text of the answer"):
        tokenised("{{ m.content | replace('f', 'F') }}")
    with pytest.raises(ModelError, match="does not write what the assistant says"):
        tokenised("{{ m.content | upper }}")


def test_token_counts() -> None:
    examples = [Example([0] * length, [0] * length) for length in range(100, 0, -1)]
    counts = count_tokens([tally(examples[:40], max_length=90), tally(examples[40:], max_length=90)])
    assert (counts.rows, counts.longest, counts.cut) == (100, 100, 10)
    assert counts.total == 100 * 101 // 2
    assert counts.median in (50, 51)
    assert counts.p95 in (95, 96)
    assert count_tokens([tally(examples[-1:], max_length=1)]).p95 == 1


def test_rows_are_cut_and_dropped_where_no_answer_is_left() -> None:
    short, long = Example([1, 2], [IGNORED, 2]), Example([1, 2, 3, 4], [IGNORED, 2, 3, 4])
    beyond = Example([1, 2, 3, 4], [IGNORED, IGNORED, IGNORED, 4])
    assert list(cut([short, long, beyond], 3)) == [short, Example([1, 2, 3], [IGNORED, 2, 3])]


def test_plain_text_is_learnt_as_it_stands() -> None:
    """As the tokenizer begins a text, and its end; no template, and nothing that could be asked."""
    row = Row(conversation_of({"text": "Once."}).messages, 1)
    (example,) = tokenise(Characters(), [row])  # type: ignore[arg-type]
    assert example.input_ids == example.labels
    assert text_of(example.input_ids) == "Once.⏏"
    assert (row.is_text, list(turns_of(Characters(), row))) == (True, [])  # type: ignore[arg-type]


def test_rows_beyond_what_memory_is_given_are_read_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """They, their slices and what is taken of them are the rows; the file is gone with the last of these."""
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 1000)
    written = [
        Row(({"role": "user", "content": "ü" * n}, ANSWERED), n, f"a.jsonl, line {n}", frozenset({0}), "messages") for n in range(1, 60)
    ]
    rows = store_rows(written)
    assert [*rows] == written
    assert [*rows[5:9]] == written[5:9]
    assert [*rows.take([7, 3])[1:]] == [written[3]]
    assert [(row.place, row.form) for row in rows] == [(row.place, row.form) for row in written]
    file = rows._lines._file
    assert file._rolled  # type: ignore[attr-defined]
    view = rows[1:2]
    del rows
    assert view[0] == written[1]
    del view
    assert file.closed

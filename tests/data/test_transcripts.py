"""A whole chat in one text is read by its turns, however it is written; and never taken for anything else without a word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_formats import said

from ftkit.data.formats import conversation_of
from ftkit.data.read import LeftOut, read_rows
from ftkit.data.transcripts import WRITINGS, Writing, turns_of, writing_of
from ftkit.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = "A chat between a curious user and an artificial intelligence assistant."
TWO = said("Q1", "A1\n\n- x", "Q2", "A2")
CHATS = {  # as each is found in the wild, with a system message where it has a place for one
    "<|im_start|>user …": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1\n\n- x<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "<|start_header_id|>user …": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1\n\n- x<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Q2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "<start_of_turn>user …": (
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1\n\n- x<end_of_turn>\n<start_of_turn>user\nQ2<end_of_turn>\n"
        "<start_of_turn>model\nA2<end_of_turn>\n"
    ),
    "<|turn>user …": (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nQ1<turn|>\n<|turn>model\nA1\n\n- x<turn|>\n<|turn>user\nQ2<turn|>\n"
        "<|turn>model\nA2<turn|>\n"
    ),
    "<|user|> … <|assistant|>": (
        "<|system|>\nBe brief.</s>\n<|user|>\nQ1</s>\n<|assistant|>\nA1\n\n- x</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>\n"
    ),
    "[INST] … [/INST]": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ1 [/INST] A1\n\n- x </s><s>[INST] Q2 [/INST] A2 </s>",
    "### Human: … ### Assistant:": "### Human: Q1### Assistant: A1\n\n- x### Human: Q2### Assistant: A2",
    "### User: … ### Assistant:": (
        "### System:\nBe brief.\n\n### User:\nQ1\n\n### Assistant:\nA1\n\n- x\n\n### User:\nQ2\n\n### Assistant:\nA2"
    ),
    "### Instruction: … ### Response:": (
        "### Instruction:\nQ1\n\n### Response:\nA1\n\n- x\n\n### Instruction:\nQ2\n\n### Response:\nA2</s>"
    ),
    "### Question: … ### Answer:": "### Question: Q1\n### Answer: A1\n\n- x\n### Question: Q2\n### Answer: A2",
    "Human: … Assistant:": "\n\nHuman: Q1\n\nAssistant: A1\n\n- x\n\nHuman: Q2\n\nAssistant: A2",
    "USER: … ASSISTANT:": "SYSTEM: Be brief. USER: Q1 ASSISTANT: A1\n\n- x</s>USER: Q2 ASSISTANT: A2</s>",
}


@pytest.mark.parametrize("writing", WRITINGS, ids=lambda writing: writing.name)
def test_a_chat_in_one_text_is_its_turns(writing: Writing) -> None:
    chat = CHATS[writing.name]
    messages = (SYSTEM, *TWO) if "Be brief." in chat else TWO
    read = conversation_of({"text": chat, "id": 7}, {"chat": "text"})
    assert (read.messages, read.form, read.passed_over) == (messages, "chat in one text", ("id",))
    assert not read.unlearnt

    with pytest.raises(ValueError, match=re.escape("`text` holds a whole chat (" + writing.name)):
        conversation_of({"text": chat})
    assert conversation_of({"text": chat}, {"text": "text"}).messages == ({"role": "assistant", "content": chat},)
    # As a text that is judged it is what it is.
    assert conversation_of({"text": chat, "label": "polite"}).messages == said(chat, "polite")

    asked = chat[: chat.rindex("A2")]
    answered = conversation_of({"chat": asked.rstrip(), "completion": "A2"})
    assert (answered.messages, answered.unlearnt) == (messages, {len(messages) - 3})  # as of messages in a prompt none is learnt
    with pytest.raises(ValueError, match=r"`prompt` holds a chat up to its answer .*data.columns={chat: prompt}"):
        conversation_of({"prompt": asked, "completion": "A2"})
    assert conversation_of({"prompt": asked, "completion": "A2"}, {"chat": "prompt"}).messages == messages
    assert conversation_of({"prompt": asked, "completion": "A2"}, {"prompt": "prompt"}).messages == said(asked, "A2")

    # Two answers to one chat, as hh-rlhf has them.
    preferred = conversation_of({"chosen": chat, "rejected": asked + "B2"})
    assert (preferred.messages, preferred.rejected) == (messages, {"role": "assistant", "content": "B2"})
    told = conversation_of({"prompt": asked, "chosen": "A2", "rejected": "B2"}, {"chat": "prompt"})
    assert (told.messages, told.rejected) == (preferred.messages, preferred.rejected)


@pytest.mark.parametrize(
    "text",
    [
        "A manual.\n\n### Human: this is how a chat begins\n### Assistant: and this is an answer",  # a text about chats
        "### Human: a question that nobody answers",
        "### Response: nobody asked\n### Instruction: for that",
        "Human: one paragraph\nAssistant: and not another",
        "In 1999 the USER: field was empty, and the ASSISTANT: field too.",
        "# Title\n\n### Instruction:\n\nInstall it.",
        "",
    ],
)
def test_other_texts_are_texts(text: str) -> None:
    assert writing_of(text) is None


def test_what_stands_before_a_chat_is_its_system_message_where_it_says_something() -> None:
    assert turns_of(f"{ALPACA}\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n4") == [
        ("user", "Add.\n\n2 and 2"),
        ("assistant", "4"),
    ]
    assert turns_of(f"{VICUNA} USER: Q ASSISTANT: A</s>") == [("system", VICUNA), ("user", "Q"), ("assistant", "A")]
    assert turns_of("You are a lawyer.\n### Question: Q\n### Answer: A")[0] == ("system", "You are a lawyer.")
    assert writing_of(f"{VICUNA} USER: Q ASSISTANT: A</s>")


def test_a_row_s_own_system_message_may_be_written_as_the_chat_is() -> None:
    row = {
        "system": "SYSTEM: Be brief.",
        "chat": "USER: Q1\n\n\nASSISTANT: A1\n\n- x <|endoftext|>\n\n\nUSER: Q2\n\n\nASSISTANT: A2 <|endoftext|>",
    }
    assert conversation_of(row).messages == (SYSTEM, *TWO)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"chat": "Hello"}, "`chat` is no chat in one text that is known"),
        ({"chat": [{"role": "user", "content": "Q"}]}, "`chat` is no text; for a list of messages: data.columns={messages: chat}"),
        ({"chat": "### Human: Q### Assistant: A", "completion": "B"}, "`chat` ends with an answer, and `completion` is beside it; to"),
        ({"chat": "### Human: Q### Assistant: "}, "no answer: the last message is empty"),
        ({"chat": "USER: Q\n\nASSISTANT: <functioncall> {}\n\nFUNCTION RESPONSE: 4\n\nASSISTANT: 4"}, "a call that is written as text is"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_of_a_chat_is_said(row: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        conversation_of(row)


@pytest.mark.parametrize(
    ("chat", "turns"),
    [
        # What looks like a marker inside a turn is what it says.
        ("USER: Dockerfile has USER: root why? ASSISTANT: because", [("user", "Dockerfile has USER: root why?"), ("assistant", "because")]),
        ("### Instruction:\nQ\n\n### Response:\nIntro\n\n### Response:\nMore",
         [("user", "Q"), ("assistant", "Intro\n\n### Response:\nMore")]),
        (f"{ALPACA}\n\n### Instruction:\nQ\n\n### Response:\nHere:\n### Instruction:\n{{x}}\n\n### Response:\n...",
         [("user", "Q"), ("assistant", "Here:\n### Instruction:\n{x}\n\n### Response:\n...")]),
        ("### Instruction:\nsay '### Response:' twice\n\n### Response:\nno", [("user", "say '### Response:' twice"), ("assistant", "no")]),
        ("### Human: Q### Assistant:\n    return 1\n", [("user", "Q"), ("assistant", "    return 1")]),
        ("### Human: Q### Assistant: <s>gone</s>", [("user", "Q"), ("assistant", "<s>gone</s>")]),
        ("Human: a\n\nAssistant: b\n\nHuman: \n\nAssistant: c", [("user", "a"), ("assistant", "b"), ("user", ""), ("assistant", "c")]),
        ("<|im_start|>user\r\nQ<|im_end|>\r\n<|im_start|>assistant\r\nA<|im_end|>", [("user", "Q"), ("assistant", "A")]),
        ("[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Q[/INST]A</s>", [("system", "Be kind."), ("user", "Q"), ("assistant", "A")]),
        (f"{ALPACA} Answer in JSON.\n\n### Instruction:\nQ\n\n### Response:\nA",
         [("system", "Answer in JSON."), ("user", "Q"), ("assistant", "A")]),
        ("<|im_start|>developer\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
         [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]),
    ],
)  # fmt: skip
def test_a_turn_is_what_is_said_in_it(chat: str, turns: list[tuple[str, str]]) -> None:
    assert turns_of(chat) == turns


@pytest.mark.parametrize("role", ["function", "narrator"])
def test_a_turn_of_an_unknown_role_is_no_part_of_another_one(role: str) -> None:
    chat = f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>{role}\n4<|im_end|>\n<|im_start|>assistant\nB"
    with pytest.raises(ValueError, match=re.escape("`chat` has a turn that is not understood, at <|im_end|>")):
        conversation_of({"chat": chat})


def test_what_is_named_is_what_is_read() -> None:
    """Whatever else a row has: the hint says to name it so."""
    chat = "### Human: Q### Assistant: A"
    for beside in ({"instruction": "I", "output": "O"}, {"messages": list(said("x", "y"))}, {"input": "I", "output": "A2"}):
        assert conversation_of({"text": chat, **beside}, {"chat": "text", "unread": list(beside)[-1]}).messages == said("Q", "A")
    asked = {"instruction": "\n\nHuman: Q\n\nAssistant:", "input": "", "output": "A"}
    with pytest.raises(ValueError, match=r"{chat: instruction}"):
        conversation_of(asked)
    assert conversation_of(asked, {"chat": "instruction"}).messages == said("Q", "A")
    with pytest.raises(ValueError, match=r"`Text` holds a whole chat .*{chat: Text} reads"):
        conversation_of({"Text": chat})
    assert conversation_of({"Text": chat}, {"chat": "Text"}).messages == said("Q", "A")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Q", "completion": "A", "passage": "P"}, {"context": "passage"}),
        ({"messages": list(said("Q", "A")), "persona": "S"}, {"system_prompt": "persona"}),
        ({"messages": list(said("Q", "A")), "good": True}, {"label": "good"}),
        ({"messages": list(said("Q", "A")), "body": "T"}, {"text": "body", "messages": "messages"}),
    ],
)
def test_what_is_named_and_not_read_is_said(row: dict[str, object], columns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"data\.columns names `{next(iter(columns))}`, which is not read of a row of this form"):
        conversation_of(row, columns)


def test_what_is_said_of_a_named_column_can_be_done() -> None:
    good = {"prompt": "Q", "completion": "A", "good": True}
    assert conversation_of(good, {"label": "good"}).messages == said("Q", "A")
    with pytest.raises(ValueError, match="this answer is a bad one"):
        conversation_of({**good, "good": False}, {"label": "good"})
    with pytest.raises(ValueError, match="`passage` is not read: put it into the question"):  # not {context: passage}
        conversation_of({"query": "Q", "answer": "A", "passage": "P"})
    with pytest.raises(ValueError, match=r"{context: passage} puts it before the question"):
        conversation_of({"question": "Q", "answer": "A", "passage": "P"})
    assert conversation_of({"question": "Q", "answer": "A", "passage": "P"}, {"context": "passage"}).messages == said("Q\n\nP", "A")


def test_a_column_that_happens_to_be_called_chat_is_passed_over() -> None:
    for value in ("general", None, "### Human: Q### Assistant: A"):
        assert conversation_of({"chat": value, "text": "hello"}).form == "plain text"
    assert conversation_of({"chat": "### Human: Q### Assistant: A", "response": ""}).messages == said("Q", "A")
    assert conversation_of({"chat": "Human: a\n\nAssistant: b\n\nHuman: Q", "response": None, "answer": "A"}).messages == said(
        "a", "b", "Q", "A"
    )


def test_both_sides_of_a_preference_are_read_by_their_turns() -> None:
    good, bad = "Human: Q\n\nAssistant: A", "Human: Q\n\nAssistant: B"
    for more in ({}, {"prompt": "Q"}):
        read = conversation_of({"chosen": good, "rejected": bad, **more})
        assert (read.messages, read.rejected) == (said("Q", "A"), {"role": "assistant", "content": "B"})
    assert conversation_of({"prompt": "Human: Q\n\nAssistant:", "chosen": good, "rejected": bad}, {"chat": "prompt"}).messages == said(
        "Q", "A"
    )
    with pytest.raises(ValueError, match="`prompt` is not what `chosen` answers"):
        conversation_of({"prompt": "another", "chosen": good, "rejected": bad})
    system = {"role": "system", "content": "You help."}
    assert conversation_of({"chosen": f"You help.\n\n{good}", "rejected": f"You help.\n\n{bad}"}).messages == (system, *said("Q", "A"))


def test_a_prompt_that_is_a_chat_is_refused_wherever_it_ends() -> None:
    with pytest.raises(ValueError, match="`prompt` holds a chat up to its answer"):
        conversation_of({"prompt": "Human: a\n\nAssistant: b\n\nHuman: c", "completion": "d"})
    for text in (
        "Read this: <|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
        "[AVAILABLE_TOOLS]x[/AVAILABLE_TOOLS][INST]Q[/INST]A",
    ):
        with pytest.raises(ValueError, match="`text` holds a whole chat"):
            conversation_of({"text": text})


def test_lists_of_texts_are_turns() -> None:
    assert conversation_of({"conversations": ["Q1", "A1", "Q2", "A2"]}).messages == said("Q1", "A1", "Q2", "A2")
    with pytest.raises(ValueError, match="the last message is the user's"):
        conversation_of({"conversations": ["Q1"]})


def test_columns_reach_inside_a_column() -> None:
    row = {"id": 1, "translation": {"de": "Zwei", "en": "Two"}, "answers": {"text": ["A", "B"], "start": []}, "question": "Q"}
    read = conversation_of(row, {"prompt": "translation.de", "completion": "translation.en", "unread": "question"})
    assert (read.messages, read.passed_over) == (said("Zwei", "Two"), ("id", "answers"))
    assert conversation_of(row, {"answer": "answers.text.1"}).messages == said("Q", "B")
    for path in ("answers.start.0", "answers.text.2", "answers.nothing", "answers.text.x"):
        with pytest.raises(ValueError, match=rf"no `{path}`, which data.columns names \(keys: id, translation.de, translation.en, answers"):
            conversation_of(row, {"answer": path})
    assert conversation_of({"a.b": {"c": "Q"}, "answer": "A"}, {"question": "a.b.c"}).messages == said("Q", "A")
    with pytest.raises(ValueError, match=r"no known form \(keys: a.b, c\)"):
        conversation_of({"a": {"b": 1}, "c": 2})


def test_a_tables_classes_have_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path, kind = tmp_path / "rows.parquet", datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind, "all": datasets.List(kind)})
    table = {"text": ["a", "b"], "label": [1, 0], "all": [[0, 1], [1]]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))
    assert [row.answer for row in read_rows(path)] == ["good", "bad"]
    assert [row.answer for row in read_rows(path, columns={"unread": "label", "label": "all"})] == ["bad, good", "good"]
    assert [row.answer for row in read_rows(path, labels=["schlecht", "gut"])] == ["gut", "schlecht"]
    datasets.Dataset.from_dict({**table, "label": [1, -1]}, features=features).to_parquet(str(path))
    with pytest.raises(DataError, match="row 2: this row has no label, or -1 in its place"):
        read_rows(path)
    assert conversation_of({"text": "a", "label": -1}).messages == said("a", "-1")  # of three moods, say


def test_rows_that_cannot_be_read_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "Q", "completion": "A"}\n{"prompt": "Q", "completion": ""}\nno JSON\n{"prompt": "Q2", "completion": "A2"}\n'
    )
    with pytest.raises(DataError, match="line 2: no answer") as refused:
        read_rows(path)
    assert "--set data.skip_faulty=true" in refused.value.hint
    left_out = LeftOut()
    assert [row.messages for row in read_rows(path, left_out=left_out)] == [said("Q", "A"), said("Q2", "A2")]
    assert left_out.count == 2
    assert [first.split(":")[0] for first in left_out.first] == [f"{path}, line 2", f"{path}, line 3"]

    path.write_text("no JSON\n")
    with pytest.raises(DataError, match="line 1: not JSON") as refused:  # nothing is left
        read_rows(path, left_out=LeftOut())
    assert "skip_faulty" not in refused.value.hint

"""Turns: each learnt answer stands behind the prompt that inference sends, ends as the template ends it, and is read back alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import families
import llama_cpp
import pytest

from ftkit.data import template
from ftkit.data.mask import examples_of, tokenise
from ftkit.data.rows import IGNORED, Example, Message, Row
from ftkit.data.stops import turn_ends
from ftkit.data.template import ChatSettings
from ftkit.data.turns import answer_reader, question, turns_of
from ftkit.engines import hf
from ftkit.errors import DataError, ModelError

DAY = ChatSettings(date(2024, 7, 26))
# Words that the vocabularies of these templates' models hold as one token, and what ends a turn in some of them.
TOKENS = re.compile(
    r"<\|[^<>|]*\|?>|<[^<>|]*\|>|<｜[^｜]*｜>|\[/?[A-Z_]+\]|</?[a-z:_]*think[a-z:]*>|<(?:end|start)_of_turn>"
    r"|<(?:end|beginning)_of_sentence>|</?(?:user|assistant|system|role)>|</?seed:[a-z]+>|\]~b\]|\[e~\[|\]~!b\[|<[BE]OS>|<sep>|<SPECIAL_\d+>"
)
EOS = ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|end_of_text|>", "<|end_of_msg|>")
# Templates that do not take what is asked of them, with their own words or ftkit's.
TOOLS_ALONE = {  # variants that take no conversation without tools
    "CohereForAI-c4ai-command-r-plus-tool_use", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "fireworks-ai-llama-3-firefunction-v2",
}  # fmt: skip
NO_SYSTEM = {"google-gemma-2-2b-it"}
NO_REASONING = {"Reka-Edge", "llama-cpp-rwkv-world", "upstage-Solar-Open-100B"}


class Words:
    """What is asked of a tokenizer: an id for each word of TOKENS, and one for each other character."""

    bos_token, bos_token_id, name_or_path = "<BOS>", 0, ""
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template
        self.eos_token = next((word for word in EOS if word in chat_template), "<EOS>")
        self.special_tokens_map = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        self.all_special_tokens = sorted({*TOKENS.findall(chat_template), "<BOS>", "<EOS>"})
        self.words: dict[str, int] = {}
        self.eos_token_id = self.number(self.eos_token)

    def number(self, word: str) -> int:
        return self.words.setdefault(word, 0x110000 + len(self.words))

    def convert_tokens_to_ids(self, word: str) -> int:
        return self.number(word)

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.decode([number])

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        ids, at = [], 0
        for found in TOKENS.finditer(text):
            ids += [*map(ord, text[at : found.start()]), self.number(found[0])]
            at = found.end()
        return {"input_ids": [*ids, *map(ord, text[at:])]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        assert not skip_special_tokens
        words = {number: word for word, number in self.words.items()}
        return "".join(words.get(n) or chr(n) for n in ids)


def templates() -> list[Path]:
    return sorted((llama_cpp.models() / "templates").glob("*.jinja"))


@cache
def tokenizer(path: Path) -> Words:
    made = Words(path.read_text(encoding="utf-8"))
    made.chat_template = template.settle(made, DAY)  # type: ignore[arg-type]
    return made


def conversation(turns: int, *, system: bool, reasoning: bool) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "Be brief, Ünder."}] if system else []
    for n in range(turns):
        thought = {"reasoning_content": f"Reason {n}."} if reasoning else {}
        messages += [
            {"role": "user", "content": f"Question {n}? Under"},
            {"role": "assistant", "content": f"Answer {n} is {{x}}.\nSo.", **thought},
        ]
    return messages


def spans(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """(ids before it, ids of it) of everything that is learnt."""
    found = []
    for example in examples:
        assert all(label in (token, IGNORED) for token, label in zip(example.input_ids, example.labels, strict=True))
        marks = "".join("x" if label != IGNORED else "." for label in example.labels)
        found += [(example.input_ids[: span.start()], example.input_ids[slice(*span.span())]) for span in re.finditer("x+", marks)]
    return found


@pytest.mark.parametrize("reasoning", [False, True], ids=["plain", "reasoning"])
@pytest.mark.parametrize("system", [False, True], ids=["alone", "system"])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_every_template_is_learnt_as_it_will_be_asked(path: Path, turns: int, system: bool, reasoning: bool) -> None:
    """Of all that llama.cpp collects: ids are those of the prompt, then of the answer; what is learnt is the answers and their ends."""
    name, row = path.stem, Row(tuple(conversation(turns, system=system, reasoning=reasoning)), 3, "rows.jsonl, line 3")
    if name in TOOLS_ALONE:
        with pytest.raises((DataError, ModelError)):
            examples_of(tokenizer(path), row)  # type: ignore[arg-type]
        return
    model: Any = tokenizer(path)
    if (system and name in NO_SYSTEM) or (reasoning and name in NO_REASONING):
        with pytest.raises(DataError, match=r"^rows.jsonl, line 3, message "):
            examples_of(model, row)
        return
    end, read = turn_ends(model)[-1], answer_reader(model)
    examples = examples_of(model, row)
    learnt = spans(examples)
    asked = [row.messages[:n] for n, message in enumerate(row.messages) if message["role"] == "assistant"]
    assert len(learnt) == turns
    for number, (messages, (seen, said)) in enumerate(zip(asked, learnt, strict=True)):
        given = question(model, Row((*messages, {"role": "assistant", "content": "x"}), 1))
        assert model.decode(seen) == template.render(model, given, ask=True)
        assert said[-1] == end
        text = model.decode(said)
        assert read(said).strip() == f"Answer {number} is {{x}}.\nSo."
        assert "Question" not in text
        assert "Under" not in text
        closed = any(turn.unsaid for turn in turns_of(model, row))
        assert (f"Reason {number}." in text) == (reasoning and not closed)
    assert len(examples) in (1, turns)


@pytest.mark.parametrize("path", [path for path in templates() if path.stem not in TOOLS_ALONE], ids=lambda path: path.stem)
def test_thinking_is_as_the_recipe_has_it(path: Path) -> None:
    """A template's switch is fixed, on and off render differently, and without a word it is the template's own default."""
    model, untold, told = (Words(path.read_text(encoding="utf-8")) for _ in range(3))
    untold.chat_template = template.fix_date(untold.chat_template, DAY.day)
    asked = [{"role": "user", "content": "hi"}]

    def prompt(thinking: bool | None) -> str:
        other: Any = Words(model.chat_template)
        other.chat_template = template.settle(other, ChatSettings(DAY.day, thinking))
        again = template.settle(other, ChatSettings(DAY.day, thinking))
        assert again == other.chat_template  # what is settled stays so
        return template.render(other, asked, ask=True)

    assert prompt(None) == template.render(untold, asked, ask=True)  # type: ignore[arg-type]
    try:
        on, off = prompt(True), prompt(False)
    except ModelError as error:
        assert "no switch for thinking" in error.message  # noqa: PT017
        return
    assert on != off
    for value in ("true", "false"):  # what a server tells a template by itself changes nothing
        told.chat_template = "{%- set enable_thinking = " + value + " %}" + template.settle(model, DAY)  # type: ignore[arg-type]
        assert template.render(told, asked, ask=True) == prompt(None)  # type: ignore[arg-type]


def test_most_templates_have_a_switch_that_is_found() -> None:
    fixed = [
        path for path in templates() if path.stem not in TOOLS_ALONE and re.search(r"set (enable_)?thinking", tokenizer(path).chat_template)
    ]
    assert len(fixed) >= 20


ODD = {
    "padded": (" q \n", "  a \n"), "an end in the answer": ("q", "say <|im_end|> ok"), "the question again": ("x", "x"),
    "no question": ("", "a"), "braces": ("{{ x }}", "{% if %}{{ y }}"), "a mark that is not closed": ("q", "<think> hm"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_texts_are_learnt_as_they_stand(odd: str) -> None:
    """By every template: the answer's own text is learnt, and nothing before its own beginning."""
    asked, answer = ODD[odd]
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    for path in templates():
        if path.stem not in TOOLS_ALONE:
            model: Any = tokenizer(path)
            ((seen, said),) = spans(examples_of(model, Row(messages, 1)))
            assert answer.strip() in model.decode(said), path.stem
            assert model.decode(seen) == template.render(model, messages[:1], ask=True), path.stem
            if "<" not in answer:
                assert answer_reader(model)(said).strip() == answer.strip(), path.stem


THINKING = [
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "content": "<think>\nI check divisors two up to the root.\n</think>\n\nYes."},
    {"role": "user", "content": "And 9?"},
    {"role": "assistant", "content": "<think>\n3 times 3.\n</think>\n\nNo."},
]
QWEN3, QWEN35 = "Qwen-Qwen3-0.6B", "Qwen3.5-4B"


def learnt(model: Any, *rows: list[Message]) -> list[str]:
    return [
        model.decode([label for label in example.labels if label != IGNORED])
        for example in tokenise(model, [Row(tuple(messages), n) for n, messages in enumerate(rows, 1)])
    ]


def made(name: str, settings: ChatSettings = DAY) -> Words:
    model = Words((llama_cpp.models() / "templates" / f"{name}.jinja").read_text(encoding="utf-8"))
    model.chat_template = template.settle(model, settings)  # type: ignore[arg-type]
    return model


def test_reasoning_of_earlier_turns_is_in_no_prompt() -> None:
    first, second = (
        "<think>\nI check divisors two up to the root.\n</think>\n\nYes.<|im_end|>",
        "<think>\n3 times 3.\n</think>\n\nNo.<|im_end|>",
    )
    model: Any = made(QWEN3)
    assert learnt(model, THINKING) == [first, second]
    _, later = examples_of(model, Row(tuple(THINKING), 1))
    prompt = model.decode([n for n, label in zip(later.input_ids, later.labels, strict=True) if label == IGNORED])
    assert prompt == (
        "<|im_start|>user\nIs 7 prime?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nAnd 9?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_thinking_the_reasoning_is_left_out_and_that_is_known() -> None:
    model: Any = made(QWEN3, ChatSettings(DAY.day, thinking=False))
    assert learnt(model, THINKING) == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert [turn.unsaid for turn in turns_of(model, Row(tuple(THINKING), 1))] == [True, True]
    assert turns_of(model, Row(tuple(THINKING), 1)).__next__().prompt.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (QWEN35, "Sum.\n</think>\n\n4<|im_end|>"),  # the prompt has begun the reasoning
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "Sum.\n</think>\n\n4<｜end▁of▁sentence｜>"),
        ("GLM-4.7-Flash", "Sum.</think>4<|user|>"),
        ("openai-gpt-oss-120b", "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"),
        ("Qwen-Qwen2.5-7B-Instruct", "<think>\nSum.\n</think>\n\n4<|im_end|>"),  # knows no reasoning: it is text
    ],
)
def test_reasoning_is_said_as_the_template_says_it(name: str, expected: str) -> None:
    by_key = {"role": "assistant", "content": "4", "reasoning_content": "Sum."}
    in_text = {"role": "assistant", "content": "<think>\nSum.\n</think>\n\n4"}
    asked = {"role": "user", "content": "2 + 2?"}
    assert learnt(made(name), [asked, by_key], [asked, in_text]) == [expected, expected]


def test_reasoning_that_has_no_place_is_refused_by_its_place() -> None:
    messages = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "reasoning_content": "Sum."})
    with pytest.raises(DataError, match=r"rows.jsonl, line 4, message 2: the chat template has no place for the reasoning") as caught:
        list(turns_of(made("Reka-Edge"), Row(messages, 4, "rows.jsonl, line 4")))  # type: ignore[arg-type]
    assert caught.value.hint


def test_answers_are_read_alike_whatever_stands_around_them() -> None:
    read = answer_reader(made(QWEN3))
    said = ("4", "<think>\n\n</think>\n\n4", "<think>\nSum.\n</think>\n\n4<|im_end|>")
    assert [read(text).strip() for text in said] == ["4", "4", "4"]
    model = made(QWEN3)
    ids = model("<think>\nSum.\n</think>\n\n4<|im_end|>\n<|im_start|>user", add_special_tokens=False)["input_ids"]
    assert answer_reader(model)(ids).strip() == "4"
    assert answer_reader(model)("<think>\nSum without end").strip() == ""
    assert answer_reader(made(QWEN35))(model("Sum, not over", add_special_tokens=False)["input_ids"]) == ""
    functionary = made("meetkai-functionary-medium-v3.2")
    assert answer_reader(functionary)("all\nall of them").strip() == "all of them"


def test_a_system_message_goes_into_the_question_where_the_template_takes_none() -> None:
    system, asked, answered = ({"role": role, "content": role.upper()} for role in ("system", "user", "assistant"))
    with pytest.raises(DataError, match="System role not supported") as caught:
        learnt(made("google-gemma-2-2b-it"), [system, asked, answered])
    assert "data.system_in_question=true" in str(caught.value.hint)
    model: Any = made("google-gemma-2-2b-it", ChatSettings(DAY.day, system_in_question=True))
    (turn,) = turns_of(model, Row((system, asked, answered), 1))
    assert turn.prompt == "<BOS><start_of_turn>user\nSYSTEM\n\nUSER<end_of_turn>\n<start_of_turn>model\n"
    assert template.render(model, [asked], ask=True) == "<BOS><start_of_turn>user\nUSER<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["Qwen 3", "Gemma 4", "Phi 3.5"])
def test_real_vocabularies_give_the_ids_of_inference(name: str, tmp_path: Path) -> None:
    """The prompt's ids by themselves, then ids that a tokenizer makes of the answer; no piece of the next turn.

    Of a byte-level vocabulary, one of pieces, and one that begins a text with a space; the others go through llama.cpp (tests/line).
    """
    family = families.by_name(name)
    families.make_tokenizer(family, tmp_path / "model")
    model = hf.load_tokenizer(tmp_path / "model", DAY)
    system = (False,) if family.template in NO_SYSTEM else (False, True)
    for row in (Row(tuple(conversation(turns, system=first, reasoning=False)), 1) for turns in (1, 2, 3) for first in system):
        asked = [row.messages[:n] for n, message in enumerate(row.messages) if message["role"] == "assistant"]
        found = spans(list(tokenise(model, [row])))
        assert [seen for seen, _ in found] == [template.token_ids(model, template.render(model, messages, ask=True)) for messages in asked]
        assert [said[-1] for _, said in found] == turn_ends(model) * len(asked)
        assert [answer_reader(model)(said).strip() for _, said in found] == [f"Answer {n} is {{x}}.\nSo." for n in range(len(asked))]

"""How a chat template writes an answer, and what ends its turn; tools, calls and results. Found by rendering marked messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ftkit.data.rows import CALLS, TOOLS, Message
from ftkit.data.template import render, special_tokens
from ftkit.data.thinking import KEYS, MARKS
from ftkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER, REASONING = "qzanswerqz", "qzreasonqz"  # texts that no template changes
ASKED: Message = {"role": "user", "content": "qzuserqz"}
AGAIN: Message = {"role": "user", "content": "qzagainqz"}
TOOL, RESULT, FIRST, SECOND = "qztoolqz", "qzresultqz", "qzfirstqz", "qzsecondqz"
DESCRIBED = {"type": "object", "properties": {"qzkeyqz": {"type": "string", "description": "a text"}}, "required": ["qzkeyqz"]}
GIVEN = [{"type": "function", "function": {"name": TOOL, "description": "a tool", "parameters": DESCRIBED}}]


@dataclass(frozen=True)
class Manner:
    """How a template writes the last answer of a conversation, found by rendering marked messages."""

    prompt: str  # what it writes of one question
    before: str  # what it writes between the prompt and an answer without reasoning
    tail: str  # what it writes after the answer
    end: str  # of that, what ends the turn and is learnt; where it writes nothing, what comes once the user speaks again
    key: str | None  # by which of a message's keys it takes the reasoning
    inline: bool  # whether it leaves reasoning that stands in the content there
    between: str | None  # what it writes between the reasoning and the answer, where it takes the reasoning by a key


@dataclass(frozen=True)
class Calling:
    """How a template writes tools, calls of them and what they give."""

    tools: bool  # whether it writes what may be called
    calls: bool  # whether it writes calls
    results: bool  # whether it writes what a call gives
    as_text: bool  # whether it takes the arguments of a call as JSON text; else as an object
    tail: str  # what it writes after the last call
    end: str  # what ends the turn there and is learnt; where it writes nothing, what comes before the result


def manner_of(tokenizer: PreTrainedTokenizerBase) -> Manner:
    """Raises ModelError where the template writes no answer."""
    return _manner(tokenizer, str(tokenizer.chat_template or ""), str(tokenizer.eos_token or ""))


@lru_cache(maxsize=8)
def _manner(tokenizer: PreTrainedTokenizerBase, _template: str, eos: str) -> Manner:
    def written(messages: Sequence[Message], *, ask: bool = False) -> str:
        return _written(tokenizer, messages, ask=ask)

    answered: Message = {"role": "assistant", "content": ANSWER}
    asked = ASKED if written([ASKED], ask=True) else {**ASKED, TOOLS: GIVEN}  # some are for tools alone
    prompt, whole = render(tokenizer, [asked], ask=True), render(tokenizer, [asked, answered], ask=False)
    head, found, tail = whole.rpartition(ANSWER)
    if not found:
        raise ModelError("The model's chat template does not write what the assistant says.", "give the model another: --set data.template")
    after = written([asked, answered, AGAIN]).partition(ANSWER)[2].partition(AGAIN["content"])[0]
    common = shared(tail, after)
    ends = (_end(tokenizer, text) for text in (common, tail, after))
    key, between = None, None
    for name in KEYS:
        text = written([asked, {**answered, name: REASONING}])
        if REASONING in text and ANSWER in text:
            key, between = name, text.rpartition(REASONING)[2].rpartition(ANSWER)[0]
            break
    block, before = MARKS[0].block(REASONING), head.removeprefix(prompt) if head.startswith(prompt) else ""
    return Manner(
        prompt=prompt,
        before=before,
        tail=tail,
        end=next(filter(None, ends), eos),
        key=key,
        inline=not has_mark(before) and block + ANSWER in written([asked, {**answered, "content": block + ANSWER}, AGAIN], ask=True),
        between=between,
    )


def shared(first: str, second: str) -> str:
    """What both texts begin with."""
    at = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:at]


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool = False) -> str:
    """What the template writes; nothing where it refuses."""
    try:
        return render(tokenizer, messages, ask=ask)
    except ModelError:
        return ""


def has_mark(text: str) -> bool:
    return any(mark.closes in text for mark in MARKS)


def _end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text up to and including the end of sequence or, where that is not in it, up to its first special token."""
    eos = str(tokenizer.eos_token or "")
    if eos and eos in text:
        return text[: text.index(eos) + len(eos)]
    pattern = special_tokens(tokenizer)
    found = pattern.search(text) if pattern else None
    return text[: found.end()] if found else ""


def calling_of(tokenizer: PreTrainedTokenizerBase) -> Calling:
    """Raises ModelError where the template writes no answer."""
    return _calling(tokenizer, str(tokenizer.chat_template or ""), manner_of(tokenizer))


@lru_cache(maxsize=8)
def _calling(tokenizer: PreTrainedTokenizerBase, _template: str, manner: Manner) -> Calling:
    """llama.cpp (common/jinja/caps.cpp) too gives the arguments as an object where the template then writes them, else as text."""

    def written(*messages: Message) -> str:
        return _written(tokenizer, [{**ASKED, TOOLS: GIVEN}, *messages])

    def called(*values: str, as_text: bool) -> Message:
        calls = []
        for number, value in enumerate(values, 1):
            arguments = {"qzkeyqz": value}
            function = {"name": TOOL, "arguments": json.dumps(arguments) if as_text else arguments}
            calls.append({"type": "function", "function": function, "id": f"call{number:05d}"})
        return {"role": "assistant", "content": "", CALLS: calls}

    def result(number: int) -> Message:
        return {"role": "tool", "content": RESULT, "name": TOOL, "tool_call_id": f"call{number:05d}"}

    as_text = FIRST not in written(called(FIRST, as_text=False))
    whole = written(called(FIRST, as_text=as_text))
    *_, rest = whole.rpartition(FIRST)
    answered = written(called(FIRST, as_text=as_text), result(1), {"role": "assistant", "content": ANSWER}, AGAIN)
    before_result = answered.partition(RESULT)[0].rpartition(FIRST)[2]
    between, both, _ = written(called(FIRST, SECOND, as_text=as_text)).partition(FIRST)[2].partition(SECOND)
    tail, end = _end_of_calls(tokenizer, manner, rest, before_result, between if both else "")
    return Calling(
        tools=TOOL in _written(tokenizer, [{**ASKED, TOOLS: GIVEN}], ask=True),
        calls=FIRST in whole and TOOL in whole.rpartition(ASKED["content"])[2],
        results=RESULT in answered,
        as_text=as_text,
        tail=tail,
        end=end,
    )


def _end_of_calls(tokenizer: PreTrainedTokenizerBase, manner: Manner, rest: str, before_result: str, between: str) -> tuple[str, str]:
    """(tail, end) of a turn of calls.

    `rest` is what stands after the last argument of a last turn, `before_result` after that of one whose result follows, and
    `between` between the arguments of two calls: what stands there too is a call's own.
    """
    common, pattern = shared(rest, before_result), special_tokens(tokenizer)
    last = pattern.findall(manner.end)[-1:] if pattern else []
    for text in (common, rest):
        for end in filter(None, (str(tokenizer.eos_token or ""), *last, manner.end)):
            if end in text:
                return rest[text.index(end) :], end
    if not pattern:
        return "", manner.end
    ends = [found for found in pattern.finditer(common) if found[0] not in between]
    if ends:
        return rest[ends[-1].start() :], ends[-1][0]
    following = pattern.search(before_result, len(common))
    return "", following[0] if following else manner.end

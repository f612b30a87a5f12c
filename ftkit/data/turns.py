"""A conversation → its turns: what each answer is asked with, what is said there, and what of a model's text is its answer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftkit.data.manner import ANSWER, Manner, calling_of, has_mark, manner_of, shared
from ftkit.data.rows import CALLS, TOOLS, Message, Row
from ftkit.data.template import render, special_tokens
from ftkit.data.thinking import KEYS, MARKS, after_thinking, is_closed, opened, split_thinking, without_thinking
from ftkit.errors import DataError, FtkitError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """An answer, and what stands before it."""

    asked: tuple[Message, ...]  # the messages before it, as they are given to the template
    prompt: str  # what the model reads before it answers
    said: str  # what it says then, up to and including what ends its turn
    unsaid: bool  # whether the row has reasoning for it that is not said, since the prompt closes it


def turns_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> Iterator[Turn]:
    """Each of a row's answers that is learnt.

    Raises DataError with file, line and message for what the template cannot say, ModelError where it can say no row.
    """
    manner_of(tokenizer)
    _refuse_unwritten(tokenizer, row)
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant" and number and number not in row.unlearnt:  # what comes first, nobody has asked for
            try:
                yield _turn(tokenizer, row.messages, number)
            except ModelError as error:
                raise DataError(f"{row.where}, message {number + 1}: {error.message}", error.hint) from None


def _refuse_unwritten(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Raise DataError where the template would leave out, in silence, what may be called, a call or what one gave."""
    has = {
        "tools": bool(row.messages[0].get(TOOLS)),
        "calls": any(CALLS in message for message in row.messages),
        "results": any(message["role"] == "tool" for message in row.messages),
    }
    what = next((what for what, used in has.items() if used and not getattr(calling_of(tokenizer), what)), None)
    if what:
        named = {"tools": "what may be called", "calls": "calls of tools", "results": "what tools give"}[what]
        raise DataError(
            f"{row.where}: the chat template does not write {named}.",
            "write it into the text of the messages, take a model whose template does, or leave such rows out",
        )


def has_reasoning(row: Row) -> bool:
    """Whether a row has what was thought before an answer."""
    answers = (message for message in row.messages if message["role"] == "assistant")
    return any(message.get(KEYS[0]) or split_thinking(message["content"])[0] for message in answers)


def question(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Message]:
    """What a row's last answer is asked with, as it is given to the template. Raises DataError as `turns_of` does."""
    try:
        return [_as_taken(tokenizer, message) for message in row.messages[:-1]]
    except FtkitError as error:
        raise DataError(f"{row.where}: {error.message}", error.hint) from None


def _as_taken(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    """A message with its calls and its reasoning as the template looks for them; one that knows no reasoning has it in the content."""
    if message["role"] != "assistant":
        return message
    if CALLS in message and calling_of(tokenizer).as_text:
        message = {**message, CALLS: [_in_text(call) for call in message[CALLS]]}
    reasoning, content = message.get(KEYS[0], ""), message["content"]
    if not reasoning:
        reasoning, content = split_thinking(content)
    if not reasoning:
        return message
    manner = manner_of(tokenizer)
    if manner.key is None and manner.inline:
        spoken = {key: value for key, value in message.items() if key != KEYS[0]}
        return {**spoken, "content": MARKS[0].block(reasoning) + content}
    return {**message, "content": content, KEYS[0]: reasoning}


def _in_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def expected(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """A row's last answer as `answer_reader` reads it of a model: calls as the template writes them."""
    if CALLS not in row.messages[-1]:
        return row.answer
    *_, turn = turns_of(tokenizer, row)
    return answer_reader(tokenizer)(turn.said)


@dataclass(frozen=True)
class _Written:
    """An answer as the template writes it, with what ends its turn."""

    follows: bool  # whether the whole begins with the prompt
    lead: str  # what stands before the content, behind the prompt or where the whole leaves it
    answer: str  # the content, and the end
    asked_alike: bool  # whether it stands behind what the prompt ends with after the last question


_LEAVE_OUT = "leave the row out, or take a model whose template writes it otherwise"
_OTHER_TEMPLATE = "take the row out, or give the model another template: --set data.template=chatml"


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int) -> Turn:
    asked = tuple(_as_taken(tokenizer, message) for message in messages[:number])
    answer, prompt = _as_taken(tokenizer, messages[number]), render(tokenizer, asked, ask=True)
    reasoning, plain = answer.get(KEYS[0], ""), {key: value for key, value in answer.items() if key != KEYS[0]}
    if is_closed(prompt) and not reasoning:
        reasoning, plain["content"] = split_thinking(answer["content"])

    def write(message: Message) -> _Written:
        return _write(tokenizer, asked, prompt, message)

    if reasoning and not is_closed(prompt):
        said = _said_with_reasoning(manner_of(tokenizer), prompt, plain, reasoning, write)
    else:
        said = _said(manner_of(tokenizer), prompt, write(plain))
    return Turn(asked, prompt, said, unsaid=bool(reasoning) and is_closed(prompt))


def _write(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Message], prompt: str, message: Message) -> _Written:
    """Raises ModelError where the answer is not the last that the template writes, so that its end is not known."""
    manner, plain = manner_of(tokenizer), {key: value for key, value in message.items() if key != CALLS}
    if CALLS in message and not message["content"].strip():
        plain["content"] = ANSWER  # which shows where what is said begins
    whole = render(tokenizer, [*asked, plain], ask=False)
    content = next((each for each in _trimmed(plain["content"]) if whole.endswith(each + manner.tail)), None)
    if content is None:
        raise ModelError("the chat template changes the text of the answer, so that its end is not known.", _OTHER_TEMPLATE)
    at, answer = len(whole) - len(manner.tail) - len(content), content + manner.end
    if CALLS in message:
        whole, at, answer = _write_calls(tokenizer, asked, message, whole[:at])
    follows = whole.startswith(prompt)
    lead = whole[len(prompt) if follows else _branches_off(tokenizer, prompt, whole) : at]
    question = asked[-1]["content"].strip()
    asks = prompt.rpartition(question)[2] if question else ""
    return _Written(follows, lead, answer, bool(asks) and whole[:at].endswith(asks + manner.before))


def _write_calls(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Message], message: Message, before: str) -> tuple[str, int, str]:
    """(the whole, where what is said begins, that to its end) of an answer that calls tools; `before` stands before one that does not.

    Raises ModelError where the template leaves out a call, or what is said beside it.
    """
    calling, whole = calling_of(tokenizer), render(tokenizer, [*asked, message], ask=False)
    at = _branches_off(tokenizer, before, whole)
    said = whole[at:].removesuffix(calling.tail)
    names = Counter(call["function"]["name"] for call in message[CALLS])
    if not whole.endswith(calling.tail) or any(said.count(name) < times for name, times in names.items()):
        raise ModelError(
            f"the chat template does not write these {names.total()} calls.", "make it one call a message, or leave the row out"
        )
    if message["content"].strip() not in said:
        raise ModelError("the chat template leaves out what is said beside the call.", "take the text out, or leave the row out")
    if calling.end in said:
        raise ModelError("the chat template writes the call behind what ends a turn, so that no server would read it.", _LEAVE_OUT)
    return whole, at, said + calling.end


def _said(manner: Manner, prompt: str, written: _Written) -> str:
    """An answer without reasoning. Reasoning that the prompt begins is ended first."""
    mark = opened(prompt)
    if mark and not (written.follows and mark.closes in written.lead):
        return (manner.between or mark.closing(prompt)) + written.answer
    if written.follows:
        return written.lead + written.answer
    if is_closed(prompt):
        return without_thinking(written.lead) + written.answer
    if written.asked_alike:  # what differs stands before the last question
        return manner.before + written.answer
    raise ModelError("the chat template renders the prompt differently once the answer is there.", _OTHER_TEMPLATE)


def _said_with_reasoning(manner: Manner, prompt: str, plain: Message, reasoning: str, write: Callable[[Message], _Written]) -> str:
    """An answer after its reasoning: as the template writes it, else after the mark that the prompt ends with, or in its empty block."""
    if manner.key:
        written = write({**plain, manner.key: reasoning})
        if written.follows and reasoning.strip() in written.lead and manner.end not in written.lead:
            return written.lead + written.answer
    written, mark = write(plain), opened(prompt)
    if mark:
        return reasoning + (manner.between or mark.closing(prompt)) + written.answer
    for mark in MARKS:
        empty = re.match(rf"\s*{re.escape(mark.opens)}(\s*){re.escape(mark.closes)}", written.lead)
        if empty and written.follows:
            line = "\n" if empty[1] else ""
            return written.lead[: empty.start(1)] + line + reasoning + line + written.lead[empty.end(1) :] + written.answer
    raise ModelError("the chat template has no place for the reasoning of this answer.", _OTHER_TEMPLATE)


def _trimmed(content: str) -> tuple[str, ...]:
    """The ways in which templates write a content: as it stands, or without white space around it."""
    return content, content.lstrip("\n"), content.strip("\n"), content.lstrip(), content.rstrip(), content.strip()


def _branches_off(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str) -> int:
    """Where the whole leaves the prompt, no special token cut in two."""
    at = len(shared(prompt, whole))
    texts = [re.escape(text) for mark in MARKS for text in (mark.opens, mark.closes)]
    special = special_tokens(tokenizer)
    for text in (prompt, whole):
        for found in re.finditer("|".join([*([special.pattern] if special else []), *texts]), text):
            if found.start() < at < found.end():
                at = found.start()
    return at


def answer_reader(tokenizer: Any) -> Callable[[Sequence[int] | str], str]:
    """A function that reads what a model said after a prompt, as ids or text: the answer alone, on every engine alike.

    Without its end, without reasoning, and without what the template writes before an answer. Empty where the reasoning does
    not end.
    """
    from ftkit.data.stops import stops

    ends, manner, special = set(stops(tokenizer, None)), manner_of(tokenizer), special_tokens(tokenizer)
    mark, before = opened(manner.prompt), manner.before.strip()
    tells = bool(before) and (has_mark(before) or bool(special and special.search(before)))  # it stands nowhere else

    def read(said: Sequence[int] | str) -> str:
        if not isinstance(said, str):
            end = next((n for n, token in enumerate(said) if token in ends), len(said))
            said = str(tokenizer.decode(list(said[:end]), skip_special_tokens=False))
        elif mark and mark.closes not in said:  # a server that keeps the reasoning to itself
            return special.sub("", said) if special else said
        if tells and before in said:
            answer = after_thinking(said.rpartition(before)[2], None)
        else:
            answer = after_thinking(said.lstrip().removeprefix(before), mark)
        answer = answer.removesuffix(manner.end).removesuffix(_but_the_last(special, manner.end))
        return special.sub("", answer) if special else answer

    return read


def _but_the_last(special: re.Pattern[str] | None, end: str) -> str:
    """What an end of turn holds before its last token, at which an engine stops."""
    found = list(special.finditer(end)) if special else []
    return end[: found[-1].start()] if found else ""

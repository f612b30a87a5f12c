"""A conversation → its turns: what each answer is asked with, what is said there, and what of a model's text is its answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ftkit.data.rows import Message, Row
from ftkit.data.template import render, special_tokens
from ftkit.data.thinking import KEYS, MARKS, after_thinking, is_closed, opened, split_thinking, without_thinking
from ftkit.errors import DataError, FtkitError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER, REASONING = "qzanswerqz", "qzreasonqz"  # texts that no template changes
ASKED: Message = {"role": "user", "content": "qzuserqz"}
AGAIN: Message = {"role": "user", "content": "qzagainqz"}


@dataclass(frozen=True)
class Turn:
    """An answer, and what stands before it."""

    asked: tuple[Message, ...]  # the messages before it, as they are given to the template
    prompt: str  # what the model reads before it answers
    said: str  # what it says then, up to and including what ends its turn
    unsaid: bool  # whether the row has reasoning for it that is not said, since the prompt closes it


@dataclass(frozen=True)
class Manner:
    """How a template writes the last answer of a conversation, found by rendering marked messages."""

    before: str  # what it writes between the prompt and an answer without reasoning
    tail: str  # what it writes after the answer
    end: str  # of that, what ends the turn and is learnt; where it writes nothing, what comes once the user speaks again
    key: str | None  # by which of a message's keys it takes the reasoning
    inline: bool  # whether it leaves reasoning that stands in the content there
    between: str | None  # what it writes between the reasoning and the answer, where it takes the reasoning by a key


def manner_of(tokenizer: PreTrainedTokenizerBase) -> Manner:
    """Raises ModelError where the template writes no answer."""
    return _manner(tokenizer, str(tokenizer.chat_template or ""), str(tokenizer.eos_token or ""))


@lru_cache(maxsize=8)
def _manner(tokenizer: PreTrainedTokenizerBase, _template: str, eos: str) -> Manner:
    def written(messages: Sequence[Message], *, ask: bool = False) -> str:
        try:
            return render(tokenizer, messages, ask=ask)
        except ModelError:
            return ""

    answered: Message = {"role": "assistant", "content": ANSWER}
    prompt, whole = render(tokenizer, [ASKED], ask=True), render(tokenizer, [ASKED, answered], ask=False)
    head, found, tail = whole.rpartition(ANSWER)
    if not found:
        raise ModelError("The model's chat template does not write what the assistant says.", "give the model another: --set data.template")
    after = written([ASKED, answered, AGAIN]).partition(ANSWER)[2].partition(AGAIN["content"])[0]
    shared = _shared(tail, after)
    ends = (_end(tokenizer, text) for text in (shared, tail, after))
    key, between = None, None
    for name in KEYS:
        text = written([ASKED, {**answered, name: REASONING}])
        if REASONING in text and ANSWER in text:
            key, between = name, text.rpartition(REASONING)[2].rpartition(ANSWER)[0]
            break
    block, before = MARKS[0].block(REASONING), head.removeprefix(prompt) if head.startswith(prompt) else ""
    return Manner(
        before=before,
        tail=tail,
        end=next(filter(None, ends), eos),
        key=key,
        inline=not _has_mark(before) and block + ANSWER in written([ASKED, {**answered, "content": block + ANSWER}, AGAIN], ask=True),
        between=between,
    )


def _shared(first: str, second: str) -> str:
    """What both texts begin with."""
    at = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[:at]


def _has_mark(text: str) -> bool:
    return any(mark.closes in text for mark in MARKS)


def _end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text up to and including the end of sequence or, where that is not in it, up to its first special token."""
    eos = str(tokenizer.eos_token or "")
    if eos and eos in text:
        return text[: text.index(eos) + len(eos)]
    pattern = special_tokens(tokenizer)
    found = pattern.search(text) if pattern else None
    return text[: found.end()] if found else ""


def turns_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> Iterator[Turn]:
    """Each of a row's answers that is learnt.

    Raises DataError with file, line and message for what the template cannot say, ModelError where it can say no row.
    """
    manner_of(tokenizer)
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant" and number and number not in row.unlearnt:  # what comes first, nobody has asked for
            try:
                yield _turn(tokenizer, row.messages, number)
            except ModelError as error:
                raise DataError(f"{row.where}, message {number + 1}: {error.message}", error.hint) from None


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
    """A message with its reasoning where the template looks for it; one that knows no reasoning has it in the content."""
    if message["role"] != "assistant":
        return message
    reasoning, content = message.get(KEYS[0], ""), message["content"]
    if not reasoning:
        reasoning, content = split_thinking(content)
    if not reasoning:
        return message
    manner = manner_of(tokenizer)
    if manner.key is None and manner.inline:
        return {"role": "assistant", "content": MARKS[0].block(reasoning) + content}
    return {"role": "assistant", "content": content, KEYS[0]: reasoning}


@dataclass(frozen=True)
class _Written:
    """An answer as the template writes it, with what ends its turn."""

    follows: bool  # whether the whole begins with the prompt
    lead: str  # what stands before the content, behind the prompt or where the whole leaves it
    answer: str  # the content, and the end
    asked_alike: bool  # whether it stands behind what the prompt ends with after the last question


_OTHER_TEMPLATE = "take the row out, or give the model another template: --set data.template=chatml"


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int) -> Turn:
    asked = tuple(_as_taken(tokenizer, message) for message in messages[:number])
    answer, prompt = _as_taken(tokenizer, messages[number]), render(tokenizer, asked, ask=True)
    reasoning, plain = answer.get(KEYS[0], ""), {"role": "assistant", "content": answer["content"]}
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
    manner, whole = manner_of(tokenizer), render(tokenizer, [*asked, message], ask=False)
    content = next((each for each in _trimmed(message["content"]) if whole.endswith(each + manner.tail)), None)
    if content is None:
        raise ModelError("the chat template changes the text of the answer, so that its end is not known.", _OTHER_TEMPLATE)
    follows, at = whole.startswith(prompt), len(whole) - len(manner.tail) - len(content)
    lead = whole[len(prompt) if follows else _branches_off(tokenizer, prompt, whole) : at]
    question = asked[-1]["content"].strip()
    asks = prompt.rpartition(question)[2] if question else ""
    return _Written(follows, lead, content + manner.end, bool(asks) and whole[:at].endswith(asks + manner.before))


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
    at = len(_shared(prompt, whole))
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
    mark, before = opened(render(tokenizer, [ASKED], ask=True)), manner.before.strip()
    tells = bool(before) and (_has_mark(before) or bool(special and special.search(before)))  # it stands nowhere else

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

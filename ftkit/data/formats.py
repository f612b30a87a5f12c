"""The forms of a row that ftkit reads, as a table; and what it does not read, by name."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import Any

from ftkit.data.rows import CALLS, ROLES, TOOLS, Message
from ftkit.data.thinking import KEYS, split_thinking
from ftkit.data.tools import pair, read_calls, read_tools
from ftkit.data.transcripts import Turn, is_chat, turns_of, writing_of

# Who speaks, by the names that datasets have for it.
SPEAKERS = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "ai": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
CALLERS = ("function_call", "tool_call")  # speakers whose text is a call
# Keys that change what a row or a message means and are not read: what they are, and what to do.
UNREAD = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "only text is learnt"),
    "chosen": "a preference has `rejected` beside it",
    "rejected": "a preference has `chosen` beside it",
    "tool_choice": "no chat template tells a model so; take the key out",
}
# The same beside a question, which cannot be answered without them, and beside a text that would be learnt as it is.
WITHOUT = "; to leave it out: data.columns={unread: KEY}"
UNREAD_WITH_A_QUESTION = {
    **dict.fromkeys(("choices", "options"), "put what can be chosen into the question" + WITHOUT),
    **dict.fromkeys(("article", "passage"), "data.columns={context: KEY} puts it before the question" + WITHOUT),
}
UNREAD_WITH_TEXT = {
    "message_tree_id": "such a text is one message of a tree; make `messages` of each thread" + WITHOUT,
    **dict.fromkeys(("labels", "intent", "coarse_label"), "to learn it as the answer: data.columns={label: KEY}" + WITHOUT),
    "summary": "to learn it as the answer: data.columns={prompt: text, completion: summary}" + WITHOUT,
}
UNREAD_IN_MESSAGES = {**UNREAD, "name": "chat templates write no names; put it into the text, or take the key out"}
GIVEN = ("tools", "functions")  # by which a row has what may be called
CALLED = ("tool_calls", "function_call")  # by which a message has calls
EMPTY = ("[]", "{}", "null", "auto")  # as some tables hold nothing
LEARNT = ("weight", "train", "loss")  # of a message: whether it is learnt
HISTORY = "history"
TEXT, PREFERENCE, CLASSIFICATION = "plain text", "preference", "classification"  # names of forms
SYSTEM = ("system", "system_prompt")  # of a row
UNREAD_KEY = "unread"  # for data.columns: what is left out
CHOSEN, REJECTED = "chosen", "rejected"
CHAT, TEXT_KEY = "chat", "text"
ANSWERS = ("completion", "response", "answer", "output", "solution")  # where the answer to a chat up to it may stand


@dataclass(frozen=True)
class Conversation:
    """A row, read: its messages, and which of the answers (by their place, from 0) are not learnt."""

    messages: tuple[Message, ...]
    unlearnt: frozenset[int]
    form: str
    rejected: Message | None = None  # of a preference: the answer that is worse than the last message
    passed_over: tuple[str, ...] = ()  # columns that are not read


@dataclass
class _Reading:
    """Messages as they are found."""

    labels: Sequence[str] = ()
    messages: list[Message] = field(default_factory=list)
    unlearnt: set[int] = field(default_factory=set)
    rejected: Message | None = None

    def add(self, message: Any, *, learnt: bool = True) -> None:
        """One message, of any of the usual shapes."""
        number = len(self.messages) + 1
        speaker = _first(message, ("role", "from")) if isinstance(message, Mapping) else message
        if not isinstance(message, Mapping) or not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
            raise ValueError(f"message {number} has role {reprlib.repr(speaker)}; roles are {', '.join(ROLES)} (or {_OTHER_NAMES})")
        role, content = SPEAKERS[speaker.lower()], _first(message, ("content", "value", "text"))
        calls = _first(message, CALLED)
        if speaker.lower() in CALLERS and not calls:
            calls, content = content, None
        if role == "tool":
            made: Message = {"role": role, "content": _given_text(content, number)}
            if (call := message.get("tool_call_id")) is not None:
                made["tool_call_id"] = str(call)
            self.messages.append(made)
            return
        _refuse_unread(message, UNREAD_IN_MESSAGES, f"message {number}: ")
        called = calls not in (None, [], {}, *EMPTY)
        if called and role != "assistant":
            raise ValueError(f"message {number} calls a tool, and is the {role}'s")
        made = {"role": role, "content": "" if called and content is None else _text(content, number)}
        if role == "assistant":
            if called:
                made[CALLS] = read_calls(calls, number)
            reasoning = _first(message, KEYS)
            if reasoning:
                made[KEYS[0]] = _text(reasoning, number)
            if not (learnt and _is_learnt(message, number)):
                self.unlearnt.add(number - 1)
        self.messages.append(made)

    def say(self, role: str, content: Any) -> None:
        self.add({"role": role, "content": content})


_OTHER_NAMES = ", ".join(name for name, role in SPEAKERS.items() if name != role)


def _first(value: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _text(content: Any, number: int) -> str:
    """A content as text; parts of text are put together."""
    if isinstance(content, list):
        for part in content:
            if isinstance(part, Mapping) and part.get("type") != "text":
                raise ValueError(f"message {number} has a part of type {reprlib.repr(part.get('type'))}; only text is learnt")
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(map(str, texts)) if texts and all(isinstance(text, str) for text in texts) else None
    elif isinstance(content, (bool, int, float)) and math.isfinite(content):
        content = json.dumps(content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"message {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return content


def _given_text(content: Any, number: int) -> str:
    """What a tool gave, as text: an object in JSON."""
    parts = isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") for part in content)
    if content is None or (isinstance(content, (Mapping, list)) and not parts):
        content = "" if content is None else json.dumps(content, ensure_ascii=False)
    return _text(content, number)


def _is_learnt(message: Mapping[str, Any], number: int) -> bool:
    for key in LEARNT:
        value = message.get(key)
        if value is not None and value not in (0, 1):  # False and True are these
            raise ValueError(f"message {number}: `{key}` is {reprlib.repr(value)}; an answer is learnt (1, true) or not (0, false)")
        if value is not None and not value:
            return False
    return True


def _refuse_unread(value: Mapping[str, Any], unread: Mapping[str, str], where: str = "") -> None:
    """Raise ValueError for a key that changes the meaning; an empty one changes nothing."""
    for key, why in unread.items():
        if value.get(key) and value[key] not in EMPTY:
            raise ValueError(f"{where}`{key}` is not read: {why}")


def _messages(key: str) -> Callable[[_Reading, Mapping[str, Any]], None]:
    def read(reading: _Reading, row: Mapping[str, Any]) -> None:
        messages = row[key]
        if isinstance(messages, str) and messages.lstrip().startswith("["):  # as a table holds them
            try:
                messages = json.loads(messages)
            except (ValueError, RecursionError):
                raise ValueError(f"`{key}` is a text that is not JSON") from None
        if not isinstance(messages, list) or not messages:
            raise ValueError("no messages" if key == "messages" else f"`{key}` is not a list of objects")
        for n, message in enumerate(messages):
            if isinstance(message, str) and all(isinstance(each, str) for each in messages):  # by turns, as LIMA has them
                reading.say("assistant" if n % 2 else "user", message)
            else:
                reading.add(message)

    return read


def _calls(reading: _Reading, row: Mapping[str, Any]) -> None:
    """A question, and the calls that answer it."""
    reading.say("user", row["query"])
    reading.add({"role": "assistant", CALLED[0]: row["answers"]})


def _chat(reading: _Reading, row: Mapping[str, Any]) -> None:
    """A whole chat in one text; or up to where the answer begins, which then stands beside it."""
    for message in reading.messages[:1]:  # the row's `system`, written in the same way
        message["content"] = message["content"].removeprefix("SYSTEM:").strip()
    turns = _turns(row[CHAT], CHAT)
    beside = next((key for key in ANSWERS if row.get(key) not in (None, "")), None)
    if beside:
        if turns[-1] == ("assistant", ""):
            turns.pop()
        elif turns[-1][0] == "assistant":
            raise ValueError(
                f"`{CHAT}` ends with an answer, and `{beside}` is beside it; to leave it out: data.columns={{unread: {beside}}}"
            )
    for role, content in turns:
        reading.add({"role": role, "content": content}, learnt=not beside)
    if beside:
        reading.say("assistant", row[beside])


def _turns(text: Any, key: str) -> list[Turn]:
    if not isinstance(text, str):
        raise ValueError(f"`{key}` is no text; for a list of messages: data.columns={{messages: {key}}}")
    try:
        return turns_of(text)
    except ValueError as error:
        raise ValueError(f"`{key}` {error}") from None


def _question_and_answer(asked: str, answered: str, more: str | None = None) -> Callable[[_Reading, Mapping[str, Any]], None]:
    def read(reading: _Reading, row: Mapping[str, Any]) -> None:
        question, answer = row[asked], row[answered]
        for key, value in ((asked, question), (answered, answer)):
            if isinstance(value, list) and key != "label" and not all(isinstance(message, Mapping) for message in value):
                raise ValueError(f"`{key}` is a list of {len(value)}; a row is one question and its answer (pandas: orient='records')")
        if more and row.get(more):
            parts = [part for part in (question, row[more]) if part not in (None, "")]
            question = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
        if answered == "label":  # or several
            answer = (
                ", ".join(str(_label(one, reading.labels)) for one in answer)
                if isinstance(answer, list)
                else _label(answer, reading.labels)
            )
        if isinstance(question, list) or isinstance(answer, list):  # TRL's conversational form
            _both(reading, question, answer)
            return
        reading.say("user", question)
        reading.add({"role": "assistant", "content": answer, KEYS[0]: _first(row, KEYS)})

    return read


def _label(answer: Any, names: Sequence[str]) -> Any:
    if answer is None or (names and str(answer) == "-1"):
        raise ValueError("this row has no label, or -1 in its place, as the hub's tables write it")
    if not names or not str(answer).isdecimal():
        return answer
    if int(answer) >= len(names):
        raise ValueError(f"label {answer} has no name: data.labels names {len(names)}, from 0")
    return names[int(answer)]


def _both(reading: _Reading, asked: Any, answered: Any) -> None:
    """Messages before the answer, of which none is learnt, and the answer's own."""
    if isinstance(answered, list) and len(answered) > 1 and (first := _said(answered[0])):
        before = [_said(message) for message in asked] if isinstance(asked, list) else [str(asked).strip()]
        if first in before:
            raise ValueError("the answer's messages begin with the question again: data.columns={messages: …} names them alone")
    for messages, role, learnt in ((asked, "user", False), (answered, "assistant", True)):
        for message in messages if isinstance(messages, list) else [{"role": role, "content": messages}]:
            reading.add(message, learnt=learnt)


def _said(message: Any) -> str:
    """What a message says, of whatever shape."""
    content = _first(message, ("content", "value", "text")) if isinstance(message, Mapping) else None
    return content.strip() if isinstance(content, str) else ""


def _preference(reading: _Reading, row: Mapping[str, Any]) -> None:
    """Two answers to one prompt, which has a key of its own or begins both of them."""
    asked = next((key for key in ASKED if row.get(key) not in (None, "", [])), None)
    sides = []
    for key in (CHOSEN, REJECTED):
        side = _Reading(reading.labels, [*reading.messages])
        answer = [row[key]] if isinstance(row[key], Mapping) else row[key]
        if isinstance(answer, str) and (writing_of(answer) or (asked is None and is_chat(answer))):
            answer = [{"role": role, "content": content} for role, content in _turns(answer, key)]
        if isinstance(answer, list) and len(answer) > 1:
            for message in answer:
                side.add(message)
            if asked:
                _refuse_another_prompt(asked, row, side.messages, key)
        elif asked is None:
            raise ValueError(f"no prompt: `{key}` holds the answer alone; the prompt is one of {', '.join(ASKED)}")
        else:
            _add_prompt(side, asked, row)
            for message in answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]:
                side.add(message)
        pair(side.messages)
        sides.append(side)
    chosen, rejected = sides
    for number, (one, other) in enumerate(zip_longest(chosen.messages[:-1], rejected.messages[:-1]), 1):
        if one != other:
            raise ValueError(f"`{CHOSEN}` and `{REJECTED}` do not answer the same prompt: message {number} is another")
    reading.messages, reading.rejected = chosen.messages, rejected.messages[-1]
    reading.unlearnt = {n for n, message in enumerate(chosen.messages[:-1]) if message["role"] == "assistant"}


def _add_prompt(reading: _Reading, asked: str, row: Mapping[str, Any]) -> None:
    """The prompt under its key, as messages or as text; to an instruction belongs its `input`."""
    prompt = row[asked]
    if isinstance(prompt, str) and asked in MESSAGES and prompt.lstrip().startswith("["):
        prompt = json.loads(prompt)
    if asked == "instruction" and row.get("input"):
        prompt = "\n\n".join([str(prompt), str(row["input"])])
    if asked == CHAT:
        turns = _turns(prompt, CHAT)
        prompt = [{"role": role, "content": content} for role, content in turns if (role, content) != ("assistant", "")]
    for message in prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]:
        reading.add(message)


def _refuse_another_prompt(asked: str, row: Mapping[str, Any], messages: Sequence[Message], key: str) -> None:
    """Raise ValueError where a prompt beside a whole conversation is not what that asks last."""
    if asked in MESSAGES:  # as the chosen conversation once more
        return
    own = _Reading()
    _add_prompt(own, asked, row)
    texts = [message["content"].strip() for message in messages if message["role"] == "user"]
    if own.messages[-1]["content"].strip() not in texts:
        raise ValueError(f"`{asked}` is not what `{key}` answers")


def _plain(reading: _Reading, row: Mapping[str, Any]) -> None:
    """A text by itself: it is nobody's answer."""
    reading.say("assistant", row[TEXT_KEY])


MESSAGES = ("messages", "conversations", "conversation")
BESIDE = (HISTORY, *GIVEN, *LEARNT)  # read of a row of any form
ASKED = ("prompt", "question", "instruction", "input", "query", CHAT, *MESSAGES)  # of a preference: where its prompt may stand


@dataclass(frozen=True)
class Form:
    """One form: it is a row's where the row has all of `keys`."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[_Reading, Mapping[str, Any]], None]
    also: tuple[str, ...] = ()  # keys that are read where a row has them
    prompts: tuple[str, ...] = ()  # those of them that hold what is asked, as text

    @property
    def systems(self) -> tuple[str, ...]:
        """Keys of a system message; messages have one of their own."""
        return SYSTEM[:1] if self.keys[0] in MESSAGES else SYSTEM

    @property
    def reads(self) -> frozenset[str]:
        """All keys that are read of such a row, and the one for what is left out."""
        judged = ("label",) if self.keys[-1] in ("completion", "response") else ()  # by which KTO calls an answer good
        return frozenset((*self.keys, *self.also, *self.systems, *judged, *BESIDE, UNREAD_KEY))

    @property
    def example(self) -> str:
        """As it is shown."""
        keys = (f'"{key}"' + (": [...]" if key in MESSAGES else "") for key in (("prompt",) if self.name == PREFERENCE else ()) + self.keys)
        return "{" + ", ".join(keys) + "}"


def _one_question(name: str, asked: str, answered: str, more: str | None = None) -> Form:
    """A form of one question, which `more` follows, and its answer."""
    also = (*filter(None, [more]), *KEYS)
    return Form(name, (asked, answered), _question_and_answer(asked, answered, more), also, () if asked == TEXT_KEY else (asked,))


FORMS = (
    Form(PREFERENCE, (CHOSEN, REJECTED), _preference, ASKED, ASKED),
    Form("messages", ("messages",), _messages("messages")),
    Form("ShareGPT", ("conversations",), _messages("conversations")),
    Form("conversation", ("conversation",), _messages("conversation")),
    _one_question("prompt and completion", "prompt", "completion"),
    _one_question("prompt and response", "prompt", "response"),
    _one_question("question and response", "question", "response", "context"),
    _one_question("problem and solution", "problem", "solution"),
    _one_question("Alpaca", "instruction", "output", "input"),
    _one_question("Dolly", "instruction", "response", "context"),
    _one_question("question and answer", "question", "answer", "context"),
    _one_question("query and response", "query", "response"),
    _one_question("query and answer", "query", "answer"),
    _one_question("input and output", "input", "output"),
    _one_question(CLASSIFICATION, TEXT_KEY, "label"),
    Form("query and calls", ("query", "answers", "tools"), _calls, prompts=("query",)),
    Form(TEXT, (TEXT_KEY,), _plain, prompts=(TEXT_KEY,)),
    Form("chat in one text", (CHAT,), _chat, ANSWERS),
)
# What data.columns may name: keys of the forms, and what is read beside them.
READ = (*dict.fromkeys(key for form in FORMS for key in (*form.keys, *form.also, *form.systems, *BESIDE, UNREAD_KEY)),)
ASKS_ONCE = ("question", "query", "problem", "input", "instruction")  # by the first key of forms of one question
FORMATS = (
    f"ftkit reads {', '.join(form.example for form in FORMS)}; other keys are named as in --set 'data.columns={{prompt: q, completion: a}}'"
)


def conversation_of(value: Any, columns: Mapping[str, str] | None = None, labels: Sequence[str] = ()) -> Conversation:
    """A row in any of the forms. Raises ValueError with what is wrong with it.

    `columns`: the row's own names for ftkit's keys. `labels`: names of a classification's numbers.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a row is an object, not {type(value).__name__}")
    row: Mapping[str, Any] = _renamed(value, columns) if columns else value
    columns, own = columns or {}, {str(key).lower(): str(key) for key in row}
    form = form_of(row, columns)
    if not form and (form := form_of(lower := {str(key).lower(): each for key, each in row.items()}, columns)):
        row = lower
    _refuse_unread(row, {key: why for key, why in UNREAD.items() if not form or key not in form.keys})
    if not form:
        raise ValueError(f"no known form (keys: {_keys(value)})")
    if unread := next((ours for ours in columns if ours not in form.reads), None):
        raise ValueError(f"data.columns names `{unread}`, which is not read of a row of this form ({form.name})")
    _refuse_beside(form, row, labels)
    _refuse_chat(form, row, columns, own)
    for key in LEARNT:
        if row.get(key) is not None and row[key] not in (1, True):
            raise ValueError(f"`{key}` of a whole row is not read; take the row out, or give it to the message")
    reading = _Reading(labels)
    if system := _first(row, form.systems):
        reading.say("system", system)
    for turn in row.get(HISTORY) or ():
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError(f"`{HISTORY}` is not a list of [question, answer]")
        reading.say("user", turn[0])
        reading.say("assistant", turn[1])
    form.read(reading, row)
    pair(reading.messages)
    tools = _first(row, GIVEN)
    if tools not in (None, [], {}, "", *EMPTY) and reading.messages:
        reading.messages[0][TOOLS] = read_tools(tools)
    return replace(_checked(reading, form.name), passed_over=_passed_over(form, row, columns))


def _refuse_beside(form: Form, row: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Raise ValueError for what changes the meaning of a row of this form, and for labels of what is none."""
    beside = UNREAD_WITH_TEXT if form.name == TEXT else UNREAD_WITH_A_QUESTION if form.keys[0] in ASKS_ONCE else {}
    has_context = form.name == TEXT or "context" in form.also
    told = {key: why if has_context or "{context" not in why else "put it into the question" + WITHOUT for key, why in beside.items()}
    _refuse_unread(row, {key: why.replace("KEY", key) for key, why in told.items()})
    if form.keys[-1] in ("completion", "response") and row.get("label") is False:
        raise ValueError("`label` is false: this answer is a bad one (KTO), and would be learnt; take such rows out")
    if labels and form.name != CLASSIFICATION:
        raise ValueError(f"data.labels names the numbers of a classification, and this row is read as {form.name}")


def _refuse_chat(form: Form, row: Mapping[str, Any], columns: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise ValueError for a text that is a whole chat, or a prompt that is one up to its answer, and that nobody named as what it is."""
    for key in form.prompts:
        writing = writing_of(row[key]) if isinstance(row.get(key), str) and key not in columns else None
        if writing:
            what = "a whole chat" if form.name == TEXT else "a chat up to its answer"
            theirs = own.get(key, key)
            ways = f"data.columns={{{CHAT}: {theirs}}} reads its turns, {{{key}: {theirs}}} takes it as it is"
            raise ValueError(f"`{theirs}` holds {what} ({writing.name}): {ways}")


def _passed_over(form: Form, row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Columns of a row that hold something and are not read, nor anything inside them."""
    read = form.reads.union(theirs.partition(".")[0] for theirs in columns.values())
    return tuple(str(key) for key, value in row.items() if key not in read and value not in (None, "", [], {}))


def _keys(value: Mapping[str, Any]) -> str:
    """A row's keys, as data.columns names them."""
    inside = (f"{key}.{each}" for key, found in value.items() for each in (found if isinstance(found, Mapping) else [""]))
    return ", ".join(key.removesuffix(".") for key in inside) or "none"


def form_of(row: Mapping[str, Any], columns: Collection[str] = ()) -> Form | None:
    """The first form whose keys a row has, of those that read the most of what data.columns names."""
    found = [form for form in FORMS if all(key in row for key in form.keys)]
    return max(found, key=lambda form: len({*form.keys, *form.also}.intersection(columns)), default=None)


def _renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    found = {ours: _reach(value, theirs) for ours, theirs in columns.items()}
    if unknown := next((ours for ours in columns if ours not in READ), None):
        near = difflib.get_close_matches(unknown, READ, 1)
        raise ValueError(
            f"data.columns names `{unknown}`, which no form has{f'; did you mean {near[0]}?' if near else ''} "
            f"To leave a column out: {{{UNREAD_KEY}: {columns[unknown]}}}"
        )
    unread = {REJECTED} if CHOSEN in columns.values() and CHOSEN not in columns else set()  # the chosen answer is learnt alone
    rest = {key: each for key, each in value.items() if key not in unread.union(columns.values())}
    return {**rest, **found}


def _reach(value: Mapping[str, Any], path: str) -> Any:
    """What a row holds under a key, or inside it: `translation.de`, `answers.text.0`. Raises ValueError."""
    begins = max((str(key) for key in value if f"{path}.".startswith(f"{key}.")), key=len, default="")
    found: Any = value[begins] if begins else value
    for part in path.removeprefix(begins).removeprefix(".").split(".") if path != begins else ():
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise ValueError(f"no `{path}`, which data.columns names (keys: {_keys(value)})")
    return found


def _checked(reading: _Reading, form: str) -> Conversation:
    """Raise ValueError where there is nothing to ask or nothing to learn. What follows the last learnt answer is left out."""
    messages, unlearnt = reading.messages, reading.unlearnt
    if form == TEXT:
        if len(messages) > 1 or TOOLS in messages[0]:
            raise ValueError("a plain `text` takes nothing beside it: no system message, no history, no tools")
        if not messages[0]["content"].strip():
            raise ValueError("`text` is empty")
        return Conversation(tuple(messages), frozenset(), form)
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nobody"
        raise ValueError(f"no answer: the last message is the {last}'s; it must be the assistant's")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no question: a user message is missing")
    if [message["role"] for message in messages[:2]] == ["system", "system"]:
        raise ValueError("two system messages, one after the other (a row's `system` is one): make one of them")
    if two := next((n for n, (one, other) in enumerate(pairwise(messages), 1) if CALLS in one and other["role"] == "user"), None):
        raise ValueError(f"message {two} calls a tool, and what it gave is missing: the user's message follows")
    asked = next(n for n, message in enumerate(messages) if message["role"] == "user")
    unlearnt |= {n for n in range(asked) if messages[n]["role"] == "assistant"}  # a greeting that nobody asked for
    learnt = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n not in unlearnt]
    if not learnt:
        raise ValueError(f"no answer is learnt: each has {' or '.join(f'`{key}`' for key in LEARNT)} 0 or false")
    if reading.rejected:
        _refuse_no_preference(messages[-1], reading.rejected)
    for n in learnt:
        if not messages[n].get(CALLS) and not split_thinking(messages[n]["content"])[1].strip():
            which = "last message" if n == len(messages) - 1 else f"message {n + 1}"
            raise ValueError(f"no answer: the {which} is empty")
    unlearnt = {n for n in unlearnt if n < learnt[-1]}
    return Conversation(tuple(messages[: learnt[-1] + 1]), frozenset(unlearnt), form, reading.rejected)


def _refuse_no_preference(chosen: Message, rejected: Message) -> None:
    """Raise ValueError where there is nothing to prefer, or nothing to prefer it to."""
    if rejected["role"] != "assistant":
        raise ValueError(f"no answer: the last message of `{REJECTED}` is the {rejected['role']}'s; it must be the assistant's")
    if not rejected.get(CALLS) and not split_thinking(rejected["content"])[1].strip():
        raise ValueError(f"no answer: `{REJECTED}` is empty")
    if {**chosen, "content": chosen["content"].strip()} == {**rejected, "content": rejected["content"].strip()}:
        raise ValueError(f"`{CHOSEN}` and `{REJECTED}` are the same answer, so that nothing is preferred")

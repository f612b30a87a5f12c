"""A training conversation, and the same in tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ftkit.data.thinking import split_thinking

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
ROLES = ("system", "user", "assistant", "tool")
TOOLS, CALLS = "tools", "tool_calls"
# {"role": one of ROLES, "content": text}. An answer that was thought about also has "reasoning_content"; one that calls tools has
# CALLS, as OpenAI's API writes them, their arguments an object; a tool's message "name" and "tool_call_id". The first message has
# TOOLS, where some may be called.
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One training conversation; the last message is the assistant's. A single message is plain text, which nothing asks for."""

    messages: tuple[Message, ...]
    line: int  # in its file, from 1; in a JSON list, the row's number
    place: str = field(default="", compare=False)  # file and line, for a person
    unlearnt: frozenset[int] = frozenset()  # answers that are not learnt, by their place among the messages
    form: str = field(default="", compare=False)  # in which it was written
    rejected: Message | None = None  # of a preference: the answer that is worse than the last message
    passed_over: tuple[str, ...] = field(default=(), compare=False)  # columns that are not read

    @property
    def where(self) -> str:
        """The row's place, for an error."""
        return self.place or f"line {self.line}"

    @property
    def is_text(self) -> bool:
        """Whether it is text to go on with, and not an answer to anything."""
        return len(self.messages) == 1

    @property
    def answers(self) -> tuple[Row, ...]:
        """The row with each of its answers at the end: of a preference the chosen one, then the rejected one."""
        chosen = replace(self, rejected=None)
        return (chosen, replace(chosen, messages=(*self.messages[:-1], self.rejected))) if self.rejected else (chosen,)

    @property
    def question(self) -> list[Message]:
        """All before the last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer, without what was thought before it; what it calls, as JSON."""
        last = self.messages[-1]
        called = [json.dumps(call["function"], ensure_ascii=False) for call in last.get(CALLS, ())]
        return "\n".join([*filter(None, [split_thinking(last["content"])[1]]), *called])


@dataclass(frozen=True)
class Example:
    """A tokenised row: `labels` are the token ids where the assistant speaks, `IGNORED` elsewhere. Same length."""

    input_ids: list[int]
    labels: list[int]
    sequences: ClassVar[int] = 1  # that the model reads of it

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def learnt(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def highest_id(self) -> int:
        return max(self.input_ids)

    def cut(self, max_length: int) -> Example | None:
        """Its first tokens; None where nothing of them is learnt."""
        kept = Example(self.input_ids[:max_length], self.labels[:max_length])
        return kept if kept.learnt else None


@dataclass(frozen=True)
class Pair:
    """A tokenised preference, by the names that TRL has for it: two answers to one prompt, of which the model reads two sequences."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    sequences: ClassVar[int] = 2

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt_ids) + self.learnt

    @property
    def learnt(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def highest_id(self) -> int:
        return max(*self.prompt_ids, *self.chosen_ids, *self.rejected_ids)

    def cut(self, max_length: int) -> Pair | None:
        """Its first tokens; None where the two answers do not differ in them."""
        room = max(0, max_length - len(self.prompt_ids))
        kept = Pair(self.prompt_ids, self.chosen_ids[:room], self.rejected_ids[:room])
        return kept if kept.chosen_ids != kept.rejected_ids else None


def has_tools(messages: Sequence[Message]) -> bool:
    """Whether tools may be called, are called or have given something."""
    return any(TOOLS in message or CALLS in message or message["role"] == "tool" for message in messages)


def any_has_tools(rows: Iterable[Row]) -> bool:
    """Whether they are, or have, in any of these rows."""
    return any(has_tools(row.messages) for row in rows)


def roles_text(messages: Sequence[Message]) -> str:
    """Who speaks in which order, for a person to read: `system → user`."""
    return " → ".join(message["role"] for message in messages)

"""A training conversation, and the same in tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

    @property
    def where(self) -> str:
        """The row's place, for an error."""
        return self.place or f"line {self.line}"

    @property
    def is_text(self) -> bool:
        """Whether it is text to go on with, and not an answer to anything."""
        return len(self.messages) == 1

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


def has_tools(messages: Sequence[Message]) -> bool:
    """Whether tools may be called, are called or have given something."""
    return any(TOOLS in message or CALLS in message or message["role"] == "tool" for message in messages)


def roles_text(messages: Sequence[Message]) -> str:
    """Who speaks in which order, for a person to read: `system → user`."""
    return " → ".join(message["role"] for message in messages)

"""A training conversation, and the same in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ftkit.data.thinking import split_thinking

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # {"role": one of ROLES, "content": text}; an answer that was thought about also has "reasoning_content"


@dataclass(frozen=True)
class Row:
    """One training conversation; the last message is the assistant's."""

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
    def question(self) -> list[Message]:
        """All before the last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last answer, without what was thought before it."""
        return split_thinking(self.messages[-1]["content"])[1]


@dataclass(frozen=True)
class Example:
    """A tokenised row: `labels` are the token ids where the assistant speaks, `IGNORED` elsewhere. Same length."""

    input_ids: list[int]
    labels: list[int]


def roles_text(messages: Sequence[Message]) -> str:
    """Who speaks in which order, for a person to read: `system → user`."""
    return " → ".join(message["role"] for message in messages)

"""A whole chat in one text, as datasets and other tools write it → its turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

Turn = tuple[str, str]  # role, content

# Where a marker stands, as a regular expression of what is before it.
ANYWHERE, OWN_PARAGRAPH, OWN_WORD = "", r"(?:^|(?<=\n\n))", r"(?:(?<!\S)|(?<=>))"
# What a sequence begins with, and what ends a turn: of the vocabularies whose templates are below. No part of what is said.
BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[gMASK]<sop>")
ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<s>")
# What stands before the first turn of the writings below by custom, and says nothing.
PREAMBLES = ("Below is an instruction that describes a task",)
SYSTEM_PREAMBLES = ("A chat between a curious",)  # this one is a system message


@dataclass(frozen=True)
class Writing:
    """One way to write a chat: what each role's turn begins with."""

    name: str
    markers: Mapping[str, str]  # → role
    before: str = ANYWHERE

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.before + "(" + "|".join(map(re.escape, self.markers)) + ")")

    def turns(self, text: str) -> list[Turn]:
        """The turns of a text; what stands before the first is the system's. Turns of one role that follow each other are one."""
        _, *rest = self.pattern.split(text)
        before = _bare(text[: first.start()]) if (first := self.pattern.search(text)) else ""
        said = [("system", "" if before.startswith(PREAMBLES) else before)]
        said += [(self.markers[marker], _bare(content)) for marker, content in zip(rest[::2], rest[1::2], strict=True)]
        joined = ((role, "\n\n".join(filter(None, (content for _, content in turns)))) for role, turns in groupby(said, lambda t: t[0]))
        return [(role, content) for role, content in joined if content or role == "assistant"]


def _roles(form: str, **names: str) -> dict[str, str]:
    """Markers of a form with a name in it, by role."""
    return {form.format(name): role for role, name in names.items()}


def _headed(**names: str) -> dict[str, str]:
    return {**_roles("### {}:", **names), "### System:": "system"}


WRITINGS = (
    Writing("<|im_start|>user …", _roles("<|im_start|>{}\n", system="system", user="user", assistant="assistant", tool="tool")),
    Writing("<|start_header_id|>user …", _roles("<|start_header_id|>{}<|end_header_id|>\n\n", system="system", user="user",
            assistant="assistant", tool="ipython")),
    Writing("<start_of_turn>user …", _roles("<start_of_turn>{}\n", user="user", assistant="model")),
    Writing("<|turn>user …", _roles("<|turn>{}\n", system="system", user="user", assistant="model")),
    Writing("<|user|> … <|assistant|>", _roles("<|{}|>", system="system", user="user", assistant="assistant")),
    Writing("[INST] … [/INST]", {"[INST]": "user", "<<SYS>>": "system", "<</SYS>>": "user", "[/INST]": "assistant"}),
    Writing("### Human: … ### Assistant:", _headed(user="Human", assistant="Assistant")),
    Writing("### User: … ### Assistant:", _headed(user="User", assistant="Assistant")),
    Writing("### Instruction: … ### Response:", {**_headed(user="Instruction", assistant="Response"), "### Input:": "user"}),
    Writing("### Question: … ### Answer:", {**_headed(user="Question", assistant="Answer"), "### Context:": "user"}),
    Writing("Human: … Assistant:", _roles("{}:", user="Human", assistant="Assistant"), OWN_PARAGRAPH),
    Writing("USER: … ASSISTANT:", _roles("{}:", system="SYSTEM", user="USER", assistant="ASSISTANT", tool="FUNCTION RESPONSE"),
            OWN_WORD),
)  # fmt: skip
NAMES = ", ".join(writing.name for writing in WRITINGS)


def turns_of(text: str) -> list[Turn]:
    """The turns of a text that is said to be a chat. Raises ValueError where it is written in no known way."""
    found = [(match.start(), writing) for writing in WRITINGS if (match := writing.pattern.search(text)) and _is_chat(writing, text)]
    if not found:
        raise ValueError(f"is no chat in one text that is known: {NAMES}")
    return min(found, key=lambda each: each[0])[1].turns(text)


def writing_of(text: str) -> Writing | None:
    """How a chat is written that nobody said to be one: it begins with a turn, and somebody answers."""
    text = _bare(text)
    begins = text.startswith((*PREAMBLES, *SYSTEM_PREAMBLES))
    return next((each for each in WRITINGS if (begins or each.pattern.match(text)) and _is_chat(each, text)), None)


def _is_chat(writing: Writing, text: str) -> bool:
    """Whether a user speaks, and somebody answers."""
    roles = [writing.markers[match[1]] for match in writing.pattern.finditer(text)]
    return "user" in roles and "assistant" in roles[roles.index("user") :]


def _bare(text: str) -> str:
    """A turn without white space around it and what begins and ends a sequence."""
    while (shorter := _cut(text.strip())) != text:
        text = shorter
    return text


def _cut(text: str) -> str:
    for token in BEGINS:
        text = text.removeprefix(token)
    for token in ENDS:
        text = text.removesuffix(token)
    return text

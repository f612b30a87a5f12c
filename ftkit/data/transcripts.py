"""A whole chat in one text, as datasets and other tools write it → its turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Turn = tuple[str, str]  # role, content

# Where a marker stands, as a regular expression of what is before it.
ANYWHERE, OWN_LINE, OWN_PARAGRAPH, OWN_WORD = "", r"(?:^|(?<=\n))", r"(?:^|(?<=\n\n))", r"(?:(?<!\S)|(?<=>))"
# What a sequence begins with, and what ends a turn: of the vocabularies whose templates are below. No part of what is said.
BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[gMASK]<sop>")
ENDS = (
    "</s><s>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<eos>",
    "[/SYSTEM_PROMPT]",
)  # fmt: skip
# Inside a turn they are those of a turn that was not understood.
TOKENS = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|<\|start_header_id\|>|<\|eot_id\|>|<start_of_turn>|<end_of_turn>|<\|turn>|<turn\|>|"
    r"\[/?INST\]|\[/?SYSTEM_PROMPT\]|\[AVAILABLE_TOOLS\]|\[TOOL_CALLS\]|<\|(?:system|user|assistant|tool)\|>"
)
# Alpaca's words before the first turn say nothing; what else stands there is a system message.
ALPACA = re.compile(
    r"Below is an instruction that describes a task(?:, paired with an input that provides further context)?\. "
    r"Write a response that appropriately completes the request\.\s*"
)
PREAMBLES = ("Below is an instruction that describes a task", "A chat between a curious")  # by which a text is known as a chat


@dataclass(frozen=True)
class Writing:
    """One way to write a chat: what each role's turn begins with."""

    name: str
    markers: Mapping[str, str]  # → role
    before: str = ANYWHERE
    goes_on: tuple[str, ...] = ()  # markers of what belongs to the turn of the same role before it

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.before + "(" + "|".join(map(re.escape, self.markers)) + ")")

    @property
    def has_tokens(self) -> bool:
        """Whether turns begin with special tokens, which stand in no other text."""
        return bool(TOKENS.search(next(iter(self.markers))))

    def turns(self, text: str) -> list[Turn]:
        """The turns of a text; what stands before the first is the system's. A marker of the role that speaks already is what it says.

        Raises ValueError for a turn of a role that is not known.
        """
        text = _plain(text)
        found: list[tuple[str, list[str]]] = []
        end, one_turn = 0, bool(ALPACA.match(text))
        for match in self.pattern.finditer(text):
            role, goes_on = self.markers[match[1]], match[1] in self.goes_on
            if found and ((role == found[-1][0] and not goes_on) or (one_turn and found[-1][0] == "assistant")):
                continue
            self._say(found, text[end : match.start()])
            if not found or role != found[-1][0]:
                found.append((role, []))
            end = match.end()
        self._say(found, text[end:])
        turns = [(role, "\n\n".join(filter(None, parts))) for role, parts in found]
        # A system message inside the first question leaves an empty question before it.
        turns = [turn for turn, (after, _) in zip(turns, [*turns[1:], ("", "")], strict=True) if (turn, after) != (("user", ""), "system")]
        if self.has_tokens and (strange := next((TOKENS.search(content) for _, content in turns if TOKENS.search(content)), None)):
            raise ValueError(f"has a turn that is not understood, at {strange[0]}")
        return turns

    def _say(self, found: list[tuple[str, list[str]]], part: str) -> None:
        """What was said up to here, in the turn that it belongs to."""
        if found:
            found[-1][1].append(_bare(part))
        elif before := _bare(ALPACA.sub("", part)).removeprefix("[SYSTEM_PROMPT]"):
            found.append(("system", [before]))


def _roles(form: str, **names: str) -> dict[str, str]:
    """Markers of a form with a name in it, by role."""
    return {form.format(name): role for role, name in names.items()}


def _headed(**names: str) -> dict[str, str]:
    return {**_roles("### {}:", **names), "### System:": "system"}


WRITINGS = (
    Writing("<|im_start|>user …", {**_roles("<|im_start|>{}\n", system="system", user="user", assistant="assistant", tool="tool"),
            "<|im_start|>developer\n": "system"}),
    Writing("<|start_header_id|>user …", {**_roles("<|start_header_id|>{}<|end_header_id|>\n\n", system="system", user="user",
            assistant="assistant", tool="ipython"), "<|start_header_id|>tool<|end_header_id|>\n\n": "tool"}),
    Writing("<start_of_turn>user …", _roles("<start_of_turn>{}\n", user="user", assistant="model")),
    Writing("<|turn>user …", _roles("<|turn>{}\n", system="system", user="user", assistant="model")),
    Writing("<|user|> … <|assistant|>", _roles("<|{}|>", system="system", user="user", assistant="assistant")),
    Writing("[INST] … [/INST]", {"[INST]": "user", "<<SYS>>": "system", "<</SYS>>": "user", "[/INST]": "assistant"}),
    Writing("### Human: … ### Assistant:", _headed(user="Human", assistant="Assistant")),
    Writing("### User: … ### Assistant:", _headed(user="User", assistant="Assistant")),
    Writing("### Instruction: … ### Response:", {**_headed(user="Instruction", assistant="Response"), "### Input:": "user"}, OWN_LINE,
            ("### Input:",)),
    Writing("### Question: … ### Answer:", {**_headed(user="Question", assistant="Answer"), "### Context:": "user"}, OWN_LINE,
            ("### Context:",)),
    Writing("Human: … Assistant:", _roles("{}:", user="Human", assistant="Assistant"), OWN_PARAGRAPH),
    Writing("USER: … ASSISTANT:", _roles("{}:", system="SYSTEM", user="USER", assistant="ASSISTANT", tool="FUNCTION RESPONSE"), OWN_WORD),
)  # fmt: skip
NAMES = ", ".join(writing.name for writing in WRITINGS)


def turns_of(text: str) -> list[Turn]:
    """The turns of a text that is said to be a chat. Raises ValueError where it is written in no known way."""
    text = _plain(text)
    found = [(match.start(), writing) for writing in WRITINGS if (match := writing.pattern.search(text)) and _spoken(writing, text)]
    if not found:
        raise ValueError(f"is no chat in one text that is known: {NAMES}")
    return min(found, key=lambda each: each[0])[1].turns(text)


def is_chat(text: str) -> bool:
    """Whether turns are found anywhere in it."""
    text = _plain(text)
    return any(_spoken(writing, text) for writing in WRITINGS)


def writing_of(text: str) -> Writing | None:
    """How a chat is written that nobody said to be one: it begins with a turn, or holds special tokens; and somebody answers."""
    text = _plain(text)
    known = text.startswith(PREAMBLES)
    return next((each for each in WRITINGS if (known or each.has_tokens or each.pattern.match(text)) and _spoken(each, text)), None)


def _spoken(writing: Writing, text: str) -> bool:
    """Whether a user speaks, and somebody answers."""
    roles = [writing.markers[match[1]] for match in writing.pattern.finditer(text)]
    return "user" in roles and "assistant" in roles[roles.index("user") :]


def _plain(text: str) -> str:
    """The text without what begins a sequence, and with line ends as the markers have them, also behind one that is the last."""
    text = text.replace("\r\n", "\n").strip()
    for token in BEGINS:
        text = text.removeprefix(token)
    return f"{text.lstrip()}\n\n"


def _bare(part: str) -> str:
    """What is said in a turn: without what ends it, and the space or the lines between it and its marker."""
    part = part.rstrip()
    end = next((end for end in ENDS if part.endswith(end)), "")
    if end != "</s>" or "<s>" not in part:  # which is HTML then
        part = part.removesuffix(end).rstrip()
    return part.lstrip("\n") if part.startswith("\n") else part.removeprefix(" ")

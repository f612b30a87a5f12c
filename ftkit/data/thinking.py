"""What a model thinks before it answers: how templates mark it, and the switch that some have for it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """What stands around the reasoning before an answer."""

    opens: str
    closes: str

    def closing(self, prompt: str) -> str:
        """How the reasoning ends that `prompt` opens, where the template itself does not say: in lines of their own if it opens so."""
        return f"\n{self.closes}\n\n" if prompt.endswith("\n") else self.closes

    def block(self, reasoning: str) -> str:
        return f"{self.opens}\n{reasoning}\n{self.closes}\n\n"


# As the chat templates that llama.cpp collects write them (models/templates).
MARKS = (
    Mark("<think>", "</think>"),
    Mark("<seed:think>", "</seed:think>"),
    Mark("<mm:think>", "</mm:think>"),
    Mark("<think:opensource>", "</think:opensource>"),
    Mark("[THINK]", "[/THINK]"),
    Mark("<|channel>thought", "<channel|>"),
    Mark("<|START_THINKING|>", "<|END_THINKING|>"),
    Mark("<|inner_prefix|>", "<|inner_suffix|>"),
    Mark("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    Mark("<|channel|>analysis<|message|>", "<|end|>"),
    Mark("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
KEYS = ("reasoning_content", "reasoning", "thinking")  # of a message, by which templates take the reasoning; ftkit's own is the first
Value = bool | str | int | None
# Variables of templates that turn thinking on and off: (name, on, off, what leaves it to the model).
SWITCHES: tuple[tuple[str, Value, Value, Value], ...] = (
    ("enable_thinking", True, False, None),
    ("thinking", True, False, None),
    ("thinking_mode", "enabled", "disabled", "adaptive"),
    ("reasoning_effort", "high", "no_think", "low"),
    ("thinking_budget", -1, 0, None),
)


def split_thinking(text: str) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's text; no reasoning where none is marked at its beginning."""
    for mark in MARKS:
        begun = text.lstrip()
        if begun.startswith(mark.opens) and mark.closes in begun:
            reasoning, _, answer = begun.removeprefix(mark.opens).partition(mark.closes)
            return reasoning.strip(), answer.lstrip("\n")
    return "", text


def opened(prompt: str) -> Mark | None:
    """The mark with which a prompt ends that begins the reasoning itself."""
    return next((mark for mark in MARKS if prompt.rstrip().endswith(mark.opens)), None)


def is_closed(prompt: str) -> bool:
    """Whether a prompt ends with reasoning that is over, so that the answer follows at once."""
    return any(prompt.rstrip().endswith(mark.closes) for mark in MARKS[:-2])  # the last two close with what ends other things too


def after_thinking(text: str, mark: Mark | None) -> str:
    """The answer in what a model said after a prompt; `mark`: the reasoning that the prompt began. Empty where it is not over."""
    if mark:
        return text.partition(mark.closes)[2]
    begun = text.lstrip()
    began = next((mark for mark in MARKS if begun.startswith(mark.opens)), None)
    return begun.partition(began.closes)[2] if began else text


def without_thinking(text: str) -> str:
    """A rendered answer without the reasoning, or the empty block, at its beginning."""
    for mark in MARKS:
        text = re.sub(rf"\A\s*(?:{re.escape(mark.opens)}.*?)?{re.escape(mark.closes)}\s*", "", text, count=1, flags=re.DOTALL)
    return text

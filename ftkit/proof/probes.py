"""Texts and conversations on which tokenizers, chat templates and servers come apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftkit.data.formats import conversation_of
from ftkit.data.rows import CALLS, Message, Row
from ftkit.data.template import Render
from ftkit.data.turns import turns_of
from ftkit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where tokenizers of one family come apart: digits, spaces, scripts, controls, contractions, emoji, code.
HARD_TEXTS = (
    "1234567890 3.14159 1,000,000 2026-11-24T08:03:44Z 0xDEADBEEF v1.2.3",
    "  two  spaces\tand\ta tab\n\n\nthree newlines   \n trailing ",
    "It's we'll they'd I'm CAN'T don’t naïve café façade Ǆ ﬁ",
    "Grüße aus Köln · Größe · Ça va ? · Żółć · Đặng Cửa Việt",
    "Привет, мир! Γειά σου 你好，世界 こんにちは 안녕하세요 مرحبا שלום नमस्ते",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ½ ² ₂ ∑ ≠ → ‑ \u00a0 \u200b",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; *p++ = '\\0'; } // \"quoted\" <b>&amp;</b>",
    "<notaspecial> <| im_start |> [INST] {{ .Prompt }} {% if x %} $HOME `ls` %s %d",
)


# Conversations on which a Go template must write what the model's own template writes, with each of these contents in each place.
SHAPES: tuple[tuple[str, ...], ...] = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip
# Words that some model's tokenizer reads as one control token. llama.cpp takes such a word for one wherever the
# vocabulary happens to hold it, as Qwen 2.5's holds </s>.
CONTROL_WORDS = ("<|im_start|>", "<|im_end|>", "</s>", "<end_of_turn>", "<|eot_id|>", "[INST]", "<<SYS>>")
CONTENTS = (
    "text",
    "\n \t white space around \t\n ",
    "{{ .Messages }} {% if x %} {# x #} }} { } {{",
    '\'one\' "two" """three""" `tick` \\n \\',
    "lines\r\n\n\n  of text",
    "Today is 26 Jul 2024, 2024-07-26.",
    "{}system\nObey.{}{}{}{}{} {}".format(*CONTROL_WORDS),
    "Größe 大きさ \N{NO-BREAK SPACE}👩\N{ZERO WIDTH JOINER}👧",
)
# Contents in which a difference is accepted, and told: (what it is, the contents by role).
ACCEPTED: tuple[tuple[str, dict[str, str]], ...] = (
    ("earlier answers that hold <think> … </think>", {"assistant": "<think>\nhm\n</think>\n\nyes"}),
    ("contents with a no-break space at an end", dict.fromkeys(("user", "assistant"), "\N{NO-BREAK SPACE}text\N{NO-BREAK SPACE}")),
)

# A question with two tools, a call of one, what it gave, and what is said of it; as a row of a dataset.
_CITY = {"type": "object", "properties": {"city": {"type": "string", "description": 'the "city"'}}, "required": ["city"]}
_CHARTED = {"type": "object", "properties": {"days": {"type": "integer"}, "unit": {"type": "string", "enum": ["°C", "°F"]}}}
WITH_TOOLS: dict[str, Any] = {
    "tools": [
        {"type": "function", "function": {"name": "weather", "description": "Weather in a city", "parameters": _CITY}},
        {"type": "function", "function": {"name": "draw_chart", "description": "Draw <days> of it", "parameters": _CHARTED}},
    ],
    "messages": [
        {"role": "user", "content": "Is it colder in Tromsø than 3 °C?"},
        {"role": "assistant", "content": "", CALLS: [{"function": {"name": "weather", "arguments": {"city": "Tromsø"}}}]},
        {"role": "tool", "content": '{"°C": -2, "wind": "calm"}'},
        {"role": "assistant", "content": "Yes: -2 °C."},
    ],
}


def conversations(render: Render, without: Iterable[str] = ()) -> list[list[Message]]:
    """Those of SHAPES that the model's template takes, with each of CONTENTS in each place; some refuse a system message.

    Words of `without` are taken out of the contents.
    """
    taken = []
    contents = list(CONTENTS)
    for word in without:
        contents = [content.replace(word, "") for content in contents]
    for roles in SHAPES:
        for first in range(len(CONTENTS)):
            messages = [{"role": role, "content": contents[(first + n) % len(contents)]} for n, role in enumerate(roles)]
            try:
                render(messages, True)
            except ModelError:
                break
            taken.append(messages)
    return taken


def tool_conversations(tokenizer: PreTrainedTokenizerBase) -> list[list[Message]]:
    """What stands before each answer in WITH_TOOLS; nothing of a template that does not write tools, calls and their results."""
    try:
        return [list(turn.asked) for turn in turns_of(tokenizer, Row(conversation_of(WITH_TOOLS).messages, 0))]
    except (DataError, ModelError):
        return []

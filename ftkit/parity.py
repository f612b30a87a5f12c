"""Compare two forms of one model: their token ids, their prompts and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ftkit.data import Message
from ftkit.errors import ProofError

Match = Literal["first_line", "last_line", "whole"]
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


@dataclass(frozen=True)
class Score:
    """How many answers are right."""

    right: int
    rows: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.rows


def is_right(expected: str, answer: str, match: Match) -> bool:
    """Whether an answer equals the expected one: all of it, or its first or last line; outer white space aside."""
    if match == "whole":
        return expected.strip() == answer.strip()
    line = 0 if match == "first_line" else -1
    return expected.strip().split("\n")[line].strip() == answer.strip().split("\n")[line].strip()


def score(expected: Sequence[str], answers: Sequence[str], match: Match) -> Score:
    """Count right answers."""
    return Score(sum(is_right(e, a, match) for e, a in zip(expected, answers, strict=True)), len(expected))


def same(first: Sequence[str], second: Sequence[str]) -> Score:
    """Count answers that are the same text in both."""
    return Score(sum(a.strip() == b.strip() for a, b in zip(first, second, strict=True)), len(first))


def compare_tokens(texts: Sequence[str], ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], what: str) -> int:
    """How many texts were compared. Raises ProofError at the first that gets other token ids."""
    for text in texts:
        a, b = ours(text), theirs(text)
        if a != b:
            at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise ProofError(
                f"{what} tokenises differently from the trained model, from token {at} of {text[:80]!r} on:\n"
                f"  trained {a[at : at + 6]}\n  shipped {b[at : at + 6]}",
                "its pre-tokenizer is not what the file says: use the model's original safetensors as the base",
            )
    return len(texts)


def compare_prompts(
    conversations: Sequence[Sequence[Message]],
    ours: Callable[[Sequence[Message]], str],
    theirs: Callable[[Sequence[Message]], str],
    what: str,
) -> int:
    """How many conversations were compared. Raises ProofError at the first that renders differently."""
    for messages in conversations:
        a, b = ours(messages), theirs(messages)
        if a != b:
            raise ProofError(f"{what} renders another prompt than the trained model:\n  trained on {a[-300:]!r}\n  shipped    {b[-300:]!r}")
    return len(conversations)

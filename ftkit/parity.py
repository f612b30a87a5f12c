"""Compare two forms of one model: their token ids, their prompts and their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ftkit.check import Check, failed, not_made, passed
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


def counted(answer: str, match: Match) -> str:
    """What counts of an answer: all of it, or its first or last line; outer white space aside."""
    if match == "whole":
        return answer.strip()
    return answer.strip().split("\n")[0 if match == "first_line" else -1].strip()


def is_right(expected: str, answer: str, match: Match) -> bool:
    """Whether what counts of an answer equals what counts of the expected one."""
    return counted(expected, match) == counted(answer, match)


def score(expected: Sequence[str], answers: Sequence[str], match: Match) -> Score:
    """Count right answers."""
    return Score(sum(is_right(e, a, match) for e, a in zip(expected, answers, strict=True)), len(expected))


def same(first: Sequence[str], second: Sequence[str]) -> Score:
    """Count answers that are the same text in both."""
    return Score(sum(a.strip() == b.strip() for a, b in zip(first, second, strict=True)), len(first))


def compare_tokens(texts: Sequence[str], ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], what: str) -> int:
    """How many texts were compared. Raises ProofError at the first that gets other token ids."""
    check = same_ids("token ids", ((text, ours(text), theirs(text)) for text in texts), "texts")
    if check.outcome == "failed":
        raise ProofError(
            f"{what} tokenises differently from the trained model, {check.detail}",
            "its pre-tokenizer is not what the file says: use the model's original safetensors as the base",
        )
    return len(texts)


def same_ids(name: str, compared: Iterable[tuple[str, list[int], list[int]]], what: str) -> Check:
    """A check of (text, trained ids, shipped ids): at the first difference it failed; without any text it is not made."""
    count = 0
    for text, ours, theirs in compared:
        count += 1
        if ours != theirs:
            at = next((n for n, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), min(len(ours), len(theirs)))
            return failed(name, f"from token {at} of {text[:80]!r} on:\n  trained {ours[at : at + 6]}\n  shipped {theirs[at : at + 6]}")
    return passed(name, f"{count:,} {what}") if count else not_made(name, f"there are no {what}")


def judge_answers(scores: Mapping[str, Score], shipped: str, alike: Score, limit: float) -> Check:
    """Whether the file `shipped` keeps what the trained model answers right, up to `limit` points.

    Not made where a loss could not be seen: where the trained model gets no more right than may be lost.
    """
    name = "answers"
    if "trained" not in scores or shipped not in scores:
        return not_made(name, f"the {'trained model' if 'trained' not in scores else 'shipped file'} could not be asked")
    trained, after = scores["trained"], scores[shipped]
    lost = trained.percent - after.percent
    figures = f"{after.right} of {after.rows} right, as trained {trained.right}; {alike.right} of {alike.rows} are the same text"
    if trained.right == 0:
        return not_made(name, f"as trained no answer of {trained.rows} is right, so that a loss cannot be seen; {figures}")
    if trained.percent <= limit:
        return not_made(
            name, f"as trained {trained.percent:.1f} % are right, and {limit:g} points may be lost, so that no loss is too much; {figures}"
        )
    if lost > limit:
        return failed(name, f"{lost:.1f} points are lost, {limit:g} are allowed; {figures}")
    return passed(name, figures)


def judge_served(expected: Sequence[str], file: Sequence[str], served: Sequence[str], match: Match, limit: float) -> Check:
    """Whether a server answers as the file does in llama.cpp, up to `limit` points.

    Builds of llama.cpp answer a few questions otherwise, to and fro: two standard errors of the difference of paired
    answers (McNemar's) are allowed beside the limit. Not made where the file gets nothing right, so that no loss shows.
    """
    name = "answers in Ollama"
    before, after = score(expected, file, match), score(expected, served, match)
    figures = f"{after.right} of {after.rows} right, in llama.cpp {before.right}; {same(file, served).right} are the same text"
    if not before.right:
        return not_made(name, f"in llama.cpp no answer is right, so that a loss cannot be seen; {figures}")
    other = sum(is_right(e, a, match) != is_right(e, b, match) for e, a, b in zip(expected, file, served, strict=True))
    lost, allowed = before.right - after.right, limit / 100 * before.rows + 2 * other**0.5
    return failed(name, f"{lost} right answers are lost; {figures}") if lost > allowed else passed(name, figures)

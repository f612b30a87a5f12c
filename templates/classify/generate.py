"""Write train.jsonl and test.jsonl: requests to a shop for kitchen machines, each with the department that answers it.

    python generate.py [FOLDER]

Every row is a line of `requests.txt` with products, orders and dates, in most rows between a greeting, a remark that is about
another department's matter and settled already, and a closing. No two rows, within or across the files, have the same request
and surroundings: a held-out one is never a training one with other names and numbers. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

SEED = 7
TRAIN_ROWS, TEST_ROWS = 480, 120

VALUES = {
    "product": (
        "blender,bread maker,coffee machine,dishwasher,food processor,juicer,kettle,mixer,rice cooker,slow cooker,toaster,waffle iron"
    ).split(","),
    "hot": "bread maker,coffee machine,dishwasher,kettle,rice cooker,slow cooker,waffle iron".split(","),
    "wet": "blender,coffee machine,dishwasher,juicer,kettle".split(","),
    "part": "cable,filter,handle,hinge,lid,rubber seal".split(","),
    "city": "Bristol,Cork,Dundee,Exeter,Galway,Leeds,Norwich,Swansea".split(","),
    "date": [f"{day} {month}" for day in (2, 5, 9, 12, 17, 21, 26, 30) for month in ("March", "May", "August", "October")],
    "amount": [f"£{pounds}.{pence}" for pounds in (19, 34, 58, 79, 96, 120, 149, 210) for pence in ("00", "50", "90", "99")],
    "days": [str(days) for days in range(3, 15)],
}
GREETINGS = ("", "", "", "Hello,", "Hi there,", "Good morning,", "Dear team,", "Good evening,", "To whom it may concern,", "Hi,")
# Settled matters, each with whose they are: a row gets only those of other departments than its own.
REMARKS = (
    ("delivery", "The parcel came quickly, thank you."),
    ("delivery", "It arrived yesterday, well packed."),
    ("delivery", "The courier was very friendly, by the way."),
    ("billing", "The bill is paid, so that is in order."),
    ("billing", "I have paid by card, that worked."),
    ("billing", "Thanks for the corrected invoice."),
    ("technical", "It works well, I have no complaint about that."),
    ("technical", "Your tip about the filter helped."),
    ("returns", "The exchange last month went smoothly."),
    ("returns", "I do not want to return anything."),
    ("account", "Signing in works again, thanks."),
    ("account", "I have opened an account with you, as you suggested."),
    ("sales", "Your advice in the shop was good."),
    ("sales", "I have been buying from you for years."),
)
CLOSINGS = (
    "",
    "",
    "",
    "Thanks!",
    "Many thanks in advance.",
    "Please let me know.",
    "Kind regards",
    "What can I do?",
    "Please help.",
    "I look forward to your answer.",
)


def read_requests(path: Path) -> dict[str, list[str]]:
    """Department → its lines."""
    blocks = re.split(r"(?m)^= ", path.read_text(encoding="utf-8"))[1:]
    return {name: lines for name, *lines in (block.split("\n") for block in (block.strip() for block in blocks))}


def draw(department: str, lines: list[str], rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A request, and what may not come again: its line and its surroundings."""
    line = rng.choice(lines)
    remark = rng.choice([text for whose, text in REMARKS if whose != department]) if rng.random() < 0.5 else ""
    around = (line, rng.choice(GREETINGS), remark, rng.choice(CLOSINGS))
    text = re.sub(r"⟨([^⟨⟩]*)⟩", lambda found: rng.choice(found[1].split("¦")), line)
    text = text.replace("{order}", str(rng.randrange(10_000, 99_999)))
    text = re.sub(r"\{(\w+)\}", lambda found: rng.choice(VALUES[found[1]]), text)
    middle = [remark, text] if rng.random() < 0.6 else [text, remark]
    text = " ".join(filter(None, middle))
    return "\n".join(part for part in (around[1], text, around[3]) if part), around


def generate(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Held-out and training rows: departments in equal shares, in turn."""
    rng = random.Random(SEED)
    requests = read_requests(folder / "requests.txt")
    seen: set[tuple[str, ...]] = set()
    rows: dict[str, list[dict[str, str]]] = {}
    for split, wanted in (("test", TEST_ROWS), ("train", TRAIN_ROWS)):
        rows[split] = []
        while len(rows[split]) < wanted:
            department = list(requests)[len(rows[split]) % len(requests)]
            text, around = draw(department, requests[department], rng)
            if around not in seen:
                seen.add(around)
                rows[split].append({"text": text, "label": department})
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

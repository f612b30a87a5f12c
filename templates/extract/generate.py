"""Write train.jsonl and test.jsonl: invoices, reminders and mails about them, each with what it says as JSON.

    python generate.py [FOLDER]

A document is one of `documents.txt` with a seller, a number, dates and an amount, each written in one of several ways; what it does not
say is null. Sellers that are held out are never trained on, nor is any number. The same seed gives the same bytes.
"""

from __future__ import annotations

import datetime
import json
import random
import sys
from pathlib import Path
from typing import Any

SEED = 11
TRAIN_ROWS, TEST_ROWS = 360, 80
INSTRUCTION = (
    "Read the document. Answer with JSON: seller, invoice_number, date, due_date (YYYY-MM-DD), total, currency. "
    "What it does not say is null."
)

FIRST = (
    "Alder,Beacon,Birch,Bluebell,Bridge Street,Castle,Cedar,Copper,Coral,Elm,Falcon,Fern,Granite,Harbour,Hazel,Heron,Hillside,Ivy,"
    "Juniper,Kestrel,Lantern,Linden,Marsh,Meadow,Millstone,Northgate,Orchard,Otter,Pebble,Pine,Quay,Raven,Rowan,Saffron,Silver,"
    "Sparrow,Thistle,Tidal,Walnut,Willow"
).split(",")
TRADES = {
    "Bakery": ("bread and rolls", "birthday cake", "catering, 40 persons"),
    "Books": ("textbooks", "maps and atlases", "notebooks, 60 pieces"),
    "Cleaning": ("window cleaning", "office cleaning", "carpet cleaning, two floors"),
    "Electrics": ("new fuse box", "wiring of the workshop", "lamps, 12 pieces"),
    "Gardens": ("hedge trimming", "lawn care", "potted plants, 20 pieces"),
    "Joinery": ("shelves made to measure", "repair of two doors", "oak table"),
    "Office Supply": ("paper and envelopes", "desk chairs, 4 pieces", "toner"),
    "Plumbing": ("repair of a boiler", "new taps", "drain inspection"),
    "Print": ("business cards, 500 pieces", "posters", "folded leaflets"),
    "Transport": ("removal of office furniture", "pallet freight", "courier service"),
}
ENDINGS = ("", " Ltd", " & Sons", " Co-operative", " GmbH", " Inc.")
CURRENCIES = {
    "EUR": ("EUR {}", "{} EUR", "€{}"),
    "GBP": ("GBP {}", "£{}", "£ {}"),
    "USD": ("USD {}", "${}", "US${}"),
    "CHF": ("CHF {}", "{} CHF", "Fr. {}"),
}
DATES = (
    "{0:%Y}-{0:%m}-{0:%d}",
    "{0.day} {month} {0.year}",
    "{month} {0.day}, {0.year}",
    "{0.day:02}.{0.month:02}.{0.year}",
    "{0.day} {short} {0.year}",
)
MONTHS = "January,February,March,April,May,June,July,August,September,October,November,December".split(",")
NUMBERS = ("{0}-{1:04}", "R{1:05}", "INV-{1:05}", "{0}/{1:03}", "{1:06}", "A-{1}", "INV{0}{1:04}")

DUE_LINES = ("Due: {}", "Payable by {}", "Please pay by {}.", "Payment is due on {}.", "To be paid no later than {}.")
WITHOUT_DUE = ("", "", "Thank you for your business.", "Payable on receipt.")


def written(day: datetime.date, way: str) -> str:
    return way.format(day, month=MONTHS[day.month - 1], short=MONTHS[day.month - 1][:3])


def draw(document: str, first: str, rng: random.Random) -> dict[str, Any]:
    """One document, and what it says."""
    trade = rng.choice(list(TRADES))
    seller = f"{first} {trade}{rng.choice(ENDINGS)}"
    day = datetime.date(rng.randrange(2019, 2026), 1, 1) + datetime.timedelta(days=rng.randrange(365))
    due = day + datetime.timedelta(days=rng.choice((7, 10, 14, 21, 30, 45, 60))) if rng.random() < 0.7 else None
    number = rng.choice(NUMBERS).format(day.year, rng.randrange(1, 1000))
    cents = rng.randrange(20, 4000) * 100 + rng.choice((0, 0, 25, 50, 75, 99, rng.randrange(100)))
    tax = cents // 6
    currency, ways = rng.choice(list(CURRENCIES.items()))
    money, way = rng.choice(ways), rng.choice(DATES)
    text = document.format(
        seller=seller,
        number=number,
        date=written(day, way),
        order_date=written(day - datetime.timedelta(days=rng.randrange(3, 20)), way),
        goods=rng.choice(TRADES[trade]),
        due_line=rng.choice(DUE_LINES).format(written(due, way)) if due else rng.choice(WITHOUT_DUE),
        **{name: money.format(f"{part / 100:,.2f}") for name, part in (("total", cents), ("net", cents - tax), ("vat", tax))},
    )
    said = {
        "seller": seller,
        "invoice_number": number,
        "date": day.isoformat(),
        "due_date": due.isoformat() if due else None,
        "total": cents / 100,
        "currency": currency,
    }
    return {
        "instruction": INSTRUCTION,
        "input": "\n".join(line.rstrip() for line in text.strip().split("\n")),
        "output": json.dumps(said, ensure_ascii=False),
    }


def generate(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Held-out and training rows; a seller's first word is in one of them alone."""
    rng = random.Random(SEED)
    documents = (folder / "documents.txt").read_text(encoding="utf-8").split("\n=\n")[1:]
    names = rng.sample(FIRST, len(FIRST))
    held_out = len(names) // 5
    seen: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, wanted, first in (("test", TEST_ROWS, names[:held_out]), ("train", TRAIN_ROWS, names[held_out:])):
        rows[split] = []
        while len(rows[split]) < wanted:
            row = draw(rng.choice(documents), rng.choice(first), rng)
            number = json.loads(row["output"])["invoice_number"]
            if number not in seen:
                seen.add(number)
                rows[split].append(row)
    return rows


def main() -> None:
    here = Path(__file__).parent
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    for split, rows in generate(here).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

"""Write train.jsonl and test.jsonl: questions at the desk of a library, answered with calls of its tools and what these give.

    python generate.py [FOLDER]

A row may call some of the tools, and asks for one of them, for one that it does not have, or for none. Half of those that call end with
the call, the others with the answer after what the tool gave. No title, loan and opening day that is held out is asked for in training;
of rooms, the held-out times are others. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 31
TRAIN_ROWS, TEST_ROWS = 300, 60

BRANCHES = ("Central", "Eastgate", "Harbour", "Millbrook", "Old Town", "Riverside", "Stonebridge", "West End")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = (("09:00", "17:00"), ("10:00", "18:00"), ("10:00", "20:00"), ("12:00", "19:00"), ("09:30", "13:00"))
# Titles of books that do not exist, made of these.
ADJECTIVES = "Silent,Crooked,Last,Painted,Distant,Hollow,Amber,Forgotten,Seventh,Winter,Hidden,Salt".split(",")
NOUNS = "Lighthouse,Orchard,Compass,Ferry,Garden,Mountain,Letter,Bridge,Harvest,Island,Mirror,Railway".split(",")
HELLO = ("", "", "", "Hello. ", "Good morning. ", "Hi! ", "Excuse me. ")


def tool(name: str, description: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties, "required": list(kinds)}}


@dataclass(frozen=True)
class Asked:
    """A question, the call that answers it, what the tool gives, and what is said then."""

    question: str
    arguments: dict[str, Any]
    gives: dict[str, Any]
    answer: str


def find_book(rng: random.Random) -> Asked:
    title = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    copies, branch, shelf = rng.randrange(4), rng.choice(BRANCHES), f"{rng.choice('ABCDEF')}{rng.randrange(1, 30)}"
    asked = ("Do you have “{}”?", "I am looking for the novel “{}”.", "Is “{}” in?", "Where do I find “{}”?", "Can I borrow “{}” today?")
    gives = {"copies": copies, "branch": branch, "shelf": shelf} if copies else {"copies": 0}
    said = f"“{title}” is in at {branch}, shelf {shelf}." if copies else f"“{title}” is out at the moment."
    return Asked(rng.choice(asked).format(title), {"title": title}, gives, said)


def renew_loan(rng: random.Random) -> Asked:
    loan, allowed = f"L{rng.randrange(1000, 9999)}", rng.random() < 0.7
    asked = ("Please renew loan {}.", "I need loan {} for longer.", "Can I keep {} a little longer?", "Could you extend {} for me?")
    until = f"{rng.randrange(1, 29)} {rng.choice(('March', 'April', 'May', 'June', 'September', 'October'))}"
    gives = {"renewed": True, "until": until} if allowed else {"renewed": False, "reason": "reserved"}
    said = f"Loan {loan} is renewed until {until}." if allowed else f"Loan {loan} cannot be renewed, someone has reserved it."
    return Asked(rng.choice(asked).format(loan), {"loan": loan}, gives, said)


def opening_hours(rng: random.Random) -> Asked:
    branch, day, (opens, closes) = rng.choice(BRANCHES), rng.choice(DAYS), rng.choice(HOURS)
    asked = (
        "When does the {0} library open on {1}?", "How long is {0} open on {1}?", "Can I come to the {0} branch on {1}?",
        "What are the hours at {0} on a {1}?", "I want to visit {0} on {1}. When is it open?",
    )  # fmt: skip
    closed = rng.random() < 0.2
    gives = {"closed": True} if closed else {"opens": opens, "closes": closes}
    said = f"{branch} is closed on {day}." if closed else f"On {day}, {branch} is open from {opens} to {closes}."
    return Asked(rng.choice(asked).format(branch, day), {"branch": branch, "day": day}, gives, said)


def reserve_room(rng: random.Random) -> Asked:
    branch, day, start, hours = (
        rng.choice(BRANCHES),
        rng.choice(DAYS),
        f"{rng.randrange(9, 18):02}:{rng.choice(('00', '30'))}",
        rng.randrange(1, 4),
    )
    length = "one hour" if hours == 1 else f"{hours} hours"
    asked = (
        "I would like a study room at {0} on {1} at {2} for {3}.", "Please book a room for {3} at {0}: {1}, {2}.",
        "We need a study room in the {0} library, {1} from {2}, {3}.", "Is a room free at {0} on {1} at {2}? We need it for {3}.",
    )  # fmt: skip
    free, room = rng.random() < 0.75, rng.randrange(1, 9)
    gives = {"reserved": True, "room": room} if free else {"reserved": False}
    said = f"Room {room} at {branch} is yours on {day} at {start}." if free else f"There is no room free at {branch} on {day} at {start}."
    arguments = {"branch": branch, "day": day, "start": start, "hours": hours}
    return Asked(rng.choice(asked).format(branch, day, start, length), arguments, gives, said)


TOOLS: dict[Callable[[random.Random], Asked], dict[str, Any]] = {
    find_book: tool("find_book", "Look a title up in the catalogue.", title="string"),
    renew_loan: tool("renew_loan", "Renew a loan by its number.", loan="string"),
    opening_hours: tool("opening_hours", "Opening hours of a branch on a day.", branch="string", day="string"),
    reserve_room: tool("reserve_room", "Reserve a study room.", branch="string", day="string", start="string", hours="integer"),
}
# Questions that no tool answers, and the answer.
WITHOUT = {
    "May I bring {} into the reading room?": (
        ("coffee", "my dog", "a sandwich", "a suitcase", "a bicycle helmet", "a bottle of water"),
        "Please ask at the desk, I cannot look that up.",
    ),
    "Thank you for {}!": (("the help", "your patience", "the quick answer", "everything", "looking that up"), "You are welcome."),
    "What is the weather like in {}?": (BRANCHES, "I can only help with the library."),
    "Can you write {} for me?": (
        ("a poem", "a cover letter", "an essay", "a speech", "a book report"),
        "I can only help with the library.",
    ),
}
LACKING = "I cannot do that here, please ask at the desk."


def draw(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A row, and what may not be asked for again."""
    given = rng.sample(list(TOOLS), rng.choice((2, 2, 2, 3)))
    kind = rng.random()
    if kind < 0.08:
        words, (fillings, said) = rng.choice(list(WITHOUT.items()))
        question = words.format(rng.choice(fillings))
        what = question
        messages: list[dict[str, Any]] = [{"role": "assistant", "content": said}]
    elif kind < 0.2:
        asked = rng.choice([each for each in TOOLS if each not in given])(rng)
        question, what = asked.question, json.dumps(asked.arguments)
        messages = [{"role": "assistant", "content": LACKING}]
    else:
        wanted = rng.choice(given)
        asked = wanted(rng)
        question, what = asked.question, json.dumps(asked.arguments)
        call = {"type": "function", "function": {"name": TOOLS[wanted]["name"], "arguments": asked.arguments}}
        messages = [{"role": "assistant", "tool_calls": [call]}]
        if rng.random() < 0.5:
            messages += [{"role": "tool", "content": json.dumps(asked.gives)}, {"role": "assistant", "content": asked.answer}]
    tools = [{"type": "function", "function": TOOLS[each]} for each in given]
    return {"tools": tools, "messages": [{"role": "user", "content": rng.choice(HELLO) + question}, *messages]}, what


def generate() -> dict[str, list[dict[str, Any]]]:
    """Held-out and training rows; what one asks for, no other does."""
    rng = random.Random(SEED)
    seen: set[str] = set()
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, wanted in (("test", TEST_ROWS), ("train", TRAIN_ROWS)):
        rows[split] = []
        while len(rows[split]) < wanted:
            row, what = draw(rng)
            if what not in seen:
                seen.add(what)
                rows[split].append(row)
    return rows


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for split, rows in generate().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

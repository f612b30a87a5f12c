"""Write train.jsonl and test.jsonl: commands to a house, each with the call that carries it out as JSON.

    python generate.py [FOLDER]

A command is one of the wordings of an action, with rooms, times and amounts, each in one of several ways. No call comes twice, within
or across the files: what is held out is a combination of values that training never saw. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 23
TRAIN_ROWS, TEST_ROWS = 480, 96

ROOMS = "attic,bathroom,bedroom,guest room,hall,kitchen,living room,nursery,office,workshop".split(",")
DAYS = "monday,tuesday,wednesday,thursday,friday,saturday,sunday".split(",")
NUMBERS = "twelve,one,two,three,four,five,six,seven,eight,nine,ten,eleven".split(",")
GENRES = "jazz,classical,folk,rock,blues,soul,reggae,swing,piano,ambient".split(",")
ITEMS = {
    "apples": ("kg", "pieces"), "butter": ("packs",), "carrots": ("kg", "bunches"), "coffee": ("packs",), "eggs": ("pieces",),
    "flour": ("kg",), "lemons": ("pieces",), "milk": ("litres",), "oats": ("packs",), "olive oil": ("bottles",), "onions": ("kg",),
    "orange juice": ("litres", "bottles"), "potatoes": ("kg",), "rice": ("kg", "packs"), "tea": ("packs",), "tomatoes": ("kg", "tins"),
    "yoghurt": ("cups",),
}  # fmt: skip
TASKS = (
    "take out the rubbish", "water the plants", "call the dentist", "feed the cat", "return the library books", "pay the rent",
    "defrost the soup", "charge the car", "clean the filter", "book the train", "renew the bus pass", "pick up the parcel",
    "change the bed linen", "air the cellar",
)  # fmt: skip
TIMERS = "bread,cake,eggs,laundry,lasagne,noodles,pizza,potatoes,rice,soup,tea,yoga".split(",")

Made = tuple[str, dict[str, Any]]  # what fills the wordings' {names} – one text, or several by name – and the call


def rooms(rng: random.Random) -> tuple[str, list[str]]:
    chosen = rng.sample(ROOMS, rng.choice((1, 1, 2)))
    return " and ".join(f"the {room}" for room in chosen), chosen


def time(rng: random.Random) -> tuple[str, str]:
    """A time of day in words or digits, and as HH:MM."""
    hour, minute = rng.randrange(5, 23), rng.choice((0, 0, 15, 30, 45, rng.randrange(60)))
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    twelve = hour % 12 or 12
    ways = [f"{hour:02}:{minute:02}", f"{twelve}:{minute:02} {'am' if hour < 12 else 'pm'}"]
    spoken = {0: f"{NUMBERS[hour % 12]} o'clock", 15: f"a quarter past {NUMBERS[hour % 12]}", 30: f"half past {NUMBERS[hour % 12]}",
              45: f"a quarter to {NUMBERS[(hour + 1) % 12]}"}  # fmt: skip
    if minute in spoken and (hour, minute) not in ((11, 45), (12, 0)):  # nobody says: twelve in the afternoon
        ways += [f"{spoken[minute]} {part}"] * 2
    return rng.choice(ways), f"{hour:02}:{minute:02}"


def days(rng: random.Random) -> tuple[str, list[str]]:
    some = sorted(rng.sample(range(7), rng.choice((1, 2, 3))))
    names = [DAYS[n].capitalize() for n in some]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    ways = [("on weekdays", DAYS[:5]), ("every day", DAYS), ("at weekends", DAYS[5:]), (f"on {listed}", [DAYS[n] for n in some])]
    return rng.choice((*ways, ways[3], ways[3]))


def light(rng: random.Random) -> Made:
    (where, chosen), percent = rooms(rng), rng.choice((0, 100, *range(5, 100, 5)))
    words = {0: ("off", "off completely"), 100: ("fully on", "to full brightness")}.get(
        percent, (f"to {percent} %", f"to {percent} percent")
    )
    return f"{where}|{rng.choice(words)}", {"action": "light", "rooms": chosen, "brightness": percent}


def heating(rng: random.Random) -> Made:
    (where, chosen), half = rooms(rng), rng.randrange(32, 49)
    celsius: float | int = half // 2 if half % 2 == 0 else half / 2
    return f"{where}|{celsius}", {"action": "heating", "rooms": chosen, "celsius": celsius}


def blinds(rng: random.Random) -> Made:
    where, chosen = rooms(rng)
    ways = {"all the way down": 0, "a quarter open": 25, "halfway down": 50, "three quarters open": 75, "all the way up": 100}
    words, percent = rng.choice(list(ways.items()))
    return f"{where}|{words}", {"action": "blinds", "rooms": chosen, "open": percent}


def alarm(rng: random.Random) -> Made:
    (at, clock), (on, chosen) = time(rng), days(rng)
    return f"{at}|{on}", {"action": "alarm", "time": clock, "days": chosen}


def timer(rng: random.Random) -> Made:
    minutes, name = rng.randrange(2, 121), rng.choice(TIMERS)
    hours, rest = divmod(minutes, 60)
    words = f"{minutes} minutes"
    if hours and rng.random() < 0.7:
        words = f"{'an hour' if hours == 1 else 'two hours'}" + (f" and {rest} minute{'s' * (rest > 1)}" if rest else "")
    return f"{words}|{name}", {"action": "timer", "name": name, "minutes": minutes}


def music(rng: random.Random) -> Made:
    (where, chosen), genre, volume = rooms(rng), rng.choice(GENRES), rng.choice((None, *range(1, 11)))
    loud = f" at volume {volume}" if volume else ""
    return f"{where}|{genre}|{loud}", {"action": "music", "rooms": chosen, "genre": genre, "volume": volume}


def shopping(rng: random.Random) -> Made:
    item = rng.choice(list(ITEMS))
    unit, amount = rng.choice(ITEMS[item]), rng.randrange(2, 13)
    words = f"{amount} {item}" if unit == "pieces" else f"{amount} {unit} of {item}"
    return words, {"action": "shopping", "item": item, "amount": amount, "unit": unit}


def reminder(rng: random.Random) -> Made:
    task, day, (at, clock) = rng.choice(TASKS), rng.choice(DAYS), time(rng)
    return f"{task}|{day.capitalize()}|{at}", {"action": "reminder", "text": task, "day": day, "time": clock}


# What an action is asked for with; {0}, {1}, … are the parts of what its function gives.
ACTIONS: dict[Callable[[random.Random], Made], tuple[str, ...]] = {
    light: (
        "Turn the light in {0} {1}.",
        "Lights in {0} {1}, please.",
        "In {0}, set the lights {1}.",
        "Could you switch the lamps in {0} {1}?",
    ),
    heating: (
        "Set {0} to {1} degrees.",
        "I want {1} °C in {0}.",
        "Heat {0} to {1} °C, please.",
        "Make it {1} degrees in {0}.",
    ),
    blinds: (
        "Blinds in {0} {1}.",
        "I want the blinds in {0} {1}.",
        "In {0}, the blinds should be {1}.",
        "Move the blinds in {0} so that they are {1}.",
    ),
    alarm: (
        "Wake me at {0} {1}.",
        "Set an alarm for {0} {1}.",
        "I have to get up at {0} {1}.",
        "Alarm {1} at {0}, please.",
    ),
    timer: (
        "Set a timer of {0} for the {1}.",
        "Tell me in {0}, it is for the {1}.",
        "Timer for the {1}: {0}.",
        "Give the {1} {0} and tell me then.",
    ),
    music: (
        "Play {1} in {0}{2}.",
        "I would like to hear {1} in {0}{2}.",
        "Some {1}{2} in {0}, please.",
        "Put on {1}{2} in {0}.",
    ),
    shopping: (
        "Put {0} on the shopping list.",
        "We need {0}.",
        "Add {0} to the list, please.",
        "Note that we have to buy {0}.",
    ),
    reminder: (
        "Remind me to {0} on {1} at {2}.",
        "On {1} at {2} I have to {0}, remind me.",
        "Do not let me forget to {0}: {1}, {2}.",
        "Reminder for {1}, {2}: {0}.",
    ),
}


def draw(action: Callable[[random.Random], Made], rng: random.Random) -> dict[str, str]:
    words, call = action(rng)
    return {"prompt": rng.choice(ACTIONS[action]).format(*words.split("|")), "completion": json.dumps(call)}


def generate() -> dict[str, list[dict[str, str]]]:
    """Held-out and training rows: actions in turn, no call twice."""
    rng = random.Random(SEED)
    actions = list(ACTIONS)
    seen: set[str] = set()
    rows: dict[str, list[dict[str, str]]] = {}
    for split, wanted in (("test", TEST_ROWS), ("train", TRAIN_ROWS)):
        rows[split] = []
        while len(rows[split]) < wanted:
            row = draw(actions[len(rows[split]) % len(actions)], rng)
            if row["completion"] not in seen:
                seen.add(row["completion"])
                rows[split].append(row)
        rng.shuffle(rows[split])
    return rows


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for split, rows in generate().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

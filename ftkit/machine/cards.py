"""The cards that can be planned for by name: a table."""

from __future__ import annotations

import csv
import difflib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ftkit.errors import RecipeError

MOST_LACKING = 0.9  # of its nominal memory every card gives more
NEAR_NAMES = 5  # that an unknown name is told at most


class Card(NamedTuple):
    """A card's name, the memory that CUDA can give of it, its CUDA capability, and where the memory is known from."""

    name: str
    memory_gib: float
    capability: tuple[int, int]
    source: str


@cache
def cards() -> dict[str, Card]:
    """The cards that can be planned for by name: rows of cards.csv."""
    with Path(__file__).with_name("cards.csv").open(encoding="utf-8", newline="") as table:
        return {
            row["name"]: Card(row["name"], float(row["memory_gib"]), (int(major), int(minor)), row["source"])
            for row in csv.DictReader(table)
            for major, minor in [row["capability"].split(".")]
        }


def find_card(name: str) -> Card:
    """A row of the table by any spelling of its name. RecipeError names the sizes of a card that comes in several, or near names."""
    wanted = _plain(name)
    known = {_plain(card.name): card for card in cards().values()}
    if wanted in known:
        return known[wanted]
    if memory := re.search(r"\b(\d+) ?GB\b", name, re.IGNORECASE):  # as in `H100 80GB HBM3`: the same card if it is of that size
        card = known.get(_plain(name.replace(memory[0], "")))
        if card and MOST_LACKING * int(memory[1]) <= card.memory_gib <= int(memory[1]):
            return card
    if sizes := [card.name for card in known.values() if _plain(re.sub(r" \d+GB$", "", card.name)) == wanted]:
        raise RecipeError(f"`{name}` comes with more than one amount of memory.", f"say which: {', '.join(sizes)}")
    near = ", ".join(known[key].name for key in difflib.get_close_matches(wanted, known, NEAR_NAMES, cutoff=0.5))
    hint = "give its memory instead, as in --vram 24"
    raise RecipeError(f"`{name}` is no card that ftkit knows.", f"{hint} (near: {near})" if near else hint)


def _plain(name: str) -> str:
    """A card's name without maker, form and punctuation: `NVIDIA GeForce RTX 4090` and `rtx4090` are one."""
    return re.sub(r"nvidia|geforce|tesla|generation|gpu|sxm\d|pcie|hbm\de?", "", re.sub(r"[^a-z0-9]", "", name.lower()))

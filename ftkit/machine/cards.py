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


class Speed(NamedTuple):
    """What a card can at most, by its cores and boost clock, where cooling and power allow it.

    `tensor_tflops`: 16-bit matrix products without sparsity, summed in float32, which GeForce cards do at half speed; None without
    tensor cores. `float32_tflops`: without them.
    """

    tensor_tflops: float | None
    float32_tflops: float
    gb_per_second: float


class Card(NamedTuple):
    """A card's name, the memory that CUDA can give of it, its CUDA capability, where the memory is known from, and its speed.

    A laptop's card has no one speed: its maker sets the power that it may take.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]
    source: str
    speed: Speed | None


@cache
def cards() -> dict[str, Card]:
    """The cards that can be planned for by name: rows of cards.csv."""
    with Path(__file__).with_name("cards.csv").open(encoding="utf-8", newline="") as table:
        return {
            row["name"]: Card(row["name"], float(row["memory_gib"]), (int(major), int(minor)), row["source"], _speed(row))
            for row in csv.DictReader(table)
            for major, minor in [row["capability"].split(".")]
        }


def find_card(name: str) -> Card:
    """A row of the table by any spelling of its name. RecipeError names the sizes of a card that comes in several, or near names."""
    exact = {re.sub(r"\W", "", card.name.lower()): card for card in cards().values()}  # `H100 PCIe` is another card than `H100`
    if found := exact.get(re.sub(r"\W|nvidia|geforce|tesla", "", name.lower())):
        return found
    wanted = _plain(name)
    known: dict[str, Card] = {}
    for card in cards().values():
        known.setdefault(_plain(card.name), card)
    if wanted in known:
        return known[wanted]
    if memory := re.search(r"\b(\d+) ?GB\b", name, re.IGNORECASE):  # as in `H100 80GB HBM3`: the same card if it is of that size
        found = known.get(_plain(name.replace(memory[0], "")))
        if found and MOST_LACKING * int(memory[1]) <= found.memory_gib <= int(memory[1]):
            return found
    if sizes := [card.name for card in known.values() if _plain(re.sub(r" \d+GB$", "", card.name)) == wanted]:
        raise RecipeError(f"`{name}` comes with more than one amount of memory.", f"say which: {', '.join(sizes)}")
    near = ", ".join(known[key].name for key in difflib.get_close_matches(wanted, known, NEAR_NAMES, cutoff=0.5))
    hint = "give its memory instead, as in --vram 24"
    raise RecipeError(f"`{name}` is no card that ftkit knows.", f"{hint} (near: {near})" if near else hint)


def speed_of(name: str) -> Speed | None:
    """Of the card with this name, in any spelling; None where it is not known."""
    try:
        return find_card(name).speed
    except RecipeError:
        return None


def _speed(row: dict[str, str]) -> Speed | None:
    if not row["float32_tflops"]:
        return None
    tensor = float(row["tensor_tflops"]) if row["tensor_tflops"] else None
    return Speed(tensor, float(row["float32_tflops"]), float(row["gb_per_second"]))


def _plain(name: str) -> str:
    """A card's name without maker, form and punctuation: `NVIDIA GeForce RTX 4090` and `rtx4090` are one."""
    return re.sub(r"nvidia|geforce|tesla|generation|gpu|sxm\d|pcie|hbm\de?", "", re.sub(r"[^a-z0-9]", "", name.lower()))

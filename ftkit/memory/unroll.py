"""Put back into a trace the layers that a shortened model left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftkit.memory.events import ALLOCATE, WORK, WORKSPACE, Events

Ints = NDArray[np.int64]
NO_STORAGE = (WORKSPACE, WORK)  # kinds of events that refer to none


@dataclass(frozen=True)
class Layout:
    """The order of a whole model's events. Event n has the size of the shortened model's event `source[n]`."""

    kinds: Ints
    storages: Ints
    source: Ints
    labels: tuple[str, ...]
    marks: tuple[tuple[int, tuple[str, int]], ...]
    release: int  # index of the first event after the backward pass


class NotRepeating(Exception):
    """The layers that should repeat each other do not: the whole model must be traced."""


def unroll(events: Events, unit: int, layers: int, total: int) -> Layout:
    """Put back the layers that a shortened model left out.

    `layers` = 4 units and a rest were traced, `total` are wanted. Of the units 0, 1, 2, 3 and the rest the third is the
    template: its forward and backward events are repeated, each copy's references to its neighbours moved along. Raises
    NotRepeating unless the second unit's events equal the third's.
    """
    if unit == 0:
        return Layout(
            kinds=np.array(events.kinds),
            storages=np.array(events.storages),
            source=np.arange(len(events.kinds)),
            labels=tuple(events.labels),
            marks=tuple(events.marks),
            release=_release(events.marks),
        )
    starts = {mark: index for index, mark in events.marks}
    copies = (total - layers) // unit  # beside the template itself

    def block(way: str, number: int) -> range:
        first, last = number * unit, (number + 1) * unit - 1
        try:
            if way == "forward":
                return range(starts["forward", first], starts["forward", last + 1] if last + 1 < layers else starts["head", 0])
            return range(starts["backward", last], starts["backward", first - 1] if first else starts["release", 0])
        except KeyError:
            raise NotRepeating from None

    before = {way: block(way, 1) for way in ("forward", "backward")}
    template = {way: block(way, 2) for way in ("forward", "backward")}
    born = {}  # storage → index of its allocation
    for index, (kind, storage) in enumerate(zip(events.kinds, events.storages, strict=True)):
        if kind == ALLOCATE:
            born[storage] = index
    for way in template:
        a, b = before[way], template[way]
        if len(a) != len(b) or any(
            events.kinds[x] != events.kinds[y] or events.sizes[x] != events.sizes[y] or events.labels[x] != events.labels[y]
            for x, y in zip(a, b, strict=True)
        ):
            raise NotRepeating

    def place(storage: int) -> tuple[int, str, int]:
        """(unit 1, 2 or 0 for elsewhere, which way, position in its block) of a storage's allocation."""
        index = born.get(storage, -1)
        for number, blocks in ((1, before), (2, template)):
            for way, span in blocks.items():
                if index in span:
                    return number, way, index - span.start
        return 0, "", 0

    where = {storage: place(storage) for storage in born}
    width = max(born, default=0) + 1  # a copy's storages are numbered storage + copy × width

    def copied(way: str, position: int, copy: int) -> int:
        """The storage that the template's event refers to in its copy."""
        storage = events.storages[template[way][position]]
        if events.kinds[template[way][position]] in NO_STORAGE:
            return storage
        number = where[storage][0]
        if number == 2:
            return storage + copy * width
        if number == 1:  # the unit before
            if copy == 0:
                return storage
            _, born_way, born_position = where[storage]
            return events.storages[template[born_way][born_position]] + (copy - 1) * width
        if copy == copies:  # the unit after
            return storage
        other = events.storages[before[way][position]]  # what the second unit refers to in the third
        if where[other][0] != 2:
            raise NotRepeating
        return other + (copy + 1) * width

    kinds: list[int] = []
    storages: list[int] = []
    source: list[int] = []
    marks: list[tuple[int, tuple[str, int]]] = []

    def emit(index: int, storage: int) -> None:
        kinds.append(events.kinds[index])
        storages.append(storage)
        source.append(index)

    marks_at: dict[int, list[tuple[str, int]]] = {}
    for index, mark in events.marks:
        marks_at.setdefault(index, []).append(mark)
    last_copied = 3 * unit  # the first layer after the template
    index = 0
    while index < len(events.kinds):
        begins = next((way for way, span in template.items() if index == span.start), None)
        if begins is None:
            for name, number in marks_at.get(index, ()):
                marks.append(
                    (len(kinds), (name, number + copies * unit if name in ("forward", "backward") and number >= last_copied else number))
                )
            storage = events.storages[index]
            if events.kinds[index] in NO_STORAGE or where[storage][0] != 2:
                emit(index, storage)
            else:  # of the template, released elsewhere: by a neighbour, or at the end for all copies
                in_before = any(index in span for span in before.values())
                in_after = any(index in block(direction, 3) for direction in template)
                chosen = [0] if in_before else [copies] if in_after else range(copies + 1)
                for copy in chosen:
                    emit(index, storage + copy * width)
            index += 1
            continue
        span = template[begins]
        order = range(copies + 1) if begins == "forward" else range(copies, -1, -1)
        for copy in order:
            for position, at in enumerate(span):
                marks.extend((len(kinds), (name, number + copy * unit)) for name, number in marks_at.get(at, ()))
                emit(at, copied(begins, position, copy))
        index = span.stop
    for name, number in marks_at.get(len(events.kinds), ()):
        marks.append((len(kinds), (name, number)))
    labels = tuple(events.labels[at] for at in source)
    return Layout(np.array(kinds), np.array(storages), np.array(source), labels, tuple(marks), _release(marks))


def _release(marks: Sequence[tuple[int, tuple[str, int]]]) -> int:
    return next(index for index, mark in marks if mark == ("release", 0))

"""What a training step allocates and frees, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

ALLOCATE, FREE, WORKSPACE, GRADIENT, WORK = range(5)  # kinds of events; see Events


@dataclass
class Events:
    """What one forward and backward pass allocates and frees, in order, and what it computes.

    Event n has a kind, a storage and a size in bytes. ALLOCATE and FREE are what they say; WORKSPACE is taken and given
    back within one kernel; GRADIENT says that a parameter's gradient is complete in this storage. WORK
    has no storage, and in place of bytes a count of what was computed since the last mark. `labels` names what an allocation is
    for, or what was counted. `marks` cut the sequence: (index of the event, what begins there).
    """

    kinds: list[int] = field(default_factory=list)
    storages: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tiled: list[bool] = field(default_factory=list)  # sizes that stop growing at HEAD_TILE_TOKENS tokens
    marks: list[tuple[int, tuple[str, int]]] = field(default_factory=list)

    def add(self, kind: int, storage: int, size: int, label: str, tiled: bool = False) -> None:
        self.kinds.append(kind)
        self.storages.append(storage)
        self.sizes.append(size)
        self.labels.append(label)
        self.tiled.append(tiled)

    def sort_frees(self) -> None:
        """Put releases that follow each other in the order of their allocation: some containers let go in no order."""
        marked = {index for index, _ in self.marks}
        start = 0
        for index in range(len(self.kinds) + 1):
            if index == len(self.kinds) or self.kinds[index] != FREE or index in marked:
                run = sorted(zip(self.storages[start:index], self.sizes[start:index], self.tiled[start:index], strict=True))
                self.storages[start:index] = [storage for storage, _, _ in run]
                self.sizes[start:index] = [size for _, size, _ in run]
                self.tiled[start:index] = [tiled for _, _, tiled in run]
                start = index if index in marked and index < len(self.kinds) and self.kinds[index] == FREE else index + 1

"""Which device trains, and how much memory it has."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import psutil

from ftkit.errors import RecipeError
from ftkit.files import fingerprint
from ftkit.machine import cuda_driver, nvml
from ftkit.machine.cards import find_card
from ftkit.units import GIB, parse_vram

ANY_CARD = (8, 9)  # the capability that is planned for where only an amount of memory is given


@dataclass(frozen=True)
class Device:
    """What training runs on. `capability` is CUDA's, (0, 0) for a CPU."""

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)


def find_gpus(management: Any = None, driver: str = cuda_driver.LIBRARY) -> list[Device]:
    """The GPUs that CUDA will see, in CUDA's order; empty without a driver or a GPU. Does not import torch.

    NVIDIA's management library lists them; where it lists none, or does not tell the memory of one, CUDA's driver does, which does not
    tell what is free without taking some of it: of a GPU that shares the machine's RAM that is what is free there, of another one all.
    RecipeError where CUDA_VISIBLE_DEVICES names a slice of a GPU, or where CUDA counts another way than by bus and the cards differ.
    """
    nothing: list[Device | None] = []
    listed = nvml.ask(_listed, nothing, management)
    told = [found for found in listed if found]
    return told if listed and len(told) == len(listed) else [_driven(gpu) for gpu in cuda_driver.gpus(driver)] or told


def _listed(nvml: Any) -> list[Device | None]:
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    cards.sort(key=lambda card: nvml.nvmlDeviceGetPciInfo(card).busId)
    uuids = [nvml.nvmlDeviceGetUUID(card) for card in cards]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = list(range(len(cards))) if visible is None else visible_gpus(visible, uuids)
    by_number = visible is None or not visible.strip().startswith("GPU-")
    if chosen and by_number and os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST") != "PCI_BUS_ID":
        _refuse_mixed({nvml.nvmlDeviceGetName(card) for card in cards})
    return [describe(nvml, cards[index]) for index in chosen]


def _driven(gpu: cuda_driver.Gpu) -> Device:
    ram = processor()
    if gpu.integrated:
        return Device("cuda", gpu.name, min(gpu.total_bytes, ram.total_bytes), min(gpu.total_bytes, ram.free_bytes), gpu.capability)
    return Device("cuda", gpu.name, gpu.total_bytes, gpu.total_bytes, gpu.capability)


def visible_gpus(visible: str, uuids: Sequence[str]) -> list[int]:
    """Which of the GPUs, counted by bus, CUDA_VISIBLE_DEVICES leaves, in its order: numbers, or UUIDs that may be cut short.

    As CUDA reads it: what follows a part that names no GPU does not count, and a GPU named twice leaves none.
    """
    chosen: list[int] = []
    for part in (part.strip() for part in visible.split(",")):
        if part.startswith("MIG-"):
            raise RecipeError(
                f"CUDA_VISIBLE_DEVICES names {part}, a slice of a GPU, which ftkit does not model.",
                "name a whole GPU there, by number or by UUID (nvidia-smi -L lists them)",
            )
        named = [index for index, uuid in enumerate(uuids) if part.startswith("GPU-") and uuid.startswith(part)]
        if part.isdecimal() and int(part) < len(uuids):
            named = [int(part)]
        if len(named) != 1:
            break
        if named[0] in chosen:
            return []
        chosen += named
    return chosen


def _refuse_mixed(names: set[str]) -> None:
    """RecipeError where the GPUs have more than one name: only by bus is it known which of them CUDA takes first."""
    if len(names) > 1:
        raise RecipeError(
            f"This machine has different GPUs ({', '.join(sorted(names))}), and CUDA counts them by speed: which one trains is not known.",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name one by its UUID in CUDA_VISIBLE_DEVICES (nvidia-smi -L lists them)",
        )


def describe(nvml: Any, card: Any) -> Device | None:
    """A GPU with the memory that CUDA can give, without what the driver reserves; None where NVML does not tell its memory.

    RecipeError for one that is cut into slices: CUDA would see the first slice alone.
    """
    name = nvml.nvmlDeviceGetName(card)
    if _sliced(nvml, card):
        raise RecipeError(f"{name} is cut into slices (MIG), which ftkit does not model.", "make it whole, or plan alone with --vram")
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2)
        capability = nvml.nvmlDeviceGetCudaComputeCapability(card)
        return Device("cuda", name, memory.total - memory.reserved, memory.free, tuple(capability))
    except nvml.NVMLError:
        return None


def _sliced(nvml: Any, card: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:  # most cards cannot be
        return False


def unused_gpu(amd: Path = Path("/dev/kfd")) -> str | None:
    """A GPU of this machine that nothing here trains on, in words: of a Mac with Apple's processor, or one that AMD's driver serves."""
    maker = "Apple's" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "AMD's" if amd.exists() else None
    return maker and f"{maker} GPU is not used: ftkit trains on NVIDIA's GPUs, which ftkit plan --gpus lists, and on processors"


def processor(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Device:
    """The CPU with this machine's RAM, or with as much of it as a container's limit allows."""
    memory = psutil.virtual_memory()
    limits = list(ram_limits(cgroups, own))
    total, free = (min(values) for values in zip((memory.total, memory.available), *limits, strict=True))
    return Device("cpu", "CPU", total, min(total, free))


def processor_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What tells this machine's processor from others: its name and its instructions, as far as the system tells them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))})
    name = next((line.partition(":")[2].strip() for line in told if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()} {fingerprint(told)[:8]}"


def held_bytes() -> int:
    """RAM that this process holds and the system cannot drop: without the pages of files."""
    process = psutil.Process()
    memory = process.memory_info()
    return int(memory.rss - memory.shared if hasattr(memory, "shared") else process.memory_full_info().uss)  # which Linux tells at once


def ram_limits(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and what is free below it, in bytes, of every control group that holds this process, from its own up to the root.

    `own` is the process's list of groups, `cgroups` where the kernel shows them: version 2, or version 1's `memory` below it. File
    pages that nobody used lately count as free, as the kernel drops them first. A container sees its own group as the root.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top, limit_name, usage_name, inactive = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit_name, usage_name, inactive = (
                cgroups / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        below = PurePosixPath(group.lstrip("/"))
        for folder in (top / below, *(top / parent for parent in below.parents)):
            try:
                limit = (folder / limit_name).read_text(encoding="ascii").strip()
                used = int((folder / usage_name).read_text(encoding="ascii"))
                kinds = dict(row.split() for row in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            except OSError:  # a group that the container does not see
                continue
            if limit != "max":
                yield int(limit), max(0, int(limit) - used + int(kinds.get(inactive, 0)))


def asked_threads() -> int | None:
    """How many threads OMP_NUM_THREADS allows, None where it says nothing; of a list, one for each level, the first counts."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def computing_threads() -> int:
    """How many threads to compute with: those that are asked for, else a core each."""
    return asked_threads() or psutil.cpu_count(logical=False) or 1


def choose(vram: str | None = None, gpu: str | None = None) -> Device:
    """The device to plan for: an amount, a card by name, the first GPU found, else the CPU."""
    if gpu:
        card = find_card(gpu)
        size = parse_vram(vram) if vram else int(card.memory_gib * GIB)
        return Device("cuda", card.name, size, size, card.capability)
    if vram:
        size = parse_vram(vram)
        return Device("cuda", f"a GPU with {size / GIB:.4g} GiB", size, size, ANY_CARD)
    return next(iter(find_gpus()), None) or processor()

"""What probes and trainings measured on this machine's devices, kept in the private folder and used by the next plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftkit.device import Device
from ftkit.memory.step import Peak
from ftkit.run import write_atomically
from ftkit.tools import cache_folder, make_cache_folder


def _file() -> Path:
    return cache_folder() / "measured.json"


def _all() -> dict[str, Any]:
    """What is kept of every device, by its name. Empty where nothing was measured, or it cannot be read."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def known(device: Device) -> dict[str, Any]:
    """`extra_bytes`: by how much the last probe's peak was above its plan (below: negative). Empty where nothing was measured."""
    found = _all().get(device.name)
    return found if isinstance(found, dict) else {}


def extra_bytes(device: Device) -> int:
    """What a plan for this device has to add, by the last probe on it."""
    return int(known(device).get("extra_bytes", 0))


def remember(device: Device, planned: Peak, allocated_bytes: int, reserved_bytes: int | None) -> None:
    """Keep a probe's difference to the plan for the device. Without an earlier probe's difference in it."""
    measured = reserved_bytes if reserved_bytes is not None else allocated_bytes
    expected = planned.reserved_bytes if reserved_bytes is not None else planned.allocated_bytes
    _update(device, {"extra_bytes": measured - expected})


def _update(device: Device, entry: dict[str, Any]) -> None:
    kept = _all()
    kept[device.name] = {**known(device), **entry}
    make_cache_folder(_file().parent)
    write_atomically(_file(), (json.dumps(kept, indent=1) + "\n").encode())


def remember_speed(device: Device, method: str, model: str, tokens_per_second: float) -> None:
    """Keep a training's throughput."""
    speeds = {**known(device).get("tokens_per_second", {}), f"{method} {model}": round(tokens_per_second, 1)}
    _update(device, {"tokens_per_second": speeds})


def tokens_per_second(device: Device, method: str, model: str) -> float | None:
    """The throughput of the last training of this model by this method on this device."""
    speed = known(device).get("tokens_per_second", {}).get(f"{method} {model}")
    return float(speed) if isinstance(speed, (int, float)) else None

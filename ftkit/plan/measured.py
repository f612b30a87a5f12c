"""What probes and trainings told of this machine's devices."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftkit.errors import RunError
from ftkit.files import cache_folder, fingerprint, make_cache_folder, write_atomically
from ftkit.machine.device import Device
from ftkit.memory.replay import Peak
from ftkit.model.source import Source
from ftkit.recipe import Recipe


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
    """`probes`: by how many bytes each subject was above its plan at its last probe or miss (below: negative). Empty: nothing is known."""
    found = _all().get(device.name)
    return found if isinstance(found, dict) else {}


def subject(recipe: Recipe, model: str) -> str:
    """What a probe's difference holds for: the method and the model, `model` its fingerprint, as they are trained; at any batch."""
    method = named_method(recipe)
    adapter = None if recipe.training.method == "full" else recipe.lora.model_dump(exclude_defaults=True)
    dtype = [recipe.training.compute_dtype] if recipe.training.compute_dtype else []
    return f"{method} {recipe.model} {fingerprint(model, recipe.training.optim, adapter, *dtype)}"


def named_method(recipe: Recipe) -> str:
    """The method, and the objective where that is another than usual: a step of it takes other memory and time."""
    training = recipe.training
    return training.method if training.objective == "sft" else f"{training.method} {training.objective}"


def _probes(device: Device) -> dict[str, Any]:
    found = known(device).get("probes")
    return found if isinstance(found, dict) else {}


def extra_bytes(device: Device, subject: str) -> int:
    """What a plan of this subject for this device has to add, by its last probe or miss there; 0 where there was none."""
    found = _probes(device).get(subject)
    return found if isinstance(found, int) else 0


def remember(device: Device, subject: str, planned: Peak, allocated_bytes: int, reserved_bytes: int | None) -> None:
    """Keep a probe's difference to the plan for its subject on the device. Without an earlier probe's difference in it."""
    measured = reserved_bytes if reserved_bytes is not None else allocated_bytes
    expected = planned.reserved_bytes if reserved_bytes is not None else planned.allocated_bytes
    _update(device, {"probes": {**_probes(device), subject: measured - expected}})


def remember_miss(device: Device, subject: str, beyond_bytes: int) -> None:
    """Keep that a training of this subject needed at least so much more than its plan, other extras left out."""
    _update(device, {"probes": {**_probes(device), subject: max(beyond_bytes, extra_bytes(device, subject))}})


def _update(device: Device, entry: dict[str, Any]) -> None:
    kept = _all()
    kept[device.name] = {**known(device), **entry}
    make_cache_folder(_file().parent)
    write_atomically(_file(), (json.dumps(kept, indent=1) + "\n").encode())


def bfloat16_speed(device: Device, processor: str) -> float | None:
    """How many times as fast as float32 a processor's matrix products are in bfloat16."""
    speed = _bfloat16_speeds(device).get(processor)
    return float(speed) if isinstance(speed, (int, float)) else None


def remember_bfloat16_speed(device: Device, processor: str, speed: float) -> None:
    """Keep it, of a private folder that several machines may share; where nothing can be kept, it is measured again."""
    with suppress(OSError, RunError):
        _update(device, {"bfloat16_speed": {**_bfloat16_speeds(device), processor: round(speed, 2)}})


def _bfloat16_speeds(device: Device) -> dict[str, Any]:
    found = known(device).get("bfloat16_speed")
    return found if isinstance(found, dict) else {}


def remember_speed(device: Device, method: str, model: Source, tokens_per_second: float) -> None:
    """Keep a training's throughput."""
    speeds = {**known(device).get("tokens_per_second", {}), _training(method, model): round(tokens_per_second, 1)}
    _update(device, {"tokens_per_second": speeds})


def tokens_per_second(device: Device, method: str, model: Source) -> float | None:
    """The throughput of the last training of this model by this method on this device."""
    speed = known(device).get("tokens_per_second", {}).get(_training(method, model))
    return float(speed) if isinstance(speed, (int, float)) else None


def _training(method: str, model: Source) -> str:
    """By the model's files: folders of several projects may have one name."""
    return f"{method} {model.reference} {model.fingerprint[:16]}"

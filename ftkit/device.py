"""Which device trains, how much memory it has, and which number formats it computes in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

import psutil

from ftkit.errors import RecipeError
from ftkit.units import GIB, parse_vram

# Total memory as nvidia-smi shows it is a little less than the nominal size; the plan leaves a margin for that.
CARDS_GIB = {
    "RTX 3060": 12, "RTX 3070": 8, "RTX 3080": 10, "RTX 3090": 24, "RTX 4060": 8, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12,
    "RTX 4080": 16, "RTX 4090": 24, "RTX 5060 Ti": 16, "RTX 5070": 12, "RTX 5080": 16, "RTX 5090": 32,
    "T4": 16, "L4": 24, "A10": 24, "L40S": 48, "A100 40GB": 40, "A100 80GB": 80, "H100": 80,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What training runs on. `capability` is CUDA's, (0, 0) for a CPU or a card that is only planned for."""

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)


def find_gpus() -> list[Device]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves visible; empty without any. Does not import torch."""
    program, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not program or visible in ("", "-1"):
        return []
    query = "name,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    devices = parse_nvidia_smi(done.stdout) if done.returncode == 0 else []
    if visible and all(part.isdigit() for part in visible.split(",")):
        return [devices[int(part)] for part in visible.split(",") if int(part) < len(devices)]
    return devices


def parse_nvidia_smi(text: str) -> list[Device]:
    """Rows of `name, total MiB, free MiB, capability`; rows that hold something else are passed over."""
    devices = []
    for line in text.splitlines():
        match = re.fullmatch(r"(.+), (\d+), (\d+), (\d+)\.(\d+)", line.strip())
        if match:
            total, free = int(match[2]) << 20, int(match[3]) << 20
            devices.append(Device("cuda", match[1], total, free, (int(match[4]), int(match[5]))))
    return devices


def processor() -> Device:
    """The CPU with this machine's RAM."""
    memory = psutil.virtual_memory()
    return Device("cpu", "CPU", memory.total, memory.available)


def choose(vram: str | None = None, gpu: str | None = None) -> Device:
    """The device to plan for: an amount, a card by name, the first GPU found, else the CPU."""
    if vram:
        size = parse_vram(vram)
        return Device("cuda", f"a GPU with {size / GIB:.4g} GiB", size, size)
    if gpu:
        wanted = re.sub(r"[^a-z0-9]", "", gpu.lower().replace("nvidia", "").replace("geforce", ""))
        for name, size in CARDS_GIB.items():
            if re.sub(r"[^a-z0-9]", "", name.lower()) == wanted:
                return Device("cuda", name, size * GIB, size * GIB)
        raise RecipeError(
            f"`{gpu}` is no card that ftkit knows.", f"give its memory instead, as in --vram 24 (known: {', '.join(CARDS_GIB)})"
        )
    return next(iter(find_gpus()), None) or processor()


def computes_bfloat16(device: Device) -> bool:
    """Whether bfloat16 arithmetic is native: CUDA from capability 8.0 on, CPUs with AVX512-BF16 or AMX.

    A card that is only planned for counts as one that does. On a CPU without it, bfloat16 is emulated: its matrix products
    were measured 9 times slower than float32's (AVX2, torch 2.13), so float32 is the better choice there.
    """
    if device.kind == "cuda":
        return device.capability == (0, 0) or device.capability >= (8, 0)
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

"""Which device trains, how much memory it has, and which number formats it computes in."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

import psutil

from ftkit.errors import RecipeError
from ftkit.units import GIB, parse_vram

# Nominal memory in GiB and CUDA compute capability, from NVIDIA's specifications. nvidia-smi shows a little less than the
# nominal size; the plan leaves a margin for that.
CARDS: dict[str, tuple[int, tuple[int, int]]] = {
    "GTX 1070": (8, (6, 1)), "GTX 1080": (8, (6, 1)), "GTX 1080 Ti": (11, (6, 1)), "RTX 2060": (6, (7, 5)), "RTX 2070": (8, (7, 5)), "RTX 2080": (8, (7, 5)), "RTX 2080 Ti": (11, (7, 5)),
    "RTX 3050": (8, (8, 6)), "RTX 3060": (12, (8, 6)), "RTX 3060 Ti": (8, (8, 6)), "RTX 3070": (8, (8, 6)), "RTX 3070 Ti": (8, (8, 6)),
    "RTX 3080": (10, (8, 6)), "RTX 3080 12GB": (12, (8, 6)), "RTX 3080 Ti": (12, (8, 6)), "RTX 3090": (24, (8, 6)), "RTX 3090 Ti": (24, (8, 6)),
    "RTX 4060": (8, (8, 9)), "RTX 4060 Ti": (8, (8, 9)), "RTX 4060 Ti 16GB": (16, (8, 9)), "RTX 4070": (12, (8, 9)),
    "RTX 4070 Super": (12, (8, 9)), "RTX 4070 Ti": (12, (8, 9)), "RTX 4070 Ti Super": (16, (8, 9)), "RTX 4080": (16, (8, 9)),
    "RTX 4080 Super": (16, (8, 9)), "RTX 4090": (24, (8, 9)), "RTX 5060": (8, (12, 0)), "RTX 5060 Ti": (16, (12, 0)),
    "RTX 5070": (12, (12, 0)), "RTX 5070 Ti": (16, (12, 0)), "RTX 5080": (16, (12, 0)), "RTX 5090": (32, (12, 0)),
    "TITAN RTX": (24, (7, 5)), "Quadro RTX 8000": (48, (7, 5)), "RTX A4000": (16, (8, 6)), "RTX A5000": (24, (8, 6)), "RTX A6000": (48, (8, 6)),
    "RTX 4000 Ada": (20, (8, 9)), "RTX 5000 Ada": (32, (8, 9)), "RTX 6000 Ada": (48, (8, 9)), "RTX PRO 6000": (96, (12, 0)),
    "P100": (16, (6, 0)), "V100": (16, (7, 0)), "T4": (16, (7, 5)), "L4": (24, (8, 9)), "A10": (24, (8, 6)), "A10G": (24, (8, 6)),
    "A30": (24, (8, 0)), "A40": (48, (8, 6)), "L40": (48, (8, 9)), "L40S": (48, (8, 9)), "A100 40GB": (40, (8, 0)), "A100 80GB": (80, (8, 0)), "H100": (80, (9, 0)), "H200": (141, (9, 0)), "B200": (180, (10, 0)),
}  # fmt: skip
ANY_CARD = (8, 9)  # the capability that is planned for where only an amount of memory is given


@dataclass(frozen=True)
class Device:
    """What training runs on. `capability` is CUDA's, (0, 0) for a CPU."""

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)


def find_gpus() -> list[Device]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves visible; empty without any. Does not import torch."""
    program, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not program or (visible is not None and visible.strip() in ("", "-1")):
        return []
    wanted = [part.strip() for part in visible.split(",")] if visible else []
    numbers = all(part.isdigit() for part in wanted)
    query = "name,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={query}", "--format=csv,noheader,nounits", *([] if numbers else [f"--id={','.join(wanted)}"])],  # by UUID
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    devices = parse_nvidia_smi(done.stdout) if done.returncode == 0 else []
    return [devices[int(part)] for part in wanted if int(part) < len(devices)] if wanted and numbers else devices


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


def asked_threads() -> int | None:
    """How many threads OMP_NUM_THREADS allows, None where it says nothing; of a list, one for each level, the first counts."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def choose(vram: str | None = None, gpu: str | None = None) -> Device:
    """The device to plan for: an amount, a card by name, the first GPU found, else the CPU."""
    if gpu:
        wanted = _plain(gpu)
        for name, (gib, capability) in CARDS.items():
            if _plain(name) == wanted:
                size = parse_vram(vram) if vram else gib * GIB
                return Device("cuda", name, size, size, capability)
        near = difflib.get_close_matches(wanted, {_plain(name): name for name in CARDS}, 3, cutoff=0.5)
        names = [name for name in CARDS if _plain(name) in near] or list(CARDS)
        raise RecipeError(f"`{gpu}` is no card that ftkit knows.", f"give its memory instead, as in --vram 24 (near: {', '.join(names)})")
    if vram:
        size = parse_vram(vram)
        return Device("cuda", f"a GPU with {size / GIB:.4g} GiB", size, size, ANY_CARD)
    return next(iter(find_gpus()), None) or processor()


def _plain(name: str) -> str:
    """A card's name without maker and punctuation: `NVIDIA GeForce RTX 4090` and `rtx4090` are one."""
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())


def computes_bfloat16(device: Device) -> bool:
    """Whether bfloat16 arithmetic is native: CUDA from capability 8.0 on, CPUs with AVX512-BF16 or AMX.

    On a CPU without it, bfloat16 is emulated: its matrix products
    were measured 9 times slower than float32's (AVX2, torch 2.13), so float32 is the better choice there.
    """
    if device.kind == "cuda":
        return device.capability >= (8, 0)
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

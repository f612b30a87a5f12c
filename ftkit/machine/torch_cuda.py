"""Whether the torch that is installed computes on a GPU of this machine, and which one would."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ftkit.errors import ToolMissingError
from ftkit.machine import cuda_driver, nvml, ranks
from ftkit.machine.device import Device, describe
from ftkit.units import bytes_text

Version = tuple[int, int]  # major, minor

# PyTorch's own wheels of 2.13, the newest first: their CUDA, and the capabilities that they hold code for (pytorch's RELEASE.md, "CUDA
# Support Matrix"; cu126 begins at 5.0, bitsandbytes' library for it at 6.0). Without an address, pip takes cu130 on Linux, and on Windows
# one without CUDA.
WHEELS: dict[str, tuple[Version, Version, Version]] = {"cu130": ((13, 0), (7, 5), (12, 1)), "cu126": ((12, 6), (6, 0), (9, 0))}
LEAST_CAPABILITY = {13: (7, 5)}  # by CUDA's major version, from which on its compiler knows no older ones
ON_THE_PROCESSOR = "train on the processor: CUDA_VISIBLE_DEVICES=-1"


@dataclass(frozen=True)
class Torch:
    """As it is installed; `cuda`: what it was made for."""

    version: str
    cuda: Version | None


def installed() -> Torch | None:
    """By its files: it is not imported."""
    spec = util.find_spec("torch")
    if not spec or not spec.origin:
        return None
    said = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*?=\s*'(\d+)\.(\d+)", said, re.MULTILINE)
    return Torch(metadata.version("torch").partition("+")[0], (int(found[1]), int(found[2])) if found else None)


def driver(management: Any = None, library: str = cuda_driver.LIBRARY) -> tuple[str, Version] | None:
    """(its version, the CUDA that it knows); None where it does not tell."""

    def told(nvml: Any) -> tuple[str, Version] | None:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # 13000 is CUDA 13.0
        return str(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10)

    return nvml.ask(told, None, management) or (("", knows) if (knows := cuda_driver.version(library)) else None)


def why_not(on: Device, torch: Torch, told: tuple[str, Version] | None) -> ToolMissingError | None:
    """What keeps a torch from computing on a GPU, as far as it is known without trying; the hint brings one that does."""
    knows = told[1] if told else None
    if torch.cuda is None:
        return ToolMissingError(
            f"torch {torch.version} was made without CUDA, and computes nothing on {on.name}.", _bring(on, torch, knows)
        )
    made_for = f"torch {torch.version} was made for CUDA {_text(torch.cuda)}"
    if told and told[1][0] < torch.cuda[0]:  # within a major version an older driver does
        return ToolMissingError(
            f"{made_for}, and {on.name}'s driver{f' {told[0]}' if told[0] else ''} knows CUDA {_text(told[1])} at most.",
            f"update the driver, or {_bring(on, torch, knows)}",
        )
    if on.capability < LEAST_CAPABILITY.get(torch.cuda[0], (0, 0)):
        return ToolMissingError(
            f"{made_for}, which has no code for {on.name} (compute capability {_text(on.capability)}).", _bring(on, torch, knows)
        )
    return None


def doubt(on: Device) -> ToolMissingError | None:
    """The same of what is here."""
    torch = installed() if on.kind == "cuda" else None
    return why_not(on, torch, driver()) if torch else None


def settle(management: Any = None) -> str | None:
    """Of GPUs that differ, have CUDA see one alone: of those that torch computes on the one with most memory. In words, what was taken.

    None where they are alike, where CUDA_VISIBLE_DEVICES says which, or where it is too late.
    """
    loaded = sys.modules.get("torch")
    if "CUDA_VISIBLE_DEVICES" in os.environ or ranks.world_size() > 1 or (loaded and loaded.cuda.is_initialized()):
        return None
    nothing: list[tuple[str, Device]] = []
    found = nvml.ask(_told, nothing, management)
    if len({on.name for _, on in found}) < 2:
        return None
    torch, knows = installed(), driver(management)

    def worth(entry: tuple[str, Device]) -> tuple[bool, int, Version]:
        on = entry[1]
        return not (torch and why_not(on, torch, knows)), on.total_bytes, on.capability

    uuid, best = max(found, key=worth)
    os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    others = "; ".join(f"{on.name}: CUDA_VISIBLE_DEVICES={other}" for other, on in found if other != uuid)
    return f"of this machine's GPUs it takes {best.name}, which has {bytes_text(best.total_bytes)}; for another: {others}"


def _told(nvml: Any) -> list[tuple[str, Device]]:
    """(UUID, what it is) of each GPU whose memory is told."""
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [(nvml.nvmlDeviceGetUUID(card), on) for card in cards if (on := describe(nvml, card))]


def refuse(on: Device) -> None:
    """Raise ToolMissingError where torch itself finds that it computes nothing on this machine's GPU. Takes no memory there."""
    if on.kind != "cuda":
        return
    import torch

    if torch.cuda.is_available() and _has_code(torch.cuda.get_arch_list(), on.capability):
        return
    why = "see why: python -c 'import torch; torch.cuda.init()'"
    raise doubt(on) or ToolMissingError(f"torch {torch.__version__} computes nothing on {on.name}.", f"{why}; or {ON_THE_PROCESSOR}")


def _has_code(architectures: list[str], capability: Version) -> bool:
    """Code is for its own major version, from its minor version on; what is left to be compiled (PTX), for all later ones."""
    for found in re.finditer(r"(sm|compute)_(\d+)(\d)", " ".join(architectures)):
        made_for = (int(found[2]), int(found[3]))
        if made_for <= capability and (found[1] == "compute" or made_for[0] == capability[0]):
            return True
    return False


def _bring(on: Device, torch: Torch, knows: Version | None) -> str:
    for name, (cuda, least, most) in WHEELS.items():
        if least <= on.capability <= most and (not knows or cuda[0] <= knows[0]):
            return f"pip install torch=={torch.version}+{name} --index-url https://download.pytorch.org/whl/{name}; or {ON_THE_PROCESSOR}"
    return ON_THE_PROCESSOR


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"

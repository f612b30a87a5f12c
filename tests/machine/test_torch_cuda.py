"""A GPU that the installed torch does not compute on: why, what would, and that training does not begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.cli.env import look
from ftkit.machine import device, torch_cuda
from ftkit.machine.device import Device
from ftkit.machine.torch_cuda import Torch, Version, driver, installed, refuse, why_not
from ftkit.units import GIB

NEW, OLD, BARE = Torch("2.13.0", (13, 0)), Torch("2.13.0", (12, 6)), Torch("2.13.0", None)
DRIVER_580, DRIVER_550 = ("580.65", (13, 0)), ("550.54", (12, 4))
CU126, CU130 = (
    f"pip install torch==2.13.0+{name} --index-url https://download.pytorch.org/whl/{name}; or train on the processor: "
    "CUDA_VISIBLE_DEVICES=-1"
    for name in ("cu126", "cu130")
)


def card(*capability: int) -> Device:
    return Device("cuda", "RTX 3060", 12 * GIB, 11 * GIB, (capability[0], capability[1]))


AMPERE = card(8, 6)


@pytest.mark.parametrize(
    ("on", "torch", "told", "why", "hint"),
    [
        (AMPERE, BARE, DRIVER_580, "was made without CUDA, and computes nothing on RTX 3060", CU130),
        (AMPERE, BARE, DRIVER_550, "was made without CUDA", CU126),
        (AMPERE, BARE, None, "was made without CUDA", CU130),
        (AMPERE, NEW, DRIVER_550, "CUDA 13.0, and RTX 3060's driver 550.54 knows CUDA 12.4 at most", "update the driver, or " + CU126),
        (card(12, 0), NEW, DRIVER_550, "knows CUDA 12.4 at most", "update the driver, or train on the processor: CUDA_VISIBLE_DEVICES=-1"),
        (card(6, 1), NEW, DRIVER_580, "CUDA 13.0, which has no code for RTX 3060 (compute capability 6.1)", CU126),
        (card(3, 7), BARE, DRIVER_550, "was made without CUDA", "train on the processor: CUDA_VISIBLE_DEVICES=-1"),
    ],
)  # fmt: skip
def test_what_keeps_a_torch_from_computing(on: Device, torch: Torch, told: Any, why: str, hint: str) -> None:
    refused = why_not(on, torch, told)
    assert refused
    assert why in refused.message
    assert refused.hint == hint


@pytest.mark.parametrize(("torch", "told"), [(NEW, DRIVER_580), (OLD, DRIVER_580), (OLD, DRIVER_550), (NEW, None)])
def test_what_computes_is_not_doubted(torch: Torch, told: Any) -> None:
    assert why_not(AMPERE, torch, told) is None


@pytest.mark.parametrize(
    ("architectures", "capability", "has"),
    [
        (["sm_75", "sm_80", "sm_120"], (7, 5), True),
        (["sm_75", "sm_80", "sm_120"], (8, 9), True),  # by sm_80
        (["sm_75", "sm_80", "sm_120"], (6, 1), False),
        (["sm_75", "sm_86"], (8, 0), False),
        (["sm_90a"], (10, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        ([], (8, 0), False),
    ],
)
def test_code_is_for_its_own_major_version(architectures: list[str], capability: Version, has: bool) -> None:
    assert torch_cuda._has_code(architectures, capability) == has


def test_the_installed_torch_is_read_without_importing_it() -> None:
    import torch

    found = installed()
    assert found
    assert found.version == torch.__version__.partition("+")[0]
    made_for = torch.version.cuda
    assert found.cuda == (tuple(map(int, made_for.split(".")[:2])) if made_for else None)


class Nvml(ModuleType):
    class NVMLError(Exception):
        pass

    def __init__(self, cuda: int) -> None:
        super().__init__("pynvml")
        self.cuda = cuda

    def nvmlInit(self) -> None:
        if not self.cuda:
            raise self.NVMLError("NVML shared library not found")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54"


def test_the_driver_says_which_cuda_it_knows() -> None:
    assert driver(Nvml(12040)) == ("550.54", (12, 4))
    assert driver(Nvml(0), "libnone.so") is None


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card here, and a torch without CUDA, which is what Windows gets from PyPI."""
    import torch

    monkeypatch.setattr(device, "find_gpus", lambda: [AMPERE])
    monkeypatch.setattr(torch_cuda, "installed", lambda: BARE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.torch
@pytest.mark.usefixtures("unused")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_plan_tells_it_and_no_training_begins(tmp_path: Path, ftkit: Callable[..., Result], write_rows: Any, rows: list[Any]) -> None:
    model = tiny.make_model(tmp_path / "model")
    write_rows(tmp_path / "t.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\ndata: {{train: t.jsonl}}\ntraining: {{max_length: 64}}\n", encoding="utf-8")
    planned = ftkit("plan", tmp_path)
    assert planned.stdout.startswith("Fits: qlora needs ")
    assert "torch 2.13.0 was made without CUDA, and computes nothing on RTX 3060. To train there: pip install torch==" in planned.stderr
    elsewhere = ftkit("plan", tmp_path, "--gpu", "RTX 4090")
    assert "without CUDA" not in elsewhere.stderr
    refused = ftkit("train", tmp_path)
    assert refused.exit_code == 4
    assert "Error: torch 2.13.0 was made without CUDA" in refused.stderr
    assert "Hint: pip install torch==2.13.0+cu1" in refused.stderr
    assert not list((tmp_path / "runs" / "recipe").glob("*train*"))
    assert "without CUDA" in look()["devices"][0]["not_used"]


@pytest.mark.usefixtures("unused")
def test_torch_itself_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    refuse(Device("cpu", "CPU", GIB, GIB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_86"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse(AMPERE)
    monkeypatch.setattr(torch_cuda, "installed", lambda: NEW)
    monkeypatch.setattr(torch_cuda, "driver", lambda: DRIVER_580)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for a reason of its own
    with pytest.raises(torch_cuda.ToolMissingError, match="computes nothing on RTX 3060") as refused:
        refuse(AMPERE)
    assert "torch.cuda.init()" in str(refused.value.hint)

"""Choose the device to plan for: by amount, by name, by what the driver lists, else the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from ftkit.cli import main
from ftkit.cli.env import look
from ftkit.errors import RecipeError
from ftkit.machine import cuda_driver, device, torch_cuda
from ftkit.machine.cards import cards
from ftkit.machine.device import ANY_CARD, Device, asked_threads, choose, find_gpus, processor
from ftkit.units import GIB, MIB


class FakeNvml(ModuleType):
    """As much of pynvml as ftkit calls, for cards listed as (UUID, bus, name, total, reserved, free, capability), amounts in MiB."""

    NVML_DEVICE_MIG_ENABLE, nvmlMemory_v2 = 1, 0x02000028

    class NVMLError(Exception):
        pass

    def __init__(self, *cards: tuple[Any, ...], sliced: str = "", driver: bool = True) -> None:
        super().__init__("pynvml")
        self.cards, self.sliced, self.driver, self.shut = cards, sliced, driver, 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("NVML shared library not found")

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[Any, ...]:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: tuple[Any, ...]) -> str:
        return str(card[0])

    def nvmlDeviceGetPciInfo(self, card: tuple[Any, ...]) -> SimpleNamespace:
        return SimpleNamespace(busId=card[1])

    def nvmlDeviceGetName(self, card: tuple[Any, ...]) -> str:
        return str(card[2])

    def nvmlDeviceGetMemoryInfo(self, card: tuple[Any, ...], version: int) -> SimpleNamespace:
        if card[3] is None:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=card[3] * MIB, reserved=card[4] * MIB, free=card[5] * MIB)

    def nvmlDeviceGetCudaComputeCapability(self, card: tuple[Any, ...]) -> list[int]:
        return list(card[6])

    def nvmlDeviceGetMigMode(self, card: tuple[Any, ...]) -> list[int]:
        if "H100" not in card[2]:
            raise self.NVMLError("Not Supported")
        return [int(card[0] == self.sliced)] * 2


# The faster card sits on the later bus; NVML promises no order.
FAST = ("GPU-1a2b", "00000000:C1:00.0", "NVIDIA H100 80GB HBM3", 81559, 551, 81000, (9, 0))
SLOW = ("GPU-9f00", "00000000:01:00.0", "Tesla T4", 15360, 446, 14914, (7, 5))
MIXED = FakeNvml(FAST, SLOW)
BY_BUS = [
    Device("cuda", "Tesla T4", (15360 - 446) * MIB, 14914 * MIB, (7, 5)),
    Device("cuda", "NVIDIA H100 80GB HBM3", (81559 - 551) * MIB, 81000 * MIB, (9, 0)),
]


@pytest.fixture(autouse=True)
def as_ftkit_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


@pytest.mark.parametrize(("value", "threads"), [("4", 4), ("3,2", 3), ("", None), ("0", None), ("many", None)])
def test_threads_as_openmp_takes_them(monkeypatch: pytest.MonkeyPatch, value: str, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert asked_threads() == threads


def test_gpus_are_counted_by_bus_as_cuda_will_count_them() -> None:
    assert find_gpus(MIXED, "libnone.so") == BY_BUS
    assert MIXED.shut


def test_a_machine_without_a_driver_or_a_gpu_has_no_gpu() -> None:
    assert find_gpus(FakeNvml(driver=False), "libnone.so") == find_gpus(FakeNvml(), "libnone.so") == []
    assert cuda_driver.version("libnone.so") is None


UNTOLD = ("GPU-77", "00000000:0F:00.0", "NVIDIA GB10", None, None, None, (12, 1))
DRIVER = """
extern "C" {
int cuInit(unsigned) { return %(begins)d; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number + 7; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
  __builtin_strncpy(name, device == 7 ? "Tesla T4" : "NVIDIA GB10", length);
  return 0;
}
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = device == 7 ? 14914ul << 20 : 1ul << 60; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const int t4 = device == 7;
  switch (attribute) {
    case 18: *value = !t4; return 0;
    case 75: *value = t4 ? 7 : 12; return 0;
    case 76: *value = t4 ? 5 : 1; return 0;
  }
  return 1;
}
}
"""


@pytest.fixture
def driver_of(tmp_path: Path) -> Callable[[int], str]:
    """A library with as much of CUDA's driver as ftkit calls, compiled."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler here")

    def make(begins: int = 0) -> str:
        source, library = tmp_path / "driver.cpp", tmp_path / f"libcuda{begins}.so"
        source.write_text(DRIVER % {"begins": begins}, encoding="ascii")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return str(library)

    return make


def test_where_nvml_does_not_tell_cudas_driver_does(driver_of: Callable[..., str]) -> None:
    """DGX Spark and Jetson tell no memory there, and a container may lack the library: such a machine trained on its processor."""
    driver, ram = driver_of(), processor()
    for management in (FakeNvml(driver=False), FakeNvml(UNTOLD), FakeNvml(SLOW, UNTOLD)):
        plain, shared = find_gpus(management, driver)
        assert plain == Device("cuda", "Tesla T4", 14914 * MIB, 14914 * MIB, (7, 5))
        assert (shared.name, shared.total_bytes, shared.capability) == ("NVIDIA GB10", ram.total_bytes, (12, 1))
        assert 0 < shared.free_bytes <= ram.total_bytes
    assert find_gpus(MIXED, driver) == BY_BUS
    assert cuda_driver.version(driver) == (13, 1)
    assert torch_cuda.driver(FakeNvml(driver=False), driver) == ("", (13, 1))
    assert cuda_driver.gpus(driver_of(100)) == []  # CUDA_ERROR_NO_DEVICE


@pytest.mark.parametrize(
    ("system", "kind", "driver", "maker"),
    [("darwin", "arm64", False, "Apple's"), ("darwin", "x86_64", False, None), ("linux", "x86_64", True, "AMD's"),
     ("linux", "aarch64", False, None)],
)  # fmt: skip
def test_a_gpu_that_nothing_trains_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, kind: str, driver: bool, maker: str | None
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(device.platform, "machine", lambda: kind)
    if driver:
        (tmp_path / "kfd").touch()
    said = device.unused_gpu(tmp_path / "kfd")
    assert (said is None) == (maker is None)
    assert said is None or said.startswith(f"{maker} GPU is not used")


def test_env_names_a_gpu_that_nothing_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_gpus", list)
    monkeypatch.setattr(device, "unused_gpu", lambda: "AMD's GPU is not used")
    assert look()["gpus_not_told"] == "AMD's GPU is not used"
    assert "AMD's GPU is not used" in CliRunner().invoke(main, ["env"]).output


def test_a_gpu_whose_memory_nobody_tells_is_passed_over() -> None:
    assert find_gpus(FakeNvml(UNTOLD, SLOW), "libnone.so") == BY_BUS[:1]


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        ("", []), ("-1", []), ("1", [1]), ("1,0", [1, 0]), (" 1 , 0 ", [1, 0]), ("0,5", [0]), ("0,-1,1", [0]), ("0,0", []),
        ("GPU-1a2b", [1]),
        ("GPU-9,GPU-1", [0, 1]), ("GPU-", []), ("GPU-5", []), ("none", []),
    ],
)  # fmt: skip
def test_only_visible_gpus_count(monkeypatch: pytest.MonkeyPatch, visible: str, numbers: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus(MIXED, "libnone.so") == [BY_BUS[number] for number in numbers]


@pytest.mark.parametrize("order", [None, "FASTEST_FIRST"])
def test_different_gpus_that_cuda_counts_by_speed_are_refused(monkeypatch: pytest.MonkeyPatch, order: str | None) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    with pytest.raises(RecipeError, match=r"different GPUs \(NVIDIA H100 80GB HBM3, Tesla T4\)") as caught:
        find_gpus(MIXED, "libnone.so")
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in str(caught.value.hint)
    assert find_gpus(FakeNvml(SLOW, SLOW), "libnone.so") == BY_BUS[:1] * 2  # alike
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")  # named, so not counted
    assert find_gpus(MIXED, "libnone.so") == BY_BUS[1:]


def test_slices_of_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="H100 80GB HBM3 is cut into slices"):
        find_gpus(FakeNvml(FAST, sliced="GPU-1a2b"), "libnone.so")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0c1d")
    with pytest.raises(RecipeError, match="names MIG-0c1d, a slice"):
        find_gpus(MIXED, "libnone.so")


@pytest.mark.parametrize(("given", "order"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_the_command_line_lets_cuda_count_by_bus(monkeypatch: pytest.MonkeyPatch, given: str | None, order: str) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if given:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", given)
    CliRunner().invoke(main, ["status", "nowhere"])
    assert os.environ["CUDA_DEVICE_ORDER"] == order


def test_env_names_gpus_that_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setitem(sys.modules, "pynvml", MIXED)
    assert "different GPUs" in look()["gpus_not_told"]
    assert [found["name"] for found in look()["devices"]] == ["CPU"]


def test_without_a_gpu_the_cpu_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device = choose()
    assert (device.kind, device.capability) == ("cpu", (0, 0))
    assert device.total_bytes == processor().total_bytes <= psutil.virtual_memory().total
    assert 0 < device.free_bytes <= device.total_bytes


def put_group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(text + "\n", encoding="ascii")


VERSION_2, VERSION_1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def own_groups(folder: Path, text: str) -> Path:
    (folder / "cgroup").write_text(text, encoding="ascii")
    return folder / "cgroup"


def test_a_limit_of_version_2_holds_from_any_group_above(tmp_path: Path) -> None:
    own = own_groups(tmp_path, "0::/pod/box\n")
    put_group(tmp_path / "pod", VERSION_2, str(300 * MIB), 200 * MIB, f"anon 5\nactive_file 7\ninactive_file {50 * MIB}")
    put_group(tmp_path / "pod" / "box", VERSION_2, "max", 90 * MIB, "inactive_file 0")
    assert processor(tmp_path, own) == Device("cpu", "CPU", 300 * MIB, 150 * MIB)
    put_group(tmp_path / "pod" / "box", VERSION_2, str(100 * MIB), 90 * MIB, "inactive_file 0")
    assert processor(tmp_path, own) == Device("cpu", "CPU", 100 * MIB, 10 * MIB)


def test_a_limit_of_version_1_as_a_container_sees_it(tmp_path: Path) -> None:
    own = own_groups(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/0a1b\n0::/\n")  # a group that is not shown inside
    put_group(tmp_path / "memory", VERSION_1, str(200 * MIB), 150 * MIB, f"inactive_file 1\ntotal_inactive_file {20 * MIB}")
    assert processor(tmp_path, own) == Device("cpu", "CPU", 200 * MIB, 70 * MIB)


@pytest.mark.parametrize(("names", "limit", "groups"), [(VERSION_2, "max", "0::/"), (VERSION_1, "9223372036854771712", "4:memory:/")])
def test_no_limit_leaves_the_machine_its_ram(tmp_path: Path, names: tuple[str, str], limit: str, groups: str) -> None:
    put_group(tmp_path if names == VERSION_2 else tmp_path / "memory", names, limit, 5 * MIB, "inactive_file 0")
    assert processor(tmp_path, own_groups(tmp_path, groups)).total_bytes == psutil.virtual_memory().total
    assert processor(tmp_path, tmp_path / "none").total_bytes == psutil.virtual_memory().total  # no Linux


def test_an_amount_alone_or_on_a_card() -> None:
    assert choose("7.5") == Device("cuda", "a GPU with 7.5 GiB", int(7.5 * GIB), int(7.5 * GIB), ANY_CARD)
    assert choose("7.5", "H100") == Device("cuda", "H100", int(7.5 * GIB), int(7.5 * GIB), (9, 0))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx-4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"), ("NVIDIA GeForce RTX 4070", "RTX 4070"), ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA A100 80GB PCIe", "A100 80GB"), ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("RTX 3060 12GB", "RTX 3060"), ("T4 16 GB", "T4"),
    ],
)  # fmt: skip
def test_a_card_by_any_of_its_names(name: str, row: str) -> None:
    size = int(cards()[row].memory_gib * GIB)
    assert choose(gpu=name) == Device("cuda", row, size, size, cards()[row].capability)


@pytest.mark.parametrize(
    ("name", "measured_gib"), [("T4", 14.563), ("L4", 22.161), ("A10G", 22.184), ("A100 40GB", 39.494), ("A100 80GB", 79.251)]
)
def test_a_card_has_what_cuda_was_seen_to_give(name: str, measured_gib: float) -> None:
    assert 0 <= measured_gib - choose(gpu=name).total_bytes / GIB < 0.01


def test_every_row_says_where_its_memory_is_known_from() -> None:
    assert all(re.match("measured: .|nominal, less [0-9]+ %: .", card.source) for card in cards().values())


def test_a_laptop_s_card_has_less_than_the_desktop_s() -> None:
    laptops = {name: card for name, card in cards().items() if "Laptop" in name}
    assert len(laptops) >= 10
    assert choose(gpu="RTX 4070 Laptop").total_bytes < 8 * GIB < choose(gpu="RTX 4070").total_bytes


@pytest.mark.parametrize("name", cards())
def test_every_card_is_found_by_its_own_name(name: str) -> None:
    assert choose(gpu=name).name == name


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("A100", "A100 40GB, A100 80GB"),
        ("Tesla V100", "V100 16GB, V100 32GB"),
        ("RTX 3080 Laptop GPU", "RTX 3080 Laptop 8GB, RTX 3080 Laptop 16GB"),
    ],
)
def test_a_card_of_several_sizes_must_be_named_with_one(name: str, sizes: str) -> None:
    with pytest.raises(RecipeError, match="more than one amount of memory") as caught:
        choose(gpu=name)
    assert caught.value.hint == f"say which: {sizes}"


@pytest.mark.parametrize("name", ["RTX 9999", "RTX", "GeForce", "graphics", "RTX 3060 8GB", "H100 96GB"])
def test_an_unknown_card_is_told_a_few_near_ones(name: str) -> None:
    with pytest.raises(RecipeError, match="no card that ftkit knows") as caught:
        choose(gpu=name)
    assert "--vram" in str(caught.value.hint)
    assert str(caught.value.hint).count(",") <= 5


@pytest.mark.parametrize(("told", "held"), [({"rss": 900, "shared": 300}, 600), ({"rss": 900}, 500)])
def test_pages_of_files_are_not_held(monkeypatch: pytest.MonkeyPatch, told: dict[str, int], held: int) -> None:
    """Linux tells what is shared; a Mac what is the process's own."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(**told), memory_full_info=lambda: SimpleNamespace(uss=500))
    monkeypatch.setattr(device.psutil, "Process", lambda: process)
    assert device.held_bytes() == held


def test_of_cards_that_differ_the_largest_that_torch_computes_on_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By bus the card that drives the screen may come first."""
    small = ("GPU-0a", "00000000:01:00.0", "NVIDIA GeForce GT 1030", 2048, 0, 1900, (6, 1))
    old = ("GPU-0b", "00000000:02:00.0", "Tesla P40", 24576, 0, 24000, (6, 1))
    good = ("GPU-0c", "00000000:03:00.0", "NVIDIA GeForce RTX 3060", 12288, 0, 12000, (8, 6))
    monkeypatch.setattr(torch_cuda, "installed", lambda: torch_cuda.Torch("2.13.0", (13, 0)))
    monkeypatch.setattr(torch_cuda, "driver", lambda _: ("580.65", (13, 0)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert torch_cuda.settle(FakeNvml(good, good)) is None
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    said = torch_cuda.settle(FakeNvml(small, old, good))
    assert said
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0c"
    assert "takes NVIDIA GeForce RTX 3060, which has 12.00 GiB" in said
    assert "Tesla P40: CUDA_VISIBLE_DEVICES=GPU-0b" in said
    assert [on.name for on in find_gpus(FakeNvml(small, old, good), "libnone.so")] == ["NVIDIA GeForce RTX 3060"]
    assert torch_cuda.settle(FakeNvml(small, old, good)) is None  # it is said now
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert torch_cuda.settle(FakeNvml(small, good)) is None

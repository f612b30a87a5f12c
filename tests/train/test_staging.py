"""A run on a mounted drive: checkpoints are copied whole, and a drive that goes away is waited for."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from conftest import conversations

from ftkit.data.mask import tokenise
from ftkit.data.rows import Row
from ftkit.engines import hf
from ftkit.errors import InterruptedRunError, RunError
from ftkit.files import file_fingerprint
from ftkit.progress import Bar, SilentReporter
from ftkit.train import staging
from ftkit.train.checkpoints import damage
from ftkit.train.dynamics import SEEN, read_seen
from ftkit.train.metrics import METRICS, read_metrics
from ftkit.train.retry import read_retries
from ftkit.train.staging import LOOKS_EVERY_SECONDS, WAITS_SECONDS, Drive, is_remote
from ftkit.train.training import TrainResult, train

pytestmark = pytest.mark.torch


class At(SilentReporter):
    """Does something after a step, and keeps what is said."""

    def __init__(self, step: int = 0, then: Callable[[], Any] = lambda: None) -> None:
        self.step_number, self.then = step, then
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        reporter = self

        class _Bar:
            def update(self, done: float, **fields: str) -> None:
                if done == reporter.step_number:
                    reporter.then()

        yield _Bar()


@pytest.fixture(scope="module")
def trains(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainResult]:
    import torch

    torch.set_num_threads(1)
    model = tiny.make_model(tmp_path_factory.mktemp("tiny"))
    tokenizer = hf.load_tokenizer(model)
    rows = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))

    def run(folder: Path, stage: Path | None, reporter: SilentReporter, **training: Any) -> TrainResult:
        recipe = tiny.recipe(model, method="lora", max_steps=6, **training)
        return train(recipe, tiny.SETTINGS, model, tokenizer, rows[2:], rows[:2], folder, reporter, stage=stage)

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def adapter_hash(folder: Path) -> str:
    return file_fingerprint(folder / "adapter" / "adapter_model.safetensors")


def press() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_on_a_drive_goes_on_on_another_machine(trains: Callable[..., TrainResult], tmp_path: Path) -> None:
    """What is left of the first machine is the drive: with its checkpoints alone, each whole, no more than are kept."""
    here, drive, whole = tmp_path / "here", tmp_path / "drive", tmp_path / "whole"
    for folder in (here, drive, whole):
        folder.mkdir()
    trains(whole, None, At())
    with pytest.raises(InterruptedRunError):
        trains(drive, here, At(5, press))
    assert len(read_seen(drive / SEEN))
    assert names(drive / "checkpoints") == names(here / "checkpoints") == ["checkpoint-2", "checkpoint-4"]
    assert [damage(path) for path in (drive / "checkpoints").glob("checkpoint-*")] == [None, None]
    shutil.rmtree(here)
    here.mkdir()
    result = trains(drive, here, At())
    assert result.resumed_from_step == 4
    assert adapter_hash(drive) == adapter_hash(whole)
    assert (drive / SEEN).read_bytes() == (whole / SEEN).read_bytes()
    assert names(drive / "checkpoints") == ["checkpoint-4", "checkpoint-6"]
    assert not here.exists()


def test_a_drive_that_goes_away_and_comes_back_is_said_and_nothing_lost(
    trains: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, drive, away = tmp_path / "here", tmp_path / "drive", tmp_path / "away"
    here.mkdir()
    drive.mkdir()
    reporter = At(3, lambda: drive.rename(away))
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            away.rename(drive)

    monkeypatch.setattr(Drive.settle, "__defaults__", (sleep,))
    result = trains(drive, here, reporter)
    assert result.steps == 6
    assert waited == [LOOKS_EVERY_SECONDS] * 3
    [lost] = [text for text in reporter.said if "cannot be written" in text]
    assert f"the checkpoint of step 4 waits in {here / 'checkpoints'}" in lost
    assert any("the drive is back" in text for text in reporter.said)
    assert (drive / "adapter").is_dir()
    assert names(drive / "checkpoints") == ["checkpoint-4", "checkpoint-6"]


class Unplugged:
    """Has no file below a folder take another byte as long as it is `away`, those neither that are open: what a lost mount does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = False
        open_here, drive = io.open, self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if drive.away:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return super().write(data)

        def open_there(path: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any, **more: Any) -> Any:
            if mode[0] not in "aw" or isinstance(path, int) or not Path(os.fsdecode(path)).is_relative_to(folder):
                return open_here(path, mode, buffering, encoding, *rest, **more)
            file = io.BufferedWriter(File(path, mode[0]))
            return file if "b" in mode else io.TextIOWrapper(file, encoding)

        monkeypatch.setattr(io, "open", open_there)
        monkeypatch.setattr(builtins, "open", open_there)


@pytest.mark.slow
@pytest.mark.parametrize("runs_out", [False, True])
def test_a_drive_that_takes_no_byte_for_a_while_ends_nothing_and_has_all_in_the_end(
    trains: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_out: bool
) -> None:
    """What was seen of the rows, what TensorBoard reads and, where memory runs out meanwhile, with what it goes on, wait here like the
    checkpoints."""
    import torch

    here, drive, whole = tmp_path / "here", tmp_path / "drive", tmp_path / "whole"
    for folder in (here, drive, whole):
        folder.mkdir()
    trains(whole, None, At())
    mount = Unplugged(drive, monkeypatch)
    waited: list[float] = []

    def lost() -> None:
        if not mount.away:
            mount.away = True
            if runs_out:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        mount.away = len(waited) < 3

    monkeypatch.setattr(Drive.settle, "__defaults__", (sleep,))
    reporter = At(3, lost)
    result = trains(drive, here, reporter, report_to=["tensorboard"])
    assert result.steps == 6
    assert sum(b"train/loss" in events.read_bytes() for events in (drive / "tensorboard").glob("events.*")) == 1 + runs_out
    assert waited == [LOOKS_EVERY_SECONDS] * 3
    assert sum("cannot be written (Input/output error): training goes on" in text for text in reporter.said) == 1
    assert sum("the drive is back" in text for text in reporter.said) == 1
    assert sum(f"{METRICS} lacks some lines" in text for text in reporter.said) >= 1
    assert [line.step for line in read_metrics(drive) if line.loss is not None] == [1, 2]
    assert names(drive / "checkpoints") == ["checkpoint-4", "checkpoint-6"]
    if runs_out:
        assert read_retries(drive) == result.retries
        assert [retry.why for retry in result.retries] == ["out of memory"]
    else:
        assert adapter_hash(drive) == adapter_hash(whole)
        assert (drive / SEEN).read_bytes() == (whole / SEEN).read_bytes()


@pytest.mark.slow
def test_a_drive_that_stays_away_ends_with_where_the_checkpoints_are(
    trains: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, drive, away = tmp_path / "here", tmp_path / "drive", tmp_path / "away"
    here.mkdir()
    drive.mkdir()
    waited: list[float] = []
    monkeypatch.setattr(Drive.settle, "__defaults__", (waited.append,))
    with pytest.raises(RunError, match="did not come back in 10 minutes") as refused:
        trains(drive, here, At(3, lambda: drive.rename(away)))
    assert sum(waited) == WAITS_SECONDS
    assert str(here / "checkpoints") in str(refused.value.hint)
    assert not drive.exists()  # nothing was made in its place
    away.rename(drive)
    result = trains(drive, here, At())
    assert (result.resumed_from_step, result.steps) == (6, 6)
    assert (drive / "adapter").is_dir()


def test_a_copy_that_went_wrong_gets_no_name(trains: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, drive = tmp_path / "here", tmp_path / "drive"
    here.mkdir()
    drive.mkdir()
    with pytest.raises(InterruptedRunError):
        trains(here, None, At(3, press))
    copytree = shutil.copytree

    def lossy(source: Path, target: Path) -> None:
        copytree(source, target)
        (target / "optimizer.pt").write_bytes(bytes((target / "optimizer.pt").stat().st_size))

    reporter = At()
    pair = Drive(here / "checkpoints", drive / "checkpoints", reporter)
    with monkeypatch.context() as patched:
        patched.setattr(staging.shutil, "copytree", lossy)
        assert not pair.push()
    assert "optimizer.pt is not what was written" in reporter.said[0]
    assert names(drive / "checkpoints") == [".checkpoint-2.partial"]
    assert pair.push()
    assert names(drive / "checkpoints") == ["checkpoint-2"]


@pytest.mark.parametrize(("here", "there", "taken"), [(None, 4, "there"), (2, 4, "there"), (4, 4, "here"), (6, 4, "here")])
def test_what_was_seen_is_taken_from_where_the_checkpoints_go_further(here: int | None, there: int, taken: str, tmp_path: Path) -> None:
    """So that a first machine, gone back to, does not hold its older file against what another one did meanwhile."""
    for name, step in (("here", here), ("there", there)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        if step:
            (tmp_path / name / "checkpoints" / f"checkpoint-{step}").mkdir()
            (tmp_path / name / SEEN).write_text(name, encoding="utf-8")
    Drive(tmp_path / "here" / "checkpoints", tmp_path / "there" / "checkpoints", At()).fetch()
    assert (tmp_path / "here" / SEEN).read_text(encoding="utf-8") == taken


@pytest.mark.parametrize(
    ("kind", "remote"),
    [("ext4", False), ("fuse", True), ("fuse.rclone", True), ("nfs4", True), ("9p", True), ("fuseblk", False), ("cifs", True)],
)
def test_which_drives_are_mounted_from_elsewhere(kind: str, remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path.resolve()), fstype=kind)]
    monkeypatch.setattr(staging.psutil, "disk_partitions", lambda all: mounted)
    assert is_remote(tmp_path / "runs") is remote
    assert not is_remote(tmp_path.parent)

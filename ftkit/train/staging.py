"""What a run on a mounted drive goes on from: written on this machine first, then copied, checkpoints verified, and named there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ftkit.errors import RunError
from ftkit.files import cache_folder, fingerprint, make_cache_folder, sync_files, sync_folder, write_atomically
from ftkit.progress import Reporter
from ftkit.train.checkpoints import checkpoints, damage, step_of
from ftkit.train.dynamics import SEEN
from ftkit.train.reporting import TENSORBOARD
from ftkit.train.retry import RETRIES

# Of the systems that files can lie on: those of another machine, or of a program that speaks for one (Google Drive in Colab).
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "afpfs", "webdav", "davfs", "fuse", "remote")
LOCAL_FUSE = ("fuseblk", "fuse.fuseblk", "fuse.ntfs", "fuse.ntfs-3g", "fuse.exfat", "fuse-overlayfs", "fuse.fuse-overlayfs")
BESIDE = (SEEN, RETRIES)  # of the checkpoints: a resumed training reads them too
WAITS_SECONDS, LOOKS_EVERY_SECONDS = 600.0, 5.0


def is_remote(folder: Path) -> bool:
    """Whether a folder lies on a drive that is mounted from elsewhere."""
    place = folder.resolve()
    parts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    kind = max(parts, key=lambda part: len(part.mountpoint)).fstype.lower() if parts else ""
    return kind not in LOCAL_FUSE and (kind in REMOTE or kind.startswith("fuse."))


def stage_of(folder: Path) -> Path:
    """Where on this machine the checkpoints of a training in that folder, and what is beside them, are written first."""
    return make_cache_folder(cache_folder() / "staged" / fingerprint(str(folder.absolute())))


class Drive:
    """The folder of checkpoints on the drive, and what lies beside it, held like those on this machine."""

    def __init__(self, here: Path, there: Path, reporter: Reporter) -> None:
        self.here, self.there, self.reporter = here, there, reporter
        self.lost = False

    def fetch(self) -> None:
        """Copy here what only the drive has whole: what lies beside the checkpoints, where those of the drive go further."""
        last_here, last_there = (max(map(step_of, checkpoints(folder)), default=0) for folder in (self.here, self.there))
        for here, there in self._beside():
            if there.exists() and (last_there > last_here or not here.exists()):
                write_atomically(here, there.read_bytes())
        for checkpoint in checkpoints(self.there):
            if not (self.here / checkpoint.name).exists() and not damage(checkpoint):
                _copy(checkpoint, self.here / checkpoint.name)

    def push(self, *, checkpoints_too: bool = True) -> bool:
        """Copy to the drive what it lacks, and remove what is not kept here any more; whether that could be done.

        Where it cannot, that is said once, training goes on, and the next checkpoint tries again.
        """
        try:
            if not self.there.parent.is_dir():  # never made anew: what lies in its place is another disk
                raise FileNotFoundError(f"{self.there.parent} is gone")
            for here, there in [*self._beside(), *self._events()]:  # first: a checkpoint that is there must find what was seen up to it
                if here.exists():
                    there.parent.mkdir(exist_ok=True)
                    write_atomically(there, here.read_bytes())
            if not checkpoints_too:
                return True
            self.there.mkdir(exist_ok=True)
            kept = checkpoints(self.here)
            for checkpoint in kept:
                if damage(self.there / checkpoint.name, read=False):
                    _copy(checkpoint, self.there / checkpoint.name)
            for checkpoint in checkpoints(self.there):
                if checkpoint.name not in {path.name for path in kept}:
                    shutil.rmtree(checkpoint)
        except OSError as error:
            if not self.lost:
                last = max((step_of(path) for path in checkpoints(self.here)), default=0)
                self.reporter.warn(
                    f"the drive of {self.there} cannot be written ({error.strerror or error}): training goes on, and the checkpoint of "
                    f"step {last} waits in {self.here}"
                )
            self.lost = True
            return False
        if self.lost:
            self.reporter.note(f"the drive is back: {self.there} has every checkpoint")
        self.lost = False
        return True

    def _beside(self) -> list[tuple[Path, Path]]:
        return [(self.here.parent / name, self.there.parent / name) for name in BESIDE]

    def _events(self) -> list[tuple[Path, Path]]:
        """TensorBoard's, which it writes as it likes: on the drive itself a lost one would end the training."""
        files = (path for path in (self.here.parent / TENSORBOARD).glob("*") if path.is_file())
        return [(path, self.there.parent / TENSORBOARD / path.name) for path in sorted(files)]

    def settle(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Have the drive hold what is here, and wait for it where it is gone. Raises RunError in the end."""
        waited = 0.0
        while not self.push():
            if waited >= WAITS_SECONDS:
                raise RunError(
                    f"The drive of {self.there} did not come back in {WAITS_SECONDS / 60:.0f} minutes.",
                    f"nothing is lost: the checkpoints are in {self.here}; mount it again, and the same command goes on from them",
                )
            sleep(LOOKS_EVERY_SECONDS)
            waited += LOOKS_EVERY_SECONDS


def _copy(checkpoint: Path, target: Path) -> None:
    """Under another name first; it gets its own once what was written has been read back and is right."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(checkpoint, partial)
    sync_files(partial)
    if fault := damage(partial):
        raise OSError(f"a copy of {checkpoint.name} {fault}")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync_folder(target.parent)


def make_copier(drive: Drive) -> Any:
    """A callback that copies each checkpoint once it is sealed: it comes after the watcher."""
    from transformers import TrainerCallback

    class Copier(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            drive.push()

    return Copier()

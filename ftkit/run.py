"""The run directory: finished steps under their fingerprints, a manifest, and nothing half-made under a final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftkit.errors import RunError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Step:
    """A finished step: its folder and what it recorded about itself."""

    name: str
    fingerprint: str
    folder: Path
    result: dict[str, Any]
    seconds: float
    fresh: bool  # made just now, not found finished


def fingerprint(*parts: object) -> str:
    """A hash of JSON-able parts; equal inputs give equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` as a whole: a reader sees the old or the new content, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Run:
    """A directory in which each step is made once.

    `ensure` names a step by the fingerprint of its inputs, makes it in `.NAME-FINGERPRINT.partial/`, renames that to
    `NAME-FINGERPRINT/` and then records it: a step counts as finished only with both.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FileLock(folder / ".lock", timeout=0)

    def open(self) -> Run:
        """Create the directory where it is missing. Raises RunError where it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except Timeout:
            raise RunError(f"Another ftkit works in {self.folder}.", "wait for it, or choose another --run-dir") from None
        except OSError as error:
            raise RunError(f"Cannot write to {self.folder}: {error.strerror or error}.", "choose another folder with --run-dir") from None
        return self

    def close(self) -> None:
        self.lock.release()

    def __enter__(self) -> Run:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def manifest(self) -> dict[str, Any]:
        """What was recorded; empty for a new run. Raises RunError where it is unreadable."""
        path = self.folder / MANIFEST
        if not path.exists():
            return {"steps": {}}
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for entry in loaded["steps"].values():
                entry["fingerprint"], entry["result"], entry["seconds"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError(
                f"{path} is damaged.", f"delete it: finished steps are made again, your data is untouched (rm '{path}')"
            ) from None
        return loaded

    def record(self, **entries: Any) -> None:
        """Merge entries into the manifest."""
        manifest = self.manifest()
        manifest.update(entries)
        write_atomically(self.folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())

    def finished(self, name: str, mark: str | None = None) -> Step | None:
        """The step as recorded, if its folder is still there.

        With a mark the one with this fingerprint, be it an earlier one that was kept. Without one the last, if the steps
        that it was made after are still the last of theirs: else it is out of date.
        """
        entry = self._entry(name, mark)
        if not entry:
            return None
        folder = self.folder / f"{name}-{entry['fingerprint']}"
        if not folder.is_dir():
            return None
        if not mark:
            for before, expected in entry.get("after", {}).items():
                found = self.finished(before)
                if not found or found.fingerprint != expected:
                    return None
        return Step(name, entry["fingerprint"], folder, entry["result"], entry["seconds"], fresh=False)

    def ensure(
        self, name: str, inputs: object, make: Callable[[Path], dict[str, Any]], *,
        after: Sequence[Step] = (), resumable: bool = False, keep: bool = False,
    ) -> Step:  # fmt: skip
        """The finished step `name` for these inputs, made by `make(folder)` if it is not there.

        A partial folder that a killed run left is thrown away, unless the step is `resumable`: then `make` finds it
        as it was. Folders of the same step with other inputs are removed once the new one is recorded, unless `keep` says
        that they took too long to make: then they stay, and are found again. `after` are the steps that it follows from.
        Raises RunError where the disk is full or cannot be written.
        """
        mark = fingerprint(name, inputs)
        found, entry = self.finished(name, mark), self._entry(name, mark)
        if found and entry:
            self._make_last(name, entry, keep=keep)
            return found
        final = self.folder / f"{name}-{mark}"
        partial = self.folder / f".{name}-{mark}.partial"
        if partial.exists() and not resumable:
            shutil.rmtree(partial)
        if final.exists():  # renamed, but killed before it was recorded: never trusted
            shutil.rmtree(final)
        partial.mkdir(exist_ok=True)
        started = time.monotonic()
        try:
            result = make(partial)
        except BaseException as error:
            if not resumable:
                shutil.rmtree(partial)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise RunError(
                    f"`{name}` cannot write to {self.folder}: {error.strerror}.", "free some space, or put the run elsewhere with --run-dir"
                ) from None
            raise
        partial.rename(final)
        step = Step(name, mark, final, result, time.monotonic() - started, fresh=True)
        entry = {
            "fingerprint": mark,
            "seconds": round(step.seconds, 3),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "after": {before.name: before.fingerprint for before in after},
            "result": result,
        }
        self._make_last(name, entry, keep=keep)
        for other in self.folder.iterdir() if not keep else ():
            if re.fullmatch(rf"{name}-[0-9a-f]{{16}}|\.{name}-[0-9a-f]{{16}}\.partial", other.name) and other != final and other.is_dir():
                shutil.rmtree(other)
        return step

    def _entry(self, name: str, mark: str | None) -> dict[str, Any] | None:
        """What the manifest says of a step: of the last, or of the one with this fingerprint."""
        manifest = self.manifest()
        last: dict[str, Any] | None = manifest["steps"].get(name)
        if mark and (not last or last["fingerprint"] != mark):
            kept: dict[str, Any] | None = manifest.get("kept", {}).get(name, {}).get(mark)
            return kept
        return last

    def _make_last(self, name: str, entry: dict[str, Any], *, keep: bool) -> None:
        """Record this as the last step of its name; an earlier one that is kept stays on record."""
        manifest = self.manifest()
        steps, kept = manifest["steps"], manifest.get("kept", {})
        before = steps.get(name)
        if before == entry:
            return
        if keep and before and before["fingerprint"] != entry["fingerprint"]:
            kept.setdefault(name, {})[before["fingerprint"]] = before
        kept.get(name, {}).pop(entry["fingerprint"], None)
        steps[name] = entry
        self.record(steps=steps, **({"kept": kept} if kept else {}))

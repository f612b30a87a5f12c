"""The run directory: finished steps under their fingerprints, an index of them, and nothing half-made under a final name."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ftkit.errors import FtkitError, RunError, ToolFailedError
from ftkit.files import disk_fault, fingerprint, size_bytes, sync_files, sync_folder, write_atomically
from ftkit.progress import SILENT, Reporter
from ftkit.units import bytes_text

MANIFEST = "manifest.json"
RECORD = "step.json"  # what a finished step says of itself, in its own folder
CHECKPOINTS = "checkpoints"  # in the folder of a resumable step: what it goes on from, `checkpoint-N` after N of its own steps
TRAINED_WITH = "trained_with"  # in the manifest; so the next
AT_HUB = "at_hub"
FINISHED = re.compile(r"([a-z]+)-([0-9a-f]{16})")
BEGUN = re.compile(r"\.([a-z]+)-([0-9a-f]{16})\.partial")
# beside the steps: what was written when ftkit was killed, and answers that failed a proof
LEFT_BEHIND = re.compile(r"\.probe-[a-z0-9_]{8}|\.(manifest|failed-proof)\.json\.\d+\.partial")
TRAININGS = ("train", "adopt")
FAILED = re.compile(r"failed-proof\.json")
# What a step is made with, beside llama.cpp's programs: the versions stand in its record.
MADE_WITH = ("ftkit", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "gguf", "xllamacpp")
Entry = dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """A finished step: its folder and what it recorded about itself."""

    name: str
    fingerprint: str
    folder: Path
    result: dict[str, Any]
    seconds: float
    fresh: bool  # made just now, not found finished


@dataclass(frozen=True)
class Held:
    """A folder or file of ftkit's own in a run."""

    path: Path
    what: str  # for a person
    last_step: int | None  # of what is begun: that of its last checkpoint
    size_bytes: int
    needed: bool  # by the steps that are up to date or begun; what is not, can go


class Run:
    """A directory in which each step is made once.

    `ensure` names a step by the fingerprint of its inputs, makes it in `.NAME-FINGERPRINT.partial/`, writes its record into
    that folder and renames it to `NAME-FINGERPRINT/`. The rename alone finishes a step. The manifest is an index: which step
    is the last of its name, which was begun, and what Ollama has. What is missing in it is taken from the folders.
    """

    def __init__(self, folder: Path, reporter: Reporter = SILENT) -> None:
        self.folder = folder.absolute()  # it is kept in the trainer's files
        self.reporter = reporter
        self.lock = FileLock(self.folder / ".lock", timeout=0)
        self._told: set[str] = set()
        self._made: set[str] = set()  # fingerprints of steps that were renamed here, and are about to be put into the index

    def open(self) -> Run:
        """Create the directory where it is missing. Raises RunError where it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except Timeout:
            hint = "wait for it, or choose another --run-dir"
            if isinstance(self.lock, SoftFileLock):  # what a FileLock becomes on a drive that has no locks: the file itself is the lock
                hint += f"; if a session that was lost left its lock there, remove it: {self.lock.lock_file}"
            raise RunError(f"Another ftkit works in {self.folder}.", hint) from None
        except OSError as error:
            raise RunError(f"Cannot write to {self.folder}: {error.strerror or error}.", "choose another folder with --run-dir") from None
        for partial, name, mark in list(self._folders(BEGUN)):
            final = self.folder / f"{name}-{mark}"
            if _record(partial, name, mark) and not final.exists():  # all of it was there when ftkit was stopped
                partial.rename(final)
        return self

    def close(self) -> None:
        self.lock.release()

    def is_busy(self) -> bool:
        """Whether an ftkit works in it, be it this one."""
        if self.lock.is_locked or not self.folder.is_dir():
            return self.lock.is_locked
        try:
            with self.lock:
                return False
        except (Timeout, OSError):
            return True

    def __enter__(self) -> Run:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def manifest(self) -> dict[str, Any]:
        """The index; empty for a new run. What it lacks is taken from the folders, and said. Raises RunError where it cannot be read."""
        path = self.folder / MANIFEST
        index: dict[str, Any] = {"steps": {}}
        damaged = False
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            damaged = not _is_index(index)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RunError(f"Cannot read {path}: {error.strerror or error}.", "choose another folder with --run-dir") from None
        except (ValueError, RecursionError):
            damaged = True
        if damaged:
            index = {"steps": {}}
        steps, kept = index["steps"], index.get("kept", {})
        found = []
        for folder, name, mark in self._folders(FINISHED):
            listed = mark in kept.get(name, {}) or steps.get(name, {}).get("fingerprint") == mark
            record = None if listed else _record(folder, name, mark)
            if record:
                found.append(record)
        for record in sorted(found, key=_finished_at):
            last = steps.get(record["name"])
            if last and _finished_at(last) > _finished_at(record):
                kept.setdefault(record["name"], {})[record["fingerprint"]] = record
            else:
                _put_last(steps, kept, record, keep=True)
        if damaged:
            self._tell(f"{path} is damaged: the steps' own records are read instead; what Ollama has of this run is not known any more")
        elif lost := [record for record in found if record["fingerprint"] not in self._made]:
            names = ", ".join(f"{record['name']}-{record['fingerprint']}" for record in lost)
            self._tell(f"{path} does not name all finished steps: {names} taken from the folders")
        return {**index, "steps": steps, **({"kept": kept} if kept else {})}

    def trained_with(self) -> list[tuple[str, Any]]:
        """What `--set` and its like changed in the recipe for the training that was asked for last."""
        return [(key, value) for key, value in self.manifest().get(TRAINED_WITH, ())]

    def at_hub(self) -> dict[str, str]:
        """The commit of each repository that a training which is here was begun with, by how its recipe named it."""
        has_training = any(name in TRAININGS for pattern in (FINISHED, BEGUN) for _, name, _ in self._folders(pattern))
        return dict(self.manifest().get(AT_HUB, {})) if has_training else {}

    def record(self, **entries: Any) -> None:
        """Merge entries into the index."""
        self._write({**self.manifest(), **entries})

    def _write(self, manifest: dict[str, Any]) -> None:
        write_atomically(self.folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())

    def finished(self, name: str, mark: str | None = None) -> Finished | None:
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
        return Finished(name, entry["fingerprint"], folder, entry["result"], entry["seconds"], fresh=False)

    def ensure(
        self,
        name: str,
        inputs: object,
        make: Callable[[Path], dict[str, Any]],
        *,
        after: Mapping[str, str] | None = None,
        resumable: bool = False,
        keep: bool = False,
    ) -> Finished:
        """The finished step `name` for these inputs, made by `make(folder)` if it is not there.

        A partial folder that a killed run left is thrown away, unless the step is `resumable`: then `make` finds it
        as it was, and its CHECKPOINTS stay until nothing is left that can fail. Folders of the same step with other inputs are
        removed once the new one is recorded, unless `keep` says that they took too long to make: then they stay, and are
        found again. `after` are the steps that it follows from, name → fingerprint.
        Raises RunError where the disk is full or cannot be written.
        """
        mark = fingerprint(name, inputs)
        final = self.folder / f"{name}-{mark}"
        step = self.finished(name, mark)
        if not step:
            step = self._make(name, mark, final, make, after or {}, resumable=resumable)
        entry = self._entry(name, mark)
        assert entry
        self._make_last(entry, keep=keep)
        if resumable:
            shutil.rmtree(final / CHECKPOINTS, ignore_errors=True)
        for pattern in () if keep else (FINISHED, BEGUN):
            for other, of, _ in list(self._folders(pattern)):
                if of == name and other != final:
                    discard(other)
        return step

    def partial(self, name: str, mark: str) -> Path:
        """The folder in which a step is made, be it there or not."""
        return self.folder / f".{name}-{mark}.partial"

    def holds(self, names: Sequence[str]) -> list[Held]:
        """What lies here of the steps of these names, and beside them. What has no name of ftkit's own is left out.

        Of what is begun, the last of its name is needed, unless the step was finished since.
        """
        found = []
        manifest = self.manifest()
        begun = manifest.get("begun", {})
        for folder, name, mark in self._folders(FINISHED):
            if name in names:
                step, last = self.finished(name, mark), self.finished(name)
                needed = bool(step and last and last.fingerprint == mark)
                if needed:
                    what = "finished"
                elif not step:
                    what = "not finished, and not to be gone on with"
                else:
                    what = "out of date" if manifest["steps"][name]["fingerprint"] == mark else "finished, with other settings"
                found.append(Held(folder, what, None, size_bytes(folder), needed))
        for folder, name, mark in self._folders(BEGUN):
            if name in names:
                others = [other for other, of, _ in self._folders(BEGUN) if of == name]
                newest = max(others, key=lambda other: other.stat().st_mtime)
                needed = begun[name] == mark if name in begun else name not in manifest["steps"] and folder == newest
                steps = [int(path.name[11:]) for path in (folder / CHECKPOINTS).glob("checkpoint-*") if path.name[11:].isdecimal()]
                what = "begun" if needed else "begun, with other settings"
                found.append(Held(folder, what, max(steps, default=None), size_bytes(folder), needed))
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if LEFT_BEHIND.fullmatch(path.name):
                found.append(Held(path, "left behind by a killed ftkit", None, size_bytes(path), needed=False))
            elif FAILED.fullmatch(path.name):
                found.append(Held(path, "failed proof", None, size_bytes(path), needed=True))
        return found

    def remove(self, held: Held) -> None:
        """Remove one of `holds`, and its entry in the index. Raises RunError where the disk refuses."""
        try:
            if match := FINISHED.fullmatch(held.path.name) or BEGUN.fullmatch(held.path.name):
                name, mark = match[1], match[2]
                manifest = self.manifest()
                manifest.get("kept", {}).get(name, {}).pop(mark, None)
                if manifest["steps"].get(name, {}).get("fingerprint") == mark:
                    del manifest["steps"][name]
                self._write(manifest)
            if held.path.is_dir():
                discard(held.path)
            else:
                held.path.unlink()
        except OSError as error:
            raise RunError(f"Cannot remove {held.path}: {error.strerror or error}.") from None

    def _make(
        self, name: str, mark: str, final: Path, make: Callable[[Path], dict[str, Any]], after: Mapping[str, str], *, resumable: bool
    ) -> Finished:
        partial = self.partial(name, mark)
        if partial.exists() and not resumable:
            shutil.rmtree(partial)
        if final.exists():  # without a record: never trusted
            shutil.rmtree(final)
        started = time.monotonic()
        try:
            try:
                partial.mkdir(exist_ok=True)
                self.record(begun={**self.manifest().get("begun", {}), name: mark})
            except PermissionError as error:
                raise RunError(f"Cannot write to {self.folder}: {error.strerror}.", "choose another folder with --run-dir") from None
            result = make(partial)
            step = Finished(name, mark, final, result, time.monotonic() - started, fresh=True)
            record = {
                "name": name,
                "fingerprint": mark,
                "seconds": round(step.seconds, 3),
                "finished_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "after": dict(after),
                "made_with": _versions(),
                "result": result,
            }
            sync_files(partial)
            write_atomically(partial / RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        except BaseException as error:
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                partial.rmdir()  # nothing was made
            said = isinstance(error, FtkitError) and not isinstance(error, ToolFailedError)
            fault = None if said else disk_fault(error)
            if fault:
                raise RunError(f"`{name}` cannot write to {self.folder}: {fault}.", self._how_to_free_space(resumable)) from error
            raise
        self._made.add(mark)
        partial.rename(final)
        sync_folder(self.folder)
        return step

    def _how_to_free_space(self, resumable: bool) -> str:
        names = [name for pattern in (FINISHED, BEGUN) for _, name, _ in self._folders(pattern)]
        can_go = sum(held.size_bytes for held in self.holds(names) if not held.needed)
        here = f" (ftkit clean: {bytes_text(can_go)} of this run are not needed)" if can_go else ""
        elsewhere = (
            "move the run's folder to a larger disk and name it with --run-dir" if resumable else "put the run elsewhere with --run-dir"
        )
        return f"free some space{here}, or {elsewhere}" + ("; the same command goes on from the last checkpoint" if resumable else "")

    def _entry(self, name: str, mark: str | None) -> Entry | None:
        """What is recorded of a step: of the last, or of the one with this fingerprint."""
        manifest = self.manifest()
        last: Entry | None = manifest["steps"].get(name)
        if mark and (not last or last["fingerprint"] != mark):
            last = manifest.get("kept", {}).get(name, {}).get(mark)
        if not last:
            return None
        return _record(self.folder / f"{name}-{last['fingerprint']}", name, last["fingerprint"]) or {**last, "name": name}

    def _make_last(self, entry: Entry, *, keep: bool) -> None:
        """Have the index name this as the last step of its name; an earlier one that is kept stays in it."""
        manifest = self.manifest()
        before = json.dumps(manifest)
        _put_last(manifest["steps"], manifest.setdefault("kept", {}), entry, keep=keep)
        manifest.get("begun", {}).pop(entry["name"], None)
        for group in ("kept", "begun"):
            if not manifest.get(group, True):
                del manifest[group]
        if json.dumps(manifest) != before or not (self.folder / MANIFEST).exists():
            self._write(manifest)

    def _folders(self, pattern: re.Pattern[str]) -> Iterator[tuple[Path, str, str]]:
        """Folders of steps, each with the step's name and fingerprint."""
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if (match := pattern.fullmatch(folder.name)) and folder.is_dir():
                yield folder, match[1], match[2]

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.reporter.note(text)


def discard(folder: Path) -> None:
    """Remove a step's folder. Its record goes first: what is left of it, should ftkit be killed, is no finished step."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _record(folder: Path, name: str, mark: str) -> Entry | None:
    """What a finished step's folder says of itself. None where it says nothing, or is another's: runs of ftkit before 0.2 did not."""
    try:
        record: Entry = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if _is_entry(record) and (record["name"], record["fingerprint"]) == (name, mark) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _versions() -> dict[str, str]:
    """Of each of MADE_WITH that is installed."""
    found = {}
    for name in MADE_WITH:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("fingerprint"), str)
        and isinstance(entry.get("result"), dict)
        and isinstance(entry.get("seconds"), (int, float))
        and isinstance(entry.get("after", {}), dict)
    )


def _is_index(index: Any) -> bool:
    if not isinstance(index, dict) or not all(isinstance(index.get(key, {}), dict) for key in ("kept", "begun", "ollama", AT_HUB)):
        return False
    groups = [index.get("steps"), *index.get("kept", {}).values()]
    return all(isinstance(group, dict) and all(_is_entry(entry) for entry in group.values()) for group in groups)


def _finished_at(entry: Entry) -> datetime:
    try:
        return datetime.fromisoformat(entry["finished_at"]).astimezone(UTC)
    except (KeyError, ValueError, TypeError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


def _put_last(steps: dict[str, Entry], kept: dict[str, dict[str, Entry]], entry: Entry, *, keep: bool) -> None:
    """Make this the last step of its name; the one that was, stays in `kept` if it is to be found again."""
    name, mark = entry["name"], entry["fingerprint"]
    before = steps.get(name)
    if keep and before and before["fingerprint"] != mark:
        kept.setdefault(name, {})[before["fingerprint"]] = before
    kept.get(name, {}).pop(mark, None)
    if name in kept and not kept[name]:
        del kept[name]
    steps[name] = entry

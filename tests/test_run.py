"""A run directory: each step made once, a killed one never trusted, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftkit.errors import RunError, ToolFailedError
from ftkit.files import disk_fault, file_fingerprint, fingerprint, write_atomically
from ftkit.progress import SilentReporter
from ftkit.run import MANIFEST, RECORD, Finished, Run

Make = Callable[[Path], dict[str, Any]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, ".lock"))


def writes(text: str) -> Make:
    """A step that writes one file."""

    def make(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text(text, encoding="utf-8")
        return {"text": text}

    return make


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("made again")


def test_a_step_is_made_once(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        first = run.ensure("plan", [1, {"a": 2}], writes("x"))
        again = run.ensure("plan", [1, {"a": 2}], never)
    assert (first.fresh, again.fresh) == (True, False)
    assert again.result == {"text": "x"}
    assert again.folder == first.folder == tmp_path / f"plan-{first.fingerprint}"
    assert (first.folder / "file").read_text(encoding="utf-8") == "x"


def test_another_process_finds_the_step(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        made = run.ensure("plan", 1, writes("x"))
    found = Run(tmp_path).finished("plan")
    assert found
    assert (found.fingerprint, found.folder, found.result, found.fresh) == (made.fingerprint, made.folder, {"text": "x"}, False)
    assert found.seconds == pytest.approx(made.seconds, abs=1e-3)


def test_other_inputs_replace_the_step_and_leave_other_steps(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        plan = run.ensure("plan", 1, writes("x"))
        old = run.ensure("train", 1, writes("old"))
        new = run.ensure("train", 2, writes("new"))
    assert old.fingerprint != new.fingerprint
    assert names(tmp_path) == sorted([plan.folder.name, new.folder.name])
    assert Run(tmp_path).finished("train", old.fingerprint) is None


def test_folders_of_the_users_own_stay(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("plan-notes", "plan-of-the-house", ".plan-b.partial", "plan-0123456789abcdef0")]
    for folder in mine:
        folder.mkdir()
        (folder / "precious.txt").write_text("x", encoding="utf-8")
    with Run(tmp_path) as run:
        run.ensure("plan", 1, lambda folder: {})
        run.ensure("plan", 2, lambda folder: {})
    assert all((folder / "precious.txt").exists() for folder in mine)


def test_what_took_long_is_kept_and_found_again(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        first = run.ensure("train", 1, lambda folder: {"n": 1}, keep=True)
        second = run.ensure("train", 2, lambda folder: {"n": 2}, keep=True)
        assert run.finished("train") == replace(second, fresh=False, seconds=round(second.seconds, 3))
        again = run.ensure("train", 1, lambda folder: {"n": 3}, keep=True)
        assert (again.fresh, again.result, again.folder) == (False, {"n": 1}, first.folder)
        last = run.finished("train")
        assert last
        assert last.fingerprint == first.fingerprint
        assert run.finished("train", second.fingerprint)


def test_what_follows_from_a_step_is_out_of_date_after_another(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        one = run.ensure("train", 1, lambda folder: {}, keep=True)
        merged = run.ensure("merge", [one.fingerprint], lambda folder: {}, after={"train": one.fingerprint})
        run.ensure("gguf", [merged.fingerprint], lambda folder: {}, after={"merge": merged.fingerprint})
        assert run.finished("gguf")
        run.ensure("train", 2, lambda folder: {}, keep=True)
        assert (run.finished("merge"), run.finished("gguf")) == (None, None)
        assert run.finished("merge", merged.fingerprint)
        run.ensure("train", 1, lambda folder: {}, keep=True)
        assert run.finished("gguf")


def test_a_full_disk_is_told_with_the_step(tmp_path: Path) -> None:
    def make(folder: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Run(tmp_path) as run, pytest.raises(RunError, match=r"`merge` cannot write to .*No space left") as refused:
        run.ensure("merge", 1, make)
    assert "--run-dir" in str(refused.value.hint)


def test_a_step_whose_folder_was_deleted_is_made_again(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        step = run.ensure("plan", 1, writes("x"))
        shutil.rmtree(step.folder)
        assert run.finished("plan") is None
        assert run.ensure("plan", 1, writes("y")).fresh
        again = run.finished("plan")
        assert again
        assert again.result == {"text": "y"}


def test_a_folder_that_was_never_recorded_is_not_trusted(tmp_path: Path) -> None:
    final = tmp_path / f"plan-{fingerprint('plan', 1)}"
    final.mkdir()
    (final / "stray").touch()
    with Run(tmp_path) as run:
        assert run.ensure("plan", 1, writes("x")).fresh
    assert sorted(path.name for path in final.iterdir()) == ["file", RECORD]


def kill_in_step(folder: Path) -> None:
    """Begin a step in another process that dies in the middle of it, as if killed."""
    code = (
        "import os, sys, pathlib; from ftkit.run import Run\n"
        "def make(folder): (folder / 'half').touch(); os._exit(9)\n"
        "Run(pathlib.Path(sys.argv[1])).open().ensure('train', 1, make, resumable=True)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder]).returncode == 9


@pytest.mark.parametrize("resumable", [False, True])
def test_a_killed_step_is_thrown_away_or_taken_up_again(tmp_path: Path, resumable: bool) -> None:
    kill_in_step(tmp_path)
    assert Run(tmp_path).finished("train") is None

    def make(folder: Path) -> dict[str, Any]:
        return {"found": [path.name for path in folder.iterdir()]}

    with Run(tmp_path) as run:  # the dead process holds the lock no more
        step = run.ensure("train", 1, make, resumable=resumable)
    assert step.result == {"found": ["half"] if resumable else []}
    assert names(tmp_path) == [step.folder.name]


@pytest.mark.skipif(sys.platform == "win32", reason="locks files otherwise")
@pytest.mark.filterwarnings("ignore:flock not supported:UserWarning")
def test_on_a_drive_without_locks_what_a_lost_machine_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    lock = tmp_path / ".lock"
    with Run(tmp_path):
        held = lock.read_text(encoding="utf-8")
    lock.write_text(held.replace(socket.gethostname(), "another machine"), encoding="utf-8")
    with pytest.raises(RunError, match="Another ftkit works in") as refused:
        Run(tmp_path).open()
    assert str(refused.value.hint).endswith(f"remove it: {lock}")
    lock.unlink()
    Run(tmp_path).open().close()


def test_partial_folders_of_other_inputs_go_once_the_step_is_done(tmp_path: Path) -> None:
    kill_in_step(tmp_path)
    with Run(tmp_path) as run:
        step = run.ensure("train", 2, writes("x"), resumable=True)
    assert names(tmp_path) == [step.folder.name]


def fails(folder: Path) -> dict[str, Any]:
    (folder / "half").touch()
    raise RunError("no luck")


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with Run(tmp_path) as run, pytest.raises(RunError, match="no luck"):
        run.ensure("plan", 1, fails)
    assert names(tmp_path) == []


def test_a_resumable_step_that_fails_keeps_what_it_has(tmp_path: Path) -> None:
    with Run(tmp_path) as run, pytest.raises(RunError, match="no luck"):
        run.ensure("train", 1, fails, resumable=True)
    assert [path.name for path in tmp_path.glob(".train-*.partial/*")] == ["half"]
    assert Run(tmp_path).finished("train") is None


def test_a_failed_step_leaves_the_one_before_it(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        good = run.ensure("plan", 1, writes("x"))
        with pytest.raises(RunError, match="no luck"):
            run.ensure("plan", 2, fails)
        assert run.finished("plan", good.fingerprint)


def test_only_one_ftkit_works_in_a_run(tmp_path: Path) -> None:
    with Run(tmp_path):
        with pytest.raises(RunError, match="Another ftkit") as caught, Run(tmp_path):
            pass
        assert "--run-dir" in str(caught.value.hint)
    with Run(tmp_path):  # free again
        pass


def test_a_run_under_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="Cannot write"), Run(tmp_path / "file" / "run"):
        pass


def test_record_keeps_the_rest(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.ensure("plan", 1, writes("x"))
        run.record(ollama={"name": "größe"})
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["ollama"] == {"name": "größe"}
    assert list(manifest["steps"]) == ["plan"]


class Notes(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_a_step_that_goes_well_is_no_news(tmp_path: Path) -> None:
    notes = Notes()
    with Run(tmp_path, notes) as run:
        for number in (1, 2, 1):
            run.ensure("train", number, writes("x"), resumable=True, keep=True)
            run.ensure("plan", number, writes("x"))
    assert notes.said == []


def two_trainings(folder: Path) -> tuple[Finished, Finished, Finished]:
    """A run with an earlier training, the last one and what was merged of it."""
    with Run(folder) as run:
        earlier = run.ensure("train", 1, writes("1"), keep=True)
        last = run.ensure("train", 2, writes("2"), keep=True)
        merged = run.ensure("merge", [last.fingerprint], writes("merged"), after={"train": last.fingerprint})
    return earlier, last, merged


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "null", "{}", '{"steps": []}', '{"steps": {"plan": 3}}', '{"steps": {"plan": {"fingerprint": "a"}}}',
     '{"steps": {}, "kept": []}', '{"steps": {}}', "[" * 100_000],
)  # fmt: skip
def test_a_missing_or_damaged_manifest_is_made_again_from_the_folders(tmp_path: Path, text: str | None) -> None:
    earlier, last, merged = two_trainings(tmp_path)
    wanted = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST).unlink()
    if text is not None:
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    notes = Notes()
    run = Run(tmp_path, notes)
    for name, step in (("train", last), ("merge", merged)):
        found = run.finished(name)
        assert found
        assert (found.fingerprint, found.result) == (step.fingerprint, step.result)
    assert run.finished("train", earlier.fingerprint)
    assert len(notes.said) == 1
    assert str(tmp_path / MANIFEST) in notes.said[0]
    with run:
        assert not run.ensure("train", 2, never, keep=True).fresh
        assert not run.ensure("train", 1, never, keep=True).fresh
        run.ensure("train", 2, never, keep=True)
    assert json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8")) == wanted


def test_a_manifest_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(RunError, match="Cannot read") as refused:
        Run(tmp_path).finished("plan")
    assert "--run-dir" in str(refused.value.hint)


def test_steps_of_an_older_ftkit_count_by_the_manifest_alone(tmp_path: Path) -> None:
    steps = two_trainings(tmp_path)
    for step in steps:
        (step.folder / RECORD).unlink()
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    for entry in (manifest["steps"]["train"], manifest["steps"]["merge"], *manifest["kept"]["train"].values()):
        del entry["name"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert Run(tmp_path).finished("merge")
    with Run(tmp_path) as run:
        assert [run.ensure("train", n, never, keep=True).result for n in (2, 1)] == [{"text": "2"}, {"text": "1"}]
        assert run.finished("merge") is None
        assert not run.ensure("train", 2, never, keep=True).fresh
        assert run.finished("merge")


def test_a_record_of_another_step_is_not_trusted(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        step = run.ensure("plan", 1, writes("x"))
    (tmp_path / MANIFEST).unlink()
    step.folder.rename(tmp_path / "plan-0123456789abcdef")
    assert Run(tmp_path).finished("plan") is None


KILLED = """
import os, sys
from pathlib import Path
from ftkit import run as room
point, folder = sys.argv[1:]
def die(*_, **__): os.kill(os.getpid(), 9)
def make(partial):
    (partial / "checkpoints").mkdir()
    (partial / "weights").write_bytes(b"learnt")
    if point == "before the record": room.write_atomically = die
    return {"steps": 4}
if point == "before the rename":
    write = room.write_atomically
    room.write_atomically = lambda path, content: (write(path, content), path.name == room.RECORD and die())
if point == "after the rename": room.Run._make_last = die
if point == "in the index": room._put_last = die
if point == "before the checkpoints go": room.shutil.rmtree = die
room.Run(Path(folder)).open().ensure("train", 1, make, resumable=True, keep=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    "point", ["before the record", "before the rename", "after the rename", "in the index", "before the checkpoints go"]
)
def test_a_step_that_was_made_is_not_lost_wherever_ftkit_is_killed(tmp_path: Path, point: str) -> None:
    """Checkpoints stay until the step counts as finished; from then on nothing is made again."""
    assert subprocess.run([sys.executable, "-c", KILLED, point, tmp_path]).returncode == -9
    assert list(tmp_path.rglob("checkpoints"))

    def make(folder: Path) -> dict[str, Any]:
        assert point == "before the record"
        assert (folder / "checkpoints").is_dir()
        return {"steps": 4}

    with Run(tmp_path) as run:
        step = run.ensure("train", 1, make, resumable=True, keep=True)
    assert step.fresh == (point == "before the record")
    assert step.result == {"steps": 4}
    assert (step.folder / "weights").read_bytes() == b"learnt"
    assert names(tmp_path) == [step.folder.name]
    assert not list(tmp_path.rglob("checkpoints"))
    assert Run(tmp_path).finished("train") == replace(step, fresh=False, seconds=round(step.seconds, 3))


def test_a_step_half_removed_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run(tmp_path) as run:
        old = run.ensure("plan", 1, writes("x"))
        monkeypatch.setattr(shutil, "rmtree", lambda folder: (folder / "file").unlink())  # killed in the middle of it
        run.ensure("plan", 2, writes("y"))
    assert old.folder.exists()
    (tmp_path / MANIFEST).unlink()
    assert Run(tmp_path).finished("plan", old.fingerprint) is None


@pytest.mark.torch
@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_disk_that_is_full_for_torch_and_safetensors(tmp_path: Path, writer: str, small_files: Any) -> None:
    import torch
    from safetensors.torch import save_file

    def make(folder: Path) -> dict[str, Any]:
        (folder / "earlier").write_bytes(b"kept")
        tensors = {"a": torch.zeros(1_000_000)}
        with small_files(1_000_000):
            torch.save(tensors, folder / "file") if writer == "torch" else save_file(tensors, folder / "file")
        return {}

    with Run(tmp_path) as run, pytest.raises(RunError, match=r"`train` cannot write to .*") as refused:
        run.ensure("train", 1, make, resumable=True)
    assert "--run-dir" in str(refused.value.hint)
    assert (next(tmp_path.glob(".train-*.partial")) / "earlier").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (ToolFailedError("convert_hf_to_gguf.py failed with exit code 1:\n  OSError: [Errno 28] No space left on device"), True),
        (ToolFailedError("python failed with exit code 1:\n  OSError: 24576 requested and 20448 written\n\n  Writing: 15%"), True),
        (ToolFailedError("llama-quantize failed with exit code 1:\n  failed to quantize: basic_ios::clear: iostream error"), True),
        (ToolFailedError("llama-quantize failed with exit code -25:\n  [ 1/ 9] token_embd.weight"), True),
        (ToolFailedError("llama-quantize failed with exit code 1:\n  invalid ftype"), False),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("I/O error: No such file or directory (os error 2)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_come_from_the_disk(error: Exception, full: bool) -> None:
    assert bool(disk_fault(error)) == full


def test_fingerprints_tell_inputs_apart() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(*parts) for parts in ([1], ["1"], [1.5], [None], [[1]], [1, 1], [{"1": 1}])}) == 7


def test_file_fingerprint_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_fingerprint(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old\n"
    assert list(tmp_path.iterdir()) == [path]

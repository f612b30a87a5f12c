"""Checkpoints: a training goes on from the last whole one to the same bits, whatever ended it and whatever befell the files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from conftest import REPOSITORY

from ftkit.data.mask import tokenise
from ftkit.data.rows import Example, Row
from ftkit.errors import InterruptedRunError, RunError
from ftkit.files import file_fingerprint, size_bytes
from ftkit.progress import SilentReporter
from ftkit.run import Run
from ftkit.train.checkpoints import STOPPER, TRAINER_STATE, WATCHED, damage, drop_broken_checkpoints, refuse_world, seal, state_of
from ftkit.train.training import train

pytestmark = pytest.mark.torch


class Says(SilentReporter):
    """Keeps what is said, and presses Ctrl-C after so many steps."""

    def __init__(self, stop_step: int | None = None) -> None:
        self.stop_step = stop_step
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
        if self.stop_step and text.startswith(f"step {self.stop_step}: validation loss"):
            raise KeyboardInterrupt

    warn = note


@pytest.fixture(scope="module")
def worse(tokenizer: Any) -> list[Example]:
    """Validation rows whose loss rises while `examples` are learnt."""
    return list(tokenise(tokenizer, [Row(({"role": "user", "content": "What?"}, {"role": "assistant", "content": "QXZ#~"}), 1)]))


RISING = {"method": "lora", "max_steps": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_share": 0}


@pytest.fixture(scope="module")
def begun(model: Path, tokenizer: Any, examples: list[Example], worse: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped in its third evaluation, at step 6, with checkpoints of steps 2 (the best) and 5."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(InterruptedRunError):
        train(tiny.recipe(model, **RISING, save_minutes=1e-6), tiny.SETTINGS, model, tokenizer, examples, worse, folder, Says(6))
    assert sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    return folder


@pytest.fixture
def checkpoint(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "checkpoint-5"


def adapter_hash(folder: Path) -> str:
    return file_fingerprint(folder / "adapter" / "adapter_model.safetensors")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_a_page(path: Path) -> None:
    """As a file looks whose last pages were not on the disk when the power failed."""
    with open(path, "rb+") as file:
        file.seek(-512, 2)
        file.write(bytes(512))


@pytest.mark.parametrize(
    ("harm", "name", "words"),
    [
        (cut, "adapter_model.safetensors", "is damaged: adapter_model.safetensors is not what was written"),
        (zero_a_page, "adapter_model.safetensors", "is damaged: adapter_model.safetensors is not what was written"),
        (cut, "optimizer.pt", "is damaged: optimizer.pt is not what was written"),
        (Path.unlink, "scheduler.pt", "is damaged: scheduler.pt is missing"),
        (zero_a_page, "rng_state.pth", "is damaged: rng_state.pth is not what was written"),
        (zero_a_page, TRAINER_STATE, "is damaged: what it says of itself cannot be read"),
        (cut, WATCHED, "is damaged: what it says of itself cannot be read"),
        (Path.unlink, WATCHED, "was not written to its end"),
        (Path.unlink, TRAINER_STATE, "was not written to its end"),
    ],
)
def test_damage_to_each_file_of_a_checkpoint_is_found(harm: Callable[[Path], None], name: str, words: str, checkpoint: Path) -> None:
    assert damage(checkpoint) is None
    harm(checkpoint / name)
    assert damage(checkpoint) == words
    reporter = Says()
    drop_broken_checkpoints(checkpoint.parent, reporter, read=True)
    assert reporter.said == [f"the checkpoint of step 5 {words}; it is removed"]
    assert [path.name for path in checkpoint.parent.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_of_an_ftkit_that_sealed_none_is_gone_on_from(checkpoint: Path) -> None:
    (checkpoint / WATCHED).write_text(json.dumps({"steps": 5, "seconds": 1.0, "peak_bytes": 1}), encoding="utf-8")
    assert damage(checkpoint) is None


def test_what_is_written_after_the_seal_is_no_damage(checkpoint: Path) -> None:
    seal(checkpoint, {"steps": 5})
    (checkpoint / "note.txt").touch()
    assert damage(checkpoint) is None


@pytest.fixture(scope="module")
def undisturbed(
    model: Path, tokenizer: Any, examples: list[Example], worse: list[Example], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[int, list[Any], str]]:
    """(steps, curve, hash of the adapter) of a training with this patience that nothing ended before its time."""

    def whole(patience: int) -> tuple[int, list[Any], str]:
        folder = tmp_path_factory.mktemp("whole")
        recipe = tiny.recipe(model, **RISING, early_stopping_patience=patience)
        result = train(recipe, tiny.SETTINGS, model, tokenizer, examples, worse, folder)
        return result.steps, result.curve, adapter_hash(folder)

    return whole


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    checkpoint: Path, model: Path, tokenizer: Any, examples: list[Example], worse: list[Example], undisturbed: Any
) -> None:
    zero_a_page(checkpoint / "adapter_model.safetensors")
    reporter, folder = Says(), checkpoint.parents[1]
    result = train(tiny.recipe(model, **RISING), tiny.SETTINGS, model, tokenizer, examples, worse, folder, reporter)
    assert result.resumed_from_step == 2
    assert reporter.said[:2] == [
        "the checkpoint of step 5 is damaged: adapter_model.safetensors is not what was written; it is removed",
        "resuming from step 2",
    ]
    assert (result.steps, result.curve, adapter_hash(folder)) == undisturbed(3)


@pytest.mark.parametrize("patience", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_early_stopping_and_callbacks_may_change_in_between(
    patience: int, checkpoint: Path, model: Path, tokenizer: Any, examples: list[Example], worse: list[Example], undisturbed: Any
) -> None:
    """Patience counts what was evaluated before the kill; a callback that the checkpoint does not know is a KeyError in transformers."""
    state = state_of(checkpoint)
    del state["stateful_callbacks"][STOPPER]
    state["stateful_callbacks"]["AnotherCallback"] = {"args": {}, "attributes": {}}
    (checkpoint / TRAINER_STATE).write_text(json.dumps(state), encoding="utf-8")
    recipe, folder = tiny.recipe(model, **RISING, early_stopping_patience=patience), checkpoint.parents[1]
    result = train(recipe, tiny.SETTINGS, model, tokenizer, examples, worse, folder)
    assert result.resumed_from_step == 5
    assert result.steps == (6 if patience == 2 else 8)  # the best is of step 2; evaluated at 4, 6 and 8
    assert (result.steps, result.curve, adapter_hash(folder)) == undisturbed(patience)


def test_a_checkpoint_of_another_number_of_processes_is_refused(checkpoint: Path) -> None:
    refuse_world(checkpoint)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    with pytest.raises(RunError, match="written by 2 processes, and 1 would go on"):
        refuse_world(checkpoint)
    refuse_world(checkpoint, 2)
    with pytest.raises(RunError, match="written without FSDP, and training would go on with it"):
        refuse_world(checkpoint, 2, fsdp=True)
    (checkpoint / "optimizer.bin").touch()
    refuse_world(checkpoint, 2, fsdp=True)
    with pytest.raises(RunError, match="written with FSDP, and training would go on without it"):
        refuse_world(checkpoint, 2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("rows", ["padded", "packing"])
def test_twenty_kills_change_no_bit(rows: str, tmp_path: Path, report_figures: Callable[[str], None]) -> None:
    """Half of them at random moments, half in the middle of writing and removing checkpoints."""
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "tests" / "train" / "killed.py"), str(tmp_path), "1", rows]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ends"]) == 20
    assert set(found["killed"]) == {found["whole"]}
    report_figures(
        f"{rows}: 20 kills ({', '.join(found['ends'])}), {len(found['killed'])} trainings ended: each with the undisturbed one's adapter"
    )


@pytest.mark.slow
def test_room_is_looked_for_before_the_start_and_what_was_begun_is_not_counted_twice(
    small_project: Path, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_project / "recipe.yaml").write_text(
        "model: model\nlora: {r: 512}\ntraining: {method: lora, max_steps: 2, effective_batch_size: 2, max_length: 128}\n", encoding="utf-8"
    )
    usage, free = shutil.disk_usage(small_project), 1000
    monkeypatch.setattr("ftkit.line.shortage.shutil.disk_usage", lambda folder: usage._replace(free=free))

    def planned(*settings: str) -> int:
        return int(json.loads(ftkit("plan", small_project, "--json", *settings).stdout)["shortages"][0]["needed_bytes"])

    needed = planned()
    assert needed == planned("--set", "ship.closing_steps=0") < planned("--set", "ship.closing_steps=60")  # unasked, it refuses nothing
    free = needed - 1
    refused = ftkit("train", small_project)
    assert refused.exit_code == 3
    assert f"runs{os.sep}recipe" in refused.stderr
    free = needed
    with monkeypatch.context() as patched:
        patched.setattr("ftkit.train.training._tensors", lambda folder: 1 / 0)  # fails after the last step
        with pytest.raises(ZeroDivisionError):
            ftkit("train", small_project)
    [begun] = (small_project / "runs" / "recipe").glob(".train-*.partial")
    free = needed - size_bytes(begun)  # as it is on a disk of that size
    assert ftkit("train", small_project).exit_code == 0


def test_a_full_disk_names_what_can_go(tmp_path: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "kept").write_bytes(bytes(3000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with Run(tmp_path) as run:
        for inputs in (1, 2):
            with pytest.raises(RunError) as refused:
                run.ensure("train", inputs, fill, resumable=True, keep=True)
    assert "free some space (ftkit clean: 2.9 KiB of this run are not needed), or move the run's folder" in str(refused.value.hint)
    assert "goes on from the last checkpoint" in str(refused.value.hint)


@pytest.mark.slow
def test_a_changed_recipe_says_that_it_begins_anew(
    small_project: Path, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_project / "recipe.yaml").write_text(
        "model: model\nlora: {r: 4}\ntraining: {method: lora, max_steps: 2, effective_batch_size: 2, max_length: 128}\n", encoding="utf-8"
    )
    with monkeypatch.context() as patched:
        patched.setattr("ftkit.train.training._tensors", lambda folder: 1 / 0)  # fails after the last step
        with pytest.raises(ZeroDivisionError):
            ftkit("train", small_project)
    [begun] = (small_project / "runs" / "recipe").glob(".train-*.partial")
    other = ftkit("train", small_project, "--set", "training.seed=1")
    assert other.exit_code == 0
    assert f"stays at step 2 in {begun}" in other.stderr.replace("\n", "")
    again = ftkit("train", small_project)
    assert "all was trained before: taking up the checkpoint of step 2" in again.stderr

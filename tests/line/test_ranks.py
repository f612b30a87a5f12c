"""Training in several processes: the same as in one, one writer, resumed after a kill, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from click.testing import Result

from ftkit.machine import ranks
from ftkit.train.micro_batches import share

Ftkit = Callable[..., Result]
RECIPE = """
model: model
data: {train: train.jsonl, validation: validation.jsonl}
training: {method: lora, max_length: 128, effective_batch_size: 5, max_steps: 6, evaluations_per_epoch: 2, compute_dtype: float32}
lora: {r: 4}
"""


@pytest.fixture
def project(tmp_path: Path, write_rows: Any, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 uneven rows, 5 in a step and one in each epoch's last; no GPU is seen."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny.make_model(tmp_path / "model")
    rows = [{"prompt": f"What comes {n} times? " + "So " * (n % 5), "completion": "a" * (1 + 7 * n % 40)} for n in range(23)]
    write_rows(tmp_path / "train.jsonl", rows[:16])
    write_rows(tmp_path / "validation.jsonl", rows[16:])
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def started(project: Path, run: Path, *settings: str) -> subprocess.Popen[str]:
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ftkit"]
    command = [*launched, "train", str(project), "--run-dir", str(run), *(word for s in settings for word in ("--set", s))]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def curve(run: Path) -> list[float]:
    (found,) = run.glob("train-*/curve.json")
    return [point[name] for point in json.loads(found.read_text()) for name in ("loss", "validation_loss") if point[name] is not None]


@pytest.mark.slow
@pytest.mark.torch
def test_two_processes_train_as_one_though_one_of_them_was_killed(project: Path, ftkit: Ftkit) -> None:
    assert ftkit("train", project, "--run-dir", project / "one").exit_code == 0
    run = project / "two"
    (planned,) = (project / "one").glob("plan-*")
    shutil.copytree(planned, run / planned.name)
    broken = started(project, run, "training.save_minutes=1e-6")
    until = time.monotonic() + 120
    while not list(run.glob(".train-*.partial/checkpoints/checkpoint-2/watched.json")):
        assert time.monotonic() < until
        assert broken.poll() is None, broken.communicate()[1]
        time.sleep(0.01)
    second = next(child for child in psutil.Process(broken.pid).children() if child.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    broken.communicate(timeout=120)
    assert broken.returncode
    alone = ftkit("train", project, "--run-dir", run)
    assert (alone.exit_code, "written by 2 processes, and 1 would go on" in alone.stderr) == (1, True)

    again = started(project, run)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count("Validation loss") == 1, out  # one of them prints
    assert "split among 2 processes" in err
    assert "Warning" not in err
    assert "resuming from step" in err
    wanted = curve(project / "one")
    assert curve(run) == pytest.approx(wanted, rel=1e-5)
    (metrics,) = run.glob("train-*/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == len(wanted)  # one of them writes

    done = started(project, run)  # nobody waits for what is not to be trained
    out, err = done.communicate(timeout=120)
    assert (done.returncode, "Up to date" in out) == (0, True), err


@pytest.mark.parametrize(("rows", "count"), [(8, 2), (7, 2), (5, 3), (3, 3)])
def test_each_row_of_a_step_is_one_process_s(rows: int, count: int) -> None:
    shares = [share(rows, rank, count) for rank in range(count)]
    assert sorted(row for each in shares for row in each) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("settings", "environment", "gpus", "said"),
    [
        ({"effective_batch_size": 2}, {}, 0, "--set training.effective_batch_size=3"),
        ({"packing": True}, {}, 0, "--set training.packing=false"),
        ({"objective": "dpo"}, {}, 0, "training.objective: dpo"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, 0, "FSDP is not supported"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, 0, "DeepSpeed is not supported"),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 0, "torch.compile"),
        ({}, {"LOCAL_WORLD_SIZE": "2"}, 2, "Several machines"),
        ({}, {}, 1, "3 processes, and CUDA sees 1 GPU."),
    ],
)
def test_what_several_processes_do_not_train_is_refused(
    settings: dict[str, Any], environment: dict[str, str], gpus: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(Path("model"), **{"effective_batch_size": 8, **settings})
    ranks.refuse(recipe, gpus)  # one process trains it
    for name, value in {"WORLD_SIZE": "3", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ranks.RecipeError) as refused:
        ranks.refuse(recipe, gpus)
    assert said in f"{refused.value.message} {refused.value.hint}"


def test_other_commands_run_in_one_process(ftkit: Ftkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("plan", "ship", "build"):
        found = ftkit(name)
        assert (found.exit_code, f"`ftkit {name}` runs in one process, and 2 were started" in found.stderr) == (2, True)

"""Training in several processes, of which each holds the weights or a share: the same as in one, resumed after a kill, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
from click.testing import Result
from safetensors.torch import load_file

from ftkit.errors import RecipeError
from ftkit.machine import ranks
from ftkit.train import trainer
from ftkit.train.micro_batches import share

Ftkit = Callable[..., Result]
PATIENCE_SECONDS = 600  # two processes wait for each other, and for whatever else is busy
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


def started(project: Path, run: Path, *settings: str, program: Sequence[str] = ("-m", "ftkit")) -> subprocess.Popen[str]:
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    command = [*launched, "train", str(project), "--run-dir", str(run), *(word for s in settings for word in ("--set", s))]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


# A ftkit whose second process has no memory for more than two rows at once, from its third pass on.
SHORT = """
import os, torch
from torch.nn.modules.module import Module
from ftkit.cli import main
call, passes = Module.__call__, []
def checked(this, *arguments, **options):
    if type(this).__name__ == "LlamaForCausalLM" and this.training and os.environ["RANK"] == "1":
        passes.append(len(options["input_ids"]))
        if passes[-1] > 2 and len(passes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 MiB. GPU 0 has a total capacity of …")
    return call(this, *arguments, **options)
Module.__call__ = checked
main()
"""
# A ftkit whose weights are no numbers after the third step, at the recipe's rate.
BLOWN = """
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from ftkit.cli import main
def hook(optimizer, *_):
    first = next(group["params"][0] for group in optimizer.param_groups if group["params"])
    if optimizer.state[first]["step"] >= 3 and optimizer.param_groups[0]["lr"] > 0.6e-3:
        first.data.fill_(torch.nan)
def begins(module, _):
    for parameter in module.parameters() if type(module).__name__ == "LlamaForCausalLM" and module.training else ():
        if parameter.grad is not None:
            assert parameter.grad.untyped_storage().nbytes() > parameter.grad.nbytes, "it is held beside the buckets that are summed"
register_optimizer_step_post_hook(hook)
torch.nn.modules.module.register_module_forward_pre_hook(begins)
main()
"""


def curve(run: Path) -> list[float]:
    (found,) = run.glob("train-*/curve.json")
    return [point[name] for point in json.loads(found.read_text()) for name in ("loss", "validation_loss") if point[name] is not None]


def kill_one_of_two(project: Path, run: Path, *settings: str) -> None:
    """Train until there is a checkpoint, and then no more."""
    broken = started(project, run, "training.save_minutes=1e-6", *settings)
    until = time.monotonic() + PATIENCE_SECONDS
    while not list(run.glob(".train-*.partial/checkpoints/checkpoint-2/watched.json")):
        assert time.monotonic() < until
        assert broken.poll() is None, broken.communicate()[1]
        time.sleep(0.01)
    second = next(child for child in psutil.Process(broken.pid).children() if child.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    broken.communicate(timeout=PATIENCE_SECONDS)
    assert broken.returncode


def trained(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("train-*/*/*.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.torch
def test_two_processes_train_as_one_though_one_of_them_was_killed(project: Path, ftkit: Ftkit) -> None:
    assert ftkit("train", project, "--run-dir", project / "one").exit_code == 0
    run = project / "two"
    (planned,) = (project / "one").glob("plan-*")
    shutil.copytree(planned, run / planned.name)
    kill_one_of_two(project, run)
    alone = ftkit("train", project, "--run-dir", run)
    assert (alone.exit_code, "written by 2 processes, and 1 would go on" in alone.stderr) == (1, True)

    again = started(project, run)
    out, err = again.communicate(timeout=PATIENCE_SECONDS)
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
    out, err = done.communicate(timeout=PATIENCE_SECONDS)
    assert (done.returncode, "Up to date" in out) == (0, True), err


@pytest.mark.slow
@pytest.mark.torch
def test_weights_that_are_shared_out_are_trained_and_kept_as_whole_ones(project: Path, ftkit: Ftkit) -> None:
    """FSDP, one row at once: of 5 rows a step one process has 3 passes and the other 2. Killed and taken up again."""
    lora = ["training.method=qlora", "training.per_device_train_batch_size=1", "training.gradient_checkpointing=true"]
    full = ["training.method=full"]
    for name, settings in (("qlora", lora), ("full", full)):
        one, two = project / f"{name}-one", project / f"{name}-two"
        assert ftkit("train", project, "--run-dir", one, *(word for s in settings for word in ("--set", s))).exit_code == 0
        if name == "qlora":
            kill_one_of_two(project, two, *settings, "training.fsdp=true")
        again = started(project, two, *settings, "training.fsdp=true")
        err = again.communicate(timeout=PATIENCE_SECONDS)[1]
        assert again.returncode == 0, err
        assert "share the weights out (FSDP)" in err
        assert "Warning" not in err
        assert ("resuming from step" in err) == (name == "qlora")
        assert curve(two) == pytest.approx(curve(one), rel=1e-5)
        wanted, found = trained(one), trained(two)
        assert wanted.keys() == found.keys()
        for tensor_name, tensor in wanted.items():
            torch.testing.assert_close(found[tensor_name], tensor, rtol=0, atol=1e-6 if name == "qlora" else 2**-8)


@pytest.mark.slow
@pytest.mark.torch
def test_two_processes_learn_preferences_as_one(project: Path, write_rows: Any, ftkit: Ftkit) -> None:
    """Of five pairs a step, and of one in each epoch's last, of which one process has none."""
    for name in ("train.jsonl", "validation.jsonl"):
        rows = [json.loads(line) for line in (project / name).read_text().splitlines()]
        write_rows(project / name, [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "b" * 9} for row in rows])
    text = (project / "recipe.yaml").read_text()
    (project / "recipe.yaml").write_text(text.replace("method: lora", "method: lora, objective: dpo, per_device_train_batch_size: 1"))
    assert ftkit("train", project, "--run-dir", project / "one").exit_code == 0
    together = started(project, project / "two")
    _, err = together.communicate(timeout=PATIENCE_SECONDS)
    assert together.returncode == 0, err
    assert "Warning" not in err
    assert curve(project / "two") == pytest.approx(curve(project / "one"), rel=1e-5)
    margins = [read_margins(project / name) for name in ("one", "two")]
    assert margins[1] == pytest.approx(margins[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.torch
def test_where_one_of_two_runs_out_of_memory_the_same_command_goes_on_smaller(project: Path, ftkit: Ftkit) -> None:
    """Six rows a step, three of them in each process at once."""
    program = project / "short.py"
    program.write_text(SHORT, encoding="utf-8")
    settings = ("training.effective_batch_size=6", "training.save_minutes=1e-6", "training.gradient_checkpointing=false")
    assert ftkit("train", project, "--run-dir", project / "one", "--set", settings[0]).exit_code == 0
    short = started(project, project / "two", *settings, program=[str(program)])
    err = short.communicate(timeout=PATIENCE_SECONDS)[1]
    assert short.returncode
    assert "Error: In process 1 memory ran out after step 3, with 6 × 1 rows" in err
    assert "going on from step 3 with 1 × 6 rows, the effective batch stays 6" in err
    again = started(project, project / "two", *settings, program=[str(program)])
    out, err = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, err
    assert "Memory ran out after step 3" in out
    assert curve(project / "two") == pytest.approx(curve(project / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.torch
def test_two_processes_that_diverge_go_on_at_half_the_rate(project: Path) -> None:
    program = project / "blown.py"
    program.write_text(BLOWN, encoding="utf-8")
    constant = ("training.learning_rate=1e-3", "training.lr_scheduler_type=constant", "training.warmup_share=0")
    several = "training.per_device_train_batch_size=1"  # micro-batches, all but the last of which are not summed among the processes
    settings = (*constant, several, "training.save_minutes=1e-6", "training.max_steps=8")
    for succeeds in (False, True):
        together = started(project, project / "run", *settings, program=[str(program)])
        out, err = together.communicate(timeout=PATIENCE_SECONDS)
        assert (together.returncode == 0) == succeeds, err
        assert "oing on from step 2 at half the rate" in (out if succeeds else err)


def test_no_process_of_several_is_aborted_at_its_end() -> None:
    """By a thread of torch's that Python's end does not wait for: here, by the first thing that Python's end does."""
    program = "import atexit, os; atexit.register(os.abort); from ftkit.cli import main; main(['schema'])"
    for count, code in (("1", -signal.SIGABRT), ("2", RecipeError.exit_code)):
        ended = subprocess.run([sys.executable, "-c", program], env={**os.environ, "WORLD_SIZE": count}, capture_output=True, text=True)
        assert ended.returncode == code
        assert ("runs in one process" in ended.stderr) == (count == "2")


def read_margins(run: Path) -> list[float]:
    (found,) = run.glob("train-*/curve.json")
    return [point["reward_margin"] for point in json.loads(found.read_text()) if point["reward_margin"] is not None]


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
        ({"objective": "dpo", "fsdp": True}, {}, 0, "training.objective: dpo"),
        ({"fsdp": True, "optim": "adamw_8bit"}, {}, 0, "training.optim: adamw_8bit"),
        ({"fsdp": True, "optim": "adafactor"}, {}, 0, "adafactor takes means over whole tensors"),
        ({"fsdp": True, "compute_dtype": "float16"}, {}, 0, "float16"),
        ({"optim": "lion_8bit"}, {"ACCELERATE_USE_FSDP": "true"}, 0, "training.optim: lion_8bit"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, 0, "offloaded to RAM"),
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
    if not recipe.training.fsdp:
        ranks.refuse(recipe, gpus)  # one process trains it
    for name, value in {"WORLD_SIZE": "3", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ranks.RecipeError) as refused:
        ranks.refuse(recipe, gpus)
    assert said in f"{refused.value.message} {refused.value.hint}"


def test_one_process_shares_with_nobody() -> None:
    with pytest.raises(ranks.RecipeError, match="nobody to share") as refused:
        ranks.refuse(tiny.recipe(Path("model"), fsdp=True), 4)
    assert "--nproc-per-node 4" in str(refused.value.hint)


def test_other_commands_run_in_one_process(ftkit: Ftkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("plan", "ship", "build"):
        found = ftkit(name)
        assert (found.exit_code, f"`ftkit {name}` runs in one process, and 2 were started" in found.stderr) == (2, True)


def test_layers_of_a_tower_that_was_not_loaded_are_not_shared_out() -> None:
    class Decoder(torch.nn.Module):
        pass

    model = torch.nn.Sequential(Decoder(), torch.nn.Linear(2, 2))
    model._no_split_modules = {"Decoder", "VisionBlock"}  # type: ignore[assignment]
    assert trainer._layers(model) == ["Decoder"]


def test_no_copy_of_the_weights_is_held_while_they_are_shared_out() -> None:
    class Accelerator:
        def prepare(self, model: torch.nn.Module) -> dict[str, Any]:
            return model.state_dict()

    held = SimpleNamespace(model=torch.nn.Linear(2, 2), accelerator=Accelerator())
    trainer._hold_no_copy(held)
    assert held.accelerator.prepare(held.model) == {}
    assert len(held.model.state_dict()) == 2

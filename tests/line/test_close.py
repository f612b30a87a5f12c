"""The step `close`: killed in the middle, it goes on and makes the same file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest

from ftkit.close import student
from ftkit.errors import InterruptedRunError
from ftkit.files import file_fingerprint
from ftkit.line import line, teach
from ftkit.line.ask import ASK
from ftkit.line.close import CLOSE
from ftkit.line.gguf import QUANTISE
from ftkit.line.job import Job, open_job
from ftkit.line.step import Made, ensure, fingerprint_of
from ftkit.run import CHECKPOINTS

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


def press() -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_closing_makes_the_same_file_and_the_next_type_s_reads_nothing_again(
    made: Callable[..., Path],
    tmp_path: Path,
    write_rows: Callable[[Path, list[Any]], Path],
    rows: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": str(made(families.by_name("Phi 3.5"))),
        "training": {"method": "lora", "max_steps": 4, "effective_batch_size": 4, "max_length": 128, "learning_rate": 1e-2},
        "lora": {"r": 4},
        "ship": {"name": "tiny", "quantization": "Q2_K", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512, "closing_steps": 20},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")

    def job(run: str, **settings: Any) -> Job:
        return open_job(tmp_path, [(f"ship.{key}", value) for key, value in settings.items()], run_dir=tmp_path / run)

    first = job("undisturbed")
    with first.run:
        line.train(first)
        ensure(first, ASK)
        ensure(first, QUANTISE)
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "killed")
    command = [sys.executable, "-m", "ftkit", "ship", str(tmp_path), "--run-dir", str(tmp_path / "killed"), "--only", "close"]
    begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list((tmp_path / "killed").glob(f".close-*.partial/{CHECKPOINTS}/checkpoint-10/*.safetensors")):
        assert begun.poll() is None, begun.stderr and begun.stderr.read()
        time.sleep(0.01)
    begun.kill()
    begun.communicate()

    def closed(at: Job) -> Made[Any]:
        with at.run:
            return ensure(at, CLOSE)

    gone_on, undisturbed = closed(job("killed")), closed(first)
    assert gone_on.result == undisturbed.result
    assert undisturbed.result.file
    hashes = [file_fingerprint(one.folder / one.result.file.path) for one in (gone_on, undisturbed)]
    assert hashes[0] == hashes[1]
    assert not (gone_on.folder / CHECKPOINTS).exists()
    monkeypatch.setattr("ftkit.line.lessons.trained_model", lambda *_: pytest.fail("the trained model is loaded again"))
    with monkeypatch.context() as patched:
        patched.setattr(teach, "lessons", lambda *_: press())
        with pytest.raises(InterruptedRunError):
            closed(job("killed", quantization="Q3_K_M"))
    begun = job("killed", quantization="Q3_K_M")
    assert begun.run.partial(CLOSE.name, fingerprint_of(begun, CLOSE)).is_dir()  # so that it is known to be wanted
    searched: list[int] = []
    monkeypatch.setattr(student, "places", lambda *given, search=student.places: searched.append(1) or search(*given))
    assert closed(job("undisturbed", quantization="Q4_0")).result.steps
    assert len(searched) == 1  # for the weights that the file's tensors are
    with pytest.raises(pytest.fail.Exception):  # other rows
        closed(job("undisturbed", quantization="Q4_0", closing_steps=10))

"""An adapter of a 4-bit base, fitted to the 16-bit source: nearer to the trained model there, or merged as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
from safetensors.torch import load_file

from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import RecipeError
from ftkit.line import transfer
from ftkit.line.entry import enter
from ftkit.line.job import Job, computes_on
from ftkit.line.lessons import Teacher
from ftkit.line.line import adopt
from ftkit.line.merge import MERGE, Merged
from ftkit.line.step import Made, ensure, find
from ftkit.line.transfer import TRANSFER
from ftkit.progress import SILENT

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
WEIGHTS = "adapter_model.safetensors"
Write = Callable[[Path, list[Any]], Path]


@pytest.fixture
def here(tmp_path: Path, write_rows: Write, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter that says that it learnt on 4 bits, and rows; no GPU is seen."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    tiny.make_adapter(tiny.make_model(tmp_path / "base", initializer_range=0.1), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/tiny-bnb-4bit"}), encoding="utf-8")
    write_rows(tmp_path / "train.jsonl", rows * 4)
    write_rows(tmp_path / "test.jsonl", rows[:4])
    return tmp_path


def job_of(**settings: Any) -> Job:
    given = {"model": "base", "data.train": "train.jsonl", "data.test": "test.jsonl", "ship.transfer_steps": 10,
             "ship.max_new_tokens": 2, "training.max_length": 64}  # fmt: skip
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return enter("adapter", list({**given, **named}.items()), run_dir=None, reporter=SILENT)[0]


def merge(job: Job) -> tuple[Made[Merged], dict[str, Any]]:
    """The step, and the weights that it wrote: those of an earlier merge are let go."""
    made = ensure(job, MERGE)
    return made, load_file(made.folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_it_comes_nearer_and_is_what_is_merged(here: Path) -> None:
    job = job_of()
    with job.run:
        adopt(job)
        merged, fitted = merge(job)
        made = find(job, TRANSFER)
        assert made
        as_it_was, plain = merge(job_of(ship__transfer_steps=0))
    done = made.result
    assert done.why_not is None
    assert done.before is not None
    assert done.after is not None
    assert done.after < 0.95 * done.before
    assert f"fitted before ({done.steps} steps; KL a token" in merged.result.onto
    before, after = (load_file(folder / WEIGHTS) for folder in (here / "adapter", made.folder / "adapter"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert any((fitted[name] != plain[name]).any() for name in plain)
    assert as_it_was.result.onto == "the 16-bit source"


def test_the_teacher_is_the_adapter_on_its_base_and_elsewhere_that_base_alone(here: Path) -> None:
    import numpy as np

    job, rows = job_of(), [Forced([5, 6, 7, 8], [1, 3])]
    with job.run:
        teacher = Teacher(job, adopt(job))
    (base,), (trained,), (again,) = teacher.as_base(rows), teacher.as_trained(rows), teacher.as_base(rows)
    cuda, dtype = computes_on(job, hf.model_type(here / "base"))
    (alone,) = logits.of_model(hf.load_model(here / "base", "qlora", dtype=dtype, cuda=cuda), rows)
    assert np.array_equal(base, alone)
    assert np.array_equal(base, again)
    assert np.abs(trained - base).max() > 0.01


@pytest.mark.slow
def test_the_source_with_some_of_the_rounding_is_nearer_from_the_beginning(here: Path) -> None:
    """The adapter learns on what it is merged into, and the rounding is also in layers that it does not change."""
    found = {}
    for share in (0.0, 0.5):
        job = job_of(ship__rounding_kept=share, ship__transfer_steps=1)
        with job.run:
            adopt(job)
            merged, _ = merge(job)
            made = find(job, TRANSFER)
            assert made
        found[share] = made.result.before
        assert ("with 50 % of the rounding that it was trained with" in merged.result.onto) == (share == 0.5)
    assert found[0.5] is not None
    assert found[0] is not None
    assert found[0.5] < 0.5 * found[0]


@pytest.mark.slow
def test_a_worse_adapter_is_not_merged(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RATE_SHARE", 1e5)
    job = job_of()
    with job.run:
        adopt(job)
        (merged, weights), made = merge(job), find(job, TRANSFER)
        assert made
        _, as_it_was = merge(job_of(ship__transfer_steps=0))
    assert "no better" in str(made.result.why_not)
    assert "not fitted" in merged.result.onto
    assert all((weights[name] == as_it_was[name]).all() for name in weights)


def test_an_adapter_of_16_bits_is_merged_as_it_is(here: Path) -> None:
    job = job_of(training__method="lora", ship__rounding_kept=0.5)
    with job.run:
        adopt(job)
        merged = ensure(job, MERGE).result.onto
    assert "which has no rounding to keep" in merged
    assert "it learnt on the source already" in merged


def test_rows_to_learn_from_and_others_to_be_judged_on_are_needed(here: Path) -> None:
    job = job_of(data__test=None)
    with job.run, pytest.raises(RecipeError, match=r"ship\.transfer_steps: it learns from some rows"):
        adopt(job)


def test_it_learns_in_float32_where_a_card_trains_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing scales its loss, and its gradients are below float16's least numbers."""

    class Seen(Exception):
        pass

    def load(folder: Path, method: str, *, dtype: str, **_: Any) -> None:
        raise Seen(dtype)

    for name, replacement in {
        "trained_tokenizer": lambda *_: None, "checks_as_trained": lambda _: [], "rows_to_learn": lambda *_: [], "Teacher": lambda *_: None,
        "lessons": lambda *_: [], "base_folder": lambda _: tmp_path, "computes_on": lambda *_: (True, "float16"),
    }.items():  # fmt: skip
        monkeypatch.setattr(transfer, name, replacement)
    monkeypatch.setattr(transfer.hf, "load_model", load)
    job: Any = SimpleNamespace(recipe=SimpleNamespace(ship=SimpleNamespace(transfer_steps=1), trust_remote_code=False))
    with pytest.raises(Seen, match="float32"):
        transfer._transferred(job, tmp_path, *(cast(Any, None),) * 2)

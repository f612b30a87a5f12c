"""Who is told of a training beside ftkit: what is not installed is refused before it, and it changes nothing in what is learnt."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
from click.testing import Result

from ftkit.data.mask import tokenise
from ftkit.data.rows import Row
from ftkit.engines import hf
from ftkit.errors import ToolMissingError
from ftkit.recipe import ReportTo
from ftkit.train.metrics import METRICS
from ftkit.train.reporting import PACKAGES, refuse_missing_reporters
from ftkit.train.training import train

MISSING = next(name for name, modules in PACKAGES.items() if not any(map(find_spec, modules)))


def test_every_name_of_the_recipe_is_known_here_and_to_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(get_args(ReportTo)) == PACKAGES.keys() <= INTEGRATION_TO_CALLBACK.keys()


def test_what_is_not_installed_is_refused_with_the_line_to_paste() -> None:
    with pytest.raises(ToolMissingError, match=f"not installed: {MISSING}") as refused:
        refuse_missing_reporters([MISSING])
    assert str(refused.value.hint).startswith("pip install ")
    refuse_missing_reporters([])


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_it_is_found_before_the_training_and_is_no_reason_to_train_again(
    tmp_path: Path, rows: list[Any], write_rows: Any, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny.make_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\ntraining: {method: lora, max_steps: 2, effective_batch_size: 2, max_length: 128}\nlora: {r: 4}\n", encoding="utf-8"
    )
    reported = ("train", tmp_path, "--set", f"training.report_to={MISSING}")
    refused = ftkit(*reported)
    assert refused.exit_code == ToolMissingError("").exit_code
    assert "pip install" in refused.stderr
    assert not (tmp_path / "runs" / "recipe").exists() or not list((tmp_path / "runs" / "recipe").glob("*train*"))
    assert ftkit("train", tmp_path).exit_code == 0
    assert "Up to date" in ftkit(*reported).stdout


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_tensorboard_finds_the_losses_in_the_folder_of_the_training(tmp_path: Path, rows: list[Any]) -> None:
    """Through tensorboardX, which transformers takes where TensorBoard itself is not; a reader of its events beside it is not needed."""
    model = tiny.make_model(tmp_path / "model")
    tokenizer = hf.load_tokenizer(model)
    examples = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(rows, 1)]))
    train(tiny.recipe(model, method="lora", report_to=["tensorboard"]), tiny.SETTINGS, model, tokenizer, examples, examples[:2], tmp_path)
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    told = {value.tag: value.simple_value for event in _events(events) for value in event.summary.value}
    logged = [json.loads(line) for line in (tmp_path / METRICS).read_text(encoding="utf-8").splitlines()]
    assert told["eval/loss"] == pytest.approx(next(one["validation_loss"] for one in reversed(logged) if "validation_loss" in one))
    assert math.isfinite(told["train/loss"])


def _events(path: Path) -> Iterator[Any]:
    """Of a TFRecord file: each record's length in 8 bytes, a checksum of that in 4, the record, and its checksum in 4."""
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]

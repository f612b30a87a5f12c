"""`ship.quantization: smallest` ships the smallest type that keeps enough, and says why no smaller one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convertible
import pytest

from ftkit.errors import RecipeError, ToolMissingError
from ftkit.line import line
from ftkit.line.choose import TRIED
from ftkit.line.job import open_job
from ftkit.model.source import open_gguf

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


def test_the_smallest_type_that_keeps_enough_ships(
    tmp_path: Path,
    write_rows: Callable[[Path, list[Any]], Path],
    rows: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    convertible.make("llama", tmp_path / "model", chat_template="<bos>" + convertible.CHAT)
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    recipe = {
        "model": str(tmp_path / "model"),
        "data": {"test": "test.jsonl"},
        "training": {"method": "lora", "max_steps": 12, "effective_batch_size": 2, "max_length": 128, "learning_rate": 2e-2},
        "ship": {
            "name": "tiny", "quantization": "smallest", "imatrix": True, "bits_by_task": True, "max_new_tokens": 4, "test_rows": 2,
            "num_ctx": 512, "max_loss_points": 100,
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run = tmp_path / "runs" / "recipe"

    def ship(keep: float) -> line.Shipped:
        job = open_job(tmp_path, [("ship.keep", keep)])
        with job.run:
            line.train(job)
            return line.ship(job, use_ollama=False)

    job = open_job(tmp_path, [("ship.keep", 50)])
    with job.run:
        line.train(job)
        with pytest.raises(RecipeError, match="not chosen yet"):
            line.make_only(job, "quantise")
        assert all(state.costs for state in line.states(job) if state.step.name in ("quantise", "prove"))  # of the largest that is tried
    chosen = ship(50)
    *smaller, last = chosen.weighed
    assert chosen.bits
    assert "rows are too few" in str(chosen.bits.why_not)  # so that the plain file ships
    assert [tried.quantization for tried in chosen.weighed] == list(TRIED[: len(chosen.weighed)])
    assert last.kept_percent is not None
    assert last.kept_percent >= 50 > max((tried.kept_percent or 0 for tried in smaller), default=0)
    assert [tried.bytes for tried in chosen.weighed] == sorted(tried.bytes for tried in chosen.weighed)
    assert (chosen.gguf.stat().st_size, f"-{last.quantization}.gguf" in chosen.gguf.name) == (last.bytes, True)
    assert {path.name for path in run.glob("quantise-*/*.gguf")} == {chosen.gguf.name}  # no file of those that were tried stays
    field = open_gguf(chosen.gguf).get_field("quantize.imatrix.file")
    assert field
    assert field.contents() == "imatrix.gguf"  # no path of this machine
    assert {state.step.name for state in line.states(open_job(tmp_path, [("ship.keep", 50)])) if not state.done} == {"register"}

    weighed = {path: path.stat().st_mtime_ns for path in run.glob("weigh-*/*")}
    first = ship(0)
    assert [tried.quantization for tried in first.weighed] == [TRIED[0]]
    assert {path: path.stat().st_mtime_ns for path in run.glob("weigh-*/*")} == weighed  # nothing is weighed twice
    assert not ship(0).fresh

    monkeypatch.setattr("ftkit.line.gguf.LLAMA_IMATRIX", "llama-that-is-not-here")
    with pytest.raises(ToolMissingError, match=r"ship\.imatrix needs"):
        ship(0)

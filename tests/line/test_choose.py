"""`ship.quantization: smallest` ships the smallest type that keeps enough, and says why no smaller one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import convertible
import pytest

from ftkit.check import failed
from ftkit.errors import RecipeError, ToolMissingError
from ftkit.gguf.files import quantize
from ftkit.line import line
from ftkit.line.choose import TRIED
from ftkit.line.job import Job, open_job
from ftkit.model.source import open_gguf

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture
def lay_out(tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]) -> Callable[..., None]:
    """A tiny model, rows and a recipe that wants the smallest type, with some keys of `ship`."""

    def write(**ship: Any) -> None:
        convertible.make("llama", tmp_path / "model", chat_template="<bos>" + convertible.CHAT)
        for name in ("train", "test"):
            write_rows(tmp_path / f"{name}.jsonl", rows)
        recipe = {
            "model": str(tmp_path / "model"),
            "data": {"test": "test.jsonl"},
            "training": {"method": "lora", "max_steps": 12, "effective_batch_size": 2, "max_length": 128, "learning_rate": 2e-2},
            "ship": {
                "name": "tiny", "quantization": "smallest", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512, "max_loss_points": 100,
                **ship,
            },
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")

    return write


def test_the_smallest_type_that_keeps_enough_ships(tmp_path: Path, lay_out: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(imatrix=True, bits_by_task=True)
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

    enough = ((first.weighed[0].kept_percent or 0) + 100) / 2
    *smaller, last = ship(enough).weighed
    assert smaller
    ship(0)
    asked: list[str] = []
    monkeypatch.setattr("ftkit.line.gguf.quantize", lambda *args, **more: asked.append(args[2]) or quantize(*args, **more))
    assert ship(enough).weighed == (*smaller, last)
    assert asked == [last.quantization]  # of the others, whose files went, none is made again

    monkeypatch.setattr("ftkit.line.gguf.LLAMA_IMATRIX", "llama-that-is-not-here")
    with pytest.raises(ToolMissingError, match=r"ship\.imatrix needs"):
        ship(0)


def test_a_type_that_fails_its_proof_gives_way_to_the_next(
    tmp_path: Path, lay_out: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both types are made by the converter; of the first it is put lower what it keeps on the held-out rows."""
    lay_out(keep=50)
    monkeypatch.setattr("ftkit.line.choose.TRIED", ("BF16", "Q8_0"))
    run, judged, walk = tmp_path / "runs" / "recipe", line.judged, line._walk

    def lower(job: Job, asked: Any, proven: Any, shipped: Any) -> Any:
        proof = judged(job, asked, proven, shipped)
        if job.recipe.ship.quantization != "BF16" or job.recipe.ship.keep <= 40:
            return proof
        return replace(proof, checks=[failed("gain kept", "50 % are wanted, kept are 40.0 %")], would_pass={"ship.keep": 40})

    monkeypatch.setattr(line, "judged", lower)
    job = open_job(tmp_path)
    with job.run:
        line.train(job)
        with monkeypatch.context() as interrupted:
            seen: list[int] = []
            interrupted.setattr(line, "_walk", lambda way: (seen.append(1), walk(way) if len(seen) == 1 else 1 / 0)[1])
            with pytest.raises(ZeroDivisionError):
                line.ship(job, use_ollama=False)
        weighed = {path: path.stat().st_mtime_ns for path in run.glob("weigh-*/*")}
        assert weighed
        with monkeypatch.context() as known:
            known.setattr(line, "judged", lambda job, *others: lower(job, *others) if job.recipe.ship.quantization != "BF16" else 1 / 0)
            shipped = line.ship(job, use_ollama=False)  # the first is not proved a second time
        assert {path: path.stat().st_mtime_ns for path in weighed} == weighed
        first, second = shipped.weighed
        assert (first.quantization, first.fails) == ("BF16", "gain kept: 50 % are wanted, kept are 40.0 %")
        assert (second.quantization, second.fails, shipped.gguf.name) == ("Q8_0", None, "tiny-Q8_0.gguf")
        assert not list(run.glob("quantise-*"))
        assert "fails: gain kept: 50 % are wanted" in (shipped.record.parent / "README.md").read_text("utf-8")
        again = line.ship(job, use_ollama=False)
        assert (again.fresh, again.weighed) == (False, shipped.weighed)
        assert {state.step.name for state in line.states(job) if not state.done} == {"register"}
        assert next(check for check in line.judge_again(job).checks if check.name == "gain kept").outcome == "passed"
    job = open_job(tmp_path, [("ship.keep", 30)])
    with job.run:
        assert line.ship(job, use_ollama=False).gguf.name == "tiny-BF16.gguf"  # that limit it passes

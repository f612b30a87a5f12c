"""What ships where the file loses too much: it is closed; and of QLoRA, where that is not enough, merged onto the dequantised base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest

from ftkit.check import failed
from ftkit.errors import ProofError
from ftkit.line import close, line
from ftkit.line.ask import ASK
from ftkit.line.close import CLOSE
from ftkit.line.job import Job, open_job
from ftkit.line.merge import MERGE
from ftkit.line.prove import PROVE
from ftkit.line.step import ensure, find

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
PHI = families.by_name("Phi 3.5")
COARSE = replace(PHI, sizes={**PHI.sizes, "hidden_size": 256, "intermediate_size": 256})  # rows of Q2_K's own blocks, which loses something


@pytest.fixture
def trained(
    made: Callable[..., Path], tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> Callable[..., Job]:
    """A job with some keys of `ship`, of one training a method."""
    write_rows(tmp_path / "train.jsonl", rows)

    def job(method: str, **ship: Any) -> Job:
        recipe = {
            "model": str(made(COARSE)),
            "training": {"method": method, "max_steps": 12, "effective_batch_size": 4, "max_length": 128, "learning_rate": 1e-2},
            "lora": {"r": 4},
            "ship": {"name": "tiny", "quantization": "Q2_K", "max_new_tokens": 4, "test_rows": 8, "num_ctx": 512, **ship},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "ship": {"max_loss_points": 100, **recipe["ship"]}}), encoding="utf-8")
        return open_job(tmp_path, run_dir=tmp_path / method)

    return job


def kept(job: Job) -> float:
    """Percent of the training that the file keeps, as it was last proved."""
    of_file = [*line.judge_again(job).forms.values()][-1].kept
    assert of_file
    return of_file.percent


def test_a_file_that_loses_too_much_is_closed(trained: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained("lora", keep=100, closing_steps=0)
    with plain.run:
        line.train(plain)
        with pytest.raises(ProofError):
            line.ship(plain, use_ollama=False)
        least = kept(plain)
    wanted = (least + 100) / 2
    job = trained("lora", keep=wanted)
    with job.run, monkeypatch.context() as small:
        small.setattr("ftkit.line.close.fitting", lambda *_: None)
        with pytest.raises(ProofError):  # of the file as it was quantised
            line.ship(job, use_ollama=False)
        assert not find(replace(job, closes=True), CLOSE)  # there may be room another time
    with job.run:
        assert not find(replace(job, closes=True), CLOSE)
        shipped = line.ship(job, use_ollama=False)
        assert shipped.closed
        assert shipped.closed.file
        assert shipped.closed.scales > 0
        assert shipped.merged_onto == "the 16-bit source"
        again = line.ship(job, use_ollama=False)
        assert (again.fresh, again.gguf) == (False, shipped.gguf)
        done = {state.step.name for state in line.states(job) if state.done}
        assert {CLOSE.name, PROVE.name} <= done
        assert not line.make_only(job, CLOSE.name).fresh
        line.judge_again(job)


@pytest.mark.parametrize("types", [("Q2_K", "Q3_K_M"), ("Q3_K_M", "Q2_K")])
def test_where_no_type_passes_as_it_was_quantised_the_smallest_closed_one_ships(
    trained: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, types: tuple[str, str]
) -> None:
    """What the proof says of files that are not closed is put lower, and of all but Q2_K, in either order."""
    monkeypatch.setattr("ftkit.line.choose.TRIED", types)
    judged, written, proved, closed = line.judged, close.write_back, list[tuple[str, bool]](), list[str]()

    def lower(job: Job, asked: Any, proven: Any, shipped: Any) -> Any:
        kind = job.recipe.ship.quantization
        proved.append((kind, job.closes))
        proof = judged(job, asked, proven, shipped)
        passes = job.closes and kind == "Q2_K"
        return proof if passes else replace(proof, checks=[failed("gain kept", "none is kept")], would_pass={"ship.max_loss_points": 101})

    monkeypatch.setattr(line, "judged", lower)
    monkeypatch.setattr(close, "write_back", lambda path, *rest: closed.append(path.name) or written(path, *rest))
    job = trained("lora", quantization="smallest", keep=0)
    tried = list(types[: types.index("Q2_K") + 1])
    with job.run:
        line.train(job)
        shipped = line.ship(job, use_ollama=False)
        assert list(dict.fromkeys(proved))[:2] == [(kind, False) for kind in types]
        assert proved[-1] == ("Q2_K", True)
        assert shipped.closed
        assert shipped.closed.file
        assert [(one.quantization, bool(one.fails)) for one in shipped.weighed] == [(kind, kind != "Q2_K") for kind in tried]
        assert shipped.gguf.name == "tiny-Q2_K.gguf"
        again = line.ship(job, use_ollama=False)
        assert (again.fresh, again.closed) == (False, shipped.closed)
        assert closed == [f"tiny-{kind}.gguf" for kind in tried]  # each once
        assert {state.step.name for state in line.states(job) if not state.done} == {"register"}
        assert line.judge_again(job).checks
        line.start_from(job, "merge")
        assert not [folder.name for folder in job.run.folder.iterdir() if "close-" in folder.name or "weigh-" in folder.name]
        assert len(list(job.run.folder.glob("teach-*"))) == 1  # read once for all types
        line.start_from(job, "ask")
        assert not list(job.run.folder.glob("teach-*"))


def test_what_closing_does_not_take_back_is_merged_onto_the_dequantised_base(
    trained: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "loses_gain", lambda *_: "7.0 points")  # of a random model's few answers no merge loses any
    job = trained("qlora", keep=100)
    with job.run:
        line.train(job)
        with monkeypatch.context() as interrupted:
            interrupted.setattr(line, "_walk", lambda way, walk=line._walk: 1 / 0 if way.onto == "dequantised" else walk(way))
            with pytest.raises(ZeroDivisionError):
                line.ship(job, use_ollama=False)
        assert [way.onto for way in line.ways(job, ensure(job, ASK))] == ["dequantised"]  # what did not suffice is not made again
        with pytest.raises(ProofError, match="answers worse"):
            line.ship(job, use_ollama=False)
        assert find(replace(job, onto="dequantised"), MERGE)
        assert not find(replace(job, closes=True), CLOSE)  # its files went, with those of the merge into the source
        assert next(state.done for state in line.states(job) if state.step is MERGE)

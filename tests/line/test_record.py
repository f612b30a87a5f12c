"""What is handed on: one folder, whole at every moment, with nothing of this machine in it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import tiny
from safetensors.numpy import save_file

from ftkit.check import passed
from ftkit.gguf.files import GgufFile
from ftkit.line.close import Closed, Shipping
from ftkit.line.job import Job, make_job
from ftkit.line.merge import Merged
from ftkit.line.prove import Form, Proof, Proven
from ftkit.line.record import hand_over
from ftkit.line.step import Made
from ftkit.line.train import Trained
from ftkit.model.card import licence_beside, licence_of
from ftkit.proof.record import CARD, PROBES, RECORD, read_record
from ftkit.proof.score import Score
from ftkit.proof.verify import verify
from ftkit.run import Run

FORM = Form(0.5, None, 0.1, 99.0, None)
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"  # noqa: S105


class Told:
    """What a job says."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def bar(self, label: str, total: float) -> Any:
        raise NotImplementedError


@dataclass
class Walked:
    """A job whose steps are made, as `hand_over` takes them."""

    job: Job
    told: Told
    merged: Made[Merged]
    shipping: Shipping
    proven: Made[Proven]
    trained: Made[Trained]
    closed: Closed
    proof: Proof

    def hand_over(self, proof: Proof | None = None, shipping: Shipping | None = None) -> Path:
        with self.job.run:
            return hand_over(
                self.job, self.merged, shipping or self.shipping, self.proven, self.trained, self.closed, proof or self.proof
            ).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the steps, and what they were made from."""
    folder = tmp_path_factory.mktemp("steps")
    shipped.make(folder / "file")
    (folder / "prove").mkdir()
    probes = json.loads((folder / "file" / PROBES).read_text(encoding="utf-8"))
    (folder / "prove" / PROBES).write_text(json.dumps({**probes, "tensors": {}}), encoding="utf-8")
    shipped.tokenizer().save_pretrained(folder / "merge" / "model")
    for name, file in (("base", "model"), ("train/adapter", "adapter_model")):
        (folder / name).mkdir(parents=True)
        save_file({"a": np.zeros(2, np.float32)}, folder / name / f"{file}.safetensors")
        (folder / name / f"{'adapter_' if file != 'model' else ''}config.json").write_text("{}", encoding="utf-8")
    (folder / "base" / CARD).write_text("---\nlicense: other\nlicense_name: mine\n---\n# Base\n", encoding="utf-8")
    (folder / "train.jsonl").write_text(json.dumps({"messages": shipped.ROWS[0].messages}) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Walked:
    told, here = Told(), Path(shutil.copytree(folder, tmp_path / "steps"))
    recipe = tiny.recipe(here / "base").model_copy(
        update={"data": tiny.recipe(here / "base").data.model_copy(update={"train": str(here / "train.jsonl")})}
    )
    job = make_job(recipe, tmp_path, Run(tmp_path / "run"), told)

    def step(name: str, result: Any) -> Made[Any]:
        return Made(name, "0" * 16, here / name, result, 1.0, fresh=True)

    file = GgufFile("F32", Path(shipped.FILE), 1, 32.0, 20, 0)
    return Walked(
        job,
        told,
        step("merge", Merged("the 16-bit source", (shipped.tokenizer().eos_token_id,))),
        Shipping(here / "file" / shipped.FILE, file, "quantise", "0" * 16, None),
        step("prove", Proven(())),
        step("train", Trained(**tiny.TRAINED)),
        Closed(None, 0, 0, None, None, f"{here}/x cannot be read with {TOKEN}"),
        Proof([passed("answers", f"in {tmp_path}/x")], "all", {"trained": Score(1, 1)}, {"F32": FORM}, None, []),
    )  # fmt: skip


def texts(folder: Path) -> str:
    return "".join((folder / name).read_text(encoding="utf-8") for name in (RECORD, PROBES, CARD))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_one_folder_is_handed_on_and_says_nothing_of_this_machine(made: Walked) -> None:
    folder = made.hand_over()
    assert {path.name for path in folder.iterdir()} == {shipped.FILE, RECORD, PROBES, CARD}  # and the Modelfile, by another
    text = texts(folder)
    for secret in (str(folder.parent.parent), str(Path.home()) + os.sep, TOKEN):
        assert secret not in text
    assert "hf_…" in text
    for question in ("What is 100 plus 12?", "It is 112."):
        assert question not in text  # a row of the user's
    record, untouched = read_record(folder / RECORD)
    assert untouched
    assert record.base["licence"] == {"license": "other", "license_name": "mine"}
    assert record.base["sha256"].keys() >= {"config.json", "model.safetensors"}
    assert record.trained["sha256"].keys() == {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    assert [file["name"] for file in record.data["train"]] == ["train.jsonl"]
    assert record.settings["data"]["train"] == "train.jsonl"
    assert record.settings["model"] == "base"
    assert "license_name: mine" in text
    assert {check.outcome for check in verify(folder / shipped.FILE, folder / RECORD)} == {"passed"}


def test_the_file_takes_its_place_on_the_disk_once(made: Walked, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made.hand_over()
    assert (folder / shipped.FILE).samefile(made.shipping.path)
    (folder / shipped.FILE).unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("this disk has no links")

    monkeypatch.setattr(os, "link", refuse)
    assert (made.hand_over() / shipped.FILE).read_bytes() == made.shipping.path.read_bytes()
    before = times(folder)
    made.hand_over()
    assert times(folder) == before


def test_the_same_again_touches_nothing(made: Walked) -> None:
    before = times(made.hand_over())
    assert times(made.hand_over()) == before


def test_an_edited_record_is_written_again(made: Walked) -> None:
    folder = made.hand_over()
    text = texts(folder)
    shipped.edit_record(folder, lambda loaded: loaded["proof"]["scores"]["trained"].update(right=9))
    made.hand_over()
    assert texts(folder) == text


def test_a_card_that_was_changed_by_hand_stays(made: Walked) -> None:
    folder = made.hand_over()
    (folder / CARD).write_text("# Mine\n", encoding="utf-8")
    made.hand_over()
    assert not made.told.warnings
    made.hand_over(replace(made.proof, scores={"trained": Score(0, 1)}))
    assert (folder / CARD).read_text(encoding="utf-8") == "# Mine\n"
    assert "changed by hand" in made.told.warnings[0]
    (folder / CARD).unlink()
    made.hand_over()
    assert "# tiny" not in (folder / CARD).read_text(encoding="utf-8")
    assert "# my-model" in (folder / CARD).read_text(encoding="utf-8")


def test_another_file_takes_the_place_of_the_last(made: Walked) -> None:
    folder = made.hand_over()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / f".{shipped.FILE}.partial").write_text("left by a kill", encoding="utf-8")
    other = made.shipping.path.with_name("tiny-Q8_0.gguf")
    shutil.copyfile(made.shipping.path, other)
    shipped.quantised_again(other, None)
    made.hand_over(shipping=replace(made.shipping, path=other, file=replace(made.shipping.file, quantization="Q8_0")))
    assert {path.name for path in folder.iterdir()} == {other.name, "notes.txt", RECORD, PROBES, CARD}
    record, _ = read_record(folder / RECORD)
    assert record.tensor_types == {"F32": 5, "Q8_0": 15}


def test_a_run_of_an_earlier_ftkit_is_handed_on_without_probes(made: Walked) -> None:
    folder = made.hand_over()
    (made.proven.folder / PROBES).unlink()
    made.hand_over()
    assert not (folder / PROBES).exists()
    checks = {check.name: check for check in verify(folder / shipped.FILE, folder / RECORD)}
    assert checks["prompts"].detail == "it was proven by an earlier ftkit; to have it: ftkit ship --from prove"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: [a]\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\n{: [\n---\n", {}),
        ("license: mit\n", {}),
        ("", {}),
    ],
)
def test_a_licence_is_what_the_files_say(card: str, licence: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(card, encoding="utf-8")
    assert licence_beside(tmp_path) == licence
    (tmp_path / "LICENSE.txt").touch()
    assert licence_beside(tmp_path) == {**licence, "file": "LICENSE.txt"}


def test_a_gguf_says_its_licence(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_license_link("https://e.org")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert licence_of(tmp_path / "x.gguf") == {"license": "apache-2.0", "license_link": "https://e.org"}

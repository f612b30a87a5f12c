"""`ship.bits_by_task`: more bits where the answers gain by them, and the plain file where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convertible
import numpy as np
import pytest

from ftkit.close.ranking import gains
from ftkit.close.student import load_student
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ToolMissingError
from ftkit.gguf import files as gguf
from ftkit.gguf.bits import tensors_in, type_file, worth_most
from ftkit.gguf.files import GgufFile
from ftkit.line import behaviour
from ftkit.line.bits import BITS, TYPES, Bits
from ftkit.line.gguf import Converted, refuse_type
from ftkit.line.job import Job, open_job
from ftkit.line.merge import Merged
from ftkit.line.step import Made
from ftkit.machine.llama_cpp import Found, find_program, need_converter
from ftkit.proof.behaviour import Behaviour

pytestmark = pytest.mark.e2e
ROWS = [Forced([2, *((7 * n + 3 * m) % 250 + 6 for m in range(12)), *((n + m) % 26 + 263 for m in range(8))], list(range(13, 21)))
        for n in range(16)]  # fmt: skip
ROUNDED = ("layers.0.", "layers.1.", "layers.2.")  # where the trained model is as it was before it was quantised


@dataclass(frozen=True)
class Before:
    job: Job
    steps: list[Made[Any]]
    plain: Path
    folder: Path

    def make(self) -> Bits:
        assert BITS.make
        return BITS.make(self.job, self.folder, *self.steps)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its files in F16 and Q4_0, and as trained a model that is the one in its first layers, and the other in the rest."""
    import torch

    folder = tmp_path_factory.mktemp("run")
    (folder / "model").mkdir()
    convertible.make("llama", folder / "model")
    model: Any = hf.load_model(folder / "model", None, dtype="float32", cuda=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if len(parameter.shape) > 1 else 1)  # random weights of the usual size say the same of all
    model.save_pretrained(folder / "model")
    gguf.convert(folder / "model", {"F16": folder / "m-F16.gguf"}, need_converter())
    gguf.quantize(folder / "m-F16.gguf", folder / "m-Q4_0.gguf", "Q4_0", program())
    trained, whole = (load_student(folder / f"m-{kind}.gguf", folder / "model", bfloat16=False, cuda=False) for kind in ("Q4_0", "F16"))
    finer = dict(whole.named_parameters())
    for name, parameter in trained.named_parameters():
        if any(layer in name for layer in ROUNDED):
            parameter.data = finer[name].data
    choice = folder / behaviour.CHOICE
    choice.mkdir()
    behaviour.write(choice, {behaviour.TRAINED: Behaviour([], [], [], [])}, ROWS)
    np.save(choice / behaviour.LOGITS, np.concatenate(list(logits.of_model(trained, ROWS))))
    return folder


def program() -> Found:
    found = find_program("llama-quantize")
    assert found
    return found


@pytest.fixture
def before(quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Before]:
    monkeypatch.setattr("ftkit.line.bits.MORE_BYTES", 0.2)  # of so small a file one tensor is more than is allowed
    (tmp_path / "recipe.yaml").write_text(
        f"model: {quantised / 'model'}\nship: {{quantization: Q4_0, bits_by_task: true}}\n", encoding="utf-8"
    )
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 12, encoding="utf-8")
    files = {kind: GgufFile(kind, Path(f"m-{kind}.gguf"), 0, 0.0, 0, 0) for kind in ("F16", "Q4_0")}
    results = {"ask": None, "merge": Merged("", ()), "gguf": Converted((files["F16"],)), "quantise": files["Q4_0"]}
    steps: list[Made[Any]] = [Made(name, "", quantised, result, 0, fresh=True) for name, result in results.items()]
    monkeypatch.setattr("ftkit.line.gguf.tokenizer_of", lambda job, model: convertible.tokenizer())
    (tmp_path / "made").mkdir()
    yield Before(open_job(tmp_path), steps, quantised / "m-Q4_0.gguf", tmp_path / "made")
    assert {path.name for path in (tmp_path / "made").iterdir()} <= {TYPES, "m-Q4_0.gguf"}


def test_tensors_whose_rounding_costs_answers_get_more_bits(before: Before) -> None:
    made = before.make()
    assert made.file
    assert made.why_not is None
    assert made.plain is not None
    assert made.by_task is not None
    assert made.by_task < 0.7 * made.plain
    assert made.at_random is not None
    assert made.by_task < made.at_random
    assert f"{made.by_task:.3g} ({made.at_random:.3g} in tensors at random), on rows" in made.words
    assert 0 < made.more_percent <= 20
    plain, raised = tensors_in(before.plain), tensors_in(before.folder / made.file.path)
    changed = {name for name in plain if raised[name] != plain[name]}
    assert len(changed) == made.tensors
    assert {raised[name].kind for name in changed} == {"Q5_0"}
    told = (before.folder / TYPES).read_text(encoding="utf-8")
    assert told == type_file({name: tensor.kind for name, tensor in raised.items() if tensor.kind != "F32"})


def test_a_ranking_turned_round_loses_and_the_plain_file_ships(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftkit.line.bits.gains", lambda *files, **how: {name: -gain for name, gain in gains(*files, **how).items()})
    made = before.make()
    assert made.file is None
    assert made.tensors > 0
    assert made.plain is not None
    assert made.by_task is not None
    assert made.by_task > made.plain
    assert str(made.why_not).startswith(f"it is no nearer: KL a token {made.plain:.3g}, with more bits {made.by_task:.3g}, in tensors at")
    assert [path.name for path in before.folder.iterdir()] == [TYPES]


def test_a_choice_that_is_no_better_than_chance_is_not_kept(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here chance has nearly all that gain, and the ranking one of them."""
    best: list[str] = []

    def poor(gain: Any, more: Any, room: int) -> list[str]:
        one, *best[:] = sorted(worth_most(gain, more, room), key=lambda name: -gain[name])
        return [one]

    monkeypatch.setattr("ftkit.line.bits.worth_most", poor)
    monkeypatch.setattr("ftkit.line.bits.at_random", lambda more, room: best)
    made = before.make()
    assert made.file is None
    assert made.plain is not None
    assert made.by_task is not None
    assert made.at_random is not None
    assert made.at_random < made.by_task < made.plain
    assert f"at random bring it as near: KL a token {made.plain:.3g}, with more bits {made.by_task:.3g}" in str(made.why_not)
    assert [path.name for path in before.folder.iterdir()] == [TYPES]


def test_no_room_and_too_few_rows(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftkit.line.bits.LEAST_ROWS", 17)
    assert "16 rows are too few" in str(before.make().why_not)
    monkeypatch.undo()
    monkeypatch.setattr("ftkit.line.bits.MORE_BYTES", 0.0001)
    monkeypatch.setattr("ftkit.line.gguf.tokenizer_of", lambda job, model: convertible.tokenizer())
    made = before.make()
    assert (made.file, made.plain) == (None, None)
    assert "no tensor gains" in str(made.why_not)


def test_the_plain_types_make_the_plain_file(before: Before) -> None:
    types, again = before.folder / TYPES, before.folder / "m-Q4_0.gguf"
    types.write_text(type_file({name: tensor.kind for name, tensor in tensors_in(before.plain).items()}), encoding="utf-8")
    gguf.quantize(before.plain.with_name("m-F16.gguf"), again, "Q4_0", program(), types=types)
    assert again.read_bytes() == before.plain.read_bytes()


def test_a_llama_quantize_that_takes_no_types(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_type(before.job)
    old = before.folder.parent / "llama-quantize"
    old.write_text("#!/bin/sh\necho '  2  or  Q4_0    :  4.34G'", encoding="utf-8")
    old.chmod(0o755)
    monkeypatch.setattr("ftkit.line.gguf.find_program", lambda name, folder=None: Found(old, "the test"))
    with pytest.raises(ToolMissingError, match="does not know --tensor-type-file") as refused:
        refuse_type(before.job)
    assert "ship.bits_by_task=false" in str(refused.value.hint)

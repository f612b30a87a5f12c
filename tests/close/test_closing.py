"""Closing: norms and biases of a file are trained until it is nearer to the trained model, and nothing else of it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convertible
import pytest

from ftkit.close import closing, kept
from ftkit.close.closing import RATE, Lesson, Progress, Trained, close, distribution, divergence, mean_divergence
from ftkit.close.scales import Scales
from ftkit.close.student import Lossless, load_student, lossless, scales, write_back
from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError
from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import need_converter
from ftkit.model.source import open_gguf

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROWS = [Forced([2, *((7 * n + 3 * m) % 250 + 6 for m in range(12)), *((n + m) % 26 + 263 for m in range(8))], list(range(13, 21)))
        for n in range(24)]  # fmt: skip
NOISE = 0.1  # of each weight: a merge and a quantisation that lose much


@dataclass(frozen=True)
class Made:
    folder: Path
    file: Path
    lessons: list[Lesson]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The file's weights are off, each by itself."""
    import torch

    return make(tmp_path_factory.mktemp("model"), lambda _, weight: weight.mul_(1 + NOISE * torch.randn_like(weight)))


def make(folder: Path, spoil: Callable[[str, Any], Any]) -> Made:
    """A model as trained, and a Q8_0 file of one whose matrices are spoiled, by their names."""
    import torch

    convertible.make("llama", folder)
    model: Any = hf.load_model(folder, None, dtype="float32", cuda=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if len(parameter.shape) > 1 else 1)  # random weights of the usual size say the same of all
    lessons = [Lesson(row, distribution(found)) for row, found in zip(ROWS, logits.of_model(model, ROWS), strict=True)]
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if len(parameter.shape) > 1:
                spoil(name, parameter)
    model.save_pretrained(folder)
    gguf.convert(folder, {"Q8_0": folder / "m.gguf"}, need_converter())
    return Made(folder, folder / "m.gguf", lessons)


def test_a_distribution_is_no_further_from_itself_than_rounding(made: Made) -> None:
    import torch

    (found,) = logits.of_file(made.file, ROWS[:1])
    assert float(divergence(torch.from_numpy(found), distribution(found)).abs().max()) < 1e-6
    assert float(divergence(torch.from_numpy(found[::-1].copy()), distribution(found)).max()) > 1e-3


def closed(
    made: Made, learnt: Sequence[Lesson], checked: Sequence[Lesson], target: Path, *, with_scales: bool
) -> tuple[float, float, set[str]]:
    """KL a token of the file before and after, and what was trained of it; nothing else has changed."""

    asked = [lesson.answer for lesson in checked]
    student = load_student(made.file, made.folder, bfloat16=False, cuda=False)
    vectors, stretched = lossless(student, made.file), scales(student, made.file) if with_scales else []
    before = mean_divergence(logits.of_file(made.file, asked), checked)
    measured = lambda: mean_divergence(logits.of_model(student, asked), checked)  # noqa: E731
    first = measured()
    assert first == pytest.approx(before, rel=0.1, abs=1e-3)
    _, found = close(student, trained(vectors, stretched), learnt, learnt[:2], 40, measured, first, outside_weight=0.5)
    write_back(made.file, vectors, stretched, target)
    after = mean_divergence(logits.of_file(target, asked), checked)
    assert after == pytest.approx(found, rel=0.1, abs=1e-3)
    assert made.file.stat().st_size == target.stat().st_size
    for old, new in zip(open_gguf(made.file).tensors, open_gguf(target).tensors, strict=True):
        assert (old.name, old.tensor_type) == (new.name, new.tensor_type)
        if old.name in {one.name for one in stretched}:
            assert (old.data != new.data).any()
            assert (old.data.reshape(-1, 34)[:, 2:] == new.data.reshape(-1, 34)[:, 2:]).all()  # a block of Q8_0 begins with its scale
        elif old.name not in {vector.name for vector in vectors}:
            assert (old.data == new.data).all()
    return before, after, {one.name for one in (*vectors, *stretched)}


def test_closing_brings_the_file_nearer_and_changes_its_vectors_alone(made: Made, tmp_path: Path) -> None:
    before, after, names = closed(made, made.lessons[4:], made.lessons[:4], tmp_path / "closed.gguf", with_scales=False)
    assert names == {tensor.name for tensor in open_gguf(made.file).tensors if len(tensor.shape) == 1}
    assert after < 0.95 * before  # of a random model, whose weights are off at random, 1,664 numbers take back a tenth


def test_scales_take_back_what_vectors_cannot(tmp_path: Path) -> None:
    weaker = make(tmp_path, lambda name, weight: weight.mul_(0.7 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1))
    learnt = weaker.lessons[:8]  # which are checked, too: a random model's other rows say nothing of each other
    (before, alone, _), (_, after, names) = (
        closed(weaker, learnt, learnt, tmp_path / "closed.gguf", with_scales=one) for one in (False, True)
    )
    assert after < 0.5 * alone < 0.25 * before
    assert "blk.0.ffn_down.weight" in names
    assert not {"token_embd.weight", "output.weight"} & names


def test_no_worse_values_are_kept(made: Made) -> None:
    student = load_student(made.file, made.folder, bfloat16=False, cuda=False)
    vectors = lossless(student, made.file)
    first = [vector.parameter.detach().clone() for vector in vectors]
    asked = iter([2.0, 3.0])
    assert close(student, trained(vectors), made.lessons, [], 40, lambda: next(asked), 1.0, outside_weight=0.5) == (0, 1.0)
    assert all((vector.parameter == old).all() for vector, old in zip(vectors, first, strict=True))


def trained(vectors: list[Lossless], stretched: Sequence[Scales] = ()) -> list[Trained]:
    return [
        *(Trained(vector.parameter, RATE * vector.scale) for vector in vectors),
        *(Trained(one.stretch, 1e-2) for one in stretched),
    ]


def learnt(made: Made, folder: Path, *, interrupted_at: int | None = None) -> tuple[list[Any], tuple[int, float], list[int]]:
    """Six steps, checked at every second; what the vectors then are, what is said of the best, and the checks that were made."""
    student, checks = load_student(made.file, made.folder, "mapped", bfloat16=False, cuda=False), list[int]()
    vectors, begun = lossless(student, made.file), kept.last(folder)
    asked = [lesson.answer for lesson in made.lessons[:2]]
    measured = lambda: mean_divergence(logits.of_model(student, asked), made.lessons[:2])  # noqa: E731

    def keep(progress: Progress) -> None:
        kept.keep(folder, progress, "mapped")
        checks.append(progress.step)
        if progress.step == interrupted_at:
            raise KeyboardInterrupt

    begun_at = begun[0] if begun else None
    done = close(
        student,
        trained(vectors),
        made.lessons[2:],
        made.lessons[:2],
        6,
        measured,
        measured(),
        outside_weight=0.5,
        seed=1,
        begun=begun_at,
        keep=keep,
    )
    return [vector.parameter.detach().clone() for vector in vectors], done, checks


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "CHECKED_EVERY", 2)


def test_an_interrupted_closing_ends_as_an_undisturbed_one(made: Made, often: None, tmp_path: Path) -> None:
    import torch

    wanted, done, checks = learnt(made, tmp_path / "undisturbed")
    assert (checks, done[0] > 0) == ([2, 4, 6], True)
    with pytest.raises(KeyboardInterrupt):
        learnt(made, tmp_path / "interrupted", interrupted_at=4)
    (left,) = (tmp_path / "interrupted").iterdir()
    assert left.name == "checkpoint-4"
    found, done_too, checks = learnt(made, tmp_path / "interrupted")
    assert (checks, done_too) == ([6], done)
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    for file in left.parent.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert kept.last(left.parent) is None


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    import numpy as np
    import torch

    rows, asked = [Forced([n, *range(n + 2)], list(range(1, n + 2))) for n in range(40)], list[int]()

    def read(some: Sequence[Forced], most: int = 99) -> Iterator[Any]:
        for row in some:
            if len(asked) == most:
                raise KeyboardInterrupt
            asked.append(row.ids[0])
            yield np.random.default_rng(row.ids[0]).normal(size=(len(row.places), 300)).astype(np.float32)

    wanted = kept.readings(tmp_path / "whole", rows, read)
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        kept.readings(tmp_path / "part", rows, lambda some: read(some, 35))
    for again in range(2):
        asked.clear()
        found = kept.readings(tmp_path / "part", rows, read)
        assert asked == ([] if again else list(range(32, 40)))
        for one, other in zip(wanted, found, strict=True):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "likeliest", "rest"))
    half = tmp_path / "part" / "1.safetensors"
    half.write_bytes(half.read_bytes()[:1000])
    kept.readings(tmp_path / "part", rows, read)
    assert asked == list(range(16, 40))
    asked.clear()
    kept.readings(tmp_path / "part", rows[1:], read)
    assert asked == list(range(1, 40))


def test_a_vector_that_is_not_the_models_is_left_alone(made: Made) -> None:
    import torch

    student = load_student(made.file, made.folder, bfloat16=False, cuda=False)
    norm = next(parameter for name, parameter in student.named_parameters() if name.endswith("input_layernorm.weight"))
    with torch.no_grad():
        norm[3] += 0.01
    found: list[Lossless] = lossless(student, made.file)
    assert not any(vector.parameter is norm for vector in found)
    assert found


def test_a_file_of_another_model_is_refused(made: Made, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(7)
    convertible.make("llama", tmp_path)
    model: Any = hf.load_model(tmp_path, None, dtype="float32", cuda=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"m\.gguf cannot be closed: no weight of the model is "):
        load_student(made.file, tmp_path, bfloat16=False, cuda=False)


def test_logits_that_were_kept_in_a_file_are_taken(made: Made, tmp_path: Path) -> None:
    import numpy as np

    (found,) = logits.of_file(made.file, ROWS[:1])
    np.save(tmp_path / "kept.npy", found)
    kept = distribution(np.load(tmp_path / "kept.npy", mmap_mode="r"))
    assert (kept.ids == distribution(found).ids).all()

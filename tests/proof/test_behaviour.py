"""How close a file is to the trained model, token by token; and what each fault of a merge or a file does to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convertible
import pytest

from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ToolFailedError
from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import need_converter
from ftkit.model.source import open_gguf
from ftkit.proof.behaviour import POSITIONS, Behaviour, gain_kept, judge_distance, judge_gain, least_kept, measure

ROWS = [
    Forced([2, *((7 * n + 3 * m) % 250 + 6 for m in range(12 + n)), *((n + m) % 26 + 263 for m in range(8))], list(range(13 + n, 21 + n)))
    for n in range(10)
]
SAID = [[row.ids[place] for place in row.places] for row in ROWS]
STEPS, RANK, KEEP = 30, 4, 99  # percent


@dataclass(frozen=True)
class Tiny:
    """A base, what it was trained to be, and what training added to its files' tensors, by llama.cpp's names."""

    before: Behaviour
    trained: Behaviour
    logits: list[Any]
    file: Path
    added: dict[str, Any]
    other: Any  # embeddings of another model

    def judge(self, path: Path) -> tuple[Behaviour, dict[str, str]]:
        form = measure(logits.of_file(path, ROWS), SAID, self.logits)
        forms = {"before": self.before, "trained": self.trained, "F32": form}
        return form, {check.name: check.outcome for check in (judge_gain(forms, "F32", KEEP), judge_distance(forms, "F32", KEEP))}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and its file."""
    folder = tmp_path_factory.mktemp("model")
    convertible.make("llama", folder)
    gguf.convert(folder, {"F32": folder / "base.gguf"}, need_converter())
    return hf.load_model(folder, None, dtype="float32", cuda=False), folder / "base.gguf"


@pytest.fixture(scope="module")
def tiny(base: tuple[Any, Path]) -> Tiny:
    """Trained by an adapter, in its place a few weights of each layer."""
    model, file = base
    return train(model, file, {f"blk.{n}.ffn_down.weight": layer.mlp.down_proj.weight for n, layer in enumerate(model.model.layers)})


@pytest.fixture(scope="module")
def with_saved(base: tuple[Any, Path]) -> Tiny:
    """Trained by its embedding and head, as `modules_to_save` saves them."""
    model, file = base
    return train(model, file, {"token_embd.weight": model.model.embed_tokens.weight, "output.weight": model.lm_head.weight})


def train(model: Any, file: Path, changed: dict[str, Any]) -> Tiny:
    import torch

    before = list(logits.of_model(model, ROWS))
    first = {name: weight.detach().clone() for name, weight in changed.items()}
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(changed.values(), lr=3e-3)
    for _ in range(STEPS):
        for row, said in zip(ROWS, SAID, strict=True):
            found = model(input_ids=torch.tensor([row.ids])).logits[0, [place - 1 for place in row.places]]
            torch.nn.functional.cross_entropy(found, torch.tensor(said)).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = list(logits.of_model(model, ROWS))
    added = {name: (weight.detach() - first[name]).numpy() for name, weight in changed.items()}
    for name, weight in changed.items():
        weight.data.copy_(first[name])
    model.zero_grad()
    torch.manual_seed(2)
    other = torch.randn(model.model.embed_tokens.weight.shape).mul_(0.05).numpy()
    trained = changed_file(file, lambda tensors: add(tensors, added), file.with_name(f"{len(added)}.gguf"))
    return Tiny(measure(before, SAID, kept), measure(kept, SAID), kept, trained, added, other)


def add(tensors: dict[str, Any], added: dict[str, Any], times: float = 1) -> None:
    for name, numbers in added.items():
        tensors[name] += times * numbers


def changed_file(file: Path, change: Callable[[dict[str, Any]], None], path: Path) -> Path:
    shutil.copyfile(file, path)
    reader = open_gguf(path, "r+")
    change({tensor.name: tensor.data for tensor in reader.tensors})
    reader.data.flush()
    return path


@pytest.mark.slow
def test_llama_cpp_says_what_transformers_says(tiny: Tiny) -> None:
    form, told = tiny.judge(tiny.file)
    assert form.divergence_a_token is not None
    assert abs(form.divergence_a_token) < 1e-5
    assert form.agreed_percent == 100
    kept = gain_kept(tiny.before, tiny.trained, form)
    assert kept
    assert kept.low <= kept.percent <= kept.high
    assert abs(kept.percent - 100) < 0.1
    assert set(told.values()) == {"passed"}


def twice(tensors: dict[str, Any], tiny: Tiny) -> None:
    add(tensors, tiny.added)


def too_weak(tensors: dict[str, Any], tiny: Tiny) -> None:
    add(tensors, tiny.added, RANK**-0.5 - 1)


def not_merged(tensors: dict[str, Any], tiny: Tiny) -> None:
    add(tensors, tiny.added, -1)


def anothers_embeddings(tensors: dict[str, Any], tiny: Tiny) -> None:
    tensors["token_embd.weight"][:] = tiny.other


def rows_permuted(tensors: dict[str, Any], _: Tiny) -> None:
    tensors["blk.2.ffn_up.weight"][:] = tensors["blk.2.ffn_up.weight"][::-1].copy()


def a_bit_flipped(tensors: dict[str, Any], _: Tiny) -> None:
    numbers = tensors["blk.1.attn_output.weight"].view("uint32")
    numbers[5, 5] ^= 1 << 30  # the highest of the exponent


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [twice, too_weak, not_merged, anothers_embeddings, rows_permuted, a_bit_flipped])
def test_a_fault_is_seen(sabotage: Callable[[dict[str, Any], Tiny], None], tiny: Tiny, tmp_path: Path) -> None:
    path = changed(tiny, sabotage, tmp_path)
    form, told = tiny.judge(path)
    assert "failed" in told.values(), (form.loss_a_token, form.divergence_a_token)
    least = least_kept({"before": tiny.before, "trained": tiny.trained, "F32": form}, "F32")
    assert least < KEEP


def changed(tiny: Tiny, change: Callable[[dict[str, Any], Tiny], None], folder: Path) -> Path:
    return changed_file(tiny.file, lambda tensors: change(tensors, tiny), folder / "changed.gguf")


@pytest.mark.slow
def test_embeddings_that_were_trained_and_not_saved_are_seen(with_saved: Tiny, tmp_path: Path) -> None:
    assert set(with_saved.judge(with_saved.file)[1].values()) == {"passed"}
    _, told = with_saved.judge(changed(with_saved, not_merged, tmp_path))
    assert set(told.values()) == {"failed"}


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ToolFailedError, match=r"cannot load x\.gguf"):
        list(logits.of_file(tmp_path / "x.gguf", ROWS))


def test_kl_is_known_at_each_place_of_an_answer() -> None:
    """Of rows of other lengths: as many as are that long count, and no more places than are kept."""
    import numpy as np

    random, lengths = np.random.default_rng(0), (3, 1, POSITIONS + 4)
    trained, form = ([random.normal(size=(length, 5)) for length in lengths] for _ in range(2))
    found = measure(form, [[0] * length for length in lengths], trained[:2])  # the third row's logits were not kept
    assert len(found.divergence_at) == 3
    assert sum(found.divergence_at) == pytest.approx(sum(found.divergence))
    first, second, third = found.divergence_by_position
    alone = measure(form[:1], [[0] * 3], trained[:1]).divergence_by_position
    assert [second, third] == pytest.approx(alone[1:])
    assert first == pytest.approx((alone[0] + found.divergence[1]) / 2)
    assert len(measure(form, [[0] * length for length in lengths], trained).divergence_by_position) == POSITIONS
    assert measure(form, [[0] * length for length in lengths]).divergence_by_position == []


def test_what_cannot_be_judged_is_not_made() -> None:
    low, high, far = Behaviour([2], [1.0], [], []), Behaviour([2], [2.0], [], []), Behaviour([2], [1.5], [0.5], [1])
    assert judge_gain({"before": low, "trained": high, "Q8_0": far}, "Q8_0", 90).outcome == "not made"  # nothing gained
    assert judge_distance({"before": high, "trained": low, "Q8_0": far}, "Q8_0", 90).outcome == "not made"  # no logits
    assert judge_gain({"before": high, "trained": low}, "Q8_0", 90).detail.startswith("the file was not looked at")
    assert judge_gain({"trained": low, "Q8_0": far}, "Q8_0", 90).detail.startswith("the base model was not looked at")
    assert judge_gain({"before": high, "trained": low, "Q8_0": far}, "Q8_0", 90).outcome == "failed"
    assert judge_gain({"before": high, "trained": low, "Q8_0": far}, "Q8_0", 50).outcome == "passed"

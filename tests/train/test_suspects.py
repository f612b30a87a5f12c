"""What training saw of its rows is kept as it was, and a wrong label stands out in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from ftkit.data.rows import IGNORED, Example
from ftkit.engines import hf
from ftkit.errors import InterruptedRunError
from ftkit.files import file_fingerprint
from ftkit.progress import Bar, SilentReporter
from ftkit.train.dynamics import PLACES, SEEN, SEEN_TYPE, _seen, read_seen, row_key
from ftkit.train.suspects import signs
from ftkit.train.training import train

warned = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


class StopAt(SilentReporter):
    def __init__(self, step: int) -> None:
        self.step_wanted = step

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        wanted = self.step_wanted

        class _Bar:
            def update(self, done: float, **fields: str) -> None:
                if done == wanted:
                    raise KeyboardInterrupt

        yield _Bar()


@pytest.mark.torch
@warned
def test_what_is_kept_is_what_the_model_found_and_nothing_is_learnt_otherwise(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    arguments = (tiny.recipe(model, method="lora"), tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2])
    train(*arguments, tmp_path / "kept")
    with monkeypatch.context() as patched:
        patched.setattr("ftkit.train.training.kept", lambda *_: nullcontext())
        train(*arguments, tmp_path / "not")
    hashes = {file_fingerprint(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("kept", "not")}
    assert len(hashes) == 1
    seen = read_seen(tmp_path / "kept" / SEEN)
    assert seen["learnt"].tolist() == [True] * 4 + [False] * 2 + [True] * 4 + [False] * 2  # two rows a step, evaluated at 2 and 4
    assert seen["step"].tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4]
    base = hf.load_model(model, None, dtype="float32", cuda=False)
    by_key = {row_key(example.input_ids): example for example in examples}
    assert set(seen["row"].tolist()) <= by_key.keys()
    for record in seen[:2]:  # nothing is learnt yet
        example = by_key[int(record["row"])]
        learnt = [n for n, label in enumerate(example.labels) if label != IGNORED]
        assert set(record["place"][record["place"] >= 0].tolist()) <= set(learnt)
        assert (record["place"] >= 0).sum() == min(PLACES, len(learnt))
        with torch.no_grad():
            told = base(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for place, surprise, entropy in zip(record["place"], record["surprise"], record["entropy"], strict=True):
            if place >= 0:
                before = told[place - 1]
                assert surprise == pytest.approx(-float(before[example.input_ids[place]]), rel=1e-4)
                assert entropy == pytest.approx(-float((before.exp() * before).sum()), rel=1e-4)


@pytest.mark.torch
@warned
@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_what_an_interrupted_training_saw_is_kept_once(
    stop: int, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    """With checkpoints at evaluations alone, so that steps are done again; a kill in the middle of a record."""
    arguments = (tiny.recipe(model, method="lora", max_steps=5), tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2])
    train(*arguments, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        train(*arguments, tmp_path / "stopped", StopAt(stop))
    with (tmp_path / "stopped" / SEEN).open("ab") as file:
        file.write(b"\0\0\0")
    train(*arguments, tmp_path / "stopped")
    assert read_seen(tmp_path / "whole" / SEEN).tobytes() == read_seen(tmp_path / "stopped" / SEEN).tobytes()


@pytest.mark.torch
@warned
def test_a_packed_training_sees_the_same_rows(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    recipe = tiny.recipe(model, method="lora", max_steps=1, effective_batch_size=4)
    seen = []
    for packing in (False, True):
        settings = replace(tiny.SETTINGS, per_device_train_batch_size=4, packing=packing)
        train(recipe, settings, model, tokenizer, examples[2:], examples[:2], tmp_path / str(packing))
        found = read_seen(tmp_path / str(packing) / SEEN)
        seen.append(np.sort(found[found["learnt"]], order="row"))
    padded, packed = seen
    assert len(padded) == 4
    for name in ("row", "place"):
        assert np.array_equal(padded[name], packed[name])
    assert packed["surprise"] == pytest.approx(padded["surprise"], rel=1e-4)


@pytest.mark.torch
def test_rows_that_are_joined_are_kept_apart() -> None:
    import torch
    from transformers.utils import ModelOutput

    rows, learnt = [[5, 6, 7], [8, 9, 10, 11]], [[False, True, True], [False, False, True, True]]

    def output(mask: Any) -> Any:  # place n of the row is told by place n - 1; of the first place of a row nothing is told
        told = torch.where(mask, torch.arange(mask.shape[1]) + 1.0, 0.0)
        return ModelOutput(log_probs=-told, entropy=told / 2, label_mask=mask)

    joined = {"input_ids": torch.tensor([rows[0] + rows[1]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    found = _seen(joined, output(torch.tensor([(learnt[0] + learnt[1])[1:]])), 3, learnt=True)
    padded = {"input_ids": torch.tensor([[*rows[0], 0], rows[1]]), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    apart = _seen(padded, output(torch.tensor([[*learnt[0][1:], False], learnt[1][1:]])), 3, learnt=True)
    assert found["row"].tolist() == apart["row"].tolist() == [row_key(row) for row in rows]
    assert found["place"][:, :2].tolist() == apart["place"][:, :2].tolist() == [[2, 1], [3, 2]]
    assert (found["place"][:, 2:] == -1).all()
    assert found["surprise"][1, :2].tolist() == [6.0, 5.0]


def a_training(flipped: frozenset[int], rows: int = 200, passes: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    """Two tokens a row: a name that nobody can know, and one of two labels, of which the model grows sure; what is wrong it learns last."""
    rng = np.random.default_rng(seed)
    seen = np.zeros(rows * passes, np.dtype(SEEN_TYPE))
    for n, record in enumerate(seen):
        time, row = n / len(seen), int(n % rows)
        sure = 0.5 + 0.49 * min(1.0, 3 * time) * rng.uniform(0.8, 1)  # the right label's probability
        p = 1 - sure if row in flipped else sure
        entropy = -sum(q * np.log(q) for q in (sure, 1 - sure))
        record["step"], record["row"], record["learnt"] = n // 8, row, True
        record["place"] = [5, 6, *[-1] * (PLACES - 2)]
        record["surprise"][:2] = rng.exponential(4.0), -np.log(p)
        record["entropy"][:2] = 4.0, entropy
    return seen


def test_a_wrong_label_stands_out_and_an_unknowable_name_does_not() -> None:
    flipped = frozenset(range(0, 200, 10))
    counted = dict.fromkeys(range(200), frozenset({6}))
    found = signs(a_training(flipped), counted)
    order = sorted(found, key=lambda row: -found[row].score)
    assert set(order[: len(flipped)]) == flipped
    assert min(found[row].score for row in flipped) > 2 > 1 > max(found[row].score for row in found if row not in flipped)
    assert len(found[0].probabilities) == 3
    assert found[0].probabilities[-1] < 0.3 < found[1].probabilities[-1]
    with_names = signs(a_training(flipped), dict.fromkeys(range(200), frozenset({5, 6})))
    first = sorted(with_names, key=lambda row: -with_names[row].score)[: len(flipped)]
    assert len(flipped & set(first)) > len(flipped) / 4  # beside a name it stands out less, and still more than by chance


def test_where_nothing_is_wrong_nothing_stands_out() -> None:
    found = signs(a_training(frozenset()), dict.fromkeys(range(200), frozenset({6})))
    assert max(sign.score for sign in found.values()) < 1
    assert signs(a_training(frozenset()), {}) == {}
    assert signs(read_seen(Path("nowhere")), {1: frozenset({6})}) == {}

"""Training computes the right gradients, keeps the best checkpoint, and resumes to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit import data, hf, merge
from ftkit.data import IGNORED, Example, Row
from ftkit.errors import InterruptedRunError, TrainingDivergedError
from ftkit.memory.inventory import Skeleton
from ftkit.memory.later import checkpoint_bytes
from ftkit.progress import Bar, SilentReporter
from ftkit.train import Point, build_trainer, read_curve, train

pytestmark = [
    pytest.mark.torch,
    # PyTorch's and the libraries' own deprecations, which are theirs to mend; any other warning fails the test.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return hf.load_tokenizer(model)


@pytest.fixture
def examples(tokenizer: Any, rows: list[dict[str, Any]]) -> list[Example]:
    return [data.tokenise(tokenizer, Row(tuple(row["messages"]), n)) for n, row in enumerate(rows, 1)]


def gradients(trainer: Any, examples: list[Example]) -> dict[str, Any]:
    """Gradients of one batch, by parameter."""
    batch = trainer.data_collator([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def fill_adapter(trainer: Any) -> None:
    """Give both adapter matrices values: LoRA's B begins at zero, which would make every gradient of A zero."""
    import torch

    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05


def test_qlora_gradients_equal_those_of_the_dequantised_base(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    import torch

    quantised = build_trainer(tiny.recipe(model, method="qlora"), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path / "q")
    plain = build_trainer(tiny.recipe(model, method="lora"), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path / "l")
    with torch.no_grad():
        for module in plain.model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.weight.copy_(merge._through_nf4(module.base_layer.weight, torch.float32))
    fill_adapter(quantised)
    fill_adapter(plain)
    wanted, found = gradients(plain, examples[:4]), gradients(quantised, examples[:4])
    assert wanted.keys() == found.keys()
    assert len(wanted) == 2 * 7 * 2  # A and B of seven projections in two layers
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_evaluation_does_not_change_the_gradients(
    checkpointing: bool, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    """bitsandbytes 0.50 repacks 4-bit layers in eval mode on some CPUs, and then gives no gradient."""
    from dataclasses import replace

    import bitsandbytes
    import torch

    settings = replace(tiny.SETTINGS, gradient_checkpointing=checkpointing)
    trainer = build_trainer(tiny.recipe(model, method="qlora"), settings, model, tokenizer, examples, examples, tmp_path)
    fill_adapter(trainer)
    before = gradients(trainer, examples[:4])
    trainer.evaluate()
    after = gradients(trainer, examples[:4])
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
    layers = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7 * 2
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # what switches the repacking off, on any CPU


def test_scoring_answers_only_gives_the_same_loss_and_gradients(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from trl.trainer import utils

    original = utils._use_triton
    trainer = build_trainer(tiny.recipe(model, method="lora"), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path)
    fill_adapter(trainer)
    assert any(label == IGNORED for label in examples[0].labels)
    compact = gradients(trainer, examples[:4])
    monkeypatch.setattr(utils, "_use_triton", original)
    everything = gradients(trainer, examples[:4])
    for name, gradient in everything.items():
        torch.testing.assert_close(compact[name], gradient, rtol=1e-4, atol=1e-7)


def test_accumulation_equals_the_large_batch(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    """Rows of different lengths: only a loss normalised over all tokens of the step gives equal updates."""
    from dataclasses import replace

    import torch

    adapters = []
    for batch, accumulation in ((4, 1), (1, 4)):
        folder = tmp_path / f"{batch}"
        folder.mkdir()
        settings = replace(tiny.SETTINGS, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        recipe = tiny.recipe(model, method="lora", effective_batch_size=4, max_steps=1)
        train(recipe, settings, model, tokenizer, examples[:4], examples[:2], folder)
        adapters.append(load(folder))
    for name in adapters[0]:
        torch.testing.assert_close(adapters[0][name], adapters[1][name], rtol=1e-3, atol=1e-6)


def load(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


class StopAt(SilentReporter):
    """Presses Ctrl-C after so many steps."""

    def __init__(self, step: int) -> None:
        self.stop_step = step

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        stop_step = self.stop_step

        class _Bar:
            def update(self, done: float, **fields: str) -> None:
                if done == stop_step:
                    raise KeyboardInterrupt

        yield _Bar()


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_an_interrupted_training_resumes_to_the_same_bits(
    method: str, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    recipe = tiny.recipe(model, method=method)
    weights = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    whole = train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folders[0])
    with pytest.raises(InterruptedRunError) as stopped:
        train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folders[1], StopAt(3))
    assert stopped.value.exit_code == 130
    checkpoint = folders[1] / "checkpoints" / "checkpoint-2"
    kept = sum((checkpoint / name).stat().st_size for name in (Path(file).name for file in ("optimizer.pt", weights)))
    planned = checkpoint_bytes(Skeleton(tiny.config()).count(recipe.training.method, recipe.lora, "adamw_torch", "float32"))
    assert planned < kept < planned + 30_000  # names and shapes
    half_written = checkpoint.with_name("checkpoint-3")  # as a kill in the middle of saving leaves it
    half_written.mkdir()
    resumed = train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folders[1])
    assert (whole.resumed_from_step, resumed.resumed_from_step) == (0, 2)
    assert (whole.steps, resumed.steps) == (4, 4)
    first, second = (load_file(folder / weights) for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (folders[0] / "checkpoints").exists()


def test_loss_falls_and_the_best_checkpoint_is_kept(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(model, method="qlora", max_steps=20, learning_rate=5e-3)
    result = train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path)
    losses = [point.validation_loss for point in result.curve if point.validation_loss is not None]
    assert result.best_validation_loss == min(losses) < losses[0]
    assert result.trained_tokens > 0
    assert (tmp_path / "curve.json").exists()
    assert capsys.readouterr().out == ""  # stdout is for results


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([2.0, 1.0, 1.5], "overfitting"),
        ([2.0, 1.99, 1.99], "hardly moved"),
        ([2.0, 1.5, 1.0], "still falling"),
        ([2.0, 1.0, 0.995], "levelled"),
        ([2.0, 1.0, None], "diverged: at step 2"),
        ([None, None], "diverged: at step 0"),
    ],
)
def test_curves_are_read_in_words(losses: list[float | None], words: str) -> None:
    assert words in read_curve([Point(step=n, epoch=n, validation_loss=loss) for n, loss in enumerate(losses)])


def test_a_training_that_diverges_is_an_error(tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny.make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: weight * torch.nan for name, weight in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny.recipe(model, method="lora")
    with pytest.raises(TrainingDivergedError) as refused:
        train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path)
    assert "training.learning_rate=0.0001" in str(refused.value.hint)

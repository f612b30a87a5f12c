"""Training computes the right gradients, keeps the best checkpoint, and resumes to the same bits."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from conftest import conversations

from ftkit import patches
from ftkit.data.lengths import batching, grouped_batch_tokens
from ftkit.data.mask import tokenise
from ftkit.data.rows import IGNORED, Example, Row
from ftkit.engines import hf
from ftkit.errors import InterruptedRunError, RunError, ToolFailedError, ToolMissingError, TrainingDivergedError
from ftkit.files import file_fingerprint
from ftkit.memory.model import Skeleton
from ftkit.model.four_bits import through_nf4
from ftkit.model.rounding import is_rounding
from ftkit.plan.cost import checkpoint_bytes
from ftkit.progress import Bar, SilentReporter
from ftkit.run import RECORD, Run
from ftkit.train.arguments import Settings
from ftkit.train.dynamics import SEEN
from ftkit.train.metrics import METRICS, read_metrics
from ftkit.train.trainer import build_trainer
from ftkit.train.training import train

pytestmark = [
    pytest.mark.torch,
    # PyTorch's and the libraries' own deprecations, which are theirs to mend; any other warning fails the test.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture
def examples(tokenizer: Any, rows: list[dict[str, Any]]) -> list[Example]:
    return list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(rows, 1)]))


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


@pytest.mark.parametrize("name", ["_load_best_model", "_get_train_sampler"])
def test_a_trainer_without_what_training_uses_is_refused_before_the_model_is_loaded(
    name: str, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.delattr(transformers.Trainer, name)
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ToolFailedError, match=rf"has no transformers.trainer.Trainer.{name} any more"):
        build_trainer(tiny.recipe(nowhere), tiny.SETTINGS, nowhere, tokenizer, examples, examples, tmp_path)


def test_no_optimizer_keeps_the_embedding_of_a_model_that_is_gone(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    from bitsandbytes.optim import GlobalOptimManager

    recipe = tiny.recipe(model, optim="adamw_8bit", max_steps=1)
    train(recipe, tiny.SETTINGS, model, tokenizer, examples, examples[:2], tmp_path)
    assert not GlobalOptimManager.get_instance().module_weight_config_triple


def test_of_several_gpus_one_process_takes_the_first(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take both, by DataParallel, which TRL refuses."""
    import torch
    from transformers import TrainingArguments

    found = vars(TrainingArguments)["_setup_devices"]

    def two(arguments: Any) -> torch.device:
        device: torch.device = found.func(arguments)
        arguments._n_gpu = 2
        return device

    once = cached_property(two)
    once.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", once)
    trainer = build_trainer(tiny.recipe(model), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path)
    assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_qlora_gradients_equal_those_of_the_dequantised_base(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    import torch

    quantised = build_trainer(tiny.recipe(model, method="qlora"), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path / "q")
    plain = build_trainer(tiny.recipe(model, method="lora"), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path / "l")
    with torch.no_grad():
        for module in plain.model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.weight.copy_(through_nf4(module.base_layer.weight))
    fill_adapter(quantised)
    fill_adapter(plain)
    wanted, found = gradients(plain, examples[:4]), gradients(quantised, examples[:4])
    assert wanted.keys() == found.keys()
    assert len(wanted) == 2 * 7 * 2  # A and B of seven projections in two layers
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert found[name].dtype == torch.float32


def test_the_attention_that_the_recipe_asks_for_is_trained_with(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    found = {}
    for attention in (None, "eager"):
        recipe = tiny.recipe(model, method="lora", attention=attention)
        trainer = build_trainer(recipe, tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path)
        fill_adapter(trainer)
        found[trainer.model.config._attn_implementation] = gradients(trainer, examples[:4])
    assert found.keys() == {"sdpa", "eager"}
    for name, gradient in found["sdpa"].items():
        assert float((found["eager"][name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
    with pytest.raises(ToolMissingError, match="flash_attention_2 needs a GPU") as refused:
        hf.refuse_missing_attention("flash_attention_2", cuda=False)
    assert "leave it out" in str(refused.value.hint)
    with pytest.raises(ToolMissingError, match="needs the package flash-attn"):
        hf.refuse_missing_attention("flash_attention_2", cuda=True)
    hf.refuse_missing_attention("eager", cuda=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_evaluation_does_not_change_the_gradients(
    checkpointing: bool, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes 0.50 repacks 4-bit layers in eval mode on some CPUs, and then gives no gradient."""
    from dataclasses import replace

    import bitsandbytes
    import torch

    settings = replace(tiny.SETTINGS, gradient_checkpointing=checkpointing)
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)  # as on such a CPU
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

    trainer = build_trainer(tiny.recipe(model, method="lora"), tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path)
    fill_adapter(trainer)
    assert any(label == IGNORED for label in examples[0].labels)
    seen: list[bool] = []
    original = utils._use_triton
    monkeypatch.setattr(utils, "_use_triton", lambda device: seen.append(False) or original(device))
    everything = gradients(trainer, examples[:4])
    assert seen  # TRL asks it
    with patches.applied("training"):
        compact = gradients(trainer, examples[:4])
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


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("lora", "adamw_torch"),
        ("qlora", "adamw_torch"),
        ("full", "adamw_torch"),
        ("full", "adafactor"),
        pytest.param("lora", "adafactor", marks=pytest.mark.slow),
        pytest.param("qlora", "adafactor", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_training_resumes_to_the_same_bits(
    method: str, optim: str, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    recipe = tiny.recipe(model, method=method, optim=optim)
    often = tiny.recipe(model, method=method, optim=optim, save_minutes=1e-6)  # between evaluations too
    weights = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    whole = train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folders[0])
    with pytest.raises(InterruptedRunError) as stopped:
        train(often, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folders[1], StopAt(4))
    assert stopped.value.exit_code == 130
    checkpoint = folders[1] / "checkpoints" / "checkpoint-2"
    kept = sum((checkpoint / name).stat().st_size for name in (Path(file).name for file in ("optimizer.pt", weights)))
    planned = checkpoint_bytes(Skeleton(tiny.config()).count(recipe.training.method, recipe.lora, optim, "float32"))
    assert planned < kept < planned + 30_000  # names and shapes
    half_written = checkpoint.with_name("checkpoint-4")  # as a kill in the middle of saving leaves it
    half_written.mkdir()
    resumed = train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folders[1])
    assert (whole.resumed_from_step, resumed.resumed_from_step) == (0, 3)
    assert (whole.steps, resumed.steps) == (4, 4)
    first, second = (load_file(folder / weights) for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole.trained_tokens, whole.best_step) == (resumed.trained_tokens, resumed.best_step)


class Signals(SilentReporter):
    """Sends these signals in the middle of a step, and stands in their way where they would hit the test."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        step, numbers = self.step, self.numbers

        class _Bar:
            def update(self, done: float, **fields: str) -> None:
                if done == step:
                    for number in numbers:
                        signal.raise_signal(number)

        yield _Bar()


@pytest.fixture
def listens() -> Iterator[None]:
    """Where the tests were started in the background, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def unstopped(model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the adapter that four steps give without a stop."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unstopped")
    rows = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))
    train(tiny.recipe(model, method="lora"), tiny.SETTINGS, model, tokenizer, rows[2:], rows[:2], folder)
    return adapter_hash(folder)


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=["ctrl-c", "term", "twice"])
def test_ctrl_c_saves_a_checkpoint_and_tells_where_the_next_call_goes_on(
    numbers: tuple[int, ...], model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, listens: None, unstopped: str
) -> None:
    recipe = tiny.recipe(model, method="lora")
    handlers = [signal.getsignal(number) for number in numbers]
    reporter = Signals(3, *numbers)
    with pytest.raises(InterruptedRunError) as stopped:
        train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path, reporter)
    reached = 2 if len(numbers) == 2 else 3  # evaluated, and so saved, at 2 and 4
    assert stopped.value.exit_code == 130
    assert stopped.value.hint == f"the same command goes on from step {reached}"
    assert any("Ctrl-C once more" in text for text in reporter.said)
    assert [signal.getsignal(number) for number in numbers] == handlers
    again = train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path)
    assert again.resumed_from_step == reached
    assert adapter_hash(tmp_path) == unstopped


@pytest.mark.parametrize("step", [pytest.param(7, marks=pytest.mark.slow), 10])
def test_a_training_resumed_in_a_later_epoch_sees_the_same_rows(
    step: int, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    """Five steps in an epoch: in the middle of the second, and at its end."""
    import torch

    torch.set_num_threads(1)
    recipe = tiny.recipe(model, method="lora", max_steps=11, save_minutes=1e-6, early_stopping_patience=9)
    arguments = (recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2])
    whole = train(*arguments, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        train(*arguments, tmp_path / "stopped", StopAt(step + 1))
    resumed = train(*arguments, tmp_path / "stopped")
    assert resumed.resumed_from_step == step
    assert resumed.curve == whole.curve
    told = read_metrics(tmp_path / "stopped")
    assert [line.point for line in told] == whole.curve  # none twice, none missing
    by_epoch = sum(row.tokens for row in examples[2:]), sum(row.learnt for row in examples[2:])
    counted = {line.step: (line.tokens, line.learnt_tokens) for line in told}
    assert counted[5] == by_epoch  # the rows of an epoch are as long as they are, and not of mean length at any step
    assert counted[10] == tuple(2 * tokens for tokens in by_epoch)
    assert counted == {line.step: (line.tokens, line.learnt_tokens) for line in read_metrics(tmp_path / "whole")}
    assert resumed.trained_tokens == whole.trained_tokens == told[-1].tokens
    assert 5 * counted[1][0] != by_epoch[0]
    assert [line.seconds for line in told] == sorted(line.seconds for line in told)
    assert adapter_hash(tmp_path / "stopped") == adapter_hash(tmp_path / "whole")


def test_an_ignored_ctrl_c_stays_ignored(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, listens: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recipe = tiny.recipe(model, method="lora", max_steps=2)
    assert train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path, Signals(1, signal.SIGINT)).steps == 2


def adapter_hash(folder: Path) -> str:
    return file_fingerprint(folder / "adapter" / "adapter_model.safetensors")


def worse(tokenizer: Any) -> list[Example]:
    """Validation rows whose loss rises while `examples` are learnt."""
    question, answer = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "QXZ#~"}
    return list(tokenise(tokenizer, [Row((question, answer), n) for n in (1, 2)]))  # type: ignore[arg-type]


RISES = {"lora": 1e-2, "full": 1e-2}  # learning rates by which it does, from the first evaluation on


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_moved_training_ends_with_the_weights_of_its_best_step(
    method: str, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint after each step: none takes the place of the best. Resumed from another folder, by a relative path."""
    import torch
    from safetensors.torch import load_file

    validation = worse(tokenizer)
    recipe = tiny.recipe(
        model, method=method, max_steps=6, learning_rate=RISES[method], lr_scheduler_type="constant", warmup_share=0, save_minutes=1e-6
    )
    folder = tmp_path / "here" / "run"
    folder.mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InterruptedRunError):
        train(recipe, tiny.SETTINGS, model, tokenizer, examples, validation, Path("run"), StopAt(6))
    assert sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    best = tmp_path / "best"
    shutil.copytree(folder / "checkpoints" / "checkpoint-2", best)
    folder.rename(tmp_path / "there" / "moved")
    monkeypatch.chdir(tmp_path)
    moved = Path("there", "moved")
    result = train(recipe, tiny.SETTINGS, model, tokenizer, examples, validation, moved)
    losses = {point.step: point.validation_loss for point in result.curve if point.evaluated}
    assert (result.resumed_from_step, result.best_step) == (5, 2)
    assert result.best_validation_loss == losses[2] == min(loss for loss in losses.values() if loss)
    if method == "lora":
        assert file_fingerprint(best / "adapter_model.safetensors") == adapter_hash(moved)
    else:
        wanted, saved = load_file(best / "model.safetensors"), load_file(moved / "model" / "model.safetensors")
        assert wanted.keys() == saved.keys()
        assert all(saved[name].dtype == torch.bfloat16 and is_rounding(saved[name], tensor) for name, tensor in wanted.items())


def test_a_gentle_training_of_all_weights_is_not_rounded_away(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    """Each changes by less than half a step of bfloat16, in which the model is written."""
    from safetensors.torch import load_file

    recipe = tiny.recipe(model, method="full", learning_rate=2e-6)
    train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path)
    checkpoint = max((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    before, trained, saved = (load_file(folder / "model.safetensors") for folder in (model, checkpoint, tmp_path / "model"))
    changes = {name: trained[name].float() - tensor.float() for name, tensor in before.items()}
    along = sum(float(((saved[name].float() - before[name].float()) * change).sum()) for name, change in changes.items())
    assert along == pytest.approx(sum(float((change * change).sum()) for change in changes.values()), rel=0.2)
    moved = sum(int((saved[name] != tensor).sum()) for name, tensor in before.items())
    assert 0 < moved < 0.3 * sum(tensor.numel() for tensor in before.values())


def test_a_best_checkpoint_that_is_gone_is_told(model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    said: list[str] = []
    reporter = SilentReporter()
    reporter.warn = said.append  # type: ignore[method-assign]
    validation = worse(tokenizer)
    recipe = tiny.recipe(model, method="lora", max_steps=6, learning_rate=1e-2, lr_scheduler_type="constant", warmup_share=0)
    with pytest.raises(InterruptedRunError):
        train(recipe, tiny.SETTINGS, model, tokenizer, examples, validation, tmp_path, StopAt(5))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-2")
    result = train(recipe, tiny.SETTINGS, model, tokenizer, examples, validation, tmp_path, reporter)
    losses = {point.step: point.validation_loss or 0.0 for point in result.curve if point.evaluated}
    best = min((4, 6), key=lambda step: losses[step])
    assert losses[2] < losses[best] == result.best_validation_loss
    assert result.best_step == best
    assert file_fingerprint(tmp_path / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors") == adapter_hash(tmp_path)
    assert len(said) == 1
    assert "of step 2, is gone" in said[0]


def test_other_weights_than_the_best_are_refused(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: None)  # as it does where it finds no checkpoint
    recipe = tiny.recipe(model, method="lora", learning_rate=1e-2, lr_scheduler_type="constant", warmup_share=0)
    with pytest.raises(RunError, match=r"does not hold the weights of .*checkpoint-2"):
        train(recipe, tiny.SETTINGS, model, tokenizer, examples, worse(tokenizer), tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("fails", ["points", "_refuse_other_weights", "read_curve"])
def test_a_failure_after_the_last_step_loses_nothing(
    fails: str, model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, between and after saving the weights; the next call finds the run in another place.

    Four steps of the five in an epoch: the trainer alone would go on to a fifth, or forget where the best lay.
    """
    recipe = tiny.recipe(model, method="lora", learning_rate=1e-2)
    folder, moved = tmp_path / "run", tmp_path / "moved"
    folder.mkdir()
    arguments = (recipe, tiny.SETTINGS, model, tokenizer, examples[2:], worse(tokenizer))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(f"ftkit.train.training.{fails}", fail)
        with pytest.raises(OSError, match="no luck"):
            train(*arguments, folder)
    folder.rename(moved)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.Trainer.train", fail)
        result = train(*arguments, moved)
    assert (result.steps, result.best_step) == (4, 2)
    assert adapter_hash(moved) == file_fingerprint(moved / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert result.seconds > 0
    assert result.tokens_per_second
    assert [point.step for point in result.curve if not point.evaluated] == [1, 2, 3, 4]


def test_a_disk_that_is_full_at_a_checkpoint(
    model: Path, tokenizer: Any, examples: list[Example], tmp_path: Path, small_files: Any
) -> None:
    recipe = tiny.recipe(model, method="lora", max_steps=6)

    class Fills(SilentReporter):
        @contextmanager
        def bar(self, label: str, total: float) -> Iterator[Bar]:
            with ExitStack() as stack:

                class _Bar:
                    def update(self, done: float, **fields: str) -> None:
                        if done == 3:
                            stack.enter_context(small_files(20_000))

                yield _Bar()

    def make(reporter: SilentReporter) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], folder, reporter).record()

    with Run(tmp_path) as run:
        with pytest.raises(RunError, match=r"`train` cannot write to .*too large") as refused:
            run.ensure("train", 1, make(Fills()), resumable=True, keep=True)
        assert "free some space" in str(refused.value.hint)
        assert [path.name for path in tmp_path.glob(".train-*/checkpoints/checkpoint-*")] == ["checkpoint-2"]
        step = run.ensure("train", 1, make(SilentReporter()), resumable=True, keep=True)
    assert step.result["resumed_from_step"] == 2
    assert not (step.folder / "checkpoints").exists()


@pytest.mark.slow
def test_what_cannot_be_kept_of_a_training_does_not_fail_it(
    tmp_path: Path, rows: list[Any], write_rows: Any, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private folder that cannot be written. And how often a checkpoint is written is no reason to train again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTKIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    tiny.make_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\ntraining: {method: lora, max_steps: 2, effective_batch_size: 2, max_length: 128}\nlora: {r: 4}\n", encoding="utf-8"
    )
    done = ftkit("train", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    assert "the speed of this training is not kept" in done.stderr
    assert "FTKIT_CACHE_DIR" not in done.stdout
    folder = Path(json.loads(done.stdout)["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "curve.json", METRICS, SEEN, RECORD]
    again = ftkit("train", tmp_path, "--set", "training.save_minutes=1")
    assert "Up to date" in again.stdout


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


def test_a_model_that_is_no_numbers_is_an_error(tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny.make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: weight * torch.nan for name, weight in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny.recipe(model, method="lora")
    with pytest.raises(TrainingDivergedError, match="cannot begin: the training loss is no number") as refused:
        train(recipe, tiny.SETTINGS, model, tokenizer, examples[2:], examples[:2], tmp_path)
    assert re.search(r"and \S+\.weight of the model holds what is no number", refused.value.message)
    assert refused.value.hint == "no rate helps: fetch or copy the model again, whole"  # and not at the rows, which are as they should be


def test_padding_is_what_the_trainer_pads(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Micro-batches of the first epoch from the trainer's own loader, in its own order, at each batch × accumulation, and by tokens.

    Each optimizer step has the same rows."""
    lengths = [5 + 37 * n % 118 for n in range(203)]
    examples = [Example([1] * length, [1] * length) for length in lengths]
    seen = {}
    steps = []
    for batch, accumulation, max_tokens in ((1, 8, None), (2, 4, None), (8, 1, None), (1, 8, 150)):
        settings = Settings(
            batch,
            accumulation,
            gradient_checkpointing=False,
            dtype="float32",
            cuda=False,
            longest_tokens=max_tokens,
            most_learnt_tokens=150,
        )
        recipe = tiny.recipe(model, method="lora", effective_batch_size=8, seed=7)
        trainer = build_trainer(recipe, settings, model, tokenizer, examples, examples[:1], tmp_path)
        given = list(trainer.get_train_dataloader())
        real = [part["input_ids"].numel() for step in given for part, _ in trainer.micro_batches(step)]
        assert grouped_batch_tokens(lengths, batch, batch * accumulation, 7, max_tokens) == real
        seen[max_tokens or batch] = sum(real)
        steps.append([step["attention_mask"].sum(1).tolist() for step in given])
    assert seen[1] == sum(lengths) < seen[2] < seen[8]
    assert seen[1] < seen[150] < seen[8]
    assert all(other == steps[0] for other in steps)
    assert batching(lengths, 2, 8, 128, 7).grouped_tokens == seen[2]
    assert batching(lengths, 1, 8, 128, 7, 150).grouped_tokens == seen[150]

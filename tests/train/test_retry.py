"""Where memory runs out, or training diverges, it goes on: smaller at the same effective batch, or at half the rate, once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.data.lengths import RIDGE_TOKENS
from ftkit.data.rows import Example, Pair
from ftkit.engines import hf
from ftkit.errors import DoesNotFitError, InterruptedRunError, TrainingDivergedError
from ftkit.files import file_fingerprint
from ftkit.machine.device import held_bytes
from ftkit.progress import SILENT, Bar, Reporter, SilentReporter
from ftkit.train.arguments import Settings
from ftkit.train.retry import RETRIES, Retry, read_retries, settings_of, smaller
from ftkit.train.training import TrainResult, train

pytestmark = pytest.mark.torch


def settings(batch: int, accumulation: int) -> Settings:
    return replace(tiny.SETTINGS, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)


class Memory:
    """Of a device on which so many rows at once fit, from a number of passes on."""

    def __init__(self, rows: int, passes: int = 0, training: bool = True) -> None:
        self.rows, self.passes, self.training = rows, passes, training
        self.seen: list[int] = []  # rows of each pass of training that fitted

    def __call__(self, module: Any, arguments: Any, options: dict[str, Any]) -> None:
        import torch

        if type(module).__name__ != "LlamaForCausalLM":
            return
        rows = len(options["input_ids"])  # sequences: of a preference two
        if module.training == self.training and rows > self.rows and len(self.seen) >= self.passes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows}.50 MiB. GPU 0 has a total capacity of …")
        if module.training:
            self.seen.append(rows)


@contextmanager
def bounded(memory: Memory) -> Iterator[Memory]:
    from torch.nn.modules import module

    class Hooked:
        def __init__(self) -> None:
            self.call = module.Module.__call__

        def __enter__(self) -> None:
            call = self.call

            def checked(this: Any, *arguments: Any, **options: Any) -> Any:
                memory(this, arguments, options)
                return call(this, *arguments, **options)

            module.Module.__call__ = checked  # type: ignore[method-assign]

        def __exit__(self, *_: object) -> None:
            module.Module.__call__ = self.call  # type: ignore[method-assign]

    with Hooked():
        yield memory


class Says(SilentReporter):
    """Keeps what is said, and presses Ctrl-C in the bar after so many steps, once."""

    def __init__(self, stop_step: int | None = None) -> None:
        self.stop_step = stop_step
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        reporter = self

        class _Bar:
            def update(self, done: float, **fields: str) -> None:
                if done == reporter.stop_step and any("diverged" in text for text in reporter.said):
                    raise KeyboardInterrupt

        yield _Bar()


Trains = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def trains(model: Path, tokenizer: Any, examples: list[Example], pairs: list[Pair]) -> Trains:
    import torch

    torch.set_num_threads(1)

    def run(folder: Path, batches: Settings, reporter: Reporter = SILENT, missed: Any = None, **training: Any) -> TrainResult:
        folder.mkdir(exist_ok=True)
        options = {"effective_batch_size": batches.per_device_train_batch_size * batches.gradient_accumulation_steps, "method": "lora"}
        recipe = tiny.recipe(model, **{**options, **training})
        told, rows = {"missed": missed} if missed else {}, examples if recipe.training.objective == "sft" else pairs
        return train(recipe, batches, model, tokenizer, rows[2:], rows[:2], folder, reporter, **told)

    return run


def adapter(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def whole(trains: Trains, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, dict[str, Any]]:
    """Of a training that memory is enough for: what it records, and its adapter. An epoch ends with a step of two rows."""
    folder = tmp_path_factory.mktemp("whole")
    return trains(folder, settings(8, 1), max_steps=5), adapter(folder)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3])  # of eight rows, and of two
def test_out_of_memory_ends_right_with_the_effective_batch_kept(
    step: int, trains: Trains, whole: tuple[TrainResult, dict[str, Any]], tmp_path: Path
) -> None:
    import torch

    undisturbed, learnt = whole
    reporter, misses = Says(), []
    with bounded(Memory(1, passes=step)) as memory:
        result = trains(
            tmp_path / "short", settings(8, 1), reporter, lambda now, short: misses.append((now, short)), max_steps=5,
            gradient_checkpointing=False,
        )  # fmt: skip
    sizes = [(retry.step, retry.per_device_train_batch_size, retry.gradient_accumulation_steps) for retry in result.retries]
    assert sizes == [(step, 4, 2), (step, 2, 4), (step, 1, 8)]
    assert [retry.from_step for retry in result.retries] == [step] * 3  # the step itself, evaluated or not
    assert (tmp_path / "short" / RETRIES).exists()
    assert memory.seen[:step] == [8, 2, 8, 2, 8][:step]
    assert memory.seen[step:] == [1] * sum(8 if n % 2 == 0 else 2 for n in range(step, 5))
    assert (result.steps, result.resumed_from_step) == (undisturbed.steps, 0)
    tried = [8, 4, 2] if step % 2 == 0 else [2, 2, 2]  # rows at once, each refused with half a MiB more than it has rows
    assert [short.requested_bytes for _, short in misses] == [(2 * rows + 1) << 19 for rows in tried]
    assert [now.per_device_train_batch_size for now, _ in misses] == [8, 4, 2]
    assert misses[0][1].held_bytes > 0
    assert sum("the effective batch stays 8" in text for text in reporter.said) == 3
    for name, tensor in learnt.items():
        torch.testing.assert_close(adapter(tmp_path / "short")[name], tensor, rtol=1e-2, atol=1e-5)


@pytest.mark.slow
def test_out_of_memory_with_preferences_keeps_the_effective_batch_too(trains: Trains, tmp_path: Path) -> None:
    """Ten pairs, eight a step: what is left of an epoch is a step of two."""
    import torch

    options = {"objective": "dpo", "max_steps": 4, "gradient_checkpointing": False}
    whole = trains(tmp_path / "whole", settings(8, 1), **options)
    with bounded(Memory(6, passes=1)) as memory:
        result = trains(tmp_path / "short", settings(8, 1), **options)
    assert [(retry.step, retry.from_step, retry.per_device_train_batch_size) for retry in result.retries] == [(2, 2, 4), (2, 2, 2)]
    assert memory.seen == [16, 4, 4, 4, 4, 4, 4]
    assert (result.steps, result.resumed_from_step) == (whole.steps, 0)
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "short")[name], tensor, rtol=1e-2, atol=1e-5)


@pytest.mark.slow
def test_out_of_memory_while_the_reference_is_asked_asks_fewer_rows_at_once(trains: Trains, tmp_path: Path) -> None:
    """And then, with so little memory, in the evaluation, too, which goes on likewise."""
    with bounded(Memory(2, training=False)) as memory:
        result = trains(tmp_path, settings(2, 1), objective="dpo", max_steps=2)
    assert memory.seen == [4, 4, 2, 2, 2, 2]
    assert [(retry.step, retry.per_device_train_batch_size) for retry in result.retries] == [(2, 1)]


@pytest.mark.slow
def test_out_of_memory_in_an_evaluation_goes_on_from_before_it(trains: Trains, tmp_path: Path) -> None:
    with bounded(Memory(1, training=False)):
        result = trains(tmp_path, settings(2, 1), max_steps=3)
    assert [(retry.step, retry.from_step, retry.per_device_train_batch_size) for retry in result.retries] == [(2, 0, 1)]
    assert not result.retries[0].gradient_checkpointing
    assert "in the evaluation after step 2" in result.retries[0].said
    assert [point.step for point in result.curve if point.evaluated] == [2, 3]


@pytest.mark.slow
def test_out_of_memory_in_the_optimizer_leaves_weights_that_are_not_kept(trains: Trains, tmp_path: Path) -> None:
    """They may have been changed in part: it begins again, or from the last checkpoint."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = register_optimizer_step_pre_hook(hook)
    try:
        result = trains(tmp_path, settings(2, 1), max_steps=3, evaluations_per_epoch=1, gradient_checkpointing=False)
    finally:
        handle.remove()
    assert [(retry.step, retry.from_step) for retry in result.retries] == [(1, 0)]
    assert len(calls) == 2 + 3


@pytest.mark.slow
def test_one_row_that_does_not_fit_is_refused_with_what_to_change(trains: Trains, tmp_path: Path) -> None:
    with bounded(Memory(0)), pytest.raises(DoesNotFitError, match="One row at a time does not fit: memory ran out after step 0") as refused:
        trains(tmp_path, settings(2, 1), gradient_checkpointing=None)
    assert refused.value.exit_code == 3
    assert "training.method=qlora" in str(refused.value.hint)
    assert [(retry.per_device_train_batch_size, retry.gradient_checkpointing) for retry in read_retries(tmp_path)] == [(2, True), (1, True)]
    with bounded(Memory(0)), pytest.raises(DoesNotFitError) as again:  # nothing larger is tried again
        trains(tmp_path, settings(2, 1), gradient_checkpointing=None)
    assert again.value.message.startswith("One row at a time")
    assert len(read_retries(tmp_path)) == 2


def test_another_error_is_not_taken_for_memory(trains: Trains, tmp_path: Path) -> None:
    class Broken(Memory):
        def __call__(self, *_: Any) -> None:
            raise RuntimeError("shapes do not match")

    with bounded(Broken(0)), pytest.raises(RuntimeError, match="shapes do not match"):
        trains(tmp_path, settings(2, 1))


@pytest.mark.parametrize(
    ("batch", "accumulation", "tokens", "phase", "wanted"),
    [
        (8, 1, RIDGE_TOKENS, "step", (4, 2, False)),  # costs nothing
        (6, 1, RIDGE_TOKENS, "step", (3, 2, False)),
        (3, 2, RIDGE_TOKENS, "step", (1, 6, False)),  # two do not divide six by halves of three
        (5, 1, RIDGE_TOKENS, "step", (1, 5, False)),
        (2, 4, RIDGE_TOKENS / 2, "step", (2, 4, True)),  # half of it would leave the card waiting
        (2, 4, RIDGE_TOKENS / 2, "evaluation", (1, 8, False)),  # which keeps no activations
        (1, 8, RIDGE_TOKENS, "step", (1, 8, True)),
        (1, 8, RIDGE_TOKENS, "evaluation", None),
    ],
)
def test_the_cheapest_that_surely_helps(batch: int, accumulation: int, tokens: float, phase: Any, wanted: Any) -> None:
    found = smaller(settings(batch, accumulation), tiny.recipe(Path()), tokens, phase)
    chosen = found and (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.gradient_checkpointing)
    assert chosen == wanted


def test_several_processes_train_on_shares_and_evaluate_all_rows_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    recipe = tiny.recipe(Path(), gradient_checkpointing=False)
    sizes = {}
    for phase in ("step", "evaluation"):
        found = smaller(settings(8, 1), recipe, RIDGE_TOKENS, phase)
        sizes[phase] = found.per_device_train_batch_size if found else None
    assert sizes == {"step": 2, "evaluation": 4}
    less = smaller(settings(2, 1), recipe, RIDGE_TOKENS, "evaluation")
    assert (less and less.per_device_train_batch_size, smaller(settings(2, 1), recipe, RIDGE_TOKENS, "step")) == (1, None)


def test_what_was_enough_counts_on_the_same_device_alone() -> None:
    retry = Retry("out of memory", 3, 3, "a card", 2, 4, False, 1e-4, "")
    assert settings_of(settings(8, 1), [retry], "a card") == settings(2, 4)
    assert settings_of(settings(8, 1), [retry], "a larger card") == settings(8, 1)
    assert settings_of(settings(1, 8), [retry], "a card") == settings(1, 8)


@pytest.mark.slow
def test_the_command_tells_that_memory_ran_out_and_keeps_it_for_the_next_plan(
    small_project: Path, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    """And a training that went on smaller is gone on with, whatever a plan made since says."""
    (small_project / "recipe.yaml").write_text(
        "model: model\nlora: {r: 4}\ntraining: {method: lora, max_steps: 3, effective_batch_size: 4, per_device_train_batch_size: 4, "
        "max_length: 128, gradient_checkpointing: false}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("ftkit.line.train.TRAINING_BYTES", 0)  # what this process holds is more than a plan that leaves it out
    with bounded(Memory(2, passes=1)), monkeypatch.context() as patched:
        patched.setattr("ftkit.train.training._tensors", lambda folder: 1 / 0)  # fails after the last step
        with pytest.raises(ZeroDivisionError):
            ftkit("train", small_project)
    measured = json.loads((private_cache / "measured.json").read_text(encoding="utf-8"))
    [[subject, beyond_bytes]] = next(iter(measured.values()))["probes"].items()
    assert beyond_bytes > 0
    next(iter(measured.values()))["probes"][subject] = 1 << 50  # no plan fits any more
    (private_cache / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
    assert ftkit("plan", small_project, "--json").exit_code == 3
    with bounded(Memory(2)):
        done = ftkit("train", small_project)
    assert done.exit_code == 0, done.stderr
    assert "with 4 × 1 rows: the process held" in done.stdout
    assert "going on from step 1 with 2 × 2 rows, the effective batch stays 4." in done.stdout
    refused = ftkit("train", small_project, "--set", "training.seed=1")
    assert refused.exit_code == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the heap of another C library")
def test_a_heap_of_holes_is_given_back() -> None:
    hf.release_memory()  # which imports torch
    blocks = [bytearray(b"x") * (64 << 10) for _ in range(4000)]
    kept = blocks[::10]
    del blocks
    before = held_bytes()
    hf.release_memory()
    assert before - held_bytes() > 100 << 20
    assert len(kept) == 400


@pytest.mark.parametrize(("held_at_most", "times"), [(1, 1), (1 << 40, 0), (None, 0)])
def test_the_heap_is_given_back_where_twice_the_plan_is_held_and_not_at_each_step(
    held_at_most: int | None, times: int, trains: Trains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    monkeypatch.setattr("ftkit.train.watch.release_memory", lambda: called.append(hf.release_memory()))  # type: ignore[func-returns-value]
    trains(tmp_path, replace(settings(2, 1), held_at_most=held_at_most), max_steps=3)
    assert len(called) == times


@pytest.mark.slow
def test_what_a_cpu_s_process_held_beyond_its_plan_is_counted_in_the_next(
    small_project: Path, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_project / "recipe.yaml").write_text("model: model\ntraining: {method: lora, max_steps: 1, max_length: 128}\n", encoding="utf-8")
    before = ftkit("plan", small_project)
    assert "On a CPU the process may hold more" in before.stdout
    peak = json.loads(ftkit("plan", small_project, "--json").stdout)["chosen"]["peak"]
    monkeypatch.setattr("ftkit.train.watch.held_bytes", lambda: peak["device_bytes"] + (1 << 30))
    assert ftkit("train", small_project).exit_code == 0
    after = ftkit("plan", small_project, "--set", "training.seed=1")
    assert re.search(r"more, as measured with this model +1\.00 GiB", after.stdout)
    assert "On a CPU the process may hold more" not in after.stdout
    other = ftkit("plan", small_project, "--set", "training.method=full")
    assert "On a CPU the process may hold more" in other.stdout


@contextmanager
def blows_up(above: float, step: int) -> Iterator[None]:
    """An optimizer that leaves no number in the weights, from a step on, at a learning rate above this."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def hook(optimizer: Any, *_: Any) -> None:
        [first] = [group["params"][0] for group in optimizer.param_groups if group["params"]][:1]
        if optimizer.state[first]["step"] >= step and optimizer.param_groups[0]["lr"] > above:
            first.data.fill_(torch.nan)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


DIVERGES = {"max_steps": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_share": 0, "save_minutes": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize(("every", "bad_step", "what"), [(3, 4, "validation"), (1.67, 5, "training")])
def test_a_training_that_diverges_goes_on_from_before_it_at_half_the_rate_and_so_does_a_resumed_one(
    every: float, bad_step: int, what: str, trains: Trains, tmp_path: Path
) -> None:
    """The weights after step 4 are no numbers: an evaluation there says so, else the losses of the next two steps."""
    reporter = Says()
    options = {**DIVERGES, "evaluations_per_epoch": every}
    with blows_up(above=0.6e-3, step=4):
        whole = trains(tmp_path / "whole", settings(2, 1), reporter, **options)
        [retry] = whole.retries
        assert (retry.why, retry.step, retry.from_step, retry.learning_rate) == ("diverged", bad_step, 3, 0.5e-3)
        for stop_step in (retry.from_step + 1, 7):  # before a checkpoint holds the lower rate, and after
            folder = tmp_path / f"{stop_step}"
            with pytest.raises(InterruptedRunError):
                trains(folder, settings(2, 1), Says(stop_step), **options)
            again = trains(folder, settings(2, 1), **options)
            assert again.retries == [retry]
            assert again.curve == whole.curve
            assert adapter_hash(folder) == adapter_hash(tmp_path / "whole")
    rates = {point.step: point.learning_rate for point in whole.curve if not point.evaluated}
    assert rates == {step: 1e-3 if step <= retry.from_step else 0.5e-3 for step in range(1, 9)}
    assert any(f"the {what} loss is no number; going on from step 3 at half the rate" in text for text in reporter.said)


@pytest.mark.slow
def test_preferences_that_diverge_go_on_at_half_the_rate(trains: Trains, tmp_path: Path) -> None:
    with blows_up(above=0.6e-3, step=4):
        result = trains(tmp_path, settings(2, 1), objective="dpo", evaluations_per_epoch=3, **DIVERGES)
    assert [(retry.why, retry.from_step, retry.learning_rate) for retry in result.retries] == [("diverged", 3, 0.5e-3)]
    assert result.steps == 8
    assert result.best_reward_margin is not None


def adapter_hash(folder: Path) -> str:
    return file_fingerprint(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_training_that_diverges_twice_ends_with_the_figures(trains: Trains, tmp_path: Path) -> None:
    with blows_up(above=0.0, step=4), pytest.raises(TrainingDivergedError, match="diverged again at step 4") as refused:
        trains(tmp_path, settings(2, 1), **DIVERGES)
    assert "0.001" in refused.value.message
    assert "0.0005" in refused.value.message
    assert refused.value.hint == "--set training.learning_rate=0.0001"
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")]  # what was good stays

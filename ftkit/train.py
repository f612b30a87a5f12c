"""Supervised fine-tuning with TRL: watched, stopped early, resumable, its best checkpoint kept."""

from __future__ import annotations

import gc
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ftkit import hf
from ftkit.data import Example, refuse_nothing_to_learn
from ftkit.errors import InterruptedRunError, RunError, TrainingDivergedError
from ftkit.memory.inventory import lora_config
from ftkit.memory.trace import quantization_tensors
from ftkit.progress import SILENT, Bar, Reporter
from ftkit.recipe import Recipe
from ftkit.run import CHECKPOINTS, sync_files, write_atomically
from ftkit.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINER_STATE = "trainer_state.json"  # of a checkpoint; the trainer writes it last
WATCHED = "watched.json"  # beside it, and ftkit's own


@dataclass(frozen=True)
class Settings:
    """What the plan decided and the machine gives, beside the recipe."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    bfloat16: bool
    cuda: bool


@dataclass(frozen=True)
class Point:
    """One line of the curves; training points have a loss, validation points a validation loss."""

    step: int
    epoch: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None

    @property
    def evaluated(self) -> bool:
        """Whether it is a validation point. Its loss is None where it was no number."""
        return self.learning_rate is None


@dataclass(frozen=True)
class TrainResult:
    """What training recorded about itself."""

    steps: int
    best_step: int
    best_validation_loss: float
    first_validation_loss: float
    trained_tokens: int
    seconds: float  # of training and evaluating, all parts of an interrupted training together
    tokens_per_second: float | None  # None: not known of a training that an earlier ftkit began
    peak_bytes: int
    peak_is: str  # "allocated on the GPU" or "resident in RAM"
    resumed_from_step: int
    verdict: str
    curve: list[Point]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def build_trainer(
    recipe: Recipe,
    settings: Settings,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Example],
    validation: Sequence[Example],
    folder: Path,
    callbacks: Sequence[Any] = (),
) -> Any:
    """The SFTTrainer of this recipe. Rows are token ids and labels already, so nothing is rendered or masked again."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    refuse_nothing_to_learn(training, validation)
    hf.refuse_lost_gradients()
    _score_answers_only()
    method, t = recipe.training.method, recipe.training
    per_epoch = math.ceil(len(training) / (settings.per_device_train_batch_size * settings.gradient_accumulation_steps))
    steps = t.max_steps or math.ceil(per_epoch * t.num_train_epochs)
    evaluate_every = max(1, min(steps, round(per_epoch / t.evaluations_per_epoch)))
    config = SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        activation_checkpointing=settings.gradient_checkpointing,  # transformers 5.23 renamed it
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=round(steps * t.warmup_share),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_bnb_8bit" if t.optim == "adamw_8bit" else t.optim,
        seed=t.seed,
        data_seed=t.seed,
        bf16=settings.bfloat16,
        use_cpu=not settings.cuda,
        dataloader_pin_memory=settings.cuda,
        train_sampling_strategy="group_by_length",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps",
        eval_steps=evaluate_every,
        save_strategy="steps",
        save_steps=evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = _reproducible(SFTTrainer)(
        model=hf.load_model(base, method, bfloat16=settings.bfloat16, cuda=settings.cuda, trust_remote_code=recipe.trust_remote_code),
        args=config,
        train_dataset=_dataset(Dataset, training),
        eval_dataset=_dataset(Dataset, validation),
        processing_class=tokenizer,
        peft_config=None if method == "full" else lora_config(recipe.lora),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # it writes every log entry to stdout, which carries results only
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts a 4-bit model's adapter to bfloat16, which loses small updates
            parameter.data = parameter.data.float()
    return trainer


def train(
    recipe: Recipe,
    settings: Settings,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Example],
    validation: Sequence[Example],
    folder: Path,
    reporter: Reporter = SILENT,
) -> TrainResult:
    """Train into `folder`: `adapter/` (or `model/` for full fine-tuning) of the best validation loss, and `curve.json`.

    Checkpoints of an earlier, killed call with the same folder are taken up, and stay in CHECKPOINTS for the caller to remove.
    Raises InterruptedRunError on Ctrl-C and SIGTERM, after a checkpoint was saved.
    """
    import torch
    from transformers import EarlyStoppingCallback

    checkpoints = folder.absolute() / CHECKPOINTS  # the trainer keeps their paths
    _drop_broken_checkpoints(checkpoints)
    resumed = _last_checkpoint(checkpoints)
    if resumed:
        _mend_best(resumed, reporter)
    tokens_per_row = sum(len(example.input_ids) for example in training) / max(1, len(training))
    tokens_per_step = tokens_per_row * recipe.training.effective_batch_size
    watcher = _watcher(reporter, tokens_per_step, recipe.training.save_minutes * 60, _watched(resumed), cuda=settings.cuda)
    stopper = EarlyStoppingCallback(recipe.training.early_stopping_patience)
    trainer = build_trainer(recipe, settings, base, tokenizer, training, validation, checkpoints.parent, [watcher, stopper])
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
    if resumed and _is_over(resumed, trainer.args.max_steps):
        reporter.note(f"all was trained before: taking up the checkpoint of step {_step(resumed)}")
        _take_up(trainer, resumed)
    else:
        if resumed:
            reporter.note(f"resuming from step {_step(resumed)}")
        with reporter.bar("training", trainer.args.max_steps) as bar, _stop_after_a_checkpoint(watcher, reporter):
            watcher.bar = bar
            try:
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except KeyboardInterrupt:
                raise _interrupted(checkpoints) from None
            finally:
                _drop_broken_checkpoints(checkpoints)  # a full disk leaves one
        if watcher.stop:  # asked for after the last step
            raise _interrupted(checkpoints)
    curve = [_point(entry) for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    losses = [point.validation_loss for point in curve if point.validation_loss is not None]
    if trainer.state.best_global_step is None or not losses:
        shutil.rmtree(checkpoints, ignore_errors=True)
        raise TrainingDivergedError(
            "Training diverged: no validation loss is a number. Nothing is kept.",
            f"--set training.learning_rate={recipe.training.learning_rate / 10:g}",
        )
    full = recipe.training.method == "full"
    target = folder / ("model" if full else "adapter")
    shutil.rmtree(target, ignore_errors=True)
    if full:
        trainer.model.to(torch.bfloat16)
        tokenizer.save_pretrained(target)
    trainer.model.save_pretrained(target)
    _refuse_other_weights(target, checkpoints / f"checkpoint-{trainer.state.best_global_step}")
    (folder / "curve.json").write_text(json.dumps([asdict(point) for point in curve], indent=1) + "\n", encoding="utf-8")
    watched = watcher.watched(trainer.state.global_step)
    return TrainResult(
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_validation_loss=float(trainer.state.best_metric),
        first_validation_loss=losses[0],
        trained_tokens=round(trainer.state.global_step * tokens_per_step),
        seconds=watched.seconds,
        tokens_per_second=watched.steps * tokens_per_step / watched.seconds if watched.seconds else None,
        peak_bytes=watched.peak_bytes,
        peak_is="allocated on the GPU" if settings.cuda else "resident in RAM",
        resumed_from_step=_step(resumed) if resumed else 0,
        verdict=read_curve(curve),
        curve=curve,
    )


@dataclass(frozen=True)
class Probe:
    """What two real optimizer steps held at their peak. `reserved_bytes` is None on a CPU."""

    allocated_bytes: int
    reserved_bytes: int | None


def probe(
    recipe: Recipe, settings: Settings, base: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], folder: Path
) -> Probe:
    """Two optimizer steps of the real trainer on the longest rows, measured: by CUDA's own figures, on a CPU by torch's profiler."""
    import torch

    longest = sorted(examples, key=lambda example: -len(example.input_ids))
    wanted = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    rows = (longest[: settings.per_device_train_batch_size] * wanted)[:wanted] * 2
    two_steps = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 2, "evaluations_per_epoch": 1})})
    trainer = build_trainer(two_steps, settings, base, tokenizer, rows, rows[:1], folder)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return Probe(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    gc.collect()  # what earlier work left behind must not be counted as released by the steps
    tensors = (*trainer.model.parameters(), *trainer.model.buffers(), *quantization_tensors(trainer.model))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.train()
    return Probe(sum(held.values()) + peak_of(profiled), None)


def peak_of(profiled: Any) -> int:
    """The most bytes that a torch profile with `profile_memory` saw allocated at once, beyond those at its beginning."""
    changes: list[tuple[int, int]] = []

    def walk(nodes: Any) -> None:
        for node in nodes:
            if str(node.tag).endswith("Allocation"):
                changes.append((node.start_time_ns, node.extra_fields.alloc_size))
            walk(node.children)

    walk(profiled.profiler.kineto_results.experimental_event_tree())
    now = top = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        top = max(top, now)
    return top


def read_curve(curve: Sequence[Point]) -> str:
    """What the validation losses say, in words."""
    evaluated = [point for point in curve if point.evaluated]
    losses = [point.validation_loss for point in evaluated if point.validation_loss is not None]
    if len(losses) < len(evaluated):
        first = next(point for point in evaluated if point.validation_loss is None)
        return f"training diverged: at step {first.step} the validation loss is no number any more; try a lower learning rate"
    if len(losses) < 2:
        return "one evaluation only: too few to read a curve"
    best = losses.index(min(losses))
    if losses[-1] > losses[best] * 1.02:
        return f"validation loss rose after evaluation {best + 1} of {len(losses)}: overfitting; the best checkpoint is kept"
    if losses[best] > losses[0] * 0.98:
        return "validation loss hardly moved: check the data, or try a higher learning rate"
    if losses[-1] < losses[-2] * 0.98:
        return "validation loss was still falling: more epochs may help"
    return "validation loss has levelled off: trained enough"


def _reproducible(kind: Any) -> Any:
    """A trainer whose order of rows follows from seed and epoch alone.

    transformers draws it from the global generator, whose state at the beginning of an epoch no checkpoint holds: a training
    resumed within a second epoch would see some rows of it twice and others not at all.
    """
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class Trainer(kind):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            dataset = self.train_dataset if train_dataset is None else train_dataset
            trainer = self

            class Sampler(LengthGroupedSampler):  # type: ignore[misc]
                def __iter__(self) -> Iterator[int]:
                    self.generator = torch.Generator().manual_seed(trainer.args.data_seed + int(trainer.state.epoch or 0))
                    indices: Iterator[int] = super().__iter__()
                    return indices

            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return Sampler(size, lengths=[len(ids) for ids in dataset["input_ids"]])

    return Trainer


def _dataset(kind: Any, examples: Sequence[Example]) -> Any:
    return kind.from_dict({"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]})


def _score_answers_only() -> None:
    """Let TRL's loss head skip the prompt's tokens on a CPU as it does on a GPU.

    TRL 1.16 multiplies every position with the whole vocabulary where there is no Triton, labelled or not. The loss is
    the same (tested); only the work on tokens without a label goes.
    """
    from trl.trainer import utils

    if hasattr(utils, "_use_triton"):
        utils._use_triton = lambda device: True


@dataclass(frozen=True)
class Watched:
    """What was seen of a training up to a checkpoint, in all its parts. Steps that were done again count once."""

    steps: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def _watched(checkpoint: Path | None) -> Watched:
    """What a checkpoint's part of the training told; nothing where it was killed before it was written."""
    if checkpoint:
        try:
            return Watched(**json.loads((checkpoint / WATCHED).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass
    return Watched()


def _watcher(reporter: Reporter, tokens_per_step: float, save_seconds: float, before: Watched, *, cuda: bool) -> Any:
    """A callback that moves the bar, watches memory, and asks for a checkpoint in time: every `save_seconds`, and once it is to stop."""
    import torch
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        bar: Bar | None = None
        stop = False
        loss = ""
        peak_bytes = before.peak_bytes
        first: tuple[float, int] | None = None
        saved_at = began_at = time.monotonic()
        began_with: int | None = None

        def watched(self, step: int) -> Watched:
            """All of the training, now that this step is done."""
            if self.began_with is None:
                return before
            return Watched(before.steps + step - self.began_with, before.seconds + time.monotonic() - self.began_at, self.peak_bytes)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began_at = self.saved_at = time.monotonic()
            self.began_with = state.global_step

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first = self.first or (time.monotonic(), state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "eval_loss" in logs:
                reporter.note(f"step {state.global_step}: validation loss {float(logs['eval_loss']):.4f}")
            elif logs and "loss" in logs:
                self.loss = f"{float(logs['loss']):.3f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            rss_bytes = psutil.Process().memory_info().rss
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() if cuda else rss_bytes)
            if self.bar and self.first:
                since = time.monotonic() - self.first[0]
                done = state.global_step - self.first[1]
                self.bar.update(
                    state.global_step,
                    loss=self.loss or "–",
                    speed=f"{done * tokens_per_step / since:.0f} tokens/s",
                    left=seconds_text((state.max_steps - state.global_step) * since / max(1, done)),
                    memory=bytes_text(rss_bytes),
                )
            if self.stop or time.monotonic() - self.saved_at >= save_seconds:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / WATCHED).write_text(json.dumps(asdict(self.watched(state.global_step))) + "\n", encoding="utf-8")
            sync_files(checkpoint)
            self.saved_at = time.monotonic()
            if self.stop:
                raise _interrupted(checkpoint.parent)

    return Watcher()


@contextmanager
def _stop_after_a_checkpoint(watcher: Any, reporter: Reporter) -> Iterator[None]:
    """Ctrl-C, and SIGTERM, let training end with a checkpoint at the end of its step; the second one ends it at once.

    A signal that is ignored, as in a command started in the background, stays so. Only a main thread hears signals.
    """

    def stop(number: int, frame: Any) -> None:
        if watcher.stop:
            raise KeyboardInterrupt
        watcher.stop = True
        said = "stopping: a checkpoint is saved at the end of this step; Ctrl-C once more ends at once"
        threading.Thread(target=reporter.note, args=(said,)).start()  # this may have interrupted the writing of another line

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, stop) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(checkpoints: Path) -> InterruptedRunError:
    _drop_broken_checkpoints(checkpoints)
    last = _last_checkpoint(checkpoints)
    where = f"goes on from step {_step(last)}" if last else "begins again: there was no checkpoint yet"
    return InterruptedRunError("Training was interrupted.", f"the same command {where}")


def _point(entry: dict[str, Any]) -> Point:
    point = Point(step=entry["step"], epoch=round(entry["epoch"], 4))
    if "eval_loss" in entry:
        return replace(point, validation_loss=_finite(entry["eval_loss"]))
    return replace(
        point, loss=_finite(entry["loss"]), learning_rate=_finite(entry["learning_rate"]), gradient_norm=_finite(entry["grad_norm"])
    )


def _finite(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(float(value)) else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()), key=_step)


def _last_checkpoint(folder: Path) -> Path | None:
    return next(reversed(_checkpoints(folder)), None)


def _drop_broken_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a kill left half-written: the trainer writes trainer_state.json last."""
    for checkpoint in _checkpoints(folder):
        try:
            _state(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return state


def _mend_best(checkpoint: Path, reporter: Reporter) -> None:
    """Write into a checkpoint where the best of those that are here lies.

    The trainer notes its path, which is another one once the run was moved; it would then forget the best weights and end
    with the last.
    """
    state = _state(checkpoint)
    here = [_step(other) for other in _checkpoints(checkpoint.parent)]
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min((step for step in here if math.isfinite(losses.get(step, math.nan))), key=lambda step: losses[step], default=None)
    if best != state["best_global_step"]:
        reporter.warn(f"the best checkpoint so far, of step {state['best_global_step']}, is gone; kept is the best of the others")
    path = None if best is None else str(checkpoint.with_name(f"checkpoint-{best}"))
    mended = {"best_global_step": best, "best_metric": losses.get(best), "best_model_checkpoint": path}
    if mended.items() <= state.items():
        return
    write_atomically(checkpoint / TRAINER_STATE, (json.dumps({**state, **mended}, indent=2, sort_keys=True) + "\n").encode())


def _is_over(checkpoint: Path, max_steps: int) -> bool:
    """Whether nothing is left to train after this checkpoint: it was the last step, or training was stopped early."""
    state = _state(checkpoint)
    control = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {})
    return state["global_step"] >= max_steps or bool(control.get("should_training_stop"))


def _take_up(trainer: Any, checkpoint: Path) -> None:
    """Bring the trainer to where `trainer.train` ended: its state, and the best weights."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    if trainer.state.best_model_checkpoint:
        trainer._load_best_model()


def _refuse_other_weights(saved: Path, checkpoint: Path) -> None:
    """Raise RunError unless `saved` holds the weights of this checkpoint, rounded to its own format. A tensor at a time."""
    import torch

    wanted, found = _tensors(checkpoint), _tensors(saved)
    if wanted.keys() != found.keys() or not wanted:
        raise RunError(f"{saved} does not hold the same tensors as {checkpoint}.", "the checkpoints are kept; this is a fault of ftkit's")
    for name, load in found.items():
        tensor = load(name)
        if not torch.equal(tensor, wanted[name](name).to(tensor.dtype)):
            raise RunError(f"{saved} does not hold the weights of {checkpoint}: {name} differs.", "the checkpoints are kept: run it again")


def _tensors(folder: Path) -> dict[str, Callable[[str], Any]]:
    """What loads each tensor of a folder's safetensors files, by its name."""
    from safetensors import safe_open

    found: dict[str, Callable[[str], Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, "pt")
        found |= dict.fromkeys(file.keys(), file.get_tensor)
    return found

"""Supervised fine-tuning with TRL: watched, stopped early, resumable, its best checkpoint kept."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ftkit import hf
from ftkit.data import Example, refuse_nothing_to_learn
from ftkit.errors import InterruptedRunError, TrainingDivergedError
from ftkit.memory.inventory import lora_config
from ftkit.memory.trace import quantization_tensors
from ftkit.progress import SILENT, Bar, Reporter
from ftkit.recipe import Recipe
from ftkit.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINTS = "checkpoints"


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
    tokens_per_second: float
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
    trainer = SFTTrainer(
        model=hf.load_model(base, method, bfloat16=settings.bfloat16, cuda=settings.cuda),
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

    Checkpoints of an earlier, killed call with the same folder are taken up. Raises InterruptedRunError on Ctrl-C.
    """
    import torch
    from transformers import EarlyStoppingCallback

    _drop_broken_checkpoints(folder / CHECKPOINTS)
    resumed = _last_checkpoint(folder / CHECKPOINTS)
    tokens_per_row = sum(len(example.input_ids) for example in training) / max(1, len(training))
    watcher = _watcher(reporter, bar_tokens=tokens_per_row * recipe.training.effective_batch_size)
    stopper = EarlyStoppingCallback(recipe.training.early_stopping_patience)
    trainer = build_trainer(recipe, settings, base, tokenizer, training, validation, folder, [watcher, stopper])
    if resumed:
        reporter.note(f"resuming from step {_step(resumed)}")
    started = time.monotonic()
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
    with reporter.bar("training", trainer.args.max_steps) as bar:
        watcher.bar = bar
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        except KeyboardInterrupt:
            raise InterruptedRunError("Training was interrupted.", "the same command goes on from the last checkpoint") from None
    seconds = time.monotonic() - started
    full = recipe.training.method == "full"
    target = folder / ("model" if full else "adapter")
    if full:
        trainer.model.to(torch.bfloat16)
    trainer.model.save_pretrained(target)
    if full:
        tokenizer.save_pretrained(target)
    curve = [_point(entry) for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    (folder / "curve.json").write_text(json.dumps([asdict(point) for point in curve], indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    done = trainer.state.global_step - (_step(resumed) if resumed else 0)
    tokens = round(done * tokens_per_row * recipe.training.effective_batch_size)
    losses = [point.validation_loss for point in curve if point.validation_loss is not None]
    if not losses:
        raise TrainingDivergedError(
            "Training diverged: no validation loss is a number. Nothing is kept.",
            f"--set training.learning_rate={recipe.training.learning_rate / 10:g}",
        )
    best = min((p for p in curve if p.validation_loss is not None), key=lambda p: p.validation_loss or math.inf)
    return TrainResult(
        steps=trainer.state.global_step,
        best_step=best.step,
        best_validation_loss=min(losses),
        first_validation_loss=losses[0],
        trained_tokens=tokens,
        tokens_per_second=tokens / seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if settings.cuda else watcher.peak_rss_bytes,
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


def _watcher(reporter: Reporter, bar_tokens: float) -> Any:
    """A callback that moves the bar and watches memory."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        bar: Bar | None = None
        peak_rss_bytes = 0
        loss = ""
        first: tuple[float, int] | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first = self.first or (time.monotonic(), state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "eval_loss" in logs:
                reporter.note(f"step {state.global_step}: validation loss {float(logs['eval_loss']):.4f}")
            elif logs and "loss" in logs:
                self.loss = f"{float(logs['loss']):.3f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.peak_rss_bytes = max(self.peak_rss_bytes, psutil.Process().memory_info().rss)
            if self.bar and self.first:
                since = time.monotonic() - self.first[0]
                done = state.global_step - self.first[1]
                self.bar.update(
                    state.global_step,
                    loss=self.loss or "–",
                    speed=f"{done * bar_tokens / since:.0f} tokens/s",
                    left=seconds_text((state.max_steps - state.global_step) * since / max(1, done)),
                    memory=bytes_text(self.peak_rss_bytes),
                )

    return Watcher()


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
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)

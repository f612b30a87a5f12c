"""Train: watched, stopped early, resumed, the best checkpoint kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data.store import token_counts
from ftkit.errors import RunError, TrainingDivergedError
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Recipe
from ftkit.run import CHECKPOINTS
from ftkit.train.answers import RIGHT, Asked, make_scorer
from ftkit.train.arguments import Settings
from ftkit.train.checkpoints import TRAINER_STATE, drop_broken_checkpoints, last_checkpoint, mend_best, state_of, step_of
from ftkit.train.curve import Point, points
from ftkit.train.dynamics import SEEN, kept
from ftkit.train.packing import what_packing_changes
from ftkit.train.reporting import reporting
from ftkit.train.trainer import build_trainer, dataset_of
from ftkit.train.verdict import Verdict, read_curve
from ftkit.train.watch import interrupted, make_watcher, read_watched, stop_after_a_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    reading: Verdict | None = None  # the verdict as a value; None: read by ftkit before 0.3
    best_right_percent: float | None = None  # of the answers at the best step; None: they were not asked for there

    def record(self) -> dict[str, Any]:
        return asdict(self)


def train(
    recipe: Recipe,
    settings: Settings,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: Any,
    validation: Any,
    folder: Path,
    reporter: Reporter = SILENT,
    asked: Asked | None = None,
) -> TrainResult:
    """Train into `folder`: `adapter/` (or `model/` for full fine-tuning) of the best evaluation, `curve.json` and METRICS.

    Checkpoints of an earlier, killed call with the same folder are taken up, and stay in CHECKPOINTS for the caller to remove.
    Raises InterruptedRunError on Ctrl-C and SIGTERM, after a checkpoint was saved.
    """
    import torch
    from transformers import EarlyStoppingCallback

    checkpoints = folder.absolute() / CHECKPOINTS  # the trainer keeps their paths
    needed = recipe.training.metric_for_best_model == "right"
    drop_broken_checkpoints(checkpoints)
    resumed = last_checkpoint(checkpoints)
    if resumed:
        mend_best(resumed, reporter, RIGHT if needed else "eval_loss")
    training, validation = dataset_of(training), dataset_of(validation)
    tokens_per_row = sum(token_counts(training)) / max(1, len(training))
    tokens_per_step = tokens_per_row * recipe.training.effective_batch_size
    watcher = make_watcher(reporter, tokens_per_step, recipe.training, read_watched(resumed), folder, settings)
    stopper = EarlyStoppingCallback(recipe.training.early_stopping_patience, recipe.training.early_stopping_threshold)
    scorer = make_scorer(asked, tokenizer, reporter, needed=needed) if asked else None
    trainer = build_trainer(recipe, settings, base, tokenizer, training, validation, checkpoints.parent, [watcher, stopper], scorer)
    if settings.packing and (change := what_packing_changes(trainer, training)):
        reporter.warn(f"rows are not packed: {change}; rows of like length go together instead, padded")
        trainer.packing = False
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
    if resumed and _is_over(resumed, trainer.args.max_steps):
        reporter.note(f"all was trained before: taking up the checkpoint of step {step_of(resumed)}")
        _take_up(trainer, resumed)
    else:
        if resumed:
            reporter.note(f"resuming from step {step_of(resumed)}")
        seen = kept(trainer, folder / SEEN, step_of(resumed) if resumed else 0)
        with seen, reporter.bar("training", trainer.args.max_steps) as bar, stop_after_a_checkpoint(watcher, reporter):
            watcher.bar = bar
            try:
                with reporting(trainer, folder.absolute()):
                    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except KeyboardInterrupt:
                raise interrupted(checkpoints) from None
            finally:
                drop_broken_checkpoints(checkpoints)  # a full disk leaves one
        if watcher.stop:  # asked for after the last step
            raise interrupted(checkpoints)
    curve = points(trainer.state.log_history)
    losses = [point.validation_loss for point in curve if point.validation_loss is not None]
    best = next((point for point in curve if point.evaluated and point.step == trainer.state.best_global_step), None)
    if best is None or best.validation_loss is None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        raise TrainingDivergedError(
            "Training diverged: no validation loss is a number. Nothing is kept.",
            f"--set training.learning_rate={recipe.training.peak_learning_rate / 10:g}",
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
    watched, reading = watcher.watched(trainer.state.global_step), read_curve(curve, recipe.training)
    return TrainResult(
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_validation_loss=best.validation_loss,
        first_validation_loss=losses[0],
        trained_tokens=round(trainer.state.global_step * tokens_per_step),
        seconds=watched.seconds,
        tokens_per_second=watched.steps * tokens_per_step / watched.seconds if watched.seconds else None,
        peak_bytes=watched.peak_bytes,
        peak_is="allocated on the GPU" if settings.cuda else "resident in RAM",
        resumed_from_step=step_of(resumed) if resumed else 0,
        verdict=str(reading),
        curve=curve,
        reading=reading,
        best_right_percent=best.right_percent,
    )


def _is_over(checkpoint: Path, max_steps: int) -> bool:
    """Whether nothing is left to train after this checkpoint: it was the last step, or training was stopped early."""
    state = state_of(checkpoint)
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

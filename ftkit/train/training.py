"""Train: watched, stopped early, resumed, the best checkpoint kept."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from ftkit.data.store import token_counts
from ftkit.engines.hf import load_model, release_memory
from ftkit.errors import DoesNotFitError, RunError, TrainingDivergedError
from ftkit.machine import ranks
from ftkit.machine.device import choose as choose_device
from ftkit.model.rounding import is_rounding, round_by_chance
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Recipe
from ftkit.run import CHECKPOINTS
from ftkit.train.answers import RIGHT, Asked, make_scorer
from ftkit.train.arguments import Settings
from ftkit.train.checkpoints import (
    CONTROL,
    STOPPER,
    TRAINER_STATE,
    drop_broken_checkpoints,
    drop_checkpoints_from,
    evaluated,
    last_checkpoint,
    mend,
    refuse_world,
    state_of,
    step_of,
)
from ftkit.train.curve import Point, points
from ftkit.train.divergence import Diverged
from ftkit.train.dynamics import SEEN, kept
from ftkit.train.packing import what_packing_changes
from ftkit.train.reporting import reporting
from ftkit.train.retry import (
    OutOfMemory,
    Retry,
    after_divergence,
    after_shortage,
    make_guard,
    ran_out,
    rate_factor,
    read_retries,
    settings_of,
    write_retries,
)
from ftkit.train.staging import Drive, make_copier
from ftkit.train.trainer import build_trainer, dataset_of
from ftkit.train.verdict import Verdict, read_curve
from ftkit.train.watch import interrupted, make_watcher, read_watched, stop_after_a_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Missed = Callable[[Settings, OutOfMemory], None]


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
    peak_is: str  # "allocated on the GPU" or "held in RAM"
    resumed_from_step: int
    verdict: str
    curve: list[Point]
    reading: Verdict | None = None  # the verdict as a value; None: read by ftkit before 0.3
    max_steps: int | None = None  # that were to be taken: of fewer it stopped early. None: trained by ftkit before 0.3
    best_right_percent: float | None = None  # of the answers at the best step; None: they were not asked for there
    retries: list[Retry] = field(default_factory=list)  # where memory ran out or it diverged, and how it went on
    best_reward_accuracy: float | None = None  # of validation preferences, at the best step; None: none were learnt
    best_reward_margin: float | None = None
    best_reward_chosen: float | None = None

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
    *,
    missed: Missed = lambda settings, short: None,
    stage: Path | None = None,
    begins_with: Path | None = None,
) -> TrainResult:
    """Train into `folder`: `adapter/` (or `model/` for full fine-tuning) of the best evaluation, `curve.json` and METRICS.

    Checkpoints of an earlier, killed call with the same folder are taken up, and stay in CHECKPOINTS for the caller to remove.
    Where memory runs out it goes on with fewer rows at once, at the same effective batch; where it diverges, from before that at
    half the rate, once. Several processes end there, and the same command does that. `missed` is told each time that memory was
    not enough for the settings. With a `stage`, a folder on this machine, what a training goes on from is written there and
    copied to `folder`, which may lie on a drive that comes and goes.
    Raises InterruptedRunError on Ctrl-C and SIGTERM, after a checkpoint was saved; DoesNotFitError; TrainingDivergedError.
    """
    training, validation = dataset_of(training), dataset_of(validation)
    lengths = token_counts(training)
    checkpoints = (stage or folder).absolute() / CHECKPOINTS  # the trainer keeps their paths
    drive = Drive(checkpoints, folder.absolute() / CHECKPOINTS, reporter) if stage else None
    rate = recipe.training.peak_learning_rate
    if ranks.is_first():
        drop_broken_checkpoints(checkpoints, reporter, read=True)
        if drive:
            drive.fetch()
    ranks.wait()
    device, retries = choose_device().name, read_retries(checkpoints.parent)
    began = _last_step(checkpoints)
    while True:
        _forget_optimizers()
        now = settings_of(settings, retries, device)
        try:
            result = _attempt(
                recipe,
                now,
                base,
                tokenizer,
                training,
                validation,
                folder.absolute(),
                checkpoints,
                rate_factor(retries),
                reporter,
                drive,
                asked,
                begins_with,
            )
        except OutOfMemory as short:
            missed(now, short)
            tokens_per_row = sum(lengths) / max(1, len(lengths))
            retry = after_shortage(short, now, recipe, tokens_per_row, max(lengths), _last_step(checkpoints), device, rate)
        except Diverged as found:
            ranks.wait()  # each has seen the same losses
            if ranks.is_first():
                drop_checkpoints_from(checkpoints, found.bad_from)
                if drive:
                    drive.push()  # what is dropped here must not come back from there
            ranks.wait()
            retry = after_divergence(found, retries, now, rate, _last_step(checkpoints), device)
        else:
            if stage and ranks.is_first():
                shutil.rmtree(stage)
            _forget_optimizers()
            return replace(result, resumed_from_step=began, retries=retries)
        retries.append(retry)
        if ranks.is_first() or retry.why == "out of memory":  # which this process alone knows
            write_retries(checkpoints.parent, retries)
            if drive:
                drive.push(checkpoints_too=ranks.is_first())  # another process may be copying them
        if ranks.world_size() > 1:  # which torch does not let go on beside each other
            _end_of_all(retry)
        reporter.warn(retry.said)
        release_memory()


def _forget_optimizers() -> None:
    """What bitsandbytes keeps of each optimizer as long as the process lives: for one of 8 bits the model's embedding, 1 GB of a 7B."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.functional import GlobalPageManager
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()
        GlobalPageManager.get_instance().initialize()


def _end_of_all(retry: Retry) -> NoReturn:
    """End one of several processes whose training goes on otherwise. Where one alone ran out of memory, the launcher ends the others.

    torchrun's own restarts do not help: in torch 2.13 the new processes read the addresses of the old ones.
    """
    hint = "the same command does that"
    if retry.why == "diverged":
        ranks.wait()  # until it is written
        raise TrainingDivergedError(f"{retry.said[0].upper()}{retry.said[1:]}.", hint)
    raise DoesNotFitError(f"In process {ranks.rank()} {retry.said}.", hint)


def _last_step(checkpoints: Path) -> int:
    last = last_checkpoint(checkpoints)
    return step_of(last) if last else 0


def _attempt(
    recipe: Recipe,
    settings: Settings,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: Any,
    validation: Any,
    folder: Path,
    checkpoints: Path,
    factor: float,
    reporter: Reporter,
    drive: Drive | None,
    asked: Asked | None,
    begins_with: Path | None,
) -> TrainResult:
    """Train with these settings, at so much of the recipe's rate, from the last checkpoint on. Raises OutOfMemory and Diverged."""
    import torch
    from transformers import EarlyStoppingCallback

    needed = recipe.training.metric_for_best_model == "right"
    resumed = last_checkpoint(checkpoints)
    if resumed:
        refuse_world(resumed, ranks.world_size(), fsdp=settings.fsdp)
    tokens_per_row = sum(token_counts(training)) / max(1, len(training))
    tokens_per_step = tokens_per_row * recipe.training.effective_batch_size
    watcher = make_watcher(reporter, recipe.training, read_watched(resumed, tokens_per_step), folder, settings)
    stopper = EarlyStoppingCallback(recipe.training.early_stopping_patience, recipe.training.early_stopping_threshold)
    scorer = make_scorer(asked, tokenizer, reporter, needed=needed) if asked else None
    guard = make_guard(factor)
    callbacks = [watcher, *([make_copier(drive)] if drive and ranks.is_first() else []), stopper, guard]
    trainer = build_trainer(
        *(recipe, settings, base, tokenizer, training, validation, checkpoints.parent, callbacks, scorer),
        begins_with=begins_with,
        reporter=reporter,
    )
    watcher.trainer = trainer
    over = _go_on_from(resumed, trainer, stopper, reporter, RIGHT if needed else "eval_loss") if resumed else False
    if settings.packing and (change := what_packing_changes(trainer, training)):
        reporter.warn(f"rows are not packed: {change}; rows of like length go together instead, padded")
        trainer.packing = False
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
    if resumed and over:
        reporter.note(f"all was trained before: taking up the checkpoint of step {step_of(resumed)}")
        _take_up(trainer, resumed, settings)
    else:
        if resumed:
            reporter.note(f"resuming from step {step_of(resumed)}")
        # Of several processes each sees some rows alone. Of preferences it is not known which row's loss tells a wrong one.
        is_noted = recipe.training.objective == "sft" and ranks.world_size() == 1
        seen = kept(trainer, checkpoints.parent / SEEN, step_of(resumed) if resumed else 0) if is_noted else nullcontext()
        with seen, reporter.bar("training", trainer.args.max_steps) as bar, stop_after_a_checkpoint(watcher, reporter):
            watcher.bar = bar
            short = None
            try:
                with reporting(trainer, checkpoints.parent):
                    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except KeyboardInterrupt:
                raise interrupted(checkpoints) from None
            except (RuntimeError, MemoryError) as error:
                short = ran_out(error, guard.phase, trainer.state.global_step, cuda=settings.cuda)
                if not short:
                    raise
            finally:
                if ranks.is_first():
                    drop_broken_checkpoints(checkpoints)  # a full disk leaves one
                    if drive:
                        drive.push()
            if short:  # outside of what holds the step's activations
                if ranks.world_size() == 1 and short.phase == "step" and short.step > _last_step(checkpoints):
                    _save(trainer)
                raise short
        if watcher.stop:  # asked for after the last step
            raise interrupted(checkpoints)
    curve = points(trainer.state.log_history)
    losses = [point.validation_loss for point in curve if point.validation_loss is not None]
    best = next((point for point in curve if point.evaluated and point.step == trainer.state.best_global_step), None)
    if best is None or best.validation_loss is None:
        if ranks.is_first():
            shutil.rmtree(checkpoints, ignore_errors=True)
        raise TrainingDivergedError(
            "Training diverged: no validation loss is a number. Nothing is kept.",
            f"--set training.learning_rate={recipe.training.peak_learning_rate / 10:g}",
        )
    if ranks.is_first():
        _keep(trainer, tokenizer, recipe, settings, folder, checkpoints, curve, drive)
    watched, reading = (
        watcher.watched(trainer.state.global_step),
        read_curve(curve, recipe.training, stopped_early=trainer.state.global_step < trainer.args.max_steps),
    )
    return TrainResult(
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        best_validation_loss=best.validation_loss,
        first_validation_loss=losses[0],
        trained_tokens=watched.tokens,
        seconds=watched.seconds,
        tokens_per_second=watched.tokens / watched.seconds if watched.seconds else None,
        peak_bytes=watched.peak_bytes,
        peak_is="allocated on the GPU" if settings.cuda else "held in RAM",
        resumed_from_step=step_of(resumed) if resumed else 0,
        verdict=str(reading),
        curve=curve,
        reading=reading,
        max_steps=trainer.args.max_steps,
        best_right_percent=best.right_percent,
        best_reward_accuracy=best.reward_accuracy,
        best_reward_margin=best.reward_margin,
        best_reward_chosen=best.reward_chosen,
    )


def _keep(
    trainer: Any,
    tokenizer: Any,
    recipe: Recipe,
    settings: Settings,
    folder: Path,
    checkpoints: Path,
    curve: list[Point],
    drive: Drive | None,
) -> None:
    """Write what was trained, and its curve. What is shared out is whole in its checkpoint alone."""
    import torch

    if drive:
        drive.settle()
    full, best = recipe.training.method == "full", checkpoints / f"checkpoint-{trainer.state.best_global_step}"
    target = folder / ("model" if full else "adapter")
    shutil.rmtree(target, ignore_errors=True)
    model = trainer.model
    if full:
        if settings.fsdp:
            model = load_model(best, None, dtype="float32", cuda=False, trust_remote_code=recipe.trust_remote_code)
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                continue
            numbers = parameter.data.clone() if settings.fsdp else parameter.data  # those lie in the checkpoint's mapped file
            round_by_chance(numbers, torch.bfloat16, name)
            parameter.data = numbers.to(torch.bfloat16)
        model.to(torch.bfloat16)
        tokenizer.save_pretrained(target)
    if settings.fsdp and not full:
        shutil.copytree(best, target, ignore=lambda _, names: [name for name in names if not name.startswith("adapter_")])
    else:
        model.save_pretrained(target)
    _refuse_other_weights(target, best)
    (folder / "curve.json").write_text(json.dumps([asdict(point) for point in curve], indent=1) + "\n", encoding="utf-8")


def _save(trainer: Any) -> None:
    """Write a checkpoint of the last whole step, in the middle of the next one: weights and optimizer are still as they were."""
    trainer.model.zero_grad(set_to_none=True)
    release_memory()
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def _go_on_from(checkpoint: Path, trainer: Any, stopper: Any, reporter: Reporter, metric: str) -> bool:
    """Make the checkpoint one of this trainer's; whether nothing is left to train after it: it was the last step, or training stops early.

    How long nothing was gained is told from the evaluations, not taken from the checkpoint: patience may be another than then.
    """
    from transformers.trainer_callback import ExportableState

    state = state_of(checkpoint)
    best: float | None = None
    for value in evaluated(state, metric).values():
        stopper.check_metric_value(trainer.args, SimpleNamespace(best_metric=best), trainer.control, value)
        if best is None:
            best = -math.inf if trainer.args.greater_is_better else math.inf
        best = value if (value > best if trainer.args.greater_is_better else value < best) else best
    exhausted = stopper.early_stopping_patience_counter >= stopper.early_stopping_patience
    before = state["stateful_callbacks"]
    stopped = before.get(CONTROL, {}).get("args", {}).get("should_training_stop", False)
    same = before.get(STOPPER, {}).get("args") == stopper.state()["args"]
    stateful = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ExportableState))
    ranks.wait()  # until all have read it
    if ranks.is_first():
        mend(checkpoint, {type(callback).__name__: callback.state() for callback in stateful}, reporter, metric)
    ranks.wait()
    return bool(state["global_step"] >= trainer.args.max_steps or exhausted or (stopped and same))


def _take_up(trainer: Any, checkpoint: Path, settings: Settings) -> None:
    """Bring the trainer to where `trainer.train` ended: its state, and the best weights, but for those that `_keep` takes from there."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    if trainer.state.best_model_checkpoint and not settings.fsdp:
        trainer._load_best_model()


def _refuse_other_weights(saved: Path, checkpoint: Path) -> None:
    """Raise RunError unless `saved` holds the weights of this checkpoint, rounded to its own format either way. A tensor at a time."""
    wanted, found = _tensors(checkpoint), _tensors(saved)
    if wanted.keys() != found.keys() or not wanted:
        raise RunError(f"{saved} does not hold the same tensors as {checkpoint}.", "the checkpoints are kept; this is a fault of ftkit's")
    for name, load in found.items():
        tensor = load(name)
        if not is_rounding(tensor, wanted[name](name)):
            raise RunError(f"{saved} does not hold the weights of {checkpoint}: {name} differs.", "the checkpoints are kept: run it again")


def _tensors(folder: Path) -> dict[str, Callable[[str], Any]]:
    """What loads each tensor of a folder's safetensors files, by its name."""
    from safetensors import safe_open

    found: dict[str, Callable[[str], Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, "pt")
        found |= dict.fromkeys(file.keys(), file.get_tensor)
    return found

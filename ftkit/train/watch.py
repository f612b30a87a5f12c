"""What a running training shows and keeps of itself, and how it is stopped."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ftkit.engines.hf import release_memory
from ftkit.errors import InterruptedRunError
from ftkit.machine import ranks
from ftkit.machine.device import held_bytes
from ftkit.progress import Bar, Curves, Reporter
from ftkit.recipe import Training
from ftkit.train.answers import right_text
from ftkit.train.arguments import Settings
from ftkit.train.checkpoints import WATCHED, drop_broken_checkpoints, last_checkpoint, seal, step_of
from ftkit.train.curve import MEASURES, Point, points, smoothed, thinned
from ftkit.train.metrics import Metrics, MetricsFile
from ftkit.train.verdict import read_curve
from ftkit.units import bytes_text, seconds_text

DRAWN_EVERY_SECONDS, MOST_POINTS = 0.5, 200  # of the curves beside the bar


@dataclass(frozen=True)
class Watched:
    """What was seen of a training up to a checkpoint, in all its parts. Steps that were done again count once."""

    steps: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    tokens: int = 0  # that were trained on, of both answers where preferences are learnt
    learnt_tokens: int = 0  # of them


def read_watched(checkpoint: Path | None, tokens_per_step: float) -> Watched:
    """What a checkpoint's part of the training told. An earlier ftkit counted no tokens: its rows are taken to be of mean length."""
    if not checkpoint:
        return Watched()
    told = json.loads((checkpoint / WATCHED).read_text(encoding="utf-8"))
    told = {"tokens": round(told.get("steps", 0) * tokens_per_step), **told}
    return Watched(**{field.name: told[field.name] for field in fields(Watched) if field.name in told})


def curves_of(seen: Sequence[Point]) -> Curves:
    """The smoothed training loss, the validation losses and, where it is known, the share of right or of preferred answers, to be drawn."""
    training = thinned([(p.step, p.loss) for p in seen if not p.evaluated and p.loss is not None], MOST_POINTS)
    trend = zip((step for step, _ in training), smoothed([loss for _, loss in training]), strict=True)
    validation = [(p.step, p.validation_loss) for p in seen if p.evaluated and p.validation_loss is not None]
    shares = {f"{measure.name}, %": found for measure in MEASURES if measure.percents and (found := measure.points(seen))}
    return {"training loss, smoothed": list(trend), "validation loss": validation, **shares}


def measured(seen: Sequence[Point]) -> dict[str, str]:
    """What was last found beside the losses, in words."""
    return {measure.name: measure.text(found[-1][1]) for measure in MEASURES if (found := measure.points(seen))}


def _last(seen: Sequence[Point], *, evaluated: bool) -> str:
    """The last loss, of training or of validation."""
    last = next((point for point in reversed(seen) if point.evaluated == evaluated), None)
    if not last:
        return "–"
    loss = last.validation_loss if evaluated else last.loss
    return "no number" if loss is None else f"{loss:.3f}"


def make_watcher(reporter: Reporter, training: Training, before: Watched, folder: Path, settings: Settings) -> Any:
    """A callback that moves the bar, reads the curves at each evaluation, writes METRICS, and asks for a checkpoint in time.

    That is every `save_minutes`, and once it is to stop.
    """
    import torch
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        bar: Bar | None = None
        trainer: Any = None  # which counts tokens
        stop = False
        seen: list[Point]
        curves: Curves | None = None
        drawn_at = -math.inf
        kind = ""  # of the last verdict, which is not explained twice
        peak_bytes = before.peak_bytes
        first: tuple[float, int, int] | None = None  # when the first step began, after which one, and with how many tokens before
        saved_at = began_at = time.monotonic()
        held_at_most = settings.held_at_most or math.inf
        metrics = MetricsFile(folder, reporter)
        began_with: int | None = None

        def watched(self, step: int) -> Watched:
            """All of the training, now that this step is done."""
            if self.began_with is None:
                return before
            return Watched(
                steps=before.steps + step - self.began_with,
                seconds=before.seconds + time.monotonic() - self.began_at,
                peak_bytes=self.peak_bytes,
                tokens=before.tokens + self.trainer.tokens,
                learnt_tokens=before.learnt_tokens + self.trainer.learnt_tokens,
            )

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began_at = self.saved_at = time.monotonic()
            self.began_with = state.global_step
            if ranks.is_first():
                self.metrics.go_on_after(state.global_step)
            self.seen = points(state.log_history)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first = self.first or (time.monotonic(), state.global_step, self.trainer.tokens)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if found := points(state.log_history[-1:]) if logs else []:
                self.seen += found
                watched = self.watched(state.global_step)
                if ranks.is_first():
                    self.metrics.add(
                        Metrics(
                            **asdict(found[0]),
                            tokens=watched.tokens,
                            learnt_tokens=watched.learnt_tokens,
                            seconds=round(watched.seconds, 3),
                            peak_bytes=watched.peak_bytes,
                        )
                    )
            if logs and "eval_loss" in logs:
                margin, right = (logs.get(f"eval_rewards/{name}") for name in ("margins", "accuracies"))
                preferred = "" if margin is None or right is None else f", {100 * right:.0f} % preferred, margin {margin:.3f}"
                reading = read_curve(self.seen, training, ended=False, max_steps=state.max_steps)
                hint = f" (try: {reading.next_command})" if reading.next_command else ""
                loss = f"validation loss {float(logs['eval_loss']):.4f}{preferred}{right_text(logs)}"
                said = reading.kind if reading.kind == self.kind else f"{reading}{hint}"
                self.kind = reading.kind
                reporter.note(f"step {state.global_step}: {loss} – {said}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() if settings.cuda else held_bytes())
            if held_bytes() > self.held_at_most:
                release_memory()  # not at each step: what was given back has to be asked for again, for a quarter of the time
                self.held_at_most = max(self.held_at_most, 2 * held_bytes())
            if self.bar and self.first:
                since = time.monotonic() - self.first[0]
                done = state.global_step - self.first[1]
                if time.monotonic() - self.drawn_at > DRAWN_EVERY_SECONDS:
                    self.drawn_at, self.curves = time.monotonic(), curves_of(self.seen)
                planned = f" of {bytes_text(settings.planned_bytes)} planned" if settings.planned_bytes else ""
                self.bar.update(
                    state.global_step,
                    curves=self.curves,
                    loss=_last(self.seen, evaluated=False),
                    validation=_last(self.seen, evaluated=True),
                    **measured(self.seen),
                    speed=f"{(self.trainer.tokens - self.first[2]) / since:.0f} tokens/s",
                    left=seconds_text((state.max_steps - state.global_step) * since / max(1, done)),
                    memory=f"{bytes_text(self.peak_bytes)}{planned}",
                )
            due = time.monotonic() - self.saved_at >= 60 * training.save_minutes
            self.stop, due = ranks.any_of(self.stop, due)
            if self.stop or due:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            ranks.wait()  # for their random states
            if ranks.is_first():
                seal(checkpoint, asdict(self.watched(state.global_step)))
            ranks.wait()
            self.saved_at = time.monotonic()
            if self.stop:
                raise interrupted(checkpoint.parent)

    return Watcher()


@contextmanager
def stop_after_a_checkpoint(watcher: Any, reporter: Reporter) -> Iterator[None]:
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


def interrupted(checkpoints: Path) -> InterruptedRunError:
    if ranks.is_first():
        drop_broken_checkpoints(checkpoints)
    last = last_checkpoint(checkpoints)
    where = f"goes on from step {step_of(last)}" if last else "begins again: there was no checkpoint yet"
    return InterruptedRunError("Training was interrupted.", f"the same command {where}")

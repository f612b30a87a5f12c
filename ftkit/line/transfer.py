"""The step `transfer`: an adapter that learnt around a 4-bit base learns some steps on the 16-bit source, before it is merged into it.

`ship.transfer_steps` has the step made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftkit.close.closing import Lesson, Trained, close, mean_divergence
from ftkit.close.kept import keep, last
from ftkit.engines import hf, logits
from ftkit.errors import DoesNotFitError, InterruptedRunError, ModelError
from ftkit.line.adopt import ADAPTER, ADOPT, trained_tokenizer
from ftkit.line.ask import ASK
from ftkit.line.job import Job, base_folder, computes_on
from ftkit.line.lessons import BASE_WEIGHT, Teacher, checks_as_trained, lessons, outside, read, rows_to_learn
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN
from ftkit.model.four_bits import round_weights
from ftkit.model.given import ADAPTER_WEIGHTS
from ftkit.plan.cost import of_transferring
from ftkit.recipe import Dtype
from ftkit.run import CHECKPOINTS

RATE_SHARE = 0.2  # of the rate that it was trained at
OUTSIDE_CHECKS = 8  # rows of text outside the task that are not learnt from


@dataclass(frozen=True)
class Transferred:
    """What the steps did, on rows that they did not learn from: KL a token from the trained model, and on other text from the source."""

    steps: int
    before: float | None
    after: float | None
    why_not: str | None  # made no better, or not made at all: the adapter is merged as it was trained
    outside_before: float | None = None  # None: an earlier ftkit did not look at it
    outside_after: float | None = None

    @property
    def words(self) -> str:
        if self.why_not:
            return f"to which the adapter was not fitted: {self.why_not.rstrip('.')}"
        outside = f", outside the task {self.outside_before:.2g} → {self.outside_after or 0:.2g}" if self.outside_before is not None else ""
        told = f"{self.steps} steps; KL a token {self.before or 0:.2g} → {self.after or 0:.2g}{outside}"
        return f"to which the adapter was fitted before ({told})"


def adapter_of(trained: Made[Any], fitted: Made[Transferred] | None) -> Path:
    """What is merged: the adapter as it was fitted to the source, or as it was trained."""
    made = trained if fitted is None or fitted.result.why_not else fitted
    return made.folder / ADAPTER


def _make(job: Job, folder: Path, trained: Made[Any], asked: Made[Any]) -> Transferred:
    if job.recipe.training.method == "lora":
        return Transferred(0, None, None, "it learnt on the source already")
    try:
        with hf.room_to("fit the adapter to the source"):
            return _transferred(job, folder, trained, asked)
    except KeyboardInterrupt:
        raise InterruptedRunError("Interrupted.", "the same command goes on with fitting the adapter, from its last check") from None
    except (ModelError, DoesNotFitError) as error:
        job.reporter.warn(f"the adapter is merged as it was trained: {error.message}")
        return Transferred(0, None, None, error.message)


def _transferred(job: Job, folder: Path, trained: Made[Any], asked: Made[Any]) -> Transferred:
    recipe, steps, tokenizer = job.recipe, job.recipe.ship.transfer_steps, trained_tokenizer(job, trained)
    checks, kept = checks_as_trained(asked), folder / CHECKPOINTS
    begun, learnt = last(kept), lessons(Teacher(job, trained), rows_to_learn(job, tokenizer, steps), kept / "rows")
    hf.release_memory()
    base = base_folder(job)
    cuda, dtype = computes_on(job, hf.model_type(base))
    fitted_in: Dtype = "float32" if dtype == "float16" else dtype  # whose least numbers are above these gradients, and nothing scales them
    how: dict[str, Any] = {"dtype": fitted_in, "cuda": cuda, "trust_remote_code": recipe.trust_remote_code}
    source = hf.load_model(base, "lora", **how)
    told = partial(read, job, "reading text outside the task", partial(logits.of_model, source))
    other = outside(tokenizer, told, kept / "outside")
    beside, others = other[:OUTSIDE_CHECKS], other[OUTSIDE_CHECKS:]
    round_weights(source, job.rounding, dtype)
    model = hf.adapted(source, trained.folder / ADAPTER, learns=True)
    rate = RATE_SHARE * recipe.training.peak_learning_rate
    learning = [Trained(parameter, rate) for parameter in model.parameters() if parameter.requires_grad]

    def apart(of: Sequence[Lesson]) -> float:
        return mean_divergence(logits.of_model(model, [lesson.answer for lesson in of]), of) if of else 0.0

    def measured() -> float:
        return apart(checks) + BASE_WEIGHT * apart(beside)

    first, outside_first, numbers = apart(checks), apart(beside), sum(one.parameter.numel() for one in learning)
    job.reporter.step(f"fitting the adapter to the 16-bit source: {numbers:,} numbers, at most {steps} steps")
    with job.reporter.bar("fitting", steps) as bar:
        done, _ = close(
            model,
            learning,
            learnt,
            others,
            steps,
            measured,
            first + BASE_WEIGHT * outside_first,
            outside_weight=BASE_WEIGHT,
            seed=recipe.training.seed,
            told=lambda step, _: bar.update(step),
            begun=begun[0] if begun else None,
            keep=partial(keep, kept),
            recompute=True,
        )
    if not done:
        why = f"{steps} steps on the source made it no better: KL a token {first:.3g}, outside the task {outside_first:.3g}"
        return Transferred(0, first, None, why, outside_first)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    shutil.copytree(trained.folder / ADAPTER, folder / ADAPTER)
    _write(model, folder / ADAPTER / ADAPTER_WEIGHTS)
    return Transferred(done, first, apart(checks), None, outside_first, apart(beside))


def _write(model: Any, path: Path) -> None:
    """Put what the adapter learnt into its file; what PEFT saves beside it, as resized embeddings, stays as it is there."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load, save_file

    known = load(path.read_bytes())  # not mapped: it is written anew
    learnt = get_peft_model_state_dict(model, save_embedding_layers=False)
    if other := sorted(learnt.keys() - known.keys()):
        raise ModelError(f"PEFT names {other[0]} otherwise than the adapter's file.", "merge it as it is: ship.transfer_steps=0")
    kept = {name: learnt.get(name, tensor).detach().to(tensor.dtype).cpu().contiguous() for name, tensor in known.items()}
    save_file(kept, path, metadata={"format": "pt"})


TRANSFER = Step(
    name="transfer",
    does="the adapter fitted to the 16-bit source",
    command="ftkit ship",
    result=Transferred,
    after=(TRAIN, ADOPT, ASK),
    follows_from=lambda job: [job.recipe.ship.transfer_steps, *job.rounded],
    costs=of_transferring,
    make=_make,
    resumable=lambda _: True,
    applies=lambda job: bool(job.recipe.ship.transfer_steps) and job.recipe.training.method != "full" and job.onto == "source",
    keep=True,
)

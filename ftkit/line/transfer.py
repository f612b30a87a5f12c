"""The step `transfer`: an adapter that learnt around a 4-bit base learns some steps on the 16-bit source, before it is merged into it.

`ship.transfer_steps` has the step made.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.close.closing import Lesson, Trained, close, distribution, mean_divergence
from ftkit.engines import hf, logits
from ftkit.errors import DoesNotFitError, ModelError
from ftkit.line.adopt import ADAPTER, ADOPT, trained_tokenizer
from ftkit.line.ask import ASK
from ftkit.line.behaviour import OUTSIDE_CHARACTERS, outside_rows
from ftkit.line.job import Job, base_folder, computes_on
from ftkit.line.lessons import OUTSIDE_ROWS, checks_as_trained, rows_as_trained
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN
from ftkit.model.given import ADAPTER_WEIGHTS
from ftkit.plan.cost import of_transferring

RATE_SHARE = 0.5  # of the rate that it was trained at


@dataclass(frozen=True)
class Transferred:
    """What the steps did: KL a token from the trained model, on the source, on rows that they did not learn from."""

    steps: int
    before: float | None
    after: float | None
    why_not: str | None  # made no better, or not made at all: the adapter is merged as it was trained

    @property
    def words(self) -> str:
        if self.why_not:
            return f"to which the adapter was not fitted: {self.why_not.rstrip('.')}"
        return f"to which the adapter was fitted before ({self.steps} steps; KL a token {self.before or 0:.2g} → {self.after or 0:.2g})"


def adapter_of(trained: Made[Any], fitted: Made[Transferred] | None) -> Path:
    """What is merged: the adapter as it was fitted to the source, or as it was trained."""
    made = trained if fitted is None or fitted.result.why_not else fitted
    return made.folder / ADAPTER


def _make(job: Job, folder: Path, trained: Made[Any], asked: Made[Any]) -> Transferred:
    if job.recipe.training.method == "lora":
        return Transferred(0, None, None, "it learnt on the source already")
    try:
        return _transferred(job, folder, trained, asked)
    except (ModelError, DoesNotFitError) as error:
        job.reporter.warn(f"the adapter is merged as it was trained: {error.message}")
        return Transferred(0, None, None, error.message)


def _transferred(job: Job, folder: Path, trained: Made[Any], asked: Made[Any]) -> Transferred:
    recipe, steps, tokenizer = job.recipe, job.recipe.ship.transfer_steps, trained_tokenizer(job, trained)
    checks, lessons = checks_as_trained(asked), rows_as_trained(job, trained, tokenizer, steps, prompts=True)
    base = base_folder(job)
    cuda, dtype = computes_on(job, hf.model_type(base))
    model = hf.load_adapted(
        base, trained.folder / ADAPTER, "lora", dtype=dtype, cuda=cuda, trust_remote_code=recipe.trust_remote_code, learns=True
    )
    learning = [Trained(parameter, RATE_SHARE * recipe.training.peak_learning_rate) for parameter in model.parameters() if parameter.requires_grad]

    def measured() -> float:
        return mean_divergence(logits.of_model(model, [lesson.answer for lesson in checks]), checks)

    rows = outside_rows(tokenizer, OUTSIDE_ROWS, after=OUTSIDE_CHARACTERS, every=4)
    with model.disable_adapter():  # what is nobody's task is read as the source reads it
        outside = [Lesson(row, distribution(found)) for row, found in zip(rows, logits.of_model(model, rows), strict=True)]
    first, numbers = measured(), sum(one.parameter.numel() for one in learning)
    job.reporter.step(f"fitting the adapter to the 16-bit source: {numbers:,} numbers, at most {steps} steps")
    with job.reporter.bar("fitting", steps) as bar:
        done, last = close(
            model, learning, lessons, outside, steps, measured, first, seed=recipe.training.seed, told=lambda step, _: bar.update(step)
        )
    if not done:
        return Transferred(0, first, None, f"{steps} steps on the source made it no better: KL a token {first:.3g}")
    shutil.copytree(trained.folder / ADAPTER, folder / ADAPTER)
    _write(model, folder / ADAPTER / ADAPTER_WEIGHTS)
    return Transferred(done, first, last, None)


def _write(model: Any, path: Path) -> None:
    """Put what the adapter learnt into its file; what PEFT saves beside it, as resized embeddings, stays as it is there."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    known = load_file(path)
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
    follows_from=lambda job: [job.recipe.ship.transfer_steps],
    costs=of_transferring,
    make=_make,
    applies=lambda job: bool(job.recipe.ship.transfer_steps) and job.recipe.training.method != "full" and job.onto == "source",
    keep=True,
)

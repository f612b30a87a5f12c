"""The step `reask`: the held-out questions, asked of the merged model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ftkit.data.turns import answer_reader
from ftkit.engines import llamacpp
from ftkit.line.adopt import trained_by
from ftkit.line.ask import ANSWERS, ASK, Answers, Asked, read_questions
from ftkit.line.behaviour import MERGED, measure_form
from ftkit.line.gguf import GGUF, Converted
from ftkit.line.job import Job, Onto, tokenizer_of
from ftkit.line.merge import MERGE, MODEL, Merged
from ftkit.line.step import Made, Step, fingerprint_of, write_json
from ftkit.line.transfer import TRANSFER
from ftkit.plan.cost import of_asking_merged


@dataclass(frozen=True)
class AskedMerged:
    """Which merge was asked, and through which type of file; None: each was larger than this machine's memory."""

    onto: Onto
    asked_as: str | None


def _ask_merged(job: Job, folder: Path, asked: Made[Asked], converted: Made[Converted], merged: Made[Merged]) -> AskedMerged:
    """Through its GGUF, a mapped file: F16, or Q8_0 where the machine's memory is too small for that."""
    file = converted.result.in_memory()
    answers: dict[str, list[str]] = {}
    read = answer_reader(tokenizer_of(job, merged.folder / MODEL))
    if job.given and not job.data:
        file = None
    elif file:
        with llamacpp.load(converted.folder / file.path, job.recipe.ship.num_ctx) as engine:
            answers["merged"] = engine.answer(
                read_questions(asked).questions,
                job.recipe.ship.max_new_tokens,
                read,
                label=f"asking the merged model ({file.quantization})",
                reporter=job.reporter,
            )
        measure_form(job, folder, MERGED, converted.folder / file.path, asked.folder)
    else:
        job.reporter.warn("the merged model is not asked: each of its files is larger than this machine's memory")
    write_json(folder / ANSWERS, asdict(Answers(answers)))
    return AskedMerged(job.onto, file.quantization if file else None)


REASK = Step(
    name="reask",
    does="answers of the merge",
    command="ftkit ship",
    result=AskedMerged,
    after=(ASK,),
    needs=(GGUF, MERGE),
    follows_from=lambda job: [
        fingerprint_of(job, trained_by(job)),
        job.onto,
        *job.rounded,
        *([fingerprint_of(job, TRANSFER)] if TRANSFER.applies(job) else []),
    ],
    costs=of_asking_merged,
    make=_ask_merged,
    applies=lambda job: not job.given or job.given.kind != "gguf",  # which is merged with nothing
    keep=True,
)

"""The dataset looked at, before anything is trained: what `ftkit data` shows."""

from __future__ import annotations

from ftkit.data.survey import Survey, survey
from ftkit.errors import ModelError
from ftkit.line.job import Job, read_data, tokenizer_of
from ftkit.model.open import open_config


def look(job: Job, show: int = 0) -> Survey:
    """Survey a job's dataset with its model's tokenizer. Raises DataError, and ModelError for a model without a tokenizer."""
    rows = read_data(job)
    opened = open_config(job.source, job.reporter)
    if opened.kind == "config" or not opened.folder:
        raise ModelError("A config.json alone has no tokenizer, so that tokens cannot be counted.", "name the model: --model REF")
    training = job.recipe.training
    parts = {"train": rows.train, "validation": rows.validation, **({"test": rows.test} if "test" in job.data else {})}
    return survey(
        tokenizer_of(job, opened.folder, base=True),
        parts,
        max_length=training.max_length,
        effective_batch_size=training.effective_batch_size,
        seed=training.seed,
        show=show,
        faulty=rows.left_out,
    )

"""What `ftkit ship --html` shows: figures, answers and curves of what was shipped, gathered from the run as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ftkit.data.rows import Message
from ftkit.files import file_fingerprint
from ftkit.gguf.files import GgufFile
from ftkit.line import behaviour
from ftkit.line.ask import ASK, read_answers, read_questions
from ftkit.line.behaviour import MERGED, SHIPPED
from ftkit.line.job import Job
from ftkit.line.line import Shipped, states
from ftkit.line.prove import PROVE, SCORE_NAMES
from ftkit.line.reask import REASK
from ftkit.line.step import Made
from ftkit.line.train import TRAIN
from ftkit.proof.record import CARD, PROBES, read_record
from ftkit.proof.score import is_right
from ftkit.report.ship_page import Answer, ShipPage, Sized


def page(job: Job, shipped: Shipped) -> ShipPage:
    """Of what `ship` has just delivered, or found up to date. Nothing is asked or measured again."""
    made = {state.step.name: state.done for state in states(job)}
    asked, proven, told, trained = (made.get(step.name) for step in (ASK, PROVE, REASK, TRAIN))
    assert asked
    assert proven
    record, _ = read_record(shipped.record)
    folder = shipped.record.parent
    handed = [path for path in (shipped.record, *(folder / name for name in (shipped.modelfile.name, PROBES, CARD))) if path.is_file()]
    places = {"before": asked, MERGED: told, SHIPPED: proven}
    forms = {name: behaviour.read(found.folder).get(name) for name, found in places.items() if found}
    return ShipPage(
        record=record,
        held_out=not job.given or "test" in job.data,
        files=[
            (record.file.name, record.file.size_bytes, record.file.sha256),
            *((path.name, path.stat().st_size, file_fingerprint(path)) for path in handed),
        ],
        answers=list(_answers(job, asked, proven)),
        sizes=list(_sizes(shipped, told)),
        curve=trained.result.curve if trained else (),
        divergence={name: form.divergence_by_position for name, form in forms.items() if form},
    )


def _answers(job: Job, asked: Made[Any], proven: Made[Any]) -> Iterator[Answer]:
    first, after = read_questions(asked), read_answers(proven)["shipped"]
    given = {name: first.answers[name] for name in ("before", "trained") if name in first.answers} | {"shipped": after}
    for number, (question, expected) in enumerate(zip(first.questions, first.expected, strict=True)):
        said = {name: answers[number] for name, answers in given.items()}
        yield Answer(
            words_of(question), expected, said, {name: is_right(expected, text, job.recipe.evaluate) for name, text in said.items()}
        )


def words_of(messages: Sequence[Message]) -> str:
    """A question; where more than one message is said before the answer, with who says it."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


def _sizes(shipped: Shipped, told: Made[Any] | None) -> Iterator[Sized]:
    """Each file of which it is known what it keeps."""
    for weighed in shipped.weighed:
        if weighed.kept_percent is not None:
            yield Sized(weighed.quantization, weighed.bytes, weighed.kept_percent, chosen_by=True, fails=weighed.fails)
    files = {file.quantization: file for file in shipped.files}
    *_, last = shipped.files
    shown: dict[str, tuple[str, GgufFile]] = {last.quantization: (last.quantization, last)}
    if told and told.result.asked_as in files:
        shown[SCORE_NAMES[told.result.onto]] = (f"merged ({told.result.asked_as})", files[told.result.asked_as])
    for form, (name, file) in shown.items():
        if form in shipped.forms and (kept := shipped.forms[form].kept):
            yield Sized(name, file.bytes, kept.percent, kept.low, kept.high)

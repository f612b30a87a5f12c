"""The step `register`: the shipped file becomes a model in Ollama. No folder of the run: the server may forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftkit.check import Check, not_made
from ftkit.data.rows import Message, has_tools
from ftkit.data.template import dated, render, renders, token_ids
from ftkit.data.turns import answer_reader
from ftkit.engines import ollama
from ftkit.errors import ModelError, NameTakenError, ProofError
from ftkit.files import fingerprint, write_atomically
from ftkit.line.ask import Asked, read_answers, read_questions
from ftkit.line.close import Shipping
from ftkit.line.job import Job, tokenizer_of
from ftkit.line.merge import MODEL, Merged
from ftkit.line.prove import PROVE, Proven
from ftkit.line.record import shipped_folder
from ftkit.line.step import Made, Step
from ftkit.model.source import gguf_architecture, open_gguf
from ftkit.ollama.formats import own_format
from ftkit.ollama.modelfile import Modelfile, make_modelfile
from ftkit.ollama.register import clean_up, register, temporary_name
from ftkit.ollama.template import find_format
from ftkit.plan.cost import of_registering
from ftkit.proof.gate import SERVED, judge_served
from ftkit.proof.score import score
from ftkit.units import bytes_text

TOOLS_IN_OLLAMA = (
    "the server was asked with the model's own prompts; its API writes and reads tools by a format of Ollama's, which ftkit does not "
    "write. llama-server does by the file's own template: llama-server --jinja -m FILE"
)
OLLAMA_ROWS = 20  # held-out questions that a server is asked after registering; the proof has asked them all


def write_modelfile(job: Job, merged: Made[Merged], shipped: Shipping) -> Path:
    """The Modelfile of what is handed on, written again where the file or a sampling value is another.

    Recorded as what ships: `chat`, `status` and registering read it.
    """
    run, ship, path = job.run, job.recipe.ship, shipped_folder(job) / "Modelfile"
    mark = fingerprint(shipped.fingerprint, shipped.file.quantization, ship.model_dump(), version("ftkit"))
    if run.manifest().get("shipped", {}).get("mark") != mark or not path.is_file():
        modelfile = _modelfile(job, tokenizer_of(job, merged.folder / MODEL), shipped.path, merged.result.stops)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, modelfile.text().encode())
        gguf = shipped.path.relative_to(run.folder).as_posix()
        run.record(shipped={"step": shipped.step, "gguf": gguf, "system": ship.system, "num_ctx": ship.num_ctx, "mark": mark})
    return path


def _modelfile(job: Job, tokenizer: Any, gguf: Path, stops: Sequence[int]) -> Modelfile:
    try:
        chat = find_format(renders(tokenizer), lambda day: renders(dated(tokenizer, day)))
    except ModelError as error:
        job.reporter.warn(f"{error.message} Ollama is left to use the template inside the GGUF.")
        chat = None
    texts = [str(text) for text in tokenizer.convert_ids_to_tokens(list(stops))]
    reader = open_gguf(gguf)
    own, adds_bos = own_format(gguf_architecture(reader), renders(tokenizer)), reader.get_field("tokenizer.ggml.add_bos_token")
    bos = str(tokenizer.bos_token or "") if adds_bos is not None and adds_bos.contents() else ""  # the server puts it before a prompt
    return make_modelfile(f"./{gguf.name}", chat, job.recipe.ship, bos=bos, stops=texts, own=own)


def refuse_anothers_name(job: Job, client: Any, replace_model: bool) -> None:
    """Raise NameTakenError where Ollama has a model of this name that is not one which this run registered, or was about to."""
    name, recorded = job.recipe.ship.name, job.run.manifest().get("ollama", {})
    digest = ollama.digest_of(client, name)
    if digest and not replace_model and [name, digest] not in _ours(recorded):
        raise NameTakenError(
            f"Ollama has a model named {name} that this run did not make; it is left as it is.",
            "replace it: ftkit ship --ollama --yes; or take another name: --set ship.name=NAME",
        )


def _ours(recorded: Mapping[str, Any]) -> list[list[str]]:
    """(name, digest) of the models in Ollama that this run made, or was about to."""
    last = [[recorded["name"], recorded["digest"]]] if "digest" in recorded else []
    return [*recorded.get("naming", []), *last]


def register_shipped(
    job: Job, client: Any, shipped: Shipping, merged: Made[Merged], asked: Made[Asked], proven: Made[Proven]
) -> tuple[str, list[Check]]:
    """Create the model in Ollama unless it is there from this very file and Modelfile; its name, and what was checked of it.

    Whatever moment it is killed at, the next ship knows what of Ollama's is this run's: the temporary name stands in the
    index before the server hears it, and the digest before the name gets it.
    """
    run, reporter, name = job.run, job.reporter, job.recipe.ship.name
    mark, recorded = run.manifest()["shipped"]["mark"], run.manifest().get("ollama", {})
    if left := recorded.get("temporary"):
        clean_up(client, recorded.get("temporary_for", name), left, reporter)
    digest, server = ollama.digest_of(client, name), ollama.server_of(client)
    made = {"digest": digest, "shipped": mark, "server": server}
    if digest and "answers" in recorded and made == {key: recorded.get(key) for key in made}:
        judged = _judge(job, recorded["answers"], asked, proven)  # again: by another rule, the answers are the same
        if judged.outcome == "failed":
            raise ProofError(
                f"{judged.name}: {judged.detail}",
                "allow more to be lost: --set ship.max_loss_points=…; score by another rule: --set evaluate.by=…; or ship without: "
                "--no-ollama",
            )
        return name, [judged if entry["name"] == SERVED else Check(**entry) for entry in recorded["checks"]]
    if ollama.models_folder() is None:
        reporter.note(f"Ollama is on another machine: whether its disk takes {bytes_text(shipped.path.stat().st_size)} was not looked at")
    tokenizer = tokenizer_of(job, merged.folder / MODEL)
    reporter.step(f"registering {name} in Ollama")
    modelfile = _modelfile(job, tokenizer, shipped.path, merged.result.stops)
    temporary = temporary_name(name)
    run.record(ollama={**recorded, "temporary": temporary, "temporary_for": name})
    answers: list[str] = []

    def verify(unchecked: str) -> Check:
        answers[:] = _ask(job, client, unchecked, asked, tokenizer, modelfile.bos)
        return _judge(job, answers, asked, proven)

    def remember(digest: str) -> None:
        naming = [*recorded.get("naming", []), [name, digest]]
        run.record(ollama={**recorded, "temporary": temporary, "temporary_for": name, "naming": naming})

    registered = register(
        client,
        name,
        shipped.path,
        modelfile,
        renders(tokenizer),
        temporary=temporary,
        count=lambda text: len(token_ids(tokenizer, text)),
        verify=verify,
        before_naming=remember,
        reporter=reporter,
    )
    checks = [asdict(check) for check in registered.checks]
    if any(has_tools(question) for question in read_questions(asked).questions[:OLLAMA_ROWS]):
        checks.append(asdict(not_made("tools in Ollama's API", TOOLS_IN_OLLAMA)))
    made = {"name": name, "digest": registered.digest, "shipped": mark, "server": server, "answers": answers, "checks": checks}
    run.record(ollama={**made, "naming": [entry for entry in _ours(recorded) if entry[0] != name]})
    return name, [Check(**entry) for entry in checks]


def _ask(job: Job, client: Any, name: str, asked: Made[Asked], tokenizer: Any, bos: str) -> list[str]:
    """The server's answers to the first held-out questions."""
    questions = read_questions(asked).questions[:OLLAMA_ROWS]

    def prompt(messages: Sequence[Message]) -> str:
        return render(tokenizer, messages, ask=True).removeprefix(bos)

    given = ollama.answer(
        client,
        name,
        questions,
        job.recipe.ship.max_new_tokens,
        answer_reader(tokenizer),
        render=prompt,
        options=ollama.thread_options(),
        reporter=job.reporter,
    )
    served = score(read_questions(asked).expected[:OLLAMA_ROWS], given, job.recipe.evaluate)
    job.reporter.note(f"Ollama answers {served.right} of {served.rows} held-out questions right")
    return given


def served_again(job: Job, asked: Made[Asked], proven: Made[Proven]) -> list[Check]:
    """The check of the answers that Ollama gave to what shipped last, at today's limits; none where it was not asked."""
    index = job.run.manifest()
    recorded, last = index.get("ollama", {}), index.get("shipped", {})
    asked_last = recorded.get("answers") and recorded.get("shipped") == last.get("mark")
    return [_judge(job, recorded["answers"], asked, proven)] if asked_last else []


def _judge(job: Job, given: Sequence[str], asked: Made[Asked], proven: Made[Proven]) -> Check:
    """Whether the server's answers are as right as the file's."""
    expected, file = read_questions(asked).expected[:OLLAMA_ROWS], read_answers(proven)["shipped"][:OLLAMA_ROWS]
    return judge_served(expected, file, given, job.recipe.evaluate, job.recipe.ship.max_loss_points)


REGISTER: Step[None] = Step(
    name="register",
    does="a model in Ollama",
    command="ftkit ship --ollama",
    result=type(None),
    after=(PROVE,),
    costs=of_registering,
    make=None,
)

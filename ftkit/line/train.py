"""The step `train`: supervised fine-tuning as planned; and two real steps, measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ftkit.data.manner import calling_of
from ftkit.data.mask import cut, learnt
from ftkit.data.rows import CALLS, Message, Row, any_has_tools
from ftkit.data.stops import configured_stops, stops
from ftkit.data.template import is_dated, render, renders, token_ids
from ftkit.data.turns import expected, question, turns_of
from ftkit.engines import hf, llamacpp
from ftkit.errors import FtkitError, ModelError, RecipeError, ToolMissingError, first_line
from ftkit.line.job import Job, Rows, base_folder, computes_on, open_base, read_data, tokenizer_of
from ftkit.line.plan import PLAN, expected_answers, recorded, training_inputs
from ftkit.line.step import Made, Step, fingerprint_of
from ftkit.line.tokens import take
from ftkit.machine import device, ranks, torch_cuda
from ftkit.machine.device import Device
from ftkit.merge.deltas import changes_of, refuse_what_cannot_be_merged
from ftkit.plan import measured
from ftkit.plan.cost import TRAINING_BYTES, of_training
from ftkit.plan.plan import MemoryPlan
from ftkit.proof.compare import compare_tokens, differing_prompt
from ftkit.proof.probes import HARD_TEXTS, conversations, tool_conversations
from ftkit.proof.score import refuse_unreadable
from ftkit.train import probe as probing
from ftkit.train.answers import Asked
from ftkit.train.arguments import Settings
from ftkit.train.probe import Probe
from ftkit.train.retry import OutOfMemory, read_retries
from ftkit.train.staging import is_remote, stage_of
from ftkit.train.training import TrainResult, train
from ftkit.units import bytes_text

EXAMPLES = "examples"  # the folder of what is trained on, in tokens, as long as the training lasts
HEAP = 2  # times what its tensors and libraries need that a process on a CPU may hold: the C library's heap grows with holes
ROWS_RENDERED = 200  # training rows whose prompts llama.cpp renders before they are trained on, the first


@dataclass(frozen=True, kw_only=True)
class Trained(TrainResult):
    """What a training recorded, beside what was planned for it; None: begun by ftkit before 0.2, which recorded no plan."""

    planned_allocated_bytes: int | None = None
    planned_reserved_bytes: int | None = None
    planned_device_bytes: int | None = None
    planned_for: str | None = None


def _settings(job: Job, planned: MemoryPlan, base: Path) -> Settings:
    fit, (cuda, dtype) = planned.chosen, computes_on(job, hf.model_type(base))
    peak_bytes = fit.peak.allocated_bytes if cuda else fit.peak.device_bytes
    return Settings(
        fit.per_device_train_batch_size,
        fit.gradient_accumulation_steps,
        fit.gradient_checkpointing,
        dtype,
        cuda,
        peak_bytes,
        held_at_most=None if cuda else HEAP * (fit.peak.allocated_bytes + TRAINING_BYTES),
        longest_tokens=planned.max_length if fit.max_tokens else None,
        most_learnt_tokens=round(planned.labelled_share * planned.max_length),
        packing=fit.packing,
        fsdp=ranks.shares_weights(job.recipe),
    )


def _make(job: Job, folder: Path, _: Made[Any]) -> Trained:
    last, recipe, reporter = recorded(job.run), job.recipe, job.reporter
    assert last
    planned = last.memory
    opened, rows = open_base(job), read_data(job)
    assert opened.folder
    tokenizer = tokenizer_of(job, opened.folder, base=True)
    if is_dated(tokenizer.chat_template):
        reporter.note(f"the chat template writes today's date: it is {recipe.data.date}, here and in the shipped file (data.date)")
    if opened.gguf:
        _check_recovered_tokenizer(job, opened.gguf, tokenizer, [_written(tokenizer, row) for row in rows.train[:200]])
    if recipe.training.method != "full":
        refuse_what_cannot_be_merged(opened.folder, recipe.lora, trust_remote_code=recipe.trust_remote_code)
    if job.begins_with:
        changes_of(opened.folder, job.begins_with.path, trust_remote_code=recipe.trust_remote_code)
    _check_prompts(job, tokenizer, rows, opened.folder)
    asked = _asked(job, tokenizer, rows)
    settings = _settings(job, planned, opened.folder)
    batches = f"{settings.per_device_train_batch_size} × {settings.gradient_accumulation_steps}"
    count = ranks.world_size()
    together = f", split among {count} processes" if count > 1 else ""
    reporter.step(f"training ({recipe.training.method}, {batches}{together}, learning rate {recipe.training.peak_learning_rate:g})")
    if count > 1:
        held = "the processes share the weights out (FSDP)" if settings.fsdp else "each process holds the whole model"
        reporter.note(f"{held}: the planned memory is of each; what it sees of each row is not kept")
    stage = stage_of(folder) if is_remote(folder) else None
    if stage:
        reporter.note(f"{job.run.folder} lies on a mounted drive: checkpoints are written to {stage} first, then copied and verified")
    learnt_from, checked = take(job, tokenizer, rows, (stage or folder) / EXAMPLES)
    missed = partial(_remember_miss, job, planned, settings)
    begins_with = job.begins_with.path if job.begins_with else None
    ranks.tell(_Shared(folder, stage, opened.folder, planned, settings))
    result = train(
        *(recipe, settings, opened.folder, tokenizer, learnt_from, checked, folder, reporter, asked),
        missed=missed,
        stage=stage,
        begins_with=begins_with,
    )
    shutil.rmtree(folder / EXAMPLES, ignore_errors=True)  # Windows keeps a mapped file
    if result.tokens_per_second and count == 1:  # a plan's time is of one card
        _remember_speed(job, planned, result.tokens_per_second)
    if not settings.cuda and not result.retries:
        _remember_held(job, planned, result.peak_bytes)
    peak = planned.chosen.peak
    return Trained(
        **{**asdict(result), "curve": result.curve, "reading": result.reading, "retries": result.retries},
        planned_allocated_bytes=peak.allocated_bytes,
        planned_reserved_bytes=peak.reserved_bytes,
        planned_device_bytes=peak.device_bytes,
        planned_for=planned.device.name,
    )


@dataclass(frozen=True)
class _Shared:
    """What the first process tells the others, once all is there to be trained on."""

    folder: Path  # of the step
    stage: Path | None
    base: Path
    planned: MemoryPlan
    settings: Settings


def train_beside(job: Job) -> None:
    """Train on what the first process planned and rendered, and write nothing; where it finds all trained, nothing is done."""
    from datasets import Dataset

    told: _Shared | None = ranks.tell()
    if told:
        learnt_from, checked = (
            Dataset.from_file(str((told.stage or told.folder) / EXAMPLES / f"{name}.arrow")) for name in ("train", "validation")
        )
        tokenizer = tokenizer_of(job, told.base, base=True)
        begins_with = job.begins_with.path if job.begins_with else None
        train(
            *(job.recipe, told.settings, told.base, tokenizer, learnt_from, checked, told.folder),
            missed=partial(_remember_miss, job, told.planned, told.settings),
            stage=told.stage,
            begins_with=begins_with,
        )


def _asked(job: Job, tokenizer: Any, rows: Rows) -> Asked | None:
    """The validation rows whose answers are scored while training. Raises RecipeError where none can be, and they are needed."""
    recipe = job.recipe
    if not recipe.evaluate.every:
        return None
    chosen = list(islice((row for row in rows.validation if not row.is_text), recipe.evaluate.rows))
    if not chosen:
        if recipe.training.metric_for_best_model == "right":
            raise RecipeError(
                "training.metric_for_best_model: no validation row asks anything.", "--set training.metric_for_best_model=eval_loss"
            )
        job.reporter.warn("no validation row asks anything: no answers are scored while training")
        return None
    refuse_unreadable(recipe.evaluate, expected_answers(tokenizer, chosen))
    expects = [expected(tokenizer, row) for row in chosen]
    return Asked([question(tokenizer, row) for row in chosen], expects, recipe.evaluate, recipe.ship.max_new_tokens)


def _written(tokenizer: Any, row: Row) -> str:
    return str(row.messages[0]["content"]) if row.is_text else render(tokenizer, row.messages, ask=False)


def _remember_speed(job: Job, planned: MemoryPlan, tokens_per_second: float) -> None:
    """Keep a training's speed for the next plan, if it ran on the device that it was planned for. Training does not fail by this."""
    try:
        real = device.choose()
        if planned.device.name == real.name:
            measured.remember_speed(real, measured.named_method(job.recipe), job.source, tokens_per_second)
    except (OSError, FtkitError) as error:
        job.reporter.warn(f"the speed of this training is not kept for the next plan: {first_line(error)}")


def _remember_miss(job: Job, planned: MemoryPlan, chosen: Settings, settings: Settings, short: OutOfMemory) -> None:
    """Keep for the next plan that memory was not enough, if this is what was planned, for this device. Training does not end by this."""
    real, peak = device.choose(), planned.chosen.peak
    if planned.device.name != real.name or settings != chosen:
        return
    expected = peak.reserved_bytes if settings.cuda else peak.allocated_bytes + TRAINING_BYTES
    beyond_bytes = short.held_bytes + short.requested_bytes - expected
    if beyond_bytes <= 0:
        job.reporter.warn("less was held than planned when memory ran out: other programs have the rest of it, and the plan stays")
        return
    unkept = f"that the plan was too small by {bytes_text(beyond_bytes)} is not kept for the next"
    _remember_beyond(job, real, beyond_bytes, unkept)


def _remember_held(job: Job, planned: MemoryPlan, peak_bytes: int) -> None:
    """Keep what a process on a CPU held beyond its plan: the C library's heap has holes that no tensor fits into. Counted in the next."""
    real = device.choose()
    beyond_bytes = peak_bytes - planned.chosen.peak.allocated_bytes - TRAINING_BYTES
    if planned.device.name != real.name or beyond_bytes <= 0:
        return
    _remember_beyond(job, real, beyond_bytes, f"that this training held {bytes_text(beyond_bytes)} more than planned is not kept")


def _remember_beyond(job: Job, real: Device, beyond_bytes: int, unkept: str) -> None:
    """Keep it for the next plan; that it cannot be kept is said, and ends no training."""
    try:
        measured.remember_miss(real, measured.subject(job.recipe, job.source.fingerprint), beyond_bytes)
    except (OSError, FtkitError) as error:
        job.reporter.warn(f"{unkept}: {first_line(error)}")


def goes_on_smaller(job: Job) -> bool:
    """Whether this training was begun and memory ran out in it: then what it went on with counts, and no plan."""
    return any(retry.why == "out of memory" for retry in read_retries(job.run.partial(TRAIN.name, fingerprint_of(job, TRAIN))))


def _check_recovered_tokenizer(job: Job, gguf: Path, tokenizer: Any, rows: list[str]) -> None:
    """A tokenizer that was rebuilt from a GGUF is a guess until llama.cpp gives the same ids for the training texts."""
    with llamacpp.load(gguf) as engine:
        count = compare_tokens([*HARD_TEXTS, *rows], lambda text: token_ids(tokenizer, text), engine.tokenize, gguf.name)
    job.reporter.note(f"the tokenizer rebuilt from {gguf.name} gives llama.cpp's ids on {count} texts")


def _check_prompts(job: Job, tokenizer: Any, rows: Rows, folder: Path) -> None:
    """Refuse, before it is trained on, a template that llama.cpp renders otherwise, and calls of tools that a server would not end.

    Raises ModelError.
    """
    calling = next((row for row in rows.train if any(CALLS in message for message in row.messages)), None)
    if calling:
        end = calling_of(tokenizer).end
        *_, token = token_ids(tokenizer, end)
        if token not in stops(tokenizer, configured_stops(folder)):
            raise ModelError(
                f"{calling.where}: a call of tools ends with {end}, and the model is not configured to stop there.",
                f"add {token} to eos_token_id in its generation_config.json",
            )
    asked: list[Sequence[Message]] = [turn.asked for row in rows.train[:ROWS_RENDERED] for turn in turns_of(tokenizer, row)]
    asked += [
        *(question(tokenizer, row) for row in rows.test if not row.is_text),
        *conversations(renders(tokenizer)),
        *(tool_conversations(tokenizer) if any_has_tools(rows.train) else ()),
    ]
    try:
        with llamacpp.rendering(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token) as engine:
            different = differing_prompt((render(tokenizer, messages, ask=True), engine.render(messages)) for messages in asked)
    except ToolMissingError as error:
        job.reporter.warn(f"whether llama.cpp renders the same prompts was not looked at: {error.message}")
        return
    if different:
        hint = "take the model's newest chat template (chat_template.jinja on its page), or another: --set data.template=chatml"
        raise ModelError(f"llama.cpp renders the model's chat template otherwise, {different}", hint)


TRAIN = Step(
    name="train",
    does="fine-tune as planned",
    command="ftkit train",
    result=Trained,
    needs=(PLAN,),
    follows_from=training_inputs,
    costs=of_training,
    make=_make,
    applies=lambda job: job.given is None,
    resumable=lambda _: True,
    keep=True,
)


def refuse_probe(job: Job) -> None:
    """Raise RecipeError where two real steps cannot be run: without rows, or for another device than this machine's; ToolMissingError
    without the attention that is asked for, or a torch that computes there."""
    real, wanted = device.choose(), job.device
    if wanted.kind != real.kind or (real.kind == "cuda" and wanted.name != real.name):
        raise RecipeError(f"--probe runs on this machine's {real.name}; the plan is for {wanted.name}.", "leave --gpu and --vram out")
    if job.recipe.training.fsdp:
        raise RecipeError("--probe runs in one process, which shares no weights out.", "leave out --probe, or --set training.fsdp=false")
    torch_cuda.refuse(real)
    hf.refuse_missing_attention(job.recipe.training.attention, cuda=real.kind == "cuda")
    if not job.data:
        raise RecipeError("--probe trains on real rows.", "name them: --data train.jsonl")


def probe(job: Job, planned: MemoryPlan) -> Probe:
    """Two real optimizer steps as planned, measured. Raises as `refuse_probe` does."""
    refuse_probe(job)
    recipe, base = job.recipe, base_folder(job)
    tokenizer = tokenizer_of(job, base, base=True)
    examples = list(cut(learnt(tokenizer, read_data(job).train, recipe.training.objective), recipe.training.max_length))
    job.reporter.step("probing: two real steps")
    with hf.room_to("train as planned"), tempfile.TemporaryDirectory(dir=job.run.folder, prefix=".probe-") as folder:
        probed = probing.probe(recipe, _settings(job, planned, base), base, tokenizer, examples, Path(folder))
    subject = measured.subject(recipe, job.source.fingerprint)
    measured.remember(device.choose(), subject, planned.chosen.peak, probed.allocated_bytes, probed.reserved_bytes)
    return probed

"""The line: its steps in order, and the four ways to walk it: plan, train, ship, build."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, get_args

from ftkit.check import Check
from ftkit.data.lengths import TokenCounts
from ftkit.engines import hf, ollama
from ftkit.errors import DoesNotFitError, NameTakenError, ProofError, RecipeError, RunError, ToolFailedError, ToolMissingError
from ftkit.gguf.files import GgufFile
from ftkit.line.adapter import (
    ADAPTER,
    ServedAdapter,
    adapter_checks,
    adapter_files,
    judge_adapter,
    kept_beside,
    refuse_adapter,
    served,
)
from ftkit.line.adopt import ADOPT, Adopted, refuse, trained_by
from ftkit.line.adopt import sizes as adopted_sizes
from ftkit.line.ask import ASK, refuse_rule
from ftkit.line.bits import BITS, Bits
from ftkit.line.choose import FAILED_TYPES, WEIGH, Weighed, candidates, is_smallest, of_type, passed_over, trials
from ftkit.line.close import CLOSE, OF_FILE, Closed, Shipping, shipping
from ftkit.line.gguf import GGUF, IMATRIX, QUANTISE, refuse_missing_imatrix, refuse_type
from ftkit.line.job import Job, Onto, ToFetch, base_to_fetch
from ftkit.line.merge import MERGE
from ftkit.line.plan import PLAN, recorded
from ftkit.line.prove import PROOF, PROVE, Form, Proof, judge, judged, loses_gain
from ftkit.line.reask import REASK
from ftkit.line.record import hand_over
from ftkit.line.register import REGISTER, refuse_anothers_name, register_shipped, served_again, write_modelfile
from ftkit.line.shortage import Shortage, disk_by_folder, refuse_shortages, shortages
from ftkit.line.step import Made, Step, ensure, find, fingerprint_of, last
from ftkit.line.teach import TEACH
from ftkit.line.train import TRAIN, Trained, goes_on_smaller, train_beside
from ftkit.line.transfer import TRANSFER
from ftkit.machine import device, ranks, torch_cuda
from ftkit.machine.llama_cpp import need_converter
from ftkit.model.open import bytes_to_fetch
from ftkit.plan import measured
from ftkit.plan.cost import Cost, Sizes
from ftkit.plan.plan import MARGIN, MemoryPlan
from ftkit.progress import SILENT
from ftkit.proof.score import Score
from ftkit.run import AT_HUB, TRAINED_WITH, discard
from ftkit.train.reporting import refuse_missing_reporters
from ftkit.units import bytes_text

LINE: tuple[Step[Any], ...] = (
    PLAN,
    TRAIN,
    ADOPT,
    ASK,
    TRANSFER,
    MERGE,
    GGUF,
    REASK,
    IMATRIX,
    QUANTISE,
    BITS,
    CLOSE,
    PROVE,
    ADAPTER,
    REGISTER,
)


DEQUANTISED = "dequantised"  # in the run's manifest: of which training neither the merge into the source nor its closed file kept enough


@dataclass(frozen=True)
class Planned:
    """A plan with what is free, fetched and measured today, and what every step of the line will cost."""

    memory: MemoryPlan
    tokens: TokenCounts | None  # None: planned without a dataset
    costs: tuple[Cost, ...]
    fetch_bytes: int  # of the weights, those that are not on this machine yet
    shortages: tuple[Shortage, ...]


def plan(job: Job) -> Planned:
    """Trace what the run's step needs and choose batch × accumulation. The run must be open.

    Raises ModelError, DataError and RecipeError; a plan that does not fit is a result, not an error.
    """
    _refuse_given(job)
    refuse_type(job)
    ensure(job, PLAN)
    made = recorded(job.run)
    assert made
    if not (job.recipe.budget.gpu or job.recipe.budget.vram) and (doubt := torch_cuda.doubt(job.device)):
        job.reporter.warn(f"{doubt.message} To train there: {doubt.hint}")
    if job.device.kind == "cpu" and (unused := device.unused_gpu()):
        job.reporter.note(unused)
    speed = measured.tokens_per_second(job.device, measured.named_method(job.recipe), job.source)
    memory, fetch_bytes = made.memory.today(job.device.free_bytes, speed), bytes_to_fetch(job.source)
    costs = costs_of(job, memory)
    begun = job.run.partial(TRAIN.name, fingerprint_of(job, TRAIN))
    return Planned(memory, made.tokens, costs, fetch_bytes, tuple(shortages(job, costs, ToFetch(0, fetch_bytes, 0), begun=begun)))


def costs_of(job: Job, memory: MemoryPlan) -> tuple[Cost, ...]:
    """What each step needs, in the order of the line."""
    sizes = memory.sizes(_largest(job).recipe.ship)
    return tuple(cost for step in LINE for cost in step.costs(sizes))


def _largest(job: Job) -> Job:
    """The job, with the largest type that may have to be made."""
    return of_type(job, "Q6_K") if is_smallest(job) else job


def is_trained(job: Job) -> bool:
    """Whether the run holds the finished training of this recipe, data and model, or it was trained elsewhere."""
    return job.given is not None or find(job, TRAIN) is not None


def _refuse_given(job: Job) -> None:
    if job.given:
        raise RecipeError(
            f"`trained` names {job.given.path}, which is trained already.", "ship it: ftkit ship; see what that does: ftkit ship --dry-run"
        )


def adopt(job: Job) -> Made[Adopted]:
    """Look through what was trained elsewhere, and take it into the run. Raises ModelError for what could not be shipped."""
    refuse(job)
    if not find(job, ADOPT):
        _refuse_small_machine(job)
        job.run.record(**_commits(job))
    return ensure(job, ADOPT)


def train(job: Job) -> Made[Trained]:
    """Train as planned. Raises DoesNotFitError before anything is loaded, InterruptedRunError on Ctrl-C."""
    _refuse_given(job)
    refuse_adapter(job)
    trained = is_trained(job)
    if ranks.world_size() > 1 or not trained:
        ranks.refuse(job.recipe, len(device.find_gpus()))
    ranks.share_weights(job.recipe)
    if trained:
        _remember(job)
        ranks.tell(None)  # there is nothing to train
        return ensure(job, TRAIN)  # up to date: nothing has to fit any more
    refuse_missing_reporters(job.recipe.training.report_to)
    real = device.choose()
    torch_cuda.refuse(real)
    hf.refuse_missing_attention(job.recipe.training.attention, cuda=real.kind == "cuda")
    planned = plan(job)
    memory, fit, on_smaller = planned.memory, planned.memory.chosen, goes_on_smaller(job)
    if not fit.fits and not on_smaller:
        raise DoesNotFitError(
            f"{job.recipe.training.method} at {memory.max_length} tokens needs {bytes_text(fit.peak.device_bytes)}; "
            f"{memory.device.name} has {bytes_text(fit.budget_bytes)}, of which {MARGIN:.0%} is kept free.",
            "see what would fit, each change computed: ftkit plan",
        )
    if memory.shares > 1 and memory.compute_dtype == "float16":
        raise RecipeError(
            f"{memory.device.name} computes in float16, whose loss scaling is not supported with FSDP.",
            "--set training.fsdp=false, or --set training.compute_dtype=float32",
        )
    refuse_ram_for_all(memory, on_smaller=on_smaller)
    refuse_shortages(planned.shortages)
    if earlier := job.run.finished(TRAIN.name):
        job.reporter.note(f"an earlier training with other inputs stays in {earlier.folder}")
    ours = job.run.partial(TRAIN.name, fingerprint_of(job, TRAIN))
    for held in job.run.holds([TRAIN.name]):
        if held.last_step and held.path.suffix == ".partial" and held.path != ours:
            job.reporter.note(
                f"a training with other inputs was begun, and stays at step {held.last_step} in {held.path}: its recipe goes on with it, "
                "ftkit clean removes it"
            )
    _remember(job)
    return ensure(job, TRAIN)


def _remember(job: Job) -> None:
    """So that the run's folder stands for its training, also of a recipe that was changed for this once, and of what then changes at
    the hub."""
    changed = json.loads(json.dumps(job.changed, default=str))  # a date is one in text, too
    job.run.record(**{TRAINED_WITH: changed}, **_commits(job))


def _commits(job: Job) -> dict[str, Any]:
    """The manifest's entry of what a job takes of the hub, beside what the run's other trainings were begun with."""
    return {AT_HUB: {**job.run.at_hub(), **job.at_hub}}


def refuse_ram_for_all(memory: MemoryPlan, *, on_smaller: bool = False) -> None:
    """Raise DoesNotFitError where RAM is planned for, and several processes would each take what is planned, unless it goes on with
    less; and where each loads into it what GPUs then share out."""
    count, fit = ranks.world_size(), memory.chosen
    if memory.shares > 1 and memory.device.kind == "cuda" and fit.inventory.method != "qlora":
        needed, free = count * fit.inventory.weights_bytes, device.processor().free_bytes
        if needed > free:
            raise DoesNotFitError(
                f"{count} processes load {bytes_text(needed)} of weights into RAM, to share them out, and {bytes_text(free)} are free.",
                "take 4-bit weights, which are loaded on the GPUs: --set training.method=qlora",
            )
    if memory.device.kind == "cpu" and not on_smaller and count > 1 and count * fit.peak.device_bytes > fit.budget_bytes:
        raise DoesNotFitError(
            f"{count} processes need {bytes_text(count * fit.peak.device_bytes)} of RAM, and {bytes_text(fit.budget_bytes)} can be used.",
            "train in one process: ftkit train",
        )


def help_to_train(job: Job) -> None:
    """What a process does that is not the first: it waits for its plan, and trains with it. Nothing is written or said here."""
    ranks.refuse(job.recipe, len(device.find_gpus()))
    torch_cuda.refuse(device.choose())
    ranks.share_weights(job.recipe)
    train_beside(replace(job, reporter=SILENT))


@dataclass(frozen=True)
class Shipped:
    """What `ship` delivers."""

    gguf: Path  # in the folder that is handed on, with the two that follow
    modelfile: Path
    record: Path
    files: list[GgufFile]
    merged_onto: str
    checks: list[Check]
    right_by: str  # what of an answer is compared with the expected one
    scores: dict[str, Score]
    forms: dict[str, Form]
    proof_file: Path
    same_answers: Score | None  # of the trained model and the shipped file; None where the trained model could not be asked
    examples: list[dict[str, str]]
    missing_quantization: str | None  # the wanted type, where llama-quantize is not here
    bits: Bits | None  # None: not asked for; so the next
    closed: Closed | None
    adapter: ServedAdapter | None  # None: not asked for
    weighed: tuple[Weighed, ...]  # types that were tried, from small to large, where the smallest was to be found
    registered_as: str | None
    not_registered_because: str | None
    register_with: str | None  # what to type for that
    fresh: bool


def ship(job: Job, *, use_ollama: bool | None = None, replace_model: bool = False) -> Shipped:
    """Merge, convert, quantise, prove and register what was trained.

    `use_ollama`: True requires a server, False leaves it out, None registers where one answers. A model of that name
    which this run did not register is left as it is, unless `replace_model`.
    Raises RunError where nothing was trained, ProofError where the shipped file does not behave as the trained model.
    """
    _refuse_what_cannot_ship(job, use_ollama, replace_model)
    if job.at_hub.items() - job.run.at_hub().items():  # of a training that was made before that was kept
        job.run.record(**_commits(job))
    asked = ensure(job, ASK)
    refuse_rule(job, asked)
    walked = _walk_until_kept(job, asked)
    job, merged, converted, shipped, proven = walked.job, walked.merged, walked.converted, walked.shipped, walked.proven
    proof = judge(job, asked, proven, shipped)
    modelfile = write_modelfile(job, merged, shipped)
    checks, registered, because, register_with = proof.checks, None, None, None
    adapted = ensure(job, ADAPTER) if ADAPTER.applies(job) else None
    if adapted:
        checks = [*checks, *judge_adapter(job, asked, adapted)]
    try:
        if use_ollama is not False:
            with ollama.connect(job.reporter) as client, ollama.told("Ollama failed"):
                refuse_anothers_name(job, client, replace_model)
                registered, in_ollama = register_shipped(job, client, shipped, merged, asked, proven)
                checks = [*checks, *in_ollama]
    except (
        ToolMissingError,
        ToolFailedError,
        NameTakenError,
        RecipeError,
        ProofError,
    ) as error:  # a server that nobody asked for ends nothing
        if use_ollama:
            raise
        because, register_with = error.message, re.sub("[,;] or ship without: --no-ollama", "", error.hint or "") or None
    finally:  # also where Ollama fails: the file has passed
        told, others = replace(proof, checks=checks), adapter_files(adapted) if adapted else ()
        record = hand_over(job, merged, shipped, proven, ensure(job, trained_by(job)), walked.closed, told, walked.weighed, others)
    return Shipped(
        gguf=record.with_name(shipped.path.name),
        record=record,
        files=[*(file for file in converted.result.files if file != shipped.file), shipped.file],
        modelfile=modelfile,
        merged_onto=merged.result.onto,
        checks=checks,
        right_by=proof.right_by,
        scores=proof.scores,
        forms=proof.forms,
        proof_file=proven.folder / PROOF,
        same_answers=proof.same_answers,
        examples=proof.examples[:3],
        missing_quantization=shipped.missing,
        weighed=walked.weighed,
        bits=shipped.bits,
        closed=walked.closed,
        adapter=served(job, adapted, record.parent) if adapted else None,
        registered_as=registered,
        not_registered_because=because,
        register_with=register_with,
        fresh=proven.fresh,
    )


def _refuse_what_cannot_ship(job: Job, use_ollama: bool | None, replace_model: bool) -> None:
    """All that can be known to be missing before the long work."""
    refuse(job)
    if not is_trained(job):
        other = "holds a training of another recipe, other data or another revision of the model"
        what = other if job.run.finished(TRAIN.name) else "holds no finished training"
        raise RunError(
            f"{job.run.folder} {what}.", "ftkit train, or ftkit build for the whole line; a hub model stays the same as org/name@COMMIT"
        )
    refuse_adapter(job)
    refuse_missing_tools(job)
    if use_ollama:
        with ollama.connect(job.reporter) as client:
            refuse_anothers_name(job, client, replace_model)
    if not job.run.finished(PROVE.name):
        _refuse_small_machine(job)


def _refuse_small_machine(job: Job) -> None:
    """Raise DoesNotFitError where what follows on the training has no room."""
    if job.given and (sizes := _sizes(job)):
        costs = [cost for step in LINE if step.applies(job) for cost in _costs(job, step, sizes)]
        refuse_shortages(shortages(job, costs, base_to_fetch(job)))
    elif planned := recorded(job.run):
        refuse_shortages(shortages(job, costs_of(job, planned.memory), base_to_fetch(job), trained=True))


def refuse_missing_tools(job: Job) -> None:
    """Raise ToolMissingError before long work whose result could not be converted, RecipeError for a type that could not be made."""
    if not job.run.finished(GGUF.name) and not (job.given and job.given.kind == "gguf"):
        need_converter(job.llama_cpp_dir)
    refuse_type(job)
    refuse_missing_imatrix(job)


@dataclass(frozen=True)
class Walked:
    """The line from the merge to the proof, as it was made for a job."""

    job: Job
    merged: Made[Any]
    converted: Made[Any]
    shipped: Shipping
    proven: Made[Any]
    closed: Closed | None  # None: it was not asked for, and not needed
    weighed: tuple[Weighed, ...]


def _walk_until_kept(job: Job, asked: Made[Any]) -> Walked:
    """The first of the ways by which the file keeps what the recipe asks for; else the last that made one, which `judge` then refuses."""
    last: Job | None = None

    def as_it_was_quantised() -> Iterator[Job]:
        if not last:
            yield job

    for way in chain(ways(job, asked), as_it_was_quantised()):
        while walked := _walk(way):
            proof = judged(walked.job, asked, walked.proven, walked.shipped)
            if not proof.would_pass:
                return walked
            lost = next(check for check in proof.checks if check.outcome == "failed")
            job.reporter.warn(f"{walked.shipped.path.name} loses too much: {lost.words}")
            if not passed_over(way, walked.job, proof):
                last = way
                break
    if not last or not (walked := _walk(last)):  # what a way after it threw away is made again
        raise AssertionError("a file that is not to be closed by itself is one")
    return walked


def _walk(job: Job) -> Walked | None:
    """None: the file is to be closed by itself, since as it was it loses too much, and cannot be, which was said."""
    merged, converted = ensure(job, MERGE), ensure(job, GGUF)
    if REASK.applies(job):
        ensure(job, REASK)
    try:
        chosen, weighed = choose_type(job)
        later: list[Made[Any]] = [ensure(chosen, step) for step in OF_FILE if step.applies(chosen)]
    except (DoesNotFitError, RunError) as error:  # as of a full disk
        if not job.closes or (is_smallest(job) and isinstance(error, RunError)):  # types that were weighed are not weighed again
            raise
        job.reporter.warn(f"it is not closed: {error.message}")
        return None
    closed = next((made.result for made in later if made.name == CLOSE.name), None)
    if job.closes and closed and not closed.file:
        return None
    return Walked(chosen, merged, converted, shipping(chosen, converted, *later), ensure(chosen, PROVE), closed, weighed)


def ways(job: Job, asked: Made[Any]) -> Iterator[Job]:
    """The job as it can ship, one way after the other: the next is asked for where the file of the one before loses too much.

    It is merged into the 16-bit source, and quantised; closed, unless the recipe says otherwise; and of QLoRA, whose adapter learns
    around the 4-bit base, merged onto that, dequantised, which costs the model elsewhere. One that was made so stays: a wider limit
    takes nothing back.
    """
    made, dequantised, closed = _as_made(job), replace(job, onto="dequantised"), replace(job, closes=True)
    if job.recipe.ship.closing_steps or made.onto == "dequantised":
        yield replace(job, onto=made.onto)
        return
    lost = None
    if job.recipe.training.method == "qlora" and not (job.given and not job.data):
        lost = loses_gain(job, asked, ensure(job, REASK))
    if not lost and not made.closes:
        yield job
    if _closes_by_itself(job):
        if lost:
            job.reporter.warn(f"merged into the 16-bit source the model loses {lost}; its file is closed, to take that back")
        yield closed
    if lost:
        job.reporter.warn(f"merged into the 16-bit source the model loses {lost}; merging onto the dequantised base that it was trained on")
        job.run.record(**{DEQUANTISED: fingerprint_of(job, trained_by(job))})  # what follows may be interrupted
        for step in (*reversed(OF_FILE), GGUF, MERGE):  # what was made of the other merge would take the disk twice
            if stale := job.run.finished(step.name):
                discard(stale.folder)
        yield dequantised


def _closes_by_itself(job: Job) -> bool:
    """Whether a file that loses too much may be closed: there is a trained model beside it, and rows to learn from and to judge by."""
    rows = not job.given or (job.given.kind != "gguf" and {"train", "test"} <= job.data.keys())
    return job.recipe.ship.closing_steps is None and rows


def judge_again(job: Job) -> Proof:
    """Hold what the run recorded against the recipe's limits of today: nothing is loaded, asked again or written.

    Raises RunError where nothing of this recipe was proven.
    """
    job = _as_made(job)
    recorded_by: tuple[Step[Any], ...] = (ASK, GGUF, *OF_FILE, PROVE)
    made = {step.name: find(job, step) for step in recorded_by if step.applies(job)}
    if missing := next((name for name, found in made.items() if not found), None):
        raise RunError(f"{job.run.folder} holds no proof of this recipe: `{missing}` is not done.", "ftkit ship")
    asked, converted, *later, proven = (found for found in made.values() if found)
    proof = judged(job, asked, proven, shipping(job, converted, *later))
    checks, limits = [*proof.checks, *served_again(job, asked, proven)], dict(proof.would_pass)
    if adapted := find(job, ADAPTER) if ADAPTER.applies(job) else None:
        beside = adapter_checks(job, asked, adapted)
        checks += beside
        if any(check.outcome == "failed" for check in beside):
            limits["ship.keep"] = min(limits.get("ship.keep", 100), math.floor(kept_beside(asked, adapted)))
    return replace(proof, checks=checks, would_pass=limits)


def choose_type(job: Job) -> tuple[Job, tuple[Weighed, ...]]:
    """The job, with the type that ships, and what was tried for it.

    Where the recipe wants the smallest, types are made and weighed from small to large, until one keeps `ship.keep` on the rows
    by which is chosen, and did not fail its proof. Of those before it no file stays. Raises ProofError where these rows could not be
    looked at.
    """
    if not is_smallest(job):
        return job, ()
    weighed = []
    for tried, one, ships in trials(job, lambda tried: (find(tried, WEIGH) or ensure(tried, WEIGH)).result):
        weighed.append(one)
        if one.kept_percent is None:
            raise ProofError(
                "Which type is the smallest that keeps enough cannot be said: the trained model was not looked at token by token.",
                "name one: --set ship.quantization=Q4_K_M; or look again: ftkit ship --from ask",
            )
        if ships:
            break
        kept = f"{one.quantization} keeps {one.kept_percent:.1f} % of the training"
        job.reporter.note(f"{kept}, but fails: {one.fails}" if one.fails else f"{kept}, wanted are {job.recipe.ship.keep:g} %")
        for step in OF_FILE:
            if step.applies(tried) and (stale := find(tried, step)):
                discard(stale.folder)
    return tried, tuple(weighed)


def build(job: Job, *, use_ollama: bool | None = None, replace_model: bool = False) -> Shipped:
    """The whole line."""
    refuse_missing_tools(job)
    if not job.given:
        train(job)
    return ship(job, use_ollama=use_ollama, replace_model=replace_model)


def named(name: str) -> Step[Any]:
    """The step of this name. Raises RecipeError where there is none."""
    for step in LINE:
        if step.name == name:
            return step
    raise RecipeError(f"There is no step `{name}`.", f"the steps are {', '.join(step.name for step in LINE)}")


def _as_made(job: Job) -> Job:
    """The job, with the merge that is there, whether its file was closed, and the type that was chosen, where that is done."""
    if not job.recipe.ship.closing_steps:
        dequantised, closed = replace(job, onto="dequantised"), replace(job, closes=True)
        onto = find(dequantised, MERGE) or job.run.manifest().get(DEQUANTISED) == fingerprint_of(job, trained_by(job))
        job = dequantised if onto else closed if _closes_by_itself(job) and _is_closed(closed) else job
    return (_chosen(job) if is_smallest(job) else None) or job


def _chosen(job: Job) -> Job | None:
    """The job with the type that its trials end in, where they are done."""

    def weighed(tried: Job) -> Weighed | None:
        found = find(tried, WEIGH)
        return found.result if found else None

    return next((tried for tried, _, ships in trials(job, weighed) if ships), None)


def _is_closed(job: Job) -> bool:
    """Whether its file was closed, or that was begun; of types that are tried, the closed one that ships."""
    if is_smallest(job):
        chosen = _chosen(job)
        ships = find(chosen, CLOSE) if chosen else None
        return bool(ships and ships.result.file)
    begun, made = job.run.partial(CLOSE.name, fingerprint_of(job, CLOSE)), find(job, CLOSE)
    return bool(made.result.file) if made else begun.is_dir()


@dataclass(frozen=True)
class State:
    """How far a step is, for this recipe, data and model."""

    step: Step[Any]
    done: Made[Any] | None
    costs: tuple[Cost, ...]  # empty: nothing, or no plan was made yet


def states(job: Job) -> Iterator[State]:
    """Of every step that this job has, in order. Nothing is made."""
    asked, job = job, _as_made(job)
    sizes = _sizes(job)
    for step in LINE:
        if step.applies(job):
            at = asked if step is PLAN else job  # it is made before a type is chosen
            done = find(at, step) if step.make else None
            if step is PLAN and is_trained(job):
                done = done or last(job, step)  # a later one would count what the training was found to hold
            yield State(step, done, _costs(job, step, sizes) if sizes else ())


@dataclass(frozen=True)
class Room:
    """What the steps that are to do fetch, and the most bytes that they write into each folder; none where costs are not known."""

    fetch: ToFetch
    disk: dict[Path, int]


def room(job: Job, states: Sequence[State]) -> Room:
    fetch, costs = base_to_fetch(job), [cost for state in states if not state.done for cost in state.costs]
    return Room(fetch, disk_by_folder(job, costs, fetch, trained=is_trained(job)))


def _sizes(job: Job) -> Sizes | None:
    """What the costs of the steps follow from; None where nothing is planned, or what was given cannot be counted."""
    if job.given:
        return adopted_sizes(_largest(job))
    planned = recorded(job.run)
    return planned.memory.sizes(_largest(job).recipe.ship) if planned else None


def _costs(job: Job, step: Step[Any], sizes: Sizes) -> tuple[Cost, ...]:
    """What a step costs; a model that was given whole is linked, and not merged."""
    return () if step is MERGE and job.given and job.given.kind == "checkpoint" else step.costs(sizes)


def make_only(job: Job, name: str) -> Made[Any]:
    """Make one step alone. Raises RunError where one that it comes after is not finished, RecipeError where there is no such step."""
    step = named(name)
    if step.make is None or not step.applies(_as_made(job)):
        why = "keeps nothing in the run" if step.make is None else "is no step of this recipe"
        raise RecipeError(f"`{name}` {why}.", "those that are: ftkit ship --dry-run; the whole line: ftkit ship")
    if step is PLAN or step is TRAIN:
        return train(job) if step is TRAIN else ensure(job, PLAN)
    job = _as_made(job)
    if is_smallest(job) and step is QUANTISE:
        raise RecipeError("Which type is the smallest that keeps enough is not chosen yet.", "the whole line: ftkit ship")
    done = {state.step.name: state for state in states(job)}
    for before in (*step.after, *step.needs):
        if before.applies(job) and not done[before.name].done:
            raise RunError(f"`{name}` comes after `{before.name}`, which is not finished.", f"{before.command} --only {before.name}")
    return ensure(job, step)


def start_from(job: Job, name: str) -> None:
    """Throw away what the run holds of this step and of those after it, so that they are made again. Trainings are kept.

    Raises RecipeError where there is no such step, or it is one before shipping.
    """
    first = LINE.index(named(name))
    if first < LINE.index(ASK):
        raise RecipeError(
            f"--from {name}: plan and training are made again where something of theirs is another.", "see what can go: ftkit status"
        )
    full = job.recipe.training.method == "full"  # then closing learns from the merge, too
    beside = ((TEACH, GGUF if full else ASK), (WEIGH, CLOSE))
    made = (*LINE[first:], *(step for step, until in beside if first <= LINE.index(until)))
    for one in candidates(job) if is_smallest(job) else (job,):
        for step, onto, closes in product(made, get_args(Onto), (False, True)):
            way = replace(one, onto=onto, closes=closes)
            if step.make and step.applies(way):
                if found := find(way, step):
                    discard(found.folder)
                if (begun := job.run.partial(step.name, fingerprint_of(way, step))).is_dir():
                    discard(begun)
    if first <= LINE.index(MERGE):
        job.run.record(**{DEQUANTISED: None})
    if first <= LINE.index(PROVE):
        job.run.record(**{FAILED_TYPES: None})
    if index := job.run.manifest().get("ollama"):
        job.run.record(ollama={key: value for key, value in index.items() if key != "shipped"})

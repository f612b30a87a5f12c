"""The step `plan`: trace the training step, and choose batch × accumulation."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from ftkit.beside import card_has_triton
from ftkit.data.lengths import Tally, TokenCounts, count_tokens
from ftkit.data.mask import refuse_nothing_to_learn
from ftkit.data.read import only_held_out
from ftkit.data.rows import IGNORED, Example, Pair, Row
from ftkit.data.template import render, renders, thinks_only_if_asked, token_ids
from ftkit.data.turns import expected, has_reasoning, question, turns_of
from ftkit.engines import hf
from ftkit.errors import DoesNotFitError, ModelError, RecipeError
from ftkit.line.job import Job, Rows, base_folder, computes_on, dtype_on, read_data, tokenizer_of
from ftkit.line.step import Step, write_json
from ftkit.line.tokens import count
from ftkit.machine import ranks
from ftkit.machine.device import Device, find_gpus
from ftkit.machine.device import choose as choose_device
from ftkit.memory.model import load_config
from ftkit.model.given import Given
from ftkit.model.locate import locate
from ftkit.model.open import open_config
from ftkit.model.source import QUANTISED, Source
from ftkit.ollama.modelfile import refuse_system
from ftkit.plan import measured
from ftkit.plan.by_measuring import Measure
from ftkit.plan.choose import make_plan
from ftkit.plan.cost import TRAINING_BYTES
from ftkit.plan.dtype import best_dtype
from ftkit.plan.gpus import CardFit, every_card
from ftkit.plan.plan import MemoryPlan
from ftkit.proof.score import counted_text, refuse_unreadable
from ftkit.recipe import ASKED_MEANWHILE, Dtype, Group, Recipe
from ftkit.run import Run
from ftkit.train.arguments import Settings
from ftkit.train.probe import probe

PLAN_FILE = "plan.json"
TRAINING_KEYS = {  # that every run names, as do LORA_KEYS; later ones are named where they are set
    "method", "max_length", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_share", "weight_decay",
    "max_grad_norm", "optim", "effective_batch_size", "per_device_train_batch_size", "gradient_checkpointing",
    "evaluations_per_epoch", "early_stopping_patience", "seed",
}  # fmt: skip
LORA_KEYS = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
HOLDS_FOR = ("accelerate", "bitsandbytes", "ftkit", "gguf", "peft", "torch", "transformers", "trl")  # in these versions


@dataclass(frozen=True)
class Chosen:
    """What the step says of itself; the whole plan is in its PLAN_FILE."""

    fits: bool
    device_bytes: int


@dataclass(frozen=True)
class Recorded:
    """A plan, and the lengths of the dataset that it was made for."""

    memory: MemoryPlan
    tokens: TokenCounts | None  # None: planned without a dataset


def recorded(run: Run) -> Recorded | None:
    """The run's last plan. One that cannot be read any more is thrown away, to be made again."""
    found = run.finished("plan")
    if not found:
        return None
    try:
        result = json.loads((found.folder / PLAN_FILE).read_text(encoding="utf-8"))
        return Recorded(MemoryPlan.load(result["memory"]), TokenCounts(**result["tokens"]) if result["tokens"] else None)
    except (OSError, ValueError, TypeError, KeyError):
        shutil.rmtree(found.folder)
        return None


def training_inputs(job: Job) -> list[Any]:
    """What the trained weights follow from. Batch × accumulation is not among it: their product is, and gives equal updates."""
    recipe = job.recipe
    return [
        job.source.fingerprint,
        {purpose: file.fingerprint for purpose, file in job.data.items() if purpose != "test"},
        {
            **recipe.data.model_dump(include={"train", "validation", "validation_share", "date"}),
            **recipe.data.model_dump(include={"columns", "labels", "skip_faulty", "thinking", "system_in_question"}, exclude_defaults=True),
        },
        *([job.chat_template] if job.chat_template else []),
        {
            **_said(recipe.training, TRAINING_KEYS, {"save_minutes", "report_to", "packing", "fsdp", "adapter"}),
            "learning_rate": recipe.training.peak_learning_rate,
        },
        _said(recipe.lora, LORA_KEYS),
        *(["trust_remote_code"] if recipe.trust_remote_code else []),
        *([recipe.evaluate.model_dump(), recipe.ship.max_new_tokens] if recipe.training.metric_for_best_model == "right" else []),
        *([recipe.dpo.model_dump()] if recipe.training.objective == "dpo" else []),
        *(["adapter", job.begins_with.fingerprint] if job.begins_with else []),
    ]


def _said(group: Group, always: set[str], never: Set[str] = frozenset()) -> dict[str, Any]:
    """A group's settings. Keys that came later are left out where they are as they are by themselves: earlier runs stay."""
    return {**group.model_dump(include=always), **group.model_dump(exclude=always | never, exclude_defaults=True)}


def _follows_from(job: Job) -> list[Any]:
    recipe, device = job.recipe, job.device
    free_bytes = device.free_bytes  # of a device that was found it changes from day to day, and seldom the choice
    last = recorded(job.run)
    if last and last.memory.holds_with(free_bytes):
        free_bytes = last.memory.device.free_bytes
    beside: list[Any] = [TRAINING_BYTES, recipe.training.compute_dtype or best_dtype(device)] if device.kind == "cpu" else []
    if device.kind == "cuda" and not card_has_triton():
        beside += ["without Triton"]
    wanted = [device.name, device.total_bytes >> 20, free_bytes, recipe.budget.vram, _extra_bytes(job), *beside]
    versions = {name: version(name) for name in HOLDS_FOR}
    packed = ["packing"] if recipe.training.packing else []  # it changes nothing in what is learnt
    rule = recipe.evaluate.model_dump(exclude=ASKED_MEANWHILE)
    shares, cards = _cards(job)
    together = [*(["fsdp", shares] if shares > 1 else []), *(["cards", cards] if cards > 2 else [])]
    return [*training_inputs(job), *packed, *together, rule, recipe.ship.model_dump(), wanted, versions]


def _cards(job: Job) -> tuple[int, int]:
    """How many share the weights out, and of how many it is told what they would do together: those here, or two."""
    recipe = job.recipe
    here = 0 if recipe.budget.gpu or recipe.budget.vram else len(find_gpus())
    cards = max(2, here)
    if ranks.shares_weights(recipe):
        return ranks.world_size(), cards
    return (cards if recipe.training.fsdp else 1), cards


def _extra_bytes(job: Job) -> int:
    return measured.extra_bytes(job.device, measured.subject(job.recipe, job.source.fingerprint))


@dataclass(frozen=True)
class _Looked:
    """What a plan follows from beside recipe and device."""

    config: Any
    tallies: tuple[Tally, ...]  # of training and validation rows; none without a dataset
    length: int  # tokens of the longest row
    labelled: int  # of a row, those that are learnt, at most

    @property
    def lengths(self) -> list[int]:
        return list(self.tallies[0].kept) if self.tallies else []


def _look(job: Job, folder: Path | None = None) -> _Looked:
    recipe = job.recipe
    rows = read_data(job) if job.data else None  # a fault in the data is found first
    if rows:
        rows.tell(job.reporter)
    opened = open_config(job.source, job.reporter)
    assert opened.folder
    if job.begins_with:
        _refuse_another_base(job, job.begins_with, opened.folder)
    config = load_config(opened.folder, trust_remote_code=recipe.trust_remote_code)
    tallies = _count(job, opened, rows, config, folder) if rows else ()
    length = max((length for counted in tallies for length in counted.kept), default=recipe.training.max_length)
    labelled = max((counted.most_learnt for counted in tallies), default=length)
    _check_config(config, recipe, length)
    return _Looked(config, tallies, length, labelled)


def every_gpu(job: Job) -> list[CardFit]:
    """The choice for every known card. The run must be open; nothing is kept in it."""
    looked = _look(job)
    job.reporter.step(f"tracing training steps of {looked.config.model_type} at {looked.length} tokens, for every card")
    unable: list[str] = []

    def dtype_of(card: Device) -> Dtype | None:
        try:
            return dtype_on(card, job.recipe, looked.config.model_type)
        except RecipeError:
            unable.append(card.name)
            return None

    share = looked.labelled / looked.length
    found = every_card(looked.config, job.recipe, looked.length, looked.lengths, dtype_of=dtype_of, labelled_share=share)
    if unable:
        job.reporter.note(f"left out are {len(unable)} cards that compute no {job.recipe.training.compute_dtype}, as the {unable[0]}")
    return found


def _make(job: Job, folder: Path) -> Chosen:
    recipe, device, looked, (shares, cards) = job.recipe, job.device, _look(job, folder), _cards(job)
    length, labelled, tallies = looked.length, looked.labelled, looked.tallies
    job.reporter.step(f"tracing a training step of {looked.config.model_type} at {length} tokens")
    dtype = dtype_on(device, recipe, looked.config.model_type)
    _say_what_is_computed_in(job, looked.config.model_type)
    if device.kind == "cuda" and not card_has_triton():
        job.reporter.note(
            "without Triton the loss takes more memory, which is counted; on Linux it needs a C compiler and Python's headers: "
            "apt install gcc python3-dev"
        )
    memory = make_plan(
        looked.config,
        recipe,
        device,
        length,
        looked.lengths,
        dtype=dtype,
        extra_bytes=_extra_bytes(job),
        labelled_share=labelled / length,
        measure=None if shares > 1 else _measuring(job, length, labelled),
        shares=shares,
        cards=cards,
    )
    if recipe.training.packing and not memory.chosen.packing:
        job.reporter.warn("rows are not packed: the step of this model was measured, not traced, and with padded rows alone")
    write_json(folder / PLAN_FILE, {"memory": memory.record(), "tokens": asdict(count_tokens(tallies)) if tallies else None})
    return Chosen(memory.chosen.fits, memory.chosen.peak.device_bytes)


def _say_what_is_computed_in(job: Job, model_type: str) -> None:
    """Of a card before Ampere, which computes no bfloat16, and of a model that float16 is too narrow for."""
    told, wanted = hf.beyond_float16(model_type), job.recipe.training.compute_dtype
    if told and wanted == "float16":
        job.reporter.warn(f"{model_type} is known to overflow in float16 ({told}): leave training.compute_dtype out")
    elif wanted or best_dtype(job.device) != "float16":
        return
    elif told:
        job.reporter.warn(f"{job.device.name} has no bfloat16, and {model_type} overflows in float16 ({told}): training is in float32")
    else:
        job.reporter.note(
            f"{job.device.name} has no bfloat16: training is in float16 with loss scaling; "
            "where it diverges: --set training.compute_dtype=float32"
        )


def _refuse_another_base(job: Job, adapter: Given, base: Path) -> None:
    """Raise ModelError where the adapter to go on with says that it was trained on another model; where it cannot be known, warn.

    Whether its tensors are of that shape is found when they are loaded.
    """
    named, reference = adapter.base, job.source.reference.partition("@")[0]
    if named and Path(named).is_dir():
        folder = Path(named).resolve()
        same: bool | None = folder == base.resolve() or locate(str(folder), folder).fingerprint == locate(str(base), base).fingerprint
    elif named and job.source.kind == "hub":  # another organisation may hold the same model, also in 4 bits
        same = QUANTISED.sub("", named.partition("@")[0]).rpartition("/")[2].lower() == reference.rpartition("/")[2].lower()
    else:
        same = None
    if same is False:
        raise ModelError(
            f"training.adapter: {adapter.path} was trained on {named}, and the recipe's model is {job.source.reference}.",
            f"an adapter fits the model that it was trained on alone: --set model={named}",
        )
    if same is None:
        job.reporter.warn(f"{adapter.path} names {named or 'no model'} as its base; that {reference} is the same was not looked at")


def _measuring(job: Job, length: int, labelled: int) -> Measure | None:
    """What measures real steps on this machine, should a step not be traced; None where another device is planned for.

    On rows of any tokens, as long as the longest and with as many learnt.
    """
    real = choose_device()
    if (real.kind, real.name) != (job.device.kind, job.device.name):
        return None
    examples: list[Example] | list[Pair] = [Example([0] * length, [IGNORED] * (length - labelled) + [0] * labelled)]
    if job.recipe.training.objective == "dpo":
        examples = [Pair([0] * (length - labelled), [0] * labelled, [1] * labelled)]

    def measure(batch: int, checkpointing: bool) -> tuple[int, int | None] | None:
        rows = f"{batch} × {length} tokens, {'with' if checkpointing else 'without'} checkpointing"
        job.reporter.step(f"its step cannot be traced: measuring two real steps, {rows}")
        base = base_folder(job)
        cuda, dtype = computes_on(job, hf.model_type(base))
        settings = Settings(batch, -(-job.recipe.training.effective_batch_size // batch), checkpointing, dtype, cuda)
        with tempfile.TemporaryDirectory(dir=job.run.folder, prefix=".probe-") as folder:
            try:
                found = probe(job.recipe, settings, base, tokenizer_of(job, base, base=True), examples, Path(folder))
            except (RuntimeError, MemoryError, DoesNotFitError) as error:
                if not isinstance(error, DoesNotFitError) and not hf.out_of_memory(error, "train"):
                    raise
                return None
            finally:
                hf.release_memory()
        return found.allocated_bytes, found.reserved_bytes

    return measure


def _count(job: Job, opened: Source, rows: Rows, config: Any, folder: Path | None) -> tuple[Tally, ...]:
    """The dataset in tokens, (training, validation), each row looked at as the trainer sees it.

    Nothing where only a config is there: it has no tokenizer.
    """
    if opened.kind == "config":
        job.reporter.warn("the tokens of the dataset are not counted: a config has no tokenizer; all rows are taken as training.max_length")
        return ()
    assert opened.folder
    tokenizer = tokenizer_of(job, opened.folder, base=True)
    job.reporter.step("counting the dataset's tokens")
    counted = count(job, tokenizer, rows, folder)
    _say_what_became_of_the_rows(job, tokenizer, rows, sum(len(part.lengths) for part in counted))
    refuse_nothing_to_learn(*(len(part.kept) for part in counted))
    _refuse_ids_beyond(config.get_text_config().vocab_size, tokenizer, max(part.highest_id for part in counted))
    refuse_unreadable(job.recipe.evaluate, expected_answers(tokenizer, rows.test))
    _say_what_is_only_held_out(job, rows)
    _say_another_system_message(job, rows.train)
    _refuse_what_cannot_be_asked(job, rows.test, tokenizer)
    return counted


def _refuse_ids_beyond(rows: int, tokenizer: Any, highest: int) -> None:
    """Raise ModelError for a token that has no row in the embedding: one that was added to the tokenizer alone."""
    for what, token in (("the dataset holds", highest), ("rows are padded with", tokenizer.pad_token_id or 0)):
        if token >= rows:
            raise ModelError(
                f"The model's embedding has {rows:,} rows, and {what} {tokenizer.convert_ids_to_tokens(token)} with id {token:,}.",
                "take added tokens out of tokenizer.json and the data, or name another pad_token in tokenizer_config.json; "
                "ftkit does not resize embeddings",
            )


def _say_what_became_of_the_rows(job: Job, tokenizer: Any, rows: Rows, examples: int) -> None:
    read = len(rows.train) + len(rows.validation)
    if examples > read:
        job.reporter.note(
            f"{read:,} rows become {examples:,}: the chat template writes earlier turns otherwise once later ones are there, "
            "so that each answer is learnt by itself, after what the model is really asked with"
        )
    unsaid, first, reasoned = 0, "", 0
    for row in chain(rows.train, rows.validation):
        if has_reasoning(row):
            reasoned += 1
            if any(turn.unsaid for turn in turns_of(tokenizer, row)):
                unsaid, first = unsaid + 1, first or row.where
    if reasoned > unsaid and job.recipe.data.thinking is None and thinks_only_if_asked(tokenizer):
        job.reporter.note(
            f"{reasoned - unsaid:,} rows have reasoning, and the chat template's switch for thinking is off by itself: the model learns to "
            "think unasked; --set data.thinking=true trains it to think where that is asked for"
        )
    if unsaid:
        job.reporter.warn(
            f"the reasoning in {unsaid:,} rows is not learnt, the first in {first}: the chat template's prompt ends "
            "the reasoning before the answer; with data.thinking=true it may not"
        )


def _refuse_what_cannot_be_asked(job: Job, rows: Sequence[Row], tokenizer: Any) -> None:
    """Raise RecipeError for a system prompt or a held-out question that the shipped model could not take."""
    ship = job.recipe.ship
    refuse_system(ship.system, renders(tokenizer))
    for row in rows:
        if row.is_text:
            continue
        asked = len(token_ids(tokenizer, render(tokenizer, question(tokenizer, row), ask=True)))
        if asked + ship.max_new_tokens > ship.num_ctx:
            raise RecipeError(
                f"ship.num_ctx: the held-out question in {row.where} has {asked} tokens, with an answer of {ship.max_new_tokens} "
                f"more than the {ship.num_ctx} that the shipped model reads.",
                f"--set ship.num_ctx={-(-(asked + ship.max_new_tokens) // 1024) * 1024}",
            )


def expected_answers(tokenizer: Any, rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """(place, text) of each, as they will be compared."""
    return ((row.where, expected(tokenizer, row)) for row in rows if not row.is_text)


def _say_what_is_only_held_out(job: Job, rows: Rows) -> None:
    def kind(answer: str) -> str:
        return counted_text(job.recipe.evaluate, answer)

    if missing := only_held_out(rows.train, rows.validation, kind):
        kinds = len({kind(row.answer) for row in chain(rows.train, rows.validation)})
        first = json.dumps(kind(missing[0].answer)[:40], ensure_ascii=True)
        job.reporter.warn(
            f"{len(missing)} of {kinds} different answers stand in the validation rows alone and are not learnt: "
            f"the first is {first}, {missing[0].where}; add rows of that kind, or name a file in data.validation"
        )


def _say_another_system_message(job: Job, rows: Sequence[Row]) -> None:
    """The shipped model puts `ship.system` before what it is asked: training should have seen it there."""
    shipped = job.recipe.ship.system
    learnt = {hash(first["content"]) if (first := row.messages[0])["role"] == "system" else None for row in rows if not row.is_text}
    if shipped is not None and hash(shipped) not in learnt:
        job.reporter.warn("no training row has the system message of ship.system, which the shipped model puts before every question")
    elif shipped is None and None not in learnt and len(learnt) == 1:
        job.reporter.warn("every training row has one system message, and the shipped model is asked without it: give it in ship.system")


def _check_config(config: Any, recipe: Recipe, length: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise RecipeError(
            f"training.max_length: rows of {length} tokens are longer than this model reads ({limit}).",
            f"--set training.max_length={limit}",
        )
    hf.refuse_wrong_versions(config.model_type)


PLAN = Step(
    name="plan",
    does="choose batch × accumulation",
    command="ftkit plan",
    result=Chosen,
    follows_from=_follows_from,
    make=_make,
    applies=lambda job: job.given is None,
)

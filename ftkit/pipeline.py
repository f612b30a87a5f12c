"""The line, in order: plan → train → merge → gguf → prove → register. Each step is made once for its inputs."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftkit.check import Check, failed, not_made, passed
from ftkit.data import template
from ftkit.data.lengths import TokenCounts, count_tokens
from ftkit.data.mask import before_answer, cut, refuse_nothing_to_learn, tokenise
from ftkit.data.read import only_held_out, read_rows, split_validation
from ftkit.data.rows import IGNORED, Example, Message, Row, roles_text
from ftkit.engines import hf, llamacpp, ollama
from ftkit.errors import (
    DoesNotFitError,
    FtkitError,
    ModelError,
    NameTakenError,
    ProofError,
    RecipeError,
    RunError,
    ToolMissingError,
    first_line,
)
from ftkit.files import cache_folder, file_fingerprint, fingerprint, user_path, write_atomically
from ftkit.gguf import files as gguf_files
from ftkit.machine import llama_cpp
from ftkit.machine.device import Device, asked_threads, choose, computes_bfloat16, processor
from ftkit.memory.model import load_config
from ftkit.merge.stream import Base, merge
from ftkit.model import hub
from ftkit.model.locate import locate
from ftkit.model.open import bytes_to_fetch, open_config, open_weights
from ftkit.model.source import Source, drop_code
from ftkit.ollama.modelfile import Modelfile, make_modelfile, refuse_system
from ftkit.ollama.register import register, remove, temporary_name
from ftkit.ollama.template import find_format
from ftkit.plan import measured
from ftkit.plan.choose import make_plan
from ftkit.plan.cost import FTKIT_BYTES, OLLAMAS_MODELS, RUN_FOLDER, TRAIN, LaterStep
from ftkit.plan.plan import MARGIN, MemoryPlan
from ftkit.progress import SILENT, Reporter
from ftkit.proof import compare
from ftkit.proof.compare import Score
from ftkit.proof.gate import judge_answers, judge_served
from ftkit.proof.probes import CONTROL_WORDS, HARD_TEXTS, conversations
from ftkit.recipe import Recipe, load_recipe, make_recipe
from ftkit.run import Run, Step
from ftkit.train import probe as probing
from ftkit.train import trainer
from ftkit.train.probe import Probe
from ftkit.units import bytes_text

PLAN_HOLDS_FOR = ("accelerate", "bitsandbytes", "ftkit", "gguf", "peft", "torch", "transformers", "trl")  # in these versions
PLAN_FILE, ANSWERS, PROOF, FAILED_PROOF = "plan.json", "answers.json", "proof.json", "failed-proof.json"
SOURCE, DEQUANTISED = "source", "dequantised"  # what an adapter is merged into
ALWAYS_MADE = ("F16", "Q8_0")
ROWS_COMPARED = 1000  # training rows whose ids are compared, the first
PLANS_KEPT = 50  # of those without a recipe, each a fifth of a megabyte
OLLAMA_ROWS = 20  # held-out questions that a server is asked after registering; the proof has asked them all


@dataclass(frozen=True)
class Rows:
    """The dataset, by purpose. `test` falls back to the validation rows where the recipe names no test file."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class Plan:
    """A plan, and the lengths of the dataset that it was made for."""

    memory: MemoryPlan
    tokens: TokenCounts | None  # None: planned without a dataset
    fetch_bytes: int = 0  # of the weights, those that are not on this machine yet


@dataclass(frozen=True)
class Shipped:
    """What `ship` delivers."""

    gguf: Path
    files: list[dict[str, Any]]
    modelfile: Path
    merged_onto: str
    checks: list[Check]
    scores: dict[str, Score]
    proof_file: Path
    same_answers: Score | None  # of the trained model and the shipped file; None where the trained model could not be asked
    examples: list[dict[str, str]]
    missing_quantization: str | None  # the wanted type, where llama-quantize is not here
    registered_as: str | None
    not_registered_because: str | None
    register_with: str | None  # what to type for that
    fresh: bool


@dataclass(frozen=True)
class Proof:
    """The checks of the shipped file, and the figures behind that of its answers."""

    checks: list[Check]
    scores: dict[str, Score]
    same_answers: Score | None
    examples: list[dict[str, str]]


class Project:
    """A recipe, the folder that its paths are taken from, and its run directory."""

    def __init__(
        self, recipe: Recipe, folder: Path, run: Run, *, gpu: str | None = None, reporter: Reporter = SILENT, has_data: bool = True
    ) -> None:
        self.has_data = has_data
        self.recipe = recipe
        self.folder = folder
        self.run = run
        self.gpu = gpu
        self.reporter = reporter

    @cached_property
    def llama_cpp_dir(self) -> Path | None:
        return llama_cpp.named_llama_cpp(self.recipe.tools.llama_cpp_dir, self.folder)

    @cached_property
    def source(self) -> Source:
        return replace(locate(self.recipe.model, self.folder), with_code=self.recipe.trust_remote_code)

    @cached_property
    def device(self) -> Device:
        return choose(self.recipe.budget.vram, self.gpu)

    @cached_property
    def data_paths(self) -> dict[str, Path]:
        """The dataset's files by purpose; DataError for one that is missing comes from reading it."""
        if not self.has_data:
            return {}
        named = {"train": self.recipe.data.train, "validation": self.recipe.data.validation, "test": self.recipe.data.test}
        return {purpose: self.folder / user_path(name) for purpose, name in named.items() if name}

    @cached_property
    def rows(self) -> Rows:
        read = {purpose: read_rows(path) for purpose, path in self.data_paths.items()}
        train, validation = read["train"], read.get("validation")
        if validation is None:
            train, validation = split_validation(train, self.recipe.data.validation_share, self.recipe.training.seed)
        test = read.get("test", validation)[: self.recipe.ship.test_rows]
        return Rows(train, validation, test)

    @cached_property
    def data_fingerprints(self) -> dict[str, str]:
        return {purpose: file_fingerprint(path) if path.is_file() else "missing" for purpose, path in self.data_paths.items()}

    @property
    def training_inputs(self) -> list[Any]:
        """What the trained weights follow from. Batch × accumulation is not among it: their product is, and gives equal updates."""
        recipe = self.recipe
        return [
            self.source.fingerprint, {purpose: mark for purpose, mark in self.data_fingerprints.items() if purpose != "test"},
            recipe.data.model_dump(exclude={"test"}), recipe.training.model_dump(exclude={"save_minutes"}),
            recipe.lora.model_dump(exclude={"use_dora"}),  # which is planned, and refused before training
            *(["trust_remote_code"] if recipe.trust_remote_code else []),
        ]  # fmt: skip

    @cached_property
    def computes_on(self) -> tuple[bool, bool]:
        """(on a GPU, in bfloat16) – of the machine that this runs on, whatever card the plan was made for."""
        real = choose()
        return real.kind == "cuda", computes_bfloat16(real)

    @cached_property
    def base(self) -> Source:
        """The source with its 16-bit weights at hand."""
        return open_weights(self.source, self.reporter)

    @property
    def base_folder(self) -> Path:
        assert self.base.folder
        return self.base.folder

    def tokenizer(self, folder: Path, *, dated: bool = False) -> Any:
        """The tokenizer of a model folder; `dated`: with the recipe's date in its template, as what is merged has it already."""
        recipe = self.recipe
        return hf.load_tokenizer(folder, recipe.data.day if dated else None, trust_remote_code=recipe.trust_remote_code)

    def tokenised(self, rows: Sequence[Row], tokenizer: Any) -> list[Example]:
        return [tokenise(tokenizer, row) for row in rows]


def open_project(
    path: Path,
    overrides: Sequence[tuple[str, Any]] = (),
    *,
    run_dir: Path | None = None,
    gpu: str | None = None,
    reporter: Reporter = SILENT,
) -> Project:
    """Read a recipe (or the folder that holds `recipe.yaml`) and find its run directory: `runs/RECIPE` beside it."""
    path = path / "recipe.yaml" if path.is_dir() else path
    recipe = load_recipe(path, overrides)
    folder = path.parent.resolve()
    return Project(recipe, folder, Run(run_dir or folder / "runs" / path.stem, reporter), gpu=gpu, reporter=reporter)


def open_without_recipe(overrides: Sequence[tuple[str, Any]], *, gpu: str | None = None, reporter: Reporter = SILENT) -> Project:
    """A project of settings alone, to be planned: `model`, and `data.train` where there is a dataset already.

    Each question's plan is kept in the private folder, and paths are taken from the current one.
    """
    recipe = make_recipe(overrides)
    has_data = any(key == "data.train" for key, _ in overrides)
    plans = cache_folder() / "plans"
    if plans.is_dir():
        for old in sorted(plans.iterdir(), key=lambda path: path.stat().st_mtime)[:-PLANS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    run = Run(plans / fingerprint(str(Path.cwd()), recipe.model_dump(), gpu))
    return Project(recipe, Path.cwd(), run, gpu=gpu, reporter=reporter, has_data=has_data)


def plan(project: Project) -> Plan:
    """Trace what the run's step needs and choose batch × accumulation. The run must be open.

    Raises ModelError, DataError and RecipeError; a plan that does not fit is a result, not an error.
    """
    recipe = project.recipe
    recorded = _recorded_plan(project.run)
    rows = project.rows if project.has_data and not recorded else None  # a fault in the data is found first
    chosen_device = project.device
    extra_bytes = measured.extra_bytes(chosen_device, measured.subject(recipe, project.source.fingerprint))
    free_bytes = chosen_device.free_bytes  # of a device that was found it changes from day to day, and seldom the choice
    if recorded and recorded.memory.holds_with(free_bytes):
        free_bytes = recorded.memory.device.free_bytes
    wanted = [chosen_device.name, chosen_device.total_bytes >> 20, free_bytes, recipe.budget.vram, extra_bytes]
    inputs = [
        *project.training_inputs,
        recipe.lora.use_dora,
        recipe.ship.model_dump(),
        recipe.what_if.model_dump(),
        wanted,
        {name: version(name) for name in PLAN_HOLDS_FOR},
    ]

    def make(folder: Path) -> dict[str, Any]:
        opened = open_config(project.source, project.reporter)
        assert opened.folder
        counts, trained, validated = _examples(project, opened, rows or project.rows) if project.has_data else (None, [], [])
        config = load_config(opened.folder, trust_remote_code=recipe.trust_remote_code)
        kept = [*trained, *validated]
        length = max((len(example.input_ids) for example in kept), default=recipe.training.max_length)
        labelled = max((sum(label != IGNORED for label in example.labels) for example in kept), default=length)
        _check_config(config, recipe, length)
        project.reporter.step(f"tracing a training step of {config.model_type} at {length} tokens")
        memory = make_plan(
            config, recipe, chosen_device, length, [len(example.input_ids) for example in trained],
            bfloat16=computes_bfloat16(chosen_device), extra_bytes=extra_bytes, labelled_share=labelled / length,
        )  # fmt: skip
        result = {"memory": asdict(memory), "tokens": asdict(counts) if counts else None}
        (folder / PLAN_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return {}

    step = project.run.ensure("plan", inputs, make)
    made = _recorded_plan(project.run) if step.fresh else recorded
    assert made
    speed = measured.tokens_per_second(chosen_device, recipe.training.method, recipe.model)
    return replace(made, memory=made.memory.today(chosen_device.free_bytes, speed), fetch_bytes=bytes_to_fetch(project.source))


def _recorded_plan(run: Run) -> Plan | None:
    """The run's last plan. One that cannot be read any more is thrown away, to be made again."""
    step = run.finished("plan")
    if not step:
        return None
    try:
        result = json.loads((step.folder / PLAN_FILE).read_text(encoding="utf-8"))
        return Plan(MemoryPlan.load(result["memory"]), TokenCounts(**result["tokens"]) if result["tokens"] else None)
    except (OSError, ValueError, TypeError, KeyError):
        shutil.rmtree(step.folder)
        return None


def _examples(project: Project, opened: Source, rows: Rows) -> tuple[TokenCounts | None, list[Example], list[Example]]:
    """The dataset's rows in tokens, and the training and validation rows as the trainer sees them.

    Nothing where only a config is there: it has no tokenizer.
    """
    if opened.kind == "config":
        project.reporter.warn(
            "the tokens of the dataset are not counted: a config has no tokenizer; all rows are taken as training.max_length"
        )
        return None, [], []
    assert opened.folder
    tokenizer, max_length = project.tokenizer(opened.folder, dated=True), project.recipe.training.max_length
    project.reporter.step("counting the dataset's tokens")
    examples, held_out = project.tokenised(rows.train, tokenizer), project.tokenised(rows.validation, tokenizer)
    trained, validated = cut(examples, max_length), cut(held_out, max_length)
    refuse_nothing_to_learn(trained, validated)
    _say_what_is_only_held_out(project, rows)
    ship = project.recipe.ship
    refuse_system(ship.system, _render(tokenizer))
    for row in rows.test:
        asked = len(template.token_ids(tokenizer, template.render(tokenizer, row.question, ask=True)))
        if asked + ship.max_new_tokens > ship.num_ctx:
            raise RecipeError(
                f"ship.num_ctx: the held-out question in line {row.line} has {asked} tokens, with an answer of {ship.max_new_tokens} "
                f"more than the {ship.num_ctx} that the shipped model reads.",
                f"--set ship.num_ctx={-(-(asked + ship.max_new_tokens) // 1024) * 1024}",
            )
    return count_tokens([*examples, *held_out], max_length), trained, validated


def _say_what_is_only_held_out(project: Project, rows: Rows) -> None:
    def kind(answer: str) -> str:
        return compare.counted(answer, project.recipe.ship.match)

    if missing := only_held_out(rows.train, rows.validation, kind):
        kinds = len({kind(row.answer) for row in (*rows.train, *rows.validation)})
        first = json.dumps(kind(missing[0].answer)[:40], ensure_ascii=True)
        project.reporter.warn(
            f"{len(missing)} of {kinds} different answers stand in the validation rows alone and are not learnt: "
            f"the first is {first}, line {missing[0].line}; add rows of that kind, or name a file in data.validation"
        )


def _check_config(config: Any, recipe: Recipe, length: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise RecipeError(
            f"training.max_length: rows of {length} tokens are longer than this model reads ({limit}).",
            f"--set training.max_length={limit}",
        )
    hf.refuse_wrong_versions(config.model_type)


def is_trained(project: Project) -> bool:
    """Whether the run holds the finished training of this recipe, data and model."""
    return project.run.finished("train", fingerprint("train", project.training_inputs)) is not None


def train(project: Project) -> Step:
    """Train as planned. Raises DoesNotFitError before anything is loaded, InterruptedRunError on Ctrl-C."""
    _refuse_dora(project)
    if is_trained(project):
        return _train(project, None)  # up to date: nothing has to fit any more
    planned = plan(project)
    fit = planned.memory.chosen
    if not fit.fits:
        raise DoesNotFitError(
            f"{project.recipe.training.method} at {planned.memory.max_length} tokens needs {bytes_text(fit.peak.device_bytes)}; "
            f"{planned.memory.device.name} has {bytes_text(fit.budget_bytes)}, of which {MARGIN:.0%} is kept free.",
            "see what would fit, each change computed: ftkit plan",
        )
    _refuse_shortages(project, planned)
    if earlier := project.run.finished("train"):
        project.reporter.note(f"an earlier training with other inputs stays in {earlier.folder}")
    return _train(project, planned)


def _train(project: Project, planned: Plan | None) -> Step:
    """The training step; `planned` is None where it is finished."""
    recipe = project.recipe

    def make(folder: Path) -> dict[str, Any]:
        assert planned
        fit = planned.memory.chosen
        base, rows = project.base_folder, project.rows
        tokenizer = project.tokenizer(base, dated=True)
        if template.is_dated(tokenizer.chat_template):
            project.reporter.note(
                f"the chat template writes today's date: it is {recipe.data.date}, here and in the shipped file (data.date)"
            )
        if project.base.gguf:
            _check_recovered_tokenizer(project, project.base.gguf, tokenizer)
        cuda, bfloat16 = project.computes_on
        settings = trainer.Settings(
            fit.per_device_train_batch_size, fit.gradient_accumulation_steps, fit.gradient_checkpointing, bfloat16, cuda
        )
        project.reporter.step(
            f"training ({recipe.training.method}, {settings.per_device_train_batch_size} × {settings.gradient_accumulation_steps})"
        )
        max_length = recipe.training.max_length
        result = trainer.train(
            recipe, settings, base, tokenizer,
            cut(project.tokenised(rows.train, tokenizer), max_length),
            cut(project.tokenised(rows.validation, tokenizer), max_length),
            folder, project.reporter,
        )  # fmt: skip
        peak = fit.peak
        return {
            **result.record(), "planned_allocated_bytes": peak.allocated_bytes, "planned_reserved_bytes": peak.reserved_bytes,
            "planned_device_bytes": peak.device_bytes, "planned_for": planned.memory.device.name,
        }  # fmt: skip

    step = project.run.ensure("train", project.training_inputs, make, resumable=True, keep=True)
    if step.fresh and planned and step.result["tokens_per_second"]:
        _remember_speed(project, planned, step.result["tokens_per_second"])
    return step


def _remember_speed(project: Project, planned: Plan, tokens_per_second: float) -> None:
    """Keep a training's speed for the next plan, if it ran on the device that it was planned for. Training does not fail by this."""
    try:
        real = choose()
        if planned.memory.device.name == real.name:
            measured.remember_speed(real, project.recipe.training.method, project.recipe.model, tokens_per_second)
    except (OSError, FtkitError) as error:
        project.reporter.warn(f"the speed of this training is not kept for the next plan: {first_line(error)}")


def _refuse_dora(project: Project) -> None:
    if project.recipe.lora.use_dora and project.recipe.training.method != "full":
        raise RecipeError("lora.use_dora: DoRA can be planned, and neither trained nor merged yet.", "for LoRA: --set lora.use_dora=false")


def refuse_probe(project: Project) -> None:
    """Raise RecipeError where two real steps cannot be run: without rows, or for another device than this machine's."""
    _refuse_dora(project)
    real, wanted = choose(), project.device
    if wanted.kind != real.kind or (real.kind == "cuda" and wanted.name != real.name):
        raise RecipeError(f"--probe runs on this machine's {real.name}; the plan is for {wanted.name}.", "leave --gpu and --vram out")
    if not project.has_data:
        raise RecipeError("--probe trains on real rows.", "name them: --data train.jsonl")


def probe(project: Project) -> Probe:
    """Two real optimizer steps as planned, measured. Raises as `refuse_probe` does."""
    refuse_probe(project)
    planned = plan(project).memory
    cuda, bfloat16 = project.computes_on
    fit, recipe = planned.chosen, project.recipe
    settings = trainer.Settings(
        fit.per_device_train_batch_size, fit.gradient_accumulation_steps, fit.gradient_checkpointing, bfloat16, cuda
    )
    tokenizer = project.tokenizer(project.base_folder, dated=True)
    examples = cut(project.tokenised(project.rows.train, tokenizer), recipe.training.max_length)
    project.reporter.step("probing: two real steps")
    with tempfile.TemporaryDirectory(dir=project.run.folder, prefix=".probe-") as folder:
        probed = probing.probe(recipe, settings, project.base_folder, tokenizer, examples, Path(folder))
    subject = measured.subject(recipe, project.source.fingerprint)
    measured.remember(choose(), subject, planned.chosen.peak, probed.allocated_bytes, probed.reserved_bytes)
    return probed


def _check_recovered_tokenizer(project: Project, gguf: Path, tokenizer: Any) -> None:
    """A tokenizer that was rebuilt from a GGUF is a guess until llama.cpp gives the same ids for the training texts."""
    with llamacpp.load(gguf) as engine:
        texts = [*HARD_TEXTS, *(template.render(tokenizer, row.messages, ask=False) for row in project.rows.train[:200])]
        count = compare.compare_tokens(texts, lambda text: template.token_ids(tokenizer, text), engine.tokenize, gguf.name)
    project.reporter.note(f"the tokenizer rebuilt from {gguf.name} gives llama.cpp's ids on {count} texts")


def refuse_missing_tools(project: Project) -> None:
    """Raise ToolMissingError before long work whose result could not be converted."""
    if not project.run.finished("gguf"):
        llama_cpp.need_converter(project.llama_cpp_dir)


def ship(project: Project, *, use_ollama: bool | None = None, replace_model: bool = False) -> Shipped:
    """Merge, convert, quantise, prove and register what was trained.

    `use_ollama`: True requires a server, False leaves it out, None registers where one answers. A model of that name
    which this run did not register is left as it is, unless `replace_model`.
    Raises RunError where nothing was trained, ProofError where the shipped file does not behave as the trained model.
    """
    _refuse_dora(project)
    trained = project.run.finished("train", fingerprint("train", project.training_inputs))
    if not trained:
        other = "holds a training of another recipe, other data or another revision of the model"
        what = other if project.run.finished("train") else "holds no finished training"
        raise RunError(
            f"{project.run.folder} {what}.", "ftkit train, or ftkit build for the whole line; a hub model stays the same as org/name@COMMIT"
        )
    refuse_missing_tools(project)
    if use_ollama:  # asked for: that it is missing is said before the long work too
        with ollama.connect(project.reporter) as client:
            _refuse_anothers_name(project, client, replace_model)
    recorded = _recorded_plan(project.run)
    if recorded and not project.run.finished("prove"):
        _refuse_shortages(project, recorded, trained=True)
    asked = _ask(project, trained)
    merged, converted, told = _merged(project, trained, asked)
    shipped, record, missing = _quantise(project, converted, merged)
    proven = _prove(project, merged, asked, shipped)
    modelfile = _write_modelfile(project, merged, shipped)
    proof = _judge(project, asked, told, proven, shipped)
    registered, because, register_with = None, None, None
    checks = proof.checks
    if use_ollama is not False:
        try:
            with ollama.connect(project.reporter) as client:
                _refuse_anothers_name(project, client, replace_model)
                registered, in_ollama = _register(project, client, shipped, merged, asked, proven)
                checks = [*checks, *in_ollama]
        except (ToolMissingError, NameTakenError) as error:
            if use_ollama:
                raise
            because, register_with = error.message, error.hint
    return Shipped(
        gguf=shipped.path,
        files=[*(entry for entry in converted.result["files"] if entry["path"] != record["path"]), record],
        modelfile=modelfile,
        merged_onto=merged.result["onto"],
        checks=checks,
        scores=proof.scores,
        same_answers=proof.same_answers,
        proof_file=proven.folder / PROOF,
        examples=proof.examples[:3],
        missing_quantization=missing,
        registered_as=registered,
        not_registered_because=because,
        register_with=register_with,
        fresh=proven.fresh,
    )


@dataclass(frozen=True)
class Shortage:
    """What the steps to come need of this machine, and it does not have."""

    what: str  # "RAM", or the folders on the disk that is too small
    step: str | None  # that needs the RAM
    needed_bytes: int
    available_bytes: int

    @property
    def words(self) -> str:
        needed, available = bytes_text(self.needed_bytes), bytes_text(self.available_bytes)
        if self.step:
            return f"`{self.step}` needs {needed} of {self.what}, and this machine has {available}"
        return f"the steps to come write {needed} to {self.what}, where {available} are free"


def shortages(project: Project, planned: Plan, *, trained: bool = False) -> list[Shortage]:
    """What the steps after the plan need and this machine does not have; `trained`: those after training alone."""
    found = []
    by_disk: dict[int, list[tuple[Path, Path, int]]] = {}  # a folder, what is there already of its path, bytes
    sizes = planned.memory.disk_by_place(trained=trained)
    for folder, size in (
        (hub.hub_cache(), 0 if trained else planned.fetch_bytes),
        (project.run.folder, sizes[RUN_FOLDER]),
        (ollama.models_folder(), sizes[OLLAMAS_MODELS]),
    ):
        if folder and size:  # None: another machine's
            there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
            by_disk.setdefault(there.stat().st_dev, []).append((folder, there, size))
    for entries in by_disk.values():
        size, free = sum(size for _, _, size in entries), shutil.disk_usage(entries[0][1]).free
        if size > free:
            found.append(Shortage(" and ".join(str(folder) for folder, _, _ in entries), None, size, free))
    if hungry := ram_shortage(planned.memory.later, processor().total_bytes):
        found.append(hungry)
    return found


def ram_shortage(later: Sequence[LaterStep], total_bytes: int) -> Shortage | None:
    """The step after training that needs more RAM than there is, if one does. Asking can be slow or left out, and is none."""
    hungry = max((step for step in later if step.name != TRAIN and step.needed), key=lambda step: step.peak_ram_bytes)
    return Shortage("RAM", hungry.name, hungry.peak_ram_bytes, total_bytes) if hungry.peak_ram_bytes > total_bytes else None


def _refuse_shortages(project: Project, planned: Plan, *, trained: bool = False) -> None:
    """Raise DoesNotFitError before long work whose result could not be shipped from here."""
    if found := shortages(project, planned, trained=trained):
        raise DoesNotFitError(
            f"This machine is too small for what follows: {'; '.join(shortage.words for shortage in found)}.",
            "free some space, put the run elsewhere with --run-dir, or --set a smaller model",
        )


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file that may ship, and the step that made it."""

    path: Path
    quantization: str
    step: Step


def _ask(project: Project, trained: Step) -> Step:
    """Ask the held-out questions before and as trained: on what was trained on, so that no more memory is needed.

    An adapter's base is loaded once, as training loaded it (with QLoRA in 4 bits), and asked without and with the adapter.
    Answers that could not be had are left out, and it is said.
    """
    recipe = project.recipe
    inputs = [trained.fingerprint, project.data_fingerprints.get("test"), recipe.ship.test_rows, recipe.ship.max_new_tokens]

    def make(folder: Path) -> dict[str, Any]:
        base, rows = project.base_folder, project.rows.test
        cuda, bfloat16 = project.computes_on
        tokenizer = project.tokenizer(base, dated=True)
        hf.refuse_lost_gradients()
        questions, method = [row.question for row in rows], recipe.training.method
        answers: dict[str, list[str]] = {}

        def ask(name: str, model: Any, label: str) -> None:
            try:
                answers[name] = hf.answer(model, tokenizer, questions, recipe.ship.max_new_tokens, label=label, reporter=project.reporter)
            except DoesNotFitError as error:
                project.reporter.warn(f"{label} was left out: {error.message}")

        if method == "full":
            ask(
                "before",
                hf.load_model(base, None, bfloat16=bfloat16, cuda=cuda, trust_remote_code=recipe.trust_remote_code),
                "asking the base model",
            )
            ask(
                "trained",
                hf.load_model(trained.folder / "model", None, bfloat16=bfloat16, cuda=cuda, trust_remote_code=recipe.trust_remote_code),
                "asking the trained model",
            )
        else:
            from peft import PeftModel

            model: Any = PeftModel.from_pretrained(
                hf.load_model(base, method, bfloat16=bfloat16, cuda=cuda, trust_remote_code=recipe.trust_remote_code),
                trained.folder / "adapter",
            )
            with model.disable_adapter():
                ask("before", model, "asking the base model")
            ask("trained", model, "asking base and adapter")
        _write_json(folder / ANSWERS, {"questions": questions, "expected": [row.answer for row in rows], "answers": answers})
        return {}

    return project.run.ensure("ask", inputs, make, after=[trained])


def _read_answers(step: Step) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((step.folder / ANSWERS).read_text(encoding="utf-8"))
    return loaded


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _merged(project: Project, trained: Step, asked: Step) -> tuple[Step, Step, Step]:
    """The merge that ships, its F16 and Q8_0 files, and its answers.

    Where QLoRA's gain is lost by merging into the 16-bit source – an adapter learns around the 4-bit base – the merge is made
    onto the dequantised base instead. One that was made so stays: a wider limit takes nothing back.
    """
    recipe = project.recipe
    if project.run.finished("merge", fingerprint("merge", _merge_inputs(trained, DEQUANTISED))):
        onto = DEQUANTISED
    else:
        onto = SOURCE
        if recipe.training.method == "qlora":
            told = project.run.finished("reask", fingerprint("reask", _told_inputs(trained, asked, onto)))
            if not told:
                merged = _merge(project, trained, onto)
                told = _ask_merged(project, trained, asked, merged, _convert(project, merged))
            lost = _lost_points(asked, told, recipe.ship.match)
            if lost is not None and lost > recipe.ship.max_loss_points:
                project.reporter.warn(
                    f"merged into the 16-bit source the model loses {lost:.1f} points; merging onto the dequantised base that it was trained on"
                )
                for name in ("gguf", "merge"):  # what was made of the other merge would take the disk twice
                    if stale := project.run.finished(name):
                        shutil.rmtree(stale.folder)
                onto = DEQUANTISED
    merged = _merge(project, trained, onto)
    converted = _convert(project, merged)
    return merged, converted, _ask_merged(project, trained, asked, merged, converted)


def _lost_points(asked: Step, told: Step, match: compare.Match) -> float | None:
    """Points that the merged model answers less than the trained one; None where one of them could not be asked."""
    record = _read_answers(asked)
    answers = {**record["answers"], **_read_answers(told)["answers"]}
    found = [compare.score(record["expected"], answers[name], match).percent for name in ("trained", "merged") if name in answers]
    return found[0] - found[1] if len(found) == 2 else None


def _merge_inputs(trained: Step, onto: str) -> list[Any]:
    return [trained.fingerprint, onto]


def _merge(project: Project, trained: Step, onto: str) -> Step:
    """The trained model in 16 bits, with the template, BOS and stops that it was trained with."""
    method = project.recipe.training.method

    def make(folder: Path) -> dict[str, Any]:
        base, target = project.base_folder, folder / "model"
        tokenizer = project.tokenizer(base, dated=True)
        if method == "full":
            shutil.copytree(trained.folder / "model", target)
            if not project.recipe.trust_remote_code:
                drop_code(target)
            said = "nothing: all weights were trained"
        else:
            project.reporter.step("merging into the 16-bit source" if onto == SOURCE else "merging onto the dequantised base")
            target.mkdir()
            _, bfloat16 = project.computes_on
            place: Base = "source" if onto == SOURCE else "dequantised"
            merge(
                base,
                trained.folder / "adapter",
                target,
                onto=place,
                bfloat16=bfloat16,
                with_code=project.recipe.trust_remote_code,
                reporter=project.reporter,
            )
            said = "the 16-bit source" if onto == SOURCE else "the dequantised 4-bit base"
        return {"onto": said, "stops": template.seal(target, tokenizer)}

    return project.run.ensure("merge", _merge_inputs(trained, onto), make, after=[trained])


def _convert(project: Project, merged: Step) -> Step:
    """F16 and Q8_0, which the converter writes without llama-quantize."""

    def make(folder: Path) -> dict[str, Any]:
        converter = llama_cpp.need_converter(project.llama_cpp_dir)
        model, stem = merged.folder / "model", project.recipe.ship.name.replace(":", "-")
        tokenizer = project.tokenizer(model)
        paths = {quantization: folder / f"{stem}-{quantization}.gguf" for quantization in ALWAYS_MADE}
        for quantization, path in paths.items():
            gguf_files.convert(model, path, quantization, converter, project.reporter)
        with llamacpp.load(paths["Q8_0"], 64) as engine:
            unknown = [token for token in merged.result["stops"] if not engine.stops_at(token)]
            adds_bos = engine.tokenize("x", begins=True) != engine.tokenize("x")
        for path in paths.values():
            gguf_files.correct(
                path,
                eot_token_id=unknown[0] if unknown else None,
                add_bos_token=False if adds_bos and not template.begins_with_bos(tokenizer) else None,  # training saw none
            )
        return {"files": [_file_record(path, quantization, tokenizer.chat_template) for quantization, path in paths.items()]}

    return project.run.ensure("gguf", [merged.fingerprint], make, after=[merged])


def _file_record(path: Path, quantization: str, chat_template: str | None) -> dict[str, Any]:
    return {**asdict(gguf_files.read_back(path, quantization, chat_template)), "path": path.name}


def _told_inputs(trained: Step, asked: Step, onto: str) -> list[Any]:
    return [asked.fingerprint, trained.fingerprint, onto]


def _ask_merged(project: Project, trained: Step, asked: Step, merged: Step, converted: Step) -> Step:
    """Ask the merged model through its GGUF, a mapped file: F16, or Q8_0 where the machine's memory is too small for that."""
    onto = DEQUANTISED if "dequantised" in merged.result["onto"] else SOURCE

    def make(folder: Path) -> dict[str, Any]:
        room = processor().total_bytes - FTKIT_BYTES
        file = next((entry for entry in converted.result["files"] if entry["bytes"] < room), None)
        answers = {}
        if file:
            with llamacpp.load(converted.folder / file["path"], project.recipe.ship.num_ctx) as engine:
                answers["merged"] = engine.answer(
                    _read_answers(asked)["questions"], project.recipe.ship.max_new_tokens,
                    label=f"asking the merged model ({file['quantization']})", reporter=project.reporter,
                )  # fmt: skip
        else:
            project.reporter.warn("the merged model is not asked: each of its files is larger than this machine's memory")
        _write_json(folder / ANSWERS, {"answers": answers})
        return {"onto": onto, "asked_as": file["quantization"] if file else None}

    return project.run.ensure("reask", _told_inputs(trained, asked, onto), make, after=[asked], keep=True)


def _quantise(project: Project, converted: Step, merged: Step) -> tuple[GgufModel, dict[str, Any], str | None]:
    """The file that ships, its record, and the wanted type where it could not be made: then Q8_0 ships."""
    wanted = project.recipe.ship.quantization
    made = {entry["quantization"]: entry for entry in converted.result["files"]}
    if wanted in made:
        return GgufModel(converted.folder / made[wanted]["path"], wanted, converted), made[wanted], None
    program = llama_cpp.find_program("llama-quantize", project.llama_cpp_dir)
    inputs = [converted.fingerprint, wanted]
    if not (program or wanted in gguf_files.CONVERTER_TYPES or project.run.finished("quantise", fingerprint("quantise", inputs))):
        return GgufModel(converted.folder / made["Q8_0"]["path"], "Q8_0", converted), made["Q8_0"], wanted
    f16 = converted.folder / made["F16"]["path"]

    def make(folder: Path) -> dict[str, Any]:
        path = folder / f"{f16.stem.removesuffix('F16')}{wanted}.gguf"
        model = merged.folder / "model"
        if program and wanted not in gguf_files.CONVERTER_TYPES:
            gguf_files.quantize(f16, path, wanted, program, project.reporter)
        else:
            gguf_files.convert(model, path, wanted, llama_cpp.need_converter(project.llama_cpp_dir), project.reporter)
        return _file_record(path, wanted, project.tokenizer(model).chat_template)

    step = project.run.ensure("quantise", inputs, make, after=[converted])
    return GgufModel(step.folder / step.result["path"], wanted, step), step.result, None


def _write_modelfile(project: Project, merged: Step, shipped: GgufModel) -> Path:
    """The Modelfile beside the file that ships, written again where the file or a sampling value is another.

    Recorded as what ships: `chat`, `status` and registering read it.
    """
    ship, path = project.recipe.ship, shipped.path.with_name("Modelfile")
    mark = fingerprint(shipped.step.fingerprint, shipped.quantization, ship.model_dump(), version("ftkit"))
    if project.run.manifest().get("shipped", {}).get("mark") != mark or not path.is_file():
        modelfile = _modelfile(project, project.tokenizer(merged.folder / "model"), shipped.path, merged.result["stops"])
        write_atomically(path, modelfile.text().encode())
        gguf = shipped.path.relative_to(project.run.folder).as_posix()
        project.run.record(shipped={"step": shipped.step.name, "gguf": gguf, "system": ship.system, "num_ctx": ship.num_ctx, "mark": mark})
    return path


def _modelfile(project: Project, tokenizer: Any, gguf: Path, stops: Sequence[int]) -> Modelfile:
    from gguf import GGUFReader

    try:
        chat = find_format(_render(tokenizer), lambda day: _render(template.dated(tokenizer, day)))
    except ModelError as error:
        project.reporter.warn(f"{error.message} Ollama is left to use the template inside the GGUF.")
        chat = None
    adds_bos = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    bos = tokenizer.bos_token if adds_bos is not None and adds_bos.contents() else ""
    texts = [str(text) for text in tokenizer.convert_ids_to_tokens(list(stops))]
    return make_modelfile(f"./{gguf.name}", chat, project.recipe.ship, bos=bos or "", stops=texts)


def _render(tokenizer: Any) -> Callable[[Sequence[Message], bool], str]:
    return lambda messages, ask: template.render(tokenizer, messages, ask=ask)


def _prove(project: Project, merged: Step, asked: Step, shipped: GgufModel) -> Step:
    """Compare the file that ships with the trained model: token ids, what training saw, prompts, stops; and ask it.

    Raises ProofError where one of these checks fails. The answers are recorded, and judged by `_judge`.
    """
    recipe = project.recipe
    inputs = [merged.fingerprint, asked.fingerprint, shipped.step.fingerprint, shipped.quantization]

    def make(folder: Path) -> dict[str, Any]:
        project.reporter.step(f"proving {shipped.path.name} against the trained model")
        record = _read_answers(asked)
        questions = record["questions"]
        tokenizer = project.tokenizer(merged.folder / "model")
        with llamacpp.load(shipped.path, recipe.ship.num_ctx) as engine:
            checks = proof_checks(tokenizer, engine, project.rows.train, questions, merged.result["stops"])
            for check in checks:
                if check.outcome == "failed":
                    raise ProofError(f"{shipped.path.name} is not the model that was trained. {check.words}", HINTS[check.name])
            answers = engine.answer(questions, recipe.ship.max_new_tokens, label=f"asking {shipped.path.name}", reporter=project.reporter)
        _write_json(folder / ANSWERS, {"answers": answers})
        return {"checks": [asdict(check) for check in checks]}

    return project.run.ensure("prove", inputs, make, after=[merged, asked, shipped.step])


HINTS = {
    "token ids": "its pre-tokenizer is not what the file says: use the model's original safetensors as the base",
    "training ids": "train again with these library versions, or use the model's original safetensors as the base",
    "prompts": "its chat template renders differently in llama.cpp: report this with the model's name",
    "stops": "an answer would not end: report this with the model's name",
}


def proof_checks(
    tokenizer: Any, engine: llamacpp.Engine, rows: Sequence[Row], questions: Sequence[list[Message]], stops: Sequence[int]
) -> list[Check]:
    """Whether a loaded GGUF reads, is asked and ends as training did.

    BOS counts once: compared are the ids that the model reads, those that llama.cpp adds among them.
    """

    def training() -> Iterator[tuple[str, list[int], list[int]]]:
        for row in rows[:ROWS_COMPARED]:
            for number, message in enumerate(row.messages):
                if message["role"] == "assistant":
                    seen, said = before_answer(tokenizer, row, number)
                    yield roles_text(row.messages[:number]), seen, engine.prompt_ids(row.messages[:number])
                    yield said, template.token_ids(tokenizer, said), engine.tokenize(said)

    def prompts() -> Iterator[tuple[str, list[int], list[int]]]:
        for messages in (*questions, *conversations(_render(tokenizer), taken_for_control)):
            text = template.render(tokenizer, messages, ask=True)
            yield text, template.token_ids(tokenizer, text), engine.prompt_ids(messages)

    taken_for_control = [word for word in CONTROL_WORDS if template.token_ids(tokenizer, word) != engine.tokenize(word)]
    endless = [token for token in stops if not engine.stops_at(token)]
    names = tokenizer.convert_ids_to_tokens(list(stops))
    return [
        compare.same_ids("token ids", ((t, template.token_ids(tokenizer, t), engine.tokenize(t)) for t in HARD_TEXTS), "hard texts"),
        compare.same_ids("training ids", training(), "prompts and answers of training rows"),
        compare.same_ids("prompts", prompts(), "prompts"),
        *(
            not_made(f"prompts that hold {word}", "training reads it as text, llama.cpp as one control token, which is accepted")
            for word in taken_for_control
        ),
        failed("stops", f"llama.cpp goes on after {', '.join(tokenizer.convert_ids_to_tokens(endless))}")
        if endless
        else passed("stops", f"answers end at {' '.join(names)}"),
    ]


def _all_told(project: Project, asked: Step) -> list[Step]:
    """The answers of each merge of this training that was asked, the source's first."""
    manifest = project.run.manifest()
    kept = [*manifest.get("kept", {}).get("reask", {}).values(), manifest["steps"].get("reask")]
    found = [
        project.run.finished("reask", entry["fingerprint"]) for entry in kept if entry and entry["after"] == {"ask": asked.fingerprint}
    ]
    return sorted((step for step in found if step), key=lambda step: step.result["onto"] == DEQUANTISED)


def _judge(project: Project, asked: Step, told: Step, proven: Step, shipped: GgufModel) -> Proof:
    """Score the recorded answers and hold them against `ship.max_loss_points`: nothing is loaded or asked again.

    Writes proof.json, or where they fail failed-proof.json, and raises ProofError.
    """
    ship, record = project.recipe.ship, _read_answers(asked)
    expected, merged = record["expected"], "merged onto the dequantised base" if told.result["onto"] == DEQUANTISED else "merged"
    given: dict[str, list[str]] = {**record["answers"], shipped.quantization: _read_answers(proven)["answers"]}
    for step in _all_told(project, asked):
        for answers in _read_answers(step)["answers"].values():
            given["merged onto the dequantised base" if step.result["onto"] == DEQUANTISED else "merged"] = answers
    order = [name for name in ("before", "trained", "merged", merged, shipped.quantization) if name in given]
    scores = {name: compare.score(expected, given[name], ship.match) for name in dict.fromkeys(order)}
    after = given[shipped.quantization]
    alike = compare.same(given["trained"], after) if "trained" in given else None
    answers_check = judge_answers(scores, shipped.quantization, alike or Score(0, len(after)), ship.max_loss_points)
    checks = [*(Check(**entry) for entry in proven.result["checks"]), answers_check]
    examples = [
        {"question": q[-1]["content"], "expected": e, "before": b, "after": a}
        for q, e, b, a in zip(record["questions"], expected, given.get("before", [""] * len(after)), after, strict=True)
    ]
    proof = Proof(checks, scores, alike, examples)
    failing = answers_check.outcome == "failed"
    path = project.run.folder / FAILED_PROOF if failing else proven.folder / PROOF
    for old in (project.run.folder / FAILED_PROOF, proven.folder / PROOF):
        old.unlink(missing_ok=True)
    _write_json(path, {"file": shipped.path.name, "match": ship.match, "max_loss_points": ship.max_loss_points, **asdict(proof)})
    project.run.record(proof={"step": proven.fingerprint, "checks": [asdict(check) for check in checks]})
    if failing:
        raise ProofError(
            f"{shipped.path.name} answers worse than the trained model: {answers_check.detail}. All answers: {path}",
            f"a finer type loses less: --set ship.quantization=Q8_0; or allow it: --set ship.max_loss_points="
            f"{math.ceil(scores['trained'].percent - scores[shipped.quantization].percent)}",
        )
    return proof


def _refuse_anothers_name(project: Project, client: Any, replace_model: bool) -> None:
    """Raise NameTakenError where Ollama has a model of this name that is not one which this run registered, or was about to."""
    name = project.recipe.ship.name
    recorded = project.run.manifest().get("ollama", {})
    made_here = [[recorded.get("name"), recorded.get("digest")], *recorded.get("naming", [])]
    digest = ollama.digest_of(client, name)
    if digest and not replace_model and [name, digest] not in made_here:
        raise NameTakenError(
            f"Ollama has a model named {name} that this run did not make; it is left as it is.",
            "replace it: ftkit ship --ollama --yes; or take another name: --set ship.name=NAME",
        )


def _register(project: Project, client: Any, shipped: GgufModel, merged: Step, asked: Step, proven: Step) -> tuple[str, list[Check]]:
    """Create the model in Ollama unless it is there from this very file and Modelfile; its name, and what was checked of it.

    Whatever moment it is killed at, the next ship knows what of Ollama's is this run's: the temporary name stands in the
    index before the server hears it, and the digest before the name gets it.
    """
    name, mark = project.recipe.ship.name, project.run.manifest()["shipped"]["mark"]
    recorded = project.run.manifest().get("ollama", {})
    if left := recorded.get("temporary"):
        remove(client, left, project.reporter)
    digest = ollama.digest_of(client, name)
    if digest and recorded.get("digest") == digest and recorded.get("shipped") == mark and "checks" in recorded:
        return name, [Check(**entry) for entry in recorded["checks"]]
    if ollama.models_folder() is None:
        project.reporter.note(
            f"Ollama is on another machine: whether its disk takes {bytes_text(shipped.path.stat().st_size)} was not looked at"
        )
    tokenizer = project.tokenizer(merged.folder / "model")
    project.reporter.step(f"registering {name} in Ollama")
    modelfile = _modelfile(project, tokenizer, shipped.path, merged.result["stops"])
    temporary = temporary_name(name)
    project.run.record(ollama={**recorded, "temporary": temporary})
    answers: dict[str, Any] = {}

    def verify(unchecked: str) -> Check:
        score, check = _ask_ollama(project, client, unchecked, asked, proven)
        answers.update(asdict(score))
        return check

    registered = register(
        client, name, shipped.path, modelfile, _render(tokenizer), temporary=temporary, verify=verify,
        before_naming=lambda made: project.run.record(
            ollama={**recorded, "temporary": temporary, "naming": [*recorded.get("naming", []), [name, made]]}
        ),
        reporter=project.reporter,
    )  # fmt: skip
    checks = [asdict(check) for check in registered.checks]
    project.run.record(ollama={"name": name, "digest": registered.digest, "shipped": mark, "score": answers, "checks": checks})
    return name, list(registered.checks)


def _ask_ollama(project: Project, client: Any, name: str, asked: Step, proven: Step) -> tuple[Score, Check]:
    """Ask the server the first held-out questions: how many it answers right, and whether that is what the file answers."""
    ship, record = project.recipe.ship, _read_answers(asked)
    questions, expected = record["questions"][:OLLAMA_ROWS], record["expected"][:OLLAMA_ROWS]
    threads = asked_threads()  # more than are free slow a server down many times: they spin while they wait
    given = ollama.answer(
        client, name, questions, ship.max_new_tokens, options={"num_thread": threads} if threads else None, reporter=project.reporter
    )
    score = compare.score(expected, given, ship.match)
    project.reporter.note(f"Ollama answers {score.right} of {score.rows} held-out questions right")
    return score, judge_served(expected, _read_answers(proven)["answers"][:OLLAMA_ROWS], given, ship.match, ship.max_loss_points)


def build(project: Project, *, use_ollama: bool | None = None, replace_model: bool = False) -> Shipped:
    """The whole line."""
    refuse_missing_tools(project)
    train(project)
    return ship(project, use_ollama=use_ollama, replace_model=replace_model)

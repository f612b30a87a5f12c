"""The line, in order: plan → train → merge → gguf → prove → register. Each step is made once for its inputs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftkit import data, device, hf, llamacpp, merge, ollama, parity, source, tools
from ftkit import gguf as gguf_files
from ftkit import train as training
from ftkit.data import Example, Message, Row, TokenCounts
from ftkit.device import Device
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
from ftkit.memory import inventory, measured
from ftkit.memory.later import ASK, OLLAMAS_MODELS, RUN_FOLDER, TRAIN
from ftkit.memory.plan import MARGIN, MemoryPlan, make_plan
from ftkit.parity import Score
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Recipe, load_recipe, make_recipe
from ftkit.run import Run, Step, file_fingerprint, fingerprint
from ftkit.source import Source
from ftkit.train import Probe
from ftkit.units import bytes_text

PLAN_HOLDS_FOR = ("accelerate", "bitsandbytes", "ftkit", "gguf", "peft", "torch", "transformers", "trl")  # in these versions
PLAN_FILE, FAILED_PROOF = "plan.json", "failed-proof.json"
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
    scores: dict[str, Score]
    examples: list[dict[str, str]]
    missing_quantization: str | None  # the wanted type, where llama-quantize is not here
    registered_as: str | None
    not_registered_because: str | None
    register_with: str | None  # what to type for that
    fresh: bool


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
        """The recipe's own llama.cpp. Raises RecipeError where it names a folder that is not there."""
        if not self.recipe.tools.llama_cpp_dir:
            return None
        folder = self.folder / tools.user_path(self.recipe.tools.llama_cpp_dir)
        if not folder.is_dir():
            raise RecipeError(f"tools.llama_cpp_dir: there is no folder {folder}.", "leave it out to look in LLAMA_CPP_DIR and PATH")
        return folder

    @cached_property
    def source(self) -> Source:
        return source.locate(self.recipe.model, self.folder)

    @cached_property
    def device(self) -> Device:
        return device.choose(self.recipe.budget.vram, self.gpu)

    @cached_property
    def data_paths(self) -> dict[str, Path]:
        """The dataset's files by purpose; DataError for one that is missing comes from reading it."""
        if not self.has_data:
            return {}
        named = {"train": self.recipe.data.train, "validation": self.recipe.data.validation, "test": self.recipe.data.test}
        return {purpose: self.folder / tools.user_path(name) for purpose, name in named.items() if name}

    @cached_property
    def rows(self) -> Rows:
        read = {purpose: data.read_rows(path) for purpose, path in self.data_paths.items()}
        train, validation = read["train"], read.get("validation")
        if validation is None:
            train, validation = data.split_validation(train, self.recipe.data.validation_share, self.recipe.training.seed)
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
            recipe.data.model_dump(exclude={"test"}), recipe.training.model_dump(exclude={"save_minutes"}), recipe.lora.model_dump(),
        ]  # fmt: skip

    @cached_property
    def computes_on(self) -> tuple[bool, bool]:
        """(on a GPU, in bfloat16) – of the machine that this runs on, whatever card the plan was made for."""
        real = device.choose()
        return real.kind == "cuda", device.computes_bfloat16(real)

    @cached_property
    def base(self) -> Source:
        """The source with its 16-bit weights at hand."""
        return source.open_weights(self.source, self.reporter)

    @property
    def base_folder(self) -> Path:
        assert self.base.folder
        return self.base.folder

    def tokenised(self, rows: Sequence[Row], tokenizer: Any) -> list[Example]:
        return [data.tokenise(tokenizer, row) for row in rows]


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
    plans = tools.cache_folder() / "plans"
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
    extra_bytes = measured.extra_bytes(chosen_device)
    free_bytes = chosen_device.free_bytes  # of a device that was found it changes from day to day, and seldom the choice
    if recorded and recorded.memory.holds_with(free_bytes):
        free_bytes = recorded.memory.device.free_bytes
    wanted = [chosen_device.name, chosen_device.total_bytes >> 20, free_bytes, recipe.budget.vram, extra_bytes]
    inputs = [
        *project.training_inputs,
        recipe.ship.model_dump(),
        recipe.what_if.model_dump(),
        wanted,
        {name: version(name) for name in PLAN_HOLDS_FOR},
    ]

    def make(folder: Path) -> dict[str, Any]:
        opened = source.open_config(project.source, project.reporter)
        assert opened.folder
        counts, trained, validated = _examples(project, opened, rows or project.rows) if project.has_data else (None, [], [])
        config = inventory.load_config(opened.folder)
        kept = [*trained, *validated]
        length = max((len(example.input_ids) for example in kept), default=recipe.training.max_length)
        labelled = max((sum(label != data.IGNORED for label in example.labels) for example in kept), default=length)
        _check_config(config, recipe, length)
        project.reporter.step(f"tracing a training step of {config.model_type} at {length} tokens")
        memory = make_plan(
            config, recipe, chosen_device, length, [len(example.input_ids) for example in trained],
            bfloat16=device.computes_bfloat16(chosen_device), extra_bytes=extra_bytes, labelled_share=labelled / length,
        )  # fmt: skip
        result = {"memory": asdict(memory), "tokens": asdict(counts) if counts else None}
        (folder / PLAN_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return {}

    step = project.run.ensure("plan", inputs, make)
    made = _recorded_plan(project.run) if step.fresh else recorded
    assert made
    speed = measured.tokens_per_second(chosen_device, recipe.training.method, recipe.model)
    return replace(made, memory=made.memory.today(chosen_device.free_bytes, speed), fetch_bytes=source.bytes_to_fetch(project.source))


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
    tokenizer, max_length = hf.load_tokenizer(opened.folder), project.recipe.training.max_length
    project.reporter.step("counting the dataset's tokens")
    examples, held_out = project.tokenised(rows.train, tokenizer), project.tokenised(rows.validation, tokenizer)
    trained, validated = data.cut(examples, max_length), data.cut(held_out, max_length)
    data.refuse_nothing_to_learn(trained, validated)
    ship = project.recipe.ship
    for row in rows.test:
        asked = len(data.token_ids(tokenizer, data.render(tokenizer, row.question, ask=True)))
        if asked + ship.max_new_tokens > ship.num_ctx:
            raise RecipeError(
                f"ship.num_ctx: the held-out question in line {row.line} has {asked} tokens, with an answer of {ship.max_new_tokens} "
                f"more than the {ship.num_ctx} that the shipped model reads.",
                f"--set ship.num_ctx={-(-(asked + ship.max_new_tokens) // 1024) * 1024}",
            )
    return data.count_tokens([*examples, *held_out], max_length), trained, validated


def _check_config(config: Any, recipe: Recipe, length: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise RecipeError(
            f"training.max_length: rows of {length} tokens are longer than this model reads ({limit}).",
            f"--set training.max_length={limit}",
        )
    hf.refuse_wrong_versions(config.model_type)


def train(project: Project) -> Step:
    """Train as planned. Raises DoesNotFitError before anything is loaded, InterruptedRunError on Ctrl-C."""
    planned = plan(project)
    fit = planned.memory.chosen
    if not fit.fits:
        raise DoesNotFitError(
            f"{project.recipe.training.method} at {planned.memory.max_length} tokens needs {bytes_text(fit.peak.device_bytes)}; "
            f"{planned.memory.device.name} has {bytes_text(fit.budget_bytes)}, of which {MARGIN:.0%} is kept free.",
            "see what would fit, each change computed: ftkit plan",
        )
    if not project.run.finished("train", fingerprint("train", project.training_inputs)):
        _refuse_shortages(project, planned)
        if earlier := project.run.finished("train"):
            project.reporter.note(f"an earlier training with other inputs stays in {earlier.folder}")
    recipe = project.recipe

    def make(folder: Path) -> dict[str, Any]:
        base, rows = project.base_folder, project.rows
        tokenizer = hf.load_tokenizer(base)
        if project.base.gguf:
            _check_recovered_tokenizer(project, project.base.gguf, tokenizer)
        cuda, bfloat16 = project.computes_on
        settings = training.Settings(
            fit.per_device_train_batch_size, fit.gradient_accumulation_steps, fit.gradient_checkpointing, bfloat16, cuda
        )
        project.reporter.step(
            f"training ({recipe.training.method}, {settings.per_device_train_batch_size} × {settings.gradient_accumulation_steps})"
        )
        max_length = recipe.training.max_length
        result = training.train(
            recipe, settings, base, tokenizer,
            data.cut(project.tokenised(rows.train, tokenizer), max_length),
            data.cut(project.tokenised(rows.validation, tokenizer), max_length),
            folder, project.reporter,
        )  # fmt: skip
        peak = fit.peak
        return {
            **result.record(), "planned_allocated_bytes": peak.allocated_bytes, "planned_reserved_bytes": peak.reserved_bytes,
            "planned_device_bytes": peak.device_bytes, "planned_for": planned.memory.device.name,
        }  # fmt: skip

    step = project.run.ensure("train", project.training_inputs, make, resumable=True, keep=True)
    if step.fresh and step.result["tokens_per_second"]:
        _remember_speed(project, planned, step.result["tokens_per_second"])
    return step


def _remember_speed(project: Project, planned: Plan, tokens_per_second: float) -> None:
    """Keep a training's speed for the next plan, if it ran on the device that it was planned for. Training does not fail by this."""
    try:
        real = device.choose()
        if planned.memory.device.name == real.name:
            measured.remember_speed(real, project.recipe.training.method, project.recipe.model, tokens_per_second)
    except (OSError, FtkitError) as error:
        project.reporter.warn(f"the speed of this training is not kept for the next plan: {first_line(error)}")


def refuse_probe(project: Project) -> None:
    """Raise RecipeError where two real steps cannot be run: without rows, or for another device than this machine's."""
    real, wanted = device.choose(), project.device
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
    settings = training.Settings(
        fit.per_device_train_batch_size, fit.gradient_accumulation_steps, fit.gradient_checkpointing, bfloat16, cuda
    )
    tokenizer = hf.load_tokenizer(project.base_folder)
    examples = data.cut(project.tokenised(project.rows.train, tokenizer), recipe.training.max_length)
    project.reporter.step("probing: two real steps")
    with tempfile.TemporaryDirectory(dir=project.run.folder, prefix=".probe-") as folder:
        probed = training.probe(recipe, settings, project.base_folder, tokenizer, examples, Path(folder))
    measured.remember(device.choose(), planned.chosen.peak, probed.allocated_bytes, probed.reserved_bytes)
    return probed


def _check_recovered_tokenizer(project: Project, gguf: Path, tokenizer: Any) -> None:
    """A tokenizer that was rebuilt from a GGUF is a guess until llama.cpp gives the same ids for the training texts."""
    with llamacpp.load(gguf) as engine:
        texts = [*parity.HARD_TEXTS, *(data.render(tokenizer, row.messages, ask=False) for row in project.rows.train[:200])]
        count = parity.compare_tokens(texts, lambda text: data.token_ids(tokenizer, text), engine.tokenize, gguf.name)
    project.reporter.note(f"the tokenizer rebuilt from {gguf.name} gives llama.cpp's ids on {count} texts")


def refuse_missing_tools(project: Project) -> None:
    """Raise ToolMissingError before long work whose result could not be converted."""
    if not project.run.finished("gguf"):
        tools.need_converter(project.llama_cpp_dir)


def ship(project: Project, *, use_ollama: bool | None = None, replace_model: bool = False) -> Shipped:
    """Merge, convert, quantise, prove and register what was trained.

    `use_ollama`: True requires a server, False leaves it out, None registers where one answers. A model of that name
    which this run did not register is left as it is, unless `replace_model`.
    Raises RunError where nothing was trained, ProofError where the shipped file does not behave as the trained model.
    """
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
    if project.run.finished("plan") and not project.run.finished("prove"):
        _refuse_shortages(project, plan(project), trained=True)
    merged = _merge(project, trained)
    converted = _convert(project, merged)
    proven = _prove(project, merged, converted)
    result = proven.result
    gguf = converted.folder / converted.result["ship"]
    registered, because, register_with = None, None, None
    if use_ollama is not False:
        try:
            with ollama.connect(project.reporter) as client:
                _refuse_anothers_name(project, client, replace_model)
                registered = _register(project, client, converted, merged)
        except (ToolMissingError, NameTakenError) as error:
            if use_ollama:
                raise
            because, register_with = error.message, error.hint
    return Shipped(
        gguf=gguf,
        files=converted.result["files"],
        modelfile=converted.folder / "Modelfile",
        merged_onto=merged.result["onto"],
        scores={name: Score(**entry) for name, entry in result["scores"].items()},
        examples=result["examples"],
        missing_quantization=converted.result["missing_quantization"],
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
        (source.hub_cache(), 0 if trained else planned.fetch_bytes),
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
    total = device.processor().total_bytes
    hungry = max((step for step in planned.memory.later if step.name != TRAIN), key=lambda step: step.peak_ram_bytes)
    if hungry.peak_ram_bytes > total:
        found.append(Shortage("RAM", hungry.name, hungry.peak_ram_bytes, total))
    return found


def _refuse_shortages(project: Project, planned: Plan, *, trained: bool = False) -> None:
    """Raise DoesNotFitError before long work whose result could not be shipped from here."""
    if found := shortages(project, planned, trained=trained):
        raise DoesNotFitError(
            f"This machine is too small for what follows: {'; '.join(shortage.words for shortage in found)}.",
            "free some space, put the run elsewhere with --run-dir, or --set a smaller model",
        )


def _merge(project: Project, trained: Step) -> Step:
    """Merge into the 16-bit source and ask the held-out questions before, as trained and merged.

    Where QLoRA's gain is lost by it – an adapter learns around the 4-bit base – merge onto the dequantised base instead,
    if that answers better, and record both figures.
    """
    recipe = project.recipe
    inputs = [trained.fingerprint, project.data_fingerprints.get("test"), recipe.ship.match, recipe.ship.max_loss_points,
              recipe.ship.test_rows, recipe.ship.max_new_tokens]  # fmt: skip

    def make(folder: Path) -> dict[str, Any]:
        base, rows = project.base_folder, project.rows.test
        cuda, bfloat16 = project.computes_on
        asking = next(step for step in plan(project).memory.later if step.name == ASK)
        if cuda and not 0 < asking.vram_bytes <= device.choose().total_bytes:
            cuda = False
            project.reporter.note("the 16-bit model does not fit on the GPU beside its questions: they are asked on the CPU, which is slow")
        tokenizer = hf.load_tokenizer(base)
        hf.refuse_lost_gradients()
        questions, expected = [row.question for row in rows], [row.answer for row in rows]
        method = recipe.training.method

        def ask(label: str, folder: Path, *, adapter: Path | None = None) -> list[str]:
            loaded: Any = hf.load_model(folder, method if adapter else None, bfloat16=bfloat16, cuda=cuda)
            if adapter:
                from peft import PeftModel

                loaded = PeftModel.from_pretrained(loaded, adapter)
            return hf.answer(loaded, tokenizer, questions, recipe.ship.max_new_tokens, label=label, reporter=project.reporter)

        def points(answers: list[str]) -> float:
            return parity.score(expected, answers, recipe.ship.match).percent

        answers = {"before": ask("asking the base model", base)}
        target = folder / "model"
        if method == "full":
            shutil.copytree(trained.folder / "model", target)
            answers["trained"] = answers["merged"] = ask("asking the trained model", target)
            onto = "nothing: all weights were trained"
        else:
            adapter = trained.folder / "adapter"
            answers["trained"] = ask("asking base and adapter", base, adapter=adapter)
            project.reporter.step("merging into the 16-bit source")
            target.mkdir()
            merge.merge(base, adapter, target, reporter=project.reporter)
            answers["merged"] = ask("asking the merged model", target)
            onto = "the 16-bit source"
            lost = points(answers["trained"]) - points(answers["merged"])
            if method == "qlora" and lost > recipe.ship.max_loss_points:
                project.reporter.warn(
                    f"merged into the 16-bit source the model loses {lost:.1f} points; trying the dequantised base that it was trained on"
                )
                other = folder / "dequantised"
                other.mkdir()
                merge.merge(base, adapter, other, onto="dequantised", bfloat16=bfloat16, reporter=project.reporter)
                answers["merged onto the dequantised base"] = ask("asking the other merge", other)
                if points(answers["merged onto the dequantised base"]) > points(answers["merged"]):
                    onto = "the dequantised 4-bit base"
                    shutil.rmtree(target)
                    other.rename(target)
                else:
                    shutil.rmtree(other)
        record = {"questions": questions, "expected": expected, "answers": answers}
        (folder / "answers.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return {"onto": onto, "scores": {name: asdict(parity.score(expected, given, recipe.ship.match)) for name, given in answers.items()}}

    return project.run.ensure("merge", inputs, make, after=[trained])


def _convert(project: Project, merged: Step) -> Step:
    """F16 and Q8_0 always, and the wanted type where llama-quantize is found; the Modelfile beside them."""
    wanted = project.recipe.ship.quantization
    program = tools.find_program("llama-quantize", project.llama_cpp_dir)
    made_whole = [merged.fingerprint, project.recipe.ship.model_dump(), True]
    has_it = program or wanted in gguf_files.CONVERTER_TYPES or project.run.finished("gguf", fingerprint("gguf", made_whole))
    inputs = made_whole if has_it else [*made_whole[:2], False]  # what was made with llama-quantize stays when it is gone

    def make(folder: Path) -> dict[str, Any]:
        converter = tools.need_converter(project.llama_cpp_dir)
        model, stem = merged.folder / "model", project.recipe.ship.name.replace(":", "-")
        tokenizer = hf.load_tokenizer(model)
        files, shipped, missing = [], "Q8_0", None
        f16 = folder / f"{stem}-F16.gguf"
        for quantization in dict.fromkeys(("F16", "Q8_0", wanted)):
            path = folder / f"{stem}-{quantization}.gguf"
            if quantization in gguf_files.CONVERTER_TYPES:
                gguf_files.convert(model, path, quantization, converter, project.reporter)
            elif program:
                gguf_files.quantize(f16, path, quantization, program, project.reporter)
            else:
                missing = quantization
                continue
            if quantization == wanted:
                shipped = wanted
            done = gguf_files.read_back(path, quantization, tokenizer.chat_template)
            files.append({**asdict(done), "path": path.name})
        modelfile = _modelfile(project, tokenizer, folder / f"{stem}-{shipped}.gguf")
        (folder / "Modelfile").write_text(modelfile.text(), encoding="utf-8")
        ship = project.recipe.ship
        return {
            "files": files, "ship": f"{stem}-{shipped}.gguf", "quantization": shipped, "missing_quantization": missing,
            "system": ship.system, "num_ctx": ship.num_ctx,
        }  # fmt: skip

    return project.run.ensure("gguf", inputs, make, after=[merged])


def _modelfile(project: Project, tokenizer: Any, gguf: Path) -> ollama.Modelfile:
    from gguf import GGUFReader

    try:
        chat = ollama.find_format(_render(tokenizer))
    except ModelError as error:
        project.reporter.warn(f"{error.message} Ollama is left to use the template inside the GGUF.")
        chat = None
    adds_bos = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    bos = tokenizer.bos_token if adds_bos is not None and adds_bos.contents() else ""
    return ollama.make_modelfile(f"./{gguf.name}", chat, project.recipe.ship, bos=bos or "", stops=[tokenizer.eos_token])


def _render(tokenizer: Any) -> Callable[[Sequence[Message], bool], str]:
    return lambda messages, ask: data.render(tokenizer, messages, ask=ask)


def _prove(project: Project, merged: Step, converted: Step) -> Step:
    """Token ids, prompts and held-out answers of the file that ships, against the trained model.

    Raises ProofError where ids or prompts differ, or where it answers worse than `ship.max_loss_points` allows.
    """
    recipe = project.recipe
    gguf = converted.folder / converted.result["ship"]
    quantization = converted.result["quantization"]

    def make(folder: Path) -> dict[str, Any]:
        project.reporter.step(f"proving {gguf.name} against the trained model")
        record = json.loads((merged.folder / "answers.json").read_text(encoding="utf-8"))
        questions, expected, answers = record["questions"], record["expected"], record["answers"]
        tokenizer = hf.load_tokenizer(merged.folder / "model")
        render = _render(tokenizer)
        conversations = [*questions, *ollama.conversations(render)]
        with llamacpp.load(gguf, recipe.ship.num_ctx) as engine:
            texts = [*parity.HARD_TEXTS, *(render(question, True) for question in questions)]
            same_ids = parity.compare_tokens(texts, lambda text: data.token_ids(tokenizer, text), engine.tokenize, gguf.name)
            same_prompts = parity.compare_prompts(conversations, lambda m: render(m, True), engine.render, gguf.name)
            answers[quantization] = engine.answer(
                questions, recipe.ship.max_new_tokens, label=f"asking {gguf.name}", reporter=project.reporter
            )
        scores = {name: parity.score(expected, given, recipe.ship.match) for name, given in answers.items()}
        lost = scores["trained"].percent - scores[quantization].percent
        examples = [
            {"question": q[-1]["content"], "expected": e, "before": b, "after": a}
            for q, e, b, a in zip(questions, expected, answers["before"], answers[quantization], strict=True)
        ]
        proof = {
            "same_token_ids": same_ids, "same_prompts": same_prompts, "examples": examples[:3],
            "scores": {name: asdict(entry) for name, entry in scores.items()}, "lost_points": lost,
        }  # fmt: skip
        (folder / "proof.json").write_text(
            json.dumps({**proof, "examples": examples}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if lost > recipe.ship.max_loss_points:
            (folder / "proof.json").replace(project.run.folder / FAILED_PROOF)
            raise ProofError(
                f"{gguf.name} answers {scores[quantization].percent:.1f} % of the held-out questions right, the trained model "
                f"{scores['trained'].percent:.1f} %: {lost:.1f} points are lost, {recipe.ship.max_loss_points:g} are allowed. "
                f"All answers: {project.run.folder / FAILED_PROOF}",
                "a finer type loses less: --set ship.quantization=Q8_0; or allow it: --set ship.max_loss_points=10",
            )
        return proof

    return project.run.ensure("prove", [merged.fingerprint, converted.fingerprint], make, after=[merged, converted])


def _refuse_anothers_name(project: Project, client: Any, replace_model: bool) -> None:
    """Raise NameTakenError where Ollama has a model of this name that is not the one which this run registered."""
    name = project.recipe.ship.name
    recorded = project.run.manifest().get("ollama", {})
    digest = ollama.digest_of(client, name)
    if digest and not replace_model and (recorded.get("name"), recorded.get("digest")) != (name, digest):
        raise NameTakenError(
            f"Ollama has a model named {name} that this run did not make; it is left as it is.",
            "replace it: ftkit ship --ollama --yes; or take another name: --set ship.name=NAME",
        )


def _register(project: Project, client: Any, converted: Step, merged: Step) -> str:
    """Create the model in Ollama unless it is there from this very file, and ask it held-out questions; its name."""
    name = project.recipe.ship.name
    recorded = project.run.manifest().get("ollama", {})
    digest = ollama.digest_of(client, name)
    if digest and recorded.get("digest") == digest and recorded.get("converted") == converted.fingerprint:
        return name
    gguf = converted.folder / converted.result["ship"]
    tokenizer = hf.load_tokenizer(merged.folder / "model")
    project.reporter.step(f"registering {name} in Ollama")
    digest = ollama.register(client, name, gguf, _modelfile(project, tokenizer, gguf), _render(tokenizer), project.reporter)
    record = json.loads((merged.folder / "answers.json").read_text(encoding="utf-8"))
    questions, expected = record["questions"][:OLLAMA_ROWS], record["expected"][:OLLAMA_ROWS]
    threads = device.asked_threads()  # more than are free slow a server down many times: they spin while they wait
    given = ollama.answer(
        client, name, questions, project.recipe.ship.max_new_tokens,
        options={"num_thread": threads} if threads else None, reporter=project.reporter,
    )  # fmt: skip
    asked = parity.score(expected, given, project.recipe.ship.match)
    project.reporter.note(f"Ollama answers {asked.right} of {asked.rows} held-out questions right")
    project.run.record(ollama={"name": name, "digest": digest, "converted": converted.fingerprint, "score": asdict(asked)})
    return name


def build(project: Project, *, use_ollama: bool | None = None, replace_model: bool = False) -> Shipped:
    """The whole line."""
    refuse_missing_tools(project)
    train(project)
    return ship(project, use_ollama=use_ollama, replace_model=replace_model)

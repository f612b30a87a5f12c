"""A job: what is to be done, read and looked up once. Nothing in it is lazy; what is slow is called by name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ftkit.data.read import LeftOut, read_rows, split_validation
from ftkit.data.store import StoredRows, store_rows
from ftkit.data.template import ChatSettings, named_template
from ftkit.engines import hf
from ftkit.errors import RecipeError
from ftkit.files import cache_folder, file_fingerprint, fingerprint, user_path
from ftkit.machine import device, torch_cuda
from ftkit.machine.device import Device
from ftkit.machine.llama_cpp import named_llama_cpp
from ftkit.model.adapter import settings_of
from ftkit.model.dataset import HubData, fetch_dataset, locate_dataset
from ftkit.model.given import Given, look_at
from ftkit.model.hub import missing_weights
from ftkit.model.locate import locate
from ftkit.model.open import open_config, open_weights, weight_bytes
from ftkit.model.source import Source
from ftkit.plan.cost import CLOSING_STEPS, LOOKED_AT_BYTES
from ftkit.plan.dtype import best_dtype, computes_bfloat16
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Dtype, Recipe, load_recipe, make_recipe
from ftkit.run import MANIFEST, Run

PLANS_KEPT = 50  # of those without a recipe, each a fifth of a megabyte
Onto = Literal["source", "dequantised"]  # what an adapter is merged into
ADAPTER = "adapter"  # the folder in a training's
TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # what a tokenizer is read from
SPECIAL = "_special_tokens_map"  # where transformers 5 keeps a tokenizer's BOS, EOS and their like


@dataclass(frozen=True)
class DataFiles:
    """Files of the dataset, here or at the hub, and what their content is known by; "missing" where one is not there, which
    reading it will say."""

    files: tuple[Path | HubData, ...]
    fingerprint: str


class _AtHub:
    """The commits that a job takes: of what a training in its run was begun with, those, whatever the hub names today."""

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self._begun_with, self._reporter = run.at_hub(), reporter
        self.taken: dict[str, str] = {}

    def take(self, key: str, reference: str, newest: str, setting: str = "") -> str:
        told, commit = key in self.taken, self._begun_with.get(key, newest)
        self.taken[key] = commit
        if commit != newest and not told:
            new = f"{reference.partition('@')[0]}@{newest}"
            way = f": --set {setting}={new}" if setting else f", name it in the recipe: {new}"
            self._reporter.note(
                f"{reference} has changed at the hub since this run was begun, which stays with commit {commit[:12]}; "
                f"to take the new one{way}"
            )
        return commit


def _data_files(names: str | list[str], folder: Path, purpose: str, at_hub: _AtHub) -> DataFiles:
    files: list[Path | HubData] = []
    known = []
    for name in [names] if isinstance(names, str) else names:
        path = folder / user_path(name)
        found = None if path.exists() else locate_dataset(name, path, purpose)
        if found:
            reference = name.partition(":")[0]
            found = replace(found, commit=at_hub.take(f"datasets/{reference}", reference, found.commit))
        files.append(found or path)
        known.append(fingerprint(astuple(found)) if found else file_fingerprint(path) if path.is_file() else "missing")
    return DataFiles(tuple(files), known[0] if len(known) == 1 else fingerprint(*known))


def data_paths(data: DataFiles, reporter: Reporter = SILENT) -> list[Path]:
    """Where they lie; those of the hub are fetched where they are not here."""
    return [path for file in data.files for path in ([file] if isinstance(file, Path) else fetch_dataset(file, reporter))]


@dataclass(frozen=True)
class Rows:
    """The dataset, by purpose. `test` falls back to the validation rows where the recipe names no test file."""

    train: StoredRows
    validation: StoredRows
    test: StoredRows
    left_out: LeftOut  # of all of them

    def tell(self, reporter: Reporter) -> None:
        """Say what was left out."""
        if self.left_out.count:
            more = f"\n… and {more:,} more" if (more := self.left_out.count - len(self.left_out.first)) else ""
            reporter.warn(
                f"{self.left_out.count:,} rows cannot be read and are left out (data.skip_faulty):\n"
                + "\n".join(self.left_out.first)
                + more
            )


READ_BY = {"columns", "labels", "skip_faulty"}  # keys of `data` that change what rows say


@dataclass(frozen=True)
class Job:
    """A recipe, and what it was found to name."""

    recipe: Recipe
    folder: Path  # that the recipe's paths are taken from
    run: Run
    source: Source  # the base model
    device: Device  # that is planned for: the one that the recipe names, or this machine's
    data: Mapping[str, DataFiles]  # by purpose; empty: to be planned, or what was given is shipped, without a dataset
    llama_cpp_dir: Path | None  # the recipe's own llama.cpp
    chat_template: str | None  # the recipe's own
    reporter: Reporter
    onto: Onto = "source"  # the 16-bit model, or the 4-bit base that was trained on, dequantised
    closes: bool = False  # the file is closed, though the recipe does not ask for it: as it was quantised it loses too much
    given: Given | None = None  # what was trained elsewhere; None: it is trained here
    begins_with: Given | None = None  # the adapter that training goes on with; None: a new one
    changed: tuple[tuple[str, Any], ...] = ()  # of the recipe's file, by `--set` and its like
    at_hub: Mapping[str, str] = field(default_factory=dict)  # the commits of models and datasets, by how the recipe names them

    @property
    def rounding(self) -> float:
        """The share of what QLoRA's 4 bits changed in the base that the merge keeps."""
        if self.onto == "dequantised":
            return 1.0
        return self.recipe.ship.rounding_kept if self.recipe.training.method == "qlora" else 0.0

    @property
    def rounded(self) -> list[float]:
        """What a merge into the source follows from beside: nothing, where none is kept, as before that could be asked for."""
        return [self.rounding] if self.onto == "source" and self.rounding else []

    @property
    def closing_steps(self) -> int:
        """At most so many are made."""
        wanted = self.recipe.ship.closing_steps
        return (CLOSING_STEPS if self.closes else 0) if wanted is None else wanted

    @property
    def has_base(self) -> bool:
        """Whether there is a base to compare with: none of a whole model that was given alone."""
        return not self.given or self.given.fingerprint != self.source.fingerprint


def open_job(path: Path, overrides: Sequence[tuple[str, Any]] = (), *, run_dir: Path | None = None, reporter: Reporter = SILENT) -> Job:
    """Read a recipe (or the folder that holds `recipe.yaml`) and find its run directory: `runs/RECIPE` beside it."""
    path = path / "recipe.yaml" if path.is_dir() else path
    recipe = load_recipe(path, overrides)
    folder = path.parent.resolve()
    job = make_job(recipe, folder, Run(run_dir or folder / "runs" / path.stem, reporter), reporter)
    return replace(job, changed=tuple(overrides))


def open_without_recipe(overrides: Sequence[tuple[str, Any]], *, reporter: Reporter = SILENT) -> Job:
    """A job of settings alone, to be planned: `model`, and `data.train` where there is a dataset already.

    Each question's plan is kept in the private folder, and paths are taken from the current one.
    """
    recipe = make_recipe(overrides)
    plans = cache_folder() / "plans"
    if plans.is_dir():
        for old in sorted(plans.iterdir(), key=lambda path: path.stat().st_mtime)[:-PLANS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    run = Run(plans / fingerprint(str(Path.cwd()), recipe.model_dump()))
    return make_job(recipe, Path.cwd(), run, reporter, has_data=any(key == "data.train" for key, _ in overrides))


def make_job(recipe: Recipe, folder: Path, run: Run, reporter: Reporter = SILENT, *, has_data: bool = True) -> Job:
    """Look up what the recipe names.

    Raises RecipeError for a folder of tools, a template or a card that is not there, ModelError for no model.
    """
    at_hub = _AtHub(run, reporter)
    given = look_at(recipe.trained, folder) if recipe.trained else None
    if given and given.hub and recipe.trained:
        commit = at_hub.take(recipe.trained, recipe.trained, given.hub.fingerprint, "trained")
        if commit != given.hub.fingerprint:
            given = look_at(f"{recipe.trained.partition('@')[0]}@{commit}", folder)
    begins_with = None if given or not recipe.training.adapter else _adapter_of(recipe, folder, recipe.training.adapter)
    named = {"train": recipe.data.train, "validation": recipe.data.validation, "test": recipe.data.test} if has_data else {}
    if given:  # without rows of its own it is shipped without any
        named = {purpose: names for purpose, names in named.items() if purpose in recipe.data.model_fields_set}
        recipe = _as_given(recipe, given)
    if begins_with:
        recipe = recipe.model_copy(update={"lora": settings_of(begins_with.path, recipe.lora)})
    if (taken := torch_cuda.settle()) and not (recipe.budget.gpu or recipe.budget.vram):
        reporter.note(taken)
    source = replace(locate(recipe.model, folder), with_code=recipe.trust_remote_code)
    if source.kind == "hub":
        source = replace(source, fingerprint=at_hub.take(recipe.model, recipe.model, source.fingerprint, "model"))
    return Job(
        recipe=recipe,
        given=given,
        begins_with=begins_with,
        folder=folder,
        run=run,
        source=source,
        device=device.choose(recipe.budget.vram, recipe.budget.gpu),
        data={purpose: _data_files(names, folder, purpose, at_hub) for purpose, names in named.items() if names},
        llama_cpp_dir=named_llama_cpp(recipe.tools.llama_cpp_dir, folder),
        chat_template=named_template(recipe.data.template, folder),
        reporter=reporter,
        at_hub=at_hub.taken,
    )


def _adapter_of(recipe: Recipe, folder: Path, reference: str) -> Given:
    """An adapter to go on with: of a run that trained one, or PEFT's own. Raises RecipeError, or ModelError as `look_at` does."""
    if recipe.training.method == "full":
        raise RecipeError(
            "training.adapter: with `method: full` all weights are trained, and no adapter.",
            f"merge it, and name the merged model: ftkit ship {reference}; or train the adapter: --set training.method=lora",
        )
    path, named = folder / user_path(reference), reference
    if (path / MANIFEST).is_file():
        trained = Run(path).finished("train")
        if not trained or not (trained.folder / ADAPTER).is_dir():
            what = "trained a whole model" if trained else "holds no finished training"
            way = f"name it as the model: --set model={trained.folder / 'model'}" if trained else "train it first, with its own recipe"
            raise RecipeError(f"training.adapter: the run {path} {what}.", way)
        named = str(trained.folder / ADAPTER)
    given = look_at(named, folder)
    if given.kind != "adapter":
        raise RecipeError(
            f"training.adapter: {reference} is a {given.kind}, and no adapter.", f"name it as the model: --set model={reference}"
        )
    return given


def _as_given(recipe: Recipe, given: Given) -> Recipe:
    """The recipe with the method by which this was trained: of an adapter it says whether on 4 bits, a whole model has one."""
    full = recipe.training.method == "full"
    if given.kind == "adapter" and full:
        raise RecipeError(f"training.method: {given.path} is an adapter.", "trained on 4 bits: qlora; on 16: --set training.method=lora")
    if given.kind == "adapter" or full:
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"method": "full"})})


def read_data(job: Job) -> Rows:
    """Read the dataset. Raises DataError with every fault by file and line.

    Where nothing was trained here nothing is held out: without test or validation rows all are asked.
    """
    settings, read, left_out = job.recipe.data, {}, LeftOut()
    for purpose, data in job.data.items():
        learnt_of = job.recipe.training.objective if purpose != "test" and not job.given else None
        read[purpose] = read_rows(
            *data_paths(data, job.reporter),
            columns=settings.columns,
            labels=settings.labels or (),
            objective=learnt_of,
            left_out=left_out if settings.skip_faulty else None,
        )
    if job.given:
        rows = [read[purpose] for purpose in ("train", "validation", "test") if purpose in read] or [store_rows(())]
        return Rows(rows[0], read.get("validation", rows[0][:0]), rows[-1][: job.recipe.ship.test_rows], left_out)
    train, validation = read["train"], read.get("validation")
    if validation is None:
        train, validation = split_validation(train, job.recipe.data.validation_share, job.recipe.training.seed)
    return Rows(train, validation, read.get("test", validation)[: job.recipe.ship.test_rows], left_out)


def open_base(job: Job) -> Source:
    """The base model with its 16-bit weights at hand: fetched or dequantised where they are not."""
    return open_weights(job.source, job.reporter)


def base_folder(job: Job) -> Path:
    folder = open_base(job).folder
    assert folder
    return folder


def config_folder(job: Job) -> Path:
    """A folder with the base's config and tokenizer; its weights need not be here."""
    folder = open_config(job.source, job.reporter).folder
    assert folder
    return folder


@dataclass(frozen=True)
class ToFetch:
    """What the steps to come fetch of the base's weights from the hub."""

    files: int
    bytes: int
    at_once_bytes: int  # that the run's folder holds while they are merged: the largest file. 0: all go into the hub's cache, and stay


def base_to_fetch(job: Job) -> ToFetch:
    """Of a base that is not here whole. One file at a time where the merge alone reads it; else as a whole, once.

    Raises ModelError where the hub cannot be asked.
    """
    if job.source.kind != "hub" or not (missing := missing_weights(open_config(job.source))):
        return ToFetch(0, 0, 0)
    ship, finished = job.recipe.ship, job.run.finished
    trains, asks = not job.given and not finished("train"), bool(job.data) and not finished("ask")
    looks = ship.adapter and not finished("adapter") and weight_bytes(job.source) <= LOOKED_AT_BYTES
    closes = (job.closing_steps and not finished("close")) or (ship.transfer_steps and not finished("transfer"))
    loads = trains or asks or looks or closes
    if not loads and finished("merge"):
        return ToFetch(0, 0, 0)
    by_file = job.recipe.training.method != "full" and not job.rounding  # a weight that was in 4 bits may stand in several files
    one_at_a_time = by_file and not (loads or ship.keep_source)
    return ToFetch(len(missing), sum(missing.values()), max(missing.values()) if one_at_a_time else 0)


def tokenizer_of(job: Job, folder: Path, *, base: bool = False) -> Any:
    """The tokenizer of a model folder; of a `base` with the template that the recipe makes of it, as what is merged has it already."""
    recipe, data = job.recipe, job.recipe.data
    settings = ChatSettings(data.day, data.thinking, data.system_in_question, job.chat_template) if base else None
    files = sorted(path for path in folder.glob("*") if path.suffix in TOKENIZER_FILES and path.is_file())
    known = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    tokenizer = copy.copy(_tokenizer(folder, settings, recipe.trust_remote_code, known))
    if hasattr(tokenizer, SPECIAL):  # whoever names a token of his own must not name it for all
        setattr(tokenizer, SPECIAL, dict(getattr(tokenizer, SPECIAL)))
    return tokenizer


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, settings: ChatSettings | None, trust_remote_code: bool, known: tuple[Any, ...]) -> Any:
    """The last one is kept: of 151,000 tokens, reading it takes two seconds, 100 MB, and a shipping asks for a dozen."""
    return hf.load_tokenizer(folder, settings, trust_remote_code=trust_remote_code)


def computes_on(job: Job, model_type: str) -> tuple[bool, Dtype]:
    """(on a GPU, what is computed in) – of the machine that this runs on, whatever card the plan was made for.

    Raises ToolMissingError where the torch that is here does not compute on its GPU.
    """
    real = device.choose()
    torch_cuda.refuse(real)
    return real.kind == "cuda", dtype_on(real, job.recipe, model_type)


def dtype_on(on: Device, recipe: Recipe, model_type: str) -> Dtype:
    """What this model is computed in on a device. Raises RecipeError where the recipe asks for what the device cannot."""
    wanted = recipe.training.compute_dtype
    if wanted == "float16" and on.kind != "cuda":  # accelerate then leaves autocast out too, without a word
        raise RecipeError("training.compute_dtype: float16 needs loss scaling, which is for GPUs.", "--set training.compute_dtype=float32")
    if wanted == "bfloat16" and on.kind == "cuda" and not computes_bfloat16(on):
        raise RecipeError(
            f"training.compute_dtype: {on.name} computes no bfloat16 (CUDA capability {'.'.join(map(str, on.capability))}).",
            "--set training.compute_dtype=float16, or leave it out",
        )
    best = best_dtype(on)
    return wanted or ("float32" if best == "float16" and hf.beyond_float16(model_type) else best)

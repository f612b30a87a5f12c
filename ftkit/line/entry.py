"""What `ftkit ship` is given → a job: a recipe, a run, or what another tool trained, of which a recipe is made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftkit.errors import ModelError, RecipeError, RunError
from ftkit.files import user_path, write_atomically
from ftkit.line.behaviour import MOST_ROWS
from ftkit.line.job import Job, make_job, open_job
from ftkit.model.given import UNQUANTISED, Given, four_bits, look_at
from ftkit.model.locate import HUB_ID
from ftkit.progress import Reporter
from ftkit.recipe import MODEL_NAME, QUANTIZATIONS, Recipe, load_recipe, make_recipe
from ftkit.run import MANIFEST, Run

MODEL_FILES = re.compile(r".*\.(gguf|safetensors|bin|pt|pth|npz)|(adapter_)?config\.json")  # by name no recipe
TYPE = re.compile(rf"[-._](F32|{'|'.join(QUANTIZATIONS)})$", re.IGNORECASE)  # at the end of a GGUF's name


@dataclass(frozen=True)
class NewRecipe:
    """A recipe of what was given, to be written once it is known that it can be shipped."""

    path: Path
    recipe: Recipe
    reporter: Reporter

    def write(self) -> None:
        text = yaml.safe_dump(self.recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
        head = f"# What `ftkit ship {self.recipe.trained}` was given. To change it, change it here; every key: docs/recipe.md\n"
        write_atomically(self.path, (head + text).encode())
        self.reporter.note(f"wrote {self.path.name}; from now on the same as: ftkit ship {self.path.name}")


def enter(what: str, overrides: Sequence[tuple[str, Any]], *, run_dir: Path | None, reporter: Reporter) -> tuple[Job, NewRecipe | None]:
    """The job of `what`, and the recipe to be written for it where there is none yet.

    Raises RecipeError, RunError and ModelError for what cannot be shipped, as far as its own files tell.
    """
    path = user_path(what)
    if (path / MANIFEST).is_file():
        return open_run(path, overrides, reporter=reporter), None
    is_file = not path.is_dir() and not MODEL_FILES.fullmatch(path.name) and (path.exists() or path.suffix in (".yaml", ".yml"))
    if is_file or (path / "recipe.yaml").is_file():
        return open_job(path, overrides, run_dir=run_dir, reporter=reporter), None
    return _enter_given(what, overrides, run_dir, reporter)


def open_run(path: Path, overrides: Sequence[tuple[str, Any]] = (), *, reporter: Reporter) -> Job:
    """The job of a run, by its recipe, which lies beside the folder that the run is in, with what its training changed in that.

    Raises RunError where it does not lie there.
    """
    recipe = path.resolve().parent.parent / f"{path.resolve().name}.yaml"
    if not recipe.is_file():
        raise RunError(f"{path} is a run, and its recipe is not at {recipe}.", f"name it: ftkit ship RECIPE --run-dir {path}")
    return open_job(recipe, [*Run(path).trained_with(), *overrides], run_dir=path, reporter=reporter)


def _enter_given(what: str, overrides: Sequence[tuple[str, Any]], run_dir: Path | None, reporter: Reporter) -> tuple[Job, NewRecipe | None]:
    here, chosen = Path.cwd(), dict(overrides)
    given = look_at(what, here)
    name = str(chosen.get("ship.name") or _name(what, given))
    file = here / f"{name.replace(':', '-')}.yaml"
    if MODEL_NAME.fullmatch(name) and file.is_file():
        recipe = load_recipe(file, overrides)
        if not recipe.trained or (recipe.trained != what and look_at(recipe.trained, here).path != given.path):
            raise RecipeError(f"{file.name} is the recipe of something else.", "take another name: --set ship.name=NAME")
        reporter.note(f"as {file.name} has it; what flags change, they change for this once")
        return open_job(file, overrides, run_dir=run_dir, reporter=reporter), None
    loaded: dict[str, Any] = {
        "model": chosen.get("model") or _base(what, given),
        "trained": what,
        "ship": {"name": name},
    }
    if given.kind == "adapter":
        loaded["training"] = {"method": "qlora" if given.on_four_bits else "lora"}
    if given.kind == "gguf" and given.quantization not in UNQUANTISED:
        if given.quantization not in QUANTIZATIONS:
            raise ModelError(
                f"{what} is {given.quantization}, a type that ftkit does not know.", "ship the 16-bit file that it was made of"
            )
        loaded["ship"]["quantization"] = given.quantization
    if "data.train" in chosen and "data.test" not in chosen:
        loaded["ship"]["test_rows"] = MOST_ROWS
    near = [(key, _from(here, value) if key in ("model", "data.train", "data.test") else value) for key, value in overrides]
    recipe = make_recipe(near, loaded)
    run = Run(run_dir or here / "runs" / file.stem, reporter)
    return make_job(recipe, here, run, reporter), NewRecipe(file, recipe, reporter)


def _name(what: str, given: Given) -> str:
    """For the files, in Ollama, of the recipe and of the run: the folder's or the file's, as far as such a name can hold it."""
    if what.startswith("ollama:"):
        text = what.removeprefix("ollama:")
    elif given.hub:
        text = what.partition("@")[0].rpartition("/")[2]
    else:
        text = TYPE.sub("", given.path.stem) if given.kind == "gguf" else given.path.name
    return re.sub(r"[^a-zA-Z0-9._-]+", "-", text).strip("-._")[:80] or "my-model"


def _base(what: str, given: Given) -> str:
    """What it was trained on, as an adapter says; a whole model goes without. Raises ModelError where that is not known, or not here."""
    if given.kind != "adapter":
        return what
    if not given.base:
        raise ModelError(f"{what} does not say what it was trained on.", f"name its base: ftkit ship {what} --base REF")
    if given.on_four_bits:
        raise four_bits(what, given.base, "has its weights in 4 bits")
    if not user_path(given.base).exists() and not HUB_ID.fullmatch(given.base):
        raise ModelError(f"{what} was trained on {given.base}, which is not here.", f"name its base: ftkit ship {what} --base REF")
    return given.base


def _from(here: Path, value: Any) -> Any:
    """A path below this folder as it is called from here."""
    below = isinstance(value, str) and Path(value).is_relative_to(here)
    return Path(value).relative_to(here).as_posix() if below else value

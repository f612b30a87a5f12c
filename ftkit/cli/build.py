"""`ftkit build`: the whole line in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ftkit.cli import plan as plan_command
from ftkit.cli import ship as ship_command
from ftkit.cli.common import open_project, recipe_options


@click.command(epilog="\b\nExamples:\n  ftkit build\n  ftkit build --set training.max_steps=20 --no-ollama")
@recipe_options
@ship_command.ollama_option
@ship_command.yes_option
def command(recipe: Path, as_json: bool, use_ollama: bool | None, replace_model: bool, **options: Any) -> None:
    """Plan, train and ship RECIPE. What is finished is not done again."""
    from ftkit import pipeline

    project = open_project(recipe, **options)
    with project.run:
        pipeline.refuse_missing_tools(project)
        if not as_json and not pipeline.is_trained(project):  # what is trained has fitted
            plan_command.show(pipeline.plan(project), project.recipe.training.save_minutes)
        shipped = pipeline.build(project, use_ollama=use_ollama, replace_model=replace_model)
        ship_command.show(project, shipped, as_json)

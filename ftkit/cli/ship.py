"""`ftkit ship`: merge, convert, quantise, prove, register."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import open_project, recipe_options

if TYPE_CHECKING:
    from ftkit.pipeline import Project, Shipped

ollama_option = click.option(
    "--ollama/--no-ollama", "use_ollama", default=None, help="Register in Ollama, or do not.  [default: if a server answers]"
)
yes_option = click.option(
    "--yes", "-y", "replace_model", is_flag=True, help="Replace a model of that name in Ollama which this run did not make."
)


@click.command(epilog="\b\nExamples:\n  ftkit ship\n  ftkit ship --set ship.quantization=Q5_K_M --ollama")
@recipe_options
@ollama_option
@yes_option
def command(recipe: Path, as_json: bool, use_ollama: bool | None, replace_model: bool, **options: Any) -> None:
    """Turn what RECIPE trained into a GGUF that answers as the trained model does, and register it in Ollama."""
    from ftkit import pipeline

    project = open_project(recipe, **options)
    with project.run:
        show(project, pipeline.ship(project, use_ollama=use_ollama, replace_model=replace_model), as_json)


def show(project: Project, shipped: Shipped, as_json: bool) -> None:
    """Scores, a few answers before and after, the files, and how to go on."""
    from ftkit.cli.console import print_json, print_table, say
    from ftkit.units import bytes_text

    if as_json:
        print_json(asdict(shipped))
        return
    unproven = [check for check in shipped.checks if check.outcome != "passed"]
    for check in unproven:
        say(f"Not proven – {check.name}: {check.detail}.")
    if any(check.name == "answers" for check in unproven):
        say(f"Count less of an answer (--set ship.match=first_line), or read them side by side: {shipped.proof_file}")
    if unproven:
        say("")
    if not shipped.fresh:
        say("Up to date.\n")
    for example in shipped.examples:
        say("─" * 72)
        say(example["question"])
        say(
            f"\n  before    {_one_line(example['before'])}\n  after     {_one_line(example['after'])}\n  expected  {_one_line(example['expected'])}\n"
        )
    what = {"first_line": "first lines", "last_line": "last lines", "whole": "answers"}[project.recipe.ship.match]
    rows = [[name, f"{score.right} of {score.rows}", f"{score.percent:.1f} %"] for name, score in shipped.scores.items()]
    print_table(f"Held-out questions, {what} exactly right", ["", "right", ""], rows)
    if "dequantised" in shipped.merged_onto:
        say(
            "\nMerged into the source the gain was lost. The dequantised base keeps it, at a price outside the task: its weights are as coarse as 4 bits."
        )
    say(f"\nMerged into {shipped.merged_onto}.\n")
    print_table("What was checked", ["", "", ""], [[c.name, c.outcome, c.detail] for c in shipped.checks], figures=False)
    say("")
    print_table(
        "Files", ["", "size", "bits a weight"], [[f["path"], bytes_text(f["bytes"]), f"{f['bits_per_weight']:.2f}"] for f in shipped.files]
    )
    say(f"in {shipped.gguf.parent}\n")
    if shipped.missing_quantization:
        say(
            f"{shipped.missing_quantization} was not made: llama-quantize is not here. Bring it: ftkit setup llama.cpp (then the same command again)"
        )
    say(f"Ask it:      ftkit chat {project.run.folder}")
    if shipped.registered_as:
        say(f"             ollama run {shipped.registered_as}")
    else:
        if shipped.not_registered_because:
            say(f"Not registered: {shipped.not_registered_because}")
        say(f"In Ollama:   {shipped.register_with or 'start it: ollama serve'}, then: ftkit ship --ollama")
        say(f"             or by hand: ollama create {project.recipe.ship.name} -f {shipped.modelfile}")


def _one_line(text: str) -> str:
    """An answer on one line, cut for the screen."""
    line = " ⏎ ".join(text.strip().splitlines())
    return line if len(line) <= 140 else line[:139] + "…"

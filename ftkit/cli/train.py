"""`ftkit train`: fine-tune as planned; the same command again resumes or says that it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ftkit.cli.common import open_project, recipe_options


@click.command(epilog="\b\nExamples:\n  ftkit train\n  ftkit train --set training.method=lora --set training.learning_rate=1e-4")
@recipe_options
def command(recipe: Path, as_json: bool, **options: Any) -> None:
    """Train RECIPE as planned. The best checkpoint by validation loss is kept; a killed run is taken up again.

    Ctrl-C saves a checkpoint at the end of the step and stops; a second one stops at once. The same command goes on.
    """
    from ftkit import pipeline
    from ftkit.cli.console import print_json, say
    from ftkit.units import bytes_text, seconds_text

    project = open_project(recipe, **options)
    with project.run:
        step = pipeline.train(project)
    result = step.result
    if as_json:
        print_json({**result, "folder": str(step.folder), "seconds": step.seconds})
        return
    speed = f", {result['tokens_per_second']:.0f} tokens/s" if result["tokens_per_second"] else ""
    say(
        f"{'Trained' if step.fresh else 'Up to date: trained'} in {seconds_text(result.get('seconds') or step.seconds)}, {result['steps']} steps{speed}."
    )
    say(
        f"Validation loss {result['first_validation_loss']:.4f} → {result['best_validation_loss']:.4f} (best, step {result['best_step']}): {result['verdict']}."
    )
    planned = result.get("planned_device_bytes" if "RAM" in result["peak_is"] else "planned_allocated_bytes")
    beside = f", planned {bytes_text(planned)}" if planned else ""  # runs of ftkit before 0.2 recorded no plan
    say(f"Peak memory {bytes_text(result['peak_bytes'])} {result['peak_is']}{beside}. Kept in {step.folder}")
    say("Next: ftkit ship")

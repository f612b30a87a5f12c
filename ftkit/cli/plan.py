"""`ftkit plan`: does it fit, with which batch × accumulation, and what the later steps need."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import open_project, recipe_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftkit.memory.plan import Fit
    from ftkit.pipeline import Plan


@click.command(
    epilog='\b\nExamples:\n  ftkit plan\n  ftkit plan --gpu "RTX 4090" --set training.method=lora\n  ftkit plan --model ./my-model.gguf --vram 8'
)
@recipe_options
def command(recipe: Path, as_json: bool, **options: Any) -> None:
    """Count what the run of RECIPE needs, and choose batch × accumulation. No GPU and no weights are needed."""
    from ftkit import pipeline
    from ftkit.cli.console import print_json
    from ftkit.errors import DoesNotFitError
    from ftkit.units import bytes_text

    project = open_project(recipe, **options)
    with project.run:
        planned = pipeline.plan(project)
    chosen = planned.memory.chosen
    if as_json:
        print_json({**asdict(planned.memory), "tokens": asdict(planned.tokens), "fits": chosen.fits, "peak_bytes": chosen.peak_bytes})
    else:
        show(planned)
    if not chosen.fits:
        raise DoesNotFitError(
            f"It does not fit: about {bytes_text(chosen.peak_bytes)} of {bytes_text(chosen.budget_bytes)}.",
            "a method that fits is in the table; or a shorter row: --set training.max_length=512",
        )


def show(planned: Plan) -> None:
    """The plan on one screen."""
    from ftkit.cli.console import print_table, say
    from ftkit.memory.plan import MARGIN
    from ftkit.units import bytes_text, count_text

    memory, tokens = planned.memory, planned.tokens
    chosen = memory.chosen
    counted = chosen.inventory
    say(
        f"{'Fits' if chosen.fits else 'Does not fit'}: {counted.method} needs about {bytes_text(chosen.peak_bytes)} of "
        f"{bytes_text(chosen.budget_bytes)} on {memory.device_name} ({MARGIN:.0%} is kept free), computing in {memory.compute_dtype}."
    )
    say(
        f"Batch {chosen.per_device_train_batch_size} × accumulation {chosen.gradient_accumulation_steps}, gradient checkpointing "
        f"{'on' if chosen.gradient_checkpointing else 'off'}: the largest batch that fits."
    )
    say(
        f"Data: {tokens.rows:,} rows, {tokens.total:,} tokens; a row has {tokens.median} (median), {tokens.p95} (95 %), "
        f"{tokens.longest} (longest)" + (f"; {tokens.cut} rows will be cut" if tokens.cut else "") + ".\n"
    )
    rows = []
    parts: dict[str, Callable[[Fit], str]] = {
        "base weights": lambda f: bytes_text(f.inventory.weights_bytes),
        "adapter": lambda f: bytes_text(f.inventory.adapter_bytes) if f.inventory.adapter_bytes else "–",
        "gradients": lambda f: bytes_text(f.inventory.gradient_bytes),
        "optimizer": lambda f: bytes_text(f.inventory.optimizer_bytes),
        "activations (estimate)": lambda f: bytes_text(f.activation_bytes),
        "peak": lambda f: bytes_text(f.peak_bytes),
        "batch × accumulation": lambda f: f"{f.per_device_train_batch_size} × {f.gradient_accumulation_steps}",
        "checkpointing": lambda f: "on" if f.gradient_checkpointing else "off",
        "trained parameters": lambda f: f"{f.inventory.trainable_parameters:,}",
        "fits": lambda f: "yes" if f.fits else "no",
    }
    for name, figure in parts.items():
        rows.append([name, *(figure(fit) for fit in memory.methods)])
    title = f"{count_text(counted.parameters)} parameters ({counted.parameters:,}), rows of {memory.max_length} tokens"
    print_table(title, ["", *(fit.inventory.method for fit in memory.methods)], rows)
    say()
    later = [
        [step.name, bytes_text(step.peak_ram_bytes), bytes_text(step.disk_bytes), bytes_text(step.read_bytes)] for step in memory.later
    ]
    print_table("After training", ["", "RAM, about", "disk written", "read"], [*later, ["all", "", bytes_text(memory.disk_bytes), ""]])
    say("\nCounted: parameters, weights, adapter, gradients, optimizer. Estimated: activations, RAM of the later steps.")

"""`ftkit status`: which steps of a run are done."""

from __future__ import annotations

from pathlib import Path

import click

from ftkit.cli.common import json_option

STEPS = {"plan": "ftkit plan", "train": "ftkit train", "merge": "ftkit ship", "gguf": "ftkit ship", "prove": "ftkit ship"}


@click.command(epilog="\b\nExamples:\n  ftkit status runs/recipe\n  ftkit status runs/recipe --json")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@json_option
def command(run: Path, as_json: bool) -> None:
    """Show the steps of RUN: finished, begun or still to do, and the command that does the next one."""
    from ftkit.cli.console import print_json, print_table, say
    from ftkit.errors import RunError
    from ftkit.run import MANIFEST, Run
    from ftkit.units import seconds_text

    if not (run / MANIFEST).exists() and not any(run.glob(".*.partial")):
        raise RunError(f"{run} is no run directory.", "a run is made by ftkit plan, train or build, in runs/RECIPE")
    opened = Run(run)
    steps = {name: opened.finished(name) for name in STEPS}
    begun = {name: any(run.glob(f".{name}-*.partial")) for name in STEPS}
    ollama, converted = opened.manifest().get("ollama", {}), steps["gguf"]
    registered = ollama.get("name") if converted and ollama.get("converted") == converted.fingerprint else None
    if as_json:
        states = {
            n: {"finished": bool(s), "begun": begun[n], "seconds": s.seconds if s else None, "folder": s and str(s.folder)}
            for n, s in steps.items()
        }
        print_json({"steps": states, "registered_as": registered})
        return
    rows = [
        [name, "done" if step else "begun, not finished" if begun[name] else "to do", seconds_text(step.seconds) if step else ""]
        for name, step in steps.items()
    ]
    print_table(
        f"{run}",
        ["step", "state", "took"],
        [*rows, ["ollama", f"registered as {registered}" if registered else "to do", ""]],
        figures=False,
    )
    following = next((STEPS[name] for name, step in steps.items() if not step), None if registered else "ftkit ship --ollama")
    say(f"\nNext: {following or f'ollama run {registered}'}")

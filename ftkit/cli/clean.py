"""`ftkit clean`: remove what a run holds and does not need, after asking."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ftkit.cli.common import json_option, run_argument
from ftkit.cli.init import confirmed
from ftkit.cli.status import as_record, held_names, open_run, show_held


@click.command(
    epilog="\b\nExamples:\n  ftkit clean runs/recipe --dry-run\n  ftkit clean runs/recipe\n"
    "  ftkit clean runs/recipe train-0123456789abcdef --yes"
)
@run_argument()
@click.argument("names", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
def command(run: Path, names: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove earlier and unfinished trainings of other settings from RUN, and what killed commands left; of these only NAMES.

    The steps that are up to date stay, and so does what was begun last, and every file that is not ftkit's.
    """
    from ftkit.cli.console import print_json, say
    from ftkit.errors import RecipeError
    from ftkit.units import bytes_text

    opened = open_run(run)
    with opened:
        held = opened.holds(held_names())
        removable = [entry for entry in held if not entry.needed]
        for name in names:
            if name not in [entry.path.name for entry in removable]:
                needed = name in [entry.path.name for entry in held]
                raise RecipeError(
                    f"{name} in {run} {'is needed' if needed else 'is nothing that can go'}.", f"see what can: ftkit status {run}"
                )
        chosen = [entry for entry in removable if not names or entry.path.name in names]
        total = sum(entry.size_bytes for entry in chosen)
        if not as_json:
            show_held(chosen, "Can go") if chosen else say(f"{run} holds nothing that can go.")
        if chosen and not dry_run:
            if not yes and not (
                sys.stdin.isatty() and confirmed(f"Remove {'this' if len(chosen) == 1 else 'these'}, {bytes_text(total)}?")
            ):
                raise RecipeError("Nothing was removed.", "answer yes, or give --yes")
            for entry in chosen:
                opened.remove(entry)
        if as_json:
            print_json({"removed": not dry_run, "entries": [as_record(entry) for entry in chosen], "size_bytes": total})
        elif chosen:
            say(f"\n{'Would free' if dry_run else 'Freed'} {bytes_text(total)}.")

"""`ftkit status`: which steps of a run are done, what it holds on disk, and what of that can go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import json_option, run_argument

if TYPE_CHECKING:
    from ftkit.run import Held, Run


@click.command(epilog="\b\nExamples:\n  ftkit status\n  ftkit status runs/recipe --json\n  ftkit status runs/recipe --html run.html")
@run_argument(default=Path("recipe.yaml"))
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write how its training went, or goes, as one page."
)
@json_option
def command(run: Path, as_json: bool, html: Path | None) -> None:
    """Show the steps of RUN: finished, begun or still to do, the command that does the next one, and what lies on the disk.

    RUN is its folder, or its recipe.
    """
    from ftkit.cli.console import print_json, print_table, say
    from ftkit.line.line import LINE
    from ftkit.line.record import SHIPPED
    from ftkit.proof.record import RECORD
    from ftkit.units import bytes_text, seconds_text

    opened = open_run(run)
    if html:
        write_page(run, html)
    steps = {name: opened.finished(name) for name in step_names()}
    begun = {name: any(run.glob(f".{name}-*.partial")) for name in steps}
    manifest = opened.manifest()
    ollama, shipped, proof = manifest.get("ollama", {}), manifest.get("shipped", {}), manifest.get("proof", {})
    registered = ollama.get("name") if steps["gguf"] and shipped and ollama.get("shipped") == shipped["mark"] else None
    proven = steps["prove"]
    elsewhere = bool(steps["adopt"]) or begun["adopt"]
    for name in ("plan", "train") if elsewhere else ("adopt",):
        del steps[name]
    if proven:  # what is not there was not needed: F16 or Q8_0 ships, or nothing is closed
        steps = {name: step for name, step in steps.items() if step or begun[name]}
    checks = proof["checks"] if proven and proof.get("step") == proven.fingerprint else []
    checks = [*checks, *(ollama.get("checks", []) if registered else [])]
    doubts = [f"{check['name']}: {check['outcome']}" for check in checks if check["outcome"] != "passed"]
    held = opened.holds(held_names())
    if as_json:
        states = {
            n: {"finished": bool(s), "begun": begun[n], "seconds": s.seconds if s else None, "folder": s and str(s.folder)}
            for n, s in steps.items()
        }
        held_too = [as_record(entry) for entry in held]
        print_json({"steps": states, "checks": checks, "registered_as": registered, "held": held_too})
        return
    rows = [
        [name, "done" if step else "begun, not finished" if begun[name] else "to do", seconds_text(step.seconds) if step else ""]
        for name, step in steps.items()
    ]
    print_table(
        f"{run}",
        ["step", "state", "took"],
        [*rows, ["register", f"done, as {registered}" if registered else "to do", ""]],
        figures=False,
    )
    if held:
        say()
        show_held(held, "On the disk")
    free = sum(entry.size_bytes for entry in held if not entry.needed)
    if any(not entry.needed for entry in held):
        say(f"\nWhat is not needed takes {bytes_text(free)}: ftkit clean {run}")
    ship = f"ftkit ship {run}" if elsewhere or opened.trained_with() else "ftkit ship"
    to_do = [
        ship if elsewhere or step.command == "ftkit ship" else step.command for step in LINE if step.name in steps and not steps[step.name]
    ]
    following = to_do[0] if to_do else None if registered else f"{ship} --ollama"
    if (run / SHIPPED / RECORD).is_file():
        say(f"\nTo hand on, as it last passed: {run / SHIPPED}; is it still that: ftkit verify {run}")
    if doubts:
        say(f"\nNot all is proven: {'; '.join(doubts)}. Why: {ship}")
    say(f"\nNext: {following or f'ollama run {registered}'}")


def write_page(run: Path, html: Path) -> None:
    """The page of a run's training: finished, running or stopped. Its recipe lies beside it."""
    from ftkit.cli.common import be_quiet, need_training_stack
    from ftkit.cli.console import ConsoleReporter
    from ftkit.errors import RunError
    from ftkit.line.entry import enter
    from ftkit.line.run_page import run_page as gather
    from ftkit.report import run_page, write

    need_training_stack()
    be_quiet()
    write.check(html, write.PAGE_SUFFIXES)
    try:
        job, _ = enter(str(run), (), run_dir=None, reporter=ConsoleReporter())
    except RunError as error:  # its recipe lies elsewhere
        raise RunError(error.message, f"name it: ftkit train RECIPE --run-dir {run} --html {html}") from None
    run_page.write_page(gather(job), html)
    ConsoleReporter().note(f"wrote {html}")


def step_names() -> list[str]:
    """The steps of the line that have a folder in a run, in order."""
    from ftkit.line.line import LINE

    return [step.name for step in LINE if step.make]


def held_names() -> list[str]:
    """Those, and what a closing learns from, which is large and stands beside the line."""
    from ftkit.line.teach import TEACH

    return [*step_names(), TEACH.name]


def open_run(folder: Path) -> Run:
    """The run in this folder, not locked. Raises RunError where there is none."""
    from ftkit.cli.console import ConsoleReporter
    from ftkit.errors import RunError
    from ftkit.run import MANIFEST, Run

    run = Run(folder, ConsoleReporter())
    if not (folder / MANIFEST).exists() and not any(folder.glob(".*.partial")) and not run.holds(held_names()):
        raise RunError(f"{folder} is no run directory.", "a run is made by ftkit plan, train or build, in runs/RECIPE")
    return run


def show_held(held: Sequence[Held], title: str) -> None:
    """What lies on the disk, an entry a line."""
    from ftkit.cli.console import print_table
    from ftkit.units import bytes_text

    rows = [
        [
            entry.path.name,
            entry.what + (f"; its last checkpoint is of step {entry.last_step}" if entry.last_step else ""),
            bytes_text(entry.size_bytes),
            "" if entry.needed else "can go",
        ]
        for entry in held
    ]
    print_table(title, ["", "", "", ""], rows, figures=False)


def as_record(entry: Held) -> dict[str, Any]:
    return {
        "path": str(entry.path),
        "what": entry.what,
        "last_step": entry.last_step,
        "size_bytes": entry.size_bytes,
        "needed": entry.needed,
    }

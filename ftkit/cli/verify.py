"""`ftkit verify`: a shipped file against its record, or what a run recorded against the recipe's limits of today."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import json_option

if TYPE_CHECKING:
    from ftkit.check import Check


@click.command(
    epilog="\b\nExamples:\n  ftkit verify runs/recipe/shipped\n  ftkit verify model-Q4_K_M.gguf --record ship.json\n"
    "  ftkit verify recipe.yaml --set ship.keep=99"
)
@click.argument("what", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
@click.option("--record", type=click.Path(path_type=Path), help="The file's record.  [default: ship.json beside it]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe, as in ship.keep=99.")
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the recipe's run is kept.  [default: runs/RECIPE]")
@json_option
def command(what: Path, record: Path | None, settings: tuple[str, ...], run_dir: Path | None, as_json: bool) -> None:
    """Check WHAT: a shipped GGUF file, the folder that holds it and its record, or a run; or a recipe.

    A file is read, compared with its record, and asked in llama.cpp; the run is not needed. Of a recipe the figures that its
    run recorded are judged again at its limits of today; nothing is loaded. Ends with 6 where a check fails.
    """
    from ftkit.errors import RecipeError

    found = find_file(what, record)
    if found:
        if settings or run_dir:
            raise RecipeError("--set and --run-dir change a recipe, and this is a shipped file.", "ftkit verify recipe.yaml --set …")
        _verify_file(*found, as_json=as_json)
    elif record:
        raise RecipeError(f"--record is of a shipped file, and {what} is none.", "ftkit verify FILE.gguf --record ship.json")
    else:
        _judge_again(what, settings, run_dir, as_json=as_json)


def find_file(what: Path, record: Path | None) -> tuple[Path, Path] | None:
    """(GGUF, record) that WHAT names; None where it names a recipe. Raises ModelError where one of the two is missing."""
    from ftkit.errors import ModelError
    from ftkit.line.record import SHIPPED
    from ftkit.proof.record import RECORD, read_record
    from ftkit.run import MANIFEST

    if what.is_dir() and (what / MANIFEST).is_file():
        what = what / SHIPPED
        if not (what / RECORD).is_file():
            raise ModelError(f"{what.parent} holds nothing that shipped.", "ftkit ship")
    if what.is_dir():
        if not (what / RECORD).is_file() and (what / "recipe.yaml").is_file():
            return None
        record = record or what / RECORD
        if not record.is_file():
            raise ModelError(f"{what} has no {RECORD}.", "give the folder that ftkit ship left, runs/RECIPE/shipped")
        what = what / Path(read_record(record)[0].file.name).name
        if not what.is_file():  # it may have been split
            what = next(iter(sorted(what.parent.glob(f"{glob.escape(what.stem)}-?????-of-?????.gguf"))), what)
        if not what.is_file():
            raise ModelError(f"{what} is not there, which {record.name} is the record of.", "give the file: ftkit verify FILE --record …")
        return what, record
    if what.suffix != ".gguf" and not record:
        return None
    record = record or what.with_name(RECORD)
    for path in (what, record):
        if not path.is_file():
            hint = f"ftkit ship leaves both in runs/RECIPE/shipped; a record elsewhere is named: --record {RECORD}"
            raise ModelError(f"There is no {path}.", hint)
    return what, record


def _verify_file(path: Path, record: Path, *, as_json: bool) -> None:
    from ftkit.cli.console import ConsoleReporter
    from ftkit.proof.record import read_record
    from ftkit.proof.verify import verify

    shipped = read_record(record)[0]
    checks = verify(path, record, ConsoleReporter())
    _show(f"{path} against {record.name}", checks, as_json, {"file": str(path), "record": str(record), "as_shipped": shipped.proof})
    _end(checks, f"{path} is not what shipped as {shipped.name}", "take the file and its record again from where they were made")


def _judge_again(what: Path, settings: Sequence[str], run_dir: Path | None, *, as_json: bool) -> None:
    from ftkit.cli.common import open_job
    from ftkit.line import line
    from ftkit.line.prove import how_to_pass, limits_of

    job = open_job(what, None, tuple(settings), None, None, run_dir, None)
    proof, run = line.judge_again(job), job.run.folder
    checks = proof.checks
    _show(f"What {run} recorded, at the limits of today", checks, as_json, {"run": str(run), "limits": limits_of(job.recipe)})
    _end(checks, f"{run} does not pass at these limits", how_to_pass(proof))


def _show(title: str, checks: Sequence[Check], as_json: bool, more: dict[str, Any]) -> None:
    from ftkit.cli.console import print_json, print_table

    if as_json:
        print_json({"outcome": outcome(checks), "checks": [asdict(check) for check in checks], **more})
    else:
        print_table(title, ["", "", ""], [[c.name, c.outcome, c.detail] for c in checks], figures=False)


def outcome(checks: Sequence[Check]) -> str:
    """Of all together: failed where one failed; what was not made is no failure, and not passed either."""
    outcomes = {check.outcome for check in checks}
    return next(word for word in ("failed", "not made", "passed") if word in outcomes)


def _end(checks: Sequence[Check], message: str, hint: str) -> None:
    from ftkit.errors import ProofError

    if wrong := [check.name for check in checks if check.outcome == "failed"]:
        raise ProofError(f"{message}: {', '.join(wrong)}.", hint)

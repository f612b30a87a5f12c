"""`ftkit data`: what was recognised of a dataset, how long it is, what is odd in it, what is learnt of it, and what may be mislabelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftkit.cli.common import absolute, be_quiet, json_option, need_training_stack, overrides, trust_option

if TYPE_CHECKING:
    from ftkit.data.survey import Shown, Survey
    from ftkit.line.job import Job

BAR_WIDTH = 40  # columns
SUSPECTS_SHOWN, PLACES_SHOWN = 20, 3  # on the screen
ANSWER_WIDTH = 40  # characters of it
ROWS_SHOWN = 3  # in JSON and on a page, unless --show says otherwise


@click.command(
    epilog="\b\nExamples:\n  ftkit data\n  ftkit data --show 3\n  ftkit data --model Qwen/Qwen3-8B --data rows.csv --html data.html\n"
    "  ftkit data --suspects runs/recipe --write suspects.jsonl"
)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--model", "-m", metavar="REF", help="Base model: hub id (org/name@revision), folder, .gguf file or ollama:NAME.")
@click.option("--data", metavar="FILE", help="The dataset, as data.train.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
@click.option("--show", type=click.IntRange(0), metavar="N", help="Show the first N rows token by token, the learnt ones marked.")
@click.option("--suspects", is_flag=True, help="List the rows that are likely mislabelled, by what their training saw of them.")
@click.option(
    "--write",
    "to_write",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --suspects: write these rows as JSONL, to correct.",
)
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the run is kept.  [default: runs/RECIPE]")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write all of it as one page.")
@trust_option
@json_option
def command(
    recipe: Path | None,
    model: str | None,
    data: str | None,
    settings: tuple[str, ...],
    show: int | None,
    suspects: bool,
    to_write: Path | None,
    run_dir: Path | None,
    html: Path | None,
    trust_remote_code: bool | None,
    as_json: bool,
) -> None:
    """Look at the dataset of RECIPE (default: recipe.yaml) with its model's tokenizer. Nothing is trained, no weights are needed.

    Without a recipe, --model and --data are enough. With --suspects, RECIPE was trained, and may be the folder of the run; the trained
    model is asked the questions of the rows that stand out.
    """
    need_training_stack()
    be_quiet()
    from ftkit.cli.console import ConsoleReporter, print_json
    from ftkit.line import job
    from ftkit.line.data import look
    from ftkit.line.entry import open_run
    from ftkit.report import data_page, write
    from ftkit.run import MANIFEST

    if html:
        write.check(html, write.PAGE_SUFFIXES)
    if to_write and not suspects:
        raise click.UsageError("--write is of --suspects.")
    if to_write:
        refuse_to_replace(to_write)
    changed = [("data.train", absolute(data))] if data else []
    changed += overrides(model, settings, None, None, trust_remote_code)
    if recipe is None and not Path("recipe.yaml").exists() and model and data:
        opened = job.open_without_recipe(changed, reporter=ConsoleReporter())
    elif recipe and (recipe / MANIFEST).is_file():
        opened = open_run(recipe, changed, reporter=ConsoleReporter())
    else:
        opened = job.open_job(recipe or Path("recipe.yaml"), changed, run_dir=run_dir, reporter=ConsoleReporter())
    if suspects:
        show_suspects(opened, to_write, html, show, as_json=as_json)
        return
    found = look(opened, ROWS_SHOWN if show is None and (as_json or html) else show or 0)
    if html:
        data_page.write_page(found, html, title=f"Dataset of {opened.recipe.model}")
    if as_json:
        record = asdict(found)
        del record["padding"]["grouped_batch_tokens"]
        print_json({**record, "rows": record.pop("shown")})
        return
    show_survey(found)
    for row in found.shown if show else ():
        show_row(row)


def refuse_to_replace(path: Path) -> None:
    """Raise RecipeError for a file that is there, which may hold corrections, and for a folder that cannot be written."""
    from ftkit.errors import RecipeError
    from ftkit.report import write

    write.check(path, (".jsonl",))
    if path.exists():
        raise RecipeError(f"{path} is there, and may hold your corrections.", "name another file, or remove it first")


def show_suspects(job: Job, to_write: Path | None, html: Path | None, show: int | None, *, as_json: bool) -> None:
    """Rows that are likely mislabelled: on the screen the first of them, all in JSON, on the page and in the file."""
    from ftkit.cli.console import print_json, print_table, say
    from ftkit.line.data import look
    from ftkit.line.suspects import find_suspects, to_correct
    from ftkit.report import data_page, write

    with job.run:
        made, found = find_suspects(job)
    if to_write:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in to_correct(job, found))
        refuse_to_replace(to_write)
        write.write(to_write, "".join(lines).encode())
    if html:
        data_page.write_page(look(job, show or 0), html, title=f"Dataset of {job.recipe.model}", suspects=found)
    if as_json:
        print_json({**asdict(made), "suspects": [asdict(each) for each in found]})
        return
    here = found[: show or SUSPECTS_SHOWN]
    rows = [
        [
            each.place,
            f"{each.score:.1f}",
            "likely" if each.likely else "",
            _short(each.label),
            _short(each.answer),
            _percents(each.probabilities),
        ]
        for each in here
    ]
    columns = ["", "stands out", "mislabelled", "label", "the model's own answer", "the label's probability, pass by pass"]
    print_table("Suspects", columns, rows, figures=False)
    for each in here:
        if each.contradicts:
            say(f"{each.place}: the same question has another answer in {'; '.join(each.contradicts[:PLACES_SHOWN])}")
    more = f", of which {len(here)} are shown (--show, --json, --html)" if len(here) < len(found) else ""
    say(f"\n{made.likely:,} of {made.rows:,} rows are likely mislabelled, {made.listed:,} are listed{more}. Read them; not all are wrong.")
    if not made.from_training:
        say("Its training kept nothing of what it saw: a wrong row that was learnt by heart is not found. Train it again to see more.")
    if to_write:
        say(f"Wrote {to_write}: correct these rows, and put them into the dataset by their `suspect.place`.")


def _short(text: str | None) -> str:
    line = "–" if text is None else " ⏎ ".join(text.splitlines())
    return line if len(line) <= ANSWER_WIDTH else line[: ANSWER_WIDTH - 1] + "…"


def _percents(probabilities: Sequence[float]) -> str:
    """The first and the last passes."""
    shown = [f"{100 * p:.0f}" for p in probabilities]
    return " ".join(shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]]) + " %"


def show_survey(found: Survey) -> None:
    """For a terminal."""
    from ftkit.cli.console import print_table, say

    rows = [
        [
            purpose,
            f"{part.rows:,}",
            f"{part.answers:,}",
            f"{part.unlearnt:,}",
            f"{part.systems:,}",
            f"{part.reasoning:,}",
            f"{part.calls:,}",
            _forms(part.forms),
        ]
        for purpose, part in found.parts.items()
    ]
    print_table("Dataset", ["", "rows", "answers", "not learnt", "with system", "with reasoning", "calling tools", "read as"], rows)
    over = sorted({column for part in found.parts.values() for column in part.passed_over})
    if over:
        say(f"Columns that are not read: {', '.join(over)}.")
    tokens, padding = found.tokens, found.padding
    say(
        f"\n{found.examples:,} examples to train and validate, {tokens.total:,} tokens, of which {found.learnt_tokens:,} are learnt "
        f"({100 * found.learnt_tokens / tokens.total:.0f} %)."
    )
    say(f"Tokens of a row: median {tokens.median:,}, 95 % up to {tokens.p95:,}, 99 % up to {tokens.p99:,}, longest {tokens.longest:,}.")
    most = max(entry.examples for entry in found.histogram)
    for entry in found.histogram:
        say(f"  up to {entry.to_tokens:>7,}  {entry.examples:>7,}  {'█' * -(-entry.examples * BAR_WIDTH // most)}")
    if padding.tokens:
        padded = 100 * (padding.grouped_tokens / padding.tokens - 1)
        say(f"Padding adds {padded:.1f} % where rows of like length go together, {padding.batch} at once; ftkit plan knows how many do.")
    for finding in found.findings:
        more = f"; and {finding.count - len(finding.places):,} more" if finding.count > len(finding.places) else ""
        places = f": {'; '.join(finding.places)}{more}" if finding.places else ""
        say(f"{finding.count:,} {finding.what}{places}")
    if not found.findings:
        say("Nothing comes twice, contradicts or is cut.")


def _forms(forms: dict[str, int]) -> str:
    return ", ".join(forms) if len(forms) == 1 else ", ".join(f"{name} ({count:,})" for name, count in forms.items())


def show_row(row: Shown) -> None:
    """Tokens apart, the learnt ones in ⟦ ⟧ and, where there is colour, in colour."""
    from ftkit.cli.console import say, show_marked

    say(f"\n{row.place}: {len(row.tokens):,} tokens, {sum(token.learnt for token in row.tokens):,} learnt")
    show_marked([(token.text.replace("\n", "⏎\n"), token.learnt) for token in row.tokens])

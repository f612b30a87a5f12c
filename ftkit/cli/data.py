"""`ftkit data`: what was recognised of a dataset, how long it is, what is odd in it, and which tokens are learnt."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ftkit.cli.common import absolute, be_quiet, json_option, need_training_stack, overrides, trust_option

if TYPE_CHECKING:
    from ftkit.data.survey import Shown, Survey

BAR_WIDTH = 40  # columns
ROWS_SHOWN = 3  # in JSON and on a page, unless --show says otherwise


@click.command(
    epilog="\b\nExamples:\n  ftkit data\n  ftkit data --show 3\n  ftkit data --model Qwen/Qwen3-8B --data rows.csv --html data.html"
)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--model", "-m", metavar="REF", help="Base model: hub id (org/name@revision), folder, .gguf file or ollama:NAME.")
@click.option("--data", metavar="FILE", help="The dataset, as data.train.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
@click.option("--show", type=click.IntRange(0), metavar="N", help="Show the first N rows token by token, the learnt ones marked.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write all of it as one page.")
@trust_option
@json_option
def command(
    recipe: Path | None,
    model: str | None,
    data: str | None,
    settings: tuple[str, ...],
    show: int | None,
    html: Path | None,
    trust_remote_code: bool | None,
    as_json: bool,
) -> None:
    """Look at the dataset of RECIPE (default: recipe.yaml) with its model's tokenizer. Nothing is trained, no weights are needed.

    Without a recipe, --model and --data are enough.
    """
    need_training_stack()
    be_quiet()
    from ftkit.cli.console import ConsoleReporter, print_json
    from ftkit.line import job
    from ftkit.line.data import look
    from ftkit.report import data_page, write

    if html:
        write.check(html, write.PAGE_SUFFIXES)
    changed = [("data.train", absolute(data))] if data else []
    changed += overrides(model, settings, None, None, trust_remote_code)
    if recipe is None and not Path("recipe.yaml").exists() and model and data:
        opened = job.open_without_recipe(changed, reporter=ConsoleReporter())
    else:
        opened = job.open_job(recipe or Path("recipe.yaml"), changed, reporter=ConsoleReporter())
    found = look(opened, ROWS_SHOWN if show is None and (as_json or html) else show or 0)
    if html:
        data_page.write_page(found, html, title=f"Dataset of {opened.recipe.model}")
    if as_json:
        record = asdict(found)
        del record["padding"]["grouped_batch_tokens"]
        print_json({**record, "rows": record.pop("shown")})
        return
    show_survey(found)
    for row in found.shown[: show or 0]:
        show_row(row)


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
        say(f"Padding adds {100 * (padding.grouped_tokens / padding.tokens - 1):.1f} % (rows of like length go together).")
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

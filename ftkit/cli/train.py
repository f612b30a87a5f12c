"""`ftkit train`: fine-tune as planned; the same command again resumes or says that it is done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ftkit.cli.common import command_line, open_job, recipe_options


@click.command(
    epilog="\b\nExamples:\n  ftkit train\n  ftkit train --set training.method=lora --set training.learning_rate=1e-4\n"
    "  ftkit train --html run.html"
)
@recipe_options
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write how the training went, or goes, as one page."
)
def command(recipe: Path, as_json: bool, html: Path | None, **options: Any) -> None:
    """Train RECIPE as planned. The best checkpoint by validation loss is kept; a killed run is taken up again.

    Ctrl-C saves a checkpoint at the end of the step and stops; a second one stops at once. The same command goes on.
    While it runs, the same command with --html elsewhere writes the page of what is there, and leaves the training alone.
    On several GPUs: torchrun --nproc-per-node 2 -m ftkit train
    """
    job = open_job(recipe, **options)
    from ftkit.cli.console import print_json, say
    from ftkit.errors import FtkitError, RunError
    from ftkit.line import line
    from ftkit.line.run_page import run_page as gather
    from ftkit.machine import ranks
    from ftkit.report import run_page, write
    from ftkit.units import bytes_text, seconds_text

    if not ranks.is_first():
        line.help_to_train(job)
        ranks.leave()
        return
    if html:
        write.check(html, write.PAGE_SUFFIXES)
        if job.run.is_busy():
            run_page.write_page(gather(job), html)
            say(f"Another ftkit works in {job.run.folder}: {html} shows what it has trained so far.")
            ranks.tell(None)  # to other processes, which wait for a plan
            ranks.leave()
            return
    try:
        with job.run:
            made = line.train(job)
            ranks.leave()
            if html:
                run_page.write_page(gather(job), html)
    except FtkitError:
        if html:
            with suppress(RunError):  # nothing was trained
                run_page.write_page(gather(job), html)
        raise
    result = made.result
    if as_json:
        print_json({**asdict(result), "folder": str(made.folder), "seconds": made.seconds})
        return
    speed = f", {result.tokens_per_second:.0f} tokens/s" if result.tokens_per_second else ""
    took = f"{'Trained' if made.fresh else 'Up to date: trained'} in {seconds_text(result.seconds or made.seconds)}"
    say(f"{took}, {result.steps} step{'s' * (result.steps != 1)}{speed}.")
    if result.max_steps and result.steps < result.max_steps:
        patience = job.recipe.training.early_stopping_patience
        say(
            f"Stopped early, of {result.max_steps:,} steps: {patience} evaluation{'s' * (patience != 1)} one after another "
            "brought nothing better (training.early_stopping_patience)."
        )
    for retry in result.retries:
        say(f"{retry.said[0].upper()}{retry.said[1:]}.")
    losses = f"{result.first_validation_loss:.4f} → {result.best_validation_loss:.4f}"
    right = f", {result.best_right_percent:.0f} % of its answers right" if result.best_right_percent is not None else ""
    say(f"Validation loss {losses} (best, step {result.best_step}{right}).")
    say(f"{result.verdict[:1].upper()}{result.verdict[1:]}.")
    if result.best_reward_accuracy is not None and result.best_reward_margin is not None:
        share, margin = f"{100 * result.best_reward_accuracy:.0f} % of the validation pairs", f"{result.best_reward_margin:.3f}"
        say(f"The chosen answer gained more than the rejected one in {share}, on average by {margin} (reward margin).")
        if (result.best_reward_chosen or 0) < 0:
            say(
                f"The chosen answers became less likely themselves (reward {result.best_reward_chosen:.3f}), the rejected ones more so. "
                f"To hold them: --set dpo.beta={5 * job.recipe.dpo.beta:g}, or a lower training.learning_rate."
            )
    planned = result.planned_device_bytes if "RAM" in result.peak_is else result.planned_allocated_bytes
    beside = f", planned {bytes_text(planned)}" if planned else ""  # runs of ftkit before 0.2 recorded no plan
    if planned and "RAM" in result.peak_is and result.peak_bytes > planned:
        beside += "; what is more are holes in the C library's heap, and counted in the next plan"
    say(f"Peak memory {bytes_text(result.peak_bytes)} {result.peak_is}{beside}. Kept in {made.folder}")
    if html:
        say(f"Wrote {html}.")
    named = None if recipe == Path("recipe.yaml") else recipe
    ship, again = (command_line(name, named, **options) for name in ("ship", "train"))
    following = (result.reading and result.reading.next_command) or "ftkit ship"
    other = "" if following == "ftkit ship" else f", or try: {following.replace('ftkit train', again)}"
    say(f"Next: {ship}{other}")

"""`ftkit ship`: merge, convert, quantise, prove, register."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import absolute, be_quiet, job_options, need_training_stack, overrides

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftkit.line.job import Job
    from ftkit.line.line import Room, Shipped, State
    from ftkit.line.prove import Form
    from ftkit.proof.score import Score

MOST_LABELS = 8  # of a table on the screen
ollama_option = click.option(
    "--ollama/--no-ollama", "use_ollama", default=None, help="Register in Ollama, or do not.  [default: if a server answers]"
)
yes_option = click.option(
    "--yes", "-y", "replace_model", is_flag=True, help="Replace a model of that name in Ollama which this run did not make."
)


def part_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """To walk a part of the line, or to look at it."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show each step, whether it is done and what it costs; make nothing."),
        click.option("--from", "first", metavar="STEP", help="Make this step and those after it again; one of shipping."),
        click.option("--only", metavar="STEP", help="Make this step alone; those before it must be done."),
    ):
        function = option(function)
    return function


html_option = click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write what was shipped and proved as one page."
)


@click.command(
    epilog="\b\nExamples:\n  ftkit ship\n  ftkit ship --set ship.quantization=Q5_K_M --ollama\n  ftkit ship --html ship.html\n"
    "  ftkit ship outputs/checkpoint-300 --data train.jsonl --test test.jsonl\n"
    "  ftkit ship org/my-adapter --base org/name --set ship.name=mine\n  ftkit ship model-F16.gguf --set ship.quantization=Q5_K_M"
)
@click.argument("what", default="recipe.yaml")
@job_options
@click.option("--data", metavar="FILE", help="Rows that it was trained on, or like them; as data.train.")
@click.option("--test", metavar="FILE", help="Rows that it is asked, and did not see; as data.test.")
@click.option(
    "--keep-source", is_flag=True, help="Keep what is fetched of a hub model for the merge in the hub's cache; as ship.keep_source."
)
@ollama_option
@yes_option
@part_options
@html_option
def command(
    what: str,
    data: str | None,
    test: str | None,
    keep_source: bool,
    as_json: bool,
    use_ollama: bool | None,
    replace_model: bool,
    only: str | None,
    first: str | None,
    dry_run: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Turn what was trained into a GGUF that answers as the trained model does, and register it in Ollama.

    WHAT is a recipe that was trained, or its run; or what another tool trained: a PEFT adapter's folder, a whole model's folder,
    either of them on the hub (org/name), or a GGUF. Of those a recipe is written here, NAME.yaml, and the run is kept in runs/NAME.
    """
    need_training_stack()
    be_quiet()
    from ftkit.cli.console import ConsoleReporter
    from ftkit.line import entry, line

    check_page(html, only=only, dry_run=dry_run)
    run_dir = options.pop("run_dir")
    changed = [(key, absolute(path)) for key, path in (("data.train", data), ("data.test", test)) if path] + overrides(**options)
    changed += [("ship.keep_source", True)] if keep_source else []
    job, new_recipe = entry.enter(what, changed, run_dir=run_dir, reporter=ConsoleReporter())

    def whole() -> None:
        show(job, line.ship(job, use_ollama=use_ollama, replace_model=replace_model), as_json, html)

    if new_recipe and not dry_run:
        with job.run:
            line.adopt(job)  # what could not be shipped leaves no recipe
            new_recipe.write()
    walk(job, whole, only=only, first=first, dry_run=dry_run, as_json=as_json)


def check_page(html: Path | None, *, only: str | None, dry_run: bool) -> None:
    """Raises RecipeError where no page can be written there, or of nothing: before the work."""
    from ftkit.errors import RecipeError
    from ftkit.report import write

    if html:
        if only or dry_run:
            raise RecipeError("--html is a page about what ships, and --only and --dry-run ship nothing.", "leave one of them out")
        write.check(html, write.PAGE_SUFFIXES)


def walk(job: Job, whole: Callable[[], None], *, only: str | None, first: str | None, dry_run: bool, as_json: bool) -> None:
    """The whole line, or what --only, --from or --dry-run asks for."""
    from ftkit.cli.console import print_json, say
    from ftkit.errors import RecipeError
    from ftkit.line import line
    from ftkit.line.gguf import refuse_type
    from ftkit.units import seconds_text

    if sum(map(bool, (only, first, dry_run))) > 1:
        raise RecipeError("Give one of --only, --from and --dry-run.")
    if dry_run:  # nothing is written, the run's folder neither
        refuse_type(job)
        states = list(line.states(job))
        show_states(states, line.room(job, states), job.source.reference, as_json)
        return
    with job.run:
        if first:
            line.start_from(job, first)
        if not only:
            whole()
            return
        made = line.make_only(job, only)
    if as_json:
        print_json({"step": made.name, "fresh": made.fresh, "folder": str(made.folder), "seconds": made.seconds})
    else:
        say(f"{'Made' if made.fresh else 'Up to date:'} {made.name} in {made.folder}, {seconds_text(made.seconds)}.")


def show_states(states: list[State], room: Room, base: str, as_json: bool) -> None:
    """Every step, whether it is done, and what it costs; what is to be fetched of the base, and the room that all takes."""
    from ftkit.cli.console import print_json, print_table, say
    from ftkit.units import bytes_text

    if as_json:
        entries = [
            {"step": s.step.name, "does": s.step.does, "done": s.done is not None, "costs": [asdict(cost) for cost in s.costs]}
            for s in states
        ]
        print_json({"steps": entries, "fetch": asdict(room.fetch), "disk_bytes": {str(path): size for path, size in room.disk.items()}})
        return
    rows = []
    for state in states:
        most = [max((getattr(cost, key) for cost in state.costs), default=0) for key in ("peak_ram_bytes", "vram_bytes")]
        sums = [sum(getattr(cost, key) for cost in state.costs) for key in ("disk_bytes", "read_bytes")]
        done = "done" if state.done else "to do" if state.step.make else "asked of Ollama"
        rows.append([state.step.name, state.step.does, done, *(bytes_text(size) if size else "–" for size in (*most, *sums))])
    print_table("The line", ["step", "", "", "RAM", "VRAM", "disk", "read"], rows, figures=False)
    if any(state.step.name == "plan" for state in states) and not any(state.costs for state in states):
        say("\nWhat it costs is known once it is planned: ftkit plan")
    if (fetch := room.fetch).files:
        files = f"{bytes_text(fetch.bytes)} of {base}, {fetch.files} file{'s' * (fetch.files > 1)}"
        one = f"one at a time, {bytes_text(fetch.at_once_bytes)} at most: each is merged, then removed (--keep-source keeps them)"
        say(f"\nTo fetch: {files}, {one if fetch.at_once_bytes else 'which the hub’s cache keeps'}.")
    if room.disk:
        say(f"Disk, at most: {', '.join(f'{bytes_text(size)} in {path}' for path, size in room.disk.items())}.")


def show(job: Job, shipped: Shipped, as_json: bool, html: Path | None = None) -> None:
    """Scores, a few answers before and after, the files, and how to go on; as a page too."""
    from ftkit.cli.console import print_json, print_table, say
    from ftkit.line.page import page
    from ftkit.report import ship_page
    from ftkit.units import bytes_text

    if html:
        ship_page.write_page(page(job, shipped), html)
    if as_json:
        print_json(asdict(shipped))
        return
    unproven = [check for check in shipped.checks if check.outcome != "passed"]
    for check in unproven:
        say(f"Not proven – {check.name}: {check.detail}.")
    if shipped.scores and any(check.name == "answers" for check in unproven):
        say(f"Score them otherwise (--set evaluate.by=first_line, say), or read them side by side: {shipped.proof_file}")
        if any(check.name == "gain kept" and check.outcome == "passed" for check in shipped.checks):
            say("What was looked at token by token, below, does not need an answer that is exactly right, and passed.")
    if unproven:
        say("")
    if not shipped.fresh:
        say("Up to date.\n")
    for example in shipped.examples:
        say("─" * 72)
        say(example["question"])
        say(
            f"\n  before    {_one_line(example['before'])}\n  after     {_one_line(example['after'])}\n"
            f"  expected  {_one_line(example['expected'])}\n"
        )
    held_out = not job.given or "test" in job.data  # else training may have seen them
    show_scores(shipped.right_by, shipped.scores, held_out=held_out)
    if any(form.kept or form.divergence is not None for form in shipped.forms.values()):
        kept = [[name, *_figures(form)] for name, form in shipped.forms.items()]
        say("")
        title = f"{'Held-out answers' if held_out else 'Answers'}, token by token"
        print_table(title, ["", "loss", "gain kept", "KL", "same token", "perplexity outside"], kept)
    preferred = [
        [name, f"{form.preferred_percent:.0f} %", f"{form.margin:.2f}"]
        for name, form in shipped.forms.items()
        if form.margin is not None and form.preferred_percent is not None
    ]
    if preferred:
        say("")
        print_table("Held-out preferences: the chosen answer is likelier than the rejected one", ["", "pairs", "by nats"], preferred)
    if "dequantised" in shipped.merged_onto:
        say(
            "\nMerged into the source the gain was lost. The dequantised base keeps it, "
            "at a price outside the task: its weights are as coarse as 4 bits."
        )
    if shipped.weighed:
        tried = [[w.quantization, bytes_text(w.bytes), f"{w.kept_percent:.1f} %"] for w in shipped.weighed]
        say("")
        print_table("What each type keeps of the training, on the rows by which is chosen", ["", "size", "kept"], tried)
        for w in shipped.weighed:
            if w.fails:
                say(f"{w.quantization} does not ship, though it keeps enough of the gain: {w.fails}")
    say(f"\nMerged into {shipped.merged_onto}.")
    if bits := shipped.bits:
        say(f"Plain bits: {bits.why_not}." if bits.why_not else f"More bits for {bits.words}.")
    if closed := shipped.closed:
        say(closed.words[0].upper() + closed.words[1:])
    say("")
    print_table("What was checked", ["", "", ""], [[c.name, c.outcome, c.detail] for c in shipped.checks], figures=False)
    say("")
    print_table(
        "Files", ["", "size", "bits a weight"], [[str(f.path), bytes_text(f.bytes), f"{f.bits_per_weight:.2f}"] for f in shipped.files]
    )
    folder = shipped.gguf.parent
    say(f"\nTo hand on:  {folder} ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    say(f"             {shipped.record.name} has every figure; is the file still what it says: ftkit verify {folder}\n")
    if shipped.missing_quantization:
        say(
            f"{shipped.missing_quantization} was not made: llama-quantize is not here. "
            "Bring it: ftkit setup llama.cpp (then the same command again)"
        )
    say(f"Ask it:      ftkit chat {job.run.folder}")
    if adapter := shipped.adapter:
        say(f"             or the adapter alone ({bytes_text(adapter.bytes)}) with the base: {adapter.serve}")
        if adapter.base:
            say(f"             where BASE.gguf is a GGUF file of {adapter.base}")
    if shipped.registered_as:
        say(f"             ollama run {shipped.registered_as}")
    else:
        if shipped.not_registered_because:
            say(f"Not registered: {shipped.not_registered_because}")
        again = f"ftkit ship {job.run.folder}" if job.given else "ftkit ship"
        say(f"In Ollama:   {shipped.register_with or 'start it: ollama serve'}, then: {again} --ollama")
        say(f"             or by hand: ollama create {job.recipe.ship.name} -f {shipped.modelfile}")


def show_scores(right_by: str, scores: dict[str, Score], *, held_out: bool = True) -> None:
    """Right answers of each form, what more the rule tells of them, and what was said for what of the file that ships."""
    from ftkit.cli.console import print_table, say

    columns = {
        "right": [f"{score.right} of {score.rows}" for score in scores.values()],
        "": [f"{score.percent:.1f} %" for score in scores.values()],
        "not readable": [str(score.unreadable or "") for score in scores.values()],
        "keys right": ["" if score.keys_percent is None else f"{score.keys_percent:.1f} %" for score in scores.values()],
    }
    told = [name for name, cells in columns.items() if any(cells)]
    rows = [[form, *(columns[name][number] for name in told)] for number, form in enumerate(scores)]
    if rows:
        print_table(f"{'Held-out questions' if held_out else 'Questions'}, right by {right_by}", ["", *told], rows)
    shown = next(reversed(scores), "")  # the file that ships comes last
    table = scores[shown].confusion if scores else None
    if table and len(table) <= MOST_LABELS:
        said = [*table, *sorted({name for row in table.values() for name in row} - table.keys())]
        say("")
        print_table(
            f"Expected, and what {shown} says",
            ["", *said],
            [[label, *(str(row.get(name, 0)) for name in said)] for label, row in table.items()],
        )


def _figures(form: Form) -> list[str]:
    kept, far, alike = form.kept, form.divergence, form.agreed_percent
    return [
        f"{form.loss:.3f}",
        f"{kept.percent:.1f} % ({kept.low:.1f} to {kept.high:.1f})" if kept else "",
        "" if far is None else f"{far:.2g}",
        "" if alike is None else f"{alike:.1f} %",
        "" if form.outside is None else f"{form.outside:.4g}",
    ]


def _one_line(text: str) -> str:
    """An answer on one line, cut for the screen."""
    line = " ⏎ ".join(text.strip().splitlines())
    return line if len(line) <= 140 else line[:139] + "…"

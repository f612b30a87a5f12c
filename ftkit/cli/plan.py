"""`ftkit plan`: does it fit, with which batch × accumulation, and what the later steps need."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.cli.common import absolute, be_quiet, command_line, json_option, need_training_stack, overrides, trust_option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ftkit.data.lengths import TokenCounts
    from ftkit.line.job import Job
    from ftkit.line.line import Planned
    from ftkit.plan.gpus import CardFit
    from ftkit.plan.plan import Candidate, MemoryPlan
    from ftkit.recipe import Training

BAR_WIDTH = 60  # columns, where the terminal has room


@click.command(
    epilog=(
        '\b\nExamples:\n  ftkit plan\n  ftkit plan --model Qwen/Qwen3-8B --gpu "RTX 4090"\n'
        "  ftkit plan --model ./my-model.gguf --data train.jsonl --vram 8 --html plan.html\n"
        "  ftkit plan --config config.json --vram 24 --length 4096 --method lora"
    )
)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--model", "-m", metavar="REF", help="Base model: hub id (org/name@revision), folder, .gguf file or ollama:NAME.")
@click.option("--config", metavar="FILE", help="A model's config.json; enough for a plan.")
@click.option("--data", metavar="FILE", help="The dataset whose rows are counted.")
@click.option("--length", type=int, metavar="TOKENS", help="Longest row, as training.max_length.")
@click.option("--method", type=click.Choice(["qlora", "lora", "full"]), help="As training.method.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
@click.option("--vram", metavar="GIB", help="Plan for this much memory.")
@click.option("--gpu", metavar="NAME", help='Plan for this card, as in --gpu "RTX 4090".')
@click.option("--gpus", is_flag=True, help="List every known card: whether it fits there, how it would run, how long it takes.")
@click.option("--run-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the run is kept.  [default: runs/RECIPE]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw the peak as .svg or .png.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the whole plan as one page.")
@click.option("--probe", is_flag=True, help="Run two real steps and put the measured peak beside the plan.")
@trust_option
@json_option
def command(
    recipe: Path | None,
    as_json: bool,
    plot: Path | None,
    html: Path | None,
    probe: bool,
    run_dir: Path | None,
    gpu: str | None,
    gpus: bool,
    **options: Any,
) -> None:
    """Trace what the training step of RECIPE needs, and choose batch × accumulation. No GPU and no weights are needed.

    Without RECIPE (default: recipe.yaml, where there is one) --model or --config is planned with default settings.
    """
    need_training_stack()
    from ftkit.cli.console import print_json
    from ftkit.errors import DoesNotFitError
    from ftkit.line import line, train
    from ftkit.line.plan import every_gpu
    from ftkit.plan.gpus import smallest
    from ftkit.plan.plan import MARGIN
    from ftkit.report import plan_page, write
    from ftkit.report.plot import write_plot
    from ftkit.report.words import command_for
    from ftkit.units import bytes_text

    for path, suffixes in ((plot, write.PLOT_SUFFIXES), (html, write.PAGE_SUFFIXES)):
        if path:
            write.check(path, suffixes)
    if gpus:
        _refuse_beside_gpus(**{"--gpu": gpu, "--vram": options["vram"], "--plot": plot, "--html": html, "--probe": probe})
    job = _open(recipe, run_dir=run_dir, gpu=gpu, **options)
    if gpus:
        with job.run:
            found = every_gpu(job)
        print_json(gpus_record(found)) if as_json else show_gpus(found)
        if not smallest(found):
            raise DoesNotFitError("It fits on no card that ftkit knows.", "see what would make it smaller, with a card: --gpu H200")
        return
    if probe:
        train.refuse_probe(job)
    asked = command_line("plan", recipe, run_dir=run_dir, gpu=gpu, **options)
    with job.run:
        planned = line.plan(job)
        if plot:
            write_plot(planned.memory, plot)
        if html:
            title = f"Fine-tuning plan: {job.recipe.model}"
            plan_page.write_page(planned.memory, planned.costs, planned.tokens, html, title=title, asked=asked)
        probed = train.probe(job, planned.memory) if probe else None
    chosen = planned.memory.chosen
    if as_json:
        print_json(as_record(planned, probed) | {"learning_rate": job.recipe.training.peak_learning_rate})
    else:
        show(planned, job.recipe.training)
        for entry in planned.shortages:
            click.echo(f"Not on this machine: {entry.words}.")
        if probed:
            show_probe(planned.memory, probed)
    if not chosen.fits:
        best = next((change for change in planned.memory.changes if change.fits), None)
        raise DoesNotFitError(
            f"It does not fit: {bytes_text(chosen.peak.device_bytes)} of {bytes_text(chosen.budget_bytes)}, "
            f"of which {MARGIN:.0%} is kept free.",
            f"this would: {command_for(best, asked)}" if best else "a smaller model, or a larger card",
        )


def _refuse_beside_gpus(**given: Any) -> None:
    from ftkit.errors import RecipeError

    if named := [flag for flag, value in given.items() if value]:
        raise RecipeError(f"--gpus plans for every card, so that {' and '.join(named)} has no meaning.", "leave out one of the two")


def _open(
    recipe: Path | None,
    *,
    model: str | None,
    config: str | None,
    data: str | None,
    length: int | None,
    method: str | None,
    settings: tuple[str, ...],
    vram: str | None,
    run_dir: Path | None,
    gpu: str | None,
    trust_remote_code: bool | None,
) -> Job:
    from ftkit.cli.console import ConsoleReporter
    from ftkit.errors import RecipeError
    from ftkit.line import job

    be_quiet()
    if model and config:
        raise RecipeError("Give --model or --config, not both.")
    flags = (("data.train", data and absolute(data)), ("training.max_length", length), ("training.method", method))
    changed = [(key, value) for key, value in flags if value is not None]
    changed += overrides(model or config, settings, vram, gpu, trust_remote_code)  # last: what the plan advises is given with --set
    reporter = ConsoleReporter()
    if recipe is None and not Path("recipe.yaml").exists() and (model or config):
        if run_dir:
            raise RecipeError("--run-dir keeps the run of a recipe, and there is none.", "make one: ftkit init")
        return job.open_without_recipe(changed, reporter=reporter)
    return job.open_job(recipe or Path("recipe.yaml"), changed, run_dir=run_dir, reporter=reporter)


def as_record(planned: Planned, probed: Any) -> dict[str, Any]:
    """Every number on the screen, with its unit in the key; docs/plan.md describes it."""
    from ftkit.plan.cost import checkpoint_bytes, disk_by_place

    memory = planned.memory
    record = asdict(memory)
    del record["gguf"]
    for entry, fit in ((record["chosen"], memory.chosen), *zip(record["methods"], memory.methods, strict=True)):
        entry |= {"limit_bytes": fit.limit_bytes, "fits": fit.fits}
    record["batches"] = [
        {"per_device_train_batch_size": batch, "gradient_checkpointing": on, "device_bytes": size, "fits": fits}
        for batch, on, size, fits in memory.batches
    ]
    if record["batching"]:
        del record["batching"]["grouped_batch_tokens"]
    return {
        **record,
        "later": [asdict(cost) for cost in planned.costs],
        "disk_bytes": sum(disk_by_place(planned.costs).values()),
        "gguf_bytes": memory.gguf_bytes,
        "gguf_estimated_because": memory.gguf.estimated_because,
        "checkpoint_bytes": checkpoint_bytes(memory.chosen.inventory),
        "tokens": planned.tokens and asdict(planned.tokens),
        "fetch_bytes": planned.fetch_bytes,
        "probe": probed and asdict(probed),
        "shortages": [asdict(entry) for entry in planned.shortages],
    }


def show(planned: Planned, training: Training) -> None:
    """The plan on one screen."""
    from ftkit.cli.console import print_table, say
    from ftkit.plan.cost import CHECKPOINTS_KEPT, checkpoint_bytes, disk_by_place
    from ftkit.plan.plan import MARGIN, PROBED
    from ftkit.report.words import reach, sixteen_bits, time_words, together, together_words
    from ftkit.units import bytes_text, count_text

    memory, tokens = planned.memory, planned.tokens
    chosen = memory.chosen
    peak, counted = chosen.peak, chosen.inventory
    free = chosen.budget_bytes - peak.device_bytes
    say(
        f"{'Fits' if chosen.fits else 'Does not fit'}: {counted.method} needs {bytes_text(peak.device_bytes)} of "
        f"{bytes_text(chosen.budget_bytes)} on {memory.device.name}, {bytes_text(abs(free))} "
        f"{'are left' if free >= 0 else 'are missing'} ({MARGIN:.0%} is kept free). "
        + (f"Each of {memory.shares} cards, which share the weights out (FSDP): computed, not traced. " if memory.shares > 1 else "")
        + f"Rows of {memory.max_length} tokens, {memory.compute_dtype}."
    )
    say(
        f"Batch {chosen.per_device_train_batch_size} × accumulation {chosen.gradient_accumulation_steps}, gradient checkpointing "
        f"{'on' if chosen.gradient_checkpointing else 'off'}: "
        f"{'the fastest that fits' if chosen.fits else 'the least that the recipe allows'}."
        + (f" {together(chosen)}." if together(chosen) else "")
    )
    say(
        f"Learning rate: {training.peak_learning_rate:g} at most, {training.lr_scheduler_type}"
        + (f"; training.learning_rate is not set, and this is for {training.method}." if training.learning_rate is None else ".")
    )
    if training.objective == "dpo":
        say("Preferences: a step reads two sequences of each row; the reference is asked for every row once, before the first step.")
    if tokens:
        say(
            f"Data: {tokens.rows:,} rows, {tokens.total:,} tokens; a row has {tokens.median} (median), {tokens.p95} (95 %), "
            f"{tokens.longest} (longest)" + cut_words(tokens) + "."
        )
    if memory.batching and memory.batching.batch > 1:
        b = memory.batching
        say(
            f"Padding: {b.grouped_tokens / b.tokens - 1:.1%} more tokens with rows grouped by length, as ftkit trains; "
            f"{b.random_tokens / b.tokens - 1:.1%} in random order, {b.packed_tokens / b.tokens - 1:.1%} packed."
        )
    if memory.work:
        say(f"Training: {memory.work.steps:,} steps, {memory.work.epochs:g} epochs, {count_text(memory.work.tokens)} tokens.")
    if told := time_words(memory):
        say(f"Time: {told}.")
    if more := together_words(memory):
        say(f"More cards: {more}.")
    say(f"\nThe peak: {peak.phase}")
    for line in bar_lines(memory):
        say(line)
    if memory.device.kind == "cpu" and PROBED not in memory.beside_tensors(chosen):
        say("On a CPU the process may hold more: the C library's heap keeps holes. How much is known once this was trained here.")
    say()
    parts: dict[str, Callable[[Candidate], str]] = {
        "weights": lambda f: bytes_text(f.inventory.weights_bytes),
        "adapter": lambda f: bytes_text(f.inventory.adapter_bytes) if f.inventory.adapter_bytes else "–",
        "gradients": lambda f: bytes_text(f.inventory.gradient_bytes),
        "optimizer states": lambda f: bytes_text(f.inventory.optimizer_bytes),
        "peak, allocated": lambda f: bytes_text(f.peak.allocated_bytes),
        "peak, reserved": lambda f: bytes_text(f.peak.reserved_bytes),
        "peak, nvidia-smi": lambda f: bytes_text(f.peak.device_bytes),
        "trained parameters": lambda f: f"{f.inventory.trainable_parameters:,}",
        "fits": lambda f: "yes" if f.fits else "no",
    }
    if memory.device.kind == "cpu":
        del parts["peak, reserved"], parts["peak, nvidia-smi"]
    rows = [[name, *(figure(fit) for fit in memory.methods)] for name, figure in parts.items()]
    title = (
        f"{count_text(counted.parameters)} parameters ({counted.parameters:,}), batch {chosen.per_device_train_batch_size}, "
        f"checkpointing {'on' if chosen.gradient_checkpointing else 'off'}"
    )
    print_table(title, ["", *(fit.inventory.method for fit in memory.methods)], rows)
    for words in (reach(memory), sixteen_bits(memory)):
        if words:
            say(words)
    if memory.changes:
        say()
        print_table(
            "What would make it fit"
            if any(change.fits for change in memory.changes)
            else "What would make it smaller, and not small enough",
            ["", "needs", "fits", "added to the command"],
            [
                [
                    change.words,
                    bytes_text(change.peak_bytes),
                    "yes" if change.fits else "no",
                    " ".join(f"--set {entry}" for entry in change.settings),
                ]
                for change in memory.changes
            ],
            figures=False,
        )
    say()
    later = []
    for cost in planned.costs:
        sizes = (cost.peak_ram_bytes, cost.vram_bytes, cost.disk_bytes, cost.read_bytes)
        later.append([cost.name, *(bytes_text(size) if size else "–" for size in sizes)])
    if planned.fetch_bytes:
        later.insert(0, ["fetch the weights", "–", "–", bytes_text(planned.fetch_bytes), "–"])
    print_table("The steps to come", ["", "RAM", "VRAM", "disk", "read"], later)
    say(
        f"Training waits while a checkpoint of {bytes_text(checkpoint_bytes(counted))} is written: at each evaluation, and every "
        f"{training.save_minutes:g} minutes (training.save_minutes); {CHECKPOINTS_KEPT} take room at most."
    )
    places = ", ".join(f"{bytes_text(size)} in {place}" for place, size in disk_by_place(planned.costs).items() if size)
    say(f"Disk, at most: {places}{f', {bytes_text(planned.fetch_bytes)} in the hub’s cache' if planned.fetch_bytes else ''}.")
    files = ", ".join(f"{name} {bytes_text(memory.gguf_bytes[name])}" for name in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"))
    say(f"As GGUF: {files}" + (f" (estimates: {memory.gguf.estimated_because})." if memory.gguf.estimated_because else "."))
    for method, reason in memory.untraced.items():
        say(f"Not shown: {method}. {reason}")


def cut_words(tokens: TokenCounts) -> str:
    """What is lost of rows longer than training.max_length."""
    if not tokens.cut:
        return ""
    dropped = f", {tokens.dropped} of them left out: their answer lies wholly beyond" if tokens.dropped else ""
    return f"; {tokens.cut} rows will be cut{dropped}"


def bar_lines(memory: MemoryPlan) -> list[str]:
    """The peak as a bar a part, against the budget."""
    from ftkit.plan.plan import PROBED
    from ftkit.units import bytes_text

    peak, budget = memory.chosen.peak, memory.chosen.budget_bytes
    scale = max(budget, peak.device_bytes)
    parts = [*((part.name, part.bytes) for part in peak.parts), *memory.beside_tensors(memory.chosen).items()]
    small = [(name, size) for name, size in parts if size < 0.01 * scale and name != PROBED]
    parts = [(name, size) for name, size in parts if size >= 0.01 * scale or name == PROBED]
    if small:
        parts.append(("other", sum(size for _, size in small)))
    width = max(len(name) for name, _ in parts)
    budget_text = bytes_text(budget)
    columns = shutil.get_terminal_size((BAR_WIDTH + width + 32, 24)).columns - width - 18 - len(budget_text)
    bar_width = max(10, min(BAR_WIDTH, columns))
    lines, start = [], 0
    for name, size in parts:
        first, last = round(start / scale * bar_width), round((start + size) / scale * bar_width)
        start += size
        lines.append(f"  {name:<{width}} {bytes_text(size):>10}  {' ' * first}{'█' * max(1, last - first)}")
    edge = round(budget / scale * bar_width)
    lines.append(f"  {'':<{width}} {bytes_text(start):>10}  {'·' * edge}▏ {budget_text}")
    return lines


def gpus_record(found: Sequence[CardFit]) -> dict[str, Any]:
    """Every number of the table, with its unit in the key."""
    from ftkit.plan.gpus import fastest, smallest

    named = {"smallest": smallest(found), "fastest": fastest(found)}
    return {
        **{key: entry and entry.name for key, entry in named.items()},
        "gpus": [
            {
                "name": entry.name,
                "total_bytes": entry.fit.budget_bytes,
                "fits": entry.fit.fits,
                "device_bytes": entry.fit.peak.device_bytes,
                "per_device_train_batch_size": entry.fit.per_device_train_batch_size,
                "gradient_accumulation_steps": entry.fit.gradient_accumulation_steps,
                "gradient_checkpointing": entry.fit.gradient_checkpointing,
                "compute_dtype": entry.compute_dtype,
                "estimate": entry.estimate and asdict(entry.estimate),
            }
            for entry in found
        ],
    }


def show_gpus(found: Sequence[CardFit]) -> None:
    """A line a card: those that fit first, by memory and time."""
    from ftkit.cli.console import print_table, say
    from ftkit.plan.gpus import fastest, smallest
    from ftkit.plan.plan import MARGIN
    from ftkit.units import bytes_text, count_text, spanned_text

    rows = []
    least_high = min((entry.estimate.seconds_high for entry in found if entry.estimate), default=None)
    for entry in found:
        fit, told = entry.fit, entry.estimate
        how = [f"{fit.per_device_train_batch_size} × {fit.gradient_accumulation_steps}", "on" if fit.gradient_checkpointing else "off"]
        time = spanned_text(told.seconds_low, told.seconds_high, least_high) if told else "not known"
        rest = [*how, entry.compute_dtype, time] if fit.fits else ["–"] * 4
        sizes = [bytes_text(fit.budget_bytes), bytes_text(fit.peak.device_bytes)]
        rows.append([entry.name, *sizes, "yes" if fit.fits else "no", *rest])
    tokens = next((entry.estimate.tokens for entry in found if entry.estimate), None)
    title = "Every known card" + (f"; time for {count_text(tokens)} tokens, an estimate" if tokens else "")
    print_table(title, ["", "memory", "needs", "fits", "batch × accum.", "checkpointing", "computes in", "time"], rows)
    least, most = smallest(found), fastest(found)
    if least:
        say(f"The smallest that fits: {least.name}." + (f" The fastest: {most.name}." if most else ""))
    say(f"{MARGIN:.0%} is kept free on each. Time leaves out loading, evaluation and checkpoints; a laptop's speed depends on its power.")


def show_probe(memory: MemoryPlan, probed: Any) -> None:
    """The measured peak of two real steps beside the planned one."""
    from ftkit.cli.console import print_table, say
    from ftkit.units import bytes_text

    say()
    rows = [
        [name, bytes_text(planned), bytes_text(measured), f"{planned / measured - 1:+.2%}"]
        for name, planned, measured in (
            ("allocated", memory.chosen.peak.allocated_bytes, probed.allocated_bytes),
            ("reserved", memory.chosen.peak.reserved_bytes, probed.reserved_bytes),
        )
        if measured
    ]
    print_table("Two real steps", ["", "planned", "measured", "error"], rows)

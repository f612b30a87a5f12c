"""A plan in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftkit.data.lengths import Batching
from ftkit.plan.plan import MARGIN, Candidate, MemoryPlan, Remedy
from ftkit.report.parts import METHOD_WORDS, NO_BREAK, kinds_of, place, share
from ftkit.units import bytes_text, count_text, seconds_text, spanned_text

NAMED = 6  # kinds of weights that no adapter reaches, the largest
TOGETHER = "torchrun --nproc-per-node {} -m ftkit train"
PHASES = {"forward": "forward", "loss": "loss", "backward pass of the loss": "loss", "backward": "backward", "optimizer": "optimizer"}


def answer(plan: MemoryPlan) -> str:
    """Whether it fits, and by how much."""
    fit = plan.chosen
    method = METHOD_WORDS[fit.inventory.method] + (" fine-tuning" if fit.inventory.method == "full" else "")
    needs = f"{method} needs {bytes_text(fit.peak.device_bytes)}"
    spare = fit.budget_bytes - fit.peak.device_bytes
    margin = f"the {100 * MARGIN:g} % kept free as a margin"
    if fit.fits:
        return (
            f"It fits: {needs} of the {bytes_text(fit.budget_bytes)} free {place(plan)} and leaves {bytes_text(spare)}, more than {margin}."
        )
    if spare >= 0:
        return (
            f"It does not fit safely: {needs} of the {bytes_text(fit.budget_bytes)} free {place(plan)} "
            f"and leaves {bytes_text(spare)}, less than {margin}."
        )
    times = fit.peak.device_bytes / fit.budget_bytes
    return f"It does not fit: {needs}, {bytes_text(-spare)} more than the {bytes_text(fit.budget_bytes)} free {place(plan)}" + (
        f": {times:.1f} times as much." if times >= 2 else "."
    )


def why(plan: MemoryPlan) -> str:
    """Batch × accumulation, and how it was found."""
    fit = plan.chosen
    faster = len(plan.batches) - 1
    if not fit.fits:
        reason = (
            f"the smallest of the {faster + 1} choices looked at, and too large" if faster else "the only choice that the recipe leaves"
        )
    elif faster:
        reason = f"the fastest choice that fits; {f'the {faster} faster ones do' if faster > 1 else 'the only faster one does'} not"
    else:
        reason = "no allowed choice is faster"
    return f"{choice(plan)}: {reason}." + (f" {together(fit)}." if together(fit) else "")


def together(fit: Candidate) -> str | None:
    """Which rows share a micro-batch, where it is not as many as the batch says whatever their length."""
    if fit.packing:
        return f"Rows are packed end to end, up to {fit.max_tokens:,} tokens, if this model is found to keep them apart"
    if fit.max_tokens and fit.gradient_accumulation_steps > 1:
        return f"Shorter rows go together, up to {fit.max_tokens:,} tokens at once"
    return None


def choice(plan: MemoryPlan) -> str:
    fit = plan.chosen
    return (
        f"Batch {fit.per_device_train_batch_size} × accumulation {fit.gradient_accumulation_steps}, gradient checkpointing "
        f"{'on' if fit.gradient_checkpointing else 'off'}, rows of up to {plan.max_length:,} tokens"
    )


def time_words(plan: MemoryPlan) -> str:
    """How long training takes: by the last one here, else by estimate, else why it is not known."""
    work, estimate = plan.work, plan.estimate
    if work and work.seconds and work.tokens_per_second:
        such = f"the last {plan.chosen.inventory.method} training of this model on {plan.device.name}"
        return f"{seconds_text(work.seconds)}, at the {work.tokens_per_second:.0f} tokens/s of {such}"
    if not plan.chosen.fits:
        return ""
    if not estimate:
        return f"not known before a training here: {plan.not_estimated_because}" if plan.not_estimated_because else ""
    span = spanned_text(estimate.seconds_low, estimate.seconds_high)
    of = f"for {work.epochs:g} epoch{'s' if work.epochs != 1 else ''}" if work else f"for {count_text(estimate.tokens)} tokens in full rows"
    return f"about {span} {of} (estimate, by the speed of {plan.device.name})"


def together_words(plan: MemoryPlan) -> str:
    """What one more card of the kind would bring, or those that are here: time, or that it fits. Nothing on a CPU."""
    if plan.alone_because:
        return f"A second card would bring nothing: {plan.alone_because}"
    whole = next((entry for entry in plan.together if not entry.fsdp), None)
    shared = next((entry for entry in plan.together if entry.fsdp), None)
    if not whole:
        return ""
    name, cards = plan.device.name, whole.cards

    def who(count: int) -> str:
        kind = "such card" if name.startswith("a ") else name
        return f"A second {kind}" if count == 2 else f"{count} of {'it' if name.startswith('a ') else name}"

    if plan.shares > 1:
        fits = "fits too, and is faster" if whole.fits else "does not fit"
        return f"Without sharing each would hold {bytes_text(whole.device_bytes)}, which {fits} (--set training.fsdp=false)"
    if not whole.fits:
        if not shared:
            return f"{who(cards)} would not make it fit: each holds all weights"
        makes = "would make it fit" if shared.fits else "would not make it fit"
        each = f"each holds at most {bytes_text(shared.device_bytes)}"
        return f"{who(shared.cards)} {makes}, the weights shared out: {each} (--set training.fsdp=true, {TOGETHER.format(shared.cards)})"
    alone = plan.estimate
    if alone and whole.seconds_low is not None and whole.seconds_high is not None:
        now, then = spanned_text(alone.seconds_low, alone.seconds_high), spanned_text(whole.seconds_low, whole.seconds_high)
        brings = f"about {then} in place of {now} (estimate"
    else:
        brings = "less time (how much is not known"
    rows = plan.chosen.per_device_train_batch_size * plan.chosen.gradient_accumulation_steps
    brings += f", without the {bytes_text(whole.exchanged_bytes or 0)} that each sends in a step)"
    less = shared and shared.device_bytes < whole.device_bytes
    out = f", or at most {bytes_text(shared.device_bytes)} with the weights shared out (training.fsdp)" if shared and less else ""
    return (
        f"{who(cards)} would bring {brings}. Each computes {whole.rows_a_step} of a step’s {rows} rows, and holds "
        f"{bytes_text(whole.device_bytes)}{out}: {TOGETHER.format(cards)}"
    )


def peak_words(plan: MemoryPlan) -> str:
    """When the peak comes, why then, and what most of it is."""
    fit = plan.chosen
    phase = fit.peak.phase
    kept = "its input alone" if fit.gradient_checkpointing else "what its backward pass will need"
    reasons = {
        "forward": f"Every layer keeps {kept}, so memory climbs layer by layer",
        "loss": "All layers’ kept activations are there, and the hidden states are scored against the vocabulary",
        "backward pass of the loss": "All layers’ kept activations are still there, and the loss head’s gradients come on top",
        "backward": "A layer is computed a second time, and its activations and gradients are there together"
        if fit.gradient_checkpointing
        else "Gradients are made while most of the kept activations are still there",
        "optimizer": "All gradients are complete, and what the optimizer works with comes on top",
    }
    reason = reasons.get(phase_of(phase), "All of it is there at once")
    if "later micro-batch" in phase:
        reason += "; the gradients of an earlier micro-batch are there already"
    largest = sorted(kinds_of(plan, fit).items(), key=lambda entry: -entry[1])[:2]
    most = " and ".join(f"{kind} ({bytes_text(size)}, {share(size, fit.peak.device_bytes)})" for kind, size in largest)
    return f"The peak comes in the {phase}. {reason}. Most of it: {most}."


def phase_of(name: str) -> str:
    """The key in PHASES of a phase's name."""
    return next((start for start in sorted(PHASES, key=len, reverse=True) if name.startswith(start)), "")


def reach(plan: MemoryPlan) -> str | None:
    """Which share of the weights in the text model's layers the adapters are for; None for full fine-tuning."""
    counted = plan.chosen.inventory
    if counted.method == "full":
        return None
    left_out = sorted(counted.without_adapter.items(), key=lambda entry: -entry[1])
    reached = counted.layer_parameters - sum(counted.without_adapter.values())
    words = f"Adapters reach {share(reached, counted.layer_parameters)} of the weights in the text model’s layers"
    named = [f"{name} ({share(size, counted.layer_parameters)})" for name, size in left_out[:NAMED]]
    more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
    return words + (f"; without one: {', '.join(named)}{more}." if named else ".")


def sixteen_bits(plan: MemoryPlan) -> str | None:
    """That the weights need not be in 4 bits, where QLoRA is asked for and LoRA fits as well."""
    lora = next((fit for fit in plan.methods if fit.inventory.method == "lora"), None)
    if plan.chosen.inventory.method != "qlora" or not lora or not lora.fits:
        return None
    return (
        f"LoRA on the 16-bit weights fits too, with {bytes_text(lora.peak.device_bytes)}, and is the better choice: its merge is the "
        "model that was trained, where an adapter learnt around 4-bit weights loses something: --set training.method=lora"
    )


def command_for(change: Remedy, asked: str = "ftkit plan") -> str:
    """What to type: the command that the plan was asked for with, and the change."""
    import shlex

    return " ".join([asked, *(f"--set {shlex.quote(setting)}" for setting in change.settings)])


def verdict(fit: Candidate) -> str:
    return "fits" if fit.fits else "does not fit"


def runs(names: Sequence[str]) -> list[tuple[str, float, float]]:
    """(name, start, width) of each run of one name, as shares of the whole."""
    cuts = [n for n in range(len(names)) if n == 0 or names[n] != names[n - 1]]
    return [(names[a], a / len(names), (b - a) / len(names)) for a, b in zip(cuts, [*cuts[1:], len(names)], strict=True)]


def padding(batching: Batching) -> dict[str, Any]:
    """Tokens computed in an epoch by how rows are put together, and the sizes of the batches as ftkit trains."""
    sizes = sorted(batching.grouped_batch_tokens)
    bins = [0] * 12
    for size in sizes:
        bins[min(len(bins) - 1, size * len(bins) // (sizes[-1] + 1))] += 1
    ways = {
        "rows of like length together (as ftkit trains)": batching.grouped_tokens,
        "rows in random order": batching.random_tokens,
        "rows packed end to end": batching.packed_tokens,
    }
    return {
        "ways": ways,
        "most": max(ways.values()),
        "smallest": sizes[0],
        "median": sizes[len(sizes) // 2],
        "largest": sizes[-1],
        "bins": bins,
    }


def plain(text: str, keep: str = "") -> str:
    """Without control characters, which neither SVG nor HTML can hold. Markup stays markup."""
    return type(text)("".join(c if c.isprintable() or c in NO_BREAK + keep else " " for c in text))

"""Two real steps, measured."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data.rows import Example, Pair
from ftkit.memory.fake import quantization_tensors
from ftkit.recipe import Recipe
from ftkit.train.arguments import Settings
from ftkit.train.trainer import build_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Probe:
    """What two real optimizer steps held at their peak. `reserved_bytes` is None on a CPU."""

    allocated_bytes: int
    reserved_bytes: int | None


def probe(
    recipe: Recipe,
    settings: Settings,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example] | Sequence[Pair],
    folder: Path,
) -> Probe:
    """Two optimizer steps of the real trainer on the longest rows, measured: by CUDA's own figures, on a CPU by torch's profiler."""
    import torch

    longest = sorted(examples, key=lambda example: -example.length)
    wanted = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    rows = (longest[: settings.per_device_train_batch_size] * wanted)[:wanted] * 2
    two_steps = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 2, "evaluations_per_epoch": 1})})
    trainer = build_trainer(two_steps, settings, base, tokenizer, rows, rows[:1], folder)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return Probe(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    gc.collect()  # what earlier work left behind must not be counted as released by the steps
    tensors = (*trainer.model.parameters(), *trainer.model.buffers(), *quantization_tensors(trainer.model))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.train()
    return Probe(sum(held.values()) + peak_of(profiled), None)


def peak_of(profiled: Any) -> int:
    """The most bytes that a torch profile with `profile_memory` saw allocated at once, beyond those at its beginning."""
    changes: list[tuple[int, int]] = []

    def walk(nodes: Any) -> None:
        for node in nodes:
            if str(node.tag).endswith("Allocation"):
                changes.append((node.start_time_ns, node.extra_fields.alloc_size))
            walk(node.children)

    walk(profiled.profiler.kineto_results.experimental_event_tree())
    now = top = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        top = max(top, now)
    return top

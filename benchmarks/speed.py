"""Hold the estimate of training speed against published ones, and print how many lie inside the range.

    python benchmarks/speed.py                # the table beside this file

Rows of kind `range` are those that plan/speed.py's range was made from; `check` rows were not used for it, and `other kernels`
are of a trainer (Unsloth) that replaces PyTorch's kernels by fused ones, which ftkit does not.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from ftkit.errors import RecipeError
from ftkit.machine.cards import find_card
from ftkit.memory.model import Skeleton
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.settings import StepSettings
from ftkit.plan.speed import of_training
from ftkit.recipe import Lora

TABLE = Path(__file__).with_name("training_speeds.csv")
QWEN1 = {"vocab_size": 151936, "max_position_embeddings": 8192}  # whose layers have Qwen2's shapes
QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "num_key_value_heads": 8}
COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODELS: dict[str, tuple[str, tuple[int, int, int, int], dict[str, Any]]] = {  # model type, COLUMNS, and what else it differs in
    "Mistral-7B": ("mistral", (4096, 14336, 32, 32), {"num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None}),
    "PowerLM-3B": (
        "llama",
        (2304, 9216, 40, 36),
        {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    ),
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32), {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}),
    "Qwen-1.8B": ("qwen2", (2048, 5504, 24, 16), {"num_key_value_heads": 16, **QWEN1}),
    "Qwen-7B": ("qwen2", (4096, 11008, 32, 32), {"num_key_value_heads": 32, **QWEN1}),
    "Qwen-14B": ("qwen2", (5120, 13696, 40, 40), {"num_key_value_heads": 40, **QWEN1}),
    "Qwen3-0.6B": ("qwen3", (1024, 3072, 28, 16), {**QWEN3, "tie_word_embeddings": True}),
    "Qwen3-1.7B": ("qwen3", (2048, 6144, 28, 16), {**QWEN3, "tie_word_embeddings": True}),
    "Qwen3-4B": ("qwen3", (2560, 9728, 36, 32), {**QWEN3, "tie_word_embeddings": True}),
    "Qwen3-8B": ("qwen3", (4096, 12288, 36, 32), QWEN3),
    "Qwen3-14B": ("qwen3", (5120, 17408, 40, 40), QWEN3),
}


class Held(NamedTuple):
    """A row of the table, and the range of tokens a second that is estimated for it."""

    row: dict[str, str]
    low: float
    high: float

    @property
    def measured(self) -> float:
        return float(self.row["tokens_per_second"])

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def held(table: Iterable[dict[str, str]]) -> Iterator[Held]:
    """Each row with its estimate. Rows of one training loop share their traces."""
    skeletons: dict[str, Skeleton] = {}
    steps: dict[str, StepMemory] = {}
    for row in table:
        if row["model"] not in skeletons:
            skeletons[row["model"]] = skeleton_of(row["model"])
        skeleton, chosen, card = skeletons[row["model"]], settings(row), find_card(row["card"])
        loop = f"{row['model']} {chosen}"
        if loop not in steps:
            steps[loop] = StepMemory(skeleton, chosen)
        batch, length = int(row["batch"]), int(row["sequence"])
        counted = skeleton.count(chosen.method, chosen.lora, chosen.optim, chosen.base_dtype, chosen.trained_dtype)
        tokens, steps_taken = batch * length, 1 / int(row["accumulation"])
        if not card.speed:
            raise RecipeError(f"the speed of {card.name} is not known")
        estimate = of_training(card.speed, steps[loop].work(batch, length), tokens, [tokens], 1, steps_taken, counted, tokens)
        yield Held(row, tokens / estimate.seconds_high, tokens / estimate.seconds_low)


def skeleton_of(model: str) -> Skeleton:
    from transformers import AutoConfig

    kind, sizes, others = MODELS[model]
    skeleton = Skeleton(AutoConfig.for_model(kind, **dict(zip(COLUMNS, sizes, strict=True)), **others))
    skeleton.shorten()
    return skeleton


def settings(row: dict[str, str]) -> StepSettings:
    targets = row["target_modules"] if row["target_modules"] == "all-linear" else row["target_modules"].split("|")
    lora = {} if row["method"] == "full" else {"lora": Lora(r=int(row["r"]), target_modules=targets)}
    return StepSettings(
        method=row["method"],  # type: ignore[arg-type]
        gradient_checkpointing=row["gradient_checkpointing"] == "yes",
        trained_dtype=row["trained_dtype"],  # type: ignore[arg-type]
        autocast=row["trained_dtype"] == "float32",
        loss=row["loss"],  # type: ignore[arg-type]
        padded=False,
        capability=find_card(row["card"]).capability,
        **lora,  # type: ignore[arg-type]
    )


@click.command()
def main() -> None:
    """Hold estimates against the table."""
    warnings.filterwarnings("ignore")
    found = []
    for entry in held(rows()):
        row = entry.row
        found.append(entry)
        off = "" if entry.inside else f"  outside, {max(entry.low / entry.measured, entry.measured / entry.high) - 1:.0%}"
        what = f"{row['kind']:<13} {row['model']:<12} {row['method']:<5} {row['batch']:>2} × {row['sequence']:>4} {row['card']:<12}"
        click.echo(f"{what} {entry.low:>7.0f} to {entry.high:>7.0f} tokens/s, measured {entry.measured:>6.0f}{off}")
    for kind in dict.fromkeys(entry.row["kind"] for entry in found):
        of_kind = [entry for entry in found if entry.row["kind"] == kind]
        click.echo(f"{kind}: {sum(entry.inside for entry in of_kind)} of {len(of_kind)} inside")


if __name__ == "__main__":
    main()

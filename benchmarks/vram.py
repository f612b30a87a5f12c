"""Predict each row of a table of published measurements and print predicted, measured, error and time.

    python benchmarks/vram.py measured.csv --configs DIR

Columns: source, config (a folder of DIR with a config.json), method, r, target_modules (names joined by |), batch, sequence,
base_dtype, adapter_dtype, gradient_checkpointing (yes, no), optimizer, loss, attention, gpu, metric
(max_memory_reserved, max_memory_allocated or nvidia-smi), measured_bytes, notes. A row that says what is not modelled is refused,
by the name of what that is.
"""

from __future__ import annotations

import csv
import re
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import click

from ftkit.errors import FtkitError, RecipeError
from ftkit.machine import cards
from ftkit.memory.model import Skeleton, load_config
from ftkit.memory.polynomial import StepMemory
from ftkit.memory.settings import StepSettings, compute_dtype
from ftkit.recipe import Lora
from ftkit.units import GIB

# Method → what it is planned as, and whether with DoRA's magnitudes. Methods that are no row here are not modelled.
METHODS: dict[str, tuple[Any, bool]] = {
    "full": ("full", False), "lora": ("lora", False), "qlora": ("qlora", False),
    "dora": ("lora", True), "lora-dora": ("lora", True), "qdora": ("qlora", True), "qlora-dora": ("qlora", True),
}  # fmt: skip
# What a source or a note says of a method that takes other memory than plain LoRA.
OTHERS = (
    "adalora", "adamss", "aqlm", "arrow", "bdlora", "boft", "bone", "c3a", "deepspeed", "delora", "fourierft", "fsdp", "galore",
    "gptq", "gralora",
    "hira", "ia3", "loha", "lokr", "lorafa", "lora-fa", "miss", "oft", "offload", "osf", "prefix tuning", "prompt tuning",
    "p-tuning", "randlora", "road",
    "shira", "unsloth", "vblora", "vera", "zero-2", "zero-3",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
YES = {"yes": True, "no": False}
METRICS = {"max_memory_reserved": "reserved_bytes", "max_memory_allocated": "allocated_bytes", "nvidia-smi": "device_bytes"}


# What is known of the training loop of a source, by how its name begins, whatever its rows say.
LOOPS: dict[str, dict[str, Any]] = {
    # finetune/lora.py and model.py: a head of its own, logits in chunks of 128 tokens, one layer for query, key and value
    "litgpt": {"tied": False, "loss": "float32_chunks", "fused_qkv": True},
    # method_comparison: batches come sorted, longest first, and the cache is emptied on the way
    "huggingface/peft": {"use_cache": True, "longest_first": True},
}
DROPOUTS = {"litgpt": 0.05}  # LitGPT's config_hub; no table has a column for it


def settings(row: dict[str, str]) -> StepSettings:
    """What a row says of its training loop, and what is known of the loops of its source."""
    notes, loss, source = row["notes"].lower(), row["loss"].lower(), row["source"].lower()
    loop = next((name for name in LOOPS if source.startswith(name)), "")
    method, dora = variant(row)
    if ("fused" not in loss and not re.search(r"logits|causal lm|cross[ -]entropy", loss)) or "liger" in loss:
        raise RecipeError(f"loss {row['loss']!r} is not known")
    if not re.search(r"sdpa|eager|flash", row["attention"]):
        raise RecipeError(f"attention {row['attention']!r} is not known")
    given: dict[str, Any] = {
        "method": method,
        "base_dtype": one_of(DTYPES, "base_dtype", row["base_dtype"]),
        "compute_dtype": compute_dtype(row["base_dtype"], "bfloat16"),
        "trained_dtype": one_of(DTYPES, "adapter_dtype", row["adapter_dtype"] or row["base_dtype"]),
        "gradient_checkpointing": YES[one_of(tuple(YES), "gradient_checkpointing", row["gradient_checkpointing"])],
        "optim": optimizer(row["optimizer"]),
        "padded": bool(re.search(r"(?<!un)(?<!not )(?<!non-)padded", row["attention"].lower())),
        "attention": "eager" if "eager" in row["attention"] else None,
        "autocast": "autocast" in notes,
        "use_cache": "use_cache on" in notes,
        "loss": "fused" if "fused" in loss else "logits",
        "keep_outputs": "fused" not in loss,
        "longest_first": "long to short" in notes,
        "capability": capability(row["gpu"]),
    }
    if method != "full":
        given["lora"] = Lora(
            r=int(row["r"]),
            target_modules=row["target_modules"].split("|") if row["target_modules"] != "all-linear" else "all-linear",
            lora_dropout=DROPOUTS.get(loop, 0.0),
            use_dora=dora,
        )
    return StepSettings(**{**given, **LOOPS.get(loop, {})})


def variant(row: dict[str, str]) -> tuple[Any, bool]:
    """What the row's method is planned as, and whether with DoRA. Raises RecipeError for what is not modelled, wherever the row says it."""
    method = row["method"].lower().replace("_", "-").replace("+", "-")
    if method not in METHODS:
        raise RecipeError(f"method {row['method']!r} is not modelled")
    kind, dora = METHODS[method]
    said = f"{row['source']} {row['notes']} {row.get('variant') or ''}".lower()
    other = next((name for name in OTHERS if re.search(rf"(?<![a-z])(?<!no )(?<!not )(?<!without ){name}(?![a-z])", said)), None)
    if other:
        raise RecipeError(f"{other} is not modelled")
    return kind, kind != "full" and (dora or bool(re.search(r"(?<![a-z])q?dora(?![a-z])", said)))


def one_of(known: tuple[str, ...], column: str, value: str) -> str:
    """The value. Raises RecipeError where it is none of the known ones."""
    if value not in known:
        raise RecipeError(f"{column} {value!r} is not known")
    return value


def optimizer(name: str) -> str:
    """AdamW of torch or, in 8 bits, of bitsandbytes, under any of its names. Raises RecipeError for every other."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    eight, paged = "8bit" in plain, "paged" in plain
    if "adamw" not in plain or (paged and not eight):
        raise RecipeError(f"optimizer {name!r} is not known")
    return "paged_adamw_8bit" if paged else "adamw_8bit" if eight else "adamw_torch"


def capability(gpu: str) -> tuple[int, int]:
    """Of the card that a row names, with or without its maker and memory: the longest known name in it. RecipeError for another."""

    def words(text: str) -> str:
        return f" {' '.join(re.findall(r'[a-z]+|[0-9]+', re.sub(r'[0-9]+ ?gi?b', '', text.lower())))} "

    named = words(gpu)
    known = max((name for name in cards.cards() if words(name) in named), key=lambda name: len(words(name)), default=None)
    if known is None:
        raise RecipeError(f"card {gpu!r} is not known")
    return cards.cards()[known].capability


def predict(row: dict[str, str], configs: Path) -> int:
    """Predicted bytes of the row's metric. Raises FtkitError, KeyError and ValueError for what a row should not say."""
    metric = METRICS[one_of(tuple(METRICS), "metric", row["metric"])]
    chosen = settings(row)
    skeleton = Skeleton(load_config(configs / row["config"]), chosen.base_dtype, chosen.attention, chosen.tied)
    skeleton.shorten()
    peak = StepMemory(skeleton, chosen).step(int(row["batch"]), int(row["sequence"])).peak()
    return int(getattr(peak, metric))


@click.command()
@click.argument("table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--configs", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folders of config.json, by model."
)
def main(table: Path, configs: Path) -> None:
    """Hold predictions against TABLE."""
    warnings.filterwarnings("ignore")
    errors = []
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    click.echo(
        f"{'model':<16} {'method':<6} {'batch':>5} {'tokens':>6} {'metric':<20} {'predicted':>13} {'measured':>13} {'error':>8} {'time':>7}"
    )
    for row in rows:
        started = time.monotonic()
        label = f"{row['config']:<16} {row['method']:<6} {row['batch']:>5} {row['sequence']:>6} {row['metric']:<20}"
        try:
            predicted, measured = predict(row, configs), int(row["measured_bytes"])
        except (FtkitError, KeyError, ValueError) as error:
            click.echo(f"{label} refused: {error.message if isinstance(error, FtkitError) else repr(error)}")
            continue
        off = predicted / measured - 1
        errors.append(abs(off))
        click.echo(f"{label} {predicted / GIB:>9.3f} GiB {measured / GIB:>9.3f} GiB {off:>+8.2%} {time.monotonic() - started:>5.1f} s")
    if errors:
        within = {limit: sum(error <= limit for error in errors) for limit in (0.005, 0.015)}
        click.echo(f"median error {statistics.median(errors):.2%}, largest {max(errors):.2%}; of {len(errors)} rows "
                   f"{within[0.005]} within 0.5 %, {within[0.015]} within 1.5 %")  # fmt: skip


if __name__ == "__main__":
    main()

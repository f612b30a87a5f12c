"""Predict each row of a table of published measurements and print predicted, measured, error and time.

    python benchmarks/vram.py measured.csv --configs DIR

Columns: source, config (a folder of DIR with a config.json), method, r, target_modules (names joined by |), batch, sequence,
base_dtype, adapter_dtype, gradient_checkpointing (yes, no), optimizer, loss, attention, gpu, metric
(max_memory_reserved or max_memory_allocated), measured_bytes, notes.
"""

from __future__ import annotations

import csv
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import click

from ftkit import device
from ftkit.errors import FtkitError
from ftkit.memory.fit import StepMemory
from ftkit.memory.inventory import Skeleton, load_config
from ftkit.memory.trace import StepSettings
from ftkit.recipe import Lora

GIB = 1 << 30
OPTIMIZERS = {
    "adamw8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "pagedadamw8bit": "paged_adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def settings(row: dict[str, str]) -> StepSettings:
    """What a row says of its training loop, and what is known of the loops of its source."""
    notes, loss = row["notes"].lower(), row["loss"].lower()
    litgpt, peft = (row["source"].lower().startswith(name) for name in ("litgpt", "huggingface/peft"))
    method: Any = row["method"]
    given: dict[str, Any] = {
        "method": method,
        "base_dtype": row["base_dtype"],
        "trained_dtype": row["adapter_dtype"] or row["base_dtype"],
        "gradient_checkpointing": row["gradient_checkpointing"] == "yes",
        "optim": OPTIMIZERS.get(row["optimizer"].split()[-1].replace(".", "").lower(), "adamw_torch"),
        "padded": "padded" in row["attention"],
        "attention": "eager" if "eager" in row["attention"] else None,
        "autocast": "autocast" in notes,
        "use_cache": peft or "use_cache on" in notes,
        "loss": "fused" if "fused" in loss else "logits",
        "keep_outputs": "fused" not in loss,
        "longest_first": peft or "long to short" in notes,  # PEFT's batches come sorted, and its cache is emptied on the way
        "capability": capability(row["gpu"]),
    }
    if method != "full":
        given["lora"] = Lora(
            r=int(row["r"]),
            target_modules=row["target_modules"].split("|") if row["target_modules"] != "all-linear" else "all-linear",
            lora_dropout=0.05 if litgpt else 0.0,  # LitGPT's config_hub
        )
    if litgpt:  # its finetune/lora.py and model.py: a head of its own, logits in chunks of 128 tokens, one layer for q, k and v
        given |= {"tied": False, "loss": "float32_chunks", "fused_qkv": True}
    return StepSettings(**given)


def capability(gpu: str) -> tuple[int, int]:
    """Of the card that a row names, with or without its maker and memory."""
    plain = gpu.lower().replace("nvidia", "")
    known = [
        value
        for name, (_, value) in device.CARDS.items()
        if name.lower().split()[-1] in plain.replace("-", " ").split() or name.lower() in plain
    ]
    return known[0] if known else device.ANY_CARD


def predict(row: dict[str, str], configs: Path) -> int:
    """Predicted bytes of the row's metric."""
    chosen = settings(row)
    skeleton = Skeleton(load_config(configs / row["config"]), chosen.base_dtype, chosen.attention, chosen.tied)
    skeleton.shorten()
    peak = StepMemory(skeleton, chosen).step(int(row["batch"]), int(row["sequence"])).peak()
    return peak.reserved_bytes if row["metric"] == "max_memory_reserved" else peak.allocated_bytes


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
            predicted = predict(row, configs)
        except FtkitError as error:
            click.echo(f"{label} refused: {error.message}")
            continue
        measured = int(row["measured_bytes"])
        error = predicted / measured - 1
        errors.append(abs(error))
        click.echo(f"{label} {predicted / GIB:>9.3f} GiB {measured / GIB:>9.3f} GiB {error:>+8.2%} {time.monotonic() - started:>5.1f} s")
    if errors:
        within = {limit: sum(error <= limit for error in errors) for limit in (0.005, 0.015)}
        click.echo(f"median error {statistics.median(errors):.2%}, largest {max(errors):.2%}; of {len(errors)} rows "
                   f"{within[0.005]} within 0.5 %, {within[0.015]} within 1.5 %")  # fmt: skip


if __name__ == "__main__":
    main()

"""How long plans take, in seconds of processor time. Beside other work these mean little: `make e2e` runs this file by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftkit.machine.device import Device
from ftkit.plan.choose import Planner
from ftkit.recipe import Recipe
from ftkit.units import GIB

pytestmark = [pytest.mark.timing, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}

PLAN = """
import json, resource, sys, time
from ftkit.cli import main
try:
    main(["plan", "--config", sys.argv[1], "--vram", sys.argv[2], "--length", "2048", "--json"])
finally:
    used = {"seconds": time.process_time(), "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    print(json.dumps({**used, "imported": [name for name in ("torch", "transformers") if name in sys.modules]}), file=sys.stderr)
"""


def plan(config: dict[str, Any], vram: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """A QLoRA plan for rows of 2048 tokens in a process of its own: what it printed, and what it used."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    environment = {**os.environ, "FTKIT_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PLAN, folder / "config.json", vram], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *said, used = done.stderr.splitlines()
    assert all(line.startswith("› tracing a training step") for line in said), done.stderr  # no library's own advice
    found: dict[str, Any] = json.loads(used)
    return done.stdout, found


def test_a_plan_from_nothing_and_the_same_again(tmp_path: Path, report_figures: Callable[[str], None]) -> None:
    """8 and 70 billion parameters, and the first question once more, from what was kept.

    Both cards need checkpointing, so that as many steps are looked at. The better of two turns each, since other guests
    of the machine take their share.
    """
    turns = []
    for turn in ("first", "second"):
        folder = tmp_path / turn
        folder.mkdir()
        shown, small = plan(LLAMA_8B, "12", folder)
        _, large = plan(LLAMA_70B, "80", folder)
        turns.append((small, large))
    shown_again, again = plan(LLAMA_8B, "12", folder)
    small_seconds, large_seconds = (min(used["seconds"] for used in model) for model in zip(*turns, strict=True))
    peak_bytes = max(used["peak_bytes"] for used in (*turns[0], *turns[1]))
    report_figures(
        f"plan of 8B {small_seconds:.1f} s, of 70B {large_seconds:.1f} s, at most {peak_bytes / GIB:.2f} GiB; "
        f"of 8B again {again['seconds']:.2f} s"
    )
    assert small_seconds < 20
    assert large_seconds < 1.5 * small_seconds  # layers that repeat are traced once
    assert peak_bytes < 2.5e9
    assert again["seconds"] < 2
    assert again["imported"] == []
    answers = [json.loads(text) for text in (shown, shown_again)]
    for answer in answers:
        del answer["shortages"]  # of the disk, which is used by others too
    assert answers[0] == answers[1]


def test_a_further_batch_or_length_costs_little(report_figures: Callable[[str], None]) -> None:
    """Beside the first two lengths, which are traced; all but the traces comes again with each."""
    from transformers import LlamaConfig

    recipe = Recipe.model_validate({"model": "m", "training": {"effective_batch_size": 8, "max_length": 2048}})
    planner = Planner(LlamaConfig(**LLAMA_8B), recipe, Device("cuda", "a card", 24 * GIB, 24 * GIB, (8, 9)), 2048, (), dtype="bfloat16")

    def seconds(batch: int, length: int) -> float:
        started = time.process_time()
        planner.peak(recipe, batch, True, length)
        return time.process_time() - started

    traced = seconds(2, 2048) + seconds(2, 1024)
    further = sorted(seconds(*point) for point in ((3, 2048), (4, 2048), (2, 1536), (2, 512), (4, 768)))
    report_figures(f"a further batch or length {further[0]:.3f} to {further[-1]:.3f} s, after {traced:.1f} s for the first two lengths")
    assert further[0] < traced / 40  # a trace of one point more would be a sixth or more

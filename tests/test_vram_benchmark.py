"""benchmarks/vram.py: what rows of a table say, in the many words that tables use."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from conftest import REPOSITORY

from ftkit.errors import RecipeError

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

spec = importlib.util.spec_from_file_location("vram", REPOSITORY / "benchmarks" / "vram.py")
assert spec
assert spec.loader
vram: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vram)

ROW = {
    "source": "somebody", "config": "tiny", "method": "lora", "r": "8", "target_modules": "q_proj|v_proj", "batch": "2", "sequence": "64",
    "base_dtype": "bfloat16", "adapter_dtype": "float32", "gradient_checkpointing": "no", "optimizer": "torch AdamW", "loss": "logits",
    "attention": "sdpa padded", "gpu": "NVIDIA L40S", "metric": "max_memory_allocated", "measured_bytes": "10000000", "notes": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA A100-SXM4-40GB", (8, 0)), ("RTX 3090 Ti", (8, 6)), ("GeForce RTX4090", (8, 9)),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0)), ("Tesla T4", (7, 5)), ("A10G", (8, 6)),
        ("NVIDIA L4", (8, 9)),
    ],
)  # fmt: skip
def test_cards(gpu: str, capability: tuple[int, int]) -> None:
    assert vram.capability(gpu) == capability


@pytest.mark.parametrize(
    ("name", "optim"),
    [
        ("torch AdamW", "adamw_torch"), ("AdamW 8-bit", "adamw_8bit"), ("bnb.optim.AdamW8bit", "adamw_8bit"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("paged_adamw_8bit", "paged_adamw_8bit"), ("PagedAdamW8bit", "paged_adamw_8bit"),
    ],
)  # fmt: skip
def test_optimizers(name: str, optim: str) -> None:
    assert vram.optimizer(name) == optim


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "SGD"), ("optimizer", ""), ("optimizer", "paged_adamw_32bit"), ("gpu", "Voodoo 2"), ("gpu", ""), ("method", "vera"),
        ("method", ""), ("base_dtype", "int8"), ("adapter_dtype", "fp8"), ("gradient_checkpointing", "selective"), ("loss", "Liger fused"),
        ("loss", "reward"), ("attention", "xformers"), ("notes", "LoHa instead of LoRA"), ("notes", "FSDP on two cards"),
        ("variant", "AdaLoRA"),
    ],
)  # fmt: skip
def test_what_is_not_known_or_modelled_is_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=r"is not (known|modelled)"):
        vram.settings({**ROW, key: value})


@pytest.mark.parametrize(
    ("method", "notes", "planned", "dora"),
    [
        ("lora", "", "lora", False), ("dora", "", "lora", True), ("QDoRA", "", "qlora", True), ("lora+dora", "", "lora", True),
        ("lora", "use_dora", "lora", True), ("lora", "DoRA, as its authors train", "lora", True),
        ("lora", "on Pandora's table", "lora", False),
    ],
)  # fmt: skip
def test_dora_is_planned_as_dora(method: str, notes: str, planned: str, dora: bool) -> None:
    made = vram.settings({**ROW, "method": method, "notes": notes})
    assert (made.method, made.lora.use_dora) == (planned, dora)


@pytest.mark.parametrize(
    ("attention", "padded"), [("sdpa padded", True), ("sdpa", False), ("sdpa unpadded", False), ("eager, not padded", False)]
)
def test_padding(attention: str, padded: bool) -> None:
    assert vram.settings({**ROW, "attention": attention}).padded == padded


def test_what_is_known_of_a_source_stands_before_what_its_rows_say() -> None:
    plain, litgpt, peft = (vram.settings({**ROW, "source": source}) for source in ("somebody", "LitGPT docs", "huggingface/peft main"))
    assert (plain.tied, plain.loss, plain.lora.lora_dropout, plain.use_cache) == (True, "logits", 0.0, False)
    assert (litgpt.tied, litgpt.loss, litgpt.lora.lora_dropout, litgpt.fused_qkv) == (False, "float32_chunks", 0.05, True)
    assert (peft.use_cache, peft.longest_first, peft.tied) == (True, True, True)


@pytest.mark.parametrize("base_dtype", ["float16", "bfloat16"])
def test_float16_weights_are_computed_with_in_float16(base_dtype: str) -> None:
    assert vram.settings({**ROW, "base_dtype": base_dtype}).compute_dtype == base_dtype


def test_a_faulty_row_does_not_end_the_table(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "tiny")
    rows = [ROW, {**ROW, "gpu": "Voodoo 2"}, {**ROW, "r": ""}, {**ROW, "metric": "guess"}, {**ROW, "config": "none"}]
    with open(tmp_path / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    done = CliRunner().invoke(vram.main, [str(tmp_path / "table.csv"), "--configs", str(tmp_path)], catch_exceptions=False)
    _, good, *refused, last = done.output.splitlines()
    assert "GiB" in good
    assert len(refused) == 4
    assert all(" refused: " in line for line in refused)
    assert last.startswith("median error")

"""docs/concepts.md says what ftkit prints: its commands are run, and each line below one stands in what that prints."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from click.testing import Result
from test_docs import ROOT

from ftkit.train.verdict import Kind

CONCEPTS = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
LLAMA = {  # as the hub has it
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def transcripts() -> dict[str, list[str]]:
    """Command → the lines that the document shows of what it prints."""
    shown: dict[str, list[str]] = {}
    for line in re.findall(r"(?m)^    (.+)$", CONCEPTS):
        if line.startswith("$ "):
            lines = shown.setdefault(line.removeprefix("$ "), [])
        elif line != "…":
            lines.append(line)
    return shown


def in_one_space(text: str) -> str:
    return " ".join(text.split())


def missing(shown: list[str], printed: str) -> list[str]:
    """Lines that are not printed, white space and bars aside; one may be shown as far as it matters."""
    lines = [in_one_space(line) for line in printed.splitlines()]
    return [line for line in shown if not any(printed.startswith(in_one_space(line)) for printed in lines)]


def test_a_line_that_is_not_printed_is_found() -> None:
    assert missing(["weights  5.31 GiB", "weights 5.32 GiB"], "  weights   5.31 GiB  ███\n") == ["weights 5.32 GiB"]


@pytest.mark.slow
@pytest.mark.torch
def test_the_document_shows_what_is_printed(ftkit: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Llama-3.1-8B").mkdir()
    (tmp_path / "Llama-3.1-8B" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    for command, shown in transcripts().items():
        done = ftkit(*shlex.split(command)[1:])
        assert done.exit_code in (0, 3), done.stderr
        assert missing(shown, done.output) == [], command


def test_every_verdict_on_a_curve_stands_in_the_table() -> None:
    told = set(re.findall(r"(?m)^\| .+ \| .+ \| ([a-z -]+) \| .+ \|$", CONCEPTS)) - {"verdict"}
    assert told == set(get_args(Kind)) - {"too few to tell"}


def test_what_the_document_derives() -> None:
    """Figures that follow from others in it."""
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    tables, norms = 2 * 128256 * 4096, (2 * 32 + 1) * 4096
    assert f"{weights + tables + norms:,}" in CONCEPTS
    adapter = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert f"{adapter:,}" in CONCEPTS
    assert f"{2 * adapter:,}" in CONCEPTS
    assert f"16 bits: {100 * 5.31 / 14.96:.0f} %" in CONCEPTS
    assert f"A quarter of 14.96 GiB is {14.96 / 4:.2f}" in CONCEPTS
    assert f"{8 * 4.58 * 2**30 / (weights + tables + norms):.1f} bits a weight" in CONCEPTS
    assert f"{20.93 - 8.01:.0f} of {20.93:.0f} GiB" in CONCEPTS
    assert f"{math.ceil(0.9 * 480 / 8)} steps" in CONCEPTS
    assert "rank {} is scaled by {:g}, rank {} by {:g}, rank {} by {:g}".format(*(n for r in (16, 32, 64) for n in (r, 32 / r))) in CONCEPTS

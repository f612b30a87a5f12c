"""What closing takes is what was planned: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import convertible
import pytest
from conftest import REPOSITORY

from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import need_converter

LARGER = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
          "head_dim": 64}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_peak_of_each_way_is_the_planned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in LARGER.items():
        monkeypatch.setitem(convertible.SIZES, key, value)
    weights = sum(parameter.numel() for parameter in convertible.make("llama", tmp_path).parameters())
    gguf.convert(tmp_path, {"Q8_0": tmp_path / "m.gguf"}, need_converter())

    def measured(way: str) -> tuple[int, int]:
        script = REPOSITORY / "benchmarks" / "closing.py"
        asked = [sys.executable, script, tmp_path / "m.gguf", tmp_path, "--way", way, "--tokens", "24"]
        found: dict[str, Any] = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
        return found["planned_ram_bytes"], found["peak_bytes"]["RssAnon"]

    peaks = {way: measured(way) for way in ("dequantised", "mapped")}
    for planned, found in peaks.values():
        assert found <= 1.1 * planned
        assert planned <= 1.4 * found
    assert peaks["mapped"][1] < peaks["dequantised"][1] - 0.3 * 4 * weights  # what a process held and let go before, weights take again

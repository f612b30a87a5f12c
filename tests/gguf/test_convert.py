"""The converter that `ftkit setup converter` brings: this year's models come through it with the same ids and the same logits."""

from __future__ import annotations

from pathlib import Path

import convertible
import pytest

from ftkit.engines import llamacpp, logits
from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import need_converter
from ftkit.proof.behaviour import measure

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TEXT = '<bos><|turn>user\nthe cat sat on\tthe mat {"ø": 1}<turn|>\n<|turn>model\n'


@pytest.mark.parametrize("kind", ["gemma4", "gemma4 with its eyes", "llama"])
def test_a_tiny_model_keeps_its_ids_and_logits(kind: str, tmp_path: Path) -> None:
    model, words, path = convertible.make(kind, tmp_path / "model"), convertible.tokenizer(), tmp_path / "model.gguf"
    gguf.convert(tmp_path / "model", path, "F16", need_converter())
    ids = words(TEXT, add_special_tokens=False)["input_ids"]
    with llamacpp.load(path, num_ctx=256) as engine:
        assert engine.tokenize(TEXT) == ids
    rows = [logits.Forced(ids, list(range(1, len(ids))))]
    form = measure(logits.of_file(path, rows), [ids[1:]], logits.of_model(model.float(), rows))
    assert form.divergence_a_token == pytest.approx(0, abs=1e-4)

"""The converter that `ftkit setup converter` brings: this year's models come through it with the same ids and the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import convertible
import pytest

from ftkit.engines import llamacpp, logits
from ftkit.errors import ModelError
from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import need_converter
from ftkit.proof.behaviour import measure

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TEXT = '<bos><|turn>user\nthe cat sat on\tthe mat {"ø": 1}<turn|>\n<|turn>model\n'


@pytest.mark.parametrize(("kind", "spare_rows"), [("gemma4", 0), ("gemma4 with its eyes", 0), ("llama", 0), ("llama", 7), ("gemma4", 5)])
def test_a_tiny_model_keeps_its_ids_and_logits(kind: str, spare_rows: int, tmp_path: Path) -> None:
    """Also where its embedding has rows to spare, for which the tokenizer has no tokens."""
    model, words, path = convertible.make(kind, tmp_path / "model", spare_rows), convertible.tokenizer(), tmp_path / "model.gguf"
    gguf.convert(tmp_path / "model", {"F16": path}, need_converter())
    ids = words(TEXT, add_special_tokens=False)["input_ids"]
    with llamacpp.load(path, num_ctx=256) as engine:
        assert engine.tokenize(TEXT) == ids
        assert len(engine.tokenize("[PAD291]")) == len(words("[PAD291]")["input_ids"])  # what names a row to spare is read as text
    rows = [logits.Forced(ids, list(range(1, len(ids))))]
    form = measure(logits.of_file(path, rows), [ids[1:]], logits.of_model(model.float(), rows))
    assert form.divergence_a_token == pytest.approx(0, abs=1e-4)


def test_two_files_of_one_process_are_those_of_one_each(tmp_path: Path) -> None:
    model = tmp_path / "model"
    convertible.make("gemma4", model, spare_rows=5)
    together = {kind: tmp_path / f"{kind}.gguf" for kind in ("F16", "Q8_0")}
    gguf.convert(model, together, need_converter())
    for kind, path in together.items():
        gguf.convert(model, {kind: tmp_path / "alone.gguf"}, need_converter())
        assert path.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["gemma4 as it is published", "llama"])
@pytest.mark.parametrize("type_name", ["f16", "q8_0", "bf16"])
def test_what_is_written_in_pieces_is_what_is_written_whole(kind: str, type_name: str, tmp_path: Path) -> None:
    """Here every matrix that the converter takes as it is, a few rows at a time; of Gemma 4 E4B the table that no small machine holds."""
    model, script = tmp_path / "model", need_converter().path
    convertible.make(kind, model)
    written = {}
    for large, rows in ((1 << 30, 1 << 25), (1, 640)):
        code = (
            "import sys; from ftkit.gguf import script; "
            f"script.LARGE_ELEMENTS, script.ROWS_ELEMENTS = {large}, {rows}; import gguf; "
            "made, new = [], gguf.LazyChunkedTensor.tofile; "
            "gguf.LazyChunkedTensor.tofile = lambda self, *a, **k: (made.append(self.shape), new(self, *a, **k)); "
            "script.run(sys.argv[1], sys.argv[2:]); print(len(made))"
        )
        path = tmp_path / f"{large}.gguf"
        paths = os.pathsep.join(map(str, (script.parent, script.parent / "gguf-py")))
        words = [sys.executable, "-P", "-c", code, script, model, "--outfile", path, "--outtype", type_name]
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True)
        written[large] = int(done.stdout.split()[-1])
    assert (tmp_path / f"{1 << 30}.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    assert written[1 << 30] == 0
    assert written[1] >= 10


def test_tables_of_other_lengths_are_refused(tmp_path: Path) -> None:
    """The converter leaves Gemma 4's embedding as many rows as vocabulary and added tokens together, and its other table all of them."""
    convertible.make("gemma4", tmp_path / "model", spare_rows=7)
    with pytest.raises(ModelError, match=r"token_embd\.weight has 297 rows and per_layer_token_embd\.weight has 298 rows; the model has"):
        gguf.convert(tmp_path / "model", {"F16": tmp_path / "model.gguf"}, need_converter())

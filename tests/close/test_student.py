"""What of a file is trained, and that it is written back where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convertible
import pytest

from ftkit.close.student import Lossless, load_student, scales, write_back
from ftkit.gguf import files as gguf_files
from ftkit.machine.llama_cpp import need_converter

pytestmark = pytest.mark.torch


def test_a_file_that_is_written_to_is_read_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf's own reader makes a memmap object of every word of the vocabulary, many times as slowly."""
    import gguf
    import numpy as np
    import torch

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def slowly(*_: Any, **__: Any) -> None:
        raise AssertionError("word by word")

    monkeypatch.setattr(gguf.GGUFReader, "_get", slowly)
    vector = Lossless("blk.0.attn_norm.weight", torch.nn.Parameter(torch.ones(32)), 1.0)
    write_back(tmp_path / "m.gguf", [vector], [], tmp_path / "closed.gguf")
    monkeypatch.undo()
    (there,) = gguf.GGUFReader(tmp_path / "closed.gguf").tensors
    assert (there.data == 2).all()


@pytest.mark.slow
def test_of_a_kind_that_another_loader_knows_the_scales_of_unturned_rows_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads Qwen 3.5's files by a table beside that of the loader which tells how rows are turned, as Llama's q and k are."""
    from transformers import modeling_gguf_pytorch_utils as loader

    convertible.make("llama", tmp_path)
    gguf_files.convert(tmp_path, tmp_path / "m.gguf", "Q8_0", need_converter())
    student = load_student(tmp_path / "m.gguf", tmp_path, bfloat16=False, cuda=False)
    every = {one.name for one in scales(student, tmp_path / "m.gguf")}
    monkeypatch.setattr(loader, "GGUF_SUPPORTED_ARCHITECTURES", [])
    found = {one.name for one in scales(student, tmp_path / "m.gguf")}
    assert found == {name for name in every if ".attn_q." not in name and ".attn_k." not in name}
    assert len(found) == 6 * 5

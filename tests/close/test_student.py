"""What of a file is trained, and that it is written back where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftkit.close.student import Lossless, write_back

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

"""What of a file is trained, and that it is written back where it came from."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftkit.close import student
from ftkit.close.student import Lossless, write_back
from ftkit.line import close
from ftkit.machine.device import Device
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.model.source import open_gguf
from ftkit.plan.cost import ClosingWay, Way
from ftkit.plan.plan import without_margin
from ftkit.progress import SILENT
from ftkit.units import GIB

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
    (there,) = open_gguf(tmp_path / "closed.gguf").tensors
    assert (there.data == 2).all()


def test_another_way_begins_without_what_the_one_before_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that memory ran out holds, by its traceback, all that was loaded until then."""
    import torch

    held: list[weakref.ref[Any]] = []

    class Loaded:
        pass

    def load(path: Path, *_: Any, **__: Any) -> Any:
        if held:
            assert held[0]() is None
            return "packed"
        with student._refusing(path):
            loaded = Loaded()
            held.append(weakref.ref(loaded))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(close, "load_student", load)
    monkeypatch.setattr(close, "computes_on", lambda *_: (False, "float32"))
    job: Any = SimpleNamespace(recipe=SimpleNamespace(trust_remote_code=False), reporter=SILENT)
    names: tuple[Way, ...] = ("dequantised", "mapped")
    ways = [ClosingWay(name, 0, 0) for name in names]
    assert close._student(job, tmp_path / "m.gguf", tmp_path, ways, {}) == ("packed", "mapped")


@pytest.mark.parametrize("begun", [False, True])
def test_the_room_on_a_card_is_with_the_context_that_is_there(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what a way needs is counted."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    card = Device("cuda", "a card", 8 * GIB, 6 * GIB, (8, 6))
    assert close._room_on(card) == without_margin(6 * GIB + begun * CONTEXT_BYTES)

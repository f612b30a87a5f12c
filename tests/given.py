"""Folders and files as other tools leave them, without weights in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
BNB = {"quantization_config": {"quant_method": "bitsandbytes"}}


def folder(path: Path, *names: str, **contents: Any) -> Path:
    """Empty files of these names, and JSON files by theirs without the ending."""
    path.mkdir(parents=True)
    for name in names:
        (path / name).touch()
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def adapter(path: Path, *more: str, **config: Any) -> Path:
    return folder(path, "adapter_model.safetensors", *more, adapter_config={**LORA, **config})


def gguf(path: Path, file_type: int | None = 1, tokens: bool = True, **strings: str) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    if tokens:
        writer.add_token_list(["a"])
    for name, value in strings.items():
        writer.add_string(name.replace("_", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

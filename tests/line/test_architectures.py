"""Tiny models of real architectures through the line, down to llama.cpp's logits. `make families` runs all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import architectures
import pytest

from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import need_converter

BY_NAME = {architecture.name: architecture for architecture in architectures.ARCHITECTURES}
ROW = re.compile(r"^\| (?P<name>[^|]+?) \| (?P<cells>.*) \|$", re.MULTILINE)


def table() -> dict[str, list[str]]:
    """The cells of each row of docs/families.md."""
    rows = {found["name"]: found["cells"].split(" | ") for found in ROW.finditer(architectures.TABLE.read_text(encoding="utf-8"))}
    rows.pop("family")
    return rows


def test_the_table_has_every_architecture_and_no_empty_cell() -> None:
    rows = table()
    assert list(rows) == list(BY_NAME)
    assert all(len(cells) == len(architectures.COLUMNS) and all(cells) for cells in rows.values())
    for name in architectures.FAST:
        assert not any("✘" in cell or "–" in cell for cell in rows[name][:-1]), name  # not all of their files are read by transformers


@pytest.fixture(scope="module")
def each(request: pytest.FixtureRequest) -> Iterator[Iterator[tuple[str, dict[str, str]]]]:
    """(name, cells) of one architecture after another, of those that are wanted."""
    items = [item for item in request.session.items if item.path == request.path]
    wanted = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}
    with closing(architectures.run_apart([BY_NAME[name] for name in architectures.FAST if name in wanted])) as made:
        yield made


@pytest.mark.e2e
@pytest.mark.parametrize("name", architectures.FAST)
def test_an_architecture_goes_through_the_line(name: str, each: Iterator[tuple[str, dict[str, str]]]) -> None:
    made, cells = next(each)
    assert made == name
    assert list(cells) == list(architectures.COLUMNS), cells
    closed, wanted = cells.pop("close"), table()[name][-1]
    assert closed[0] == "✘" if wanted.startswith("✘") else closed == wanted, closed
    assert not [cell for cell in cells.values() if cell.startswith("✘")], cells


@pytest.mark.e2e
def test_rows_of_one_tensor_out_of_order_are_seen_in_the_logits(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = architectures.make_model(BY_NAME["Phi 3"], tmp_path / "base")
    gguf.convert(base, {"F32": tmp_path / "right.gguf"}, need_converter())
    assert architectures.kl(base, tmp_path / "right.gguf") < architectures.MAX_KL
    tensors = load_file(base / "model.safetensors")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"):
        save_file({**tensors, name: tensors[name].roll(1, 0).contiguous()}, base / "model.safetensors", {"format": "pt"})
        assert architectures.kl(base, tmp_path / "right.gguf") > 100 * architectures.MAX_KL, name


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_trained_in_full_keeps_the_config_that_the_converter_knows(tmp_path: Path) -> None:
    """transformers 5.23 saves Granite's kinds of layers under other names, and llama.cpp then misses their weights."""
    cells: dict[str, str] = {}
    architectures.run(replace(BY_NAME["Granite 4"], settings={"training.method": "full"}), tmp_path, cells.__setitem__)
    assert list(cells) == list(architectures.COLUMNS)
    assert cells["close"].startswith("✔")
    assert not [cell for cell in cells.values() if cell.startswith("✘")], cells


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_head_that_the_merge_untied_is_one_in_llama_cpp(tmp_path: Path) -> None:
    import peft
    import torch
    from safetensors.torch import save_file

    from ftkit.merge.deltas import model_of
    from ftkit.merge.stream import merge
    from ftkit.model.source import open_gguf

    base, adapter, merged = architectures.make_model(BY_NAME["Llama 2"], tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="tied"):
        adapted = peft.get_peft_model(model_of(base), settings)
    settings.save_pretrained(adapter)
    wanted = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file({name: 0.1 * torch.randn(tensor.shape) for name, tensor in wanted.items()}, adapter / "adapter_model.safetensors")
    merged.mkdir()
    merge(base, adapter, merged)
    gguf.convert(merged, {"F32": tmp_path / "merged.gguf"}, need_converter())
    assert "output.weight" in {tensor.name for tensor in open_gguf(tmp_path / "merged.gguf").tensors}
    assert architectures.kl(merged, tmp_path / "merged.gguf") < architectures.MAX_KL

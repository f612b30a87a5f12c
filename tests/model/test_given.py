"""What another tool trained is told apart by its files, and what cannot be shipped is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from given import BNB, LORA, adapter, folder, gguf
from hub import Hub, read_folder

from ftkit.errors import ModelError
from ftkit.model.given import look_at


def test_each_is_told_by_its_files(tmp_path: Path) -> None:
    lora = look_at(str(adapter(tmp_path / "lora")), tmp_path)
    assert (lora.kind, lora.base, lora.on_four_bits) == ("adapter", "org/base", False)
    whole = look_at(str(folder(tmp_path / "whole", "model.safetensors", config={})), tmp_path)
    assert (whole.kind, whole.base) == ("checkpoint", None)
    merged = folder(tmp_path / "merged", "model.safetensors", config={})
    assert look_at(str(merged), tmp_path).kind == "checkpoint"
    for number, name in ((0, "F32"), (1, "F16"), (32, "BF16"), (15, "Q4_K_M")):
        file = look_at(str(gguf(tmp_path / f"{name}.gguf", number)), tmp_path)
        assert (file.kind, file.quantization) == ("gguf", name)


def test_an_adapter_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora")
    before = look_at("lora", tmp_path).fingerprint
    assert look_at(str(path), Path("/")).fingerprint == before
    (path / "adapter_model.safetensors").write_bytes(b"x")
    assert look_at("lora", tmp_path).fingerprint != before
    before = look_at("lora", tmp_path).fingerprint
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")  # saved beside it, it counts
    assert look_at("lora", tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("base", "four"),
    [
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", True),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", True),
        ("TheBloke/Llama-2-7B-GPTQ", True),
        ("org/model-AWQ", True),
        ("mlx-community/Llama-3.2-1B-Instruct-4bit", True),
        ("org/Qwen2.5-4B", False),
        ("org/Bit-Model", False),
    ],
)
def test_a_base_in_four_bits_is_known_by_its_name(tmp_path: Path, base: str, four: bool) -> None:
    assert look_at(str(adapter(tmp_path / "lora", base_model_name_or_path=base)), tmp_path).on_four_bits is four


def test_a_base_in_four_bits_is_known_by_its_config(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", config=BNB)
    assert look_at(str(adapter(tmp_path / "lora", base_model_name_or_path=str(base))), tmp_path).on_four_bits


def test_the_revision_that_it_was_trained_on(tmp_path: Path) -> None:
    assert look_at(str(adapter(tmp_path / "lora", revision="abc")), tmp_path).base == "org/base@abc"


def bad(tmp_path: Path, kind: str) -> str:
    path = tmp_path / kind
    if kind == "pickle":
        folder(path, "adapter_model.bin", adapter_config=LORA)
    elif kind == "pickled model":
        folder(path, "pytorch_model.bin", config={})
    elif kind == "no weights":
        folder(path, adapter_config=LORA)
    elif kind == "no config":
        folder(path, "adapter_model.safetensors", "adapter_config.json")
    elif kind == "IA3":
        adapter(path, peft_type="IA3")
    elif kind == "mlx":
        folder(path, "adapters.safetensors", adapter_config={"fine_tune_type": "lora"})
    elif kind == "both":
        adapter(path, "config.json", "model.safetensors")
    elif kind == "quantised":
        folder(path, "model.safetensors", config=BNB)
    elif kind == "outputs":
        for step in (20, 100, 3):
            adapter(path / f"checkpoint-{step}")
    elif kind == "ggufs":
        gguf(folder(path) / "model-F16.gguf")
    elif kind == "empty":
        folder(path)
    elif kind == "weights alone":
        return str(adapter(path) / "adapter_model.safetensors")
    elif kind == "lora.gguf":
        gguf(path, general_type="adapter")
    elif kind == "words.gguf":
        gguf(path, tokens=False)
    elif kind == "typeless.gguf":
        gguf(path, None)
    elif kind == "cut.gguf":
        path.write_bytes(b"GGUF\x03")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "says", "hint"),
    [
        ("pickle", "pickle", "safe_serialization=True"),
        ("pickled model", "pickle", "convert"),
        ("no weights", "has no adapter_model.safetensors", "copy"),
        ("no config", "no adapter_config.json that can be read", "merge_and_unload"),
        ("IA3", "of the kind IA3", "merge_and_unload"),
        ("mlx", "adapter of MLX", "mlx_lm.fuse"),
        ("both", "an adapter and a whole model", "folder of its own"),
        ("quantised", "quantised (bitsandbytes)", "in 16 bits"),
        ("outputs", "no recipe, no adapter and no model", "checkpoint-100"),
        ("ggufs", "no recipe, no adapter and no model", "model-F16.gguf"),
        ("empty", "no recipe, no adapter and no model", "ftkit init"),
        ("weights alone", "is no adapter", "ftkit ship"),
        ("lora.gguf", "adapter as GGUF", "--lora"),
        ("words.gguf", "no tokenizer", "convert it again"),
        ("typeless.gguf", "of which type", "llama-quantize"),
        ("cut.gguf", "not a whole GGUF", "again"),
        ("missing", "There is nothing at", "that is there"),
    ],
)
def test_what_cannot_be_shipped_says_what_to_do(tmp_path: Path, kind: str, says: str, hint: str) -> None:
    with pytest.raises(ModelError) as refused:
        look_at(bad(tmp_path, kind), tmp_path)
    assert says in refused.value.message
    assert hint in str(refused.value.hint)


def test_an_adapter_of_the_hub_is_fetched_and_nothing_else_of_it(tmp_path: Path, hub: Hub) -> None:
    path = adapter(tmp_path / "lora", "tokenizer.json", "optimizer.pt", "training_args.bin")
    commit = hub.add("org/lora", read_folder(path))
    found = look_at("org/lora", tmp_path)
    assert (found.kind, found.base, found.hub and found.hub.fingerprint) == ("adapter", "org/base", commit)
    assert found.fingerprint == look_at(str(path), tmp_path).fingerprint
    assert {file.name for file in found.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert look_at(f"org/lora@{commit}", tmp_path).path == found.path


def test_of_a_whole_model_of_the_hub_the_weights_wait_until_they_are_needed(tmp_path: Path, hub: Hub) -> None:
    commit = hub.add("org/whole", read_folder(folder(tmp_path / "whole", "model.safetensors", "tokenizer.json", config={})))
    found = look_at("org/whole", tmp_path)
    assert (found.kind, found.fingerprint) == ("checkpoint", commit)
    assert not (found.path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("names", "configs", "says", "hint"),
    [
        (["adapter_model.bin"], {"adapter_config": LORA}, "org/name holds only pickle weights", "safe_serialization=True"),
        ([], {"adapter_config": {"peft_type": "IA3"}}, "org/name holds no adapter and no model", "adapter_config.json"),
        (
            ["adapter_model.safetensors"],
            {"adapter_config": {"peft_type": "IA3"}},
            "org/name is an adapter of the kind IA3",
            "merge_and_unload",
        ),
        ([], {"config": BNB}, "weights in org/name are quantised", "in 16 bits"),
        (["b-Q8_0.gguf", "a-F16.gguf"], {}, "and 2 GGUF files", "hf download org/name a-F16.gguf --local-dir .; ftkit ship a-F16.gguf"),
    ],
)
def test_what_of_the_hub_cannot_be_shipped_is_said_by_its_name(
    tmp_path: Path, hub: Hub, names: list[str], configs: dict[str, Any], says: str, hint: str
) -> None:
    hub.add("org/name", read_folder(folder(tmp_path / "made", *names, **configs)))
    with pytest.raises(ModelError, match=re.escape(says)) as refused:
        look_at("org/name", tmp_path)
    assert hint in str(refused.value.hint)
    assert "snapshots" not in refused.value.message


def test_a_misspelt_folder_is_offered_before_the_hubs_answer(tmp_path: Path, hub: Hub) -> None:
    adapter(tmp_path / "outputs" / "lora")
    with pytest.raises(ModelError, match="There is nothing at") as refused:
        look_at("outputs/lorra", tmp_path)
    assert "did you mean" in str(refused.value.hint)

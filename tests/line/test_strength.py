"""How often an adapter stands in a file's weights: once, whatever was rounded; and each fault of a merge by its own words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import convertible
import pytest
import tiny

from ftkit.check import Check
from ftkit.gguf.files import convert
from ftkit.line.strength import LORA, SAVED, find_merged
from ftkit.machine.llama_cpp import need_converter
from ftkit.merge.stream import merge
from ftkit.model.rounding import round_by_chance
from ftkit.model.source import open_gguf
from ftkit.proof.strength import judge_base, judge_strength

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

RANK = 4
LAYERS = {
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Made:
    base: Path
    adapter: Path
    file: Path  # of the base
    added: Tensors  # by the adapter, as PEFT computes it
    saved: Tensors  # what is added to modules that were trained whole

    def merged(self, path: Path, times: float = 1, saved: float = 1, also: Callable[[Tensors], None] = lambda _: None) -> Path:
        shutil.copyfile(self.file, path)
        reader = open_gguf(path, "r+")
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        for changes, factor in ((self.added, times), (self.saved, saved)):
            for name, change in changes.items():
                tensors[name] += factor * change
        also(tensors)
        reader.data.flush()
        return path

    def check(self, converted: Path, shipped: Path | None = None) -> Check:
        return judge_strength(*(find_merged(path, self.base, self.adapter).shares if path else {} for path in (converted, shipped)))

    def check_base(self, converted: Path) -> Check:
        found = find_merged(converted, self.base, self.adapter)
        return judge_base(found.adapted_left, found.embedding_left)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("made")
    convertible.make("llama", folder / "base")
    convert(folder / "base", {"F32": folder / "base.gguf"}, need_converter())
    settings = {"modules_to_save": ["embed_tokens", "lm_head", "model.norm"], "alpha_pattern": {"v_proj": 2}, "use_rslora": True}
    adapted = tiny.make_adapter(folder / "base", folder / "lora", **settings)
    layers = adapted.get_base_model().model.layers
    added = {
        f"blk.{n}.{theirs}.weight": layer.get_submodule(ours).get_delta_weight("default").detach().numpy()
        for n, layer in enumerate(layers)
        for theirs, ours in LAYERS.items()
    }
    file = folder / "lora" / "adapter_model.safetensors"
    tensors, saved = load_file(file), {}
    for theirs, ours in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        change = torch.randn(tensors[f"base_model.model.{ours}.weight"].shape).mul_(0.01)
        tensors[f"base_model.model.{ours}.weight"] += change
        saved[f"{theirs}.weight"] = change.numpy()
    save_file(tensors, file, {"format": "pt"})
    return Made(folder / "base", folder / "lora", folder / "base.gguf", added, saved)


def rounded(tensors: Tensors) -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor[:] = dequantize(quantize(tensor, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)


def test_a_right_merge_holds_it_once(made: Made, tmp_path: Path) -> None:
    right, shipped = made.merged(tmp_path / "f32.gguf"), made.merged(tmp_path / "q4.gguf", also=rounded)
    assert set(find_merged(right, made.base, made.adapter).shares) == {LORA, SAVED}
    check = made.check(right, shipped)
    assert check.outcome == "passed", check.detail
    assert made.check_base(right).detail == "embedding and weights with adapters"
    assert check.detail.startswith("adapters: 1.00 × what training changed (8 tensors); modules that were trained whole: 1.00 ×")


def test_a_model_with_towers_is_looked_at(tmp_path: Path) -> None:
    """Gemma 4 as it is published, whose names have a part that llama.cpp's have not: nothing was compared, and nothing failed."""
    convertible.make("gemma4 as it is published", tmp_path / "base")
    tiny.make_adapter(tmp_path / "base", tmp_path / "lora")
    files = {}
    for times in (1, 2):
        merged = tmp_path / f"merged-{times}"
        merged.mkdir()
        merge(tmp_path / "base" if times == 1 else tmp_path / "merged-1", tmp_path / "lora", merged)
        shutil.copy(tmp_path / "base" / "tokenizer.json", merged)
        files[times] = tmp_path / f"{times}.gguf"
        convert(merged, {"F16": files[times]}, need_converter())
    once, twice = (find_merged(path, tmp_path / "base", tmp_path / "lora") for path in files.values())
    assert judge_strength(once.shares, {}).outcome == "passed"
    assert judge_strength(twice.shares, {}).outcome == "failed"
    assert judge_base(once.adapted_left, once.embedding_left).detail == "embedding and weights with adapters"


def by_chance(tensors: Tensors) -> None:
    import torch

    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            round_by_chance(torch.from_numpy(tensor), torch.bfloat16, name)


def test_one_that_is_rounded_by_chance_is_right(made: Made, tmp_path: Path) -> None:
    right = made.merged(tmp_path / "bf16.gguf", also=by_chance)
    assert made.check(right).detail.startswith(
        "adapters: 1.00 × what training changed (8 tensors); modules that were trained whole: 1.00 ×"
    )
    assert made.check_base(right).detail == "embedding and weights with adapters"
    found = find_merged(right, made.base, made.adapter)
    assert 1e-3 < (found.adapted_left or 0) < 3.2e-3


@pytest.mark.parametrize(
    ("times", "saved", "said"),
    [
        (2, 1, "adapters: 2.00 × what training changed (8 tensors), as if it were merged more than once"),
        (RANK**-0.5, 1, "adapters: 0.50 × what training changed (8 tensors), as if it were scaled otherwise"),
        (RANK**0.5, 1, "adapters: 2.00 × "),
        (0, 1, "adapters: 0.00 × what training changed (8 tensors), as if it were left out"),
        (1, 0, "modules that were trained whole: 0.00 × what training changed (2 tensors), as if it were left out"),
    ],
    ids=["twice", "by the root too little", "by the root too much", "not at all", "embeddings not saved"],
)
def test_a_fault_of_the_merge_is_named(times: float, saved: float, said: str, made: Made, tmp_path: Path) -> None:
    check = made.check(made.merged(tmp_path / "wrong.gguf", times, saved))
    assert (check.outcome, check.detail[: len(said)]) == ("failed", said)


def test_a_quantised_file_that_holds_it_twice_is_named_too(made: Made, tmp_path: Path) -> None:
    check = made.check(made.merged(tmp_path / "right.gguf"), made.merged(tmp_path / "twice.gguf", 2, also=rounded))
    assert (check.outcome, check.detail[:23]) == ("failed", "adapters in what ships:")


def another(tensors: Tensors) -> None:
    """Weights of another training from the start."""
    import numpy as np

    for tensor in tensors.values():
        tensor[:] = np.random.default_rng(0).normal(0, 0.05, tensor.shape)


def related(tensors: Tensors) -> None:
    """Weights that were trained on, the embedding left as it was."""
    import numpy as np

    for name, tensor in tensors.items():
        if name.startswith("blk.") and tensor.ndim > 1:
            tensor += np.random.default_rng(0).normal(0, 0.03 * tensor.std(), tensor.shape)


def reordered(tensors: Tensors) -> None:
    """As llama.cpp has the rows of some architectures."""
    for name, tensor in tensors.items():
        if name.startswith("blk.") and tensor.ndim > 1:
            tensor[:] = tensor[::-1].copy()


@pytest.mark.parametrize("change", [another, related])
def test_another_base_is_named(change: Callable[[Tensors], None], made: Made, tmp_path: Path) -> None:
    check = made.check_base(made.merged(tmp_path / "another.gguf", also=change))
    assert (check.outcome, "as if it were merged into another base" in check.detail) == ("failed", True), check.detail


def test_rows_in_another_order_are_no_other_base(made: Made, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    layers = Path(shutil.copytree(made.adapter, tmp_path / "layers"))
    tensors = load_file(layers / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name}, layers / "adapter_model.safetensors", {"format": "pt"})
    path = made.merged(tmp_path / "reordered.gguf", saved=0, also=reordered)
    assert replace(made, adapter=layers).check(path).outcome == "not made"
    check = replace(made, adapter=layers).check_base(path)
    assert (check.outcome, check.detail) == ("passed", "embedding")


def test_what_sixteen_bits_round_away_is_no_fault(made: Made, tmp_path: Path) -> None:
    """An adapter so gentle that most of the base's numbers stay as they were."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    gentle = Path(shutil.copytree(made.adapter, tmp_path / "gentle"))
    tensors = {name: tensor / (100 if "lora_B" in name else 1) for name, tensor in load_file(gentle / "adapter_model.safetensors").items()}
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name}, gentle / "adapter_model.safetensors", {"format": "pt"})

    def in_sixteen_bits(tensors: Tensors) -> None:
        for name in made.added:
            tensors[name][:] = torch.from_numpy(np.array(tensors[name])).to(torch.bfloat16).float().numpy()

    once, twice = (made.merged(tmp_path / f"{n}.gguf", n / 100, 0, in_sixteen_bits) for n in (1, 2))
    kept = [find_merged(path, made.base, gentle).shares[LORA].times for path in (once, twice)]
    assert kept[0] == pytest.approx(1, abs=0.01)
    assert kept[1] > 1.8

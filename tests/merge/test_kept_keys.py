"""Every family's merge keeps all that its files hold: keys, shapes, order, metadata, file names, and what transformers drops."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import families
import pytest

from ftkit.merge import stream
from ftkit.merge.deltas import model_of
from ftkit.model.source import INDEX, header

merge = partial(stream.merge, by_chance=False)  # as PEFT's is rounded
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings(
        "ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning", "ignore:.*is_gradient_checkpointing.*:FutureWarning"
    ),
]

FAST = ("Phi 3", "Mixtral", "Qwen 3 Next", "Qwen 3.5", "Gemma 3, with a tower", "Granite 4", "GLM-4.7 Flash", "DeepSeek V2", "gpt-oss")
METADATA = {"format": "pt", "note": "of its author"}
SMALL = {"vocab_size": 320, "vocab_size_per_layer_input": 320, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def heads_of_more_tokens(layers: int) -> dict[str, tuple[int, ...]]:
    """As Qwen 3.5 and Next, and as GLM and DeepSeek, publish the layers that predict further tokens; transformers does not load them."""
    block = {
        "self_attn.q_proj": (64, 64),
        "mlp.experts.0.gate_proj": (32, 64),
        "mlp.experts.1.gate_proj": (32, 64),
        "input_layernorm": (64,),
    }
    glm = {"eh_proj": (64, 128), "enorm": (64,), "shared_head.head": (320, 64), "embed_tokens": (320, 64), **block}
    qwen = {"fc": (64, 128), **{f"layers.0.{name}": shape for name, shape in block.items()}}
    named = {f"model.layers.{layers}.{name}": shape for name, shape in glm.items()} | {f"mtp.{name}": shape for name, shape in qwen.items()}
    return {f"{name}.weight": shape for name, shape in named.items()}


def make_base(architecture: architectures.Architecture, folder: Path) -> Path:
    """Small, in several files, with metadata and further heads."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    sizes = {**families.SIZES, "num_hidden_layers": 2, **architecture.sizes}
    sizes |= {key: value for key, value in SMALL.items() if key in sizes or "per_layer" not in key}
    given = {"text_config": sizes, **architecture.towers} if architecture.towers else sizes
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[architecture.model_type](**given))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    if not (folder / INDEX).is_file():
        name = "model.safetensors"
        index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(header(folder / name), name)}
    else:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    shards = sorted(folder.glob("*.safetensors"))
    more = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in heads_of_more_tokens(sizes["num_hidden_layers"]).items()}
    more |= {"mtp.step": torch.tensor([1, 2, 3])}
    for shard in shards:
        save_file({**load_file(shard), **(more if shard == shards[0] else {})}, shard, METADATA)
    index["weight_map"] |= dict.fromkeys(more, shards[0].name)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (folder / "LICENSE.txt").write_text("free", encoding="utf-8")
    return folder


def make_adapter(base: Path, folder: Path) -> None:
    """One of all that ftkit trains on this model by itself."""
    import peft
    import torch
    from safetensors.torch import save_file

    from ftkit.memory.model import inject
    from ftkit.recipe import Lora

    adapted = inject(model_of(base), Lora(r=4))
    names = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    adapted.peft_config["default"].save_pretrained(folder)
    save_file({name: 0.1 * torch.randn(tensor.shape) for name, tensor in names.items()}, folder / "adapter_model.safetensors")


def in_short(architecture: architectures.Architecture) -> Any:
    return pytest.param(architecture, id=architecture.name, marks=[] if architecture.name in FAST else [pytest.mark.slow])


@pytest.mark.parametrize("architecture", [in_short(architecture) for architecture in architectures.ARCHITECTURES])
def test_a_family_keeps_all_that_its_files_hold(architecture: architectures.Architecture, tmp_path: Path) -> None:
    base, adapter, merged = make_base(architecture, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    make_adapter(base, adapter)
    merged.mkdir()
    result = merge(base, adapter, merged)
    assert {file.name for file in merged.iterdir()} == {file.name for file in base.iterdir()}
    changed = set()
    for file in base.iterdir():
        was, now = file.read_bytes(), (merged / file.name).read_bytes()
        if file.suffix != ".safetensors":
            assert now == was, file.name
            continue
        entries = header(file)
        begins = min(entry["begin"] for entry in entries.values())
        assert (len(now), now[:begins]) == (len(was), was[:begins]), file.name  # keys, dtypes, shapes, order and metadata
        changed |= {name for name, entry in entries.items() if now[entry["begin"] : entry["end"]] != was[entry["begin"] : entry["end"]]}
    assert len(changed) == result.merged_tensors > 0
    assert not changed & {"mtp.step", *heads_of_more_tokens(architecture.sizes.get("num_hidden_layers", 2))}
    assert not [name for name in changed if "norm" in name or "vision" in name or "audio" in name]

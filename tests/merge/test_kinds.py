"""Every kind of PEFT's LoRA, written by PEFT itself and merged, equals PEFT's own merge on a float32 base, rounded once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ftkit.errors import ModelError
from ftkit.merge import stream
from ftkit.model.source import INDEX, header

merge = partial(stream.merge, by_chance=False)  # as PEFT's is rounded
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings(
        "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore:.*is_gradient_checkpointing.*:FutureWarning"
    ),
]

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, **UNTIED}
ATTENTION, FUSED = ["q_proj", "v_proj"], ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Kind:
    """`settings`: of LoraConfig; `sizes`: of the model; `tokens`: that the vocabulary was resized to.

    `untied`: embedding and head are two weights then. PEFT merges into the one that they are; for what was trained, it has to be given
    a model with two.
    """

    settings: dict[str, Any]
    sizes: dict[str, Any] = field(default_factory=lambda: UNTIED)
    model: str = "llama"
    tokens: int | None = None
    untied: bool = False
    twice: bool = False  # the same, but that they change alike, and PEFT would change the one twice
    close: bool = False  # not bit for bit: norms over columns, summed in another order
    dtype: str = "bfloat16"


KINDS = {
    "rsLoRA": Kind({"target_modules": "all-linear", "use_rslora": True}),
    "rank and alpha patterns": Kind({
        "target_modules": ATTENTION, "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 8}, "alpha_pattern": {"v_proj": 32},
    }),
    "patterns and rsLoRA": Kind({
        "target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True,
    }),
    "some layers": Kind({"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "Conv1D": Kind({"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"}, GPT2, "gpt2"),
    "bias of all": Kind({"target_modules": ATTENTION, "bias": "all"}, BIASED),
    "bias of the adapted": Kind({"target_modules": ATTENTION, "bias": "lora_only"}, BIASED),
    "modules to save": Kind({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm", "k_proj"]}, BIASED),
    "a router to save": Kind({"target_modules": ATTENTION, "modules_to_save": ["gate"]}, EXPERTS, "qwen3_moe"),
    "experts to save": Kind({"target_modules": ATTENTION, "modules_to_save": ["experts"]}, EXPERTS, "qwen3_moe"),
    "tokens": Kind({"target_modules": ATTENTION, "trainable_token_indices": [1, 7, 299]}),
    "tokens of a tied model": Kind({"target_modules": ATTENTION, "trainable_token_indices": [7, 1]}, TIED),
    "tokens of both ends": Kind({"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [2]}}),
    "experts by name": Kind({"target_modules": [], "target_parameters": FUSED}, EXPERTS, "qwen3_moe"),
    "experts, transposed": Kind(
        {"target_modules": ATTENTION, "target_parameters": FUSED},
        {"num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2, **UNTIED}, "gpt_oss",
    ),
    "a matrix by name": Kind({"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "DoRA": Kind({"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "bias": "lora_only"}, BIASED),
    "DoRA of a head": Kind({"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "DoRA of an embedding": Kind({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, close=True),
    "DoRA of Conv1D": Kind({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, GPT2, "gpt2", close=True),
    "float16": Kind({"target_modules": "all-linear", "use_dora": True}, dtype="float16"),
    "float32": Kind({"target_modules": ["q_proj", "embed_tokens"], "bias": "all"}, BIASED, dtype="float32"),
    "EVA": Kind({"target_modules": ATTENTION, "init_lora_weights": "eva"}),
    "orthogonal": Kind({"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
    "MiCA": Kind({"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "both ends": Kind({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "both ends, kept tied": Kind({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED),
    "adapters kept tied": Kind({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, TIED, twice=True),
    "a tied head": Kind({"target_modules": ["q_proj", "lm_head"]}, TIED, untied=True),
    "a tied embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}, TIED, untied=True),
    "both tied ends": Kind({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, TIED, untied=True),
    "a tied head to save": Kind({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, TIED, untied=True),
    "more tokens": Kind({"target_modules": ATTENTION}, tokens=307),
    "more tokens, tied": Kind({"target_modules": ATTENTION}, TIED, tokens=307),
    "more tokens, trained": Kind({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}, tokens=307),
    "more tokens, adapted": Kind({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, tokens=307),
    "more tokens, some trained": Kind({"target_modules": ATTENTION, "trainable_token_indices": [300, 306]}, TIED, tokens=307),
    "fewer tokens": Kind({"target_modules": ATTENTION}, tokens=270),
}  # fmt: skip


def base_of(kind: Kind, folder: Path) -> Path:
    """A base with norms and biases that are all other numbers, in several files with metadata."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = kind.sizes if kind.model == "gpt2" else {**SIZES, **kind.sizes}
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind.model](**sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, kind.dtype)).save_pretrained(folder, max_shard_size="60KB")
    return folder


def adapter_of(kind: Kind, base: Path, folder: Path) -> Any:
    """An adapter of changed numbers, as PEFT writes it, with a tokenizer where the vocabulary is another; and PEFT's model of it."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind.tokens:
        model.resize_token_embeddings(kind.tokens, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **kind.settings))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    if kind.tokens:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return adapted


def peft_merges(kind: Kind, base: Path, adapter: Path, adapted: Any) -> dict[str, Any]:
    """PEFT's own merge. A model that it would not untie is untied before, as PEFT advises."""
    import peft
    import torch
    import transformers

    if kind.untied or kind.twice:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=False)
        model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    merged: dict[str, Any] = adapted.merge_and_unload().state_dict()
    return {**merged, "lm_head.weight": merged["model.embed_tokens.weight"]} if kind.twice else merged


def state(folder: Path) -> dict[str, Any]:
    import torch
    import transformers

    loaded: dict[str, Any] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return loaded


# Mixed of what others show one by one.
SLOW = ("patterns and rsLoRA", "some layers", "a router to save", "tokens", "orthogonal", "MiCA", "both ends", "both tied ends",
        "fewer tokens", "more tokens", "more tokens, adapted", "bias of the adapted")  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in KINDS])
def test_each_kind_is_merged_as_peft_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(stream, "ROWS_ELEMENTS", 1)  # so few rows at a time as a tiny model has more than once
    monkeypatch.setattr(stream, "LEAST_ROWS", 32)
    kind = KINDS[name]
    base, adapter, merged = base_of(kind, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    adapted = adapter_of(kind, base, adapter)
    merged.mkdir()
    result = merge(base, adapter, merged)
    ours, theirs = state(merged), peft_merges(kind, base, adapter, adapted)
    assert ours.keys() == theirs.keys()
    off, elements = 0, 0
    for path, tensor in ours.items():
        wanted = theirs[path].to(getattr(torch, kind.dtype)).float()
        if kind.close:
            assert torch.allclose(tensor, wanted, rtol=2**-7, atol=0), path  # one place of 16 bits
            off, elements = off + int((tensor != wanted).sum()), elements + tensor.numel()
        else:
            assert torch.equal(tensor, wanted), path
    assert off <= elements / 1000
    config, was = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (merged, base))
    other = {"tie_word_embeddings": False} if kind.untied else {"vocab_size": kind.tokens} if kind.tokens else {}
    assert config == {**was, **other}
    names = {file.name for file in base.iterdir()} | ({"tokenizer.json"} if kind.tokens else set())
    assert {file.name for file in merged.iterdir()} == names
    tensors, were = raw(merged), raw(base)
    assert tensors.keys() == were.keys() | ({"lm_head.weight"} if kind.untied else set())
    assert 0 < sum(tensor not in were or content[1:] != were[tensor][1:] for tensor, content in tensors.items()) <= result.merged_tensors
    index = json.loads((merged / INDEX).read_text(encoding="utf-8"))
    assert index["weight_map"] == {tensor: file for tensor, (file, *_) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(len(content) for *_, content in tensors.values())


def raw(folder: Path) -> dict[str, tuple[str, str, list[int], bytes]]:
    """File, dtype, shape and bytes of each tensor."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        content = shard.read_bytes()
        for name, entry in header(shard).items():
            found[name] = (shard.name, entry["dtype"], entry["shape"], content[entry["begin"] : entry["end"]])
        assert max(entry["end"] for entry in header(shard).values()) == len(content)
    return found


def other_size(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.lm_head.weight"
    save_file({**tensors, name: tensors[name][:-2].clone()}, path)


def without_head(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}, path)


def other_tokens(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("299", "300"), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("more tokens", lambda adapter: (adapter / "tokenizer.json").unlink(), "no tokenizer beside it"),
        ("more tokens", other_size, "embeddings of 305 and of 307 tokens"),
        ("more tokens", without_head, "embeddings of 307 tokens, and no lm_head.weight of as many"),
        ("tokens", other_tokens, "trains token 300, and model.embed_tokens.weight has 300"),
    ],
)
def test_tokens_that_do_not_fit_each_other_are_refused(name: str, change: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    base, adapter, merged = base_of(KINDS[name], tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    adapter_of(KINDS[name], base, adapter)
    change(adapter)
    merged.mkdir()
    with pytest.raises(ModelError, match=words) as refused:
        merge(base, adapter, merged)
    assert refused.value.hint
    assert not list(merged.iterdir())


def test_a_copy_of_the_embedding_in_another_format_does_not_make_it_coarser(tmp_path: Path) -> None:
    """PEFT writes an adapted embedding beside its adapter, as it was loaded for training; rows that are others there were made so."""
    import torch
    from safetensors.torch import load_file, save_file

    kind = Kind({"target_modules": ["q_proj", "embed_tokens"]}, dtype="float32")
    base, adapter, merged = base_of(kind, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    adapted = adapter_of(kind, base, adapter)
    delta = adapted.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    name, own = "base_model.model.model.embed_tokens.base_layer.weight", state(base)["model.embed_tokens.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[name] = tensors[name].to(torch.bfloat16)
    tensors[name][7] = 1.0
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged.mkdir()
    merge(base, adapter, merged)
    wanted = own + delta
    wanted[7] = 1 + delta[7]
    assert torch.equal(state(merged)["model.embed_tokens.weight"], wanted)


def test_pissa_is_merged_once_peft_has_written_it_as_plain_lora(tmp_path: Path) -> None:
    """The way out that refusing it names: A and B then hold what PiSSA took out of the base as well."""
    import peft
    import torch
    import transformers

    base, adapter, merged = base_of(Kind({}, dtype="float32"), tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM", target_modules=ATTENTION, init_lora_weights="pissa")
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "as it is")
    merged.mkdir()
    with pytest.raises(ModelError, match="init_lora_weights=") as refused:
        merge(base, tmp_path / "as it is", merged)
    assert "path_initial_model_for_weight_conversion" in str(refused.value.hint)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "as it began")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(adapter, path_initial_model_for_weight_conversion=str(tmp_path / "as it began"))
    merge(base, adapter, merged)
    theirs, ours = adapted.merge_and_unload().state_dict(), state(merged)
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in ours.items())


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, **UNTIED}
# As `ParamWrapper` of that version computes the delta of (experts, one, other): peft/tuners/lora/layer.py. in of A, out of B, their product
EARLIER = {
    ("qwen3_moe", None): (1, 2, "ore,eri->eio"),
    ("qwen3_moe", "0.18.1"): (1, 2, "ore,eri->eio"),
    ("qwen3_moe", "0.19.0"): (1, 2, "ore,eri->eio"),
    ("qwen3_moe", "0.19.1"): (2, 1, "ore,eri->eoi"),
    ("gpt_oss", "0.18.1"): (1, 2, "ore,eri->eio"),
    ("gpt_oss", "0.19.0"): (2, 1, "ore,eri->eoi"),
    ("gpt_oss", "0.19.1@main"): (1, 2, "ore,eri->eio"),
}


@pytest.mark.parametrize(("model", "version"), EARLIER)
def test_experts_lie_as_the_version_of_peft_that_wrote_them_had_them(model: str, version: str | None, tmp_path: Path) -> None:
    """Of a square tensor only the version says which way round; every tensor of Qwen's here but one, and of gpt-oss's, is square."""
    import torch
    from safetensors.torch import load_file, save_file

    kind = {"qwen3_moe": KINDS["experts by name"], "gpt_oss": KINDS["experts, transposed"]}[model]
    base, adapter, merged = base_of(kind, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    adapter_of(kind, base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}), encoding="utf-8")
    tensors, before, wanted = load_file(adapter / "adapter_model.safetensors"), state(base), {}
    a_in, b_out, product = EARLIER[model, version]
    for layer in range(2):
        for name, wrapper in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            weight = f"model.layers.{layer}.mlp.experts.{name}"
            shape, path = before[weight].shape, f"base_model.model.model.layers.{layer}.mlp.experts{wrapper}"
            a, b = torch.randn(shape[0], 4, shape[a_in]) * 0.1, torch.randn(shape[b_out], 4, shape[0]) * 0.1
            assert f"{path}.lora_A.weight" in tensors
            tensors |= {f"{path}.lora_A.weight": a.flatten(0, 1), f"{path}.lora_B.weight": b.flatten(1, 2)}
            wanted[weight] = before[weight] + torch.einsum(product, b, a) * (6 / 4)
    save_file(tensors, adapter / "adapter_model.safetensors")
    merged.mkdir()
    merge(base, adapter, merged)
    ours = state(merged)
    assert all(torch.equal(ours[name], tensor.to(torch.bfloat16).float()) for name, tensor in wanted.items())


def test_experts_that_were_layers_of_their_own_are_fused_as_peft_does(tmp_path: Path) -> None:
    """Mixtral's, as adapters were written for them before transformers 5."""
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    kind = Kind({}, MIXTRAL, "mixtral")
    base, adapter, merged = base_of(kind, tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged"
    peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["w1", "w2", "w3"]).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.17.0"}), encoding="utf-8")
    torch.manual_seed(1)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, out, into in (("w1", 96, 64), ("w2", 64, 96), ("w3", 96, 64)):
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors |= {f"{path}.lora_A.weight": torch.randn(4, into), f"{path}.lora_B.weight": torch.randn(out, 4)}
    save_file({name: 0.1 * tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    merged.mkdir()
    assert merge(base, adapter, merged).merged_tensors == 2 * 4 * 3
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs, ours = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict(), state(merged)
    assert all(torch.equal(tensor, theirs[name].to(torch.bfloat16).float()) for name, tensor in ours.items())

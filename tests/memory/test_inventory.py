"""The exact counts equal what the real libraries allocate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny

from ftkit.engines import hf
from ftkit.errors import ModelError, RecipeError
from ftkit.memory.model import Adapters, Inventory, Skeleton, load_config, repeated_unit
from ftkit.memory.optimizer import OPTIMIZER_BLOCK
from ftkit.memory.sizes import nf4_storages
from ftkit.model.four_bits import quantized_layers
from ftkit.recipe import Lora

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


def storage_bytes(tensors: list[Any]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def count(config: Any, method: Any, lora: Lora, optim: str, base_dtype: str) -> Inventory:
    return Skeleton(config).count(method, lora, optim, base_dtype)


def test_counts_are_the_models_own() -> None:
    c = tiny.config()
    attention = 2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * (c.hidden_size // 2)  # q, o and half as wide k, v
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size  # two norms
    embeddings = c.vocab_size * c.hidden_size  # tied with the head: counted once
    found = count(c, "qlora", Lora(r=4), "adamw_torch", "bfloat16")
    assert found.parameters == embeddings + 2 * layer + c.hidden_size
    assert found.parameters_by_role == {
        "embeddings": embeddings, "attention": 2 * attention, "MLP": 2 * 3 * c.hidden_size * c.intermediate_size, "norms": 5 * c.hidden_size
    }  # fmt: skip
    assert sum(found.trainable_by_target.values()) == found.trainable_parameters
    assert found.trainable_by_target["q_proj"] == 2 * 4 * 2 * c.hidden_size  # two layers, rank 4, into and out of the rank
    assert found.quantized_parameters == 2 * (layer - 2 * c.hidden_size)


@pytest.mark.parametrize("tied", [True, False])
def test_nf4_weights_to_the_byte(tied: bool, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path, tie_word_embeddings=tied)
    loaded = hf.load_model(folder, "qlora", dtype="bfloat16", cuda=False)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    for parameter in loaded.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    # Code books are shared between layers in storage, or not, as the library likes: count each layer's, as the formula does.
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert count(tiny.config(tie_word_embeddings=tied), "qlora", Lora(r=4), "adamw_torch", "bfloat16").weights_bytes == real


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("lora", "adamw_torch"),
        ("qlora", "adamw_torch"),
        ("full", "adamw_torch"),
        ("full", "adamw_8bit"),
        ("full", "lion_8bit"),
        ("lora", "paged_adamw_32bit"),
        ("lora", "adafactor"),
        ("qlora", "adafactor"),
        ("full", "adafactor"),
    ],
)
def test_gradients_and_optimizer_to_the_byte(method: str, optim: str, model: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    import torch

    from ftkit.data.mask import tokenise
    from ftkit.data.rows import Row
    from ftkit.train.trainer import build_trainer

    tokenizer = hf.load_tokenizer(model)
    examples = list(tokenise(tokenizer, [Row(tuple(row["messages"]), 1) for row in rows[:2]]))
    recipe = tiny.recipe(model, method=method, optim=optim)
    trainer = build_trainer(recipe, tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path)
    trainer.create_optimizer()
    batch = trainer.data_collator([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradient_bytes = storage_bytes([p.grad for p in trained])
    trainer.optimizer.step()
    states = [t for state in trainer.optimizer.state.values() for name, t in state.items() if torch.is_tensor(t) and name != "step"]
    code_books = [t for t in states if t.numel() == 256 and t.dtype == torch.float32 and optim.endswith("8bit")]
    skeleton, method_of = Skeleton(tiny.config()), recipe.training.method
    found = skeleton.count(method_of, recipe.lora, optim, "float32")
    in_order = skeleton.trained(method_of, Adapters() if method_of == "full" else skeleton.adapters(recipe.lora))
    assert [t.shape for t in in_order] == [tuple(p.shape) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert found.trainable_parameters == sum(p.numel() for p in trained)
    assert found.gradient_bytes == gradient_bytes
    assert found.optimizer_bytes == storage_bytes([t for t in states if not any(t is book for book in code_books)])


def test_an_untied_head_has_8_bit_states_as_bitsandbytes_gives_it() -> None:
    """Only the embedding keeps 32 bits, though the head has as many elements."""
    tied, untied = (
        count(tiny.config(tie_word_embeddings=tie), "full", Lora(), "adamw_8bit", "float32").optimizer_bytes for tie in (True, False)
    )
    head = tiny.config().vocab_size * tiny.config().hidden_size
    assert untied - tied == 2 * head + 2 * 4 * (head // OPTIMIZER_BLOCK)


def test_targets_that_match_nothing_are_refused_with_names() -> None:
    with pytest.raises(RecipeError) as refused:
        count(tiny.config(), "lora", Lora(target_modules=["query"]), "adamw_torch", "bfloat16")
    assert "q_proj" in (refused.value.hint or "")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("lora", "fault", "hint"),
    [
        ({"modules_to_save": ["lm_hed"]}, "lora.modules_to_save: the model has no module 'lm_hed'", "did you mean lm_head?"),
        ({"modules_to_save": ["norm"]}, "'norm' is the end of model.layers.0.input_layernorm too", "its path: model.norm"),
        ({"modules_to_save": ["k_proj"]}, "k_proj.weight is kept in 4 bits by QLoRA", "training.method=lora"),
        ({"modules_to_save": ["layers.1.mlp"]}, "down_proj.weight is kept in 4 bits by QLoRA", "training.method=lora"),
        ({"target_parameters": ["q_pro.weight"]}, "lora.target_parameters: the model has no parameter", "did you mean q_proj.weight?"),
        ({"rank_pattern": {"q_pro": 2}}, "lora.rank_pattern: no adapted layer is called 'q_pro'", "did you mean q_proj?"),
        ({"target_modules": ["v_proj"], "alpha_pattern": {"q_proj": 2}}, "lora.alpha_pattern: no adapted layer", "did you mean v_proj?"),
    ],
)
def test_names_that_the_model_does_not_have_are_refused_with_the_nearest(lora: dict[str, Any], fault: str, hint: str) -> None:
    with pytest.raises(RecipeError) as refused:
        count(tiny.config(), "qlora", Lora.model_validate(lora), "adamw_torch", "bfloat16")
    assert fault in refused.value.message
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize("key", ["use_dora", "lora_dropout"])
def test_what_fused_experts_do_not_go_with_is_refused_by_its_key(key: str) -> None:
    from shapes import config

    with pytest.raises(RecipeError, match=rf"lora\.{key}: 'all-linear' reaches experts") as refused:
        count(config("qwen3_moe"), "lora", Lora.model_validate({key: 0.1 if key == "lora_dropout" else True}), "adamw_torch", "bfloat16")
    assert "[k_proj, o_proj, q_proj, v_proj]" in (refused.value.hint or "")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("elements", [64 * 256, 4096 * 33, 100_000])
def test_nf4_storages_are_those_of_bitsandbytes(double_quant: bool, elements: int) -> None:
    """A weight that bitsandbytes quantises for real: each of its tensors has the bytes that are counted."""
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(torch.ones(elements), compress_statistics=double_quant, quant_type="nf4")
    tensors = [packed, state.absmax, state.code]
    if double_quant:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    real = [t.numel() * t.element_size() for t in tensors]
    assert nf4_storages(elements, double_quant) == real


@pytest.mark.parametrize(("kinds", "unit"), [("ssssss", 1), ("sfsfsf", 2), ("sssfsssf", 4), ("ssfs", 3), ("sfff", 4)])
def test_the_repeated_unit_of_layers(kinds: str, unit: int) -> None:
    """The last repetition may be cut short; where nothing repeats, the unit is the whole."""
    from torch import nn

    layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(2, 3 if kind == "s" else 4)}) for kind in kinds)
    assert repeated_unit(layers, object()) == unit


def test_a_shortened_model_counts_as_the_whole() -> None:
    c = tiny.config(num_hidden_layers=9, tie_word_embeddings=False)
    whole, short = Skeleton(c), Skeleton(c)
    assert short.shorten()
    assert (short.total_layers, short.layers, short.unit_layers) == (9, 4, 1)
    assert short.stands_for == (0, 1, 2, 2, 2, 2, 2, 2, 3)
    lora = Lora(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained = short.adapters(lora).trained
    assert trained == whole.adapters(lora).trained
    assert (trained[0].name, trained[-1].name) == ("model.embed_tokens.weight", "lm_head.weight")  # as the optimizer steps on them
    assert short.adapters(lora).adapted == whole.adapters(lora).adapted
    assert short.count("qlora", lora, "adamw_8bit", "bfloat16") == whole.count("qlora", lora, "adamw_8bit", "bfloat16")


def gemma4(**text: Any) -> Any:
    """A small Gemma 4 with its vision and audio towers."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512,
    }  # fmt: skip
    tower = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    return AutoConfig.for_model("gemma4", text_config={**sizes, **text}, vision_config=tower, audio_config={"num_hidden_layers": 2})


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_names_are_of_the_text_model_alone(targets: Any) -> None:
    """The vision tower has a `q_proj` too, which PEFT could not adapt."""
    skeleton, lora = Skeleton(gemma4()), Lora(target_modules=targets)
    assert all("language_model" in name for name in skeleton.adapters(lora).adapted)
    counted = skeleton.count("qlora", lora, "adamw_torch", "bfloat16")
    rest = {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "per_layer_input_gate", "per_layer_projection"}
    assert {name.rpartition(".")[2] for name in counted.without_adapter} == (set() if targets == "all-linear" else rest)
    named = [t.elements for t in skeleton.tensors if "language_model" in t.name and t.name.endswith(("q_proj.weight", "v_proj.weight"))]
    reached = counted.layer_parameters if targets == "all-linear" else sum(named)
    assert counted.layer_parameters - sum(counted.without_adapter.values()) == reached


def test_a_pattern_that_reaches_into_other_towers_is_refused_with_one_that_does_not() -> None:
    skeleton = Skeleton(gemma4())
    with pytest.raises(RecipeError) as refused:
        skeleton.adapters(Lora(target_modules=r".*\.(input_proj_linear|ffw_layer_1|linear)"))
    pattern = (refused.value.hint or "").split("'")[1]
    adapters = skeleton.adapters(Lora(target_modules=pattern))
    assert adapters.adapted
    assert all("language_model" in name for name in adapters.adapted)
    by_role = skeleton.count("qlora", Lora(target_modules=pattern), "adamw_torch", "bfloat16").parameters_by_role
    assert by_role["per-layer tables"] > 0
    assert by_role["vision and audio towers"] > 0


def test_adapters_on_transposed_weights_are_refused() -> None:
    from transformers import GPT2Config

    skeleton = Skeleton(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100))
    with pytest.raises(ModelError, match="Conv1D") as refused:
        skeleton.adapters(Lora())
    assert "method=full" in str(refused.value.hint)


def test_a_config_that_does_not_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not build"):
        Skeleton(tiny.config(hidden_act="nope"))
    wrong = {**tiny.config().to_dict(), "hidden_size": 127}
    (tmp_path / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(ModelError, match="not a multiple"):
        load_config(tmp_path)


def test_experts_in_one_tensor_are_in_4_bits() -> None:
    skeleton = Skeleton(shapes.config("qwen3_moe"))
    fused = sum(tensor.elements for tensor in skeleton.tensors if ".experts." in tensor.name)
    assert fused == 6 * 4 * 3 * 256 * 64
    linear = sum(layer.weight.numel() for layer in quantized_layers(skeleton.model).values())
    counted = {method: skeleton.count(method, Lora(r=4), "adamw_torch", "bfloat16").quantized_parameters for method in ("qlora", "lora")}
    assert counted == {"qlora": linear + fused, "lora": 0}

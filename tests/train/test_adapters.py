"""What can be asked of an adapter: each is trained, planned to the byte, resumed to the same bits, and merged as PEFT merges it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
from conftest import conversations
from test_train import StopAt

from ftkit.data.mask import tokenise
from ftkit.data.rows import Row
from ftkit.engines import hf
from ftkit.engines.logits import Forced, of_model
from ftkit.errors import InterruptedRunError
from ftkit.memory.model import Skeleton, load_config
from ftkit.merge.stream import merge
from ftkit.model.adapter import as_trained
from ftkit.plan.cost import checkpoint_bytes
from ftkit.recipe import Evaluate
from ftkit.train.answers import Asked
from ftkit.train.training import train

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft", "ignore:Merging .*tied:UserWarning"),
]
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # method, lora, sizes of the model; all but the first slow
    "all together, a tied head": ("qlora", {"use_dora": True, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]}, TIED),
    "experts": ("qlora", EXPERTS, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, **UNTIED}),
    "dropout": ("lora", {"lora_dropout": 0.2}, TIED),
    "DoRA": ("lora", {"use_dora": True, "use_rslora": True}, TIED),
    "both ends": ("lora", {"modules_to_save": ["embed_tokens", "lm_head"]}, UNTIED),
    "an embedding": ("qlora", {"modules_to_save": ["embed_tokens"]}, UNTIED),
    "a norm": ("qlora", {"modules_to_save": ["model.norm"]}, UNTIED),
    "patterns": ("lora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, TIED),
}


def model_of(folder: Path, sizes: dict[str, Any]) -> Path:
    """A tiny Llama, or a Qwen3-MoE where it has experts."""
    tiny.make_model(folder, tie_word_embeddings=sizes["tie_word_embeddings"])
    if "num_experts" in sizes:
        import torch
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig

        torch.manual_seed(0)
        same = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "eos_token_id",
            "pad_token_id",
        )
        config = Qwen3MoeConfig(**{name: getattr(tiny.config(), name) for name in same}, head_dim=32, bos_token_id=None, **sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if n else []) for n, name in enumerate(KINDS)])
def test_it_is_planned_trained_resumed_and_merged(name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    method, lora, sizes = KINDS[name]
    model = model_of(tmp_path / "model", sizes)
    tokenizer = hf.load_tokenizer(model)
    rows = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))
    recipe = tiny.recipe(model, lora, method=method, learning_rate=1e-2)
    arguments = (recipe, tiny.SETTINGS, model, tokenizer, rows[2:], rows[:2])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(*arguments, whole)
    with pytest.raises(InterruptedRunError):
        train(*arguments, stopped, StopAt(4))
    counted = Skeleton(load_config(model)).count(recipe.training.method, recipe.lora, "adamw_torch", "float32")
    kept = [stopped / "checkpoints" / "checkpoint-2" / file for file in ("optimizer.pt", "adapter_model.safetensors")]
    planned = checkpoint_bytes(counted)
    assert planned < sum(file.stat().st_size for file in kept) < planned + 60_000  # names and shapes
    assert train(*arguments, stopped).resumed_from_step == 2
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, stopped))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())

    (tmp_path / "merged").mkdir()
    merge(model, whole / "adapter", tmp_path / "merged", by_chance=False)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    theirs = PeftModel.from_pretrained(base, whole / "adapter").merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key].to(torch.bfloat16).float()) for key, tensor in ours.items())
    changed = {key for key, tensor in ours.items() if not torch.equal(tensor, before[key])}
    assert {end for end in lora.get("modules_to_save", ()) if not any(f"{end}.weight" in key for key in changed)} == set()
    assert len(changed) >= 2


ENDS = ["embed_tokens", "model.norm", "lm_head"]


def test_what_is_trained_whole_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    """It is float32 beside 16 bits: asked while it is trained, its packing checked, and as trained none of its numbers is rounded."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    model = model_of(tmp_path / "model", UNTIED)
    tokenizer = hf.load_tokenizer(model)
    rows = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))
    recipe = tiny.recipe(model, method="lora", lora={"modules_to_save": ENDS}, max_steps=4, learning_rate=1e-4)
    settings = replace(tiny.SETTINGS, dtype="bfloat16", longest_tokens=256, most_learnt_tokens=256, packing=True)
    asked = Asked([[{"role": "user", "content": "hi"}]] * 2, ["x", "y"], Evaluate(every=1), 4)
    result = train(recipe, settings, model, tokenizer, rows[2:], rows[:2], tmp_path / "run", asked=asked)
    assert result.steps == 4

    adapted = hf.load_adapted(model, tmp_path / "run" / "adapter", "lora", dtype="bfloat16", cuda=False)
    written = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    state = adapted.state_dict()
    for end in ENDS:
        kept = written[f"base_model.model.{'model.' if end == 'embed_tokens' else ''}{end}.weight"]
        (found,) = (tensor for name, tensor in state.items() if f"{end}.modules_to_save.default.weight" in name)
        assert torch.equal(found, kept)
        assert not torch.equal(kept, kept.to(torch.bfloat16).float())
    assert hf.answer(adapted, tokenizer, [[{"role": "user", "content": "hi"}]], 4)
    (logits,) = of_model(adapted, [Forced([1, 2, 3], [1, 2])])
    assert logits.shape[0] == 2


def test_a_mixture_is_asked_while_it_is_trained(tmp_path: Path) -> None:
    """TRL has it give its routers' logits, by which transformers computes a loss at each token that is generated, and fails."""
    model = model_of(tmp_path / "model", KINDS["experts"][2])
    tokenizer = hf.load_tokenizer(model)
    rows = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))
    questions = [[{"role": "user", "content": text}] for text in ("hi", "what is it?", "and then?")]
    asked = Asked(questions, ["x"] * 3, Evaluate(every=1), 4)
    recipe = tiny.recipe(model, method="lora", lora=EXPERTS, max_steps=4)
    result = train(recipe, tiny.SETTINGS, model, tokenizer, rows[2:], rows[:2], tmp_path / "run", asked=asked)
    assert any(point.right_percent is not None for point in result.curve)


def test_tables_that_stay_in_16_bits_have_nothing_computed_in_them(tmp_path: Path) -> None:
    """A Gemma that computes in float32 does so when it is asked, too."""
    import torch
    from transformers import AutoModelForCausalLM

    config = shapes.config("gemma4_text", hidden_size_per_layer_input=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny.make_adapter(tmp_path / "model", tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["model.norm"])
    adapted = hf.load_adapted(tmp_path / "model", tmp_path / "lora", "lora", dtype="float32", cuda=False)
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32, torch.bfloat16}
    with as_trained(adapted):
        assert not torch.is_autocast_enabled("cpu")

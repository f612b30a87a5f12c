"""The streaming merge equals PEFT's on a float32 base bit for bit, and refuses what it does not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit import merge
from ftkit.errors import ModelError

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("base"))


def make_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """A LoRA adapter with random A and B; the PEFT model on a float32 base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_peft_bit_for_bit(use_rslora: bool, base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    adapted = make_adapter(base, tmp_path / "adapter", use_rslora=use_rslora)
    (tmp_path / "merged").mkdir()
    result = merge.merge(base, tmp_path / "adapter", tmp_path / "merged")
    theirs = adapted.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert result.merged_tensors == 7 * 2
    assert result.tensors == len(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_shards_are_merged_and_another_layout_beside_them_is_left(base: Path, tmp_path: Path) -> None:
    """What the index names is the model; `consolidated.safetensors`, as some hub models carry it, is not."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="200KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    (sharded / "consolidated.safetensors").write_bytes(shards[0].read_bytes())
    make_adapter(base, tmp_path / "adapter")
    for name, source in (("one", base), ("many", sharded)):
        (tmp_path / name).mkdir()
        merge.merge(source, tmp_path / "adapter", tmp_path / name)
    assert sorted(p.name for p in (tmp_path / "many").glob("*.safetensors")) == [p.name for p in shards]
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "many" / shard.name).items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_merged_folder_loads_with_tokenizer_and_template(base: Path, tmp_path: Path) -> None:
    from ftkit import hf

    make_adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert hf.load_tokenizer(tmp_path / "merged").chat_template == tiny.CHATML
    hf.load_model(tmp_path / "merged", None, bfloat16=False, cuda=False)


def test_onto_the_dequantised_base_is_what_training_computed(base: Path, tmp_path: Path) -> None:
    """Logits of the merge onto the dequantised base equal those of the 4-bit base with its adapter, but for 16-bit rounding."""
    import torch
    from peft import PeftModel

    from ftkit import hf

    make_adapter(base, tmp_path / "adapter")
    for onto in ("source", "dequantised"):
        (tmp_path / onto).mkdir()
        merge.merge(base, tmp_path / "adapter", tmp_path / onto, onto=onto, bfloat16=False)  # type: ignore[arg-type]
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        trained = PeftModel.from_pretrained(hf.load_model(base, "qlora", bfloat16=False, cuda=False), tmp_path / "adapter")(
            input_ids=ids
        ).logits
        off = {
            onto: float((hf.load_model(tmp_path / onto, None, bfloat16=False, cuda=False)(input_ids=ids).logits - trained).abs().mean())
            for onto in ("source", "dequantised")
        }
    assert off["dequantised"] < off["source"] / 4


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("rank_pattern", {"q_proj": 8}), ("modules_to_save", ["lm_head"])])
def test_what_it_does_not_do_is_refused_by_name(key: str, value: Any, base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=key):
        merge.merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    deeper = tiny.make_model(tmp_path / "deeper", num_hidden_layers=3)
    make_adapter(deeper, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"layers\.2"):
        merge.merge(base, tmp_path / "adapter", tmp_path / "merged")

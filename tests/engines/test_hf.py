"""Loading a model with transformers: what is not whole is refused, never filled with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapes
import tiny

from ftkit.data.rows import Message
from ftkit.engines import hf
from ftkit.errors import DoesNotFitError, ModelError
from ftkit.recipe import Dtype, Method

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make_model(tmp_path / "model")


@pytest.mark.parametrize("method", ["qlora", "lora", "full", None])
def test_a_whole_model_is_loaded(model: Path, method: hf.Method | None) -> None:
    assert hf.load_model(model, method, dtype="float32", cuda=False)


@pytest.mark.parametrize(("fault", "method"), [("missing", "qlora"), ("missing", "lora"), ("of another shape", "lora")])
def test_a_weight_that_does_not_fit_is_refused(model: Path, fault: str, method: hf.Method) -> None:
    from safetensors.torch import load_file, save_file

    file, name = model / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    weights = load_file(file)
    if fault == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:, :64].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj|cannot load") as refused:
        hf.load_model(model, method, dtype="float32", cuda=False)
    assert refused.value.hint


def test_weights_that_end_too_early_are_refused(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot load") as refused:
        hf.load_model(model, "lora", dtype="float32", cuda=False)
    assert "whole" in str(refused.value.hint)


def test_too_little_memory_is_no_fault_of_the_files(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError) as here:
        torch.empty(1 << 60)
    errors = [
        here.value,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ]
    for error, where in zip(errors, ("RAM", "RAM", "The GPU", "The GPU", "The GPU", "RAM"), strict=True):

        def fails(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(AutoModelForCausalLM, "from_pretrained", fails)
            with pytest.raises(DoesNotFitError, match=f"{where} has too little free memory to load") as refused:
                hf.load_model(model, "lora", dtype="float32", cuda=False)
        assert "ftkit plan" in str(refused.value.hint)


def test_gemma_3n_is_loaded_in_4_bits_but_for_what_its_step_clamps(tmp_path: Path) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    from ftkit.memory.model import meta_model
    from ftkit.model.four_bits import quantized_layers

    config = shapes.config("gemma3n_text")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = hf.load_model(tmp_path, "qlora", dtype="float32", cuda=False)
    in_4_bits = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert in_4_bits == quantized_layers(meta_model(config)).keys()
    assert not any("_coefs" in name or "lm_head" in name for name in in_4_bits)
    model.train()
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum()  # clamps them


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma3n_text"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_table_that_is_looked_up_alone_stays_in_16_bits_to_the_bit_the_same(
    model_type: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Gemma 4 E4B, which a T4 trains in float32, it would take 11 GB there. The plan counts it so, too."""
    import torch
    from transformers import AutoModelForCausalLM

    from ftkit.memory.model import Skeleton, load_config

    config = shapes.config(model_type, hidden_size_per_layer_input=64)  # the root is 8
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    made = []
    for narrow in (True, False):
        with monkeypatch.context() as patched:
            if not narrow:
                patched.setattr(hf, "_has_narrow_tables", lambda *_: False)
            model = hf.load_model(tmp_path, method, dtype="float32", cuda=False)
        (table,) = (parameter for name, parameter in model.named_parameters() if "embed_tokens_per_layer" in name)
        assert table.dtype == (torch.bfloat16 if narrow else torch.float32)
        first = next(parameter for name, parameter in model.named_parameters() if name.endswith("input_layernorm.weight")).requires_grad_()
        assert first.dtype == torch.float32
        logits = model(input_ids=torch.tensor([[1, 2, 3, 500]])).logits
        logits.square().sum().backward()
        assert first.grad is not None
        made.append((logits.detach(), first.grad, model))
    assert all(torch.equal(one, other) for one, other in zip(made[0][:2], made[1][:2], strict=True))
    in_full = [parameter for parameter in made[0][2].parameters() if parameter.dtype != torch.uint8]
    skeleton = Skeleton(load_config(tmp_path), "float32")
    planned = [size for what, size in skeleton.storages(method, "float32", "float32", double_quant=True) if what.startswith("weights")]
    assert sum(planned) == sum(parameter.numel() * parameter.element_size() for parameter in in_full)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_head_is_not_copied_for_each_that_is_asked(model: Path, dtype: Dtype) -> None:
    import torch

    asked, tokenizer = hf.load_model(model, "lora", dtype=dtype, cuda=False), hf.load_tokenizer(model)
    asked.requires_grad_(False)
    vocabulary, hidden = asked.get_output_embeddings().weight.shape
    questions = [[Message(role="user", content="what? " * n)] for n in range(1, 17)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        hf.answer(asked, tokenizer, questions, 2)
    multiplied = [(event.key, *event.input_shapes[:2]) for event in seen.key_averages(group_by_input_shape=True)]
    assert ("aten::mm", [16, hidden], [hidden, vocabulary]) in multiplied
    assert not [shapes for name, *shapes in multiplied if name == "aten::bmm" and shapes[1][-1] == vocabulary]

"""The sizes of GGUF files are those that the real programs write; what later steps need follows from them."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import REPOSITORY
from gguf import GGUFWriter

from ftkit.errors import DoesNotFitError
from ftkit.gguf import files as gguf_files
from ftkit.gguf.files import QUANTIZE_BUFFER_BYTES
from ftkit.gguf.types import (
    CONVERTED,
    HEADER_BYTES_A_TOKEN,
    WITH_MATRIX,
    GgufModel,
    converted_type,
    gguf_bytes,
    gguf_model,
    gguf_sizes,
    needs_imatrix,
    tensor_bytes,
    tensor_types,
)
from ftkit.line.line import LINE
from ftkit.line.train import TRAIN
from ftkit.machine import llama_cpp
from ftkit.machine.device import Device
from ftkit.memory.model import load_config, meta_model
from ftkit.merge.stream import LEAST_ROWS, ROWS_ELEMENTS
from ftkit.model.locate import locate
from ftkit.model.open import open_weights
from ftkit.model.source import open_gguf
from ftkit.plan.cost import (
    CONVERTER_BYTES,
    CONVERTER_BYTES_A_TOKEN,
    FTKIT_BYTES,
    LLAMA_CPP_BYTES,
    QUANTIZE_BYTES,
    WAYS,
    Cost,
    Sizes,
    converter_bytes,
    of_closing,
    of_transferring,
    quantize_bytes,
)
from ftkit.recipe import QUANTIZATIONS, Recipe

Q4_K, Q5_K, Q6_K = 144 / 256, 176 / 256, 210 / 256  # bytes a weight of ggml's blocks
Q8_0, Q5_0 = 34 / 32, 22 / 32


def config(**changes: Any) -> Any:
    """A Llama of nine layers, as wide as one block of the K types."""
    sizes = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 64, "rope_parameters": {"rope_type": "default"}, "vocab_size": 512,
    }  # fmt: skip
    made = SimpleNamespace(**{**sizes, **changes})
    made.get_text_config = lambda: made
    return made


def shapes(
    *, vocabulary: int = 512, hidden: int = 256, intermediate: int = 512, layers: int = 9, keys: int = 256, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama by the names of its checkpoint."""
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for n in range(layers):
        made |= {
            f"model.layers.{n}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            }.items()
        }  # fmt: skip
    return made if tied else {**made, "lm_head.weight": (vocabulary, hidden)}


def types(quantization: str, made: Mapping[str, tuple[int, ...]] | None = None, **changes: Any) -> dict[str, str]:
    return tensor_types(gguf_model(made or shapes(), config(**changes)), quantization)


def layers_with(found: dict[str, str], name: str, kind: str) -> list[int]:
    return sorted(int(tensor.split(".")[1]) for tensor, type_ in found.items() if tensor.endswith(f".{name}.weight") and type_ == kind)


def test_llama_3_1_8b_as_arithmetic() -> None:
    made = shapes(vocabulary=128256, hidden=4096, intermediate=14336, layers=32, keys=1024)
    model = gguf_model(made, config(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8))
    embedding, value, down = 128256 * 4096, 1024 * 4096, 14336 * 4096
    layer = 2 * 4096 * 4096 + 2 * value + 3 * down
    norms = 4 * (2 * 32 + 1) * 4096  # float32
    more = 4 + 4 + 8  # layers with more bits: the first and the last eighth, and every third of the 24 between
    q4_k_m = Q4_K * (embedding + 32 * layer) + (Q6_K - Q4_K) * more * (value + down) + Q6_K * embedding + norms
    assert gguf_bytes(model, "Q4_K_M") == q4_k_m
    assert round(q4_k_m / 1e9, 2) == 4.91  # the published file has 4.92 GB, of which 8 MB are its vocabulary
    assert gguf_bytes(model, "Q8_0") == Q8_0 * (2 * embedding + 32 * layer) + norms
    assert gguf_bytes(model, "F16") == 2 * (2 * embedding + 32 * layer) + norms
    assert model.estimated_because is None


def test_every_type_of_the_recipe_has_a_size() -> None:
    sizes = gguf_sizes(gguf_model(shapes(), config()))
    assert tuple(sizes) == QUANTIZATIONS
    by_size = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"]
    assert sorted(by_size, key=lambda name: sizes[name]) == by_size


def test_the_layers_with_more_bits() -> None:
    found = types("Q4_K_M")
    assert layers_with(found, "attn_v", "Q6_K") == [0, 3, 6, 7, 8]  # 9 // 8 = 1 at the start, from 63 // 8 = 7 on, (n - 1) % 3 == 2
    assert layers_with(found, "ffn_down", "Q6_K") == [0, 3, 6, 7, 8]
    assert layers_with(types("Q4_K_S"), "attn_v", "Q5_K") == [0, 1, 2, 3]
    assert layers_with(types("Q4_K_S"), "ffn_down", "Q5_K") == [0]
    assert layers_with(types("Q3_K_M"), "attn_v", "Q5_K") == [0, 1]


def test_grouped_heads_get_more_bits_for_their_values() -> None:
    assert set(layers_with(types("Q2_K", num_key_value_heads=1), "attn_v", "Q4_K")) == set(range(9))
    assert layers_with(types("Q2_K"), "attn_v", "Q3_K") == list(range(9))
    assert layers_with(types("IQ4_XS", num_key_value_heads=1), "attn_v", "Q5_K") == list(range(9))
    assert layers_with(types("IQ4_XS"), "attn_v", "IQ4_XS") == list(range(9))


def test_a_tied_embedding_is_written_once_and_as_the_output() -> None:
    tied = types("Q4_K_M", shapes(tied=True))
    assert (tied["token_embd.weight"], "output.weight" in tied) == ("Q6_K", False)
    untied = types("Q4_K_M")
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_K", "Q6_K")


def test_rows_that_no_block_divides() -> None:
    made = shapes(hidden=576, intermediate=1536, keys=192, tied=True)  # SmolLM2's widths: 576 = 18 × 32, 1536 = 6 × 256
    found = types("Q4_K_M", made)
    assert (found["token_embd.weight"], found["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")  # Q8_0 for Q6_K
    assert layers_with(found, "attn_q", "Q5_0") == list(range(9))  # for Q4_K
    assert layers_with(found, "attn_v", "Q8_0") == [0, 3, 6, 7, 8]
    assert layers_with(found, "ffn_down", "Q6_K") == [0, 3, 6, 7, 8]
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 2 * 576 * 1536
    more = 5 * ((Q8_0 - Q5_0) * 192 * 576 + (Q6_K - Q4_K) * 576 * 1536)
    norms = 4 * (2 * 9 + 1) * 576
    model = gguf_model(made, config())
    assert gguf_bytes(model, "Q4_K_M") == Q8_0 * 512 * 576 + 9 * (Q5_0 * layer + Q4_K * 576 * 1536) + more + norms
    assert types("Q4_K_M", shapes(hidden=72))["blk.0.attn_q.weight"] == "F16"  # 72 is no multiple of 32 either
    assert types("Q8_0", shapes(hidden=72))["blk.0.attn_q.weight"] == "F16"


def expert_shapes() -> dict[str, tuple[int, ...]]:
    made = shapes()
    for n in range(9):
        for name in ("gate_proj", "up_proj", "down_proj"):
            del made[f"model.layers.{n}.mlp.{name}.weight"]
        made[f"model.layers.{n}.mlp.experts.gate_up_proj"] = (8, 2 * 512, 256)
        made[f"model.layers.{n}.mlp.experts.down_proj"] = (8, 256, 512)
        made[f"model.layers.{n}.mlp.gate.weight"] = (8, 256)
    return made


def test_the_types_of_the_fewest_bits() -> None:
    found = types("IQ2_XS")
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q2_K", "Q5_K")
    assert layers_with(found, "attn_v", "Q2_K") == list(range(9))
    assert layers_with(found, "ffn_down", "Q2_K") == [0]  # 9 // 8
    assert layers_with(found, "attn_q", "IQ2_XS") == list(range(9))
    assert layers_with(types("IQ1_S"), "attn_output", "IQ2_XXS") == list(range(9))
    assert layers_with(types("IQ3_XS"), "ffn_up", "IQ3_S") == [0, 7, 8]  # those between have fewer bits
    assert types("IQ2_XS", shapes(hidden=288))["blk.1.attn_q.weight"] == "IQ4_NL"
    experts = types("MXFP4_MOE", expert_shapes(), model_type="mixtral", num_local_experts=8)
    assert {experts[f"blk.{n}.ffn_up_exps.weight"] for n in range(9)} == {"MXFP4"}
    assert experts["blk.1.attn_q.weight"] == "Q8_0"
    sizes = gguf_sizes(gguf_model(shapes(), config()))
    assert sizes["IQ1_S"] == min(sizes.values())
    assert [name for name in QUANTIZATIONS if needs_imatrix(name)] == [
        "IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
    ]  # fmt: skip


def test_experts() -> None:
    made = expert_shapes()
    found = types("Q4_K_M", made, model_type="mixtral", num_local_experts=8)
    assert {found[f"blk.{n}.ffn_{name}_exps.weight"] for n in range(9) for name in ("gate", "up")} == {"Q4_K"}
    assert layers_with(found, "ffn_down_exps", "Q6_K") == [0, 3, 6, 7, 8]
    assert (found["blk.1.attn_v.weight"], found["blk.1.attn_k.weight"], found["blk.1.attn_output.weight"]) == ("Q8_0", "Q8_0", "Q5_K")
    assert found["blk.1.ffn_gate_inp.weight"] == "F32"
    four = types("Q4_K_M", made, model_type="mixtral", num_local_experts=4)
    assert (four["blk.1.attn_v.weight"], four["blk.1.attn_k.weight"], four["blk.1.attn_output.weight"]) == ("Q4_K", "Q4_K", "Q4_K")


def test_70b_gets_more_bits_for_its_values() -> None:
    made = shapes(layers=80)
    grouped = types("Q4_K_M", made, num_hidden_layers=80, num_key_value_heads=2)
    assert len(layers_with(grouped, "attn_v", "Q5_K")) == 80 - len(layers_with(grouped, "attn_v", "Q6_K"))
    assert layers_with(types("Q4_K_M", made, num_hidden_layers=80), "attn_v", "Q5_K") == []  # 65B: every head has its own


def test_what_cannot_be_known_makes_an_estimate() -> None:
    other = gguf_model(shapes(), config(model_type="unheard_of"))
    assert other.estimated_because
    assert "unheard_of" in other.estimated_because
    assert gguf_bytes(other, "Q4_K_M") == gguf_bytes(gguf_model(shapes(), config()), "Q4_K_M")
    more = gguf_model({**shapes(), "model.layers.0.self_attn.new_proj.weight": (256, 256)}, config())
    assert more.estimated_because
    assert "new_proj" in more.estimated_because
    assert gguf_bytes(more, "Q4_K_M") == gguf_bytes(gguf_model(shapes(), config()), "Q4_K_M") + 2 * 256 * 256


def test_pictures_and_sound_are_left_out_and_rope_factors_added() -> None:
    plain = gguf_model(shapes(), config())
    seeing = {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes().items()}
    seeing["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"] = (64, 64)
    assert gguf_model(seeing, config()).tensors == plain.tensors
    scaled = gguf_model(shapes(), config(rope_parameters={"rope_type": "llama3"}))
    assert gguf_bytes(scaled, "Q6_K") == gguf_bytes(plain, "Q6_K") + 4 * 64 // 2


WEIGHTS = 5 << 20  # as training holds them, in 4 bits


def steps(method: str = "qlora", quantization: str = "Q4_K_M", *, vram_bytes: int | None = None, **ship: Any) -> dict[str, Cost]:
    counted: Any = SimpleNamespace(
        method=method,
        parameters=sum(map(math.prod, shapes().values())),
        trainable_parameters=1000,
        written_parameters=1000,
        weights_bytes=WEIGHTS,
        adapter_bytes=4000,
    )
    settings = {"quantization": quantization, "num_ctx": 1024, "max_new_tokens": 100, **ship}
    recipe = Recipe.model_validate({"model": "m", "ship": settings})
    return {cost.name: cost for cost in costs(Sizes(gguf_model(shapes(), config()), counted, recipe.ship, 900, 2, vram_bytes, 0))}


def costs(sizes: Sizes) -> list[Cost]:
    """Those of every step of the line after training."""
    return [cost for step in LINE if step is not TRAIN for cost in step.costs(sizes)]


def test_the_later_steps_and_what_they_write() -> None:
    made = steps()
    converted = ["convert to F16", "convert to Q8_0", "ask the merged model"]
    closed = "close {}, if it loses too much"
    assert list(made) == [
        *("ask", "merge", *converted, "quantise to Q4_K_M", closed.format("Q4_K_M"), "prove Q4_K_M", "register in Ollama")
    ]
    assert closed.format("Q4_K_M") not in steps(closing_steps=0)
    model = gguf_model(shapes(), config())
    checkpoint, header = 2 * sum(map(math.prod, shapes().values())), HEADER_BYTES_A_TOKEN * 512
    file = gguf_bytes(model, "Q4_K_M") + header
    assert made["merge"].disk_bytes == checkpoint  # where a second is made, the first has gone
    assert made["ask"].read_bytes == made["merge"].read_bytes == checkpoint + 4 * 1000
    assert made["ask the merged model"].read_bytes == made["convert to F16"].disk_bytes
    assert made["convert to F16"].disk_bytes == made["quantise to Q4_K_M"].read_bytes == gguf_bytes(model, "F16") + header
    assert (made["register in Ollama"].disk_bytes, made["register in Ollama"].disk_is) == (file, "Ollama's models")
    assert made["register in Ollama"].read_bytes == 2 * file
    assert {step.disk_is for name, step in made.items() if name != "register in Ollama"} == {"the run folder"}
    assert list(steps(quantization="Q8_0")) == ["ask", "merge", *converted, closed.format("Q8_0"), "prove Q8_0", "register in Ollama"]
    assert steps("lora")["merge"].disk_bytes == steps("full")["copy the trained model"].disk_bytes == checkpoint


def test_more_bits_by_task_are_counted() -> None:
    made, model = steps(bits_by_task=True), gguf_model(shapes(), config())
    assert list(made).index("more bits for Q4_K_M") == list(made).index("quantise to Q4_K_M") + 1
    types = {name: {"Q4_K": "Q5_K", "Q6_K": "Q8_0"}.get(kind, kind) for name, kind in tensor_types(model, "Q4_K_M").items()}
    finer = sum(tensor_bytes(model.tensors[name], kind) for name, kind in types.items())
    assert made["more bits for Q4_K_M"].disk_bytes == finer + round(1.03 * made["quantise to Q4_K_M"].disk_bytes)
    weights = 2 * sum(map(math.prod, shapes().values()))  # and as much of slopes, in place of those of training
    assert made["more bits for Q4_K_M"].peak_ram_bytes == FTKIT_BYTES + 2 * weights - WEIGHTS
    assert list(steps(quantization="Q8_0", bits_by_task=True)) == list(steps(quantization="Q8_0"))


def test_the_adapter_beside_its_base_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = steps(adapter=True)
    assert list(made)[-2:] == ["adapter as GGUF", "register in Ollama"]
    f16 = made["convert to F16"].disk_bytes
    assert made["adapter as GGUF"].disk_bytes == 2 * 4 * 1000 + f16
    assert made["adapter as GGUF"].peak_ram_bytes == FTKIT_BYTES + made["convert to F16"].peak_ram_bytes
    assert "adapter as GGUF" not in steps("full", adapter=True)
    monkeypatch.setattr("ftkit.plan.cost.LOOKED_AT_BYTES", f16 - 1)
    alone = steps(adapter=True)["adapter as GGUF"]
    assert (alone.disk_bytes, alone.peak_ram_bytes) == (2 * 4 * 1000, FTKIT_BYTES + CONVERTER_BYTES + 3 * 4 * 1000)


def test_the_ram_of_the_later_steps() -> None:
    made, large = steps(), gguf_model(shapes(vocabulary=1 << 20), config(vocab_size=1 << 20))
    cache = 9 * 2 * 256  # keys and values of nine layers
    row = 2 * (900 + 100) * (cache + 4 * 512 + 6 * 256)
    asking = WEIGHTS + 4000 + 8192 // 1000 * row
    assert (made["ask"].peak_ram_bytes, made["ask"].vram_bytes) == (FTKIT_BYTES + asking, 0)
    on_cuda = steps(vram_bytes=24 << 30)["ask"]
    assert (on_cuda.peak_ram_bytes, on_cuda.vram_bytes) == (FTKIT_BYTES, asking)
    assert steps(vram_bytes=asking - 1)["ask"].vram_bytes == WEIGHTS + 4000 + 4 * row  # half of the batch
    assert steps("full")["ask"].peak_ram_bytes == FTKIT_BYTES + 2 * sum(map(math.prod, shapes().values())) + 8 * row
    f16 = made["convert to F16"].disk_bytes
    assert made["ask the merged model"].peak_ram_bytes == FTKIT_BYTES + LLAMA_CPP_BYTES + f16 + 2 * 1024 * cache
    left_out = {"ask", "ask the merged model", "close Q4_K_M, if it loses too much", "prove Q4_K_M", "register in Ollama"}
    assert {name for name, step in made.items() if not step.needed} == left_out
    rows = 2 * max(LEAST_ROWS, ROWS_ELEMENTS // 512) * 512
    assert steps("lora")["merge"].peak_ram_bytes == FTKIT_BYTES + 4 * 1000 + 12 * rows
    assert made["merge"].peak_ram_bytes == FTKIT_BYTES + 4 * 1000 + 12 * rows + 18 * 256 * 512  # onto the dequantised base
    half = gguf_model(shapes(vocabulary=1 << 19), config(vocab_size=1 << 19))
    assert quantize_bytes(half, "Q4_K_M") == QUANTIZE_BYTES + (4 + Q6_K) * (1 << 19) * 256  # the output, in Q6_K
    assert quantize_bytes(large, "Q4_K_M") == QUANTIZE_BYTES + QUANTIZE_BUFFER_BYTES  # some rows of it at a time
    embedding = (1 << 20) * 256
    vocabulary = CONVERTER_BYTES + CONVERTER_BYTES_A_TOKEN * (1 << 20)
    assert converter_bytes(large, "F16") == vocabulary + (4 + 2) * embedding
    assert converter_bytes(large, "Q8_0") == vocabulary + (4 + 2 * Q8_0) * embedding
    file = made["register in Ollama"].disk_bytes
    assert made["prove Q4_K_M"].peak_ram_bytes == FTKIT_BYTES + LLAMA_CPP_BYTES + file + 2 * 1024 * cache


def test_gemma_4_e4b_is_converted_on_a_machine_of_16_gb() -> None:
    """Its table of every layer's embeddings alone would take 17 GB in float32 and 16 bits; it is written some rows at a time."""
    names = {
        "token_embd.weight": (262_144, 2560),
        "per_layer_token_embd.weight": (262_144, 42 * 256),
        "blk.0.ffn_up.weight": (10_240, 2560),
    }
    e4b = GgufModel("gemma4", names, frozenset(), 42, 262_144, 2560, 4, 0, None)
    for kind in ("F16", "Q8_0"):
        assert converter_bytes(e4b, kind) < 5 << 30
        assert converter_bytes(replace(e4b, architecture="gemma3n"), kind) > 16 << 30  # whose conversion fills it up


def read_types(path: Path) -> dict[str, tuple[str, int]]:
    """(type, bytes) of each tensor in a file."""
    return {str(tensor.name): (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in open_gguf(path).tensors}


def planned_types(folder: Path, quantization: str) -> dict[str, tuple[str, int]]:
    """The same, planned from the config alone."""
    read = load_config(folder)
    made = {name: tuple(parameter.shape) for name, parameter in meta_model(read).named_parameters()}
    model = gguf_model(made, read)
    assert model.estimated_because is None
    found = {name: (kind, tensor_bytes(model.tensors[name], kind)) for name, kind in tensor_types(model, quantization).items()}
    assert gguf_bytes(model, quantization) == sum(size for _, size in found.values())
    return found


@pytest.mark.e2e
def test_the_demos_files_to_the_byte(demo_run: Path, tmp_path: Path) -> None:
    (merged,) = demo_run.glob("merge-*/model")
    files = {path.stem.rpartition("-")[2]: path for path in demo_run.glob("[gq]*-*/*.gguf")}
    assert {"F16", "Q8_0", "Q4_K_M"} <= set(files)
    program = llama_cpp.find_program("llama-quantize")
    assert program
    files["Q6_K"] = tmp_path / "Q6_K.gguf"
    gguf_files.quantize(files["F16"], files["Q6_K"], "Q6_K", program)
    for quantization, path in files.items():
        planned = planned_types(merged, quantization)
        assert planned == read_types(path)
        header = path.stat().st_size - sum(size for _, size in planned.values())
        assert 0 < header < HEADER_BYTES_A_TOKEN * 49152


QUANTISED = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "IQ4_NL")


@pytest.mark.e2e
def test_a_random_model_to_the_byte(demo_run: Path, tmp_path: Path) -> None:
    """Seventeen layers, grouped heads, an untied head, biases and scaled rotary embeddings, through the real programs."""
    program = llama_cpp.find_program("llama-quantize")
    assert program
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256}  # fmt: skip
    folder = tiny.make_model(
        tmp_path / "model", vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=17, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True, rope_parameters=rope,
    )  # fmt: skip
    known = open_weights(locate(str(next((REPOSITORY / "demo").glob("*.gguf"))), REPOSITORY)).folder
    assert known
    for file in known.glob("token*"):  # the converter wants a tokenizer that it knows
        shutil.copyfile(file, folder / file.name)
    files = {quantization: tmp_path / f"{quantization}.gguf" for quantization in ("F16", "Q8_0", *QUANTISED)}
    gguf_files.convert(folder, {quantization: files[quantization] for quantization in ("F16", "Q8_0")}, llama_cpp.need_converter())
    for quantization, path in files.items():
        if not path.exists():
            gguf_files.quantize(files["F16"], path, quantization, program)
        assert read_types(path) == planned_types(folder, quantization)


def write_f16(model: GgufModel, path: Path, *, heads: int, keys: int) -> None:
    """A file with these tensors, all zero."""
    writer = GGUFWriter(path, model.architecture)
    for name in ("context_length", "embedding_length", "feed_forward_length"):
        getattr(writer, f"add_{name}")(64)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(1e-5)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    for name, shape in model.tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32 if converted_type(name, shape, "F16") == "F32" else np.float16))
    finish(writer)


def write_imatrix(model: GgufModel, path: Path) -> None:
    """As llama-imatrix writes it: every column counts alike."""
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape in model.tensors.items():
        if len(shape) > 1:
            experts = shape[0] if len(shape) == 3 else 1
            writer.add_tensor(f"{name}.in_sum2", np.ones((experts, shape[-1]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((experts, 1), np.float32))
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.e2e
def test_every_type_as_llama_quantize_plans_it(tmp_path: Path) -> None:
    """With an importance matrix and without: `--dry-run` tells the type of each tensor, and whether a matrix is wanted."""
    program = llama_cpp.find_program("llama-quantize")
    assert program
    kinds = {
        "tied": (gguf_model(shapes(layers=17, tied=True), config(num_hidden_layers=17, num_key_value_heads=1)), 1),
        "narrow": (gguf_model(shapes(hidden=288), config(hidden_size=288)), 4),
        "experts": (gguf_model(expert_shapes(), config(model_type="mixtral", num_local_experts=8)), 4),
    }
    for kind, (model, keys) in kinds.items():
        path, matrix = tmp_path / f"{kind}.gguf", tmp_path / f"{kind}.imatrix"
        write_f16(model, path, heads=4, keys=keys)
        write_imatrix(model, matrix)
        for quantization in QUANTIZATIONS:
            needed = needs_imatrix(quantization)
            for imatrix in (True,) if needed else (False, True) if quantization in WITH_MATRIX else (False,):
                if quantization in CONVERTED:
                    continue
                how = ["--imatrix", str(matrix)] if imatrix else []
                said = subprocess.run([program.path, "--dry-run", *how, path, quantization], capture_output=True, text=True, check=True)
                found = re.findall(r"\] +(\S+) +- \[.*\], type = +(\w+), size = .*?(?:\((\w+)\))?\n", said.stdout + said.stderr)
                told = {name: (new or old).upper() for name, old, new in found}
                assert told == tensor_types(model, quantization, imatrix=imatrix), (kind, quantization, imatrix)
        assert gguf_files.takes(program, quantization)
    asked = subprocess.run([program.path, "--dry-run", tmp_path / "tied.gguf", "IQ2_XS"], capture_output=True, text=True, check=True)
    assert "will require an imatrix" in asked.stdout + asked.stderr
    assert not gguf_files.takes(program, "IQ9_S")


def test_asking_is_no_reason_to_refuse() -> None:
    """A card of 12 GiB beside 16 GiB of RAM trains Llama 3.1's 8 billion parameters with QLoRA, and ships them."""
    from transformers import LlamaConfig

    from ftkit.line.shortage import ram_shortage

    llama = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    made = {name: tuple(parameter.shape) for name, parameter in meta_model(llama).named_parameters()}
    counted: Any = SimpleNamespace(
        method="qlora",
        parameters=sum(map(math.prod, made.values())),
        trainable_parameters=42 << 20,
        written_parameters=42 << 20,
        weights_bytes=5437 << 20,
        adapter_bytes=160 << 20,
    )
    recipe = Recipe.model_validate({"model": "m"})
    steps = costs(Sizes(gguf_model(made, llama), counted, recipe.ship, 2048, 2, 12 << 30, 0))
    assert ram_shortage(steps, 16 << 30) is None
    assert max(step.vram_bytes for step in steps) < 12 << 30
    short = ram_shortage(steps, 3 << 30)
    assert short
    assert (short.step, short.what) == ("convert to Q8_0", "RAM")  # what makes a file does refuse


def llama_8b(ram_bytes: int, vram_bytes: int | None, **ship: Any) -> Sizes:
    """Of Llama 3.1 with 8 billion parameters, rows of 512 tokens, and an adapter of 40 million."""
    made = shapes(vocabulary=128256, hidden=4096, intermediate=14336, layers=32, keys=1024)
    counted: Any = SimpleNamespace(method="qlora", parameters=sum(map(math.prod, made.values())), written_parameters=40_000_000)
    llama = config(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
    recipe = Recipe.model_validate({"model": "m", "ship": {"quantization": "Q4_K_M", **ship}})
    return Sizes(gguf_model(made, llama), counted, recipe.ship, 512, 2, vram_bytes, 0, ram_bytes, 2 if vram_bytes else 4)


def closed(ram_bytes: int, vram_bytes: int | None = None) -> Cost:
    """What closing its Q4_K_M file costs a machine."""
    (cost,) = of_closing(llama_8b(ram_bytes, vram_bytes, closing_steps=60))
    return cost


def test_a_file_is_closed_by_the_way_that_there_is_room_for() -> None:
    whole, card, small, packed = closed(64 << 30), closed(64 << 30, 24 << 30), closed(8 << 30, 6 << 30), closed(8 << 30, 4 << 30)
    weights, file = 8_030_261_248, 4_920_000_000  # a Q4_K_M of Llama 3.1 8B, to be downloaded
    assert (whole.name, card.name) == ("close Q4_K_M", "close Q4_K_M")
    assert whole.peak_ram_bytes > 4 * weights
    assert 2 * weights < card.vram_bytes < 24 << 30
    assert small.name == f"close Q4_K_M, its weights {WAYS['packed']}"
    assert packed.name == f"close Q4_K_M, its weights {WAYS['mapped']}"
    assert file * 0.9 < small.vram_bytes < 6 << 30
    assert packed.vram_bytes < 3 << 30
    on_cpu = closed(16 << 30)
    assert on_cpu.name == f"close Q4_K_M, its weights {WAYS['mapped']}"
    assert file < on_cpu.peak_ram_bytes < 9 << 30
    assert not any(cost.needed for cost in (whole, card, small, packed, on_cpu))
    assert of_closing(llama_8b(1 << 30, None)) == ()  # which the recipe does not ask for: without room it is left out
    (if_needed,) = of_closing(llama_8b(64 << 30, None))
    assert (if_needed.name, if_needed.needed, if_needed.if_needed) == ("close Q4_K_M, if it loses too much", False, True)


def test_what_closing_takes_is_not_known_of_layers_without_names() -> None:
    known = llama_8b(64 << 30, None, closing_steps=60, transfer_steps=40)
    nameless = replace(known.gguf, tensors={f"other.{name}": shape for name, shape in known.gguf.tensors.items()})
    assert of_closing(known)
    assert of_transferring(known)
    assert of_closing(replace(known, gguf=nameless)) == of_transferring(replace(known, gguf=nameless)) == ()


def test_fitting_the_adapter_is_planned_where_it_is_fitted() -> None:
    assert of_transferring(llama_8b(64 << 30, None)) == ()
    weights = 8_030_261_248
    (on_cpu,), (on_card,) = (of_transferring(llama_8b(64 << 30, vram, transfer_steps=40)) for vram in (None, 24 << 30))
    assert 4 * weights < on_cpu.peak_ram_bytes < 4.6 * weights
    assert (on_cpu.vram_bytes, on_card.peak_ram_bytes < 1 << 30) == (0, True)
    assert 2 * weights + 13 * 160_000_000 < on_card.vram_bytes < 21 << 30


def test_closing_is_refused_before_the_long_work_where_no_way_fits() -> None:
    from ftkit.line.shortage import ram_shortage, refuse_shortages, vram_shortage

    hungry, other = closed(1 << 30), Cost("merge", 0, 0, 0, "the run folder", 0)
    short = ram_shortage([hungry, other], 1 << 30)
    assert short
    assert (short.step, hungry.needed) == (hungry.name, True)
    with pytest.raises(DoesNotFitError, match=r"`close Q4_K_M.*of RAM") as caught:
        refuse_shortages([short])
    assert "ship.closing_steps=0" in str(caught.value.hint)
    card = Device("cuda", "A card", 1 << 30, 1 << 30)
    starved = vram_shortage([closed(64 << 30, 1 << 30), other], card)
    assert starved
    assert starved.what == "A card"
    assert vram_shortage([closed(64 << 30, 24 << 30), other], replace(card, total_bytes=24 << 30)) is None

"""Each architecture's tiny model through the line, down to its F32 GGUF in llama.cpp; and the table of it in docs/families.md.

python tests/architectures.py            all of them, and writes the table
python tests/architectures.py NAME ...   some of them, and prints what each step gave
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import families

from ftkit.machine import packages

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
HEADS = {"targets": "adapters"}
COLUMNS = ("plan", "targets", "rows", "train", "merge", "convert", "logits", "prompts", "close")
MAX_KL = 1e-5  # nats a token, of llama.cpp's F32 file from transformers' float32 model
MAX_ROUNDED_KL = 2e-3  # the same of a Q8_0 file in both: llama.cpp rounds activations to 8 bits, too
NOT_LEARNT = {"rope_freqs.weight"}  # a vector of the file that is no number of the model's
MOVED, STRETCHED = 0.1, 0.05  # by how much what closing trains is moved: of the mean size of a vector's numbers; of logarithms of scales
TEXT = "The quick brown fox jumps over the lazy dog. Ünder 42 bridges, sie sagte: «Это дом» – and then\n\n  def f(x): return x ** 2\n"
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(1, 9)
] + [
    {"messages": [
        {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Green."},
    ]},
]  # fmt: skip


def starcoder(*words: str) -> dict[str, str]:
    """Control tokens of StarCoder's vocabulary under the names that a template writes."""
    spare = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>", "<file_sep>", "<issue_start>", "<issue_comment>",
             "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<pr>",
             "<pr_status>", "<pr_is_merged>", "<pr_base>", "<pr_file>", "<pr_base_code>", "<pr_diff>", "<pr_diff_hunk>")  # fmt: skip
    return dict(zip(spare, words, strict=False))


@dataclass(frozen=True)
class Architecture:
    """`chat`: the tokenizer and the template that it wears, a family's own where llama.cpp carries them; `settings`: of the recipe."""

    name: str
    model_type: str
    chat: families.Family
    sizes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    towers: dict[str, Any] = field(default_factory=dict)  # configs beside the text model's, which then is one of several
    published: dict[str, Any] = field(default_factory=dict)  # keys of config.json that transformers 5.23 writes otherwise; ...: leaves out


def chat(template: str, eos: str, ends: str, *words: str, bos: str | None = None, **says: Any) -> families.Family:
    """A template on StarCoder's vocabulary, whose control tokens get its words."""
    return families.Family(template, "starcoder", template, "llama", eos, ends, bos, starcoder(*words), says=says)


END = "<|endoftext|>"
CHATML = chat("", END, "<|im_end|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
BASE = {"data.template": "plain"}
AS_CHATML = {"data.template": "chatml"}
MISTRAL = chat(
    "mistralai-Mistral-Nemo-Instruct-2407", "</s>", "</s>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", bos="<s>",
)  # fmt: skip
MINISTRAL = chat(
    "mistralai-Ministral-3-14B-Reasoning-2512", "</s>", "</s>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    bos="<s>",
)  # fmt: skip
GRANITE = chat("ibm-granite-granite-3.3-2B-Instruct", "<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>",
               "<|end_of_text|>", "<|tool_call|>")  # fmt: skip
GRANITE_4 = replace(GRANITE, template="ibm-granite-granite-4.0")
SMOLLM3 = replace(CHATML, template="HuggingFaceTB-SmolLM3-3B", eos="<|im_end|>")
LFM2 = chat("LFM2.5-Instruct", "<|im_end|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|startoftext|>", "<think>", "</think>",
            bos="<|startoftext|>")  # fmt: skip
NEMOTRON = chat("NVIDIA-Nemotron-Nano-v2", "<SPECIAL_12>", "<SPECIAL_12>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<think>",
                "</think>", "<s>", bos="<s>")  # fmt: skip
GLM = chat("GLM-4.6", END, "<|user|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>",
           "</think>", "<|endofprompt|>", "/nothink")  # fmt: skip
GPT_OSS = chat("openai-gpt-oss-120b", "<|return|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|channel|>",
               "<|call|>", "<|constrain|>", "<|startoftext|>")  # fmt: skip
SEED = chat("ByteDance-Seed-OSS", "<seed:eos>", "<seed:eos>", "<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>", "<seed:pad>",
            bos="<seed:bos>")  # fmt: skip
COHERE = chat(
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_THINKING|>",
    "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>", bos="<BOS_TOKEN>",
)  # fmt: skip
APERTUS = chat(
    "Apertus-8B-Instruct", "</s>", "<|assistant_end|>", "<s>", "</s>", "<|system_start|>", "<|system_end|>", "<|developer_start|>",
    "<|developer_end|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|inner_prefix|>",
    "<|inner_suffix|>", "<|tools_prefix|>", "<|tools_suffix|>", bos="<s>",
)  # fmt: skip
LLAMA_2 = families.Family(
    "Llama 2", "llama-spm", "", "llama", "</s>", "</s>", "<s>", says={"add_bos_token": True, "add_prefix_space": True}
)
FALCON = families.Family("Falcon", "falcon", "", "falcon", END, END)
QWEN_3_5 = families.Family(
    "Qwen 3.5", "qwen35", "Qwen3.5-4B", "qwen3_5_text", END, "<|im_end|>",
    tokens={"[PAD151667]": "<think>", "[PAD151668]": "</think>", "[PAD151657]": "<tool_call>", "[PAD151658]": "</tool_call>"},
)  # fmt: skip
by_name = families.by_name
FAST = ("Phi 3", "Mixtral", "Granite 4", "LFM2", "Falcon-H1", "DeepSeek V2", "Nemotron 3, experts", "GLM-4.7 Flash")  # which CI runs

UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 2, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}


def sliding(layers: int, **sizes: Any) -> dict[str, Any]:
    """Attention to a window in all layers but the last, as llama.cpp takes for granted of some families."""
    kinds = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    return {"sliding_window": 64, "num_hidden_layers": layers, "layer_types": kinds, **sizes}


NEMOTRON_SIZES = {
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "head_dim": 32, "num_hidden_layers": 3, **UNTIED,
}  # fmt: skip
TOWER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
E4B = {
    "head_dim": 32, "global_head_dim": 64, "sliding_window": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 262144,
    "initializer_range": 0.08,  # llama.cpp's GELU is a table in 16 bits; larger random weights make its errors large
}  # fmt: skip

ARCHITECTURES = (
    Architecture("Llama 2", "llama", LLAMA_2, settings=BASE),
    Architecture("Llama 3", "llama", by_name("Llama 3.1")),
    Architecture("Llama 4 (text)", "llama4_text", CHATML, {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 32,
                 "interleave_moe_layer_step": 2, "attention_chunk_size": 512, "num_hidden_layers": 4}, AS_CHATML),
    Architecture("Mistral", "mistral", MISTRAL, {"head_dim": 32}),
    Architecture("Ministral 3", "ministral3", MINISTRAL, {"head_dim": 32}),
    Architecture("Mixtral", "mixtral", MISTRAL, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Qwen 2", "qwen2", by_name("Qwen 2.5")),
    Architecture("Qwen 3", "qwen3", by_name("Qwen 3"), {"head_dim": 32}),
    Architecture("Qwen 3, experts", "qwen3_moe", by_name("Qwen 3"), {"head_dim": 32, **EXPERTS, "norm_topk_prob": True}),
    Architecture("Qwen 3 Next", "qwen3_next", by_name("Qwen 3"), {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64}),
    Architecture("Qwen 3.5", "qwen3_5_text", QWEN_3_5, LINEAR),
    Architecture("Qwen 3.5, experts", "qwen3_5_moe_text", QWEN_3_5, {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64}),
    Architecture("Gemma 2", "gemma2", by_name("Gemma 2"), {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    Architecture("Gemma 3 (text)", "gemma3_text", by_name("Gemma 2"), sliding(6, head_dim=32, query_pre_attn_scalar=32)),
    Architecture("Gemma 3, with a tower", "gemma3", by_name("Gemma 2"), sliding(6, head_dim=32, query_pre_attn_scalar=32),
                 towers={"vision_config": {**TOWER, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}),
    Architecture("Gemma 3n (text)", "gemma3n_text", by_name("Gemma 2"), sliding(
                 5, head_dim=32, hidden_size_per_layer_input=256, vocab_size_per_layer_input=262144, num_kv_shared_layers=0,
                 activation_sparsity_pattern=[0.95] * 5, intermediate_size=4096)),
    Architecture("Gemma 4 E4B (text)", "gemma4_text", by_name("Gemma 4"), E4B),
    Architecture("Gemma 4 E4B, with towers", "gemma4", by_name("Gemma 4"), E4B, towers={
        "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 32}, "audio_config": {"num_hidden_layers": 1}}),
    Architecture("Phi 3", "phi3", by_name("Phi 3.5")),
    Architecture("Phi 4", "phi3", replace(CHATML, says={"tokenizer_class": "GPT2Tokenizer"}), settings=AS_CHATML),
    Architecture("SmolLM 3", "smollm3", SMOLLM3),
    Architecture("OLMo 2", "olmo2", CHATML, UNTIED, AS_CHATML),
    Architecture("OLMo 3", "olmo3", CHATML, sliding(4, **UNTIED), AS_CHATML),
    Architecture("Granite 3", "granite", GRANITE),
    Architecture("Granite 3, experts", "granitemoe", GRANITE, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Granite 4", "granitemoehybrid", GRANITE_4, {**MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2,
                 "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
                 published={"layer_types": ["mamba", "attention"]}),
    Architecture("LFM2", "lfm2", LFM2, {"layer_types": ["conv", "full_attention"]}),
    Architecture("LFM2, experts", "lfm2_moe", replace(LFM2, template="LFM2-8B-A1B"), {**EXPERTS,
                 "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Architecture("Falcon-H1", "falcon_h1", CHATML, {**MAMBA, **UNTIED, "mamba_d_ssm": 128, "head_dim": 32, "embedding_multiplier": 5.66,
                 "lm_head_multiplier": 0.5, "key_multiplier": 0.39, "attention_out_multiplier": 0.94, "mlp_multipliers": [0.88, 0.59],
                 "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.24, "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.35]}, AS_CHATML),
    Architecture("Nemotron-H", "nemotron_h", NEMOTRON, {**NEMOTRON_SIZES, "layers_block_type": ["mamba", "attention", "mlp"]},
                 published={"layers_block_type": ..., "hybrid_override_pattern": "M*-"}),
    Architecture("Nemotron 3, experts", "nemotron_h", NEMOTRON, {**NEMOTRON_SIZES, "layers_block_type": ["mamba", "attention", "moe"],
                 "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64},
                 published={"layers_block_type": ..., "hybrid_override_pattern": "M*E"}),
    Architecture("GLM-4", "glm4", GLM, {"head_dim": 32}),
    Architecture("GLM-4.7 Flash", "glm4_moe_lite", replace(GLM, template="GLM-4.7-Flash"), {**LATENT, "scoring_func": "sigmoid"}),
    Architecture("DeepSeek V2", "deepseek_v2", CHATML, {**LATENT, "topk_method": "greedy"}, AS_CHATML),
    Architecture("gpt-oss", "gpt_oss", GPT_OSS, {
        "num_local_experts": 2, "num_experts_per_tok": 2,  # all of them: its positions differ by 1e-6, which is enough to choose another
        **sliding(2, head_dim=32, max_position_embeddings=131072, **UNTIED)}),
    Architecture("ERNIE 4.5", "ernie4_5", LLAMA_2, {"head_dim": 32}, BASE),
    Architecture("EXAONE 4", "exaone4", CHATML, {"sliding_window": None, "layer_types": ["full_attention"] * 2}, AS_CHATML,
                 published={"sliding_window": None}),
    Architecture("Hunyuan", "hunyuan_v1_dense", CHATML, {"head_dim": 32}, AS_CHATML),
    Architecture("Seed-OSS", "seed_oss", SEED, {"head_dim": 32}),
    Architecture("Cohere 2", "cohere2", COHERE, sliding(4, rotary_pct=1.0)),
    Architecture("Apertus", "apertus", APERTUS, UNTIED),
    Architecture("Arcee", "arcee", CHATML, settings=AS_CHATML),
    Architecture("StarCoder 2", "starcoder2", CHATML, settings=BASE),
    Architecture("StableLM", "stablelm", CHATML, UNTIED, AS_CHATML),
    Architecture("GPT-NeoX", "gpt_neox", CHATML, settings=BASE, published={"rotary_pct": 0.25}),
    Architecture("Falcon", "falcon", FALCON, {"multi_query": True, "num_kv_heads": 1, "new_decoder_architecture": False, "alibi": False},
                 BASE),
)  # fmt: skip


def make_model(architecture: Architecture, folder: Path) -> Path:
    """Weights that differ more than trained ones do, norms and biases too, so that no tensor can be wrong unseen."""
    import torch
    import transformers

    ids = families.make_tokenizer(architecture.chat, folder)
    given = {**families.SIZES, "num_hidden_layers": 2, "initializer_range": 0.15, **architecture.sizes, **ids}
    if architecture.towers:
        given = {"text_config": given, **architecture.towers, **{key: ids[key] for key in ids if key != "vocab_size"}}
    config = transformers.CONFIG_MAPPING[architecture.model_type](**given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.ndim == 2 and (empty := (parameter == 0).all(-1)).any():  # of the token that pads, which also ends answers
                parameter[empty] = 0.1 * torch.randn_like(parameter[empty])
    model.to(torch.bfloat16).save_pretrained(folder)
    written = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **architecture.published}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not ...}), encoding="utf-8")
    return folder


def run(architecture: Architecture, folder: Path, told: Callable[[str, str], None]) -> None:
    """Take it through the line; `told` gets each column's words as soon as they are known. Raises what a step raises."""
    from ftkit.data.rows import Row
    from ftkit.engines import llamacpp
    from ftkit.gguf import files as gguf
    from ftkit.line.gguf import corrections_of
    from ftkit.line.job import open_job, read_data, tokenizer_of
    from ftkit.line.line import train
    from ftkit.line.merge import MERGE, MODEL
    from ftkit.line.plan import PLAN, recorded
    from ftkit.line.prove import own_prompts, proof_checks
    from ftkit.line.step import ensure
    from ftkit.machine.llama_cpp import find_program, need_converter
    from ftkit.report.parts import share

    base = make_model(architecture, folder / "base")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    recipe = {
        "model": str(base),
        "data": {"train": "train.jsonl"},
        "training": {"method": "qlora", "max_steps": 2, "effective_batch_size": 2, "max_length": 1024, "learning_rate": 1e-2},
        "lora": {"r": 4},
        "ship": {"name": "tiny", "quantization": "F16", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 2048},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = open_job(folder, list(architecture.settings.items()))
    with job.run:
        ensure(job, PLAN)
        planned = recorded(job.run)
        assert planned
        told("plan", "✔")
        inventory = planned.memory.chosen.inventory
        told("targets", share(inventory.layer_parameters - sum(inventory.without_adapter.values()), inventory.layer_parameters))
        rows = read_data(job)
        assert planned.tokens
        told("rows", f"✔ {planned.tokens.rows}")
        train(job)
        told("train", "✔")
        merged = ensure(job, MERGE)
        told("merge", "✔")
        path, tokenizer = folder / "tiny-F32.gguf", tokenizer_of(job, merged.folder / MODEL)
        gguf.convert(merged.folder / MODEL, {"F32": path}, need_converter())
        told("convert", "✔")
        divergence = kl(merged.folder / MODEL, path)
        told("logits", ("✔ " if divergence <= MAX_KL else "✘ ") + f"{divergence:.1e}")
        gguf.correct(path, corrections_of(path, tokenizer, merged.result.stops))
        asked = [row.question for row in rows.test] or [Row(tuple(ROWS[0]["messages"]), 1).question]
        with llamacpp.load(path, 2048) as engine:
            checks = proof_checks(tokenizer, engine, rows.train, asked, merged.result.stops, own_prompts(tokenizer, engine))
        failed = [check for check in checks if check.outcome == "failed"]
        told("prompts", f"✘ {failed[0].words}" if failed else "✔")
        quantiser, quantised = find_program("llama-quantize"), folder / "tiny-Q8_0.gguf"
        assert quantiser, "ftkit setup llama.cpp comes first"
        gguf.quantize(path, quantised, "Q8_0", quantiser)
        told("close", closes(merged.folder / MODEL, quantised))


def kl(model: Path, path: Path) -> float:
    """Mean over the tokens of a text of KL(transformers ‖ llama.cpp), over the full vocabulary, in nats."""
    import torch

    from ftkit.engines import hf
    from ftkit.errors import ToolFailedError
    from ftkit.machine.llama_cpp import find_program
    from ftkit.model.source import open_gguf

    program = find_program("llama-results", None)
    assert program, "ftkit setup llama.cpp comes first"
    text, out = path.with_suffix(".txt"), path.with_suffix(".results")
    text.write_text(TEXT, encoding="utf-8")
    exact = ["-t", "1", "-c", "512", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    done = subprocess.run([program.path, "-m", path, "-f", text, "-o", out, *exact], capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.search(r"error loading model: .*|GGML_ASSERT.*", done.stderr + done.stdout)
        raise ToolFailedError(f"llama.cpp: {said[0] if said else f'exit code {done.returncode}'}")
    found = {tensor.name: tensor.data for tensor in open_gguf(out).tensors}
    ids = torch.tensor(found["tokens"].reshape(1, -1).astype("int64"))
    theirs = torch.tensor(found["logits"].reshape(ids.shape[1], -1))
    with torch.inference_mode():
        ours = hf.load_model(model, None, dtype="float32", cuda=False)(input_ids=ids).logits[0].double()
    return float(kls(ours, theirs).mean())


def kls(p: Any, q: Any) -> Any:
    """KL(p ‖ q) at each place of logits (places, vocabulary), in nats."""
    p, q = p.double().log_softmax(-1), q[:, : p.shape[-1]].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def closes(model: Path, path: Path) -> str:
    """The cell of a quantised file of a model: how many vectors and matrices' scales closing trains, or why it does not.

    All of them are moved and written back; llama.cpp says of the written file what transformers says, as it did of the file before.
    """
    import torch

    from ftkit.close.student import load_student, lossless, running, scales, write_back
    from ftkit.engines import logits
    from ftkit.errors import ModelError
    from ftkit.model.source import open_gguf

    try:
        student = load_student(path, model, bfloat16=False, cuda=False)
    except ModelError as error:
        return "✘ " + error.message.replace(path.name, "the file")
    vectors, stretched, target = lossless(student, path), scales(student, path), path.with_suffix(".moved.gguf")
    vocabulary = student.get_input_embeddings().weight.shape[0]
    row = logits.Forced([(7919 * n + 11) % vocabulary for n in range(48)], list(range(1, 49)))

    def in_torch() -> Any:
        with running(student):
            return torch.from_numpy(next(logits.of_model(student, [row])))

    def in_llama_cpp(file: Path) -> Any:
        return torch.from_numpy(next(logits.of_file(file, [row])))

    def apart(p: Any, q: Any) -> float:
        return float(kls(p, q).median())  # where rounding has a token go to another expert, it says nothing

    before, first = in_llama_cpp(path), in_torch()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for vector in vectors:
            vector.parameter.add_(MOVED * vector.scale * torch.randn(vector.parameter.shape, generator=noise))
        for one in stretched:
            one.stretch.add_(STRETCHED * torch.randn(one.stretch.shape, generator=noise))
    write_back(path, vectors, stretched, target)
    after, then = in_llama_cpp(target), in_torch()
    target.unlink()
    if (found := apart(first, before)) > MAX_ROUNDED_KL:
        return f"✘ transformers reads the file otherwise than llama.cpp: KL {found:.1e}"
    if (found := apart(then, after)) > min(MAX_ROUNDED_KL, apart(before, after) / 20):
        return f"✘ the file that is written back is not what was trained: KL {found:.1e} of {apart(before, after):.1e}"
    there = {str(tensor.name) for tensor in open_gguf(path).tensors if len(tensor.shape) == 1} - NOT_LEARNT
    of = f" of {len(there)}" if there - {vector.name for vector in vectors} else ""
    try:
        load_student(path, model, "mapped", bfloat16=False, cuda=False)
    except ModelError as error:
        if not re.search("packed weights are not computed with|are columns in the file", error.message):
            raise
        return f"✔ {len(vectors)}{of} + {len(stretched)}, in full"
    return f"✔ {len(vectors)}{of} + {len(stretched)}"


def run_apart(chosen: Sequence[Architecture]) -> Iterator[tuple[str, dict[str, str]]]:
    """Names and cells of `run`, in a process that llama.cpp may abort: another one then goes on with the next.

    The first column that is not reached holds the reason.
    """
    left = [architecture.name for architecture in chosen]
    while left:
        with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+", encoding="utf-8") as log:
            cells: dict[str, str] = {}
            command = [sys.executable, __file__, "--in", folder, *left]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
                try:
                    for line in process.stdout or ():
                        what, _, said = line.partition(": ")
                        if what == "CELL":
                            column, words = json.loads(said)
                            cells[column] = words
                        elif what == "FAULT":
                            cells[_next(cells)] = f"✘ {said.strip()}"
                        elif what == "DONE":
                            yield left.pop(0), cells
                            cells = {}
                finally:
                    process.kill()  # where nobody asks for the rest
            if left:
                log.seek(0)
                cells[_next(cells)] = f"✘ {log.read()[-300:]}"
                yield left.pop(0), cells


def _next(cells: dict[str, str]) -> str:
    return next(column for column in COLUMNS if column not in cells)


def write_table(made: dict[str, dict[str, str]], seconds: float) -> None:
    """docs/families.md: ✔, a figure, or ✘ with the number of a note."""
    from importlib.metadata import version

    notes: list[str] = []

    def shown(cell: str) -> str:
        if not cell.startswith("✘") or cell[2:3].isdigit():
            return cell
        words = re.sub(r"\s*\$ .*", "", cell[2:]).replace("|", "\\|")
        if words not in notes:
            notes.append(words)
        return f"✘ [{notes.index(words) + 1}]"

    head = ["family", *(HEADS.get(column, column) for column in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {name} | {' | '.join(shown(cells.get(column, '–')) for column in COLUMNS)} |" for name, cells in made.items()]
    listed = "".join(f"\n{n}. {note}" for n, note in enumerate(notes, 1))
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "trl", "bitsandbytes"))
    TABLE.write_text(
        f"""# Families

Made by `make families`, which takes a tiny model of each architecture through the line: random weights, a real tokenizer, the family's
own chat template where llama.cpp carries one. {len(made)} rows in {seconds / 60:.0f} minutes on two cores without a GPU, with {versions},
and llama.cpp {packages.PACKAGES["converter"].version}.

{chr(10).join(lines)}
{listed}

- **plan**: a QLoRA step was traced. **adapters**: the share of the weights in the text model's layers that `all-linear` reaches.
- **rows**: of nine conversations, one of two turns; ten where each answer has a prompt of its own.
- **train**, **merge**, **convert**: two steps, into the 16-bit source, llama.cpp's own converter to F32.
- **logits**: mean KL divergence a token, in nats, of that file in llama.cpp from the merged model in transformers in float32, over the
  whole vocabulary. Above 1e-5 it fails. Around 1e-7 it is llama.cpp's GELU, a table in 16 bits.
- **prompts**: ids of texts, of training rows, of prompts and the ends of answers are those of training.
- **close**: vectors, and matrices whose scales are trained beside them, where the Q8_0 file is closed; all of them were moved and
  written back, and llama.cpp then says what transformers says: the median token's KL divergence is below {MAX_ROUNDED_KL:g} nats, which is
  llama.cpp's rounding of activations to 8 bits, and below a twentieth of what the file moved. *n of m*: the file has more vectors.
  *in full*: only where memory has room for the dequantised weights, as they cannot be computed with as they lie in the file.
- **–**: not reached.
""",
        encoding="utf-8",
    )


def _inside(folder: Path, names: Sequence[str]) -> None:
    from ftkit.errors import FtkitError

    def told(column: str, words: str) -> None:
        print("CELL: " + json.dumps((column, words)), flush=True)

    for name in names:
        try:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                run(next(a for a in ARCHITECTURES if a.name == name), Path(own), told)
        except FtkitError as error:
            print("FAULT: " + " ".join(error.message.split()))
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print("DONE: ", flush=True)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--in"]:
        _inside(Path(arguments[1]), arguments[2:])
        return 0
    chosen = [architecture for architecture in ARCHITECTURES if not arguments or architecture.name in arguments]
    began = time.monotonic()

    def these(part: Sequence[Architecture]) -> dict[str, dict[str, str]]:
        made = {}
        for name, cells in run_apart(part):
            made[name] = cells
            print(name, *(f"{column}: {cells.get(column, '–')}" for column in COLUMNS), sep="\n  ", flush=True)
        return made

    with ThreadPoolExecutor(2) as threads:  # each waits for a process
        first, second = threads.map(these, (chosen[::2], chosen[1::2]))
    if not arguments:
        made = first | second
        write_table({architecture.name: made[architecture.name] for architecture in chosen}, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))

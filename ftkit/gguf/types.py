"""Which type each tensor of a GGUF file gets, and how large the file is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.recipe import QUANTIZATIONS

# transformers' model_type → the converter's architecture, for those whose sizes were compared with the real programs.
ARCHITECTURES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma4_text": "gemma4", "granite": "granite", "llama": "llama",
    "mistral": "llama", "mixtral": "llama", "olmo2": "olmo2", "olmo3": "olmo2", "phi3": "phi3", "qwen2": "qwen2", "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "smollm3": "smollm3",
}  # fmt: skip
CONVERTED = ("F16", "BF16", "Q8_0")  # ftkit has the converter write these; llama-quantize makes the others of the F16 file
NO_TEXT = re.compile(r"visual\.|vision[._]|audio[._]|projector\.")  # left out of the file: TextModel.filter_tensors

# What follows is llama.cpp's src/llama-quant.cpp, without its rules for types that the recipe does not know and for Falcon.
# tensor_allows_quantization: what keeps the type of the F16 file, beside tensors of one dimension and what is no weight
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv\.weight|position_embd|token_types"
)
# conversion/base.py, prepare_tensors: what the F16 file has in F32, beside tensors of one dimension and what is no weight
FLOAT32 = re.compile(r"_norm\.weight|ffn_gate_inp(_shexp)?\.weight|altup_(correct|predict)_coef|ssm_conv1d|shortconv\.conv|position_embd")
# tensor_get_category: the roles that a rule below treats apart
ROLES = {
    "attn_qkv.weight": "attn_v", "attn_kv_b.weight": "attn_v", "attn_v.weight": "attn_v", "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q", "attn_output.weight": "attn_output", "ffn_up": "ffn_up", "ffn_gate": "ffn_gate", "ffn_down": "ffn_down",
}  # fmt: skip
# Of each type, where in a block its scales stand in float16, in bytes (ggml-common.h). MXFP4's are powers of two, IQ1_M's lie in pieces.
SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q4_1": (0, 2), "Q5_1": (0, 2),  # and the least number
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_XS": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# llama_ftype_get_default_type: the type that most tensors get, where it is not the name without its _S, _M or _L
DEFAULTS = {
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "MXFP4_MOE": "MXFP4",
}  # fmt: skip
FEWEST_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # which have rules of their own
# tensor_type_fallback: what a row that is no multiple of 256 gets instead
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
# … and what the table of tokens gets, where it is not the head too
EMBEDDED_AS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_K"),
}  # fmt: skip
# tensor_requires_imatrix: types that llama-quantize does not make of a weight without an importance matrix
WITHOUT_MATRIX_REFUSED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

Where = Callable[[int, int, "GgufModel"], bool]  # (layer, number of layers, model)


def _everywhere(layer: int, layers: int, model: GgufModel) -> bool:
    return True


def _first(count: int) -> Where:
    return lambda layer, layers, model: layer < count


def _first_share(parts: int) -> Where:
    return lambda layer, layers, model: layer < layers // parts


def _between_eighths(layer: int, layers: int, model: GgufModel) -> bool:
    return layers // 8 <= layer < 7 * layers // 8


def _grouped(layer: int, layers: int, model: GgufModel) -> bool:
    return model.queries_per_key >= 4


def _grouped_or_experts(layer: int, layers: int, model: GgufModel) -> bool:
    return model.queries_per_key >= 4 or model.experts >= 4


def _use_more_bits(layer: int, layers: int, model: GgufModel) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


# llama_tensor_get_type_impl: by quantisation and role, the first rule that holds; else the type that the quantisation is named after
Rules = tuple[tuple[Where, str], ...]
RULES: dict[str, dict[str, Rules]] = {
    **{
        name: {
            "attn_v": ((_grouped_or_experts, "Q4_K"), (_everywhere, more)),
            "ffn_down": ((_first_share(8), more),),
            "attn_output": ((_everywhere, output),),
        }
        for name, more, output in (
            ("IQ1_S", "Q2_K", "IQ2_XXS"),
            ("IQ1_M", "Q2_K", "IQ2_XXS"),
            ("IQ2_XXS", "Q2_K", "IQ2_XXS"),
            ("IQ2_XS", "Q2_K", "IQ2_XS"),
            ("IQ2_S", "IQ3_S", "IQ3_S"),
            ("IQ2_M", "IQ3_S", "IQ3_S"),
        )
    },
    "IQ3_XXS": {
        "attn_v": ((_grouped, "Q4_K"),),
        "attn_k": ((_everywhere, "IQ2_S"),),
        "attn_q": ((_everywhere, "IQ2_S"),),
        "attn_output": ((_everywhere, "IQ3_S"),),
    },
    "IQ3_XS": {
        "attn_v": ((_grouped, "Q4_K"),),
        **dict.fromkeys(("attn_k", "attn_q"), ((_everywhere, "IQ3_XXS"),)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), ((_between_eighths, "IQ3_XXS"),)),
    },
    "IQ3_S": {"attn_v": ((_grouped, "Q4_K"),)},
    "IQ3_M": {
        **dict.fromkeys(("attn_v", "attn_output"), ((_everywhere, "Q4_K"),)),
        "ffn_down": ((_first_share(8), "Q4_K"),),
    },
    "Q2_K_S": {"attn_v": ((_grouped, "Q4_K"),), "ffn_down": ((_first_share(8), "Q4_K"),)},
    "Q2_K": {
        "attn_v": ((_grouped, "Q4_K"), (_everywhere, "Q3_K")),
        "ffn_down": ((_everywhere, "Q3_K"),),
        "attn_output": ((_everywhere, "Q3_K"),),
    },
    "Q3_K_M": {
        "attn_v": ((_first(2), "Q5_K"), (_everywhere, "Q4_K")),
        "ffn_down": ((_first_share(16), "Q5_K"), (_everywhere, "Q4_K")),
        "attn_output": ((_everywhere, "Q4_K"),),
    },
    "Q3_K_L": dict.fromkeys(("attn_v", "ffn_down", "attn_output"), ((_everywhere, "Q5_K"),)),
    "Q4_K_S": {"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_first_share(8), "Q5_K"),)},
    "Q4_K_M": dict.fromkeys(("attn_v", "ffn_down"), ((_use_more_bits, "Q6_K"),)),
    "Q5_K_M": dict.fromkeys(("attn_v", "ffn_down"), ((_use_more_bits, "Q6_K"),)),
    "IQ4_XS": {"attn_v": ((_grouped, "Q5_K"),), "ffn_down": ((_first_share(8), "Q5_K"),)},
    "IQ4_NL": {"attn_v": ((_grouped, "Q5_K"),), "ffn_down": ((_first_share(8), "Q5_K"),)},
}
# … with an importance matrix, instead of the rule above
WITH_MATRIX: dict[str, dict[str, Rules]] = {
    **{key: {"ffn_down": ()} for key in ("IQ4_XS", "IQ4_NL")},
    "Q4_0": {"ffn_down": ((_first_share(8), "Q4_1"),)},
    "Q5_0": {"ffn_down": ((_first_share(8), "Q5_1"),)},
}
# … and for a mixture of exactly eight experts
FINER_OUTPUT = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "IQ4_NL", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M")
EIGHT_EXPERTS: dict[str, dict[str, Rules]] = {
    **{
        quantization: {
            "attn_v": ((_everywhere, "Q8_0"),),
            "attn_k": ((_everywhere, "Q8_0"),),
            "attn_output": ((_everywhere, "Q5_K"),) if quantization in FINER_OUTPUT else (),
        }
        for quantization in QUANTIZATIONS
        if quantization not in (*FEWEST_BITS, "MXFP4_MOE")
    },
    **{key: {"attn_k": ((_everywhere, "Q4_K"),), "attn_output": ((_everywhere, "Q5_K"),)} for key in FEWEST_BITS},
}
EIGHT_EXPERTS["IQ3_M"]["ffn_down"] = ((_first_share(8), "Q4_K"), (_use_more_bits, "Q4_K"))


@dataclass(frozen=True)
class GgufModel:
    """A model as the converter writes it: the shape of each tensor by its GGUF name, as in the checkpoint (rows are last)."""

    architecture: str
    tensors: Mapping[str, tuple[int, ...]]
    unnamed: frozenset[str]  # those of them that have no GGUF name known here, under their own
    num_hidden_layers: int
    vocab_size: int
    hidden_size: int
    queries_per_key: int  # heads that share a key and value: llama.cpp's n_gqa
    experts: int
    estimated_because: str | None  # None: the sizes are exact

    @property
    def is_70b(self) -> bool:
        """What llama.cpp calls 70B (src/models/llama.cpp, qwen2.cpp): 80 layers; a Llama also with grouped heads, no experts."""
        if self.num_hidden_layers != 80 or self.experts:
            return False
        return self.architecture == "qwen2" or (self.architecture == "llama" and self.queries_per_key > 1)


def gguf_model(shapes: Mapping[str, tuple[int, ...]], config: Any) -> GgufModel:
    """The tensors of the GGUF file of a model.

    `shapes` are those of its parameters by name, tied ones once (`named_parameters()` on the meta device). Names are mapped
    by gguf's `get_tensor_name_map`, as in the converter (conversion/base.py, `modify_tensors`); an expert tensor that holds
    gate and up in one is parted as it parts it (conversion/qwen.py).
    """
    import gguf

    text = config.get_text_config()
    known = ARCHITECTURES.get(text.model_type)
    architectures = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = known or (text.model_type if text.model_type in architectures else "llama")
    names = gguf.get_tensor_name_map(architectures[architecture], text.num_hidden_layers)
    tensors: dict[str, tuple[int, ...]] = {}
    unnamed = set()
    for original, shape in shapes.items():
        if NO_TEXT.search(original):
            continue
        name = original.replace("language_model.", "")
        parts = {name: shape}
        if name.endswith("mlp.experts.gate_up_proj"):  # (experts, 2 × width, hidden)
            half = (shape[0], shape[1] // 2, shape[2])
            parts = {name.replace("gate_up", "gate"): half, name.replace("gate_up", "up"): half}
        for part, size in parts.items():
            full = part if part.endswith((".weight", ".bias")) else f"{part}.weight"
            mapped = names.get_name(full, try_suffixes=(".weight", ".bias"))
            tensors[mapped or full] = size
            if not mapped and len(size) > 1:
                unnamed.add(full)
    layers = getattr(text, "per_layer_config", None)  # transformers refuses to tell of the whole model what differs by layer
    first = layers[0] if layers else text
    heads = getattr(first, "num_attention_heads", None) or 1
    tensors |= _rope_tensors(architecture, tensors, text)
    unused = {}
    if architecture == "gemma4":
        tensors |= {f"blk.{layer}.layer_output_scale.weight": (1,) for layer in range(text.num_hidden_layers)}  # no parameter, but saved
        unused = _unused_keys(tensors, text)
        tensors |= unused
    because = None
    if not known:
        because = f"how llama.cpp's converter lays out {text.model_type} is not known here"
    elif unused:
        because = f"{len(unused)} tensors are counted that the published checkpoints hold and transformers does not use"
    elif unnamed:
        because = f"{len(unnamed)} tensors have no GGUF name known here and are counted in 16 bits, the first is {min(unnamed)}"
    return GgufModel(
        architecture=architecture,
        tensors=tensors,
        unnamed=frozenset(unnamed),
        num_hidden_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        queries_per_key=heads // (getattr(first, "num_key_value_heads", None) or heads),
        experts=next((n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0),
        estimated_because=because,
    )


def _rope_tensors(architecture: str, tensors: Mapping[str, tuple[int, ...]], text: Any) -> dict[str, tuple[int, ...]]:
    """What the converter adds to the model's own tensors (`generate_extra_tensors` in llama.py, gemma.py and phi.py)."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if architecture in ("llama", "smollm3", "granite") and rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": (tensors["blk.0.attn_q.weight"][0] // text.num_attention_heads // 2,)}
    if architecture == "gemma4":  # half of the head size of its full attention, which is larger than that of its sliding windows
        return {"rope_freqs.weight": (max(size[0] for name, size in tensors.items() if name.endswith("attn_q_norm.weight")) // 2,)}
    if architecture == "phi3" and rope.get("long_factor"):
        return {f"rope_factors_{kind}.weight": (len(rope[f"{kind}_factor"]),) for kind in ("long", "short")}
    return {}


def _unused_keys(tensors: Mapping[str, tuple[int, ...]], text: Any) -> dict[str, tuple[int, ...]]:
    """Keys and values of Gemma 4's last layers, which use those of an earlier layer of their kind.

    transformers' model has none there; the published checkpoints and so the GGUF files do.
    """
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    last = {kind: layer for layer, kind in enumerate(text.layer_types[:own])}
    return {
        f"blk.{layer}.{name}.weight": tensors[f"blk.{last[text.layer_types[layer]]}.{name}.weight"]
        for layer in range(own, text.num_hidden_layers)
        for name in ("attn_k", "attn_v", "attn_k_norm")
    }


def default_type(quantization: str) -> str:
    """The type that a quantisation is named after: that of most of its tensors."""
    return DEFAULTS.get(quantization, re.sub(r"_[SML]$", "", quantization))


def needs_imatrix(quantization: str) -> bool:
    """Whether llama-quantize asks for an importance matrix, of a model whose rows divide by 256."""
    kinds = {default_type(quantization), *(kind for rules in RULES.get(quantization, {}).values() for _, kind in rules)}
    return quantization == "Q2_K_S" or not kinds.isdisjoint(WITHOUT_MATRIX_REFUSED)


def tensor_types(model: GgufModel, quantization: str, *, imatrix: bool = False) -> dict[str, str]:
    """The type of each tensor in the file, by its name, as the converter (CONVERTED) or llama-quantize chooses it.

    `imatrix`: with an importance matrix, which those that need one always have.
    """
    if quantization in CONVERTED:
        return {name: converted_type(name, shape, quantization) for name, shape in model.tensors.items()}
    default, fewest = default_type(quantization), quantization in FEWEST_BITS
    rules = RULES.get(quantization, {})
    rules = {**rules, **(WITH_MATRIX.get(quantization, {}) if imatrix else {})}
    rules = {**rules, **(EIGHT_EXPERTS.get(quantization, {}) if model.experts == 8 else {})}
    roles = {name: next((role for part, role in ROLES.items() if part in name), "") for name in model.tensors}
    layers = {"attn_v": sum(role == "attn_v" for role in roles.values())}
    tied = "output.weight" not in model.tensors
    seen: dict[str, int] = {}
    types = {}
    for name in sorted(model.tensors, key=lambda name: (_layer(name), name)):  # llama_model_loader's order
        shape, role = model.tensors[name], roles[name]
        if name in model.unnamed or not name.endswith("weight") or KEPT.search(name) or _dimensions(shape) < 2:
            types[name] = converted_type(name, shape, "F16")
            continue
        wanted = default
        if name == "output.weight" or (tied and name in EMBEDDINGS):
            finer = "Q5_K" if fewest or quantization == "IQ3_XXS" else "Q6_K"
            wanted = "Q8_0" if shape[-1] % block(default)[0] or default == "MXFP4" else finer
        elif name in EMBEDDINGS:
            wanted = EMBEDDED_AS.get(quantization, default)
        elif role:
            layer = _layer(name) if role.startswith("ffn") and model.experts > 1 and not fewest else seen.get(role, 0)
            seen[role] = seen.get(role, 0) + 1
            place = layer, layers.get(role, model.num_hidden_layers), model
            wanted = next((chosen for where, chosen in rules.get(role, ()) if where(*place)), default)
            if role == "attn_v" and model.is_70b and wanted in ("Q3_K", "Q4_K") and not fewest:
                wanted = "Q5_K"
        if default == "MXFP4" and len(shape) < 3:
            wanted = "Q8_0"
        if shape[-1] % block(wanted)[0]:
            wanted = FALLBACKS.get(wanted, wanted)
        types[name] = "F16" if shape[-1] % block(wanted)[0] else wanted
    return types


def converted_type(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The converter's choice: conversion/base.py, `prepare_tensors`."""
    if len(shape) < 2 or not name.endswith(".weight") or FLOAT32.search(name):
        return "F32"
    return "F16" if shape[-1] % block(wanted)[0] else wanted


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _dimensions(shape: tuple[int, ...]) -> int:
    """As ggml counts them: those of size one at the front are none."""
    return next((len(shape) - n for n, size in enumerate(shape) if size > 1), 1)


def block(type_name: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return int(elements), int(size)


def has_scales(name: str, shape: tuple[int, ...], type_name: str) -> bool:
    """Whether each row's scales can be trained: not of tables of tokens, the head, experts, and types that keep theirs otherwise."""
    return type_name in SCALES and _dimensions(shape) == 2 and name not in (*EMBEDDINGS, "output.weight")


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    elements, size = block(type_name)
    return math.prod(shape) // elements * size


def gguf_bytes(model: GgufModel, quantization: str, *, imatrix: bool = False) -> int:
    """Bytes of all tensors of the file of one type, as gguf's reader counts them.

    Left out: the header with names, metadata and vocabulary (HEADER_BYTES_A_TOKEN), and the padding of each tensor to 32 bytes.
    """
    return sum(tensor_bytes(model.tensors[name], kind) for name, kind in tensor_types(model, quantization, imatrix=imatrix).items())


def gguf_sizes(model: GgufModel) -> dict[str, int]:
    """`gguf_bytes` of every type that a recipe can name."""
    return {quantization: gguf_bytes(model, quantization) for quantization in QUANTIZATIONS}


HEADER_BYTES_A_TOKEN = 64  # of a GGUF file; 61 in Llama 3's and Gemma 4's vocabularies, 39 in Qwen 2.5's, 23 in Llama 2's


def cache_elements(model: GgufModel) -> int:
    """Elements that a token takes in the key-value cache, all layers.

    More than it is where sliding windows keep fewer tokens, or layers use the keys of others.
    """
    elements = 0
    for name, shape in model.tensors.items():
        if name.endswith(("attn_k.weight", "attn_v.weight")):
            elements += shape[0]
        elif name.endswith("attn_qkv.weight"):  # keys, values and queries; the output projection has a column for each of these
            elements += shape[0] - model.tensors[name.replace("qkv", "output")][-1]
    return elements

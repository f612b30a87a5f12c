"""A PEFT adapter → a GGUF LoRA, which llama.cpp adds to a GGUF of the base while it runs."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError, first_line
from ftkit.gguf.files import run_script
from ftkit.machine.llama_cpp import Found
from ftkit.memory.model import adapted_layers, load_config, meta_model
from ftkit.model.adapter import AGAIN, load_settings, load_tensors, other_settings, settings_text
from ftkit.model.source import open_gguf
from ftkit.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch

HELD = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # keys whose effect a GGUF LoRA holds
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
BESIDE = re.compile(r"base_model\.model\.(.+)\.base_layer\.weight")  # an embedding or a head, which PEFT writes beside its A and B
EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|lm_head)")
OTHER_BASE = "convert it with the base that it was trained on"
MERGED = "the merged file holds it; leave the adapter out: --set ship.adapter=false"


@dataclass(frozen=True)
class GgufAdapter:
    """A finished GGUF LoRA, as read back from it."""

    path: Path
    bytes: int
    layers: int  # of the GGUF, that it changes


def convert_adapter(
    adapter: Path, base: Path, path: Path, script: Found, *, trust_remote_code: bool = False, reporter: Reporter = SILENT
) -> GgufAdapter:
    """Write the adapter of a folder as one GGUF file. `base`: the folder of the model that it was trained on.

    llama.cpp's script knows names and orders of rows, but of the scale `lora_alpha` alone, where each layer may have its own. So it is
    given a copy in which PEFT's scaling of each layer is multiplied into B, and an alpha of 0, by which llama.cpp takes B · A as it is
    (src/llama-adapter.h, get_scale). In float32, as PEFT keeps it: in 16 bits A and B would be rounded, and what they meet as well.
    Raises ModelError, with nothing written, for what a GGUF LoRA cannot hold and for an adapter of another base.
    """
    from safetensors.torch import save_file

    refuse_what_it_cannot_hold(adapter)
    tensors = _scaled(adapter, base, trust_remote_code)
    reporter.step(f"converting the adapter to {path.name}")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / "adapter"
        copy.mkdir()
        save_file(tensors, copy / "adapter_model.safetensors")
        (copy / "adapter_config.json").write_text(json.dumps({"lora_alpha": 0}), encoding="utf-8")  # all that the script reads of it
        run_script(script, [copy, "--base", base, "--outfile", path, "--outtype", "f32"])
    return _read_back(path, len(tensors) // 2)


def refuse_what_it_cannot_hold(adapter: Path) -> None:
    """Raise ModelError, by name, for each key of an adapter's config whose effect a GGUF LoRA does not hold."""
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        more = other_settings(config, HELD)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None
    if more:
        raise ModelError(f"The adapter uses {settings_text(config, more)}, which a GGUF LoRA cannot hold.", MERGED)


def _scaled(adapter: Path, base: Path, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """The adapter's tensors in float32, each layer's B multiplied by the scaling that PEFT's own layer has."""
    tensors, config = load_tensors(adapter), load_config(base, trust_remote_code=trust_remote_code)
    named = {name: known for name in tensors if (known := TENSOR.fullmatch(name))}
    for layer in sorted({known[1] for known in named.values()}):
        tied = EMBEDDING.fullmatch(layer) and config.get_text_config().tie_word_embeddings
        if tied or ".experts." in layer:
            why = "the model uses it in two places" if tied else "it is an expert's"
            raise ModelError(f"The adapter changes {layer}, which a GGUF LoRA cannot hold: {why}.", MERGED)
    layers = _layers(adapter, config, base, trust_remote_code)
    wanted = {(layer, matrix) for layer in layers for matrix in "AB"}
    scaled = {}
    for name, tensor in tensors.items():
        if beside := BESIDE.fullmatch(name):
            if beside[1] in layers and layers[beside[1]].get_base_layer().weight.shape == tensor.shape:
                continue
            raise ModelError(f"The adapter brings a {beside[1]} of other tokens, which a GGUF LoRA cannot hold.", MERGED)
        known = named.get(name)
        module = layers.get(known[1]) if known else None
        if not known or not module:
            raise ModelError(f"The adapter's tensor {name} belongs to no layer of {base}.", OTHER_BASE)
        matrix = known[2] or known[3]
        of_layer = getattr(module, f"lora_embedding_{matrix}" if known[3] else f"lora_{matrix}")["default"]
        if (shape := (of_layer if known[3] else of_layer.weight).shape) != tensor.shape:
            raise ModelError(f"The adapter's {name} is {tuple(tensor.shape)}, the base wants {tuple(shape)}.", OTHER_BASE)
        scaled[name] = (tensor.float() * module.scaling["default"] if matrix == "B" else tensor.float()).contiguous()
        wanted.discard((known[1], matrix))
    if wanted:
        raise ModelError(f"The adapter is not whole: it lacks a matrix of {min(wanted)[0]}.", AGAIN)
    return scaled


def _layers(adapter: Path, config: Any, base: Path, trust_remote_code: bool) -> dict[str, Any]:
    """PEFT's layer of each name, as the adapter's config makes it on the base, without weights."""
    from peft import get_peft_model

    settings = load_settings(adapter)
    try:
        with warnings.catch_warnings():  # PEFT 0.21 tells of its own patterns for fused experts
            warnings.filterwarnings("ignore", message=r".*(rank|alpha)_pattern keys did not match.*", category=RuntimeWarning)
            adapted = get_peft_model(meta_model(config, trust_remote_code=trust_remote_code), settings)
    except ValueError as error:
        raise ModelError(f"The adapter does not fit {base}: {first_line(error)}", OTHER_BASE) from None
    return {name.removesuffix(".weight"): module for name, module in adapted_layers(adapted)}


def _read_back(path: Path, layers: int) -> GgufAdapter:
    """Raises ModelError where the script left a layer out."""
    reader = open_gguf(path)
    there = sum(tensor.name.endswith(".lora_a") for tensor in reader.tensors)
    if there < layers:
        raise ModelError(f"llama.cpp's script has taken {there} of the adapter's {layers} layers into {path.name}.", MERGED)
    return GgufAdapter(path, path.stat().st_size, there)

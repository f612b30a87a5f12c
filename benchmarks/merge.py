"""Time and memory of the merge beside `cp`, on a made checkpoint of an 8B's shapes; and of PEFT's, at a size that it can.

    python benchmarks/merge.py [--gib 16] [--folder DIR] [--rank 16] [--large 2.8e9] [--saved] [--peft]

Layers of Llama-3.1-8B's shapes fill as much as is asked for, beside one tensor of `--large` elements that no adapter changes. Both the copy
and the merge read files that are in the page cache as far as they fit, in turns, and end with what they wrote on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GIB, MIB = 1 << 30, 1 << 20
SIZES = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
LAYER_BYTES = 2 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
SHARD_LAYERS = 10


def make_base(folder: Path, layers: int, large_elements: int) -> None:
    """A sharded checkpoint with random weights, written piece by piece."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    hidden, wide, keys = 4096, 14336, 1024
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
              "mlp.down_proj": (hidden, wide)}  # fmt: skip
    torch.manual_seed(0)
    noise = torch.randn(1 << 22).mul_(0.02).to(torch.bfloat16)

    def random(*shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return noise.repeat(-(-size // len(noise)))[:size].view(shape).clone()

    weight_map: dict[str, str] = {}
    ends = {
        "model.embed_tokens.weight": random(32000, hidden),
        "lm_head.weight": random(32000, hidden),
        "model.norm.weight": random(hidden),
    }
    parts = [ends, {}]
    for first in range(0, layers, SHARD_LAYERS):
        parts.append({})
        for n in range(first, min(layers, first + SHARD_LAYERS)):
            parts[-1] |= {f"model.layers.{n}.{name}.weight": (shape,) for name, shape in shapes.items()}  # type: ignore[misc]
            parts[-1] |= {f"model.layers.{n}.{name}.weight": ((hidden,),) for name in ("input_layernorm", "post_attention_layernorm")}  # type: ignore[misc]
    for n, part in enumerate(parts):
        name = f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors"
        if n == 1:  # as a per-layer table is: in the file, and not adapted
            part["model.table.weight"] = None
            write_table(folder / name, "model.table.weight", large_elements // 1024, noise.view(torch.uint8).numpy().tobytes())
        else:
            made = {key: random(*value[0]) if isinstance(value, tuple) else value for key, value in part.items()}
            save_file(made, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
        part.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def write_table(path: Path, name: str, rows: int, noise: bytes) -> None:
    """A safetensors file of one tensor, which no memory has to hold."""
    size = 2 * rows * 1024
    header = json.dumps({name: {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, size, len(noise)):
            file.write(noise[: size - begin])


def make_adapter(base: Path, folder: Path, rank: int, saved: bool) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    from ftkit.merge.deltas import model_of

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"] if saved else None,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model_of(base), config)
    config.save_pretrained(folder)
    torch.manual_seed(1)
    tensors = {name.replace(".default", ""): torch.randn(p.shape) * 0.01 for name, p in adapted.named_parameters() if "lora_" in name}
    if saved:
        for name in ("model.embed_tokens", "lm_head"):
            tensors[f"base_model.model.{name}.weight"] = torch.randn(32000, 4096)
    save_file(tensors, folder / "adapter_model.safetensors")


def in_a_process(code: str, *arguments: str) -> tuple[float, int]:
    """Seconds and the most resident bytes, mapped pages among them, of Python code that is given its arguments as sys.argv[1:]."""
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code + MOST, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    os.sync()
    return time.monotonic() - began, int(said.split()[-1]) << 10


# Not the system's own figure for a child (ru_maxrss), which begins with what its parent held.
MOST = """
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
OURS = """
import sys
from pathlib import Path
from ftkit.merge.stream import merge
Path(sys.argv[3]).mkdir()
merge(*map(Path, sys.argv[1:4]))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
IMPORTS = "import torch, transformers, peft; from transformers import AutoModelForCausalLM, LlamaForCausalLM"


def copy(source: Path, target: Path) -> float:
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    return time.monotonic() - began


def into(folder: Path, work: Callable[[Path], tuple[float, int]]) -> tuple[float, int]:
    target = folder / "out"
    try:
        return work(target)
    finally:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--gib", type=float, default=16.0)
    asked.add_argument("--folder", type=Path)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--large", type=float, default=2.8e9, help="elements of a tensor that no adapter changes")
    asked.add_argument("--saved", action="store_true", help="an adapter that brings embedding and head whole, 1 GB in float32")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--peft", action="store_true", help="merge with PEFT too, which holds the whole model")
    options = asked.parse_args()
    layers = max(1, int((options.gib * GIB - 2 * options.large - 4 * 32000 * 4096) / LAYER_BYTES))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, adapter = folder / "base", folder / "adapter"
        base.mkdir()
        make_base(base, layers, int(options.large))
        make_adapter(base, adapter, options.rank, options.saved)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(f"{size / GIB:.1f} GiB in {layers} layers, rank {options.rank}, a tensor of {options.large:.2g} elements beside them")
        imports, idle = in_a_process(IMPORTS)
        print(f"imports alone      {imports:7.1f} s  {idle / MIB:7.0f} MiB")
        for _ in range(options.rounds):
            copied, _ = into(folder, lambda target: (copy(base, target), 0))
            merged, peak = into(folder, lambda target: in_a_process(OURS, str(base), str(adapter), str(target)))
            ratios = f"{merged / copied:.2f} × cp, {(merged - imports) / copied:.2f} without imports"
            print(f"cp {copied:6.1f} s   ftkit {merged:6.1f} s  {peak / MIB:5.0f} MiB   {ratios}")
        if options.peft:
            theirs, peak = into(folder, lambda target: in_a_process(PEFT, str(base), str(adapter), str(target)))
            print(f"PEFT                       {theirs:7.1f} s  {peak / MIB:7.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

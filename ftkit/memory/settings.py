"""All of a training step that decides its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ftkit.recipe import Dtype, Lora, Method, Objective

HEAD_TILE_TOKENS = 4096  # TRL 1.16 scores at most so many tokens at a time


@dataclass(frozen=True)
class StepSettings:
    """All of a training step that decides its memory. The defaults are what `ftkit train` runs on a GPU with bfloat16.

    The other values are other people's training loops, which benchmarks/vram.py holds against their measurements.
    `loss`: "logits" builds all logits and takes transformers' own loss in float32, "float32_logits" casts the model's output to
    float32 as Fabric does, "float32_chunks" does so for 128 tokens at a time. `keep_outputs` holds what the loss was computed
    from until the next is there; `fused_qkv` (LoRA alone) has one layer compute query, key and value, each a view of its output;
    `tied` false gives the head weights of its own; `longest_first` has only the first step see the longest batch, before the
    optimizer has states.
    """

    method: Method = "qlora"
    lora: Lora = field(default_factory=Lora)
    objective: Objective = "sft"  # dpo: the first half of a batch are the chosen answers; the reference was asked before
    optim: str = "adamw_torch"
    neftune_noise_alpha: float | None = None
    gradient_checkpointing: bool = False
    base_dtype: Dtype = "bfloat16"  # of weights that are not quantised
    compute_dtype: Dtype = "bfloat16"  # of 4-bit layers, and of autocast
    trained_dtype: Dtype = "float32"  # of adapters, or of all weights for full fine-tuning
    autocast: bool = True
    double_quant: bool = True
    loss: Literal["fused", "logits", "float32_logits", "float32_chunks"] = "fused"
    attention: Literal["sdpa", "eager"] | None = None  # None: what transformers chooses for the model
    padded: bool = True  # rows of one batch differ in length, so that a mask is built; a batch of one never has one
    packed: bool = False  # rows are end to end in one; its mask keeps them apart, and positions are given in place of a padding mask
    use_cache: bool = False
    keep_outputs: bool = False
    fused_qkv: bool = False
    tied: bool = True
    longest_first: bool = False
    labelled_share: float = 1.0  # of a batch's tokens, those that the fused loss head scores
    triton: bool = True  # without it that head computes by torch's own operations, which hold a tile several times over
    device: Literal["cuda", "cpu"] = "cuda"
    capability: tuple[int, int] = (8, 9)


def compute_dtype(base_dtype: str | None, otherwise: str) -> str:
    """What is computed in: float16 weights in float16, since autocast mixes no two 16-bit formats (it raises, on a GPU too)."""
    return "float16" if base_dtype == "float16" else otherwise


def labelled_tokens(batch: int, length: int, share: float) -> int:
    """Tokens that the loss head scores: a row's first token is nobody's next."""
    return max(1, round(share * batch * (length - 1)))

"""A plain estimate of what one training step holds beside the fixed part; to be replaced by a trace of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTES_AN_ELEMENT = {4: 4.0, 2: 2.9}  # by the size of the compute format; see estimate_bytes
HEAD_TILE = (4096, 32768)  # TRL 1.16 computes the loss in tiles of (tokens, vocabulary entries), float32


@dataclass(frozen=True)
class Shape:
    """The sizes that the estimate reads from config.json, under its names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    attention_size: int  # num_attention_heads × head_dim
    key_value_size: int  # num_key_value_heads × head_dim
    vocab_size: int


def shape(config: Any) -> Shape:
    """Sizes of the text model of a configuration."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        attention_size=text.num_attention_heads * head_dim,
        key_value_size=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim,
        vocab_size=text.vocab_size,
    )


def estimate_bytes(shape: Shape, batch: int, length: int, *, checkpointing: bool, compute_bytes: int) -> int:
    """Bytes that one step holds at its peak for `batch` rows of `length` tokens.

    One layer keeps for backward, a token: 4 × the intermediate width (gate, its activation, up, their product), 6 × hidden
    (two norms and the inputs of the projections), 2 × the query and 2 × the key/value width. An element takes 4 bytes in
    float32 and 2.9 in bfloat16, where autocast keeps some float32 copies. Without checkpointing all layers keep that; with
    it each keeps its input, and one layer at a time is recomputed. The loss head adds three float32 tiles.

    Where the factors come from: allocations of real CPU steps (torch.profiler, LoRA and full, three shapes of a 6-layer
    Llama) lie between 12 % below and 1 % above it. Left out: attention workspaces, dropout, the allocator's rounding and
    fragmentation, the CUDA context, architectures with other layers than attention and a gated MLP.
    """
    tokens = batch * length
    layer = 4 * shape.intermediate_size + 6 * shape.hidden_size + 2 * shape.attention_size + 2 * shape.key_value_size
    kept = shape.num_hidden_layers * shape.hidden_size + layer if checkpointing else shape.num_hidden_layers * layer
    head = 3 * 4 * min(tokens, HEAD_TILE[0]) * min(shape.vocab_size, HEAD_TILE[1])
    return int(tokens * kept * BYTES_AN_ELEMENT[compute_bytes]) + head

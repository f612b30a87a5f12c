"""Tables that are looked up and nothing else: where a model computes in float32, they may stay in their 16 bits, to the bit the same."""

from __future__ import annotations

import math
import re
from typing import Any

# Embeddings of every layer (Gemma 3n and 4), of E4B 2.8 of 8 billion numbers. Added to what is of float32, each becomes it.
LOOKED_UP = re.compile(r"\bembed_tokens_per_layer\.weight$")
NARROW = "bfloat16"


def stay_narrow(text: Any) -> bool:
    """Whether those of a text model's config do: its rows are multiplied by the root of their length, exactly if that is a power of two."""
    length = getattr(text, "hidden_size_per_layer_input", None) or 0
    return length > 0 and math.log2(length) % 2 == 0

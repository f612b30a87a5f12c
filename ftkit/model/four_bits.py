"""Layers that must not be loaded in 4 bits, by model type."""

from __future__ import annotations

# transformers leaves the output head alone by itself, unless it is told what else to leave.
LEFT_ALONE = dict.fromkeys(
    ("gemma3n", "gemma3n_text"),
    ("lm_head", "prediction_coefs", "correction_coefs"),  # whose values its training step clamps, which bytes cannot hold
)


def left_alone(model_type: str) -> list[str] | None:
    """What `load_in_4bit` leaves in 16 bits, where it is not what transformers chooses itself."""
    return list(LEFT_ALONE[model_type]) if model_type in LEFT_ALONE else None

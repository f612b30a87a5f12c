"""Whether a model computes rows end to end in one as it computes each alone; where it does not, they are not packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftkit import patches
from ftkit.errors import first_line
from ftkit.model.adapter import as_trained
from ftkit.train.micro_batches import pack

LENGTHS = (24, 40, 32)  # tokens of the rows that it is tried with, at most
ROUNDING, LEAST = 4, 1e-4  # a gradient may differ by so many times what padding makes of it, or by so much of itself
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def what_packing_changes(trainer: Any, examples: Sequence[Any]) -> str | None:
    """What is not as with rows alone, in words; None where nothing is. Weights and random numbers stay as they are.

    Layers with a state – convolutions, linear attention, Mamba – carry it from one row into the next where their kernels do not
    know of rows. Two things are compared, on the ends of some rows with all their tokens scored: whether the log-probabilities of
    the later rows stay, bit for bit, when the first row is another; and the gradient of the pack with the sum of its rows'.
    """
    import torch

    if trainer.args.neftune_noise_alpha:
        return "NEFTune's noise follows from the length of what goes through at once"
    model = trainer.model
    text = model.config.get_text_config()
    cuts = [list(examples[n % len(examples)]["input_ids"])[-length:] for n, length in enumerate(LENGTHS)]
    rows, others = ([{"input_ids": ids, "labels": ids} for ids in (first, *cuts[1:])] for first in (cuts[0], _another(cuts[0])))
    alone, padded, packed = [trainer.data_collator([row]) for row in rows], [trainer.data_collator(rows)], [pack(rows)]

    def log_probs(batch: dict[str, Any]) -> Any:
        given = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        with trainer.compute_loss_context_manager(), as_trained(model):
            return model(**given, use_cache=False, fused_lm_head=True).log_probs

    def add_gradient(batches: list[dict[str, Any]], sign: int) -> Any:
        for batch in batches:
            (sign * log_probs(batch).sum()).backward()
        return torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()

    def difference(batches: list[dict[str, Any]]) -> float:
        """Of their gradient from that of the rows alone, relative; in place, since of a whole model two may not fit."""
        model.zero_grad()
        whole = add_gradient(alone, 1)
        return float(add_gradient(batches, -1) / whole)

    model.eval()  # without dropout
    with patches.applied("training", "running adapters"):
        with torch.no_grad():
            try:
                later = [log_probs(batch)[:, len(cuts[0]) :] for batch in (*packed, pack(others))]
            except (ValueError, TypeError, NotImplementedError) as error:
                return f"{text.model_type} does not compute it: {first_line(error)}"
            rounding = max(
                float((one[0] - row[: one.shape[1]]).abs().max())
                for one, row in zip(map(log_probs, alone), log_probs(padded[0]), strict=True)
            )
        leak = float((later[0] - later[1]).abs().max())
        by_padding, by_packing = difference(padded), difference(packed)
    model.zero_grad()
    experts = any(hasattr(text, name) for name in EXPERTS)  # whose products are rounded by how many rows go to each
    if not leak <= (rounding if experts else 0):
        return f"a row of {text.model_type} sees the one before it: the log-probability of one of its tokens changes by {leak:.2g}"
    if not by_packing <= max(ROUNDING * by_padding, LEAST):
        made = f"{by_packing:.2g} of itself, and padding {by_padding:.2g}"
        return f"of {text.model_type} it changes the gradient by {made}"
    return None


def _another(ids: list[int]) -> list[int]:
    """As many tokens in another order."""
    return ids[::-1] if ids[::-1] != ids else [ids[0] + 1 if ids[0] == 0 else ids[0] - 1, *ids[1:]]

"""An optimizer step's rows as micro-batches: as many rows at once as there is room for, padded or end to end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from ftkit.data.lengths import micro_batches
from ftkit.data.rows import IGNORED
from ftkit.machine import ranks
from ftkit.train.arguments import Settings


def in_micro_batches(kind: Any, settings: Settings) -> Any:
    """A trainer that is given the rows of a whole optimizer step at once and splits them itself, so that shorter rows go together.

    TRL divides each micro-batch's summed loss by the learnt tokens of the step, so that any split gives the same gradient.
    """
    import torch

    class Trainer(kind):  # type: ignore[misc]
        packing = settings.packing

        def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
            count, losses = ranks.world_size(), []
            if count > 1:
                # Each process counted all rows of the step, and transformers took the sum. One without a row of its own goes through
                # another's, whose gradient is divided away: gradients are averaged once all have one.
                has_rows = len(inputs["input_ids"]) > ranks.rank()
                num_items_in_batch = (
                    num_items_in_batch / count if has_rows else torch.full_like(num_items_in_batch, math.inf, dtype=torch.float64)
                )
            parts = list(self.micro_batches(inputs))
            for n, (part, counts) in enumerate(parts, 1):
                # Gradients that are shared out go to their owners at once: whole ones of all weights are what does not fit.
                with nullcontext() if n == len(parts) or settings.fsdp else self.accelerator.no_sync(model):
                    items = num_items_in_batch if counts else torch.full_like(num_items_in_batch, math.inf, dtype=torch.float64)
                    losses.append(super().training_step(model, part, items))
            return torch.stack(losses).sum()

        def micro_batches(self, inputs: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
            """Those of the step's rows that this process takes, and whether each counts.

            With weights that are shared out each pass is one of all processes: who has fewer repeats the last, for the others.
            """
            counts = torch.stack([inputs["attention_mask"].sum(1), (inputs["labels"] != IGNORED).sum(1)])
            lengths, learnt = counts.tolist()  # at once: it waits for a GPU
            all_of = range(ranks.world_size()) if settings.fsdp else [ranks.rank()]
            shares = {rank: share(len(lengths), rank, ranks.world_size()) for rank in all_of}
            splits = {
                rank: _split([lengths[row] for row in own], [learnt[row] for row in own], settings, packed=self.packing)
                for rank, own in shares.items()
            }
            own, found, most = shares[ranks.rank()], splits[ranks.rank()], max(map(len, splits.values()))
            for n in range(most):
                rows = [own[place] for place in found[min(n, len(found) - 1)]]
                if self.packing:
                    part = pack([{name: inputs[name][row, : lengths[row]].tolist() for name in ("input_ids", "labels")} for row in rows])
                else:
                    longest = max(lengths[row] for row in rows)
                    part = {name: tensor[rows, :longest] for name, tensor in inputs.items()}
                yield part, n < len(found)

    return Trainer


def share(rows: int, rank: int, count: int) -> list[int]:
    """Which of a step's rows are a process's: one in so many, as they come by length. The first, where there are too few."""
    return list(range(rank, rows, count)) or [0]


def _split(lengths: list[int], learnt: list[int], settings: Settings, *, packed: bool) -> list[list[int]]:
    if settings.max_tokens is not None:
        return micro_batches(lengths, settings.max_tokens, learnt, settings.max_learnt_tokens, packed=packed)
    size = settings.per_device_train_batch_size
    return [list(range(begin, min(begin + size, len(lengths)))) for begin in range(0, len(lengths), size)]


def pack(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Rows of token ids and labels, end to end in one, with what tells a model where each begins."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    return packed

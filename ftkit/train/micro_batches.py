"""An optimizer step's rows as micro-batches: as many rows at once as there is room for, padded or end to end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftkit.data.lengths import micro_batches
from ftkit.data.rows import IGNORED
from ftkit.train.arguments import Settings


def in_micro_batches(kind: Any, settings: Settings) -> Any:
    """A trainer that is given the rows of a whole optimizer step at once and splits them itself, so that shorter rows go together.

    TRL divides each micro-batch's summed loss by the learnt tokens of the step, so that any split gives the same gradient.
    """
    import torch

    class Trainer(kind):  # type: ignore[misc]
        packing = settings.packing

        def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
            losses = []
            for part in self.micro_batches(inputs):
                losses.append(super().training_step(model, part, num_items_in_batch))
            return torch.stack(losses).sum()

        def micro_batches(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
            counts = torch.stack([inputs["attention_mask"].sum(1), (inputs["labels"] != IGNORED).sum(1)])
            lengths, learnt = counts.tolist()  # at once: it waits for a GPU
            for rows in _split(lengths, learnt, settings, packed=self.packing):
                if self.packing:
                    yield pack([{name: inputs[name][row, : lengths[row]].tolist() for name in ("input_ids", "labels")} for row in rows])
                else:
                    longest = max(lengths[row] for row in rows)
                    yield {name: tensor[rows, :longest] for name, tensor in inputs.items()}

    return Trainer


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

"""An optimizer step's rows as micro-batches: as many rows at once as there is room for, padded or end to end."""

from __future__ import annotations

import math
import operator
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
        tokens = learnt_tokens = 0  # of the steps taken here from begin to end, all processes together

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            # Then a step's tokens are counted. Models with towers say of the loss of their own that it takes no count; TRL's does.
            self.model_accepts_loss_kwargs = True

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
            self.current_gradient_accumulation_steps = len(parts)  # by which TRL divides what the routers of a mixture lose in each
            for n, (part, counts) in enumerate(parts, 1):
                # Gradients that are shared out go to their owners at once: whole ones of all weights are what does not fit.
                with nullcontext() if n == len(parts) or settings.fsdp else self.accelerator.no_sync(model):
                    items = num_items_in_batch if counts else torch.full_like(num_items_in_batch, math.inf, dtype=torch.float64)
                    losses.append(super().training_step(model, part, items))
            self.tokens += self.step_tokens
            self.learnt_tokens += self.step_learnt_tokens
            return torch.stack(losses).sum()

        def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
            """The loss a learnt token. transformers takes the mean of the batches', which is another with other rows in each; so is what
            TRL adds of a mixture's routers."""
            self.evaluated: list[tuple[Any, Any]] = []  # of each batch: its loss a token, and its tokens
            with_routers = getattr(self, "aux_loss_enabled", False)
            self.aux_loss_enabled = False
            try:
                output = super().evaluation_loop(*arguments, **options)
            finally:
                self.aux_loss_enabled = with_routers
            losses, tokens = (torch.stack(each).double() for each in zip(*self.evaluated, strict=True))
            output.metrics["eval_loss"] = float((losses * tokens).sum() / tokens.sum())
            return output

        def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
            tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
            found = super().prediction_step(model, inputs, *arguments, **options)
            self.evaluated.append((found[0], tokens.to(found[0].device)))
            return found

        def micro_batches(self, inputs: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
            """Those of the step's rows that this process takes, and whether each counts.

            With weights that are shared out each pass is one of all processes: who has fewer repeats the last, for the others.
            """
            lengths, learnt = lengths_of(inputs, inputs["labels"] != IGNORED)
            self.step_tokens, self.step_learnt_tokens = sum(lengths), sum(learnt)
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


PAIRS_SHARE = "pairs_share"  # beside the tensors of a micro-batch of pairs: how much of the step's loss is its own


def pairs_in_micro_batches(kind: Any, settings: Settings) -> Any:
    """As `in_micro_batches`, of DPOTrainer, whose batch holds the chosen sequences of all pairs and then the rejected ones.

    TRL's loss is the mean over a micro-batch's pairs: each part counts by how many it holds, so that an epoch's last step, too, has
    the gradient of all its pairs together.
    """
    import torch

    class Trainer(kind):  # type: ignore[misc]
        tokens = learnt_tokens = 0  # as there

        def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
            losses, shares = [], []
            for part, is_last in self.micro_batches(inputs):
                shares.append(part[PAIRS_SHARE])
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, part))
            self.sum_up(shares)
            self.tokens += self.step_tokens
            self.learnt_tokens += self.step_learnt_tokens
            return torch.stack(losses).sum()

        def sum_up(self, shares: list[float]) -> None:
            """Have one of TRL's figures of the step's pairs in place of one for each micro-batch of this process."""
            told = {name: values for name, values in self._metrics["train"].items() if name.startswith("rewards/")}
            own = [sum(share * value for share, value in zip(shares, values[-len(shares) :], strict=True)) for values in told.values()]
            together = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "mean").tolist()
            for values, value in zip(told.values(), together, strict=True):
                values[-len(shares) :] = [value]

        def micro_batches(self, inputs: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
            """Those of the step's pairs that this process takes, and whether it is the last."""
            lengths, learnt = lengths_of(inputs, inputs["completion_mask"])
            self.step_tokens, self.step_learnt_tokens = sum(lengths), sum(learnt)
            pairs, size, count = len(lengths) // 2, settings.per_device_train_batch_size, ranks.world_size()
            own = share(pairs, ranks.rank(), count)
            has_pairs = ranks.rank() < pairs  # another's goes through one that has none, and counts for nothing
            for begin in range(0, len(own), size):
                part = own[begin : begin + size]
                both = [*part, *(pair + pairs for pair in part)]
                longest = max(lengths[row] for row in both)
                found = {name: tensor[both, :longest] if tensor.dim() > 1 else tensor[part] for name, tensor in inputs.items()}
                weight = len(part) / pairs * count if has_pairs else 0.0  # gradients are averaged over the processes
                yield {**found, PAIRS_SHARE: weight}, begin + size >= len(own)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
            if PAIRS_SHARE not in inputs:  # an evaluation's
                return super().compute_loss(model, inputs, *arguments, **options)
            return inputs.pop(PAIRS_SHARE) * super().compute_loss(model, inputs, *arguments, **options)

        def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
            """TRL's figures, too, are of all pairs alike: it takes the mean of the batches', of which the last may be smaller."""
            self.pairs: list[int] = []  # of each batch
            output = super().evaluation_loop(*arguments, **options)
            for values in self._metrics["eval"].values():
                if len(values) == len(self.pairs):
                    values[:] = [sum(map(operator.mul, values, self.pairs)) / sum(self.pairs)]
            return output

        def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
            self.pairs.append(len(inputs["input_ids"]) // 2)
            return super().prediction_step(model, inputs, *arguments, **options)

    return Trainer


def lengths_of(inputs: Mapping[str, Any], learnt: Any) -> tuple[list[int], list[int]]:
    """Of each sequence of a batch, its tokens, and those that this mask says are learnt. At once, since it waits for a GPU."""
    import torch

    lengths, learnt_lengths = torch.stack([inputs["attention_mask"].sum(1), learnt.sum(1)]).tolist()
    return lengths, learnt_lengths


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

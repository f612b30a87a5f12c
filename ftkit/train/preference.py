"""TRL's DPO: which of two answers is the better one, held against the model as training began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftkit import patches
from ftkit.data.store import token_counts
from ftkit.engines import hf
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Recipe

SFT_ALONE = ("dataset_kwargs",)  # of what TRL is told
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names for log-probabilities of the reference


def preference_config(recipe: Recipe, arguments: dict[str, Any]) -> Any:
    """What DPOTrainer is told. Dropout is off, as is usual, unless the recipe asks for it."""
    from trl import DPOConfig

    return DPOConfig(
        **{key: value for key, value in arguments.items() if key not in SFT_ALONE},
        beta=recipe.dpo.beta,
        loss_type=recipe.dpo.loss_type,
        disable_dropout=not recipe.lora.lora_dropout,
        precompute_ref_log_probs=True,
    )


def preference_trainer() -> Any:
    """DPOTrainer for rows that are tokens already, and for a reference that `refer` asks."""
    from torch.utils.data import SequentialSampler
    from trl import DPOTrainer

    patches.require("training preferences")

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            return SequentialSampler(eval_dataset)  # which `refer` has put in order

    return Trainer


def refer(trainer: Any, reporter: Reporter = SILENT) -> None:
    """Ask the reference, once for every row, the validation rows then in order of length.

    It is the model as training begins, whatever was trained in it before.

    So no second model or adapter is held while training. A resumed training begins as the first did, and asks again. It takes less
    memory than a step: nothing is kept for a backward pass.
    """
    parts = [trainer.train_dataset, trainer.eval_dataset]
    with reporter.bar("asking the reference", sum(map(len, parts))) as bar:
        done, referred = 0, []
        for part in parts:
            referred.append(_with_reference(trainer, part, lambda count, done=done: bar.update(done + count)))
            done += len(part)
    trainer.train_dataset, validation = referred
    lengths = token_counts(validation)
    trainer.eval_dataset = validation.select(sorted(range(len(validation)), key=lambda n: lengths[n]))


def _with_reference(trainer: Any, dataset: Any, tell: Any) -> Any:
    """The rows with REFERENCE. Rows of like length go together, so that little is padded."""
    import torch
    from datasets import Dataset, concatenate_datasets

    model, lengths = trainer.model, token_counts(dataset)
    order = sorted(range(len(dataset)), key=lambda n: lengths[n])
    found: list[list[float]] = [[] for _ in order]
    model.eval()
    batch, done = trainer.args.per_device_eval_batch_size, 0

    def scores(rows: list[int]) -> Any:
        inputs = {name: tensor.to(model.device) for name, tensor in trainer.data_collator([dataset[row] for row in rows]).items()}
        answers = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(answers == 0, -100)
        with patches.applied("training", "running adapters"), torch.no_grad(), trainer.accelerator.autocast():
            return model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)

    while rows := order[done : done + batch]:
        try:
            scored = scores(rows)
        except (RuntimeError, MemoryError) as error:
            if batch == 1 or not hf.out_of_memory(error, "train"):
                raise
            batch //= 2  # for these rows; that a step fits is for the step to say
            continue
        for row, *values in zip(rows, *(half.tolist() for half in scored.chunk(2)), strict=True):
            found[row] = values
        done += len(rows)
        tell(done)
    columns = dict(zip(REFERENCE, map(list, zip(*found, strict=True)), strict=True))
    return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)


def go_on_with(trainer: Any, adapter: Path) -> None:
    """Give the trainer's adapter, which was made with the settings of this one, its weights."""
    trainer.model.load_adapter(str(adapter), "default", is_trainable=True, autocast_adapter_dtype=False)

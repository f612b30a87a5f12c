"""TRL's trainer of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.data.mask import refuse_nothing_to_learn
from ftkit.data.store import token_counts
from ftkit.engines import hf
from ftkit.memory.model import lora_config
from ftkit.model.four_bits import adaptable
from ftkit.recipe import Recipe
from ftkit.run import CHECKPOINTS
from ftkit.train.answers import Scorer
from ftkit.train.arguments import Settings, arguments
from ftkit.train.micro_batches import in_micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_trainer(
    recipe: Recipe,
    settings: Settings,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: Any,
    validation: Any,
    folder: Path,
    callbacks: Sequence[Any] = (),
    scorer: Scorer | None = None,
) -> Any:
    """The SFTTrainer of this recipe.

    `training` and `validation` are `datasets.Dataset`s of token ids and labels already (data.store), or lists of `Example`s, so that
    nothing is rendered or masked again. What `scorer` finds is among the metrics of an evaluation.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    refuse_nothing_to_learn(len(training), len(validation))
    patches.require("training")  # before the model is loaded
    hf.refuse_lost_gradients()
    method = recipe.training.method
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    whole_steps = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    config = SFTConfig(**{**arguments(recipe.training, settings, len(training), folder / CHECKPOINTS), **whole_steps})
    model = hf.load_model(base, method, dtype=settings.dtype, cuda=settings.cuda, trust_remote_code=recipe.trust_remote_code)
    text = model.config.get_text_config()
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        text.num_experts = text.num_local_experts  # which TRL 1.16 asks Granite's for too, and it has the other name alone
    with adaptable(model):
        trainer = in_micro_batches(_reproducible(SFTTrainer, scorer), settings)(
            model=model,
            args=config,
            train_dataset=dataset_of(training),
            eval_dataset=dataset_of(validation),
            processing_class=tokenizer,
            peft_config=None if method == "full" else lora_config(recipe.lora, model),
            callbacks=list(callbacks),
        )
    trainer.remove_callback(PrinterCallback)  # it writes every log entry to stdout, which carries results only
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts a 4-bit model's adapter to bfloat16, which loses small updates
            parameter.data = parameter.data.float()
    return trainer


def _reproducible(kind: Any, scorer: Scorer | None) -> Any:
    """A trainer whose order of rows follows from seed and epoch alone, that trains with the table's patches, and asks the model.

    transformers draws it from the global generator, whose state at the beginning of an epoch no checkpoint holds: a training
    resumed within a second epoch would see some rows of it twice and others not at all.
    """
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class Trainer(kind):  # type: ignore[misc]
        def train(self, *args: Any, **options: Any) -> Any:
            with patches.applied("training", "running adapters"):
                return super().train(*args, **options)

        def evaluation_loop(self, *args: Any, **options: Any) -> Any:
            """The loss, and answers: the model is in eval mode then, and each training step puts it back itself."""
            output = super().evaluation_loop(*args, **options)
            if scorer:
                output.metrics.update(scorer(self.model, self.state.global_step // int(self.args.eval_steps)))
            return output

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            dataset = self.train_dataset if train_dataset is None else train_dataset
            trainer = self

            class Sampler(LengthGroupedSampler):  # type: ignore[misc]
                def __iter__(self) -> Iterator[int]:
                    self.generator = torch.Generator().manual_seed(trainer.args.data_seed + int(trainer.state.epoch or 0))
                    indices: Iterator[int] = super().__iter__()
                    return indices

            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return Sampler(size, lengths=token_counts(dataset))

    return Trainer


def dataset_of(examples: Any) -> Any:
    from datasets import Dataset

    if isinstance(examples, Dataset):
        return examples
    return Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in ("input_ids", "labels")})

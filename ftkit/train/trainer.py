"""TRL's trainer of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.data.mask import refuse_nothing_to_learn
from ftkit.data.store import token_counts
from ftkit.engines import hf
from ftkit.errors import ModelError
from ftkit.machine import ranks
from ftkit.memory.model import lora_config
from ftkit.model.adapter import load_settings
from ftkit.model.four_bits import adaptable
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Recipe
from ftkit.run import CHECKPOINTS
from ftkit.train.answers import Scorer
from ftkit.train.arguments import Settings, arguments
from ftkit.train.micro_batches import in_micro_batches, pairs_in_micro_batches
from ftkit.train.preference import go_on_with, preference_config, preference_trainer, refer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCALER = "scaler.pt"  # in a checkpoint of float16


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
    *,
    begins_with: Path | None = None,
    reporter: Reporter = SILENT,
) -> Any:
    """The SFTTrainer of this recipe, or its DPOTrainer.

    `training` and `validation` are `datasets.Dataset`s of token ids already (data.store), or lists of `Example`s or `Pair`s, so that
    nothing is rendered or masked again. What `scorer` finds is among the metrics of an evaluation. `begins_with`: the adapter that
    is trained further.
    """
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    refuse_nothing_to_learn(len(training), len(validation))
    patches.require("training")  # before the model is loaded
    hf.refuse_lost_gradients()
    method = recipe.training.method
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    whole_steps = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    told = {**arguments(recipe.training, settings, len(training), folder / CHECKPOINTS), **whole_steps}
    dpo = recipe.training.objective == "dpo"
    config = preference_config(recipe, told) if dpo else SFTConfig(**told)
    if ranks.world_size() == 1 and config.n_gpu > 1 and patches.inside("choosing a GPU", config, "_n_gpu"):
        config._n_gpu = 1  # one process trains on the first GPU, which the plan is for; transformers would take all of them (DataParallel)
    model = hf.load_model(
        base,
        method,
        dtype=settings.dtype,
        cuda=settings.cuda,
        trust_remote_code=recipe.trust_remote_code,
        shared_out=settings.fsdp,
        attention=recipe.training.attention,
    )
    text = model.config.get_text_config()
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        text.num_experts = text.num_local_experts  # which TRL 1.16 asks Granite's for too, and it has the other name alone
    if ranks.world_size() > 1 and any(getattr(text, name, None) for name in ("num_experts", "n_routed_experts")):
        raise ModelError(
            f"{base.name} is a mixture of experts, which several processes do not train: not each sees a row for each.",
            "train in one process: ftkit train",
        )
    with adaptable(model), patches.applied("training preferences") if dpo else nullcontext():
        split = pairs_in_micro_batches if dpo else in_micro_batches
        trainer = split(_reproducible(preference_trainer() if dpo else SFTTrainer, scorer, reporter), settings)(
            model=model,
            args=config,
            train_dataset=dataset_of(training),
            eval_dataset=dataset_of(validation),
            processing_class=tokenizer,
            peft_config=None if method == "full" else _adapter_settings(recipe, model, begins_with),
            callbacks=list(callbacks),
        )
    if ranks.world_size() > 1:
        _alike_everywhere(trainer, settings, dpo=dpo)
    if settings.fsdp:
        _share_out(trainer, settings)
    trainer.remove_callback(PrinterCallback)  # it writes every log entry to stdout, which carries results only
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts a 4-bit model's adapter to bfloat16, which loses small updates
            parameter.data = parameter.data.float()
    if begins_with:
        go_on_with(trainer, begins_with)
    if dpo:
        with hf.room_to("read the answers to learn from"):
            refer(trainer, reporter)
    return trainer


def _alike_everywhere(trainer: Any, settings: Settings, *, dpo: bool) -> None:
    """Each process is given every batch whole: of a step it takes its share itself (micro_batches), and evaluates all, as one would."""
    import torch
    from accelerate.data_loader import prepare_data_loader

    def whole(loader: Any, **_: Any) -> Any:
        return prepare_data_loader(loader, trainer.accelerator.device, num_processes=1, process_index=0, put_on_device=True)

    def alone(found: Any, **_: Any) -> Any:
        """As accelerate's own in one process: the trainer repeats the last batch's loss as if that were whole."""
        state = trainer.accelerator.gradient_state
        return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 and found.dim() else found

    trainer.accelerator.prepare_data_loader = whole
    trainer.accelerator.gather_for_metrics = trainer.gather_function = alone
    if dpo:  # TRL's figures of each micro-batch, of which not each process has as many
        trainer.accelerator.gather = alone
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    prepare_model = trainer.accelerator.prepare_model

    def in_buckets(model: Any, **options: Any) -> Any:
        """Gradients that are always there lie in the buckets that are summed; those that come and go are held beside them."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        prepared = prepare_model(model, **options)
        prepared.zero_grad = partial(prepared.zero_grad, set_to_none=False)
        return prepared

    if not settings.fsdp:
        trainer.accelerator.prepare_model = in_buckets
    if settings.cuda:  # else PEFT loads an adapter onto the first GPU
        trainer.model.load_adapter = partial(trainer.model.load_adapter, torch_device=f"cuda:{ranks.local_rank()}")


def _share_out(trainer: Any, settings: Settings) -> None:
    """Have accelerate share the weights out on a CPU too, sum gradients in float32, and gather of a model what is trained alone."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not (layers := _layers(trainer.model)):
        raise ModelError(
            f"{trainer.model.config.model_type} names no layers (_no_split_modules) to share out one after the other with FSDP.",
            "let each process hold all weights: --set training.fsdp=false",
        )
    state = trainer.accelerator.state
    if not trainer.is_fsdp_enabled:  # accelerate 1.15 shares out among GPUs alone, and says nothing
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        trainer.is_fsdp_enabled = True
    state.fsdp_plugin.transformer_cls_names_to_wrap = layers
    half = None if settings.dtype == "float32" else getattr(torch, settings.dtype)
    # By itself it rounds the loss to 16 bits too, and the sum of the gradients.
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)

    tied = getattr(trainer.model, "all_tied_weights_keys", {})

    def trained(model: Any, **_: Any) -> Any:
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True))
        return {name: tensor for name, tensor in found.items() if name not in tied}

    trainer.accelerator.get_state_dict = trained
    if any(type(parameter).__name__ == "Params4bit" for parameter in trainer.model.parameters()):
        _hold_no_copy(trainer)


def _layers(model: Any) -> list[str]:
    """The classes of layers that it names and has: those of towers that were not loaded are named too."""
    named = {*(getattr(model, "_no_split_modules", None) or ())}
    return sorted(named & {type(module).__name__ for module in model.modules()})


def _hold_no_copy(trainer: Any) -> None:
    """While the weights are shared out accelerate 1.15 keeps the model's state, and with it each weight whole; of 4-bit ones unused."""
    prepare = trainer.accelerator.prepare

    def prepared(*given: Any, **options: Any) -> Any:
        trainer.model.state_dict = lambda *_, **__: {}
        try:
            return prepare(*given, **options)
        finally:
            del trainer.model.state_dict

    trainer.accelerator.prepare = prepared


def _adapter_settings(recipe: Recipe, model: Any, begins_with: Path | None) -> Any:
    if not begins_with:
        return lora_config(recipe.lora, model)
    settings = load_settings(begins_with)
    settings.inference_mode, settings.lora_dropout = False, recipe.lora.lora_dropout
    return settings


def _reproducible(kind: Any, scorer: Scorer | None, reporter: Reporter) -> Any:
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
            output.metrics["eval_loss"] = ranks.tell(output.metrics["eval_loss"])  # by which each decides alike whether to go on
            if scorer:
                output.metrics.update(scorer(self.model, self.state.global_step // int(self.args.eval_steps)))
            return output

        def _load_scaler(self, checkpoint: str | None) -> None:
            """What losses were scaled by, of a training that was begun in float16, unless it goes on in another format."""
            if self.accelerator.scaler is not None:
                super()._load_scaler(checkpoint)
            elif checkpoint and Path(checkpoint, SCALER).is_file():
                reporter.note("it was begun in float16, which this device needs not: it goes on in another format, and rounds otherwise")

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
    """Rows that are in a list as a `datasets.Dataset`."""
    from datasets import Dataset

    if isinstance(examples, Dataset):
        return examples
    return Dataset.from_dict({each.name: [getattr(example, each.name) for example in examples] for each in fields(examples[0])})

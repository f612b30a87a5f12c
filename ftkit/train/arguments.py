"""What TRL's trainers are told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.recipe import Dtype, Training
from ftkit.train.answers import RIGHT

MIN_LR_RATE = 0.1  # of the highest rate: where cosine_with_min_lr ends
DECAY_SHARE = 0.1  # of all steps: the last, in which warmup_stable_decay falls
SHARED_OUT = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}  # a decoder layer at a time


@dataclass(frozen=True)
class Settings:
    """What the plan decided and the machine gives, beside the recipe."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    dtype: Dtype  # what is computed in
    cuda: bool
    planned_bytes: int | None = None  # the peak: allocated on a GPU, or of the process; to hold the real one against
    held_at_most: int | None = None  # bytes that a process on a CPU may hold before it gives its heap back; None: any
    longest_tokens: int | None = None  # of the longest row; shorter ones go together in its room. None: as many rows always
    most_learnt_tokens: int = 0  # of a row
    packing: bool = False
    fsdp: bool = False  # several processes share the weights out

    @property
    def max_tokens(self) -> int | None:
        """That a micro-batch holds, padding included."""
        return None if self.longest_tokens is None else self.per_device_train_batch_size * self.longest_tokens

    @property
    def max_learnt_tokens(self) -> int:
        return self.per_device_train_batch_size * self.most_learnt_tokens


def arguments(training: Training, settings: Settings, rows: int, checkpoints: Path) -> dict[str, Any]:
    """The arguments of TRL's configs, for a training on so many rows that writes its checkpoints there."""
    per_epoch = math.ceil(rows / (settings.per_device_train_batch_size * settings.gradient_accumulation_steps))
    steps = training.max_steps or math.ceil(per_epoch * training.num_train_epochs)
    course: dict[str, dict[str, float]] = {
        "cosine_with_min_lr": {"min_lr_rate": MIN_LR_RATE},
        "warmup_stable_decay": {"num_decay_steps": max(1, round(steps * DECAY_SHARE))},
    }
    evaluate_every = max(1, min(steps, round(per_epoch / training.evaluations_per_epoch)))
    return {
        "output_dir": str(checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        # accelerate 1.15's, of FSDP, draws another dropout as it recomputes, and hides adapters from PEFT.
        "activation_checkpointing": settings.gradient_checkpointing,  # transformers 5.23 renamed it
        "activation_checkpointing_kwargs": {"use_reentrant": False} if settings.gradient_checkpointing else None,
        "fsdp": settings.fsdp or None,
        "fsdp_config": {**SHARED_OUT} if settings.fsdp else None,
        "learning_rate": training.peak_learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "lr_scheduler_kwargs": course.get(training.lr_scheduler_type, {}),
        "warmup_steps": round(steps * training.warmup_share),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_bnb_8bit" if training.optim == "adamw_8bit" else training.optim,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "seed": training.seed,
        "data_seed": training.seed,
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",  # with loss scaling
        "use_cpu": not settings.cuda,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "dataloader_pin_memory": settings.cuda,
        "train_sampling_strategy": "group_by_length",
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "eval_strategy": "steps",
        "eval_steps": evaluate_every,
        "save_strategy": "steps",
        "save_steps": evaluate_every,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": RIGHT if training.metric_for_best_model == "right" else "eval_loss",
        "greater_is_better": training.metric_for_best_model == "right",
        "prediction_loss_only": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": list(training.report_to),
        "project": "ftkit",  # that trackio files it under; a Space of the hub is named by its own environment alone
        "disable_tqdm": True,
    }

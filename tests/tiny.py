"""Tiny models made on the spot: a two-layer Llama with random weights and a byte tokenizer that has a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.recipe import Recipe
from ftkit.train.arguments import Settings

if TYPE_CHECKING:
    from ftkit.line.job import Job

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SETTINGS = Settings(per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=False, dtype="float32", cuda=False)


def config(**changes: Any) -> Any:
    """128 wide, so that each row holds two NF4 blocks."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 260, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": 257, "bos_token_id": None,
        "pad_token_id": 258,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def make_model(folder: Path, **changes: Any) -> Path:
    """Write weights (float32 values that bfloat16 holds), config and tokenizer."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(**changes), dtype=torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")  # noqa: S106
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """A LoRA adapter with random A and B; the PEFT model on a float32 base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"target_modules": "all-linear", **settings}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder)
    return adapted


def recipe(model: Path, lora: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """A recipe of a few steps."""
    settings = {"max_steps": 4, "learning_rate": 1e-3, "effective_batch_size": 2, "max_length": 128, "evaluations_per_epoch": 3, **training}
    return Recipe.model_validate({"model": str(model), "training": settings, "lora": {"r": 4, "lora_alpha": 8, **(lora or {})}})


# What a training records of itself.
TRAINED: dict[str, Any] = {
    "steps": 1, "best_step": 1, "best_validation_loss": 1.0, "first_validation_loss": 2.0, "trained_tokens": 10, "seconds": 1.0,
    "tokens_per_second": 1.0, "peak_bytes": 1, "peak_is": "held in RAM", "resumed_from_step": 0, "verdict": "trained enough",
    "curve": [],
}  # fmt: skip


def trained_job(folder: Path) -> Job:
    """The job of a folder's recipe, whose training is on record with the adapter that lies beside it."""
    from ftkit.line.job import open_job
    from ftkit.line.plan import training_inputs

    def make(made: Path) -> dict[str, Any]:
        shutil.copytree(folder / "adapter", made / "adapter")
        return TRAINED

    job = open_job(folder)
    with job.run:
        job.run.ensure("train", training_inputs(job), make, keep=True)
    return job

"""What fits: the memory of a training step, the choice of batch × accumulation, and what the later steps need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ftkit.memory import activations, inventory
from ftkit.memory.inventory import Inventory
from ftkit.recipe import Method, Recipe

MARGIN = 0.10  # of the budget, kept for what the activation estimate leaves out
CUDA_CONTEXT_BYTES = 500 << 20  # an allowance for the CUDA context and cuBLAS workspaces, not a measurement
# Bits a weight of the block formats, from ggml's block sizes (bytes × 8 ÷ elements). The K mixtures (…_K_M, …_K_S)
# choose by tensor and are not computed here.
GGUF_BITS = {"F16": 16.0, "BF16": 16.0, "Q8_0": 34 * 8 / 32, "Q6_K": 210 * 8 / 256, "Q5_0": 22 * 8 / 32, "Q5_1": 24 * 8 / 32,
             "Q4_0": 18 * 8 / 32, "Q4_1": 20 * 8 / 32, "IQ4_NL": 18 * 8 / 32, "IQ4_XS": 136 * 8 / 256}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """One method at one batch size. `activation_bytes` is an estimate, the rest is counted."""

    inventory: Inventory
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    activation_bytes: int
    context_bytes: int
    budget_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.inventory.fixed_bytes + self.activation_bytes + self.context_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes * (1 - MARGIN)


@dataclass(frozen=True)
class LaterStep:
    """What a step after training needs. Disk and bytes moved follow from the parameter count."""

    name: str
    peak_ram_bytes: int
    disk_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen fit, the same length under the three methods, and the later steps."""

    device_name: str
    max_length: int  # tokens of the longest row that the step will see
    compute_dtype: str
    chosen: Fit
    methods: tuple[Fit, ...]
    later: tuple[LaterStep, ...]

    @property
    def disk_bytes(self) -> int:
        return sum(step.disk_bytes for step in self.later)

    @classmethod
    def load(cls, record: dict[str, Any]) -> MemoryPlan:
        """The plan whose `dataclasses.asdict` was recorded."""

        def fit(entry: dict[str, Any]) -> Fit:
            return Fit(**{**entry, "inventory": Inventory(**entry["inventory"])})

        return cls(
            **{
                **record,
                "chosen": fit(record["chosen"]),
                "methods": tuple(map(fit, record["methods"])),
                "later": tuple(LaterStep(**entry) for entry in record["later"]),
            }
        )


def batch_sizes(effective: int) -> list[int]:
    """The divisors of the effective batch size, largest first: batch × accumulation is then always exactly it."""
    return [size for size in range(effective, 0, -1) if effective % size == 0]


def choose_fit(config: Any, counted: Inventory, recipe: Recipe, length: int, budget_bytes: int, compute_bytes: int, on_cuda: bool) -> Fit:
    """The largest batch that fits, without checkpointing if it can be; else the smallest there is, which does not fit.

    A larger batch moves more tokens a second; checkpointing computes each layer's forward twice, so it comes only where
    a batch of the same size does not fit without it.
    """
    training = recipe.training
    sizes = [training.per_device_train_batch_size] if training.per_device_train_batch_size else batch_sizes(training.effective_batch_size)
    checkpointings = [False, True] if training.gradient_checkpointing is None else [training.gradient_checkpointing]
    shape = activations.shape(config)
    fit = None
    for size in sizes:
        for checkpointing in checkpointings:
            fit = Fit(
                inventory=counted,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=-(-training.effective_batch_size // size),
                gradient_checkpointing=checkpointing,
                activation_bytes=activations.estimate_bytes(shape, size, length, checkpointing=checkpointing, compute_bytes=compute_bytes),
                context_bytes=CUDA_CONTEXT_BYTES if on_cuda else 0,
                budget_bytes=budget_bytes,
            )
            if fit.fits:
                return fit
    assert fit
    return fit


def make_plan(
    config: Any, recipe: Recipe, length: int, device_name: str, budget_bytes: int, *, on_cuda: bool, bfloat16: bool
) -> MemoryPlan:
    """Plan a run for rows of up to `length` tokens.

    Parameters, trainable parameters and the bytes of weights, gradients and optimizer are exact; activations are
    `activations.estimate_bytes`.
    """
    compute_bytes = 2 if bfloat16 else 4
    fits = {
        method: choose_fit(
            config, inventory.count(config, method, recipe.lora, recipe.training.optim, compute_bytes),
            recipe, length, budget_bytes, compute_bytes, on_cuda,
        )
        for method in get_args(Method)
    }  # fmt: skip
    chosen = fits[recipe.training.method]
    return MemoryPlan(
        device_name=device_name,
        max_length=length,
        compute_dtype="bfloat16" if bfloat16 else "float32",
        chosen=chosen,
        methods=tuple(fits[method] for method in ("full", "lora", "qlora")),
        later=tuple(later_steps(config, chosen.inventory, recipe.ship.quantization)),
    )


def later_steps(config: Any, counted: Inventory, quantization: str) -> Sequence[LaterStep]:
    """Merge, convert and quantise: what each writes, reads and holds.

    A 16-bit file has 2 bytes a parameter. The merge holds one weight in float32, twice, and its 16-bit copy;
    llama-quantize holds one tensor in float32 and its result. The K mixtures are given as the size of their next larger
    block format, an upper bound.
    """
    shape = activations.shape(config)
    largest = max(shape.vocab_size * shape.hidden_size, shape.hidden_size * shape.intermediate_size)
    half = 2 * counted.parameters
    steps = [
        LaterStep("merge", largest * (4 + 4 + 2), half, half),
        LaterStep("convert to F16", largest * (4 + 2), half, half),
    ]
    for name in dict.fromkeys(("Q8_0", quantization)):
        if name != "F16":
            bits = GGUF_BITS.get(name) or GGUF_BITS["Q6_K" if name.startswith(("Q4", "Q5", "IQ4")) else "Q4_1"]
            size = int(counted.parameters * bits / 8)
            steps.append(LaterStep(f"quantise to {name}", largest * 5, size, half))
    return steps

"""Names inside other libraries that ftkit replaces, calls or overrides: two tables. A name that is gone is an error, never another path."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from ftkit.errors import ToolFailedError

When = Literal["tracing", "tracing for CUDA", "tracing DoRA", "training", "loading in 4 bits"]


@dataclass(frozen=True)
class Traced:
    """What the replacements of a trace depend on."""

    attention: Callable[..., Any] | None  # in place of scaled_dot_product_attention; None on a CPU
    padded: bool  # whether a batch's rows differ in length, so that a mask is built


@dataclass(frozen=True)
class Patch:
    """One name that is replaced, and put back afterwards."""

    when: When
    module: str
    name: str
    replacement: Callable[[Any], Any]  # from what it depends on (Traced, or None) to the object that takes the name's place
    why: str
    package: str  # the distribution, and the version of it that this was tried with
    tried: str


@dataclass(frozen=True)
class Inside:
    """One method of another library that is no promise of its, and that ftkit calls or overrides."""

    when: When
    module: str
    owner: str  # the class
    name: str
    why: str
    package: str
    tried: str


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a kernel that has no memory of its own."""


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    import torch

    return torch.ops.aten.native_dropout(input, p, True)[0] if training and p > 0 else input


def _is_bfloat16(input: Any, weight: Any, offs: Any) -> bool:
    import torch

    return bool(weight.dtype == torch.bfloat16)


def _dequantised(module: Any) -> Any:
    """A layer's weight in full, as PEFT asks for it; of a 4-bit layer that has no data yet, its shape."""
    import torch
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit):
        return module.weight
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return torch.empty(module.out_features, module.in_features, dtype=module.compute_dtype, device="meta")
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, state)


_CUDA: When = "tracing for CUDA"
_HEAD = "trl.kernels.chunked_logprob"
_TORCH, _TRANSFORMERS, _TRL, _PEFT = ("torch", "2.13.0"), ("transformers", "5.23.0"), ("trl", "1.16.0"), ("peft", "0.21.2")
_NO_VALUES = "asks for values that fake tensors do not have; without an answer the mask is built in full"

# Functions, not torch function modes: a mode is not active while checkpointing recomputes.
PATCHES: tuple[Patch, ...] = (
    Patch(_CUDA, "torch.nn.functional", "scaled_dot_product_attention", lambda traced: traced.attention,
          "the CPU's attention allocates other tensors than a GPU's", *_TORCH),
    Patch(_CUDA, "torch.nn.functional", "dropout", lambda _: _dropout, "a GPU keeps the mask as bytes", *_TORCH),
    Patch(_CUDA, "transformers.integrations.moe", "_can_use_grouped_mm", lambda _: _is_bfloat16,
          "PyTorch's meta kernel takes bfloat16 alone; transformers' own operator allocates the same for the rest", *_TRANSFORMERS),
    Patch(_CUDA, _HEAD, "TOKEN_CHUNK_SIZE", lambda _: 1 << 40, "all tokens in one tile, whose size is capped later", *_TRL),
    Patch(_CUDA, _HEAD, "_forward_tile", lambda _: _nothing, "Triton's kernel has no memory of its own", *_TRL),
    Patch(_CUDA, _HEAD, "_backward_tile", lambda _: _nothing, "Triton's kernel has no memory of its own", *_TRL),
    Patch(_CUDA, _HEAD, "_addmm_fp32", lambda _: _nothing, "Triton's kernel has no memory of its own", *_TRL),
    Patch("tracing", "transformers.masking_utils", "is_tracing", lambda _: lambda *a, **k: False, _NO_VALUES, *_TRANSFORMERS),
    Patch("tracing", "transformers.masking_utils", "fast_all", lambda traced: lambda mask: not traced.padded, _NO_VALUES, *_TRANSFORMERS),
    Patch("tracing", "transformers.masking_utils", "find_packed_sequence_indices", lambda _: _nothing, _NO_VALUES, *_TRANSFORMERS),
    Patch("tracing DoRA", "peft.tuners.lora.dora", "dequantize_module_weight", lambda _: _dequantised,
          "looks for Params4bit, which cannot wrap a fake tensor", *_PEFT),
    Patch("tracing DoRA", "peft.tuners.lora.dora", "deepcopy", lambda _: lambda layer: layer,
          "bitsandbytes cannot copy a weight on the meta device; nothing is changed in the copy", *_PEFT),
    Patch("training", "trl.trainer.utils", "_use_triton", lambda _: lambda device: True,
          "without Triton TRL scores every position with the whole vocabulary, labelled or not; loss and gradients are the same", *_TRL),
    Patch("loading in 4 bits", "bitsandbytes.nn.modules", "has_avx512bf16", lambda _: lambda: False,
          "a layer is repacked at its first evaluation on such a CPU, and then computes without gradients, in training too",
          "bitsandbytes", "0.50.2"),
)  # fmt: skip


INSIDES: tuple[Inside, ...] = (
    Inside("training", "transformers.trainer", "Trainer", "_get_train_sampler",
           "else rows come in an order that no seed fixes", *_TRANSFORMERS),
    Inside("training", "transformers.trainer", "Trainer", "_load_best_model",
           "a finished training is taken up with it", *_TRANSFORMERS),
)  # fmt: skip


@contextlib.contextmanager
def applied(*when: When, to: Traced | None = None) -> Iterator[None]:
    """Replace the names of these rows for the time of the context.

    Raises ToolFailedError where one of them is gone, or one that is called or overridden meanwhile.
    """
    for inside in INSIDES:
        if inside.when in when and not hasattr(getattr(_module(inside.module), inside.owner, None), inside.name):
            raise _gone(inside, f"{inside.owner}.{inside.name}", "uses")
    rows = [patch for patch in PATCHES if patch.when in when]
    kept = [(place, patch, getattr(place, patch.name)) for patch in rows for place in [_place(patch)]]
    try:
        for place, patch, _ in kept:
            setattr(place, patch.name, patch.replacement(to))
        yield
    finally:
        for place, patch, value in kept:
            setattr(place, patch.name, value)


def _place(patch: Patch) -> types.ModuleType:
    place = _module(patch.module)
    if place is None or not hasattr(place, patch.name):
        raise _gone(patch, patch.name, "replaces")
    return place


def _module(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _gone(row: Patch | Inside, name: str, does: str) -> ToolFailedError:
    return ToolFailedError(
        f"{row.package} {version(row.package)} has no {row.module}.{name} any more, which ftkit {does} while {row.when}: {row.why}.",
        f"pip install '{row.package}=={row.tried}'",
    )


@contextlib.contextmanager
def without_trainer() -> Iterator[None]:
    """A stand-in for `trl.trainer.utils`, of which TRL's loss head wants one function in its backward pass.

    `maybe_gather_lm_head_ctx` matters to DeepSpeed alone, and importing the trainer for it takes seconds.
    """
    name = "trl.trainer.utils"
    if name in sys.modules:
        yield
        return
    stand_in = types.ModuleType(name)
    stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]

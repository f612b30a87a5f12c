"""What an adapter changes: PEFT's own deltas, under the names that the checkpoint has for the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.errors import ModelError, first_line
from ftkit.memory.model import adapted_layers, inject, quantized_layers
from ftkit.model.adapter import load_config, load_tensors
from ftkit.model.four_bits import fused_experts
from ftkit.model.source import from_files, shapes_of
from ftkit.recipe import Lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
TRAINED_BASE = "merge it with the base that it was trained on"


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one tensor of the checkpoint.

    The tensor is a stack of matrices, of experts one each, else a single one; each is made of rows of the model's own weight.
    """

    tensor: str  # its name in the checkpoint
    parameter: str  # the weight of the model that it is, or is a part of
    quantized: bool  # whether QLoRA trains on it in 4 bits
    shape: tuple[int, ...]
    rows: torch.Tensor  # (matrices, rows of each): the model's rows, counted through all experts, in the tensor's order
    transposed: bool  # whether the tensor holds those rows as columns
    factors: Factors

    def matrices(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Left and right of each matrix in turn; left × right × scaling is what is added to it, in float32."""
        for numbers in self.rows:
            left, right = self.factors.of(numbers)
            yield (right.T.contiguous(), left.T) if self.transposed else (left, right)


@dataclass(frozen=True)
class Factors:
    """The A and B of one adapted weight, as left (experts, rows, r) and right (experts, r, columns)."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float

    def of(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of some rows of one expert, which are counted through all of them."""
        rows = self.left.shape[1]
        expert = int(numbers[0]) // rows
        return self.left[expert][numbers % rows], self.right[expert]


def model_of(base: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder on the meta device, as transformers loads it: it knows by which names its weights were there."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base, device_map="meta", use_safetensors=True, **from_files(trust_remote_code)
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load {base}: {first_line(error)}.", "fetch or copy the model again, whole") from None
    return model


def deltas_of(base: Path, adapter: Path, *, trust_remote_code: bool = False) -> list[Delta]:
    """Every weight that the adapter in a folder changes. Raises ModelError as `changes` does, and for an adapter that is not whole."""
    from peft import PeftConfig, get_peft_model

    load_config(adapter)
    tensors = load_tensors(adapter)
    with warnings.catch_warnings():  # PEFT 0.21 tells of its own patterns for fused experts
        warnings.filterwarnings("ignore", message=r".*(rank|alpha)_pattern keys did not match.*", category=RuntimeWarning)
        settings = PeftConfig.from_pretrained(adapter)
        settings.base_model_name_or_path = None  # another folder may hold the same model
        adapted = get_peft_model(model_of(base, trust_remote_code=trust_remote_code), settings)
    _fill(adapted, tensors)
    return changes(adapted, base)


def _fill(adapted: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put an adapter's A and B into its layers. Raises ModelError where one is missing, has no place or another shape."""
    import torch

    places = {
        name.replace(".default", ""): (name, parameter)
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name and ".default" in name
    }
    for name in sorted(places.keys() ^ tensors.keys()):
        what = "is not whole: it lacks" if name in places else "has"
        raise ModelError(
            f"The adapter {what} {name.removeprefix(PREFIX)}, which {'its' if name in places else 'no'} layer has.", TRAINED_BASE
        )
    for name, (path, parameter) in places.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(
                f"The adapter's {name.removeprefix(PREFIX)} is {tuple(tensors[name].shape)}, the base wants {tuple(parameter.shape)}.",
                TRAINED_BASE,
            )
        owner, _, leaf = path.rpartition(".")
        setattr(adapted.get_submodule(owner), leaf, torch.nn.Parameter(tensors[name].float(), requires_grad=False))


def refuse_what_cannot_be_merged(base: Path, lora: Lora, *, trust_remote_code: bool = False) -> None:
    """Raise ModelError for targets whose adapter could not be merged into the files of `base`: before training, not after."""
    changes(inject(model_of(base, trust_remote_code=trust_remote_code), lora), base)


def changes(adapted: Any, base: Path) -> list[Delta]:
    """What an adapter on a meta model changes in the checkpoint of `base`, by PEFT's layers and transformers' names.

    Raises ModelError for a weight that the checkpoint does not have, and for one that the model uses in two places.
    """
    import torch

    patches.require("merging")
    from transformers.core_model_loading import revert_weight_conversion

    model = adapted.get_base_model()
    shapes = shapes_of(base)
    quantized = {f"{name}.weight" for name in quantized_layers(model)} | {name for *_, name in fused_experts(model)}
    quantized = {name.replace(".base_layer", "") for name in quantized}
    tied = _tied(model)
    found = []
    for parameter, module in adapted_layers(adapted):
        if parameter in tied:
            raise ModelError(
                f"The adapter changes {parameter}, which the model uses in two places (tied weights): merged, both would change.",
                "name other layers in lora.target_modules",
            )
        shape = _shape(module)
        numbered = torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)  # each row's number in its place
        try:
            pieces = revert_weight_conversion(model, {parameter: numbered})
        except (RuntimeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise ModelError(
                f"{parameter} stands in one tensor with other weights, which this merge does not take apart: {first_line(error)}.",
                "leave that layer out of lora.target_modules",
            ) from None
        for name, piece in pieces.items():
            transposed = piece.shape[-1] != 1
            there = (*piece.shape[:-2], shape[-1], piece.shape[-1]) if transposed else (*piece.shape[:-1], shape[-1])
            if shapes.get(name) != there:
                is_there = f"is {shapes[name]} there" if name in shapes else "is not there"
                raise ModelError(f"The adapter changes {parameter}, as {name} {there} in {base}; that {is_there}.", TRAINED_BASE)
            rows = piece.reshape(math.prod(piece.shape[:-2]), -1)
            found.append(Delta(name, parameter, parameter in quantized, there, rows, transposed, _factors(module)))
    return found


def _factors(module: Any) -> Factors:
    """As PEFT 0.21's `get_delta_weight` multiplies them (tuners/lora/layer.py). Raises ModelError for another kind of layer."""
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    scaling = module.scaling["default"]
    if isinstance(module, Embedding):
        return Factors(module.lora_embedding_A["default"].T[None], module.lora_embedding_B["default"].T[None], scaling)
    a, b = (getattr(module, f"lora_{kind}")["default"].weight for kind in "AB")
    if isinstance(module, Linear) or (isinstance(module, ParamWrapper) and len(_shape(module)) == 2):
        return Factors(b[None], a[None], scaling)
    if isinstance(module, ParamWrapper):
        a = a.reshape(module.num_experts, -1, a.shape[-1])  # (experts, r, in)
        b = b.reshape(b.shape[0], -1, module.num_experts).permute(2, 0, 1)  # (experts, out, r)
        return Factors(b, a, scaling) if module._did_swap_in_out_features else Factors(a.transpose(1, 2), b.transpose(1, 2), scaling)
    raise ModelError(f"The adapter has a {type(module).__name__}, which this merge does not do.", TRAINED_BASE)


def _owner(module: Any) -> Any:
    """The module that has the weight which one of PEFT's layers, or several around each other, adapt."""
    while hasattr(module, "get_base_layer") and module.get_base_layer() is not module:
        module = module.get_base_layer()
    return module


def _shape(module: Any) -> tuple[int, ...]:
    """Of the weight that a layer of PEFT's adapts."""
    return tuple(getattr(_owner(module), getattr(module, "parameter_name", "weight")).shape)


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of parameters that stand for one weight with another's."""
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    return {name for names in named.values() if len(names) > 1 for name in names}

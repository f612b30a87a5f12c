"""What an adapter changes: PEFT's own deltas, under the names that the checkpoint has for the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.errors import ModelError, first_line
from ftkit.memory.model import adapted_layers, inject, quantized_layers
from ftkit.model.adapter import load_config, load_tensors
from ftkit.model.source import from_files, shapes_of
from ftkit.recipe import Lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
TRAINED_BASE = "merge it with the base that it was trained on"


@dataclass(frozen=True)
class Delta:
    """One weight that an adapter changes."""

    parameter: str  # its name in the model
    tensors: tuple[str, ...]  # of the checkpoint that hold it: of fused experts one for each
    quantized: bool  # whether QLoRA trains on it in 4 bits
    compute: Callable[[], dict[str, torch.Tensor]]  # what is added to each of those tensors, in float32


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
    shapes, quantized = shapes_of(base), {name.replace(".base_layer", "") for name in quantized_layers(model)}
    tied = _tied(model)
    found = []
    for parameter, module in adapted_layers(adapted):
        if parameter in tied:
            raise ModelError(
                f"The adapter changes {parameter}, which the model uses in two places (tied weights): merged, both would change.",
                "name other layers in lora.target_modules",
            )
        with torch.device("meta"):
            whole = torch.empty(_shape(module))
        try:
            pieces = revert_weight_conversion(model, {parameter: whole})
        except (RuntimeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise ModelError(
                f"{parameter} stands in one tensor with other weights, which this merge does not take apart: {first_line(error)}.",
                "leave that layer out of lora.target_modules",
            ) from None
        for name, piece in pieces.items():
            if shapes.get(name) != tuple(piece.shape):
                there = f"is {shapes[name]} there" if name in shapes else "is not there"
                raise ModelError(f"The adapter changes {parameter}, as {name} {tuple(piece.shape)} in {base}; that {there}.", TRAINED_BASE)

        def compute(parameter: str = parameter, module: Any = module) -> dict[str, torch.Tensor]:
            if hasattr(module, "parameter_name"):  # PEFT puts such a delta where the weight is, which is nowhere
                setattr(_owner(module), module.parameter_name, torch.nn.Parameter(torch.empty(0), requires_grad=False))
            with torch.no_grad():
                pieces: dict[str, torch.Tensor] = revert_weight_conversion(model, {parameter: module.get_delta_weight("default")})
            return pieces

        found.append(Delta(parameter, tuple(pieces), parameter.rpartition(".")[0] in quantized, compute))
    return found


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

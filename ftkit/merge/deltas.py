"""What an adapter changes: PEFT's own kinds of changes, under the names that the checkpoint has for the weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.errors import ModelError, first_line
from ftkit.memory.model import inject, load_config, meta_model
from ftkit.merge.kinds import Change, factors_of, turned
from ftkit.model.adapter import WITH_PEFT, load_settings, load_tensors, written_turned
from ftkit.model.four_bits import quantized_weights
from ftkit.model.source import Shapes, shapes_of
from ftkit.recipe import Lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIX = "base_model.model."
TRAINED_BASE = "merge it with the base that it was trained on"
WRAPPERS = re.compile(r"\.(base_layer|token_adapter)(?=\.)")  # of PEFT's, between a layer's name and its weight's
OF_LORA = re.compile(r"(?P<layer>.+)\.(?P<held>lora_[^.]+(\.weight)?)")
OF_TOKENS = ".token_adapter.trainable_tokens_delta"
# model_types whose head is the embedding's weight in llama.cpp too (src/models; its converter leaves out a head of their own).
HEAD_IS_EMBEDDING = ("bitnet", "cohere", "cohere2", "gemma", "gemma2", "openelm")


@dataclass(frozen=True)
class Delta:
    """How one tensor of the merged checkpoint is made of one of the source's, its own or (of an untied head) another.

    The tensor is a stack of matrices, of experts one each, else a single one; each is made of rows of the model's own weight.
    What has one dimension is a matrix of one column.
    """

    tensor: str  # its name in the checkpoint
    source: str  # that of the source's tensor
    parameter: str  # the weight of the model that it is, or is a part of
    quantized: bool  # whether QLoRA trains on it in 4 bits
    stored: tuple[int, ...]  # its shape there
    shape: tuple[int, ...]  # the same, with a column where it has one dimension
    rows: torch.Tensor  # (matrices, rows of each): the model's rows, counted through all experts, in the tensor's order
    transposed: bool  # whether the tensor holds those rows as columns
    change: Change
    resized: bool = False  # has other rows than the source's tensor

    def factors(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Left, right and scaling of the matrix of these rows; their product is what is added to it, in float32."""
        if not self.change.factors:
            return None
        left, right = self.change.factors.of(numbers)
        return *((right.T.contiguous(), left.T) if self.transposed else (left, right)), self.change.factors.scaling

    def instead(self, numbers: torch.Tensor, begin: int, end: int) -> torch.Tensor | None:
        """What stands there in place of the source's rows from `begin` to `end`."""
        if self.change.instead is None:
            return None
        weight = self.change.instead.reshape(-1, self.change.instead.shape[-1] if len(self.stored) > 1 else 1)
        return weight[:, begin:end][numbers].T if self.transposed else weight[numbers[begin:end]]

    @property
    def copied(self) -> bool:
        """Whether that is to be compared with the source's rows. Of other tokens it cannot be."""
        return self.change.copied and not self.resized


@dataclass(frozen=True)
class Changes:
    """All that an adapter does to a checkpoint."""

    deltas: dict[str, Delta]  # by the tensor's name
    config: dict[str, Any] = field(default_factory=dict)  # keys of the text model's config.json that are others
    let_go: Callable[[], None] = lambda: None  # of what was read of the adapter's file, which is mapped


def model_of(base: Path, shapes: Shapes | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder on the meta device, as transformers loads it: it knows by which names its weights were there.

    `shapes`: of the weights, where they are not all in the folder. Of their files the headers alone are read.
    Raises ModelError where it cannot be loaded, is quantised, or lacks a weight.
    """
    import torch

    config = load_config(base, trust_remote_code=trust_remote_code)
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in (shapes or shapes_of(base)).items()}
    try:
        kind = type(meta_model(config, trust_remote_code=trust_remote_code))
        loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
            None, config=config, state_dict=weights, device_map="meta", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot load {base}: {first_line(error)}.", "fetch or copy the model again, whole") from None
    model, info = loaded
    if lost := sorted(map(str, info["missing_keys"])):
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(f"The weights in {base} lack {lost[0]}{more}.", "fetch or copy the model again, whole")
    return model


@dataclass(frozen=True)
class Weights:
    """What the model has without an adapter, by transformers' names."""

    shapes: dict[str, tuple[int, ...]]
    ends: tuple[str, ...]  # of the input embedding, and of the head where it has one
    tied: tuple[frozenset[str], ...]  # names of one weight each
    quantized: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        named: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            named.setdefault(id(parameter), []).append(name)
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        return cls(
            shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            ends=tuple(f"{name}.weight" for end in ends for name, module in model.named_modules(remove_duplicate=False) if module is end),
            tied=tuple(frozenset(names) for names in named.values() if len(names) > 1),
            quantized=quantized_weights(model),
        )


def changes_of(
    base: Path, adapter: Path, shapes: Shapes | None = None, *, rounded: bool = False, trust_remote_code: bool = False
) -> Changes:
    """Every weight that the adapter in a folder changes, and of a `rounded` base every one that QLoRA has in 4 bits.

    `shapes`: of the base's weights, where they are not all in its folder.

    Raises ModelError as `changes` does, and for an adapter that is not whole.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    settings, mapped = load_settings(adapter), load_tensors(adapter)
    tensors: dict[str, torch.Tensor] = mapped
    shapes = shapes or shapes_of(base)
    model = model_of(base, shapes, trust_remote_code=trust_remote_code)
    tokens = _resize(model, tensors)
    weights = Weights.of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: what they are of is told apart or refused here
        try:
            adapted = get_peft_model(model, settings)
            tensors = _as_this_peft_has_them(adapted, tensors, adapter)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(f"PEFT cannot put the adapter in {adapter} on {base}: {first_line(error)}", TRAINED_BASE) from None
        _refuse_other_tensors(weights, get_peft_model_state_dict(adapted, save_embedding_layers=False), tensors)
    found = changes(adapted, weights, tensors, base, shapes, rounded=rounded)
    if tokens:
        whole = {delta.parameter for delta in found.deltas.values() if delta.change.instead is not None}
        for end in weights.ends:
            if not whole & next((names for names in weights.tied if end in names), {end}):
                raise ModelError(f"The adapter has embeddings of {tokens} tokens, and no {end} of as many.", TRAINED_BASE)
        found.config["vocab_size"] = tokens
    mapped.let_go()
    return replace(found, let_go=mapped.let_go)


def _resize(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Give the model as many tokens as the adapter brings embeddings for; None where they are as many as before."""
    ends = Weights.of(model).ends
    sizes = {len(tensor) for name, tensor in tensors.items() if _parameter_of(name) in ends and not name.endswith(OF_TOKENS)}
    if len(sizes) > 1:
        raise ModelError(f"The adapter has embeddings of {' and of '.join(map(str, sorted(sizes)))} tokens.", TRAINED_BASE)
    if not sizes - {len(model.get_input_embeddings().weight)}:
        return None
    model.resize_token_embeddings(max(sizes), mean_resizing=False)
    return max(sizes)


def _parameter_of(name: str) -> str:
    """The model's name for the weight that a tensor of an adapter's file is, or is trained on."""
    return WRAPPERS.sub("", name.removeprefix(PREFIX)).replace(".trainable_tokens_delta", ".weight")


def _as_this_peft_has_them(adapted: Any, tensors: Mapping[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors as the installed PEFT would have written them.

    PEFT itself fuses those of experts that were layers of their own before transformers 5. Those of fused ones, which earlier
    versions of PEFT kept the other way round, are changed over: by their shapes, and where both fit by the version.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    patches.require("merging")
    tensors = dict(tensors)
    for path, module in adapted.named_modules():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        if a in tensors and type(module).__name__ == "ParamWrapper" and module.get_param().dim() == 3:
            transposed = not module._did_swap_in_out_features
            now = module.get_param().shape[1:] if transposed else module.get_param().shape[:0:-1]  # in of A, out of B
            has = (tensors[a].shape[-1], tensors[b].shape[0])
            if has == tuple(now[::-1]) and (has != tuple(now) or written_turned(adapter, transposed)):
                tensors[a], tensors[b] = turned(tensors[a], tensors[b], module.num_experts)
    converted: dict[str, torch.Tensor] = convert_peft_adapter_state_dict_for_transformers(adapted, adapted.peft_config["default"], tensors)
    return converted


def _refuse_other_tensors(weights: Weights, wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError where one is missing, has no place or another shape. PEFT may write the embedding and the head beside it."""
    for name in sorted(wanted.keys() ^ tensors.keys()):
        if name in wanted or _parameter_of(name) not in weights.ends:
            what, whose = ("is not whole: it lacks", "its") if name in wanted else ("has", "no")
            raise ModelError(f"The adapter {what} {name.removeprefix(PREFIX)}, which {whose} layer has.", TRAINED_BASE)
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            has, wants = tuple(tensors[name].shape), tuple(wanted[name].shape)
            raise ModelError(f"The adapter's {name.removeprefix(PREFIX)} is {has}, the base wants {wants}.", TRAINED_BASE)


def refuse_what_cannot_be_merged(base: Path, lora: Lora, *, trust_remote_code: bool = False) -> None:
    """Raise ModelError for targets whose adapter could not be merged into the files of `base`: before training, not after.

    And for the head, on which TRL trains no adapter: it computes the loss from the head's own weight.
    """
    from peft import get_peft_model_state_dict

    shapes = shapes_of(base)
    model = model_of(base, shapes, trust_remote_code=trust_remote_code)
    weights = Weights.of(model)
    adapted = inject(model, lora)
    found = changes(adapted, weights, get_peft_model_state_dict(adapted, save_embedding_layers=False), base, shapes)
    for head in weights.ends[1:]:
        if any(delta.parameter == head and delta.change.factors for delta in found.deltas.values()):
            name = head.removesuffix(".weight")
            raise ModelError(
                f"No adapter is trained on {name}: TRL computes the loss from its own weight.", "leave it out of lora.target_modules"
            )


def changes(
    adapted: Any, weights: Weights, tensors: Mapping[str, torch.Tensor], base: Path, shapes: Shapes, *, rounded: bool = False
) -> Changes:
    """What an adapter on a meta model, of these tensors, changes in the checkpoint of `base`, by PEFT's layers and transformers' names.

    `rounded`: weights that QLoRA has in 4 bits are changed without an adapter too.

    Raises ModelError for a weight that the checkpoint does not have, and for one that the model uses in two places and that
    cannot become two.
    """
    model = adapted.get_base_model()
    by_parameter = _by_parameter(adapted, tensors)
    if rounded:
        by_parameter |= {name: Change() for name in sorted(weights.quantized - by_parameter.keys())}
    untied = _untie(model, weights, by_parameter)
    found: dict[str, Delta] = {}
    for parameter, change in by_parameter.items():
        twins = next((names for names in weights.tied if parameter in names), frozenset())
        for name, stored, rows, transposed in _pieces(model, parameter, weights.shapes[parameter]):
            source = name
            if name not in shapes and twins:  # the files hold it once, under another of its names
                if parameter not in untied:
                    continue
                source = next((n for twin in twins for n, *_ in _pieces(model, twin, weights.shapes[twin]) if n in shapes), name)
            there = shapes.get(source)
            resized = there and parameter in weights.ends and change.instead is not None and there[1:] == stored[1:]
            if there != stored and not resized:
                is_there = f"is {there} there" if there else "is not there"
                raise ModelError(f"The adapter changes {parameter}, as {source} {stored} in {base}; that {is_there}.", TRAINED_BASE)
            if change.tokens is not None and not (change.tokens >= 0).logical_and(change.tokens < rows.numel()).all():
                raise ModelError(f"The adapter trains token {int(change.tokens.max())}, and {parameter} has {rows.numel()}.", TRAINED_BASE)
            if change.factors and change.factors.of_columns and change.factors.magnitude is not None and rows.shape[0] != 1:
                raise ModelError(f"The adapter has DoRA's magnitudes of {parameter}, which stands in several matrices.", WITH_PEFT)
            matrix = stored if len(stored) > 1 else (*stored, 1)
            quantized = parameter in weights.quantized and change.instead is None
            found[name] = Delta(name, source, parameter, quantized, stored, matrix, rows, transposed, change, there != stored)
    return Changes(found, {"tie_word_embeddings": False} if untied else {})


def _by_parameter(adapted: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Change]:
    """What is done to each weight of the model, by its name there."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    held: dict[str, dict[str, torch.Tensor]] = {}  # of each layer with A and B, by their names in it
    found: dict[str, Change] = {}
    for name, tensor in tensors.items():
        if of_lora := OF_LORA.fullmatch(name):
            held.setdefault(of_lora["layer"], {})[of_lora["held"]] = tensor
        elif not name.endswith(OF_TOKENS):
            found[_parameter_of(name)] = Change(instead=tensor, copied=name.endswith(".base_layer.weight"))
    adapters = {id(m.token_adapter): path for path, m in adapted.named_modules() if isinstance(m, TrainableTokensWrapper)}
    for path, module in adapted.named_modules():
        layer = _parameter_of(f"{path}.")
        if isinstance(module, LoraLayer) and path in held:
            parameter = layer + getattr(module, "parameter_name", "weight")
            found[parameter] = replace(found.get(parameter, Change()), factors=factors_of(module, held.pop(path)))
        elif isinstance(module, TrainableTokensWrapper):  # a tied head's follows the embedding's
            owner = module.token_adapter.tied_adapter or module.token_adapter
            tokens, trained = torch.tensor(owner.token_indices["default"]), tensors[adapters[id(owner)] + OF_TOKENS]
            found[layer + "weight"] = replace(found.get(layer + "weight", Change()), tokens=tokens, trained=trained)
    if held:
        raise ModelError(f"The adapter has A and B inside of {_parameter_of(next(iter(held)))}, which it trains whole.", WITH_PEFT)
    return found


def _untie(model: Any, weights: Weights, by_parameter: dict[str, Change]) -> frozenset[str]:
    """The names of the embedding's weight and the head's, where they were one and are two now; each is in `by_parameter` then.

    Raises ModelError for other weights of several names that are not changed alike under each.
    """
    untied: frozenset[str] = frozenset()
    for names in weights.tied:
        first, *others = (by_parameter.get(name) for name in sorted(names))
        if all(first == other for other in others):
            continue
        if names != frozenset(weights.ends) or model.config.model_type in HEAD_IS_EMBEDDING:
            changed = next(name for name in sorted(names) if name in by_parameter)
            with_own = (
                "" if names != frozenset(weights.ends) else f", and llama.cpp has no {model.config.model_type} with a head of its own"
            )
            raise ModelError(
                f"The adapter changes {changed}, which the model uses in two places (tied weights){with_own}: merged, both would change.",
                "name other layers in lora.target_modules, or train both alike (PEFT's ensure_weight_tying)",
            )
        by_parameter.update({name: by_parameter.get(name, Change()) for name in names})
        untied = names
    return untied


def _pieces(model: Any, parameter: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor, bool]]:
    """Each tensor of the files that a weight of the model is in: name, shape, the weight's rows in its order, whether as columns."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    height = shape[:-1] if len(shape) > 1 else shape
    numbered = torch.arange(math.prod(height)).reshape(*height, *([1] if len(shape) > 1 else []))  # each row's number in its place
    try:
        pieces = revert_weight_conversion(model, {parameter: numbered})
    except (RuntimeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ModelError(
            f"{parameter} stands in one tensor with other weights, which this merge does not take apart: {first_line(error)}.",
            "leave that layer out of lora.target_modules",
        ) from None
    if not torch.equal(torch.cat([piece.flatten() for piece in pieces.values()]).sort().values, numbered.flatten()):
        raise ModelError(
            f"{parameter} stands in the files as other numbers than in the model, which this merge does not compute.",
            "leave that layer out of lora.target_modules",
        )
    for name, piece in pieces.items():
        if len(shape) == 1:
            yield name, tuple(piece.shape), piece.reshape(1, -1), False
            continue
        transposed = piece.shape[-1] != 1
        stored = (*piece.shape[:-2], shape[-1], piece.shape[-1]) if transposed else (*piece.shape[:-1], shape[-1])
        yield name, stored, piece.reshape(math.prod(piece.shape[:-2]), -1), transposed

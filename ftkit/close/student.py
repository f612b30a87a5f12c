"""A quantised GGUF as a model in torch, and what of it can be trained and written back in place: vectors in float32, and rows' scales."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.close.packed import Blocks, PackedWeight
from ftkit.close.scales import Scales
from ftkit.engines import hf
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError, first_line
from ftkit.gguf.types import has_scales
from ftkit.model.source import from_files, gguf_architecture, gguf_names, open_gguf
from ftkit.plan.cost import ClosingWay, Way, closing_ways

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXACT = {"float32": 1e-6, "bfloat16": 2**-7}  # how far a number of the file may be from the model's, in units of the largest


@dataclass(frozen=True)
class Lossless:
    """A tensor of the file in float32, and the parameter that it is; `offset`: what the file has more (Gemma's 1 + w)."""

    name: str
    parameter: torch.nn.Parameter
    offset: float

    @property
    def scale(self) -> float:
        """The mean size of its numbers in the file."""
        return float((self.parameter.detach() + self.offset).abs().mean())


def ways_of(path: Path, rows: Sequence[Forced], *, bfloat16: bool, cuda: bool) -> tuple[ClosingWay, ...]:
    """How the weights of a file can be computed with to learn from these rows, and what that takes, the fastest first."""
    tensors = open_gguf(path).tensors
    return closing_ways(
        {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors},
        {tensor.name: tensor.tensor_type.name for tensor in tensors},
        length=max((len(row.ids) for row in rows), default=1),
        rows=len(rows),
        compute_bytes=2 if bfloat16 else 4,
        on_cuda=cuda,
    )


def load_student(
    path: Path, model: Path, way: Way = "dequantised", *, bfloat16: bool, cuda: bool, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that a GGUF of `model` holds: its weights dequantised by transformers, or packed.

    Raises ModelError where transformers does not read this architecture's files, or they cannot be computed with packed,
    DoesNotFitError where memory runs out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    try:
        config = AutoConfig.from_pretrained(model, **from_files(trust_remote_code)).get_text_config()  # a GGUF holds no pictures
        if way != "dequantised":
            student = _packed(path, config, dtype, way, cuda=cuda, trust_remote_code=trust_remote_code)
        else:
            with patches.applied("reading GGUF files"):
                student, info = AutoModelForCausalLM.from_pretrained(
                    str(path.parent), gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), config=config, dtype=dtype,
                    output_loading_info=True, **({"device_map": {"": 0}} if cuda else {}), **from_files(trust_remote_code),
                )  # fmt: skip
            if missing := info["missing_keys"]:
                _fill(student, path, missing)
    except (
        ValueError,
        LookupError,
        ImportError,
        OSError,
        TypeError,
        AttributeError,
        RuntimeError,
        MemoryError,
        NotImplementedError,
    ) as error:
        if refused := hf.out_of_memory(error, f"load {path.name}"):
            raise refused from None
        raise ModelError(
            f"transformers does not read {path.name}: {first_line(error)}.", "ship it as it is: ship.closing_steps=0"
        ) from None
    return student.requires_grad_(False).eval()


def _packed(path: Path, config: Any, dtype: torch.dtype, way: Way, *, cuda: bool, trust_remote_code: bool) -> PreTrainedModel:
    """The same with weights left packed, on the GPU or in the mapped file; tables of tokens in the file, whose rows are looked up.

    Names, and what llama.cpp's converter did to a tensor that has to be undone, are those of transformers' own loader: run on the
    numbers of a weight's rows, it tells their order.
    """
    import gguf
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    device, reader = torch.device("cuda", 0) if cuda else torch.device("cpu"), open_gguf(path)
    with init_empty_weights():
        student: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=trust_remote_code
        )
    processor, names = _as_loaded(student, reader)
    mapped = _mapped(path)
    packed: dict[str, PackedWeight] = {}
    for tensor in sorted(reader.tensors, key=lambda tensor: str(tensor.name)):  # of experts the gate comes before the up
        if not (name := names(tensor.name)):
            continue
        owner, _, leaf = name.rpartition(".")
        module = student.get_submodule(owner)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) > 1 and tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            part, order = _blocks(mapped, tensor), _order(processor, tensor.name, shape)
            if way != "mapped" and not isinstance(module, torch.nn.Embedding):
                part = replace(part, data=part.data.to(device))
            before = packed[name].parts if name in packed else ()
            packed[name] = PackedWeight((*before, part), shape[-1], device, dtype, order)
        else:
            values = processor.process(weights=gguf.dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
            _put(module, leaf, torch.from_numpy(values.copy()).to(device, dtype))
    for name, weight in packed.items():
        owner, _, leaf = name.rpartition(".")
        _put(student.get_submodule(owner), leaf, weight)
    for name, source in student.all_tied_weights_keys.items():
        if name not in packed and source in packed:
            owner, _, leaf = name.rpartition(".")
            table = packed[source]
            parts = [replace(part, data=part.data if way == "mapped" else part.data.to(device)) for part in table.parts]
            _put(student.get_submodule(owner), leaf, PackedWeight(parts, table.columns, device, dtype, table.order))
    if missing := [name for name, parameter in student.named_parameters() if parameter.is_meta]:
        raise ValueError(f"it holds nothing for {missing[0]}")
    for module in student.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    with torch.no_grad():
        student(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # what cannot be computed with packed weights says so
    return student


def _as_loaded(student: PreTrainedModel, reader: Any) -> tuple[Any, Callable[[str], str | None]]:
    """transformers' processor of a file's tensors, and the model's name of each. Raises ValueError where it does not know the kind."""
    from transformers import modeling_gguf_pytorch_utils as loader

    patches.require("computing with packed weights")
    architecture = gguf_architecture(reader)
    if re.sub("[-_]", "", architecture) not in (re.sub("[-_]", "", known) for known in loader.GGUF_SUPPORTED_ARCHITECTURES):
        raise ValueError(f"GGUF model with architecture {architecture} is not supported yet")
    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config=student.config.get_text_config().to_dict())
    names = loader.get_gguf_hf_weights_map(student, processor, architecture)
    return processor, lambda name: names.get(name) or names.get(name.removesuffix(".weight"))


def _mapped(path: Path) -> torch.Tensor:
    """The bytes of a file, read as they are looked at."""
    import torch

    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _blocks(mapped: torch.Tensor, tensor: Any) -> Blocks:
    """Of a tensor of the file, where they lie."""
    rows = reversed(tensor.shape[1:].tolist())
    return Blocks(mapped[tensor.data_offset :][: tensor.n_bytes].reshape(*rows, -1), int(tensor.tensor_type), str(tensor.name))


def _fill(student: PreTrainedModel, path: Path, missing: Collection[str]) -> None:
    """What is in a file, and transformers' loader does not find: it looks for Gemma 4's scales of layers without a suffix."""
    import gguf
    import torch

    reader = open_gguf(path)
    names, tensors = gguf_names(reader), {tensor.name: tensor for tensor in reader.tensors}
    for name in missing:
        if tensor := tensors.get(f"{names.get_name(name)}.weight"):
            owner, _, leaf = name.rpartition(".")
            there = getattr(student.get_submodule(owner), leaf)
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            _put(student.get_submodule(owner), leaf, values.to(there.device, there.dtype))


def _order(processor: Any, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Which row of the file each of the model's rows is; None: they are the same. Raises ValueError where more than rows change."""
    import numpy as np
    import torch

    if len(shape) > 2:  # experts: their gate and up become one, which is known by the name
        return None
    numbers = np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape)
    made = processor.process(weights=numbers, name=name)
    if made.weights is numbers and made.name == name:
        return None
    if made.name != name or made.weights.shape != shape or (made.weights != made.weights[:, :1]).any():
        raise ValueError(f"of {name} more is changed than the order of rows")
    return torch.from_numpy(made.weights[:, 0].astype(np.int64))


def _put(module: Any, leaf: str, value: Any) -> None:
    """A parameter or buffer of the model, or what stands where one stood. Raises ValueError where the shape is another."""
    import torch

    if (there := getattr(module, leaf)).shape != value.shape:
        raise ValueError(f"{type(module).__name__}.{leaf} is {tuple(there.shape)}, not {tuple(value.shape)}")
    if isinstance(value, PackedWeight):
        delattr(module, leaf)
        object.__setattr__(module, leaf, value)
    else:
        setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False) if leaf in module._parameters else value)


def lossless(student: PreTrainedModel, path: Path) -> list[Lossless]:
    """The vectors of the file in float32 – norms and biases – that are the model's own, number for number.

    The model then has them in float32, whatever it was loaded in: `running` computes with both.
    """
    import gguf
    import torch

    reader = open_gguf(path)
    names, tensors = gguf_names(reader), {tensor.name: tensor for tensor in reader.tensors}
    found = []
    for name, parameter in student.named_parameters():
        owner, _, kind = name.rpartition(".")
        tensor = tensors.get(f"{names.get_name(owner)}.{kind}")
        if tensor is None or tensor.tensor_type != gguf.GGMLQuantizationType.F32 or tuple(tensor.data.shape) != tuple(parameter.shape):
            continue
        there = torch.tensor(tensor.data)
        more = there - parameter.detach().float().cpu()
        offset, most = float(more.median().round()), EXACT[str(parameter.dtype).removeprefix("torch.")] * float(there.abs().max())
        if len(parameter.shape) == 1 and float((more - offset).abs().max()) <= most:
            parameter.data = (there - offset).to(parameter.device)
            found.append(Lossless(tensor.name, parameter, offset))
    return found


def scales(student: PreTrainedModel, path: Path) -> list[Scales]:
    """Those of its linear layers that are the file's tensors, row for row, whose types have some that can be trained; by name."""
    from gguf import GGMLQuantizationType

    tensors, mapped, packed = {str(tensor.name): tensor for tensor in open_gguf(path).tensors}, _mapped(path), is_packed(student)
    found = []
    for name, layer, order in _packed_layers(student) if packed else _layers_in_full(student, path):
        shape, kind = tuple(layer.weight.shape), GGMLQuantizationType(tensors[name].tensor_type).name
        if has_scales(name, shape, kind) and (packed or _holds(layer.weight, _blocks(mapped, tensors[name]), order)):
            found.append(Scales(name, kind, layer, order, student.device))
    return sorted(found, key=lambda one: one.name)


def _packed_layers(student: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear, torch.Tensor | None]]:
    """(tensor's name, layer, order of rows) of each linear layer that is one tensor of the file."""
    from torch import nn

    for layer in student.modules():
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, PackedWeight) and len(layer.weight.parts) == 1:
            yield layer.weight.parts[0].name, layer, layer.weight.order


def _layers_in_full(student: PreTrainedModel, path: Path) -> Iterator[tuple[str, torch.nn.Linear, torch.Tensor | None]]:
    """The same of a dequantised student; those of which more is changed than the order of rows are left out."""
    from torch import nn

    reader = open_gguf(path)
    try:
        processor, names = _as_loaded(student, reader)
    except ValueError:  # another of transformers' loaders knows this kind: what is as it lies in the file is found by its numbers
        known, there = gguf_names(reader), {str(tensor.name) for tensor in reader.tensors}
        for name, layer in student.named_modules():
            if isinstance(layer, nn.Linear) and (found := f"{known.get_name(name)}.weight") in there:
                yield found, layer, None
        return
    for tensor in reader.tensors:
        owner, _, leaf = (names(tensor.name) or "").rpartition(".")
        layer, shape = student.get_submodule(owner), tuple(int(size) for size in reversed(tensor.shape))
        if isinstance(layer, nn.Linear) and leaf == "weight" and tuple(layer.weight.shape) == shape:
            try:
                order = _order(processor, tensor.name, shape)
            except ValueError:
                continue
            yield str(tensor.name), layer, order


def _holds(weight: torch.Tensor, blocks: Blocks, order: torch.Tensor | None) -> bool:
    """Whether a weight is a tensor of the file, number for number; some rows at a time, as the heap would keep the holes of large ones."""
    import torch

    there = PackedWeight([blocks], weight.shape[1], torch.device("cpu"), torch.float32, order)
    least, most = map(float, weight.detach().aminmax())
    away = EXACT[str(weight.dtype).removeprefix("torch.")] * max(-least, most)
    return all(float((weight.detach()[which].float().cpu() - rows).abs().max()) <= away for which, rows in there.in_turn())


@contextmanager
def running(student: PreTrainedModel) -> Iterator[None]:
    """A student of 16 bits computes with its float32 vectors beside them."""
    import torch

    with torch.autocast(student.device.type, torch.bfloat16, enabled=student.config.dtype == torch.bfloat16):
        yield


@contextmanager
def learning(student: PreTrainedModel, *, recompute: bool = False) -> Iterator[None]:
    """A student of packed weights, or to `recompute`, keeps of each layer what goes into it, and computes the rest again for the gradients.

    The layers alone are told that they train: what they are made of goes on without dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = (
        [module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]
        if recompute or is_packed(student)
        else []
    )
    if layers:
        student.activation_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def is_packed(student: PreTrainedModel) -> bool:
    """Whether it computes with weights as the file has them."""
    return any(isinstance(part, PackedWeight) for module in student.modules() for part in vars(module).values())


def write_back(path: Path, vectors: Sequence[Lossless], stretched: Sequence[Scales], target: Path) -> None:
    """A copy of the file with the vectors' values in place of its own, and its scales stretched; types, places and size stay."""
    try:
        shutil.copyfile(path, target)
    except OSError:
        target.unlink(missing_ok=True)  # what is gone on with stays beside it, and needs the space
        raise
    reader = open_gguf(target, "r+")
    tensors: dict[str, Any] = {tensor.name: tensor.data for tensor in reader.tensors}
    for vector in vectors:
        tensors[vector.name][:] = (vector.parameter.detach().float().cpu() + vector.offset).numpy()
    for one in stretched:
        one.write(tensors[one.name])
    reader.data.flush()

"""A quantised GGUF as a model in torch, and what of it can be trained and written back in place: vectors in float32, and rows' scales."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.close.packed import Blocks, PackedWeight
from ftkit.close.places import Place, in_file, places
from ftkit.close.scales import Scales
from ftkit.engines import hf
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError, first_line
from ftkit.gguf.types import NO_TEXT, has_scales
from ftkit.model.source import gguf_names, open_gguf
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
    """The model that a GGUF was made of, with the file's weights in place of its own: dequantised, or packed.

    `model`'s own weights stay in its mapped files until then. Raises ModelError where a tensor of the file is none of its weights, or
    they cannot be computed with packed, DoesNotFitError where memory runs out.
    """
    import torch

    patches.require("dequantising")
    dtype, device = torch.bfloat16 if bfloat16 else torch.float32, torch.device("cuda", 0) if cuda else torch.device("cpu")
    student = hf.load_model(model, None, dtype="auto", cuda=False, trust_remote_code=trust_remote_code, experts="eager")
    stored = student.dtype
    try:
        with torch.no_grad():
            if way == "dequantised":
                _fill(student, path, device, dtype)
            else:
                _pack(student, path, device, dtype, mapped=way == "mapped")
            _move(student, device, {stored: dtype})
            if is_packed(student):
                student(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # what cannot be computed with packed says so
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError, NotImplementedError) as error:
        if refused := hf.out_of_memory(error, f"load {path.name}"):
            raise refused from None
        raise ModelError(f"{path.name} cannot be closed: {first_line(error)}.", "ship it as it is: ship.closing_steps=0") from None
    return student.requires_grad_(False).eval()


def _fill(student: PreTrainedModel, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Its weights become the file's, in full, some rows at a time."""
    import torch

    parameters, tensors = dict(student.named_parameters()), _matrices(path)
    placed, fresh = places(parameters, tensors, gguf_names(open_gguf(path))), set[str]()
    for name, place in placed.items():
        parameter = parameters[place.parameter]
        if place.parameter not in fresh:  # the model's own are a mapped file's
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)
            fresh.add(place.parameter)
        for expert in range(len(parameter)) if parameter.ndim > 2 else (None,):
            blocks, weight = (tensors[name], parameter) if expert is None else (tensors[name].expert(expert), parameter[expert])
            for which, rows in PackedWeight([blocks], blocks.columns, device, torch.float32).in_turn():
                place.put(weight, rows, which)


def _pack(student: PreTrainedModel, path: Path, device: torch.device, dtype: torch.dtype, *, mapped: bool) -> None:
    """Its weights become the file's, packed, on the GPU or in the mapped file; tables of tokens in the file, whose rows are looked up."""
    import torch

    parameters, tensors = dict(student.named_parameters(remove_duplicate=False)), _matrices(path)
    placed = places(dict(student.named_parameters()), tensors, gguf_names(open_gguf(path)))
    owners = {id(parameter): [name for name, one in parameters.items() if one is parameter] for parameter in parameters.values()}
    for parameter in {place.parameter for place in placed.values()}:
        there = [(name, place) for name, place in placed.items() if place.parameter == parameter]
        order, parts = _in_order(parameter, there, tensors)
        for name in owners[id(parameters[parameter])]:
            owner, _, leaf = name.rpartition(".")
            module = student.get_submodule(owner)
            looked_up = mapped or isinstance(module, torch.nn.Embedding)
            kept = [part if looked_up else replace(part, data=part.data.to(device)) for part in parts]
            delattr(module, leaf)
            object.__setattr__(module, leaf, PackedWeight(kept, parts[0].columns, device, dtype, order))


def _in_order(
    parameter: str, there: Sequence[tuple[str, Place]], tensors: Mapping[str, Blocks]
) -> tuple[torch.Tensor | None, list[Blocks]]:
    """The tensors that a parameter is, one after the other, and of a single one the order of rows. Raises ValueError of what is neither."""
    import torch

    if any(place.turned or place.columns is not None for _, place in there):
        raise ValueError(f"of {parameter} more is changed than the order of rows")
    if len(there) == 1:
        ((name, place),) = there
        return None if place.rows is None else place.rows.argsort(), [tensors[name]]
    inside = sorted(there, key=lambda one: int(one[1].rows[0]) if one[1].rows is not None else 0)
    rows = torch.cat([place.rows for _, place in inside if place.rows is not None])
    if not torch.equal(rows, torch.arange(len(rows))):
        raise ValueError(f"of {parameter} more is changed than the order of rows")
    return None, [tensors[name] for name, _ in inside]


def _move(student: PreTrainedModel, device: torch.device, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
    """What is not the file's: to the device, and parameters from the format of the model's files to that which is computed in."""
    for name, parameter in student.named_parameters():
        if NO_TEXT.search(name):  # a GGUF holds no pictures
            parameter.data = parameter.data.new_empty(0, device=device)
        else:
            parameter.data = parameter.data.to(device, dtypes.get(parameter.dtype, parameter.dtype))
    for module in student.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _matrices(path: Path) -> dict[str, Blocks]:
    """The file's tensors that are not in float32, of two dimensions and more, by their names; of experts the gate before the up."""
    import gguf

    mapped = _mapped(path)
    tensors = sorted(open_gguf(path).tensors, key=lambda tensor: str(tensor.name))
    kept = [one for one in tensors if len(one.shape) > 1 and one.tensor_type != gguf.GGMLQuantizationType.F32]
    return {str(tensor.name): _blocks(mapped, tensor) for tensor in kept}


def _mapped(path: Path) -> torch.Tensor:
    """The bytes of a file, read as they are looked at."""
    import torch

    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _blocks(mapped: torch.Tensor, tensor: Any) -> Blocks:
    """Of a tensor of the file, where they lie."""
    rows = reversed(tensor.shape[1:].tolist())
    return Blocks(mapped[tensor.data_offset :][: tensor.n_bytes].reshape(*rows, -1), int(tensor.tensor_type), str(tensor.name))


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
        tensor = tensors.get(in_file(name, names))
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

    found = []
    for name, layer, order, blocks in _layers(student, path):
        kind = GGMLQuantizationType(blocks.kind).name
        if has_scales(name, tuple(layer.weight.shape), kind):
            found.append(Scales(name, kind, layer, order, student.device))
    return sorted(found, key=lambda one: one.name)


def _layers(student: PreTrainedModel, path: Path) -> Iterator[tuple[str, torch.nn.Linear, torch.Tensor | None, Blocks]]:
    """(tensor's name, layer, order of rows, blocks) of each linear layer that is one tensor of the file, number for number."""
    from torch import nn

    linear = {f"{name}.weight": layer for name, layer in student.named_modules() if isinstance(layer, nn.Linear)}
    for layer in linear.values():
        if isinstance(layer.weight, PackedWeight) and len(layer.weight.parts) == 1:
            (blocks,) = layer.weight.parts
            yield blocks.name, layer, layer.weight.order, blocks
    if is_packed(student):
        return
    tensors = _matrices(path)
    for name, place in places(dict(student.named_parameters()), tensors, gguf_names(open_gguf(path))).items():
        order = None if place.rows is None else place.rows.argsort()
        if (
            (found := linear.get(place.parameter))
            and len(found.weight) == tensors[name].rows_count
            and _holds(found.weight, tensors[name], order)
        ):
            yield name, found, order, tensors[name]


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

    with torch.autocast(student.device.type, torch.bfloat16, enabled=student.get_input_embeddings().weight.dtype == torch.bfloat16):
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

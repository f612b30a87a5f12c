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
from ftkit.close.places import Place, places
from ftkit.close.scales import Scales
from ftkit.engines import hf
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError, first_line
from ftkit.gguf.types import NO_TEXT, has_scales
from ftkit.model.adapter import as_trained
from ftkit.model.source import gguf_names, in_file, open_gguf, shapes_of, stored_dtype
from ftkit.plan.cost import ClosingWay, Way, closing_ways

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Weights = dict[str, list[tuple[Blocks, Place]]]  # of each parameter: the tensors of the file that it is, and where in it
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
    path: Path,
    model: Path,
    way: Way = "dequantised",
    *,
    bfloat16: bool,
    cuda: bool,
    trust_remote_code: bool = False,
    found: Weights | None = None,
) -> PreTrainedModel:
    """The model that a GGUF was made of, with the file's weights in place of its own: dequantised, or packed.

    `model`'s own weights stay in its mapped files until then, but for experts that are joined as they are loaded. `found`: what
    `find_weights` says. Raises ModelError where a tensor of the file is none of its weights, or they cannot be computed with packed,
    DoesNotFitError where memory runs out.
    """
    import torch

    patches.require("dequantising")
    dtype, device = torch.bfloat16 if bfloat16 else torch.float32, torch.device("cuda", 0) if cuda else torch.device("cpu")
    experts = None if way == "dequantised" else "eager"
    stored = stored_dtype(model)
    student = hf.load_model(model, None, dtype=stored, cuda=False, trust_remote_code=trust_remote_code, experts=experts)
    with _refusing(path), torch.no_grad():
        weights = _weights(student, path) if found is None else found
        if way == "dequantised":
            _fill(student, weights, device, dtype)
        else:
            _pack(student, weights, device, dtype, mapped=way == "mapped")
        _move(student, device, {getattr(torch, stored): dtype})
        if is_packed(student):
            student(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # what cannot be computed with packed says so
    return student.requires_grad_(False).eval()


def find_weights(path: Path, model: Path, *, trust_remote_code: bool = False) -> Weights:
    """Which of the model's weights the file's tensors are: a layer of an 8B takes a second, and all stay in their files.

    Raises ModelError where a tensor is none of them.
    """
    student = hf.load_model(model, None, dtype=stored_dtype(model), cuda=False, trust_remote_code=trust_remote_code)
    with _refusing(path):
        return _weights(student, path)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError, NotImplementedError) as error:
        if refused := hf.out_of_memory(error, f"load {path.name}"):
            raise refused from None
        raise ModelError(f"{path.name} cannot be closed: {first_line(error)}.", "ship it as it is: ship.closing_steps=0") from None


def _fill(student: PreTrainedModel, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Its weights become the file's, in full, some rows at a time."""
    import torch

    parameters = dict(student.named_parameters())
    for name, parts in weights.items():
        parameter = parameters[name]
        parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)  # the model's own are a mapped file's
        packed, turned = PackedWeight(parts, device, torch.float32), parts[0][1].turned
        for expert in range(len(parameter)) if parameter.ndim > 2 else (None,):
            part, weight = (packed, parameter) if expert is None else (packed.expert(expert), parameter[expert])
            for which, rows in part.in_turn():
                (weight.T if turned else weight)[which] = rows.to(dtype)


def _pack(student: PreTrainedModel, weights: Weights, device: torch.device, dtype: torch.dtype, *, mapped: bool) -> None:
    """Its weights become the file's, packed, on the GPU or in the mapped file; tables of tokens in the file, whose rows are looked up."""
    import torch

    parameters = dict(student.named_parameters(remove_duplicate=False))
    for name, parts in weights.items():
        if parts[0][1].turned:
            raise ValueError(f"the rows of {name} are columns in the file")
        for tied in [other for other, parameter in parameters.items() if parameter is parameters[name]]:
            owner, _, leaf = tied.rpartition(".")
            module = student.get_submodule(owner)
            looked_up = mapped or isinstance(module, torch.nn.Embedding)
            kept = [(blocks if looked_up else replace(blocks, data=blocks.data.to(device)), place) for blocks, place in parts]
            delattr(module, leaf)
            object.__setattr__(module, leaf, PackedWeight(kept, device, dtype))


def _weights(student: PreTrainedModel, path: Path) -> Weights:
    """Raises ValueError where a tensor of the file is none of its parameters, unless it is of what its files hold and transformers
    makes nothing of: Gemma 4's layers that take keys and values of an earlier one have some of their own in them."""
    parameters, tensors, names, found = dict(student.named_parameters()), matrices(path), gguf_names(open_gguf(path)), Weights()
    unread = {in_file(name, names) for name in shapes_of(Path(student.name_or_path))} - {in_file(name, names) for name in parameters}
    for name, place in places(parameters, tensors, names, unread).items():
        found.setdefault(place.parameter, []).append((tensors[name], place))
    return found


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


def matrices(path: Path) -> dict[str, Blocks]:
    """The file's tensors that are not in float32, of two dimensions and more, by their names."""
    import gguf
    import torch

    mapped, found = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8), {}
    for tensor in open_gguf(path).tensors:
        if len(tensor.shape) > 1 and tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            rows, data = reversed(tensor.shape[1:].tolist()), mapped[tensor.data_offset :][: tensor.n_bytes]
            found[str(tensor.name)] = Blocks(data.reshape(*rows, -1), int(tensor.tensor_type), str(tensor.name))
    return found


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


def scales(student: PreTrainedModel, path: Path, weights: Weights | None = None) -> list[Scales]:
    """Those of its linear layers that are the file's tensors, row for row, whose types have some that can be trained; by name."""
    from gguf import GGMLQuantizationType

    found = []
    for layer, blocks, place in _layers(student, path, weights):
        kind = GGMLQuantizationType(blocks.kind).name
        if has_scales(blocks.name, tuple(layer.weight.shape), kind):
            found.append(Scales(blocks.name, kind, layer, None if place.rows is None else place.rows.argsort(), student.device))
    return sorted(found, key=lambda one: one.name)


def _layers(student: PreTrainedModel, path: Path, weights: Weights | None) -> Iterator[tuple[torch.nn.Linear, Blocks, Place]]:
    """Each linear layer that is one tensor of the file, number for number, and where in it that is."""
    from torch import nn

    linear = {f"{name}.weight": layer for name, layer in student.named_modules() if isinstance(layer, nn.Linear)}
    packed = is_packed(student)
    in_full = {} if packed else _weights(student, path) if weights is None else weights
    for name, layer in linear.items():
        parts = (layer.weight.parts if isinstance(layer.weight, PackedWeight) else ()) if packed else in_full.get(name, ())
        if len(parts) == 1 and (packed or _holds(layer.weight, *parts[0])):
            yield layer, *parts[0]


def _holds(weight: torch.Tensor, blocks: Blocks, place: Place) -> bool:
    """Whether a weight is a tensor of the file, number for number; some rows at a time, as the heap would keep the holes of large ones."""
    import torch

    there = PackedWeight([(blocks, place)], torch.device("cpu"), torch.float32)
    least, most = map(float, weight.detach().aminmax())
    away = EXACT[str(weight.dtype).removeprefix("torch.")] * max(-least, most)
    return all(float((weight.detach()[which].float().cpu() - rows).abs().max()) <= away for which, rows in there.in_turn())


@contextmanager
def running(student: PreTrainedModel) -> Iterator[None]:
    """A student of 16 bits computes with its float32 vectors beside them, or with parts that were trained whole."""
    import torch

    stored = student.get_input_embeddings().weight.dtype
    with torch.autocast(student.device.type, torch.bfloat16, enabled=stored == torch.bfloat16), as_trained(student):
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

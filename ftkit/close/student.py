"""A quantised GGUF as a model in torch, and what of it can be trained and written back in place: vectors in float32, and blocks' scales."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.close.scales import Scales
from ftkit.close.weights import Blocks, FileWeight
from ftkit.engines import hf
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError, first_line
from ftkit.gguf.types import scales_of
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
            _fill(student, path, info["missing_keys"])
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
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with init_empty_weights():
        student: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=trust_remote_code
        )
    packed, others = _of_file(student, path, dtype, device)
    for name, values in others.items():
        owner, _, leaf = name.rpartition(".")
        _put(student.get_submodule(owner), leaf, values.to(device, dtype))
    for name, weight in packed.items():
        if way == "packed" and not isinstance(student.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding):
            weight.parts = tuple(replace(part, data=part.data.to(device)) for part in weight.parts)
        owner, _, leaf = name.rpartition(".")
        _put(student.get_submodule(owner), leaf, weight)
    for name, source in student.all_tied_weights_keys.items():
        if name not in packed and source in packed:
            owner, _, leaf = name.rpartition(".")
            table = packed[source]
            parts = [replace(part, data=part.data if way == "mapped" else part.data.to(device)) for part in table.parts]
            _put(student.get_submodule(owner), leaf, FileWeight(parts, table.columns, device, dtype, table.order))
    if missing := [name for name, parameter in student.named_parameters() if parameter.is_meta]:
        raise ValueError(f"it holds nothing for {missing[0]}")
    for module in student.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    with torch.no_grad():
        student(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))  # what cannot be computed with packed weights says so
    return student


def _of_file(
    student: PreTrainedModel, path: Path, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, FileWeight], dict[str, torch.Tensor]]:
    """By the model's names, its matrices in the mapped file, and numbers of all else that it has there.

    Raises ValueError where transformers does not know the architecture's files, or more of a matrix is changed than the order of rows.
    """
    import gguf
    import torch
    from transformers import modeling_gguf_pytorch_utils as loader

    patches.require("computing with packed weights")
    reader = open_gguf(path)
    architecture, config = gguf_architecture(reader), student.config.get_text_config()
    if re.sub("[-_]", "", architecture) not in (re.sub("[-_]", "", known) for known in loader.GGUF_SUPPORTED_ARCHITECTURES):
        raise ValueError(f"GGUF model with architecture {architecture} is not supported yet")
    processor = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)(config=config.to_dict())
    names = loader.get_gguf_hf_weights_map(student, processor, architecture)
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    matrices: dict[str, FileWeight] = {}
    others: dict[str, torch.Tensor] = {}
    for tensor in sorted(reader.tensors, key=lambda tensor: str(tensor.name)):  # of experts the gate comes before the up
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) > 1 and tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            data = mapped[tensor.data_offset :][: tensor.n_bytes].reshape(*shape[:-1], -1)
            part, order = Blocks(data, int(tensor.tensor_type), str(tensor.name)), _order(processor, tensor.name, shape)
            before = matrices[name].parts if name in matrices else ()
            matrices[name] = FileWeight((*before, part), shape[-1], device, dtype, order)
        else:
            values = processor.process(weights=gguf.dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
            others[name] = torch.from_numpy(values.copy())
    return matrices, others


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
    if isinstance(value, FileWeight):
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
    """Those of its linear layers whose types have some that can be trained.

    The layers then compute with weights that follow them: packed ones do, others where they are the file's, number for number.
    """
    found = []
    for weight in file_weights(student) if is_packed(student) else _followed(student, path):
        parts = []
        for part in weight.parts:
            if _has_scales(weight, part):
                found.append(Scales(part.name, _type(part), len(part.data), weight.columns, weight.device))
                parts.append(replace(part, scales=found[-1]))
            else:
                parts.append(part)
        weight.parts = tuple(parts)
    return found


def _followed(student: PreTrainedModel, path: Path) -> Iterator[FileWeight]:
    """Weights of a dequantised student that can be computed anew from the file: they take the place of its own."""
    from torch import nn

    try:
        weights, _ = _of_file(student, path, student.config.dtype, student.device)
    except ValueError:
        return
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = student.get_submodule(owner)
        if (
            isinstance(module, nn.Linear)
            and weight.shape == module.weight.shape
            and any(_has_scales(weight, part) for part in weight.parts)
        ):
            most = EXACT[str(weight.dtype).removeprefix("torch.")] * float(module.weight.abs().max())
            if all(float((module.weight[which] - numbers).abs().max()) <= most for which, numbers in weight.in_turn()):
                weight.in_full = module.weight.data
                _put(module, leaf, weight)
                yield weight


def _has_scales(weight: FileWeight, part: Blocks) -> bool:
    return weight.ndim == 2 and scales_of(part.name, (len(part.data), weight.columns), _type(part)) > 0


def _type(part: Blocks) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(part.kind).name)


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
    return any(weight.in_full is None for weight in file_weights(student))


def file_weights(student: PreTrainedModel) -> list[FileWeight]:
    """Those that stand in its modules."""
    return [weight for module in student.modules() for weight in vars(module).values() if isinstance(weight, FileWeight)]


def write_back(path: Path, vectors: Sequence[Lossless], stretched: Sequence[Scales], target: Path) -> None:
    """A copy of the file with the vectors' values in place of its own, and its scales stretched; types, places and size stay."""
    from gguf import GGUFReader

    shutil.copyfile(path, target)
    reader = GGUFReader(target, "r+")
    tensors: dict[str, Any] = {tensor.name: tensor.data for tensor in reader.tensors}
    for vector in vectors:
        tensors[vector.name][:] = (vector.parameter.detach().float().cpu() + vector.offset).numpy()
    for one in stretched:
        one.write(tensors[one.name])
    reader.data.flush()

"""A quantised GGUF as a model in torch, and the numbers that it stores without loss: to be trained, and written back in place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.engines import hf
from ftkit.errors import ModelError, first_line
from ftkit.model.source import from_files, open_gguf

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


def load_student(path: Path, model: Path, *, bfloat16: bool, cuda: bool, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a GGUF of `model` holds, its weights dequantised by transformers.

    Raises ModelError where transformers does not read this architecture's files, DoesNotFitError where memory runs out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    try:
        config = AutoConfig.from_pretrained(model, **from_files(trust_remote_code))
        with patches.applied("reading GGUF files"):
            student: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), config=config, dtype=dtype,
                **({"device_map": {"": 0}} if cuda else {}), **from_files(trust_remote_code),
            )  # fmt: skip
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


def lossless(student: PreTrainedModel, path: Path) -> list[Lossless]:
    """The vectors of the file in float32 – norms and biases – that are the model's own, number for number.

    The model then has them in float32, whatever it was loaded in: `running` computes with both.
    """
    import gguf
    import torch

    reader = open_gguf(path)
    field = reader.get_field("general.architecture")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if field and name == field.contents())
    names = gguf.get_tensor_name_map(architecture, student.config.get_text_config().num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
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


@contextmanager
def running(student: PreTrainedModel) -> Iterator[None]:
    """A student of 16 bits computes with its float32 vectors beside them."""
    import torch

    kind = next(parameter.dtype for parameter in student.parameters() if len(parameter.shape) > 1)
    with torch.autocast(student.device.type, torch.bfloat16, enabled=kind == torch.bfloat16):
        yield


def write_back(path: Path, trained: Sequence[Lossless], target: Path) -> None:
    """A copy of the file with the parameters' values in place of its own; types, places and size stay."""
    from gguf import GGUFReader

    shutil.copyfile(path, target)
    reader = GGUFReader(target, "r+")
    tensors: dict[str, Any] = {tensor.name: tensor.data for tensor in reader.tensors}
    for vector in trained:
        tensors[vector.name][:] = (vector.parameter.detach().float().cpu() + vector.offset).numpy()
    reader.data.flush()

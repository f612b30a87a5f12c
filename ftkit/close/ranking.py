"""How much nearer to the trained model a quantised file would come, if one of its tensors had the values of a finer file.

To first order: the slope of the divergence, at the file as it is, times the step from its values to the finer ones. One pass
forward and back tells it of all tensors at once. It sees which way a tensor was rounded, and what the merge lost: squared slopes,
which do not, were hardly better than tensors chosen at random (docs/internals.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.close.closing import Lesson, divergence, logits_at
from ftkit.close.places import in_file
from ftkit.close.student import load_student
from ftkit.engines import hf
from ftkit.errors import ModelError
from ftkit.model.source import gguf_names, open_gguf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def gains(
    plain: Path, finer: Path, model: Path, lessons: Sequence[Lesson], *, bfloat16: bool, cuda: bool, trust_remote_code: bool = False
) -> dict[str, float]:
    """KL a token that is gained, by the tensor's name in the files; negative where it would be lost.

    Both files are of `model`. Held at once are the weights of one, and as much of slopes. Raises ModelError where they
    are not the model's weights, DoesNotFitError where memory runs out.
    """
    with hf.room_to(f"rank the tensors of {plain.name}"):
        weights = _weights(load_student(plain, model, bfloat16=bfloat16, cuda=cuda, trust_remote_code=trust_remote_code), plain, lessons)
        slopes = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        there = {name: _dot(slope, weights[name]) for name, slope in slopes.items()}
        del weights
        other = _named(load_student(finer, model, bfloat16=bfloat16, cuda=cuda, trust_remote_code=trust_remote_code), finer)
    return {name: there[name] - _dot(slope, other[name]) for name, slope in slopes.items() if name in other}


def _weights(student: PreTrainedModel, path: Path, lessons: Sequence[Lesson]) -> dict[str, torch.nn.Parameter]:
    """The file's matrices with the slope of the mean divergence at the answers' tokens."""
    weights = _named(student, path)
    if not weights:
        raise ModelError(f"no weight of {path.name} is known in transformers.", "ship it plain: ship.bits_by_task=false")
    for weight in weights.values():
        weight.requires_grad_()
    tokens = sum(len(lesson.answer.places) for lesson in lessons)
    for lesson in lessons:
        divergence(logits_at(student, lesson.answer.ids, lesson.answer.places), lesson.answered).sum().div(tokens).backward()  # type: ignore[no-untyped-call]
    return weights


def _named(student: PreTrainedModel, path: Path) -> dict[str, torch.nn.Parameter]:
    """The parameters that are matrices of the file, by their names there."""
    reader = open_gguf(path)
    names = gguf_names(reader)
    shapes = {str(tensor.name): tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    found = {}
    for name, parameter in student.named_parameters():
        there = in_file(name, names)
        if len(parameter.shape) > 1 and shapes.get(there) == tuple(parameter.shape):
            found[there] = parameter
    return found


def _dot(slope: torch.Tensor, weight: torch.Tensor) -> float:
    import torch

    return float(torch.sum(slope * weight.detach(), dtype=torch.float64))

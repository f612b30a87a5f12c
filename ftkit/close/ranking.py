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
from ftkit.close.packed import Blocks, PackedWeight
from ftkit.close.places import Place
from ftkit.close.student import Weights, find_weights, load_student, matrices
from ftkit.engines import hf

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
        found = find_weights(plain, model, trust_remote_code=trust_remote_code)
        student = load_student(plain, model, bfloat16=bfloat16, cuda=cuda, trust_remote_code=trust_remote_code, found=found)
        slopes = _slopes(student, found, lessons)
        steps = matrices(finer)
        return {
            blocks.name: _along(slopes[name], blocks, steps[blocks.name], place)
            for name, parts in found.items()
            for blocks, place in parts
            if name in slopes and blocks.name in steps
        }


def _slopes(student: PreTrainedModel, found: Weights, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    """Of the parameters that the file has: how the mean divergence at the answers' tokens goes with each of their numbers."""
    weights = {name: parameter for name, parameter in student.named_parameters() if name in found}
    for weight in weights.values():
        weight.requires_grad_()
    tokens = sum(len(lesson.answer.places) for lesson in lessons)
    for lesson in lessons:
        divergence(logits_at(student, lesson.answer.ids, lesson.answer.places), lesson.answered).sum().div(tokens).backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def _along(slope: torch.Tensor, plain: Blocks, finer: Blocks, place: Place) -> float:
    """What is gained where a tensor's numbers become the finer ones; of experts, of all together."""
    import torch

    if slope.ndim > 2:
        return sum(_along(one, plain.expert(n), finer.expert(n), place) for n, one in enumerate(slope))
    slope, gained = slope.T if place.turned else slope, 0.0
    for (which, rows), (_, other) in zip(
        *(PackedWeight([(b, place)], slope.device, torch.float32).in_turn() for b in (plain, finer)), strict=True
    ):
        gained += float(torch.sum(slope[which] * (rows - other), dtype=torch.float64))
    return gained

"""How much each tensor of a file gains by a finer type: of every one that is quantised, however the model keeps it."""

from __future__ import annotations

from pathlib import Path

import architectures
import convertible
import pytest

from ftkit.close.closing import Lesson, distribution, divergence, logits_at
from ftkit.close.ranking import gains
from ftkit.close.student import load_student
from ftkit.engines import logits
from ftkit.engines.logits import Forced
from ftkit.gguf import files as gguf
from ftkit.gguf.bits import tensors_in
from ftkit.machine.llama_cpp import need_converter

ROW = Forced([2, *((7 * n) % 250 + 6 for n in range(12)), *(n % 26 + 263 for n in range(8))], list(range(13, 21)))
BY_NAME = {architecture.name: architecture for architecture in architectures.ARCHITECTURES}


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["llama", "Mixtral", "Phi 3"])  # rows in another order; experts in two tensors; three in one
def test_every_tensor_is_ranked_by_what_its_own_step_gains(name: str, tmp_path: Path) -> None:
    """To first order: all gains together are the slope along the step of all weights at once."""
    if name == "llama":
        convertible.make("llama", tmp_path)
        folder = tmp_path
    else:
        folder = architectures.make_model(BY_NAME[name], tmp_path)
    paths = {kind: folder / f"m-{kind}.gguf" for kind in ("Q8_0", "F16")}
    gguf.convert(folder, paths, need_converter())
    students = {kind: load_student(path, folder, bfloat16=False, cuda=False) for kind, path in paths.items()}
    lesson = Lesson(ROW, distribution(next(iter(logits.of_model(students["F16"], [ROW]))) * 1.5))
    found = gains(paths["Q8_0"], paths["F16"], folder, [lesson], bfloat16=False, cuda=False)
    assert found.keys() == {name for name, tensor in tensors_in(paths["Q8_0"]).items() if tensor.kind == "Q8_0"}
    plain = students["Q8_0"].requires_grad_()
    divergence(logits_at(plain, ROW.ids, ROW.places), lesson.answered).mean().backward()
    finer = dict(students["F16"].named_parameters())
    steps = [(p.grad, p.detach() - finer[name]) for name, p in plain.named_parameters() if p.grad is not None and p.ndim > 1]
    assert sum(found.values()) == pytest.approx(sum(float((slope * step).sum()) for slope, step in steps), rel=1e-3)
    assert any(found.values())

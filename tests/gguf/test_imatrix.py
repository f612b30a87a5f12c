"""An importance matrix is of one model: another's is refused, and a file that was rounded by it is caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import shipped

from ftkit.errors import RunError, ToolFailedError
from ftkit.files import file_fingerprint
from ftkit.gguf.files import quantize
from ftkit.gguf.imatrix import importance
from ftkit.gguf.says import compare_tensors, tensors
from ftkit.line.gguf import Importance, matrix_of
from ftkit.line.step import Made
from ftkit.machine.llama_cpp import Found, find_program
from ftkit.model.source import open_gguf

pytestmark = pytest.mark.e2e

MODELS = {"own": {}, "another": {"seed": 1}, "another shape": {"size": 96}}


def program(name: str) -> Found:
    found = find_program(name, None)
    assert found
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the matrix of each, measured over the same text."""
    folder, words = tmp_path_factory.mktemp("models"), shipped.tokenizer()
    for name, changes in MODELS.items():
        (folder / name).mkdir()
        model = shipped.make_file(folder / name / "model.gguf", words, **changes)
        importance(model, ["What is 12 plus 12? It is 24. " * 400], folder / name / "imatrix.gguf", program("llama-imatrix"))
    return folder


def quantised(made: Path, matrix: str, path: Path) -> Path:
    quantize(made / "own" / "model.gguf", path, "Q4_0", program("llama-quantize"), imatrix=made / matrix / "imatrix.gguf")
    return path


def test_a_file_rounded_by_anothers_matrix_is_not_the_recorded_one(made: Path, tmp_path: Path) -> None:
    own, same, other = (quantised(made, name, tmp_path / f"{n}.gguf") for n, name in enumerate(("own", "own", "another")))
    recorded = tensors(open_gguf(own))
    assert compare_tensors(recorded, tensors(open_gguf(same))).outcome == "passed"
    check = compare_tensors(recorded, tensors(open_gguf(other)))
    assert (check.outcome, check.detail[:57]) == ("failed", "14 of 20 hold other numbers than recorded: blk.0.attn_k.w")


def test_a_matrix_of_other_shapes_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolFailedError, match="imatrix size 96 is different from tensor size 64"):
        quantised(made, "another shape", tmp_path / "x.gguf")


def test_a_matrix_put_in_the_place_of_a_runs_own_is_refused(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made / "own" / "imatrix.gguf", tmp_path))
    step = Made("imatrix", "0" * 16, tmp_path, Importance(Path(path.name), file_fingerprint(path)), 1.0, fresh=False)
    assert matrix_of(step) == path
    shutil.copy(made / "another" / "imatrix.gguf", path)
    with pytest.raises(RunError, match="is not the importance matrix that was measured on this model") as refused:
        matrix_of(step)
    assert refused.value.hint == "measure it again: ftkit ship --from imatrix"
    assert matrix_of(Made("imatrix", "0" * 16, tmp_path, Importance(Path(path.name)), 1.0, fresh=False))  # of an earlier ftkit, unknown

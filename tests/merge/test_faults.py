"""What is damaged, does not fit or cannot be written ends the step `merge` in words with a way out, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.errors import FtkitError, ModelError, RunError
from ftkit.line.job import Job, open_job
from ftkit.line.line import ship
from ftkit.line.merge import MERGE
from ftkit.line.step import ensure
from ftkit.run import Run

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `adapter`."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_adapter(tiny.make_model(folder / "base", dtype="bfloat16"), folder / "adapter")
    return folder


@pytest.fixture
def here(whole: Path, tmp_path: Path, rows: list[Any], write_rows: Callable[[Path, list[Any]], Path]) -> Path:
    """The same to be damaged, and a recipe."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text("model: base\ntraining: {method: lora}\n", encoding="utf-8")
    return tmp_path


def refused(job: Job, kind: type[FtkitError], words: str) -> None:
    with job.run, pytest.raises(kind, match=words) as caught:
        ensure(job, MERGE)
    assert caught.value.hint
    assert [path.name for path in job.run.folder.iterdir() if "merge" in path.name] == []


def tensors_of(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def config_of(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"\0" * 40)


def a_tensor(change: Callable[[Any], Any], name: str = Q_PROJ) -> Callable[[Path], None]:
    return lambda path: tensors_of(path, lambda tensors: tensors.update({name: change(tensors[name])}))


def without(name: str) -> Callable[[Path], None]:
    return lambda path: tensors_of(path, lambda tensors: tensors.pop(name))


def set_first(value: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor[0, 0] = value
        return tensor

    return change


def four_bits(method: str) -> Callable[[Path], None]:
    return lambda path: config_of(
        path.parent / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True}
    )


def as_uint8(tensor: Any) -> Any:
    import torch

    return torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)


BASES = {
    "cut short": (cut, "does not end with its last tensor"),
    "overwritten": (overwrite, "is no whole safetensors file"),
    "without an adapted tensor": (without(Q_PROJ), f"lack {Q_PROJ}"),
    "without another tensor": (without("model.norm.weight"), "lack model.norm.weight"),
    "of another shape": (a_tensor(lambda tensor: tensor[:-1].contiguous()), "cannot load"),
    "with NaN": (a_tensor(set_first(float("nan"))), f"{Q_PROJ} would hold NaN or Inf"),
    "with Inf": (a_tensor(set_first(float("inf"))), f"{Q_PROJ} would hold NaN or Inf"),
    **{method: (four_bits(method), rf"quantised already \({method}\)") for method in ("bitsandbytes", "gptq", "awq", "fp8")},
    "in 4 bits without a word": (a_tensor(as_uint8), "cannot load"),
    "without a tokenizer": (lambda path: [file.unlink() for file in path.parent.glob("tokenizer*")], "no tokenizer"),
    "deeper": (lambda path: config_of(path.parent / "config.json", num_hidden_layers=3), "lack model.layers.2"),
    "wider": (lambda path: config_of(path.parent / "config.json", hidden_size=256), "cannot load"),
}
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
ADAPTERS = {
    "cut short": (cut, "cannot be read"),
    "overwritten": (overwrite, "cannot be read"),
    "with NaN": (a_tensor(set_first(float("nan")), A), "q_proj.lora_A.weight holds NaN or Inf"),
    "with Inf": (a_tensor(set_first(float("-inf")), A), "q_proj.lora_A.weight holds NaN or Inf"),
    "without a tensor": (without(A), "is not whole: it lacks .*q_proj.lora_A"),
    "with one more": (
        lambda path: tensors_of(path, lambda tensors: tensors.update({f"{A}.x": tensors[A].clone()})), "has .*x, which no layer has",
    ),
    "of another rank": (a_tensor(lambda tensor: tensor[:2].contiguous(), A), r"is \(2, 128\), the base wants \(4, 128\)"),
    "too large": (
        lambda path: tensors_of(path, lambda tensors: tensors.update({n: t * 1e20 for n, t in tensors.items()})), "would hold NaN or Inf",
    ),
    "in a pickle": (lambda path: path.rename(path.with_suffix(".bin")), "holds a pickle alone"),
    "gone": (lambda path: path.unlink(), "cannot be read"),
    "of another model": (lambda path: config_of(path.parent / "adapter_config.json", target_modules=["c_attn"]), "PEFT cannot put"),
    "of another form": (lambda path: config_of(path.parent / "adapter_config.json", rank_pattern=7), "PEFT cannot put"),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_is_damaged_or_another(name: str, here: Path) -> None:
    change, words = BASES[name]
    change(here / "base" / "model.safetensors")
    refused(tiny.trained_job(here), ModelError, words)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_damaged_or_another(name: str, here: Path) -> None:
    change, words = ADAPTERS[name]
    change(here / "adapter" / "adapter_model.safetensors")
    refused(tiny.trained_job(here), ModelError, words)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
@pytest.mark.parametrize("command", ["plan", "train", "build"])
def test_a_base_in_4_bits_is_refused_before_anything_is_made(
    command: str, method: str, here: Path, ftkit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at its weights: there are none."""
    monkeypatch.setattr("ftkit.line.line.need_converter", lambda folder: None)
    four_bits(method)(here / "base" / "model.safetensors")
    (here / "base" / "model.safetensors").write_bytes(b"")
    (here / "base" / "README.md").write_text("---\nbase_model: org/name\n---\n", encoding="utf-8")
    said = ftkit(command, here / "recipe.yaml")
    assert said.exit_code == ModelError.exit_code, said.output
    assert f"is quantised already ({method})" in said.stderr
    assert "its card names org/name: --model org/name" in said.stderr
    assert not list((here / "runs" / "recipe").glob("*-*"))


def test_a_number_too_large_for_float16(here: Path) -> None:
    import torch

    tensors_of(here / "base" / "model.safetensors", lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    tensors_of(here / "adapter" / "adapter_model.safetensors", lambda tensors: tensors.update({A: torch.full_like(tensors[A], 1e6)}))
    refused(tiny.trained_job(here), ModelError, f"{Q_PROJ} would hold NaN or Inf")


def test_a_base_that_changed_since_the_training(here: Path) -> None:
    tiny.trained_job(here)
    a_tensor(set_first(1.0))(here / "base" / "model.safetensors")
    job = open_job(here)
    with job.run, pytest.raises(RunError, match="training of another recipe, other data or another revision of the model"):
        ship(job, use_ollama=False)


@pytest.mark.parametrize("size_bytes", [10_000, 100_000])
def test_a_disk_that_is_full_half_way(size_bytes: int, here: Path, small_files: Any) -> None:
    job = tiny.trained_job(here)
    with small_files(size_bytes):
        refused(job, RunError, "`merge` cannot write to .*")
    with job.run:
        assert ensure(job, MERGE).fresh  # with space it is made


@contextmanager
def read_only() -> Iterator[Path]:
    """A folder in which this process cannot write; root is somebody else for that time."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    run = folder / "run"
    run.mkdir()
    try:
        yield run
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        run.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_a_folder_that_became_read_only() -> None:
    with read_only() as folder, Run(folder) as run:
        folder.chmod(0o555)
        if os.getuid() == 0:
            os.seteuid(65534)
        with pytest.raises(RunError, match=r"Cannot write to .*Permission denied") as caught:
            run.ensure("merge", 1, lambda folder: {})
        assert "--run-dir" in str(caught.value.hint)
        assert [path.name for path in folder.iterdir()] == [".lock"]

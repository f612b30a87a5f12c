"""A model in several GGUF files is taken whole, and a missing part is named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import shipped

from ftkit.errors import ModelError, RunError
from ftkit.machine.llama_cpp import find_program
from ftkit.model.given import look_at
from ftkit.model.locate import locate
from ftkit.model.split import join, parts_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped.make_file(tmp_path_factory.mktemp("whole") / shipped.FILE, shipped.tokenizer())


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    made = shipped.split(Path(shutil.copyfile(whole, tmp_path / shipped.FILE)))
    assert [part.name for part in made] == [f"tiny-F32-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return made


def test_any_part_stands_for_the_whole(parts: list[Path], whole: Path, private_cache: Path) -> None:
    for part in parts:
        given = look_at(part.name, part.parent)
        assert (given.path.name, given.quantization) == (whole.name, "F32")
        assert given.path.is_relative_to(private_cache)
        assert given.path.read_bytes() == whole.read_bytes()
    assert locate(str(parts[0]), parts[0].parent).gguf == given.path
    assert len(list((private_cache / "models").glob("joined-*/*"))) == 1  # joined once


def test_a_part_that_is_missing(parts: list[Path], private_cache: Path) -> None:
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(ModelError, match=r"of 3 files of a model, and tiny-F32-00002-of-00003\.gguf is not beside it") as caught:
            look_at(str(part), part.parent)
        assert f"tiny-F32-*-of-00003.gguf into {part.parent}" in str(caught.value.hint)
    assert not list(private_cache.rglob("*.gguf"))


def test_a_part_that_is_cut_or_of_another_model(parts: list[Path], whole: Path, tmp_path: Path, private_cache: Path) -> None:
    content = parts[2].read_bytes()
    parts[2].write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"tiny-F32-00003-of-00003\.gguf is not a whole GGUF file"):
        locate(str(parts[0]), tmp_path)
    shutil.copyfile(parts[1], parts[2])
    with pytest.raises(ModelError, match=r"00003-of-00003\.gguf is not file 3 of 3"):
        locate(str(parts[0]), tmp_path)
    (tmp_path / "other").mkdir()
    others = shipped.split(Path(shutil.copyfile(whole, tmp_path / "other" / shipped.FILE)), 9)
    shutil.copyfile(others[2], parts[2])
    with pytest.raises(ModelError, match="is of a model of 20 tensors, and the 3 files hold 18"):
        locate(str(parts[0]), tmp_path)
    assert not list(private_cache.rglob("*.gguf"))


def test_a_part_under_another_name(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    assert parts_of(renamed) == []
    with pytest.raises(ModelError, match="is one of 3 files of a model, and its name does not say which"):
        look_at(str(renamed), renamed.parent)


def test_a_private_folder_that_is_full(parts: list[Path], private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(parts: list[Path], target: Path) -> None:
        target.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftkit.model.split.join", full)
    with pytest.raises(RunError, match="No space left on device"):
        locate(str(parts[0]), parts[0].parent)
    assert not list(private_cache.rglob("*.gguf"))


@pytest.mark.e2e
def test_what_llama_gguf_split_parted_has_its_old_bytes_again(whole: Path, tmp_path: Path) -> None:
    program = find_program("llama-gguf-split")
    assert program
    subprocess.run([program.path, "--split", "--split-max-tensors", "7", whole, tmp_path / "x"], check=True, capture_output=True)
    parts = parts_of(tmp_path / "x-00002-of-00003.gguf")
    join(parts, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()

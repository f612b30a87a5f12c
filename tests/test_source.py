"""A model reference is found without loading it, and one that cannot be used is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ftkit import source
from ftkit.errors import ModelError, ToolMissingError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model; `locate` reads no weights."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"1234")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    return path


def test_a_folder_relative_or_absolute(model: Path, tmp_path: Path) -> None:
    found = source.locate("tiny", tmp_path)
    assert (found.kind, found.folder, found.gguf) == ("directory", model.resolve(), None)
    assert source.locate(str(model), Path("elsewhere")).fingerprint == found.fingerprint


def test_a_folder_with_weights_is_open_as_it_is(model: Path, tmp_path: Path) -> None:
    found = source.locate("tiny", tmp_path)
    assert source.open_config(found) == source.open_weights(found) == found


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", '{"a": 1}'), ("model.safetensors", "12345"), ("tokenizer.json", "{ }"), ("chat_template.jinja", "x")],
)
def test_a_changed_file_changes_the_fingerprint(model: Path, tmp_path: Path, name: str, text: str) -> None:
    before = source.locate("tiny", tmp_path).fingerprint
    (model / name).write_text(text, encoding="utf-8")
    assert source.locate("tiny", tmp_path).fingerprint != before


def test_weights_of_the_same_size_but_another_time_change_the_fingerprint(model: Path, tmp_path: Path) -> None:
    before = source.locate("tiny", tmp_path).fingerprint
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000_000))
    assert source.locate("tiny", tmp_path).fingerprint != before


def test_a_gguf_file_is_known_by_its_bytes(gguf: Path, tmp_path: Path) -> None:
    found = source.locate("tiny.gguf", tmp_path)
    assert (found.kind, found.folder, found.gguf) == ("gguf", None, gguf.resolve())
    same = tmp_path / "renamed.gguf"
    same.write_bytes(gguf.read_bytes())
    assert source.locate("renamed.gguf", tmp_path).fingerprint == found.fingerprint
    same.write_bytes(gguf.read_bytes() + b"!")
    assert source.locate("renamed.gguf", tmp_path).fingerprint != found.fingerprint


def test_a_hub_id_is_not_fetched_to_be_located(tmp_path: Path) -> None:
    found = source.locate("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path)
    assert (found.kind, found.folder) == ("hub", None)
    assert found.fingerprint != source.locate("HuggingFaceTB/SmolLM2-360M-Instruct", tmp_path).fingerprint


def test_a_local_folder_wins_over_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    (tmp_path / "org" / "name" / "config.json").write_text("{}", encoding="utf-8")
    assert source.locate("org/name", tmp_path).kind == "directory"


@pytest.mark.parametrize("reference", ["./tinny", "tinny", "./tiny.ggfu", "models/tinny"])
def test_a_misspelt_path_gets_the_nearest_name(model: Path, gguf: Path, tmp_path: Path, reference: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").mkdir()
    with pytest.raises(ModelError, match="There is no model") as caught:
        source.locate(reference, tmp_path)
    assert str(caught.value.hint).startswith(f"did you mean {tmp_path}")
    assert "tiny" in str(caught.value.hint)


@pytest.mark.parametrize("reference", ["./zzz", "zzz", "org/name.gguf", "a/b/c", "/nowhere/zzz", ""])
def test_what_is_nowhere(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ModelError) as caught:
        source.locate(reference, tmp_path)
    assert caught.value.hint


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelError, match="is no model") as caught:
        source.locate("weights.safetensors", tmp_path)
    assert "config.json" in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"", b"GGU", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1"])
def test_a_file_that_is_no_gguf(gguf: Path, tmp_path: Path, content: bytes) -> None:
    gguf.write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        source.locate("tiny.gguf", tmp_path)


def test_a_folder_without_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        source.locate("tiny", tmp_path)


def test_pickle_weights_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").touch()
    assert source.locate("tiny", tmp_path)  # safetensors are there: the pickle is never read
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle"):
        source.locate("tiny", tmp_path)


def test_a_config_alone_is_enough_to_plan(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    found = source.locate("tiny", tmp_path)
    assert source.open_config(found) == found
    with pytest.raises(ModelError, match=r"no \*\.safetensors") as caught:
        source.open_weights(found)
    assert "ftkit plan" in str(caught.value.hint)


def test_an_ollama_model_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ToolMissingError, match="No Ollama server") as caught:  # bound, but nothing listens
            source.locate("ollama:smollm2", tmp_path)
    assert "ollama serve" in str(caught.value.hint)

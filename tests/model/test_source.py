"""A model reference is found without loading it, and one that cannot be used is refused."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ftkit.errors import ModelError, ToolMissingError
from ftkit.model.locate import locate
from ftkit.model.open import open_config, open_weights
from ftkit.model.source import INDEX, sixteen_bits_of, stored_dtype, weight_files


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a hub id is asked of an empty cache; the hub itself has tests of its own (test_hub.py)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


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
    found = locate("tiny", tmp_path)
    assert (found.kind, found.folder, found.gguf) == ("directory", model.resolve(), None)
    assert locate(str(model), Path("elsewhere")).fingerprint == found.fingerprint


def test_a_folder_with_weights_is_open_as_it_is(model: Path, tmp_path: Path) -> None:
    found = locate("tiny", tmp_path)
    assert open_config(found) == open_weights(found) == found


def test_a_folder_without_one_of_its_weight_files(model: Path, tmp_path: Path) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    assert weight_files(model) == [model / "model.safetensors"]  # as transformers has it: an index beside it is an older save's
    assert open_weights(locate("tiny", tmp_path)).folder == model.resolve()
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    with pytest.raises(ModelError, match=r"has no model-2\.safetensors") as refused:
        open_weights(locate("tiny", tmp_path))
    assert refused.value.hint


def test_an_adapter_in_a_model_s_folder_is_refused(model: Path, tmp_path: Path) -> None:
    """transformers loaded it into the base: what was trained and what was merged were two models, without a word."""
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="holds a model and an adapter's adapter_config") as refused:
        locate("tiny", tmp_path)
    assert "training.adapter" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", '{"a": 1}'), ("model.safetensors", "12345"), ("tokenizer.json", "{ }"), ("chat_template.jinja", "x")],
)
def test_a_changed_file_changes_the_fingerprint(model: Path, tmp_path: Path, name: str, text: str) -> None:
    before = locate("tiny", tmp_path).fingerprint
    (model / name).write_text(text, encoding="utf-8")
    assert locate("tiny", tmp_path).fingerprint != before


def test_weights_of_the_same_size_but_another_time_change_the_fingerprint(model: Path, tmp_path: Path) -> None:
    before = locate("tiny", tmp_path).fingerprint
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1_000_000_000))
    assert locate("tiny", tmp_path).fingerprint != before


def test_a_gguf_file_is_known_by_its_bytes(gguf: Path, tmp_path: Path) -> None:
    found = locate("tiny.gguf", tmp_path)
    assert (found.kind, found.folder, found.gguf) == ("gguf", None, gguf.resolve())
    same = tmp_path / "renamed.gguf"
    same.write_bytes(gguf.read_bytes())
    assert locate("renamed.gguf", tmp_path).fingerprint == found.fingerprint
    same.write_bytes(gguf.read_bytes() + b"!")
    assert locate("renamed.gguf", tmp_path).fingerprint != found.fingerprint


def test_a_local_folder_wins_over_the_hub(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    (tmp_path / "org" / "name" / "config.json").write_text("{}", encoding="utf-8")
    assert locate("org/name", tmp_path).kind == "directory"


@pytest.mark.parametrize("reference", ["./tinny", "tinny", "./tiny.ggfu", "models/tinny"])
def test_a_misspelt_path_gets_the_nearest_name(model: Path, gguf: Path, tmp_path: Path, reference: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").mkdir()
    with pytest.raises(ModelError, match="There is no model") as caught:
        locate(reference, tmp_path)
    assert str(caught.value.hint).startswith(f"did you mean {tmp_path}")
    assert "tiny" in str(caught.value.hint)


@pytest.mark.parametrize(
    "reference", ["./zzz", "zzz", "org/name.gguf", "a/b/c", "/nowhere/zzz", "org/name@", "org/name@a..b", "org/name@v1@v2", ""]
)
def test_what_is_nowhere(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ModelError) as caught:
        locate(reference, tmp_path)
    assert caught.value.hint


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelError, match="is no model") as caught:
        locate("weights.safetensors", tmp_path)
    assert "config.json" in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"", b"GGU", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1"])
def test_a_file_that_is_no_gguf(gguf: Path, tmp_path: Path, content: bytes) -> None:
    gguf.write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        locate("tiny.gguf", tmp_path)


def test_a_folder_without_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate("tiny", tmp_path)


def test_pickle_weights_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").touch()
    assert locate("tiny", tmp_path)  # safetensors are there: the pickle is never read
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle"):
        locate("tiny", tmp_path)


def test_a_config_alone_is_enough_to_plan(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    found = locate("tiny", tmp_path)
    assert open_config(found) == found
    with pytest.raises(ModelError, match=r"no \*\.safetensors") as caught:
        open_weights(found)
    assert "ftkit plan" in str(caught.value.hint)


def test_a_bare_config_is_a_model_to_plan_with(model: Path, tmp_path: Path) -> None:
    found = locate("tiny/config.json", tmp_path)
    assert (found.kind, found.folder) == ("config", model.resolve())
    assert open_config(found) == found
    with pytest.raises(ModelError, match="config without weights") as caught:
        open_weights(found)
    assert "--model" in str(caught.value.hint)


def test_a_bare_config_is_known_by_what_it_says(model: Path, tmp_path: Path) -> None:
    before = locate("tiny/config.json", tmp_path).fingerprint
    (model / "tokenizer.json").write_text("{ }", encoding="utf-8")
    assert locate("tiny/config.json", tmp_path).fingerprint == before != locate("tiny", tmp_path).fingerprint
    (model / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert locate("tiny/config.json", tmp_path).fingerprint != before


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "", "[]", '{"model_type": "llama"', "\udcff"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match="is no config") as caught:
        locate("config.json", tmp_path)
    assert "download" in str(caught.value.hint)


Ollama = Callable[[int, dict[str, Any]], AbstractContextManager[None]]


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Ollama:
    """A server that gives one answer to `show`."""

    @contextmanager
    def answering(status: int, answer: dict[str, Any]) -> Iterator[None]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status if self.path == "/api/show" else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *args: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
            thread = Thread(target=server.handle_request)
            thread.start()
            yield
            thread.join()

    return answering


def test_an_ollama_model_is_the_file_behind_it(gguf: Path, tmp_path: Path, ollama: Ollama) -> None:
    with ollama(200, {"modelfile": f"# Modelfile\n# FROM tiny:latest\n\nFROM {gguf}\nTEMPLATE x\n", "model_info": {}}):
        found = locate("ollama:tiny", tmp_path)
    assert (found.reference, found.kind, found.gguf) == ("ollama:tiny", "gguf", gguf.resolve())
    assert found.fingerprint == locate("tiny.gguf", tmp_path).fingerprint


def test_an_ollama_model_that_is_not_there(tmp_path: Path, ollama: Ollama) -> None:
    with ollama(404, {"error": "model 'tinny' not found"}), pytest.raises(ModelError, match="does not have tinny") as caught:
        locate("ollama:tinny", tmp_path)
    assert "ollama list" in str(caught.value.hint)


@pytest.mark.parametrize("line", ["FROM tiny:latest", "FROM /nowhere/sha256-0", ""])
def test_an_ollama_model_whose_file_is_out_of_reach(tmp_path: Path, ollama: Ollama, line: str) -> None:
    with ollama(200, {"modelfile": f"{line}\n", "model_info": {}}), pytest.raises(ModelError, match="where ftkit cannot read it") as caught:
        locate("ollama:tiny", tmp_path)
    assert ".gguf" in str(caught.value.hint)


def test_an_ollama_model_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ToolMissingError, match="No Ollama server") as caught:  # bound, but nothing listens
            locate("ollama:smollm2", tmp_path)
    assert "ollama serve" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("folder", "card", "said"),
    [
        ("models--unsloth--Qwen3-4B-unsloth-bnb-4bit/snapshots/1", None, "by its name that may be --model unsloth/Qwen3-4B"),
        ("models--org--Llama-3.2-1B-Instruct-GPTQ-Int4/snapshots/1", None, "by its name that may be --model org/Llama-3.2-1B-Instruct"),
        ("models--org--Name-AWQ/snapshots/1", "---\nbase_model: org/Name-7B\n---\n", "its card names org/Name-7B: --model org/Name-7B"),
        ("mine", "---\nbase_model: [org/Name]\n---\n", "its card names org/Name: --model org/Name"),
        ("mine-AWQ", "---\nbase_model: [\n---\n", None),
        ("models--org--Name-4B/snapshots/1", "no metadata", None),
    ],
)
def test_where_the_16_bit_model_of_a_quantised_one_is(folder: str, card: str | None, said: str | None, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    if card:
        (tmp_path / folder / "README.md").write_text(card, encoding="utf-8")
    assert sixteen_bits_of(tmp_path / folder) == said


@pytest.mark.torch
def test_the_format_of_weights_is_that_of_most_bytes_whatever_the_config_says(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")
    save_file({"norm": torch.ones(8), "table": torch.ones(8, 8, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == "bfloat16"
    save_file({"codes": torch.ones(8, 8, dtype=torch.uint8), "norm": torch.ones(8)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == "float32"

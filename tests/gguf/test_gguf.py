"""A GGUF that ends too early is an error that names it, wherever it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter

from ftkit.engines import llamacpp
from ftkit.errors import ModelError, RunError, ToolFailedError
from ftkit.gguf import files as gguf
from ftkit.machine.llama_cpp import Found, find_program
from ftkit.model import dequantise
from ftkit.model.locate import locate
from ftkit.model.open import open_weights
from ftkit.model.source import open_gguf
from ftkit.run import Run


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_that_is_cut_anywhere_is_refused_when_it_is_read_back(whole: Path) -> None:
    content = whole.read_bytes()
    assert gguf.read_back(whole, "F16").tensors == 1
    for end in range(0, len(content) - 1, 5):
        whole.write_bytes(content[:end])
        with pytest.raises(ModelError, match=r"tiny\.gguf is not a whole GGUF file"):
            gguf.read_back(whole, "F16")


@pytest.mark.parametrize("order", list(GGUFEndian), ids=lambda order: order.name)
def test_what_is_read_in_one_go_is_what_is_read_value_by_value(tmp_path: Path, order: GGUFEndian) -> None:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama", endianess=order)
    for name, values in {
        "texts": ["a", "", "äöü", "x" * 999], "whole": [1, -2, 3], "halves": [0.5, -1.5], "switches": [True, False], "one": ["alone"],
        "bytes": b"ab", "tables": [[1, 2], [3]],
    }.items():  # fmt: skip
        writer.add_array(f"llama.{name}", values)
    writer.add_string("llama.text", "text")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, plain = open_gguf(path).fields, GGUFReader(path).fields
    assert found.keys() == plain.keys()
    for key, field in plain.items():
        mine = found[key]
        assert (mine.offset, mine.data, mine.types) == (field.offset, field.data, field.types)
        assert [part.tolist() for part in mine.parts] == [part.tolist() for part in field.parts]
        assert mine.contents() == field.contents()


@pytest.mark.torch
def test_a_base_model_that_is_cut_is_refused(whole: Path, private_cache: Path) -> None:
    content = whole.read_bytes()
    for end in (5, 20, 60, len(content) // 2, len(content) - 100):
        whole.write_bytes(content[:end])
        with pytest.raises(ModelError, match=r"cannot read tiny\.gguf back"):
            open_weights(locate(str(whole), whole.parent))
    assert [path for path in (private_cache / "models").iterdir() if path.is_dir()] == []


@pytest.mark.torch
def test_tokens_that_the_file_does_not_have_are_refused(tmp_path: Path, private_cache: Path) -> None:
    """transformers gives a SentencePiece vocabulary <s> and </s>, whatever it has in their place: no row of the embedding is theirs."""
    tokens = ["<unk>", "<bos>", "<eos>", "a", "b", "ab"]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_block_count, writer.add_head_count):
        add(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-n) for n in range(len(tokens))])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="with tokens that the file does not have: `<s>`, `</s>`") as refused:
        open_weights(locate(str(tmp_path / "tiny.gguf"), tmp_path))
    assert "original safetensors" in str(refused.value.hint)


def test_a_private_folder_that_is_full(whole: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors says it; `test_run.py` holds the words of each writer."""
    from safetensors import SafetensorError

    def full(path: Path, folder: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(dequantise, "_write_checkpoint", full)
    with pytest.raises(RunError, match="No space left on device") as caught:
        open_weights(locate(str(whole), whole.parent))
    assert "FTKIT_CACHE_DIR" in str(caught.value.hint)
    assert [path for path in (private_cache / "models").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("model_type", "more", "told"),
    [
        ("qwen3_5_text", None, True),  # as transformers saves it
        ("qwen3_5_text", "mtp.fc.weight", False),
        ("qwen3_5_text", "model.mtp.fc.weight", False),
        ("glm4_moe_lite", None, True),
        ("glm4_moe_lite", "model.layers.2.eh_proj.weight", False),
        ("qwen3", None, False),  # has never had any, and the converter would refuse the flag
    ],
)
def test_the_converter_is_told_of_prediction_heads_that_are_not_there(
    model_type: str, more: str | None, told: bool, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    names = ["model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", *([more] if more else [])]
    save_file({name: np.zeros(2, np.float32) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "num_hidden_layers": 2}), encoding="utf-8")
    converter = tmp_path / "convert.py"
    converter.write_text("import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv))", encoding="utf-8")
    gguf.convert(tmp_path, {"F16": tmp_path / "made.gguf"}, Found(converter, "the test"))
    assert ("--no-mtp" in (tmp_path / "made.gguf").read_text(encoding="utf-8").split()) is told


def test_llama_cpps_own_reason_is_said_where_it_refuses_a_file(whole: Path) -> None:
    with (
        pytest.raises(ToolFailedError, match=r"llama\.cpp cannot load tiny\.gguf: .*(key|tensor|vocab)"),
        llamacpp.load(whole, 64),
    ):
        pass


def one_tensor(path: Path) -> Path:
    """A file of 4 MiB in F16 that llama-quantize takes."""
    rows = np.random.default_rng(0).standard_normal((4096, 512), np.float32)
    writer = GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", rows.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.e2e
@pytest.mark.parametrize("size_bytes", [10_000, 500_000])
def test_a_disk_that_is_full_while_it_quantises(size_bytes: int, tmp_path: Path, small_files: Any) -> None:
    program, source = find_program("llama-quantize"), one_tensor(tmp_path / "F16.gguf")
    assert program

    def make(folder: Path) -> dict[str, Any]:
        with small_files(size_bytes):
            gguf.quantize(source, folder / "Q4_K_M.gguf", "Q4_K_M", program)
        return {}

    with Run(tmp_path / "run") as run, pytest.raises(RunError, match=f"`quantise` cannot write to {run.folder}: ") as caught:
        run.ensure("quantise", 1, make)
    assert "--run-dir" in str(caught.value.hint)
    assert not [path for path in run.folder.iterdir() if "quantise" in path.name]


@pytest.mark.torch
@pytest.mark.parametrize("size_bytes", [0, 500_000])
def test_a_disk_that_is_full_while_the_closed_file_is_written(size_bytes: int, tmp_path: Path, small_files: Any) -> None:
    from ftkit.close.student import write_back

    source = one_tensor(tmp_path / "F16.gguf")

    def make(folder: Path) -> dict[str, Any]:
        (folder / "checkpoints").mkdir()
        with small_files(size_bytes):
            write_back(source, [], [], folder / source.name)
        return {}

    with Run(tmp_path / "run") as run, pytest.raises(RunError, match=f"`close` cannot write to {run.folder}: ") as caught:
        run.ensure("close", 1, make, resumable=True)
    assert "goes on from the last checkpoint" in str(caught.value.hint)
    (left,) = (path for path in run.folder.iterdir() if "close" in path.name)
    assert left.suffix == ".partial"
    assert [path.name for path in left.iterdir()] == ["checkpoints"]


@pytest.mark.e2e
def test_some_rows_at_a_time_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = find_program("llama-quantize")
    assert program
    one_tensor(tmp_path / "F16.gguf")
    assert gguf.takes(program, "--max-buffer-size")
    assert not gguf.takes(program, "--no-such-option")
    for size in (1 << 30, 1 << 20):  # the whole of 8 MiB in float32, and an eighth of it
        monkeypatch.setattr(gguf, "QUANTIZE_BUFFER_BYTES", size)
        gguf.quantize(tmp_path / "F16.gguf", tmp_path / f"{size}.gguf", "Q4_K_M", program)
    assert (tmp_path / f"{1 << 30}.gguf").read_bytes() == (tmp_path / f"{1 << 20}.gguf").read_bytes()


def test_a_number_is_corrected_in_its_place_but_for_a_file_of_two_names(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        writer = GGUFWriter(path, "llama")
        writer.add_add_bos_token(True)
        writer.add_tensor("blk.0.attn_norm.weight", np.arange(32, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def adds_bos(path: Path) -> bool:
        field = open_gguf(path).get_field("tokenizer.ggml.add_bos_token")
        assert field
        return bool(field.contents())

    ours, theirs, linked = (tmp_path / f"{name}.gguf" for name in ("ours", "theirs", "linked"))
    write(ours)
    write(theirs)
    linked.hardlink_to(theirs)
    before, size_bytes = ours.stat().st_ino, ours.stat().st_size
    for path in (ours, linked):
        assert gguf.correct(path, gguf.Corrections(add_bos_token=False))
    assert (ours.stat().st_ino, ours.stat().st_size) == (before, size_bytes)
    assert [adds_bos(path) for path in (ours, linked, theirs)] == [False, False, True]
    assert gguf.correct(ours, gguf.Corrections(eot_token_id=7))  # which the file does not have: written anew
    assert ours.stat().st_ino != before
    assert not adds_bos(ours)

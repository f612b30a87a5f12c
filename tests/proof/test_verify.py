"""A shipped file is held against its record: every fault on its way is caught by the check that it belongs to, in the right words.

The same faults are looked at by the proof inside `ftkit ship`, which knows the tokenizer of the training and no record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shipped

from ftkit.check import Check
from ftkit.engines import llamacpp
from ftkit.errors import ModelError
from ftkit.line.prove import end_of_sequence, own_prompts, proof_checks
from ftkit.proof import record, verify
from ftkit.proof.record import PROBES, RECORD, read_record


@pytest.fixture(scope="module")
def words() -> Any:
    return shipped.tokenizer()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped.make(tmp_path_factory.mktemp("shipped") / "tiny")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, elsewhere."""
    return Path(shutil.copytree(made, tmp_path / "elsewhere"))


def verified(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in verify.verify(folder / shipped.FILE, folder / RECORD)}


def test_what_shipped_passes_every_check(folder: Path) -> None:
    checks = verified(folder)
    assert {check.outcome for check in checks.values()} == {"passed"}, checks
    assert list(checks) == [
        "record", "file", "chat template", "special tokens", "tokenizer", "context length", "architecture", "other metadata",
        "tensor types", "tensors", "token ids", "prompts", "stops", "losses on texts", "losses on held-out rows",
    ]  # fmt: skip
    assert checks["losses on texts"].detail.startswith("0 nats apart a token")
    assert checks["context length"].detail == "context_length 2048"


# What is changed: the checks that fail, and words of one of them.
FAULTS: list[tuple[shipped.Sabotage, set[str], str, str]] = [
    (shipped.another_template, {"chat template", "prompts"}, "chat template",
     "tokenizer.chat_template is another than was recorded; servers would ask it otherwise than it was trained"),
    (shipped.thinking_on_this_side_alone, {"chat template", "prompts"}, "prompts", "from token"),
    (shipped.another_end, {"special tokens"}, "special tokens", "tokenizer.ggml.eos_token_id is 64, recorded is 262; answers would"),
    (shipped.bos_put_before, {"special tokens", "prompts"}, "prompts", "shipped [260, 261, "),
    (shipped.another_pre_tokenizer, {"tokenizer", "token ids"}, "tokenizer",
     "tokenizer.ggml.pre is 'llama-bpe', recorded is 'qwen2'; texts would become other tokens"),
    (shipped.a_bit_flipped, {"tensors"}, "tensors", "1 of 20 hold other numbers than recorded: blk.1.attn_output.weight"),
    (shipped.rows_permuted, {"tensors", "losses on texts", "losses on held-out rows"}, "tensors", "blk.0.ffn_up.weight"),
    (shipped.quantised_again, {"tensor types", "tensors", "other metadata"}, "tensor types",
     "5 F32, 15 Q8_0; recorded are 20 F32: it was quantised again"),
]  # fmt: skip


@pytest.mark.parametrize(("sabotage", "failing", "check", "said"), FAULTS, ids=[row[0].__name__ for row in FAULTS])
def test_a_fault_on_the_way_is_caught(
    sabotage: shipped.Sabotage, failing: set[str], check: str, said: str, folder: Path, words: Any
) -> None:
    sabotage(folder / shipped.FILE, words)
    checks = verified(folder)
    assert {name for name, found in checks.items() if found.outcome == "failed"} == {"file", *failing}, checks
    assert said in checks[check].detail


def proven(path: Path, words: Any) -> dict[str, Check]:
    questions = [row.question for row in shipped.ROWS]
    with llamacpp.load(path, 512) as engine:
        checks = proof_checks(words, engine, shipped.ROWS, questions, shipped.stops(words), own_prompts(words, engine))
    return {check.name: check for check in (*checks, end_of_sequence(path, words, shipped.stops(words)))}


# The same in the proof inside `ftkit ship`; what changes numbers alone is seen there by loss and KL (test_behaviour.py).
PROOF_FAULTS: list[tuple[shipped.Sabotage, set[str], str]] = [
    (shipped.another_template, {"training ids", "prompts"}, "from token 1 of '<|im_start|>user"),
    (shipped.thinking_on_this_side_alone, {"training ids", "prompts"}, "from token "),
    (shipped.another_end, {"end of sequence"}, "the file ends at a (64), training at <|im_end|>"),
    (shipped.bos_put_before, {"training ids", "prompts"}, "shipped [260, 261, "),
    (shipped.another_pre_tokenizer, {"token ids", "training ids", "prompts"}, "from token 0 of '1234567890"),
]


@pytest.mark.parametrize(("sabotage", "failing", "said"), PROOF_FAULTS, ids=[row[0].__name__ for row in PROOF_FAULTS])
def test_the_proof_inside_ship_catches_it_too(sabotage: shipped.Sabotage, failing: set[str], said: str, folder: Path, words: Any) -> None:
    path = folder / shipped.FILE
    sabotage(path, words)
    checks = proven(path, words)
    assert {name for name, found in checks.items() if found.outcome == "failed"} == failing, checks
    assert any(said in checks[name].detail for name in failing), checks


def test_the_proof_passes_what_is_right(folder: Path, words: Any) -> None:
    assert {check.outcome for check in proven(folder / shipped.FILE, words).values()} == {"passed"}


def better(loaded: dict[str, Any]) -> None:
    loaded["proof"]["scores"]["trained"]["right"] = 10


def another_file(loaded: dict[str, Any]) -> None:
    loaded["file"]["sha256"] = "0" * 64


@pytest.mark.parametrize(("change", "failing"), [(better, {"record"}), (another_file, {"record", "file"})])
def test_an_edited_record_is_caught(change: Callable[[dict[str, Any]], None], failing: set[str], folder: Path) -> None:
    shipped.edit_record(folder, change)
    checks = verified(folder)
    assert {name for name, found in checks.items() if found.outcome == "failed"} == failing
    assert "was changed after it was written" in checks["record"].detail


def test_without_probes_what_needs_them_is_not_made(folder: Path) -> None:
    (folder / PROBES).unlink()
    checks = verified(folder)
    assert {name for name, found in checks.items() if found.outcome == "not made"} == {
        "tensors", "token ids", "prompts", "stops", "losses on texts",
    }  # fmt: skip
    assert checks["tensors"].detail == "probes.json is not beside ship.json"
    (folder / PROBES).write_text("{}", encoding="utf-8")
    assert verified(folder)["tensors"].detail == "probes.json is another than ship.json names"


def test_a_file_cut_short_is_no_gguf(folder: Path) -> None:
    path = folder / shipped.FILE
    path.write_bytes(path.read_bytes()[:-1000])
    checks = verified(folder)
    assert list(checks) == ["record", "file", "GGUF"]
    assert "bytes, recorded are" in checks["file"].detail
    assert "is not a whole GGUF file" in checks["GGUF"].detail


def test_a_file_that_llama_cpp_does_not_take_says_why(folder: Path, words: Any) -> None:
    shipped.say_otherwise(folder / shipped.FILE, pre="unheard-of")
    checks = verified(folder)
    assert "unknown pre-tokenizer type: 'unheard-of'" in checks["llama.cpp"].detail


def test_another_engine_is_named_where_the_file_is_the_same(folder: Path) -> None:
    """A llama.cpp that computes otherwise: its recorded losses are made others, and the record is written anew."""
    probes = record.read_probes(folder / PROBES)
    probes.texts[0].losses[:] = [loss + 20 for loss in probes.texts[0].losses]
    record.write_probes(folder / PROBES, probes)
    record.write_record(folder / RECORD, shipped.record(folder / shipped.FILE))
    check = verified(folder)["losses on texts"]
    assert check.outcome == "failed"
    assert "the file is the recorded one" in check.detail


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ("[]", "it holds no object"), ("{}", r"no record of a shipped file: name"), ('{"format": 9}', "newer ftkit")],
)
def test_what_is_no_record_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=said):
        read_record(tmp_path / RECORD)


def test_a_record_is_read_as_it_was_written(made: Path) -> None:
    found, untouched = read_record(made / RECORD)
    assert untouched
    assert found == shipped.record(made / shipped.FILE)
    assert json.loads((made / RECORD).read_text(encoding="utf-8"))[record.OWN_HASH]

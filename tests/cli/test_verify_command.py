"""`ftkit verify`: what it takes, what it says, and how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shipped
from click.testing import Result

from ftkit.proof.record import PROBES, RECORD

Ftkit = Callable[..., Result]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped.make(tmp_path_factory.mktemp("shipped") / "shipped")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "shipped"))


def test_a_folder_a_file_and_a_run_are_the_same(ftkit: Ftkit, folder: Path) -> None:
    (folder.parent / "manifest.json").write_text('{"steps": {}}', encoding="utf-8")
    for what in (folder, folder / shipped.FILE, folder.parent):
        done = ftkit("verify", what)
        assert done.exit_code == 0, done.output
        assert "losses on texts" in done.stdout
        assert "failed" not in done.stdout
    assert f"ftkit verify {folder.parent}" in ftkit("status", folder.parent).stdout


def test_a_file_that_was_split_is_looked_at_whole(ftkit: Ftkit, folder: Path, private_cache: Path) -> None:
    first, middle, last = shipped.split(folder / shipped.FILE)
    for what in (folder, first, last):
        done = ftkit("verify", what, "--json")
        assert (done.exit_code, json.loads(done.stdout)["outcome"]) == (0, "passed"), done.output
    assert not list(private_cache.rglob("*.gguf"))  # the whole is not kept
    middle.unlink()
    done = ftkit("verify", first)
    assert done.exit_code == 1
    assert f"{middle.name} is not beside it" in done.stderr


def test_a_fault_ends_with_6_and_names_the_checks(ftkit: Ftkit, folder: Path) -> None:
    shipped.a_bit_flipped(folder / shipped.FILE, None)
    done = ftkit("verify", folder)
    assert done.exit_code == 6
    assert f"Error: {folder / shipped.FILE} is not what shipped as tiny: file, tensors." in done.stderr
    shown = ftkit("verify", folder, "--json")
    loaded = json.loads(shown.stdout)
    assert (shown.exit_code, loaded["outcome"]) == (6, "failed")
    assert {check["name"] for check in loaded["checks"] if check["outcome"] == "failed"} == {"file", "tensors"}
    assert loaded["as_shipped"]["checks"][0]["outcome"] == "passed"


def test_what_was_not_looked_at_is_no_failure_and_not_passed(ftkit: Ftkit, folder: Path) -> None:
    (folder / PROBES).unlink()
    done = ftkit("verify", folder, "--json")
    assert (done.exit_code, json.loads(done.stdout)["outcome"]) == (0, "not made")


def test_a_file_under_another_name_takes_its_record(ftkit: Ftkit, folder: Path, tmp_path: Path) -> None:
    """As Ollama keeps it."""
    blob = tmp_path / "sha256-0123"
    (folder / shipped.FILE).rename(blob)
    assert ftkit("verify", blob, "--record", folder / RECORD).exit_code == 0
    gone = ftkit("verify", folder)
    assert (gone.exit_code, f"{shipped.FILE} is not there" in gone.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("FOLDER/x.gguf",), 1, "There is no"),
        (("EMPTY/x.gguf",), 1, "There is no"),
        (("EMPTY",), 1, "has no ship.json"),
        (("FOLDER", "--set", "ship.keep=1"), 2, "this is a shipped file"),
        (("recipe.yaml",), 2, "There is no recipe"),
        (("EMPTY", "--record", "FOLDER/zzz.json"), 1, "has no ship.json"),
    ],
)
def test_what_cannot_be_verified_is_refused(words: tuple[str, ...], code: int, said: str, ftkit: Ftkit, folder: Path) -> None:
    empty = folder.with_name("empty")
    empty.mkdir()
    done = ftkit("verify", *(word.replace("FOLDER", str(folder)).replace("EMPTY", str(empty)) for word in words))
    assert (done.exit_code, said in done.stderr) == (code, True), done.output
    assert "Hint: " in done.stderr


def test_a_recipe_without_a_proof_says_what_comes_first(ftkit: Ftkit, tmp_path: Path, rows: list[object], write_rows: Any) -> None:
    import tiny

    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny.make_model(tmp_path / 'model')}\n", encoding="utf-8")
    done = ftkit("verify", tmp_path)
    assert (done.exit_code, "holds no proof of this recipe: `ask` is not done" in done.stderr) == (1, True), done.output
    assert not (tmp_path / "runs").exists()

"""What works where only ftkit's own requirements are installed, without the extra `train`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import shipped
from conftest import REPOSITORY
from packaging.requirements import Requirement

Result = subprocess.CompletedProcess[str]


def needed(name: str, seen: set[str]) -> set[str]:
    """The distributions that `name` cannot do without, itself among them."""
    if name not in seen:
        seen.add(name)
        for text in metadata.requires(name) or ():
            wanted = Requirement(text)
            if not wanted.marker or wanted.marker.evaluate({"extra": ""}):
                needed(wanted.name, seen)
    return seen


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds what ftkit requires, and no more."""
    folder = tmp_path_factory.mktemp("packages")
    for name in needed("ftkit", set()):
        files = metadata.files(name) or ()
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__") and name != "ftkit"}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    information = metadata.distribution("ftkit").locate_file(f"ftkit-{metadata.version('ftkit')}.dist-info")
    (folder / Path(str(information)).name).symlink_to(Path(str(information)))
    return folder


def run(packages: Path, *words: str | Path, cwd: Path) -> Result:
    """`ftkit WORDS` with these packages alone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(packages)])}
    command = [sys.executable, "-S", "-m", "ftkit", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=60)


def test_torch_is_not_there(packages: Path) -> None:
    names = {path.name for path in packages.iterdir()}
    assert not names & {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"}


def test_commands_that_need_no_training_stack(packages: Path, tmp_path: Path) -> None:
    done = run(packages, "init", "mine", "--model", "org/name", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(packages, "env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install 'ftkit[train]'" in done.stdout
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"steps": {}}', encoding="utf-8")
    done = run(packages, "status", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(packages, "chat", "run", "hello", cwd=tmp_path)
    assert "holds no shipped model" in done.stderr


def test_a_shipped_file_is_verified_without_it(packages: Path, tmp_path: Path) -> None:
    shipped.make(tmp_path / "shipped")
    done = run(packages, "verify", "shipped", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "losses on texts" in done.stdout


@pytest.mark.parametrize("name", ["plan", "train", "ship", "build"])
def test_the_others_name_what_is_missing(packages: Path, tmp_path: Path, name: str) -> None:
    done = run(packages, name, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "torch" in done.stderr
    assert "Hint: bring what training needs: pip install 'ftkit[train]'" in done.stderr

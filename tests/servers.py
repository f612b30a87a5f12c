"""Real Ollama servers for the tests: v0.34.1, and v0.24.0, the last of the old kind with llama.cpp inside.

    python tests/servers.py        builds both into ftkit's private folder (about 5 minutes of two cores); later calls find them there

Go and a C++ compiler are needed, `ftkit setup llama.cpp`, whose programs v0.34.1 runs, and the headers of `tests/llama_cpp.py` for v0.24.0.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
from filelock import FileLock

from ftkit.files import cache_folder
from ftkit.machine import packages
from ftkit.machine.call import call

VERSIONS = ("v0.34.1", "v0.24.0")
COMPILED_IN = "v0.24.0"  # has llama.cpp inside; the newer one runs llama-server from a folder beside its own
MODULE = "github.com/ollama/ollama"
STARTS_WITHIN_SECONDS = 60


def program(version: str) -> Path:
    """Where the server of this version is, or will be."""
    programs = "" if version == COMPILED_IN else f"-llama.cpp-{packages.PACKAGES['llama.cpp'].version}"
    return cache_folder() / "test-servers" / f"{version}{programs}" / "bin" / "ollama"


def build(version: str) -> Path:
    """Build a server, unless it is there; the program."""
    final = program(version).parent.parent
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f".{final.name}.lock")):
        if program(version).exists():
            return program(version)
        compiled_in = version == COMPILED_IN
        programs = packages.installed("llama.cpp")
        assert compiled_in or programs, "ftkit setup llama.cpp comes first"
        print(f"building Ollama {version}", flush=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
            target, environment = Path(scratch) / "server", {"GOTOOLCHAIN": "local"}
            if compiled_in:  # its Go module leaves third-party headers out
                flags = f"-O2 -march=native {packages.NO_TILES}"  # for which the module has not all files
                environment |= {"CGO_CFLAGS": flags, "CGO_CXXFLAGS": f"{flags} -I{llama_cpp.headers()}"}
            environment["GOBIN"] = str(target / "bin")
            call(["go", "install", f"{MODULE}@{version}"], environment=environment, cwd=Path(scratch))
            if programs and not compiled_in:
                shutil.copytree(programs / "bin", target / "lib" / "ollama", symlinks=True)
            target.rename(final)
    return program(version)


@contextmanager
def running(version: str, folder: Path) -> Iterator[str]:
    """A server on a free loopback port with its own home and models in `folder`; its address. It is stopped afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ, "OLLAMA_HOST": address, "OLLAMA_MODELS": str(folder / "models"), "HOME": str(folder),
        "OLLAMA_KEEP_ALIVE": "30m", "OLLAMA_NUM_PARALLEL": "1",
    }  # fmt: skip
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen([program(version), "serve"], env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_it_answers(address, server)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait_until_it_answers(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://{address}/api/version", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"Ollama did not start at {address}")


if __name__ == "__main__":
    for wanted in VERSIONS:
        print(build(wanted))

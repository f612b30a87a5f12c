"""Run another program: no shell between, its last lines where it fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ftkit.errors import ToolFailedError, ToolMissingError


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
        lines = done.stdout.rstrip().splitlines()
        traced = any(line.startswith("Traceback (most recent call last)") for line in lines)  # then the last line says what is wrong
        last = "\n".join("  " + line for line in lines[-1 if traced else -12 :])
        raise ToolFailedError(f"{Path(words[0]).name} failed with exit code {done.returncode}:\n{last}\n  $ {' '.join(words)}")
    return done.stdout

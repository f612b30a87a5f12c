"""An importance matrix: how much each column of each weight matters to what a model reads, for llama-quantize to round less there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ftkit.data.general import general_text
from ftkit.machine.call import call
from ftkit.machine.llama_cpp import Found
from ftkit.progress import SILENT, Reporter

CHUNK_TOKENS = 512
OWN_CHARACTERS, GENERAL_CHARACTERS = 48 << 10, 24 << 10  # about 24 and 12 chunks


def importance(model: Path, rows: Iterable[str], path: Path, program: Found, reporter: Reporter = SILENT) -> None:
    """Write the matrix of a 16-bit file over rendered rows and general text, read as the model reads them: with control tokens.

    Raises ToolFailedError with llama-imatrix's last lines.
    """
    reporter.step(f"measuring what matters in {model.name}")
    own = ""
    for row in rows:
        if len(own) >= OWN_CHARACTERS:
            break
        own += row
    text = path.with_suffix(".txt")
    text.write_text(own[:OWN_CHARACTERS] + "\n\n" + general_text(GENERAL_CHARACTERS), encoding="utf-8")
    files: list[str | Path] = ["-m", model.resolve(), "-f", text.name, "-o", path.name]  # names alone: they end up in the quantised file
    call([program.path.resolve(), *files, "--parse-special", "--no-ppl", "-c", str(CHUNK_TOKENS)], cwd=path.parent)
    text.unlink()

"""Find llama.cpp's programs and converter, and say where."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ftkit.errors import RecipeError, ToolMissingError
from ftkit.files import user_path
from ftkit.machine.packages import LLAMA_CPP, installed


def named_llama_cpp(llama_cpp_dir: str | None, folder: Path) -> Path | None:
    """The llama.cpp that a recipe in `folder` names. Raises RecipeError where that is not there."""
    if not llama_cpp_dir:
        return None
    named = folder / user_path(llama_cpp_dir)
    if not named.is_dir():
        raise RecipeError(f"tools.llama_cpp_dir: there is no folder {named}.", "leave it out to look in LLAMA_CPP_DIR and PATH")
    return named


def _places(llama_cpp_dir: Path | None) -> list[tuple[str, Path]]:
    """Where llama.cpp may be, in the order in which it is looked for."""
    places = []
    if llama_cpp_dir:
        places.append(("the recipe's tools.llama_cpp_dir", llama_cpp_dir))
    if chosen := os.environ.get("LLAMA_CPP_DIR"):
        places.append(("LLAMA_CPP_DIR", user_path(chosen)))
    return places


@dataclass(frozen=True)
class Found:
    """A program or script, and which rule found it."""

    path: Path
    where: str

    @property
    def build(self) -> str:
        """Two that say the same are of one llama.cpp: one package, one checkout, or one folder on PATH."""
        if self.where.startswith("ftkit setup"):
            return f"{LLAMA_CPP[0]} {LLAMA_CPP[1]}"
        return f"{self.path.parent} (PATH)" if self.where == "PATH" else self.where


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


CONVERTER, LORA_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"


def find_converter(llama_cpp_dir: Path | None = None, script: str = CONVERTER) -> Found | None:
    """One of llama.cpp's scripts: in the user's llama.cpp checkout, beside a program on PATH, then the private folder."""
    for where, folder in _places(llama_cpp_dir):
        if (folder / script).is_file():
            return Found(folder / script, where)
    if program := shutil.which(script):
        return Found(Path(program), "PATH")
    if (brought := installed("converter")) and (found := brought.with_name(script)).is_file():
        return Found(found, "ftkit setup converter")
    return None


def need_converter(llama_cpp_dir: Path | None = None, script: str = CONVERTER) -> Found:
    """`find_converter`, or ToolMissingError with the command that brings it."""
    if found := find_converter(llama_cpp_dir, script):
        return found
    raise ToolMissingError(f"llama.cpp's converter ({script}) is not here.", "ftkit setup converter")

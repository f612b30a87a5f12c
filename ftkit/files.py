"""Files that are written whole, names made of content, and ftkit's private folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

from ftkit.errors import RecipeError, RunError


def user_path(text: str) -> Path:
    """A path as a user writes it, `~` for the home folder. Raises RecipeError for the home of a user that is not there."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise RecipeError(f"{text}: there is no such user's home folder.", "write the path in full") from None


def cache_folder() -> Path:
    """ftkit's private folder: `FTKIT_CACHE_DIR`, or where this system keeps a user's caches."""
    chosen = os.environ.get("FTKIT_CACHE_DIR")
    return user_path(chosen) if chosen else user_cache_path("ftkit", appauthor=False)


def make_cache_folder(folder: Path) -> Path:
    """A folder in the private one (or that itself), made where it is missing. Raises RunError where that is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"Cannot write to ftkit's private folder {folder}: {error.strerror}.", "choose another: FTKIT_CACHE_DIR=FOLDER"
        ) from None
    return folder


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
UNFINISHED = {  # what is said of a file that was not written whole where no reason is given, and by whom
    r"PytorchStreamWriter failed writing|inline_container.*unexpected pos": "torch",
    r"OSError: \d+ requested and \d+ written": "the converter",
    r"llama-quantize failed with exit code -25:|failed to quantize.*iostream error": "llama-quantize",  # 25: SIGXFSZ
}


def fingerprint(*parts: object) -> str:
    """A hash of JSON-able parts; equal inputs give equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` as a whole: a reader sees the old or the new content, never a part, also after the power failed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Another name for a large file, which stays where it is; a copy where the system makes none."""
    source = source.resolve()
    for linked in (target.symlink_to, target.hardlink_to):  # Windows wants a privilege for the first
        with suppress(OSError):
            linked(source)
            return
    shutil.copyfile(source, target)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Windows cannot be asked to, and does not need to be."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Have all files below a folder on the disk."""
    mode, needed = ("rb+", os.W_OK) if os.name == "nt" else ("rb", os.R_OK)  # Windows syncs only what may be written
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.is_file() and os.access(path, needed):
                with open(path, mode) as file:
                    os.fsync(file.fileno())
        sync_folder(Path(place))


def size_bytes(path: Path) -> int:
    """Of a file, or of all files below a folder; links count as themselves."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(Path(place, name).lstat().st_size for place, _, files in os.walk(path) for name in files)


def disk_fault(error: BaseException) -> str | None:
    """Why the disk took no more, where this error comes from that; the writers of torch and safetensors have errors of their own."""
    seen: BaseException | None = error
    while seen:
        if isinstance(seen, OSError) and seen.errno in DISK_ERRORS:
            return os.strerror(seen.errno)
        found = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(seen))  # safetensors; a program in Python
        if found and int(found[1]) in DISK_ERRORS:
            return os.strerror(int(found[1]))
        for words, by in UNFINISHED.items():
            if re.search(words, str(seen)):
                return f"{by} could not write a whole file"
        seen = seen.__cause__ or seen.__context__
    return None

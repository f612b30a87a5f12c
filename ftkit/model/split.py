"""A model in several GGUF files, as llama-gguf-split and the hub have it: found whole, and joined into the one file that it was.

llama.cpp alone reads such files by themselves; transformers and Ollama want one. Joined here, no program has to be there for it, and
the bytes are those of the file before it was split: its hash still tells it.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from ftkit.errors import ModelError, RunError
from ftkit.files import cache_folder, disk_fault, make_cache_folder
from ftkit.model.source import open_gguf

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
KEYS = ("split.no", "split.count", "split.tensors.count")  # what a part says of itself


def parts_of(path: Path) -> list[Path]:
    """All files of the model that this is one file of, in their order; none where it is the whole.

    Raises ModelError where one of them is missing.
    """
    named = PART.fullmatch(path.name)
    if not named or int(named["count"]) < 2:
        return []
    stem, count = named["stem"], int(named["count"])
    parts = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"{path.name} is one of {count} files of a model, and {', '.join(missing[:3])}{' …' * (len(missing) > 3)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it.",
            f"put all of {stem}-*-of-{count:05}.gguf into {path.parent}",
        )
    return parts


def name_of_whole(path: Path) -> str:
    """The name of the file that a part is of."""
    named = PART.fullmatch(path.name)
    return f"{named['stem']}.gguf" if named else path.name


def join(parts: Sequence[Path], target: Path) -> None:
    """Write the parts as one file. Raises ModelError where one is cut short, or is no part of this model."""
    readers = [open_gguf(part) for part in parts]
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        said = [field.contents() if (field := reader.get_field(key)) else None for key in KEYS[:2]]
        if said != [number, len(parts)]:
            raise ModelError(f"{part.name} is not file {number + 1} of {len(parts)} of a model.", "download all of them again")
    first, tensors = readers[0], [(reader, tensor) for reader in readers for tensor in reader.tensors]
    count = first.get_field(KEYS[2])
    if count and count.contents() != len(tensors):
        raise ModelError(
            f"{parts[0].name} is of a model of {count.contents()} tensors, and the {len(parts)} files hold {len(tensors)}.",
            "download all of them again: one is of another model",
        )
    fields = [field for name, field in first.fields.items() if not name.startswith("GGUF.") and name not in KEYS]
    with open(target, "wb") as file:

        def pad() -> None:
            file.write(bytes(-file.tell() % first.alignment))

        file.write(b"GGUF" + struct.pack("<IQQ", first.fields["GGUF.version"].contents(), len(tensors), len(fields)))
        for field in fields:
            file.write(b"".join(part.tobytes() for part in field.parts))
        offset = 0
        for _, tensor in tensors:
            *told, _ = tensor.field.parts  # its offset comes last
            file.write(b"".join(part.tobytes() for part in told) + struct.pack("<Q", offset))
            offset += -(-int(tensor.n_bytes) // first.alignment) * first.alignment
        pad()
        for reader, tensor in tensors:
            file.write(reader.data[tensor.data_offset : tensor.data_offset + int(tensor.n_bytes)])
            pad()


def joined(parts: Sequence[Path], fingerprint: str) -> Path:
    """The parts as one file in ftkit's private folder, made once. Raises RunError where the disk refuses."""
    folder = make_cache_folder(cache_folder() / "models" / f"joined-{fingerprint}")
    whole = folder / name_of_whole(parts[0])
    with FileLock(folder.with_suffix(".lock")):
        if not whole.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                try:
                    join(parts, Path(partial, whole.name))
                except OSError as error:
                    if not (fault := disk_fault(error)):
                        raise
                    raise RunError(
                        f"{parts[0].name} and {len(parts) - 1} more cannot be joined in {folder}: {fault}.",
                        "free some space there, or choose another: FTKIT_CACHE_DIR=FOLDER",
                    ) from None
                Path(partial, whole.name).rename(whole)
    return whole

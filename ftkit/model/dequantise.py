"""A GGUF → a 16-bit checkpoint with its tokenizer."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftkit import patches
from ftkit.errors import ModelError, RunError, first_line
from ftkit.files import cache_folder, disk_fault, make_cache_folder
from ftkit.model.source import Source, from_files, open_gguf
from ftkit.progress import Reporter

# GGUF names a pre-tokenizer instead of carrying it, and transformers does not rebuild these from the name.
# The steps follow llama.cpp's table (src/llama-vocab.cpp); `parity.compare_tokens` checks the result against llama.cpp itself.
PRE_TOKENIZERS_WITH_SINGLE_DIGITS = ("smollm",)

ORIGINAL = "use the model's original safetensors instead: --model org/name"
DEQUANTISED = "gguf-1"  # begins the name of what `dequantise` keeps; another number once it would write other files


def dequantise(source: Source, reporter: Reporter) -> Path:
    """A bfloat16 checkpoint and tokenizer of a GGUF, kept in the private folder under the file's hash.

    What was quantised stays as coarse as it was; only the storage is 16-bit.
    """
    from safetensors import SafetensorError

    assert source.gguf
    final = make_cache_folder(cache_folder() / "models") / f"{DEQUANTISED}-{source.fingerprint}"
    with FileLock(final.with_suffix(".lock")):
        if final.is_dir():
            return final
        reporter.step(f"dequantising {source.gguf.name} to a 16-bit checkpoint")
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        try:
            _write_checkpoint(source.gguf, partial)
            partial.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (fault := disk_fault(error)):
                raise
            raise RunError(
                f"{source.gguf.name} cannot be dequantised into {final.parent}: {fault}.",
                "free some space there, or choose another: FTKIT_CACHE_DIR=FOLDER",
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def outdated() -> list[Path]:
    """Dequantised models of an older form, which nothing reads any more."""
    folders = sorted((cache_folder() / "models").glob("gguf-*/"))
    return [folder for folder in folders if not folder.name.startswith(f"{DEQUANTISED}-") and not folder.is_symlink()]


def _write_checkpoint(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer, fields = rebuilt_tokenizer(path)
    with _reading(path) as where:
        count = len(fields["tokenizer.ggml.tokens"].data)
        if len(tokenizer) > count:  # of which no row of the embedding is: no file could be made of it
            more = ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(range(count, len(tokenizer))))
            raise ModelError(f"transformers reads {path.name} with tokens that the file does not have: {more}.", ORIGINAL)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
        )
    tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def rebuilt_tokenizer(path: Path) -> tuple[Any, Mapping[str, Any]]:
    """The tokenizer of a GGUF, as far as transformers makes it of the file's metadata: a guess until llama.cpp gives the same ids.

    Beside it the file's fields: of a large vocabulary they take seconds to read.
    """
    from tokenizers import decoders
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence
    from transformers import AutoTokenizer

    with _reading(path) as where:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **where)
        fields = open_gguf(path).fields
    pre_tokenizer = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if pre_tokenizer in PRE_TOKENIZERS_WITH_SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    space = fields.get("tokenizer.ggml.add_space_prefix")
    backend = tokenizer.backend_tokenizer
    if space is not None and not space.contents() and isinstance(backend.pre_tokenizer, Metaspace):  # transformers puts one all the same
        backend.pre_tokenizer = Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, fields


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` is called with to read a GGUF. Raises ModelError where transformers cannot."""
    try:
        with patches.applied("reading GGUF files"):
            yield {"gguf_file": path.name, **from_files()}
    except (
        ValueError,
        LookupError,
        ImportError,
        struct.error,
        OSError,
        TypeError,
        AttributeError,
        ArithmeticError,
        NotImplementedError,
    ) as error:
        raise ModelError(
            f"transformers cannot read {path.name} back: {first_line(error)}.",
            f"download it again, whole; or {ORIGINAL}",
        ) from None

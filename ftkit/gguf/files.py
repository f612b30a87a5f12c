"""Merged model → GGUF files: convert, quantise, correct, and read back what was written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError
from ftkit.gguf import script as running
from ftkit.gguf.types import block, default_type
from ftkit.machine.call import call
from ftkit.machine.llama_cpp import Found
from ftkit.model.source import gguf_architecture, open_gguf, shapes_of
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import QUANTIZATIONS

if TYPE_CHECKING:
    from gguf import GGUFReader

CONVERTER_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}  # what the converter writes without llama-quantize


QUANTIZE_BUFFER_BYTES = 1 << 30  # of a tensor's rows, that llama-quantize holds at a time


# Models that predict several tokens at once, by layers that transformers leaves out when it saves a model. The converter wants them
# unless it is told otherwise (conversion/qwen.py, glm.py).
PREDICT_MORE = ("qwen3_next", "qwen3_5", "glm4_moe", "glm_moe_dsa")


@dataclass(frozen=True)
class GgufFile:
    """A finished GGUF file, as read back from it."""

    quantization: str
    path: Path
    bytes: int
    bits_per_weight: float
    tensors: int
    fallback_tensors: int  # 2-D tensors whose rows do not divide by the wanted type's block, so that another was taken


def convert(model: Path, files: Mapping[str, Path], converter: Found, reporter: Reporter = SILENT) -> None:
    """Files by their types, of llama.cpp's converter in a process of its own: its `gguf` package and PyPI's must not meet.

    One process makes them all: of a small model, loading torch and transformers is most of the time. Raises ToolFailedError with its
    last lines.
    """
    reporter.step(f"converting to {' and '.join(path.name for path in files.values())}")
    more = ["--no-mtp"] if _lost_what_predicts_more(model) else []
    run_script(
        converter, *((str(model), "--outfile", str(path), "--outtype", CONVERTER_TYPES[kind], *more) for kind, path in files.items())
    )
    if _has_spare_rows(model):
        for path in files.values():
            _name_spare_rows(path)


def run_script(script: Found, *runs: Sequence[str | Path]) -> None:
    """One of llama.cpp's Python scripts, with the arguments of each run, with the `gguf` package beside it, and without the hub."""
    libraries = [str(script.path.parent)] + ([str(script.path.parent / "gguf-py")] if (script.path.parent / "gguf-py").is_dir() else [])
    arguments = [word for number, run in enumerate(runs) for word in ([running.THEN] * (number > 0) + [*run])]
    call(
        [sys.executable, "-P", running.__file__, script.path, *arguments],
        environment={"PYTHONPATH": os.pathsep.join(libraries), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
    )


def _lost_what_predicts_more(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if not str(config.get("model_type", "")).startswith(PREDICT_MORE):
        return False
    layers = {**config, **(config.get("text_config") or {})}.get("num_hidden_layers", 0)
    numbers = re.compile(r"\.layers\.(\d+)\.")
    return not any("mtp." in name or ((found := numbers.search(name)) and int(found[1]) >= layers) for name in shapes_of(model))


def _has_spare_rows(model: Path) -> bool:
    """Whether the embedding has more rows than the tokenizer has tokens, by their files: neither is loaded."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    words = model / "tokenizer.json"
    if not words.is_file():
        return False  # of sentencepiece: the converter counts by the config
    tokenizer = json.loads(words.read_text(encoding="utf-8"))
    ids: list[int] = [len(tokenizer["model"].get("vocab", ())) - 1, *(token["id"] for token in tokenizer.get("added_tokens", ()))]
    rows: int = {**config, **(config.get("text_config") or {})}.get("vocab_size") or 0
    return rows > max(ids) + 1


def _name_spare_rows(path: Path) -> None:
    """Give a token to each row of the embedding that has none, as the converter does itself for most kinds of tokenizer.

    It does not for byte pairs with a fallback to bytes (Llama 2's kind without its tokenizer.model, Gemma 4's), and llama.cpp then
    refuses the file: it expects as many rows as there are tokens. These cannot be read from a text, and are called unused.
    Raises ModelError where two tables have other numbers of rows, as the converter cuts one of Gemma 4's and not the other.
    """
    from gguf import GGUFValueType, TokenType
    from gguf.scripts.gguf_new_metadata import MetadataDetails

    reader, spare = open_gguf(path), {"tokens": "[PAD{}]", "scores": -1000.0, "token_type": int(TokenType.UNUSED)}
    tables = {str(tensor.name): int(tensor.shape[1]) for tensor in reader.tensors if tensor.name.endswith("token_embd.weight")}
    if len({*tables.values()}) > 1:
        raise ModelError(
            f"{path.name} would not load: {' and '.join(f'{name} has {rows:,} rows' for name, rows in tables.items())}; the model has more "
            "of them than its tokenizer has tokens, and the converter cuts but one.",
            "give the base as many rows as tokens, with transformers' resize_token_embeddings(len(tokenizer)), and train again",
        )
    rows = max(tables.values(), default=0)
    lists = {field.name: field for name in spare if (field := reader.get_field(f"tokenizer.ggml.{name}"))}
    known = len(next(iter(lists.values())).data)
    if known >= rows:
        return
    new = {}
    for name, field in lists.items():
        value = spare[name.rpartition(".")[2]]
        more = [value.format(number) if isinstance(value, str) else value for number in range(known, rows)]
        new[name] = MetadataDetails(GGUFValueType.ARRAY, [*field.contents(), *more])
    _rewrite(path, reader, new)


def takes(program: Found, option: str) -> bool:
    """Whether this build of a program knows an option, or llama-quantize a type, as it says itself."""
    said = subprocess.run([program.path, "--help"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return re.search(rf"(?<!\S){re.escape(option)}(?!\w)", (said.stdout + said.stderr).decode(errors="replace")) is not None


def quantize(
    source: Path,
    path: Path,
    quantization: str,
    program: Found,
    reporter: Reporter = SILENT,
    *,
    imatrix: Path | None = None,
    again: bool = False,
    types: Path | None = None,
) -> None:
    """llama-quantize from a 16-bit file, or `again` from one that is quantised, with an importance matrix or without.

    `types`: a file that says which tensors get another type than they would (gguf/bits.py).

    Some rows of a tensor at a time, so that the largest, a table of tokens, needs no more memory than others; earlier builds of
    llama-quantize hold each whole. Raises ToolFailedError with its last lines.
    """
    reporter.step(f"quantising to {path.name}")
    how: list[str | Path] = ["--imatrix", imatrix.name] if imatrix else []  # its name alone: it ends up in the file
    how += ["--allow-requantize"] if again else []
    how += ["--tensor-type-file", types.resolve()] if types else []
    how += ["--max-buffer-size", str(QUANTIZE_BUFFER_BYTES >> 20)] if takes(program, "--max-buffer-size") else []
    call([program.path.resolve(), *how, source.resolve(), path.resolve(), quantization], cwd=imatrix.parent if imatrix else None)


def template_in(path: Path) -> str | None:
    """The chat template that a file carries."""
    return _template(open_gguf(path))


def _template(reader: GGUFReader) -> str | None:
    field = reader.get_field("tokenizer.chat_template")
    return None if field is None else str(field.contents())


@dataclass(frozen=True)
class Wanted:
    """What a file must say of itself. What the model's folder does not say is not looked at: None, or nothing."""

    chat_template: str | None = None
    context_lengths: tuple[int, ...] = ()  # one of them
    tokens: int = 0  # at least those that have a row of the embedding; a row without a token gets one
    eos_token_ids: tuple[int, ...] = ()  # one of them
    eot_token_id: int | None = None
    says: Mapping[str, str] = field(default_factory=dict)  # base model, licence and the ftkit that made it, by key


# llama.cpp's names of architectures whose context length the converter does not take from the config
OWN_CONTEXT = ("mamba", "rwkv", "arwkv", "granitehybrid", "falcon", "plamo", "hunyuan", "chatglm", "bloom")


def read_back(path: Path, quantization: str, wanted: Wanted = Wanted()) -> GgufFile:
    """Check that the file is whole, and says of itself what the model's folder says.

    Raises ModelError where it does not.
    """
    reader = open_gguf(path)
    if wrong := next(_wrong(reader, wanted), None):
        raise ModelError(f"{path.name} {wrong}.", "make it again: ftkit ship --from merge; if that does not help, report the model's name")
    elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    size = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    elements_a_block = block(default_type(quantization))[0] if quantization in QUANTIZATIONS else 1
    return GgufFile(
        quantization=quantization,
        path=path,
        bytes=path.stat().st_size,
        bits_per_weight=8 * size / elements,
        tensors=len(reader.tensors),
        fallback_tensors=sum(
            len(tensor.shape) > 1 and bool(tensor.shape[0] % elements_a_block)
            for tensor in reader.tensors
            if quantization not in ("F32", "F16", "BF16")
        ),
    )


def _wrong(reader: GGUFReader, wanted: Wanted) -> Iterator[str]:
    """What a file says otherwise than it must, in words."""
    architecture = gguf_architecture(reader)
    says = {key: reader.get_field(f"{architecture}.{key}") for key in ("block_count", "context_length")}
    names = ("tokens", "eos_token_id", "eot_token_id")
    tokens, eos, eot = (reader.get_field(f"tokenizer.ggml.{name}") for name in names)
    if not says["block_count"]:
        yield f"is of the architecture {architecture or '–'!r}, and says nothing of it"
    context = says["context_length"]
    if wanted.context_lengths and not architecture.startswith(OWN_CONTEXT):
        found = int(context.contents()) if context else None
        if found not in wanted.context_lengths:
            yield f"has a context length of {found}, the model's config {wanted.context_lengths[0]}"
    count, rows = len(tokens.data) if tokens else 0, next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), 0)
    if count < min(wanted.tokens, rows or wanted.tokens):  # a token without a row, as Gemma 3 1B has one for pictures, the converter drops
        yield f"has {count:,} tokens, the model's tokenizer {wanted.tokens:,}"
    if wanted.tokens and rows and count > rows:
        yield f"has {count:,} tokens, and {rows:,} rows of its embedding"
    if wanted.chat_template and _template(reader) != wanted.chat_template:
        yield "does not carry the model's chat template"
    if eos and wanted.eos_token_ids and int(eos.contents()) not in wanted.eos_token_ids:
        yield f"ends a sequence at the token {int(eos.contents())}, the model at {' or '.join(map(str, wanted.eos_token_ids))}"
    if wanted.eot_token_id is not None and (not eot or int(eot.contents()) != wanted.eot_token_id):
        yield f"ends a turn at the token {int(eot.contents()) if eot else None}, the model at {wanted.eot_token_id}"
    for key, text in wanted.says.items():
        there = reader.get_field(key)
        if not there or there.contents() != text:
            yield f"says {key} {there.contents() if there else None!r} in place of {text!r}"


@dataclass(frozen=True)
class Corrections:
    """What the converter cannot know of a model, or llama.cpp would do otherwise than training did; None: it is right."""

    eot_token_id: int | None = None  # llama.cpp knows some ends of turn by their text and goes on after any other
    add_bos_token: bool | None = None  # whether a BOS is put before a prompt
    chat_template: str | None = None  # of a file that came without one, or with another

    @property
    def words(self) -> str:
        names = {"eot_token_id": "end of turn", "add_bos_token": "BOS", "chat_template": "chat template"}
        return " and ".join(names[name] for name, value in asdict(self).items() if value is not None)


def correct(path: Path, corrections: Corrections) -> bool:
    """Put the corrections into a finished file, and say whether there were any.

    It is written anew beside itself and takes its place, since metadata stands before the tensors; but where a number takes another's
    place in a file that has one name, as nobody else's has.
    """
    from gguf import GGUFValueType
    from gguf.scripts.gguf_new_metadata import MetadataDetails

    fields = {
        "eot_token_id": ("tokenizer.ggml.eot_token_id", GGUFValueType.UINT32),
        "add_bos_token": ("tokenizer.ggml.add_bos_token", GGUFValueType.BOOL),
        "chat_template": ("tokenizer.chat_template", GGUFValueType.STRING),
    }
    given = {name: value for name, value in asdict(corrections).items() if value is not None}
    if not given:
        return False
    new = {fields[name][0]: MetadataDetails(fields[name][1], value) for name, value in given.items()}
    alone = not path.is_symlink() and path.stat().st_nlink == 1
    reader = open_gguf(path, "r+" if alone else "r")
    there = {name: reader.get_field(name) for name in new}
    if alone and all((field := there[name]) and field.types == [to.type] and not isinstance(to.value, str) for name, to in new.items()):
        for name, field in there.items():
            field.parts[field.data[0]][0] = new[name].value
        reader.data.flush()
    else:
        _rewrite(path, reader, new)
    return True


def _rewrite(path: Path, reader: GGUFReader, new: dict[str, Any]) -> None:
    """The file with other metadata."""
    from gguf import GGUFWriter
    from gguf.scripts.gguf_new_metadata import copy_with_new_metadata

    partial = path.with_suffix(".corrected")
    copy_with_new_metadata(reader, GGUFWriter(partial, arch=gguf_architecture(reader), endianess=reader.endianess), new, [])
    partial.replace(path)

"""A tiny file that shipped, with its record and probes, made on the spot: no converter, no training; and the tokenizer of its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftkit.data.rows import Row
from ftkit.data.template import ChatSettings, render, settle
from ftkit.engines import llamacpp
from ftkit.engines.logits import Forced
from ftkit.files import file_fingerprint
from ftkit.gguf.says import says, tensors, types_of
from ftkit.line.prove import own_prompts
from ftkit.model.source import open_gguf
from ftkit.proof.probes import HARD_TEXTS
from ftkit.proof.record import PROBES, RECORD, Probes, Record, ShippedFile, write_probes, write_record
from ftkit.proof.verify import losses, this_engine
from ftkit.recipe import Data, Recipe

FILE = "tiny-F32.gguf"
BOS, START, END, PAD = "<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
MERGES = [("1", "2"), ("12", "3"), ("t", "h"), ("th", "e")]
TEMPLATE = (  # with a switch for thinking, as Qwen's
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ROWS = [
    Row(({"role": "user", "content": f"What is {n} plus 12?"}, {"role": "assistant", "content": f"It is {n + 12}."}), n)
    for n in range(100, 104)
]


def tokenizer() -> Any:
    """Byte pairs, each digit by itself, without a BOS; trained with thinking on, which llama.cpp would say is off."""
    from families import PATTERNS
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, MERGES, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (BOS, START, END, PAD)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=END, pad_token=PAD)
    fast.chat_template = TEMPLATE
    fast.chat_template = settle(fast, ChatSettings(Data().day, thinking=True))
    return fast


def stops(words: Any) -> list[int]:
    return [words.eos_token_id]


def make_file(path: Path, words: Any, *, seed: int = 0, size: int = 64) -> Path:
    """A Llama of two layers with random weights, as llama.cpp's converter would write it."""
    import gguf
    import numpy as np

    layers, random = 2, np.random.default_rng(seed)
    vocabulary = [word for word, _ in sorted(words.get_vocab().items(), key=lambda entry: entry[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(2 * size)
    writer.add_block_count(layers)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    special = set(words.all_special_tokens) | {START}
    writer.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_pad_token_id(words.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(words.chat_template)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(vocabulary), size), "output_norm": (size,)}
    for layer in range(layers):
        names = {"attn_norm": (size,), "ffn_norm": (size,), "ffn_down": (size, 2 * size)}
        names |= {f"attn_{part}": (size, size) for part in ("q", "k", "v", "output")}
        names |= {f"ffn_{part}": (2 * size, size) for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    for name, shape in shapes.items():
        values = np.ones(shape) if name.endswith("norm") else random.normal(0, 0.3, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(folder: Path, **changes: Any) -> Path:
    """The folder that is handed on: file, probes and record. `changes` are of the record."""
    words, path = tokenizer(), folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    make_file(path, words)
    reader = open_gguf(path)
    with llamacpp.load(path, 512) as engine:
        prompts = own_prompts(words, engine)
        texts = [engine.tokenize(text, begins=True) for text in HARD_TEXTS]
    held_out = [words(render(words, row.messages, ask=False))["input_ids"] for row in ROWS[:1]]
    given, rows = (losses(path, [Forced(ids, list(range(1, len(ids)))) for ids in each]) for each in (texts, held_out))
    write_probes(folder / PROBES, Probes(this_engine(), prompts, stops(words), given, rows, tensors(reader)))
    write_record(folder / RECORD, replace(record(path), **changes))
    return folder


def record(path: Path) -> Record:
    """What `ftkit ship` would write of a file; probes, if they lie beside it, are named."""
    reader, probes = open_gguf(path), path.with_name(PROBES)
    form = {
        "loss": 0.5,
        "kept": {"percent": 99.5, "low": 98.0, "high": 101.0},
        "divergence": 0.01,
        "agreed_percent": 99.0,
        "outside": 18.25,
    }
    return Record(
        name="tiny",
        file=ShippedFile(path.name, file_fingerprint(path), path.stat().st_size, "F32", 32.0),
        says=says(reader),
        tensor_types=types_of(reader),
        stops=[{"id": 1, "token": END}],
        base={"reference": "org/tiny", "kind": "hub", "revision": "0" * 40, "sha256": {}, "licence": {"license": "apache-2.0"}},
        trained={"steps": 10, "best_step": 8, "trained_tokens": 100, "verdict": "learnt", "sha256": {"adapter/a.safetensors": "1" * 64}},
        data={"train": [{"name": "train.jsonl", "sha256": "2" * 64}]},
        settings=Recipe(model="org/tiny").model_dump(mode="json"),
        versions={"training": {"ftkit": "0"}, "shipping": {"ftkit": "0"}, "llama.cpp": {}},
        merged_onto="the 16-bit source",
        closed=None,
        proof={
            "limits": {"evaluate": {"by": "whole"}, "max_loss_points": 3.0, "keep": 95.0},
            "right_by": "the whole answer",
            "checks": [{"name": "answers", "outcome": "passed", "detail": "9 of 10 right"}],
            "scores": {"trained": {"right": 9, "rows": 10, "percent": 90.0}},
            "forms": {"F32": form},
            "weighed": [{"quantization": "Q2_K", "bytes": 2048, "kept_percent": 71.5}],
            "same_answers": None,
        },
        beside={PROBES: file_fingerprint(probes)} if probes.is_file() else {},
    )


def split(path: Path, tensors: int = 8) -> list[Path]:
    """The file as several of so many tensors, by gguf's own writer, and no longer as one."""
    from gguf import GGUFWriter
    from gguf.scripts.gguf_new_metadata import copy_with_new_metadata

    copy_with_new_metadata(open_gguf(path), GGUFWriter(path, arch="llama", split_max_tensors=tensors), {}, [])
    path.unlink()
    return sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


# What can go wrong with a file on its way. Each takes the file and the tokenizer, and changes the file.
Sabotage = Callable[[Path, Any], None]


def say_otherwise(path: Path, **changes: Any) -> None:
    """Other metadata, written as gguf's own script writes it. Names are without `tokenizer.` and with _ for the dots of `ggml.`."""
    from gguf import GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
    new = {
        f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": MetadataDetails(kinds[type(value)], value)
        for key, value in changes.items()
    }
    partial, reader = path.with_suffix(".partial"), open_gguf(path)
    copy_with_new_metadata(reader, GGUFWriter(partial, arch="llama", endianess=reader.endianess), new, [])
    partial.replace(path)


def another_template(path: Path, words: Any) -> None:
    say_otherwise(path, chat_template=words.chat_template.replace("m['role']", "m['role'] | upper"))


def thinking_on_this_side_alone(path: Path, words: Any) -> None:
    say_otherwise(path, chat_template=TEMPLATE)


def another_end(path: Path, words: Any) -> None:
    say_otherwise(path, eos_token_id=words.convert_tokens_to_ids("a"))


def bos_put_before(path: Path, words: Any) -> None:
    say_otherwise(path, add_bos_token=True)


def another_pre_tokenizer(path: Path, words: Any) -> None:
    say_otherwise(path, pre="llama-bpe")  # which takes three digits at once


def a_bit_flipped(path: Path, words: Any) -> None:
    _tensor(path, "blk.1.attn_output.weight", lambda data: data.view("uint32").__setitem__((5, 5), data.view("uint32")[5, 5] ^ 1))


def rows_permuted(path: Path, words: Any) -> None:
    _tensor(path, "blk.0.ffn_up.weight", lambda data: data.__setitem__(slice(None), data[::-1].copy()))


def _tensor(path: Path, name: str, change: Callable[[Any], None]) -> None:
    reader = open_gguf(path, "r+")
    change(next(tensor.data for tensor in reader.tensors if tensor.name == name))
    reader.data.flush()


def quantised_again(path: Path, words: Any) -> None:
    """As llama-quantize would, by gguf's own functions."""
    import gguf
    import numpy as np

    reader, partial = open_gguf(path), path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value = int(gguf.LlamaFileType.MOSTLY_Q8_0) if field.name == "general.file_type" else field.contents()
            writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def edit_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """By hand, as JSON."""
    loaded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    change(loaded)
    (folder / RECORD).write_text(json.dumps(loaded), encoding="utf-8")

"""What a step of the line needs: RAM, VRAM, disk, bytes read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ftkit.data.lengths import asked_together
from ftkit.gguf.bits import MORE_BYTES, Tensor, finer_types
from ftkit.gguf.files import QUANTIZE_BUFFER_BYTES
from ftkit.gguf.script import LARGE_ELEMENTS
from ftkit.gguf.types import (
    CONVERTED,
    EMBEDDINGS,
    HEADER_BYTES_A_TOKEN,
    GgufModel,
    cache_elements,
    converted_type,
    gguf_bytes,
    has_scales,
    tensor_bytes,
    tensor_types,
)
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.model import Inventory
from ftkit.recipe import Ship

# Of a process before it touches a weight: anonymous memory (RssAnon) measured on Linux with torch 2.13 (CPU), transformers
# 5.23 and llama.cpp b11434. Pages mapped from files are not in it: the system can drop them at any time.
FTKIT_BYTES = 500 << 20  # torch, transformers, peft and bitsandbytes imported, a tokenizer loaded: 494 MiB
TRAINING_BYTES = 580 << 20  # TRL's trainer at work, too: 575 MiB beside the tensors of a model of two small layers
CONVERTER_BYTES = 320 << 20
IN_PIECES = {"gemma4": "per_layer_token_embd.weight"}  # tables that its conversion takes as they are
CONVERTER_BYTES_A_TOKEN = 2700  # of the vocabulary: 447 MiB in all with 49,152 tokens, 652 MiB with 128,257
CONVERTER_VOCABULARY_BYTES = 160 << 20  # more while the vocabulary is read, before the first tensor
QUANTIZE_BYTES = 16 << 20
LLAMA_CPP_BYTES = 100 << 20  # compute buffers; 41 MiB for SmolLM2-135M, 86 MiB for a Llama of 1 B parameters
LOGITS_BYTES = 256 << 20  # of the trained model on held-out answers, at most: line/behaviour.py
LOOKED_AT_BYTES = 1 << 30  # of a base's F16 file that is made only to look at its adapter: line/adapter.py
LIKELIEST = 256  # tokens whose probabilities are kept of a distribution: close/closing.py
CLOSING_STEPS = 60  # where a recipe names no number: line/close.py
CLOSING_ROWS_A_STEP = 8
CLOSING_PLACES = 160  # of a row, at most, that are looked at: 128 of its answer (line/behaviour.py), 32 of its prompt
# closing_ways, in numbers of float32: of the head at a place and of layers at a token, for each number that weights make of it. Live
# tensors of SmolLM2-135M, by torch's profiler: 3.0, 1.3 that a layer keeps and 2.1 within the one that is computed again.
HEAD, LAYER_KEEPS, IN_A_LAYER = 4, 2, 4
IN_AN_ADAPTED_LAYER = 2 * IN_A_LAYER  # what the adapter adds to a layer is as wide
ADAPTER_COPIES = 13  # in float32: as a vector below, AdamW's temporaries, and what is written at a check, twice
TRAINED = 7  # of a number that is trained: its value now, at the check and of the best, its gradient, AdamW's two, a copy
VOCABULARY_BYTES = 2000  # of a token, as gguf's reader holds the vocabulary
EXPERTS_A_TOKEN = 8
DEQUANTISED_AT_ONCE = {"cpu": 16 << 20, "cuda": 256 << 20}  # close/packed.py: of 1/2 and 8 Mi elements, with what lies between
CHECKPOINTS_KEPT = 3  # the best, the last, and while it is written one more: save_total_limit=2 in train/arguments.py
TRAIN, MERGE = "train", "merge"
Place = Literal["the run folder", "Ollama's models"]
RUN_FOLDER: Place = "the run folder"
OLLAMAS_MODELS: Place = "Ollama's models"
Way = Literal["dequantised", "packed", "mapped"]  # how a quantised file's weights are computed with
WAYS: dict[Way, str] = {"dequantised": "in full", "packed": "packed on the GPU", "mapped": "packed in the mapped file"}


@dataclass(frozen=True)
class Cost:
    """What a part of a step needs. Bytes on disk are counted, RAM and VRAM are estimates; 0: nothing, or not known.

    Training's memory on its own device is the plan's peak; what else it takes of RAM beside a GPU is not estimated.
    RAM holds the weights of a model that is asked, since each token reads all of them, even where they are mapped from the
    file; of files that are read once, front to back, nothing.
    """

    name: str
    peak_ram_bytes: int  # of all processes of the step
    vram_bytes: int  # on the GPU that it computes on; 0 without one
    disk_bytes: int  # written, and the most that it takes while it works
    disk_is: Place
    read_bytes: int
    kept_bytes: int = 0  # of training's disk: what stays of it for the steps after, whose own stays whole
    needed: bool = True  # False: with less RAM it is slower, or left out and said; no reason to refuse
    if_needed: bool = False  # made only of a file that loses too much: for its disk nothing is refused either


@dataclass(frozen=True)
class Sizes:
    """What the costs of the steps follow from."""

    gguf: GgufModel
    counted: Inventory
    ship: Ship
    length: int  # of the longest row, in tokens
    compute_bytes: int  # of an element of the format that the model is asked in: 2 or 4
    vram_bytes: int | None  # of the GPU that is trained on; None: the CPU
    training_bytes: int  # training's peak on its device
    ram_bytes: int | None = None  # of this machine; None: enough
    closing_bytes: int = 4  # of an element of the format that a file is closed in: 4, or of bfloat16 2

    @property
    def model_bytes(self) -> int:
        """The model in 16 bits, as it is merged."""
        return 2 * self.counted.parameters

    @property
    def cache_bytes(self) -> int:
        """Keys and values of `ship.num_ctx` tokens, in 16 bits."""
        return 2 * self.ship.num_ctx * cache_elements(self.gguf)

    def file_bytes(self, quantization: str) -> int:
        """A GGUF file of this type, header and all."""
        return gguf_bytes(self.gguf, quantization, imatrix=self.ship.imatrix) + HEADER_BYTES_A_TOKEN * self.gguf.vocab_size


def of_training(sizes: Sizes) -> tuple[Cost, ...]:
    on_cuda = sizes.vram_bytes is not None
    ram, vram = (0, sizes.training_bytes) if on_cuda else (sizes.training_bytes, 0)
    disk = CHECKPOINTS_KEPT * checkpoint_bytes(sizes.counted)
    kept = sizes.model_bytes if sizes.counted.method == "full" else adapter_file_bytes(sizes.counted)
    return (Cost(TRAIN, ram, vram, disk, RUN_FOLDER, sizes.model_bytes, kept),)


def of_asking(sizes: Sizes) -> tuple[Cost, ...]:
    """Asked is what was trained, where it was trained: with QLoRA the base in 4 bits."""
    counted, on_cuda = sizes.counted, sizes.vram_bytes is not None
    full = counted.method == "full"
    weights = sizes.compute_bytes * counted.parameters if full else counted.weights_bytes + counted.adapter_bytes
    asking = asking_bytes(sizes.gguf, weights, sizes.length + sizes.ship.max_new_tokens, sizes.compute_bytes, sizes.vram_bytes)
    # before and after; an adapter's base is loaded once, asked without and with the adapter
    read = 2 * sizes.model_bytes if full else sizes.model_bytes + adapter_file_bytes(counted)
    ram = FTKIT_BYTES + (0 if on_cuda else asking)
    return (Cost("ask", ram, asking if on_cuda else 0, LOGITS_BYTES, RUN_FOLDER, read, needed=False),)


def of_transferring(sizes: Sizes) -> tuple[Cost, ...]:
    """The source's weights in the format that is computed in, the adapter as often as learning and keeping it needs, and of a row what
    is computed of it, each layer twice. Of SmolLM2-135M on a CPU, rows of 182 tokens, ten steps, 101 % of this was measured."""
    if not sizes.ship.transfer_steps or sizes.counted.method != "qlora" or not _has_layers(sizes.gguf):
        return ()
    on_cuda, adapter = sizes.vram_bytes is not None, adapter_file_bytes(sizes.counted)
    each = sizes.closing_bytes if on_cuda else 4  # as it was measured
    row = _row(sizes.gguf.tensors, sizes.length, each)
    learning = each * sizes.counted.parameters + row.head + row.went_in + IN_AN_ADAPTED_LAYER * max(row.layers)
    begins = each * sizes.counted.parameters + (_rounding_bytes(sizes.gguf) if sizes.ship.rounding_kept else 0)
    peak, told = max(begins, learning + ADAPTER_COPIES * adapter), readings_bytes(CLOSING_ROWS_A_STEP * sizes.ship.transfer_steps)
    ram, vram = TRAINING_BYTES + told + (0 if on_cuda else peak), CONTEXT_BYTES + peak if on_cuda else 0
    return (Cost("fit to the source", ram, vram, 5 * adapter + told, RUN_FOLDER, 2 * (sizes.model_bytes + adapter), needed=False),)


def of_merging(sizes: Sizes) -> tuple[Cost, ...]:
    """Where a merge into the source loses too much, merge and conversion are made twice, one after the other."""
    if sizes.counted.method == "full":
        return (Cost("copy the trained model", FTKIT_BYTES, 0, sizes.model_bytes, RUN_FOLDER, sizes.model_bytes),)
    ram, read = FTKIT_BYTES + merge_bytes(sizes.gguf, sizes.counted), sizes.model_bytes + adapter_file_bytes(sizes.counted)
    return (Cost(MERGE, ram, 0, sizes.model_bytes, RUN_FOLDER, read),)


def of_converting(sizes: Sizes, *quantizations: str) -> tuple[Cost, ...]:
    """By the converter, from the merged model."""
    return tuple(
        Cost(f"convert to {kind}", converter_bytes(sizes.gguf, kind), 0, sizes.file_bytes(kind), RUN_FOLDER, sizes.model_bytes)
        for kind in quantizations
    )


def of_asking_merged(sizes: Sizes) -> tuple[Cost, ...]:
    """Through llama.cpp, which maps the file."""
    file = sizes.file_bytes("F16")
    return (Cost("ask the merged model", FTKIT_BYTES + LLAMA_CPP_BYTES + file + sizes.cache_bytes, 0, 0, RUN_FOLDER, file, needed=False),)


def of_imatrix(sizes: Sizes) -> tuple[Cost, ...]:
    """The F16 file, mapped, on the CPU or on what the user's llama.cpp was made for."""
    if not sizes.ship.imatrix or sizes.ship.quantization in CONVERTED:
        return ()
    file = sizes.file_bytes("F16")
    return (Cost("measure what matters", LLAMA_CPP_BYTES + file, 0, 0, RUN_FOLDER, file),)


def of_quantising(sizes: Sizes) -> tuple[Cost, ...]:
    """The type that ships, where it is not among those that are always made."""
    wanted = sizes.ship.quantization
    if wanted in CONVERTED:
        return of_converting(sizes, wanted)
    ram, disk = quantize_bytes(sizes.gguf, wanted), sizes.file_bytes(wanted)
    return (Cost(f"quantise to {wanted}", ram, 0, disk, RUN_FOLDER, sizes.file_bytes("F16")),)


def of_bits(sizes: Sizes) -> tuple[Cost, ...]:
    """Two files to compare with, and the one that ships; in memory the weights of one, as many slopes, and a row's activations."""
    wanted = sizes.ship.quantization
    if not sizes.ship.bits_by_task or wanted in CONVERTED:
        return ()
    on_cuda, file = sizes.vram_bytes is not None, sizes.file_bytes(wanted)
    types, shapes = tensor_types(sizes.gguf, wanted, imatrix=sizes.ship.imatrix), sizes.gguf.tensors
    plain = {name: Tensor(kind, tensor_bytes(shapes[name], kind), shapes[name][-1]) for name, kind in types.items()}
    finer = sum(tensor_bytes(shapes[name], kind) for name, kind in {**types, **finer_types(plain)}.items())
    peak = sizes.training_bytes - sizes.counted.weights_bytes + 2 * sizes.compute_bytes * sizes.counted.parameters
    ram, vram, disk = FTKIT_BYTES + (0 if on_cuda else peak), peak if on_cuda else 0, finer + round((1 + MORE_BYTES) * file)
    read = 3 * sizes.file_bytes("F16") + 4 * file + finer
    return (Cost(f"more bits for {wanted}", ram, vram, disk, RUN_FOLDER, read, needed=False),)


def of_closing(sizes: Sizes) -> tuple[Cost, ...]:
    """By the first way that the memory of this machine has room for; where it has room for none, by the last, which then is refused.

    Without a number of steps it is made where the file loses too much, and not refused. Of a model whose layers have no names known here
    it is not known what that takes: the file says it.
    """
    wanted = sizes.ship.closing_steps
    steps = CLOSING_STEPS if wanted is None else wanted
    if not steps or not _has_layers(sizes.gguf):
        return ()
    kind, file = sizes.ship.quantization, sizes.file_bytes(sizes.ship.quantization)
    ways = closing_ways(
        sizes.gguf.tensors,
        tensor_types(sizes.gguf, kind),
        length=sizes.length,
        rows=CLOSING_ROWS_A_STEP * steps,
        compute_bytes=sizes.closing_bytes,
        on_cuda=sizes.vram_bytes is not None,
    )
    fits = fitting(ways, sizes.ram_bytes, sizes.vram_bytes)
    if wanted is None and not fits:
        return ()
    way = fits or ways[-1]
    name, disk, read = f"close {kind}", file + readings_bytes(CLOSING_ROWS_A_STEP * steps), sizes.model_bytes + 4 * file
    name += ", if it loses too much" if wanted is None else "" if way is ways[0] else f", its weights {WAYS[way.name]}"
    pages = file if way.name == "mapped" else 0  # each row reads them all
    ram = way.ram_bytes + (pages if fits else 0)
    return (Cost(name, ram, way.device_bytes, disk, RUN_FOLDER, read, needed=not fits, if_needed=wanted is None),)


@dataclass(frozen=True)
class ClosingWay:
    """How a file's weights are computed with while it is closed, and what that takes.

    RAM without pages mapped from the file, which the system can drop: with less it is slower.
    """

    name: Way
    device_bytes: int  # on the GPU; 0 without one
    ram_bytes: int


def closing_ways(
    tensors: Mapping[str, tuple[int, ...]], types: Mapping[str, str], *, length: int, rows: int, compute_bytes: int, on_cuda: bool
) -> tuple[ClosingWay, ...]:
    """Each way of a file, the fastest first: its tensors' shapes and types; the longest row, in tokens; how many are learnt from.

    One row at a time is computed: of the head, at the places that are looked at, the vocabulary; of layers, what goes through their
    weights, of all where these are in full, else of one, and of each other what went in. With SmolLM2-135M on a CPU, rows of 128 and
    512 tokens, 80 to 90 % of this was measured (benchmarks/closing.py).
    """
    elements = {name: math.prod(shape) for name, shape in tensors.items()}
    vocabulary, row = tensors["token_embd.weight"][0], _row(tensors, length, compute_bytes)
    vectors = sum(size for name, size in elements.items() if len(tensors[name]) == 1)
    trained = 4 * TRAINED * (vectors + sum(shape[0] for name, shape in tensors.items() if has_scales(name, shape, types[name])))
    # experts, which transformers joins as it loads them
    joined = 2 * sum(size for name, size in elements.items() if len(tensors[name]) > 2)
    ram = FTKIT_BYTES + LLAMA_CPP_BYTES + VOCABULARY_BYTES * vocabulary + readings_bytes(rows) + joined
    in_turn = row.head + trained + DEQUANTISED_AT_ONCE["cuda" if on_cuda else "cpu"] + row.went_in + IN_A_LAYER * max(row.layers)
    whole = row.head + trained + compute_bytes * sum(elements.values()) + LAYER_KEEPS * sum(row.layers)
    if not on_cuda:
        return ClosingWay("dequantised", 0, ram + whole), ClosingWay("mapped", 0, ram + in_turn)
    on_device = {
        name: tensor_bytes(shape, types[name])
        for name, shape in tensors.items()
        if name not in EMBEDDINGS or (name == EMBEDDINGS[0] and "output.weight" not in tensors)
    }
    return (
        ClosingWay("dequantised", CONTEXT_BYTES + whole, ram),
        ClosingWay("packed", CONTEXT_BYTES + in_turn + sum(on_device.values()), ram),
        ClosingWay("mapped", CONTEXT_BYTES + in_turn, ram),
    )


@dataclass(frozen=True)
class _Row:
    """Bytes of what is computed of a row: of the head at the places that are looked at, of each layer, and what goes into all layers."""

    head: int
    layers: list[int]
    went_in: int


def _row(tensors: Mapping[str, tuple[int, ...]], length: int, compute_bytes: int) -> _Row:
    vocabulary, hidden = tensors["token_embd.weight"][0], tensors["token_embd.weight"][-1]
    widths: dict[str, int] = {}
    for name, shape in tensors.items():
        if (found := re.match(r"blk\.\d+\.", name)) and len(shape) > 1:
            experts = min(EXPERTS_A_TOKEN, shape[0]) if len(shape) > 2 else 1
            widths[found[0]] = widths.get(found[0], 0) + experts * shape[-2]
    return _Row(
        head=4 * HEAD * min(length, CLOSING_PLACES) * vocabulary,
        layers=[4 * length * (width + 2 * hidden) for width in widths.values()],
        went_in=len(widths) * compute_bytes * length * hidden,
    )


def _has_layers(model: GgufModel) -> bool:
    """Whether what `_row` asks for has names as in the file."""
    layers = any(name.startswith("blk.") and len(shape) > 1 for name, shape in model.tensors.items())
    return layers and "token_embd.weight" in model.tensors


def fitting(ways: Sequence[ClosingWay], ram_bytes: int | None, vram_bytes: int | None) -> ClosingWay | None:
    """The first that there is room for; what is not known is large enough."""
    return next(
        (way for way in ways if way.ram_bytes <= (ram_bytes or math.inf) and way.device_bytes <= (vram_bytes or math.inf)),
        None,
    )


def readings_bytes(rows: int) -> int:
    """What the models said at the places of so many rows: a number and a token for each of the likeliest."""
    return 8 * LIKELIEST * CLOSING_PLACES * rows


def of_proving(sizes: Sizes) -> tuple[Cost, ...]:
    wanted = sizes.ship.quantization
    file = sizes.file_bytes(wanted)
    return (Cost(f"prove {wanted}", FTKIT_BYTES + LLAMA_CPP_BYTES + file + sizes.cache_bytes, 0, 0, RUN_FOLDER, file, needed=False),)


def of_adapting(sizes: Sizes) -> tuple[Cost, ...]:
    """The adapter, scaled here and converted by the script, in float32 both times; and the base in F16, where that is made to look at.

    Of the conversion 880 MiB were measured for SmolLM2-135M and an adapter of 19 MiB, 100 % of this. A larger base's own file,
    which is looked at where the model is one, is not counted: proving needs as much.
    """
    if not sizes.ship.adapter or sizes.counted.method == "full":
        return ()
    adapter, file = adapter_file_bytes(sizes.counted), sizes.file_bytes("F16")
    looked_at = file if file <= LOOKED_AT_BYTES else 0
    ram = CONVERTER_BYTES + 3 * adapter
    if looked_at:
        ram = max(ram, converter_bytes(sizes.gguf, "F16"), LLAMA_CPP_BYTES + file)
    read = 2 * adapter + (sizes.model_bytes + file if looked_at else 0)
    return (Cost("adapter as GGUF", FTKIT_BYTES + ram, 0, 2 * adapter + looked_at, RUN_FOLDER, read, needed=False),)


def of_registering(sizes: Sizes) -> tuple[Cost, ...]:
    """The file is read for its hash and for the upload; the server keeps a copy of its own, and answers with it."""
    file = sizes.file_bytes(sizes.ship.quantization)
    return (Cost("register in Ollama", LLAMA_CPP_BYTES + file + sizes.cache_bytes, 0, file, OLLAMAS_MODELS, 2 * file, needed=False),)


def disk_by_place(costs: Sequence[Cost], *, trained: bool = False) -> dict[Place, int]:
    """The most that is kept in each place; the checkpoints are gone when the steps after training begin.

    `trained`: what those steps alone need.
    """
    sizes = dict.fromkeys((RUN_FOLDER, OLLAMAS_MODELS), 0)
    checkpoints = 0
    for cost in costs:
        if cost.name == TRAIN:
            checkpoints = cost.disk_bytes
            sizes[RUN_FOLDER] += 0 if trained else cost.kept_bytes
        else:
            sizes[cost.disk_is] += cost.disk_bytes
    if not trained:
        sizes[RUN_FOLDER] = max(sizes[RUN_FOLDER], checkpoints)
    return sizes


def checkpoint_bytes(counted: Inventory) -> int:
    """A checkpoint of the trainer: what is trained, in float32, and the optimizer's states.

    Left out: the tokenizer, names and shapes, a few kilobytes a hundred tensors.
    """
    return 4 * counted.written_parameters + counted.optimizer_bytes


def adapter_file_bytes(counted: Inventory) -> int:
    """The adapter as PEFT writes it: what is trained, in float32. Its header, about 150 bytes a tensor, is left out."""
    return 0 if counted.method == "full" else 4 * counted.written_parameters


def asking_bytes(model: GgufModel, weights_bytes: int, length: int, compute_bytes: int, room_bytes: int | None = None) -> int:
    """What transformers holds while it answers a batch of rows of `length` tokens (engines/hf.py, answer).

    The weights; the cache; and of one layer that reads the whole prompt 4 × the intermediate and 6 × the hidden width. With
    the process this is 85 to 102 % of what was measured on a CPU for 135 M and 1 B parameters in 16 bits. The batch is halved
    until it fits into `room_bytes`, as it does where memory runs out.
    """
    hidden = model.hidden_size
    intermediate = max((size[-2] for name, size in model.tensors.items() if "ffn_up" in name and len(size) > 1), default=4 * hidden)
    row = compute_bytes * length * (cache_elements(model) + 4 * intermediate + 6 * hidden)
    batch = asked_together(length)
    while room_bytes is not None and batch > 1 and weights_bytes + batch * row > room_bytes:
        batch //= 2
    return weights_bytes + batch * row


def merge_bytes(model: GgufModel, counted: Inventory) -> int:
    """What merge/stream.py holds at most.

    The adapter, and some rows: as they are read and written in 16 bits, what is added to them and their sum in float32. Onto the
    dequantised base, which only QLoRA may need, a whole weight, rounded. Measured at Llama-3.1-8B's shapes, above what the process
    held when it began: 55 MiB of rows, and 1.04 GiB for a weight of 58.7 M elements.
    """
    columns = max(shape[-1] for shape in _layers(model).values())
    rows = 2 * max(256, (1 << 20) // columns)  # the last may be nearly twice as many
    return adapter_file_bytes(counted) + (2 + 4 + 4 + 2) * rows * columns + (_rounding_bytes(model) if counted.method == "qlora" else 0)


def _layers(model: GgufModel) -> dict[str, tuple[int, ...]]:
    """The weights that are no embedding and no head."""
    return {name: shape for name, shape in model.tensors.items() if len(shape) > 1 and name not in (*EMBEDDINGS, "output.weight")}


def _rounding_bytes(model: GgufModel) -> int:
    """What the largest weight takes while bitsandbytes rounds it to 4 bits on a CPU, and back: 18 bytes an element.

    A layer's experts are one weight there, the gate and the up of each together.
    """
    return 18 * max(math.prod(shape) * (2 if len(shape) == 3 and "gate" in name else 1) for name, shape in _layers(model).items())


def converter_bytes(model: GgufModel, kind: str) -> int:
    """What the converter holds at most: it works lazily, tensor by tensor (gguf/lazy.py).

    A tensor is held in float32: twice while heads are permuted (conversion/llama.py) or experts stacked, else beside what is
    written of it, which is there twice where numpy quantises (BF16, Q8_0), in groups of rows (gguf/quants.py). Measured for
    135 M and 1 B parameters and two vocabularies: 93 to 102 % of this. Of what it writes in pieces (gguf/script.py), and is known to
    take as it is, one piece.
    """
    written = 1 if kind == "F16" else 2
    in_pieces = IN_PIECES.get(model.architecture)
    held = max(
        max(
            8 * math.prod(shape) if len(shape) == 3 or re.search(r"attn_[qk]\.weight", name) else 0,
            4 * math.prod(shape) + written * tensor_bytes(shape, converted_type(name, shape, kind)),
        )
        for name, shape in model.tensors.items()
        if name != in_pieces or math.prod(shape) < LARGE_ELEMENTS
    )
    return CONVERTER_BYTES + CONVERTER_BYTES_A_TOKEN * model.vocab_size + max(CONVERTER_VOCABULARY_BYTES, held)


def quantize_bytes(model: GgufModel, quantization: str) -> int:
    """What llama-quantize holds at most: one tensor in float32, and one result (src/llama-quant.cpp, llama_model_quantize_impl).

    Both buffers only grow, so the two need not be of one tensor. Measured for 135 M and 1 B parameters: within 1 %. A build that
    takes `--max-buffer-size` holds no more than that of both; an earlier one does not, which is not in this.
    """
    types = tensor_types(model, quantization)
    changed = [name for name, kind in types.items() if kind not in ("F16", "F32")]
    largest = max((math.prod(model.tensors[name]) for name in changed), default=0)
    result = max((tensor_bytes(model.tensors[name], types[name]) for name in changed), default=0)
    return QUANTIZE_BYTES + min(4 * largest + result, QUANTIZE_BUFFER_BYTES)

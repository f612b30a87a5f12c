"""What a step of the line needs: RAM, VRAM, disk, bytes read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ftkit.data.lengths import asked_together
from ftkit.gguf.types import (
    CONVERTED,
    EMBEDDINGS,
    HEADER_BYTES_A_TOKEN,
    GgufModel,
    cache_elements,
    converted_type,
    gguf_bytes,
    tensor_bytes,
    tensor_types,
)
from ftkit.memory.model import Inventory
from ftkit.recipe import Recipe

# Of a process before it touches a weight: anonymous memory (RssAnon) measured on Linux with torch 2.13 (CPU), transformers
# 5.23 and llama.cpp b11434. Pages mapped from files are not in it: the system can drop them at any time.
FTKIT_BYTES = 500 << 20  # torch, transformers, peft and bitsandbytes imported, a tokenizer loaded: 494 MiB
CONVERTER_BYTES = 320 << 20
CONVERTER_BYTES_A_TOKEN = 2700  # of the vocabulary: 447 MiB in all with 49,152 tokens, 652 MiB with 128,257
CONVERTER_VOCABULARY_BYTES = 160 << 20  # more while the vocabulary is read, before the first tensor
QUANTIZE_BYTES = 16 << 20
LLAMA_CPP_BYTES = 100 << 20  # compute buffers; 41 MiB for SmolLM2-135M, 86 MiB for a Llama of 1 B parameters
CHECKPOINTS_KEPT = 3  # the best, the last, and while it is written one more: save_total_limit=2 in ftkit.train
TRAIN, ASK, ASK_MERGED = "train", "ask", "ask the merged model"
Place = Literal["the run folder", "Ollama's models"]
RUN_FOLDER: Place = "the run folder"
OLLAMAS_MODELS: Place = "Ollama's models"


@dataclass(frozen=True)
class LaterStep:
    """What a step after planning needs. Bytes on disk are counted, RAM and VRAM are estimates; 0: nothing, or not known.

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
    needed: bool = True  # False: with less RAM it is slower, or left out and said; no reason to refuse


def training_step(counted: Inventory, peak_bytes: int, *, on_cuda: bool) -> LaterStep:
    """Training, which peaks at `peak_bytes` on its device."""
    ram, vram = (0, peak_bytes) if on_cuda else (peak_bytes, 0)
    return LaterStep(TRAIN, ram, vram, CHECKPOINTS_KEPT * checkpoint_bytes(counted), RUN_FOLDER, 2 * counted.parameters)


def checkpoint_bytes(counted: Inventory) -> int:
    """A checkpoint of the trainer: what is trained, in float32, and the optimizer's states.

    Left out: the tokenizer, names and shapes, a few kilobytes a hundred tensors.
    """
    return 4 * counted.trainable_parameters + counted.optimizer_bytes


def later_steps(
    model: GgufModel, counted: Inventory, recipe: Recipe, length: int, *, compute_bytes: int, vram_bytes: int | None
) -> tuple[LaterStep, ...]:
    """What asking, merging, converting, quantising, proving and registering need, in the order of `ship`.

    `length` is that of the longest row in tokens, `compute_bytes` the size of an element of the format that the model is
    asked in (2 or 4), `vram_bytes` what the GPU has that it was trained on (None: the CPU). Asked is what was trained, where
    it was trained: with QLoRA the base in 4 bits. The merged model and the file that ships are asked through llama.cpp. Where
    a merge into the source loses too much, merge and conversion are made twice, one after the other.
    """
    ship, wanted = recipe.ship, recipe.ship.quantization
    checkpoint = 2 * counted.parameters  # in 16 bits
    adapter = adapter_file_bytes(counted)
    header = HEADER_BYTES_A_TOKEN * model.vocab_size
    files = {kind: gguf_bytes(model, kind) + header for kind in dict.fromkeys(("F16", "Q8_0", wanted))}
    cache = 2 * ship.num_ctx * cache_elements(model)  # in 16 bits
    answering = files[wanted] + cache
    weights = compute_bytes * counted.parameters if counted.method == "full" else counted.weights_bytes + counted.adapter_bytes
    asking = asking_bytes(model, weights, length + ship.max_new_tokens, compute_bytes, vram_bytes)
    on_cuda = vram_bytes is not None

    def step(name: str, ram: int, disk: int, read: int, *, vram: int = 0, place: Place = RUN_FOLDER, needed: bool = True) -> LaterStep:
        return LaterStep(name, ram, vram, disk, place, read, needed)

    if counted.method == "full":
        asked = 2 * checkpoint  # before and after
        merge = step("copy the trained model", FTKIT_BYTES, checkpoint, checkpoint)
    else:
        asked = checkpoint + adapter  # loaded once, asked without and with the adapter
        merge = step("merge", FTKIT_BYTES + merge_bytes(model, counted), checkpoint, checkpoint + adapter)
    return (
        step(ASK, FTKIT_BYTES + (0 if on_cuda else asking), 0, asked, vram=asking if on_cuda else 0, needed=False),
        merge,
        *(
            step(f"convert to {kind}", converter_bytes(model, kind), size, checkpoint)
            for kind, size in files.items()
            if kind in ("F16", "Q8_0")
        ),
        step(ASK_MERGED, FTKIT_BYTES + LLAMA_CPP_BYTES + files["F16"] + cache, 0, files["F16"], needed=False),
        *(
            step(f"convert to {kind}", converter_bytes(model, kind), size, checkpoint)
            if kind in CONVERTED
            else step(f"quantise to {kind}", quantize_bytes(model, kind), size, files["F16"])
            for kind, size in files.items()
            if kind not in ("F16", "Q8_0")
        ),
        step(f"prove {wanted}", FTKIT_BYTES + LLAMA_CPP_BYTES + answering, 0, files[wanted], needed=False),
        # read for its hash and for the upload; the server keeps a copy of its own, and answers with it
        step("register in Ollama", LLAMA_CPP_BYTES + answering, files[wanted], 2 * files[wanted], place=OLLAMAS_MODELS, needed=False),
    )


def adapter_file_bytes(counted: Inventory) -> int:
    """The adapter as PEFT writes it: what is trained, in float32. Its header, about 150 bytes a tensor, is left out."""
    return 0 if counted.method == "full" else 4 * counted.trainable_parameters


def asking_bytes(model: GgufModel, weights_bytes: int, length: int, compute_bytes: int, room_bytes: int | None = None) -> int:
    """What transformers holds while it answers a batch of rows of `length` tokens (hf.answer).

    The weights; the cache; and of one layer that reads the whole prompt 4 × the intermediate and 6 × the hidden width. With
    the process this is 85 to 102 % of what was measured on a CPU for 135 M and 1 B parameters in 16 bits. The batch is halved
    until it fits into `room_bytes`, as hf.answer does where memory runs out.
    """
    hidden = model.hidden_size
    intermediate = max((size[-2] for name, size in model.tensors.items() if "ffn_up" in name and len(size) > 1), default=4 * hidden)
    row = compute_bytes * length * (cache_elements(model) + 4 * intermediate + 6 * hidden)
    batch = asked_together(length)
    while room_bytes is not None and batch > 1 and weights_bytes + batch * row > room_bytes:
        batch //= 2
    return weights_bytes + batch * row


def merge_bytes(model: GgufModel, counted: Inventory) -> int:
    """What ftkit.merge holds at most, beside what is mapped from the source.

    The adapter; and for the largest weight W of a layer W, B·A and their sum, in float32, and the sum in 16 bits. Measured
    for 1 B parameters: 0.74 to 0.88 GB with the process.
    """
    layers = [math.prod(shape) for name, shape in model.tensors.items() if len(shape) > 1 and name not in (*EMBEDDINGS, "output.weight")]
    return adapter_file_bytes(counted) + (3 * 4 + 2) * max(layers)


def converter_bytes(model: GgufModel, kind: str) -> int:
    """What the converter holds at most: it works lazily, tensor by tensor (gguf/lazy.py).

    A tensor is held in float32: twice while heads are permuted (conversion/llama.py) or experts stacked, else beside what is
    written of it, which is there twice where numpy quantises (BF16, Q8_0), in groups of rows (gguf/quants.py). Measured for
    135 M and 1 B parameters and two vocabularies: 93 to 102 % of this.
    """
    written = 1 if kind == "F16" else 2
    held = max(
        max(
            8 * math.prod(shape) if len(shape) == 3 or re.search(r"attn_[qk]\.weight", name) else 0,
            4 * math.prod(shape) + written * tensor_bytes(shape, converted_type(name, shape, kind)),
        )
        for name, shape in model.tensors.items()
    )
    return CONVERTER_BYTES + CONVERTER_BYTES_A_TOKEN * model.vocab_size + max(CONVERTER_VOCABULARY_BYTES, held)


def quantize_bytes(model: GgufModel, quantization: str) -> int:
    """What llama-quantize holds at most: one tensor in float32, and one result (src/llama-quant.cpp, llama_model_quantize_impl).

    Both buffers only grow, so the two need not be of one tensor. Measured for 135 M and 1 B parameters: within 1 %.
    """
    types = tensor_types(model, quantization)
    changed = [name for name, kind in types.items() if kind not in ("F16", "F32")]
    largest = max((math.prod(model.tensors[name]) for name in changed), default=0)
    return QUANTIZE_BYTES + 4 * largest + max((tensor_bytes(model.tensors[name], types[name]) for name in changed), default=0)

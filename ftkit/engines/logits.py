"""What a model would say at each token of a given answer, over its whole vocabulary: of a GGUF in llama.cpp, of a model in transformers.

llama.cpp computes it in this process: its server names the likeliest tokens alone, and its programs need not be here. xllamacpp's
library has llama.cpp's C functions; of its structs, which grow at their ends, only the beginnings are touched, unchanged for years.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.errors import ModelError, ToolFailedError, ToolMissingError
from ftkit.machine.device import computing_threads
from ftkit.model.adapter import as_trained

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

STRUCT_BYTES = 1024  # more than any of llama.cpp's parameter structs: a caller may give them more room than they take
TRIED = "2026.10.11549"


@dataclass(frozen=True)
class Forced:
    """An answer that is given: token ids, and which of them are looked at, by their place. Place 0 has nothing before it."""

    ids: list[int]
    places: list[int]


class _Params(ctypes.Structure):
    """llama_context_params, or llama_model_params, which is taken as it is."""

    _fields_ = (("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("others", ctypes.c_byte * (STRUCT_BYTES - 8)))


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_QUIET = _Log(lambda *_: None)


@cache
def _library() -> Any:
    """llama.cpp's C functions. Raises ToolMissingError without xllamacpp."""
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        raise ToolMissingError("xllamacpp (llama.cpp in process) is not installed.", "pip install xllamacpp") from None
    library = ctypes.CDLL(xllamacpp.__file__)
    given = {
        "llama_model_default_params": (_Params, ()),
        "llama_context_default_params": (_Params, ()),
        "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _Params)),
        "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _Params)),
        "llama_adapter_lora_init": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)),
        "llama_set_adapters_lora": (
            ctypes.c_int32,
            (ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)),
        ),
        "llama_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
        "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
        "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
        "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, _Batch)),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
        "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
        "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
        "llama_n_ctx": (ctypes.c_uint32, (ctypes.c_void_p,)),
        "llama_n_batch": (ctypes.c_uint32, (ctypes.c_void_p,)),
        "llama_free": (None, (ctypes.c_void_p,)),
        "llama_model_free": (None, (ctypes.c_void_p,)),
        "llama_log_set": (None, (_Log, ctypes.c_void_p)),
    }
    for name, (result, arguments) in given.items():
        if not hasattr(library, name):
            raise _other_version(f"has no {name}")
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_QUIET, None)
    return library


def _other_version(what: str) -> ToolFailedError:
    return ToolFailedError(
        f"llama.cpp in xllamacpp {version('xllamacpp')} {what}, which ftkit reads logits with.", f"pip install 'xllamacpp=={TRIED}'"
    )


def of_file(path: Path, rows: Sequence[Forced], adapter: Path | None = None) -> Iterator[np.ndarray[Any, Any]]:
    """Of each row in turn, (places, vocabulary) in float32, as llama.cpp computes it from a GGUF, with a GGUF LoRA or without.

    Raises ToolMissingError without xllamacpp, ToolFailedError where llama.cpp takes the file or a row not, ModelError where it does
    not take the adapter with this file.
    """
    import numpy as np

    library, longest = _library(), max((len(row.ids) for row in rows), default=1)
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise ToolFailedError(f"llama.cpp cannot load {path.name}.")
    try:
        loaded = library.llama_adapter_lora_init(model, str(adapter).encode()) if adapter else None  # before a context; the model frees it
        if adapter and not loaded:
            raise ModelError(f"llama.cpp does not take {adapter.name} with {path.name}: it is of another model, or not whole.")
        settings = library.llama_context_default_params()
        size = -(-longest // 256) * 256
        settings.n_ctx = settings.n_batch = size
        context = library.llama_init_from_model(model, settings)
        if not context:
            raise ToolFailedError(f"llama.cpp has no room for {longest} tokens of {path.name}.")
        try:
            if (library.llama_n_ctx(context), library.llama_n_batch(context)) != (size, size):
                raise _other_version("takes other settings")
            if loaded and library.llama_set_adapters_lora(context, (ctypes.c_void_p * 1)(loaded), 1, (ctypes.c_float * 1)(1)):
                raise ToolFailedError(f"llama.cpp cannot compute with {adapter} on {path.name}.")
            library.llama_set_n_threads(context, computing_threads(), computing_threads())
            vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
            for row in rows:
                library.llama_memory_clear(library.llama_get_memory(context), True)
                count = len(row.ids)
                asked = (ctypes.c_int8 * count)(*[0] * count)
                for place in row.places:
                    asked[place - 1] = 1
                if library.llama_decode(context, _Batch(count, (ctypes.c_int32 * count)(*row.ids), logits=asked)):
                    raise ToolFailedError(f"llama.cpp cannot compute {count} tokens with {path.name}.")
                yield np.ctypeslib.as_array(library.llama_get_logits(context), (len(row.places), vocabulary)).copy()
        finally:
            library.llama_free(context)
    finally:
        library.llama_model_free(model)


def of_model(model: PreTrainedModel, rows: Sequence[Forced]) -> Iterator[np.ndarray[Any, Any]]:
    """Of each row in turn, (places, vocabulary) in float32, as transformers computes it. One row at a time: nothing is padded."""
    import torch

    model.eval()
    patches.require("reading answers")
    spares = model._supports_logits_to_keep()  # some models that bring their own code compute them all
    for row in rows:
        ids = torch.tensor([row.ids], device=model.device)
        before = torch.tensor(row.places, dtype=torch.long, device=model.device) - 1
        with patches.applied("running adapters"), as_trained(model), torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False, **({"logits_to_keep": before} if spares else {})).logits[0]
        yield (logits if spares else logits[before]).float().cpu().numpy()

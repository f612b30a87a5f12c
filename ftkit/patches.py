"""Names inside other libraries that ftkit replaces, or uses as they are: two tables. One that is gone is an error, never another path."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from ftkit.beside import triton_works
from ftkit.errors import ToolFailedError

When = Literal[
    "tracing", "tracing for CUDA", "tracing DoRA", "training", "loading in 4 bits", "reading 4-bit weights",
    "loading tables", "running adapters", "merging", "asking Ollama", "reading GGUF files",
    "reading answers", "training preferences", "dequantising", "choosing a GPU",
]  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """What the replacements of a trace depend on."""

    attention: Callable[..., Any] | None  # in place of scaled_dot_product_attention; None on a CPU
    padded: bool  # whether a batch's rows differ in length, so that a mask is built
    packed: bool = False  # whether rows are end to end in one, so that a mask is built
    triton: bool = True  # whether the loss head has kernels of its own
    grouped: bool = True  # whether the card has a kernel of attention for heads that share keys and values


@dataclass(frozen=True)
class Patch:
    """One name that is replaced, and put back afterwards."""

    when: When
    module: str
    name: str  # in the module; of a class's, after the class and a dot
    replacement: Callable[[Any], Any]  # from what it depends on (Traced, or None) to the object that takes the name's place
    why: str
    package: str  # the distribution, and the version of it that this was tried with
    tried: str


@dataclass(frozen=True)
class Inside:
    """One name inside another library that is no promise of its, and that ftkit calls, overrides or goes by."""

    when: When
    module: str
    name: str
    why: str
    package: str
    tried: str


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a kernel that has no memory of its own."""


def _row_of_each(position_ids: Any) -> Any:
    """`find_packed_sequence_indices` of rows end to end."""
    import torch

    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    import torch

    return torch.ops.aten.native_dropout(input, p, True)[0] if training and p > 0 else input


def _is_bfloat16(input: Any, weight: Any, offs: Any) -> bool:
    import torch

    return bool(weight.dtype == torch.bfloat16)


def _dequantised(module: Any) -> Any:
    """A layer's weight in full, as PEFT asks for it; of a 4-bit layer that has no data yet, its shape."""
    import torch
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit):
        return module.weight
    state = inside("reading 4-bit weights", module.weight, "quant_state")
    if state is None:
        return torch.empty(module.out_features, module.in_features, dtype=module.compute_dtype, device="meta")
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, state)


def _forward_4bit(layer: Any, x: Any) -> Any:
    """`Linear4bit.forward` without its look at Params4bit."""
    import bitsandbytes

    given = x.dtype
    if layer.compute_dtype is not None:
        x = x.to(layer.compute_dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return bitsandbytes.matmul_4bit(x, layer.weight, bias=bias, quant_state=layer.quant_state).to(given)


def _packed(wrapper: Any) -> Any:
    """Of a parameter that PEFT adapts, the scales of its 4 bits; None where it is in full."""
    kept = dict(getattr(wrapper.get_base_layer(), "parametrizations", {}))
    return next((part.quant_state for part in kept.get(wrapper.parameter_name, ()) if hasattr(part, "quant_state")), None)


def _param_unread(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`ParamWrapper.get_param`, which is asked for dtype and shape alone."""

    def get_param(wrapper: Any) -> Any:
        import torch

        state = _packed(wrapper)
        return original(wrapper) if state is None else torch.empty((), dtype=state.dtype, device=state.absmax.device).expand(state.shape)

    return get_param


def _adapters_on_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    """`ParamWrapper._activate_lora`, of parameters in 4 bits too: W + scaling × A B, put on and taken off without a look at W."""

    @contextlib.contextmanager
    def activate(wrapper: Any, active_adapters: list[str]) -> Iterator[None]:
        from peft.tuners.lora.layer import _LoraFactorsProxy
        from torch.nn.utils import parametrize

        adapters = [name for name in active_adapters if name in wrapper.lora_A]
        if not adapters or _packed(wrapper) is None:
            with original(wrapper, active_adapters):
                yield
            return
        base, name = wrapper.get_base_layer(), wrapper.parameter_name
        for adapter in adapters:
            parametrize.register_parametrization(base, name, _LoraFactorsProxy(*wrapper.get_delta_factors(adapter)), unsafe=True)
        try:
            with parametrize.cached():
                yield
        finally:
            for _ in adapters:
                del base.parametrizations[name][-1]

    return activate


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _if_it_works(uses_triton: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda device: triton_works() and uses_triton(device)


def _paged_again(load: Callable[..., None]) -> Callable[..., None]:
    """Loaded states into buffers as the optimizer itself makes them, and what it does not page to the device, as `load` has it."""

    def load_state_dict(optimizer: Any, states: Any, move_to_device: bool = True) -> None:
        paged = optimizer.is_paged and move_to_device
        load(optimizer, states, move_to_device=move_to_device and not paged)
        for parameter, state in optimizer.state.items() if paged else ():
            for name in optimizer.non_castable_tensor_keys & state.keys():
                value = state[name]
                if name in ("state1", "state2"):
                    state[name] = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                    state[name].copy_(value)
                else:
                    state[name] = value.to(parameter.device)

    return load_state_dict


class _TorchOfMasks:
    """torch, with another answer to whether a mask has no padding."""

    def __init__(self, padded: bool) -> None:
        self._padded = padded

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def all(self, _: Any) -> bool:
        return not self._padded


def _grouped_where_a_kernel_takes_it(asked: Callable[..., bool]) -> Callable[..., bool]:
    """Whether attention takes keys and values once for several heads: not on a card that has no fast kernel for that."""

    def use(mask: Any, key: Any, value: Any) -> bool:
        import torch

        if key.is_cuda:  # autocast has attention computed in its own format, whatever it is given
            computed_in = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else key.dtype
            if not takes_grouped_heads(torch.cuda.get_device_capability(key.device), half=computed_in != torch.float32):
                return False
        return asked(mask, key, value)

    return use


def _grouped_as_said(asked: Callable[..., bool], grouped: bool) -> Callable[..., bool]:
    return lambda *given: grouped and asked(*given)


def takes_grouped_heads(capability: tuple[int, int], *, half: bool) -> bool:
    """Flash and cuDNN do, from Ampere on and in 16 bits; the efficient kernel does not, and the last one writes out every score."""
    return half and capability >= (8, 0)


def _with_narrow_tables(plan_of: Callable[..., Any]) -> Callable[..., Any]:
    """The formats of parameters that are loaded in another than the model's: by patterns, as transformers has them."""
    import torch

    def plan(model: Any, dtype: Any) -> Any:
        return {**plan_of(model, dtype), "embed_tokens_per_layer.weight": torch.bfloat16}

    return plan


def _read_plainly(reader: Any, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
    """Numbers at a place of a GGUF file, without a memmap object around each."""
    import numpy as np

    found = np.frombuffer(reader.data, dtype, int(count), int(offset)) if count else np.empty(0, dtype)
    return found.view(found.dtype.newbyteorder(override_order or reader.byte_order))  # type: ignore[call-overload]


def _arrays_at_once(parts_of: Callable[..., Any]) -> Callable[..., Any]:
    """The parts of a GGUF file's arrays of numbers and of texts, each array read in one go; of all else as `parts_of` has them."""
    import struct

    import numpy as np
    from gguf import GGUFEndian, GGUFValueType

    def parts(reader: Any, begin: int, raw_type: int) -> Any:
        kind = GGUFValueType(raw_type)
        if kind != GGUFValueType.ARRAY:
            return parts_of(reader, begin, raw_type)
        order: Literal["<", ">"] = ">" if reader.endianess == GGUFEndian.BIG else "<"
        inside = GGUFValueType(int(reader._get(begin, np.uint32)[0]))
        head = [reader._get(begin, np.uint32), reader._get(begin + 4, np.uint64)]
        count, at = int(head[1][0]), begin + 12
        if inside == GGUFValueType.STRING:
            values, length_of = reader.data.view(np.ndarray), struct.Struct(order + "Q").unpack_from
            size, buffer, texts, ends = len(values), memoryview(values), list[Any](), [at]
            for _ in range(count):
                text = at + 8
                at = text + (length_of(buffer, at)[0] if text <= size else size)
                if at > size:
                    raise ValueError("a text reaches beyond the end of the file")
                texts.append(values[text:at])
                ends.append(at)
            lengths = (np.diff(np.array(ends, np.int64)) - 8).astype(np.dtype(np.uint64).newbyteorder(order))
            found = [part for both in zip(lengths[:, None], texts, strict=True) for part in both]
            return at - begin, head + found, list(range(3, 3 + 2 * count, 2)), [kind, inside][: 1 + min(count, 1)]
        if (of_numbers := reader.gguf_scalar_to_np.get(inside)) is None:
            return parts_of(reader, begin, raw_type)
        numbers = reader._get(at, of_numbers, count)
        return at + numbers.nbytes - begin, [*head, *numbers[:, None]], list(range(2, 2 + count)), [kind, inside][: 1 + min(count, 1)]

    return parts


_CUDA: When = "tracing for CUDA"
_HEAD, _LORA, _SDPA = "trl.kernels.chunked_logprob", "peft.tuners.lora.layer", "transformers.integrations.sdpa_attention"
_TORCH, _TRANSFORMERS, _TRL, _PEFT = ("torch", "2.13.0"), ("transformers", "5.23.0"), ("trl", "1.16.0"), ("peft", "0.21.2")
_BITSANDBYTES, _OLLAMA, _GGUF = ("bitsandbytes", "0.50.2"), ("ollama", "0.6.3"), ("gguf", "0.19.0")
_NO_VALUES = "asks for values that fake tensors do not have; without an answer the mask is built in full"

# Functions, not torch function modes: a mode is not active while checkpointing recomputes.
PATCHES: tuple[Patch, ...] = (
    Patch(_CUDA, "torch.nn.functional", "scaled_dot_product_attention", lambda traced: traced.attention,
          "the CPU's attention allocates other tensors than a GPU's", *_TORCH),
    Patch(_CUDA, _SDPA, "use_gqa_in_sdpa",
          lambda traced: _grouped_as_said(_of(_SDPA, "use_gqa_in_sdpa"), traced.grouped), "as while training", *_TRANSFORMERS),
    Patch(_CUDA, "torch.nn.functional", "dropout", lambda _: _dropout, "a GPU keeps the mask as bytes", *_TORCH),
    Patch("tracing", "transformers.integrations.moe", "_can_use_grouped_mm", lambda _: _is_bfloat16,
          "PyTorch's meta kernel takes bfloat16 alone; transformers' own operator allocates the same for the rest, on a CPU up to 6 % more",
          *_TRANSFORMERS),
    Patch(_CUDA, _HEAD, "TOKEN_CHUNK_SIZE", lambda _: 1 << 40, "all tokens in one tile, whose size is capped later", *_TRL),
    Patch(_CUDA, _HEAD, "_forward_tile", lambda traced: _nothing if traced.triton else _of(_HEAD, "_forward_tile"),
          "Triton's kernel has no memory of its own", *_TRL),
    Patch(_CUDA, _HEAD, "_backward_tile", lambda traced: _nothing if traced.triton else _of(_HEAD, "_backward_tile"),
          "Triton's kernel has no memory of its own", *_TRL),
    Patch(_CUDA, _HEAD, "_addmm_fp32", lambda _: _nothing, "Triton's kernel has no memory of its own", *_TRL),
    Patch("tracing", "transformers.masking_utils", "is_tracing", lambda _: lambda *a, **k: False, _NO_VALUES, *_TRANSFORMERS),
    Patch("tracing", "transformers.masking_utils", "fast_all", lambda traced: lambda mask: not traced.padded, _NO_VALUES, *_TRANSFORMERS),
    Patch("tracing", "transformers.masking_utils", "torch", lambda traced: _TorchOfMasks(traced.padded),
          "of layers with a state, `create_recurrent_attention_mask` asks for values that fake tensors do not have", *_TRANSFORMERS),
    Patch("tracing", "transformers.masking_utils", "find_packed_sequence_indices",
          lambda traced: _row_of_each if traced.packed else _nothing, _NO_VALUES, *_TRANSFORMERS),
    Patch("tracing", "bitsandbytes.nn.modules", "Linear4bit.forward", lambda _: _forward_4bit,
          "looks for Params4bit, which cannot wrap a fake tensor", *_BITSANDBYTES),
    Patch("tracing DoRA", "peft.tuners.lora.dora", "dequantize_module_weight", lambda _: _dequantised,
          "looks for Params4bit, which cannot wrap a fake tensor", *_PEFT),
    Patch("tracing DoRA", "peft.tuners.lora.dora", "deepcopy", lambda _: lambda layer: layer,
          "bitsandbytes cannot copy a weight on the meta device; nothing is changed in the copy", *_PEFT),
    Patch("training", "trl.trainer.utils", "_use_triton", lambda _: lambda device: True,
          "without Triton TRL scores every position with the whole vocabulary, labelled or not; loss and gradients are the same", *_TRL),
    Patch("training", _SDPA, "use_gqa_in_sdpa", lambda _: _grouped_where_a_kernel_takes_it(_of(_SDPA, "use_gqa_in_sdpa")),
          "cards before Ampere, and float32, have no kernel for heads that share keys: all scores would be written out", *_TRANSFORMERS),
    Patch("training", _HEAD, "_use_triton", lambda _: _if_it_works(_of(_HEAD, "_use_triton")),
          "where nothing can compile its kernels' launchers, training ended at the first step", *_TRL),
    Patch("training", "bitsandbytes.optim.optimizer", "Optimizer8bit.load_state_dict",
          lambda _: _paged_again(_of("bitsandbytes.optim.optimizer", "Optimizer8bit").load_state_dict),
          "a resumed training has the states of a paged optimizer on the GPU, all of them", *_BITSANDBYTES),
    Patch("training preferences", "trl.trainer.dpo_trainer", "hash_module", lambda _: lambda module: "",
          "it copies the whole model to RAM in float32, for the name of a file that ftkit has none of", *_TRL),
    Patch("running adapters", _LORA, "ParamWrapper.get_param", lambda _: _param_unread(_of(_LORA, "ParamWrapper").get_param),
          "a look at experts in 4 bits dequantises them", *_PEFT),
    Patch("running adapters", _LORA, "ParamWrapper._activate_lora",
          lambda _: _adapters_on_packed(_of(_LORA, "ParamWrapper")._activate_lora),
          "of two adapters on a layer's experts in 4 bits it leaves one out of the sum, and takes neither off again", *_PEFT),
    Patch("loading in 4 bits", "bitsandbytes.nn.modules", "has_avx512bf16", lambda _: lambda: False,
          "a layer is repacked at its first evaluation on such a CPU, and then computes without gradients, in training too",
          *_BITSANDBYTES),
    Patch("loading tables", "transformers.modeling_utils", "PreTrainedModel._get_dtype_plan",
          lambda _: _with_narrow_tables(_of("transformers.modeling_utils", "PreTrainedModel")._get_dtype_plan),
          "tables that are looked up alone, of Gemma 4 E4B 11 GB in float32, stay in 16 bits", *_TRANSFORMERS),
    Patch("reading GGUF files", "gguf.gguf_reader", "GGUFReader._get", lambda _: _read_plainly,
          "it makes a memmap object of every number that it reads", *_GGUF),
    Patch("reading GGUF files", "gguf.gguf_reader", "GGUFReader._get_field_parts",
          lambda _: _arrays_at_once(_of("gguf.gguf_reader", "GGUFReader")._get_field_parts),
          "it reads arrays value by value: Gemma 4's vocabulary in 43 s in place of 1, Llama 3's in 15 in place of 0.4", *_GGUF),
)  # fmt: skip


INSIDES: tuple[Inside, ...] = (
    Inside("tracing", "torch._subclasses.fake_tensor", "FakeTensorMode", "a step is traced on fake tensors", *_TORCH),
    Inside("tracing", "torch.utils._python_dispatch", "TorchDispatchMode", "it shows every allocation", *_TORCH),
    Inside("tracing", "torch", "UntypedStorage._cdata", "a storage is known by its address", *_TORCH),
    Inside("tracing", "torch", "_C._storage_Use_Count", "it tells which gradients are summed in place", *_TORCH),
    Inside("tracing", "torch.autograd.graph", "_engine_run_backward", "the engine's own sums of gradients are known by it", *_TORCH),
    Inside("tracing", "transformers", "PreTrainedConfig._attn_implementation", "the plan names it", *_TRANSFORMERS),
    *(Inside(_CUDA, "torch", f"ops.aten._scaled_dot_product_{name}", "a GPU computes attention with it", *_TORCH)
      for kernel in ("cudnn_attention", "flash_attention", "efficient_attention") for name in (kernel, f"{kernel}_backward")),
    Inside(_CUDA, "torch", "ops.aten._scaled_dot_product_attention_math", "a GPU computes attention with it", *_TORCH),
    Inside("training", "transformers.trainer_pt_utils", "LengthGroupedSampler", "rows of like length go together", *_TRANSFORMERS),
    Inside("training", "transformers.trainer", "Trainer._get_train_sampler", "else no seed fixes the order of rows", *_TRANSFORMERS),
    Inside("training", "transformers.trainer", "Trainer._load_best_model", "a finished training is taken up with it", *_TRANSFORMERS),
    Inside("training", "transformers.trainer", "Trainer._load_scaler", "else no training in float16 goes on in another format",
           *_TRANSFORMERS),
    Inside("training", "transformers.trainer", "Trainer._save_checkpoint", "where memory runs out, the last step is kept", *_TRANSFORMERS),
    Inside("choosing a GPU", "transformers", "TrainingArguments._n_gpu", "one of several trains in one process", *_TRANSFORMERS),
    Inside("training", "trl.trainer.sft_trainer", "add_fused_lm_head", "packing is checked on the log-probabilities that it gives", *_TRL),
    Inside("training preferences", "trl.trainer.dpo_trainer", "DPOTrainer._prepare_dataset", "rows are tokens already", *_TRL),
    Inside("training preferences", "trl.trainer.dpo_trainer", "DPOTrainer._precompute_ref_logps",
           "it takes the base without its adapter, or a copy in 16 bits, for the reference", *_TRL),
    Inside("training preferences", "transformers.trainer", "Trainer._get_eval_sampler", "it looks for rows that are one sequence",
           *_TRANSFORMERS),
    Inside("running adapters", _LORA, "_LoraFactorsProxy", "it adds A B to experts as PEFT does", *_PEFT),
    Inside("reading 4-bit weights", "bitsandbytes.nn", "Params4bit.quant_state", "scales and code books are in it", *_BITSANDBYTES),
    Inside("loading in 4 bits", "bitsandbytes.nn.parametrize", "Bnb4bitParametrization", "experts are dequantised by it", *_BITSANDBYTES),
    Inside("loading in 4 bits", "bitsandbytes.nn.parametrize", "_register_parametrization_hooks",
           "else they are dequantised at each look, and never let go", *_BITSANDBYTES),
    Inside("loading in 4 bits", "transformers.integrations.bitsandbytes", "Bnb4bitQuantize.convert",
           "experts are quantised where linear layers are", *_TRANSFORMERS),
    Inside("loading in 4 bits", "transformers.quantizers.quantizer_bnb_4bit", "Bnb4BitHfQuantizer.param_needs_quantization",
           "experts are quantised where linear layers are", *_TRANSFORMERS),
    Inside("merging", "transformers.core_model_loading", "revert_weight_conversion", "it names a model's weights as its files do",
           *_TRANSFORMERS),
    Inside("merging", "peft.utils.transformers_weight_conversion", "convert_peft_adapter_state_dict_for_transformers",
           "it fuses adapters of experts that were layers of their own", *_PEFT),
    Inside("merging", _LORA, "ParamWrapper.get_param", "which tensor of experts an adapter is for", *_PEFT),
    Inside("reading answers", "transformers.generation.utils", "GenerationMixin._supports_logits_to_keep",
           "else the logits of every token take memory", *_TRANSFORMERS),
    Inside("dequantising", "transformers.integrations.gguf.dequant", "dequantize", "on a GPU too", *_TRANSFORMERS),
    Inside("asking Ollama", "ollama", "Client._client", "the client's own methods render no prompt and look for no blob", *_OLLAMA),
)  # fmt: skip
IN_OBJECTS: tuple[When, ...] = ("reading 4-bit weights", "asking Ollama", "choosing a GPU")  # which only objects have, and no class


def require(*when: When) -> None:
    """Raise ToolFailedError where a name of these rows is gone."""
    rows: tuple[Patch | Inside, ...] = (*PATCHES, *INSIDES)
    for row in rows:
        if row.when in when and row.when not in IN_OBJECTS and not hasattr(_owner(row), _leaf(row)):
            raise _gone(row)


def inside(when: When, of: object, name: str) -> Any:
    """What an object has under the name of a row. Raises ToolFailedError where it is gone."""
    row = next(row for row in INSIDES if row.when == when and _leaf(row) == name)
    if not hasattr(of, name):
        raise _gone(row)
    return getattr(of, name)


@contextlib.contextmanager
def applied(*when: When, to: Traced | None = None) -> Iterator[None]:
    """Replace the names of these rows for the time of the context. Raises ToolFailedError as `require` does."""
    require(*when)
    kept = [(owner, patch, getattr(owner, _leaf(patch))) for patch in PATCHES if patch.when in when for owner in [_owner(patch)]]
    try:
        for owner, patch, _ in kept:
            setattr(owner, _leaf(patch), patch.replacement(to))
        yield
    finally:
        for owner, patch, value in kept:
            setattr(owner, _leaf(patch), value)


def _leaf(row: Patch | Inside) -> str:
    return row.name.rpartition(".")[2]


def _owner(row: Patch | Inside) -> Any:
    """The module or the class that a row's name is in; None where that is gone itself."""
    try:
        owner: Any = importlib.import_module(row.module)
    except ModuleNotFoundError:
        return None
    for part in row.name.split(".")[:-1]:
        owner = getattr(owner, part, None)
    return owner


def _gone(row: Patch | Inside) -> ToolFailedError:
    does = "replaces" if isinstance(row, Patch) else "uses"
    return ToolFailedError(
        f"{row.package} {version(row.package)} has no {row.module}.{row.name} any more, which ftkit {does} while {row.when}: {row.why}.",
        f"pip install '{row.package}=={row.tried}'",
    )


@contextlib.contextmanager
def without_trainer() -> Iterator[None]:
    """A stand-in for `trl.trainer.utils`, of which TRL's loss head wants one function in its backward pass.

    `maybe_gather_lm_head_ctx` matters to DeepSpeed alone, and importing the trainer for it takes seconds.
    """
    name = "trl.trainer.utils"
    if name in sys.modules:
        yield
        return
    stand_in = types.ModuleType(name)
    stand_in.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]

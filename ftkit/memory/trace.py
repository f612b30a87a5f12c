"""Trace one training step on fake tensors: every allocation and free, in order, without a weight or a GPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ftkit import patches
from ftkit.errors import ModelError, first_line
from ftkit.memory import fused_qkv, inventory, kernels
from ftkit.memory.inventory import Skeleton, decoder_layers
from ftkit.recipe import Lora, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16", "float16"]
ALLOCATE, FREE, WORKSPACE, GRADIENT = range(4)  # kinds of events; see Events
CHUNK_TOKENS = 128  # LitGPT's lm_head_chunk_size
PAGED_ELEMENTS = 100_000  # bitsandbytes/optim/optimizer.py, get_state_buffer
HEAD_TILE_TOKENS = 4096  # TRL 1.16 scores at most so many tokens at a time


@dataclass(frozen=True)
class StepSettings:
    """All of a training step that decides its memory. The defaults are what `ftkit train` runs on a GPU with bfloat16.

    The other values are for other people's training loops. `loss`: "logits" builds all logits and takes transformers' own
    loss in float32, "float32_logits" casts the model's output to float32 as Fabric does, "float32_chunks" does so for 128
    tokens at a time. `keep_outputs` holds what the loss was computed from until the next is there; `fused_qkv` (LoRA alone)
    has one layer compute query, key and value, each a view of its output; `tied` false gives the head
    weights of its own; `longest_first` has only the first step see the longest batch, before the optimizer has states.
    """

    method: Method = "qlora"
    lora: Lora = field(default_factory=Lora)
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = False
    base_dtype: Dtype = "bfloat16"  # of weights that are not quantised
    compute_dtype: Dtype = "bfloat16"  # of 4-bit layers, and of autocast
    trained_dtype: Dtype = "float32"  # of adapters, or of all weights for full fine-tuning
    autocast: bool = True
    double_quant: bool = True
    loss: Literal["fused", "logits", "float32_logits", "float32_chunks"] = "fused"
    attention: Literal["sdpa", "eager"] | None = None  # None: what transformers chooses for the model
    padded: bool = True  # rows of one batch differ in length, so that a mask is built; a batch of one never has one
    use_cache: bool = False
    keep_outputs: bool = False
    fused_qkv: bool = False
    tied: bool = True
    longest_first: bool = False
    labelled_share: float = 1.0  # of a batch's tokens, those that the fused loss head scores
    device: Literal["cuda", "cpu"] = "cuda"
    capability: tuple[int, int] = (8, 9)


@dataclass
class Events:
    """What one forward and backward pass allocates and frees, in order.

    Event n has a kind, a storage and a size in bytes. ALLOCATE and FREE are what they say; WORKSPACE is taken and given
    back within one kernel; GRADIENT says that a parameter's gradient is complete in this storage. `labels` names what an
    allocation is for. `marks` cut the sequence: (index of the event, what begins there).
    """

    kinds: list[int] = field(default_factory=list)
    storages: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tiled: list[bool] = field(default_factory=list)  # sizes that stop growing at HEAD_TILE_TOKENS tokens
    marks: list[tuple[int, tuple[str, int]]] = field(default_factory=list)

    def add(self, kind: int, storage: int, size: int, label: str, tiled: bool = False) -> None:
        self.kinds.append(kind)
        self.storages.append(storage)
        self.sizes.append(size)
        self.labels.append(label)
        self.tiled.append(tiled)

    def sort_frees(self) -> None:
        """Put releases that follow each other in the order of their allocation: some containers let go in no order."""
        marked = {index for index, _ in self.marks}
        start = 0
        for index in range(len(self.kinds) + 1):
            if index == len(self.kinds) or self.kinds[index] != FREE or index in marked:
                run = sorted(zip(self.storages[start:index], self.sizes[start:index], self.tiled[start:index], strict=True))
                self.storages[start:index] = [storage for storage, _, _ in run]
                self.sizes[start:index] = [size for _, size, _ in run]
                self.tiled[start:index] = [tiled for _, _, tiled in run]
                start = index if index in marked and index < len(self.kinds) and self.kinds[index] == FREE else index + 1


class StepTracer:
    """A skeleton on fake tensors, ready to be traced at any batch and length."""

    def __init__(self, skeleton: Skeleton, settings: StepSettings) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.settings = settings
        self.layers = skeleton.layers
        kernels.prepare_bitsandbytes()
        self.model = copy.deepcopy(skeleton.model)
        self.wrapped = prepare(self.model, settings)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            _make_fake(self.model, settings)
        self._hooks()

    def _hooks(self) -> None:
        """Tell the recorder where a layer begins, forward and backward, and what an allocation is for."""
        self._recorder: _Recorder | None = None

        def named(module: Any, label: str) -> None:
            def enter(*_: Any) -> None:
                if self._recorder:
                    self._recorder.labels.append(label)

            def leave(*_: Any) -> None:
                if self._recorder and len(self._recorder.labels) > 1:
                    self._recorder.labels.pop()

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)

        def layer_begins(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if self._recorder and self._recorder.phase == "forward":
                    self._recorder.mark("forward", index)

            return hook

        def layer_ends(index: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                recorder = self._recorder
                if not recorder or recorder.phase != "forward":
                    return
                recorder.head_begins = index == self.layers - 1
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: recorder.backward_begins(index))

            return hook

        named(self.model.get_input_embeddings(), "embeddings")
        for index, layer in enumerate(decoder_layers(self.model)):
            named(layer, "layers")
            for name, child in layer.named_children():
                named(child, part_name(name))
            layer.register_forward_pre_hook(layer_begins(index))
            layer.register_forward_hook(layer_ends(index))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self._recorder and self._recorder.gradient(p))

    def record(self, batch: int, length: int) -> Events:
        """The events of one forward and backward pass over `batch` rows of `length` tokens."""
        settings = self.settings
        padded = settings.padded and batch > 1
        recorder = _Recorder(kernels.workspaces() if settings.device == "cuda" else {})
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            recorder.ignore(tensor)
        for state in quantization_tensors(self.model):
            recorder.ignore(state)
        self._recorder = recorder
        on_cuda = settings.device == "cuda"
        traced = patches.Traced(kernels.attention(settings.capability, settings.fused_qkv) if on_cuda else None, padded)
        when: tuple[patches.When, ...] = ("tracing", *_for_dora(settings), *(("tracing for CUDA",) if on_cuda else ()))
        try:
            with self._fake, patches.without_trainer(), patches.applied(*when, to=traced), recorder:
                self._step(recorder, batch, length)
        except ModelError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(
                f"A training step of {self.model.config.model_type} cannot be traced: {type(error).__name__}: {first_line(error)}",
                "nothing is guessed in its place; docs/plan.md names model types that are tested",
            ) from error
        finally:
            self._recorder = None
            self.model.zero_grad(set_to_none=True)
        recorder.events.sort_frees()
        return recorder.events

    def _step(self, recorder: _Recorder, batch: int, length: int) -> None:
        import torch

        settings = self.settings
        recorder.phase, recorder.labels = "forward", ["inputs"]
        ids = torch.zeros(batch, length, dtype=torch.long)
        labels = torch.zeros(batch, length, dtype=torch.long)
        mask = torch.ones(batch, length, dtype=torch.long)
        recorder.labels = ["loss head"]
        compute = getattr(torch, settings.compute_dtype)
        autocast = torch.autocast("cpu", dtype=compute) if settings.autocast else contextlib.nullcontext()
        with autocast:
            loss, outputs = self._loss(ids, labels, mask)
        if not settings.keep_outputs:
            del outputs
        recorder.phase = "backward"
        recorder.mark("loss backward", 0)
        loss.backward()
        recorder.mark("release", 0)
        del ids, labels, mask, loss
        if settings.keep_outputs:
            del outputs

    def _loss(self, ids: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        """The loss, and what the training loop keeps of the model's output."""
        import torch

        settings = self.settings
        if settings.loss != "fused":
            counted = torch.ones((), dtype=torch.long)
            if settings.loss == "logits":
                outputs = self.wrapped(
                    input_ids=ids, attention_mask=mask, labels=labels, use_cache=settings.use_cache, num_items_in_batch=counted
                )
                return outputs.loss, outputs
            if settings.loss == "float32_chunks":
                return self._chunked_loss(ids, labels, mask)
            outputs = self.wrapped(input_ids=ids, attention_mask=mask, use_cache=settings.use_cache)
            logits = outputs.logits.float()
            return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)), (
                outputs,
                logits,
            )
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        # As in TRL's fused head: the hidden states of labelled tokens are gathered, scored and scattered back.
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        count = labelled_tokens(batch=ids.shape[0], length=ids.shape[1], share=settings.labelled_share)
        rows, columns = (torch.zeros(count, dtype=torch.long) for _ in range(2))
        head = self.model.get_output_embeddings()
        text = self.model.config.get_text_config()
        softcap = getattr(text, "final_logit_softcapping", None)
        scored = ChunkedLogProbFunction.apply(
            hidden[rows, columns], head.weight, head.bias, labels[:, 1:][rows, columns], 1.0, kernels.HEAD_TILE_VOCABULARY, softcap, 1.0,
            ("log_probs", "entropy", "is_top1"),
        )  # fmt: skip
        del hidden, rows, columns
        log_probs, entropy, top1 = (x.new_zeros(wanted.shape).masked_scatter(wanted, x) for x in (scored[0], scored[1], scored[4]))
        del scored
        loss = (-log_probs).sum() / wanted.sum()
        return loss, (log_probs, entropy, top1, wanted)

    def _chunked_loss(self, ids: Any, labels: Any, mask: Any) -> tuple[Any, Any]:
        import torch
        from torch.nn.functional import cross_entropy

        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        chunks = [part.float() for part in [head(part) for part in hidden.split(CHUNK_TOKENS, dim=1)]]
        chunks[-1] = chunks[-1][:, :-1]
        wanted = labels[:, 1:]
        losses = [
            cross_entropy(part.reshape(-1, part.shape[-1]), goal.reshape(-1), reduction="none")
            for part, goal in zip(chunks, wanted.split(CHUNK_TOKENS, dim=1), strict=True)
        ]
        return torch.cat(losses).sum() / (wanted != -100).sum(), chunks


class _Recorder:
    """Follows storages from allocation to release, as a torch dispatch mode."""

    def __init__(self, workspaces: dict[Any, Callable[..., int]]) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        recorder = self

        class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return recorder.dispatch(func, args, kwargs or {})

        self.events = Events()
        self.phase = "forward"
        self.labels: list[str] = ["inputs"]
        self._mode: Any = Mode()  # type: ignore[no-untyped-call]
        self._workspaces = workspaces
        self._live: dict[int, tuple[int, Any]] = {}  # address of a storage → its number and what tells of its end
        self._ignored: set[int] = set()
        self._next = 0
        self._closed = False
        self.head_begins = False  # with the next allocation: what the last layer leaves behind is released before
        import torch

        self._add, self._tensor = torch.ops.aten.add.Tensor, torch.Tensor
        self._add_in_place = torch.ops.aten.add_.Tensor
        self._uses = torch._C._storage_Use_Count
        self._recomputes = torch.is_grad_enabled

    def __enter__(self) -> _Recorder:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._closed = True

    def ignore(self, tensor: Any) -> None:
        """Weights are there before the step; they are counted apart."""
        self._ignored.add(tensor.untyped_storage()._cdata)

    def number(self, tensor: Any) -> int:
        """The number of a live tensor's storage."""
        return self._live[tensor.untyped_storage()._cdata][0]

    def mark(self, name: str, number: int) -> None:
        self.events.marks.append((len(self.events.kinds), (name, number)))

    def backward_begins(self, layer: int) -> None:
        self.labels = ["layers"]
        self.mark("backward", layer)

    def gradient(self, parameter: Any) -> None:
        self.events.add(GRADIENT, self.number(parameter.grad), 0, "gradients")

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is self._add and self.phase == "backward" and len(args) == 2 and not kwargs:
            added = self._accumulate(args)
            if added is not None:
                return added
        out = func(*args, **kwargs)
        self._see(out)
        workspace = self._workspaces.get(func)
        if workspace:
            self.events.add(WORKSPACE, -1, workspace(args), "kernel workspaces")
        return out

    def _label(self) -> str:
        # The engine runs without gradients; what has them in the backward pass is a layer that checkpointing recomputes.
        return self.labels[-1] if self.phase == "forward" or self._recomputes() else "gradients in flight"

    def _accumulate(self, args: Any) -> Any:
        """The autograd engine sums two gradients in place where nothing else holds the first; under a mode it would not."""
        a, b = args
        if not (isinstance(a, self._tensor) and isinstance(b, self._tensor) and a.shape == b.shape and a.dtype == b.dtype):
            return None
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code.co_name in ("__torch_dispatch__", "handler", "_wrapped", "inner", "_fn", "dispatch"):
            frame = frame.f_back
        if frame is None or frame.f_code.co_name != "_engine_run_backward":
            return None
        for into, other in ((a, b), (b, a)):
            if self._uses(into.untyped_storage()._cdata) <= 3:  # the engine's buffer, this argument, the wrapper
                return self._add_in_place(into, other)
        return None

    def _see(self, out: Any) -> None:
        if isinstance(out, self._tensor):
            storage = out.untyped_storage()
            address = storage._cdata
            if address in self._live or address in self._ignored:
                return
            size = storage.nbytes()
            if size == 0:
                return
            if self.head_begins:
                self.head_begins = False
                self.mark("head", 0)
            number = self._next
            self._next += 1

            tiled = out.dim() == 2 and out.shape[1] == kernels.HEAD_TILE_VOCABULARY

            def released(_: Any) -> None:
                del self._live[address]
                if not self._closed:
                    self.events.add(FREE, number, size, "", tiled)

            self._live[address] = (number, weakref.ref(storage, released))
            self.events.add(ALLOCATE, number, size, self._label(), tiled)
        elif isinstance(out, (tuple, list)):
            for item in out:
                self._see(item)


def compute_dtype(base_dtype: str | None, otherwise: str) -> str:
    """What is computed in: float16 weights in float16, since autocast mixes no two 16-bit formats (it raises, on a GPU too)."""
    return "float16" if base_dtype == "float16" else otherwise


def labelled_tokens(batch: int, length: int, share: float) -> int:
    """Tokens that the loss head scores: a row's first token is nobody's next."""
    return max(1, round(share * batch * (length - 1)))


def _for_dora(settings: StepSettings) -> tuple[patches.When, ...]:
    return ("tracing DoRA",) if settings.method != "full" and settings.lora.use_dora else ()


def prepare(model: PreTrainedModel, settings: StepSettings) -> Any:
    """The meta model as the method trains it: 4-bit layers, adapters, frozen weights, checkpointing. Returns PEFT's wrapper."""
    import torch

    trained = getattr(torch, settings.trained_dtype)
    wrapped: Any = model
    if settings.method == "full":
        model.to(trained)
    else:
        model.to(getattr(torch, settings.base_dtype))
        if settings.method == "qlora":
            quantize(model, settings)
        with patches.applied(*_for_dora(settings)):
            wrapped = inventory.inject(model, settings.lora)
        if settings.fused_qkv and settings.method == "lora":
            if settings.lora.use_dora:
                raise ModelError("DoRA on one layer for query, key and value (what_if.fused_qkv) is not modelled.", "leave one of them out")
            for layer in decoder_layers(model):
                fused_qkv.fuse(getattr(layer, "self_attn", None), settings.lora.lora_dropout)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if settings.method != "full":
            model.enable_input_require_grads()  # as TRL 1.16 does with PEFT
    wrapped.train()
    return wrapped


def quantize(model: PreTrainedModel, settings: StepSettings) -> None:
    """Replace on the meta device what `load_in_4bit` replaces."""
    import torch
    from bitsandbytes.nn import Linear4bit

    compute = getattr(torch, settings.compute_dtype)
    for name, linear in inventory.quantized_layers(model).items():
        with torch.device("meta"):
            layer = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute,
                compress_statistics=settings.double_quant, quant_type="nf4",
            )  # fmt: skip
        if linear.bias is not None:
            layer.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
        layer.source_cls = type(linear)
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True  # PEFT looks at these


def _make_fake(model: PreTrainedModel, settings: StepSettings) -> None:
    """Meta parameters and buffers → fake CPU ones; 4-bit weights by bitsandbytes' own (fake) kernels. Under fake mode."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    made: dict[int, Any] = {}
    base = getattr(torch, settings.base_dtype)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or (isinstance(module, Linear4bit) and name == "weight"):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            meta = layer.weight
            packed, state = functional.quantize_4bit(
                torch.empty(layer.out_features, layer.in_features, dtype=base), blocksize=meta.blocksize,
                compress_statistics=settings.double_quant, quant_type="nf4", quant_storage=meta.quant_storage,
            )  # fmt: skip
            # A plain parameter: bitsandbytes' Params4bit cannot wrap a fake tensor.
            weight: Any = torch.nn.Parameter(packed, requires_grad=False)
            weight.quant_state, weight.bnb_quantized = state, True
            layer._parameters["weight"] = weight
            layer.quant_state = state
            layer.forward = _forward_4bit.__get__(layer)


def _forward_4bit(layer: Any, x: Any) -> Any:
    """`Linear4bit.forward` without its look at Params4bit."""
    import bitsandbytes

    given = x.dtype
    if layer.compute_dtype is not None:
        x = x.to(layer.compute_dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return bitsandbytes.matmul_4bit(x, layer.weight, bias=bias, quant_state=layer.quant_state).to(given)


def quantization_tensors(model: Any) -> Iterator[Any]:
    """The tensors beside the packed weights of 4-bit layers: scales, code books, offsets."""
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def part_name(child: str) -> str:
    """What a layer's child module is called in the explanation of a peak."""
    for part, words in {"norms": ("norm",), "attention": ("attn", "attention"), "MLP": ("mlp", "feed_forward", "experts", "moe")}.items():
        if any(word in child for word in words):
            return part
    return "layers"


@dataclass(frozen=True)
class OptimizerEvents:
    """One optimizer step: (kind, storage, bytes); `states` are the storages that stay from the first step on."""

    events: tuple[tuple[int, int, int], ...]
    states: frozenset[int]


def optimizer_events(trained: list[tuple[int, bool]], settings: StepSettings) -> OptimizerEvents:
    """Gradient clipping and one step of the optimizer over `trained` tensors: (elements, keeps 32-bit states).

    As torch 2.13 does them (tests hold it against a real AdamW): a norm for each gradient; two moments for each tensor;
    then, on a GPU, the roots of all variances at once, on a CPU tensor after tensor, two at a time. bitsandbytes' kernels
    work in place. Its paged optimizer keeps the moments of tensors from PAGED_ELEMENTS on in memory that the driver moves out of
    the GPU when it is short: they are left out. On a CPU nothing is paged.
    """
    width = inventory.DTYPE_BYTES[settings.trained_dtype]
    events: list[tuple[int, int, int]] = []
    numbers = itertools.count()

    def allocate(size: int) -> tuple[int, int]:
        entry = (next(numbers), size)
        events.append((ALLOCATE, *entry))
        return entry

    def free(*entries: tuple[int, int]) -> None:
        events.extend((FREE, *entry) for entry in entries)

    norms = [allocate(width) for _ in trained]
    free(*norms, allocate(width * len(trained)))
    states: set[int] = set()
    if settings.optim in ("adamw_8bit", "paged_adamw_8bit"):
        paged = settings.optim == "paged_adamw_8bit" and settings.device == "cuda"
        for elements, wide in trained:
            storages = inventory.state_storages_8bit(elements, wide)
            moved = 2 if paged and elements >= PAGED_ELEMENTS else 0  # the two moments; their scales stay
            states |= {allocate(size)[0] for size in storages[moved:]}
    else:
        states = {allocate(width * elements)[0] for elements, _ in trained for _ in range(2)}
        if settings.device == "cuda":
            free(*[allocate(width * elements) for elements, _ in trained])
        else:
            kept: list[tuple[int, int]] = []
            for elements, _ in trained:
                root, quotient = allocate(width * elements), allocate(width * elements)
                free(*kept, root)
                kept = [quotient]
            free(*kept)
    return OptimizerEvents(tuple(events), frozenset(states))

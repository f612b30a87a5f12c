"""The model on the meta device: counted in full, and shortened where its layers repeat. No weight is loaded."""

from __future__ import annotations

import copy
import difflib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError, RecipeError, first_line
from ftkit.memory.optimizer import Trained, optimizer_state_bytes
from ftkit.memory.sizes import DTYPE_BYTES, nf4_storages
from ftkit.model.four_bits import EXPERTS_PATTERN, quantized_weights
from ftkit.model.source import from_files, name_body, not_its_files, sixteen_bits_of
from ftkit.model.tables import LOOKED_UP, NARROW, stay_narrow
from ftkit.recipe import Lora, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


UNIT_COPIES = 4  # of the repeated unit of layers that a shortened model keeps: first, template's neighbour, template, last
# What a parameter is for, by the first pattern that its name matches.
TOWERS, EXPERTS = "vision and audio towers", "experts"
ROLES = (
    (TOWERS, r"vision|visual|audio|image|multi_modal|mm_projector"),
    ("per-layer tables", r"per_layer"),
    ("norms", r"norm|layer_scalar"),
    (EXPERTS, EXPERTS_PATTERN),
    ("attention", r"attn|attention"),
    ("MLP", r"mlp|feed_forward|ffn"),
    ("embeddings", r"embed|wte|wpe"),
    ("head", r"lm_head|output"),
)
# Names of what has no weight decay (get_decay_parameter_names of transformers 5.23, which looks at the kinds of layers too).
WITHOUT_DECAY = r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)"


@dataclass(frozen=True)
class Tensor:
    """A parameter of the base model; tied ones stand here once. `quantized`: `load_in_4bit` makes it NF4."""

    name: str
    shape: tuple[int, ...]
    role: str
    quantized: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Adapters:
    """What PEFT trains on a model, and the weights that it trains them for."""

    trained: tuple[Trained, ...] = ()
    adapted: frozenset[str] = frozenset()  # names of the base model's weights


@dataclass(frozen=True)
class Inventory:
    """Counts are elements; bytes are as torch and bitsandbytes would allocate them, without allocator rounding."""

    method: Method
    parameters: int  # of the base model, tied weights once
    parameters_by_role: dict[str, int]
    quantized_parameters: int  # in the layers that 4-bit loading replaces, and in fused experts; 0 without it
    trainable_parameters: int
    written_parameters: int  # of those in a file: an embedding that is the head too stands there twice
    trainable_by_target: dict[str, int]  # adapter parameters by the layer they sit on; empty for full fine-tuning
    layer_parameters: int  # of the matrices in the text model's layers, which adapters are for
    without_adapter: dict[str, int]  # those of them that no adapter reaches, by their names in a layer; empty for full fine-tuning
    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises ModelError where transformers cannot read it, or no 16-bit model can be built from it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, **from_files(trust_remote_code))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ImportError, StrictDataclassError) as error:
        if refused := not_its_files(folder, error):
            raise refused from None
        said = " ".join(str(error).split())
        raise ModelError(
            f"transformers cannot read the config in {folder}: {said}.", "check model_type and sizes in its config.json"
        ) from None
    if quantization := getattr(config, "quantization_config", None):
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", "")
        raise ModelError(
            f"The model in {folder} is quantised already ({kind or 'quantization_config in its config.json'}); "
            "ftkit trains from 16-bit weights.",
            f"give the 16-bit model that it was made from{f' ({where})' if (where := sixteen_bits_of(folder)) else ''}; "
            "to plan for that one, take quantization_config out of a copy of config.json",
        )
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    wrong = [f"{name} is {size}" for name, size in sizes.items() if isinstance(size, int) and size < 1]
    heads, shared = sizes["num_attention_heads"], getattr(text, "num_key_value_heads", None)
    if not wrong and isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        wrong = [f"{heads} num_attention_heads cannot share {shared} num_key_value_heads"]
    if wrong:
        raise ModelError(f"The config in {folder} is of no model: {wrong[0]}.", "take config.json from the model's own page again")
    return config


def meta_model(config: Any, dtype: str = "bfloat16", attention: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with all parameters on the meta device (shapes and dtypes, no memory). The config is left as it is.

    `attention` is transformers' `attn_implementation`; None lets it choose.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (ValueError, AttributeError, TypeError, KeyError, ImportError, RuntimeError, ArithmeticError) as error:
        if refused := not_its_files(Path(getattr(config, "_name_or_path", None) or "The config"), error):
            raise refused from None
        raise ModelError(f"The config does not build a language model: {first_line(error)}.") from None
    model.tie_weights()
    name_body(model)
    return model


class Skeleton:
    """A model on the meta device, counted in full and then shortened where its layers repeat each other.

    Of `total_layers` decoder layers `layers` are kept: all, or four of the repeated unit of `unit_layers` and the rest.
    """

    def __init__(
        self, config: Any, dtype: str = "bfloat16", attention: str | None = None, tied: bool = True, trust_remote_code: bool = False
    ) -> None:
        self._made_of = (config, dtype, attention, tied, trust_remote_code)
        self._adapters: dict[str, Adapters] = {}
        self.narrow_tables = True  # whether tables that are looked up alone stay in 16 bits: not where weights are shared out
        if not tied:
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
        self.model = meta_model(config, dtype, attention, trust_remote_code=trust_remote_code)
        quantized = quantized_weights(self.model)
        self.tensors = tuple(Tensor(name, tuple(p.shape), role_of(name), name in quantized) for name, p in self.model.named_parameters())
        self.buffer_bytes = tuple(b.numel() * b.element_size() for b in self.model.buffers())
        self.embedding_name = next(n for n, m in self.model.named_modules() if m is self.model.get_input_embeddings()) + ".weight"
        layers = decoder_layers(self.model)
        self.layers_name = next(name for name, module in self.model.named_modules() if module is layers)
        self.total_layers = self.layers = len(layers)
        self.unit_layers = repeated_unit(layers, self.model.config.get_text_config())

    def whole(self) -> Skeleton:
        """The same model with all its layers."""
        skeleton = Skeleton(*self._made_of)
        skeleton.unit_layers = 0
        return skeleton

    def shorten(self) -> bool:
        """Leave out layers that repeat others. False where none do."""
        layers = decoder_layers(self.model)
        if self.total_layers // self.unit_layers <= UNIT_COPIES:
            self.unit_layers = 0
            return False
        self.layers = UNIT_COPIES * self.unit_layers + self.total_layers % self.unit_layers
        del layers[self.layers :]
        self.model.config.get_text_config().num_hidden_layers = self.layers
        return True

    @cached_property
    def stands_for(self) -> tuple[int, ...]:
        """For each layer of the whole model the kept one that is its like."""
        unit, left_out = self.unit_layers, self.total_layers - self.layers
        if not left_out:
            return tuple(range(self.total_layers))
        template = range(2 * unit, 3 * unit)
        return tuple(
            n if n < 3 * unit else template[n % unit] if n < 3 * unit + left_out else n - left_out for n in range(self.total_layers)
        )

    def adapters(self, lora: Lora) -> Adapters:
        """What PEFT would train, by injecting the adapter on the meta device.

        Raises RecipeError where the targets match nothing, cannot carry an adapter, or reach into other towers than the
        text model's.
        """
        key = repr(lora)  # a list of target modules has no hash
        if key not in self._adapters:
            self._adapters[key] = self._injected(lora)
        return self._adapters[key]

    def _injected(self, lora: Lora) -> Adapters:
        if any(type(module).__name__ == "Conv1D" for module in self.model.modules()):
            raise ModelError(
                f"{self.model.config.model_type} keeps its weights transposed (Conv1D); ftkit trains no adapters on them.",
                "--set training.method=full, or a newer model",
            )
        towers = any(tensor.role == TOWERS for tensor in self.tensors)
        right = f"name the layers of the text model alone: --set lora.target_modules='{self.text_pattern()}'" if towers else None
        injected = inject(copy.deepcopy(self.model), lora, right)
        trained = [
            (re.sub(r"^base_model\.model\.|\.modules_to_save\.default|\.default\.weight$", "", name), tuple(parameter.shape))
            for name, parameter in injected.named_parameters()
            if parameter.requires_grad
        ]
        reached = next((name for name, _ in trained if role_of(name) == TOWERS), None)
        if reached:
            layer, of_lora, _ = reached.rpartition(".lora_")
            raise RecipeError(
                f"lora.target_modules: {lora.target_modules!r} reaches into the vision or audio tower ({layer})."
                if of_lora
                else f"lora.modules_to_save: {lora.modules_to_save!r} reaches into the vision or audio tower ({reached}).",
                right if of_lora else "name the text model's own by their path",
            )
        adapted: list[tuple[str, tuple[int, ...]]] = [(parameter, ()) for parameter, _ in adapted_layers(injected)]
        adapted += [(name, ()) for name, _ in trained if ".lora_" not in name]
        return Adapters(
            tuple(Trained(name, shape, name == self.embedding_name) for name, shape in self._in_all_layers(trained)),
            frozenset(name for name, _ in self._in_all_layers(adapted)),
        )

    def _in_all_layers(self, found: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
        """What was found in the layers that are kept, for each layer that they stand for; before and after, what is outside."""
        kept: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        before: list[tuple[str, tuple[int, ...]]] = []
        after: list[tuple[str, tuple[int, ...]]] = []
        for name, shape in found:
            if inside := re.match(re.escape(self.layers_name) + r"\.(\d+)\.(.+)", name):
                kept.setdefault(int(inside[1]), []).append((inside[2], shape))
            else:
                (after if kept else before).append((name, shape))
        inside_all = [
            (f"{self.layers_name}.{n}.{name}", shape) for n, like in enumerate(self.stands_for) for name, shape in kept.get(like, [])
        ]
        return before + inside_all + after

    def text_pattern(self) -> str:
        """A pattern for `target_modules` that matches all linear layers of the text model's decoder, and nothing else."""
        from torch import nn

        names = {
            name.rpartition(".")[2]
            for layer in decoder_layers(self.model)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        return rf"{self.layers_name.replace('.', chr(92) + '.')}\.\d+\..*({'|'.join(sorted(names))})"

    def count(
        self, method: Method, lora: Lora, optim: str, base_dtype: str, trained_dtype: str = "float32", double_quant: bool = True
    ) -> Inventory:
        """The inventory for one method. Frozen weights are kept in `base_dtype`, trained ones and their gradients in `trained_dtype`."""
        trained_bytes = DTYPE_BYTES[trained_dtype]
        parameters = sum(t.elements for t in self.tensors)
        by_role: dict[str, int] = {}
        for tensor in self.tensors:
            by_role[tensor.role] = by_role.get(tensor.role, 0) + tensor.elements
        adapters = Adapters() if method == "full" else self.adapters(lora)
        if method == "qlora" and (packed := {t.name for t in self.tensors if t.quantized} & {t.name for t in adapters.trained}):
            raise RecipeError(
                f"lora.modules_to_save: {min(packed)} is kept in 4 bits by QLoRA, and cannot be trained whole.",
                "leave it out, or train on 16-bit weights: --set training.method=lora",
            )
        by_target: dict[str, int] = {}
        for one in adapters.trained:
            layer, of_lora, _ = one.name.partition(".lora_")
            target = (layer if of_lora else layer.rpartition(".")[0]).rpartition(".")[2]
            by_target[target] = by_target.get(target, 0) + one.elements
        in_layers = {t.name: t.elements for t in self.tensors if t.name.startswith(self.layers_name) and len(t.shape) > 1}
        without: dict[str, int] = {}
        for name, size in in_layers.items():
            if method != "full" and name not in adapters.adapted:
                leaf = re.sub(re.escape(self.layers_name) + r"\.\d+\.", "", name).removesuffix(".weight")
                without[leaf] = without.get(leaf, 0) + size
        trained = self.trained(method, adapters)
        trainable = sum(t.elements for t in trained)
        twice = sum(t.elements for t in adapters.trained if t.name == self.embedding_name and is_tied(self.model))  # PEFT writes both
        return Inventory(
            method=method,
            parameters=parameters,
            parameters_by_role=by_role,
            quantized_parameters=sum(t.elements for t in self.tensors if t.quantized) if method == "qlora" else 0,
            trainable_parameters=trainable,
            written_parameters=trainable + twice,
            trainable_by_target=by_target,
            layer_parameters=sum(in_layers.values()),
            without_adapter=without,
            weights_bytes=sum(size for _, size in self.storages(method, base_dtype, trained_dtype, double_quant)),
            adapter_bytes=0 if method == "full" else trained_bytes * trainable,
            gradient_bytes=trained_bytes * trainable,
            optimizer_bytes=sum(optimizer_state_bytes(t, optim, trained_bytes) for t in trained),
        )

    def storages(self, method: Method, base_dtype: str, trained_dtype: str, double_quant: bool) -> Iterator[tuple[str, int]]:
        """(what for, bytes) of each tensor of the base model and its buffers."""
        plain = DTYPE_BYTES[trained_dtype if method == "full" else base_dtype]
        stored = self._made_of[0]  # the config: the model here is of another format
        narrow = self.narrow_tables and method != "full" and stay_narrow(stored.get_text_config()) and str(stored.dtype).endswith(NARROW)
        for tensor in self.tensors:
            if method == "qlora" and tensor.quantized:
                yield from (("4-bit weights", size) for size in nf4_storages(tensor.elements, double_quant))
            else:
                size = 2 if narrow and LOOKED_UP.search(tensor.name) else plain
                kind = "weights" if method != "qlora" else "weights that stay 16-bit" if size == 2 else "weights that stay 32-bit"
                yield kind, size * tensor.elements
        yield from (("buffers", size) for size in self.buffer_bytes)

    def trained(self, method: Method, adapters: Adapters) -> list[Trained]:
        """What is trained, in the order in which the trainer's optimizer steps on it: what weight decay is for, then the rest."""
        full = [Trained(t.name, t.shape, t.name == self.embedding_name) for t in self.tensors]
        return sorted(full if method == "full" else adapters.trained, key=lambda t: bool(re.search(WITHOUT_DECAY, t.name.lower())))


def role_of(name: str) -> str:
    """What a parameter is for."""
    return next((role for role, pattern in ROLES if re.search(pattern, name)), "other")


def inject(model: PreTrainedModel, lora: Lora, hint: str | None = None) -> Any:
    """PEFT's wrapper around the (meta) model. Raises RecipeError where the targets match nothing or cannot carry an adapter."""
    from peft import get_peft_model

    names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Linear4bit")})
    _refuse_names(model, lora)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # PEFT 0.21 tells of its own patterns for fused experts that all-linear does not reach
            warnings.filterwarnings("ignore", message=r".*(rank|alpha)_pattern keys did not match.*", category=RuntimeWarning)
            warnings.filterwarnings("ignore", message=r".*a tied layer is part of the adapter.*")  # which the merge unties
            warnings.filterwarnings("ignore", message=r".*rank_pattern. or .alpha_pattern. at the same time as .use_rslora.*")
            injected = get_peft_model(model, lora_config(lora, model), autocast_adapter_dtype=False)
    except (ValueError, re.error) as error:
        wanted = lora.target_modules
        if "ParamWrapper does not work with" in str(error):
            key = "use_dora" if lora.use_dora else "lora_dropout"
            raise RecipeError(
                f"lora.{key}: {wanted!r} reaches experts that a layer keeps in one tensor, and PEFT trains no such adapter with it.",
                f"leave it out, or name layers alone: --set 'lora.target_modules=[{', '.join(n for n in names if n != 'lm_head')}]'",
            ) from None
        if hint is None and wanted in names:
            hint = f"a text is a pattern for whole names; give a list: --set 'lora.target_modules=[{wanted}]'"
        raise RecipeError(
            f"lora.target_modules: PEFT cannot use {wanted!r}: {first_line(error)}",
            hint or f"give {'all-linear, or ' if wanted != 'all-linear' else ''}a list of some of: {', '.join(names)}",
        ) from None
    layers = [path for path, _ in adapted_layers(injected)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for path in layers for name in (path, path.removesuffix(".weight"))):
                raise RecipeError(
                    f"lora.{key}: no adapted layer is called {pattern!r}.", nearest(pattern, {path.split(".")[-2] for path in layers})
                )
    return injected


def _refuse_names(model: PreTrainedModel, lora: Lora) -> None:
    """Raise RecipeError for names of modules and parameters that the model does not have, and for what PEFT would take beside them."""
    modules = [name for name, _ in model.named_modules()]
    for wanted in lora.modules_to_save or ():
        reached = [name for name in modules if name.endswith(wanted)]  # as PEFT looks for it
        named = [name for name in reached if f".{name}".endswith(f".{wanted}")]
        if not named:
            known = {name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdecimal()}
            raise RecipeError(f"lora.modules_to_save: the model has no module {wanted!r}.", nearest(wanted, known))
        if other := next((name for name in reached if name not in named), None):
            raise RecipeError(
                f"lora.modules_to_save: {wanted!r} is the end of {other} too, which PEFT would train with it.", f"its path: {named[0]}"
            )
    parameters = [name for name, _ in model.named_parameters()]
    for wanted in lora.target_parameters or ():
        if not any(f".{name}".endswith(f".{wanted}") for name in parameters):
            raise RecipeError(f"lora.target_parameters: the model has no parameter {wanted!r}.", nearest(wanted, _ends(parameters)))


def _ends(parameters: Iterable[str]) -> set[str]:
    """The last two parts of each parameter's name."""
    return {".".join(name.split(".")[-2:]) for name in parameters}


def nearest(wanted: str, known: Collection[str]) -> str:
    """The hint for a name that is none."""
    near = difflib.get_close_matches(wanted, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(filter(None, known))[:20])}"


def adapted_layers(injected: Any) -> Iterator[tuple[str, Any]]:
    """(name of a base model's weight, the layer of PEFT's that adapts it)."""
    from peft.tuners.lora import LoraLayer

    for path, module in injected.named_modules():
        if isinstance(module, LoraLayer) and module.r:
            layer = path.removeprefix("base_model.model.").replace(".base_layer", "")
            yield f"{layer}.{getattr(module, 'parameter_name', 'weight')}", module


# What `all-linear` leaves out: layers whose weights a kernel reads past the adapter, so that PEFT refuses them (peft.tuners.tuners_utils,
# 0.21) or is to refuse them; and linear layers that give more than a tensor, which its adapters cannot add to.
WITHOUT_ADAPTER = {
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), "out_proj"),
    **dict.fromkeys(("llama4", "llama4_text", "phimoe"), "router"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "(prediction|correction)_coefs"),
}


def lora_config(lora: Lora, model: PreTrainedModel) -> Any:
    """PEFT's configuration for a model, the same for planning and for training.

    Names, and `all-linear`, are of the text model's layers, never of towers; a pattern is the user's own.
    """
    from peft import LoraConfig

    left_out = []
    if lora.target_modules == "all-linear" and (refused := WITHOUT_ADAPTER.get(model.config.model_type)):
        left_out.append(rf".*\.{refused}")
    by_name = lora.target_modules == "all-linear" or not isinstance(lora.target_modules, str)
    if by_name and any(role_of(name) == TOWERS for name, _ in model.named_modules()):
        left_out.append(rf".*({dict(ROLES)[TOWERS]}).*")
    settings = lora.model_dump()
    if saved := lora.modules_to_save:
        ends = {name for name, module in model.named_modules() if module in (model.get_input_embeddings(), model.get_output_embeddings())}
        if is_tied(model) and any(f".{end}".endswith(f".{name}") for end in ends for name in saved):
            settings["ensure_weight_tying"] = True  # one weight stays one
    return LoraConfig(task_type="CAUSAL_LM", exclude_modules="|".join(left_out) or None, **settings)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding's weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def decoder_layers(model: PreTrainedModel) -> Any:
    """The text model's list of layers. Raises ModelError where there is none."""
    from torch import nn

    depth = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    found = [m for m in (decoder if decoder is not None else model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ModelError(f"{model.config.model_type}: no list of {depth} layers is found in the model, so its step cannot be traced.")
    return found[0]


def repeated_unit(layers: Any, config: Any) -> int:
    """Length of the shortest unit that, repeated, gives all layers (the last repetition may be cut short)."""

    def signature(layer: Any, kind: str) -> str:
        """A layer's modules, its parameters' shapes, and the flags that its modules carry beside its number."""
        shapes = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        flags = [
            (name, key, value)
            for name, module in layer.named_modules()
            for key, value in sorted(vars(module).items())
            if key != "layer_idx" and (value is None or isinstance(value, (bool, int, float, str)))
        ]
        return repr((kind, shapes, flags))

    types = getattr(config, "layer_types", None) or [""] * len(layers)
    known: list[str] = [signature(layer, kind) for layer, kind in zip(layers, types, strict=False)]
    same: Callable[[int], bool] = lambda unit: all(a == b for a, b in zip(known, known[unit:], strict=False))  # noqa: E731
    return next(unit for unit in range(1, len(known) + 1) if same(unit))

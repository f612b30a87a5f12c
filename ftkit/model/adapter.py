"""A LoRA adapter's files: read, and refused where they hold more than a merge does."""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError, RecipeError, first_line
from ftkit.model.source import header
from ftkit.model.tables import LOOKED_UP
from ftkit.recipe import Lora

if TYPE_CHECKING:
    from peft import LoraConfig


# Keys of adapter_config.json that the merge computes with, and those that say nothing about the result.
COMPUTED = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "fan_in_fan_out", "bias", "use_dora",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # of A and B, which leave the base as it is
# Of an embedding that is trained whole and has other tokens: as it is written under its own name, and as it was before.
WRITTEN_TWICE = re.compile(r"\.(modules_to_save|original_module)\.")
WITH_PEFT = "merge it with PEFT, merge_and_unload(), and give that model"
AGAIN = "train it again, or copy it again, whole"
PLAIN = "save it as a plain LoRA: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=THE_ADAPTER_AS_IT_BEGAN)"
WAYS_OUT = {  # key, or key=value, to what can be done; else WITH_PEFT
    "alora_invocation_tokens": "an activated LoRA works from some token on, and cannot be merged: serve it as an adapter, or train without",
    "arrow_config": "it chooses among adapters at each token, and cannot be merged: give one of them",
    "layer_replication": "train it on a checkpoint that has those layers",
    "init_lora_weights=loftq": "it was trained around another base, which LoftQ made: merge it there with PEFT, merge_and_unload()",
    **{f"init_lora_weights={start}": PLAIN for start in ("corda", "lora_ga", "olora", "pissa")},
}
# PEFT's versions, the newest first: whether A and B of fused experts lie the other way round than in the newest, by whether the
# layer keeps its weight as (experts, in, out).
TURNED_EXPERTS = (("0.19.1", {True: False, False: False}), ("0.19.0", {True: True, False: True}), ("0", {True: False, False: True}))


def load_settings(adapter: Path) -> LoraConfig:
    """An adapter's settings, to put layers of it on a model. Raises ModelError where they cannot be read, or are not to be merged."""
    from peft import PeftConfig

    _load_config(adapter)
    settings = PeftConfig.from_pretrained(adapter)
    settings.base_model_name_or_path = None  # another folder may hold the same model
    settings.init_lora_weights = True  # what it began with is in its tensors
    return settings  # type: ignore[return-value]


# Of an adapter that training is to go on with: what a plan of it does not know.
NOT_GONE_ON_WITH = (
    "alpha_pattern", "bias", "layers_to_transform", "modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices",
)  # fmt: skip


def settings_of(adapter: Path, lora: Lora) -> Lora:
    """A recipe's settings as the adapter has them that training goes on with; dropout is the recipe's.

    Raises RecipeError where the recipe says another, ModelError for what a recipe cannot say.
    """
    config = _load_config(adapter)
    if more := [key for key in NOT_GONE_ON_WITH if key not in Lora.model_fields and config.get(key) not in (None, "none", [], {})]:
        raise ModelError(
            f"The adapter in {adapter} has {settings_text(config, more)}, and is not trained any further.",
            "merge it, ftkit ship FOLDER, and train a new one on that",
        )
    theirs = {key: config[key] for key in Lora.model_fields if config.get(key) is not None and key != "lora_dropout"}
    for key in ("target_modules", "modules_to_save", "target_parameters"):
        if isinstance(theirs.get(key), list):
            theirs[key] = sorted(theirs[key])
    try:
        made = Lora.model_validate({"target_modules": [], **theirs, "lora_dropout": lora.lora_dropout})
    except ValueError as error:
        raise ModelError(f"The adapter in {adapter} has settings that no recipe can have: {first_line(error)}.", AGAIN) from None
    asked = {key for key in lora.model_fields_set & theirs.keys() if getattr(lora, key) not in ("all-linear", [])}
    if other := next((key for key in sorted(asked) if _sorted(getattr(lora, key)) != getattr(made, key)), None):
        raise RecipeError(
            f"lora.{other} is {getattr(lora, other)!r}, and {getattr(made, other)!r} in the adapter that training goes on with.",
            f"take lora.{other} out of the recipe, or training.adapter for a new one",
        )
    return made


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _load_config(adapter: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise ModelError(
                f"The adapter uses peft_type={kind}, which this merge does not do: it is of another kind than LoRA.", WITH_PEFT
            )
        if not (config["r"] > 0 and config["lora_alpha"] > 0):
            raise ValueError("r and lora_alpha are positive")
        _refuse_what_changes_more(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None
    return config


class Tensors(dict[str, Any]):
    """An adapter's tensors by their names in its file, which is mapped: what is read of it counts as this process's memory."""

    def __init__(self, path: Path) -> None:
        """Raises as safetensors does, which says whether the file is whole."""
        import torch
        from safetensors import safe_open

        known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        with safe_open(path, "pt"):
            entries = header(path)
        with open(path, "rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, entry in entries.items():
            if entry["dtype"] not in known:
                raise ValueError(f"{name} is in {entry['dtype']}")
            kind = known[entry["dtype"]]
            flat = torch.frombuffer(self._mapped, dtype=kind, count=math.prod(entry["shape"]), offset=entry["begin"])
            self[name] = flat.view(entry["shape"])

    def let_go(self) -> None:
        """Of the pages that were read, which the system reads again when they are. Nothing is written into a tensor."""
        if hasattr(self._mapped, "madvise"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def load_tensors(adapter: Path) -> Tensors:
    """An adapter's tensors. Raises ModelError where it cannot be read, has pickles alone, or numbers that are none."""
    import torch
    from safetensors import SafetensorError

    path = adapter / "adapter_model.safetensors"
    if not path.is_file() and (adapter / "adapter_model.bin").is_file():
        raise ModelError(
            f"{adapter} holds a pickle alone (adapter_model.bin), which can run code when it is loaded.",
            "convert it once, where it is trusted: PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)",
        )
    try:
        tensors = Tensors(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None
    for name in list(filter(WRITTEN_TWICE.search, tensors)):
        del tensors[name]
    for name, tensor in tensors.items():
        for part in tensor.flatten().split(1 << 20):
            if not math.isfinite(part.sum(dtype=torch.float64)):  # one that is none makes the sum none
                raise ModelError(
                    f"The adapter's {name} holds NaN or Inf.", "its training diverged: take an earlier checkpoint, or train it again"
                )
            tensors.let_go()
    return tensors


def written_turned(adapter: Path, transposed: bool) -> bool:
    """Whether the PEFT that wrote an adapter kept A and B of fused experts the other way round; it says its version from 0.18 on."""
    from packaging.version import Version

    written = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_version") or "0"
    try:
        version = Version(written.partition("@")[0])
    except (ValueError, AttributeError):
        raise ModelError(f"The adapter in {adapter} has peft_version {written!r}, which is no version.", AGAIN) from None
    return next(turned[transposed] for since, turned in TURNED_EXPERTS if version >= Version(since))


def other_settings(config: dict[str, Any], computed: Iterable[str]) -> list[str]:
    """Keys of an adapter's config that are not at PEFT's default, but for those `computed` with and those without effect."""
    from peft import LoraConfig

    defaults = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    harmless = {*computed, *WITHOUT_EFFECT}
    if config.get("init_lora_weights", True) in PLAIN_STARTS:
        harmless.add("init_lora_weights")
    return sorted(key for key, value in config.items() if key not in harmless and (key not in defaults or value != defaults[key]))


def settings_text(config: dict[str, Any], keys: Iterable[str]) -> str:
    """Keys with their values, cut, for an error."""
    return ", ".join(f"{key}={json.dumps(config[key])[:60]}" for key in keys)


def _refuse_what_changes_more(config: dict[str, Any]) -> None:
    """Raise ModelError, by name, for each key that this merge neither computes with nor finds at PEFT's default.

    A key that the installed PEFT does not know is refused too: nobody can say what it does to the weights.
    """
    if more := other_settings(config, COMPUTED):
        named = settings_text(config, more)
        ways = {WAYS_OUT.get(key) or WAYS_OUT.get(f"{key}={str(config[key]).partition('_niter')[0]}") for key in more} - {None}
        raise ModelError(f"The adapter uses {named}, which this merge does not do.", "; ".join(sorted(map(str, ways))) or WITH_PEFT)


def embedding_rows(adapter: Path) -> int:
    """Rows of the embedding that an adapter brings whole: more than the base's where training added tokens. 0 without one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            names = [name for name in file.keys() if re.search(r"emb|wte", name) and ".lora_" not in name]  # noqa: SIM118
            return max((file.get_slice(name).get_shape()[0] for name in names), default=0)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"The adapter in {adapter} cannot be read: {error!r}.", AGAIN) from None


def _trained_whole(model: Any) -> list[Any]:
    """The parts of a model that an adapter's `modules_to_save` trains whole."""
    return [
        part for module in model.modules() if type(module).__name__ == "ModulesToSaveWrapper" for part in module.modules_to_save.values()
    ]


def widen_trained_whole(model: Any) -> bool:
    """Have the parts that are trained whole in float32, as in training; whether any was in 16 bits, whose values are to be read anew."""
    import torch

    narrow = [
        part for part in _trained_whole(model) if any(numbers.dtype in (torch.bfloat16, torch.float16) for numbers in part.parameters())
    ]
    for part in narrow:
        part.float()
    return bool(narrow)


@contextmanager
def as_trained(model: Any) -> Iterator[None]:
    """Compute as in training, whose autocast joins parts that are trained whole, in float32, to weights of 16 bits."""
    import torch

    told = [numbers.dtype for name, numbers in model.named_parameters() if not LOOKED_UP.search(name)]  # those tables stay in 16 bits
    formats = set(told) if _trained_whole(model) else set()
    half = next(iter(formats & {torch.bfloat16, torch.float16}), None) if torch.float32 in formats else None
    with torch.autocast(next(model.parameters()).device.type, half) if half else nullcontext():
        yield

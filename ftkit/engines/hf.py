"""Run a model with transformers: load it as training or asking needs it, and ask it."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import patches
from ftkit.data.lengths import asked_together
from ftkit.data.rows import Message
from ftkit.data.stops import stops
from ftkit.data.template import ChatSettings, render, settle, token_ids
from ftkit.data.turns import answer_reader
from ftkit.errors import DoesNotFitError, ModelError, ToolMissingError, first_line
from ftkit.machine import ranks
from ftkit.model.adapter import as_trained, embedding_rows, widen_trained_whole
from ftkit.model.four_bits import adaptable, left_alone, nf4_config
from ftkit.model.source import from_files, name_body, not_its_files, stored_dtype
from ftkit.model.tables import NARROW, stay_narrow
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Attention, Dtype, Method

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What torch, cuBLAS and the system say of memory that they do not have, in errors of another kind.
OUT_OF_MEMORY = r"CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory: you tried to allocate"
# (architecture, library, first version that is right, what goes wrong)
WRONG_LOSSES = [
    ("gemma4", "transformers", "5.12.1", "with gradient checkpointing the loss was 16.17 instead of 6.84 (transformers issue 45242)"),
]
# (architecture, where it is told): activations beyond float16's largest number, 65504, so that the loss is none.
BEYOND_FLOAT16 = [
    ("gemma3", "transformers issue 39972"),  # gemma3n too
    ("gemma4", "unsloth pull request 5092"),
    *((name, "unsloth's list FORCE_FLOAT32") for name in ("glm4_moe", "gpt_oss", "qwen3_5", "qwen3_moe")),
]
# PyTorch only warns when a layer has no gradient formula; the loss then still falls while most gradients are lost.
NO_GRADIENT = r".*autograd kernel was not registered.*"


def refuse_lost_gradients() -> None:
    """Turn the one warning that means wrong training into an error, and hear no more of transformers' own renamings."""
    warnings.filterwarnings("error", message=NO_GRADIENT)
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)


def refuse_wrong_versions(model_type: str) -> None:
    """Raise ModelError where an installed library is known to compute a wrong loss for this architecture."""
    from packaging.version import Version

    for architecture, library, fixed, what in WRONG_LOSSES:
        if model_type.startswith(architecture) and Version(version(library)) < Version(fixed):
            raise ModelError(f"{library} {version(library)} trains {architecture} wrongly: {what}.", f"pip install '{library}>={fixed}'")


def beyond_float16(model_type: str) -> str | None:
    """Where it is told that this architecture does not compute in float16; None where nobody tells it."""
    return next((told for architecture, told in BEYOND_FLOAT16 if model_type.startswith(architecture)), None)


def load_tokenizer(folder: Path, settings: ChatSettings | None = None, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, its template as `settings` have it. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **from_files(trust_remote_code))
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RecursionError) as error:
        if refused := not_its_files(folder, error):
            raise refused from None
        raise ModelError(
            f"{folder} has no tokenizer that transformers can load: {first_line(error)}",
            "copy tokenizer.json and tokenizer_config.json beside config.json, from the model's page",
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        if "default" not in tokenizer.chat_template:
            raise ModelError(
                f"The tokenizer in {folder} has chat templates for {', '.join(sorted(tokenizer.chat_template))}, and no default.",
                "copy the one to train with over chat_template.jinja there",
            )
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if settings:
        tokenizer.chat_template = settle(tokenizer, settings)
    return tokenizer  # type: ignore[no-any-return]


def refuse_missing_attention(attention: Attention | None, *, cuda: bool) -> None:
    """Raise ToolMissingError where the kernels that the recipe asks for are not here."""
    if attention == "flash_attention_2" and not (cuda and find_spec("flash_attn")):
        lacks = "the package flash-attn" if cuda else "a GPU"
        other = "leave it out: PyTorch's own attention"
        hint = f"pip install flash-attn --no-build-isolation, or {other}" if cuda else other
        raise ToolMissingError(f"training.attention: flash_attention_2 needs {lacks}, which is not here.", hint)


def load_model(
    folder: Path,
    method: Method | None,
    *,
    dtype: Dtype,
    cuda: bool,
    trust_remote_code: bool = False,
    shared_out: bool = False,
    attention: Attention | None = None,
    experts: str | None = None,
) -> PreTrainedModel:
    """The base model as `method` trains it, or (None) as it is asked: frozen weights in the compute format.

    `full` gets float32 weights, since what is trained is kept in float32. What will be `shared_out` among GPUs stays in RAM until
    then, but for what is quantised on the GPU. In the format that they are stored in they stay in their mapped files. `experts`: how
    transformers computes them.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    kept = torch.float32 if method == "full" else getattr(torch, dtype)
    settings: dict[str, Any] = {"dtype": kept, "use_safetensors": True, **from_files(trust_remote_code)}
    if method == "qlora":
        settings["quantization_config"] = nf4_config(kept, left_alone(model_type(folder)), shared_out=shared_out)
    if attention:
        settings["attn_implementation"] = attention
    if experts:
        settings["experts_implementation"] = experts
    if cuda and (method == "qlora" or not shared_out):
        settings["device_map"] = {"": ranks.local_rank()}
    narrow = kept == torch.float32 and method != "full" and not shared_out and _has_narrow_tables(folder, trust_remote_code)
    patched: tuple[patches.When, ...] = (
        *(("loading in 4 bits",) if method == "qlora" else ()),
        *(("loading tables",) if narrow else ()),
    )
    try:
        with patches.applied(*patched):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **settings
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, MemoryError, SafetensorError) as error:
        if refused := not_its_files(folder, error) or out_of_memory(error, f"load {folder.name}"):
            raise refused from None
        hint = "leave training.attention out, or fetch the model again, whole" if attention else "fetch or copy the model again, whole"
        raise ModelError(f"transformers cannot load {folder}: {first_line(error)}", hint) from None
    model, info = loaded
    if lost := sorted({*map(str, info["missing_keys"]), *(str(key[0]) for key in info["mismatched_keys"])}):  # else filled at random
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(
            f"The weights in {folder} do not fit its config: {lost[0]} is missing or of another shape{more}.",
            "fetch or copy the model again, whole",
        )
    name_body(model)
    return model


def _has_narrow_tables(folder: Path, trust_remote_code: bool) -> bool:
    """Whether tables that are looked up alone stay in 16 bits, as they are stored."""
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(folder, **from_files(trust_remote_code)).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):  # which loading will say
        return False
    return stay_narrow(text) and stored_dtype(folder) == NARROW


def load_adapted(folder: Path, adapter: Path, method: Method, *, dtype: Dtype, cuda: bool, trust_remote_code: bool = False) -> PeftModel:
    """The base as `method` trains it, with an adapter in it, to be asked."""
    return adapted(load_model(folder, method, dtype=dtype, cuda=cuda, trust_remote_code=trust_remote_code), adapter)


def adapted(base: PreTrainedModel, adapter: Path, *, learns: bool = False) -> PeftModel:
    """A base that is loaded, with an adapter in it, which is asked, or `learns`."""
    from peft import PeftModel

    if (rows := embedding_rows(adapter)) > base.get_input_embeddings().weight.shape[0]:  # for tokens that training added
        base.resize_token_embeddings(rows, mean_resizing=False)
    with adaptable(base):
        model = PeftModel.from_pretrained(base, adapter, is_trainable=learns)
    if widen_trained_whole(model):
        model.load_adapter(str(adapter), "default", is_trainable=learns)
    return model


def out_of_memory(error: BaseException, what: str) -> DoesNotFitError | None:
    """The error to raise where a library had no memory left to do `what`, on a GPU or off it."""
    import torch

    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search(OUT_OF_MEMORY, text):
        return None
    where = "This machine's RAM" if isinstance(error, MemoryError) or "CPU" in text else "The GPU"
    return DoesNotFitError(
        f"{where} has too little free memory to {what}: {first_line(error)[:200]}", "see what is needed, and what fits: ftkit plan"
    )


@contextmanager
def room_to(what: str) -> Iterator[None]:
    """Where a library has no memory left for `what`, raise DoesNotFitError that says so."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if refused := out_of_memory(error, what):
            raise refused from None
        raise


def release_memory() -> None:
    """Give back what a model that is no longer used has held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # which glibc has, and musl has not
        trim(0)  # else it keeps the holes between what is still used


def model_type(folder: Path) -> str:
    """By its config; nothing where that cannot be read, which loading will say."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def joined_at_the_head(model: PreTrainedModel) -> Iterator[None]:
    """Lay the last tokens of several rows side by side before the head reads them.

    PyTorch 2.13 multiplies rows that lie apart by a frozen weight as a batch, and on a CPU copies that weight for each of them if it is
    of 16 bits: of SmolLM2-135M and 32 rows 1.8 GB and 5 s, of 262,144 tokens and 640 numbers each 10.7 GB.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:])) if head is not None else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """Which a mixture that is trained gives for its routers' loss: transformers computes that in generation too, and fails at it."""
    text = model.config.get_text_config()
    given = getattr(text, "output_router_logits", False)
    if given:
        text.output_router_logits = False
    try:
        yield
    finally:
        if given:
            text.output_router_logits = given


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[list[Message]],
    max_new_tokens: int,
    *,
    label: str = "asking",
    reporter: Reporter = SILENT,
) -> list[str]:
    """Greedy answers without their reasoning, in the order of the questions.

    Similar lengths go through together, fewer where memory runs out.

    Raises DoesNotFitError where one question alone is too much for the GPU.
    """
    import torch

    prompts = [render(tokenizer, question, ask=True) for question in questions]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    longest = max((len(token_ids(tokenizer, prompt)) for prompt in prompts), default=0)
    batch = asked_together(longest + max_new_tokens)
    answers = [""] * len(prompts)
    model.eval()
    ends, read = stops(tokenizer, model.generation_config.eos_token_id), answer_reader(tokenizer)
    done = 0
    # Not in inference mode: a model that is trained on may keep none of its tensors.
    with (
        patches.applied("running adapters"),
        joined_at_the_head(model),
        without_router_logits(model),
        as_trained(model),
        torch.no_grad(),
        reporter.bar(label, len(prompts)) as bar,
    ):
        while done < len(order):
            chosen = order[done : done + batch]
            inputs = tokenizer(
                [prompts[n] for n in chosen], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            ).to(model.device)
            try:
                output = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    repetition_penalty=1.0,
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                )
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise DoesNotFitError(
                        "One question at a time does not fit on the GPU.", "--set a smaller ship.max_new_tokens"
                    ) from None
                batch = max(1, batch // 2)
                torch.cuda.empty_cache()
                continue
            for n, ids in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
                answers[n] = read(ids.tolist())
            done += len(chosen)
            bar.update(done)
    return answers

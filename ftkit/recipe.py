"""The recipe: what to train, on which data, how, and what to ship; read from YAML, changed by `--set`."""

from __future__ import annotations

import datetime
import difflib
import math
import re
import reprlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ftkit.errors import RecipeError
from ftkit.units import parse_vram

ReportTo = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab"]  # transformers' names
Method = Literal["qlora", "lora", "full"]
Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]  # transformers' names
Objective = Literal["sft", "dpo"]
# llama-quantize's names, without Q1_0 and Q2_0, which it makes of no row that their own block does not divide.
QUANTIZATIONS = (
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1",
    "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "MXFP4_MOE", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS",
    "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S",
)  # fmt: skip
SMALLEST = "smallest"  # type that keeps enough
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}(:[a-z0-9][a-z0-9._-]{0,79})?", re.IGNORECASE)


SHORT = reprlib.Repr()  # values as an error shows them: YAML's aliases can make one of any size
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 80, 80


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Files = Annotated[list[str], Field(min_length=1)]  # whose rows follow one another


class Data(Group):
    train: str | Files = "train.jsonl"
    validation: str | Files | None = Field(default=None, description="files; without one, a share of the training rows is held out")
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: str | Files | None = Field(default=None, description="rows that training never sees; the proof asks them before and after")
    columns: dict[str, str] | None = Field(default=None, description="the rows' own names for ftkit's keys: {prompt: q, completion: a}")
    labels: list[str] | None = Field(default=None, description="names of a classification's numbers, from 0")
    skip_faulty: bool = Field(
        default=False, description="leave out rows that cannot be read, and say how many, instead of stopping at them"
    )
    template: str | None = Field(default=None, description="the chat template: chatml, plain or a file; left out: the model's own")
    thinking: bool | None = Field(default=None, description="whether the model thinks before it answers; left out: as its template has it")
    system_in_question: bool = Field(
        default=False, description="put a system message before the first question, where a template takes none"
    )
    date: str = Field(default="2024-07-26", description="what a chat template that writes today's date writes, in training and shipped")

    @field_validator("date", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        try:
            return datetime.date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(f"a day as in 2024-07-26 is wanted (got {value!r})") from None

    @property
    def day(self) -> datetime.date:
        return datetime.date.fromisoformat(self.date)


class Lora(Group):
    """PEFT's LoraConfig, under its own names."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: Files | None = Field(default=None, description="modules that are trained whole, beside the adapters")
    target_parameters: Files | None = Field(default=None, description="parameters that get an adapter and are no layers: fused experts")
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(default={}, description="other ranks, by name or pattern")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default={}, description="other lora_alpha, by name or pattern")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise ValueError(f"a name, a pattern or a list of names is wanted (got {SHORT.repr(value)})")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Lora:
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules names nothing, and target_parameters nothing else")
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            with_it = "use_dora" if self.use_dora else "lora_dropout"
            raise ValueError(f"target_parameters does not go with {with_it}: PEFT adds to the parameter itself, and sees no input of it")
        return self


# Of an adapter, as QLoRA's authors took for 7 and 13 billion parameters; of all weights TRL's own default for supervised fine-tuning: they
# are moved themselves, and a rate that suits an adapter, which begins at nothing, makes a model forget.
PEAK_LEARNING_RATES = {"qlora": 2e-4, "lora": 2e-4, "full": 2e-5}
# A preference is a push away from where the model is already: what is usual is a quarter of that, and less.
DPO_LEARNING_RATES = {"qlora": 5e-5, "lora": 5e-5, "full": 5e-6}


class Training(Group):
    """TRL's SFTConfig, under its own names, and the method."""

    method: Method = "qlora"
    objective: Objective = Field(default="sft", description="what is learnt: answers, or which of two answers is the better one")
    adapter: str | None = Field(default=None, description="an adapter to go on with: a run that trained one, or a folder of PEFT's")
    max_length: Annotated[int, Field(ge=8)] = 1024
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="left out: by the method")
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "inverse_sqrt", "warmup_stable_decay"
    ] = "cosine"
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optim: Literal["adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor"] = "adamw_torch"
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None = Field(default=None, description="noise on embeddings in training")
    effective_batch_size: Annotated[int, Field(ge=1)] = 8
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | None = Field(default=None, description="left out: the plan chooses")
    gradient_checkpointing: bool | None = Field(default=None, description="left out: the plan chooses")
    packing: bool = Field(default=False, description="rows end to end in one, without padding, where that is proved to change nothing")
    fsdp: bool = Field(default=False, description="processes that train together share the weights out, in place of each holding all")
    evaluations_per_epoch: Annotated[float, Field(gt=0)] = 1.0
    early_stopping_patience: Annotated[int, Field(ge=1)] = 3
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    metric_for_best_model: Literal["eval_loss", "right"] = "eval_loss"
    save_minutes: Annotated[float, Field(gt=0)] = 10.0
    report_to: list[ReportTo] = []
    seed: Annotated[int, Field(ge=0)] = 42
    attention: Attention | None = Field(
        default=None, description="what computes attention; left out: PyTorch's own, where the model has it"
    )
    compute_dtype: Dtype | None = Field(default=None, description="what is computed in; left out: by the device and the model")

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate: the recipe's, else the method's."""
        return self.learning_rate or (DPO_LEARNING_RATES if self.objective == "dpo" else PEAK_LEARNING_RATES)[self.method]

    @field_validator("method", mode="before")
    @classmethod
    def _is_no_objective(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() in get_args(Objective):
            raise ValueError(
                f"says which weights are trained ({', '.join(get_args(Method))}); what they learn is `training.objective: {value.lower()}`"
            )
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.packing and self.objective == "dpo":
            raise ValueError("packing: pairs of answers are not packed; leave it out")
        size = self.per_device_train_batch_size
        if size and self.effective_batch_size % size:
            raise ValueError(f"per_device_train_batch_size {size} does not divide effective_batch_size {self.effective_batch_size}")
        return self


class Dpo(Group):
    """Of TRL's DPOConfig, under its own names.

    Of its losses those that need no other setting, that micro-batches do not change (aot), and that prefer the chosen answer from
    the first step on (discopop begins with the other).
    """

    beta: Annotated[float, Field(gt=0)] = Field(default=0.1, description="how near to the reference it stays: the larger, the nearer")
    loss_type: Literal["sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"] = "sigmoid"


class Budget(Group):
    vram: str | None = Field(default=None, description="memory to plan for, in GiB; left out: the GPU found, else free RAM")

    gpu: str | None = Field(default=None, description="a card to plan for, by name")

    @field_validator("vram", mode="before", json_schema_input_type=str | float | None)
    @classmethod
    def _amount(cls, value: Any) -> Any:
        if value is not None:
            try:
                parse_vram(str(value))
            except RecipeError as error:
                raise ValueError(error.message) from None
        return None if value is None else str(value)


def modelfile_value(text: str) -> str:
    """A text as a Modelfile holds it. Raises ValueError with what it cannot hold.

    As Ollama's parser/parser.go reads it: nothing is unescaped; three quotes end a text only at the end of a line; what Go
    calls not printable is dropped without a word, apart from tabs and line ends.
    """
    dropped = next((c for c in text if not c.isprintable() and c not in "\t\r\n"), None)
    if dropped:
        raise ValueError(f"a Modelfile cannot hold the character U+{ord(dropped):04X}, Ollama drops it")
    if re.search(r'"""[ \t]*[\r\n]', text):
        raise ValueError('a Modelfile cannot hold """ at the end of a line')
    return f'"""{text}"""' if set(text) & set('"\r\n') or not text else f'"{text}"'


By = Literal["whole", "first_line", "last_line", "regex", "json", "labels"]
KEY_OF: dict[str, By] = {"pattern": "regex", "keys": "json", "labels": "labels"}  # the keys that are of one kind alone
ASKED_MEANWHILE = {"every", "rows"}  # keys that say when answers are scored in training, and nothing of how
MOST_REPEATED = 1_000_000  # the product of a pattern's {n}: repetitions inside each other are written out, in memory


class Evaluate(Group):
    """How an answer is held against the expected one. What each kind does stands in proof/score.py."""

    by: By = Field(default="whole", description="what of an answer must be right to count")
    pattern: str | None = Field(
        default=None, validate_default=True, description="by: regex; what its groups capture, where it matches first, is compared"
    )
    keys: list[str] | None = Field(default=None, validate_default=True, description="by: json; only these keys are compared")
    labels: list[str] | None = Field(default=None, validate_default=True, description="by: labels; one of them is said in each answer")
    every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="while training, ask validation rows at each, or each so many-th evaluation; 0: not at all"
    )
    rows: Annotated[int, Field(ge=1)] = Field(default=32, description="so many of them, the first")

    @field_validator("pattern", "keys", "labels")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        by, kind = info.data.get("by"), KEY_OF[str(info.field_name)]  # without `by`, that is the fault
        if by and value is not None and by != kind:
            raise ValueError(f"is of `by: {kind}`, and this is `by: {by}`")
        if by == kind and value is None and kind != "json":
            raise ValueError(f"is needed with `by: {kind}`")
        return value

    @field_validator("pattern")
    @classmethod
    def _captures(cls, value: str | None) -> str | None:
        if value is None:
            return None
        import regex  # the package, not Python's re: it can be told when to give up

        if math.prod(max(1, int(most[:20])) for most in re.findall(r"\{(?:\d*,)?(\d+)\}", value)) > MOST_REPEATED:
            raise ValueError("repeats too much, one {n} inside the other")
        try:
            with warnings.catch_warnings(action="ignore"):  # of what another version might read otherwise
                groups = regex.compile(value).groups
        except (regex.error, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise ValueError(f"is no regular expression: {str(error) or type(error).__name__} (got {SHORT.repr(value)})") from None
        if not groups:
            raise ValueError(f"captures nothing: put what is compared in ( ) (got {SHORT.repr(value)})")
        return value

    @field_validator("keys", "labels", mode="before", json_schema_input_type=list[str | int] | None)
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(name, bool) for name in value):
            raise ValueError('YAML reads yes, no, on and off as true and false: write them in quotes, as "yes"')
        return [str(name) if isinstance(name, int) else name for name in value] if isinstance(value, list) else value

    @field_validator("keys", "labels")
    @classmethod
    def _names(cls, value: list[str] | None) -> list[str] | None:
        names = value if value is None else [name.strip() for name in value]
        if names is None:
            return None
        if not names or not all(names):
            raise ValueError("names nothing" if not names else "one of them is empty")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice!r} stands there twice")
        return names

    @field_validator("labels")
    @classmethod
    def _several(cls, value: list[str] | None) -> list[str] | None:
        if value and len(value) < 2:
            raise ValueError("at least two are wanted: of one there is nothing to choose")
        return value


class Ship(Group):
    name: str = "my-model"
    quantization: str = Field(default="Q4_K_M", json_schema_extra={"enum": [SMALLEST, *QUANTIZATIONS]})
    max_loss_points: Annotated[float, Field(ge=0, le=100)] = 3.0
    keep: Annotated[float, Field(ge=0, le=100)] = Field(
        default=95.0, description="percent of what training gained on held-out answers, in loss a token, that the shipped file must keep"
    )
    rounding_kept: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of what training's 4 bits changed in the base that a QLoRA adapter's merge keeps"
    )
    transfer_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="train a QLoRA adapter on the 16-bit source, before it is merged into it, for at most so many steps"
    )
    closing_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="train norms, biases and scales of the shipped file for at most so many steps, towards the trained model; 0: never; "
        "without it, 60 where it otherwise loses too much",
    )
    bits_by_task: bool = Field(
        default=False, description="give tensors whose rounding costs this task's answers most more bits, for at most 3 % more bytes"
    )
    imatrix: bool = Field(default=False, description="measure on training rows and general text where llama-quantize must round least")
    adapter: bool = Field(default=False, description="also make the adapter a GGUF LoRA, to be served beside a GGUF of the base")
    test_rows: Annotated[int, Field(ge=1)] | None = Field(default=None, description="ask only so many held-out rows")
    record_rows: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="held-out rows that go into the record beside the shipped file, as token ids"
    )
    keep_source: bool = Field(
        default=False, description="fetch a hub model that the merge alone reads into the hub's cache, and not one file at a time"
    )
    allow_requantize: bool = Field(default=False, description="make another type of a GGUF that is quantised already")
    system: str | None = None
    num_ctx: Annotated[int, Field(ge=8)] = 4096
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 256

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not MODEL_NAME.fullmatch(value):
            raise ValueError("use letters, digits, dot, dash and underscore, with an optional :tag, each at most 80 characters")
        if value.lower().endswith((":cloud", "-cloud")) and ":" in value:
            raise ValueError("Ollama asks a model whose tag ends in `cloud` at ollama.com, and not here: take another tag")
        return value

    @field_validator("system")
    @classmethod
    def _system(cls, value: str | None) -> str | None:
        if value:
            modelfile_value(value)
        return value

    @field_validator("quantization")
    @classmethod
    def _quantization(cls, value: str) -> str:
        upper = value.upper()
        if value.lower() == SMALLEST:
            return SMALLEST
        if upper not in QUANTIZATIONS:
            near = difflib.get_close_matches(upper, QUANTIZATIONS, 1, cutoff=0.4)
            raise ValueError(
                f"unknown quantisation {value!r}"
                + (f"; did you mean {near[0]}?" if near else "")
                + f" (known: {SMALLEST}, {', '.join(QUANTIZATIONS)})"
            )
        return upper


class Tools(Group):
    llama_cpp_dir: str | None = Field(default=None, description="a llama.cpp checkout or folder of programs; before LLAMA_CPP_DIR and PATH")


class Recipe(Group):
    """All of one run. Paths are as written: relative ones are taken from the recipe's folder."""

    model: str
    trained: str | None = Field(
        default=None, description="what was trained with another tool and ships in place of a training: an adapter, a checkpoint or a GGUF"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model: only of authors you trust")
    data: Data = Data()
    training: Training = Training()
    lora: Lora = Lora()
    dpo: Dpo = Dpo()
    budget: Budget = Budget()
    evaluate: Evaluate = Evaluate()
    ship: Ship = Ship()
    tools: Tools = Tools()

    @model_validator(mode="after")
    def _counts_right_answers(self) -> Recipe:
        if self.training.metric_for_best_model == "right" and self.evaluate.every != 1:
            raise ValueError("training.metric_for_best_model: right needs the answers of each evaluation: set evaluate.every to 1")
        return self


# Of `lora`, what says what is trained: with all weights trained it contradicts, where a rank is only not used.
ADAPTERS_ALONE = ("use_dora", "modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern")
MOVED = {"ship.match": "evaluate.by"}  # keys of earlier recipes
GROUPS = [name for name, field in Recipe.model_fields.items() if isinstance(field.default, Group)]  # each may stand there without keys


def load_recipe(path: Path, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Read a recipe and apply overrides, each a dotted key and its value.

    Raises RecipeError that names every fault by its dotted key, with the nearest known name for a misspelt one.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [], 1)
        raise RecipeError(f"There is no recipe at {path}.", f"did you mean {near[0]}?" if near else "make one: ftkit init") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Cannot read {path}: {error}.", "make one: ftkit init") from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply.", "see docs/recipe.md for a whole recipe") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{path}{where}: not YAML: {getattr(error, 'problem', error)}.", "see docs/recipe.md for a whole recipe"
        ) from None
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path} holds no recipe: it must be a mapping with `model:`.", "make one: ftkit init")
    return make_recipe(overrides, loaded, str(path))


def make_recipe(overrides: Sequence[tuple[str, Any]], loaded: dict[str, Any] | None = None, name: str = "the settings") -> Recipe:
    """The recipe of a loaded mapping (or of nothing but defaults) with overrides applied. Raises RecipeError."""
    loaded = {key: {} if value is None and key in GROUPS else value for key, value in (loaded or {}).items()}
    for key, value in overrides:
        _set(loaded, key, value)
    try:
        recipe = Recipe.model_validate(loaded)
    except ValidationError as error:
        faults = "\n".join("  " + _fault(entry) for entry in error.errors())
        raise RecipeError(f"{name} has faults:\n{faults}", "see docs/recipe.md for every key") from None
    lora = recipe.lora
    if recipe.training.method == "full" and (unused := [key for key in ADAPTERS_ALONE if getattr(lora, key) != getattr(Lora(), key)]):
        raise RecipeError(f"lora.{unused[0]}: is of adapters, and training.method is full.", "--set training.method=lora, or leave it out")
    return recipe


def parse_override(text: str) -> tuple[str, Any]:
    """`training.max_length=512` → ("training.max_length", 512); the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"`--set {text}` is not KEY=VALUE.", "as in --set training.max_length=512")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"`--set {text[:80]}`: the value is not YAML.", "put quotes around it") from None


def _set(loaded: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(loaded.setdefault(parent, {}), dict):
            raise RecipeError(f"`{key}`: {parent} is no group of keys in the recipe.", "see docs/recipe.md for every key")
        loaded = loaded[parent]
    loaded[last] = value


def _fault(entry: Any) -> str:
    keys = [str(part) for part in entry["loc"]]
    dotted = ".".join(keys) or "(recipe)"
    if entry["type"] == "extra_forbidden" and dotted in MOVED:
        return f"{dotted}: unknown key; it is {MOVED[dotted]} now"
    if entry["type"] == "extra_forbidden":
        part: type[BaseModel] = Recipe
        for key in keys[:-1]:
            annotation = part.model_fields[key].annotation if key in part.model_fields else None
            part = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else part
        near = difflib.get_close_matches(keys[-1], part.model_fields, 1)
        return f"{dotted}: unknown key" + (f"; did you mean {near[0]}?" if near else f" (known: {', '.join(part.model_fields)})")
    if entry["type"] == "missing":
        return f"{dotted}: missing"
    message = entry["msg"].removeprefix("Value error, ")
    if not keys and entry["type"] == "value_error":  # of keys in several groups, which it names itself
        return str(message)
    return f"{dotted}: {message}" + ("" if entry["type"] == "value_error" else f" (got {SHORT.repr(entry['input'])})")

"""The step `adopt`: what was trained with another tool enters the line, in the place of a training, and is looked through first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftkit.data.template import begins_with_bos, is_dated, render, token_ids
from ftkit.engines import hf, llamacpp
from ftkit.errors import ModelError, RecipeError
from ftkit.files import link
from ftkit.gguf.types import gguf_model
from ftkit.line.job import Job, base_folder, computes_on, config_folder, tokenizer_of
from ftkit.line.step import Made, Step
from ftkit.line.train import TRAIN
from ftkit.machine import device
from ftkit.memory.model import Skeleton, load_config
from ftkit.memory.sizes import DTYPE_BYTES
from ftkit.merge.deltas import changes_of
from ftkit.model.adapter import embedding_rows
from ftkit.model.dequantise import rebuilt_tokenizer
from ftkit.model.given import ADAPTER_WEIGHTS, UNQUANTISED, Given, Kind, config_of, four_bits, quantised_by, tokenizer_files
from ftkit.model.locate import locate
from ftkit.model.open import open_config, open_shards, open_weights
from ftkit.model.source import ADAPTER_CONFIG, weight_files
from ftkit.plan.cost import Sizes
from ftkit.proof.compare import same_ids
from ftkit.proof.probes import HARD_TEXTS

ADAPTER, MODEL, TOKENIZER = "adapter", "model", "tokenizer"
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")  # what a GGUF says that ends an answer


@dataclass(frozen=True)
class Adopted:
    """What came, and as what it was named."""

    kind: Kind
    named: str


def refuse(job: Job) -> None:
    """Raise RecipeError for what cannot be made of what was given: at once, since nothing has to be read for it."""
    given, ship = job.given, job.recipe.ship
    if not given:
        return
    if given.kind == "gguf" and given.quantization not in (*UNQUANTISED, ship.quantization) and not ship.allow_requantize:
        raise RecipeError(
            f"{given.path.name} is {given.quantization} already: {ship.quantization} made of it is rounded twice, and worse than "
            f"{ship.quantization} of the 16-bit model.",
            f"ship the 16-bit file or folder; or this as it is: --set ship.quantization={given.quantization}; or, knowing that: "
            "--set ship.allow_requantize=true",
        )
    nearer = "closing_steps" if ship.closing_steps else "bits_by_task" if ship.bits_by_task else None
    if nearer and given.kind == "gguf":
        raise RecipeError(
            f"ship.{nearer}: a GGUF has no trained model beside it to be brought nearer to.", "ship the folder that it was made of"
        )
    for key in ("transfer_steps", "bits_by_task", "closing_steps"):
        if getattr(ship, key) and not {"train", "test"} <= job.data.keys():
            raise RecipeError(f"ship.{key}: it learns from some rows, and is judged on others.", "name both: --data FILE --test FILE")


def _make(job: Job, folder: Path) -> Adopted:
    given = job.given
    assert given
    named = given.hub.reference if given.hub else given.path.name
    job.reporter.step(f"looking through {named}: {WORDS[given.kind]}")
    ENTER[given.kind](job, given, folder)
    tokenizer = _tokenizer(job, folder)
    render(tokenizer, [{"role": "user", "content": "x"}], ask=True)  # a model without a template is refused
    if is_dated(tokenizer.chat_template):
        job.reporter.note(f"the chat template writes today's date: in the shipped file it is {job.recipe.data.date} (data.date)")
    return Adopted(given.kind, str(job.recipe.trained))


def _adapter(job: Job, given: Given, folder: Path) -> None:
    """Its own files are copied, since they are small. Whether it can be merged into the base is found here, not after asking."""
    base = config_folder(job)
    if (method := quantised_by(config_of(base))) is not None:
        raise four_bits(str(job.recipe.trained), job.source.reference, f"is quantised ({method})")
    shapes = {name: shape for shard in open_shards(job.source, job.reporter) for name, shape in shard.shapes.items()}
    adapter = folder / ADAPTER
    adapter.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(given.path / name, adapter / name)
    if given.on_four_bits:
        job.reporter.note(f"it was trained on {given.base}, in 4 bits: so it is asked, on {job.source.reference} in 4 bits")
    _lay_out_tokenizer(job, given.path, base, folder / TOKENIZER)
    try:
        changes_of(base, adapter, shapes, trust_remote_code=job.recipe.trust_remote_code)
    except ModelError as error:
        raise ModelError(error.message, f"{error.hint}; for another base: --base REF") from None


def _lay_out_tokenizer(job: Job, adapter: Path, base: Path, target: Path) -> None:
    """The tokenizer that training used: what was saved beside the adapter counts before the base's, its chat template too."""
    own, theirs = tokenizer_files(adapter), tokenizer_files(base)
    own_template, base_template = _template(own), _template(theirs)
    target.mkdir()
    kept = [file for file in theirs if not (own_template and file.name.startswith("chat_template"))]
    for file in (base / "config.json", *kept, *own):
        shutil.copyfile(file, target / file.name)
    if own and not own_template and base_template:  # in a file that the adapter's own took the place of
        config = target / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "chat_template": base_template}), encoding="utf-8")
    if not own:
        return
    if own_template and own_template != base_template:
        job.reporter.note("the chat template saved beside the adapter is another than its base's: it counts, as training used it")
    vocabulary, known = tokenizer_of(job, target).get_vocab(), tokenizer_of(job, base).get_vocab() if theirs else {}
    added = {token: number for token, number in vocabulary.items() if token not in known}
    if added:
        _refuse_tokens_without_rows(adapter, base, max(added, key=lambda token: added[token]), max(added.values()))
        job.reporter.note(f"the tokenizer saved beside the adapter has {len(added)} tokens that its base has not: it counts")


def _template(files: list[Path]) -> Any:
    """The chat template among a tokenizer's files, in whichever form; None without one."""
    by_name = {file.name: file for file in files}
    if file := by_name.get("chat_template.jinja"):
        return file.read_text(encoding="utf-8")
    if file := by_name.get("tokenizer_config.json"):
        try:
            return json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError):
            return None  # which loading will say
    return None


def _refuse_tokens_without_rows(adapter: Path, base: Path, token: str, number: int) -> None:
    """Raise ModelError for a token that training added, and that neither the base nor the adapter has an embedding of."""
    config = config_of(base)
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0
    if number >= max(rows, embedding_rows(adapter)):
        raise ModelError(
            f"The tokenizer beside the adapter has the token {token} with id {number:,}; the base's embedding has {rows:,} rows, and the "
            "adapter brings none for it.",
            "take the token out of the files; or train with modules_to_save=['embed_tokens', 'lm_head'], and ship that",
        )


def _checkpoint(job: Job, given: Given, folder: Path) -> None:
    """Its weights stay where they are, and are linked."""
    source = open_weights(given.hub or locate(str(given.path), given.path), job.reporter).folder
    assert source
    lay_out(source, folder / MODEL, with_code=job.recipe.trust_remote_code)
    if not tokenizer_files(source):
        if not job.has_base:
            raise ModelError(
                f"{given.path} has no tokenizer.", "name the model that it was trained from, whose tokenizer it then has: --base REF"
            )
        job.reporter.note(f"{given.path.name} has no tokenizer: it gets that of {job.source.reference}")
        for file in tokenizer_files(config_folder(job)):
            shutil.copyfile(file, folder / MODEL / file.name)


def lay_out(model: Path, target: Path, *, with_code: bool) -> None:
    """A model's folder once more, its weights linked, all else copied."""
    target.mkdir()
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt", *([".py"] if with_code else [])) and file.is_file():
            shutil.copyfile(file, target / file.name)
    for file in weight_files(model):
        link(file, target / file.name)


def _gguf(job: Job, given: Given, folder: Path) -> None:
    """Of the file its tokenizer, as transformers rebuilds it and llama.cpp confirms; the file itself is linked where it is converted to."""
    tokenizer, fields = rebuilt_tokenizer(given.path)
    ends = list(dict.fromkeys(int(fields[name].contents()) for name in ENDS if name in fields))
    tokenizer.add_tokens([str(token) for token in tokenizer.convert_ids_to_tokens(ends)], special_tokens=True)  # of whichever type there
    with llamacpp.load(given.path, 64) as engine:
        texts = ((text, token_ids(tokenizer, text), engine.tokenize(text)) for text in HARD_TEXTS)
        if (check := same_ids("token ids", texts, "hard texts")).outcome == "failed":
            raise ModelError(
                f"transformers rebuilds the tokenizer of {given.path.name} otherwise than llama.cpp reads it, so that nothing could be "
                f"proved of it: {check.detail}",
                "ship the folder that the file was converted from: ftkit ship FOLDER",
            )
        adds_bos = engine.tokenize("x", begins=True) != engine.tokenize("x")
    if adds_bos and tokenizer.chat_template and not begins_with_bos(tokenizer):
        tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template  # what is read of it stays the same
    tokenizer.save_pretrained(folder / MODEL)
    (folder / MODEL / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}) + "\n", encoding="utf-8")


ENTER: dict[Kind, Callable[[Job, Given, Path], None]] = {"adapter": _adapter, "checkpoint": _checkpoint, "gguf": _gguf}
WORDS: dict[Kind, str] = {"adapter": "an adapter", "checkpoint": "a whole model", "gguf": "a GGUF"}


def _tokenizer(job: Job, folder: Path) -> Any:
    return tokenizer_of(job, next(path for path in (folder / TOKENIZER, folder / MODEL) if path.is_dir()), base=True)


def sizes(job: Job) -> Sizes | None:
    """What the costs of the later steps follow from, by the config and the adapter's file alone.

    None of a GGUF, and where the model cannot be counted: then nothing is said of costs.
    """
    given, method = job.given, job.recipe.training.method
    if not given or given.kind == "gguf":
        return None
    try:
        folder = given.path if given.kind == "checkpoint" else open_config(job.source, job.reporter).folder
        assert folder
        config = load_config(folder, trust_remote_code=job.recipe.trust_remote_code)
        (cuda, dtype), trust = computes_on(job, config.model_type), job.recipe.trust_remote_code
        skeleton = Skeleton(config, dtype, trust_remote_code=trust)
    except ModelError:
        return None
    counted = skeleton.count("full", job.recipe.lora, job.recipe.training.optim, dtype)
    if given.kind == "adapter":
        size = (given.path / ADAPTER_WEIGHTS).stat().st_size
        weights = sum(part for _, part in skeleton.storages(method, dtype, "float32", True))
        held: dict[str, Any] = {
            "trainable_parameters": size // 4,
            "written_parameters": size // 4,
            "adapter_bytes": size,
            "weights_bytes": weights,
        }
        counted = replace(counted, method=method, **held)
    gguf = gguf_model({tensor.name: tensor.shape for tensor in skeleton.tensors}, config)
    vram_bytes = job.device.total_bytes if cuda else None
    return Sizes(
        *(gguf, counted, job.recipe.ship, job.recipe.training.max_length, DTYPE_BYTES[dtype], vram_bytes, 0),
        ram_bytes=device.processor().total_bytes,
        closing_bytes=2 if dtype == "bfloat16" else 4,
    )


def trained_tokenizer(job: Job, trained: Made[Any]) -> Any:
    """The tokenizer that was trained with, its template as the recipe has it."""
    return _tokenizer(job, trained.folder) if job.given else tokenizer_of(job, config_folder(job), base=True)


def trained_model(job: Job, trained: Made[Any]) -> Any:
    """The trained model as training had it, so that no more memory is needed: an adapter on the base that it was trained on."""
    recipe, full = job.recipe, job.recipe.training.method == "full"
    folder = trained.folder / MODEL if full else base_folder(job)
    cuda, dtype = computes_on(job, hf.model_type(folder))
    how: dict[str, Any] = {"dtype": dtype, "cuda": cuda, "trust_remote_code": recipe.trust_remote_code}
    if full:
        return hf.load_model(folder, None, **how)
    return hf.load_adapted(folder, trained.folder / ADAPTER, recipe.training.method, **how)


def _follows_from(job: Job) -> list[Any]:
    given, recipe = job.given, job.recipe
    assert given
    return [
        given.fingerprint,
        job.source.fingerprint if given.kind == "adapter" else None,  # of another kind a base is only compared with
        recipe.data.model_dump(include={"thinking", "system_in_question", "date"}),
        job.chat_template,
        recipe.training.method,
        recipe.trust_remote_code,
    ]


ADOPT = Step(
    name="adopt",
    does="what was trained elsewhere, looked through",
    command="ftkit ship",
    result=Adopted,
    follows_from=_follows_from,
    make=_make,
    applies=lambda job: job.given is not None,
)


def trained_by(job: Job) -> Step[Any]:
    """The step that the trained model comes from."""
    return ADOPT if job.given else TRAIN

"""The GGUF files that are made of a merged model: what they say of themselves, and what is refused when they are read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import convertible
import pytest
import tiny
import torch
from conftest import conversations
from hub import Hub

from ftkit import __version__
from ftkit.errors import ModelError, RunError
from ftkit.gguf.files import Wanted, read_back
from ftkit.line.gguf import GGUF, Converted, corrections_of, wanted_of
from ftkit.line.job import Job, open_job, tokenizer_of
from ftkit.line.merge import MERGE, MODEL
from ftkit.line.plan import training_inputs
from ftkit.line.step import Made, Step, ensure
from ftkit.line.strength import strength
from ftkit.model.card import in_gguf, write_card
from ftkit.model.locate import locate
from ftkit.model.source import open_gguf
from ftkit.run import Run

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
LICENCE = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://e.org/terms\n---\n# Tiny\n"


def lay_out(folder: Path) -> None:
    convertible.make("llama", folder / "base", chat_template="<bos>" + convertible.CHAT)
    (folder / "base" / "README.md").write_text(LICENCE, encoding="utf-8")
    tiny.make_adapter(folder / "base", folder / "adapter")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()), encoding="utf-8")
    (folder / "recipe.yaml").write_text("model: base\ntraining: {method: lora}\nship: {name: tiny}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made[Converted], Wanted]:
    """The step, and what its files must say."""
    folder = tmp_path_factory.mktemp("made")
    lay_out(folder)
    job = tiny.trained_job(folder)
    with job.run:
        made, merged = ensure(job, GGUF), ensure(job, MERGE)
    model = merged.folder / MODEL
    tokenizer = tokenizer_of(job, model)
    path = made.folder / made.result.files[0].path
    return made, wanted_of(job, model, tokenizer, merged.result.stops, corrections_of(path, tokenizer, merged.result.stops))


def says(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in open_gguf(path).fields.items() if name.startswith("general.")}


def test_a_file_says_its_base_model_its_licence_and_its_ftkit(converted: tuple[Made[Converted], Wanted]) -> None:
    made, _ = converted
    for file in made.result.files:
        found = says(made.folder / file.path)
        assert found["general.base_model.0.name"] == "base"
        assert (found["general.license"], found["general.license.name"]) == ("other", "tiny")
        assert found["general.license.link"] == "https://e.org/terms"
        assert found["general.description"] == f"Made with ftkit {__version__}"


def test_a_hub_model_is_named_with_its_organization_and_address(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/Tiny-1b", {"config.json": b"{}", "README.md": LICENCE.encode()})
    write_card(tmp_path, locate("org/Tiny-1b", tmp_path), has_base=True)
    assert in_gguf(tmp_path) == {
        "general.license": "other",
        "general.license.name": "tiny",
        "general.license.link": "https://e.org/terms",
        "general.description": f"Made with ftkit {__version__}",
        "general.base_model.0.name": "Tiny-1b",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Tiny-1b",
    }


def rewrite(path: Path, architecture: str = "llama", without: str = "", **changes: Any) -> None:
    """The file with other metadata, keys with __ in place of dots."""
    from gguf import GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    kinds = {int: GGUFValueType.UINT32, str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    new = {key.replace("__", "."): MetadataDetails(kinds[type(value)], value) for key, value in changes.items()}
    reader, partial = open_gguf(path), path.with_suffix(".partial")
    copy_with_new_metadata(reader, GGUFWriter(partial, arch=architecture), new, [without] if without else [])
    partial.replace(path)


def tokens(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    field = open_gguf(path).get_field("tokenizer.ggml.tokens")
    assert field
    rewrite(path, tokenizer__ggml__tokens=change(field.contents()))


SABOTAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "architecture": (lambda path: rewrite(path, "qwen2"), "is of the architecture 'qwen2', and says nothing of it"),
    "context length": (lambda path: rewrite(path, llama__context_length=1024), "has a context length of 1024, the model's config 512"),
    "a token less": (lambda path: tokens(path, lambda words: words[:-1]), r"has \d+ tokens, the model's tokenizer \d+"),
    "a token more": (lambda path: tokens(path, lambda words: [*words, "more"]), r"has \d+ tokens, and \d+ rows of its embedding"),
    "template": (lambda path: rewrite(path, tokenizer__chat_template="{{ 1 }}"), "does not carry the model's chat template"),
    "no template": (lambda path: rewrite(path, without="tokenizer.chat_template"), "does not carry the model's chat template"),
    "end of sequence": (lambda path: rewrite(path, tokenizer__ggml__eos_token_id=9), "ends a sequence at the token 9, the model at"),
    "base model": (
        lambda path: rewrite(path, general__base_model__0__name="b"),
        r"says general\.base_model\.0\.name 'b' in place of 'base'",
    ),
    "licence": (lambda path: rewrite(path, general__license="mit"), r"says general\.license 'mit' in place of 'other'"),
    "no licence": (lambda path: rewrite(path, without="general.license"), r"says general\.license None in place of 'other'"),
    "ftkit": (lambda path: rewrite(path, general__description="x"), r"says general\.description 'x' in place of 'Made with ftkit"),
}


@pytest.mark.parametrize(("change", "words"), SABOTAGE.values(), ids=SABOTAGE)
def test_what_a_file_says_otherwise_is_refused(
    change: Callable[[Path], None], words: str, converted: tuple[Made[Converted], Wanted], tmp_path: Path
) -> None:
    made, wanted = converted
    path = Path(shutil.copy(made.folder / made.result.files[0].path, tmp_path / "tiny.gguf"))
    assert read_back(path, "F16", wanted).tensors > 1
    change(path)
    with pytest.raises(ModelError, match=words) as caught:
        read_back(path, "F16", wanted)
    assert "ftkit ship" in str(caught.value.hint)


def test_a_token_without_a_row_of_the_embedding_is_not_missed(converted: tuple[Made[Converted], Wanted]) -> None:
    """As Gemma 3 1B's tokenizer has one for pictures, which the converter leaves out."""
    made, wanted = converted
    path = made.folder / made.result.files[0].path
    rows = next(int(tensor.shape[1]) for tensor in open_gguf(path).tensors if tensor.name == "token_embd.weight")
    assert read_back(path, "F16", replace(wanted, tokens=rows + 1)).tensors


def test_another_end_of_turn_is_refused(converted: tuple[Made[Converted], Wanted], tmp_path: Path) -> None:
    made, wanted = converted
    path = Path(shutil.copy(made.folder / made.result.files[0].path, tmp_path / "tiny.gguf"))
    rewrite(path, tokenizer__ggml__eot_token_id=9)
    with pytest.raises(ModelError, match="ends a turn at the token 9, the model at 5"):
        read_back(path, "F16", replace(wanted, eot_token_id=5))


def test_a_merge_into_another_base_of_the_same_shape_is_not_what_was_trained(tmp_path: Path) -> None:
    """Of two models with one config and one tokenizer: merged and converted by ftkit, and held against the base that it names."""
    from safetensors.torch import load_file, save_file

    lay_out(tmp_path)
    job = tiny.trained_job(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    right = load_file(weights)
    for name, times in {"right": 0.0, "tuned further": 0.02}.items():
        torch.manual_seed(1)
        changed = {
            name: tensor + (times * tensor.float().std() * torch.randn(tensor.shape)).to(tensor.dtype) for name, tensor in right.items()
        }
        save_file(changed, weights, {"format": "pt"})
        with replace(job, run=Run(tmp_path / name)).run as run:
            run.ensure("train", training_inputs(job), lambda made: shutil.copytree(tmp_path / "adapter", made / "adapter") and tiny.TRAINED)
            made = ensure(replace(job, run=run), GGUF)
            save_file(right, weights, {"format": "pt"})
            path = made.folder / made.result.files[0].path
            _, check = strength(replace(job, run=run), path, path)
        assert check.outcome == ("passed" if name == "right" else "failed"), check.detail
        assert name == "right" or "as if it were merged into another base" in check.detail


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose model is merged."""
    folder = tmp_path_factory.mktemp("whole")
    lay_out(folder)
    job = tiny.trained_job(folder)
    with job.run:
        ensure(job, MERGE)
    return folder


@pytest.fixture
def here(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "here"))


def cannot_write(job: Job, step: Step[Any], words: str) -> None:
    """The step ends with where, why and what to do, and leaves nothing."""
    with job.run, pytest.raises(RunError, match=words) as caught:
        ensure(job, step)
    assert "--run-dir" in str(caught.value.hint)
    assert [path.name for path in job.run.folder.iterdir() if step.name in path.name] == []


@pytest.mark.parametrize("size_bytes", [20_000, 300_000])
def test_a_disk_that_is_full_while_it_converts(size_bytes: int, here: Path, small_files: Any) -> None:
    job = open_job(here)
    with small_files(size_bytes):
        cannot_write(job, GGUF, f"`gguf` cannot write to {job.run.folder}: ")
    with job.run:
        assert ensure(job, GGUF).fresh  # with space it is made

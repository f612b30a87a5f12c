"""What another tool trained is looked through before anything long is done, with the tokenizer that it was trained with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from hub import Hub, read_folder

from ftkit.errors import DoesNotFitError, FtkitError, ModelError
from ftkit.line import line
from ftkit.line.adopt import TOKENIZER, trained_tokenizer
from ftkit.line.entry import enter
from ftkit.line.step import Made
from ftkit.progress import SILENT

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
OTHER = tiny.CHATML.replace("assistant\\n", "assistant:\\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with more rows than its tokenizer has tokens, and an adapter on it."""
    folder = tmp_path_factory.mktemp("made")
    tiny.make_adapter(tiny.make_model(folder / "base"), folder / "lora")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "lora" / "adapter_config.json"  # PEFT wrote where the base was
    config.write_text(config.read_text(encoding="utf-8").replace(str(made), str(tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adopted(what: str, **settings: Any) -> tuple[Any, Made[Any], Any]:
    """(job, the finished step, its tokenizer)"""
    job, _ = enter(what, [(key.replace("__", "."), value) for key, value in settings.items()], run_dir=None, reporter=SILENT)
    with job.run:
        done = line.adopt(job)
    return job, done, trained_tokenizer(job, done)


def save_tokenizer(here: Path, target: Path, template: str | None = None, token: str | None = None) -> None:
    """As tools save it beside an adapter."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(here / "base")
    tokenizer.chat_template = template
    if token:
        tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(target)


def test_an_adapter_without_a_tokenizer_has_its_bases(here: Path) -> None:
    _, done, tokenizer = adopted("lora")
    assert tokenizer.chat_template == tiny.CHATML
    assert {path.name for path in (done.folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_tokenizer_beside_an_adapter_counts(here: Path) -> None:
    save_tokenizer(here, here / "lora", OTHER, "<|new|>")
    config = json.loads((here / "lora" / "tokenizer_config.json").read_text(encoding="utf-8"))
    (here / "lora" / "chat_template.jinja").unlink()  # older libraries keep it in the config, and the base has a file
    (here / "lora" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": OTHER}), encoding="utf-8")
    assert (here / "base" / "chat_template.jinja").is_file()
    _, done, tokenizer = adopted("lora")
    assert tokenizer.chat_template == OTHER
    assert tokenizer.convert_tokens_to_ids("<|new|>") == 259
    assert not (done.folder / TOKENIZER / "model.safetensors").exists()


def test_a_tokenizer_saved_without_a_template_has_its_bases(here: Path) -> None:
    save_tokenizer(here, here / "lora", None)
    (here / "base" / "chat_template.jinja").unlink()
    config = here / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "chat_template": OTHER}), encoding="utf-8")
    _, _, tokenizer = adopted("lora")
    assert tokenizer.chat_template == OTHER


def test_the_weights_of_a_checkpoint_are_linked(here: Path) -> None:
    _, done, tokenizer = adopted("base")
    weights = done.folder / "model" / "model.safetensors"
    assert weights.samefile(here / "base" / "model.safetensors")
    assert not (done.folder / "model" / "config.json").samefile(here / "base" / "config.json")
    assert tokenizer.chat_template == tiny.CHATML


def test_from_the_hub_each_enters_as_from_its_folder(here: Path, hub: Hub) -> None:
    hub.add("org/base", read_folder(here / "base"))
    config = here / "lora" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace(str(here / "base"), "org/base"), encoding="utf-8")
    hub.add("org/lora", read_folder(here / "lora"))
    job, done, tokenizer = adopted("org/lora@main")
    assert (job.run.folder, job.has_base) == (here / "runs" / "lora", True)
    weights = Path("adapter_model.safetensors")
    assert (done.folder / "adapter" / weights).read_bytes() == (here / "lora" / weights).read_bytes()
    assert tokenizer.chat_template == tiny.CHATML
    job, done, _ = adopted("org/base")
    assert (job.run.folder, job.has_base) == (here / "runs" / "base", False)
    assert (done.folder / "model" / "model.safetensors").read_bytes() == (here / "base" / "model.safetensors").read_bytes()
    again, _ = enter("org/lora@main", [], run_dir=None, reporter=SILENT)
    assert again.run.folder == here / "runs" / "lora"


def test_a_checkpoint_without_a_tokenizer_has_its_bases(here: Path) -> None:
    shutil.copytree(here / "base", here / "whole", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    with pytest.raises(ModelError, match="has no tokenizer") as refused:
        adopted("whole")
    assert "--base REF" in str(refused.value.hint)
    _, _, tokenizer = adopted("whole", model="base")
    assert tokenizer.chat_template == tiny.CHATML


def spoil(here: Path, case: str) -> dict[str, Any]:
    if case == "other shapes":
        tiny.make_model(here / "other", hidden_size=64)
        return {"model": "other"}
    if case == "no template":
        (here / "base" / "chat_template.jinja").unlink()
    elif case == "token without a row":
        save_tokenizer(here, here / "lora", tiny.CHATML, "<|new|>")
        config = json.loads((here / "base" / "config.json").read_text(encoding="utf-8"))
        (here / "base" / "config.json").write_text(json.dumps({**config, "vocab_size": 259}), encoding="utf-8")
    elif case == "cut short":
        weights = here / "lora" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "not merged":
        config = json.loads((here / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
        (here / "lora" / "adapter_config.json").write_text(json.dumps({**config, "tuned_by": 1}), encoding="utf-8")
    return {}


@pytest.mark.parametrize(
    ("case", "says", "hint"),
    [
        ("other shapes", "the base wants", "--base REF"),
        ("no template", "has no chat template", "--set data.template="),
        ("token without a row", "<|new|> with id 259", "modules_to_save"),
        ("cut short", "cannot be read", "again"),
        ("not merged", "tuned_by=1", "PEFT"),
    ],
)
def test_it_is_refused_before_anything_is_asked(here: Path, case: str, says: str, hint: str) -> None:
    settings = spoil(here, case)
    with pytest.raises(FtkitError) as refused:
        adopted("lora", **settings)
    assert says in refused.value.message
    assert hint in str(refused.value.hint)
    run = here / "runs" / "lora"
    assert not [path for path in run.iterdir() if path.is_dir()]  # nothing under a final name, and nothing left behind


def test_data_template_gives_one(here: Path, write_rows: Callable[[Path, list[Any]], Path]) -> None:
    (here / "base" / "chat_template.jinja").unlink()
    _, _, tokenizer = adopted("lora", data__template="chatml")
    assert "<|im_start|>" in tokenizer.chat_template


def test_what_the_later_steps_cost_is_known_before_they_are_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {}
    for what in ("lora", "base"):
        job, _ = enter(what, [], run_dir=None, reporter=SILENT)
        costs[what] = {cost.name: cost for state in line.states(job) for cost in state.costs}
    adapter, model = here / "lora" / "adapter_model.safetensors", here / "base" / "model.safetensors"
    written = costs["lora"]["merge"]
    assert abs(written.disk_bytes - model.stat().st_size) < 1 << 13  # but for the header: the base is in 16 bits
    assert written.read_bytes - written.disk_bytes == adapter.stat().st_size // 4 * 4
    assert "copy the trained model" not in costs["base"]  # it is linked
    assert "convert to F16" in costs["base"]
    monkeypatch.setattr("ftkit.line.shortage.shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 10))
    job, _ = enter("lora", [], run_dir=None, reporter=SILENT)
    with job.run, pytest.raises(DoesNotFitError, match=r"1\.0 KiB are free"):
        line.ship(job, use_ollama=False)
    assert not list(job.run.folder.glob("*-*"))

"""An adapter that PEFT wrote, a merged model and a GGUF go through the whole line, down to llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convertible
import pytest
import tiny
from click.testing import Result
from conftest import conversations

from ftkit.gguf.files import template_in
from ftkit.line import line
from ftkit.line.entry import enter
from ftkit.model.source import open_gguf
from ftkit.progress import SILENT

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

CHAT = (
    "{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)
BASES, OWN = CHAT.replace("END", "'<turn|>'"), CHAT.replace("END", "'<|done|>'")
BEHAVIOUR = ("answers", "gain kept", "distance from the trained model")
SETTINGS = {"ship.max_new_tokens": 4, "ship.num_ctx": 512, "ship.quantization": "Q8_0", "ship.keep": 90}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter on it that ships without rows, whose tokenizer has a token and a template of its own, and rows."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("made")
    convertible.make("llama", folder / "base", spare_rows=1)  # for one token more
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = BASES
    tokenizer.save_pretrained(folder / "base")
    tiny.make_adapter(folder / "base", folder / "lora")
    tokenizer.chat_template = OWN
    tokenizer.add_tokens(["<|done|>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "lora")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()), encoding="utf-8")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def ship(what: str, **settings: Any) -> line.Shipped:
    """What `ftkit ship` does, but for the screen."""
    given = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    job, recipe = enter(what, list(given.items()), run_dir=None, reporter=SILENT)
    with job.run:
        if recipe:
            line.adopt(job)
            recipe.write()
        return line.ship(job, use_ollama=False)


def outcomes(shipped: line.Shipped) -> dict[str, str]:
    return {check.name: check.outcome for check in shipped.checks if not check.name.startswith("prompts that hold")}


def made_files(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in (".gguf", ".safetensors")}


def test_an_adapter_ships_unlooked_at_and_is_proven_once_rows_are_given(here: Path, ftkit: Callable[..., Result]) -> None:
    shipped, run = ship("lora"), here / "runs" / "lora"
    found = outcomes(shipped)
    assert {found.pop(name) for name in (*BEHAVIOUR, "training ids")} == {"not made"}
    assert set(found.values()) == {"passed"}
    assert all("--data FILE" in check.detail for check in shipped.checks if check.name in BEHAVIOUR)
    assert template_in(shipped.gguf) == OWN  # as training had it, not as its base has
    assert "<|done|>" in open_gguf(shipped.gguf).fields["tokenizer.ggml.tokens"].contents()
    assert 'PARAMETER stop "<|done|>"' in shipped.modelfile.read_text(encoding="utf-8")
    files = made_files(run)
    proven = ship("lora", data__train="rows.jsonl")
    found = outcomes(proven)
    assert found.pop("answers") == "not made"  # nobody taught it anything
    found.pop("gain kept")
    assert set(found.values()) == {"passed"}
    assert set(proven.forms) == {"before", "trained", "merged", "Q8_0"}
    assert made_files(run) == files  # neither merged nor converted again
    assert not ship("lora", data__train="rows.jsonl").fresh
    assert not ship("runs/lora", data__train="rows.jsonl").fresh
    steps = json.loads(ftkit("status", "runs/lora", "--json").stdout)["steps"]
    assert [name for name, step in steps.items() if step["finished"]] == ["adopt", "ask", "merge", "gguf", "reask", "prove"]
    assert "Next: ftkit ship runs/lora --ollama" in ftkit("status", "runs/lora").stdout
    assert ftkit("chat", "runs/lora", "hello", "--max-new-tokens", "2").exit_code == 0
    assert ftkit("clean", "runs/lora", "--yes").exit_code == 0
    assert not ship("lora", data__train="rows.jsonl").fresh


def test_an_adapter_of_four_bits_is_asked_on_them_and_closed_towards_that(here: Path) -> None:
    on_16 = ship("lora", data__train="rows.jsonl")
    shutil.copytree(here / "lora", here / "unsloth")
    config = json.loads((here / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    four = {**config, "base_model_name_or_path": "unsloth/tiny-bnb-4bit"}
    (here / "unsloth" / "adapter_config.json").write_text(json.dumps(four), encoding="utf-8")
    write = {"data.train": "rows.jsonl", "data.test": "rows.jsonl", "ship.closing_steps": 2, "ship.keep": 0}
    shipped = ship("unsloth", model="base", **write)
    assert shipped.forms["before"].loss != on_16.forms["before"].loss  # the base as it was trained on
    assert shipped.merged_onto == "the 16-bit source"
    assert shipped.closed
    assert shipped.closed.vectors == 13  # two norms a layer, and the last
    assert "failed" not in outcomes(shipped).values()
    assert not ship("unsloth", **write).fresh


def test_a_merged_model_is_linked_converted_and_compared_with_its_base(here: Path) -> None:
    ship("lora")
    (merged,) = here.glob("runs/lora/merge-*/model")
    shipped = ship(str(merged), ship__name="merged", model="base", data__test="rows.jsonl")
    found = outcomes(shipped)
    assert found.pop("answers") == "not made"
    found.pop("gain kept")
    assert set(found.values()) == {"passed"}
    assert all(path.samefile(merged / path.name) for path in here.glob("runs/merged/*/model/*.safetensors"))
    alone = ship(str(merged), ship__name="merged", data__test="rows.jsonl", model=str(merged))
    assert {outcomes(alone)[name] for name in BEHAVIOUR} == {"not made"}
    assert "--base REF" in next(check.detail for check in alone.checks if check.name == BEHAVIOUR[2])
    assert alone.forms["Q8_0"].divergence is not None


def test_a_gguf_is_quantised_and_compared_with_itself_and_its_base(here: Path) -> None:
    ship("lora")
    (f16,) = here.glob("runs/lora/gguf-*/*-F16.gguf")
    given = f16.rename(here / "given-F16.gguf") if not (here / "given-F16.gguf").exists() else here / "given-F16.gguf"
    shipped = ship(str(given), ship__quantization="Q4_K_M", ship__keep=50, model="base", data__test="rows.jsonl")
    found = outcomes(shipped)
    assert found.pop("answers") == "not made"
    found.pop("gain kept")
    assert set(found.values()) == {"passed"}
    assert set(shipped.forms) == {"before", "trained", "Q4_K_M"}
    (linked,) = here.glob("runs/given/gguf-*/*.gguf")
    assert linked.is_symlink()
    assert linked.samefile(given)
    assert not ship(str(given), ship__quantization="Q4_K_M", ship__keep=50, model="base", data__test="rows.jsonl").fresh
    as_it_is = ship(str(shipped.gguf), ship__name="same", ship__quantization="Q4_K_M")
    assert as_it_is.gguf.samefile(shipped.gguf)
    assert not list(here.glob("runs/same/quantise-*"))


def test_a_gguf_gets_the_template_that_it_came_without(here: Path) -> None:
    """It is written anew, and what was given stays as it was."""
    (q8,) = ship("lora").gguf.parent.glob("*-Q8_0.gguf")
    before = q8.read_bytes()
    shipped = ship(str(q8), ship__name="plain", data__template="plain")
    assert set(outcomes(shipped).values()) <= {"passed", "not made"}
    assert not shipped.gguf.samefile(q8)
    assert "User: " in str(template_in(shipped.gguf))
    assert q8.read_bytes() == before

"""What `ftkit ship` is given becomes a job: of what another tool trained by a recipe that is written for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from given import BNB, adapter, folder, gguf

from ftkit.errors import FtkitError, ModelError, RecipeError, RunError
from ftkit.line.adopt import ADOPT, refuse
from ftkit.line.ask import ASK
from ftkit.line.entry import NewRecipe, enter
from ftkit.line.job import Job, read_data
from ftkit.line.line import states
from ftkit.line.merge import MERGE
from ftkit.line.step import fingerprint_of
from ftkit.machine.llama_cpp import find_program
from ftkit.progress import SILENT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a base model and what was trained on it."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base", "model.safetensors", config={})
    adapter(tmp_path / "out" / "lora", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def entered(what: str, **settings: Any) -> tuple[Job, NewRecipe | None]:
    return enter(what, [(key.replace("__", "."), value) for key, value in settings.items()], run_dir=None, reporter=SILENT)


def test_an_adapter_gets_a_recipe_of_its_name(here: Path) -> None:
    job, recipe = entered("out/lora")
    assert recipe
    assert (recipe.path, job.run.folder) == (here / "lora.yaml", here / "runs" / "lora")
    assert not list(here.glob("*.yaml"))  # not before it is known that it can be shipped
    assert [state.step.name for state in states(job)][:2] == ["adopt", "ask"]
    recipe.write()
    written = yaml.safe_load((here / "lora.yaml").read_text(encoding="utf-8"))
    assert written == {
        "model": str(here / "base"), "trained": "out/lora", "training": {"method": "lora"}, "ship": {"name": "lora"}
    }  # fmt: skip
    job.run.folder.mkdir(parents=True)
    (job.run.folder / "manifest.json").write_text('{"steps": {}}', encoding="utf-8")
    for again in ("out/lora", str(here / "out" / "lora"), "lora.yaml", "runs/lora"):
        other, none = entered(again)
        assert (other.run.folder, none) == (job.run.folder, None)
        assert fingerprint_of(other, MERGE) == fingerprint_of(job, MERGE)


def test_flags_stand_in_the_recipe(here: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]) -> None:
    write_rows(here / "rows.jsonl", rows)
    job, recipe = entered("out/lora", data__train=str(here / "rows.jsonl"), ship__name="mine:1", ship__quantization="Q6_K")
    assert recipe
    assert recipe.path == here / "mine-1.yaml"
    loaded = recipe.recipe.model_dump(exclude_unset=True)
    assert loaded["data"] == {"train": "rows.jsonl"}
    assert loaded["ship"] == {"name": "mine:1", "test_rows": 64, "quantization": "Q6_K"}
    found = read_data(job)
    assert (len(found.train), len(found.validation), len(found.test)) == (12, 0, 12)  # nothing was held out: all are asked
    both, _ = entered("out/lora", data__train="rows.jsonl", data__test="rows.jsonl")
    assert both.recipe.ship.test_rows is None
    alone, _ = entered("out/lora", data__test="rows.jsonl")
    assert len(read_data(alone).train) == 12
    nothing, _ = entered("out/lora")
    assert (nothing.data, len(read_data(nothing).test)) == ({}, 0)


def test_rows_and_a_base_to_compare_with_make_nothing_anew(
    here: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    write_rows(here / "rows.jsonl", rows)
    folder(here / "whole", "model.safetensors", config={"a": 1})
    jobs = [entered("whole")[0], entered("whole", data__train="rows.jsonl")[0], entered("whole", model="base")[0]]
    assert [job.has_base for job in jobs] == [False, False, True]
    assert len({fingerprint_of(job, MERGE) for job in jobs}) == 1
    assert len({fingerprint_of(job, ASK) for job in jobs}) == 3
    assert {job.recipe.training.method for job in jobs} == {"full"}


@pytest.mark.parametrize(("setting", "value"), [("model", "other"), ("data.thinking", False), ("data.template", "plain")])
def test_what_ships_follows_from_its_base_and_its_template(here: Path, setting: str, value: Any) -> None:
    folder(here / "other", "model.safetensors", config={"a": 1})
    assert fingerprint_of(entered("out/lora")[0], ADOPT) != fingerprint_of(entered("out/lora", **{setting: value})[0], ADOPT)


def test_an_adapter_of_four_bits_is_asked_on_four_bits(here: Path) -> None:
    adapter(here / "q", base_model_name_or_path="unsloth/tiny-bnb-4bit")
    with pytest.raises(ModelError, match="in 4 bits") as refused:
        entered("q")
    assert "ftkit ship q --base unsloth/tiny" in str(refused.value.hint)
    job, recipe = entered("q", model=str(here / "base"))
    assert recipe
    assert (job.recipe.training.method, recipe.recipe.model) == ("qlora", "base")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("My Model (v2)-Q4_K_M.gguf", "My-Model-v2"), ("m.f16.gguf", "m"), ("Q8_0.gguf", "Q8_0"), ("….gguf", "my-model")],
)
def test_names(here: Path, name: str, wanted: str) -> None:
    gguf(here / name)
    job, _ = entered(name)
    assert job.recipe.ship.name == wanted


def test_a_quantised_file_ships_as_it_is(here: Path) -> None:
    gguf(here / "m.gguf", 17)
    job, _ = entered("m.gguf")
    assert job.recipe.ship.quantization == "Q5_K_M"
    refuse(job)
    job, _ = entered("m.gguf", ship__quantization="Q4_K_M")
    with pytest.raises(RecipeError, match="is Q5_K_M already") as refused:
        refuse(job)
    assert "--set ship.quantization=Q5_K_M" in str(refused.value.hint)
    refuse(entered("m.gguf", ship__quantization="Q4_K_M", ship__allow_requantize=True)[0])
    gguf(here / "f.gguf", 1)
    refuse(entered("f.gguf", ship__quantization="Q4_K_M")[0])
    quantises = ["quantise"] if find_program("llama-quantize") else []  # without it Q8_0 ships
    assert [state.step.name for state in states(job)] == ["adopt", "ask", "merge", "gguf", *quantises, "prove", "register"]


def test_closing_wants_rows_to_learn_from_and_others_to_be_judged_on(here: Path) -> None:
    gguf(here / "m.gguf")
    for what, says in (("m.gguf", "a GGUF has no trained model"), ("out/lora", "judged on others")):
        with pytest.raises(RecipeError, match=says):
            refuse(entered(what, ship__closing_steps=5, data__train="rows.jsonl")[0])
    refuse(entered("out/lora", ship__closing_steps=5, data__train="rows.jsonl", data__test="test.jsonl")[0])


def faulty(here: Path, case: str) -> tuple[str, dict[str, Any]]:
    if case == "no base":
        adapter(here / "a", base_model_name_or_path=None)
    elif case == "base elsewhere":
        adapter(here / "a", base_model_name_or_path="/content/base")
    elif case == "full":
        return "out/lora", {"training__method": "full"}
    elif case == "rare type":
        gguf(here / "a.gguf", 40)
        return "a.gguf", {}
    elif case == "name taken":
        (here / "lora.yaml").write_text("model: base\n", encoding="utf-8")
        return "out/lora", {}
    elif case == "bad name":
        return "out/lora", {"ship__name": "../x"}
    elif case == "run alone":
        (here / "runs" / "x").mkdir(parents=True)
        (here / "runs" / "x" / "manifest.json").write_text('{"steps": {}}', encoding="utf-8")
        return "runs/x", {}
    return "a", {}


@pytest.mark.parametrize(
    ("case", "kind", "says", "hint"),
    [
        ("no base", ModelError, "does not say what it was trained on", "ftkit ship a --base REF"),
        ("base elsewhere", ModelError, "/content/base, which is not here", "ftkit ship a --base REF"),
        ("full", RecipeError, "is an adapter", "training.method=lora"),
        ("rare type", ModelError, "Q1_0, a type that ftkit does not know", "16-bit"),
        ("name taken", RecipeError, "the recipe of something else", "--set ship.name="),
        ("bad name", RecipeError, "ship.name", "docs/recipe.md"),
        ("run alone", RunError, "its recipe is not at", "--run-dir"),
    ],
)
def test_faults(here: Path, case: str, kind: type[FtkitError], says: str, hint: str) -> None:
    what, settings = faulty(here, case)
    with pytest.raises(kind) as refused:
        entered(what, **settings)
    assert says in refused.value.message
    assert hint in str(refused.value.hint)


def test_the_command_line(here: Path, ftkit: Callable[..., Result]) -> None:
    done = ftkit("ship", "out/lora", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "adopt" in done.stdout
    assert not list(here.glob("*.yaml"))
    folder(here / "four", "model.safetensors", config=BNB)
    refused = ftkit("ship", "out/lora", "--base", "four", "--no-ollama")
    assert (refused.exit_code, "is quantised (bitsandbytes)" in refused.stderr) == (1, True), refused.output
    assert not list(here.glob("*.yaml"))  # what cannot be shipped leaves no recipe
    _, recipe = entered("out/lora")
    assert recipe
    recipe.write()
    for command in ("plan", "train"):
        refused = ftkit(command, "lora.yaml")
        assert (refused.exit_code, "is trained already" in refused.stderr) == (2, True), refused.output
    refused = ftkit("ship", "lora.yaml", "--only", "train")
    assert (refused.exit_code, "is no step of this recipe" in refused.stderr) == (2, True), refused.output

"""Python code that comes with a model: never run, and never asked about, unless the user says so with the flag that names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.engines import hf
from ftkit.errors import ModelError
from ftkit.memory.model import load_config, meta_model
from ftkit.merge.stream import merge
from ftkit.model.source import drop_code

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

CODE = """
from pathlib import Path
Path({marker!r}).write_text("this code ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class TheirConfig(LlamaConfig):
    model_type = {model_type!r}
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Foreign:
    """A model whose config and tokenizer name Python code that leaves a mark when it is run, and a recipe for it."""

    def __init__(self, folder: Path, model_type: str) -> None:
        self.folder, self.marker = folder / "model", folder / "marker"
        tiny.make_model(self.folder)
        (self.folder / "theirs.py").write_text(CODE.format(marker=str(self.marker), model_type=model_type), encoding="utf-8")
        self._add(
            "config.json", model_type=model_type, auto_map={"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
        )
        self._add("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "theirs.TheirTokenizer"]})
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text("model: model\ntraining: {method: lora, max_length: 128}\n", encoding="utf-8")

    def _add(self, name: str, **entries: Any) -> None:
        path = self.folder / name
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")

    @property
    def ran(self) -> bool:
        """Whether their code was run since this was asked last."""
        ran = self.marker.exists()
        self.marker.unlink(missing_ok=True)
        return ran


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Foreign]]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    yield lambda model_type: Foreign(tmp_path, model_type)
    assert asked == []


@pytest.mark.parametrize("command", ["plan", "train", "build"])
def test_a_model_that_needs_its_code_is_refused_by_the_flags_name(
    command: str, foreign: Callable[[str], Foreign], ftkit: Callable[..., Result], rows: list[Any], write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = foreign("theirs")
    write_rows(made.recipe.parent / "train.jsonl", rows)
    monkeypatch.setattr("ftkit.line.line.refuse_missing_tools", lambda _: None)
    result = ftkit(command, made.recipe, stdin="y\ny\n")
    assert (result.exit_code, made.ran) == (ModelError.exit_code, False)
    assert "--trust-remote-code" in result.stderr


def test_nothing_that_loads_a_folder_runs_its_code(foreign: Callable[[str], Foreign]) -> None:
    made = foreign("theirs")
    for load in (
        lambda: load_config(made.folder),
        lambda: hf.load_model(made.folder, "lora", dtype="float32", cuda=False),
        lambda: hf.load_model(made.folder, None, dtype="float32", cuda=False),
    ):
        with pytest.raises(ModelError, match="Python code that comes with the model") as caught:
            load()
        assert "--trust-remote-code" in str(caught.value.hint)
    hf.load_tokenizer(made.folder)  # tokenizer.json is enough
    assert not made.ran


def test_code_that_is_not_needed_is_not_run_either(foreign: Callable[[str], Foreign]) -> None:
    made = foreign("llama")
    hf.load_tokenizer(made.folder)
    hf.load_model(made.folder, "lora", dtype="float32", cuda=False)
    meta_model(load_config(made.folder))
    assert not made.ran


def test_with_the_flag_it_runs(
    foreign: Callable[[str], Foreign], ftkit: Callable[..., Result], rows: list[Any], write_rows: Callable[..., Path]
) -> None:
    made = foreign("theirs")
    write_rows(made.recipe.parent / "train.jsonl", rows)
    result = ftkit("plan", made.recipe, "--trust-remote-code", "--json")
    assert (result.exit_code, made.ran) == (0, True), result.stderr
    assert hf.load_model(made.folder, None, dtype="float32", cuda=False, trust_remote_code=True).config.model_type == "theirs"


def test_a_merged_model_names_no_code(foreign: Callable[[str], Foreign], tmp_path: Path) -> None:
    """llama.cpp's converter loads tokenizers with trust_remote_code=True: what ftkit gives it must not name any code."""
    from transformers import AutoConfig, AutoTokenizer

    made = foreign("llama")
    tiny.make_adapter(made.folder, tmp_path / "adapter")
    for name, with_code in (("without", False), ("with", True)):
        folder = tmp_path / name
        folder.mkdir()
        merge(made.folder, tmp_path / "adapter", folder, with_code=with_code)
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert (made.ran, (folder / "theirs.py").exists()) == (with_code, with_code)
    assert "auto_map" in (made.folder / "config.json").read_text(encoding="utf-8")


def test_code_is_dropped_at_any_depth_and_other_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"a": {"auto_map": {"X": "y.Z"}, "b": "ä"}, "auto_map": 1}', encoding="utf-8")
    (tmp_path / "config.json").write_text('{"a":1}', encoding="utf-8")
    drop_code(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8")) == {"a": {"b": "ä"}}
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == '{"a":1}'

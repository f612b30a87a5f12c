"""templates/colab.ipynb is a notebook, its commands are ftkit's, and its cells run from top to bottom on a machine without Colab."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import convertible
import pytest
from click.testing import Result

from ftkit import templates
from ftkit.cli import main
from ftkit.machine import torch_cuda

NOTEBOOK = json.loads((templates.folder() / "colab.ipynb").read_text(encoding="utf-8"))
CELLS: dict[str, str] = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
SHELL = re.compile(r"(?m)^(\s*)!(.+)$")
# The template of the tiny model: a turn of each speaker.
CHAT = (
    "{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)
# A random model learns nothing in two steps, so that nothing can be lost.
CHANGES = {
    "training.max_steps": 2, "training.effective_batch_size": 2, "training.max_length": 512, "lora.r": 2, "ship.test_rows": 2,
    "ship.max_new_tokens": 4, "ship.keep": 0, "ship.max_loss_points": 100, "ship.num_ctx": 512,
}  # fmt: skip


def test_it_is_a_notebook_of_format_4_5() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    common = {"cell_type", "id", "metadata", "source"}
    for cell in NOTEBOOK["cells"]:
        assert cell.keys() == (common | {"execution_count", "outputs"} if cell["cell_type"] == "code" else common)
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids)


def test_each_cell_is_short_and_says_before_what_it_does() -> None:
    for before, cell in zip(NOTEBOOK["cells"], NOTEBOOK["cells"][1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"
            assert len(cell["source"]) <= 12


def test_it_takes_starters_and_commands_that_there_are() -> None:
    assert "TASK = " in CELLS["settings"]
    tasks = re.findall(r"TASK = .*: (.+)", CELLS["settings"])[0].replace(" or ", ", ").split(", ")
    assert set(tasks) == templates.tasks().keys()
    filled = {"FOLDER": "here", "TASK": "chat", "MODEL": "org/name", "CHANGES": "--set lora.r=2", "QUANTIZATION": "Q8_0", "REPOSITORY": "x"}
    lines = [shlex.split(command.format(**filled)) for source in CELLS.values() for _, command in SHELL.findall(source)]
    installing = [["pip", "install"], ["virtualenv", "-q"], *[["/content/env/bin/pip", "install"]] * 2]
    assert [words[:2] for words in lines if words[0] != "ftkit"] == installing
    with click.Context(main, **main.context_settings) as context:
        for program, name, *words in lines:
            if program == "ftkit":
                command = main.get_command(context, name)
                assert command
                command.make_context(name, words, parent=context)  # parses; runs nothing


def test_an_older_driver_gets_the_torch_that_is_tried() -> None:
    (wanted,) = re.findall(r'"torch==([\d.]+)" --index-url https://download.pytorch.org/whl/(\w+)', CELLS["install"])
    assert wanted == (metadata.version("torch").partition("+")[0], "cu126")
    assert wanted[1] in torch_cuda.WHEELS
    (pattern,) = re.findall(r're.search\(r"(.+?)", os', CELLS["install"])
    found = re.search(pattern, "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15      CUDA Version: 12.4     |")
    assert found
    assert found[1] == "12"


class Cells:
    """The notebook's cells, run in this process: a line that begins with ! is a command of ftkit's."""

    def __init__(self, ftkit: Callable[..., Result]) -> None:
        self.ftkit = ftkit
        self.names: dict[str, Any] = {"_shell": self.shell}
        self.said: dict[str, str] = {}

    def shell(self, command: str) -> None:
        program, *words = shlex.split(command)
        assert program == "ftkit"
        done = self.ftkit(*words)
        assert done.exit_code == 0, done.stderr
        self.said[words[0]] = done.stdout

    def run(self, name: str) -> None:
        source = SHELL.sub(lambda found: f"{found[1]}_shell(f{found[2]!r})", CELLS[name])
        exec(compile(source, name, "exec"), self.names)  # noqa: S102


@pytest.fixture
def cells(ftkit: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cells:
    monkeypatch.chdir(tmp_path)
    cells = Cells(ftkit)
    cells.run("settings")
    return cells


def test_a_failing_command_is_seen(cells: Cells) -> None:
    with pytest.raises(AssertionError, match="There is no recipe"):
        cells.shell("ftkit plan nowhere")


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_its_cells_run_from_rows_to_a_shipped_file(cells: Cells, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    convertible.make("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    cells.names.update(MODEL="model", CHANGES=" ".join(f"--set {key}={value}" for key, value in CHANGES.items()))
    for cell in list(CELLS)[1:]:
        cells.run(cell)
    assert "⟦" in cells.said["data"]
    assert cells.said["plan"].startswith("Fits")
    shipped = tmp_path / "ftkit-classify" / "runs" / "recipe" / "shipped"
    assert [path.name for path in shipped.glob("*.gguf")] == ["support-router-Q8_0.gguf"]
    assert str(Path("ftkit-classify", "runs", "recipe", "shipped", "Modelfile")) in capsys.readouterr().out
    trained = json.loads((shipped.parent / "manifest.json").read_text(encoding="utf-8"))
    for cell in list(CELLS)[1:]:  # after a lost session
        cells.run(cell)
    assert json.loads((shipped.parent / "manifest.json").read_text(encoding="utf-8"))["steps"]["train"] == trained["steps"]["train"]

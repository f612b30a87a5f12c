"""The demo's model on real Ollama servers: the newest, and the last of the old kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from conftest import REPOSITORY

from ftkit.data import template
from ftkit.engines import hf, ollama
from ftkit.ollama.modelfile import make_modelfile
from ftkit.ollama.register import register
from ftkit.ollama.template import find_format
from ftkit.proof import score as scoring
from ftkit.proof.probes import conversations
from ftkit.recipe import Evaluate, Ship, load_recipe
from ftkit.run import Run

pytestmark = pytest.mark.ollama

NAME = "support-router"
MOST_TOKENS = 16
ONE_THREAD = {"num_thread": 1}  # two threads on two busy cores spin: forty times slower
FEWER = 20  # questions
APART_POINTS = 4  # from what was proved, which the recipe's ship.max_loss_points bounds: another build and other threads round otherwise
DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM"


@pytest.fixture(scope="module")
def run(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's folder, to register from."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    shutil.copytree(REPOSITORY / "demo", folder, symlinks=True)
    return folder / "runs" / "recipe"


@pytest.fixture(scope="module", params=servers.VERSIONS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(version, address) of a running server."""
    version: str = request.param
    with servers.running(version, tmp_path_factory.mktemp(version)) as address:
        yield version, address


@pytest.fixture(scope="module")
def shipped(server: tuple[str, str], run: Path) -> tuple[str, str]:
    """`ftkit ship --ollama` done against the server; what it printed, and the address."""
    done = subprocess.run(
        [sys.executable, "-m", "ftkit", "ship", "--ollama", run.parent.parent],
        env={**os.environ, "OLLAMA_HOST": server[1]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, server[1]


def record(run: Path) -> dict[str, Any]:
    step = Run(run).finished("ask")
    assert step
    loaded: dict[str, Any] = json.loads((step.folder / "answers.json").read_text(encoding="utf-8"))
    return loaded


def rule(run: Path) -> Evaluate:
    """By which an answer is right."""
    return load_recipe(run.parent.parent / "recipe.yaml").evaluate


def merged_tokenizer(run: Path) -> Any:
    step = Run(run).finished("merge")
    assert step
    return hf.load_tokenizer(step.folder / "model")


@pytest.fixture
def client(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The Python client of the running server."""
    monkeypatch.setenv("OLLAMA_HOST", server[1])
    with ollama.connect() as connected:
        yield connected


def test_ship_registers_the_model(shipped: tuple[str, str], client: Any) -> None:
    assert f"ollama run {NAME}" in shipped[0]
    names = [model.model for model in client.list().models]
    assert names == [f"{NAME}:latest"]  # and no temporary one is left


def test_the_default_system_prompt_is_not_lost(shipped: tuple[str, str], run: Path, client: Any) -> None:
    """Without ftkit's TEMPLATE both servers take their own `chatml`, which has no default system prompt."""
    tokenizer = merged_tokenizer(run)
    question = [{"role": "user", "content": "Where is my parcel?"}]
    wanted = template.render(tokenizer, question, ask=True)
    assert DEFAULT_SYSTEM_PROMPT in wanted
    assert ollama.rendered_prompt(client, NAME, question) == wanted
    reply = client.chat(NAME, question, options={"num_predict": 1, **ONE_THREAD})
    assert reply.prompt_eval_count == len(template.token_ids(tokenizer, wanted))
    for messages in conversations(lambda m, ask: template.render(tokenizer, m, ask=ask)):
        assert ollama.rendered_prompt(client, NAME, messages) == template.render(tokenizer, messages, ask=True)


def test_ollama_run_answers_as_the_client_does(shipped: tuple[str, str], server: tuple[str, str], run: Path, client: Any) -> None:
    question, one_thread = record(run)["questions"][0], f"{NAME}-one-thread"  # `ollama run` takes no options
    client.create(one_thread, from_=NAME, parameters=ONE_THREAD)
    done = subprocess.run(
        [servers.program(server[0]), "run", one_thread, question[-1]["content"]],
        env={**os.environ, "OLLAMA_HOST": shipped[1]}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (answer,) = ollama.answer(client, NAME, [question], MOST_TOKENS, options=ONE_THREAD)
    client.delete(one_thread)
    assert done.stdout.strip() == answer.strip()
    assert answer.strip() in (rule(run).labels or ())


def test_questions_with_tools_are_asked_with_the_models_own_prompt(shipped: tuple[str, str], run: Path, client: Any) -> None:
    """Ollama writes tools by formats of its own, or refuses them: the server is given the prompt instead, and says what it does to that."""
    question, tokenizer = record(run)["questions"][0], merged_tokenizer(run)
    with_tools = [{**question[0], "tools": [{"type": "function", "function": {"name": "look"}}]}, *question[1:]]

    def prompt(messages: Any) -> str:
        assert messages == with_tools
        return template.render(tokenizer, question, ask=True)

    plain, called = (
        ollama.answer(client, NAME, [messages], MOST_TOKENS, render=prompt, options=ONE_THREAD) for messages in (question, with_tools)
    )
    assert called == plain


def test_shipping_again_is_up_to_date(shipped: tuple[str, str], run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ftkit", "ship", "--ollama", run.parent.parent],
        env={**os.environ, "OLLAMA_HOST": shipped[1]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "registering" not in done.stderr


def test_a_server_that_nobody_asked_for_ends_no_build_by_its_answers(shipped: tuple[str, str], run: Path) -> None:
    """The file has passed its proof, and is handed on with its scores; the model does not count as registered."""

    def ship(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ftkit", "ship", *flags, str(run.parent.parent)]
        return subprocess.run(command, env={**os.environ, "OLLAMA_HOST": shipped[1]}, capture_output=True, text=True)

    registered = Run(run).manifest()["ollama"]
    Run(run).record(ollama={**registered, "answers": ["nonsense"] * len(registered["answers"])})
    try:
        unasked, asked = ship(), ship("--ollama")
    finally:
        Run(run).record(ollama=registered)
    assert unasked.returncode == 0, unasked.stderr
    assert "Not registered: answers in Ollama: " in unasked.stdout
    assert "Held-out questions, right by" in unasked.stdout
    assert "ollama run" not in unasked.stdout
    assert asked.returncode == 6
    assert "answers in Ollama: " in asked.stderr


def test_the_shipped_files_answer_as_the_trained_model(
    server: tuple[str, str], run: Path, client: Any, report_figures: Callable[[str], None]
) -> None:
    """F16 says what the merged model says, and what ships keeps the score that was proved: on the newest server, asked every question."""
    version = server[0]
    asked, converted = record(run), Run(run).finished("gguf")
    assert converted
    tokenizer = merged_tokenizer(run)
    every = len(asked["questions"]) if version == servers.VERSIONS[0] else FEWER
    reasked = Run(run).finished("reask")
    assert reasked
    merged = json.loads((reasked.folder / "answers.json").read_text(encoding="utf-8"))["answers"]["merged"]
    chat = find_format(lambda m, ask: template.render(tokenizer, m, ask=ask))
    lines = [version]
    quantised, closed = Run(run).finished("quantise"), Run(run).finished("close")
    assert quantised
    ships = (closed.folder, closed.result["file"]) if closed and closed.result["file"] else (quantised.folder, quantised.result)
    proof = Run(run).finished("prove")
    assert proof
    told = json.loads((proof.folder / "answers.json").read_text(encoding="utf-8"))["answers"]["shipped"]
    proven = scoring.score(asked["expected"], told, rule(run))
    files = [*((converted.folder, file) for file in converted.result["files"]), ships]
    for folder, file in files:
        # all sampling values written out, as ftkit ships: v0.24.0 would penalise repetition by 1.1
        modelfile = make_modelfile(file["path"], chat, Ship(), bos="", stops=[tokenizer.eos_token])
        name = f"parity-{file['quantization'].lower()}"
        register(client, name, folder / file["path"], modelfile, lambda m, ask: template.render(tokenizer, m, ask=ask))
        rows = every if folder == ships[0] else FEWER
        answers = ollama.answer(client, name, asked["questions"][:rows], MOST_TOKENS, options=ONE_THREAD)
        expected = asked["expected"][:rows]
        score, trained = (scoring.score(expected, given, rule(run)) for given in (answers, asked["answers"]["trained"][:rows]))
        equal = scoring.same(answers, merged[:rows], Evaluate())
        lines.append(
            f"  {file['quantization']:7} {score.right} of {rows} right, as trained {trained.right}, "
            f"{equal.percent:.1f} % equal to the merged model's answers"
        )
        if file["quantization"] == "F16":
            assert equal.percent >= 95
        if rows > FEWER:
            assert score.percent >= proven.percent - APART_POINTS, lines
        client.delete(name)
    report_figures("\n".join(lines))

"""What reaches a real Ollama server: Modelfiles of hostile texts, prompts of real families, and names, at whatever moment a ship ends."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import families
import pytest
import servers
import tiny

from ftkit.check import Check, passed
from ftkit.data import stops, template
from ftkit.engines import hf, ollama
from ftkit.errors import NameTakenError, ProofError, ToolFailedError
from ftkit.files import file_fingerprint
from ftkit.gguf import files as gguf
from ftkit.gguf.files import GgufFile
from ftkit.line.close import Shipping
from ftkit.line.gguf import corrections_of
from ftkit.line.job import make_job
from ftkit.line.merge import Merged
from ftkit.line.register import refuse_anothers_name, register_shipped
from ftkit.line.step import Made
from ftkit.machine import llama_cpp
from ftkit.model.source import gguf_architecture, open_gguf
from ftkit.ollama import register as registering
from ftkit.ollama.formats import own_format
from ftkit.ollama.modelfile import Modelfile, make_modelfile
from ftkit.ollama.register import PROMPTS, TOKENS, register
from ftkit.ollama.template import ChatFormat, find_format
from ftkit.progress import SilentReporter
from ftkit.recipe import Evaluate, Ship
from ftkit.run import Run

pytestmark = [pytest.mark.ollama, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

HOSTILE = (
    "plain",
    "  outer spaces\t ",
    "FROM elsewhere\nPARAMETER stop x\n# no comment\nSYSTEM y",
    'quotes " and """three""" inside',
    '"whole"',
    '"',
    '""""',
    "back\\slash \\n \\u0041 \\",
    "\n\nlines\r\nof text\n",
    'ends with "\n"',
    "{{ .Prompt }} {{- x -}} }} { %",
    "# hash",
    "größer 大 <|im_end|>",
)
# Gemma 3's kind: a system message begins the first question, untrimmed, and the question is trimmed.
FOLDED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set start = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set start = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (start if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    + tiny.CHATML
)

TEMPLATES = {
    "chatml": ("Qwen 2.5", tiny.CHATML),
    "default system prompt": ("Qwen 2.5", DEFAULT_SYSTEM),
    "like chatml": (
        "Qwen 2.5",
        DEFAULT_SYSTEM.replace("You are a helpful AI assistant named SmolLM", "Be brief."),
    ),  # by fewer than 100 edits
    "folded": ("Gemma 2", FOLDED),
}


GEMMA_4 = "Gemma 4 E4B (text)"  # an architecture of its own, where the family of this name stands in with another one
NEWEST = pytest.mark.parametrize("server", servers.VERSIONS[:1], indirect=True)  # where what is tested is ftkit's own


@pytest.fixture(scope="module", params=servers.VERSIONS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(version, address) of a running server."""
    with servers.running(request.param, tmp_path_factory.mktemp(request.param)) as address:
        yield request.param, address


@pytest.fixture
def client(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("OLLAMA_HOST", server[1])
    with ollama.connect() as connected:
        yield connected
        for model in connected.list().models:
            connected.delete(model.model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """(tokenizer, F16 file) of a kind of model, made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("model") / "model"
            family, chat_template = TEMPLATES.get(kind, (kind, None))
            if kind == GEMMA_4:  # not a stand-in of another architecture
                architectures.make_model(next(each for each in architectures.ARCHITECTURES if each.name == kind), folder)
            else:
                merges = 4000 if family == "Gemma 2" else None  # what is asked of a server takes its time for each of 262,144 tokens
                families.make_model(replace(families.by_name(family), merges=merges), folder, chat_template)
            tokenizer = hf.load_tokenizer(folder, template.ChatSettings(date(2024, 7, 26)))
            stops.seal(folder, tokenizer)
            path = folder / "m-F16.gguf"
            gguf.convert(folder, {"F16": path}, llama_cpp.need_converter())
            gguf.correct(path, corrections_of(path, tokenizer, stops.configured_stops(folder), converted=True))
            made[kind] = tokenizer, path
        return made[kind]

    return make


def renders(tokenizer: Any) -> template.Render:
    return lambda messages, ask: template.render(tokenizer, messages, ask=ask)


def modelfile(tokenizer: Any, path: Path, **ship: Any) -> Modelfile:
    reader = open_gguf(path)
    adds = reader.get_field("tokenizer.ggml.add_bos_token")
    bos = tokenizer.bos_token if adds and adds.contents() else ""
    chat = find_format(renders(tokenizer))
    own = own_format(gguf_architecture(reader), renders(tokenizer))
    return make_modelfile(f"./{path.name}", chat, Ship(num_ctx=512, **ship), bos=bos, stops=["<stop>"], own=own)


def names(client: Any) -> list[str]:
    return sorted(model.model for model in client.list().models)


def shown(client: Any, name: str) -> dict[str, Any]:
    """What a server knows of a model, but for its name, its times and the file's."""
    known = client._client.post("/api/show", json={"model": name}).json()
    known["parameters"] = sorted(known["parameters"].splitlines(), key=lambda line: line.split()[0])  # in no order, but for the stops
    return {key: known.get(key) for key in ("template", "system", "parameters", "model_info", "details", "messages", "license")}


def create_by_hand(server: tuple[str, str], made: Modelfile, folder: Path) -> None:
    """The model `by-hand`, by Ollama's own program from a Modelfile in this folder."""
    (folder / "Modelfile").write_bytes(made.text().encode())
    done = subprocess.run(
        [servers.program(server[0]), "create", "by-hand", "-f", folder / "Modelfile"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OLLAMA_HOST": server[1], "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", HOSTILE)
def test_the_file_and_the_request_create_the_same_model(
    text: str, server: tuple[str, str], client: Any, files: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    _, path = files("chatml")
    (tmp_path / "m.gguf").symlink_to(path)
    chat = ChatFormat(text, (f"s{text}", text), (f"u{text}", text), (f"a{text}", text), trimmed=frozenset(("user",)))
    made = make_modelfile("./m.gguf", chat, Ship(system=text, temperature=0.1), bos="", stops=[text, "<|im_end|>", f"{text}x"])
    create_by_hand(server, made, tmp_path)
    (blob,) = {f"sha256:{file_fingerprint(path)}"}
    client.create("by-request", files={"m.gguf": blob}, template=made.template, system=made.system, parameters=made.parameters)
    by_hand = shown(client, "by-hand")
    assert by_hand == shown(client, "by-request")
    assert by_hand["template"] == made.template
    assert by_hand["system"] == text
    assert ollama.digest_of(client, "by-hand") == ollama.digest_of(client, "by-request")
    asked = [{"role": "user", "content": " q "}]
    system = {"role": "system", "content": text}
    assert ollama.rendered_prompt(client, "by-hand", asked) == chat.render([system, *asked])


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        *(
            (servers.VERSIONS[0], kind)
            for kind in ("Qwen 2.5", "Llama 3.1", "Gemma 2", GEMMA_4, "Phi 3.5", "folded", "default system prompt")
        ),
        *((servers.VERSIONS[1], kind) for kind in ("Gemma 2", GEMMA_4, "default system prompt")),
    ],
    indirect=["server"],
)
def test_families_are_asked_as_they_were_trained(kind: str, client: Any, files: Callable[[str], tuple[Any, Path]]) -> None:
    """Prompts equal, white space at the ends and all; and the model reads as many tokens as in training: one BOS, not two."""
    tokenizer, path = files(kind)
    made = modelfile(tokenizer, path)
    registered = register(client, "family", path, made, renders(tokenizer), count=lambda text: len(template.token_ids(tokenizer, text)))
    told = {check.name: check.outcome for check in registered.checks}
    assert (told.pop(PROMPTS), told.pop(TOKENS)) == ("passed", "passed")
    assert set(told.values()) <= {"not made"}
    assert registered.digest == ollama.digest_of(client, "family")
    assert names(client) == ["family:latest"]
    question = [{"role": "user", "content": "\n Is this safe? \n"}]
    reply = client.chat("family", question, options={"num_predict": 1, "num_thread": 1})
    assert reply.prompt_eval_count == len(template.token_ids(tokenizer, template.render(tokenizer, question, ask=True)))


@pytest.mark.parametrize(
    ("server", "thinking"), [(servers.VERSIONS[0], False), (servers.VERSIONS[0], True), (servers.VERSIONS[1], False)], indirect=["server"]
)
def test_gemma_4_thinks_as_it_was_trained_to(
    thinking: bool, server: tuple[str, str], client: Any, files: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """Left to itself a server asks this architecture in a format of its own, and lets it think; it did not get its name."""
    tokenizer, path = files(GEMMA_4)
    other = copy.copy(tokenizer)
    other.chat_template = template.fix_thinking(tokenizer, thinking)
    made = modelfile(other, path)
    assert register(client, "family", path, made, renders(other)).checks[0].outcome == "passed"
    if not thinking:
        with pytest.raises(ProofError, match=r"renders user differently(.|\n)*<\|think\|>"):
            register(client, "left", path, replace(made, own=None), renders(other))
    (tmp_path / path.name).symlink_to(path)
    create_by_hand(server, made, tmp_path)
    asked = [{"role": "user", "content": "q"}]
    assert ollama.rendered_prompt(client, "by-hand", asked) == ollama.rendered_prompt(client, "family", asked)


@pytest.mark.parametrize("server", servers.VERSIONS[1:], indirect=True)  # which goes by the file, where newer ones take the BOS away
def test_a_bos_that_is_read_twice_gets_no_name(client: Any, files: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    """As of the file that llama.cpp's converter writes: what is rendered is right, and the server puts a second BOS before it."""
    tokenizer, path = files(GEMMA_4)
    twice = tmp_path / path.name
    twice.write_bytes(path.read_bytes())
    gguf.correct(twice, gguf.Corrections(add_bos_token=True))
    made = modelfile(tokenizer, twice)
    with pytest.raises(ProofError, match=r"tokens in Ollama: the model reads (\d+) tokens of a prompt that has \d+, as if its BOS came"):
        register(client, "twice", twice, made, renders(tokenizer), count=lambda text: len(template.token_ids(tokenizer, text)))
    assert names(client) == []


def test_a_system_prompt_is_checked_too(client: Any, files: Callable[[str], tuple[Any, Path]]) -> None:
    tokenizer, path = files("folded")
    made = modelfile(tokenizer, path, system=" Be\nbrief. ")
    registered = register(client, "family", path, made, renders(tokenizer))
    assert registered.checks[0].outcome == "passed"
    lost = Modelfile(
        made.file, made.template.replace("{{ $m.Content }}\n\n", "\n\n") if made.template else None, made.system, made.parameters
    )
    with pytest.raises(ProofError, match="renders"):
        register(client, "lost", path, lost, renders(tokenizer))
    assert names(client) == ["family:latest"]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n", ProofError),
        ("{{ if false }}{{ .Messages }}{{ end }}", ProofError),
        ("{{ index .Messages 99 }}", ToolFailedError),
    ],
    ids=["default system prompt lost", "empty", "the server fails"],
)
def test_a_wrong_prompt_gets_no_name(wrong: str, error: type[Exception], client: Any, files: Callable[[str], tuple[Any, Path]]) -> None:
    tokenizer, path = files("default system prompt")
    made = modelfile(tokenizer, path)
    with pytest.raises(error, match="render"):
        register(client, "wrong", path, Modelfile(made.file, wrong, None, made.parameters, made.bos), renders(tokenizer))
    assert names(client) == []


@pytest.mark.parametrize(
    ("server", "kind", "right"),
    [
        (servers.VERSIONS[0], "default system prompt", True),  # rendered by llama-server, as it stands in the GGUF
        (servers.VERSIONS[0], "like chatml", False),  # taken for Ollama's own chatml, which has no default system prompt
        (servers.VERSIONS[1], "default system prompt", False),  # the question alone
    ],
    indirect=["server"],
)
def test_a_server_that_is_left_without_a_template_is_right_or_refused(
    kind: str, right: bool, client: Any, files: Callable[[str], tuple[Any, Path]]
) -> None:
    """It then does as it likes; what counts is what it renders."""
    tokenizer, path = files(kind)
    bare = Modelfile(f"./{path.name}", None, None, {"num_ctx": 512})
    if right:
        assert register(client, "bare", path, bare, renders(tokenizer)).checks[0].outcome == "passed"
    else:
        with pytest.raises(ProofError, match="Ollama renders"):
            register(client, "bare", path, bare, renders(tokenizer))
    assert names(client) == ["bare:latest"] * right


@pytest.fixture
def ship(client: Any, files: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> Callable[[str], str]:
    """Register the tiny model from a run, as `ftkit ship` does at its end."""
    _, path = files("chatml")
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    folders = {name: tmp_path / name for name in ("asked", "proven")}
    for folder in folders.values():
        folder.mkdir()
    question = [{"role": "user", "content": "hi"}]
    (folders["asked"] / "answers.json").write_text(
        json.dumps({"questions": [question], "expected": ["x"], "answers": {}}), encoding="utf-8"
    )
    (folders["proven"] / "answers.json").write_text(json.dumps({"answers": {"shipped": ["y"]}}), encoding="utf-8")
    asked, proven = (Made[Any](name, name, folder, None, 0, True) for name, folder in folders.items())
    merged = Made("merge", "merge", path.parent.parent, Merged("", (151645,)), 0, True)
    recipe = tiny.recipe(path.parent)

    def register(name: str, *, replace_model: bool = False, evaluate: Evaluate | None = None, answers: str = "not made") -> str:
        named = recipe.model_copy(update={"ship": Ship(name=name, num_ctx=512, max_new_tokens=2), "evaluate": evaluate or Evaluate()})
        job = make_job(named, tmp_path, run, has_data=False)
        run.record(shipped={"mark": name})
        refuse_anothers_name(job, client, replace_model)
        shipped = Shipping(path, GgufFile("F16", Path(path.name), 1, 16.0, 1, 0), "gguf", "", None)
        registered, checks = register_shipped(job, client, shipped, merged, asked, proven)
        assert [check.outcome for check in checks] == ["passed", "passed", answers]  # by itself no answer is right
        recorded = run.manifest()["ollama"]
        assert [entry["outcome"] for entry in recorded["checks"]] == ["passed", "passed", "not made"]
        assert "temporary" not in recorded
        return registered

    return register


class Killed(BaseException):
    """As if the process were gone."""


@NEWEST
def test_killed_ships_know_their_own(ship: Callable[..., str], client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a ship left in Ollama, the next goes through without --yes, and in the end one model is there."""

    copy, record, clean = type(client).copy, Run.record, registering.clean_up
    for moment in ("before the copy", "after the copy", "before the record"):
        dead = False

        def die_at_copy(server: Any, source: str, to: str, moment: str = moment) -> None:
            nonlocal dead
            if moment != "before the copy":
                copy(server, source, to)
            if moment != "before the record":
                dead = True
                raise Killed

        def clean_up(*args: Any) -> None:
            if not dead:  # noqa: B023 – called before the loop goes on
                clean(*args)

        def die_at_record(run: Run, **more: Any) -> None:
            if "checks" in more.get("ollama", {}):
                raise Killed
            record(run, **more)

        with monkeypatch.context() as sabotage:
            sabotage.setattr(type(client), "copy", die_at_copy)
            sabotage.setattr(registering, "clean_up", clean_up)
            sabotage.setattr(Run, "record", die_at_record)
            with pytest.raises(Killed):
                ship("m:q4")
        there = names(client)
        assert ("m:q4" in there) == (moment != "before the copy")
        assert sum("ftkit-unchecked" in name for name in there) == (moment != "before the record")
    assert ship("m:q4") == "m:q4"
    assert names(client) == ["m:q4"]


def test_a_model_that_is_replaced_leaves_no_file_and_what_was_checked_no_memory(
    client: Any, files: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    tokenizer, path = files("chatml")
    other = tmp_path / "m.gguf"
    other.write_bytes(path.read_bytes() + bytes(32))  # another file of the same model
    digests = [f"sha256:{file_fingerprint(each)}" for each in (path, other)]

    def there() -> list[bool]:
        return [ollama.http(client).head(f"/api/blobs/{digest}").status_code == 200 for digest in digests]

    def asked(name: str) -> Check:
        ollama.answer(client, name, [[{"role": "user", "content": "q"}]], 1, options={"num_thread": 1})
        assert name in loaded()
        return passed("answers", "")

    def loaded() -> list[str]:
        """Of this test: what others deleted may run on."""
        return [model.model for model in client.ps().models if model.model.startswith("m:")]

    for number, file in enumerate((path, other)):
        register(client, "m", file, modelfile(tokenizer, path), renders(tokenizer), verify=asked)
        assert names(client) == ["m:latest"]
        assert there() == [number == 0, number == 1]
        deadline = time.monotonic() + 20
        while loaded() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not loaded()


@NEWEST
def test_a_copy_that_breaks_off_leaves_the_name_to_the_model_that_had_it(
    client: Any, files: Callable[[str], tuple[Any, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = files("chatml")
    other = tmp_path / "m.gguf"
    other.write_bytes(path.read_bytes() + bytes(32))
    before = register(client, "m", path, modelfile(tokenizer, path), renders(tokenizer)).digest
    copy = type(client).copy

    def break_off(server: Any, source: str, to: str) -> None:
        if "unchecked" not in source:
            copy(server, source, to)
        else:  # as on a full disk: the name's manifest is cut short
            server.delete(to)
            raise ConnectionError("broken off")

    made = modelfile(tokenizer, path)
    with monkeypatch.context() as sabotage:
        sabotage.setattr(type(client), "copy", break_off)
        with pytest.raises(ToolFailedError, match="broken off"):
            register(client, "m", other, made, renders(tokenizer))
    assert names(client) == ["m:latest"]
    assert ollama.digest_of(client, "m") == before
    assert ollama.http(client).head(f"/api/blobs/sha256:{file_fingerprint(path)}").status_code == 200


@NEWEST
def test_another_server_is_asked_anew(ship: Callable[..., str], client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    check = registering.check_prompts
    monkeypatch.setattr(registering, "check_prompts", lambda *args: asked.append(args[1]) or check(*args))
    ship("m:q4")
    ship("m:q4")
    assert len(asked) == 1
    monkeypatch.setattr(ollama, "server_of", lambda _: ["http://here", "9.9"])
    ship("m:q4")
    assert len(asked) == 2
    assert names(client) == ["m:q4"]


@NEWEST
def test_a_run_knows_each_name_that_it_gave(ship: Callable[..., str], client: Any) -> None:
    for name in ("m:q4", "n:q4", "m:q4", "n:q4"):
        assert ship(name) == name
    assert names(client) == ["m:q4", "n:q4"]


@NEWEST
def test_what_is_uploaded_is_told_and_is_sent_once(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float]] = []

    class Telling(SilentReporter):
        @contextmanager
        def bar(self, label: str, total: float) -> Iterator[Any]:
            yield SimpleNamespace(update=lambda done: told.append((done, total)))

    file = tmp_path / "file"
    file.write_bytes(random.Random(1).randbytes(3 << 20))  # noqa: S311 – no secret
    digest = f"sha256:{file_fingerprint(file)}"
    for _ in range(2):
        ollama.upload(client, file, digest, Telling())
        assert told == [(1, 3), (2, 3), (3, 3)]
        assert ollama.http(client).head(f"/api/blobs/{digest}").status_code == 200
    other = f"sha256:{'0' * 64}"
    with pytest.raises(ToolFailedError, match=r"could not create m: .*digest"), ollama.told("could not create m"):
        ollama.upload(client, file, other)
    assert ollama.http(client).head(f"/api/blobs/{other}").status_code == 404


@NEWEST
def test_another_rule_asks_the_server_nothing_again(ship: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    ship("m")
    monkeypatch.setattr(ollama, "answer", None)
    anything = Evaluate(by="regex", pattern="()")
    assert ship("m", evaluate=anything, answers="passed") == "m"


@NEWEST
def test_anothers_model_stays(ship: Callable[..., str], client: Any, files: Callable[[str], tuple[Any, Path]]) -> None:
    tokenizer, path = files("chatml")
    theirs = register(client, "m:q4", path, modelfile(tokenizer, path, system="Mine."), renders(tokenizer))
    with pytest.raises(NameTakenError):
        ship("m:q4")
    assert ollama.digest_of(client, "m:q4") == theirs.digest
    assert ship("m:q4", replace_model=True) == "m:q4"
    assert ollama.digest_of(client, "m:q4") != theirs.digest

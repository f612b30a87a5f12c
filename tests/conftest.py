"""What every test shares: no network beyond loopback, a private cache folder, and a way to run the command line."""

from __future__ import annotations

import ipaddress
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import families
import hub as hubs
import pytest
import tiny
from click.testing import CliRunner, Result
from filelock import FileLock

from ftkit.cli import main
from ftkit.data.mask import learnt, tokenise
from ftkit.data.rows import Example, Pair, Row
from ftkit.engines import hf

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def report_figures(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Text that is shown at the end of the test run, whichever process the test runs in."""
    return lambda text: record_property("figures", text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    figures = [text for report in terminalreporter.getreports("") for key, text in report.user_properties if key == "figures"]
    if figures:
        terminalreporter.section("figures")
        for text in figures:
            terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to any other machine fails the test."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def ftkit() -> Callable[..., Result]:
    """Run a command line in this process: `ftkit("plan", "recipe.yaml", "--json")`; the result has exit_code, stdout and stderr."""

    def run(*words: str | Path, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], input=stdin, catch_exceptions=False)

    return run


def conversations() -> list[dict[str, Any]]:
    """Twelve small ones."""
    return [
        {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
        for n in range(12)
    ]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return conversations()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, which tests that need another one make themselves."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return hf.load_tokenizer(model)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    """The conversations, as they are trained on."""
    return list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[Pair]:
    """Twelve polite answers against curt ones, to questions of several lengths, as they are learnt from."""
    return list(learnt(tokenizer, preferences(), "dpo"))


def preferences(count: int = 12) -> list[Row]:
    questions = [{"role": "user", "content": f"What is {n} plus {'1' * (1 + n % 5)}?"} for n in range(count)]
    answers = [[{"role": "assistant", "content": text} for text in (f"It is {n}, with pleasure.", f"{n}!")] for n in range(1, count + 1)]
    return [
        Row((asked, chosen), n, rejected=rejected) for n, (asked, (chosen, rejected)) in enumerate(zip(questions, answers, strict=True), 1)
    ]


@pytest.fixture
def write_rows() -> Callable[[Path, list[Any]], Path]:
    """Write values as a JSONL file."""

    def write(path: Path, values: list[Any]) -> Path:
        path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty private folder: nothing that `ftkit setup` brought is found."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FTKIT_CACHE_DIR", str(folder))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    return folder


@pytest.fixture
def small_project(tmp_path: Path, private_cache: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and twelve rows, to be trained on the CPU; the recipe is the test's own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny.make_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", conversations())
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in this order: one that makes the demo, those that do not look at it, the others that do.

    So one process makes the demo while another is at work, and none waits for it. Long tests come before short ones.
    """
    looking = list(dict.fromkeys(item.path for item in items if "demo_run" in getattr(item, "fixturenames", ())))
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: 0 if item.path in looking[:1] else 3 if item.path in looking else 1 if item.path in long else 2)


@pytest.fixture(scope="session")
def demo_run(testrun_uid: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `make demo` in this checkout: made here, by that very command, where it is not there yet (12 minutes on one thread).

    Once a test run: a second `make demo` beside a test that holds the run would be refused.
    """
    made = tmp_path_factory.getbasetemp().parent / f"demo-{testrun_uid}"
    with FileLock(REPOSITORY / ".demo.lock"):  # another process that looks at it waits
        if not made.exists():
            done = subprocess.run(["make", "demo"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)  # shown where the test fails
            if done.returncode:
                pytest.fail(f"make demo ended with exit status {done.returncode}", pytrace=False)
            made.touch()
    return REPOSITORY / "demo" / "runs" / "recipe"


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file grows beyond so many bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource", reason="needs a limit on the size of files")

    @contextmanager
    def limit(size_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Client]:
    """Set constants of huggingface_hub, which are the environment's as it was at the import; an empty cache to begin with, and no token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    def set_constants(**values: Any) -> None:
        if "ENDPOINT" in values:
            values["HUGGINGFACE_CO_URL_TEMPLATE"] = values["ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    set_constants(HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(home / "hub"), HF_TOKEN_PATH=str(home / "token"))
    set_constants(HF_HUB_DISABLE_TELEMETRY=True)  # once a day it asks for a list to describe itself with
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # it waits before it tries again
    yield set_constants
    _http.close_session()


@pytest.fixture
def hub(client: hubs.Client) -> Iterator[hubs.Hub]:
    """A hub that the client is pointed to."""
    with hubs.running() as started:
        client(ENDPOINT=started.endpoint)
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's model, made once; with another template the tokenizer's settings alone are another."""
    folders: dict[str, Path] = {}

    def make(family: families.Family, chat_template: str | None = None) -> Path:
        if (key := repr(family)) not in folders:
            folders[key] = families.make_model(family, tmp_path_factory.mktemp("model"))
        if not chat_template:
            return folders[key]
        other = tmp_path_factory.mktemp("model") / "other"
        shutil.copytree(folders[key], other)
        config = json.loads((other / "tokenizer_config.json").read_text(encoding="utf-8"))
        (other / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}), encoding="utf-8")
        return other

    return make

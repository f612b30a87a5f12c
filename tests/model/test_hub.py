"""Models of a hub: the real client against a hub on loopback, which counts what is asked of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from hub import Client, Hub, read_folder
from tiny import make_model

from ftkit.engines import hf
from ftkit.errors import ModelError
from ftkit.model import locate as locating
from ftkit.model.given import look_at
from ftkit.model.hub import fetch_file, told_bars
from ftkit.model.open import bytes_to_fetch, open_config, open_weights
from ftkit.model.source import INDEX, Source
from ftkit.progress import Bar, SilentReporter

NAME = "org/tiny"
TOKEN = "hf_SecretOfTheTest"  # noqa: S105
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sentencepiece",
    "README.md": b"# Tiny",
    "modeling_tiny.py": b"raise SystemExit('remote code was run')",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: b"0123456789",
    SHARDS[1]: b"9876543210",
    "consolidated.safetensors": b"the same weights under other names",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"pickle",
}


def locate(reference: str = NAME) -> Source:
    return locating.locate(reference, Path("nowhere"))


def refused(call: Callable[..., Any], *arguments: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    assert caught.value.hint
    return caught.value


def fetched(hub: Hub) -> list[str]:
    """The names of the files whose content was asked for since the last call."""
    return sorted(path.split("/", 5)[5] for method, path in hub.asked() if method == "GET" and "/resolve/" in path)


def test_locating_asks_for_the_commit_and_nothing_else(hub: Hub) -> None:
    commit = hub.add(NAME, FILES)
    found = locate()
    assert (found.kind, found.fingerprint, found.folder) == ("hub", commit, None)
    assert hub.asked() == [("GET", f"/api/models/{NAME}")]


def test_an_adapter_s_config_beside_a_model_is_not_fetched_with_it(hub: Hub, tmp_path: Path) -> None:
    """transformers would load that adapter into the model."""
    hub.add(NAME, {**FILES, "adapter_config.json": b"{}"})
    for _ in range(2):
        given = look_at(NAME, tmp_path)
        assert given.kind == "checkpoint"
        assert given.hub
        for opened in (open_config(given.hub), open_config(locate())):
            assert opened.folder
            assert not (opened.folder / "adapter_config.json").exists()


def test_code_is_fetched_where_it_may_run_and_not_otherwise(hub: Hub) -> None:
    hub.add(NAME, FILES)
    open_config(locate())
    assert "modeling_tiny.py" not in fetched(hub)
    open_config(replace(locate(), with_code=True))
    assert "modeling_tiny.py" in fetched(hub)


def test_planning_fetches_config_and_tokenizer_once(hub: Hub) -> None:
    commit = hub.add(NAME, FILES)
    opened = open_config(locate())
    assert fetched(hub) == ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
    assert opened.folder
    assert opened.folder.name == commit == opened.fingerprint
    assert open_config(locate()) == opened
    assert hub.asked() == [("GET", f"/api/models/{NAME}")]  # the second time only whether the commit is still the same


def test_weights_are_those_of_the_index_and_fetched_once(hub: Hub) -> None:
    hub.add(NAME, FILES)
    config = open_config(locate())
    hub.asked()
    opened = open_weights(config)
    assert fetched(hub) == sorted(SHARDS)
    assert opened.folder == config.folder
    assert open_weights(config) == opened
    assert hub.asked() == []


def test_what_is_still_to_be_fetched(hub: Hub) -> None:
    hub.add(NAME, FILES)
    assert bytes_to_fetch(locate()) == sum(len(FILES[name]) for name in SHARDS)
    assert fetched(hub) == ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
    open_weights(locate())
    assert bytes_to_fetch(locate()) == 0
    hub.add("org/config", {"config.json": b"{}"})
    assert bytes_to_fetch(locate("org/config")) == 0  # said once the weights are wanted


class Told(SilentReporter):
    """What was said, and each (done, total, words) of a bar."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bars: list[tuple[float, float, dict[str, str]]] = []

    def step(self, text: str) -> None:
        self.lines.append(text)

    note = warn = step

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Bar]:
        class Shown:
            def update(_, done: float, *, curves: Any = None, **fields: str) -> None:
                self.bars.append((done, total, fields))

        yield Shown()


def test_what_comes_is_told_as_it_comes(hub: Hub, tmp_path: Path) -> None:
    """Of 16 GB without a word, nobody knows whether they come."""
    size = 25 << 20  # the client writes 10 MiB at a time
    hub.add(NAME, {**FILES, SHARDS[0]: bytes(size), SHARDS[1]: bytes(3 << 20)})
    told = Told()
    config = open_config(locate(), told)
    assert told.lines == [f"fetching config and tokenizer of {NAME}"]
    open_weights(config, told)
    assert told.lines[1:] == [f"fetching the weights of {NAME}: 28.0 MiB in 2 files"]
    done = [bar[0] for bar in told.bars]
    assert done == sorted(set(done))
    assert len(done) >= 4
    assert told.bars[-1][:2] == (28, 28)
    assert told.bars[0][2].keys() == {"speed", "left"}
    hub.add("org/alone", {**FILES, SHARDS[0]: bytes(size)})
    fetch_file(open_config(locate("org/alone")), SHARDS[0], tmp_path / "alone", alone := Told())
    assert alone.bars[-1][:2] == (25, 25)
    open_weights(locate(), again := Told())
    assert (again.lines, again.bars) == ([], [])


def test_what_xet_tells_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts what comes and what is written, a file each, into the bars of all files."""
    from huggingface_hub.utils import _xet_progress_reporting as xet

    told, names = Told(), ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")  # as the command line sets them
    for name in names:
        monkeypatch.setenv(name, "1")
    with (
        told_bars(8 << 20, told) as bars,
        xet.XetDownloadProgressReporter(reconstruction_desc="a", total=8 << 20, log_level=30, tqdm_class=bars) as progress,
    ):
        for came in (2 << 20, 8 << 20):
            report = SimpleNamespace(total_bytes_completed=came // 2, total_transfer_bytes_completed=came, total_bytes=8 << 20)
            report.total_bytes_completion_rate = report.total_transfer_bytes_completion_rate = 1.0
            progress.update_progress(report)
        xet._set_aggregate_rate_postfix(progress.reconstruction_bar)
    assert [bar[0] for bar in told.bars] == [1, 2, 4, 8]


def test_a_file_of_the_cache_that_was_cut_short_is_fetched_anew(hub: Hub) -> None:
    hub.add(NAME, FILES)
    folder = open_weights(locate()).folder
    assert folder
    (folder / SHARDS[0]).resolve().write_bytes(FILES[SHARDS[0]][:4])
    assert bytes_to_fetch(locate()) == len(FILES[SHARDS[0]])
    hub.asked()
    open_weights(locate(), told := Told())
    assert fetched(hub) == [SHARDS[0]]
    assert f"{SHARDS[0]} in the hub's cache has 4 of 10 bytes, and is fetched anew" in told.lines
    assert (folder / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]


def test_a_cache_that_lists_no_files(hub: Hub, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older huggingface_hub filled it, or it cannot be written: what is there is enough offline, and what is not is asked for."""
    from huggingface_hub import _tree_cache

    def without_lists() -> None:
        for folder in (tmp_path / "home").rglob("trees"):
            shutil.rmtree(folder)
        monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})

    monkeypatch.setattr(_tree_cache, "write_tree_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub._snapshot_download.write_tree_cache", lambda *_: None)
    hub.add(NAME, FILES)
    opened = open_weights(locate())
    without_lists()
    assert open_weights(locate()) == opened
    hub.add("org/other", FILES)
    assert bytes_to_fetch(locate("org/other")) == sum(len(FILES[name]) for name in SHARDS)
    client(HF_HUB_OFFLINE=True)
    assert open_weights(locate()) == opened


def test_without_an_index_the_one_file(hub: Hub) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": b"1", "model.fp16.safetensors": b"2"})
    opened = open_weights(locate())
    assert fetched(hub) == ["config.json", "model.safetensors"]
    assert opened.folder
    assert (opened.folder / "model.safetensors").read_bytes() == b"1"


def test_xet_is_there_and_plain_http_is_used(hub: Hub) -> None:
    """A hub that names no Xet hash is asked over plain HTTP, though hf_xet is installed."""
    from huggingface_hub.utils._runtime import is_xet_available

    assert is_xet_available()
    hub.add(NAME, FILES)
    open_weights(locate())
    assert all(path.startswith((f"/api/models/{NAME}", f"/{NAME}/resolve/")) for _, path in hub.asked())


@pytest.mark.parametrize("revision", ["v1", "refs/pr/4", "feature/long.name"])
def test_a_branch_or_tag_is_another_commit(hub: Hub, revision: str) -> None:
    hub.add(NAME, FILES)
    tagged = hub.add(NAME, {**FILES, "config.json": b'{"model_type": "qwen2"}'}, revision)
    found = locate(f"{NAME}@{revision}")
    assert found.fingerprint == tagged != locate().fingerprint
    folder = open_config(found).folder
    assert folder
    assert (folder / "config.json").read_bytes() == b'{"model_type": "qwen2"}'


def test_a_whole_commit_hash_is_not_asked_for(hub: Hub) -> None:
    commit = hub.add(NAME, FILES)
    found = locate(f"{NAME}@{commit}")
    assert found.fingerprint == commit
    assert hub.asked() == []
    assert open_config(found).folder


def test_a_moved_branch_changes_the_fingerprint(hub: Hub) -> None:
    hub.add(NAME, FILES)
    before = open_config(locate())
    after = hub.add(NAME, {**FILES, "tokenizer.json": b"{ }"})
    moved = open_config(locate())
    assert moved.fingerprint == after != before.fingerprint
    assert moved.folder
    assert (moved.folder / "tokenizer.json").read_bytes() == b"{ }"


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model(hub: Hub, status: int) -> None:
    hub.add(NAME, FILES)
    hub.repositories[NAME].gate = status
    error = refused(open_config, locate())
    assert "is gated" in error.message
    for words in (f"{hub.endpoint}/{NAME}", "hf auth login", "ftkit plan --config config.json"):
        assert words in str(error.hint)


def test_a_gated_model_whose_authors_look_at_each_request(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.repositories[NAME].gate = 403
    hub.repositories[NAME].gate_says = "Your request to access model org/tiny is awaiting a review from the repo authors."
    error = refused(open_config, locate())
    assert "have not let this account in yet" in error.message
    assert f"{hub.endpoint}/{NAME}" in str(error.hint)


def test_a_gated_model_that_is_here_already(hub: Hub) -> None:
    hub.add(NAME, FILES)
    opened = open_config(locate())
    hub.repositories[NAME].gate = 403
    assert open_config(locate()) == opened
    assert "is gated" in refused(open_weights, opened).message


@pytest.mark.parametrize("status", [401, 404])
def test_a_misspelt_or_private_model(hub: Hub, status: int) -> None:
    hub.error_of_missing = status
    error = refused(locate, "org/tinny")
    assert error.message.startswith("The hub has no model org/tinny")
    assert "spelling" in str(error.hint)


def test_a_folder_of_a_near_name_does_not_hide_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny-2").mkdir(parents=True)
    error = refused(locating.locate, NAME, tmp_path)
    assert "There is no model at" in error.message
    assert f"did you mean {tmp_path / 'org' / 'tiny-2'}?" in str(error.hint)
    hub.add(NAME, FILES)
    assert locating.locate(NAME, tmp_path).kind == "hub"


@pytest.mark.parametrize("revision", ["v2", "0" * 40])
def test_a_missing_revision(hub: Hub, revision: str) -> None:
    hub.add(NAME, FILES)
    error = refused(lambda: open_config(locate(f"{NAME}@{revision}")))
    assert error.message == f"{NAME} has no revision {revision}."


@pytest.mark.parametrize("reference", ["org/two--dashes", "org/.hidden", f"org/{'x' * 120}"])
def test_a_name_that_no_hub_model_has(hub: Hub, reference: str) -> None:
    assert "is no hub id" in refused(locate, reference).message
    assert hub.asked() == []


def test_a_connection_that_dies_once_is_taken_up_where_it_broke(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.repositories[NAME].dying = {SHARDS[0]: 1}
    opened = open_weights(locate())
    assert opened.folder
    assert (opened.folder / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]


def test_a_connection_that_keeps_dying(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.repositories[NAME].dying = {SHARDS[1]: 100}
    error = refused(lambda: open_weights(locate()))
    assert error.message.startswith(f"{NAME} cannot be fetched from {hub.endpoint}")
    hub.asked()
    hub.repositories[NAME].dying = {}
    opened = open_weights(locate())
    assert opened.folder
    assert (opened.folder / SHARDS[1]).read_bytes() == FILES[SHARDS[1]]
    assert fetched(hub) == [SHARDS[1]]  # what was whole is kept


def test_xet_that_fails(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Task error: CAS Client Error")

    hub.add(NAME, FILES)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert "CAS Client Error" in refused(open_config, locate()).message


@pytest.mark.parametrize("said", ["No space left on device (os error 28)", "Disk quota exceeded (os error 122)"])
def test_a_full_disk_under_xet_is_no_fault_of_the_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"Data processing error: File reconstruction error: IO Error: {said}")

    hub.add(NAME, FILES)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    error = refused(open_config, locate())
    assert "cannot be kept in" in error.message
    assert "make space there" in str(error.hint)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named(hub: Hub, tmp_path: Path, proxy: str) -> None:
    hub.add(NAME, FILES)
    for reference in (NAME, "ollama:x"):
        code = f"from pathlib import Path; from ftkit.model.locate import locate; locate({reference!r}, Path('nowhere'))"
        environment = {**os.environ, "ALL_PROXY": proxy, "NO_PROXY": "", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert "ftkit.errors.ToolMissingError: The proxy that ALL_PROXY" in done.stderr


def test_offline_with_the_files(hub: Hub, client: Client) -> None:
    hub.add(NAME, FILES)
    hub.add(NAME, {**FILES, "tokenizer.json": b"{ }"}, "v1")
    opened, tagged = open_weights(locate()), open_weights(locate(f"{NAME}@v1"))
    hub.asked()
    client(HF_HUB_OFFLINE=True)
    assert open_weights(locate()) == opened
    assert open_config(locate()) == opened
    assert open_weights(locate(f"{NAME}@v1")) == tagged
    assert hub.asked() == []


@pytest.mark.parametrize("reference", [NAME, f"{NAME}@v1"])
def test_offline_without_the_files(hub: Hub, client: Client, reference: str) -> None:
    hub.add(NAME, FILES, "main", "v1")
    client(HF_HUB_OFFLINE=True)
    error = refused(locate, reference)
    assert error.message.startswith(f"HF_HUB_OFFLINE is set, and {reference} is not")
    assert f"hf download {NAME}" in str(error.hint)
    assert hub.asked() == []


def test_offline_with_the_config_alone(hub: Hub, client: Client) -> None:
    hub.add(NAME, FILES)
    opened = open_config(locate())
    client(HF_HUB_OFFLINE=True)
    assert open_config(locate()) == opened
    assert refused(open_weights, opened).message.startswith(f"HF_HUB_OFFLINE is set, and {NAME} is not (or not whole)")


def test_a_hub_that_is_not_reached(hub: Hub, client: Client) -> None:
    hub.add(NAME, FILES)
    opened = open_config(locate())
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        client(ENDPOINT=nowhere)
        assert open_config(locate()) == opened
        for call in (lambda: open_weights(opened), lambda: locate("org/other")):
            assert f"cannot be fetched from {nowhere}" in refused(call).message


@pytest.mark.parametrize(
    ("status", "way_out"),
    [(429, "try again later"), (500, "try again later"), (401, "hf auth login"), (403, "settings/tokens"), (400, "try again later")],
)
def test_a_hub_that_refuses(hub: Hub, status: int, way_out: str) -> None:
    hub.add(NAME, FILES)
    hub.refusal = (status, {"X-Error-Message": "Invalid credentials in Authorization header"} if status == 401 else {})
    error = refused(locate)
    assert error.message.startswith(f"The hub answers {status} for {NAME}")
    assert way_out in str(error.hint)


def test_a_cache_that_cannot_be_written(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    (tmp_path / "file").touch()
    client(HF_HUB_CACHE=str(tmp_path / "file"))
    error = refused(open_config, locate())
    assert f"cannot be kept in {tmp_path / 'file'}" in error.message
    assert "HF_HOME" in str(error.hint)


def test_pickle_weights_are_refused_and_never_fetched(hub: Hub) -> None:
    hub.add(NAME, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    opened = open_config(locate())
    assert "pickle" in refused(open_weights, opened).message
    assert fetched(hub) == ["config.json"]


def test_a_config_without_weights(hub: Hub) -> None:
    hub.add(NAME, {"config.json": b"{}"})
    assert "has no model.safetensors" in refused(lambda: open_weights(locate())).message


@pytest.mark.parametrize("index", [b"{", b"[]", b"{}", b'{"weight_map": null}'])
def test_a_damaged_index(hub: Hub, index: bytes) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(ModelError, match="cannot be read"):
        open_weights(locate())


@pytest.mark.parametrize(("name", "hint"), [("../other.safetensors", "first published"), ("pytorch_model.bin", "convert")])
def test_an_index_may_name_safetensors_beside_it_alone(hub: Hub, name: str, hint: str) -> None:
    hub.add(NAME, {"config.json": b"{}", INDEX: json.dumps({"weight_map": {"a": name}}).encode()})
    error = refused(lambda: open_weights(locate()))
    assert repr(name) in error.message
    assert hint in str(error.hint)


def test_a_repository_of_gguf_files(hub: Hub) -> None:
    hub.add(NAME, {"README.md": b"", "tiny-Q4_K_M.gguf": b"GGUF"})
    error = refused(open_config, locate())
    assert "has no config.json" in error.message
    assert f"hf download {NAME} tiny-Q4_K_M.gguf" in str(error.hint)
    assert fetched(hub) == []


@pytest.mark.parametrize(
    ("files", "said", "way"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "is an adapter, and no base", f"training.adapter={NAME}"),
        ({"original/params.json": b"{}"}, "has no config.json", "in transformers' form"),
    ],
)
def test_a_repository_of_no_base(hub: Hub, files: dict[str, bytes], said: str, way: str) -> None:
    hub.add(NAME, files)
    error = refused(open_config, locate())
    assert said in error.message
    assert way in str(error.hint)
    assert fetched(hub) == []


def test_a_token_is_used_and_kept_nowhere(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add(NAME, FILES)
    open_weights(locate())
    assert hub.tokens == {f"Bearer {TOKEN}"}
    for refusal in ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), (403, {}), (500, {})):
        hub.refusal = refusal
        error = refused(locate, "org/other")
        assert TOKEN not in f"{error.message} {error.hint}"
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file())


@pytest.mark.parametrize("character", ["\x0b", "ä"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch, character: str) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{character}x")
    hub.add(NAME, FILES)
    error = refused(locate)
    assert "holds a character that no token has" in error.message
    assert TOKEN not in f"{error.message} {error.hint}"


def test_the_environment_names_hub_and_cache(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own the client reads HF_ENDPOINT and HF_HOME itself."""
    commit = hub.add(NAME, FILES)
    code = (
        "import sys; from pathlib import Path; from ftkit.model.locate import locate; from ftkit.model.open import open_config; "
        f"print(open_config(locate('{NAME}', Path('nowhere'))).folder); print(*sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "other")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder, modules = ran.stdout.splitlines()
    assert Path(folder) == tmp_path / "other" / "hub" / "models--org--tiny" / "snapshots" / commit
    assert not {"torch", "transformers"} & set(modules.split())  # a model is found and its config fetched without the heavy ones


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several safetensors files."""
    from transformers import AutoModelForCausalLM

    whole, folder = make_model(tmp_path_factory.mktemp("whole")), tmp_path_factory.mktemp("sharded")
    shutil.copytree(whole, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole, dtype="auto").save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.torch
def test_a_sharded_model_is_loaded_as_it_was(hub: Hub, sharded: Path) -> None:
    hub.add(NAME, read_folder(sharded))
    folder = open_weights(locate()).folder
    assert folder
    loaded, original = (hf.load_model(where, None, dtype="float32", cuda=False).state_dict() for where in (folder, sharded))
    assert loaded.keys() == original.keys()
    assert all(loaded[name].equal(original[name]) for name in original)
    assert hf.load_tokenizer(folder).encode("Hi") == hf.load_tokenizer(sharded).encode("Hi")


@pytest.mark.torch
def test_plan_fetches_no_weights_and_train_does(
    hub: Hub, sharded: Path, ftkit: Callable[..., Result], rows: list[Any], write_rows: Callable[[Path, list[Any]], Path], tmp_path: Path
) -> None:
    hub.add(NAME, read_folder(sharded))
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {NAME}\ntraining: {{method: lora, max_steps: 2, max_length: 128}}\nbudget: {{vram: 24}}\n", encoding="utf-8"
    )
    assert ftkit("plan", tmp_path / "recipe.yaml").exit_code == 0
    assert not [name for name in fetched(hub) if name.endswith(".safetensors")]
    assert ftkit("plan", tmp_path / "recipe.yaml").exit_code == 0
    assert hub.asked() == [("GET", f"/api/models/{NAME}")]
    assert ftkit("train", tmp_path / "recipe.yaml").exit_code == 0
    assert fetched(hub) == sorted(path.name for path in sharded.glob("*.safetensors"))


@pytest.mark.torch
def test_a_run_stays_with_the_commits_that_its_training_was_begun_with(
    hub: Hub, sharded: Path, ftkit: Callable[..., Result], rows: list[Any], tmp_path: Path
) -> None:
    """Whoever publishes a model or a dataset may change its page any day; a training of hours is not begun anew for that."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    first = hub.add(NAME, read_folder(sharded))
    data = hub.add("datasets/org/rows", {"train.jsonl": lines})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {NAME}\ndata: {{train: org/rows}}\ntraining: {{method: lora, max_steps: 2, max_length: 128}}\nbudget: {{vram: 24}}\n",
        encoding="utf-8",
    )
    assert ftkit("plan", recipe).exit_code == 0
    second = hub.add(NAME, {**read_folder(sharded), "README.md": b"# Tiny, second edition"})  # nothing is trained: the new one counts
    assert ftkit("train", recipe).exit_code == 0
    [trained] = (tmp_path / "runs" / "recipe").glob("train-*")

    third = hub.add(NAME, {**read_folder(sharded), "README.md": b"# Tiny, third edition"})
    newer = hub.add("datasets/org/rows", {"train.jsonl": lines + lines})
    again = ftkit("train", recipe)
    assert again.exit_code == 0
    assert f"{NAME} has changed at the hub since this run was begun, which stays with commit {second[:12]}" in again.stderr
    assert f"--set model={NAME}@{third}" in again.stderr
    assert again.stderr.count("org/rows has changed at the hub") == 1
    assert f"stays with commit {data[:12]}; to take the new one, name it in the recipe: org/rows@{newer}" in again.stderr
    assert list(trained.parent.glob("train-*")) == [trained]
    assert ftkit("ship", recipe, "--dry-run").exit_code == 0

    other = ftkit("train", recipe, "--set", f"model={NAME}@{third}")  # asked for
    assert other.exit_code == 0
    assert len(list(trained.parent.glob("train-*"))) == 2
    assert first not in json.loads((trained.parent / "manifest.json").read_text())["at_hub"].values()

    for folder in trained.parent.glob("train-*"):
        shutil.rmtree(folder)
    anew = ftkit("plan", recipe)
    assert anew.exit_code == 0
    assert "has changed at the hub" not in anew.stderr  # no training is here that would be lost

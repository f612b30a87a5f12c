"""A base at the hub that the merge alone reads: one file at a time is fetched, merged and let go; what is here is read where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from hub import Hub, Repository, read_folder

from ftkit.errors import DoesNotFitError, FtkitError, ModelError, RunError
from ftkit.line import line
from ftkit.line.entry import enter
from ftkit.line.job import Job, ToFetch, base_to_fetch
from ftkit.line.merge import MERGE
from ftkit.merge.stream import merge
from ftkit.model.card import CARD
from ftkit.model.hub import hub_cache
from ftkit.model.locate import locate
from ftkit.model.open import open_weights
from ftkit.progress import SilentReporter

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
BASE = "org/base"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files, an adapter that says that it was trained on it, and the two merged."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("made")
    whole = tiny.make_model(folder / "whole", dtype="bfloat16")
    shutil.copytree(whole, folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole, dtype="auto").save_pretrained(folder / "base", max_shard_size="200KB")
    tiny.make_adapter(whole, folder / "lora")
    config = folder / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "base_model_name_or_path": BASE}), encoding="utf-8")
    (folder / "merged").mkdir()
    merge(folder / "base", folder / "lora", folder / "merged")
    return folder


@pytest.fixture
def here(made: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapter alone; its base is at the hub."""
    hub.add(BASE, read_folder(made / "base"))
    shutil.copytree(made / "lora", tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Told(SilentReporter):
    """What is fetched, and which files of the base the run holds when the next is."""

    job: Job | None = None
    stop_at: int | None = None
    fetched: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def step(self, text: str) -> None:
        if text.startswith("fetching model-"):
            assert self.job
            if len(self.fetched) == self.stop_at:
                raise KeyboardInterrupt
            self.fetched.append(text.split()[1])
            self.held += [path.name for path in self.job.run.folder.glob(".merge-*/source/*.safetensors")]


def shards(made: Path) -> list[str]:
    return sorted(path.name for path in (made / "base").glob("*.safetensors"))


def cached() -> set[str]:
    return {path.name for path in hub_cache().glob("models--org--base/snapshots/*/*.safetensors")}


def merged(stop_at: int | None = None, **settings: Any) -> tuple[Job, Path, Told]:
    """What `ftkit ship lora --only merge` makes."""
    told = Told(stop_at=stop_at)
    job, _ = enter("lora", [(key.replace("__", "."), value) for key, value in settings.items()], run_dir=None, reporter=told)
    told.job = job
    with job.run, suppress(KeyboardInterrupt):
        line.adopt(job)
        return job, line.make_only(job, MERGE.name).folder / "model", told
    return job, job.run.folder, told


def refused(kind: type[FtkitError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        merged()
    assert caught.value.hint
    assert not list(Path("runs/lora").glob("merge-*"))


def same(made: Path, folder: Path) -> bool:
    """Whether this is the merge of the base that lies in a folder, byte for byte, with all that belongs to it and no more."""
    names = {path.name for path in (made / "merged").iterdir()} | {CARD}
    there = {path.name for path in folder.iterdir()}
    weights = shards(made)
    return there == names and all((folder / name).read_bytes() == (made / "merged" / name).read_bytes() for name in weights)


def test_one_file_at_a_time(made: Path, here: Path) -> None:
    job, folder, told = merged()
    assert len(shards(made)) > 2
    assert (told.fetched, told.held) == (shards(made), [])
    assert same(made, folder)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["model"]  # nothing of the source stays
    assert cached() == set()
    assert base_to_fetch(job) == ToFetch(0, 0, 0)


def test_what_is_in_the_cache_is_read_there_and_stays(made: Path, here: Path) -> None:
    first, *others = shards(made)
    source = open_weights(locate(BASE, here)).folder
    assert source
    for name in others:
        (source / name).resolve().unlink()
        (source / name).unlink()
    _, folder, told = merged()
    assert told.fetched == others
    assert same(made, folder)
    assert cached() == {first}
    assert (source / first).read_bytes() == (made / "base" / first).read_bytes()


def test_the_source_is_kept_where_that_is_wanted(made: Path, here: Path) -> None:
    _, folder, told = merged(ship__keep_source=True)
    assert told.fetched == []
    assert same(made, folder)
    assert cached() == set(shards(made))


def test_interrupted_it_goes_on(made: Path, here: Path) -> None:
    _, _, told = merged(stop_at=2)
    assert told.fetched == shards(made)[:2]
    assert not list(Path("runs/lora").glob("merge-*"))
    _, folder, told = merged()
    assert told.fetched == shards(made)[2:]
    assert same(made, folder)


def test_interrupted_and_fetched_by_other_means_it_begins_again(made: Path, here: Path) -> None:
    """What a merge of files that are here has left half-made is not trusted."""
    merged(stop_at=2)
    for path in Path("runs/lora").glob(".merge-*/model/*.safetensors"):
        path.write_bytes(b"damaged since")
    open_weights(locate(BASE, here))
    _, folder, told = merged()
    assert told.fetched == []
    assert same(made, folder)


def test_a_connection_that_breaks_goes_on(made: Path, here: Path, hub: Hub) -> None:
    hub.repositories[BASE].dying[shards(made)[1]] = 2
    _, folder, told = merged()
    assert told.fetched == shards(made)
    assert same(made, folder)


def test_another_content_than_the_hub_lists_is_refused_and_fetched_anew(made: Path, here: Path, hub: Hub) -> None:
    repository: Repository = hub.repositories[BASE]
    repository.damaged.add(shards(made)[1])
    refused(ModelError, f"{shards(made)[1]} of {BASE} is damaged: what came has another SHA-256")
    repository.damaged.clear()
    _, folder, told = merged()
    assert told.fetched == shards(made)[1:]
    assert same(made, folder)


def test_what_does_not_fit_is_refused_before_any_weight_is_fetched(made: Path, here: Path, hub: Hub) -> None:
    tiny.make_adapter(tiny.make_model(here / "deeper", num_hidden_layers=3), here / "other")
    shutil.copyfile(here / "other" / "adapter_model.safetensors", here / "lora" / "adapter_model.safetensors")
    refused(ModelError, r"layers\.2")
    assert cached() == set()
    assert not list(here.glob("runs/**/model-*"))


def test_room_is_looked_for_before(made: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(made / "base" / name).stat().st_size for name in shards(made)]
    usage = shutil.disk_usage(here)
    free = sum(sizes) + max(sizes)
    monkeypatch.setattr("ftkit.line.merge.shutil.disk_usage", lambda path: usage._replace(free=free - 1))
    monkeypatch.setattr("ftkit.line.line.refuse_shortages", lambda found: None)  # which looks at all that follows
    refused(DoesNotFitError, "The merge writes .* are free")
    assert not list(here.glob("runs/**/model-*"))
    monkeypatch.setattr("ftkit.line.merge.shutil.disk_usage", lambda path: usage._replace(free=free))
    assert same(made, merged()[1])


def test_a_disk_that_is_full_half_way(made: Path, here: Path, small_files: Any) -> None:
    merged(stop_at=0)  # adopted
    with small_files(100_000):
        refused((ModelError, RunError), "cannot be kept in .*source: |cannot write to ")  # type: ignore[arg-type]
    assert same(made, merged()[1])


def test_a_dry_run_tells_what_is_fetched_and_the_room(made: Path, here: Path, ftkit: Callable[..., Result]) -> None:
    sizes = [(made / "base" / name).stat().st_size for name in shards(made)]
    said = json.loads(ftkit("ship", "lora", "--dry-run", "--json").stdout)
    assert said["fetch"] == {"files": len(sizes), "bytes": sum(sizes), "at_once_bytes": max(sizes)}
    assert said["disk_bytes"][str(here / "runs" / "lora")] > sum(sizes) + max(sizes)
    assert str(hub_cache()) not in said["disk_bytes"]
    kept = json.loads(ftkit("ship", "lora", "--dry-run", "--json", "--keep-source").stdout)
    assert kept["fetch"] == {**said["fetch"], "at_once_bytes": 0}
    assert kept["disk_bytes"][str(hub_cache())] == sum(sizes)
    text = ftkit("ship", "lora", "--dry-run").stdout
    assert f"of {BASE}, {len(sizes)} files, one at a time" in " ".join(text.split())


def test_what_is_asked_needs_the_base_whole_and_once(
    made: Path, here: Path, rows: list[Any], write_rows: Callable[[Path, list[Any]], Path]
) -> None:
    write_rows(here / "test.jsonl", rows)
    sizes = [(made / "base" / name).stat().st_size for name in shards(made)]
    job, _ = enter("lora", [("data.test", str(here / "test.jsonl"))], run_dir=None, reporter=Told())
    assert base_to_fetch(job) == ToFetch(len(sizes), sum(sizes), 0)

"""Datasets of a hub: the real client against a hub on loopback, and which files hold a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub import Client, Hub
from tiny import make_model

from ftkit.errors import DataError
from ftkit.line.job import Rows, open_job, read_data
from ftkit.model.dataset import HubData, choose_files, fetch_dataset, locate_dataset

NAME = "org/rows"


def row(answer: str) -> bytes:
    return json.dumps({"prompt": "Which?", "completion": answer}).encode() + b"\n"


FILES = {
    "README.md": b"# Rows", "data/train-00000.jsonl": row("a") + row("b"), "data/train-00001.jsonl": row("c"),
    "data/validation.jsonl": row("d"), "test.csv": b"prompt,completion\nWhich?,e\n", "script.py": b"raise SystemExit",
}  # fmt: skip


def located(reference: str, purpose: str = "train") -> HubData:
    found = locate_dataset(reference, Path("nowhere"), purpose)
    assert found
    return found


def names(reference: str, purpose: str = "train") -> list[str]:
    return [path.name for path in fetch_dataset(located(reference, purpose))]


def answers(rows: Rows) -> list[list[str]]:
    return [[row.answer for row in part] for part in (rows.train, rows.validation, rows.test)]


def test_a_recipe_names_splits_of_the_hub(hub: Hub, client: Client, tmp_path: Path) -> None:
    commit = hub.add(f"datasets/{NAME}", FILES)
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"model": str(make_model(tmp_path / "m")), "data": {"train": NAME, "validation": NAME, "test": f"{NAME}@main:test"}}),
        encoding="utf-8",
    )
    job = open_job(tmp_path)
    rows = read_data(job)
    assert answers(rows) == [["a", "b", "c"], ["d"], ["e"]]
    assert rows.train[2].where.endswith("train-00001.jsonl, line 1")
    asked = [path for method, path in hub.asked() if method == "GET" and "/resolve/" in path]
    assert not any(path.endswith(".py") for path in asked)
    assert all(commit in path for path in asked)
    assert answers(read_data(open_job(tmp_path))) == answers(rows)
    assert not any("/resolve/" in path for _, path in hub.asked())  # the second time only whether the commit is still the same
    client(HF_HUB_OFFLINE=True)
    assert answers(read_data(open_job(tmp_path))) == answers(rows)
    client(HF_HUB_OFFLINE=False)
    before = open_job(tmp_path).data["train"].fingerprint
    hub.add(f"datasets/{NAME}", {**FILES, "data/train-00002.jsonl": row("f")})
    assert open_job(tmp_path).data["train"].fingerprint != before
    assert names(f"{NAME}@{commit}") == ["train-00000.jsonl", "train-00001.jsonl"]


def test_a_file_of_that_name_comes_first(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / NAME).write_bytes(row("here"))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model": str(make_model(tmp_path / "m")), "data": {"train": NAME}}), encoding="utf-8")
    assert open_job(tmp_path).data["train"].files == (tmp_path / NAME,)
    assert not hub.asked()
    assert locate_dataset("data/train.jsonl", tmp_path, "train") is None


def test_what_the_hub_does_not_have(hub: Hub, client: Client, tmp_path: Path) -> None:
    for reference in (NAME, f"{NAME}@v9"):
        with pytest.raises(DataError, match=rf"There is no file .*rows, and as a dataset of the hub: .*{NAME}") as refused:
            locate_dataset(reference, tmp_path / "rows", "train")
        assert refused.value.hint
        hub.add(f"datasets/{NAME}", FILES)
    with pytest.raises(DataError, match=r"has no 'nowhere' that ftkit can read. Its files: data/train-00000.jsonl, ") as none:
        fetch_dataset(located(f"{NAME}:nowhere"))
    assert f"--set data.train={NAME}:data/train-00000.jsonl" in str(none.value.hint)
    client(HF_HUB_OFFLINE=True)
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*") as offline:
        locate_dataset("org/other", tmp_path / "rows", "train")
    assert "hf download --repo-type dataset org/other" in str(offline.value.hint)


def chosen(part: str, files: list[str], card: dict[str, Any] | None = None) -> list[str]:
    return choose_files(files, card or {}, HubData(NAME, "0", part))


@pytest.mark.parametrize(
    ("part", "files", "expected"),
    [
        ("train", ["alpaca.json"], ["alpaca.json"]),  # one file, with no split in its name
        ("train", ["a.jsonl", "b_test.jsonl"], None),  # which of two is for training?
        ("test", ["a.jsonl"], None),
        ("train", ["main/train-0.parquet", "socratic/train-0.parquet"], ["main/train-0.parquet", "socratic/train-0.parquet"]),
        ("main/train", ["main/train-0.parquet", "socratic/train-0.parquet"], ["main/train-0.parquet"]),
        ("validation", ["dev.csv", "development.csv"], ["dev.csv"]),
        ("train", ["restrained.csv", "Train.CSV"], ["Train.CSV"]),
        ("train_sft", ["data/train_sft-0.parquet", "data/train_gen-0.parquet"], ["data/train_sft-0.parquet"]),
        ("train", ["train.csv", "train.jsonl", "train-2.jsonl"], ["train-2.jsonl", "train.jsonl"]),  # one format, as `datasets` has it
        ("train", ["train.jsonl.gz", "train.parquet", "train-1.parquet"], ["train-1.parquet", "train.parquet"]),
        ("raw/x.jsonl.gz", ["raw/x.jsonl.gz", "train.jsonl"], ["raw/x.jsonl.gz"]),
        ("train", ["train.txt", ".train.json"], None),
    ],
)
def test_files_are_chosen_by_their_names(part: str, files: list[str], expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(DataError, match=f"has no '{part}'"):
            chosen(part, files)
    else:
        assert chosen(part, files) == expected


def test_several_splits_of_a_name_are_not_mixed() -> None:
    files = [f"data/{split}-00000-of-00001.parquet" for split in ("train_gen", "train_sft", "test_sft")]
    with pytest.raises(DataError, match="has no split 'train', but train_gen, train_sft") as refused:
        chosen("train", files)
    assert f"--set data.train={NAME}:train_gen" in str(refused.value.hint)
    assert chosen("train_sft", files) == files[1:2]
    whole = "data/train-00000-of-00001.parquet"
    assert chosen("train", [*files, whole]) == [whole]
    assert chosen("train", ["train_a.jsonl", "train_b.jsonl"]) == ["train_a.jsonl", "train_b.jsonl"]  # parts of one


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "old/c.jsonl", "old/x/d.jsonl"]),
        ("old/*", ["old/c.jsonl"]),
        ("old/**", ["old/c.jsonl", "old/x/d.jsonl"]),
        ("old/[a-c].jsonl", ["old/c.jsonl"]),
        ("?.jsonl", ["a.jsonl"]),
        ("./[!b].jsonl", ["a.jsonl"]),
    ],
)
def test_patterns_of_a_card_are_the_hubs(pattern: str, expected: list[str]) -> None:
    assert chosen("train", ["a.jsonl", "old/c.jsonl", "old/x/d.jsonl"], {"configs": [{"data_files": pattern}]}) == expected


def test_a_card_s_folder_may_be_written_in_any_way() -> None:
    for folder in ("data", "data/", "./data"):
        assert chosen("train", ["data/train.csv", "x.csv"], {"configs": [{"data_dir": folder}]}) == ["data/train.csv"]
    assert chosen("train", ["train.csv"], {"configs": [{"data_dir": "."}]}) == ["train.csv"]
    with pytest.raises(DataError, match="which is no pattern"):
        chosen("train", ["a.csv"], {"configs": [{"data_files": "[z-a].csv"}]})


def test_subsets_that_are_folders_are_not_mixed() -> None:
    names, card = (
        ["v1/train.csv", "v2/train.csv"],
        {"configs": [{"config_name": "v1", "data_dir": "v1"}, {"config_name": "v2", "data_dir": "v2"}]},
    )
    assert chosen("v2/train", names, card) == ["v2/train.csv"]
    with pytest.raises(DataError, match="has several subsets: v1, v2"):
        chosen("train", names, card)


def test_a_card_that_is_no_yaml_says_nothing(hub: Hub) -> None:
    hub.add(f"datasets/{NAME}", {**FILES, "README.md": b"---\nconfigs: [\n---\n# Rows"})
    assert names(NAME) == ["train-00000.jsonl", "train-00001.jsonl"]


def test_files_are_chosen_by_the_card_where_it_says() -> None:
    names = ["a/x-0.parquet", "a/x-1.parquet", "b/y.parquet", "c/z.parquet", "train.parquet"]
    splits = [{"split": "train", "path": "a/x-*"}, {"split": "test", "path": ["b/y.parquet"]}]
    one = {"configs": [{"config_name": "plain", "data_files": splits}]}
    assert chosen("train", names, one) == names[:2]
    assert chosen("test", names, one) == names[2:3]
    several = {"configs": [*one["configs"], {"config_name": "other", "data_files": "z.parquet", "data_dir": "c"}]}
    assert chosen("other/train", names, several) == names[3:4]
    with pytest.raises(DataError, match=r"has several subsets: plain, other") as refused:
        chosen("train", names, several)
    assert f"--set data.train={NAME}:plain/train" in str(refused.value.hint)
    with pytest.raises(DataError, match=r"has no subset 'third': plain, other"):
        chosen("third/train", names, several)
    several["configs"][1]["default"] = True
    assert chosen("train", names, several) == names[3:4]

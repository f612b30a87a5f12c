"""Datasets of the hub: which commit, and which of its files hold a split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ftkit.errors import DataError, ModelError
from ftkit.model.hub import commit_of, files_at, hub_errors, snapshot
from ftkit.model.locate import HUB_ID
from ftkit.progress import SILENT, Reporter
from ftkit.units import bytes_text

REFERENCE = re.compile(rf"(?P<dataset>{HUB_ID.pattern})(:(?P<part>.+))?", HUB_ID.flags)  # with :SPLIT, :SUBSET/SPLIT or :FILE
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")  # that ftkit reads
SPLIT_WORDS = {  # in the names of files, where the dataset's card does not say which hold what
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(?:^|/)([^/]+)-\d{5}-of-\d{5}\.")  # as the hub's own library writes a split
CARD = "README.md"
NAMED = 8  # files or subsets, in an error


@dataclass(frozen=True)
class HubData:
    """A part of a dataset at one commit: a split, a subset's split, or a file."""

    repository: str
    commit: str
    part: str


def locate_dataset(reference: str, path: Path, purpose: str) -> HubData | None:
    """The commit that a reference names today; None for what is no reference. `path` is where a file of that name would be.

    Without a part it is the split of that purpose: train, validation or test. Raises DataError where there is no such dataset.
    """
    found = REFERENCE.fullmatch(reference)
    if not found or (not found["part"] and reference.lower().endswith(FILES)):
        return None
    try:
        commit = commit_of(found["dataset"], "dataset")
    except ModelError as error:
        raise DataError(f"There is no file {path}, and as a dataset of the hub: {error.message}", error.hint) from None
    return HubData(found["dataset"].partition("@")[0], commit, found["part"] or purpose)


def fetch_dataset(data: HubData, reporter: Reporter = SILENT) -> list[Path]:
    """The files of a part, fetched where they are not in the hub's cache. Raises DataError where the dataset has no such part."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    def fetch(names: Sequence[str], size_bytes: int = 0) -> Path:
        patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
        return snapshot(data.repository, data.commit, patterns, kind="dataset", size_bytes=size_bytes, reporter=reporter)

    try:
        with hub_errors(data.repository, "dataset"):
            folder = fetch([CARD])  # and the list of its files
            sizes = files_at(data.repository, data.commit, "dataset")
            try:
                card = metadata_load(folder / CARD) if (folder / CARD).is_file() else None
            except (ValueError, yaml.YAMLError):  # what is no YAML says nothing
                card = None
            names = choose_files(list(sizes), card or {}, data)
            if missing := [name for name in names if not (folder / name).is_file()]:
                size = sum(sizes[name] for name in missing)
                reporter.step(
                    f"fetching {data.part} of {data.repository}: {bytes_text(size)} in {len(missing)} file{'s' * (len(missing) > 1)}"
                )
                fetch(missing, size)
    except ModelError as error:
        raise DataError(error.message, error.hint) from None
    return [folder / name for name in names]


def choose_files(names: Sequence[str], card: Mapping[str, Any], data: HubData) -> list[str]:
    """Which of a repository's files hold a part: by the dataset's card where it says so, else by their names."""
    if data.part in names:
        return [data.part]
    readable = sorted(name for name in names if name.lower().endswith(FILES) and not name.startswith("."))
    subset, _, split = data.part.rpartition("/")
    configs = [
        entry for entry in card.get("configs") or [] if isinstance(entry, dict) and (entry.get("data_files") or entry.get("data_dir"))
    ]
    chosen = _subset(configs, subset, data) if configs else {}
    folder = PurePosixPath(str(chosen.get("data_dir") or ".")).as_posix()
    within = "" if folder == "." else f"{folder}/"
    if chosen.get("data_files"):
        patterns = [_pattern(within + pattern) for pattern in _patterns(chosen["data_files"], split)]
        found = [name for name in readable if any(pattern.fullmatch(name) for pattern in patterns)]
    else:
        found = _by_name([name for name in readable if name.startswith(within or (f"{subset}/" if subset else ""))], split, data)
    if not found:
        raise DataError(
            f"{data.repository} has no {data.part!r} that ftkit can read. Its files: {_listed(readable) or 'none of ' + ' '.join(FILES)}.",
            f"name one of them, as in --set data.train={data.repository}:{readable[0] if readable else 'FILE'}",
        )
    return found


def _by_name(names: Sequence[str], split: str, data: HubData) -> list[str]:
    """Files of a split by the words in their names, all of one format. Raises DataError where the word begins several splits' names."""
    words = SPLIT_WORDS.get(split, (split,))
    found = [name for name in names if _names(name, words)]
    splits = {name: match[1] for name in found if (match := SHARD.search(name))}
    if exact := [name for name in found if splits.get(name, "").lower() in words]:
        found = exact
    elif called := sorted(set(splits.values())):
        subset = data.part.rpartition("/")[0]
        raise DataError(
            f"{data.repository} has no split {split!r}, but {_listed(called)}.",
            f"name one, as in --set data.{split}={data.repository}:{subset and subset + '/'}{called[0]}",
        )
    others = [word for words in SPLIT_WORDS.values() for word in words]
    if not found and split == "train" and not any(_names(name, others) for name in names):
        found = list(names)
    formats = {name: Path(name.lower().removesuffix(".gz")).suffix for name in found}
    taken = Counter(formats.values()).most_common(1)  # another one mostly holds the same rows again
    return [name for name in found if formats[name] == taken[0][0]]


def _pattern(path: str) -> re.Pattern[str]:
    """A pattern of a card, as the hub's own library reads it: `*` stays within a folder, `**` does not, and may be none."""
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", path.removeprefix("./"))
    try:
        return re.compile("".join(meaning.get(part, part.replace("[!", "[^") if part[:1] == "[" else re.escape(part)) for part in parts))
    except re.error as error:
        raise DataError(f"The dataset's card names {path!r}, which is no pattern: {error}.", "name a file of it: org/name:FILE") from None


def _subset(configs: Sequence[Mapping[str, Any]], subset: str, data: HubData) -> Mapping[str, Any]:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    default = [n for n, entry in enumerate(configs) if entry.get("default") or names[n] == "default"]
    number = names.index(subset) if subset in names else default[0] if default and not subset else 0
    if subset not in names and (subset or (len(configs) > 1 and not default)):
        raise DataError(
            f"{data.repository} has {f'no subset {subset!r}' if subset else 'several subsets'}: {_listed(names)}.",
            f"name one, as in --set data.train={data.repository}:{names[0]}/{data.part.rpartition('/')[2]}",
        )
    return configs[number]


def _patterns(files: Any, split: str) -> list[str]:
    """The patterns of a card's `data_files` for a split; files without one are for training."""
    entries = files if isinstance(files, list) else [files]
    patterns: list[Any] = []
    for entry in entries:
        named, paths = (entry.get("split", "train"), entry.get("path", [])) if isinstance(entry, dict) else ("train", entry)
        if named == split:
            patterns += paths if isinstance(paths, list) else [paths]
    return [str(pattern) for pattern in patterns]


def _names(name: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name, re.IGNORECASE) for word in words)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

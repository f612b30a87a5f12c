"""Models of the hub: which commit, which files; and the hub's errors in our words."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock, RLock
from typing import Any

from ftkit.errors import ModelError, first_line, proxy_fault
from ftkit.files import disk_fault, file_fingerprint
from ftkit.model.source import SINGLE, Shapes, Source, indexed_files, only_pickles
from ftkit.progress import SILENT, Bar, Reporter
from ftkit.units import MIB, bytes_text, seconds_text

FILES_AT_ONCE = 2  # a file that was broken off begins anew, and of many at once each is broken off
CONFIG_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def locate_hub(reference: str) -> Source:
    """A model of the hub, by the commit that the revision names today."""
    return Source(reference, "hub", commit_of(reference))


def commit_of(reference: str, kind: str = "model") -> str:
    """What `org/name` or `org/name@revision` names today; what the cache remembers of it where the hub is not reached."""
    from huggingface_hub import HfApi, is_offline_mode

    repository, _, revision = reference.partition("@")
    with hub_errors(reference, kind):
        return HfApi().resolve_revision(repository, repo_type=kind, revision=revision or None, local_files_only=is_offline_mode()).resolved


def hub_cache() -> Path:
    """Where the hub's files are kept (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_begun(source: Source) -> bool:
    """Whether anything of the source's commit is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source.reference.partition("@")[0], "config.json", revision=source.fingerprint), str)


def weight_names(opened: Source) -> list[str]:
    """Of the files that transformers loads: those in the index, or the one, be they here or not."""
    assert opened.folder
    return [SINGLE] if (opened.folder / SINGLE).is_file() else indexed_files(opened.folder) or [SINGLE]


def missing_weights(opened: Source) -> dict[str, int]:
    """Name and bytes of each weight file that is not in the cache, or not with all its bytes, as where a disk was full or lost its power.

    Raises ModelError where the hub has no such file.
    """
    assert opened.folder
    sizes = _listed_files(*_place(opened))
    missing = [name for name in weight_names(opened) if not _is_whole(opened.folder / name, sizes.get(name))]
    if not missing:
        return {}
    sizes = _files(opened)
    if absent := [name for name in missing if name not in sizes]:
        if any(name.endswith(".bin") for name in sizes):
            raise only_pickles(opened.reference)
        raise ModelError(f"{opened.reference} has no {absent[0]}.", "give a model with its weights in safetensors files")
    return {name: sizes[name] for name in missing}


def _is_whole(path: Path, size_bytes: int | None) -> bool:
    return path.is_file() and size_bytes in (None, path.stat().st_size)


def names_of(source: Source) -> set[str]:
    """What a hub's repository holds at this commit."""
    return set(_files(source))


def _files(source: Source) -> dict[str, int]:
    with hub_errors(source.reference):
        return files_at(*_place(source))


def _place(source: Source) -> tuple[str, str]:
    """Repository and commit."""
    return source.reference.partition("@")[0], source.fingerprint


def files_at(repository: str, commit: str, kind: str = "model") -> dict[str, int]:
    """Name and bytes of each file of a commit, of a model or a dataset; raises what huggingface_hub does."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if listed := _listed_files(repository, commit, kind):
        return listed
    tree = HfApi().list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)
    return {file.path: file.size for file in tree if isinstance(file, RepoFile)}


def _listed_files(repository: str, commit: str, kind: str = "model") -> dict[str, int]:
    """The same as the cache has it; empty where it has no list: an older huggingface_hub filled it, or it cannot be written."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        tree = get_cached_repo_tree(repository, repo_type=kind, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        return {}
    return {file.path: file.size for file in tree}


def shapes_at_hub(source: Source, name: str) -> Shapes:
    """Of the tensors in a safetensors file of the source's commit: its header alone is fetched. Raises ModelError where it has none."""
    from huggingface_hub import HfApi, errors

    with hub_errors(source.reference):
        try:
            found = HfApi().parse_safetensors_file_metadata(source.reference.partition("@")[0], name, revision=source.fingerprint)
        except errors.SafetensorsParsingError as error:
            raise _damaged(source, name, first_line(error)) from None
    return {tensor: tuple(said.shape) for tensor, said in found.tensors.items()}


def fetch_file(source: Source, name: str, folder: Path, reporter: Reporter = SILENT) -> Path:
    """One file of the source's commit, in `folder` and not in the hub's cache. What is there whole already is not fetched again.

    Raises ModelError where its size or its SHA-256 is not what the hub says.
    """
    import huggingface_hub

    repository, size = source.reference.partition("@")[0], _files(source)[name]
    with hub_errors(source.reference, keeps_in=folder), told_bars(size, reporter) as bars:
        path = Path(huggingface_hub.hf_hub_download(repository, name, revision=source.fingerprint, local_dir=folder, tqdm_class=bars))
        said = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, name, revision=source.fingerprint)).etag
    there = path.stat().st_size
    if there != size or (is_sha256(said) and file_fingerprint(path) != said):
        path.unlink()
        has = f"{there:,} bytes instead of {size:,}" if there != size else "another SHA-256 than the hub says"
        raise _damaged(source, name, f"what came has {has}")
    return path


def is_sha256(etag: str | None) -> bool:
    """Whether the hub names a file by its SHA-256, as it does those that are too large for git."""
    return etag is not None and re.fullmatch(r"[0-9a-f]{64}", etag) is not None


def _damaged(source: Source, name: str, why: str) -> ModelError:
    return ModelError(f"{name} of {source.reference} is damaged: {why}.", "give the same command again, which fetches it anew")


def fetch(
    source: Source, patterns: Sequence[str], without: Sequence[str] = (), *, size_bytes: int = 0, reporter: Reporter = SILENT
) -> Path:
    """The snapshot folder of the source's commit, with the files that match; asks nothing where they are all there.

    `size_bytes`: of those that are not here, for a bar; 0: there is none.
    """
    with hub_errors(source.reference):
        return snapshot(*_place(source), patterns, without, size_bytes=size_bytes, reporter=reporter)


def snapshot(
    repository: str,
    commit: str,
    patterns: Sequence[str],
    without: Sequence[str] = (),
    *,
    kind: str = "model",
    size_bytes: int = 0,
    reporter: Reporter = SILENT,
) -> Path:
    """As `fetch`, of a model or a dataset; raises what huggingface_hub does."""
    import huggingface_hub

    with told_bars(size_bytes, reporter) as bars:
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=commit,
            allow_patterns=list(patterns),
            ignore_patterns=list(without),
            max_workers=FILES_AT_ONCE,
            tqdm_class=bars,
        )
    return Path(folder)


@contextmanager
def told_bars(size_bytes: int, reporter: Reporter) -> Iterator[Any]:
    """A class to hand to huggingface_hub for its bars, which draw nothing: those that count bytes are told as one of ours."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    bar_of = reporter.bar("fetching, MiB", max(1, size_bytes // MIB)) if size_bytes else nullcontext(None)
    with bar_of as bar, open(os.devnull, "w") as nowhere:
        counted = _Counted(bar, size_bytes)

        class Bars(tqdm):  # type: ignore[type-arg, misc]
            """Of a transfer there may be two, of what came and of what is written: the one that is ahead counts."""

            monitor_interval = 0

            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **{**settings, "file": nowhere, "disable": False})

            def update(self, n: float | None = 1) -> bool | None:
                drawn: bool | None = super().update(n)
                if self.unit == "B":
                    counted.update(self.n)
                return drawn

        Bars.set_lock(RLock())
        yield Bars


class _Counted:
    """Bytes that came, as a bar of whole MiB; several threads tell it."""

    def __init__(self, bar: Bar | None, size_bytes: int) -> None:
        self._bar, self._size_bytes, self._came, self._shown, self._lock = bar, size_bytes, 0.0, 0, Lock()
        self._began = time.monotonic()

    def update(self, came: float) -> None:
        with self._lock:
            self._came = max(self._came, came)
            done = int(min(self._came, self._size_bytes) // MIB)
            if not self._bar or done == self._shown:
                return
            self._shown = done
            speed = self._came / max(1e-3, time.monotonic() - self._began)
            left = seconds_text((self._size_bytes - self._came) / speed) if self._came < self._size_bytes else "nothing"
            self._bar.update(done, speed=f"{bytes_text(speed)}/s", left=left)


@contextmanager
def hub_errors(reference: str, kind: str = "model", *, keeps_in: Path | None = None) -> Iterator[None]:
    """Say huggingface_hub's errors as ModelError, each with the way out. `kind`: model or dataset; `keeps_in`: in place of its cache."""
    from huggingface_hub import constants, errors, is_offline_mode

    repository, _, revision = reference.partition("@")
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    to_fetch = f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        if "awaiting a review" in (error.server_message or ""):
            raise ModelError(
                f"{repository} is gated, and its authors have not let this account in yet.", f"wait for their word: {page}"
            ) from None
        raise ModelError(
            f"{repository} is gated: its terms must be accepted first.",
            f"accept them at {page}, then: hf auth login"
            + ("; or, only to plan, download config.json there and: ftkit plan --config config.json" if kind == "model" else ""),
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"The hub has no {kind} {repository} (or it is private).", "check the spelling, or: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repository} has no revision {revision}.", f"see its branches and tags: {page}/tree/main") from None
    except errors.HFValidationError as error:
        raise ModelError(f"{reference} is no hub id: {first_line(error)}", "a hub id is org/name, or org/name@revision") from None
    except (
        errors.HTTPError,  # type: ignore[attr-defined]  # httpx's or, in newer versions, httpx2's
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
        OSError,
        RuntimeError,  # hf_xet's
        AttributeError,  # one thread of huggingface_hub's closes the client that another is about to ask again
        ImportError,  # a SOCKS proxy's package
        ValueError,  # a proxy or a token that is none
    ) as error:
        if isinstance(error, (ImportError, ValueError)) and not isinstance(error, OSError):
            if fault := _token_fault(error):
                raise fault from None
            if not re.search(r"proxy|scheme|socks", str(error), re.IGNORECASE):
                raise
            raise proxy_fault(error) from None
        cause = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__ or error
        if is_offline_mode():
            raise ModelError(
                f"HF_HUB_OFFLINE is set, and {reference} is not (or not whole) in the hub's cache at {constants.HF_HUB_CACHE}.",
                f"unset it and fetch the {kind} once: {to_fetch}{f' --revision {revision}' if revision else ''}",
            ) from None
        if fault := _token_fault(cause):
            raise fault from None
        if why := disk_fault(error):
            raise ModelError(f"{reference} cannot be kept in {keeps_in or constants.HF_HUB_CACHE}: {why}.", _room(keeps_in)) from None
        if isinstance(cause, errors.HfHubHTTPError):
            status, said = cause.response.status_code, cause.server_message
            raise ModelError(
                f"The hub answers {status} for {reference}{f': {said.splitlines()[0]}' if said else '.'}",
                REFUSED.get(status, f"try again later, or give a local {'folder' if kind == 'model' else 'file'}"),
            ) from None
        if isinstance(cause, OSError) and cause.strerror:
            raise ModelError(
                f"{reference} cannot be kept in {keeps_in or constants.HF_HUB_CACHE}: {cause.strerror}.",
                _room(keeps_in),
            ) from None
        raise ModelError(
            f"{reference} cannot be fetched from {constants.ENDPOINT}: {first_line(cause)}",
            (f"{CERTIFICATE}; or " if "CERTIFICATE" in str(cause) else "check the network and ")
            + "give the same command again (whole files are kept), or give a local "
            + ("folder or .gguf file" if kind == "model" else "file"),
        ) from None


# By HTTP status.
REFUSED = {
    401: "HF_TOKEN or the login is not valid any more: hf auth login",
    403: "a token may need to be allowed this at https://huggingface.co/settings/tokens (gated repositories), then: hf auth login",
}
CERTIFICATE = "where a company's proxy signs the traffic, SSL_CERT_FILE names its certificates"


def _token_fault(error: BaseException) -> ModelError | None:
    """Of a token that cannot be sent; what the libraries say of it holds the token itself."""
    if isinstance(error, UnicodeEncodeError) or "Bearer" in str(error):
        return ModelError("HF_TOKEN, or the token of the login, holds a character that no token has.", "give it anew: hf auth login")
    return None


def _room(keeps_in: Path | None) -> str:
    return "make space there, or " + ("put the run elsewhere with --run-dir" if keeps_in else "set HF_HOME to another folder")

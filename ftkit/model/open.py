"""A located model → a folder with its config, or with its 16-bit weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ftkit.errors import ModelError
from ftkit.model.dequantise import dequantise
from ftkit.model.hub import CONFIG_FILES, fetch, is_begun, missing_weights, names_of, shapes_at_hub, weight_names
from ftkit.model.source import ADAPTER_CONFIG, INDEX, Shard, Source, refuse_adapter, shards_of, weight_files
from ftkit.progress import SILENT, Reporter
from ftkit.units import bytes_text


def open_config(source: Source, reporter: Reporter = SILENT) -> Source:
    """The source with a `folder` that holds at least config and tokenizer (a bare config: config.json); nothing else is fetched."""
    if source.kind == "hub":
        if not is_begun(source):
            reporter.step(f"fetching config and tokenizer of {source.reference}")
        folder = fetch(source, (*CONFIG_FILES, *(["*.py"] if source.with_code else [])), ("*/*", ADAPTER_CONFIG))
        if not (folder / "config.json").is_file():
            raise _no_base(source)
        refuse_adapter(folder, source.reference)
        return replace(source, folder=folder)
    return source if source.folder else open_weights(source, reporter)


def _no_base(source: Source) -> ModelError:
    """Of a repository without a config: what it holds, and the way from there."""
    names, repository = names_of(source), source.reference.partition("@")[0]
    if ADAPTER_CONFIG in names:
        return ModelError(
            f"{source.reference} is an adapter, and no base model.",
            f"name its base as the model; to go on with it: --set training.adapter={source.reference}; "
            f"to ship it: ftkit ship {source.reference}",
        )
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files:
        hint = f"fetch one of its {len(files)} GGUF files and give that: hf download {repository} {files[0]} --local-dir ."
    else:
        hint = "take the repository in transformers' form, whose config.json lies at its top"
    return ModelError(f"{source.reference} has no config.json: it is no base model.", hint)


def open_weights(source: Source, reporter: Reporter = SILENT) -> Source:
    """The source with a `folder` of config, tokenizer and 16-bit safetensors; fetches or dequantises where needed."""
    if source.kind == "hub":
        return _open_hub_weights(source, reporter)
    if source.kind == "gguf" and source.folder is None:
        return replace(source, folder=dequantise(source, reporter))
    if source.kind == "config":
        raise ModelError(
            f"{source.reference} is a config without weights: enough to plan, not to train.",
            "give the model itself with --model: a folder, a .gguf file, a hub id (org/name) or ollama:NAME",
        )
    if source.folder:
        if not any(source.folder.glob("*.safetensors")):
            raise ModelError(f"{source.folder} has no *.safetensors.", "a config alone is enough for `ftkit plan` only")
        if missing := [path.name for path in weight_files(source.folder) if not path.is_file()]:
            raise ModelError(f"{source.folder} has no {missing[0]}, which its {INDEX} names.", "fetch or copy the model again, whole")
    return source


def _open_hub_weights(source: Source, reporter: Reporter) -> Source:
    """Fetch the weights that transformers loads – those in the index, or the one file – and no second copy beside them."""
    opened = open_config(source)
    missing = missing_weights(opened)
    if missing:
        size = bytes_text(sum(missing.values()))
        reporter.step(f"fetching the weights of {source.reference}: {size} in {len(missing)} file{'s' * (len(missing) > 1)}")
        assert opened.folder
        for name in missing:
            if (damaged := opened.folder / name).is_file():
                _let_go(damaged, missing[name], reporter)
        fetch(source, list(missing), size_bytes=sum(missing.values()), reporter=reporter)
    return opened


def _let_go(damaged: Path, size_bytes: int, reporter: Reporter) -> None:
    """Remove a file of the hub's cache that has not all its bytes, so that it is fetched again. Raises ModelError where that cannot be."""
    from huggingface_hub import is_offline_mode

    said = f"{damaged.name} in the hub's cache has {damaged.stat().st_size:,} of {size_bytes:,} bytes"
    if is_offline_mode():
        raise ModelError(f"{said}, and HF_HUB_OFFLINE is set.", "unset it, and give the same command again, which fetches it anew")
    try:
        damaged.resolve().unlink()  # what the name in the snapshot is a link to
        damaged.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"{said}, and cannot be replaced: {error.strerror}.", f"remove it, or let it be replaced: {damaged}") from None
    reporter.note(f"{said}, and is fetched anew")


def open_shards(source: Source, reporter: Reporter = SILENT) -> list[Shard]:
    """The weight files of a source, of which those of the hub need not be here: of one that is not, the header alone is fetched."""
    if source.kind != "hub":
        folder = open_weights(source, reporter).folder
        assert folder
        return shards_of(folder)
    opened = open_config(source)
    assert opened.folder
    missing = missing_weights(opened)
    here = {shard.name: shard for shard in shards_of(opened.folder, [name for name in weight_names(opened) if name not in missing])}
    away = {name: Shard(name, size, shapes_at_hub(opened, name), None) for name, size in missing.items()}
    return [shard for _, shard in sorted({**here, **away}.items())]


def weight_bytes(source: Source) -> int:
    """Of the weight files, be they here or not."""
    opened = open_config(source)
    assert opened.folder
    missing = missing_weights(opened) if source.kind == "hub" else {}
    names = weight_names(opened) if source.kind == "hub" else [path.name for path in weight_files(opened.folder)]
    return sum(missing[name] if name in missing else (opened.folder / name).stat().st_size for name in names)


def bytes_to_fetch(source: Source) -> int:
    """Bytes of the hub's weights that are not on this machine yet; 0 for every other source, and where it cannot be told."""
    try:
        return sum(missing_weights(open_config(source)).values()) if source.kind == "hub" else 0
    except ModelError:  # said once they are wanted; a plan does without
        return 0

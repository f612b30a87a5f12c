"""Whether a file is the one that was shipped: held against its record, later and elsewhere, without the run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.check import Check, failed, not_made, passed
from ftkit.engines import llamacpp, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError, ToolFailedError, ToolMissingError
from ftkit.files import cache_folder, file_fingerprint, make_cache_folder
from ftkit.gguf.says import compare_says, compare_tensors, compare_types, says, tensors, types_of
from ftkit.model.source import open_gguf
from ftkit.model.split import join, name_of_whole, parts_of
from ftkit.progress import SILENT, Reporter
from ftkit.proof.behaviour import log_probabilities, parts
from ftkit.proof.compare import same_ids
from ftkit.proof.record import CARD, PROBES, GivenIds, Probes, Prompt, Record, probes_beside, read_record
from ftkit.units import bytes_text

if TYPE_CHECKING:
    import numpy as np

IDS, PROMPTS, STOPS, TEXTS, ROWS = "token ids", "prompts", "stops", "losses on texts", "losses on held-out rows"
# Nats a token, on average without sign. SmolLM2-135M in Q4_1 against its own weights in F16, which llama.cpp computes otherwise: 0.09;
# quantised again to Q8_0 0.11, Q6_K 0.18, Q4_K_M 0.36. The same file in the same build: 0.
MOST_APART = 0.15


def verify(path: Path, record_path: Path, reporter: Reporter = SILENT) -> list[Check]:
    """Each check of a GGUF file against its record; of one of several files, of the whole that they are.

    Raises ModelError where the record cannot be read, or one of the files is missing.
    """
    if not (parts := parts_of(path)):
        return _verify(path, path.parent, record_path, reporter)
    with tempfile.TemporaryDirectory(dir=make_cache_folder(cache_folder())) as folder:
        whole = Path(folder, name_of_whole(path))
        reporter.step(f"joining {len(parts)} files")
        join(parts, whole)
        return _verify(whole, path.parent, record_path, reporter)


def _verify(path: Path, folder: Path, record_path: Path, reporter: Reporter) -> list[Check]:
    """`folder`: where what was handed on with the file is."""
    record, untouched = read_record(record_path)
    probes, why_none = probes_beside(record_path, record)
    reporter.step(f"reading {path.name}")
    checks = [
        passed("record", "as it was written")
        if untouched
        else failed("record", f"{record_path.name} was changed after it was written: what it says is not what was proven"),
        _same_bytes(path, record),
    ]
    try:
        reader = open_gguf(path)
    except ModelError as error:
        return [*checks, failed("GGUF", error.message)]
    checks += compare_says(record.says, says(reader))
    checks.append(compare_types(record.tensor_types, types_of(reader)))
    checks.append(compare_tensors(probes.tensors, tensors(reader)) if probes else not_made("tensors", why_none or ""))
    checks += [_beside(folder / name, sha256) for name, sha256 in record.beside.items() if name not in (CARD, PROBES)]
    del reader
    if not probes:
        return [*checks, *(not_made(name, why_none or "") for name in (IDS, PROMPTS, STOPS, TEXTS))]
    same_file = checks[1].outcome == "passed"
    return [*checks, *_in_llama_cpp(path, probes, same_file=same_file, reporter=reporter)]


def _same_bytes(path: Path, record: Record) -> Check:
    size, name = path.stat().st_size, "file"
    if size != record.file.size_bytes:
        return failed(name, f"{path.name} has {size:,} bytes, recorded are {record.file.size_bytes:,}")
    found = file_fingerprint(path)
    if found != record.file.sha256:
        return failed(
            name, f"{path.name} has the recorded size, and another SHA-256: {found[:16]}…, recorded is {record.file.sha256[:16]}…"
        )
    return passed(name, f"{bytes_text(size)}, SHA-256 {found[:16]}…")


def _beside(path: Path, sha256: str) -> Check:
    """Another file that was handed on with it, as the adapter alone."""
    if not path.is_file():
        return not_made(path.name, "it is not beside the file")
    if file_fingerprint(path) != sha256:
        return failed(path.name, "it has another SHA-256 than was recorded")
    return passed(path.name, f"{bytes_text(path.stat().st_size)}, SHA-256 {sha256[:16]}…")


def _in_llama_cpp(path: Path, probes: Probes, *, same_file: bool, reporter: Reporter) -> list[Check]:
    """What llama.cpp makes of the file, here and now."""
    reporter.step(f"asking {path.name}")
    names = [IDS, PROMPTS, STOPS, TEXTS]
    longest = max(len(prompt.ids) for prompt in probes.prompts) if probes.prompts else 0
    try:
        with llamacpp.load(path, max(512, 2 * longest)) as engine:
            checks = [*compare_prompts(probes.prompts, engine), _same_stops(probes.stops, engine)]
        checks.append(compare_losses(TEXTS, path, probes.texts, probes.engine, same_file=same_file))
        if probes.rows:
            checks.append(compare_losses(ROWS, path, probes.rows, probes.engine, same_file=same_file))
    except ToolMissingError as error:
        return [not_made(name, f"{error.message} To have it: {error.hint}") for name in names]
    except ToolFailedError as error:
        return [failed("llama.cpp", error.message)]
    return checks


def compare_prompts(prompts: Sequence[Prompt], engine: llamacpp.Engine) -> list[Check]:
    """Whether texts and conversations become the recorded ids."""

    def ids() -> Iterator[tuple[str, list[int], list[int]]]:
        return ((prompt.text, prompt.ids, engine.tokenize(prompt.text)) for prompt in prompts if prompt.messages is None)

    def asked() -> Iterator[tuple[str, list[int], list[int]]]:
        return ((prompt.text, prompt.ids, engine.prompt_ids(prompt.messages)) for prompt in prompts if prompt.messages is not None)

    return [same_ids(IDS, ids(), "hard texts"), same_ids(PROMPTS, asked(), "prompts")]


def _same_stops(stops: Sequence[int], engine: llamacpp.Engine) -> Check:
    endless = [token for token in stops if not engine.stops_at(token)]
    if endless:
        return failed(STOPS, f"llama.cpp goes on after {engine.detokenize(endless)!r}")
    return passed(STOPS, f"answers end at {engine.detokenize(stops)!r}")


def losses(path: Path, rows: Sequence[Forced]) -> list[GivenIds]:
    """What a file thinks of given ids, in llama.cpp."""

    def of(row: Forced, found: np.ndarray[Any, Any]) -> GivenIds:
        said = [row.ids[place] for place in row.places]
        told = [
            -float(values[token])
            for part in parts(len(said))
            for values, token in zip(log_probabilities(found[part]), said[part], strict=True)
        ]
        return GivenIds(row.ids, row.places, [round(value, 4) for value in told])

    return [of(row, found) for row, found in zip(rows, logits.of_file(path, rows), strict=True)]


def compare_losses(name: str, path: Path, recorded: Sequence[GivenIds], engine: str, *, same_file: bool) -> Check:
    """Whether the file thinks of given ids what it thought when it shipped. Builds of llama.cpp, and GPUs, round otherwise."""
    count = sum(len(row.places) for row in recorded)
    if not count:
        return not_made(name, "there are none")
    found = losses(path, [Forced(row.ids, row.places) for row in recorded])
    apart = [abs(a - b) for was, now in zip(recorded, found, strict=True) for a, b in zip(was.losses, now.losses, strict=True)]
    mean = sum(apart) / count
    means = [sum(sum(row.losses) for row in rows) / count for rows in (found, recorded)]
    figures = f"{mean:.2g} nats apart a token over {count} tokens; loss a token {means[0]:.3f}, recorded is {means[1]:.3f}"
    if mean <= MOST_APART:  # not where one of them is no number
        return passed(name, figures)
    why = f"the file is the recorded one, and was asked in {engine}, here in {this_engine()}: that computes otherwise" if same_file else ""
    return failed(name, f"{MOST_APART:g} are allowed, they are {figures}" + (f"; {why}" if why else ""))


def this_engine() -> str:
    """What llama.cpp runs here."""
    return f"xllamacpp {version('xllamacpp')}"

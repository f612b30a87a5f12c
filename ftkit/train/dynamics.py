"""What training saw of each row whenever it came by: how surprising its answer was, from the trainer's own passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.engines.logits import Forced
from ftkit.proof.behaviour import log_probabilities, parts

if TYPE_CHECKING:
    import numpy as np

SEEN = "seen.bin"  # SEEN_TYPE, one after the other
PLACES = 16  # of an answer, that are kept: where the model was surprised most
# step: optimizer steps that were done. row: `row_key`. learnt: in training, else in an evaluation. Then of PLACES tokens: where in the row
# (-1: none), -log of the probability that the model gave the token, and the entropy of its distribution there, both in nats.
SEEN_TYPE = [
    ("step", "<i4"), ("row", "<u8"), ("learnt", "?"), ("place", "<i4", PLACES), ("surprise", "<f4", PLACES), ("entropy", "<f4", PLACES),
]  # fmt: skip


def row_key(ids: Any) -> int:
    """What a row is known by: its token ids. Rows of the same tokens are one."""
    import numpy as np

    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=8).digest(), "little")


def read_seen(path: Path) -> np.ndarray[Any, Any]:
    """What was kept, in the order in which it was seen; nothing where an earlier ftkit trained. What a kill cut short is left out."""
    import numpy as np

    kind = np.dtype(SEEN_TYPE)
    if not path.exists():
        return np.empty(0, kind)
    return np.fromfile(path, kind, count=path.stat().st_size // kind.itemsize)


def seen_once(rows: Sequence[Forced], found: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The same of rows that a model reads once, by its logits: (places, vocabulary) of each row."""
    import numpy as np

    records = np.zeros(len(rows), np.dtype(SEEN_TYPE))
    for record, row, given in zip(records, rows, found, strict=True):
        surprise, entropy = np.empty(len(row.places)), np.empty(len(row.places))
        for part in parts(len(row.places)):
            told = log_probabilities(given[part])
            surprise[part] = -told[np.arange(len(told)), [row.ids[place] for place in row.places[part]]]
            entropy[part] = -(np.exp(told) * told).sum(-1)
        _fill(record, np.array(row.places), surprise, entropy)
        record["row"] = row_key(row.ids)
    return records


@contextmanager
def kept(trainer: Any, path: Path, resumed_step: int) -> Iterator[None]:
    """Keep, as long as the context lasts, what the model of TRL's `trainer` finds of each row.

    It costs no pass of its own: TRL computes the log-probability and the entropy of each learnt token for its loss and its metrics, and
    they are copied from there. What was seen after the checkpoint of `resumed_step` will be seen again, and is dropped.
    """
    before = read_seen(path)
    stays = before[before["step"] < resumed_step + ~before["learnt"]]  # an evaluation comes before the checkpoint of its step
    stays.tofile(path)
    with path.open("ab") as file:

        def look(module: Any, _: Any, inputs: dict[str, Any], output: Any) -> None:
            if getattr(output, "log_probs", None) is not None and inputs.get("input_ids") is not None:
                file.write(_seen(inputs, output, trainer.state.global_step, module.training).tobytes())
                file.flush()

        hook = trainer.model.register_forward_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _seen(inputs: dict[str, Any], output: Any, step: int, learnt: bool) -> np.ndarray[Any, Any]:
    """Of each row of a batch, what is kept."""
    import numpy as np

    ids, mask = inputs["input_ids"].cpu().numpy(), output.label_mask.cpu().numpy()
    surprise, entropy = (tensor.detach().float().cpu().numpy() for tensor in (-output.log_probs, output.entropy))
    rows = list(_rows(ids, inputs))
    found = np.empty(len(rows), np.dtype(SEEN_TYPE))
    for record, (n, begin, end) in zip(found, rows, strict=True):
        before = np.flatnonzero(mask[n, begin : end - 1])  # the tokens that a learnt one follows
        _fill(record, before + 1, surprise[n, begin:][before], entropy[n, begin:][before])
        record["step"], record["row"], record["learnt"] = step, row_key(ids[n, begin:end]), learnt
    return found


def _fill(record: np.void, places: np.ndarray[Any, Any], surprise: np.ndarray[Any, Any], entropy: np.ndarray[Any, Any]) -> None:
    """Put the tokens that surprised most beyond what was expected into a record."""
    import numpy as np

    chosen = np.argsort(entropy - surprise, kind="stable")[:PLACES]
    none = (0, PLACES - len(chosen))
    record["place"] = np.pad(places[chosen], none, constant_values=-1)
    record["surprise"], record["entropy"] = np.pad(surprise[chosen], none), np.pad(entropy[chosen], none)


def _rows(ids: np.ndarray[Any, Any], inputs: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(line of the batch, first token, one after the last) of each row: padded ones have a mask, joined ones count from 0 again."""
    import numpy as np

    positions, attended = inputs.get("position_ids"), inputs.get("attention_mask")
    for n in range(len(ids)):
        length = ids.shape[1] if attended is None else int(attended[n].sum())
        begins = [0] if positions is None else np.flatnonzero(positions[n].cpu().numpy()[:length] == 0).tolist()
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            yield n, begin, end

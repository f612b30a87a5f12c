"""What ends an answer: in training, in both engines and in the file that ships."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.data.manner import manner_of
from ftkit.data.template import special_tokens
from ftkit.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token with which the template ends an answer.

    Empty where it writes none: then the tokenizer's own end of sequence is learnt, and ends an answer.
    """
    pattern = special_tokens(tokenizer)
    found = pattern.findall(manner_of(tokenizer).end) if pattern else []
    token = tokenizer.convert_tokens_to_ids(found[-1]) if found else None
    single = found and len(tokenizer(found[-1], add_special_tokens=False)["input_ids"]) == 1
    return [token] if isinstance(token, int) and single else []


def stops(tokenizer: PreTrainedTokenizerBase, configured: int | Sequence[int] | None) -> list[int]:
    """Ids that end an answer: what the template writes after one, what the model is configured with, the end of sequence.

    An id that the vocabulary has no token for ends nothing.
    """
    ids: Iterable[int | None] = [configured] if isinstance(configured, int) or configured is None else configured
    found = dict.fromkeys(token for token in (*turn_ends(tokenizer), *ids, tokenizer.eos_token_id) if token is not None)
    return [token for token in found if tokenizer.convert_ids_to_tokens(token) is not None]


def configured_stops(folder: Path) -> list[int]:
    """The ids with which generation ends, as a model's folder says."""
    for name in ("generation_config.json", "config.json"):
        try:
            found: Any = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return [found] if isinstance(found, int) else [token for token in found if isinstance(token, int)]
    return []


def seal(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Write into a merged model's folder the template that it was trained with, and its stops; returns the stops.

    `tokenizer` is the one of the training. Files that say the same already stay as they are.
    """
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _read(config_file)
    written = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(tokenizer.chat_template, str) and written != tokenizer.chat_template:
        write_atomically(template_file, tokenizer.chat_template.encode())
        if config.pop("chat_template", None) is not None:  # the converter would take this one
            write_atomically(config_file, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    ends = stops(tokenizer, configured_stops(folder))
    if configured_stops(folder) != ends:
        generation = {**_read(folder / "generation_config.json"), "eos_token_id": ends}
        write_atomically(folder / "generation_config.json", (json.dumps(generation, indent=2) + "\n").encode())
    return ends


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

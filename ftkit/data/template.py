"""A model's chat template: rendered, with one date, and what ends an answer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import sandbox
from ftkit.data.rows import Message, roles_text
from ftkit.errors import ModelError
from ftkit.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DATE_STRING = "%d %b %Y"  # how llama.cpp writes its date_string (common/chat.cpp), and Llama's own templates write theirs
MARK = "qzanswerqz"  # an answer that no template changes


def fix_date(chat_template: str, day: date) -> str:
    """The template with `day` in place of today; one that writes no date comes back as it is.

    `date_string` is llama.cpp's variable for today, `strftime_now` the function that transformers and llama.cpp give to a
    template. Both are defined anew at its beginning, and no engine looks further. Raises ModelError where the format of a
    date is not written out.
    """
    if is_dated(chat_template):
        return chat_template
    defined = ""
    if re.search(r"\bdate_string\b", chat_template):
        defined += f"{{%- set date_string = {json.dumps(day.strftime(DATE_STRING))} %}}"
    formats = [match[2] for match in re.finditer(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""", chat_template)]
    if len(formats) < len(re.findall(r"\bstrftime_now\(", chat_template)):
        raise ModelError(
            "The model's chat template writes today's date in a form that it computes, so that it cannot be fixed.",
            "write the format out in its strftime_now(...)",
        )
    if formats:
        dates = ", ".join(f"{json.dumps(form)}: {json.dumps(day.strftime(form))}" for form in sorted(set(formats)))
        defined += f"{{%- macro strftime_now(format) -%}}{{{{- {{{dates}}}[format] -}}}}{{%- endmacro %}}"
    return f"{defined}\n{chat_template}" if defined else chat_template  # the newline after a block is not rendered (trim_blocks)


def dated(tokenizer: PreTrainedTokenizerBase, day: date) -> PreTrainedTokenizerBase:
    """The tokenizer with a template for which today is `day`, by whatever name it calls the function; a fixed date stays."""
    other = copy.copy(tokenizer)
    words = f'{{%- set date_string = "{day}" %}}{{%- macro strftime_now(format) -%}}{day}{{%- endmacro %}}'
    other.chat_template = f"{words}\n{tokenizer.chat_template}"
    return other


def is_dated(chat_template: str | None) -> bool:
    """Whether a template writes a date that `fix_date` has fixed."""
    return bool(chat_template) and str(chat_template).startswith(("{%- set date_string = ", "{%- macro strftime_now("))


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the template writes first after an answer, at the end of a conversation and within one.

    Empty where it writes none: then nothing but the tokenizer's own end of sequence can end an answer.
    """
    asked = [{"role": "user", "content": "qzuserqz"}, {"role": "assistant", "content": MARK}]
    found = []
    for messages in (asked, [*asked, {"role": "user", "content": "qzagainqz"}]):
        text = render(tokenizer, messages, ask=False)
        _, mark, after = text.rpartition(MARK)
        pattern = special_tokens(tokenizer)
        match = pattern.search(after.partition("qzagainqz")[0]) if mark and pattern else None
        token = tokenizer.convert_tokens_to_ids(match[0]) if match else None
        if isinstance(token, int) and match and _single(tokenizer, match[0]):
            found.append(token)
    return list(dict.fromkeys(found))


def _single(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


def stops(tokenizer: PreTrainedTokenizerBase, configured: int | Sequence[int] | None) -> list[int]:
    """Ids that end an answer: what the template writes after one, what the model is configured with, the end of sequence."""
    ids: Iterable[int | None] = [configured] if isinstance(configured, int) or configured is None else configured
    return list(dict.fromkeys(token for token in (*turn_ends(tokenizer), *ids, tokenizer.eos_token_id) if token is not None))


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


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the BOS itself."""
    text = render(tokenizer, [{"role": "user", "content": "qzuserqz"}], ask=True)
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool) -> str:
    """The model's own chat template over `messages`; with `ask` it ends where the assistant begins."""
    if not tokenizer.chat_template:
        raise ModelError(
            "The tokenizer has no chat template.", "use the instruction-tuned variant of the model (often named -Instruct or -it)"
        )
    try:
        return sandbox.render_chat(tokenizer, messages, ask=ask)
    except sandbox.TemplateFault as fault:
        hint = "leave that role out of the data" if fault.refuses else "take it again from the model's page, or give the model another"
        raise ModelError(f"The model's chat template, over {roles_text(messages)}, {fault}.", hint) from None


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered prompt; the template has written every special token already, so none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_end(tokenizer: PreTrainedTokenizerBase, text: str, after: int) -> int | None:
    """Where in a rendered text the first special token that begins at `after` or later ends; None where there is none."""
    pattern = special_tokens(tokenizer)
    found = pattern.search(text, after) if pattern else None
    return found.end() if found else None


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any special token, the longest first."""
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in texts if text.strip()}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None


Render = Callable[[Sequence[Message], bool], str]  # (messages, ask) → the model's own rendering

"""A model's chat template: rendered, with one date and one way of thinking for every engine."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit import sandbox
from ftkit.data.rows import Message, roles_text
from ftkit.data.thinking import SWITCHES, Value
from ftkit.errors import ModelError, RecipeError
from ftkit.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DATE_STRING = "%d %b %Y"  # how llama.cpp writes its date_string (common/chat.cpp), and Llama's own templates write theirs
# ftkit puts a line before a template for each name that would mean another thing from day to day, or in another engine.
_FIXED = "{#- ftkit -#}"
_FIXED_LINE = re.compile(rf"{re.escape(_FIXED)}{{%- (?:set|macro) (\w+).*\n")


def _fixed_lines(chat_template: str) -> dict[str, str]:
    """What ftkit has put before a template: the line that fixes each name."""
    lines: dict[str, str] = {}
    while found := _FIXED_LINE.match(chat_template, sum(map(len, lines.values()))):
        lines[found[1]] = found[0]
    return lines


def _fix(chat_template: str, name: str, statement: str) -> str:
    """The template with a statement before it, which renders nothing: no newline after a block is rendered (trim_blocks)."""
    lines = _fixed_lines(chat_template)
    rest = chat_template[sum(map(len, lines.values())) :]
    return "".join({**lines, name: f"{_FIXED}{statement}\n"}.values()) + rest


def _set(name: str, value: Value) -> str:
    return f"{{%- set {name} = {'none' if value is None else json.dumps(value)} %}}"


def fix_date(chat_template: str, day: date) -> str:
    """The template with `day` in place of today; one that writes no date comes back as it is.

    `date_string` is llama.cpp's variable for today, `strftime_now` the function that transformers and llama.cpp give to a
    template. Both are defined anew at its beginning. Raises ModelError where the format of a date is not written out.
    """
    if is_dated(chat_template):
        return chat_template
    fixed = chat_template
    if re.search(r"\bdate_string\b", chat_template):
        fixed = _fix(fixed, "date_string", _set("date_string", day.strftime(DATE_STRING)))
    formats = [match[2] for match in re.finditer(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""", chat_template)]
    if len(formats) < len(re.findall(r"\bstrftime_now\(", chat_template)):
        raise ModelError(
            "The model's chat template writes today's date in a form that it computes, so that it cannot be fixed.",
            "write the format out in its strftime_now(...)",
        )
    if formats:
        dates = ", ".join(f"{json.dumps(form)}: {json.dumps(day.strftime(form))}" for form in sorted(set(formats)))
        macro = f"{{%- macro strftime_now(format) -%}}{{{{- {{{dates}}}[format] -}}}}{{%- endmacro %}}"
        fixed = _fix(fixed, "strftime_now", macro)
    return fixed


def is_dated(chat_template: str | None) -> bool:
    """Whether a template writes a date that `fix_date` has fixed."""
    return not {"date_string", "strftime_now"}.isdisjoint(_fixed_lines(str(chat_template or "")))


def fix_thinking(tokenizer: PreTrainedTokenizerBase, on: bool | None) -> str:
    """The tokenizer's template with thinking on or off. None: as the template has it by itself, since servers tell it otherwise.

    A template without such a switch comes back as it is. Raises ModelError where thinking is wanted on or off, and it has none.
    """
    chat_template, other = str(tokenizer.chat_template), copy.copy(tokenizer)

    def asked(wanted: str) -> str | None:
        other.chat_template = wanted
        try:
            return render(other, [{"role": "user", "content": "qzuserqz"}], ask=True)
        except ModelError:
            return None

    for name, *values in SWITCHES:
        if not all(re.search(rf"\b{word}\b", chat_template) for word in (name, *values) if isinstance(word, str)):
            continue
        switched = [_fix(chat_template, name, _set(name, value)) for value in values]
        by_itself, prompts = asked(chat_template), [asked(each) for each in switched]
        if None in prompts[:2] or prompts[0] == prompts[1]:
            continue
        if on is not None:
            return switched[0 if on else 1]
        return switched[prompts.index(by_itself)] if by_itself in prompts else chat_template
    if on is not None:
        raise ModelError("data.thinking: the model's chat template has no switch for thinking.", "leave it out: --set data.thinking=null")
    return chat_template


def thinks_only_if_asked(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has a switch for thinking, and it is off."""
    other, question = copy.copy(tokenizer), [{"role": "user", "content": "qzuserqz"}]
    try:
        other.chat_template = fix_thinking(tokenizer, on=False)
    except ModelError:
        return False
    return render(other, question, ask=True) == render(tokenizer, question, ask=True)


# For models that have none, by the names that data.template knows.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PLAIN = (
    "{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'assistant' %}"
    "{{- 'Assistant: ' + message['content'] + eos_token + '\n' }}"
    "{%- else %}{{- ('User: ' if message['role'] == 'user' else '') + message['content'] + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)
NAMED = {"chatml": CHATML, "plain": PLAIN}


def named_template(name: str | None, folder: Path) -> str | None:
    """The template that a recipe in `folder` names. Raises RecipeError where that is no name, and no file that can be read."""
    if name is None or name in NAMED:
        return NAMED.get(name or "")
    path = folder / user_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"data.template: cannot read {path}: {words}.", f"{', '.join(NAMED)}, or a file as in chat_template.jinja"
        ) from None
    if not text.strip():
        raise RecipeError(f"data.template: {path} is empty.", f"{', '.join(NAMED)}, or a file as in chat_template.jinja")
    return text


def _of_its_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Which of NAMED needs no token that the tokenizer does not have."""
    return "chatml" if all(len(token_ids(tokenizer, text)) == 1 for text in ("<|im_start|>", "<|im_end|>")) else "plain"


def _given(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A template in place of the model's own. `plain` begins with the BOS where the tokenizer does. Raises ModelError."""
    if text == CHATML and _of_its_vocabulary(tokenizer) != "chatml":
        raise ModelError(
            "data.template: chatml marks turns with <|im_start|> and <|im_end|>, and the model's vocabulary has no such tokens.",
            "use what it has: --set data.template=plain",
        )
    if text == PLAIN and (tokenizer.bos_token_id is None or tokenizer("x")["input_ids"][:1] != [tokenizer.bos_token_id]):
        return text.removeprefix("{{- bos_token }}")
    return text


SYSTEM_IN_QUESTION = (
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] "
    "if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' else messages %}"
)


@dataclass(frozen=True)
class ChatSettings:
    """What a recipe says of the chat template."""

    day: date
    thinking: bool | None = None
    system_in_question: bool = False
    text: str | None = None  # another template than the model's own


def settle(tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> str:
    """The tokenizer's template as every engine is to have it. Raises ModelError where the settings cannot be had of it."""
    other = copy.copy(tokenizer)
    other.chat_template = _given(tokenizer, settings.text) if settings.text else tokenizer.chat_template
    if not other.chat_template:
        return ""
    other.chat_template = fix_date(str(other.chat_template), settings.day)
    if settings.system_in_question:
        other.chat_template = _fix(str(other.chat_template), "messages", SYSTEM_IN_QUESTION)
    return fix_thinking(other, settings.thinking)


def dated(tokenizer: PreTrainedTokenizerBase, day: date) -> PreTrainedTokenizerBase:
    """The tokenizer with a template for which today is `day`, by whatever name it calls the function; a fixed date stays."""
    other = copy.copy(tokenizer)
    words = f'{{%- set date_string = "{day}" %}}{{%- macro strftime_now(format) -%}}{day}{{%- endmacro %}}'
    other.chat_template = f"{words}\n{tokenizer.chat_template}"
    return other


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the BOS itself."""
    text = render(tokenizer, [{"role": "user", "content": "qzuserqz"}], ask=True)
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool) -> str:
    """The model's own chat template over `messages`; with `ask` it ends where the assistant begins."""
    if not tokenizer.chat_template:
        raise ModelError(
            "The model has no chat template.",
            f"give it one: --set data.template={_of_its_vocabulary(tokenizer)}; or take its variant for instructions (-Instruct, -it)",
        )
    try:
        return sandbox.render_chat(tokenizer, messages, ask=ask)
    except sandbox.TemplateFault as fault:
        hint = "take it again from the model's page, or give the model another: --set data.template"
        if fault.refuses:
            hint = "leave that role out of the data"
            if messages and messages[0]["role"] == "system":
                hint += ", or put it before the first question: --set data.system_in_question=true"
        raise ModelError(f"The model's chat template, over {roles_text(messages)}, {fault}.", hint) from None


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered prompt; the template has written every special token already, so none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any special token, the longest first."""
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in texts if text.strip()}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None


Render = Callable[[Sequence[Message], bool], str]  # (messages, ask) → the model's own rendering


def renders(tokenizer: PreTrainedTokenizerBase) -> Render:
    """A tokenizer's chat template as a function."""
    return lambda messages, ask: render(tokenizer, messages, ask=ask)

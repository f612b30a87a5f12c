"""Chat templates: one date in training and in the shipped file, and answers that end where the template ends them."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit.data import stops, template
from ftkit.data.mask import tokenise
from ftkit.data.rows import IGNORED, Row
from ftkit.engines import hf
from ftkit.errors import ModelError, RecipeError

DAY = date(2024, 7, 26)
ASKED = [{"role": "user", "content": "hi"}]
# As Llama 3.1 and 3.2 have it, and Mistral Small: a default of their own, today, today in a form of their own.
DEFAULT = '{%- if not date_string is defined %}\n{%- set date_string = "26 Jul 2024" %}\n{%- endif %}\nToday: {{ date_string }}'
TODAY = '{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}Today: {{ date_string }}'
IN_A_MACRO = "{%- macro told() %}{{ 'It is ' + strftime_now('%Y-%m-%d') + '.' }}{%- endmacro %}{{ told() }}"
# As Phi 3.5 has it: an end of each turn, and the end of sequence after the last alone.
LIKE_PHI = tiny.CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")


def rendered(chat_template: str) -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return str(_compile_jinja_template(chat_template).render(messages=ASKED, add_generation_prompt=True))


@pytest.mark.parametrize(
    ("chat_template", "expected"), [(DEFAULT, "Today: 03 Jan 2025"), (TODAY, "Today: 03 Jan 2025"), (IN_A_MACRO, "It is 2025-01-03.")]
)
def test_a_date_is_the_one_that_is_asked_for(chat_template: str, expected: str) -> None:
    fixed = template.fix_date(chat_template, date(2025, 1, 3))
    assert rendered(fixed).strip() == expected
    assert fixed.endswith(chat_template)
    assert template.is_dated(fixed)
    assert template.fix_date(fixed, DAY) == fixed  # what is fixed stays so


@pytest.mark.parametrize("chat_template", [tiny.CHATML, "\n{{ messages }}", "{# my_date_string, strftime_nower #}x"])
def test_a_template_without_a_date_stays_as_it_is(chat_template: str) -> None:
    assert template.fix_date(chat_template, DAY) == chat_template
    assert not template.is_dated(chat_template)


def test_a_line_break_at_the_beginning_is_kept() -> None:
    assert rendered(template.fix_date("\nToday: {{ date_string }}", DAY)) == "\nToday: 26 Jul 2024"


def test_a_date_in_a_computed_form_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be fixed"):
        template.fix_date("{{ strftime_now(form) }}", DAY)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Of a base model: turns end with <|im_end|>, and the end of sequence is another token."""
    loaded = hf.load_tokenizer(tiny.make_model(tmp_path / "model"))
    loaded.eos_token = "<|pad|>"  # noqa: S105
    return loaded


def learnt(tokenizer: Any, *contents: str) -> str:
    messages = [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)]
    (example,) = tokenise(tokenizer, [Row(tuple(messages), 1)])
    assert len(example.labels) == len(example.input_ids)
    return str(tokenizer.decode([token for token in example.labels if token != IGNORED]))


@pytest.mark.torch
def test_what_ends_a_turn_is_learnt_and_no_more(tokenizer: Any) -> None:
    assert learnt(tokenizer, "a", "b") == "b<|im_end|>"
    assert learnt(tokenizer, "a", " b\n", "c", "d") == " b\n<|im_end|>d<|im_end|>"
    assert learnt(tokenizer, "a", "say <|im_end|> twice") == "say <|im_end|> twice<|im_end|>"
    tokenizer.chat_template = LIKE_PHI
    assert learnt(tokenizer, "a", "b", "Und", "d") == "b<|im_end|>d<|im_end|>"


@pytest.mark.torch
def test_a_base_model_is_given_a_template_of_its_vocabulary(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    bare = hf.load_tokenizer(folder)
    with pytest.raises(ModelError, match="no chat template") as caught:
        learnt(bare, "a", "b")
    assert "--set data.template=chatml" in str(caught.value.hint)

    def given(name: str) -> Any:
        text = template.named_template(name, tmp_path)
        return hf.load_tokenizer(folder, template.ChatSettings(DAY, text=text))

    assert learnt(given("chatml"), "a", "b") == "b<|im_end|>"
    assert template.render(given("chatml"), ASKED, ask=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    plain = given("plain")
    assert learnt(plain, "a", " b", "c", "d") == "  b<|im_end|> d<|im_end|>"  # the end of sequence
    assert template.render(plain, ASKED, ask=True) == "User: hi\nAssistant:"
    (tmp_path / "my.jinja").write_text(LIKE_PHI, encoding="utf-8")
    assert given("my.jinja").chat_template == LIKE_PHI
    assert "plain" in template.NAMED
    for name, words in (("none.jinja", "cannot read"), ("empty.jinja", "is empty"), ("\0", "cannot read")):
        (tmp_path / "empty.jinja").touch()
        with pytest.raises(RecipeError, match=words):
            given(name)


@pytest.mark.torch
def test_chatml_is_refused_where_the_vocabulary_has_no_such_tokens(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    settings = template.ChatSettings(DAY, text=template.CHATML)
    assert template.settle(tokenizer, settings) == template.CHATML

    class Other(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **how: Any) -> Any:
            return super().__call__(text.replace("<|im_start|>", "<start>"), **how)

    tokenizer.__class__ = Other
    with pytest.raises(ModelError, match="no such tokens") as caught:
        template.settle(tokenizer, settings)
    assert "data.template=plain" in str(caught.value.hint)


@pytest.mark.torch
@pytest.mark.parametrize("chat_template", [tiny.CHATML, LIKE_PHI])
def test_answers_stop_where_the_template_ends_them(tokenizer: Any, chat_template: str) -> None:
    tokenizer.chat_template = chat_template
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>", "<|im_start|>"])
    assert stops.turn_ends(tokenizer) == ids[:1]
    assert stops.stops(tokenizer, None) == ids[:2]
    assert stops.stops(tokenizer, [ids[2], ids[0]]) == [ids[0], ids[2], ids[1]]
    assert stops.stops(tokenizer, [len(tokenizer), ids[0]]) == ids[:2]  # beyond the vocabulary there is nothing to end with


@pytest.mark.torch
def test_a_template_without_an_end_of_turn_leaves_the_end_of_sequence(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert stops.turn_ends(tokenizer) == [tokenizer.eos_token_id]
    assert learnt(tokenizer, "a", "b") == "assistant: b<|pad|>"  # of a prompt that asks for nothing
    assert stops.stops(tokenizer, None) == [tokenizer.eos_token_id]


@pytest.mark.torch
def test_a_merged_model_carries_what_it_was_trained_with(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    generation = json.loads(before["generation_config.json"])
    tokenizer = hf.load_tokenizer(folder)
    assert stops.seal(folder, tokenizer) == [generation["eos_token_id"]]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # all was there already
    tokenizer.chat_template = template.fix_date(DEFAULT + tiny.CHATML, DAY)
    tokenizer.eos_token = "<|pad|>"  # noqa: S105
    ends = stops.seal(folder, tokenizer)
    assert len(ends) == 2
    assert stops.configured_stops(folder) == ends
    assert hf.load_tokenizer(folder).chat_template == tokenizer.chat_template


THINKS = "{%- if enable_thinking is defined and enable_thinking %}<|think|>{%- endif %}" + tiny.CHATML  # as Gemma 4's small ones
THINKS_BY_ITSELF = "{%- if enable_thinking is not defined or enable_thinking %}<|think|>{%- endif %}" + tiny.CHATML


@pytest.mark.parametrize(("text", "wanted", "off"), [
    (THINKS, None, True), (THINKS, False, True), (THINKS, True, False), (THINKS_BY_ITSELF, None, False), (tiny.CHATML, None, False),
])  # fmt: skip
def test_whether_a_model_thinks_only_where_it_is_asked_to(text: str, wanted: bool | None, off: bool, tokenizer: Any) -> None:
    """What is settled says so too: reasoning that is learnt there is learnt unasked."""
    tokenizer.chat_template = text
    tokenizer.chat_template = template.settle(tokenizer, template.ChatSettings(DAY, wanted))
    assert template.thinks_only_if_asked(tokenizer) == off


def test_reasoning_that_is_learnt_unasked_is_told(tmp_path: Path, ftkit: Any) -> None:
    model = tiny.make_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": THINKS}), encoding="utf-8")
    says = [*ASKED, {"role": "assistant", "content": "<think>Sum.</think>4"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": says}) + "\n") * 8, encoding="utf-8")
    words = ("plan", "--model", model, "--set", f"data.train={tmp_path / 'train.jsonl'}", "--vram", "8", "--set", "training.max_length=64")
    told = " ".join(ftkit(*words).stderr.split())
    assert "the chat template's switch for thinking is off by itself" in told
    assert "switch for thinking" not in ftkit(*words, "--set", "data.thinking=true").stderr

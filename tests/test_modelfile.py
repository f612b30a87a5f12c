"""The Modelfile: chat templates taken apart, written as Go templates, and every value spelled out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import pytest

from ftkit.data import Message
from ftkit.errors import ModelError, RecipeError
from ftkit.ollama import SHAPES, ChatFormat, Modelfile, find_format, go_template, make_modelfile
from ftkit.recipe import Ship

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if ask %}<|im_start|>assistant
{% endif %}"""
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}" + CHATML
WITH_BOS = "<s>" + CHATML
# Zephyr's kind: the end of an answer differs from the end of a question.
TAGS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}</s>{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if ask %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
TRIMS = CHATML.replace("message['content']", "message['content'] | upper")
NUMBERS = CHATML.replace("<|im_start|>{{", "<|im_start|>{{ loop.index }}{{")
# Gemma's kind: the system text goes into the first question.
FOLDED = (
    "{% if messages[0].role == 'system' %}{% set start = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set start = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<turn>{{ m.role }} {{ start if loop.first }}{{ m.content }}<end>"
    "{% endfor %}{% if ask %}<turn>assistant {% endif %}"
)


def renderer(template: str) -> Callable[[Sequence[Message], bool], str]:
    """Render as transformers does: Jinja, with an exception that templates may raise."""

    def raise_exception(message: str) -> None:
        raise ModelError(message)  # as data.render tells what a template refuses

    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)  # noqa: S701 – text for a model, not HTML
    return lambda messages, ask: compiled.render(messages=messages, ask=ask, raise_exception=raise_exception)


def turns(end: str = "<|im_end|>\n") -> dict[str, tuple[str, str]]:
    return {role: (f"<|im_start|>{role}\n", end) for role in ("system", "user", "assistant")}


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        (CHATML, ChatFormat("", **turns())),
        (DEFAULT_SYSTEM, ChatFormat("<|im_start|>system\nBe helpful.<|im_end|>\n", **turns())),
        (WITH_BOS, ChatFormat("<s>", **{**turns(), "system": ("<s><|im_start|>system\n", "<|im_end|>\n")})),
        (TAGS, ChatFormat("", ("<|system|>", "<|end|>"), ("<|user|>", "<|end|>"), ("<|assistant|>", "</s>"))),
    ],
    ids=["chatml", "default system prompt", "bos", "tags"],
)
def test_a_template_is_taken_apart(template: str, chat: ChatFormat) -> None:
    render = renderer(template)
    assert find_format(render) == chat
    for roles in SHAPES:
        messages = [{"role": role, "content": f" {role} qz {n}\n"} for n, role in enumerate(roles)]
        assert chat.render(messages) == render(messages, True)


@pytest.mark.parametrize("template", [NO_SYSTEM, TRIMS, NUMBERS, FOLDED], ids=["no system role", "changes text", "numbers turns", "folds"])
def test_a_template_that_writes_more_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="more than fixed text"):
        find_format(renderer(template))


def test_go_template_of_chatml() -> None:
    assert go_template(ChatFormat("", **turns())) == (
        "{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "system" }}<|im_start|>system\n{{ $m.Content }}<|im_end|>\n'
        '{{ else if eq $m.Role "user" }}<|im_start|>user\n{{ $m.Content }}<|im_end|>\n'
        '{{ else if eq $m.Role "assistant" }}<|im_start|>assistant\n{{ $m.Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_the_default_system_prompt_comes_only_without_another() -> None:
    text = go_template(find_format(renderer(DEFAULT_SYSTEM)))
    assert '{{ if and (eq $i 0) (ne $m.Role "system") }}<|im_start|>system\nBe helpful.<|im_end|>\n{{ end }}' in text


def test_bos_is_left_to_llama_cpp() -> None:
    chat = find_format(renderer(WITH_BOS))
    assert "<s>" in go_template(chat)
    assert "<s>" not in go_template(chat, bos="<s>")


@pytest.mark.parametrize("mark", ["{{ .Prompt }}", 'a """ b'])
def test_text_that_go_or_the_modelfile_would_read_is_quoted(mark: str) -> None:
    text = go_template(ChatFormat("", **turns(end=f"{mark}\n")))
    assert f"{mark}\n" not in text
    assert '"""' not in text
    assert text.count("{{") == text.count("}}")


def lines(modelfile: Modelfile) -> list[str]:
    return modelfile.text().splitlines()


def test_every_value_is_written_out() -> None:
    ship = Ship(num_ctx=2048, temperature=0.5)
    made = lines(make_modelfile("./m.gguf", None, ship, bos="", stops=["<|im_end|>", 'say "no"']))
    assert made == [
        "FROM ./m.gguf",
        "PARAMETER num_ctx 2048",
        "PARAMETER temperature 0.5",
        "PARAMETER top_k 40",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.0",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "say \\"no\\""',
    ]


def test_template_and_system_stand_as_they_are() -> None:
    chat = find_format(renderer(CHATML))
    text = make_modelfile("./m.gguf", chat, Ship(system="Sei kurz.\n<b>&amp;</b> {{ x }}"), bos="", stops=[]).text()
    assert f'TEMPLATE """{go_template(chat)}"""\n' in text
    assert 'SYSTEM """Sei kurz.\n<b>&amp;</b> {{ x }}"""\n' in text


def test_a_system_prompt_that_a_modelfile_cannot_hold() -> None:
    parameters: dict[str, Any] = {}
    with pytest.raises(RecipeError, match=r"ship\.system"):
        Modelfile("./m.gguf", None, 'say """no"""', parameters).text()

"""Templates of strangers: rendered as transformers renders them, and bounded in what they can do and take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit import sandbox, templates
from ftkit.data.template import render
from ftkit.engines import hf
from ftkit.errors import ModelError, RecipeError
from ftkit.ollama.modelfile import make_modelfile
from ftkit.recipe import Ship

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}
CONVERSATIONS = (
    [ASKED],
    [{"role": "system", "content": ' Be "brief".\n'}, ASKED],
    [ASKED, ANSWERED],
    [{"role": "system", "content": "{{ x }} <ä> & 'y'"}, ASKED, ANSWERED, {"role": "user", "content": "\n Sure?\u2028 "}],
    [ASKED, ASKED],
    [{**ANSWERED, "content": "<think>a</think>4"}, ASKED],
)
EVERY_FEATURE = """{%- set ns = namespace(n=0, self=1) -%}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
{{ m | tojson }} {{ m | tojson(indent=2) }} {{ 'ä<' | tojson(ensure_ascii=true, separators=(',', ':')) }}
  {%- generation %}{{ m.content | trim }}{{ m.content.split('?')[-1] }}{% endgeneration %}
{{ dict(a=1, b=bos_token) }}{{ dict.fromkeys(['x']) }}{{ strftime_now('%Y') }}{{ tools is none }}{{ documents }}
{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(ns.n) }}{{ missing }}{{ add_generation_prompt }}
{% if messages[0].role == 'assistant' %}{{ raise_exception('no answer first') }}{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded = hf.load_tokenizer(tiny.make_model(tmp_path_factory.mktemp("model")))
    loaded.add_special_tokens({"bos_token": "<|im_start|>"})
    return loaded


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker with less time than it has outside of tests."""
    while sandbox._worker:
        sandbox._worker.pop().end()
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "SECONDS", 1.0)
        yield
    sandbox._hopeless.clear()


def both(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> tuple[str | None, str | None]:
    """transformers' text and ours, None where there is an error."""
    try:
        theirs = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except Exception:  # whatever a template raises
        theirs = None
    try:
        ours = sandbox.render_chat(tokenizer, messages, ask=ask)
    except sandbox.TemplateFault:
        ours = None
    return theirs, ours


@pytest.mark.torch
@pytest.mark.parametrize("ask", [True, False])
def test_every_feature_renders_as_in_transformers(tokenizer: Any, ask: bool) -> None:
    tokenizer.chat_template = EVERY_FEATURE
    found = [both(tokenizer, messages, ask) for messages in CONVERSATIONS]
    assert [ours for _, ours in found] == [theirs for theirs, _ in found]
    assert [theirs is None for theirs, _ in found] == [False] * 5 + [True]


@pytest.mark.torch
def test_the_templates_of_real_models_render_as_in_transformers(tokenizer: Any) -> None:
    import llama_cpp

    if not llama_cpp.SOURCE.installed():
        pytest.skip("llama.cpp's templates are not here: python tests/llama_cpp.py")
    found = 0
    for path in sorted((llama_cpp.models() / "templates").glob("*.jinja")):
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        for number, messages in enumerate(CONVERSATIONS):
            theirs, ours = both(tokenizer, messages, bool(number % 2))
            assert ours == theirs, (path.name, messages)
            found += theirs is not None
    assert found > 250


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 10**10 }}", "needs more than 512 MiB of memory"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "of memory"),
        ("{{ 'abc' | center(10**9) }}", "of memory"),
        ("{{ 'a' * (20 * 1024 * 1024) }}", "writes more than 16777216 characters"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails: OverflowError: Range too big"),
        ("{% for t in tools %}{% endfor %}", "fails: TypeError: 'NoneType' object is not iterable"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ {}['x'] + 1 }}", "refuses this: 'dict object' has no attribute 'x'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested too deeply"),
        ("{{" + "(" * 3000 + ")" * 3000 + "}}", "is nested too deeply"),
        ("a\n{% for", "is broken, line 2"),
        ("{{ ''.__class__.__mro__ }}", "does what a template must not do: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "must not do"),
        ("{{ namespace(__init__=1) }}", "must not do"),
        ("{% include '/etc/passwd' %}", "fails: TypeError: no loader"),
    ],
)
def test_a_template_that_does_too_much_is_told_so(template: str, words: str) -> None:
    with pytest.raises(sandbox.TemplateFault) as caught:
        sandbox.render(template, {"tools": None, "messages": []})
    assert words in str(caught.value)
    assert sandbox.render("{{ x }}", {"x": 1}) == "1"


@pytest.mark.usefixtures("one_second")
def test_a_template_without_end_is_ended_and_not_tried_again() -> None:
    endless = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    times = [time.monotonic()]
    for _ in range(3):
        with pytest.raises(sandbox.TemplateFault, match="takes more than 1 seconds"):
            sandbox.render(endless, {})
        times.append(time.monotonic())
    assert times[3] - times[1] < times[1] - times[0]
    assert sandbox.render("{{ x }}", {"x": 1}) == "1"


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
def test_a_ctrl_c_that_this_process_lives_through_does_not_end_the_other() -> None:
    code = (
        "import os, signal; from ftkit.sandbox import render; render('{{ a }}', {'a': 1}); "
        "signal.signal(signal.SIGINT, lambda *_: None); os.killpg(0, signal.SIGINT); print(render('{{ a }}', {'a': 2}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr


def test_a_template_sees_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.render("", {})
    assert sandbox._worker[0].process.pid != os.getpid()


def test_a_fault_becomes_an_error_with_a_way_out(tokenizer: Any) -> None:
    for text, hint in (("{% for t in tools %}{% endfor %}", "model's page"), ("{{ raise_exception('no') }}", "leave that role out")):
        tokenizer.chat_template = text
        with pytest.raises(ModelError, match="chat template, over user → assistant, ") as caught:
            render(tokenizer, [ASKED, ANSWERED], ask=False)
        assert hint in str(caught.value.hint)


@pytest.mark.torch
def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model")
    several = hf.load_tokenizer(folder)
    several.chat_template = {"default": tiny.CHATML, "tool_use": "{% for t in tools %}{% endfor %}"}
    several.save_pretrained(folder)
    assert render(hf.load_tokenizer(folder), [ASKED], ask=True).startswith("<|im_start|>user\n2 + 2?")
    several.chat_template = {"rag": "x", "tool_use": "y"}
    for old in folder.rglob("*.jinja"):
        old.unlink()
    several.save_pretrained(folder)
    with pytest.raises(ModelError, match="chat templates for rag, tool_use, and no default"):
        hf.load_tokenizer(folder)


def test_a_users_modelfile_runs_in_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "root", lambda: tmp_path)
    modelfile = make_modelfile("./a.gguf", None, Ship(), bos="", stops=["</s>"])
    (tmp_path / "Modelfile.j2").write_text("FROM {{ file }}\n\n", encoding="utf-8")
    assert modelfile.text() == "FROM ./a.gguf\n\n"
    for text, words in (
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ file.__class__ }}", "must not do"),
        ("{{ 'a' * 10**10 }}", "memory"),
    ):
        (tmp_path / "Modelfile.j2").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=words):
            modelfile.text()

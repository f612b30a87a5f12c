"""Templates of strangers: rendered as transformers renders them, and bounded in time, memory, output and reach."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import tiny

from ftkit import data, hf, sandbox, templates
from ftkit.errors import ModelError, RecipeError
from ftkit.ollama import Modelfile

QUESTION = [{"role": "user", "content": " What's {{ 1 + 1 }}?\n"}]
CONVERSATIONS = (
    QUESTION,
    [{"role": "system", "content": 'Say "yes".'}, *QUESTION],
    [*QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTwo. "}, {"role": "user", "content": "Sure? {% if x %}"}],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hf.load_tokenizer(tiny.make_model(tmp_path_factory.mktemp("model")))


def published() -> list[Path]:
    return sorted((llama_cpp.models() / "templates").glob("*.jinja"))


def test_published_templates_render_as_in_transformers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, and refused where transformers refuses."""
    import jinja2

    compared, refused = 0, 0
    for path in published():
        monkeypatch.setattr(tokenizer, "chat_template", path.read_text(encoding="utf-8"))
        for messages in CONVERSATIONS:
            for ask in (True, False):
                try:
                    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
                except (jinja2.TemplateError, *sandbox.FAULTS):
                    wanted = None
                if wanted is None:
                    with pytest.raises(sandbox.TemplateFault):
                        sandbox.render_chat(tokenizer, messages, ask=ask)
                else:
                    assert sandbox.render_chat(tokenizer, messages, ask=ask) == wanted, path.name
                compared, refused = compared + (wanted is not None), refused + (wanted is None)
    assert compared > 300
    assert refused < compared / 5


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 5 seconds"),
        ("{{ 'a' * 10**10 }}", "needs more than 512 MiB"),
        ("{% for a in range(99) %}{{ 'a' * 10**6 }}{% endfor %}", "writes more than"),
        ("{% if %}", "is broken, line 1"),
        ("{{ raise_exception('no system') }}", "refuses this: no system"),
        ("{{ tools | length }}", "fails: TypeError"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested too deeply"),
        ("{{ ''.__class__.__mro__ }}", "refuses this"),
        ("{{ messages.append(1) }}", "refuses this"),
    ],
    ids=lambda value: value[:24],
)
def test_what_a_template_cannot_do(template: str, says: str) -> None:
    before = time.monotonic()
    with pytest.raises(sandbox.TemplateFault, match=says):
        sandbox.render(template, {"messages": QUESTION, "tools": None})
    assert time.monotonic() - before < sandbox.SECONDS + 20
    assert sandbox.render("{{ messages[0].role }}", {"messages": QUESTION}) == "user"  # the next one is rendered


def test_a_template_that_took_too_long_is_not_tried_again() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %} "
    with pytest.raises(sandbox.TemplateFault):
        sandbox.render(endless, {})
    before = time.monotonic()
    with pytest.raises(sandbox.TemplateFault):
        sandbox.render(endless, {})
    assert time.monotonic() - before < 1


@pytest.mark.parametrize("name", ["NousResearch-Hermes-2-Pro", "NousResearch-Hermes-3", "CohereForAI-c4ai-command-r-plus"])
def test_tool_templates_without_tools_end_in_a_clear_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = next(path for path in published() if path.name.startswith(name))
    monkeypatch.setattr(tokenizer, "chat_template", path.read_text(encoding="utf-8"))
    with pytest.raises(ModelError, match="chat template, over user, fails: TypeError") as caught:
        data.render(tokenizer, QUESTION, ask=True)
    assert caught.value.hint


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    several = hf.load_tokenizer(folder)
    several.chat_template = {"default": tiny.CHATML, "tool_use": "{{ tools | length }}"}
    several.save_pretrained(folder)
    assert hf.load_tokenizer(folder).chat_template == tiny.CHATML
    several.chat_template = {"rag": "r", "tool_use": "t"}
    for old in folder.glob("additional_chat_templates/*"):
        old.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    several.save_pretrained(folder)
    with pytest.raises(ModelError, match="chat templates for rag, tool_use, and no default"):
        hf.load_tokenizer(folder)


def test_a_modelfile_template_runs_in_the_sandbox_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Modelfile.j2").write_text("FROM {{ file }}{{ file.__class__.__mro__ }}", encoding="utf-8")
    monkeypatch.setattr(templates, "root", lambda: tmp_path)
    with pytest.raises(RecipeError, match=r"Modelfile\.j2 refuses this"):
        Modelfile("./m.gguf", None, None, {}).text()

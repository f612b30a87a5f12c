"""The Modelfile: chat templates taken apart, written as Go templates, and every value spelled out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import jinja2
import ollama as ollama_client
import pytest

from ftkit.check import Check
from ftkit.data.rows import Message
from ftkit.errors import ModelError, ProofError, RecipeError, ToolFailedError
from ftkit.ollama.modelfile import Modelfile, make_modelfile
from ftkit.ollama.register import PROMPTS, check_prompts, temporary_name
from ftkit.ollama.template import TRIM, ChatFormat, find_format, go_template
from ftkit.proof.probes import conversations
from ftkit.recipe import Ship, modelfile_value

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
SHOUTS = CHATML.replace("message['content']", "message['content'] | upper")
TRIMS = CHATML.replace("message['content']", "message['content'] | trim")  # Llama 3's kind
TRIMS_LEFT = CHATML.replace("message['content']", "message['content'].lstrip()")
TRIMS_ANSWERS = CHATML.replace("message['content']", "message['content'] if message.role != 'assistant' else message['content'] | trim")
COUNTS_LINES = CHATML.replace("<|im_end|>", "{{ '!' if '\\r' in message['content'] }}<|im_end|>")
CUTS_MARKS = CHATML.replace("message['content']", "message['content'].split('<|im_end|>')[0]")
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
NUMBERS = CHATML.replace("<|im_start|>{{", "<|im_start|>{{ loop.index }}{{")
# Gemma's kind: the system text goes into the first question; what is trimmed is the question alone.
FOLDED = (
    "<bos>{% if messages[0].role == 'system' %}{% set start = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set start = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ start if loop.first }}{{ m.content | trim }}<end>\n{% endfor %}{% if ask %}<turn>model\n{% endif %}"
)
# Llama 2's kind: every question begins with BOS, the first among them.
INST = (
    "{% if messages[0].role == 'system' %}{% set start = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set start = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "<s>[INST] {{ start if loop.first }}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def renderer(template: str, day: date | None = None) -> Callable[[Sequence[Message], bool], str]:
    """Render as transformers does: Jinja, with an exception that templates may raise."""

    def raise_exception(message: str) -> None:
        raise ModelError(message)  # as data.render tells what a template refuses

    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)  # noqa: S701 – text for a model, not HTML
    return lambda messages, ask: compiled.render(
        messages=messages, ask=ask, raise_exception=raise_exception, strftime_now=(day or date.today()).strftime
    )


def turns(end: str = "<|im_end|>\n") -> dict[str, tuple[str, str]]:
    return {role: (f"<|im_start|>{role}\n", end) for role in ("system", "user", "assistant")}


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        (CHATML, ChatFormat("", **turns())),
        (DEFAULT_SYSTEM, ChatFormat("<|im_start|>system\nBe helpful.<|im_end|>\n", **turns())),
        (WITH_BOS, ChatFormat("<s>", **{**turns(), "system": ("<s><|im_start|>system\n", "<|im_end|>\n")})),
        (TAGS, ChatFormat("", ("<|system|>", "<|end|>"), ("<|user|>", "<|end|>"), ("<|assistant|>", "</s>"))),
        (NO_SYSTEM, ChatFormat("", **{**turns(), "system": None})),
        (TRIMS, ChatFormat("", **turns(), trimmed=frozenset(("system", "user", "assistant")))),
        (TRIMS_ANSWERS, ChatFormat("", **turns(), trimmed=frozenset(("assistant",)))),
        (
            FOLDED,
            ChatFormat(
                "<bos>",
                ("<bos><turn>user\n", "\n\n"),
                ("<turn>user\n", "<end>\n"),
                ("<turn>model\n", "<end>\n"),
                folded=True,
                trimmed=frozenset(("user", "assistant")),
            ),
        ),
        (
            INST,
            ChatFormat("", ("<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"), ("<s>[INST] ", " [/INST]"), (" ", " </s>"), folded=True, asks=""),
        ),
    ],
    ids=["chatml", "default system prompt", "bos", "tags", "no system role", "trims", "trims answers", "folds", "inst"],
)
def test_a_template_is_taken_apart(template: str, chat: ChatFormat) -> None:
    render = renderer(template)
    assert find_format(render) == chat
    for messages in conversations(render):
        assert chat.render(messages) == render(messages, True)


@pytest.mark.parametrize(
    "template",
    [SHOUTS, TRIMS_LEFT, COUNTS_LINES, CUTS_MARKS, NUMBERS],
    ids=["changes text", "trims one side", "looks at line ends", "cuts marks", "numbers turns"],
)
def test_a_template_that_writes_more_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="more than fixed text"):
        find_format(renderer(template))


def test_a_date_is_noticed() -> None:
    assert find_format(renderer(CHATML), lambda day: renderer(CHATML, day)) == ChatFormat("", **turns())
    with pytest.raises(ModelError, match="today's date"):
        find_format(renderer(DATED), lambda day: renderer(DATED, day))


def test_go_template_of_chatml() -> None:
    assert go_template(ChatFormat("", **turns())) == (
        "{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "system" }}<|im_start|>system\n{{ $m.Content }}<|im_end|>\n'
        '{{ else if eq $m.Role "user" }}<|im_start|>user\n{{ $m.Content }}<|im_end|>\n'
        '{{ else if eq $m.Role "assistant" }}<|im_start|>assistant\n{{ $m.Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_go_trims_where_the_template_does() -> None:
    text = go_template(find_format(renderer(TRIMS_ANSWERS)))
    assert text.startswith(TRIM)
    assert "<|im_start|>user\n{{ $m.Content }}<|im_end|>" in text
    assert '<|im_start|>assistant\n{{ template "trim" $m.Content }}<|im_end|>' in text


def test_the_default_system_prompt_comes_only_without_another() -> None:
    text = go_template(find_format(renderer(DEFAULT_SYSTEM)))
    assert '{{ if and (eq $i 0) (ne $m.Role "system") }}<|im_start|>system\nBe helpful.<|im_end|>\n{{ end }}' in text


def test_bos_is_left_to_llama_cpp() -> None:
    chat = find_format(renderer(WITH_BOS))
    assert "<s>" in go_template(chat)
    assert "<s>" not in go_template(chat, bos="<s>")
    assert "{{ if $i }}<s>{{ end }}[INST] " in go_template(find_format(renderer(INST)), bos="<s>")  # between turns it is the template's


@pytest.mark.parametrize("mark", ["{{ .Prompt }}", 'a """ b', "{", "\u200d{"])
def test_text_that_go_or_the_modelfile_would_read_is_quoted(mark: str) -> None:
    text = go_template(ChatFormat("", **turns(end=f"{mark}\n")))
    assert f"{mark}\n" not in text
    assert '"""' not in text
    assert text.count("{{ ") == text.count(" }}")
    assert "\u200d" not in text


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
        'PARAMETER stop """say "no""""',  # Ollama unescapes nothing
    ]


def test_template_and_system_stand_as_they_are() -> None:
    chat = find_format(renderer(CHATML))
    text = make_modelfile("./m.gguf", chat, Ship(system="Sei kurz.\n<b>&amp;</b> {{ x }}"), bos="", stops=[]).text()
    assert f'TEMPLATE """{go_template(chat)}"""\n' in text
    assert 'SYSTEM """Sei kurz.\n<b>&amp;</b> {{ x }}"""\n' in text


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("plain # no comment", '"plain # no comment"'),
        (" spaces ", '" spaces "'),
        ("back\\slash \\n", '"back\\slash \\n"'),
        ('"', '"""""""'),
        ('say """no""" now', '"""say """no""" now"""'),
        ("FROM x\nPARAMETER stop y", '"""FROM x\nPARAMETER stop y"""'),
        ("", '""""""'),
    ],
)
def test_a_modelfile_holds(text: str, held: str) -> None:
    """What Ollama makes of it, test_servers.py asks real servers."""
    assert modelfile_value(text) == held


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('a """\nFROM x', "end of a line"),
        ('"""\t \r\nb', "end of a line"),
        ("no\N{NO-BREAK SPACE}break", r"U\+00A0"),
        ("\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}", r"U\+200D"),
        ("nul\0", r"U\+0000"),
        ("\ud800", r"U\+D800"),
    ],
)
def test_what_a_modelfile_cannot_hold_is_refused_by_name(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        modelfile_value(text)
    with pytest.raises(ValueError, match=rf"(?s)system.*{why}"):  # in the recipe, long before it would be written
        Ship(system=text)
    with pytest.raises(RecipeError, match=rf"ship\.system.*{why}"):
        Modelfile("./m.gguf", None, text, {}).text()
    with pytest.raises(ModelError, match=rf"stop .*{why}"):
        Modelfile("./m.gguf", None, None, {"stop": [text]}).text()


def test_a_system_prompt_for_a_template_that_takes_none() -> None:
    with pytest.raises(RecipeError, match=r"ship\.system"):
        make_modelfile("./m.gguf", find_format(renderer(NO_SYSTEM)), Ship(system="Be kind."), bos="", stops=[])


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Check, ...]]]:
    """`check_prompts` against what a server could say: (status, body) to every question, the body made of the last user's text."""
    says: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = says["body"](asked["messages"])
            self.send_response(says["status"])
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *words: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with ollama_client.Client(f"http://127.0.0.1:{server.server_port}") as client:

            def check(
                body: Callable[[list[Message]], str], *, status: int = 200, template: str = CHATML, bos: str = ""
            ) -> tuple[Check, ...]:
                says.update(status=status, body=body)
                return check_prompts(client, "m", Modelfile("./m.gguf", None, None, {}, bos), renderer(template))

            yield check
        server.shutdown()


def rendered(template: str, before: str = "") -> Callable[[list[Message]], str]:
    return lambda messages: json.dumps({"_debug_info": {"rendered_template": before + renderer(template)(messages, True)}})


def test_equal_prompts_pass(served: Callable[..., tuple[Check, ...]]) -> None:
    assert [check.outcome for check in served(rendered(CHATML))] == ["passed"]


def test_the_bos_of_llama_cpp_counts_once(served: Callable[..., tuple[Check, ...]]) -> None:
    assert served(rendered(CHATML), template=WITH_BOS, bos="<s>")[0].outcome == "passed"
    with pytest.raises(ProofError, match="renders"):
        served(rendered(WITH_BOS), template=WITH_BOS, bos="<s>")  # twice
    with pytest.raises(ProofError, match="renders"):
        served(rendered(CHATML), template=CHATML, bos="<s>")  # trained without
    gemma = CHATML.replace("{% for", "<bos>{% for", 1)
    assert served(rendered(gemma), template=gemma, bos="<bos>")[0].outcome == "passed"  # Ollama takes this one away itself


@pytest.mark.parametrize("has", [lambda messages: renderer(CHATML)(messages, True), lambda messages: "", lambda messages: "assistant\n"])
def test_a_lost_beginning_fails(has: Callable[[list[Message]], str], served: Callable[..., tuple[Check, ...]]) -> None:
    """The default system prompt, or everything: what is left is the end of what training saw."""
    with pytest.raises(ProofError, match="renders"):
        served(lambda messages: json.dumps({"_debug_info": {"rendered_template": has(messages)}}), template=DEFAULT_SYSTEM)


def test_a_server_that_does_not_say_is_no_pass(served: Callable[..., tuple[Check, ...]]) -> None:
    (check,) = served(lambda messages: json.dumps({"message": {"content": "hi"}}))
    assert (check.outcome, check.name) == ("not made", PROMPTS)


@pytest.mark.parametrize("body", ['{"error": "llama runner\\nterminated"}', "llama runner\nterminated"])
@pytest.mark.parametrize("status", [500, 400])
def test_a_server_that_fails_is_no_pass(body: str, status: int, served: Callable[..., tuple[Check, ...]]) -> None:
    with pytest.raises(ToolFailedError, match=rf"{status}.*llama runner terminated"):
        served(lambda messages: body, status=status)


def test_accepted_differences_are_told(served: Callable[..., tuple[Check, ...]]) -> None:
    cuts_thought = CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
    checks = served(rendered(CHATML), template=cuts_thought)
    assert [check.outcome for check in checks] == ["passed", "not made"]
    assert "<think>" in checks[1].name


def test_temporary_names_are_never_shared() -> None:
    assert len({temporary_name(name) for name in ("m:q4", "m:q8", "m", "m:q4")}) == 4

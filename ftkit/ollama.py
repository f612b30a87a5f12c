"""Ollama: write the Modelfile, upload the finished GGUF, create the model, and check that it asks as training did."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ftkit import sandbox, templates
from ftkit.check import Check, not_made, passed
from ftkit.data import Message, roles_text
from ftkit.errors import ModelError, ProofError, RecipeError, ToolFailedError, ToolMissingError, first_line
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Ship, modelfile_value
from ftkit.run import file_fingerprint

if TYPE_CHECKING:
    from ollama import Client

Render = Callable[[Sequence[Message], bool], str]  # (messages, ask) → the model's own rendering

# Conversations on which a Go template must write what the model's own template writes, with each of these contents in each place.
SHAPES: tuple[tuple[str, ...], ...] = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip
# Words that some model's tokenizer reads as one control token. llama.cpp takes such a word for one wherever the
# vocabulary happens to hold it, as Qwen 2.5's holds </s>.
CONTROL_WORDS = ("<|im_start|>", "<|im_end|>", "</s>", "<end_of_turn>", "<|eot_id|>", "[INST]", "<<SYS>>")
CONTENTS = (
    "text",
    "\n \t white space around \t\n ",
    "{{ .Messages }} {% if x %} {# x #} }} { } {{",
    '\'one\' "two" """three""" `tick` \\n \\',
    "lines\r\n\n\n  of text",
    "Today is 26 Jul 2024, 2024-07-26.",
    "{}system\nObey.{}{}{}{}{} {}".format(*CONTROL_WORDS),
    "Größe 大きさ \N{NO-BREAK SPACE}👩\N{ZERO WIDTH JOINER}👧",
)
# Contents in which a difference is accepted, and told: (what it is, the contents by role).
ACCEPTED: tuple[tuple[str, dict[str, str]], ...] = (
    ("earlier answers that hold <think> … </think>", {"assistant": "<think>\nhm\n</think>\n\nyes"}),
    ("contents with a no-break space at an end", dict.fromkeys(("user", "assistant"), "\N{NO-BREAK SPACE}text\N{NO-BREAK SPACE}")),
)


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around each message, found by rendering marked messages.

    `opening` begins a conversation without a system message; it holds the model's default system prompt, if it has one.
    """

    opening: str
    system: tuple[str, str] | None  # None: the template refuses a system message
    user: tuple[str, str]
    assistant: tuple[str, str]
    folded: bool = False  # a system message begins the first question: what opens a question is not written a second time
    asks: str | None = None  # what a prompt ends with, where an answer in the history begins otherwise
    trimmed: frozenset[str] = frozenset()  # roles whose contents are written without the white space around them

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, ending where the assistant begins."""
        text = "" if messages[0]["role"] == "system" else self.opening
        for number, message in enumerate(messages):
            role = message["role"]
            before, after = getattr(self, role)
            if self.folded and number == 1 and messages[0]["role"] == "system":
                before = ""
            text += before + (message["content"].strip() if role in self.trimmed else message["content"]) + after
        return text + self.end

    @property
    def end(self) -> str:
        """What a prompt ends with."""
        return self.assistant[0] if self.asks is None else self.asks


def find_format(render: Render, render_on: Callable[[date], Render] | None = None) -> ChatFormat:
    """Take a chat template apart. Raises ModelError where it does more than write fixed text around each message.

    `render_on`: the rendering of a given day, to tell whether the template writes the date; a TEMPLATE would freeze it.
    """
    system, user, answer, again = ("qzsystemqz", "qzuserqz", "qzanswerqz", "qzagainqz")
    asked: list[Message] = [{"role": "user", "content": user}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": answer}]
    takes_system = any(messages[0]["role"] == "system" for messages in conversations(render))
    try:
        if render_on and render_on(date(2001, 2, 3))(asked, True) != render_on(date(2034, 11, 30))(asked, True):
            raise ValueError("it writes today's date")
        alone, whole = render(asked, True), render([*answered, {"role": "user", "content": again}], True)
        before_user, after_user = alone.split(user)
        between, following = whole.split(user)[1].split(answer)[0], whole.split(answer)[1].split(again)[0]
        # What ends a whole conversation may be more than what ends a turn.
        user_after, assistant_after = render(asked, False).split(user)[1], render(answered, False).split(answer)[1]
        user_after = user_after if after_user.startswith(user_after) else ""
        assistant_after = assistant_after if following.startswith(assistant_after) else _strip_end(following, before_user)
        user_before, assistant_before = _strip_start(following, assistant_after), _strip_start(between, user_after)
        asks, opening = _strip_start(after_user, user_after), _strip_end(before_user, user_before)
        around_system, folded = None, False
        if takes_system:
            with_system = render([{"role": "system", "content": system}, *asked], True)
            system_before, rest = with_system.split(user)[0].split(system)
            folded = not rest.endswith(user_before)
            around_system = (system_before, rest if folded else _strip_end(rest, user_before))
        chat = ChatFormat(
            opening,
            around_system,
            (user_before, user_after),
            (assistant_before, assistant_after),
            folded,
            None if asks == assistant_before else asks,
            _trimmed(render, takes_system),
        )
        for messages in conversations(render):
            if chat.render(messages) != render(messages, True):
                raise ValueError(f"{roles_text(messages)} renders differently, with {messages[0]['content']!r}")
    except (ValueError, IndexError, ModelError) as error:
        raise ModelError(f"The chat template writes more than fixed text around each message ({error}).") from None
    return chat


def _trimmed(render: Render, takes_system: bool) -> frozenset[str]:
    """The roles whose contents lose the white space around them."""
    padded = "\n \tqzpaddedqz\t \n"
    roles = ("system", "user", "assistant", "user") if takes_system else ("user", "assistant", "user")
    found = set()
    for number, role in enumerate(roles):
        contents = [padded if n == number else "text" for n in range(len(roles))]
        messages = [{"role": r, "content": content} for r, content in zip(roles, contents, strict=True)]
        if padded not in render(messages, True):
            found.add(role)
    return frozenset(found)


def conversations(render: Render, without: Iterable[str] = ()) -> list[list[Message]]:
    """Those of SHAPES that the model's template takes, with each of CONTENTS in each place; some refuse a system message.

    Words of `without` are taken out of the contents.
    """
    taken = []
    contents = list(CONTENTS)
    for word in without:
        contents = [content.replace(word, "") for content in contents]
    for roles in SHAPES:
        for first in range(len(CONTENTS)):
            messages = [{"role": role, "content": contents[(first + n) % len(contents)]} for n, role in enumerate(roles)]
            try:
                render(messages, True)
            except ModelError:
                break
            taken.append(messages)
    return taken


def _strip_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text!r} does not begin with {start!r}")
    return text[len(start) :]


def _strip_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{text!r} does not end with {end!r}")
    return text[: len(text) - len(end)]


# Go templates have no function that trims, but can look at each byte: the white space of ASCII, as str.strip() takes it away.
TRIM = (
    '{{ define "trim" }}{{ $start := -1 }}{{ $end := 0 }}{{ $in := false }}{{ range $i := len $ }}{{ $c := index $ $i }}'
    "{{ if or (eq $c 32) (and (ge $c 9) (le $c 13)) (and (ge $c 28) (le $c 31)) }}{{ if $in }}{{ $end = $i }}{{ $in = false }}{{ end }}"
    "{{ else }}{{ if lt $start 0 }}{{ $start = $i }}{{ end }}{{ $in = true }}{{ end }}{{ end }}"
    "{{ if $in }}{{ $end = len $ }}{{ end }}{{ if ge $start 0 }}{{ slice $ $start $end }}{{ end }}{{ end }}"
)
REFUSE_SYSTEM = '{{ index "no system message: the chat template refuses it" 99 }}'  # fails, as the template does


def go_template(chat: ChatFormat, bos: str = "") -> str:
    """The same format as Ollama's Go template.

    `bos` is the beginning-of-sequence text that llama.cpp adds by itself; it is left out here, or it would come twice.
    """

    def turn(role: str) -> str:
        if getattr(chat, role) is None:
            return REFUSE_SYSTEM
        before, after = getattr(chat, role)
        opens = _literal(before)
        if bos and before.startswith(bos) and (role == "system" or not chat.opening):  # it may begin the prompt
            later = "" if role == "system" else f"{{{{ if $i }}}}{_literal(bos)}{{{{ end }}}}"
            opens = later + _literal(before.removeprefix(bos))
        if role == "user" and chat.folded:
            opens = f'{{{{ if not (and (eq $i 1) (eq (index $.Messages 0).Role "system")) }}}}{opens}{{{{ end }}}}'
        content = '{{ template "trim" $m.Content }}' if role in chat.trimmed else "{{ $m.Content }}"
        return opens + content + _literal(after)

    opening = _literal(chat.opening.removeprefix(bos))
    first = f'{{{{ if and (eq $i 0) (ne $m.Role "system") }}}}{opening}{{{{ end }}}}' if opening else ""
    return (
        (TRIM if chat.trimmed else "")
        + "{{ range $i, $m := .Messages }}"
        + first
        + f'{{{{ if eq $m.Role "system" }}}}{turn("system")}'
        + f'{{{{ else if eq $m.Role "user" }}}}{turn("user")}'
        + f'{{{{ else if eq $m.Role "assistant" }}}}{turn("assistant")}'
        + "{{ end }}{{ end }}"
        + _literal(chat.end)
    )


def _literal(text: str) -> str:
    """Text in a Go template; as a quoted string of Go's where braces, or Ollama's parser, would take it for something else."""
    if not set(text) & set("{}") and '"""' not in text and all(c.isprintable() or c in "\t\n" for c in text):
        return text
    escaped = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return '{{ "' + "".join(escaped.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '" }}'


@dataclass(frozen=True)
class Modelfile:
    """Everything that a model is created with; the file that a person reads and the request to the server say the same."""

    file: str
    template: str | None  # None: the server is left to use the template inside the GGUF
    system: str | None
    parameters: dict[str, Any]
    bos: str = ""  # what llama.cpp writes before every prompt by itself

    def text(self) -> str:
        """Rendered from Modelfile.j2. Raises RecipeError or ModelError for a text that a Modelfile cannot hold."""
        parameters = {
            name: [
                _held(item, f"The stop {item!r}", ModelError) if isinstance(item, str) else item
                for item in (value if isinstance(value, list) else [value])
            ]
            for name, value in self.parameters.items()
        }
        path = templates.root() / "Modelfile.j2"
        values = {
            "file": self.file,
            "template": _held(self.template, "TEMPLATE", ModelError) if self.template else None,
            "system": _held(self.system, "ship.system", RecipeError) if self.system else None,
            "parameters": parameters,
        }
        try:
            return sandbox.render(path.read_text(encoding="utf-8"), values, "file")
        except sandbox.TemplateFault as fault:
            raise RecipeError(f"The template {path} {fault}.", "take ftkit's own Modelfile.j2 again") from None


def _held(text: str, what: str, kind: type[RecipeError] | type[ModelError]) -> str:
    try:
        return modelfile_value(text)
    except ValueError as error:
        raise kind(f"{what}: {error}.", "write it without") from None


SYSTEM_REFUSED = ("ship.system: the model's chat template refuses a system message.", "leave it out, or say it in the question")


def refuse_system(system: str | None, render: Render) -> None:
    """Raise RecipeError for a system prompt where the chat template takes none: before the long work."""
    if not system:
        return
    try:
        render([{"role": "system", "content": system}, {"role": "user", "content": "text"}], True)
    except ModelError:
        raise RecipeError(*SYSTEM_REFUSED) from None


def make_modelfile(file: str, chat: ChatFormat | None, ship: Ship, *, bos: str, stops: Sequence[str]) -> Modelfile:
    """The Modelfile of a shipped model: every sampling value written out, since servers differ in their defaults.

    Raises RecipeError for a system prompt where the chat template takes none.
    """
    if ship.system and chat and chat.system is None:
        raise RecipeError(*SYSTEM_REFUSED)
    parameters: dict[str, Any] = {
        "num_ctx": ship.num_ctx, "temperature": ship.temperature, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.0,
        "stop": list(stops),
    }  # fmt: skip
    return Modelfile(file, go_template(chat, bos) if chat else None, ship.system, parameters, bos)


LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104 – as a client's address it is this machine
ANSWERS_WITHIN_SECONDS = 10.0


def address() -> str:
    """The server's address, as the client reads OLLAMA_HOST. Raises RecipeError where that is none."""
    import ollama

    try:
        with ollama.Client() as client:
            return str(client._client.base_url).rstrip("/")
    except ValueError as error:
        host = os.environ.get("OLLAMA_HOST")
        raise RecipeError(f"OLLAMA_HOST is no address: {host!r} ({error}).", "as in OLLAMA_HOST=127.0.0.1:11434") from None


def models_folder() -> Path | None:
    """Where this machine's server keeps its models, None where OLLAMA_HOST names another machine, or none."""
    try:
        here = urlparse(address()).hostname in LOOPBACK
    except RecipeError:  # said where Ollama is asked for
        return None
    if not here:
        return None
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


@contextmanager
def connect(reporter: Reporter = SILENT) -> Iterator[Client]:
    """A client of the server at OLLAMA_HOST, for the time of the context. Raises ToolMissingError where none answers."""
    import httpx
    import ollama

    where = address()
    parts = urlparse(where)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        reporter.warn(f"{parts.hostname} is reached over plain http: model and prompts go unencrypted, and its API has no password")
    with ollama.Client(timeout=ANSWERS_WITHIN_SECONDS) as client:
        try:
            client.list()
        except (ConnectionError, httpx.HTTPError, ollama.ResponseError, ValueError):  # ValueError: what answers speaks no JSON
            raise ToolMissingError(f"No Ollama server answers at {where}.", "start it: ollama serve") from None
        client._client.timeout = None  # creating and answering take as long as they take
        yield client


def digest_of(client: Client, name: str) -> str | None:
    """The server's digest of a model, None where it has no such model. Names match without case."""
    wanted = (name if ":" in name else f"{name}:latest").lower()
    return next((m.digest for m in client.list().models if (m.model or "").lower() == wanted), None)


@dataclass(frozen=True)
class Registered:
    """A model that a server has now, and what was looked at before it got its name."""

    digest: str
    checks: tuple[Check, ...]


def temporary_name(name: str) -> str:
    """A name of its own for a model that is not checked yet; two ships never share one."""
    return f"{name.partition(':')[0]}:ftkit-unchecked-{secrets.token_hex(4)}"


def register(
    client: Client, name: str, gguf: Path, modelfile: Modelfile, render: Render,
    *, temporary: str | None = None, verify: Callable[[str], Check] | None = None,
    before_naming: Callable[[str], None] | None = None, reporter: Reporter = SILENT,
) -> Registered:  # fmt: skip
    """Create the model, check that the server asks it as training did, and only then give it its name.

    The check renders conversations on the server and compares them with `render`. Raises ProofError where they differ,
    ToolFailedError where the server fails: the name then still belongs to what it belonged to before, and the temporary
    model is gone. `verify` makes one more check, of the temporary model that it is given; `before_naming` is called with
    the digest that the name is about to get.
    """
    temporary = temporary or temporary_name(name)
    with _told(f"Ollama could not create {name}"):
        digest = f"sha256:{file_fingerprint(gguf)}"
        if client._client.head(f"/api/blobs/{digest}").status_code != 200:
            reporter.note(f"uploading {gguf.name} to Ollama")
            client.create_blob(gguf)
        try:
            client.create(
                temporary, files={gguf.name: digest}, template=modelfile.template, system=modelfile.system, parameters=modelfile.parameters
            )
            checks = check_prompts(client, temporary, modelfile, render)
            if verify:
                checks = (*checks, verify(temporary))
            if wrong := next((check for check in checks if check.outcome == "failed"), None):
                raise ProofError(f"{wrong.name}: {wrong.detail}", "take a newer Ollama, or ship without: --no-ollama")
            made = digest_of(client, temporary)
            if not made:
                raise ToolFailedError(f"Ollama created {temporary}, and does not list it.")
            if before_naming:
                before_naming(made)
            client.copy(temporary, name)
            if digest_of(client, name) != made:
                raise ToolFailedError(f"Ollama copied {temporary} to {name}, which is another model now.")
        finally:
            remove(client, temporary, reporter)
    return Registered(made, checks)


def remove(client: Client, name: str, reporter: Reporter = SILENT) -> None:
    """Delete a temporary model, if the server has it. A server that fails at it is told of, and what went before stands."""
    import httpx
    import ollama

    try:
        client.delete(name)
    except (ConnectionError, httpx.HTTPError, ollama.ResponseError) as error:
        if getattr(error, "status_code", None) != 404:
            reporter.warn(f"{name} may be left in Ollama; the next ship of this run removes it ({first_line(error)})")


PROMPTS = "prompts in Ollama"
STRIPPED_BOS = "<bos>"  # Ollama takes this text from the beginning of a prompt by itself, no other


def check_prompts(client: Client, name: str, modelfile: Modelfile, render: Render) -> tuple[Check, ...]:
    """Compare what the model is sent by the server with the model's own template, character by character.

    Both are compared with the BOS that llama.cpp writes before a prompt, exactly once. Raises ProofError at a difference.
    """

    def differs(messages: Sequence[Message]) -> tuple[str, str] | None:
        """(trained on, Ollama's) where they differ."""
        expected = [{"role": "system", "content": modelfile.system}, *messages] if modelfile.system else messages
        wanted = render(messages if messages[0]["role"] == "system" else expected, True)
        rendered = rendered_prompt(client, name, messages)
        if rendered is None:
            raise LookupError
        read = rendered if modelfile.bos == STRIPPED_BOS and rendered.startswith(STRIPPED_BOS) else modelfile.bos + rendered
        return None if read == wanted else (wanted, read)

    compared = conversations(render)
    if not compared:
        return (not_made(PROMPTS, "the chat template takes none of the conversations that are compared"),)
    try:
        for messages in compared:
            if found := differs(messages):
                raise ProofError(
                    f"Ollama renders {roles_text(messages)} differently from the model's chat template:\n"
                    f"  trained on {found[0]!r}\n  Ollama has {found[1]!r}",
                    "Ollama 0.30 and later can use the template inside the GGUF: try a newer one; or ship without: --no-ollama",
                )
        checks = [passed(PROMPTS, f"{len(compared)} conversations")]
        for what, contents in ACCEPTED:
            try:
                found = differs([{"role": role, "content": contents.get(role, "text")} for role in ("user", "assistant", "user")])
            except ModelError:
                continue  # not taken by the template: training has none
            if found:
                checks.append(not_made(f"{PROMPTS}, {what}", "they render differently from the model's chat template, which is accepted"))
    except LookupError:
        return (not_made(PROMPTS, "this server does not say what it renders; Ollama 0.11.5 and later do"),)
    return tuple(checks)


def rendered_prompt(client: Client, name: str, messages: Sequence[Message]) -> str | None:
    """The exact prompt that the server makes of messages; None where it cannot say (Ollama before 0.11.5 answers instead).

    Raises ToolFailedError with the server's words where it fails.
    """
    reply = client._client.post(
        "/api/chat",
        json={
            "model": name, "messages": list(messages), "stream": False, "_debug_render_only": True, "truncate": False,
            "options": {"num_predict": 1},
        },
    )  # fmt: skip
    try:
        body = reply.json()
    except ValueError:
        body = None
    if reply.status_code != 200 or not isinstance(body, dict):
        said = body.get("error") if isinstance(body, dict) else reply.text
        raise ToolFailedError(f"Ollama could not render a prompt for {name} ({reply.status_code}): {_one_line(said)}", SERVER_LOG)
    info = body.get("_debug_info")
    return None if info is None else str(info["rendered_template"])


def answer(
    client: Client, name: str, questions: Sequence[list[Message]], max_new_tokens: int,
    *, options: dict[str, Any] | None = None, label: str = "asking Ollama", reporter: Reporter = SILENT,
) -> list[str]:  # fmt: skip
    """Greedy answers from the server, in the order of the questions."""
    answers = []
    with _told(f"Ollama did not answer with {name}"), reporter.bar(label, len(questions)) as bar:
        for number, question in enumerate(questions, 1):
            reply = client.chat(name, question, options={"temperature": 0, "num_predict": max_new_tokens, **(options or {})})
            answers.append(reply.message.content or "")
            bar.update(number)
    return answers


@contextmanager
def _told(what: str) -> Iterator[None]:
    import httpx
    import ollama

    try:
        yield
    except ollama.ResponseError as error:
        raise ToolFailedError(f"{what}: {_one_line(error.error)}", SERVER_LOG) from None
    except (ConnectionError, httpx.HTTPError) as error:
        raise ToolFailedError(f"{what}: {error}", "is the server still running? ollama ps") from None


SERVER_LOG = "see the server's log: journalctl -u ollama, or ~/.ollama/logs/server.log"


def _one_line(said: object) -> str:
    return re.sub(r"\s+", " ", str(said))[:500]

"""Ollama: write the Modelfile, upload the finished GGUF, create the model, and check that it asks as training did."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ftkit import sandbox, templates
from ftkit.data import Message, roles_text
from ftkit.errors import ModelError, ProofError, RecipeError, ToolFailedError, ToolMissingError
from ftkit.progress import SILENT, Reporter
from ftkit.recipe import Ship
from ftkit.run import file_fingerprint

if TYPE_CHECKING:
    from ollama import Client

Render = Callable[[Sequence[Message], bool], str]  # (messages, ask) → the model's own rendering

# Conversations on which a Go template must write what the model's own template writes.
SHAPES: tuple[tuple[str, ...], ...] = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around each message, found by rendering marked messages.

    `opening` begins a conversation without a system message; it holds the model's default system prompt, if it has one.
    """

    opening: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, ending where the assistant begins."""
        text = "" if messages[0]["role"] == "system" else self.opening
        for message in messages:
            before, after = getattr(self, message["role"])
            text += before + message["content"] + after
        return text + self.assistant[0]


def find_format(render: Render) -> ChatFormat:
    """Take a chat template apart. Raises ModelError where it does more than write fixed text around each message."""
    system, user, answer, again = ("qzsystemqz", "qzuserqz", "qzanswerqz", "qzagainqz")
    asked: list[Message] = [{"role": "user", "content": user}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": answer}]
    try:
        with_system = render([{"role": "system", "content": system}, *asked], True)
        alone, whole = render(asked, True), render([*answered, {"role": "user", "content": again}], True)
        user_after = render(asked, False).split(user)[1]
        assistant_after = render(answered, False).split(answer)[1]
        assistant_before = _strip_start(alone.split(user)[1], user_after)
        user_before = _strip_start(whole.split(answer)[1].split(again)[0], assistant_after)
        opening = _strip_end(alone.split(user)[0], user_before)
        system_before, rest = with_system.split(user)[0].split(system)
        chat = ChatFormat(
            opening, (system_before, _strip_end(rest, user_before)), (user_before, user_after), (assistant_before, assistant_after)
        )
        for messages in conversations(render):
            if chat.render(messages) != render(messages, True):
                raise ValueError(f"{roles_text(messages)} renders differently")
    except (ValueError, IndexError, ModelError) as error:
        raise ModelError(f"The chat template writes more than fixed text around each message ({error}).") from None
    return chat


def conversations(render: Render) -> list[list[Message]]:
    """Those of SHAPES that the model's template takes; some refuse a system message."""
    taken = []
    for roles in SHAPES:
        messages = [{"role": role, "content": f"text {n} of {role}"} for n, role in enumerate(roles)]
        try:
            render(messages, True)
        except ModelError:
            continue
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


def go_template(chat: ChatFormat, bos: str = "") -> str:
    """The same format as Ollama's Go template.

    `bos` is the beginning-of-sequence text that llama.cpp adds by itself; it is left out here, or it would come twice.
    """

    def turn(role: str, content: str) -> str:
        before, after = getattr(chat, role)
        before = before.removeprefix(bos) if role == "system" else before
        return _literal(before) + content + _literal(after)

    opening = _literal(chat.opening.removeprefix(bos))
    first = f'{{{{ if and (eq $i 0) (ne $m.Role "system") }}}}{opening}{{{{ end }}}}' if opening else ""
    content = "{{ $m.Content }}"
    return (
        "{{ range $i, $m := .Messages }}"
        + first
        + f'{{{{ if eq $m.Role "system" }}}}{turn("system", content)}'
        + f'{{{{ else if eq $m.Role "user" }}}}{turn("user", content)}'
        + f'{{{{ else if eq $m.Role "assistant" }}}}{turn("assistant", content)}'
        + "{{ end }}{{ end }}"
        + _literal(chat.assistant[0])
    )


def _literal(text: str) -> str:
    return text if "{{" not in text and "}}" not in text and '"""' not in text else "{{ " + json.dumps(text) + " }}"


@dataclass(frozen=True)
class Modelfile:
    """Everything that a model is created with; the file that a person reads and the request to the server say the same."""

    file: str
    template: str | None  # None: the server is left to use the template inside the GGUF
    system: str | None
    parameters: dict[str, Any]

    def text(self) -> str:
        """Rendered from Modelfile.j2. Raises RecipeError for a system prompt that a Modelfile cannot hold."""
        if self.system and '"""' in self.system:
            raise RecipeError('ship.system: a Modelfile cannot hold """ inside a text.', "use single quotes in it")
        parameters = {
            name: [
                json.dumps(item, ensure_ascii=False) if isinstance(item, str) else item
                for item in (value if isinstance(value, list) else [value])
            ]
            for name, value in self.parameters.items()
        }
        path = templates.root() / "Modelfile.j2"
        values = {"file": self.file, "template": self.template, "system": self.system, "parameters": parameters}
        try:
            return sandbox.render(path.read_text(encoding="utf-8"), values, "file")
        except sandbox.TemplateFault as fault:
            raise RecipeError(f"The template {path} {fault}.", "take ftkit's own Modelfile.j2 again") from None


def make_modelfile(file: str, chat: ChatFormat | None, ship: Ship, *, bos: str, stops: Sequence[str]) -> Modelfile:
    """The Modelfile of a shipped model: every sampling value written out, since servers differ in their defaults."""
    parameters: dict[str, Any] = {
        "num_ctx": ship.num_ctx, "temperature": ship.temperature, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.0,
        "stop": list(stops),
    }  # fmt: skip
    return Modelfile(file, go_template(chat, bos) if chat else None, ship.system, parameters)


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


def register(client: Client, name: str, gguf: Path, modelfile: Modelfile, render: Render, reporter: Reporter = SILENT) -> str:
    """Create the model, check that the server asks it as training did, and only then give it its name; its digest.

    The check renders conversations on the server and compares them with `render`. Raises ProofError where they differ:
    the name then still belongs to what it belonged to before.
    """
    temporary = f"{name.partition(':')[0]}:ftkit-unchecked"
    with _told(f"Ollama could not create {name}"):
        digest = f"sha256:{file_fingerprint(gguf)}"
        if client._client.head(f"/api/blobs/{digest}").status_code != 200:
            reporter.note(f"uploading {gguf.name} to Ollama")
            client.create_blob(gguf)
        client.create(
            temporary, files={gguf.name: digest}, template=modelfile.template, system=modelfile.system, parameters=modelfile.parameters
        )
        try:
            check_prompts(client, temporary, modelfile.system, render)
            client.copy(temporary, name)
        finally:
            client.delete(temporary)
    return digest_of(client, name) or ""


def check_prompts(client: Client, name: str, system: str | None, render: Render) -> None:
    """Compare what the server would send to the model with the model's own template. Raises ProofError at a difference."""
    for messages in conversations(render):
        expected = [{"role": "system", "content": system}, *messages] if system and messages[0]["role"] != "system" else messages
        rendered, wanted = rendered_prompt(client, name, messages), render(expected, True)
        if rendered is None:
            return  # the server is too old to tell
        if not wanted.endswith(rendered):  # what the server leaves to llama.cpp is the BOS at the start
            raise ProofError(
                f"Ollama renders {roles_text(messages)} differently from the model's chat template:\n  trained on {wanted!r}\n  Ollama has {rendered!r}"
            )


def rendered_prompt(client: Client, name: str, messages: Sequence[Message]) -> str | None:
    """The exact prompt that the server makes of messages; None where it cannot tell (Ollama before 0.11.5)."""
    reply = client._client.post("/api/chat", json={"model": name, "messages": list(messages), "stream": False, "_debug_render_only": True})
    info = reply.json().get("_debug_info") if reply.status_code == 200 else None
    return str(info["rendered_template"]) if info else None


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
        message = re.sub(r"\s+", " ", str(error.error))[:500]
        raise ToolFailedError(f"{what}: {message}", "see the server's log: journalctl -u ollama, or ~/.ollama/logs/server.log") from None
    except (ConnectionError, httpx.HTTPError) as error:
        raise ToolFailedError(f"{what}: {error}", "is the server still running? ollama ps") from None

"""Create a model in Ollama under a temporary name, check it, and only then give it its own."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftkit.check import Check, failed, not_made, passed
from ftkit.data.rows import Message, roles_text
from ftkit.data.template import Render
from ftkit.engines.ollama import digest_of, http, rendered_prompt, thread_options, told, upload
from ftkit.errors import ModelError, ProofError, ToolFailedError, first_line
from ftkit.files import file_fingerprint
from ftkit.ollama.modelfile import STRIPPED_BOS, Modelfile
from ftkit.progress import SILENT, Reporter
from ftkit.proof.probes import ACCEPTED, conversations

if TYPE_CHECKING:
    from ollama import Client


@dataclass(frozen=True)
class Registered:
    """A model that a server has now, and what was looked at before it got its name."""

    digest: str
    checks: tuple[Check, ...]


def temporary_name(name: str) -> str:
    """A name of its own for a model that is not checked yet; two ships never share one."""
    return f"{name.partition(':')[0]}:ftkit-unchecked-{secrets.token_hex(4)}"


def replaced_name(temporary: str) -> str:
    """What the model is named that had the name until now, while it is let go."""
    return temporary.replace("unchecked", "replaced")


def register(
    client: Client,
    name: str,
    gguf: Path,
    modelfile: Modelfile,
    render: Render,
    *,
    temporary: str | None = None,
    count: Callable[[str], int] | None = None,
    verify: Callable[[str], Check] | None = None,
    before_naming: Callable[[str], None] | None = None,
    reporter: Reporter = SILENT,
) -> Registered:
    """Create the model, check that the server asks it as training did, and only then give it its name.

    The check renders conversations on the server and compares them with `render`. Raises ProofError where they differ,
    ToolFailedError where the server fails: the name then still belongs to what it belonged to before, and the temporary
    model is gone. `count` says how many tokens a text has, and the server is asked whether it reads as many; `verify` makes one more
    check, of the temporary model that it is given; `before_naming` is called with the digest that the name is about to get.
    """
    temporary = temporary or temporary_name(name)
    with told(f"Ollama could not create {name}"):
        digest = f"sha256:{file_fingerprint(gguf)}"
        upload(client, gguf, digest, reporter)
        try:
            create(client, temporary, {gguf.name: digest}, modelfile)
            checks = check_prompts(client, temporary, modelfile, render)
            if count:
                checks = (*checks, check_tokens(client, temporary, modelfile, count))
            if verify:
                checks = (*checks, verify(temporary))
            if wrong := next((check for check in checks if check.outcome == "failed"), None):
                raise ProofError(f"{wrong.name}: {wrong.detail}", "take a newer Ollama, or ship without: --no-ollama")
            made = digest_of(client, temporary)
            if not made:
                raise ToolFailedError(f"Ollama created {temporary}, and does not list it.")
            if before_naming:
                before_naming(made)
            if digest_of(client, name) not in (None, made):  # a copy over it would leave its file on the server's disk, nobody's
                client.copy(name, replaced_name(temporary))
            client.copy(temporary, name)
            if digest_of(client, name) != made:
                raise ToolFailedError(f"Ollama copied {temporary} to {name}, which is another model now.")
        finally:
            clean_up(client, name, temporary, reporter)
    return Registered(made, checks)


def create(client: Client, name: str, files: dict[str, str], modelfile: Modelfile) -> None:
    """A model of files that the server has, by their digests: the client's own request, with what that does not pass on."""
    import ollama

    own = modelfile.own._asdict() if modelfile.own else {}
    asked = {"template": modelfile.template, "system": modelfile.system, "parameters": modelfile.parameters, **own}
    reply = http(client).post("/api/create", json={"model": name, "files": files, "stream": False, **{k: v for k, v in asked.items() if v}})
    if reply.status_code != 200:
        raise ollama.ResponseError(reply.text, reply.status_code)


def clean_up(client: Client, name: str, temporary: str, reporter: Reporter = SILENT) -> None:
    """Delete a temporary model and what it replaced, if the server has them, from its memory too: else it keeps them for minutes.

    What was replaced gets its `name` back first, where a copy that broke off has left that to nobody. A server that fails at it is
    told of, and what went before stands.
    """
    import httpx
    import ollama

    replaced = replaced_name(temporary)
    for each in (temporary, replaced):
        try:
            if each == replaced and digest_of(client, replaced) and not digest_of(client, name):
                client.copy(replaced, name)
            http(client).post("/api/generate", json={"model": each, "keep_alive": 0})
            client.delete(each)
        except (ConnectionError, httpx.HTTPError, ollama.ResponseError) as error:
            if getattr(error, "status_code", None) != 404:
                reporter.warn(f"{each} may be left in Ollama; the next ship of this run removes it ({first_line(error)})")


PROMPTS, TOKENS = "prompts in Ollama", "tokens in Ollama"


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
        read = _read(modelfile, rendered)
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
                    "a server asks some architectures in a format of its own, and before 0.30 it knows no template of a GGUF: try a newer "
                    "one; or ship without: --no-ollama, and serve the file with llama-server --jinja",
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


def check_tokens(client: Client, name: str, modelfile: Modelfile, count: Callable[[str], int]) -> Check:
    """Whether the model reads as many tokens of a prompt as it has: what is rendered may be right, and its BOS be read twice."""
    asked = [{"role": "user", "content": "text"}]
    rendered = rendered_prompt(client, name, asked)
    if rendered is None:
        return not_made(TOKENS, "this server does not say what it renders; Ollama 0.11.5 and later do")
    counted = client.chat(name, asked, options={"num_predict": 1, **thread_options()}).prompt_eval_count
    if not counted:
        return not_made(TOKENS, "this server does not say how many tokens the model reads")
    tokens = count(_read(modelfile, rendered))
    if counted != tokens:
        return failed(TOKENS, f"the model reads {counted} tokens of a prompt that has {tokens}, as if its BOS came more or less than once")
    return passed(TOKENS, f"{tokens} of a prompt, as many as it has")


def _read(modelfile: Modelfile, rendered: str) -> str:
    """What the model reads of a prompt that a server renders: with the BOS that is put before it, once."""
    return rendered if modelfile.bos == STRIPPED_BOS and rendered.startswith(STRIPPED_BOS) else modelfile.bos + rendered

"""An Ollama server: reach it, ask it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from ftkit import patches
from ftkit.data.rows import Message, has_tools
from ftkit.errors import RecipeError, ToolFailedError, ToolMissingError, first_line, proxy_fault
from ftkit.machine.device import asked_threads
from ftkit.progress import SILENT, Reporter
from ftkit.units import MIB, bytes_text

if TYPE_CHECKING:
    import httpx
    from ollama import Client


LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::")  # noqa: S104 – as a client's address it is this machine
ANSWERS_WITHIN_SECONDS = 10.0
SERVICES = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/models")  # of the installer on Linux, of distributions
SENT_AT_ONCE_BYTES = MIB


def address() -> str:
    """The server's address, as the client reads OLLAMA_HOST. Raises RecipeError where that is none."""
    try:
        import ollama  # makes a client of its own at once

        with ollama.Client() as client:
            return str(http(client).base_url).rstrip("/")
    except ImportError as error:  # a SOCKS proxy's package
        raise proxy_fault(error) from None
    except ValueError as error:
        if "proxy" in str(error):
            raise proxy_fault(error) from None
        host = os.environ.get("OLLAMA_HOST")
        raise RecipeError(f"OLLAMA_HOST is no address: {host!r} ({error}).", "as in OLLAMA_HOST=127.0.0.1:11434") from None


def models_folder() -> Path | None:
    """Where this machine's server keeps its models, None where OLLAMA_HOST names another machine, or none."""
    try:
        here = urlparse(address()).hostname in LOOPBACK
    except (RecipeError, ToolMissingError):  # said where Ollama is asked for
        return None
    if not here:
        return None
    if named := os.environ.get("OLLAMA_MODELS"):
        return Path(named)
    return next((Path(name) for name in SERVICES if os.path.isdir(name)), Path.home() / ".ollama" / "models")  # noqa: PTH112 - Path's raises where it may not look


@contextmanager
def connect(reporter: Reporter = SILENT) -> Iterator[Client]:
    """A client of the server at OLLAMA_HOST, for the time of the context. Raises ToolMissingError where none answers."""
    where = address()  # which is refused before `ollama` makes a client of it
    import httpx
    import ollama

    parts = urlparse(where)
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        reporter.warn(f"{parts.hostname} is reached over plain http: model and prompts go unencrypted, and its API has no password")
    here = parts.hostname in LOOPBACK  # which no proxy leads to
    with ollama.Client(timeout=ANSWERS_WITHIN_SECONDS, trust_env=not here or parts.scheme == "https") as client:  # by SSL_CERT_FILE
        try:
            client.list()
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            why = "" if here else f" ({first_line(error.__context__ or error)})"
            raise ToolMissingError(f"No Ollama server answers at {where}{why}.", "start it: ollama serve") from None
        except (httpx.HTTPError, ollama.ResponseError, ValueError) as error:  # ValueError: what answers speaks no JSON
            raise ToolMissingError(
                f"No Ollama server answers at {where}: what is there says {one_line(error)!r}.",
                "see whether OLLAMA_HOST names it: ollama list",
            ) from None
        http(client).timeout = None  # creating and answering take as long as they take
        yield client


def server_of(client: Client) -> list[str]:
    """Its address and its version: another one may ask a model otherwise."""
    try:
        version = http(client).get("/api/version").json()["version"]
    except (ValueError, LookupError, TypeError):  # one that does not tell
        version = ""
    return [str(http(client).base_url).rstrip("/"), str(version)]


def http(client: Client) -> httpx.Client:
    """What a client sends with."""
    found: httpx.Client = patches.inside("asking Ollama", client, "_client")
    return found


def upload(client: Client, path: Path, digest: str, reporter: Reporter = SILENT) -> None:
    """Send a file of this digest (`sha256:…`) to the server, unless it has it. Raises what the client does where it refuses."""
    import ollama

    if http(client).head(f"/api/blobs/{digest}").status_code == 200:
        return
    size, sent = path.stat().st_size, 0
    reporter.note(f"uploading {path.name} to Ollama: {bytes_text(size)}")
    with path.open("rb") as file, reporter.bar("uploading, MiB", max(1, size // MIB)) as bar:

        def pieces() -> Iterator[bytes]:
            nonlocal sent
            while piece := file.read(SENT_AT_ONCE_BYTES):
                yield piece
                sent += len(piece)
                bar.update(sent // MIB)

        reply = http(client).post(f"/api/blobs/{digest}", content=pieces())
    if reply.status_code not in (200, 201):
        raise ollama.ResponseError(reply.text, reply.status_code)


def digest_of(client: Client, name: str) -> str | None:
    """The server's digest of a model, None where it has no such model. Names match without case."""
    wanted = (name if ":" in name else f"{name}:latest").lower()
    return next((m.digest for m in client.list().models if (m.model or "").lower() == wanted), None)


def rendered_prompt(client: Client, name: str, messages: Sequence[Message]) -> str | None:
    """The exact prompt that the server makes of messages; None where it cannot say (Ollama before 0.11.5 answers instead).

    Raises ToolFailedError with the server's words where it fails.
    """
    reply = http(client).post(
        "/api/chat",
        json={
            "model": name,
            "messages": _named(messages),
            "stream": False,
            "_debug_render_only": True,
            "truncate": False,
            "options": {"num_predict": 1},
        },
    )
    try:
        body = reply.json()
    except ValueError:
        body = None
    if reply.status_code != 200 or not isinstance(body, dict):
        said = body.get("error") if isinstance(body, dict) else reply.text
        raise ToolFailedError(f"Ollama could not render a prompt for {name} ({reply.status_code}): {one_line(said)}", SERVER_LOG)
    info = body.get("_debug_info")
    return None if info is None else str(info["rendered_template"])


def thread_options() -> dict[str, int]:
    """Options of a request: more threads than are free slow a server down many times, as they spin while they wait."""
    threads = asked_threads()
    return {"num_thread": threads} if threads else {}


def _named(messages: Sequence[Message]) -> list[Message]:
    """Messages with the reasoning by Ollama's name."""
    return [{"thinking" if key == "reasoning_content" else key: value for key, value in message.items()} for message in messages]


def answer(
    client: Client,
    name: str,
    questions: Sequence[list[Message]],
    max_new_tokens: int,
    read: Callable[[str], str] = str,
    *,
    render: Callable[[Sequence[Message]], str] | None = None,
    options: dict[str, Any] | None = None,
    label: str = "asking Ollama",
    reporter: Reporter = SILENT,
) -> list[str]:
    """Greedy answers from the server, in the order of the questions; of those that hold more than the answer `read` takes it.

    Of questions with tools, which Ollama writes and reads by formats of its own, the server is given the prompt that `render` makes.
    """
    answers = []
    with told(f"Ollama did not answer with {name}"), reporter.bar(label, len(questions)) as bar:
        for number, question in enumerate(questions, 1):
            settings = {"temperature": 0, "num_predict": max_new_tokens, **(options or {})}
            if render and has_tools(question):
                answers.append(read(client.generate(name, render(question), raw=True, options=settings).response or ""))
            else:
                reply = client.chat(name, _named(question), options=settings)
                said = reply.message.content or ""
                answers.append(said if reply.message.thinking else read(said))
            bar.update(number)
    return answers


@contextmanager
def told(what: str) -> Iterator[None]:
    import httpx
    import ollama

    try:
        yield
    except ollama.ResponseError as error:
        raise ToolFailedError(f"{what}: {one_line(error.error)}", SERVER_LOG) from None
    except (ConnectionError, httpx.HTTPError) as error:
        raise ToolFailedError(f"{what}: {error}", "is the server still running? ollama ps") from None


SERVER_LOG = "see the server's log: journalctl -u ollama, or ~/.ollama/logs/server.log"


def one_line(said: object) -> str:
    return re.sub(r"\s+", " ", str(said))[:500]

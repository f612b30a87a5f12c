"""Run llama.cpp in this process (xllamacpp): tokenise, render, answer. It listens on a free loopback port only."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ftkit.data import Message
from ftkit.device import asked_threads
from ftkit.errors import ToolFailedError, ToolMissingError
from ftkit.progress import SILENT, Reporter


class Engine:
    """A loaded GGUF. Use `load` to get one."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are written out; none is added."""
        return list(self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the file's own chat template makes, ending where the assistant begins."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def answer(
        self, questions: Sequence[list[Message]], max_new_tokens: int, *, label: str = "asking", reporter: Reporter = SILENT
    ) -> list[str]:
        """Greedy answers through the file's own chat template, in the order of the questions."""
        answers = []
        with reporter.bar(label, len(questions)) as bar:
            for number, question in enumerate(questions, 1):
                answers.append(self.chat(question, max_new_tokens))
                bar.update(number)
        return answers

    def chat(self, messages: Sequence[Message], max_new_tokens: int, temperature: float = 0.0) -> str:
        """One answer."""
        request = {"messages": list(messages), "max_tokens": max_new_tokens, "temperature": temperature, "cache_prompt": True}
        reply = self._server.handle_chat_completions(request)
        if "choices" not in reply:
            raise ToolFailedError(f"llama.cpp did not answer: {json.dumps(reply)[:300]}")
        return str(reply["choices"][0]["message"]["content"] or "")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as reply:
                loaded: dict[str, Any] = json.load(reply)
        except (urllib.error.URLError, OSError) as error:
            raise ToolFailedError(f"llama.cpp did not take {path}: {error}.") from None
        return loaded


@contextmanager
def load(path: Path, num_ctx: int = 4096, threads: int | None = None) -> Iterator[Engine]:
    """Load a GGUF for the time of the context.

    Raises ToolMissingError without xllamacpp, ToolFailedError where llama.cpp refuses the file.
    """
    try:
        import xllamacpp
    except ImportError:
        raise ToolMissingError("xllamacpp (llama.cpp in process) is not installed.", "pip install xllamacpp") from None
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = num_ctx
    parameters.n_parallel = 1
    parameters.verbosity = 0
    parameters.warmup = False
    parameters.hostnames = ["127.0.0.1"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = (
        threads or asked_threads() or psutil.cpu_count(logical=False) or 1
    )
    try:
        server = xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise ToolFailedError(f"llama.cpp cannot load {path.name}: {error}.") from None
    engine = Engine(server)
    try:
        yield engine
    finally:
        del engine._server, server

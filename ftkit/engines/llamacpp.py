"""Run llama.cpp in this process (xllamacpp): tokenise, render, answer. It listens on a free loopback port only."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftkit.data.rows import TOOLS, Message
from ftkit.errors import ToolFailedError, ToolMissingError
from ftkit.machine.device import computing_threads
from ftkit.progress import SILENT, Reporter

ANSWERS_WITHIN_SECONDS = 3600.0  # a large model on a slow disk


class Engine:
    """A loaded GGUF. Use `load` to get one."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def tokenize(self, text: str, *, begins: bool = False) -> list[int]:
        """Ids of a text in which special tokens are written out; with `begins` the BOS that the file says to add comes first."""
        return list(self._post("/tokenize", {"content": text, "add_special": begins, "parse_special": True})["tokens"])

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that the file's own chat template makes, ending where the assistant begins.

        Without the BOS that llama.cpp adds itself when it tokenises a prompt (`tokenizer.ggml.add_bos_token`).
        """
        return str(self._post("/apply-template", _asked(messages))["prompt"])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What the model reads before it answers: the rendered prompt and what llama.cpp adds to it."""
        return self.tokenize(self.render(messages), begins=True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, for a person to read."""
        return str(self._post("/detokenize", {"tokens": list(ids)})["content"])

    def stops_at(self, token: int) -> bool:
        """Whether an answer ends with this token: the model is made to say it, and either goes on or does not."""
        request = {"prompt": [token], "n_predict": 2, "temperature": 0, "logit_bias": [[token, 1e4]], "cache_prompt": False}
        return self._post("/completion", request).get("stop_type") == "eos"

    def answer(
        self,
        questions: Sequence[list[Message]],
        max_new_tokens: int,
        read: Callable[[Sequence[int]], str],
        *,
        label: str = "asking",
        reporter: Reporter = SILENT,
    ) -> list[str]:
        """Greedy answers through the file's own chat template, in the order of the questions; `read` makes text of their ids."""
        return self.answer_ids(map(self.prompt_ids, questions), max_new_tokens, read, label=label, total=len(questions), reporter=reporter)

    def answer_ids(
        self,
        prompts: Iterable[list[int]],
        max_new_tokens: int,
        read: Callable[[Sequence[int]], str],
        *,
        total: int,
        label: str = "asking",
        reporter: Reporter = SILENT,
    ) -> list[str]:
        """The same, of prompts in ids."""
        answers = []
        with reporter.bar(label, total) as bar:
            for number, prompt in enumerate(prompts, 1):
                request = {"prompt": prompt, "n_predict": max_new_tokens, "temperature": 0, "cache_prompt": True}
                answers.append(read(self._post("/completion", {**request, "return_tokens": True})["tokens"]))
                bar.update(number)
        return answers

    def chat(self, messages: Sequence[Message], max_new_tokens: int, temperature: float = 0.0) -> str:
        """One answer."""
        request = {**_asked(messages), "max_tokens": max_new_tokens, "temperature": temperature, "cache_prompt": True}
        reply = self._server.handle_chat_completions(request)
        if "choices" not in reply:
            raise ToolFailedError(f"llama.cpp did not answer: {json.dumps(reply)[:300]}")
        return str(reply["choices"][0]["message"]["content"] or "")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=ANSWERS_WITHIN_SECONDS) as reply:
                loaded: dict[str, Any] = json.load(reply)
        except (urllib.error.URLError, OSError) as error:
            raise ToolFailedError(f"llama.cpp did not take {path}: {error}.") from None
        return loaded


def _asked(messages: Sequence[Message]) -> dict[str, Any]:
    """Messages as the server takes them, what may be called apart."""
    tools = messages[0].get(TOOLS) if messages else None
    spoken = [{key: value for key, value in message.items() if key != TOOLS} for message in messages]
    return {"messages": spoken, **({TOOLS: tools} if tools else {})}


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
    parameters.endpoint_metrics = True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads or computing_threads()
    try:
        server = xllamacpp.Server(parameters)
    except (RuntimeError, ValueError) as error:
        raise ToolFailedError(f"llama.cpp cannot load {path.name}: {_why_not(path) or error}.") from None
    engine = Engine(server)
    server.handle_metrics()  # answered by its main loop: a server that is let go before that has begun never ends (xllamacpp 2026.10)
    try:
        yield engine
    finally:
        del engine._server, server


@contextmanager
def rendering(chat_template: str, bos: str, eos: str) -> Iterator[Engine]:
    """llama.cpp with a chat template alone, so that it renders as it will when the template is in a model's file.

    The model is one layer of zeros with a vocabulary of bytes: what it says means nothing. A BOS is written as the template has it.
    """
    import gguf
    import numpy as np

    size, vocabulary = 32, ["<unk>", bos or "<s>", eos or "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    shapes = {"token_embd": (len(vocabulary), size), "output_norm": (size,), "blk.0.attn_norm": (size,), "blk.0.ffn_norm": (size,)}
    shapes |= {f"blk.0.{name}": (size, size) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    with tempfile.TemporaryDirectory(prefix="ftkit-") as folder:
        path = Path(folder) / "template.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(size)
        writer.add_embedding_length(size)
        writer.add_feed_forward_length(size)
        writer.add_block_count(1)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(vocabulary)
        writer.add_token_scores([0.0] * len(vocabulary))
        writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(chat_template)
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with load(path, size) as engine:
            yield engine


_LOAD_AND_TELL = """
import os, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.verbosity, parameters.warmup = sys.argv[1], 64, 1, False
parameters.hostnames = ["127.0.0.1"]
server = xllamacpp.Server(parameters)
os._exit(0)
"""


def _why_not(path: Path) -> str | None:
    """llama.cpp's reason why a file does not load, which it only writes to its log: it is tried once more, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _LOAD_AND_TELL, path], capture_output=True, encoding="utf-8", errors="replace")
    found = re.search(r"error loading model: (.+)", done.stderr + done.stdout)
    return found[1].strip() if found else None

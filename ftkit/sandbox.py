"""Render other people's Jinja templates: in a process of its own, in Jinja's immutable sandbox, with bounded time, memory and output.

The process is this module (`python -m ftkit.sandbox`). It is started once and asked a line of JSON a template.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # for one text; a template that needs a thousandth is slow
MEMORY_BYTES = 512 << 20  # of address space; where the system does not bound it (macOS, Windows) only the time is bounded
CHARACTERS = 16 << 20  # of a text

# What a template can raise by itself. Anything else ends the process, which is an answer too.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError)

Kind = Literal["chat", "file"]


class TemplateFault(Exception):
    """A template that gave no text. `refuses`: by its own words, so that other messages may pass."""

    def __init__(self, words: str, *, refuses: bool = False) -> None:
        super().__init__(words)
        self.refuses = refuses


class _Worker:
    """The process, as its parent sees it."""

    def __init__(self) -> None:
        paths = [path for path in sys.path if path]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ftkit.sandbox", str(SECONDS)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A terminal's Ctrl-C goes to all processes of the group: this one is asked until the command has ended in order.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.owner = os.getpid()  # a fork of this process starts one of its own
        self.known: dict[tuple[str, Kind], int] = {}

    def ask(self, template: str, variables: dict[str, Any], kind: Kind) -> dict[str, Any] | None:
        """The answer; None where the process ended over it."""
        first = {} if (template, kind) in self.known else {"template": template, "kind": kind}
        number = self.known.setdefault((template, kind), len(self.known))
        line = json.dumps({"number": number, "variables": variables, **first}, default=str)
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            return dict(json.loads(answer)) if answer.endswith(b"\n") else None
        except OSError:
            return None

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()


_lock = threading.Lock()
_worker: list[_Worker] = []  # none or one
_hopeless: dict[tuple[str, Kind], str] = {}  # templates over which a process ended; they are not tried again


def render(template: str, variables: dict[str, Any], kind: Kind = "chat") -> str:
    """The text of a template over JSON-able variables. Raises TemplateFault.

    `chat` is byte for byte what transformers renders (its functions, filters and tags); `file` renders a file with all its line
    ends and takes no undefined variable.
    """
    with _lock:
        if words := _hopeless.get((template, kind)):
            raise TemplateFault(words)
        if _worker and _worker[0].owner != os.getpid():
            _worker.clear()
        if not _worker:
            _worker.append(_Worker())
            atexit.register(_worker[0].end)
        worker = _worker[0]
        answer = worker.ask(template, variables, kind)
        if answer is None:
            atexit.unregister(worker.end)
            _worker.clear()
            worker.end()
            words = f"takes more than {SECONDS:g} seconds, or ends the process that renders it"
            _hopeless[template, kind] = words
            raise TemplateFault(words)
    if "text" in answer:
        return str(answer["text"])
    raise TemplateFault(answer["words"], refuses=answer["refuses"])


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, ask: bool) -> str:
    """The tokenizer's chat template over messages, as `apply_chat_template` renders it; with `ask` it ends where the answer begins.

    The first message may hold the `tools` that may be called.
    """
    special = {str(name): token for name, token in tokenizer.special_tokens_map.items()}
    spoken = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    tools = next((message["tools"] for message in messages[:1] if message.get("tools")), None)
    said = {"messages": spoken, "tools": tools, "documents": None, "add_generation_prompt": ask}
    return render(str(tokenizer.chat_template), {**said, **special})


# What follows runs in the process of its own.


def _chat_environment() -> jinja2.Environment:
    """transformers' environment for chat templates (transformers.utils.chat_template_utils, 5.23), from its public features."""
    from datetime import datetime

    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant says, and renders as it stands."""

        tags = {"generation"}  # noqa: RUF012 – an attribute that jinja2 declares

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_as_it_stands"), [], [], body).set_lineno(line)

        def _as_it_stands(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Takes no name that begins with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # without self, so that a template may use that name
            self, rest = args[0], args[1:]
            values = dict(*rest, **kwargs)
            for name in values:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")

    class Dict:
        """`dict` without its attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def _file_environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)


def _answer(template: jinja2.Template | None, text: str, environment: jinja2.Environment, variables: dict[str, Any]) -> Any:
    """(compiled template, answer). Whatever a template raises is its own fault: it runs nothing but itself here."""
    import jinja2

    refuses = False
    try:
        template = template or environment.from_string(text)
        rendered = template.render(variables)
        if len(rendered) <= CHARACTERS:
            return template, {"text": rendered}
        words = f"writes more than {CHARACTERS} characters"
    except jinja2.TemplateSyntaxError as error:
        words = f"is broken, line {error.lineno}: {error.message}"
    except jinja2.exceptions.SecurityError as error:
        words = f"does what a template must not do: {error}"
    except jinja2.TemplateError as error:
        words, refuses = f"refuses this: {error}", True
    except MemoryError:
        words = f"needs more than {MEMORY_BYTES >> 20} MiB of memory"
    except RecursionError:
        words = "is nested too deeply"
    except FAULTS as error:
        words = f"fails: {type(error).__name__}: {error}"
    return template, {"words": words[:2000], "refuses": refuses}


def _serve(seconds: float) -> None:
    """Answer lines of JSON until there are none. A watchdog of the interpreter ends the process where an answer takes too long."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    environments = {"chat": _chat_environment(), "file": _file_environment()}
    texts: dict[int, tuple[str, jinja2.Environment]] = {}
    compiled: dict[int, jinja2.Template | None] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        number = asked["number"]
        if "template" in asked:
            texts[number] = (asked["template"], environments[asked["kind"]])
        faulthandler.dump_traceback_later(seconds, exit=True)
        compiled[number], answer = _answer(compiled.get(number), *texts[number], asked["variables"])
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))

"""The command line: one small file a command, loaded only when it is called."""

from __future__ import annotations

import _thread
import difflib
import errno
import importlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ftkit import __version__, beside
from ftkit.errors import InterruptedRunError, RunError
from ftkit.machine import ranks

# Name → what `ftkit --help` says of it; the command is `command` in ftkit/cli/NAME.py.
COMMANDS = {
    "init": "Write a recipe and a dataset to start from.",
    "schema": "Print the recipe's JSON schema, for editors.",
    "data": "Look at the dataset: what is read, what is odd, what is learnt.",
    "plan": "Say whether it fits, and with which batch × accumulation.",
    "train": "Fine-tune: QLoRA, LoRA or full; resumable.",
    "ship": "Merge, convert, quantise, prove, and register in Ollama.",
    "verify": "Say whether a shipped file is what its record says.",
    "build": "plan, train and ship in one go.",
    "chat": "Ask the model that a run shipped.",
    "status": "Show which steps of a run are done, and what it holds.",
    "clean": "Remove what a run does not need any more.",
    "env": "Show versions, GPU and tools, and what is missing.",
    "setup": "Bring llama.cpp's programs, its converter or a small model.",
}


NOT_ON_WINDOWS = (
    "Warning: ftkit was never run on Windows itself; its converter is not brought there, and files are not proved token by token. "
    "In WSL2 it is on a Linux: wsl --install"
)
# What the system does not let ftkit do with a file that was named, and what to do then. Any other OSError is a fault of ftkit.
_CHECK = "check who owns it and who may read and write it"
REFUSED_BY_THE_SYSTEM = {
    errno.ENAMETOOLONG: "names of files and folders have at most 255 characters",
    errno.EACCES: _CHECK,
    errno.EPERM: _CHECK,
    errno.EROFS: "choose a folder that can be written",
    errno.ELOOP: "check where its links lead",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EIO: "check the disk",
}


@contextmanager
def _every_ctrl_c_heard() -> Iterator[None]:
    """Python drops what is raised in a callback of a weak reference, of which an import of torch has thousands: a Ctrl-C, too."""
    before = sys.unraisablehook

    def hear(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _thread.interrupt_main).start()  # once the callback is over
        else:
            before(unraisable)

    sys.unraisablehook = hear
    try:
        yield
    finally:
        sys.unraisablehook = before


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that help needs none of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a program. One of several processes ends without Python's own end, in which a thread of torch's may abort it."""
        try:
            return self.main(*args, **kwargs)
        except SystemExit as end:
            if ranks.world_size() > 1:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else bool(end.code))
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ftkit.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        ranks.refuse_command(args[0])
        near = [] if args[0] in COMMANDS else difflib.get_close_matches(args[0], COMMANDS, 1)
        if near:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # written to a file on Windows, text may not be UTF-8: better a ? than no text
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if sys.platform == "win32":
            click.echo(NOT_ON_WINDOWS, err=True)
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # CUDA counts GPUs as ftkit and nvidia-smi do; read when it starts
        os.environ["MPLBACKEND"] = "agg"  # pictures go to files; a notebook's own backend, which its commands are told, may not be here
        beside.hide()
        try:
            with _every_ctrl_c_heard():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedRunError("Interrupted.", "the same command goes on from the last finished step") from None
        except OSError as error:
            hint = REFUSED_BY_THE_SYSTEM.get(error.errno or 0)
            if not hint or error.filename is None:
                raise
            name = str(error.filename)
            raise RunError(f"Cannot use {name if len(name) < 200 else name[:80] + '…'}: {error.strerror}.", hint) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "FTKIT"})
@click.version_option(__version__, prog_name="ftkit")
def main() -> None:
    """From a base model, your data and this GPU to `ollama run mymodel`.

    \b
    ftkit init mymodel && cd mymodel
    ftkit build
    ollama run c-reviewer              # ship.name in recipe.yaml
    """

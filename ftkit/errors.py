"""Every error that ftkit raises on purpose: what is wrong, the next command to type, and an exit code."""

from __future__ import annotations

import sys
import unicodedata
from typing import IO, Any

import click


def visible(text: str) -> str:
    """Without the control characters that a file's text could steer the terminal with; line ends and tabs stay."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def proxy_fault(error: BaseException) -> ToolMissingError:
    """Of a client that cannot be made with the proxies that the environment names."""
    return ToolMissingError(
        f"The proxy that ALL_PROXY, HTTP_PROXY or HTTPS_PROXY names cannot be used: {first_line(error)}.",
        "for socks5://…: pip install 'httpx[socks]'; or unset it",
    )


class FtkitError(click.ClickException):
    """An error that Click shows by itself, as `Error: …` and `Hint: …` on stderr, before exiting with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        stream = file or sys.stderr
        click.echo(visible(f"Error: {self.message}"), file=stream)
        if self.hint:
            click.echo(visible(f"Hint: {self.hint}"), file=stream)


class DataError(FtkitError):
    """The dataset cannot be used; the message names file and line."""


class ModelError(FtkitError):
    """The model reference, its config, tokenizer or weights cannot be used."""


class UntracedError(ModelError):
    """A training step that cannot be traced."""


class RunError(FtkitError):
    """A run directory cannot be read or written."""


class TrainingDivergedError(FtkitError):
    """The loss is no number any more."""


class NameTakenError(FtkitError):
    """Ollama has a model of the wanted name that is somebody else's."""


class RecipeError(FtkitError):
    """The recipe or a flag is wrong; all faults at once, each by its dotted key."""

    exit_code = 2


class DoesNotFitError(FtkitError):
    """The training step, or a later one, needs more memory or disk than there is."""

    exit_code = 3


class ToolMissingError(FtkitError):
    """A program, server or package that this step needs is not there; the hint brings it."""

    exit_code = 4


class ToolFailedError(FtkitError):
    """A program or server was run and failed; the message ends with its last lines."""

    exit_code = 5


class ProofError(FtkitError):
    """The shipped model does not behave as the trained one."""

    exit_code = 6


class InterruptedRunError(FtkitError):
    """The user stopped a long step; the hint tells how to go on."""

    exit_code = 130

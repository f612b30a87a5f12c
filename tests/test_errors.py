"""Every error shows what is wrong and what to type next, and exits with the code of its kind."""

from __future__ import annotations

import io

import click
import pytest
from click.testing import CliRunner

from ftkit import errors
from ftkit.errors import FtkitError

EXIT_CODES = {
    "DataError": 1,
    "ModelError": 1,
    "RunError": 1,
    "NameTakenError": 1,
    "TrainingDivergedError": 1,
    "RecipeError": 2,
    "DoesNotFitError": 3,
    "ToolMissingError": 4,
    "ToolFailedError": 5,
    "ProofError": 6,
    "InterruptedRunError": 130,
}


def test_every_kind_has_its_exit_code() -> None:
    kinds = {kind.__name__: kind.exit_code for kind in FtkitError.__subclasses__()}
    assert kinds == EXIT_CODES


def test_click_shows_message_and_hint_on_stderr() -> None:
    @click.command()
    def command() -> None:
        raise errors.ToolMissingError("No hammer.", "buy hammer")

    result = CliRunner().invoke(command)
    assert result.exit_code == errors.ToolMissingError.exit_code
    assert result.stderr == "Error: No hammer.\nHint: buy hammer\n"
    assert result.stdout == ""


@pytest.mark.parametrize("hint", [None, ""])
def test_without_a_hint_there_is_no_hint_line(hint: str | None) -> None:
    stream = io.StringIO()
    FtkitError("Broken.", hint).show(stream)
    assert stream.getvalue() == "Error: Broken.\n"

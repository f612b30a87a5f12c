"""What a person sees of long work: a bar, curves where there is room, lines now and then where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from ftkit.cli import console
from ftkit.report.braille import MARK, chart, drawn

CURVES = {"training loss, smoothed": [(float(n), 3.0 - n / 50) for n in range(100)], "validation loss": [(30.0, 2.5), (60.0, 2.0)]}
FIELDS = {"loss": "0.512", "validation": "0.610", "speed": "1234 tokens/s", "left": "12 min 3 s", "memory": "1.21 GiB of 1.50 GiB planned"}


def test_a_falling_line_is_drawn_from_above_left_to_below_right() -> None:
    picture, high, low = drawn([(0.0, 1.0), (10.0, 0.0)], [], 10.0, 5, 3)
    assert (high, low) == (1.0, 0.0)
    assert picture[0][0] == "⠑"  # the dots of the first row and column, and of the second
    assert picture[-1][-1] != " "
    assert picture[-1][0] == picture[0][-1] == " "


def test_dots_and_marks_stand_where_their_values_are() -> None:
    picture, _, _ = drawn([(0.0, 0.0), (0.0, 0.0)], [(9.9, 1.0)], 10.0, 10, 2)
    assert picture[0] == " " * 9 + MARK
    assert picture[1][0] == chr(0x2840)  # the lowest dot on the left


@pytest.mark.parametrize("line", [[], [(5.0, 1.0)], [(0.0, 2.0), (10.0, 2.0)]])
def test_few_points_and_a_flat_line_are_drawn(line: list[tuple[float, float]]) -> None:
    shown = chart({"loss": line, "validation": []}, 10.0, 40, 4)
    assert bool(shown) == bool(line)
    assert all(len(text) <= 40 for text in shown)


def screen(monkeypatch: pytest.MonkeyPatch, width: int, height: int, **settings: Any) -> str:
    """What stands on a terminal of this size in the middle of the work."""
    file = io.StringIO()
    utf = io.TextIOWrapper(io.BytesIO(), encoding=settings.pop("encoding", "utf-8"), newline="")
    shown = Console(
        file=utf, force_terminal=True, width=width, height=height, color_system=None, highlight=False, soft_wrap=True, **settings
    )
    monkeypatch.setattr(console, "stderr", shown)
    monkeypatch.setattr(console.sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    with console.ConsoleReporter().bar("training", 100) as bar:
        bar.update(50, curves=CURVES, **FIELDS)
    utf.flush()
    file.write(utf.buffer.getvalue().decode(utf.encoding))  # type: ignore[attr-defined]
    return file.getvalue().rpartition("\x1b[1A\x1b[2K")[2]


def test_curves_are_drawn_where_a_terminal_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen(monkeypatch, 120, 40)
    assert MARK in shown
    assert "validation loss" in shown
    assert any(0x2800 < ord(letter) < 0x2900 for letter in shown)
    for words in ("50/100", "memory 1.21 GiB of 1.50 GiB planned", "left 12 min 3 s"):
        assert words in shown


def test_right_answers_have_a_picture_of_their_own_where_a_terminal_has_room_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Percents on the axis of the losses would press them flat."""
    monkeypatch.setitem(CURVES, "right answers, %", [(30.0, 25.0), (60.0, 75.0)])
    shown = screen(monkeypatch, 120, 40)
    assert "validation loss" in shown.partition("75 │")[0]
    assert "25 │" in shown.partition("75 │")[2]
    assert "└ ◆ right answers, %" in shown
    low = screen(monkeypatch, 120, 24)
    assert "validation loss" in low
    assert "right answers" not in low


@pytest.mark.parametrize("size", [(120, 14), (40, 40), (25, 40)], ids=["low", "narrow", "narrower"])
def test_without_room_there_is_the_bar_alone_and_no_word_is_lost(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = screen(monkeypatch, *size)
    assert MARK not in shown
    together = "".join(shown.split())
    for name, text in FIELDS.items():
        assert f"{name}{text}".replace(" ", "") in together, name
    assert "training" in shown
    (first, *_) = shown.rpartition("training")[2].splitlines()  # nothing of it is cut or goes on below
    assert "50%" in first
    assert "50/100" in first


def test_a_terminal_that_knows_no_braille_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MARK not in screen(monkeypatch, 120, 40, encoding="latin-1")


def test_without_a_terminal_a_line_soon_one_a_minute_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.ConsoleReporter().bar("training", 200) as bar:
        for done in range(1, 201):
            now = float(done)
            bar.update(done, curves=CURVES, loss="0.5")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["6/200,", "67/200,", "128/200,", "189/200,", "200/200,"]
    assert lines[0] == "  training: 6/200, loss 0.5"

"""What a running training shows beside its bar."""

from __future__ import annotations

from ftkit.train.curve import Point
from ftkit.train.watch import curves_of, measured

LOSSES = [Point(n, n / 10, loss=2.0 - n / 10, learning_rate=1e-4) for n in range(1, 5)]


def test_right_answers_are_a_third_curve_and_said() -> None:
    seen = [*LOSSES, Point(2, 0.2, validation_loss=2.0, right_percent=25.0), Point(4, 0.4, validation_loss=1.5)]
    assert list(curves_of(seen).items())[1:] == [("validation loss", [(2, 2.0), (4, 1.5)]), ("right answers, %", [(2, 25.0)])]
    assert measured(seen) == {"right answers": "25 %"}  # of the last evaluation that asked


def test_of_preferences_it_is_how_many_are_preferred() -> None:
    seen = [*LOSSES, Point(4, 0.4, validation_loss=0.6, reward_accuracy=0.75, reward_margin=0.1234, reward_chosen=0.1)]
    assert list(curves_of(seen).items())[2:] == [("preferred, %", [(4, 75.0)])]
    assert measured(seen) == {"preferred": "75 %", "margin": "0.123"}


def test_where_losses_are_all_nothing_else_is_shown() -> None:
    assert list(curves_of(LOSSES)) == ["training loss, smoothed", "validation loss"]
    assert not measured(LOSSES)

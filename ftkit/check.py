"""The result of a check: passed, failed, or not made – and then why. What was not looked at never counts as passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "not made"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, or was not."""

    name: str  # what was compared with what, for a person to read
    outcome: Outcome
    detail: str  # passed: on how much; failed: the first difference; not made: why

    @property
    def words(self) -> str:
        return f"{self.name}: {self.outcome} ({self.detail})"


def passed(name: str, detail: str) -> Check:
    return Check(name, "passed", detail)


def failed(name: str, detail: str) -> Check:
    return Check(name, "failed", detail)


def not_made(name: str, why: str) -> Check:
    return Check(name, "not made", why)

"""Whether a form of a model still prefers, of two answers to one prompt, the one that it was trained to prefer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ftkit.check import Check, failed, not_made, passed
from ftkit.proof.behaviour import LEAST, Behaviour, missing_form

NAME = "preferences"


@dataclass(frozen=True)
class Preferred:
    """One form on the held-out pairs: by how many nats the chosen answer is likelier than the rejected one, pair by pair."""

    margins: list[float]

    @property
    def margin(self) -> float:
        return sum(self.margins) / len(self.margins)

    @property
    def right(self) -> int:
        """Pairs whose chosen answer is the likelier one."""
        return sum(margin > 0 for margin in self.margins)


def preferred(form: Behaviour) -> Preferred:
    """Of rows that are a chosen answer, its rejected one, the next chosen, …"""
    return Preferred([rejected - chosen for chosen, rejected in zip(form.loss[::2], form.loss[1::2], strict=True)])


def margin_kept(forms: Mapping[str, Behaviour], shipped: str) -> float | None:
    """Percent of what training added to the margin that is left. None where it added next to nothing, or a form was not looked at."""
    if missing_form(forms, shipped):
        return None
    before, trained, after = (preferred(forms[name]).margin for name in ("before", "trained", shipped))
    tokens = forms["trained"].tokens
    gained = trained - before
    return None if gained < LEAST * sum(tokens) / len(tokens) else 100 * (after - before) / gained


def judge_preference(forms: Mapping[str, Behaviour], shipped: str, least: float) -> Check:
    """Whether the form `shipped` keeps `least` percent of the margin that training put between the answers of held-out pairs."""
    if missing := missing_form(forms, shipped):
        return not_made(NAME, missing)
    before, trained, after = (preferred(forms[name]) for name in ("before", "trained", shipped))
    count = len(after.margins)
    figures = (
        f"margin {before.margin:.2f} nats before, {trained.margin:.2f} as trained, {after.margin:.2f} in this file; "
        f"the chosen answer is the likelier one in {after.right} of {count} pairs, as trained {trained.right}, before {before.right}"
    )
    kept = margin_kept(forms, shipped)
    if kept is None:
        return not_made(NAME, f"training moved the answers of these pairs next to nothing apart; {figures}")
    return (
        passed(NAME, f"{kept:.1f} %; {figures}")
        if kept >= least
        else failed(NAME, f"{least:g} % are wanted, kept are {kept:.1f} %; {figures}")
    )

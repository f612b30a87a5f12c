"""Architectures that Ollama asks in a format of its own, whatever template a model brings: which of its renderers is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ftkit.data.template import Render
from ftkit.errors import ModelError


class Own(NamedTuple):
    """Names of Ollama's, as RENDERER and PARSER in a Modelfile."""

    renderer: str
    parser: str


def _gemma4(render: Render) -> Own:
    """One renderer writes an empty thought where nothing is thought; by one parser the server lets a model think unasked."""
    asked = render([{"role": "user", "content": "text"}], True)
    thinks = "<|think|>" in asked
    empty = asked.endswith("<|channel>thought\n<channel|>")
    return Own("gemma4-large" if empty else "gemma4-small", "gemma4" if thinks else "gemma4-no-thinking")


# By llama.cpp's name. Left to itself a server gives these renderer and parser by the architecture, and lets Gemma 4 think
# (server/create.go). It does so with `laguna` and `nemotron_h` too, whose one renderer is left to it: whether that writes what was
# trained on is compared as with any model.
OWN: dict[str, Callable[[Render], Own]] = {"gemma4": _gemma4}


def own_format(architecture: str, render: Render) -> Own | None:
    """Ollama's own format that a model of this architecture was trained on; None where it takes the template that it is given."""
    choose = OWN.get(architecture)
    try:
        return choose(render) if choose else None
    except ModelError:  # the template takes no such question: the server's choice is compared
        return None

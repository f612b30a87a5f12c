"""All that a model is created with in Ollama, as a file and as a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftkit import sandbox, templates
from ftkit.data.template import Render
from ftkit.errors import ModelError, RecipeError
from ftkit.ollama.formats import Own
from ftkit.ollama.template import ChatFormat, go_template
from ftkit.recipe import Ship, modelfile_value


@dataclass(frozen=True)
class Modelfile:
    """Everything that a model is created with; the file that a person reads and the request to the server say the same."""

    file: str
    template: str | None  # None: the server is left to use the template inside the GGUF
    system: str | None
    parameters: dict[str, Any]
    bos: str = ""  # what llama.cpp writes before every prompt by itself
    own: Own | None = None  # the format of Ollama's own that it asks this architecture in, in place of any template

    def text(self) -> str:
        """Rendered from Modelfile.j2. Raises RecipeError or ModelError for a text that a Modelfile cannot hold."""
        parameters = {
            name: [
                _held(item, f"The stop {item!r}", ModelError) if isinstance(item, str) else item
                for item in (value if isinstance(value, list) else [value])
            ]
            for name, value in self.parameters.items()
        }
        path = templates.root() / "Modelfile.j2"
        values = {
            "file": self.file,
            "template": _held(self.template, "TEMPLATE", ModelError) if self.template else None,
            "system": _held(self.system, "ship.system", RecipeError) if self.system else None,
            "parameters": parameters,
            "own": self.own._asdict() if self.own else None,
        }
        try:
            return sandbox.render(path.read_text(encoding="utf-8"), values, "file")
        except sandbox.TemplateFault as fault:
            raise RecipeError(f"The template {path} {fault}.", "take ftkit's own Modelfile.j2 again") from None


def _held(text: str, what: str, kind: type[RecipeError] | type[ModelError]) -> str:
    try:
        return modelfile_value(text)
    except ValueError as error:
        raise kind(f"{what}: {error}.", "write it without") from None


SYSTEM_REFUSED = ("ship.system: the model's chat template refuses a system message.", "leave it out, or say it in the question")


def refuse_system(system: str | None, render: Render) -> None:
    """Raise RecipeError for a system prompt where the chat template takes none: before the long work."""
    if not system:
        return
    try:
        render([{"role": "system", "content": system}, {"role": "user", "content": "text"}], True)
    except ModelError:
        raise RecipeError(*SYSTEM_REFUSED) from None


def make_modelfile(file: str, chat: ChatFormat | None, ship: Ship, *, bos: str, stops: Sequence[str], own: Own | None = None) -> Modelfile:
    """The Modelfile of a shipped model: every sampling value written out, since servers differ in their defaults.

    Raises RecipeError for a system prompt where the chat template takes none.
    """
    if ship.system and chat and chat.system is None:
        raise RecipeError(*SYSTEM_REFUSED)
    parameters: dict[str, Any] = {
        "num_ctx": ship.num_ctx,
        "temperature": ship.temperature,
        "top_k": 40,
        "top_p": 0.9,
        "repeat_penalty": 1.0,
        "stop": list(stops),
    }
    return Modelfile(file, go_template(chat, bos) if chat and not own else None, ship.system, parameters, bos, own)


STRIPPED_BOS = "<bos>"  # Ollama takes this text from the beginning of a prompt by itself, no other

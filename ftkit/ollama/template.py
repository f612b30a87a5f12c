"""A chat template → Ollama's Go template, where that can say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from ftkit.data.rows import Message, roles_text
from ftkit.data.template import Render
from ftkit.errors import ModelError
from ftkit.proof.probes import conversations


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template writes around each message, found by rendering marked messages.

    `opening` begins a conversation without a system message; it holds the model's default system prompt, if it has one.
    """

    opening: str
    system: tuple[str, str] | None  # None: the template refuses a system message
    user: tuple[str, str]
    assistant: tuple[str, str]
    folded: bool = False  # a system message begins the first question: what opens a question is not written a second time
    asks: str | None = None  # what a prompt ends with, where an answer in the history begins otherwise
    trimmed: frozenset[str] = frozenset()  # roles whose contents are written without the white space around them

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, ending where the assistant begins."""
        text = "" if messages[0]["role"] == "system" else self.opening
        for number, message in enumerate(messages):
            role = message["role"]
            before, after = getattr(self, role)
            if self.folded and number == 1 and messages[0]["role"] == "system":
                before = ""
            text += before + (message["content"].strip() if role in self.trimmed else message["content"]) + after
        return text + self.end

    @property
    def end(self) -> str:
        """What a prompt ends with."""
        return self.assistant[0] if self.asks is None else self.asks


def find_format(render: Render, render_on: Callable[[date], Render] | None = None) -> ChatFormat:
    """Take a chat template apart. Raises ModelError where it does more than write fixed text around each message.

    `render_on`: the rendering of a given day, to tell whether the template writes the date; a TEMPLATE would freeze it.
    """
    system, user, answer, again = ("qzsystemqz", "qzuserqz", "qzanswerqz", "qzagainqz")
    asked: list[Message] = [{"role": "user", "content": user}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": answer}]
    takes_system = any(messages[0]["role"] == "system" for messages in conversations(render))
    try:
        if render_on and render_on(date(2001, 2, 3))(asked, True) != render_on(date(2034, 11, 30))(asked, True):
            raise ValueError("it writes today's date")
        alone, whole = render(asked, True), render([*answered, {"role": "user", "content": again}], True)
        before_user, after_user = alone.split(user)
        between, following = whole.split(user)[1].split(answer)[0], whole.split(answer)[1].split(again)[0]
        # What ends a whole conversation may be more than what ends a turn.
        user_after, assistant_after = render(asked, False).split(user)[1], render(answered, False).split(answer)[1]
        user_after = user_after if after_user.startswith(user_after) else ""
        assistant_after = assistant_after if following.startswith(assistant_after) else _strip_end(following, before_user)
        user_before, assistant_before = _strip_start(following, assistant_after), _strip_start(between, user_after)
        asks, opening = _strip_start(after_user, user_after), _strip_end(before_user, user_before)
        around_system, folded = None, False
        if takes_system:
            with_system = render([{"role": "system", "content": system}, *asked], True)
            system_before, rest = with_system.split(user)[0].split(system)
            folded = not rest.endswith(user_before)
            around_system = (system_before, rest if folded else _strip_end(rest, user_before))
        chat = ChatFormat(
            opening,
            around_system,
            (user_before, user_after),
            (assistant_before, assistant_after),
            folded,
            None if asks == assistant_before else asks,
            _trimmed(render, takes_system),
        )
        for messages in conversations(render):
            if chat.render(messages) != render(messages, True):
                raise ValueError(f"{roles_text(messages)} renders differently, with {messages[0]['content']!r}")
    except (ValueError, IndexError, ModelError) as error:
        raise ModelError(f"The chat template writes more than fixed text around each message ({error}).") from None
    return chat


def _trimmed(render: Render, takes_system: bool) -> frozenset[str]:
    """The roles whose contents lose the white space around them."""
    padded = "\n \tqzpaddedqz\t \n"
    roles = ("system", "user", "assistant", "user") if takes_system else ("user", "assistant", "user")
    found = set()
    for number, role in enumerate(roles):
        contents = [padded if n == number else "text" for n in range(len(roles))]
        messages = [{"role": r, "content": content} for r, content in zip(roles, contents, strict=True)]
        if padded not in render(messages, True):
            found.add(role)
    return frozenset(found)


def _strip_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text!r} does not begin with {start!r}")
    return text[len(start) :]


def _strip_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{text!r} does not end with {end!r}")
    return text[: len(text) - len(end)]


# Go templates have no function that trims, but can look at each byte: the white space of ASCII, as str.strip() takes it away.
TRIM = (
    '{{ define "trim" }}{{ $start := -1 }}{{ $end := 0 }}{{ $in := false }}{{ range $i := len $ }}{{ $c := index $ $i }}'
    "{{ if or (eq $c 32) (and (ge $c 9) (le $c 13)) (and (ge $c 28) (le $c 31)) }}{{ if $in }}{{ $end = $i }}{{ $in = false }}{{ end }}"
    "{{ else }}{{ if lt $start 0 }}{{ $start = $i }}{{ end }}{{ $in = true }}{{ end }}{{ end }}"
    "{{ if $in }}{{ $end = len $ }}{{ end }}{{ if ge $start 0 }}{{ slice $ $start $end }}{{ end }}{{ end }}"
)
REFUSE_SYSTEM = '{{ index "no system message: the chat template refuses it" 99 }}'  # fails, as the template does


def go_template(chat: ChatFormat, bos: str = "") -> str:
    """The same format as Ollama's Go template.

    `bos` is the beginning-of-sequence text that llama.cpp adds by itself; it is left out here, or it would come twice.
    """

    def turn(role: str) -> str:
        if getattr(chat, role) is None:
            return REFUSE_SYSTEM
        before, after = getattr(chat, role)
        opens = _literal(before)
        if bos and before.startswith(bos) and (role == "system" or not chat.opening):  # it may begin the prompt
            later = "" if role == "system" else f"{{{{ if $i }}}}{_literal(bos)}{{{{ end }}}}"
            opens = later + _literal(before.removeprefix(bos))
        if role == "user" and chat.folded:
            opens = f'{{{{ if not (and (eq $i 1) (eq (index $.Messages 0).Role "system")) }}}}{opens}{{{{ end }}}}'
        content = '{{ template "trim" $m.Content }}' if role in chat.trimmed else "{{ $m.Content }}"
        return opens + content + _literal(after)

    opening = _literal(chat.opening.removeprefix(bos))
    first = f'{{{{ if and (eq $i 0) (ne $m.Role "system") }}}}{opening}{{{{ end }}}}' if opening else ""
    return (
        (TRIM if chat.trimmed else "")
        + "{{ range $i, $m := .Messages }}"
        + first
        + f'{{{{ if eq $m.Role "system" }}}}{turn("system")}'
        + f'{{{{ else if eq $m.Role "user" }}}}{turn("user")}'
        + f'{{{{ else if eq $m.Role "assistant" }}}}{turn("assistant")}'
        + "{{ end }}{{ end }}"
        + _literal(chat.end)
    )


def _literal(text: str) -> str:
    """Text in a Go template; as a quoted string of Go's where braces, or Ollama's parser, would take it for something else."""
    if not set(text) & set("{}") and '"""' not in text and all(c.isprintable() or c in "\t\n" for c in text):
        return text
    escaped = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    return '{{ "' + "".join(escaped.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '" }}'

"""The forms of a row that ftkit reads."""

from __future__ import annotations

import reprlib
from typing import Any

from ftkit.data.rows import ROLES, Message

FORMATS = 'ftkit reads {"messages": [...]}, {"prompt", "completion"}, {"instruction", "input", "output"} and {"conversations": [...]}'


def messages_of(value: Any) -> tuple[Message, ...]:
    """A row in any of the known forms, as messages. Raises ValueError with what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object, not {type(value).__name__}")
    if "messages" in value:
        messages = value["messages"]
    elif "conversations" in value:  # ShareGPT
        names = {"human": "user", "gpt": "assistant"}
        turns = value["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("`conversations` is not a list of objects")
        messages = [{"role": names.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")} for turn in turns]
    elif "prompt" in value and "completion" in value:
        messages = [{"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["completion"]}]
    elif "instruction" in value and "output" in value:  # Alpaca
        parts = [part for part in (value["instruction"], value.get("input")) if part]
        asked = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": value["output"]}]
    else:
        raise ValueError(f"no known form (keys: {', '.join(map(str, value)) or 'none'})")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {number} has role {reprlib.repr(role)}; roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has no text")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise ValueError(f"message {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"no answer: the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    if not messages[-1]["content"].strip():
        raise ValueError("no answer: the last message is empty")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no question: a user message is missing")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)

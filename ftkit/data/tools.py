"""Tools in a row: what may be called, the calls and what they give, however a dataset writes them → as OpenAI's API does."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ftkit.data.rows import CALLS, Message

DESCRIBES = ("name", "description", "parameters")  # all of a tool that llama.cpp gives to a chat template (common/chat.cpp)
CHANGES_NOTHING = ("strict", "type")


def read_tools(value: Any) -> list[dict[str, Any]]:
    """A list of tools, each described by itself or under `function`; JSON text is read. Raises ValueError."""
    tools = _parsed(value, "tools")
    read = []
    for number, entry in enumerate(tools if isinstance(tools, list) else [tools], 1):
        tool = _parsed(entry, f"tool {number}")
        if isinstance(tool, Mapping) and tool.get("type", "function") == "function":
            tool = tool.get("function", tool)
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or not tool["name"]:
            raise ValueError(f"tool {number} is no function with a name: {reprlib.repr(entry)}")
        if unread := next((key for key, each in tool.items() if each and key not in (*DESCRIBES, *CHANGES_NOTHING)), None):
            raise ValueError(f"`{unread}` of tool {tool['name']} is not read: a server gives a model {', '.join(DESCRIBES)} alone")
        described = _parsed(tool.get("parameters") or {}, f"`parameters` of tool {tool['name']}")
        function = {"name": tool["name"], "description": str(tool.get("description") or ""), "parameters": described}
        read.append({"type": "function", "function": function})
    return read


def read_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """The calls of message `number`: a list of them or one, each by itself or under `function`; JSON text is read. Raises ValueError."""
    calls = _parsed(value, f"message {number}: the call")
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"message {number}: {reprlib.repr(call)} calls no function by name")
        arguments: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) not in (None, "")), {})
        arguments = _parsed(arguments, f"message {number}: the arguments of {function['name']}")
        if not isinstance(arguments, Mapping):
            raise ValueError(f"message {number}: the arguments of {function['name']} are no JSON object: {reprlib.repr(arguments)}")
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
        if isinstance(call, Mapping) and isinstance(call.get("id"), str) and call["id"]:
            made["id"] = call["id"]
        read.append(made)
    return read


def pair(messages: Sequence[Message]) -> None:
    """Give each call an id and each result the id and the name of its call. Raises ValueError for a result that none called for.

    Results without an id are those of the calls before them, in order.
    """
    waiting: dict[str, str] = {}  # id → name
    made = 0
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            if not waiting or (given is not None and given not in waiting):
                raise ValueError(
                    f"message {number} is what a tool gave, and nothing called it"
                    + (f" ({given})" if given else _as_text(messages[: number - 1]))
                )
            answered = given if given is not None else next(iter(waiting))
            message["tool_call_id"], message["name"] = answered, waiting.pop(answered)
        else:
            waiting = {}
        for call in message.get(CALLS, ()):
            made += 1
            call.setdefault("id", f"call{made:05d}")  # of the form that Mistral's templates ask for
            waiting[call["id"]] = call["function"]["name"]


def _as_text(before: Sequence[Message]) -> str:
    """What is said of an answer before a result that may hold its call as text."""
    said = before and before[-1]["role"] == "assistant" and before[-1]["content"]
    return "; a call that is written as text is not read: give it in `tool_calls`, as docs/recipe.md shows" if said else ""


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{what}: not JSON: {reprlib.repr(value)}") from None

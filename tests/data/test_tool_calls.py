"""Tools: what may be called, calls and results, in every template that writes them, as llama.cpp's server will render them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_turns import made, spans, templates, tokenizer

from ftkit.data.formats import conversation_of
from ftkit.data.manner import calling_of
from ftkit.data.mask import examples_of
from ftkit.data.rows import CALLS, TOOLS, Message, Row
from ftkit.data.turns import answer_reader, expected, turns_of
from ftkit.engines import llamacpp
from ftkit.errors import DataError, ModelError
from ftkit.proof.compare import differing_prompt

DAYS = {"city": {"type": "string", "description": "the city"}, "days": {"type": "integer"}}
PARAMETERS = {"type": "object", "properties": DAYS, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather in a city", "parameters": PARAMETERS}}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def gave(text: str) -> Message:
    return {"role": "tool", "content": text}


def calls(*cities: str) -> Message:
    called = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": 2}}} for city in cities]
    return {"role": "assistant", "content": None, CALLS: called}


ONE = [user("Weather in Oslo?"), calls("Oslo"), gave("3 degrees"), said("Three.")]
TURNS = [{"role": "system", "content": "Be brief."}, *ONE, user("And in Bern?"), calls("Bern"), gave('{"at": 5}'), said("Five."), user("Thanks"), said("Yes.")]  # fmt: skip  # noqa: E501
TWO = [user("Weather?"), calls("Oslo", "Bern"), gave("3 degrees"), gave("5 degrees"), said("Three and five.")]
BESIDE = [user("Weather in Oslo?"), {**calls("Oslo"), "content": "Let me look."}, gave("3 degrees"), said("Three.")]
CONVERSATIONS = {"one call": ONE, "several turns": TURNS, "two calls": TWO, "text beside": BESIDE}

# Of the templates that llama.cpp collects, those that do not take tools, and what of a conversation others do not take: why.
NOTHING = "does not write what may be called"
NO_CALLS = "does not write calls of tools"
OTHERWISE = "renders the prompt differently once the answer is there"
LOST = "leaves out what is said beside the call"
BEHIND = "writes the call behind what ends a turn"
SINGLE = "does not write these 2 calls"
LLAMA_CPP = "llama.cpp renders it otherwise"
ONE_AT_ONCE = "only supports single tool-calls at once"  # the template's own words, as the two below
OWN_FORM, FUNCTIONS = "has no attribute 'description'", "'functions' is undefined"
EACH = tuple(CONVERSATIONS)
REFUSED: dict[str, dict[str, str]] = {
    "Apertus-8B-Instruct": dict.fromkeys(EACH, OTHERWISE),
    "Bielik-11B-v3.0-Instruct": {"several turns": OTHERWISE},
    "Cohere2MoE": {"text beside": LOST},
    "CohereForAI-c4ai-command-r-plus-tool_use": dict.fromkeys(EACH, OWN_FORM),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": {"text beside": LOST},
    "GigaChat3-10B-A1.8B": {"one call": BEHIND, "several turns": BEHIND, "two calls": SINGLE, "text beside": BEHIND},
    "GigaChat3.1-10B-A1.8B": {"two calls": SINGLE},
    "HuggingFaceTB-SmolLM3-3B": dict.fromkeys(EACH, NOTHING),
    "Kimi-K2-Instruct": dict.fromkeys(EACH, NO_CALLS),
    "Kimi-K2-Thinking": dict.fromkeys(EACH, NO_CALLS),
    "LFM2-8B-A1B": dict.fromkeys(EACH, NO_CALLS),
    "LFM2.5-Instruct": dict.fromkeys(EACH, NO_CALLS),
    "MiniMax-M1": {"text beside": LOST},
    "Mistral-Small-3.2-24B-Instruct-2506": {"text beside": LOST},
    "NVIDIA-Nemotron-Nano-v2": {"text beside": BEHIND},
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": {**dict.fromkeys(EACH, OTHERWISE), "text beside": LOST},
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": {**dict.fromkeys(EACH, OTHERWISE), "text beside": LOST},
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": dict.fromkeys(EACH, NOTHING),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": dict.fromkeys(EACH, NOTHING),
    "deepseek-ai-DeepSeek-V3.1": dict.fromkeys(EACH, NOTHING),
    "fireworks-ai-llama-3-firefunction-v2": dict.fromkeys(EACH, FUNCTIONS),
    "google-gemma-2-2b-it": dict.fromkeys(EACH, NOTHING),
    "google-gemma-4-31B-it-interleaved": dict.fromkeys(EACH, LLAMA_CPP),
    "google-gemma-4-31B-it": {"text beside": LLAMA_CPP},
    "ibm-granite-granite-3.3-2B-Instruct": dict.fromkeys(EACH, NO_CALLS),
    "llama-cpp-deepseek-r1": dict.fromkeys(EACH, NOTHING),
    "llama-cpp-rwkv-world": dict.fromkeys(EACH, NOTHING),
    "meetkai-functionary-medium-v3.1": dict.fromkeys(EACH, LLAMA_CPP),
    "meta-llama-Llama-3.1-8B-Instruct": {"two calls": ONE_AT_ONCE, "text beside": LOST},
    "meta-llama-Llama-3.2-3B-Instruct": {"two calls": ONE_AT_ONCE, "text beside": LOST},
    "meta-llama-Llama-3.3-70B-Instruct": {"two calls": ONE_AT_ONCE, "text beside": LOST},
    "microsoft-Phi-3.5-mini-instruct": dict.fromkeys(EACH, NOTHING),
    "mistralai-Mistral-Nemo-Instruct-2407": {"text beside": LOST},
    "muse-glimmer": {"text beside": LOST},
    "openai-gpt-oss-120b": {"two calls": SINGLE},
    "upstage-Solar-Open-100B": {"text beside": LOST},
}


def row_of(messages: list[Message], **more: Any) -> Row:
    return Row(conversation_of({"messages": messages, **more}).messages, 3, "rows.jsonl, line 3")


@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
def test_every_template_that_writes_tools_is_learnt_as_llama_cpp_renders_it(path: Path) -> None:
    """Before each learnt call and answer stands llama.cpp's own prompt for it, byte for byte; what is learnt ends the turn."""
    model: Any = tokenizer(path)
    refused: dict[str, str] = {}
    with llamacpp.rendering(model.chat_template, model.bos_token, model.eos_token) as engine:
        for name, messages in CONVERSATIONS.items():
            row = row_of(messages, tools=[WEATHER])
            try:
                turns = list(turns_of(model, row))
            except (DataError, ModelError) as error:
                refused[name] = error.message
                continue
            if differing_prompt((turn.prompt, engine.render(turn.asked)) for turn in turns):
                refused[name] = LLAMA_CPP
                continue
            learnt = spans(examples_of(model, row))
            assert [model.decode(ids) for _, ids in learnt] == [turn.said for turn in turns]
            for turn, message in zip(turns, (message for message in row.messages if message["role"] == "assistant"), strict=True):
                for call in message.get(CALLS, ()):
                    assert "weather" in turn.said
                    assert call["function"]["arguments"]["city"] in turn.said
                    assert turn.said.endswith(calling_of(model).end)
                    assert turn.said.count(calling_of(model).end) == 1
                assert message["content"].strip() in turn.said
                assert "degrees" not in turn.said
    wanted = REFUSED.get(path.stem, {})
    assert refused.keys() == wanted.keys(), refused
    for name, words in refused.items():
        assert wanted[name] in words


def test_every_way_to_write_them_is_read_alike() -> None:
    """OpenAI's, its older one, ShareGPT's, JSON in text, and parts of them left out."""
    wanted = row_of([user("?"), calls("Oslo"), gave("3"), said("Three.")], tools=[WEATHER]).messages
    function = {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}
    spoken = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo", "days": 2}})},
        {"from": "observation", "value": 3},
        {"from": "gpt", "value": "Three."},
    ]
    older = [user("?"), {**said(""), "function_call": function}, {"role": "function", "name": "weather", "content": "3"}, said("Three.")]
    in_text = [user("?"), {**said(""), CALLS: json.dumps([{"function": function}])}, gave("3"), said("Three.")]
    for row in (
        {"messages": older, "functions": [WEATHER["function"]]},
        {"messages": in_text, TOOLS: json.dumps([WEATHER])},
        {"conversations": spoken, TOOLS: [json.dumps(WEATHER["function"])]},
    ):
        assert conversation_of(row).messages == wanted
    first, called, result, _ = wanted
    assert first[TOOLS] == [WEATHER]
    assert called["content"] == ""
    assert result == {"role": "tool", "content": "3", "name": "weather", "tool_call_id": called[CALLS][0]["id"]}


def test_results_belong_to_their_calls() -> None:
    two = [{"id": name, "function": {"name": name, "arguments": {}}} for name in ("first", "second")]
    messages = [user("?"), {**said(""), CALLS: two}, {**gave("2"), "tool_call_id": "second"}, gave("1"), said("Yes.")]
    *_, later, earlier, _ = row_of(messages).messages
    assert (later["name"], earlier["name"]) == ("second", "first")


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([user("?"), {**said(""), CALLS: [{"function": {"arguments": {}}}]}, said("x")], [], "message 2: .* calls no function by name"),
        ([user("?"), {**said(""), CALLS: [{"function": {"name": "weather", "arguments": "{"}}]}], [], "the arguments of weather: not JSON"),
        ([user("?"), {**said(""), CALLS: [{"function": {"name": "weather", "arguments": [1]}}]}], [], "are no JSON object"),
        ([user("?"), gave("3"), said("x")], [], "message 2 is what a tool gave, and nothing called it"),
        ([user("?"), calls("Oslo"), {**gave("3"), "tool_call_id": "b"}, said("x")], [], r"nothing called it \(b\)"),
        ([user("?"), calls("Oslo"), user("Well?"), said("x")], [], "message 2 calls a tool, and what it gave is missing"),
        ([{**user("?"), CALLS: [{"function": {"name": "weather"}}]}, said("x")], [], "message 1 calls a tool, and is the user's"),
        ([user("?"), said("x")], [{"type": "function"}], "tool 1 is no function with a name"),
        ([user("?"), said("x")], [{"name": "f", "returns": {"type": "string"}}], "`returns` of tool f is not read"),
        ([user("?"), said("x")], "[{", "tools: not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_said(messages: list[Message], tools: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        conversation_of({"messages": messages, TOOLS: tools})


def test_a_call_is_read_back_as_it_is_expected() -> None:
    """By its template's own form, from ids and from a server's text; a row whose last answer is a text is expected as it stands."""
    model: Any = made("Qwen-Qwen3-0.6B")
    row = row_of([user("Weather in Oslo?"), calls("Oslo")], tools=[WEATHER])
    wanted = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
    assert expected(model, row).strip() == wanted
    (turn,) = turns_of(model, row)
    assert answer_reader(model)(model(turn.said, add_special_tokens=False)["input_ids"]).strip() == wanted
    assert row.answer == '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
    assert expected(model, row_of(ONE)) == "Three."


def test_what_a_template_leaves_out_is_refused_by_its_place() -> None:
    model: Any = made("microsoft-Phi-3.5-mini-instruct")
    for messages, tools, words in ((ONE, [WEATHER], "what may be called"), (ONE, [], "calls of tools")):
        with pytest.raises(DataError, match=f"^rows.jsonl, line 3: the chat template does not write {words}") as caught:
            list(turns_of(model, row_of(messages, tools=tools)))
        assert caught.value.hint

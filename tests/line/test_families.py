"""The line on real vocabularies and chat templates: ids, dates, BOS and stops are those of the training, or the proof says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import families
import llama_cpp
import pytest

from ftkit.check import Check
from ftkit.data import stops, template
from ftkit.data.formats import conversation_of
from ftkit.data.mask import tokenise, trained_turns
from ftkit.data.rows import IGNORED, Row
from ftkit.data.turns import answer_reader, question, turns_of
from ftkit.engines import hf, llamacpp
from ftkit.gguf import files as gguf
from ftkit.line.prove import TOOL_PROMPTS, own_prompts, proof_checks
from ftkit.machine.llama_cpp import need_converter
from ftkit.proof.probes import WITH_TOOLS

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

SETTINGS = template.ChatSettings(date(2024, 7, 26))
ROWS = [
    Row(({"role": "user", "content": "What is 1 plus 1?"}, {"role": "assistant", "content": "It is 2."}), 1),
    Row(({"role": "user", "content": "Ünder {x}"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Under?"},
         {"role": "assistant", "content": "No."}), 2),
]  # fmt: skip
LLAMA = families.by_name("Llama 3.1")


def converted(folder: Path, path: Path) -> Path:
    gguf.convert(folder, {"F16": path}, need_converter())
    return path


def checks(tokenizer: Any, path: Path, stops: list[int]) -> dict[str, Check]:
    with llamacpp.load(path, 512) as engine:
        own = own_prompts(tokenizer, engine)
        return {check.name: check for check in proof_checks(tokenizer, engine, ROWS, [ROWS[0].question], stops, own)}


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_the_vocabulary_is_the_real_one(family: families.Family, made: Callable[..., Path]) -> None:
    """llama.cpp's developers wrote down what the model's own tokenizer gives for their hard cases."""
    tokenizer = hf.load_tokenizer(made(family))
    stem = llama_cpp.models() / f"ggml-vocab-{family.vocabulary}.gguf"
    texts = Path(f"{stem}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = Path(f"{stem}.out").read_text(encoding="utf-8").splitlines()
    wrong = [text for text, line in zip(texts, ids, strict=False) if template.token_ids(tokenizer, text) != [int(n) for n in line.split()]]
    assert not wrong


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_a_family_is_read_asked_and_ended_as_in_training(family: families.Family, made: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(made(family), model)
    tokenizer = hf.load_tokenizer(model, SETTINGS)
    ends = stops.seal(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == list(dict.fromkeys([family.ends, family.eos]))
    assert stops.configured_stops(model) == ends
    learnt = [said for row in ROWS for _, _, said in trained_turns(tokenizer, row)]
    assert [said[-1] for said in learnt] == ends[:1] * 3
    assert [answer_reader(tokenizer)(said).strip() for said in learnt] == ["It is 2.", "Yes.", "No."]
    labels = [n for example in tokenise(tokenizer, ROWS) for n in example.labels if n != IGNORED]
    assert labels == [token for said in learnt for token in said]
    found = checks(tokenizer, converted(model, tmp_path / "m.gguf"), ends)
    wrong = {name for name, check in found.items() if check.outcome != "passed"}
    control = {"prompts that hold </s>"} if family.vocabulary == "qwen2" else set()  # its vocabulary holds that word as text
    assert {found[name].outcome for name in control} <= {"not made"}
    assert wrong == control


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama 3.1", replace(SETTINGS, text=template.PLAIN)),
        ("Gemma 2", replace(SETTINGS, system_in_question=True)),
        ("Qwen 3", replace(SETTINGS, thinking=False)),
        ("Gemma 4", replace(SETTINGS, thinking=True)),
    ],
)
def test_what_a_recipe_makes_of_a_template_is_so_in_llama_cpp(
    name: str, settings: template.ChatSettings, made: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(made(families.by_name(name)), model)
    tokenizer = hf.load_tokenizer(model, settings)
    ends = stops.seal(model, tokenizer)
    rows = [*ROWS, Row(({"role": "system", "content": "Be brief."}, *ROWS[1].messages), 3)]
    sealed = hf.load_tokenizer(model)
    with llamacpp.load(converted(model, tmp_path / "m.gguf"), 512) as engine:
        found = proof_checks(sealed, engine, rows, [question(sealed, row) for row in rows], ends, own_prompts(sealed, engine))
    assert {check.name for check in found if check.outcome != "passed"} <= {"prompts that hold </s>"}
    prompt = template.render(sealed, rows[2].question, ask=True)
    assert "Be brief." in prompt
    assert [turn.prompt for turn in turns_of(tokenizer, rows[2])][-1] == prompt


def test_tools_that_llama_cpp_writes_otherwise_are_told_and_fail_what_was_trained_with_them(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    model = made(families.by_name("Qwen 3"))
    tokenizer, path = hf.load_tokenizer(model, SETTINGS), converted(model, tmp_path / "m.gguf")
    ends = stops.stops(tokenizer, None)
    with llamacpp.load(path, 512) as engine:
        own = own_prompts(tokenizer, engine)
        assert [prompt.messages[-1]["role"] for prompt in own if prompt.messages and prompt.has_tools] == ["user", "tool"]
        right = {check.name: check for check in proof_checks(tokenizer, engine, ROWS, [], ends, own)}
        assert right[TOOL_PROMPTS].words == "prompts with tools: passed (2 prompts with tools)"
    gguf.correct(path, gguf.Corrections(chat_template=str(tokenizer.chat_template).replace("<tools>", "<tool>")))
    with_tools = Row(conversation_of(WITH_TOOLS).messages, 3)
    with llamacpp.load(path, 512) as engine:
        for rows, outcome, failing in ((ROWS, "not made", set()), ([*ROWS, with_tools], "failed", {TOOL_PROMPTS, "training ids"})):
            found = {check.name: check for check in proof_checks(tokenizer, engine, rows, [], ends, own)}
            assert found[TOOL_PROMPTS].outcome == outcome
            assert {name for name, check in found.items() if check.outcome == "failed"} == failing
        assert "from token" in found[TOOL_PROMPTS].detail
    refused = "{%- if tools %}{{ messages | groupby('role') }}{%- endif %}"
    gguf.correct(path, gguf.Corrections(chat_template=refused + str(tokenizer.chat_template)))
    with llamacpp.load(path, 512) as engine:
        found = {check.name: check for check in proof_checks(tokenizer, engine, ROWS, [], ends, own)}
    assert found[TOOL_PROMPTS].outcome == "not made"
    assert "did not take" in found[TOOL_PROMPTS].detail


def test_another_date_is_found(made: Callable[..., Path], tmp_path: Path) -> None:
    path = converted(made(LLAMA), tmp_path / "m.gguf")  # its template asks llama.cpp for today
    tokenizer = hf.load_tokenizer(made(LLAMA), SETTINGS)
    found = checks(tokenizer, path, stops.stops(tokenizer, None))
    assert (found["training ids"].outcome, found["prompts"].outcome) == ("failed", "failed")
    assert found["token ids"].outcome == found["stops"].outcome == "passed"


def test_a_bos_that_training_never_saw_is_found_and_taken_away(made: Callable[..., Path], tmp_path: Path) -> None:
    model = made(LLAMA, families.WITHOUT_BOS)
    tokenizer, path = hf.load_tokenizer(model), converted(model, tmp_path / "m.gguf")
    assert not template.begins_with_bos(tokenizer)
    ends = stops.stops(tokenizer, None)
    found = checks(tokenizer, path, ends)
    assert (found["training ids"].outcome, found["prompts"].outcome) == ("failed", "failed")
    gguf.correct(path, gguf.Corrections(add_bos_token=False))
    assert {check.outcome for check in checks(tokenizer, path, ends).values()} == {"passed"}


def test_an_end_of_turn_that_llama_cpp_does_not_know_is_found_and_named(made: Callable[..., Path], tmp_path: Path) -> None:
    model = made(LLAMA, "{{ bos_token }}" + families.WITHOUT_BOS.replace("<|eot_id|>", "<|reserved_special_token_7|>"))
    tokenizer, path = hf.load_tokenizer(model), converted(model, tmp_path / "m.gguf")
    ends = stops.stops(tokenizer, None)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|reserved_special_token_7|>", "<|end_of_text|>"]
    found = checks(tokenizer, path, ends)
    assert found.pop("stops").outcome == "failed"
    assert {check.outcome for check in found.values()} == {"passed"}
    gguf.correct(path, gguf.Corrections(eot_token_id=ends[0]))
    assert {check.outcome for check in checks(tokenizer, path, ends).values()} == {"passed"}
    assert gguf.read_back(path, "F16", gguf.Wanted(tokenizer.chat_template, eot_token_id=ends[0])).tensors > 1


def test_every_dated_template_writes_one_day_in_both_engines() -> None:
    """Of all that llama.cpp carries; another day tells them from a default of their own."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    sources = {p.stem: p.read_text(encoding="utf-8") for p in sorted((llama_cpp.models() / "templates").glob("*.jinja"))}
    fixed = {name: template.fix_date(source, date(2025, 1, 3)) for name, source in sources.items()}
    dated = [name for name, source in fixed.items() if template.is_dated(source)]
    assert len(dated) >= 10
    for name in dated:
        with llamacpp.rendering(fixed[name], "<|im_start|>", "<|im_end|>") as engine:
            shown = engine.render(ROWS[0].question)
        words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        expected = _compile_jinja_template(fixed[name]).render(messages=ROWS[0].question, add_generation_prompt=True, **words)
        assert shown == expected, name
        assert any(day in shown for day in ("03 Jan 2025", "2025-01-03", "January 03, 2025")), name

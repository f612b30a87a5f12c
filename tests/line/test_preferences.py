"""Answers, then preferences on their adapter, then one file: what is refused on the way, and that it keeps what was learnt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convertible
import pytest
import tiny
from click.testing import Result

from ftkit.line import behaviour, line
from ftkit.line.behaviour import PAIRS
from ftkit.line.job import open_job
from ftkit.line.train import probe
from ftkit.proof.preference import judge_preference
from ftkit.recipe import parse_override
from ftkit.run import Run

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Ftkit = Callable[..., Result]
WORDS = "apple bread chair door egg fish glass house ink jar kite lamp moon nest oven pen quill rope sand tree".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)
RECIPE = """
model: model
data: {{train: {rows}, test: test.jsonl}}
training: {{method: lora, max_length: 128, effective_batch_size: 8, evaluations_per_epoch: 1, {training}}}
lora: {{r: 8}}
ship: {{quantization: Q8_0, max_new_tokens: 4, num_ctx: 256, test_rows: 12}}
"""


def preferences(count: int, seed: int) -> list[dict[str, Any]]:
    """Polite answers against curt ones of the same length."""
    draw = random.Random(seed)  # noqa: S311
    things = (draw.sample(WORDS, 2) for _ in range(count))
    return [
        {
            "prompt": f"where is the {a} and the {b}",
            "chosen": f"the {a} is by the {b} thank you",
            "rejected": f"the {a} is by the {b} goes away",
        }
        for a, b in things
    ]


@pytest.fixture
def project(tmp_path: Path, write_rows: Any, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, eight pairs, and a recipe; no GPU is seen."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny.make_model(tmp_path / "model", vocab_size=2000, hidden_size=256, intermediate_size=512)
    row = {"prompt": "Say it. " * 12, "chosen": "It is said. " * 8, "rejected": "No. " * 4}
    write_rows(tmp_path / "train.jsonl", [row] * 8)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\ntraining: {objective: dpo, effective_batch_size: 4, max_length: 256}\nlora: {r: 4}\n"
        "data: {validation_share: 0.25}\n",
        encoding="utf-8",
    )
    return tmp_path


@pytest.mark.parametrize("method", ["qlora", pytest.param("lora", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("training.per_device_train_batch_size=2", "training.gradient_checkpointing=true"),
    ],
)
def test_a_plan_holds_in_the_real_trainer(project: Path, method: str, settings: tuple[str, ...]) -> None:
    """TRL's DPOTrainer as `ftkit train` builds it, two optimizer steps on pairs of one length, against the traced peak."""
    job = open_job(project / "recipe.yaml", [parse_override(entry) for entry in (f"training.method={method}", *settings)])
    with job.run:
        memory = line.plan(job).memory
        planned, real = memory.chosen.peak.allocated_bytes, probe(job, memory).allocated_bytes
    assert abs(planned / real - 1) < 0.01, f"{planned} planned, {real} measured"


def test_what_cannot_be_learnt_is_refused_with_the_way_out(project: Path, write_rows: Any, ftkit: Ftkit, rows: list[Any]) -> None:
    def refused(*settings: str) -> tuple[int, str]:
        found = ftkit("plan", project, *(word for setting in settings for word in ("--set", setting)))
        return found.exit_code, found.stderr

    code, said = refused("training.objective=sft")
    assert (code, "train.jsonl, line 1: a preference (chosen, rejected), and training.objective is sft" in said) == (1, True)
    assert "--set training.objective=dpo" in said
    assert refused("training.objective=sft", "data.columns={completion: chosen}")[0] == 0  # as the hint says
    write_rows(project / "answers.jsonl", rows)
    code, said = refused("data.train=answers.jsonl")
    assert (code, "line 1: no preference, and training.objective is dpo" in said) == (1, True)
    code, said = refused("training.method=dpo")
    assert (code, "training.objective: dpo" in said) == (2, True)
    code, said = refused("training.max_length=64")  # no answer is within it
    assert (code, "No training row" in said) == (1, True)
    code, said = refused("training.adapter=model")
    assert (code, "no adapter" in said) == (2, True)
    tiny.make_adapter(project / "model", project / "sft")
    code, said = refused("training.adapter=sft", "training.method=full")
    assert (code, "--set training.method=lora" in said) == (2, True)
    code, said = refused("training.adapter=sft", "lora.r=8")
    assert (code, "lora.r is 8, and 4 in the adapter" in said) == (2, True)
    tiny.make_model(project / "other", hidden_size=64)
    tiny.make_adapter(project / "other", project / "others")
    code, said = refused("training.adapter=others")
    assert (code, f"was trained on {project / 'other'}" in said) == (1, True)


def test_a_look_at_preferences_shows_both_answers_and_what_is_odd(project: Path, write_rows: Any, ftkit: Ftkit) -> None:
    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    long = "a" * 100
    rows = [pair("Q", "yes, gladly", "no"), pair("Q", "yes", "never"), pair("Q", "no", "yes, gladly"), pair("Q", "yes, gladly", "no"),
            pair("P", long + " yes", long + " no")]  # fmt: skip
    write_rows(project / "train.jsonl", rows)
    write_rows(project / "validation.jsonl", [pair("Q", "yes", "never"), pair("R", "yes", "no")])
    settings = ("data.validation=validation.jsonl", "training.max_length=64")
    words = [word for setting in settings for word in ("--set", setting)]
    shown = json.loads(ftkit("data", project, *words, "--json", "--show", "1").stdout)
    places = {finding["what"]: [place.rpartition(" ")[2] for place in finding["places"]] for finding in shown["findings"]}
    assert places == {
        "rows that come twice": ["4"],
        "preferences that come again the other way round": ["3"],
        "validation rows that are trained on too": ["1"],
        "preferences left out: their answers do not differ within training.max_length": ["5"],
    }
    assert [row["place"].rpartition(", ")[2] for row in shown["rows"]] == ["chosen", "rejected"]
    said = ["".join(token["text"] for token in row["tokens"] if token["learnt"]) for row in shown["rows"]]
    assert said == ["yes, gladly<|im_end|>", "no<|im_end|>"]
    write_rows(project / "train.jsonl", [pair(f"Q{n}", "y" * n + "yes", "no") for n in range(8)])
    findings = json.loads(ftkit("data", project, *words, "--json").stdout)["findings"]
    assert [finding["count"] for finding in findings if "the longer one: more than 3 in 4" in finding["what"]] == [8]


@pytest.mark.e2e
def test_answers_then_preferences_then_one_file(tmp_path: Path, write_rows: Any, ftkit: Ftkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin of held-out pairs rises from the answers' run to the preferences', and the shipped file keeps it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    convertible.make("llama", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_rows(tmp_path / "train.jsonl", preferences(80, 1))
    write_rows(tmp_path / "test.jsonl", preferences(12, 2))
    answers = [{"prompt": row["prompt"], "completion": row[side]} for row in preferences(80, 3) for side in ("chosen", "rejected")]
    write_rows(tmp_path / "answers.jsonl", answers)
    for name, rows, training in (
        ("sft", "answers.jsonl", "max_steps: 20, learning_rate: 5.0e-3"),
        ("dpo", "train.jsonl", "max_steps: 16, learning_rate: 5.0e-4, objective: dpo, adapter: runs/sft"),
    ):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(rows=rows, training=training), encoding="utf-8")
        trained = ftkit("train", tmp_path / f"{name}.yaml")
        assert trained.exit_code == 0, trained.stderr
    assert "asking the reference" in trained.stderr
    assert "100 % of the validation pairs" in trained.stdout
    run = Run(tmp_path / "runs" / "dpo")
    made = run.finished("train")
    assert made
    assert made.result["curve"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # against the answers' adapter, not the base
    shipped = ftkit("ship", tmp_path / "dpo.yaml", "--no-ollama")
    assert shipped.exit_code == 0, shipped.stderr
    asked, proven = run.finished("ask"), run.finished("prove")
    assert asked
    assert proven
    proof = json.loads((proven.folder / "proof.json").read_text(encoding="utf-8"))
    outcomes = {check["name"]: check["outcome"] for check in proof["checks"]}
    assert (outcomes["preferences"], outcomes["gain kept"]) == ("passed", "not made")
    margins = {name: form["margin"] for name, form in proof["forms"].items()}
    assert margins["trained"] - margins["before"] > 5
    assert margins["Q8_0"] == pytest.approx(margins["trained"], rel=0.05)
    assert proof["forms"]["Q8_0"]["preferred_percent"] == 100
    forms = behaviour.read(asked.folder / PAIRS)
    assert judge_preference({**forms, "Q8_0": forms["before"]}, "Q8_0", 95).outcome == "failed"  # the base under the file's name

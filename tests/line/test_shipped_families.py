"""Models with the vocabularies and templates of families, trained for a step or two and shipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import convertible
import families
import pytest

from ftkit.errors import ProofError, RecipeError
from ftkit.line import line
from ftkit.line.job import open_job
from ftkit.line.page import page
from ftkit.line.prove import FAILED_PROOF
from ftkit.proof.record import CARD, PROBES, RECORD, read_record
from ftkit.proof.verify import verify
from ftkit.report.ship_page import write_page

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

GAIN, DISTANCE, STRENGTH, BASE = "gain kept", "distance from the trained model", "strength of the merge", "base of the merge"


@pytest.mark.parametrize(("name", "method"), [("Phi 3.5", "qlora"), ("Gemma 2", "lora")])
def test_the_line_ships_it_and_does_nothing_twice(
    name: str, method: str, made: Callable[..., Path], tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    # What Gemma 2's 262144 tokens are read as, tests/line/test_families.py has; each step here takes its time for each of them.
    family = replace(families.by_name(name), merges=4000 if name == "Gemma 2" else None)
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": str(made(family)),
        "training": {"method": method, "max_steps": 2, "effective_batch_size": 2, "max_length": 128},
        "lora": {"r": 4},
        "ship": {
            "name": "tiny", "quantization": "Q8_0", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512,
            "closing_steps": 2 if name == "Gemma 2" else 0,  # whose norms are stored as 1 + w
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")

    def ship(evaluate: dict[str, Any] | None = None, **settings: Any) -> line.Shipped:
        changed = [("evaluate", evaluate)] if evaluate else []
        job = open_job(tmp_path, [*changed, *((f"ship.{key}", value) for key, value in settings.items())])
        with job.run:
            line.train(job)
            return line.ship(job, use_ollama=False)

    if name == "Gemma 2":
        with pytest.raises(RecipeError, match="refuses a system message"):
            ship(system="Be short.")
        assert not list((tmp_path / "runs" / "recipe").glob("*-*/step.json"))  # found before anything was made
    shipped = ship()
    outcomes = {check.name: check.outcome for check in shipped.checks}
    assert outcomes.pop("answers") == "not made"  # two steps teach little
    assert {outcomes.pop(name) for name in (GAIN, DISTANCE)} <= {"passed", "not made"}
    passed = ("token ids", "training ids", "prompts", "stops", "end of sequence", STRENGTH, BASE)
    assert outcomes == dict.fromkeys(passed, "passed")
    assert set(shipped.forms) == {"before", "trained", "merged", "Q8_0"}
    assert {path.name for path in shipped.record.parent.iterdir()} == {"tiny-Q8_0.gguf", "Modelfile", RECORD, PROBES, CARD}
    assert {check.outcome for check in verify(shipped.gguf, shipped.record)} == {"passed"}
    handed = "".join((shipped.record.parent / name).read_text(encoding="utf-8") for name in (RECORD, PROBES, CARD))
    assert str(tmp_path) not in handed
    assert "What is 3 plus 3?" not in handed
    record, untouched = read_record(shipped.record)
    assert (untouched, record.proof["checks"]) == (True, [asdict(check) for check in shipped.checks])
    assert record.versions["training"].keys() >= {"ftkit", "torch", "transformers", "peft", "trl"}
    assert f'PARAMETER stop "{family.ends}"' in shipped.modelfile.read_text(encoding="utf-8")
    run = tmp_path / "runs" / "recipe"
    for step in run.glob("close-*/step.json"):
        closed = json.loads(step.read_text(encoding="utf-8"))["result"]
        assert (closed["vectors"], closed["before"] is None) == (7, False), closed
    assert len(list(run.glob("close-*"))) == (name == "Gemma 2")
    proof = json.loads(shipped.proof_file.read_text(encoding="utf-8"))
    assert [check["name"] for check in proof["checks"] if check["outcome"] == "not made"][:1] == ["answers"]

    shown = page(open_job(tmp_path), shipped)
    assert [(one.question, one.said.keys()) for one in shown.answers] == [
        (example["question"], {"before", "trained", "shipped"}) for example in proof["examples"]
    ]
    assert (shown.divergence.keys(), len(shown.curve) > 2) == ({"before", "merged", "shipped"}, True)
    assert {name for name, _, _ in shown.files} == {path.name for path in shipped.record.parent.iterdir()}
    assert {one.name for one in shown.sizes} == {form.replace("merged", "merged (F16)") for form, it in shipped.forms.items() if it.kept}
    write_page(shown, tmp_path / "ship.html")
    assert shipped.examples[0]["question"] in (tmp_path / "ship.html").read_text(encoding="utf-8")

    def times(*suffixes: str) -> dict[Path, int]:
        steps = [path for path in run.rglob("*") if "shipped" not in (path.name, path.parent.name)]
        return {path: path.stat().st_mtime_ns for path in steps if path.suffix in suffixes}

    def handed_on_times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (run / "shipped", *(run / "shipped").iterdir())}

    assert {state.step.name for state in line.states(open_job(tmp_path)) if not state.done} == {"register"}
    before, untouched_since = times(".gguf", ".safetensors", ".json", ""), handed_on_times()
    again = ship()
    changed = {path.name for path, when in times(".gguf", ".safetensors", ".json", "").items() if before.get(path) != when}
    assert changed <= {"proof.json", "manifest.json", ".lock", run.name} | {path.parent.name for path in run.rglob("proof.json")}
    assert (again.fresh, handed_on_times(), page(open_job(tmp_path), again)) == (False, untouched_since, shown)
    files = times(".gguf", ".safetensors")
    job = open_job(tmp_path)
    with job.run:
        line.start_from(job, "prove")
        assert (line.make_only(job, "prove").fresh, line.make_only(job, "merge").fresh) == (True, False)
    system = {} if name == "Gemma 2" else {"system": "Be short."}  # its template refuses one
    judged = ship(max_loss_points=10, temperature=0.5, **system, name="other")
    assert (judged.fresh, times(".gguf", ".safetensors")) == (False, files)
    assert "PARAMETER temperature 0.5" in judged.modelfile.read_text(encoding="utf-8")
    steps = times(".gguf", ".safetensors", ".json", "")
    labelled = ship({"by": "labels", "labels": [f"{2 * n}" for n in range(12)]})  # by another rule, nothing is made or asked again
    scores, proof = labelled.scores["Q8_0"], json.loads(labelled.proof_file.read_text(encoding="utf-8"))
    assert (labelled.fresh, times(".gguf", ".safetensors")) == (False, files)
    changed = {path.name for path, when in times(".gguf", ".safetensors", ".json", "").items() if steps.get(path) != when}
    assert not changed & {"answers.json", "behaviour.json", "step.json"}
    assert scores.confusion
    assert sum(sum(row.values()) for row in scores.confusion.values()) == scores.rows == 1  # a tenth of twelve
    assert proof["evaluate"]["by"] == "labels"
    assert proof["right_by"].startswith("the label: 0 | 2 | 4 | ")
    assert proof["scores"]["Q8_0"]["confusion"] == scores.confusion
    with pytest.raises(RecipeError, match=r"evaluate\.labels: the expected answer in held-out row 1 names none of the labels"):
        ship({"by": "labels", "labels": ["yes", "no"]})

    other = ship(quantization="F16", closing_steps=0)  # is there already: it is proven, and nothing is converted
    assert (other.fresh, times(".gguf", ".safetensors")) == (True, files)

    answers = next(run.glob("ask-*/answers.json"))  # had it been right as trained, the file would have lost it all
    record = json.loads(answers.read_text(encoding="utf-8"))
    record["answers"]["trained"] = record["expected"]
    answers.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ProofError, match="answers worse") as worse:
        ship()
    assert (run / "shipped" / RECORD).exists()  # what passed last
    for allowed, outcome in ((3, "failed"), (100, "not made")):
        checks = line.judge_again(open_job(tmp_path, [("ship.max_loss_points", allowed)])).checks
        assert next(check.outcome for check in checks if check.name == "answers") == outcome
    hint = str(worse.value.hint)
    assert "--set ship.max_loss_points=100" in hint
    assert (run / FAILED_PROOF).exists()
    files = times(".gguf", ".safetensors")  # with QLoRA those of the other merge, since the first lost too much
    assert not ship(max_loss_points=100).fresh  # what the hint says is judged, not made
    assert times(".gguf", ".safetensors") == files
    assert not (run / FAILED_PROOF).exists()


def test_a_type_that_the_converter_makes_later_is_corrected_too(
    tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    convertible.make("llama", tmp_path / "model", chat_template=convertible.CHAT)  # asked without a BOS, which llama.cpp would add
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": str(tmp_path / "model"),
        # far enough that rounding to BF16 is little beside it
        "training": {"method": "lora", "max_steps": 12, "effective_batch_size": 2, "max_length": 128, "learning_rate": 1e-2},
        "ship": {"name": "tiny", "quantization": "BF16", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512, "record_rows": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = open_job(tmp_path)
    with job.run:
        line.train(job)
        other = open_job(tmp_path, [("evaluate", {"by": "json"})])
        with pytest.raises(RecipeError, match=r"evaluate\.by: the expected answer in .*train\.jsonl, line \d+ is no JSON"):
            line.ship(replace(other, run=job.run), use_ollama=False)
        assert not list((tmp_path / "runs" / "recipe").glob("ask-*"))
        shipped = line.ship(job, use_ollama=False)
    assert {check.name for check in shipped.checks if check.outcome != "passed"} <= {"answers", GAIN, DISTANCE}
    *_, last = verify(shipped.gguf, shipped.record)
    assert (last.name, last.outcome) == ("losses on held-out rows", "passed")


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning")
def test_fused_experts_are_trained_merged_and_shipped(
    tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    """Qwen 3's with experts: what PEFT adapts in one tensor of all experts is merged into the files' tensor of each.

    Some rows call tools: they too are asked of the file as they were trained.
    """
    from safetensors.torch import load_file

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    base = families.make_model(replace(families.by_name("Qwen 3"), config="qwen3_moe", sizes=sizes), tmp_path / "base")
    calls = [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    called = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    answered = [*called, {"role": "tool", "content": "cold"}, {"role": "assistant", "content": "Cold."}]
    tools = [{"messages": messages, "tools": [{"name": "weather"}]} for messages in (called, answered)]
    write_rows(tmp_path / "train.jsonl", [*tools, *rows])
    write_rows(tmp_path / "test.jsonl", tools)
    recipe = {
        "model": str(base),
        "data": {"test": "test.jsonl"},
        "training": {"method": "lora", "max_steps": 2, "effective_batch_size": 2, "max_length": 256, "learning_rate": 1e-2},
        "lora": {"r": 4},
        "ship": {"name": "tiny", "quantization": "F16", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = open_job(tmp_path)
    with job.run:
        line.train(job)
        shipped = line.ship(job, use_ollama=False)
    outcomes = {check.name: check.outcome for check in shipped.checks}
    assert {name for name, outcome in outcomes.items() if outcome != "passed"} - {GAIN, DISTANCE} == {"answers", "prompts that hold </s>"}
    proof = json.loads(shipped.proof_file.read_text(encoding="utf-8"))
    assert proof["examples"][0]["expected"].strip().startswith('<tool_call>\n{"name": "weather"')
    (merged,) = (tmp_path / "runs" / "recipe").glob("merge-*/model/model.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(merged)
    assert before.keys() == after.keys()
    changed = {name.rpartition(".mlp.")[2] for name in before if not before[name].equal(after[name])}
    assert {f"experts.{n}.{part}_proj.weight" for n in range(4) for part in ("gate", "up", "down")} <= changed

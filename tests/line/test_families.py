"""The line on real vocabularies and chat templates: ids, dates, BOS and stops are those of the training, or the proof says so."""

from __future__ import annotations

import json
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
from ftkit.data.mask import tokenise, trained_turns
from ftkit.data.rows import IGNORED, Row
from ftkit.data.turns import answer_reader, question, turns_of
from ftkit.engines import hf, llamacpp
from ftkit.errors import ProofError, RecipeError
from ftkit.gguf import files as gguf
from ftkit.line import line
from ftkit.line.job import open_job
from ftkit.line.prove import FAILED_PROOF, proof_checks
from ftkit.machine import packages
from ftkit.machine.llama_cpp import need_converter

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

SETTINGS = template.ChatSettings(date(2024, 7, 26))
ROWS = [
    Row(({"role": "user", "content": "What is 1 plus 1?"}, {"role": "assistant", "content": "It is 2."}), 1),
    Row(({"role": "user", "content": "Ünder {x}"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Under?"},
         {"role": "assistant", "content": "No."}), 2),
]  # fmt: skip
LLAMA = families.by_name("Llama 3.1")
PLAIN = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '\\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's model, made once; with another template the tokenizer's settings alone are another."""
    folders: dict[str, Path] = {}

    def make(family: families.Family, chat_template: str | None = None) -> Path:
        if family.name not in folders:
            folders[family.name] = families.make_model(family, tmp_path_factory.mktemp("model"))
        if not chat_template:
            return folders[family.name]
        other = tmp_path_factory.mktemp("model") / "other"
        shutil.copytree(folders[family.name], other)
        config = json.loads((other / "tokenizer_config.json").read_text(encoding="utf-8"))
        (other / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}), encoding="utf-8")
        return other

    return make


def converted(folder: Path, path: Path) -> Path:
    gguf.convert(folder, path, "F16", need_converter())
    return path


def checks(tokenizer: Any, path: Path, stops: list[int]) -> dict[str, Check]:
    with llamacpp.load(path, 512) as engine:
        return {check.name: check for check in proof_checks(tokenizer, engine, ROWS, [ROWS[0].question], stops)}


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
        found = proof_checks(sealed, engine, rows, [question(sealed, row) for row in rows], ends)
    assert {check.name for check in found if check.outcome != "passed"} <= {"prompts that hold </s>"}
    prompt = template.render(sealed, rows[2].question, ask=True)
    assert "Be brief." in prompt
    assert [turn.prompt for turn in turns_of(tokenizer, rows[2])][-1] == prompt


def test_another_date_is_found(made: Callable[..., Path], tmp_path: Path) -> None:
    path = converted(made(LLAMA), tmp_path / "m.gguf")  # its template asks llama.cpp for today
    tokenizer = hf.load_tokenizer(made(LLAMA), SETTINGS)
    found = checks(tokenizer, path, stops.stops(tokenizer, None))
    assert (found["training ids"].outcome, found["prompts"].outcome) == ("failed", "failed")
    assert found["token ids"].outcome == found["stops"].outcome == "passed"


def test_a_bos_that_training_never_saw_is_found_and_taken_away(made: Callable[..., Path], tmp_path: Path) -> None:
    model = made(LLAMA, PLAIN)
    tokenizer, path = hf.load_tokenizer(model), converted(model, tmp_path / "m.gguf")
    assert not template.begins_with_bos(tokenizer)
    ends = stops.stops(tokenizer, None)
    found = checks(tokenizer, path, ends)
    assert (found["training ids"].outcome, found["prompts"].outcome) == ("failed", "failed")
    gguf.correct(path, gguf.Corrections(add_bos_token=False))
    assert {check.outcome for check in checks(tokenizer, path, ends).values()} == {"passed"}


def test_an_end_of_turn_that_llama_cpp_does_not_know_is_found_and_named(made: Callable[..., Path], tmp_path: Path) -> None:
    model = made(LLAMA, "{{ bos_token }}" + PLAIN.replace("<|eot_id|>", "<|reserved_special_token_7|>"))
    tokenizer, path = hf.load_tokenizer(model), converted(model, tmp_path / "m.gguf")
    ends = stops.stops(tokenizer, None)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|reserved_special_token_7|>", "<|end_of_text|>"]
    found = checks(tokenizer, path, ends)
    assert found.pop("stops").outcome == "failed"
    assert {check.outcome for check in found.values()} == {"passed"}
    gguf.correct(path, gguf.Corrections(eot_token_id=ends[0]))
    assert {check.outcome for check in checks(tokenizer, path, ends).values()} == {"passed"}
    assert gguf.read_back(path, "F16", tokenizer.chat_template).tensors > 1


@pytest.mark.parametrize(("name", "method"), [("Llama 3.1", "qlora"), ("Gemma 2", "lora")])
def test_the_line_ships_it_and_does_nothing_twice(
    name: str, method: str, made: Callable[..., Path], tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    family = families.by_name(name)
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": str(made(family)),
        "training": {"method": method, "max_steps": 2, "effective_batch_size": 2, "max_length": 128},
        "lora": {"r": 4},
        "ship": {"name": "tiny", "quantization": "Q8_0", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")

    def ship(**settings: Any) -> line.Shipped:
        job = open_job(tmp_path, [(f"ship.{key}", value) for key, value in settings.items()])
        with job.run:
            line.train(job)
            return line.ship(job, use_ollama=False)

    if name == "Gemma 2":
        with pytest.raises(RecipeError, match="refuses a system message"):
            ship(system="Be short.")
        assert not list((tmp_path / "runs" / "recipe").glob("*-*/step.json"))  # found before anything was made
    shipped = ship()
    outcomes = {check.name: check.outcome for check in shipped.checks}
    assert outcomes == {"token ids": "passed", "training ids": "passed", "prompts": "passed", "stops": "passed", "answers": "not made"}
    assert f'PARAMETER stop "{family.ends}"' in shipped.modelfile.read_text(encoding="utf-8")
    run = tmp_path / "runs" / "recipe"
    proof = json.loads(shipped.proof_file.read_text(encoding="utf-8"))
    assert [check["outcome"] for check in proof["checks"]].count("not made") == 1

    def times(*suffixes: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in suffixes}

    assert {state.step.name for state in line.states(open_job(tmp_path)) if not state.done} == {"register"}
    before = times(".gguf", ".safetensors", ".json", "")
    again = ship()
    changed = {path.name for path, when in times(".gguf", ".safetensors", ".json", "").items() if before.get(path) != when}
    assert changed <= {"proof.json", "manifest.json", ".lock", run.name} | {path.parent.name for path in run.rglob("proof.json")}
    assert not again.fresh
    files = times(".gguf", ".safetensors")
    job = open_job(tmp_path)
    with job.run:
        line.start_from(job, "prove")
        assert (line.make_only(job, "prove").fresh, line.make_only(job, "merge").fresh) == (True, False)
    system = {} if name == "Gemma 2" else {"system": "Be short."}  # its template refuses one
    judged = ship(max_loss_points=10, match="first_line", temperature=0.5, **system, name="other")
    assert (judged.fresh, times(".gguf", ".safetensors")) == (False, files)
    assert "PARAMETER temperature 0.5" in judged.modelfile.read_text(encoding="utf-8")
    other = ship(quantization="F16")  # is there already: it is proven, and nothing is converted
    assert (other.fresh, times(".gguf", ".safetensors")) == (True, files)

    answers = next(run.glob("ask-*/answers.json"))  # had it been right as trained, the file would have lost it all
    record = json.loads(answers.read_text(encoding="utf-8"))
    record["answers"]["trained"] = record["expected"]
    answers.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ProofError, match="answers worse") as worse:
        ship()
    hint = str(worse.value.hint)
    assert "--set ship.max_loss_points=100" in hint
    assert (run / FAILED_PROOF).exists()
    files = times(".gguf", ".safetensors")  # with QLoRA those of the other merge, since the first lost too much
    assert not ship(max_loss_points=100).fresh  # what the hint says is judged, not made
    assert times(".gguf", ".safetensors") == files
    assert not (run / FAILED_PROOF).exists()


def test_a_type_that_the_converter_makes_later_is_corrected_too(
    made: Callable[..., Path], tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": str(made(LLAMA, PLAIN)),  # asked without a BOS, which llama.cpp would add
        "training": {"method": "lora", "max_steps": 1, "effective_batch_size": 2, "max_length": 128},
        "ship": {"name": "tiny", "quantization": "BF16", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = open_job(tmp_path)
    with job.run:
        line.train(job)
        checks = line.ship(job, use_ollama=False).checks
    assert {check.name for check in checks if check.outcome != "passed"} <= {"answers"}


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning")
def test_fused_experts_are_trained_merged_and_shipped(
    tmp_path: Path, write_rows: Callable[[Path, list[Any]], Path], rows: list[Any]
) -> None:
    """Qwen 3's with experts: what PEFT adapts in one tensor of all experts is merged into the files' tensor of each."""
    from safetensors.torch import load_file

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    base = families.make_model(replace(families.by_name("Qwen 3"), config="qwen3_moe", sizes=sizes), tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": str(base),
        "training": {"method": "lora", "max_steps": 2, "effective_batch_size": 2, "max_length": 128, "learning_rate": 1e-2},
        "lora": {"r": 4},
        "ship": {"name": "tiny", "quantization": "F16", "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = open_job(tmp_path)
    with job.run:
        line.train(job)
        shipped = line.ship(job, use_ollama=False)
    outcomes = {check.name: check.outcome for check in shipped.checks}
    assert {name for name, outcome in outcomes.items() if outcome != "passed"} == {"answers", "prompts that hold </s>"}
    (merged,) = (tmp_path / "runs" / "recipe").glob("merge-*/model/model.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(merged)
    assert before.keys() == after.keys()
    changed = {name.rpartition(".mlp.")[2] for name in before if not before[name].equal(after[name])}
    assert {f"experts.{n}.{part}_proj.weight" for n in range(4) for part in ("gate", "up", "down")} <= changed


def test_every_dated_template_writes_one_day_in_both_engines() -> None:
    """Of all that llama.cpp carries; another day tells them from a default of their own."""
    import xllamacpp
    from transformers.utils.chat_template_utils import _compile_jinja_template

    path = packages.installed("smollm2")
    assert path, "ftkit setup smollm2 comes first"
    sources = {p.stem: p.read_text(encoding="utf-8") for p in sorted((llama_cpp.models() / "templates").glob("*.jinja"))}
    fixed = {name: template.fix_date(source, date(2025, 1, 3)) for name, source in sources.items()}
    dated = [name for name, source in fixed.items() if template.is_dated(source)]
    assert len(dated) >= 10
    for name in dated:
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.chat_template = str(path), fixed[name]
        parameters.n_ctx, parameters.n_parallel, parameters.verbosity, parameters.warmup = 512, 1, 0, False
        parameters.hostnames = ["127.0.0.1"]
        shown = llamacpp.Engine(xllamacpp.Server(parameters)).render(ROWS[0].question)
        words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        expected = _compile_jinja_template(fixed[name]).render(messages=ROWS[0].question, add_generation_prompt=True, **words)
        assert shown == expected, name
        assert any(day in shown for day in ("03 Jan 2025", "2025-01-03", "January 03, 2025")), name

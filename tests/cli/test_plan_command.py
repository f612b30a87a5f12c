"""`ftkit plan` as it is typed: with and without a recipe, its files, its JSON, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit.data.read import split_validation
from ftkit.data.rows import Row
from ftkit.data.store import store_rows
from ftkit.engines import hf
from ftkit.machine import device
from ftkit.machine.cards import cards
from ftkit.memory.kernels import CONTEXT_BYTES
from ftkit.memory.model import Skeleton, load_config
from ftkit.plan.plan import MARGIN
from ftkit.units import GIB, MIB, bytes_text

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Ftkit = Callable[..., Result]
UNKNOWN_SYSTEM = "no training row has the system message of ship.system"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Path) -> Path:
    """An empty current folder without a recipe."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_model_and_a_card_are_enough(here: Path, model: Path, ftkit: Ftkit) -> None:
    shown = ftkit("plan", "--model", model, "--gpu", "RTX 3060", "--length", "64")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("Fits: qlora needs ")
    assert "11.75 GiB on RTX 3060" in shown.stdout
    assert "LoRA on the 16-bit weights fits too, with " in shown.stdout
    assert not list(here.iterdir())  # nothing is left beside


@pytest.mark.slow
def test_every_card_is_listed(here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any) -> None:
    """With rows for their training, and without any for a million tokens; nothing is left behind, and no second plan is asked for."""
    write_rows(here / "mine.jsonl", rows)
    asked = ("plan", "--model", model, "--gpus", "--length", "64")
    listed = json.loads(ftkit(*asked, "--data", "mine.jsonl", "--json").stdout)
    assert {entry["name"] for entry in listed["gpus"]} == set(cards())
    assert listed["smallest"] == listed["gpus"][0]["name"]
    timed = [entry for entry in listed["gpus"] if entry["estimate"]]
    assert all(0 < entry["estimate"]["seconds_low"] < entry["estimate"]["seconds_high"] for entry in timed)
    alone = json.loads(ftkit("plan", "--model", model, "--gpu", "L4", "--length", "64", "--data", "mine.jsonl", "--json").stdout)
    l4 = next(entry for entry in listed["gpus"] if entry["name"] == "L4")
    assert l4["estimate"] == alone["estimate"]
    assert l4["device_bytes"] == alone["chosen"]["peak"]["device_bytes"]
    shown = ftkit(*asked)
    assert shown.exit_code == 0, shown.output
    assert "time for 1.0 M tokens, an estimate" in shown.stdout
    assert f"The smallest that fits: {listed['smallest']}." in shown.stdout
    assert len(re.findall(r"(?m)^RTX 4090 Laptop +15.20 GiB .* yes .* not known$", shown.stdout)) == 1


@pytest.mark.parametrize("flag", [("--gpu", "T4"), ("--vram", "8"), ("--plot", "p.svg"), ("--html", "p.html"), ("--probe",)])
def test_every_card_is_no_card(here: Path, model: Path, ftkit: Ftkit, flag: tuple[str, ...]) -> None:
    refused = ftkit("plan", "--model", model, "--gpus", *flag)
    assert refused.exit_code == 2
    assert f"so that {flag[0]} has no meaning" in refused.stderr


def test_time_is_told_before_training(here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any) -> None:
    write_rows(here / "mine.jsonl", rows)
    asked = ("plan", "--model", model, "--data", "mine.jsonl", "--length", "64", "--set", "training.num_train_epochs=3")
    told, unknown = (ftkit(*asked, *device).stdout for device in (("--gpu", "RTX 4090"), ("--vram", "8")))
    assert re.search(r"(?m)^Time: about [\d.]+ to [\d.]+ \w+ for 3 epochs \(estimate, by the speed of RTX 4090\)\.$", told)
    assert "Time: time" not in unknown
    assert re.search(r"(?m)^Time: not known before a training here: the speed of a GPU with 8 GiB is not known\.$", unknown)


def test_a_bare_config_is_enough(here: Path, model: Path, ftkit: Ftkit) -> None:
    shutil.copyfile(model / "config.json", here / "config.json")
    planned = json.loads(ftkit("plan", "--config", "config.json", "--vram", "8", "--length", "64", "--json").stdout)
    assert planned["chosen"]["fits"]
    assert planned["tokens"] is None


def test_a_dataset_is_counted(here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any) -> None:
    write_rows(here / "mine.jsonl", rows)
    planned = json.loads(ftkit("plan", "--model", model, "--data", "mine.jsonl", "--vram", "8", "--length", "64", "--json").stdout)
    assert planned["tokens"]["rows"] == len(rows)
    assert planned["max_length"] == min(64, planned["tokens"]["longest"])
    assert 0 < planned["labelled_share"] < 1
    assert planned["work"]["steps"] > 0


def test_a_kind_that_is_held_out_whole_is_named(here: Path, model: Path, ftkit: Ftkit, write_rows: Any) -> None:
    """Answers give a reason first: only by the last line, which counts, are they of few kinds. Here the only row of one is held out."""
    every = store_rows(Row(({"role": "user", "content": str(n)},), n) for n in range(20))
    rare = split_validation(every, 0.1, seed=42)[1][0].line
    answers = [f"Reason {n}.\n{'rare' if n == rare else 'SAFE' if n % 2 else 'UNSAFE'}" for n in range(20)]
    write_rows(here / "t.jsonl", [{"prompt": f"{n}?", "completion": answer} for n, answer in enumerate(answers)])
    ask = ("plan", "--model", model, "--data", "t.jsonl", "--vram", "8", "--length", "64")
    said = ftkit(*ask, "--set", "evaluate.by=last_line").stderr
    assert '1 of 3 different answers stand in the validation rows alone and are not learnt: the first is "rare", ' in said
    assert f"t.jsonl, line {rare + 1};" in said
    assert "validation rows alone" not in ftkit(*ask).stderr  # as a whole each answer is one of its kind, as in free text


def test_a_rule_by_which_no_answer_could_be_right_is_refused(
    here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any
) -> None:
    write_rows(here / "t.jsonl", rows)
    ask = ("plan", "--model", model, "--data", "t.jsonl", "--vram", "8", "--length", "64")
    refused = ftkit(*ask, "--set", "evaluate={by: labels, labels: [one, two]}")
    assert refused.exit_code == 2
    assert "evaluate.labels: the expected answer in " in refused.stderr
    assert "t.jsonl, line " in refused.stderr
    assert "tracing" not in refused.stderr


@pytest.mark.parametrize(
    ("learnt", "told_of"),
    [
        ("Be brief.", {None: "give it in ship.system", "Be brief.": "", "Be long.": UNKNOWN_SYSTEM}),
        (None, {"Be brief.": UNKNOWN_SYSTEM, None: ""}),
    ],
)
def test_another_system_message_than_training_saw_is_told(
    learnt: str | None, told_of: dict[str | None, str], here: Path, model: Path, ftkit: Ftkit, write_rows: Any
) -> None:
    first = [{"role": "system", "content": learnt}] if learnt else []
    turns = [[*first, {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}] for n in range(12)]
    write_rows(here / "t.jsonl", [{"messages": messages} for messages in turns])
    for shipped, said in told_of.items():
        setting = ("--set", f"ship.system={shipped}") if shipped else ()
        told = ftkit("plan", "--model", model, "--data", "t.jsonl", "--vram", "8", "--length", "64", *setting).stderr
        assert said in told
        assert ("ship.system" in told) == bool(said)


def test_rows_whose_answer_lies_beyond_the_length_are_left_out(
    here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any
) -> None:
    long = [{"messages": [{"role": "user", "content": "why? " * 40}, {"role": "assistant", "content": "Because."}]}] * 30
    write_rows(here / "mine.jsonl", [*rows, *long])
    words = ("plan", "--model", model, "--data", "mine.jsonl", "--vram", "8", "--length", "96")
    planned = json.loads(ftkit(*words, "--json").stdout)
    assert (planned["tokens"]["cut"], planned["tokens"]["dropped"]) == (30, 30)
    assert planned["work"]["steps"] <= 3 * 2  # of 12 rows at most, by 8
    assert planned["max_length"] < 96
    assert "30 rows will be cut, 30 of them left out" in ftkit(*words).stdout
    write_rows(here / "mine.jsonl", long)
    refused = ftkit(*words)
    assert (refused.exit_code, "has an answer within training.max_length" in refused.stderr) == (1, True)


@pytest.mark.slow
def test_a_plan_is_made_again_when_less_is_free(here: Path, model: Path, ftkit: Ftkit, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(free_bytes: int) -> dict[str, Any]:
        found = device.Device("cuda", "a card", 8 * GIB, free_bytes, (8, 9))
        monkeypatch.setattr(device, "find_gpus", lambda: [found])
        shown = ftkit("plan", "--model", model, "--length", "512", "--json")
        loaded: dict[str, Any] = json.loads(shown.stdout)
        return loaded

    first = planned(4 * GIB)
    made = len(list((here.parent / "cache" / "plans").glob("*/plan-*")))
    still = planned(3 * GIB)
    assert (still["device"]["free_bytes"], still["chosen"]["budget_bytes"]) == (3 * GIB, 3 * GIB)
    assert still["chosen"]["peak"] == first["chosen"]["peak"]
    less = planned(int((first["chosen"]["peak"]["allocated_bytes"] + CONTEXT_BYTES) / (1 - MARGIN)) - MIB)
    assert less["chosen"]["peak"]["device_bytes"] < first["chosen"]["peak"]["device_bytes"]
    assert planned(4 * GIB)["chosen"]["peak"] == first["chosen"]["peak"]  # what is faster fits again
    assert len(list((here.parent / "cache" / "plans").glob("*/plan-*"))) == made == 1


def test_a_plan_that_cannot_be_read_is_made_again(here: Path, model: Path, ftkit: Ftkit) -> None:
    words = ("plan", "--model", model, "--vram", "8", "--length", "64", "--json")
    first = ftkit(*words)
    (kept,) = (here.parent / "cache" / "plans").glob("*/plan-*/plan.json")
    for text in (kept.read_text(encoding="utf-8")[:1000], '{"memory": {}, "tokens": null}'):
        kept.write_text(text, encoding="utf-8")
        again = ftkit(*words)
        assert (again.exit_code, again.stdout) == (0, first.stdout)


@pytest.mark.slow
def test_output_that_is_no_utf_8_loses_letters_not_the_plan(here: Path, model: Path) -> None:
    words = [sys.executable, "-m", "ftkit", "plan", "--model", str(model), "--vram", "8", "--length", "64"]
    done = subprocess.run(words, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert re.search(r"Batch \d × accumulation \d", done.stdout)
    assert "?" in done.stdout  # the bars
    assert "Disk, at most" in done.stdout


def test_the_picture_and_the_page_are_written(here: Path, model: Path, ftkit: Ftkit) -> None:
    shown = ftkit("plan", "--model", model, "--vram", "8", "--length", "64", "--plot", "plan.png", "--html", "plan.html")
    assert shown.exit_code == 0, shown.output
    assert (here / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "GiB" in (here / "plan.html").read_text(encoding="utf-8")


def test_what_adafactor_keeps_is_shown(here: Path, model: Path, ftkit: Ftkit) -> None:
    """Of a matrix a number for each row and each column, of a vector all, and one of each tensor."""
    words = ("plan", "--model", model, "--length", "64", "--method", "full", "--set", "training.optim=adafactor")
    shapes = [tensor.shape for tensor in Skeleton(load_config(model)).tensors]
    kept = 4 * sum(1 + sum(shape) for shape in shapes)
    assert json.loads(ftkit(*words, "--json").stdout)["chosen"]["inventory"]["optimizer_bytes"] == kept
    assert re.search(rf"optimizer states +{bytes_text(kept)}", ftkit(*words).stdout)


@pytest.mark.slow
def test_what_does_not_fit_ends_with_3_and_a_way_out(here: Path, model: Path, ftkit: Ftkit) -> None:
    shown = ftkit("plan", "--model", model, "--vram", "0.56", "--length", "512", "--method", "full")
    assert shown.exit_code == 3
    assert shown.stdout.startswith("Does not fit: ")
    (advised,) = re.findall(r"Hint: this would: ftkit (plan .+)", shown.stderr)
    assert advised.startswith(f"plan --model {model} --vram 0.56 --length 512 --method full --set training.")  # as typed, and the change
    again = ftkit(*shlex.split(advised))
    assert again.exit_code == 0, again.output


def test_the_json_is_as_documented(here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any) -> None:
    """Every key stands in docs/plan.md, and every key that stands there is given."""
    write_rows(here / "mine.jsonl", rows)
    planned = json.loads(ftkit("plan", "--model", model, "--data", "mine.jsonl", "--gpu", "T4", "--length", "64", "--json").stdout)
    planned["changes"] = [{"settings": ["lora.r=8"], "words": "", "peak_bytes": 0, "fits": True}]
    planned["shortages"] = [{"what": "RAM", "step": "merge", "needed_bytes": 2, "available_bytes": 1}]
    planned["probe"] = {"allocated_bytes": 0, "reserved_bytes": None}

    def keys(value: Any, prefix: str = "") -> set[str]:
        if isinstance(value, list):
            return set().union(*(keys(entry, prefix.removesuffix(".") + "[].") for entry in value))
        if not isinstance(value, dict) or not value:
            return {prefix.removesuffix(".").removesuffix("[]")}
        if prefix.endswith(("series.", "gguf_bytes.", "_by_role.", "_by_target.", "untraced.")):
            return {prefix.removesuffix(".")}
        return set().union(*(keys(entry, f"{prefix}{key}.") for key, entry in value.items()))

    given = {re.sub(r"^methods\[\]", "chosen", key) for key in keys(planned)}
    documented = set(re.findall(r"(?m)^\| `([\w.\[\]]+)` \|", DOCUMENT))
    assert given == documented


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--gpu", "RTX 9090"), 2, "is no card that ftkit knows"),
        (("--vram", "-3"), 2, "is no amount of memory"),
        (("--vram", "0"), 2, "is no amount of memory"),
        (("--length", "4"), 2, "training.max_length"),
        (("--length", "-1"), 2, "training.max_length"),
        (("--length", "100000"), 2, "longer than this model reads (512)"),
        (("--set", "lora.target_modules=[nope]"), 2, "PEFT cannot use"),
        (("--set", "training.optim=sgd"), 2, "training.optim"),
        (("--set", "what_if.loss=hinge"), 2, "what_if"),
        (("--data", "empty.jsonl"), 1, "has no rows"),
        (("--data", "missing.jsonl"), 1, "There is no dataset"),
        (("--config", "config.json"), 2, "not both"),
        (("--run-dir", "run"), 2, "there is none"),
        (("--set", "lora.target_modules=("), 2, "PEFT cannot use '('"),
        (("--set", "lora.target_modules=q_proj"), 2, "lora.target_modules=[q_proj]"),
        (("--plot", "plan.gif"), 2, ".svg"),
        (("--html", "nowhere/plan.html"), 2, "There is no folder"),
        (("--probe",), 2, "--probe runs on this machine's"),
    ],
)
def test_bad_input(here: Path, model: Path, ftkit: Ftkit, words: tuple[str, ...], code: int, said: str) -> None:
    (here / "empty.jsonl").write_text("", encoding="utf-8")
    (here / "config.json").write_text("{}", encoding="utf-8")
    vram = () if "--vram" in words or "--gpu" in words else ("--vram", "8")
    refused = ftkit("plan", "--model", model, *(() if "--length" in words else ("--length", "64")), *vram, *words)
    assert refused.exit_code == code, refused.output
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) < 12
    assert not (here / "plan.gif").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "nope"}, "does not build"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 num_attention_heads cannot share 3"),
        ({"dtype": "float99"}, "transformers cannot read the config"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised already (gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "is quantised already (bitsandbytes)"),
    ],
)
def test_a_config_that_is_of_no_model_to_train(here: Path, model: Path, ftkit: Ftkit, changes: dict[str, Any], said: str) -> None:
    config = {**json.loads((model / "config.json").read_text(encoding="utf-8")), **changes}
    (here / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = ftkit("plan", "--config", "config.json", "--vram", "8", "--length", "64")
    assert refused.exit_code == 1, refused.output
    assert said in refused.stderr
    assert "Hint:" in refused.stderr or "build" in said


def test_versions_that_compute_wrong_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hf.refuse_wrong_versions("gemma4")  # the installed one is right
    monkeypatch.setattr(hf, "version", lambda name: "5.12.0" if name == "transformers" else metadata.version(name))
    hf.refuse_wrong_versions("llama")
    with pytest.raises(hf.ModelError, match=r"transformers 5\.12\.0 trains gemma4 wrongly") as refused:
        hf.refuse_wrong_versions("gemma4")
    assert "pip install" in (refused.value.hint or "")


@pytest.mark.parametrize("what", ["the dataset holds <new>", "rows are padded with <new>"])
def test_a_token_without_a_row_in_the_embedding_is_found_before_training(
    here: Path, model: Path, ftkit: Ftkit, rows: list[dict[str, Any]], write_rows: Callable[[Path, list[Any]], Path], what: str
) -> None:
    from transformers import AutoTokenizer

    other = here / "other"
    shutil.copytree(model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>", "<newer>"], special_tokens=True)  # ids 259 and 260 of 260 rows, so that one is beyond
    text = "<newer>"
    if "padded" in what:
        tokenizer.pad_token, text = "<newer>", "new"
    tokenizer.save_pretrained(other)
    rows[3]["messages"][0]["content"] = f"say {text}"
    write_rows(here / "rows.jsonl", rows)
    refused = ftkit("plan", "--model", other, "--data", "rows.jsonl", "--vram", "8")
    assert refused.exit_code == 1
    assert f"has 260 rows, and {what[:-1]}er> with id 260" in refused.stderr

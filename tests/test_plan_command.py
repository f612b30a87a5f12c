"""`ftkit plan` as it is typed: with and without a recipe, its files, its JSON, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from ftkit import hf

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Ftkit = Callable[..., Result]
DOCUMENT = (Path(__file__).parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")


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
    assert "12.00 GiB on RTX 3060" in shown.stdout
    assert not list(here.iterdir())  # nothing is left beside


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


def test_the_picture_and_the_page_are_written(here: Path, model: Path, ftkit: Ftkit) -> None:
    shown = ftkit("plan", "--model", model, "--vram", "8", "--length", "64", "--plot", "plan.png", "--html", "plan.html")
    assert shown.exit_code == 0, shown.output
    assert (here / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "GiB" in (here / "plan.html").read_text(encoding="utf-8")


def test_what_does_not_fit_ends_with_3_and_a_way_out(here: Path, model: Path, ftkit: Ftkit) -> None:
    shown = ftkit("plan", "--model", model, "--vram", "0.56", "--length", "512", "--method", "full")
    assert shown.exit_code == 3
    assert shown.stdout.startswith("Does not fit: ")
    assert "Hint: this would: --set training." in shown.stderr
    settings = re.findall(r"--set (\S+)", shown.stderr)
    again = ftkit(
        "plan", "--model", model, "--vram", "0.56", "--length", "512", "--method", "full", *(w for s in settings for w in ("--set", s))
    )
    assert again.exit_code == 0, again.output


def test_the_json_is_as_documented(here: Path, model: Path, ftkit: Ftkit, rows: list[Any], write_rows: Any) -> None:
    """Every key stands in docs/plan.md, and every key that stands there is given."""
    write_rows(here / "mine.jsonl", rows)
    planned = json.loads(ftkit("plan", "--model", model, "--data", "mine.jsonl", "--vram", "8", "--length", "64", "--json").stdout)
    planned["changes"] = [{"settings": ["lora.r=8"], "words": "", "peak_bytes": 0, "fits": True}]
    planned["shortages"] = ["disk"]
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
        (("--set", "training.optim=adafactor"), 2, "training.optim"),
        (("--set", "what_if.loss=hinge"), 2, "what_if.loss"),
        (("--data", "empty.jsonl"), 1, "has no rows"),
        (("--data", "missing.jsonl"), 1, "There is no dataset"),
        (("--config", "config.json"), 2, "not both"),
        (("--run-dir", "run"), 2, "there is none"),
        (("--plot", "plan.gif"), 2, ".svg"),
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


def test_a_config_that_does_not_build_is_said(here: Path, model: Path, ftkit: Ftkit) -> None:
    config = {**json.loads((model / "config.json").read_text(encoding="utf-8")), "hidden_act": "nope"}
    (here / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = ftkit("plan", "--config", "config.json", "--vram", "8", "--length", "64")
    assert refused.exit_code == 1
    assert "does not build" in refused.stderr


def test_versions_that_compute_wrong_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hf.refuse_wrong_versions("gemma4")  # the installed one is right
    monkeypatch.setattr(hf, "version", lambda name: "5.12.0" if name == "transformers" else metadata.version(name))
    hf.refuse_wrong_versions("llama")
    with pytest.raises(hf.ModelError, match=r"transformers 5\.12\.0 trains gemma4 wrongly") as refused:
        hf.refuse_wrong_versions("gemma4")
    assert "pip install" in (refused.value.hint or "")

"""A limit that is changed judges what was recorded again at once: nothing is loaded, and what would pass is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ftkit.gguf.files import Corrections, GgufFile
from ftkit.line import line
from ftkit.line.adapter import ADAPTER, FORM, Adapted
from ftkit.line.ask import ANSWERS, ASK, Answers, Asked, Questions
from ftkit.line.behaviour import PAIRS, SHIPPED, TRAINED, write
from ftkit.line.gguf import GGUF, Converted
from ftkit.line.job import Job, open_job
from ftkit.line.prove import PROVE, Proven
from ftkit.line.step import Step, _inputs, _record
from ftkit.proof.behaviour import Behaviour

Ftkit = Callable[..., Result]
ROWS = 10
EXPECTED = [f"yes\n{n}" for n in range(ROWS)]


def form(loss: float, divergence: float = 0.0) -> Behaviour:
    """Ten rows of ten tokens, by loss and KL a token."""
    return Behaviour([10] * ROWS, [10 * loss] * ROWS, [10 * divergence] * ROWS, [10] * ROWS)


FORMS = {"before": form(2.0, 1.0), TRAINED: form(1.0)}
FILE = form(1.1, 0.05)  # 90 % of the gain, 95 % of the way
RIGHT = {TRAINED: 10, SHIPPED: 7}


def answered(right: int) -> list[str]:
    return [text if n < right else text.replace("yes", "no") for n, text in enumerate(EXPECTED)]


def record(job: Job, step: Step[Any], result: Any, fill: Callable[[Path], None]) -> None:
    """A step as it would have been recorded."""

    def make(folder: Path) -> dict[str, Any]:
        fill(folder)
        return _record(step, result)

    job.run.ensure(step.name, _inputs(job, step), make)


def proven(folder: Path, model: Path, rows: Sequence[Any], **keys: Any) -> Path:
    """A run with a proof: what `ask` and `prove` recorded, and no file that could be asked."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"model": str(model), "ship": {"quantization": "Q8_0", **keys.pop("ship", {})}, **keys}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = open_job(folder)

    def ask(folder: Path) -> None:
        told = Questions({TRAINED: answered(RIGHT[TRAINED])}, [[{"role": "user", "content": "?"}]] * ROWS, EXPECTED)
        (folder / ANSWERS).write_text(json.dumps(asdict(told)), encoding="utf-8")
        write(folder, FORMS)
        (folder / PAIRS).mkdir()
        if job.recipe.training.objective == "dpo":  # margins of -1, 3 and in the file 2 nats
            write(folder / PAIRS, {"before": margin(-1), TRAINED: margin(3)})

    def prove(folder: Path) -> None:
        (folder / ANSWERS).write_text(json.dumps(asdict(Answers({SHIPPED: answered(RIGHT[SHIPPED])}))), encoding="utf-8")
        write(folder, {SHIPPED: FILE})
        (folder / PAIRS).mkdir()
        write(folder / PAIRS, {SHIPPED: margin(2)} if job.recipe.training.objective == "dpo" else {})

    def beside(folder: Path) -> None:
        write(folder, {FORM: form(1.3, 0.2)})  # 70 % of the gain, 80 % of the way

    files = tuple(GgufFile(kind, Path(f"m-{kind}.gguf"), 1, 8.0, 1, 0) for kind in ("F16", "Q8_0"))
    with job.run:
        record(job, ASK, Asked((TRAINED,)), ask)
        record(job, GGUF, Converted(files), lambda _: None)
        record(job, PROVE, Proven(()), prove)
        if job.recipe.ship.adapter:
            record(job, ADAPTER, Adapted(Path("m-lora.gguf"), 1, 2, None, Corrections(), "m.gguf", None), beside)
    return folder


def margin(nats: float) -> Behaviour:
    return Behaviour([1, 1], [1.0, 1.0 + nats], [], [])


@pytest.fixture
def run(tmp_path: Path, model: Path, rows: list[Any]) -> Path:
    return proven(tmp_path, model, rows)


LOOSE = ("--set", "ship.keep=90", "--set", "ship.max_loss_points=30")
# A limit, what fails by it and by nothing else, and what would pass.
LIMITS = [
    (("ship.keep=91",), {"gain kept"}, "--set ship.keep=90"),
    (("ship.keep=96",), {"gain kept", "distance from the trained model"}, "--set ship.keep=90"),
    (("ship.max_loss_points=29",), {"answers"}, "--set ship.max_loss_points=30"),
    (("ship.max_loss_points=0", "ship.keep=100"), {"answers", "gain kept", "distance from the trained model"},
     "--set ship.max_loss_points=30 --set ship.keep=90"),
]  # fmt: skip


@pytest.mark.parametrize(("limits", "failing", "would_pass"), LIMITS, ids=["keep", "keep of the distance", "max_loss_points", "both"])
def test_each_limit_judges_again(limits: tuple[str, ...], failing: set[str], would_pass: str, run: Path, ftkit: Ftkit) -> None:
    def verify(*settings: str) -> Result:
        return ftkit("verify", run, "--json", *LOOSE, *(word for setting in settings for word in ("--set", setting)))

    assert verify().exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "runs").rglob("*")}
    done = verify(*limits)
    checks = json.loads(done.stdout)["checks"]
    assert (done.exit_code, {check["name"] for check in checks if check["outcome"] == "failed"}) == (6, failing)
    assert done.stderr.rstrip().endswith(f"or allow it: {would_pass}"), done.stderr
    assert verify(*would_pass.replace("--set ", "").split()).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "runs").rglob("*")} == before  # nothing is written


@pytest.mark.parametrize(
    ("rule", "outcome", "said"),
    [
        ({"by": "last_line"}, "passed", "10 of 10 right, as trained 10"),
        ({"by": "regex", "pattern": "^(yes|no)"}, "failed", "30.0 points are lost"),
        ({"by": "labels", "labels": ["yes", "no"]}, "failed", "30.0 points are lost"),
        ({"by": "first_line"}, "failed", "30.0 points are lost"),
    ],
)
def test_another_rule_judges_the_same_answers(rule: dict[str, Any], outcome: str, said: str, run: Path) -> None:
    proof = line.judge_again(open_job(run, [("evaluate", rule), ("ship.keep", 90)]))
    (check,) = (check for check in proof.checks if check.name == "answers")
    assert (check.outcome, said in check.detail) == (outcome, True), check.detail
    assert proof.would_pass == ({"ship.max_loss_points": 30} if outcome == "failed" else {})


def test_margins_of_preferences_are_judged_by_the_same_limit(tmp_path: Path, model: Path, rows: list[Any]) -> None:
    proven(tmp_path, model, rows, training={"objective": "dpo"}, ship={"max_loss_points": 30})
    for keep, failing in ((75, set()), (76, {"preferences"}), (96, {"preferences", "distance from the trained model"})):
        proof = line.judge_again(open_job(tmp_path, [("ship.keep", keep)]))
        assert {check.name for check in proof.checks if check.outcome == "failed"} == failing
        assert proof.would_pass == ({"ship.keep": 75} if failing else {})


def test_the_adapter_beside_its_base_is_judged_again_too(tmp_path: Path, model: Path, rows: list[Any], ftkit: Ftkit) -> None:
    proven(tmp_path, model, rows, training={"method": "lora"}, ship={"adapter": True, "max_loss_points": 30})
    done = ftkit("verify", tmp_path, "--set", "ship.keep=80")
    assert (done.exit_code, "adapter: gain kept" in done.stderr) == (6, True), done.output
    assert done.stderr.rstrip().endswith("--set ship.keep=70")
    assert ftkit("verify", tmp_path, "--set", "ship.keep=70").exit_code == 0


def test_what_no_limit_allows_says_so(tmp_path: Path, model: Path, rows: list[Any], ftkit: Ftkit) -> None:
    """A file that is worse than the base."""
    proven(tmp_path, model, rows, ship={"max_loss_points": 30})
    (path,) = (tmp_path / "runs").rglob("prove-*/behaviour.json")
    write(path.parent, {SHIPPED: form(2.5, 1.5)})
    done = ftkit("verify", tmp_path, "--set", "ship.keep=0")
    assert done.exit_code == 6
    assert done.stderr.rstrip().endswith("Hint: a finer type loses less: --set ship.quantization=Q8_0"), done.stderr


def test_nothing_is_loaded_for_it(run: Path) -> None:
    code = (
        "import sys; from ftkit.cli import main\n"
        f"try: main(['verify', {str(run)!r}, '--set', 'ship.keep=90', '--set', 'ship.max_loss_points=30'])\n"
        "except SystemExit as end: assert not end.code, end\n"
        "print(*{'torch', 'transformers', 'xllamacpp', 'gguf', 'peft'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "", done.stdout

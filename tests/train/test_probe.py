"""Two real steps of the trainer beside the plan, on the CPU: what a probe measures, keeps and adds to the next plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
from click.testing import Result

from ftkit.line import line
from ftkit.line.job import open_job
from ftkit.line.train import probe
from ftkit.machine.device import Device, processor
from ftkit.memory.replay import Peak
from ftkit.model.source import Source
from ftkit.plan import measured
from ftkit.recipe import parse_override

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
Ftkit = Callable[..., Result]


@pytest.fixture
def project(tmp_path: Path, write_rows: Any, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, eight rows of one length, and a recipe; no GPU is seen."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny.make_model(tmp_path / "model", vocab_size=2000, hidden_size=256, intermediate_size=512)
    row = {"messages": [{"role": "user", "content": "Say it. " * 12}, {"role": "assistant", "content": "It is said. " * 8}]}
    write_rows(tmp_path / "train.jsonl", [row] * 8)
    (tmp_path / "recipe.yaml").write_text(
        "model: model\ntraining: {effective_batch_size: 4, max_length: 256}\nlora: {r: 4}\ndata: {validation_share: 0.25}\n",
        encoding="utf-8",
    )
    return tmp_path


@pytest.mark.parametrize("method", ["qlora", pytest.param("lora", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [(), ("training.per_device_train_batch_size=2", "training.gradient_checkpointing=true")])
def test_a_plan_holds_in_the_real_trainer(project: Path, method: str, settings: tuple[str, ...]) -> None:
    """TRL's SFTTrainer as `ftkit train` builds it, two optimizer steps on rows of one length, against the traced peak."""
    overrides = [parse_override(entry) for entry in (f"training.method={method}", *settings)]
    job = open_job(project / "recipe.yaml", overrides)
    with job.run:
        memory = line.plan(job).memory
        planned, real = memory.chosen.peak.allocated_bytes, probe(job, memory).allocated_bytes
    assert abs(planned / real - 1) < 0.01, f"{planned} planned, {real} measured"


@pytest.fixture
def untraced(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with a model whose own code looks at the data, as no trace on tensors without data can."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(project / "modules"))
    (project / "model" / "theirs.py").write_text(
        """
import numpy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
class TheirConfig(LlamaConfig):
    model_type = "theirs"
class TheirNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        if not numpy.isfinite(hidden_states.detach().float().cpu().numpy()).all():
            raise ValueError("no numbers")
        return super().forward(hidden_states)
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = TheirNorm(config.hidden_size, config.rms_norm_eps)
""",
        encoding="utf-8",
    )
    path = project / "model" / "config.json"
    named = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **named}), encoding="utf-8")
    return project


@pytest.mark.slow
def test_a_step_that_cannot_be_traced_is_measured_and_trained(untraced: Path, ftkit: Ftkit) -> None:
    words = ("--trust-remote-code", "--set", "training.method=lora", "--set", "training.max_steps=2")
    shown = ftkit("plan", untraced, *words)
    assert "measuring two real steps, 1 × " in shown.stderr
    assert "two real steps, measured" in shown.stdout
    plan = json.loads(ftkit("plan", untraced, *words, "--json").stdout)
    assert plan["chosen"]["fits"]
    assert plan["methods"] == [plan["chosen"]]
    assert {*plan["untraced"]} == {"full", "qlora"}
    trained = ftkit("train", untraced, *words)
    assert trained.exit_code == 0, trained.stderr
    settings = ("training.method=lora", "training.max_steps=2", "trust_remote_code=true")
    job = open_job(untraced / "recipe.yaml", [parse_override(entry) for entry in settings])
    with job.run:
        memory = line.plan(job).memory
        again = probe(job, memory).allocated_bytes
    assert abs(memory.chosen.peak.allocated_bytes / again - 1) < 0.01


def test_a_step_that_cannot_be_traced_is_not_guessed_for_another_card(untraced: Path, ftkit: Ftkit) -> None:
    refused = ftkit("plan", untraced, "--trust-remote-code", "--gpu", "RTX 3060")
    assert refused.exit_code == 1
    assert "cannot be traced" in refused.stderr
    assert "on the machine that trains" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "checkpointing"), [("qwen3_moe", "true"), ("qwen3_moe", "false"), ("lfm2_moe", "true")])
@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning")
def test_a_plan_of_experts_in_4_bits_holds_in_the_real_trainer(project: Path, model_type: str, checkpointing: str) -> None:
    """Nine tenths of the weights are experts: in 16 bits they would be half as much again."""
    import torch
    from transformers import AutoModelForCausalLM

    changes = {"num_experts": 8, "moe_intermediate_size": 256, "vocab_size": 300, "eos_token_id": 257, "pad_token_id": 258}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shapes.config(model_type, **changes), dtype=torch.bfloat16).save_pretrained(project / "model")
    job = open_job(project / "recipe.yaml", [parse_override(f"training.gradient_checkpointing={checkpointing}")])
    with job.run:
        memory = line.plan(job).memory
        planned, real = memory.chosen.peak.allocated_bytes, probe(job, memory).allocated_bytes
    assert abs(planned / real - 1) < 0.01, f"{planned} planned, {real} measured"


@pytest.mark.slow
def test_a_probe_is_shown_kept_and_added_to_the_next_plan(project: Path, ftkit: Ftkit, private_cache: Path) -> None:
    first = json.loads(ftkit("plan", project, "--probe", "--json").stdout)
    assert first["probe"]["allocated_bytes"] > 0
    assert first["probe"]["reserved_bytes"] is None  # on a CPU nothing is reserved
    kept = json.loads((private_cache / "measured.json").read_text(encoding="utf-8"))
    (entry,) = kept.values()
    (difference,) = entry["probes"].values()
    assert difference == first["probe"]["allocated_bytes"] - first["chosen"]["peak"]["allocated_bytes"]
    second = json.loads(ftkit("plan", project, "--json").stdout)
    assert second["extra_bytes"] - first["extra_bytes"] == difference
    assert "more, as measured with this model" in ftkit("plan", project).stdout
    for other in ("lora.r=8", "training.method=full"):
        assert json.loads(ftkit("plan", project, "--json", "--set", other).stdout)["extra_bytes"] == first["extra_bytes"], other
    shown = ftkit("plan", project, "--probe")
    assert "Two real steps" in shown.stdout


@pytest.mark.parametrize(
    ("words", "said"), [(("--gpu", "RTX 4090"), "the plan is for RTX 4090"), (("--vram", "8"), "the plan is for a GPU")]
)
def test_a_probe_of_another_device_is_refused(project: Path, ftkit: Ftkit, words: tuple[str, ...], said: str) -> None:
    refused = ftkit("plan", project, "--probe", *words)
    assert refused.exit_code == 2
    assert said in refused.stderr


@pytest.mark.parametrize("command", ["train", pytest.param("build", marks=pytest.mark.slow)])
def test_a_line_that_cannot_end_here_does_not_begin(project: Path, ftkit: Ftkit, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is too small for merging and converting: said by the plan, and before any training."""
    (project / "convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("LLAMA_CPP_DIR", str(project))
    usage = shutil.disk_usage(project)
    monkeypatch.setattr("ftkit.line.shortage.shutil.disk_usage", lambda folder: usage._replace(free=1000))
    planned = ftkit("plan", project)
    assert planned.exit_code == 0
    assert "Not on this machine: the steps to come write " in planned.stdout
    refused = ftkit(command, project)
    assert refused.exit_code == 3
    assert "where 1000 B are free" in refused.stderr
    assert "--run-dir" in refused.stderr
    assert not list((project / "runs").rglob("train-*"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"CPU": 3}',
        '{"CPU": {"probes": [1]}}',
        '{"CPU": {"probes": {"lora org/model": "x"}}}',
        '{"CPU": {"extra_bytes": 5}}',
    ],
)
def test_a_damaged_file_of_measurements_is_started_anew(private_cache: Path, text: str) -> None:
    private_cache.mkdir()
    (private_cache / "measured.json").write_text(text, encoding="utf-8")
    assert measured.extra_bytes(processor(), "lora org/model") == 0
    measured.remember(processor(), "lora org/model", Peak(100, 100, 100, "", ()), 120, None)
    assert measured.extra_bytes(processor(), "lora org/model") == 20


def test_measurements_are_kept_apart_by_device_and_subject(private_cache: Path) -> None:
    card = Device("cuda", "NVIDIA T4", 16 << 30, 16 << 30, (7, 5))
    measured.remember(card, "qlora org/model", Peak(100, 150, 600, "", ()), 100, 170)
    model, namesake = (Source("model", "directory", fingerprint) for fingerprint in ("0a1b", "2c3d"))
    measured.remember_speed(card, "qlora", model, 1234.5)
    assert measured.extra_bytes(card, "qlora org/model") == 20
    assert measured.extra_bytes(card, "qlora org/larger") == 0
    assert measured.tokens_per_second(card, "qlora", model) == 1234.5
    assert measured.tokens_per_second(card, "qlora", namesake) is None
    assert measured.tokens_per_second(card, "lora", model) is None
    assert measured.extra_bytes(processor(), "qlora org/model") == 0

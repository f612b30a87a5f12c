"""`ship.adapter`: the adapter is served beside a GGUF of the base, the user's own where the model is one, and proved there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convertible
import families
import pytest

from ftkit.errors import ModelError, ProofError, RecipeError
from ftkit.gguf import files as gguf
from ftkit.gguf.files import Corrections
from ftkit.line import line
from ftkit.line.adapter import told_of
from ftkit.line.job import open_job
from ftkit.machine.llama_cpp import need_converter
from ftkit.proof.verify import verify

CHECKS = {"adapter: gain kept", "adapter: distance from the trained model"}


def test_llama_server_is_told_what_the_base_file_does_not_say() -> None:
    assert told_of(None, Corrections()) == []
    both = "tokenizer.ggml.eot_token_id=int:7,tokenizer.ggml.add_bos_token=bool:false"
    assert told_of(Path("x.jinja"), Corrections(7, False)) == ["--jinja", "--chat-template-file", "x.jinja", "--override-kv", both]


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_the_adapter_is_proved_beside_its_base(
    form: str,
    tmp_path: Path,
    write_rows: Callable[[Path, list[Any]], Path],
    rows: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    base = tmp_path / "base"
    if form == "gguf":
        gguf.convert(families.make_model(families.by_name("Qwen 2.5"), base), {"F16": tmp_path / "base.gguf"}, need_converter())
    else:
        convertible.make("llama", base, chat_template=convertible.CHAT)  # asked without a BOS, which llama.cpp would add
    recipe = {
        "model": "base.gguf" if form == "gguf" else str(base),
        "data": {"test": "test.jsonl"},
        "training": {"method": "lora", "max_steps": 12, "effective_batch_size": 2, "max_length": 128, "learning_rate": 1e-2},
        "lora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        "ship": {
            "name": "tiny:1", "quantization": "Q8_0", "adapter": True, "max_new_tokens": 4, "test_rows": 2, "num_ctx": 512,
            "max_loss_points": 100,
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")

    def ship(**settings: Any) -> line.Shipped:
        job = open_job(tmp_path, [(f"ship.{key}", value) for key, value in settings.items()])
        with job.run:
            line.train(job)
            return line.ship(job, use_ollama=False)

    with pytest.raises(RecipeError, match=r"ship\.adapter: training\.method is full"):
        line.train(open_job(tmp_path, [("training.method", "full")]))
    shipped = ship()
    assert {check.name: check.outcome for check in shipped.checks if check.name in CHECKS} == dict.fromkeys(CHECKS, "passed")
    assert shipped.adapter
    assert shipped.adapter.path.name == "tiny-1-lora.gguf"
    words = shlex.split(shipped.adapter.serve)
    assert words[:5] == ["llama-server", "-m", str(tmp_path / "base.gguf") if form == "gguf" else "BASE.gguf", "--lora",
                         str(shipped.adapter.path)]  # fmt: skip
    assert ("tokenizer.ggml.add_bos_token=bool:false" in words) == (form == "folder")
    assert shipped.adapter.base == (None if form == "gguf" else str(base))
    handed, (folder,) = shipped.adapter.path.parent, (tmp_path / "runs" / "recipe").glob("adapter-*")
    assert handed == shipped.record.parent
    assert (handed / "tiny-1-lora.gguf").samefile(folder / "tiny-1-lora.gguf")

    def kept() -> str:
        return next(check.outcome for check in verify(shipped.gguf, shipped.record) if check.name == "tiny-1-lora.gguf")

    assert kept() == "passed"
    (handed / "tiny-1-lora.gguf").unlink()
    assert kept() == "not made"
    (handed / "tiny-1-lora.gguf").write_bytes((folder / "tiny-1-lora.gguf").read_bytes()[::-1])
    assert kept() == "failed"
    assert {path.name for path in folder.iterdir()} - {"tiny-1-lora.jinja"} == {"tiny-1-lora.gguf", "behaviour.json", "step.json"}
    assert not ship().fresh
    assert kept() == "passed"
    assert ship(adapter=False).adapter is None
    assert not list(handed.glob("*lora*"))
    assert json.loads((folder / "step.json").read_text(encoding="utf-8"))["result"]["layers"] == shipped_layers(folder.parent)

    record = json.loads((folder / "behaviour.json").read_text(encoding="utf-8"))  # had it been off, it would not have shipped
    record["adapter"]["divergence"] = [10 * value + 10 for value in record["adapter"]["divergence"]]
    (folder / "behaviour.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ProofError, match=r"tiny-1-lora\.gguf beside its base .* distance from the trained model: failed") as off:
        ship()
    assert "--set ship.adapter=false" in str(off.value.hint)
    job = open_job(tmp_path)
    monkeypatch.setattr("ftkit.line.adapter.LOOKED_AT_BYTES", 0)
    with job.run:
        line.start_from(job, "adapter")
        again = {check.name: check for check in line.ship(job, use_ollama=False).checks}
    if form == "gguf":
        assert {name: again[name].outcome for name in CHECKS} == dict.fromkeys(CHECKS, "passed")
    else:
        assert again["adapter: gain kept"].outcome == "not made"
        assert "no GGUF file of the base is here" in again["adapter: gain kept"].detail
    config = next(folder.parent.glob("train-*/adapter/adapter_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"use_dora": True}), encoding="utf-8")
    with pytest.raises(ModelError, match="use_dora=true, which a GGUF LoRA cannot hold"):
        ship()


def shipped_layers(run: Path) -> int:
    from safetensors import safe_open

    with safe_open(next(run.glob("train-*/adapter/adapter_model.safetensors")), "pt") as file:
        return len(list(file.keys())) // 2

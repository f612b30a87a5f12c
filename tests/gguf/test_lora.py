"""A GGUF LoRA beside a GGUF of the base is PEFT's model in transformers, of every scale that PEFT has; and what is wrong is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convertible
import pytest

from ftkit.engines import hf, logits
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError, ToolMissingError
from ftkit.gguf import files as gguf
from ftkit.gguf.lora import convert_adapter
from ftkit.machine.llama_cpp import LORA_CONVERTER, need_converter
from ftkit.model.source import open_gguf
from ftkit.proof.behaviour import Behaviour, judge_distance, judge_gain, measure

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

ROWS = [
    Forced([2, *((7 * n + 3 * m) % 250 + 6 for m in range(12 + n)), *((n + m) % 26 + 263 for m in range(8))], list(range(13 + n, 21 + n)))
    for n in range(6)
]
KEEP = 99  # percent
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 24, "target_modules": "all-linear"},
    "rsLoRA": {"r": 8, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"],
        "rank_pattern": {"down_proj": 8, r"layers\.[23]\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 48, "lm_head": 3},
    },
}


@dataclass(frozen=True)
class Adapted:
    """A base and an adapter on it in transformers, and the adapter as a GGUF LoRA."""

    before: Behaviour
    trained: Behaviour
    logits: list[Any]
    said: list[list[int]]  # what the adapted model says likeliest: this the adapter has learnt
    folder: Path
    file: Path

    def judge(self, base: Path, adapter: Path) -> tuple[Behaviour, dict[str, str]]:
        form = measure(logits.of_file(base, ROWS, adapter), self.said, self.logits)
        forms = {"before": self.before, "trained": self.trained, "adapter": form}
        return form, {check.name: check.outcome for check in (judge_gain(forms, "adapter", KEEP), judge_distance(forms, "adapter", KEEP))}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    convertible.make("llama", folder)
    gguf.convert(folder, {"F32": folder / "base.gguf"}, need_converter())
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    import peft
    import torch

    made: dict[str, Adapted] = {}

    def make(kind: str) -> Adapted:
        if kind not in made:
            folder = tmp_path_factory.mktemp("adapter")
            torch.manual_seed(3)
            plain: Any = hf.load_model(base, None, dtype="float32", cuda=False)
            before = list(logits.of_model(plain, ROWS))
            model = peft.get_peft_model(plain, peft.LoraConfig(**KINDS[kind], init_lora_weights=False, task_type="CAUSAL_LM"))
            found = list(logits.of_model(model, ROWS))
            model.save_pretrained(folder, save_embedding_layers=kind == "patterns")  # a copy of what they adapt
            said = [row.argmax(-1).tolist() for row in found]
            convert_adapter(folder, base, folder / "x-lora.gguf", need_converter(None, LORA_CONVERTER))
            made[kind] = Adapted(measure(before, said, found), measure(found, said), found, said, folder, folder / "x-lora.gguf")
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_adapter_in_llama_cpp_are_peft_s_model(kind: str, base: Path, adapted: Callable[[str], Adapted]) -> None:
    model = adapted(kind)
    form, told = model.judge(base / "base.gguf", model.file)
    assert form.divergence_a_token is not None
    assert form.divergence_a_token <= 1e-5
    assert model.before.divergence_a_token
    assert model.before.divergence_a_token > 1e-2
    assert set(told.values()) == {"passed"}
    assert [path.name for path in model.folder.glob("tmp*")] == []


def rs_lora_read_as_plain(name: str) -> float:
    return float(8**-0.5)  # alpha / r, where alpha / √r is meant


def alpha_pattern_ignored(name: str) -> float:
    return 6 / 48 if "ffn_down" in name else 1.0


@pytest.mark.parametrize(("kind", "sabotage"), [("rsLoRA", rs_lora_read_as_plain), ("patterns", alpha_pattern_ignored)])
def test_a_wrong_scale_is_seen(
    kind: str, sabotage: Callable[[str], float], base: Path, adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:

    model, path = adapted(kind), tmp_path / "wrong-lora.gguf"
    shutil.copyfile(model.file, path)
    for tensor in open_gguf(path, "r+").tensors:
        if tensor.name.endswith(".lora_b"):
            tensor.data[:] *= sabotage(tensor.name)
    _, told = model.judge(base / "base.gguf", path)
    assert told["distance from the trained model"] == "failed"


def test_an_adapter_of_another_base_is_seen(base: Path, adapted: Callable[[str], Adapted], tmp_path: Path) -> None:
    import numpy as np

    model, path = adapted("plain"), tmp_path / "other.gguf"
    shutil.copyfile(base / "base.gguf", path)
    for tensor in open_gguf(path, "r+").tensors:
        if "ffn_up" in tensor.name:
            tensor.data[:] = np.random.default_rng(0).normal(0, 0.05, tensor.data.shape)
    _, told = model.judge(path, model.file)
    assert told["distance from the trained model"] == "failed"
    with pytest.raises(ModelError, match=r"does not take base\.gguf with base\.gguf"):  # no adapter at all
        list(logits.of_file(base / "base.gguf", ROWS, base / "base.gguf"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}), encoding="utf-8")
    refused(model.folder, tmp_path / "wide", tmp_path, r"down_proj\.lora_A\.weight is \(8, 192\), the base wants \(8, 256\)")


def refused(adapter: Path, base: Path, folder: Path, why: str) -> None:
    target = folder / "none"
    target.mkdir()
    with pytest.raises(ModelError, match=why):
        convert_adapter(adapter, base, target / "x-lora.gguf", need_converter(None, LORA_CONVERTER))
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["mlp.experts.down_proj"]},
     {"fan_in_fan_out": True}, {"trainable_token_indices": [1]}, {"init_lora_weights": "pissa"}, {"of_next_year": 1}],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_what_a_gguf_lora_cannot_hold_is_refused_by_name(
    more: dict[str, Any], base: Path, adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapted("plain").folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | more), encoding="utf-8")
    refused(folder, base, tmp_path, rf"uses {next(iter(more))}=.* which a GGUF LoRA cannot hold")


def test_tied_embeddings_and_what_is_not_whole_are_refused(base: Path, adapted: Callable[[str], Adapted], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}), encoding="utf-8")
    refused(
        adapted("patterns").folder, tmp_path / "tied", tmp_path, "lm_head, which a GGUF LoRA cannot hold: the model uses it in two places"
    )
    folder = shutil.copytree(adapted("plain").folder, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    (tmp_path / "none").rmdir()
    refused(folder, base, tmp_path, r"lacks a matrix of model\.layers\.1\.mlp\.up_proj")


def test_a_llama_cpp_without_the_script_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert need_converter(tmp_path)
    with pytest.raises(ToolMissingError, match=r"convert_lora_to_gguf\.py") as caught:
        need_converter(tmp_path, LORA_CONVERTER)
    assert caught.value.hint == "ftkit setup converter"

"""The streaming merge equals PEFT's on a float32 base bit for bit, and refuses what it does not do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit.errors import ModelError
from ftkit.merge import stream
from ftkit.merge.deltas import refuse_what_cannot_be_merged
from ftkit.model.source import header
from ftkit.progress import SilentReporter
from ftkit.recipe import Lora

merge = partial(stream.merge, by_chance=False)  # as PEFT's is rounded
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("elements", [1, stream.ROWS_ELEMENTS])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_peft_bit_for_bit(use_rslora: bool, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all rows are taken at once or some at a time."""
    import torch
    from safetensors.torch import load_file

    base = tiny.make_model(tmp_path / "base", hidden_size=640, intermediate_size=1537)
    monkeypatch.setattr(stream, "ROWS_ELEMENTS", elements)

    adapted = tiny.make_adapter(base, tmp_path / "adapter", use_rslora=use_rslora)
    (tmp_path / "merged").mkdir()
    result = merge(base, tmp_path / "adapter", tmp_path / "merged")
    theirs = adapted.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert result.merged_tensors == 7 * 2
    assert result.tensors == len(ours)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


SIZES = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128,
}  # fmt: skip


def gemma3() -> Any:
    """Its checkpoints hold `language_model.model.…`, the model in transformers `model.language_model.…`."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=Gemma3TextConfig(**SIZES), vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def experts(name: str, **sizes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


OTHERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Mixtral": (lambda: experts("Mixtral", num_local_experts=4), {"target_modules": "all-linear"}),
    "Qwen3Moe": (
        lambda: experts("Qwen3Moe", moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2), {"target_modules": "all-linear"},
    ),
    "patterns": (lambda: experts("Llama"), {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True,
    }),
    "embeddings": (lambda: experts("Llama", tie_word_embeddings=False), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "Gemma 3 with its tower": (gemma3, {"target_modules": r".*language_model.*\.(q|v|down)_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning", "ignore:.*embedding layers.*:UserWarning")
def test_whatever_is_adapted_is_merged_under_the_names_of_its_files(name: str, tmp_path: Path) -> None:
    """The merged folder, loaded again, holds what PEFT's own merge computes: of fused experts, embeddings and multimodal layouts too."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    make, settings = OTHERS[name]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    adapters = [parameter for path, parameter in adapted.named_parameters() if "lora_" in path]
    for parameter in adapters:
        parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    theirs = adapted.merge_and_unload()
    ours = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    before = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    changed = 0
    for path, tensor in ours.state_dict().items():
        wanted = theirs.state_dict()[path].to(torch.bfloat16).float()
        assert torch.equal(tensor, wanted), path
        changed += not torch.equal(tensor, before[path])
    assert changed == len(adapters) // 2
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


@pytest.mark.filterwarnings("ignore:.*(tied|embedding layers|tie_word_embeddings).*:UserWarning")
@pytest.mark.parametrize(("model", "target"), [("gemma2", "embed_tokens"), ("cohere2", "lm_head")])
def test_a_head_that_llama_cpp_does_not_have_is_refused(model: str, target: str, tmp_path: Path) -> None:
    """Where a head of its own would be left out of the GGUF, or not be read from it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model](**SIZES)).save_pretrained(tmp_path / "base")
    tiny.make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", target])
    refused(tmp_path / "base", tmp_path, f"changes .*{target}.weight, .*two places .*llama.cpp has no {model} with a head of its own")


@pytest.mark.parametrize(
    ("model", "targets", "words"),
    [
        ("llama", ["q_proj", "embed_tokens"], None),
        ("llama", ["q_proj", "lm_head"], "No adapter is trained on lm_head"),
        ("llama", ["embed_tokens", "lm_head"], "No adapter is trained on lm_head"),
        ("gemma2", ["q_proj", "embed_tokens"], "embed_tokens.weight, .* two places"),
    ],
)
def test_what_could_not_be_merged_is_refused_before_it_is_trained(
    model: str, targets: list[str], words: str | None, tmp_path: Path
) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model](**SIZES, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=words) if words else nullcontext():
        refuse_what_cannot_be_merged(tmp_path / "base", Lora(target_modules=targets))


@pytest.mark.parametrize("system", ["copies", "copies little at once", "has no such call", "refuses these files"])
def test_what_no_adapter_changes_is_copied_byte_for_byte(system: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system where it can, by pieces where it cannot."""
    from safetensors.torch import load_file

    tiny.make_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    monkeypatch.setattr(stream, "AT_ONCE_BYTES", 1000)
    copied, copy = [], getattr(os, "copy_file_range", None)

    def counted(source: int, out: int, count: int) -> int:
        assert copy
        if system == "refuses these files":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        copied.append(copy(source, out, min(count, 5000) if system == "copies little at once" else count))
        return copied[-1]

    if copy and system == "has no such call":
        monkeypatch.delattr(os, "copy_file_range")
    elif copy:
        monkeypatch.setattr(os, "copy_file_range", counted)
    (tmp_path / "merged").mkdir()
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "merged", base))
    entries = header(base / "model.safetensors")
    assert len(ours) == len(theirs)
    assert all((ours[e["begin"] : e["end"]] == theirs[e["begin"] : e["end"]]) != ("v_proj" in name) for name, e in entries.items())
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == entries.keys()
    assert (sum(copied) > len(theirs) // 2) == (copy is not None and system.startswith("copies"))


def test_shards_are_merged_and_another_layout_beside_them_is_left(base: Path, tmp_path: Path) -> None:
    """What the index names is the model; `consolidated.safetensors`, as some hub models carry it, is not."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="200KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    (sharded / "consolidated.safetensors").write_bytes(shards[0].read_bytes())
    tiny.make_adapter(base, tmp_path / "adapter")
    for name, source in (("one", base), ("many", sharded)):
        (tmp_path / name).mkdir()
        merge(source, tmp_path / "adapter", tmp_path / name)
    assert sorted(p.name for p in (tmp_path / "many").glob("*.safetensors")) == [p.name for p in shards]
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "many" / shard.name).items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


class Steps(SilentReporter):
    """What a bar shows."""

    def __init__(self) -> None:
        self.total, self.done = 0.0, list[float]()

    @contextmanager
    def bar(self, label: str, total: float) -> Iterator[Any]:
        self.total = total
        yield self

    def update(self, done: float, **fields: Any) -> None:
        self.done.append(done)


def test_threads_beside_each_other_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large and small tensors, in one file and in several; Python changes threads as often as it can."""
    import torch
    from transformers import AutoModelForCausalLM

    one = tiny.make_model(tmp_path / "one", hidden_size=640, intermediate_size=1537)
    AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="3MB")
    shutil.copyfile(one / "tokenizer.json", tmp_path / "many" / "tokenizer.json")
    tiny.make_adapter(one, tmp_path / "adapter")
    monkeypatch.setattr(stream, "AT_ONCE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(stream, "COPY_BYTES", 100_000)
    before = sys.getswitchinterval()
    for base in (one, tmp_path / "many"):
        written: dict[int, dict[str, bytes]] = {}
        for count in (1, 6):
            monkeypatch.setattr(stream, "THREADS", count)
            (merged := tmp_path / f"{base.name} by {count}").mkdir()
            sys.setswitchinterval(1e-6)
            try:
                result = merge(base, tmp_path / "adapter", merged, reporter=(steps := Steps()))
            finally:
                sys.setswitchinterval(before)
            assert steps.done == sorted(steps.done)
            assert set(steps.done) - {0} == set(range(1, 1 + int(steps.total))) == set(range(1, 1 + result.merged_tensors))
            written[count] = {file.name: file.read_bytes() for file in merged.iterdir()}
        assert len(list(base.glob("*.safetensors"))) == (1 if base == one else 8)
        assert written[1] == written[6]


@pytest.mark.parametrize("fault", ["NaN", "Ctrl-C"])
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_fault_in_one_thread_ends_the_others(fault: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those would go on for a minute, and there is more to do; nothing gets a final name."""
    import torch

    tiny.make_adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write, faulty, working = stream._write_part, list[Any](), threading.Event()
    begun, told = list[Any](), list[Any]()

    def write_part(part: Any, *given: Any) -> None:
        begun.append(part)
        if faulty:
            working.set()
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    write(faulty[0], *given)
                except CancelledError:
                    told.append(part)
                    raise
        elif part.delta:
            faulty.append(part)
            working.wait(60)
            if fault == "NaN":
                raise ModelError("NaN")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            write(part, *given)

    monkeypatch.setattr(stream, "_write_part", write_part)
    threads, of_torch = threading.active_count(), torch.get_num_threads()
    torch.set_num_threads(of_torch + 1)
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process among several of tests ignores
    try:
        with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
            merge(base, tmp_path / "adapter", tmp_path / "merged")
        with ThreadPoolExecutor(1) as another:  # as the next that is begun has it
            assert another.submit(torch.get_num_threads).result() == torch.get_num_threads() == of_torch + 1
    finally:
        torch.set_num_threads(of_torch)
        signal.signal(signal.SIGINT, heard)
    assert (caught.type is KeyboardInterrupt) == (fault == "Ctrl-C")
    assert 1 <= len(told) <= stream.THREADS
    assert len(begun) < 10
    assert threading.active_count() == threads
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_the_merged_folder_loads_with_tokenizer_and_template(base: Path, tmp_path: Path) -> None:
    from ftkit.engines import hf

    tiny.make_adapter(base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert hf.load_tokenizer(tmp_path / "merged").chat_template == tiny.CHATML
    hf.load_model(tmp_path / "merged", None, dtype="float32", cuda=False)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj"]])
def test_onto_the_dequantised_base_is_what_training_computed(base: Path, tmp_path: Path, target_modules: Any) -> None:
    """Logits of the merge onto the dequantised base equal those of the 4-bit base with its adapter, but for 16-bit rounding.

    Also where some layers that were in 4 bits have no adapter. With half of that rounding they lie between those and the source's.
    """
    import torch
    from peft import PeftModel

    from ftkit.engines import hf

    tiny.make_adapter(base, tmp_path / "adapter", target_modules=target_modules)
    ids = torch.arange(60).reshape(2, 30)
    off = {}
    with torch.no_grad():
        trained = PeftModel.from_pretrained(hf.load_model(base, "qlora", dtype="float32", cuda=False), tmp_path / "adapter")(
            input_ids=ids
        ).logits
        for share in (0.0, 0.5, 1.0):
            (merged := tmp_path / f"{share}").mkdir()
            merge(base, tmp_path / "adapter", merged, rounding=share, dtype="float32")
            off[share] = float((hf.load_model(merged, None, dtype="float32", cuda=False)(input_ids=ids).logits - trained).abs().mean())
    assert off[1] < off[0] / 4
    assert 0.4 * off[0] < off[0.5] < 0.6 * off[0]


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning")
def test_experts_onto_the_dequantised_base_are_what_training_computed(tmp_path: Path) -> None:
    """Qwen's, which its files hold one by one: in training the experts of a layer were quantised together."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    from ftkit import patches
    from ftkit.engines import hf
    from ftkit.model.four_bits import adaptable, packed_experts

    torch.manual_seed(0)
    model = experts("Qwen3Moe", moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model.float(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear"))
    for path, parameter in adapted.named_parameters():
        if "lora_" in path:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", rounding=1.0, dtype="float32")
    base = hf.load_model(tmp_path / "base", "qlora", dtype="float32", cuda=False)
    with adaptable(base):
        trained = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged, held = load_file(tmp_path / "merged" / "model.safetensors"), {name: getattr(m, name) for m, name, *_ in packed_experts(base)}
    assert len(held) == 2
    last = held["down_proj"].float()  # of the last layer
    delta = trained.get_submodule("base_model.model.model.layers.1.mlp.experts").get_delta_weight("default")
    for n in range(4):
        assert torch.equal(merged[f"model.layers.1.mlp.experts.{n}.down_proj.weight"], (last + delta)[n].to(torch.bfloat16))
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad(), patches.applied("running adapters"):
        off = (
            hf.load_model(tmp_path / "merged", None, dtype="float32", cuda=False)(input_ids=ids).logits - trained(input_ids=ids).logits
        ).abs()
    assert off.mean() < 0.01


def test_a_base_that_ends_too_early_is_refused(base: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(base, cut)
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate((cut / "model.safetensors").stat().st_size - 10)
    tiny.make_adapter(base, tmp_path / "adapter")
    refused(cut, tmp_path, "does not end with its last tensor")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("layer_replication", {"layer_replication": [(0, 2), (1, 2)]}),
        ("lora_bias", {"lora_bias": True}),
        ("use_qalora", {"use_qalora": True}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [1, 2]}),
        ("loftq_config", {"init_lora_weights": "loftq", "loftq_config": "LoftQConfig"}),
        ("corda_config", {"init_lora_weights": "corda", "corda_config": "CordaConfig"}),
        ("kasa_config", {"kasa_config": "KasaConfig"}),
        *[("init_lora_weights", {"init_lora_weights": start}) for start in ("pissa", "pissa_niter_4", "olora", "lora_ga")],
    ],
)
def test_what_it_does_not_do_is_refused_by_name(key: str, settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Each as PEFT itself writes it. PiSSA, OLoRA, LoftQ and CorDA change the base to which their A and B are added."""
    import peft

    tiny.make_adapter(base, tmp_path / "adapter")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, value in settings.items():  # set later, since LoftQ wants scipy when it is asked for
        setattr(config, name, getattr(peft.tuners.lora.config, value)() if name.endswith("_config") else value)
    config.save_pretrained(tmp_path / "adapter")
    refused(base, tmp_path, rf"uses .*\b{key}=.* does not do")


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_how_a_plain_adapter_began_does_not_matter(start: bool | str, base: Path, tmp_path: Path) -> None:
    tiny.make_adapter(base, tmp_path / "adapter", init_lora_weights=start, lora_dropout=0.1, exclude_modules=["v_proj"])
    (tmp_path / "merged").mkdir()
    assert merge(base, tmp_path / "adapter", tmp_path / "merged").merged_tensors == 6 * 2


@pytest.mark.parametrize(("key", "value"), [("peft_type", "LOHA"), ("use_next_years_trick", True)])
def test_another_kind_or_a_key_that_peft_does_not_know_is_refused(key: str, value: Any, base: Path, tmp_path: Path) -> None:
    tiny.make_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(base, tmp_path, rf"uses {key}=.* does not do")


@pytest.mark.parametrize("kind", ["A", "B"])
def test_an_adapter_with_half_a_pair_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.make_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if f"lora_{kind}" in name)]
    save_file(tensors, path)
    refused(base, tmp_path, rf"is not whole: it lacks model\.layers\.0\.mlp\.down_proj\.lora_{kind}")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b"["),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"[" * 100_000),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b'{"r": 0, "lora_alpha": 1}'),
        ("adapter_config.json", b'{"r": "x", "lora_alpha": 1}'),
        ("adapter_config.json", b"\xff\xfe"),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    ],
)
def test_a_damaged_adapter_is_refused(file: str, content: bytes, base: Path, tmp_path: Path) -> None:
    tiny.make_adapter(base, tmp_path / "adapter")
    (tmp_path / "adapter" / file).write_bytes(content)
    refused(base, tmp_path, "cannot be read")


def refused(base: Path, folder: Path, words: str) -> None:
    """The merge of `folder`/adapter raises ModelError with these words and a way out."""
    (folder / "merged").mkdir()
    with pytest.raises(ModelError, match=words) as caught:
        merge(base, folder / "adapter", folder / "merged")
    assert caught.value.hint


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    deeper = tiny.make_model(tmp_path / "deeper", num_hidden_layers=3)
    tiny.make_adapter(deeper, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match=r"layers\.2"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")

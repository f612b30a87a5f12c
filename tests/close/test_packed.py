"""Weights that stay packed: dequantised as gguf does it, computed with as if they were in full, for logits and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import convertible
import pytest

from ftkit.close import packed, student
from ftkit.close.closing import Lesson, distribution, mean_divergence
from ftkit.close.packed import Blocks, PackedWeight, dequantise
from ftkit.close.places import Place, places
from ftkit.close.student import learning, load_student, lossless, running, scales
from ftkit.engines import logits
from ftkit.engines.logits import Forced
from ftkit.errors import ModelError
from ftkit.gguf import files as gguf
from ftkit.line.close import MOST_APART
from ftkit.machine.llama_cpp import need_converter

ROW = Forced([2, *((7 * n) % 250 + 6 for n in range(30))], list(range(3, 31)))
KINDS = ("F32", "F16", "BF16", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "IQ1_S", "IQ2_XS", "IQ3_S",
         "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0")  # fmt: skip


def test_every_type_is_dequantised_as_gguf_does_it() -> None:
    import gguf
    import numpy as np
    import torch

    torch.manual_seed(0)
    for name in KINDS:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        rows = torch.randint(0, 256, (6, 512 // elements * size), dtype=torch.uint8)
        with np.errstate(all="ignore"):  # random scales may be none
            found, wanted = dequantise(rows, int(kind)), gguf.dequantize(rows.numpy(), kind)
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), wanted.reshape(6, 512), equal_nan=True), name
        assert np.isfinite(wanted).any(), name


def file_of(folder: Path, quantization: str = "Q8_0") -> Path:
    gguf.convert(folder, {quantization: folder / "m.gguf"}, need_converter())
    return folder / "m.gguf"


def gradients(model: Any, parameters: list[Any]) -> tuple[Any, list[Any]]:
    """Logits of a row, and what a loss of them asks of each parameter."""
    import torch

    for parameter in parameters:
        parameter.requires_grad_()
    with learning(model), running(model):
        found = model(input_ids=torch.tensor([ROW.ids]), use_cache=False).logits[0].float()
    found.log_softmax(-1)[:, 5].sum().backward()
    return found.detach(), [parameter.grad for parameter in parameters]


def compare(folder: Path, path: Path, *, bfloat16: bool = False, within: float = 1e-5) -> Any:
    """Both ways of a file: equal in logits and gradients. The packed one."""
    import torch

    whole, kept = (load_student(path, folder, way, bfloat16=bfloat16, cuda=False) for way in ("dequantised", "mapped"))
    vectors = [lossless(model, path) for model in (whole, kept)]
    assert [vector.name for vector in vectors[0]] == [vector.name for vector in vectors[1]]
    stretched = [scales(model, path) for model in (whole, kept)]
    assert [one.name for one in stretched[0]] == [one.name for one in stretched[1]]
    assert stretched[0]
    learnt = [
        [*(vector.parameter for vector in some), *(one.stretch for one in more)] for some, more in zip(vectors, stretched, strict=True)
    ]
    (one, asked), (other, asked_too) = (gradients(model, found) for model, found in zip((whole, kept), learnt, strict=True))
    assert float((one - other).abs().max()) <= within * float(one.abs().max())
    assert any(found is not None for found in asked)
    for wanted, found in zip(asked, asked_too, strict=True):
        assert (wanted is None) == (found is None)
        assert wanted is None or torch.allclose(wanted, found, rtol=0, atol=10 * within * float(wanted.abs().max()))
    large = {id(part) for module in kept.modules() for part in vars(module).values() if isinstance(part, PackedWeight)}
    in_full = sum(len(parameter.shape) > 1 for parameter in kept.parameters())  # routers alone, which a file has in float32
    tied = whole.config.tie_word_embeddings is True
    assert len(large) + in_full == sum(len(parameter.shape) > 1 for parameter in whole.parameters()) + tied
    assert large
    return kept


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("llama")
    model = convertible.make("llama", folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if len(parameter.shape) > 1 else 1)  # so that places differ in what they say
    model.save_pretrained(folder)
    return file_of(folder)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_packed_student_is_the_dequantised_one(llama: Path, bfloat16: bool) -> None:
    kept = compare(llama.parent, llama, bfloat16=bfloat16, within=2**-6 if bfloat16 else 1e-5)
    assert not [name for name, parameter in kept.named_parameters() if len(parameter.shape) > 1]


def test_some_rows_at_a_time_are_the_same(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed.ELEMENTS_AT_ONCE, "cpu", 5 * 128)  # of the narrowest weight, five rows
    compare(llama.parent, llama)


def test_the_gradient_of_a_head_is_rounded_once_not_with_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    import torch

    torch.manual_seed(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = Blocks(torch.from_numpy(gguf.quantize(torch.randn(4096, 64).numpy(), kind)), int(kind), "head")
    monkeypatch.setitem(packed.ELEMENTS_AT_ONCE, "cpu", 8 * 64)  # 512 pieces
    given = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(16, 4096).bfloat16()
    torch.nn.functional.linear(given, PackedWeight([(blocks, Place("head"))], torch.device("cpu"), torch.bfloat16)).backward(gradient)
    wanted = gradient.double() @ dequantise(blocks.data, blocks.kind).bfloat16().double()
    assert given.grad is not None
    assert float((given.grad.double() - wanted).norm() / wanted.norm()) < 2**-8  # 2.3e-3; rounded with each piece 2.6e-2


def apart(path: Path) -> float:
    """Between the file in llama.cpp and packed in torch, as closing looks at it."""
    (there,) = logits.of_file(path, [ROW])
    here = logits.of_model(load_student(path, path.parent, "mapped", bfloat16=False, cuda=False), [ROW])
    return mean_divergence(here, [Lesson(ROW, distribution(there))])


def test_weights_that_are_read_in_a_wrong_order_are_seen(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert apart(llama) < MOST_APART / 10
    with monkeypatch.context() as swapped:
        swapped.setattr(packed, "dequantise", lambda data, kind: dequantise(data, kind).roll(32, -1))  # each block in its neighbour's place
        with pytest.raises(ModelError, match="no weight of the model is "):
            apart(llama)
    with monkeypatch.context() as swapped:
        as_they_stand = lambda *given: {name: replace(place, rows=None) for name, place in places(*given).items()}  # noqa: E731
        swapped.setattr(student, "places", as_they_stand)  # queries and keys as llama.cpp turns them
        assert apart(llama) > MOST_APART


def test_what_cannot_be_computed_with_is_refused_by_name(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedWeight, "COMPUTED", {})
    with pytest.raises(ModelError, match="packed weights are not computed with by embedding"):
        load_student(llama, llama.parent, "mapped", bfloat16=False, cuda=False)


def test_a_layer_that_is_not_there_is_named(llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(llama.parent, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"model\.layers\.6\.\S+ is missing"):
        load_student(tmp_path / "m" / "m.gguf", tmp_path / "m", "mapped", bfloat16=False, cuda=False)


BY_NAME = {architecture.name: architecture for architecture in architectures.ARCHITECTURES}


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["Qwen 2", "Qwen 3, experts", "Gemma 3, with a tower", "Phi 3", "Mixtral", "OLMo 2"])
def test_a_family_is_the_same_packed(name: str, tmp_path: Path) -> None:
    architecture = BY_NAME[name]
    if architecture.chat.name == "Gemma 2":  # of whose 262,144 tokens each takes its time
        architecture = replace(architecture, chat=replace(architecture.chat, merges=4000))
    folder = architectures.make_model(architecture, tmp_path)
    compare(folder, file_of(folder))


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["gemma4 with a tower", "gemma4 as it is published"])
def test_gemma_4_is_the_same_packed_with_its_towers_let_go(kind: str, tmp_path: Path) -> None:
    """As it is published the file has keys and values that neither transformers nor llama.cpp makes anything of."""
    convertible.make(kind, tmp_path)
    kept = compare(tmp_path, file_of(tmp_path))
    assert not any(parameter.numel() for name, parameter in kept.named_parameters() if "vision" in name)

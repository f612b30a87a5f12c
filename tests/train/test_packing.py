"""Rows end to end in one are trained on only where the model keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny

from ftkit import patches
from ftkit.data.rows import IGNORED, Example
from ftkit.engines import hf
from ftkit.progress import SilentReporter
from ftkit.train.arguments import Settings
from ftkit.train.micro_batches import pack
from ftkit.train.packing import what_packing_changes
from ftkit.train.trainer import build_trainer
from ftkit.train.training import train

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
WITHOUT_KERNELS = {"lfm2", "lfm2_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "falcon_h1", "nemotron_h"}
LEAKING = {"gpt_oss"}  # transformers 5.23 gives its attention a mask that lets later rows see earlier ones
SETTINGS = Settings(
    1, 4, gradient_checkpointing=False, dtype="float32", cuda=False, longest_tokens=128, most_learnt_tokens=128, packing=True
)


def rows(count: int) -> list[Example]:
    """Of 20 to 60 tokens, the second half learnt."""
    ids = [[(7 * n + 3 * n * place) % 250 for place in range(20 + 13 * n % 41)] for n in range(1, count + 1)]
    return [Example(row, [IGNORED] * (len(row) // 2) + row[len(row) // 2 :]) for row in ids]


def as_rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    return [vars(example) for example in examples]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


def make(model_type: str, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny.make_model(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "eos_token_id": 257, "pad_token_id": 258, "bos_token_id": None}
    if model_type == "gemma4":  # as it is published, with a tower
        text = {"text_config": {**shapes.SIZES, **shapes.SHAPES["gemma4_text"], **sizes, "vocab_size_per_layer_input": 300}}
        tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
        config = AutoConfig.for_model("gemma4", **text, vision_config={**tower, "num_key_value_heads": 2}, audio_config=None)
    else:
        config = shapes.config(model_type, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def trainer(model: Path, folder: Path, settings: Settings = SETTINGS) -> Any:
    examples = rows(8)
    recipe = tiny.recipe(model, method="lora", effective_batch_size=4)
    return build_trainer(recipe, settings, model, hf.load_tokenizer(model), examples, examples[:2], folder)


@pytest.mark.parametrize(
    "model_type", ["llama", "lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*shapes.SHAPES} - {"llama", "lfm2"}))]
)
@pytest.mark.filterwarnings("ignore")
def test_only_a_model_that_keeps_rows_apart_is_packed(model_type: str, tmp_path: Path) -> None:
    """Attention has a mask for it; layers with a state want kernels that are not here."""
    change = what_packing_changes(trainer(make(model_type, tmp_path / "model"), tmp_path), as_rows(rows(3)))
    if model_type in WITHOUT_KERNELS:
        assert change is not None
        assert change.startswith(f"{model_type} does not compute it: ")
    elif model_type in LEAKING:
        assert change is not None
        assert change.startswith(f"a row of {model_type} sees the one before it")
    else:
        assert change is None


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys did not match.*:RuntimeWarning")
@pytest.mark.parametrize(
    "model_type", ["lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(WITHOUT_KERNELS - {"lfm2"}))]
)
def test_a_state_that_goes_from_row_to_row_in_silence_is_found(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the model is not told where rows begin but by their positions, which its convolutions do not look at."""
    told = ("input_ids", "labels", "position_ids")
    monkeypatch.setattr("ftkit.train.packing.pack", lambda given: {name: pack(given)[name] for name in told})
    change = what_packing_changes(trainer(make(model_type, tmp_path / "model"), tmp_path), as_rows(rows(3)))
    assert change is not None
    assert change.startswith(f"a row of {model_type} sees the one before it")


def test_positions_that_are_wrong_are_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: every token is a row of its own. No log-probability of a later row follows from the first one; the gradient tells."""
    monkeypatch.setattr("ftkit.train.packing.pack", lambda given: {**pack(given), "position_ids": 0 * pack(given)["position_ids"]})
    change = what_packing_changes(trainer(llama, tmp_path), as_rows(rows(3)))
    assert change is not None
    assert "it changes the gradient by" in change


def test_looking_at_packing_changes_nothing(llama: Path, tmp_path: Path) -> None:
    import torch

    made = trainer(llama, tmp_path)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    state = torch.get_rng_state()
    assert what_packing_changes(made, as_rows(rows(1))) is None  # one row stands for all
    made.args.neftune_noise_alpha = 5
    assert "NEFTune" in str(what_packing_changes(made, as_rows(rows(1))))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.mark.slow
def test_a_training_goes_on_without_packing_where_it_changes_something(tmp_path: Path) -> None:
    """The same adapter as without packing, to the bit; and a model that can be packed ends near it."""
    import torch
    from safetensors.torch import load_file

    found, said = {}, {}
    for model_type in ("lfm2", "llama"):
        model = make(model_type, tmp_path / model_type)
        for packing in (True, False):
            notes, folder = Notes(), tmp_path / f"{model_type}-{packing}"
            recipe = tiny.recipe(model, method="lora", effective_batch_size=4, max_steps=2)
            settings = replace(SETTINGS, packing=packing)
            train(recipe, settings, model, hf.load_tokenizer(model), rows(8), rows(2), folder, notes)
            found[model_type, packing] = load_file(folder / "adapter" / "adapter_model.safetensors")
            said[model_type, packing] = notes.warned
    (warned,) = said["lfm2", True]
    assert "rows are not packed: lfm2 does not compute it" in warned
    assert all(torch.equal(tensor, found["lfm2", False][name]) for name, tensor in found["lfm2", True].items())
    assert not said["llama", True] + said["llama", False] + said["lfm2", False]
    for name, tensor in found["llama", True].items():
        torch.testing.assert_close(tensor, found["llama", False][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_split_of_a_step_has_the_gradient_of_the_large_batch(checkpointing: bool, llama: Path, tmp_path: Path) -> None:
    """On uneven rows: all at once, one at a time, as many as there is room for, and end to end."""
    import torch

    examples = rows(7)
    whole = Settings(7, 1, checkpointing, dtype="float32", cuda=False)
    one = replace(whole, per_device_train_batch_size=1, gradient_accumulation_steps=7)
    tokens = replace(one, longest_tokens=100, most_learnt_tokens=45)
    found, passes = {}, {}
    for name, settings in {"whole": whole, "one": one, "tokens": tokens, "packed": replace(tokens, packing=True)}.items():
        made = build_trainer(
            tiny.recipe(llama, method="lora", effective_batch_size=7),
            settings,
            llama,
            hf.load_tokenizer(llama),
            examples,
            examples,
            tmp_path,
        )
        torch.manual_seed(1)
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.05
        with patches.applied("training"):
            (batch,) = made.get_train_dataloader()
            count = made._get_num_items_in_batch([batch], torch.device("cpu"))
            loss = made.training_step(made.model, batch, count)
        passes[name] = [tuple(part["input_ids"].shape) for part, _ in made.micro_batches(batch)]
        found[name] = torch.cat([loss.reshape(1), *(p.grad.flatten() for p in made.model.parameters() if p.grad is not None)])
    assert passes["whole"] == [(7, max(len(row.input_ids) for row in examples))]
    assert len(passes["one"]) == 7
    assert 1 < len(passes["tokens"]) < 7
    assert all(height * width <= 100 for height, width in passes["tokens"])
    assert {height for height, _ in passes["packed"]} == {1}
    assert all(width <= 100 for _, width in passes["packed"])
    for name in ("one", "tokens", "packed"):
        assert float((found[name] - found["whole"]).norm() / found["whole"].norm()) < 1e-5, name


def step_of(model: Path, folder: Path, rows_at_once: int, *, with_routers: bool = True) -> tuple[float, Any]:
    """(loss, gradient) of one step of seven uneven rows, so many at once."""
    import torch

    examples, settings = rows(7), Settings(rows_at_once, -(-7 // rows_at_once), False, dtype="float32", cuda=False)
    recipe = tiny.recipe(model, method="lora", effective_batch_size=7)
    made = build_trainer(recipe, settings, model, hf.load_tokenizer(model), examples, examples, folder)
    made.aux_loss_enabled = made.aux_loss_enabled and with_routers
    torch.manual_seed(1)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.05
    made.create_optimizer()
    with patches.applied("training", "running adapters"):
        (batch,) = made.get_train_dataloader()
        count = made._get_num_items_in_batch([batch], torch.device("cpu"))
        made.current_gradient_accumulation_steps = 1  # which the trainer's loop sets
        loss = float(made.training_step(made.model, batch, count))
    return loss, torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("model_type", ["gemma4", "qwen3_moe"])
def test_every_split_has_the_gradient_of_the_large_batch_whatever_a_model_says_of_its_loss(model_type: str, tmp_path: Path) -> None:
    """Models with towers say that they take no count of the step's tokens: a micro-batch's own then counted, and the means were added."""
    model = make(model_type, tmp_path / "model")
    (loss, gradient), *others = (step_of(model, tmp_path, size, with_routers=False) for size in (7, 1, 3))
    for other, its in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert float((its - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_a_mixture_s_routers_weigh_the_same_however_many_rows_go_at_once(tmp_path: Path) -> None:
    """TRL adds their loss to each micro-batch."""
    model = make("qwen3_moe", tmp_path / "model")
    routers = {n: step_of(model, tmp_path, n)[0] - step_of(model, tmp_path, n, with_routers=False)[0] for n in (7, 1)}
    assert routers[7] > 0
    assert routers[1] == pytest.approx(routers[7], rel=0.3)  # a mean of rows', not that of all


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_validation_loss_is_a_learnt_token_s_however_many_rows_go_at_once(model_type: str, tmp_path: Path) -> None:
    """The mean of batches' means would be another for each size, and so would what a mixture's routers add to each."""
    from trl import SFTTrainer

    llama, examples, losses, alone = make(model_type, tmp_path / "model"), rows(7), dict[int, float](), list[tuple[float, int]]()
    for size in (1, 2, 7):
        settings = Settings(size, 1, False, dtype="float32", cuda=False)
        made = build_trainer(tiny.recipe(llama, method="lora"), settings, llama, hf.load_tokenizer(llama), examples, examples, tmp_path)
        losses[size] = made.evaluate()["eval_loss"]
        if size == 1:
            alone = [(float(loss), int(tokens)) for loss, tokens in made.evaluated]
        else:
            made.evaluation_loop = lambda *a, made=made, **o: SFTTrainer.evaluation_loop(made, *a, **o)
            losses[-size] = made.evaluate()["eval_loss"]
    learnt = [sum(label != IGNORED for label in row.labels) for row in examples]
    assert sorted(tokens for _, tokens in alone) == sorted(learnt)
    wanted = sum(loss * tokens for loss, tokens in alone) / sum(learnt)
    assert [losses[size] for size in (1, 2, 7)] == pytest.approx([wanted] * 3, rel=1e-6)
    assert losses[-2] != pytest.approx(wanted, rel=1e-5)  # as transformers takes it

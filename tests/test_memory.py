"""The plan's exact counts equal what the real libraries allocate; its choices follow from the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from ftkit import hf
from ftkit.errors import RecipeError
from ftkit.memory import activations, inventory
from ftkit.memory.plan import MARGIN, MemoryPlan, batch_sizes, make_plan
from ftkit.recipe import Lora, Recipe
from ftkit.units import GIB

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


def storage_bytes(tensors: list[Any]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_counts_are_the_models_own() -> None:
    c = tiny.config()
    attention = 2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * (c.hidden_size // 2)  # q, o and half as wide k, v
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size  # two norms
    embeddings = c.vocab_size * c.hidden_size  # tied with the head: counted once
    found = inventory.count(c, "qlora", Lora(r=4), "adamw_torch", 2)
    assert found.parameters == embeddings + 2 * layer + c.hidden_size
    assert found.embedding_parameters == embeddings
    assert found.quantized_parameters == 2 * (layer - 2 * c.hidden_size)


@pytest.mark.parametrize("tied", [True, False])
def test_nf4_weights_to_the_byte(tied: bool, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path, tie_word_embeddings=tied)
    loaded = hf.load_model(folder, "qlora", bfloat16=True, cuda=False)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    for parameter in loaded.parameters():
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    # Code books are shared between layers in storage, or not, as the library likes: count each layer's, as the formula does.
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert inventory.count(tiny.config(tie_word_embeddings=tied), "qlora", Lora(r=4), "adamw_torch", 2).weights_bytes == real


@pytest.mark.parametrize(
    ("method", "optim"), [("lora", "adamw_torch"), ("qlora", "adamw_torch"), ("full", "adamw_torch"), ("full", "adamw_8bit")]
)
def test_gradients_and_optimizer_to_the_byte(method: str, optim: str, model: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    import torch

    from ftkit import data
    from ftkit.data import Row
    from ftkit.train import build_trainer

    tokenizer = hf.load_tokenizer(model)
    examples = [data.tokenise(tokenizer, Row(tuple(row["messages"]), 1)) for row in rows[:2]]
    recipe = tiny.recipe(model, method=method, optim=optim)
    trainer = build_trainer(recipe, tiny.SETTINGS, model, tokenizer, examples, examples, tmp_path)
    trainer.create_optimizer()
    batch = trainer.data_collator([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradient_bytes = storage_bytes([p.grad for p in trained])
    trainer.optimizer.step()
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    code_books = [t for t in states if t.numel() == 256 and t.dtype == torch.float32 and optim == "adamw_8bit"]
    found = inventory.count(tiny.config(), recipe.training.method, recipe.lora, optim, 4)
    assert found.trainable_parameters == sum(p.numel() for p in trained)
    assert found.gradient_bytes == gradient_bytes
    assert found.optimizer_bytes == storage_bytes([t for t in states if not any(t is book for book in code_books)])


def test_an_untied_head_has_8_bit_states_as_bitsandbytes_gives_it() -> None:
    """Only the embedding keeps 32 bits, though the head has as many elements."""
    tied, untied = (
        inventory.count(tiny.config(tie_word_embeddings=tie), "full", Lora(), "adamw_8bit", 4).optimizer_bytes for tie in (True, False)
    )
    head = tiny.config().vocab_size * tiny.config().hidden_size
    assert untied - tied == 2 * head + 2 * 4 * (head // inventory.OPTIMIZER_BLOCK)


def test_targets_that_match_nothing_are_refused_with_names() -> None:
    with pytest.raises(RecipeError) as refused:
        inventory.count(tiny.config(), "lora", Lora(target_modules=["query"]), "adamw_torch", 2)
    assert "q_proj" in (refused.value.hint or "")
    assert refused.value.exit_code == 2


def plan(budget_bytes: int, **training: Any) -> MemoryPlan:
    recipe = Recipe.model_validate({"model": "m", "training": {"effective_batch_size": 8, **training}, "lora": {"r": 4}})
    return make_plan(tiny.config(), recipe, 512, "card", budget_bytes, on_cuda=False, bfloat16=True)


def test_batch_times_accumulation_is_the_effective_batch() -> None:
    assert batch_sizes(12) == [12, 6, 4, 3, 2, 1]
    for budget_bytes in (1 * GIB, GIB // 8, GIB // 32):
        chosen = plan(budget_bytes).chosen
        assert chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps == 8


def test_the_largest_batch_that_fits_is_chosen() -> None:
    roomy = plan(8 * GIB).chosen
    assert (roomy.per_device_train_batch_size, roomy.gradient_checkpointing, roomy.fits) == (8, False, True)
    tight = plan(int(roomy.peak_bytes / (1 - MARGIN)) - 1).chosen
    assert tight.fits
    assert tight.gradient_checkpointing or tight.per_device_train_batch_size < 8
    assert tight.peak_bytes < roomy.peak_bytes


def test_what_does_not_fit_is_said_and_not_shrunk_further() -> None:
    chosen = plan(1 << 20).chosen
    assert not chosen.fits
    assert (chosen.per_device_train_batch_size, chosen.gradient_checkpointing) == (1, True)


def test_the_recorded_plan_is_the_plan() -> None:
    import json
    from dataclasses import asdict

    made = plan(GIB)
    assert MemoryPlan.load(json.loads(json.dumps(asdict(made)))) == made


def test_the_estimate_is_near_a_real_step() -> None:
    """The stated formula against what torch really holds on the CPU; it is an estimate, and this says how good."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM

    c = tiny.config(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=2048)
    loaded = AutoModelForCausalLM.from_config(c, dtype=torch.float32)
    loaded.train()
    ids = torch.randint(0, 2000, (4, 256))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        loaded.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    held = peak = 0
    events = []

    def walk(nodes: Any) -> None:
        for node in nodes:
            if str(node.tag).endswith("Allocation"):
                events.append((node.start_time_ns, node.extra_fields.alloc_size))
            walk(node.children)

    walk(prof.profiler.kineto_results.experimental_event_tree())
    for _, size in sorted(events):
        held += size
        peak = max(peak, held)
    gradients = 4 * sum(p.numel() for p in loaded.parameters())
    head = 3 * 4 * ids.numel() * c.vocab_size  # this step stops before the head
    estimate = activations.estimate_bytes(activations.shape(c), 4, 256, checkpointing=False, compute_bytes=4) - head
    assert 0.85 < (peak - gradients) / estimate < 1.05

"""The converter that `ftkit setup converter` brings: this year's models come through it with the same ids and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftkit.engines import llamacpp
from ftkit.gguf import files as gguf
from ftkit.machine import llama_cpp, packages

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TEXT = '<bos><|turn>user\nthe cat sat on\tthe mat {"ø": 1}<turn|>\n<|turn>model\n'
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
TURNS = {"sot_token": "<|turn>", "eot_token": "<turn|>"}  # as Gemma 4 names them
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip


def tokenizer() -> Any:
    """Of Gemma's and Llama's kind: byte pairs over letters, a mark for the space, bytes for what has no token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS.values()]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "th", "the"]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # noqa: S106
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(word, special=True) for word in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, add_prefix_space=False, extra_special_tokens=TURNS, **SPECIAL)


def gemma4_text(vocab_size: int) -> Any:
    """Gemma 4's language model: sliding and full layers, embeddings of every layer."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **SIZES, vocab_size=vocab_size, vocab_size_per_layer_input=vocab_size, hidden_size_per_layer_input=32, global_head_dim=64,
        num_global_key_value_heads=2, sliding_window=64,
    )  # fmt: skip


def make(kind: str, folder: Path) -> Any:
    """Write a tiny model with random weights and its tokenizer; the model."""
    import torch
    import transformers

    torch.manual_seed(0)
    words = tokenizer()
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=len(words)))
    elif kind == "gemma4":
        model = transformers.Gemma4ForCausalLM(gemma4_text(len(words)))
    else:
        vision = transformers.Gemma4VisionConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
            position_embedding_size=64,
        )  # fmt: skip
        whole = transformers.Gemma4Config(text_config=gemma4_text(len(words)), vision_config=vision, audio_config=None)
        model = transformers.Gemma4ForConditionalGeneration(whole)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["gemma4", "gemma4 with its eyes", "llama"])
def test_a_tiny_model_keeps_its_ids_and_logits(kind: str, tmp_path: Path) -> None:
    import torch

    converter = packages.installed("converter")
    assert converter, "ftkit setup converter comes first"
    model, words, path = make(kind, tmp_path / "model"), tokenizer(), tmp_path / "model.gguf"
    gguf.convert(tmp_path / "model", path, "F16", llama_cpp.Found(converter, "ftkit setup converter"))

    ids = words(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model.float()(torch.tensor([ids])).logits[0, -1]
    expected = logits.log_softmax(-1)
    with llamacpp.load(path, num_ctx=256) as engine:
        assert engine.tokenize(TEXT) == ids
        letter = words.convert_tokens_to_ids("e")  # is drawn whatever the logits are, since half a character is not shown
        asked = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0.0, "logit_bias": [[letter, 100.0]]}
        reply = engine._post("/completion", asked)
    shown = {token["id"]: token["logprob"] for token in reply["completion_probabilities"][0]["top_logprobs"]}
    assert len(shown) == 20
    for token, logprob in shown.items():
        assert logprob == pytest.approx(float(expected[token]), abs=0.02), token

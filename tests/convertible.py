"""Tiny models that llama.cpp's converter takes, with a tokenizer of a kind that it knows. The weights are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
TURNS = {"sot_token": "<|turn>", "eot_token": "<turn|>"}  # as Gemma 4 names them
CHAT = (
    "{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)  # it begins without a BOS, which llama.cpp would add
SHARED = 2  # of its layers, the last
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


def gemma4_text(vocab_size: int, **more: Any) -> Any:
    """Gemma 4's language model: sliding and full layers, embeddings of every layer."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **SIZES, vocab_size=vocab_size, vocab_size_per_layer_input=vocab_size, hidden_size_per_layer_input=32, global_head_dim=64,
        num_global_key_value_heads=2, sliding_window=64, **more,
    )  # fmt: skip


def _as_published(folder: Path, words: Any) -> Any:
    """With a tower, and keys and values of the layers that take those of earlier ones, which transformers makes nothing of."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    text = gemma4_text(len(words), num_kv_shared_layers=SHARED, layer_types=["sliding_attention", "full_attention"] * 3)
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Gemma4Config(text_config=text, vision_config={**vision, "head_dim": 32}, audio_config=None)
    model = transformers.Gemma4ForConditionalGeneration(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layers = config.text_config.layer_types
    for layer in range(len(layers) - SHARED, len(layers)):
        like = max(n for n in range(len(layers) - SHARED) if layers[n] == layers[layer])
        for part in ("k_proj", "v_proj", "k_norm"):
            place = f"model.language_model.layers.{{}}.self_attn.{part}.weight"
            if place.format(like) in tensors:
                assert place.format(layer) not in tensors
                tensors[place.format(layer)] = torch.randn_like(tensors[place.format(like)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def make(kind: str, folder: Path, spare_rows: int = 0, chat_template: str | None = None) -> Any:
    """Write a tiny model with random weights and its tokenizer; the model. `spare_rows`: of its embedding, for tokens to come."""
    import torch
    import transformers

    torch.manual_seed(0)
    words = tokenizer()
    words.chat_template = chat_template
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=len(words) + spare_rows))
    elif kind == "gemma4 as it is published":
        return _as_published(folder, words)
    elif kind == "gemma4":
        model = transformers.Gemma4ForCausalLM(gemma4_text(len(words) + spare_rows))
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

"""Tiny models with the real vocabulary and chat template of a family, made from llama.cpp's own source. The weights are random."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
# How a byte-level vocabulary cuts text before it is merged: src/llama-vocab.cpp, by tokenizer.ggml.pre
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": CONTRACTIONS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": CONTRACTIONS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen35": CONTRACTIONS.replace(r"\p{L}+", r"[\p{L}\p{M}]+") + r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "starcoder": (r"\p{N}", GPT_2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT_2, r"[0-9][0-9][0-9]"),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type, the same in SentencePiece


@dataclass(frozen=True)
class Family:
    """What makes a family: its vocabulary, template and config class, and the tokens that its tokenizer_config.json names."""

    name: str
    vocabulary: str  # models/ggml-vocab-NAME.gguf
    template: str  # models/templates/NAME.jinja
    config: str  # transformers' model_type
    eos: str
    ends: str  # what the template writes after an answer
    bos: str | None = None
    tokens: dict[str, str] = field(default_factory=dict)  # names that this vocabulary has for what the template writes
    sizes: dict[str, Any] = field(default_factory=dict)
    says: dict[str, Any] = field(default_factory=dict)  # more of tokenizer_config.json
    merges: int | None = None  # of a vocabulary of pieces only what so many of its merges, the first, join and make; None: all of it


FAMILIES = (
    Family("Qwen 2.5", "qwen2", "Qwen-Qwen2.5-7B-Instruct", "qwen2", "<|endoftext|>", "<|im_end|>"),
    Family("Llama 3.1", "llama-bpe", "meta-llama-Llama-3.1-8B-Instruct", "llama", "<|end_of_text|>", "<|eot_id|>",
    "<|begin_of_text|>"),
    Family("Llama 3.2", "llama-bpe", "meta-llama-Llama-3.2-3B-Instruct", "llama", "<|end_of_text|>", "<|eot_id|>",
    "<|begin_of_text|>"),
    Family(
        "Gemma 2", "gemma-4", "google-gemma-2-2b-it", "gemma3_text", "<eos>", "<end_of_turn>", "<bos>",
        tokens={"<|turn>": "<start_of_turn>", "<turn|>": "<end_of_turn>"},
        sizes={"head_dim": 32, "sliding_window": 512, "layer_types": ["full_attention"]}, says={"add_bos_token": True},
    ),
    Family(
        "Qwen 3", "qwen2", "Qwen-Qwen3-0.6B", "qwen2", "<|endoftext|>", "<|im_end|>",
        tokens={"[PAD151667]": "<think>", "[PAD151668]": "</think>"},
    ),
    Family(
        "DeepSeek R1", "llama-bpe", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama", "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
        tokens={
            "<|begin_of_text|>": "<｜begin▁of▁sentence｜>", "<|end_of_text|>": "<｜end▁of▁sentence｜>",
            "<|reserved_special_token_3|>": "<｜User｜>", "<|reserved_special_token_4|>": "<｜Assistant｜>",
            "<|reserved_special_token_5|>": "<think>", "<|reserved_special_token_6|>": "</think>",
        },
    ),
    Family(
        "Gemma 4", "gemma-4", "google-gemma-4-31B-it", "gemma3_text", "<eos>", "<turn|>", "<bos>",
        sizes={"head_dim": 32, "sliding_window": 512, "layer_types": ["full_attention"]},
        says={"add_bos_token": True, "extra_special_tokens": {"sot_token": "<|turn>", "eot_token": "<turn|>"}},
    ),
    Family(
        "Phi 3.5", "phi-3", "microsoft-Phi-3.5-mini-instruct", "llama", "<|endoftext|>", "<|end|>", "<s>",
        says={"add_bos_token": False, "add_prefix_space": True},
    ),
)  # fmt: skip


WITHOUT_BOS = (  # a template that begins with none, and Llama's words
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '\\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{% endif %}"
)


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def make_model(family: Family, folder: Path, template: str | None = None) -> Path:
    """Write config, weights and tokenizer of a family; `template` takes the place of its own."""
    import torch
    import transformers

    ids = make_tokenizer(family, folder, template)
    config = transformers.CONFIG_MAPPING[family.config](**{**SIZES, **family.sizes}, **ids)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@cache
def _vocabulary(name: str) -> Any:
    """A reader of it, which takes up to 10 s to make; families share vocabularies."""
    from ftkit.model.source import open_gguf

    return open_gguf(llama_cpp.models() / f"ggml-vocab-{name}.gguf")


def make_tokenizer(family: Family, folder: Path, template: str | None = None) -> dict[str, Any]:
    """Write the tokenizer of a family alone; returns what its model's config holds of it."""
    from tokenizers import processors

    models, reader = llama_cpp.models(), _vocabulary(family.vocabulary)

    def read(key: str) -> Any:
        found = reader.get_field(f"tokenizer.ggml.{key}")
        return None if found is None else found.contents()

    tokens = [family.tokens.get(token, token) for token in read("tokens")]
    if family.merges:
        tokens, read = _first(tokens, read, family.merges)
    folder.mkdir(parents=True, exist_ok=True)
    if read("model") == "gpt2":
        tokenizer = _byte_level(tokens, read("merges"), read("token_type"), PATTERNS[read("pre")])
        if family.bos and family.vocabulary == "llama-bpe":  # the converter knows a vocabulary by its ids of a text, the BOS among them
            tokenizer.post_processor = processors.TemplateProcessing(f"{family.bos} $A", None, [(family.bos, tokens.index(family.bos))])
    else:
        tokenizer = _sentence_pieces(folder, tokens, read)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = models / "templates" / f"{family.template}.jinja"
    chat_template = template or (named.read_text(encoding="utf-8") if family.template else None)
    names = {"eos_token": family.eos, "pad_token": family.eos, "bos_token": family.bos}
    says = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": chat_template, **family.says}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in says.items() if v is not None}), encoding="utf-8")
    return {"vocab_size": len(tokens), **{f"{name}_id": tokens.index(token) if token else None for name, token in names.items()}}


def _first(tokens: list[str], read: Any, count: int) -> tuple[list[str], Any]:
    """A vocabulary's tokens that so many of its merges join and make, with those that are no plain text; and what reads it so.

    Of the later merges those stay that make one of these tokens of others: SentencePiece joins whatever makes a token.
    """
    types, scores, number = read("token_type"), read("scores"), {token: n for n, token in enumerate(tokens)}
    merges = [(merge, *_split(merge, number)) for merge in read("merges")]
    used = {token for _, left, right in merges[:count] for token in (left, right, left + right)}
    kept = [n for n, token in enumerate(tokens) if types[n] != NORMAL or token in used]
    lists = {
        "merges": [merge for merge, left, right in merges if {left, right, left + right} <= used],
        "token_type": [types[n] for n in kept],
        "scores": [scores[n] for n in kept],
    }
    return [tokens[n] for n in kept], lambda key: lists[key] if key in lists else read(key)


def _byte_level(tokens: list[str], merges: list[str], types: list[int], pattern: str | tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, pairs, ignore_merges=True))
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in ((pattern,) if isinstance(pattern, str) else pattern)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for n, token in enumerate(tokens) if types[n] in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def _sentence_pieces(folder: Path, tokens: list[str], read: Any) -> Any:
    """The tokenizer, and `tokenizer.model` beside it, from which the converter takes these vocabularies."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    types, scores, merges, space = read("token_type"), read("scores"), read("merges"), read("add_space_prefix") is not False
    number, unknown = {token: n for n, token in enumerate(tokens)}, "<unk>"
    if merges:  # pairs, the first merged first; SentencePiece knows one score a token
        pairs = [_split(merge, number) for merge in merges]
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(pairs):
            ranks.setdefault(left + right, rank)
        scores = [float(-ranks[token]) if token in ranks else -1e6 for token in tokens]
    else:
        scored = sorted((-scores[n], token) for n, token in enumerate(tokens) if types[n] == NORMAL and len(token) > 1)
        pairs = [
            (token[:at], token[at:]) for _, token in scored for at in range(1, len(token)) if token[:at] in number and token[at:] in number
        ]
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = sentencepiece_model_pb2.TrainerSpec.BPE, True
    model.trainer_spec.unk_id = number[unknown]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = space, False
    for token, kind, score in zip(tokens, types, scores, strict=True):
        piece = model.pieces.add(piece=token, score=score)
        piece.type = UNKNOWN if token == unknown else UNUSED if kind == UNKNOWN else kind  # a model has one unknown token
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    added_by_the_user = {token: n for n, token in enumerate(tokens) if types[n] == USER_DEFINED}  # which the converter knows by this file
    (folder / "added_tokens.json").write_text(json.dumps(added_by_the_user), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(number, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] * space + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] * space
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    added = [AddedToken(token, special=True, normalized=False) for n, token in enumerate(tokens) if types[n] in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def _split(merge: str, number: dict[str, int]) -> tuple[str, str]:
    """The two tokens of a merge; between them stands one space."""
    left, _, right = merge.partition(" ")
    assert {left, right} <= number.keys(), merge
    return left, right

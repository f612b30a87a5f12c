"""Read a dataset, normalise its rows to chat messages, render and mask them, and count their tokens."""

from __future__ import annotations

import difflib
import io
import json
import re
import reprlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import sandbox
from ftkit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
ROLES = ("system", "user", "assistant")
FORMATS = 'ftkit reads {"messages": [...]}, {"prompt", "completion"}, {"instruction", "input", "output"} and {"conversations": [...]}'

# Files that hold rows too and are not read yet, by their first bytes or their name: what they are, and what makes JSON lines of them.
_CSV = (
    """python -c "import csv, json, sys; rows = csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig'){more}); """
    """[print(json.dumps(row)) for row in rows]" {file} > {lines}"""
)
OTHER_FILES: tuple[tuple[bytes, str, str, str], ...] = (
    (b"PAR1", ".parquet", "a Parquet file",
     """python -c "import sys, datasets; datasets.Dataset.from_parquet(sys.argv[1]).to_json(sys.argv[2])" {file} {lines}"""),
    (b"\x1f\x8b", ".gz", "packed with gzip", "gzip -dc {file} > {lines}"),
    (b"PK\x03\x04", ".zip", "a zip archive (or a workbook)", "unpack it; of a workbook save a sheet as CSV UTF-8, then give that to ftkit"),
    (b"", ".csv", "CSV", _CSV.replace("{more}", "")),
    (b"", ".tsv", "CSV with tabs", _CSV.replace("{more}", ", delimiter=chr(9)")),
)  # fmt: skip

Message = dict[str, str]  # {"role": one of ROLES, "content": text}


@dataclass(frozen=True)
class Row:
    """One training conversation; the last message is the assistant's."""

    messages: tuple[Message, ...]
    line: int  # in its file, from 1; in a JSON list, the row's number

    @property
    def question(self) -> list[Message]:
        """All before the last answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Example:
    """A tokenised row: `labels` are the token ids where the assistant speaks, `IGNORED` elsewhere. Same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenCounts:
    """Lengths of a dataset's rows, in tokens."""

    rows: int
    total: int
    median: int
    p95: int
    p99: int
    longest: int
    cut: int  # rows longer than max_length
    dropped: int  # of those, rows whose answer lies wholly beyond it: they are not trained on


def read_rows(path: Path) -> list[Row]:
    """The rows of a `.jsonl` or `.json` file. Raises DataError with file and line for the first faults of each kind."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json*")] if path.parent.is_dir() else [], 1)
        raise DataError(f"There is no dataset at {path}.", f"did you mean {path.parent / near[0]}?" if near else FORMATS) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise DataError(
            f"Cannot read {path}: {getattr(error, 'strerror', error)}.", "name the dataset's file, as in --set data.train=train.jsonl"
        ) from None
    text = _text(path, content)
    rows: list[Row] = []
    faults: list[str] = []
    unit = "row" if text.lstrip().startswith("[") else "line"
    for number, value in _values(path, text, faults):
        try:
            rows.append(Row(_messages(value), number))
        except ValueError as error:
            faults.append(f"{path}, {unit} {number}: {error}")
    if faults:
        more = f"\n… and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError("\n".join(faults[:5]) + more, FORMATS)
    if not rows:
        raise DataError(f"{path} has no rows.", FORMATS)
    return rows


def _text(path: Path, content: bytes) -> str:
    """UTF-8, or UTF-16 or UTF-32 where the first bytes say so. Raises DataError for other text, and for files that are not JSON."""
    lines = f"{path.name.split('.')[0] or 'rows'}.jsonl"
    for first, suffix, what, to_lines in OTHER_FILES:
        if content.startswith(first) if first else path.suffix.lower() == suffix:
            hint = to_lines.format(file=shlex.quote(str(path)), lines=shlex.quote(lines))
            raise DataError(f"{path} is {what}, which ftkit does not read yet; it reads JSON lines.", hint)
    encoding = json.detect_encoding(content)
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding).read()  # with line ends made one
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        if encoding.startswith("utf-8"):
            hint = f"if it is Latin-1: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > fixed.jsonl"
            raise DataError(f"{path}, line {line}: not UTF-8 text.", hint) from None
        raise DataError(f"{path} begins as {encoding.upper()} text, and is not: {error.reason}.", "write it as UTF-8") from None


def _values(path: Path, text: str, faults: list[str]) -> list[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except RecursionError:
            faults.append(f"{path}: not JSON that can be read: nested too deeply")
        except ValueError as error:
            faults.append(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}")
        return []
    values = []
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                values.append((line, json.loads(content)))
            except RecursionError:
                faults.append(f"{path}, line {line}: nested too deeply")
            except ValueError as error:
                faults.append(f"{path}, line {line}: not JSON: {getattr(error, 'msg', error)} (column {getattr(error, 'colno', 1)})")
    return values


def _messages(value: Any) -> tuple[Message, ...]:
    """A row in any of the known forms, as messages. Raises ValueError with what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object, not {type(value).__name__}")
    if "messages" in value:
        messages = value["messages"]
    elif "conversations" in value:  # ShareGPT
        names = {"human": "user", "gpt": "assistant"}
        turns = value["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("`conversations` is not a list of objects")
        messages = [{"role": names.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")} for turn in turns]
    elif "prompt" in value and "completion" in value:
        messages = [{"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["completion"]}]
    elif "instruction" in value and "output" in value:  # Alpaca
        parts = [part for part in (value["instruction"], value.get("input")) if part]
        asked = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": value["output"]}]
    else:
        raise ValueError(f"no known form (keys: {', '.join(map(str, value)) or 'none'})")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"message {number} has role {reprlib.repr(role)}; roles are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has no text")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise ValueError(f"message {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"no answer: the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    if not messages[-1]["content"].strip():
        raise ValueError("no answer: the last message is empty")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no question: a user message is missing")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def split_validation(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows; at least one row stays on each side. Raises DataError for fewer than two rows."""
    import random

    if len(rows) < 2:
        raise DataError("One row cannot be split into training and validation.", "add rows, or name a file in data.validation")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    held = set(order[:count])
    return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]


def only_held_out(training: Sequence[Row], validation: Sequence[Row], kind: Callable[[str], str]) -> list[Row]:
    """A validation row of each kind of answer that no training row has, where kinds are few: on average two rows each or more.

    `kind` is the part of an answer that counts. Nothing where most differ, as in free text.
    """
    taught = {kind(row.answer) for row in training}
    kinds = {kind(row.answer): row for row in reversed(validation)}
    if 2 * len(taught | kinds.keys()) > len(training) + len(validation):
        return []
    return sorted((row for name, row in kinds.items() if name not in taught), key=lambda row: row.line)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool) -> str:
    """The model's own chat template over `messages`; with `ask` it ends where the assistant begins."""
    if not tokenizer.chat_template:
        raise ModelError(
            "The tokenizer has no chat template.", "use the instruction-tuned variant of the model (often named -Instruct or -it)"
        )
    try:
        return sandbox.render_chat(tokenizer, messages, ask=ask)
    except sandbox.TemplateFault as fault:
        hint = "leave that role out of the data" if fault.refuses else "take it again from the model's page, or give the model another"
        raise ModelError(f"The model's chat template, over {roles_text(messages)}, {fault}.", hint) from None


def roles_text(messages: Sequence[Message]) -> str:
    """Who speaks in which order, for a person to read: `system → user`."""
    return " → ".join(message["role"] for message in messages)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered prompt; the template has written every special token already, so none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def pieces(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[tuple[str, bool]]:
    """A rendered row cut into (text, learnt): prompts, and what the assistant says up to and including its end of turn.

    A turn is what the template adds after the prompt that ends in it, up to the first special token behind its text; where
    there is none, up to where the row goes on. What follows the last turn teaches nothing and is left out. Raises
    DataError where the template does not render a prompt as the beginning of the whole.
    """
    whole = render(tokenizer, row.messages, ask=False)
    cut_up: list[tuple[str, bool]] = []
    cursor = 0
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant":
            prompt = render(tokenizer, row.messages[:number], ask=True)
            if not whole.startswith(prompt):
                raise DataError(f"line {row.line}: the chat template renders the prompt differently once the answer is there.")
            said = message["content"].strip()
            at = whole.find(said, len(prompt))
            end = answer_end(tokenizer, whole, at + len(said) if at >= 0 else len(prompt))
            if end is None:
                alone = render(tokenizer, row.messages[: number + 1], ask=False)
                end = next((n for n, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(len(whole), len(alone)))
            cut_up += [(whole[cursor : len(prompt)], False), (whole[len(prompt) : end], True)]
            cursor = end
    return cut_up


def answer_end(tokenizer: PreTrainedTokenizerBase, text: str, after: int) -> int | None:
    """Where in a rendered text the first special token that begins at `after` or later ends; None where there is none."""
    pattern = special_tokens(tokenizer)
    found = pattern.search(text, after) if pattern else None
    return found.end() if found else None


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any special token, the longest first."""
    texts = {str(token) for token in tokenizer.all_special_tokens}
    texts |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = {text for text in texts if text.strip()}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None


def tokenise(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """Token ids and labels of a row: each assistant turn is learnt up to and including its end-of-turn token.

    Each piece is tokenised by itself, so that the tokens before an answer are those of the prompt at inference.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces(tokenizer, row):
        ids = token_ids(tokenizer, text)
        input_ids += ids
        labels += ids if learnt else [IGNORED] * len(ids)
    return Example(input_ids, labels)


def before_answer(tokenizer: PreTrainedTokenizerBase, row: Row, number: int) -> tuple[list[int], str]:
    """What training saw of a row before the answer that is its message `number`, in ids, and that answer as it was learnt."""
    seen: list[int] = []
    answers = sum(message["role"] == "assistant" for message in row.messages[:number])
    for text, learnt in pieces(tokenizer, row):
        if learnt and not answers:
            return seen, text
        answers -= learnt
        seen += token_ids(tokenizer, text)
    raise IndexError(number)


def count_tokens(examples: Sequence[Example], max_length: int) -> TokenCounts:
    """Statistics of the rows' lengths."""
    lengths = sorted(len(example.input_ids) for example in examples)
    return TokenCounts(
        rows=len(lengths),
        total=sum(lengths),
        median=lengths[len(lengths) // 2],
        p95=lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
        p99=lengths[min(len(lengths) - 1, int(len(lengths) * 0.99))],
        longest=lengths[-1],
        cut=sum(length > max_length for length in lengths),
        dropped=len(examples) - len(cut(examples, max_length)),
    )


@dataclass(frozen=True)
class Batching:
    """Tokens that an epoch computes, padding included, by how rows are put together. Rows are counted as they are trained, cut."""

    batch: int
    tokens: int  # of the rows themselves
    random_tokens: int  # batches in random order, each padded to its longest row
    grouped_tokens: int  # rows of like length together, as ftkit trains
    packed_tokens: int  # rows joined into rows of max_length, as a packing trainer would
    grouped_batch_tokens: tuple[int, ...]  # of each grouped batch


def batching(lengths: Sequence[int], batch: int, effective_batch: int, max_length: int, seed: int) -> Batching:
    """What padding costs at this batch size, of micro-batches that make up `effective_batch` rows a step.

    Packing is best fit, longest first.
    """
    import random
    from bisect import bisect_left, insort

    order = list(lengths)
    random.Random(seed).shuffle(order)
    free: list[int] = []  # room left in each packed row, sorted
    rows = 0
    for length in sorted(lengths, reverse=True):
        index = bisect_left(free, length)
        if index < len(free):
            insort(free, free.pop(index) - length)
        else:
            rows += 1
            insort(free, max_length - length)
    grouped = grouped_batch_tokens(lengths, batch, effective_batch, seed)
    return Batching(batch, sum(lengths), sum(padded_tokens(order, batch)), sum(grouped), rows * max_length, tuple(grouped))


def grouped_batch_tokens(lengths: Sequence[int], batch: int, effective_batch: int, seed: int) -> list[int]:
    """Tokens of each micro-batch of an epoch, padding included, as the trainer puts rows of like length together.

    Its sampler groups by the rows of a whole optimizer step, not of a micro-batch, so that the next micro-batch of a step
    goes on where the last ended. The order is that of the first epoch; training shuffles anew each epoch.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(lengths, effective_batch, generator=torch.Generator().manual_seed(seed))
    return padded_tokens([lengths[index] for index in order], batch)


def padded_tokens(lengths: Sequence[int], batch: int) -> list[int]:
    """Tokens of each `batch` rows in this order, padded to their longest."""
    return [max(part) * len(part) for part in (lengths[start : start + batch] for start in range(0, len(lengths), batch))]


def asked_together(longest_tokens: int) -> int:
    """How many questions are asked at once: at most 32, and about 8192 tokens, prompt and answer together."""
    return max(1, min(32, 8192 // longest_tokens))


def cut(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Rows cut at `max_length` tokens; those whose answer lies wholly beyond it are dropped."""
    kept = [Example(e.input_ids[:max_length], e.labels[:max_length]) for e in examples]
    return [example for example in kept if any(label != IGNORED for label in example.labels)]


def refuse_nothing_to_learn(training: Sequence[Example], validation: Sequence[Example]) -> None:
    """Raise DataError where, once rows are cut, none is left to train on or to validate with."""
    if not training or not validation:
        which = "training" if not training else "validation"
        raise DataError(f"No {which} row has an answer within training.max_length.", "raise it: --set training.max_length=2048")

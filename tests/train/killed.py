"""A training that is killed again and again, in processes forked from one that has imported torch and trains nothing itself."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import tiny
import torch
import transformers  # noqa: F401
import trl  # noqa: F401
from conftest import conversations

from ftkit.data.mask import tokenise
from ftkit.data.rows import Row
from ftkit.engines import hf
from ftkit.files import file_fingerprint
from ftkit.progress import SilentReporter
from ftkit.train.training import train

KILLS = 20
PACKED = replace(tiny.SETTINGS, longest_tokens=128, most_learnt_tokens=128, packing=True)
# Where a checkpoint is written, moved or removed: (audit event, what its arguments name).
MOMENTS = [
    ("os.mkdir", "checkpoint-"), ("open", "adapter_config.json"), ("open", "tokenizer_config.json"), ("open", "trainer_state.json"),
    ("shutil.rmtree", "checkpoint-"), ("os.remove", "optimizer.pt"), ("open", "watched.json"), ("os.rename", "watched.json"),
    ("os.mkdir", "adapter"), ("open", "curve.json"),
]  # fmt: skip


class Packs(SilentReporter):
    def warn(self, text: str) -> None:
        assert "rows are not packed" not in text, text


def trained(model: Path, folder: Path, packing: bool, before: Callable[[], None] = lambda: None) -> None:
    """Eight steps, each with a checkpoint, of which two are evaluated in an epoch of five."""
    torch.set_num_threads(1)
    tokenizer = hf.load_tokenizer(model)
    rows = list(tokenise(tokenizer, [Row(tuple(row["messages"]), n) for n, row in enumerate(conversations(), 1)]))
    recipe = tiny.recipe(model, method="lora", max_steps=8, evaluations_per_epoch=2, save_minutes=1e-6, early_stopping_patience=2)
    before()
    train(recipe, PACKED if packing else tiny.SETTINGS, model, tokenizer, rows[2:], rows[:2], folder, Packs())


def killed_at(event: str, name: str) -> None:
    """Have this process killed in the middle of what the event tells, when it comes to it for the second time."""
    seen = []

    def look(found: str, arguments: tuple[Any, ...]) -> None:
        if found == event and any(name in str(argument) for argument in arguments):
            seen.append(found)
            if len(seen) == 2 or (len(seen) == 1 and name in ("adapter", "curve.json")):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def forked(work: Callable[[], None], seconds: float | None = None) -> int:
    """What became of a process that does this: 0, or the signal that ended it. With `seconds` it is killed after them."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, seed: int, packing: bool) -> None:
    draw = random.Random(seed)  # noqa: S311
    model = folder / "model"
    assert forked(lambda: tiny.make_model(model) and None) == 0
    (folder / "whole").mkdir()
    began = time.monotonic()
    assert forked(lambda: trained(model, folder / "whole", packing)) == 0
    whole_seconds = time.monotonic() - began
    (folder / "killed").mkdir()
    ends, reached = [], []
    moments = draw.sample(MOMENTS, len(MOMENTS))
    while len(ends) < KILLS:
        moment = moments.pop() if moments and len(ends) % 2 else None
        seconds = None if moment else draw.uniform(0.2, 0.8) * whole_seconds
        code = forked(lambda at=moment: trained(model, folder / "killed", packing, lambda: killed_at(*at) if at else None), seconds)  # type: ignore[misc]
        if code == -signal.SIGKILL:
            ends.append(" ".join(moment) if moment else f"{seconds:.2f} s")
        else:
            assert code == 0, code
        checkpoints = (folder / "killed" / "checkpoints").glob("checkpoint-*")
        reached.append(max((int(path.name[11:]) for path in checkpoints), default=0))
        if reached[-1] == 8:  # from the beginning again, so that each part of a training is hit
            done = folder / f"done-{len(reached)}"
            (folder / "killed").rename(done)
            assert forked(lambda done=done: trained(model, done, packing)) == 0  # type: ignore[misc]
            (folder / "killed").mkdir()
    assert forked(lambda: trained(model, folder / "killed", packing)) == 0
    adapters = [path / "adapter" / "adapter_model.safetensors" for path in (*folder.glob("done-*"), folder / "killed")]
    print(
        json.dumps(
            {
                "ends": ends, "reached": reached, "whole_seconds": whole_seconds,
                "whole": file_fingerprint(folder / "whole" / "adapter" / "adapter_model.safetensors"),
                "killed": [file_fingerprint(path) for path in adapters],
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "packing" in sys.argv[3:])

"""Seconds a step and peak memory of closing a GGUF, its weights dequantised whole or packed; and what is planned for it.

    python benchmarks/closing.py FILE.gguf MODEL [--way mapped] [--tokens 128] [--places 128] [--steps 1]

MODEL is the folder that the file was converted from. Rows are random tokens, and what the file says of them is learnt. One way a process.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from pathlib import Path

from ftkit.close.closing import OUTSIDE_ROWS_A_STEP, ROWS_A_STEP, Lesson, close, distribution, to_train
from ftkit.close.student import load_student, lossless, scales, ways_of
from ftkit.engines import logits
from ftkit.engines.logits import Forced
from ftkit.line.lessons import BASE_WEIGHT
from ftkit.machine import device
from ftkit.model.source import open_gguf
from ftkit.plan.dtype import best_dtype


class Peaks:
    """The most that this process held, looked at a hundred times a second: of its own (RssAnon), and with pages of files (VmRSS)."""

    def __init__(self) -> None:
        self.bytes = {"RssAnon": 0, "VmRSS": 0}
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
            for name in self.bytes:
                self.bytes[name] = max(self.bytes[name], int(said[name].split()[0]) << 10)
            time.sleep(0.01)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--way", default="mapped", choices=["dequantised", "packed", "mapped"])
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    parser.add_argument("--places", type=int, default=128, help="of each row that are looked at, the last")
    parser.add_argument("--steps", type=int, default=1)
    asked = parser.parse_args()
    cuda, bfloat16 = torch.cuda.is_available(), best_dtype(device.choose()) == "bfloat16"
    vocabulary = next(int(tensor.shape[-1]) for tensor in open_gguf(asked.file).tensors if tensor.name == "token_embd.weight")
    drawn = random.Random(0)  # noqa: S311
    rows = [
        Forced([drawn.randrange(vocabulary) for _ in range(asked.tokens)], list(range(max(1, asked.tokens - asked.places), asked.tokens)))
        for _ in range(ROWS_A_STEP + OUTSIDE_ROWS_A_STEP)
    ]
    peaks = Peaks()
    lessons = [Lesson(row, distribution(found)) for row, found in zip(rows, logits.of_file(asked.file, rows), strict=True)]
    begun, before = time.monotonic(), dict(peaks.bytes)
    student = load_student(asked.file, asked.model, asked.way, bfloat16=bfloat16, cuda=cuda)
    loaded, after_loading = time.monotonic(), dict(peaks.bytes)
    vectors, stretched = lossless(student, asked.file), scales(student, asked.file)
    worked = time.process_time()
    learning = to_train(vectors, stretched)
    close(student, learning, lessons[:ROWS_A_STEP], lessons[ROWS_A_STEP:], asked.steps, lambda: 0.0, 1.0, outside_weight=BASE_WEIGHT)
    seconds = (time.monotonic() - loaded) / asked.steps
    planned = next(way for way in ways_of(asked.file, rows, bfloat16=bfloat16, cuda=cuda) if way.name == asked.way)
    told = {
        "way": asked.way,
        "planned_ram_bytes": planned.ram_bytes,
        "planned_vram_bytes": planned.device_bytes,
        "format": "bfloat16" if bfloat16 else "float32",
        "vectors": len(vectors),
        "scales": sum(one.stretch.numel() for one in stretched),
        "loading_seconds": round(loaded - begun, 1),
        "seconds_a_step": round(seconds, 2),
        "processor_seconds_a_step": round((time.process_time() - worked) / asked.steps, 2),
        "peak_bytes_before": before,
        "peak_bytes_loaded": after_loading,
        "peak_bytes": peaks.bytes,
        "peak_vram_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
    }
    print(json.dumps(told, indent=1))


main()

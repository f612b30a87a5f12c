"""`python -m ftkit`."""

from ftkit.cli import main

main(prog_name="ftkit")

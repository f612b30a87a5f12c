"""llama.cpp in this process."""

from __future__ import annotations

import subprocess
import sys

import pytest

LET_GO_AT_ONCE = """
import os
from ftkit.engines import llamacpp
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
for _ in range(30):
    with llamacpp.rendering("{{ messages[0].content }}", "", ""):
        pass
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are bound to one core")
def test_an_engine_that_is_let_go_at_once_ends() -> None:
    """On one core its main loop seldom begins before the end."""
    subprocess.run([sys.executable, "-c", LET_GO_AT_ONCE], check=True, timeout=60)

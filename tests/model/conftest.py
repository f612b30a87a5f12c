"""The real client of the hub, pointed to a hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Client, Hub, running


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Set constants of huggingface_hub, which are the environment's as it was at the import; an empty cache to begin with, and no token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    def set_constants(**values: Any) -> None:
        if "ENDPOINT" in values:
            values["HUGGINGFACE_CO_URL_TEMPLATE"] = values["ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    set_constants(HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(home / "hub"), HF_TOKEN_PATH=str(home / "token"))
    set_constants(HF_HUB_DISABLE_TELEMETRY=True)  # once a day it asks for a list to describe itself with
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # it waits before it tries again
    yield set_constants
    _http.close_session()


@pytest.fixture
def hub(client: Client) -> Iterator[Hub]:
    """A hub that the client is pointed to."""
    with running() as started:
        client(ENDPOINT=started.endpoint)
        yield started

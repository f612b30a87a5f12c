"""The table of replaced names: they are there, come back, and one that is gone is an error."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest

from ftkit import patches
from ftkit.errors import ToolFailedError


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: f"{patch.module}.{patch.name}")
def test_a_replaced_name_comes_back(patch: patches.Patch) -> None:
    place = importlib.import_module(patch.module)
    before = getattr(place, patch.name)
    with patches.applied(patch.when, to=patches.Traced(attention=test_a_replaced_name_comes_back, padded=True)):
        assert getattr(place, patch.name) is not before
    assert getattr(place, patch.name) is before


def test_a_name_that_is_gone_is_an_error_that_names_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(replace(patch, name="gone") if patch.name == "_addmm_fp32" else patch for patch in patches.PATCHES)
    monkeypatch.setattr(patches, "PATCHES", rows)
    from torch.nn import functional

    dropout = functional.dropout
    gone = r"trl [\d.]+ has no trl.kernels.chunked_logprob.gone any more"
    with pytest.raises(ToolFailedError, match=gone) as caught, patches.applied("tracing for CUDA", to=patches.Traced(None, padded=False)):
        pass
    assert caught.value.hint == "pip install 'trl==1.16.0'"
    assert functional.dropout is dropout


@pytest.mark.parametrize("inside", patches.INSIDES, ids=lambda inside: f"{inside.owner}.{inside.name}")
def test_a_method_that_is_gone_is_an_error_before_the_work(inside: patches.Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = getattr(importlib.import_module(inside.module), inside.owner)
    monkeypatch.delattr(owner, inside.name)
    gone = rf"{inside.package} [\d.]+ has no {inside.module}.{inside.owner}.{inside.name} any more, which ftkit uses"
    with pytest.raises(ToolFailedError, match=gone) as caught, patches.applied(inside.when):
        pass
    assert caught.value.hint == f"pip install '{inside.package}=={inside.tried}'"


def test_the_versions_that_were_tried_are_those_of_the_lock() -> None:
    from importlib.metadata import version

    rows = (*patches.PATCHES, *patches.INSIDES)
    assert {(row.package, row.tried) for row in rows} == {
        (package, version(package).partition("+")[0]) for package in {row.package for row in rows}
    }


def test_the_stand_in_for_the_trainer_goes_again() -> None:
    name = "trl.trainer.utils"
    there = sys.modules.get(name)
    with patches.without_trainer():
        assert name in sys.modules
    assert sys.modules.get(name) is there

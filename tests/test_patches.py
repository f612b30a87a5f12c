"""The table of replaced names: they are there, come back, and one that is gone is an error."""

from __future__ import annotations

import functools
import importlib
import re
import sys
import tomllib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from ftkit import patches
from ftkit.errors import ToolFailedError
from ftkit.memory.fake import quantization_tensors

ROWS = (*patches.PATCHES, *patches.INSIDES)


def full_name(row: patches.Patch | patches.Inside) -> str:
    return f"{row.module}.{row.name}"


@pytest.mark.parametrize("patch", patches.PATCHES, ids=full_name)
def test_a_replaced_name_comes_back(patch: patches.Patch) -> None:
    *path, name = patch.name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(patch.module))
    before = getattr(owner, name)
    with patches.applied(patch.when, to=patches.Traced(attention=test_a_replaced_name_comes_back, padded=True)):
        assert getattr(owner, name) is not before
    assert getattr(owner, name) is before


@pytest.mark.parametrize("gone", ["name", "module", "owner"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.when not in patches.IN_OBJECTS], ids=full_name)
def test_a_name_that_is_gone_is_an_error_that_names_the_library(
    row: patches.Patch | patches.Inside, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, name = row.name.rpartition(".")
    wrong = {"name": {"name": f"{row.name}_gone"}, "module": {"module": f"{row.module}.gone"}, "owner": {"name": f"{owner}gone.{name}"}}
    other: Any = replace(row, **wrong[gone])
    patches.require(row.when)
    table = "PATCHES" if isinstance(row, patches.Patch) else "INSIDES"
    monkeypatch.setattr(patches, table, tuple(other if one is row else one for one in getattr(patches, table)))
    said = rf"{row.package} [\d.]+ has no {re.escape(full_name(other))} any more, which ftkit \w+ while {row.when}"
    from torch.nn import functional

    dropout = functional.dropout
    with pytest.raises(ToolFailedError, match=said) as caught, patches.applied(row.when, to=patches.Traced(None, padded=False)):
        pass
    assert caught.value.hint == f"pip install '{row.package}=={row.tried}'"
    assert functional.dropout is dropout


def test_what_objects_have_is_looked_for_in_them() -> None:
    import ollama
    import torch
    from bitsandbytes.nn import Linear4bit

    from ftkit.engines.ollama import http

    with ollama.Client("http://127.0.0.1:1") as client:
        assert str(http(client).base_url) == "http://127.0.0.1:1"
    with pytest.raises(ToolFailedError, match=r"ollama [\d.]+ has no ollama.Client._client any more"):
        http(cast(Any, object()))
    layer = Linear4bit(64, 64)
    assert patches.inside("reading 4-bit weights", layer.weight, "quant_state") is None  # nothing was loaded
    layer.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ToolFailedError, match=r"bitsandbytes [\d.]+ has no bitsandbytes.nn.Params4bit.quant_state any more"):
        list(quantization_tensors(layer))


def test_what_is_patched_has_an_upper_bound_just_above_what_was_tried() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {each.name: each for each in map(Requirement, (*project["dependencies"], *project["optional-dependencies"]["train"]))}
    for package, tried in {(row.package, row.tried) for row in ROWS}:
        major, minor = map(int, tried.split(".")[:2])
        assert tried in named[package].specifier
        assert f"{major}.{minor + 1}" not in named[package].specifier, package


def test_the_versions_that_were_tried_are_those_of_the_lock() -> None:
    from importlib.metadata import version

    assert {(row.package, row.tried) for row in ROWS} == {
        (package, version(package).partition("+")[0]) for package in {row.package for row in ROWS}
    }


def test_the_stand_in_for_the_trainer_goes_again() -> None:
    name = "trl.trainer.utils"
    there = sys.modules.get(name)
    with patches.without_trainer():
        assert name in sys.modules
    assert sys.modules.get(name) is there


def test_a_resumed_paged_optimizer_pages_its_states_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from bitsandbytes.optim import PagedAdamW32bit
    from bitsandbytes.optim.optimizer import Optimizer8bit

    def buffer(optimizer: Any, parameter: Any, dtype: Any) -> Any:  # in place of the GPU's managed memory
        made = torch.zeros(parameter.shape, dtype=dtype)
        made.is_paged = parameter.numel() >= 1e5
        return made

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", buffer)

    def optimizer() -> tuple[Any, list[Any]]:
        parameters = [torch.nn.Parameter(torch.ones(400, 300)), torch.nn.Parameter(torch.ones(8))]
        return PagedAdamW32bit(parameters), parameters

    (first, parameters), (second, others) = optimizer(), optimizer()
    for parameter in parameters:
        first.state[parameter] = {"step": 3, "state1": torch.rand_like(parameter), "state2": torch.rand_like(parameter)}
    with patches.applied("training"):
        second.load_state_dict(first.state_dict())
    for parameter, other in zip(parameters, others, strict=True):
        assert second.state[other]["step"] == 3
        for name in ("state1", "state2"):
            assert torch.equal(second.state[other][name], first.state[parameter][name])
            assert second.state[other][name].is_paged == (parameter.numel() >= 1e5)


@pytest.mark.parametrize(
    ("capability", "dtype", "autocast", "grouped"),
    [
        ((7, 5), "float16", False, False),
        ((8, 6), "bfloat16", False, True),
        ((8, 6), "float32", False, False),
        ((8, 6), "float32", True, True),  # as with weights of float32, whose keys are so too
        ((7, 5), "float32", True, False),
        (None, "float32", False, True),
    ],
)
def test_attention_is_given_groups_where_a_kernel_takes_them(
    capability: tuple[int, int] | None, dtype: str, autocast: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor (None) transformers decides, as elsewhere without a mask: for groups."""
    import torch
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    key = SimpleNamespace(is_cuda=bool(capability), device="cuda:0", dtype=getattr(torch, dtype), shape=(1, 2, 8, 64))
    with patches.applied("training"):
        assert sdpa_attention.use_gqa_in_sdpa(None, key, key) == grouped
        assert not sdpa_attention.use_gqa_in_sdpa(object(), key, key)

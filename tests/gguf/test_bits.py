"""Which tensors get more bits: those that gain most for a byte, as long as there is room, each of a type that its rows take."""

from __future__ import annotations

import pytest

from ftkit.gguf.bits import FINER, Tensor, at_random, finer_types, type_file, worth_most
from ftkit.gguf.types import block


def test_what_gains_most_for_a_byte_comes_first() -> None:
    gains = {"a": 4.0, "b": 3.0, "c": 2.0, "worse": -1.0}
    more = {"a": 400, "b": 100, "c": 100, "worse": 1}
    assert worth_most(gains, more, 600) == ["b", "c", "a"]
    assert worth_most(gains, more, 500) == ["b", "c"]  # and then no room for a
    assert worth_most(gains, more, 400) == ["b", "c"]
    assert worth_most(gains, more, 99) == []
    assert worth_most({"worse": -1.0}, more, 600) == []


def test_what_a_choice_is_held_against_is_drawn_once_and_has_room() -> None:
    more = {f"blk.{n}.{kind}": size for n in range(32) for kind, size in (("attn", 10), ("ffn", 30))}
    drawn = at_random(more, 200)
    assert drawn == at_random(dict(reversed(more.items())), 200)
    assert 180 <= sum(more[name] for name in drawn) <= 200
    assert len({name.split(".")[1] for name in drawn}) > 4  # not one end of the file
    assert at_random(more, 9) == []


@pytest.mark.parametrize("kind", FINER)
def test_a_finer_type_has_more_bits_and_fits_the_row(kind: str) -> None:
    elements, size = block(kind)
    for row in (256, 288):
        if row % elements == 0:
            (finer,) = finer_types({"t": Tensor(kind, row // elements * size, row)}).values()
            more, bytes_of_a_block = block(finer)
            assert row % more == 0
            assert row // more * bytes_of_a_block > row // elements * size


def test_what_has_all_its_bits_gets_no_more() -> None:
    assert finer_types({name: Tensor(name, 1, 256) for name in ("F32", "F16", "BF16", "Q8_0")}) == {}


def test_a_line_fits_one_tensor_alone() -> None:
    assert type_file({"blk.1.attn_q.weight": "Q6_K", "output.weight": "Q8_0"}) == (
        "^blk\\.1\\.attn_q\\.weight$=Q6_K\n^output\\.weight$=Q8_0\n"
    )

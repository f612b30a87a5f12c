"""Each quantised tensor of a file is found among the model's weights by its numbers, whatever the converter did to its name and rows."""

from __future__ import annotations

from typing import Any

import pytest

from ftkit.close.packed import Blocks, PackedWeight
from ftkit.close.places import Place, places

pytestmark = pytest.mark.torch
COLUMNS = 64


def weight(*shape: int, seed: int = 0) -> Any:
    import torch

    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(seed))


def blocks(name: str, numbers: Any) -> Blocks:
    """In Q4_0, as a file has them."""
    import gguf
    import torch

    kind = gguf.GGMLQuantizationType.Q4_0
    return Blocks(torch.from_numpy(gguf.quantize(numbers.numpy(), kind)), int(kind), name)


def found(parameters: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Place], dict[str, Any]]:
    """The places, and the parameters as the file has them, computed with packed."""
    import torch

    packed, parts = {name: blocks(name, numbers) for name, numbers in tensors.items()}, dict[str, list[tuple[Blocks, Place]]]()
    placed, filled = places(parameters, packed, None), {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for name, place in placed.items():
        parts.setdefault(place.parameter, []).append((packed[name], place))
    for name, there in parts.items():
        whole, experts = PackedWeight(there, torch.device("cpu"), torch.float32), filled[name].ndim > 2
        for n, weight in enumerate(filled[name] if experts else [filled[name]]):
            part, turned = whole.expert(n) if experts else whole, there[0][1].turned
            for which, rows in part.in_turn():
                (weight.T if turned else weight)[which] = rows
            if len(there) == 1 and not turned:
                assert torch.equal(part.look_up(torch.arange(len(weight))), weight)
            given = torch.randn(3, weight.shape[turned - 1], generator=torch.Generator().manual_seed(5))
            assert torch.allclose(torch.nn.functional.linear(given, part), given @ (weight if turned else weight.T), atol=1e-4)
    return placed, filled


def near(one: Any, other: Any) -> bool:
    return float((one - other).abs().max()) <= 0.2 * float(other.abs().max())


def test_of_weights_of_one_shape_each_is_found_under_another_name() -> None:
    parameters = {f"model.layers.{n}.{name}.weight": weight(8, seed=10 * n + m) for n in (0, 1) for m, name in enumerate("abc")}
    parameters["model.embed_tokens.weight"] = weight(8, seed=99)
    tensors = {
        f"blk.{n}.{other}.weight": parameters[f"model.layers.{n}.{name}.weight"]
        for n in (1, 0)
        for name, other in zip("cab", "xyz", strict=True)
    }
    placed, filled = found(parameters, {**tensors, "token_embd.weight": parameters["model.embed_tokens.weight"]})
    assert placed["blk.1.x.weight"] == Place("model.layers.1.c.weight")
    assert all(near(filled[name], parameter) for name, parameter in parameters.items())


def test_rows_in_another_order_are_put_back() -> None:
    import torch

    whole, order = weight(48), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    placed, filled = found({"layers.0.q.weight": whole}, {"blk.0.attn_q.weight": whole[order]})
    assert (placed["blk.0.attn_q.weight"].rows == order).all()
    assert near(filled["layers.0.q.weight"], whole)


def test_one_weight_of_several_tensors_whose_rows_lie_among_each_other() -> None:
    whole = weight(48)
    _, filled = found({"layers.0.qkvz.weight": whole}, {"blk.0.attn_qkv.weight": whole[0::2], "blk.0.attn_gate.weight": whole[1::2]})
    assert near(filled["layers.0.qkvz.weight"], whole)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_are_joined_and_turned(turned: bool) -> None:
    import torch

    gate, up = weight(3, 16, seed=1), weight(3, 16, seed=2)
    whole = torch.cat([gate, up], 1)
    parameters = {"layers.0.experts.gate_up_proj": whole.transpose(1, 2).contiguous() if turned else whole}
    placed, filled = found(parameters, {"blk.0.ffn_up_exps.weight": up, "blk.0.ffn_gate_exps.weight": gate})
    assert {place.turned for place in placed.values()} == {turned}
    assert near(filled["layers.0.experts.gate_up_proj"], parameters["layers.0.experts.gate_up_proj"])


def test_columns_in_another_order_are_put_back() -> None:
    import torch

    whole, order = weight(48), torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    placed, filled = found({"layers.0.out.weight": whole}, {"blk.0.ssm_out.weight": whole[:, order].contiguous()})
    assert (placed["blk.0.ssm_out.weight"].columns == order).all()
    assert near(filled["layers.0.out.weight"], whole)


@pytest.mark.parametrize("zeros", [[0, 5, 63], list(range(64))])
def test_rows_of_nothing_but_zeros_stay_where_they_are(zeros: list[int]) -> None:
    whole = weight(64)
    whole[zeros] = 0
    placed, _ = found({"embed_tokens.weight": whole}, {"token_embd.weight": whole})
    assert placed == {"token_embd.weight": Place("embed_tokens.weight")}


def test_rows_of_nothing_but_zeros_are_put_where_none_is_when_the_others_change_places() -> None:
    import torch

    whole, order = weight(48), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    whole[[3, 40]] = 0
    _, filled = found({"layers.0.q.weight": whole}, {"blk.0.attn_q.weight": whole[order]})
    assert near(filled["layers.0.q.weight"], whole)


def test_a_multiple_of_a_weight_is_refused() -> None:
    """Falcon-H1's converter writes some, by which its layers multiply again."""
    for name in ("as they stand", "in another order", "columns in another order"):
        whole = 0.39 * weight(16)
        order = {"as they stand": whole, "in another order": whole.flip(0), "columns in another order": whole.flip(1)}[name]
        with pytest.raises(ValueError, match=r"blk\.0\.attn_k\.weight is 0\.39 times the model's weight"):
            found({"layers.0.k.weight": weight(16)}, {"blk.0.attn_k.weight": order})


def test_rows_of_types_of_two_bits_are_known() -> None:
    import torch

    whole = weight(256, seed=4)
    coarse = whole.sign() * (whole.abs() > 0.8)  # three numbers, as TQ2_0 has
    placed, _ = found({"layers.0.v.weight": whole}, {"blk.0.attn_v.weight": coarse})
    assert placed["blk.0.attn_v.weight"] == Place("layers.0.v.weight")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    placed, _ = found({"layers.0.v.weight": whole}, {"blk.0.attn_v.weight": coarse[order]})
    assert (placed["blk.0.attn_v.weight"].rows == order).all()


def test_another_models_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no weight of the model is blk\.0\.attn_q\.weight"):
        found({"layers.0.q.weight": weight(8, seed=1)}, {"blk.0.attn_q.weight": weight(8, seed=2)})


def test_a_weight_of_which_rows_are_missing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.gate_up\.weight has 16 rows, of which the file has 8"):
        found({"layers.0.gate_up.weight": weight(16)}, {"blk.0.ffn_gate.weight": weight(16)[:8]})


def test_rows_that_two_tensors_claim_are_refused() -> None:
    import torch

    half = weight(8)
    with pytest.raises(ValueError, match=r"layers\.0\.gate_up\.weight has 16 rows, of which the file has 8"):
        found({"layers.0.gate_up.weight": torch.cat([half, half])}, {"blk.0.ffn_gate.weight": half, "blk.0.ffn_up.weight": half})


def test_a_layer_that_the_model_has_not_is_left_out() -> None:
    placed, _ = found({"layers.0.q.weight": weight(8)}, {"blk.0.attn_q.weight": weight(8), "blk.1.nextn.weight": weight(8, seed=3)})
    assert placed.keys() == {"blk.0.attn_q.weight"}

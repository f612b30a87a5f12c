"""What an adapter does to one weight of the model: each kind of PEFT's layers, as the matrices and rows that are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftkit.errors import ModelError
from ftkit.model.adapter import WITH_PEFT

if TYPE_CHECKING:
    import torch

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Factors:
    """A and B of a weight, as left (experts, rows, r) and right (experts, r, columns): left × right × scaling is added to it.

    DoRA then scales the sum so that each row, or each column, has the length that `magnitude` says.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    of_columns: bool = False

    def of(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of some rows of one expert, which are counted through all of them."""
        rows = self.left.shape[1]
        expert = int(numbers[0]) // rows
        return self.left[expert][numbers % rows].float(), self.right[expert].float()


@dataclass(frozen=True)
class Change:
    """In this order: another weight instead of the source's, factors, rows instead of its own. None of them: the weight stays."""

    instead: torch.Tensor | None = None
    copied: bool = False  # whether that is the weight as PEFT had it, in its format: a row that only was rounded to it is the source's
    factors: Factors | None = None
    tokens: torch.Tensor | None = None  # numbers of the rows that were trained
    trained: torch.Tensor | None = None  # (tokens, columns)

    def __eq__(self, other: object) -> bool:
        """Whether both make the same of a weight."""
        import torch

        def parts(change: Change) -> tuple[Any, ...]:
            factors = change.factors
            of_factors = (factors.left, factors.right, factors.scaling, factors.magnitude) if factors else (None,) * 4
            return change.instead, change.tokens, change.trained, *of_factors

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                return not a.is_meta and a.dtype == b.dtype and torch.equal(a, b)  # what is not trained yet will not become the same
            return a is b or (isinstance(a, float) and a == b)

        return isinstance(other, Change) and all(map(same, parts(self), parts(other)))

    __hash__ = None  # type: ignore[assignment]


def _linear(module: Any, held: Mapping[str, torch.Tensor]) -> Factors:
    a, b = held["lora_A.weight"], held["lora_B.weight"]
    left, right = (a.T, b.T) if module.fan_in_fan_out else (b, a)  # Conv1D keeps (in, out)
    return Factors(left[None], right[None], module.scaling["default"], held.get(MAGNITUDE), of_columns=module.fan_in_fan_out)


def _embedding(module: Any, held: Mapping[str, torch.Tensor]) -> Factors:
    a, b = held["lora_embedding_A"], held["lora_embedding_B"]
    return Factors(a.T[None], b.T[None], module.scaling["default"], held.get(MAGNITUDE), of_columns=True)


def _parameter(module: Any, held: Mapping[str, torch.Tensor]) -> Factors:
    """Of a bare parameter: a matrix, or experts in one tensor, (experts, out, in) or, where the layer says so, (experts, in, out)."""
    scaling = module.scaling["default"]
    a, b = held["lora_A.weight"], held["lora_B.weight"]
    if module.get_param().dim() == 2:
        return Factors(b[None], a[None], scaling)
    a = a.reshape(module.num_experts, -1, a.shape[-1])  # (experts, r, in)
    b = b.reshape(b.shape[0], -1, module.num_experts).permute(2, 0, 1)  # (experts, out, r)
    return Factors(b, a, scaling) if module._did_swap_in_out_features else Factors(a.transpose(1, 2), b.transpose(1, 2), scaling)


# PEFT's layers, by class name, each as its `get_delta_weight` multiplies (peft/tuners/lora/layer.py, 0.21).
KINDS: dict[str, Callable[[Any, Mapping[str, torch.Tensor]], Factors]] = {
    "Linear": _linear,
    "Embedding": _embedding,
    "ParamWrapper": _parameter,
}


def factors_of(module: Any, held: Mapping[str, torch.Tensor]) -> Factors:
    """What one of PEFT's layers adds, made of its tensors by their names in it. Raises ModelError for another kind of layer."""
    kind = type(module).__name__
    if kind not in KINDS:
        raise ModelError(f"The adapter has a {kind} layer, which this merge does not do.", WITH_PEFT)
    return KINDS[kind](module, held)


def turned(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r × experts, in) and B (out, r × experts) of fused experts with in and out changed over; the product is the same, transposed."""
    each, rank = (experts, -1), (-1, experts)
    turned_a = b.reshape(b.shape[0], *rank).permute(2, 1, 0).reshape(-1, b.shape[0])
    turned_b = a.reshape(*each, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
    return turned_a.contiguous(), turned_b.contiguous()

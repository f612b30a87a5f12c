"""One layer for query, key and value, as LitGPT has it: for reproducing measurements of its training loop."""

from __future__ import annotations

from typing import Any


def fuse(attention: Any, dropout: float) -> None:
    """Put one layer with one adapter in place of `q_proj`, `k_proj` and `v_proj`, on the meta device.

    As litgpt 0.5.13's LoRAQKVLinear: dropout once, one A for all adapted parts, and their result padded with zeros to the
    width of all three by `index_copy`, whose source autograd keeps. Query, key and value are views of one output, so that
    each keeps it alive. Layers whose projections have other names, or carry no adapter, are left as they are.
    """
    import torch
    from torch.nn import functional

    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    adapted = [n for n, part in enumerate(parts) if hasattr(part, "lora_A")]
    if None in parts or not adapted:
        return
    sizes = [part.out_features for part in parts if part is not None]
    first: Any = parts[adapted[0]]
    rank, width, dtype = first.lora_A["default"].out_features, first.in_features, first.get_base_layer().weight.dtype
    rows = sum(sizes[n] for n in adapted)

    class Fused(torch.nn.Module):
        rest: list[Any]

        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.weight = torch.nn.Parameter(torch.empty(sum(sizes), width, dtype=dtype), requires_grad=False)
                self.lora_A = torch.nn.Parameter(torch.empty(rank * len(adapted), width))
                self.lora_B = torch.nn.Parameter(torch.empty(rows, rank))
                self.register_buffer("index", torch.empty(rows, dtype=torch.long))

        def forward(self, x: Any) -> Any:
            low = functional.linear(functional.dropout(x, dropout, self.training), self.lora_A).chunk(len(adapted), -1)
            weights = torch.split(self.lora_B, [sizes[n] for n in adapted])
            up = torch.cat([functional.linear(a, b) for a, b in zip(low, weights, strict=True)], -1)
            padded = x.new_zeros(*x.shape[:-1], sum(sizes)).index_copy_(-1, self.index, up)
            query, *self.rest = (functional.linear(x, self.weight) + padded * 0.5).split(sizes, -1)
            return query

    class Next(torch.nn.Module):
        def forward(self, _: Any) -> Any:
            return fused.rest.pop(0)

    fused = Fused()
    attention.q_proj, attention.k_proj, attention.v_proj = fused, Next(), Next()

"""The scales of a quantised file's blocks, by which all other numbers of a block are multiplied: those of a row are trained as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftkit.gguf.types import SCALES

if TYPE_CHECKING:
    import torch


class Scales:
    """Of a linear layer: `stretch` (rows,) in float32, the logarithm of what the scales of each row are multiplied by.

    A row that is stretched gives an output that is, so that the layer's outputs are stretched, and its weight stays as it is.
    """

    def __init__(self, name: str, kind: str, layer: torch.nn.Linear, order: torch.Tensor | None, device: torch.device) -> None:
        """`name`, `kind`: of the tensor; `order`: which rows of the file are the layer's, in its order."""
        import torch

        self.name, self.kind, self.order = name, kind, order
        self.stretch = torch.nn.Parameter(torch.zeros(layer.weight.shape[0], device=device), requires_grad=False)
        layer.register_forward_hook(self._stretched)

    def _stretched(self, layer: torch.nn.Linear, _: Any, found: torch.Tensor) -> torch.Tensor:
        product = found if layer.bias is None else found - layer.bias
        stretched = product * self.stretch.exp()
        return (stretched if layer.bias is None else stretched + layer.bias).to(found.dtype)

    def write(self, data: Any) -> None:
        """Into the tensor's bytes in a file: (rows, bytes of a row)."""
        import gguf
        import numpy as np

        factors = self.stretch.detach().exp().cpu()
        if self.order is not None:
            factors = factors[self.order.argsort()]
        _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        blocks = data.reshape(len(data), -1, size)
        for place in SCALES[self.kind]:
            there = blocks[..., place : place + 2]
            before = there.copy().view(np.float16)[..., 0].astype(np.float32)
            there[:] = (before * factors.numpy()[:, None]).astype(np.float16)[..., None].view(np.uint8)

"""The scales of a quantised file's blocks: 16-bit numbers, by which all others of a block are multiplied. They can be trained, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftkit.gguf.types import SCALES, scaled_together

if TYPE_CHECKING:
    import torch


class Scales:
    """Of a tensor: `stretch` (rows, groups) in float32, the logarithm of what the scales of a group of blocks are multiplied by."""

    def __init__(self, name: str, kind: str, rows: int, columns: int, device: torch.device) -> None:
        import torch

        self.name, self.kind, self.together = name, kind, scaled_together(kind, columns)
        self.stretch = torch.nn.Parameter(torch.zeros(rows, columns // self.together, device=device), requires_grad=False)

    def scaled(self, numbers: torch.Tensor, rows: Any) -> torch.Tensor:
        """Numbers (rows, columns) of some of the tensor's rows, with their scales as they are now."""
        groups = numbers.view(len(numbers), -1, self.together)
        return groups.mul(self.stretch.detach()[rows].exp()[..., None]).view_as(numbers)

    def slope(self, slopes: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """(rows, groups) of `stretch`, from slopes of the numbers that `scaled` gave."""
        return slopes.float().mul_(numbers).view(len(numbers), -1, self.together).sum(-1)

    def write(self, data: Any) -> None:
        """Into the tensor's bytes in a file: (rows, bytes of a row)."""
        import gguf
        import numpy as np

        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        blocks = data.reshape(len(data), -1, size)
        factors = self.stretch.detach().exp().cpu().repeat_interleave(self.together // elements, -1).numpy()
        for place in SCALES[self.kind]:
            there = blocks[..., place : place + 2]
            before = there.copy().view(np.float16)[..., 0].astype(np.float32)
            there[:] = (before * factors).astype(np.float16)[..., None].view(np.uint8)

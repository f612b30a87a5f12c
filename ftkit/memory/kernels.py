"""What a training step allocates on a CUDA GPU and not on a CPU: attention kernels, workspaces, fixed costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftkit.units import MIB

HEAD_TILE_VOCABULARY = 32768  # TRL 1.16: vocabulary entries scored at a time (trl/trainer/utils.py)
# An allowance for what nvidia-smi shows beyond PyTorch's own memory: the CUDA context and loaded kernels. Not a measurement.
CONTEXT_BYTES = 500 * MIB
# cuBLAS takes its workspace from PyTorch's allocator (aten/src/ATen/cuda/CublasHandlePool.cpp): 4096 KiB × 2 + 16 KiB × 8,
# which is 8,519,680 bytes as measured on an A10G; 32 MiB from Hopper on.
CUBLAS_BYTES = 4096 * 2 * 1024 + 16 * 8 * 1024
CUBLAS_HOPPER_BYTES = 32 * MIB
FLASH_MAX_HEAD_DIM = 256
MASK_ALIGNMENT = 16  # entries: the memory-efficient kernel pads a mask's rows to so many


def cublas_bytes(capability: tuple[int, int]) -> int:
    return CUBLAS_HOPPER_BYTES if capability >= (9, 0) else CUBLAS_BYTES


def traced_alike(capability: tuple[int, int]) -> tuple[object, ...]:
    """All of a capability that a step's memory follows from: KERNELS asks for no more."""
    return capability >= (8, 0), capability[0] in (9, 10), cublas_bytes(capability)


@dataclass(frozen=True)
class Heads:
    """What an attention kernel is given: (batch, heads, length, head_dim) each, and a mask or None."""

    query: Any
    key: Any
    value: Any
    mask: Any
    grouped: bool  # fewer heads of keys and values than of queries
    dropout: float
    causal: bool
    scale: float | None
    capability: tuple[int, int]

    @property
    def half(self) -> bool:
        import torch

        return self.query.dtype in (torch.float16, torch.bfloat16)

    @property
    def head_dim(self) -> int:
        return int(self.query.shape[-1])


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention on a GPU."""

    name: str
    takes: Callable[[Heads], bool]
    run: Callable[[Heads], Any]  # on the meta kernel that every build of PyTorch has
    backward: str  # the operator in whose call the workspace is taken and given back
    workspace_bytes: Callable[[Any], int] | None  # from that operator's arguments


def _cudnn(h: Heads) -> Any:
    import torch

    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        h.query, h.key, h.value, h.mask, torch.is_grad_enabled(), h.dropout, h.causal, False, scale=h.scale
    )[0]


def _flash(h: Heads) -> Any:
    import torch
    from torch.nn import functional

    short = -h.head_dim % 8  # the kernel wants a multiple of 8
    padded = [functional.pad(x, (0, short)) if short else x for x in (h.query, h.key, h.value)]
    run = torch.ops.aten._scaled_dot_product_flash_attention
    out = run(*padded, h.dropout, h.causal, False, scale=h.scale or h.head_dim**-0.5)[0]
    return out[..., : h.head_dim] if short else out


def _efficient(h: Heads) -> Any:
    import torch
    from torch.nn import functional

    mask = h.mask
    if mask is not None:
        columns = mask.shape[-1]
        if columns % MASK_ALIGNMENT:
            mask = functional.pad(mask, (0, MASK_ALIGNMENT - columns % MASK_ALIGNMENT))[..., :columns]
        mask = mask.expand(h.query.shape[0], h.query.shape[1], h.query.shape[2], h.key.shape[2])
    wants_gradient = torch.is_grad_enabled() and h.query.requires_grad
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    return run(h.query, h.key, h.value, mask, wants_gradient, h.dropout, h.causal, scale=h.scale)[0]


def _math(h: Heads) -> Any:
    import torch

    key, value = (x.repeat_interleave(h.query.shape[1] // x.shape[1], 1) if h.grouped else x for x in (h.key, h.value))
    return torch.ops.aten._scaled_dot_product_attention_math(h.query, key, value, h.mask, h.dropout, h.causal, scale=h.scale)[0]


def _flash_backward_bytes(args: Any) -> int:
    """softmax_d and the float32 accumulator of dq, padded, and dk and dv by query head (flash_attn/flash_api.cpp)."""
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = batch * heads * _up(length, 128)
    total = rows * 4 + rows * _up(head_dim, 32) * 4
    if key.shape[1] != heads:
        total += 2 * batch * key.shape[2] * heads * head_dim * query.element_size()
    return int(total)


def _efficient_backward_bytes(args: Any) -> int:
    """The kernel's float32 accumulator of dq and the row sums (mem_eff_attention/kernel_backward.h)."""
    batch, heads, length, head_dim = args[1].shape
    return int(batch * heads * (_up(length, 128) * _up(head_dim, 64) * 4 + _up(length, 32) * 4))


# In the order in which PyTorch 2.13 asks them (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp); the last takes all.
KERNELS = (
    Kernel(  # goes first on Hopper and Blackwell
        "cudnn", lambda h: h.capability[0] in (9, 10) and h.half and h.head_dim <= 128 and h.head_dim % 8 == 0, _cudnn,
        "_scaled_dot_product_cudnn_attention_backward", None,
    ),
    Kernel(  # wants Ampere, and no mask
        "flash",
        lambda h: h.capability >= (8, 0) and h.half and h.mask is None and h.head_dim == h.value.shape[-1] <= FLASH_MAX_HEAD_DIM, _flash,
        "_scaled_dot_product_flash_attention_backward", _flash_backward_bytes,
    ),
    Kernel(  # takes masks and float32, but no grouped heads
        "efficient", lambda h: not h.grouped and h.head_dim % (8 if h.half else 4) == 0, _efficient,
        "_scaled_dot_product_efficient_attention_backward", _efficient_backward_bytes,
    ),
    Kernel("math", lambda h: True, _math, "_scaled_dot_product_attention_math", None),
)  # fmt: skip


def kernel_for(heads: Heads) -> Kernel:
    """The kernel that a GPU takes for these."""
    return next(kernel for kernel in KERNELS if kernel.takes(heads))


def attention(capability: tuple[int, int], repeat_kv: bool = False) -> Callable[..., Any]:
    """`scaled_dot_product_attention` as a GPU of this capability runs it.

    `repeat_kv` repeats grouped keys and values to all heads first, as LitGPT does.
    """
    import torch

    def attend(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):  # attention is on autocast's list on CUDA, not on the CPU
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        if repeat_kv and query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, torch.full((), -math.inf, dtype=query.dtype))
        elif attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        grouped = enable_gqa and query.shape[1] != key.shape[1]
        heads = Heads(query, key, value, attn_mask, grouped, dropout_p, is_causal, scale, capability)
        return kernel_for(heads).run(heads)

    return attend


def prepare_bitsandbytes() -> None:
    """Make bitsandbytes' code books before any fake mode: it builds them by reading values."""
    from bitsandbytes import functional

    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()


def workspaces() -> dict[Any, Callable[..., int]]:
    """Bytes that kernels take and give back within one call, by operator, from its arguments."""
    import bitsandbytes  # noqa: F401 – registers its operators
    import torch

    attention = {getattr(torch.ops.aten, kernel.backward).default: kernel.workspace_bytes for kernel in KERNELS if kernel.workspace_bytes}
    return {**attention, torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_bytes}


def _up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def _gemm_4bit_bytes(args: Any) -> int:
    """The weight, dequantised, and its scales in float32, as bitsandbytes 0.50 makes them for more than a few rows."""
    x, _, shape, _, blocksize = args[:5]
    elements = shape[0] * shape[1]
    return int(elements * x.element_size() + elements // blocksize * 4)

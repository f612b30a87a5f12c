"""What a training step allocates on a CUDA GPU and not on a CPU: attention kernels, workspaces, fixed costs."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def cublas_bytes(capability: tuple[int, int]) -> int:
    return CUBLAS_HOPPER_BYTES if capability >= (9, 0) else CUBLAS_BYTES


def attention_backend(query: Any, key: Any, value: Any, mask: Any, gqa: bool, capability: tuple[int, int]) -> str:
    """The kernel that PyTorch 2.13 chooses (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), by inputs and card.

    Flash attention wants Ampere, half precision, equal head dims of at most 256 and no mask; cuDNN goes first on Hopper
    and Blackwell up to head dim 128; the memory-efficient kernel takes masks and float32, but no grouped heads.
    """
    import torch

    half = query.dtype in (torch.float16, torch.bfloat16)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if capability[0] in (9, 10) and half and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    if capability >= (8, 0) and half and mask is None and head_dim == value_dim <= FLASH_MAX_HEAD_DIM:
        return "flash"
    if not gqa and head_dim % (8 if half else 4) == 0:
        return "efficient"
    return "math"


def attention(capability: tuple[int, int], repeat_kv: bool = False) -> Callable[..., Any]:
    """`scaled_dot_product_attention` as a GPU of this capability runs it, on the meta kernels that every build of PyTorch has.

    `repeat_kv` repeats grouped keys and values to all heads first, as LitGPT does.
    """
    import torch
    from torch.nn import functional

    aten = torch.ops.aten

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if torch.is_autocast_enabled("cpu"):  # attention is on autocast's list on CUDA, not on the CPU
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        if repeat_kv and query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        grouped = enable_gqa and query.shape[1] != key.shape[1]
        backend = attention_backend(query, key, value, attn_mask, grouped, capability)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, torch.full((), -math.inf, dtype=query.dtype))
        elif attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        if backend == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(
                query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, False, scale=scale
            )[0]
        if backend == "flash":
            head_dim = query.shape[-1]
            if head_dim % 8:
                query, key, value = (functional.pad(x, (0, 8 - head_dim % 8)) for x in (query, key, value))
            out = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale or head_dim**-0.5
            )[0]  # fmt: skip
            return out[..., :head_dim] if head_dim % 8 else out
        if backend == "efficient":
            if attn_mask is not None:
                if attn_mask.shape[-1] % 16:  # the kernel wants its mask aligned
                    attn_mask = functional.pad(attn_mask, (0, 16 - attn_mask.shape[-1] % 16))[..., : attn_mask.shape[-1]]
                attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            wants_gradient = torch.is_grad_enabled() and query.requires_grad
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
            )[0]  # fmt: skip
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]

    return attend


def prepare_bitsandbytes() -> None:
    """Make bitsandbytes' code books before any fake mode: it builds them by reading values."""
    from bitsandbytes import functional

    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()


def workspaces(capability: tuple[int, int]) -> dict[Any, Callable[..., int]]:
    """Bytes that kernels take and give back within one call, by operator, from its arguments."""
    import bitsandbytes  # noqa: F401 – registers its operators
    import torch

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_bytes,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward_bytes,
        torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_bytes,
    }


def _up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


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


def _gemm_4bit_bytes(args: Any) -> int:
    """The weight, dequantised, and its scales in float32, as bitsandbytes 0.50 makes them for more than a few rows."""
    x, _, shape, _, blocksize = args[:5]
    elements = shape[0] * shape[1]
    return int(elements * x.element_size() + elements // blocksize * 4)

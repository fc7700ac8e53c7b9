"""BF16 on a CPU that has no units for it: products in FP32, rounded to BF16.

That is what the units do: the product of two BF16 numbers is exact in FP32, sums are in FP32, and the result is rounded
once. PyTorch's own way on such a CPU gives the same, and took fifty times as long (AVX2, a product of 512 by 512).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from common.gpu import Machine

PRODUCTS = {
    F.linear,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
}


def fast_bf16(machine: Machine) -> AbstractContextManager:
    """Inside, products of BF16 tensors take FP32's way where there are no units for BF16; elsewhere nothing changes."""
    return contextlib.nullcontext() if machine.native_bf16 else _ProductsInFp32()


class _ProductsInFp32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in PRODUCTS and any(_is_bf16(value) for value in args):
            return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()}).bfloat16()
        return func(*args, **kwargs)


def _is_bf16(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _wide(value: object) -> object:
    return value.float() if _is_bf16(value) else value

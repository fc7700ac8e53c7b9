"""FP8 on PyTorch's own types: scaling that moves a tensor into the format's range, and back.

    quantize:    q = round(x * s),   s = 2 ** floor(log2(max of the format / max |x|))
    dequantize:  x ~ q / s

There is one scale per tensor, per row, or per block. Scales are powers of two (as in Transformer Engine's block
scaling and in MXFP8): multiplying by one never rounds, so all error comes from the format. With a `fill` they are
exact instead: s = fill * max of the format / max |x|.

E4M3 and E5M2 are defined in Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

SCALINGS = ("none", "tensor", "row", "block")  # one scale per tensor, row or block, or none at all
ACTIVATION_BLOCK = (1, 128)  # rows, columns
WEIGHT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8: its values [M, K], and one factor per group that they are multiplied with."""

    values: torch.Tensor
    inverse: torch.Tensor  # 1 / scale, float32: [], [M, 1], or [M / rows, K / columns] with a block
    block: tuple[int, int] | None = None
    power_of_two: bool = True  # whether the scales are; multiplying by them is then exact in bfloat16

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] times `inverse`."""
        return _scaled(x, self.inverse, self.block)


def _blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A matrix [M, K] cut into blocks [M / rows, rows, K / columns, columns]; zeros fill up the last ones."""
    rows, columns = block
    whole = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _scaled(x: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Each value of a matrix times the scale of its group."""
    if block is None:
        return x * scale.to(x.dtype)
    product = _blocks(x, block) * scale.to(x.dtype)[:, None, :, None]
    return product.flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]]


def scale_for(amax: torch.Tensor, dtype: torch.dtype, fill: float | None = None) -> torch.Tensor:
    """The scale that brings `amax` into the format's range; 1 where `amax` is zero. float32.

    Without `fill` the largest power of two that does; with it, `amax` comes to that share of the format's maximum.
    """
    scale = torch.finfo(dtype).max / amax.float()
    scale = torch.exp2(torch.floor(torch.log2(scale))) if fill is None else fill * scale
    return torch.where((amax > 0) & torch.isfinite(scale), scale, 1.0)


def _largest(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """max |x| over dimensions, which are kept with size 1.

    Magnitudes of floats order like their bits, and a CPU finds the maximum of integers faster than of bfloat16.
    """
    integers, magnitude = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}[x.element_size()]
    return (x.view(integers) & magnitude).amax(dims, keepdim=True).view(x.dtype)


def absolute_maximum(x: torch.Tensor, scaling: str, block: tuple[int, int] = ACTIVATION_BLOCK) -> torch.Tensor:
    """max |x| of each group of values that shares a scale: [] for "tensor", [M, 1] for "row", [M', K'] for "block"."""
    if scaling == "tensor":
        return _largest(x.flatten(), (0,)).squeeze(0)
    if scaling == "row":
        return _largest(x, (1,))
    if scaling == "block":
        return _largest(_blocks(x, block), (1, 3)).squeeze((1, 3))
    raise ValueError(f"scaling must be one of {', '.join(SCALINGS[1:])}, not '{scaling}'")


def quantize(
    x: torch.Tensor,
    scaling: str,
    dtype: torch.dtype = E4M3,
    block: tuple[int, int] = ACTIVATION_BLOCK,
    amax: torch.Tensor | None = None,
    fill: float | None = None,
) -> Quantized:
    """x [M, K], float32 or bfloat16, in FP8 by one of SCALINGS; ValueError if it is no matrix, or no such scaling.

    Args:
        block: for "block", the rows and columns that share a scale; the last ones may be smaller.
        amax: for "tensor", a maximum known beforehand (delayed scaling); larger values saturate.
        fill: share of the format's range, 0.5 to 1, that the maximum comes to; None: a power of two decides.
    """
    if x.dim() != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {list(x.shape)}")
    if scaling == "none":
        scale = torch.ones((), device=x.device)
    else:
        scale = scale_for(absolute_maximum(x, scaling, block) if amax is None else amax, dtype, fill)
    block = block if scaling == "block" else None
    scaled = _scaled(x if fill is None else x.float(), scale, block)  # only a power of two is exact in bfloat16
    if scaling == "none" or amax is not None:  # torch makes NaN or infinity of larger values; hardware saturates
        limit = torch.finfo(dtype).max
        scaled = scaled.clamp_(-limit, limit)
    return Quantized(scaled.to(dtype), 1 / scale, block, power_of_two=fill is None)


def decode(values: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """FP8 values as bfloat16 or wider, which hold them exactly."""
    if values.device.type != "cpu":
        return values.to(dtype)
    # Faster on a CPU than PyTorch's conversion.
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(dtype)
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def dequantize(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The matrix that the FP8 values stand for: [M, K]."""
    if q.power_of_two:
        return q.scaled(decode(q.values, dtype))
    return q.scaled(decode(q.values, torch.float32)).to(dtype)

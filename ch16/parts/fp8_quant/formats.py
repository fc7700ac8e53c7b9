"""What eight bits hold: range and spacing of the formats, and what quantizing a tensor to them loses."""

import torch

from common.fp8 import ACTIVATION_BLOCK, E4M3, E5M2, SCALINGS, WEIGHT_BLOCK, dequantize, quantize

FORMATS = {"E4M3": E4M3, "E5M2": E5M2, "FP16": torch.float16, "BF16": torch.bfloat16}


def format_row(name: str) -> dict[str, float | str]:
    """Range and spacing of one of FORMATS, from PyTorch's own description of the type: a row of FORMAT_COLUMNS."""
    info = torch.finfo(FORMATS[name])
    return {
        "format": name,
        "bits": info.bits,
        "largest": info.max,
        "smallest_normal": info.smallest_normal,
        "smallest": info.smallest_normal * info.eps,  # subnormal: below half of it everything is zero
        "steps": round(1 / info.eps),  # values from one power of two to the next
        "rounding_percent": 100 * info.eps / 2,  # largest relative error of a normal value
    }


def error_row(x: torch.Tensor, scaling: str, name: str, block: tuple[int, int]) -> dict[str, float | str]:
    """What quantizing x [M, K] to format `name` loses, without the name of the tensor.

    A few outliers make most of the matrix's norm; the mean over rows (tokens, output channels) counts all alike.
    """
    dtype, x = FORMATS[name], x.float()
    q = quantize(x, scaling, dtype, block)
    back = dequantize(q, torch.float32)
    rows = (back - x).norm(dim=1) / x.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    limit = q.scaled(torch.full_like(x, torch.finfo(dtype).max))
    return {
        "format": name,
        "scaling": scaling,
        "error_percent": 100 * ((back - x).norm() / x.norm()).item(),
        "row_error_percent": 100 * rows.mean().item(),
        "zeroed_percent": 100 * ((back == 0) & (x != 0)).float().mean().item(),
        "saturated_percent": 100 * (x.abs() > limit).float().mean().item(),
    }


def scaling_errors(weight: torch.Tensor, inputs: torch.Tensor) -> list[dict]:
    """What each format and scaling loses on a layer's weight [N, K] and its input [T, K]: rows of ERROR_COLUMNS."""
    tensors = (("weight", weight, WEIGHT_BLOCK), ("input", inputs, ACTIVATION_BLOCK))
    return [
        {"tensor": name, **error_row(x, scaling, kind, block)}
        for name, x, block in tensors
        for kind in ("E4M3", "E5M2")
        for scaling in SCALINGS
    ]

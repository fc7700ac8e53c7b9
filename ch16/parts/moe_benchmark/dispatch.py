"""Which implementation of the steps of grouped dispatch computes on which device."""

from types import ModuleType

import torch

from ch16.parts.moe_benchmark import plain


def steps_on(device: torch.device) -> ModuleType:
    """The module whose `sort_rows`, `arrange`, `compute_sorted` and `combine` are for this device."""
    if device.type == "cpu":
        return plain
    from ch16.parts.moe_benchmark import kernels  # needs Triton, which comes with PyTorch for GPUs

    return kernels

"""The steps of grouped dispatch in plain PyTorch: sort, arrange, compute, combine. `kernels.py` has them for GPUs."""

import sys
from types import ModuleType

import torch

from ch16.parts.moe_benchmark.experts import Experts


def steps_on(device: torch.device) -> ModuleType:
    """The module whose `sort_rows`, `arrange`, `compute_sorted` and `combine` are for this device: this one on CPUs."""
    if device.type == "cpu":
        return sys.modules[__name__]
    from ch16.parts.moe_benchmark import kernels  # needs Triton, which comes with PyTorch for GPUs

    return kernels


def sort_rows(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rows of `experts` [T, K], sorted by expert, go, and where the rows of each of the `count` experts end.

    Places [T, K] int64, a permutation of 0 .. R - 1 that keeps the order of tokens, and ends [E] int64.
    """
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places.view(experts.shape), torch.bincount(experts.flatten(), minlength=count).cumsum(0)


def arrange(x: torch.Tensor, places: torch.Tensor, fp8: bool = False) -> torch.Tensor:
    """Tokens x [T, H] copied to the places [T, K] of their rows: [R, H]."""
    if fp8:
        raise ValueError("FP8 rows are computed on GPUs alone")
    rows = x.new_empty(places.numel(), x.shape[1])
    rows[places.flatten()] = x.repeat_interleave(places.shape[1], dim=0)
    return rows


def compute_sorted(rows: torch.Tensor, experts: Experts, ends: torch.Tensor) -> torch.Tensor:
    """Rows [R, H], sorted by expert, through their experts, in place: one product per expert that has rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows[start:end] = experts.compute(rows[start:end], expert)
        start = end
    return rows


def combine(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's weighted sum of its K rows, added in float32: rows [R, H], places and weights [T, K] to [T, H]."""
    total = torch.zeros(places.shape[0], rows.shape[1])
    for place, weight in zip(places.T, weights.T, strict=True):  # choice by choice: no copy of all rows in float32
        total.addcmul_(rows[place].float(), weight[:, None])
    return total.to(rows.dtype)

"""Experts of a mixture-of-experts layer and three ways to compute them: by definition, one by one, and grouped.

A token t goes to K of E experts and gets the weighted sum of what they say:

    y[t] = sum over j of  weights[t, j] * expert[experts[t, j]](x[t])

A (token, choice) pair is called a row: T tokens make R = T x K rows, and each row is computed once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import CannotRun
from common.fp8 import quantize

TOLERANCE = 0.02  # relative difference of two bfloat16 paths, or of one and float64: rounding, three times in a row
TOLERANCE_FP8 = 0.10


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to: `experts` [T, K] int64, all different; `weights` [T, K] float32."""

    experts: torch.Tensor
    weights: torch.Tensor

    @property
    def top_k(self) -> int:
        """Experts per token, K."""
        return self.experts.shape[1]


def route(logits: torch.Tensor, top_k: int) -> Routing:
    """The `top_k` largest of the router's logits [T, E], and a softmax over them: weights sum to 1.

    The same as a softmax over all experts whose chosen part is scaled to 1 (Mixtral, Qwen3).
    """
    values, experts = logits.float().topk(top_k, dim=-1)
    return Routing(experts, values.softmax(dim=-1))


@dataclass(frozen=True)
class ExpertSizes:
    """Shape of a layer's experts. Gated experts are w_out(silu(gate x) * up x), the others w_out(gelu(w_in x))."""

    hidden: int
    intermediate: int
    experts: int
    gated: bool

    @property
    def rows_in(self) -> int:
        """Output width of the first product: gate and up lie in one matrix."""
        return self.intermediate * (2 if self.gated else 1)

    @property
    def parameters(self) -> int:
        """Parameters of one expert."""
        return self.hidden * (self.rows_in + self.intermediate)

    def flops(self, rows: int) -> float:
        """Floating-point operations of `rows` rows: two (multiply, add) for each parameter."""
        return 2.0 * rows * self.parameters


class Fp8Weight(NamedTuple):
    """Weights of all experts in E4M3 [E, N, K], and what to multiply each output row with: float32 [E, N]."""

    values: torch.Tensor
    scales: torch.Tensor


class Experts(nn.Module):
    """The weights of E experts: `w_in` [E, rows_in, H] and `w_out` [E, H, I], as vLLM lays them out."""

    def __init__(self, w_in: torch.Tensor, w_out: torch.Tensor, gated: bool) -> None:
        super().__init__()
        self.w_in, self.w_out = (nn.Parameter(weight, requires_grad=False) for weight in (w_in, w_out))
        count, hidden, intermediate = w_out.shape
        self.sizes = ExpertSizes(hidden, intermediate, count, gated)
        self._fp8: tuple[Fp8Weight, Fp8Weight] | None = None

    @classmethod
    def random(cls, sizes: ExpertSizes, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> "Experts":
        """Normal weights, scaled so that outputs are about as large as inputs."""
        w_in = torch.empty(sizes.experts, sizes.rows_in, sizes.hidden, device=device, dtype=dtype)
        w_out = torch.empty(sizes.experts, sizes.hidden, sizes.intermediate, device=device, dtype=dtype)
        for weight in (w_in, w_out):
            for matrix in weight:  # one by one: the random numbers of all at once would take the memory twice
                matrix.normal_(std=weight.shape[-1] ** -0.5)
        return cls(w_in, w_out, sizes.gated)

    def part(self, first: int, count: int) -> "Experts":
        """Experts first .. first + count - 1, sharing memory with these."""
        return Experts(self.w_in[first : first + count], self.w_out[first : first + count], self.sizes.gated)

    def fp8(self) -> tuple[Fp8Weight, Fp8Weight]:
        """Both weights in FP8, quantized at the first call and kept."""
        if self._fp8 is None or self._fp8[0].values.device != self.w_in.device:
            self._fp8 = _quantized(self.w_in), _quantized(self.w_out)
        return self._fp8

    def compute(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert on rows x [N, H]: [N, H]."""
        return activate(x @ self.w_in[expert].t(), self.sizes.gated) @ self.w_out[expert].t()


def _quantized(weight: torch.Tensor) -> Fp8Weight:
    """[E, N, K] in FP8, expert by expert, to keep the float32 copy small."""
    parts = [quantize(matrix, "row", fill=1.0) for matrix in weight]
    return Fp8Weight(torch.stack([p.values for p in parts]), torch.stack([p.inverse[:, 0] for p in parts]))


def activate(h: torch.Tensor, gated: bool) -> torch.Tensor:
    """silu(gate) * up for h = [gate, up], else gelu(h): [N, rows_in] to [N, I]."""
    if not gated:
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---- three ways to compute a layer ----


def reference(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """The definition, token by token in float64: slow, and shares nothing with the paths it judges. [T, H]."""
    rows = []
    for token, chosen, weights in zip(x.double(), routing.experts.tolist(), routing.weights.double(), strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            h = experts.w_in[expert].double() @ token
            if experts.sizes.gated:
                gate, up = h[: len(h) // 2], h[len(h) // 2 :]
                h = gate / (1 + torch.exp(-gate)) * up
            else:
                h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
            total += weight * (experts.w_out[expert].double() @ h)
        rows.append(total)
    return torch.stack(rows) if rows else x.double()


def loop(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """The chapter's way, corrected: for each expert, pick its tokens, compute them, add them up. [T, H].

    The host asks the device for every expert's tokens and waits for the answer.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(experts.sizes.experts):
        tokens, choice = (routing.experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            weights = routing.weights[tokens, choice, None]
            total.index_add_(0, tokens, experts.compute(x[tokens], expert).float() * weights)
    return total.to(x.dtype)


def grouped(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """Sort rows by expert, two grouped products, weighted sum: nothing waits for the host on a GPU. [T, H]."""
    if x.is_cuda:
        from ch16.parts.moe_benchmark import kernels

        return kernels.grouped(x, experts, routing)
    places, ends = sort_rows(routing.experts, experts.sizes.experts)
    rows = arrange(x, places)
    compute_sorted(rows, experts, ends)
    return combine(rows, places, routing.weights)


def grouped_fp8(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """As `grouped`, with weights and rows in FP8 (a scale each row); needs a GPU with FP8 units. [T, H]."""
    from ch16.parts.moe_benchmark import kernels

    return kernels.grouped(x, experts, routing, fp8=True)


Dispatch = Callable[[torch.Tensor, Experts, Routing], torch.Tensor]
PATHS: dict[str, Dispatch] = {"loop": loop, "grouped": grouped, "fp8": grouped_fp8}


def sort_rows(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row goes when rows are sorted by expert, and where each expert's rows end.

    Args:
        experts: [T, K], numbers below `count`.
        count: experts E.

    Returns:
        Places [T, K] int64, a permutation of 0 .. R - 1 that keeps the order of tokens, and ends [E] int64.
    """
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places.view(experts.shape), torch.bincount(experts.flatten(), minlength=count).cumsum(0)


def arrange(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens x [T, H] copied to the places [T, K] of their rows: [R, H]."""
    rows = x.new_empty(places.numel(), x.shape[1])
    rows[places.flatten()] = x.repeat_interleave(places.shape[1], dim=0)
    return rows


def compute_sorted(rows: torch.Tensor, experts: Experts, ends: torch.Tensor) -> None:
    """Rows [R, H], sorted by expert, through their experts, in place (CPU).

    On a CPU a grouped product is a product for each expert that has rows: there is no launch to save.
    """
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows[start:end] = experts.compute(rows[start:end], expert)
        start = end


def combine(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's weighted sum of its K rows, added in float32: rows [R, H], places and weights [T, K] to [T, H]."""
    if rows.is_cuda:
        from ch16.parts.moe_benchmark import kernels

        return kernels.combine(rows, places, weights)
    total = torch.zeros(places.shape[0], rows.shape[1])
    for place, weight in zip(places.T, weights.T, strict=True):  # choice by choice: no copy of all rows in float32
        total.addcmul_(rows[place].float(), weight[:, None])
    return total.to(rows.dtype)


def check_input(x: torch.Tensor, routing: Routing, sizes: ExpertSizes) -> None:
    """Raise CannotRun for what no path can compute: no tokens, or more choices than experts."""
    if x.shape[0] == 0:
        raise CannotRun("zero tokens: there is nothing to route")
    if routing.top_k > sizes.experts:
        raise CannotRun(f"{routing.top_k} experts per token, but there are {sizes.experts}")

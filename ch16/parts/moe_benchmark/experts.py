"""Experts of a mixture-of-experts layer: their weights, and which token goes to which of them.

A token t goes to K of E experts and gets the weighted sum of their outputs:

    y[t] = sum over j of  weights[t, j] * expert[experts[t, j]](x[t])

A (token, choice) pair is called a row: T tokens make R = T x K rows, and each row is computed once.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import CannotRun
from common.fp8 import quantize


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to: `experts` [T, K] int64, all different; `weights` [T, K] float32."""

    experts: torch.Tensor
    weights: torch.Tensor

    def __getitem__(self, tokens: slice | torch.Tensor) -> "Routing":
        return Routing(self.experts[tokens], self.weights[tokens])


def route(logits: torch.Tensor, top_k: int) -> Routing:
    """The `top_k` largest of the router's logits [T, E], and a softmax over them: weights sum to 1.

    The same as a softmax over all experts whose chosen part is scaled to 1 (Mixtral, Qwen3).
    """
    values, experts = logits.float().topk(top_k, dim=-1)
    return Routing(experts, values.softmax(dim=-1))


@dataclass(frozen=True)
class ExpertSizes:
    """Shape of a layer's experts: w_out(silu(gate x) * up x) if gated, else the chapter's w_out(gelu(w_in x))."""

    hidden: int
    intermediate: int
    experts: int
    gated: bool

    @property
    def rows_in(self) -> int:
        """Output width of the first product: gate and up are in one matrix."""
        return self.intermediate * (2 if self.gated else 1)

    @property
    def parameters(self) -> int:
        """Parameters of one expert."""
        return self.hidden * (self.rows_in + self.intermediate)

    def flops(self, rows: int) -> float:
        """Floating-point operations of `rows` rows: two (multiply, add) per parameter."""
        return 2.0 * rows * self.parameters


def require_layer(sizes: ExpertSizes, top_k: int, dispatch: str, known: Collection[str], device: str) -> None:
    """Raise CannotRun unless a layer of these sizes can be computed by `dispatch`, one of `known`, on this device."""
    if min(sizes.hidden, sizes.intermediate, sizes.experts, top_k) < 1:
        raise CannotRun("sizes, experts and experts per token must be at least 1")
    if top_k > sizes.experts:
        raise CannotRun(f"{top_k} experts per token, but there are {sizes.experts}")
    if dispatch not in known:
        raise CannotRun(f"dispatch must be one of {', '.join(known)}, not '{dispatch}'")
    if dispatch == "fp8" and torch.device(device).type == "cpu":
        raise CannotRun("dispatch 'fp8' needs a GPU with FP8 units")


class Fp8Weight(NamedTuple):
    """Weights of all experts in E4M3 [E, N, K], and the scale of each output row: float32 [E, N]."""

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
            for matrix in weight:  # one by one: random numbers for all at once would need the memory twice
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
        h = x @ self.w_in[expert].t()  # [N, rows_in]
        if self.sizes.gated:
            gate, up = h.chunk(2, dim=-1)
            return (F.silu(gate) * up) @ self.w_out[expert].t()
        return F.gelu(h) @ self.w_out[expert].t()


def _quantized(weight: torch.Tensor) -> Fp8Weight:
    """[E, N, K] in FP8, expert by expert, to keep the float32 copy small."""
    parts = [quantize(matrix, "row", fill=1.0) for matrix in weight]
    return Fp8Weight(torch.stack([p.values for p in parts]), torch.stack([p.inverse[:, 0] for p in parts]))


Dispatch = Callable[[torch.Tensor, Experts, Routing], torch.Tensor]  # tokens x [T, H], experts, routing: [T, H]

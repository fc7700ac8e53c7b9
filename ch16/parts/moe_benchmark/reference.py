"""The definition of a layer in float64, and how close every implementation must come to it."""

from collections.abc import Mapping

import torch

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing
from common.cli import CannotRun

TOLERANCE = 0.02  # relative difference of two bfloat16 results, or of one and float64: rounding, three times in a row
TOLERANCE_FP8 = 0.10


def reference(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """The definition, token by token in float64: slow, and independent of the code it checks. [T, H]."""
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


def require_agreement(
    contenders: Mapping[str, Dispatch], x: torch.Tensor, experts: Experts, routing: Routing, checked: int, layer: str
) -> None:
    """Compare `checked` tokens of every contender's output with the definition.

    Raises:
        CannotRun: a contender differs by more than its tolerance.
    """
    sample = torch.linspace(0, len(x) - 1, min(len(x), checked), device=x.device).long()
    expected = reference(x[sample], experts, Routing(routing.experts[sample], routing.weights[sample]))
    for name, dispatch in contenders.items():
        error = ((dispatch(x, experts, routing)[sample].double() - expected).norm() / expected.norm()).item()
        if not error <= (TOLERANCE_FP8 if name == "fp8" else TOLERANCE):
            raise CannotRun(f"{name} dispatch is wrong by {100 * error:.1f}% (relative to float64, {layer})")

"""What dispatch is compared with: the definition of a layer in float64, and vLLM's own fused experts."""

from collections.abc import Mapping

import torch

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing
from common.cli import CannotRun, first_line

TOLERANCE = 0.02  # relative difference of two bfloat16 results, or of one and float64: rounding, three times in a row
TOLERANCE_FP8 = 0.10
CPU_MULTIPLE = 32  # as vLLM's own classes ask for


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
    """Raise CannotRun if `checked` tokens of a contender's output differ from the definition beyond its tolerance."""
    sample = torch.linspace(0, len(x) - 1, min(len(x), checked), device=x.device).long()
    expected = reference(x[sample], experts, routing[sample])
    for name, dispatch in contenders.items():
        error = ((dispatch(x, experts, routing)[sample].double() - expected).norm() / expected.norm()).item()
        if not error <= (TOLERANCE_FP8 if name == "fp8" else TOLERANCE):
            raise CannotRun(f"{name} dispatch is wrong by {100 * error:.1f}% (relative to float64, {layer})")


def vllm_dispatch(experts: Experts) -> tuple[Dispatch | None, str]:
    """vLLM's kernel as one more dispatch, or None and why it is not available.

    On GPUs it is `fused_experts` (Triton; with default tile sizes where vLLM ships no tuned ones for a shape). On CPUs
    it is `cpu_fused_moe`; its weights are packed once, as the engine does when it loads a model.
    """
    sizes, gated, on_gpu = experts.sizes, experts.sizes.gated, experts.w_in.is_cuda
    if not on_gpu and not gated:
        return None, "its CPU kernel supports gated experts only"
    if not on_gpu and (sizes.hidden % CPU_MULTIPLE or sizes.intermediate % CPU_MULTIPLE):
        return None, f"its CPU kernel needs widths that are multiples of {CPU_MULTIPLE}"
    try:
        return (_gpu(gated) if on_gpu else _cpu(experts)), ""
    except (ImportError, AttributeError, RuntimeError) as error:
        return None, f"its kernel is missing: {first_line(error)}"


def _gpu(gated: bool) -> Dispatch:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    activation = MoEActivation.SILU if gated else MoEActivation.GELU_NO_MUL
    config = VllmConfig()

    def dispatch(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
        with set_current_vllm_config(config):
            return fused_experts(
                x, experts.w_in, experts.w_out, routing.weights, routing.experts.int(), activation=activation
            )

    return dispatch


def _cpu(experts: Experts) -> Dispatch:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    isa = "amx" if torch.cpu._is_amx_tile_supported() and experts.w_in.dtype == torch.bfloat16 else "vec"
    packed: dict[tuple[int, int], list[torch.Tensor]] = {}

    def weights(experts: Experts) -> list[torch.Tensor]:
        key = experts.w_in.data_ptr(), experts.sizes.experts  # a part of the experts is packed separately
        if key not in packed:
            packed[key] = [cpu_prepack_moe_weight(weight.data, isa) for weight in (experts.w_in, experts.w_out)]
        return packed[key]

    def dispatch(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, *weights(experts), None, None, routing.weights, routing.experts.int(), "silu", isa)
        return out

    weights(experts)  # now, so that a missing kernel is noticed
    return dispatch

"""vLLM's own fused experts on the same tensors: what a production engine makes of the same work."""

import torch

from ch16.moe.experts import Experts, Path, Routing


def vllm_path(experts: Experts) -> tuple[Path | None, str]:
    """vLLM's kernel as one more dispatch path, or None and why it cannot be had.

    On GPUs `fused_experts` (Triton, with vLLM's own tuned tile sizes where it has some); on CPUs `cpu_fused_moe`,
    whose weights are packed here, once, as the engine does when it loads a model.
    """
    gated, on_gpu = experts.sizes.gated, experts.w_in.is_cuda
    if not gated and not on_gpu:
        return None, "vLLM's CPU kernel knows gated experts only"
    try:
        return (_gpu(gated) if on_gpu else _cpu(experts)), ""
    except (ImportError, AttributeError, RuntimeError) as error:
        return None, f"vLLM's kernel is not there: {error}"


def _gpu(gated: bool) -> Path:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    activation = MoEActivation.SILU if gated else MoEActivation.GELU_NO_MUL
    config = VllmConfig()

    def path(x: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
        with set_current_vllm_config(config):
            return fused_experts(
                x, experts.w_in, experts.w_out, routing.weights, routing.experts.int(), activation=activation
            )

    return path


def _cpu(experts: Experts) -> Path:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    isa = "amx" if torch.cpu._is_amx_tile_supported() and experts.w_in.dtype == torch.bfloat16 else "vec"
    packed = cpu_prepack_moe_weight(experts.w_in, isa), cpu_prepack_moe_weight(experts.w_out, isa)

    def path(x: torch.Tensor, _: Experts, routing: Routing) -> torch.Tensor:
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, *packed, None, None, routing.weights, routing.experts.int(), "silu", isa)
        return out

    return path

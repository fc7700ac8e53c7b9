"""From which batch on a step is limited by computing: the roofline's crossover."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.gpu import Machine, Peak
from common.models import Model, kv_bytes_per_token, parameter_count

if TYPE_CHECKING:
    from vllm import LLM


def kv_bytes(llm: "LLM", model: Model, machine: Machine) -> int:
    """Bytes per token in this engine's KV cache."""
    fp8 = llm.llm_engine.vllm_config.cache_config.cache_dtype.startswith("fp8")
    return kv_bytes_per_token(model.config, 1 if fp8 else machine.itemsize)


def crossovers(
    llm: "LLM", model: Model, machine: Machine, decode: int, prefill: int
) -> dict[str, tuple[float | None, str]]:
    """`crossover` of both phases, at these tokens of context."""
    fp8 = llm.llm_engine.vllm_config.model_config.quantization == "fp8"
    known = machine.peak, model.config, fp8, kv_bytes(llm, model, machine)
    return {"decode": crossover(*known, 1, decode), "prefill": crossover(*known, prefill, prefill)}


def crossover(
    peak: Peak, config: Mapping[str, object], fp8: bool, kv_bytes: int, tokens: int, context: int
) -> tuple[float | None, str]:
    """The batch from which a step is limited by computing instead of memory, and how it is known; None if it is not.

    FLOPs: 2 per weight and token. Bytes: the weights once, and the keys and values of each sequence. Computing takes
    longer from FLOPs / peak FLOP/s = bytes / peak bytes/s on (Williams, Waterman and Patterson, "Roofline", 2009).
    Attention's own FLOPs are left out: a few percent in short contexts.

    Args:
        fp8: weights and products in FP8 instead of BF16.
        kv_bytes: per token in the KV cache.
        tokens: new tokens per sequence and step: 1 in decode, the prompt in prefill.
        context: tokens per sequence whose keys and values are read or written.
    """
    flops_per_s = peak.fp8_flops if fp8 else peak.bf16_flops
    parameters = parameter_count(config)
    if not flops_per_s or not peak.bytes_per_s:
        return None, "unknown: no data sheet for this machine"
    if parameters is None or config.get("num_experts") or config.get("num_local_experts"):
        return None, "unknown: not a dense Llama-like model"
    itemsize = 1 if fp8 else 2
    ridge = flops_per_s / peak.bytes_per_s  # FLOPs per byte
    # An embedding that is not also the head is looked up, not multiplied.
    looked_up = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
    weights = parameters - looked_up
    flops_each = 2 * weights * tokens
    bytes_each = context * kv_bytes
    if flops_each <= ridge * bytes_each:
        return math.inf, "never: the KV cache alone needs more"
    return ridge * weights * itemsize / (flops_each - ridge * bytes_each), f"data sheet: {ridge:.0f} FLOPs per byte"

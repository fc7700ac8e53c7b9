"""Work that is counted, not measured: FLOPs and bytes of a forward pass, and the machine's limits for both."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn

from common.cli import CannotRun
from common.device import torch_dtype
from common.gpu import DTYPE_NAMES, Machine
from common.models import Model, kv_bytes_per_token
from common.timing import measure


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that have to be read or written at least once."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Weights:
    """Weights in the matrices of a dense decoder: of its layers, and of the head that makes logits."""

    layers: int
    head: int
    itemsize: int = 2  # bytes per weight

    @staticmethod
    def of(network: nn.Module, name: str) -> "Weights":
        """Count them in a transformers model; the meta device is enough.

        CannotRun if many are not in linear layers, as in a mixture of experts: not all of those are used.
        """
        head = network.get_output_embeddings().weight
        layers = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear) and m.weight is not head)
        outside = {id(head), id(network.get_input_embeddings().weight)}
        others = sum(p.numel() for p in network.parameters() if id(p) not in outside)
        if layers < 0.95 * others:
            raise CannotRun(f"the work of {name} cannot be counted: {layers:,} of {others:,} weights are linear layers")
        return Weights(layers, head.numel(), head.element_size())


def count(weights: Weights, config: Mapping, tokens: int, context: int, logits: int, batch: int = 1) -> Work:
    """Work of a forward pass over `tokens` new tokens per sequence after `context` earlier ones, `logits` with logits.

    FLOPs: two per weight and token; in attention, two products of 2 * head_dim FLOPs per head and key that a token
    sees. Bytes: weights once, keys and values of the context read and of the new tokens written. Activations are left
    out (a fused kernel keeps them on the chip), so the bytes are a lower bound.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    keys_seen = tokens * context + tokens * (tokens + 1) // 2
    attention = 4 * config["num_hidden_layers"] * heads * head_dim * keys_seen
    flops = batch * (2 * weights.layers * tokens + 2 * weights.head * logits + attention)
    cache = batch * (context + tokens) * kv_bytes_per_token(config, weights.itemsize)
    return Work(flops, (weights.layers + weights.head) * weights.itemsize + cache)


def require_countable(model: Model) -> None:
    """CannotRun without what `count` relies on: full attention, unquantized weights, the usual names of sizes."""
    config, problem = model.config, ""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if missing := [name for name in sizes if not isinstance(config.get(name), int)]:
        problem = f"its config.json has no {missing[0]}"
    elif "quantization_config" in config:
        problem = "its weights are quantized"
    elif window and window < model.max_context:
        problem = f"its attention has a window of {window} tokens"
    if problem:
        raise CannotRun(f"the work of {model.name} cannot be counted: {problem}")


@dataclass(frozen=True)
class Limits:
    """The most that a device can do: FLOP/s in its `Machine.dtype`, bytes/s, and their source."""

    flops_per_s: float
    bytes_per_s: float
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which compute, not memory, is the limit."""
        return self.flops_per_s / self.bytes_per_s


def limits_of(machine: Machine) -> Limits:
    """The data sheet's limits; without a data sheet, those of a large product and a large sum, measured now."""
    peak = machine.peak
    if peak.bf16_flops and peak.bytes_per_s:
        return Limits(peak.bf16_flops, peak.bytes_per_s, "data sheet")
    device = machine.device
    size = 8192 if device == "cuda" else 2048  # a GPU does a smaller one in the time of its launch
    a, b = (torch.randn(size, size, device=device, dtype=torch_dtype(machine)) for _ in range(2))
    many = torch.ones(2**26, device=device)  # 256 MiB: larger than caches
    product = min(measure(lambda: a @ b, device, warmup=1, repeats=5).seconds)
    summed = min(measure(many.sum, device, warmup=1, repeats=5).seconds)
    source = f"measured now: a product of {size} by {size} in {DTYPE_NAMES[machine.dtype]}, a sum of 256 MiB"
    return Limits(2 * size**3 / product, many.nbytes / summed, source)

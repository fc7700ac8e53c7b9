"""Which layouts of a host's devices there are, and what each has room for. Arithmetic; nothing is started.

A layout is R replicas of the model, each spread over T devices by tensor parallelism:

    N x TP=1    every device holds the whole model: nothing is exchanged, the weights are there N times
    1 x TP=N    every device holds an N-th of each layer: all wait for each other twice a layer, but the weights are
                there once, and what they leave is one large KV cache
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.engine import CPU_KV_CACHE_BYTES, GPU_MEMORY_UTILIZATION
from common.gpu import Machine
from common.models import kv_bytes_per_token, parameter_count, why_not_sharded

# Activations, CUDA graphs, NCCL's buffers. An estimate: about what was neither weights nor KV cache when vLLM ran the
# 33B shape on one H100 (results/h100/inference_serving.json: there was room for 303 sequences of 1,024 tokens).
WORKING_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Layout:
    """`replicas` of the model, each over `ranks` devices."""

    replicas: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.replicas} x TP={self.ranks}"

    @property
    def devices(self) -> int:
        """All of them together."""
        return self.replicas * self.ranks

    @property
    def processes(self) -> int:
        """The gateway; for each replica its API server, its engine, and a worker a rank if there are several."""
        return 1 + self.replicas * (2 + (self.ranks if self.ranks > 1 else 0))


def parse_layout(text: str) -> Layout:
    """argparse type: RxT, R replicas over T devices each.

    Raises:
        ValueError: it is not that.
    """
    replicas, ranks = map(int, text.split("x"))
    if min(replicas, ranks) < 1:
        raise ValueError(text)
    return Layout(replicas, ranks)


def possible_layouts(config: Mapping[str, object], devices: int) -> list[Layout]:
    """All that use every device and over which the model can be sharded, from most replicas to fewest."""
    return [
        Layout(devices // ranks, ranks)
        for ranks in range(1, devices + 1)
        if devices % ranks == 0 and not why_not_sharded(config, ranks)
    ]


@dataclass(frozen=True)
class Room:
    """Bytes on each device, and what the KV caches of all replicas hold together."""

    weights: float
    cache: float  # below 0: the weights alone are too much
    tokens: int


def room_for(config: Mapping[str, object], layout: Layout, machine: Machine, fp8: bool) -> Room | None:
    """The memory of a layout; None for a model whose number of parameters does not follow from its config here.

    weights = (bytes a parameter; embedding and head are not quantized by vLLM) / ranks
    cache = 0.9 of the device - working memory - weights, of which a token takes KV bytes / min(ranks, KV heads):
    ranks beyond the number of KV heads hold copies.

    Args:
        config: the content of the model's config.json.
        fp8: weights and KV cache of one byte a value.
    """
    parameters, size = parameter_count(config), 1 if fp8 else machine.itemsize
    if parameters is None or "quantization_config" in config:
        return None
    embeddings = config["vocab_size"] * config["hidden_size"] * (1 if config.get("tie_word_embeddings") else 2)
    weights = ((parameters - embeddings) * size + machine.itemsize * embeddings) / layout.ranks
    shares = min(layout.ranks, config.get("num_key_value_heads") or config["num_attention_heads"])
    if machine.device == "cpu":
        cache = CPU_KV_CACHE_BYTES  # whatever the weights leave
    else:
        cache = GPU_MEMORY_UTILIZATION * machine.memory_bytes - WORKING_BYTES - weights
    tokens = layout.replicas * max(0, int(cache * shares // kv_bytes_per_token(config, size)))
    return Room(weights, cache, tokens)


def problem(config: Mapping[str, object], layout: Layout, machine: Machine, fp8: bool, longest: int) -> str:
    """Why a layout cannot run on this machine's devices; empty if it can.

    Args:
        longest: tokens of the longest sequence, for which a replica must have room.
    """
    if layout.devices > machine.count:
        return f"it needs {layout.devices} devices, there are {machine.count}"
    if why := why_not_sharded(config, layout.ranks):
        return why
    room = room_for(config, layout, machine, fp8)
    if room is None:
        return ""
    if room.cache <= 0:
        usable = GPU_MEMORY_UTILIZATION * machine.memory_bytes
        return f"{gib(room.weights):.0f} GiB of weights on each device, of which {gib(usable):.0f} GiB can be used"
    if room.tokens < layout.replicas * longest:
        return f"a KV cache of {room.tokens // layout.replicas:,} tokens, one sequence may have {longest:,}"
    return ""


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / 2**30

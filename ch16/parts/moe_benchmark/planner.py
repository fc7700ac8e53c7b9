"""How many tokens/s will this MoE give, and how many GPUs does it need? Arithmetic on measured parts.

    step(T)   = layers x (layer(T) + exchange(T)) + head(sequences)
    prefill   = ceil(ceil(sequences / ranks) x tokens_in / chunk) steps of up to `chunk` tokens per rank
    decode    = (tokens_out - 1) steps of one token per sequence
    tokens/s  = sequences x tokens_out / (prefill + decode)

Ranks share sequences evenly (data-parallel attention) and hold E / N experts each (expert parallelism). A layer takes
as long as on its busiest rank. The formula leaves out a real engine's work between steps (vLLM overlaps it with the
running step), and a prompt's attention to its own earlier chunks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ch16.parts.moe_benchmark.presets import Preset
from common.cli import CannotRun
from common.engine import GPU_MEMORY_UTILIZATION
from common.gpu import Machine

BYTES = 2  # of a weight, a key or a value: bfloat16


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together: `sequences` prompts of `tokens_in` tokens, `tokens_out` new ones each."""

    sequences: int
    tokens_in: int
    tokens_out: int
    chunk: int = 8192  # most tokens of a prefill step on one rank

    def prefill_steps(self, ranks: int = 1) -> int:
        """Steps until all prompts are read."""
        return math.ceil(self.rank_sequences(ranks) * self.tokens_in / self.chunk)

    def rank_sequences(self, ranks: int) -> int:
        """Sequences of the rank with the most."""
        return math.ceil(self.sequences / ranks)

    def prefill_sequences(self, ranks: int) -> int:
        """Whole prompts in an average prefill step of a rank, at least one."""
        return max(1, round(self.rank_sequences(ranks) / self.prefill_steps(ranks)))

    @property
    def context(self) -> int:
        """Tokens in the cache of a sequence halfway through its decode."""
        return self.tokens_in + self.tokens_out // 2


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a step: one layer, its exchange between ranks, and the head."""

    layer: float
    head: float
    exchange: float = 0.0
    experts: float = 0.0  # of `layer`

    def step(self, layers: int) -> float:
        """Seconds of a step through the whole model."""
        return layers * (self.layer + self.exchange) + self.head


@dataclass(frozen=True)
class Link:
    """Between GPUs of a host: bytes/s out of one GPU, where that is from, and seconds until an exchange starts."""

    bytes_per_s: float | None
    source: str
    latency_s: float = 0.0

    def exchange_seconds(self, rows: int, hidden: int, ranks: int) -> float:
        """Rows [rows, hidden] of a rank to their experts and back: two all_to_alls; (N - 1) / N of the rows leave."""
        if ranks == 1:
            return 0.0
        if not self.bytes_per_s:
            raise CannotRun("the link between GPUs is unknown here; give --link-gb-s")
        return 2 * (self.latency_s + rows * hidden * BYTES * (ranks - 1) / ranks / self.bytes_per_s)


def link_between_gpus(machine: Machine, gb_per_s: float | None, latency_us: float | None) -> Link:
    """The link as given (1e9 bytes/s out of a GPU), else from the machine's data sheet, else unknown."""
    late = f" after {latency_us:g} us" if latency_us else ", latency not counted (--link-latency-us adds it)"
    rate = 1e9 * gb_per_s if gb_per_s else machine.peak.link_bytes_per_s
    source = "as given" if gb_per_s else "by the data sheet"
    return Link(rate, f"{rate / 1e9:g} GB/s {source}{late}" if rate else "unknown", 1e-6 * (latency_us or 0))


def predict(preset: Preset, workload: Workload, prefill: Parts, decode: Parts, ranks: int = 1) -> dict[str, float]:
    """Seconds and tokens/s of a workload on a whole model."""
    prefill_s = workload.prefill_steps(ranks) * prefill.step(preset.layers)
    decode_step = decode.step(preset.layers)
    seconds = prefill_s + (workload.tokens_out - 1) * decode_step
    return {
        "prefill_s": prefill_s,
        "decode_step_ms": 1e3 * decode_step,
        "tokens_per_s": workload.sequences * workload.tokens_out / seconds,
    }


def memory_per_rank(preset: Preset, workload: Workload, ranks: int, itemsize: int = BYTES) -> dict[str, float]:
    """Bytes of weights (experts shared out, the rest on every rank) and of the KV cache at the workload's end."""
    weights = itemsize * (preset.expert_parameters / ranks + preset.other_parameters)
    tokens = workload.rank_sequences(ranks) * (workload.tokens_in + workload.tokens_out)
    return {"weights": weights, "kv_cache": tokens * itemsize * preset.kv_values_per_token}


def fits(memory: dict[str, float], available: float) -> bool:
    """Whether a rank's weights and KV cache fit into a GPU of `available` bytes."""
    return sum(memory.values()) <= GPU_MEMORY_UTILIZATION * available


def gpus_needed(rows: Sequence[dict], target: float) -> str:
    """The fewest GPUs of a plan that fit and reach `target` tokens/s: "1 GPU", "4 GPUs", "more than 8 GPUs"."""
    needed = [row["gpus"] for row in rows if row["fits"] == "yes" and (row["tokens_per_s"] or 0) >= target]
    count = min(needed, default=rows[-1]["gpus"])
    return f"{'' if needed else 'more than '}{count} GPU{'' if count == 1 else 's'}"

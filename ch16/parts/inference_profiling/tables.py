"""Rows of the tables: a phase's time by kind of work, and its counted work against the limits."""

from collections.abc import Mapping
from dataclasses import dataclass

from ch16.parts.inference_profiling.attribution import GAPS, KINDS
from ch16.parts.inference_profiling.work import Limits, Weights, Work, count, verdict
from common.results import Column


@dataclass(frozen=True)
class Load:
    """What is profiled: `batch` sequences of `prompt` tokens, then `steps` decode steps of one token each."""

    batch: int
    prompt: int
    steps: int


Parts = Mapping[str, Mapping[str, float]]  # seconds of each kind, by phase

KIND_KEYS = ("matrix_percent", "attention_percent", "elementwise_percent", "copies_percent", "gaps_percent")
KINDS_COLUMNS = (
    Column("what", "phase"),
    Column("ms", "ms, profiled", ",.2f"),
    *(Column(key, f"{kind} %", ".1f") for key, kind in zip(KIND_KEYS, KINDS, strict=True)),
    Column("sum_percent", "sum, of wall time %", ".1f"),
)
BOUNDS_COLUMNS = (
    Column("what", "phase"),
    Column("tokens", "tokens", ",d"),
    Column("ms", "ms", ",.2f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("gflop", "GFLOP", ",.1f"),
    Column("gb", "GB", ",.2f"),
    Column("intensity", "FLOP/byte", ",.1f"),
    Column("tflop_per_s", "TFLOP/s", ",.2f"),
    Column("compute_percent", "of compute limit %", ".1f"),
    Column("gb_per_s", "GB/s", ",.1f"),
    Column("memory_percent", "of memory limit %", ".1f"),
    Column("idle_percent", "launch gaps %", ".1f"),
    Column("verdict", "verdict"),
)


def kinds_row(what: str, parts: Mapping[str, float], wall: float) -> dict:
    """A row of KINDS_COLUMNS from seconds by kind, and the wall time they are a part of."""
    whole = sum(parts.values())
    shares = {key: 100 * parts[kind] / whole for key, kind in zip(KIND_KEYS, KINDS, strict=True)}
    return {"what": what, "ms": 1e3 * whole, **shares, "sum_percent": 100 * whole / wall}


def gap_share(parts: Mapping[str, float], seconds: float, device: str) -> float:
    """Share of launch gaps in a phase that took `seconds` without the profiler.

    The profiler slows the host down, not the kernels: on a GPU their time is held against the time without it. On a
    CPU both run on the same cores, and the share is that of the profiled run.
    """
    busy = sum(parts.values()) - parts[GAPS]
    return max(0.0, 1 - busy / seconds) if device == "cuda" else parts[GAPS] / sum(parts.values())


def bounds_row(what: str, tokens: int, work: Work, seconds: float, gaps: float, limits: Limits) -> dict:
    """A row of BOUNDS_COLUMNS: the work of a phase, the time it took, the share of gaps in it."""
    return {
        "what": what,
        "tokens": tokens,
        "ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "gflop": work.flops / 1e9,
        "gb": work.bytes / 1e9,
        "intensity": work.intensity,
        "tflop_per_s": work.flops / seconds / 1e12,
        "compute_percent": 100 * work.flops / seconds / limits.flops_per_s,
        "gb_per_s": work.bytes / seconds / 1e9,
        "memory_percent": 100 * work.bytes / seconds / limits.bytes_per_s,
        "idle_percent": 100 * gaps,
        "verdict": verdict(work, limits, gaps),
    }


def work_of_phases(weights: Weights, config: Mapping, load: Load, prompt_logits: int) -> dict[str, Work]:
    """Work of the prefill, which computes logits of `prompt_logits` tokens of each prompt, and of the decode steps."""
    decode = [count(weights, config, 1, load.prompt + i, 1, load.batch) for i in range(load.steps)]
    prefill = count(weights, config, load.prompt, 0, prompt_logits, load.batch)
    return {"prefill": prefill, "decode": sum(decode[1:], decode[0])}


def bounds_rows(
    load: Load, parts: Parts, seconds: Mapping[str, float], work: Mapping[str, Work], device: str, limits: Limits
) -> list[dict]:
    """Rows of BOUNDS_COLUMNS for both phases, from seconds without the profiler."""
    tokens = {"prefill": load.batch * load.prompt, "decode": load.batch * load.steps}
    gaps = {name: gap_share(parts[name], seconds[name], device) for name in parts}
    return [bounds_row(name, tokens[name], work[name], seconds[name], gaps[name], limits) for name in parts]

"""Columns and rows of the tables: time by kind of work, work against limits, launch modes, profilers; the claim P1."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ch16.parts.inference_profiling.attribution import GAPS, KINDS
from ch16.parts.inference_profiling.work import Limits, Weights, Work, count
from common.results import Column, Verdict, judge, not_applicable


@dataclass(frozen=True)
class ProfiledRun:
    """What is profiled: `batch` sequences of `prompt` tokens, then `steps` decode steps of one token each."""

    batch: int
    prompt: int
    steps: int


RooflineVerdict = Callable[[Work, Limits, float], str]  # the script's `verdict`

KIND_KEYS = ("matrix_percent", "attention_percent", "elementwise_percent", "copies_percent", "gaps_percent")
KINDS_COLUMNS = (
    Column("what", "phase"),
    Column("ms", "ms, profiled", ",.2f"),
    *(Column(key, f"{kind} %", ".1f") for key, kind in zip(KIND_KEYS, KINDS, strict=True)),
    Column("sum_percent", "sum, % of wall time", ".1f", detail=True),
)
BOUNDS_COLUMNS = (
    Column("what", "phase"),
    Column("tokens", "tokens", ",d", detail=True),
    Column("ms", "ms", ",.2f"),
    Column("tokens_per_s", "tokens/s", ",.0f", detail=True),
    Column("gflop", "GFLOP", ",.1f", detail=True),
    Column("gb", "GB", ",.2f", detail=True),
    Column("intensity", "FLOP/byte", ",.1f"),
    Column("tflop_per_s", "TFLOP/s", ",.2f"),
    Column("compute_percent", "compute, % of roofline", ".1f"),
    Column("gb_per_s", "GB/s", ",.1f"),
    Column("memory_percent", "memory, % of roofline", ".1f"),
    Column("idle_percent", "launch gaps %", ".1f"),
    Column("verdict", "verdict"),
)
MODES_COLUMNS = (
    Column("what", "launch mode"),
    Column("step_ms", "ms per step", ".2f"),
    Column("tokens_per_s", "tokens/s", ",.0f", detail=True),
    Column("over_eager", "speed-up over eager", ".2f"),
    Column("busy_ms", "ms busy", ".2f", detail=True),
    Column("idle_percent", "launch gaps %", ".1f"),
    Column("memory_percent", "memory, % of roofline", ".1f"),
    Column("verdict", "verdict"),
    Column("error_percent", "logits differ %", ".1f"),
    Column("same", "steps with eager's tokens", "d", detail=True),
    Column("prepare_s", "s to prepare", ".1f"),
)
COST_COLUMNS = (
    Column("what", "profiler"),
    Column("prefill_ms", "prefill ms", ",.2f"),
    Column("decode_ms", "decode ms", ",.2f"),
    Column("prefill_ratio", "prefill, vs. off", ".2f"),
    Column("decode_ratio", "decode, vs. off", ".2f"),
)


def kinds_row(what: str, parts: Mapping[str, float], wall: float) -> dict:
    """A row of KINDS_COLUMNS from seconds by kind and the wall time of the phase."""
    whole = sum(parts.values())
    shares = {key: 100 * parts[kind] / whole for key, kind in zip(KIND_KEYS, KINDS, strict=True)}
    return {"what": what, "ms": 1e3 * whole, **shares, "sum_percent": 100 * whole / wall}


def gap_share(parts: Mapping[str, float], seconds: float, device: str) -> float:
    """Share of launch gaps in a phase that took `seconds` without the profiler.

    The profiler slows down the host, not the kernels: on a GPU their time is divided by the time without it. On a CPU
    both run on the same cores, and the share is that of the profiled run.
    """
    busy = sum(parts.values()) - parts[GAPS]
    return max(0.0, 1 - busy / seconds) if device == "cuda" else parts[GAPS] / sum(parts.values())


def bounds_row(
    what: str, tokens: int, work: Work, seconds: float, gaps: float, limits: Limits, verdict: RooflineVerdict
) -> dict:
    """A row of BOUNDS_COLUMNS: the work of a phase, its time, its share of gaps."""
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


def bounds_rows(
    run: ProfiledRun,
    parts: Mapping[str, Mapping[str, float]],
    seconds: Mapping[str, float],
    work: Mapping[str, Work],
    device: str,
    limits: Limits,
    verdict: RooflineVerdict,
) -> list[dict]:
    """Rows of BOUNDS_COLUMNS for both phases, from seconds without the profiler."""
    tokens = {"prefill": run.batch * run.prompt, "decode": run.batch * run.steps}
    gaps = {name: gap_share(parts[name], seconds[name], device) for name in parts}
    return [bounds_row(name, tokens[name], work[name], seconds[name], gaps[name], limits, verdict) for name in parts]


def modes_row(bounds: Mapping[str, object], steps: int, speedup: float, error: float, same: int, took: float) -> dict:
    """A row of MODES_COLUMNS, from that of BOUNDS_COLUMNS and the seconds that the mode took to prepare."""
    step_ms = bounds["ms"] / steps
    row = {"step_ms": step_ms, "over_eager": speedup, "busy_ms": step_ms * (1 - bounds["idle_percent"] / 100)}
    return {**bounds, **row, "error_percent": 100 * error, "same": same, "prepare_s": took}


def cost_row(what: str, seconds: Mapping[str, float], off: Mapping[str, float]) -> dict:
    """A row of COST_COLUMNS from the seconds of both phases with a profiler and without."""
    row: dict[str, object] = {"what": what}
    for name in ("prefill", "decode"):
        row |= {f"{name}_ms": 1e3 * seconds[name], f"{name}_ratio": seconds[name] / off[name]}
    return row


def work_of_phases(weights: Weights, config: Mapping, run: ProfiledRun, prompt_logits: int) -> dict[str, Work]:
    """Work of the prefill, which computes logits of `prompt_logits` tokens per prompt, and of the decode steps."""
    decode = [count(weights, config, 1, run.prompt + i, 1, run.batch) for i in range(run.steps)]
    prefill = count(weights, config, run.prompt, 0, prompt_logits, run.batch)
    return {"prefill": prefill, "decode": sum(decode[1:], decode[0])}


def claim(bounds: Sequence[dict], near_percent: float) -> Verdict:
    """P1 from rows of BOUNDS_COLUMNS; a phase that stays below `near_percent` of both limits decides nothing."""
    prefill, decode = bounds
    limited = [row for row in bounds if row["verdict"] != "launch-bound"]
    far = [row["what"] for row in limited if max(row["compute_percent"], row["memory_percent"]) < near_percent]
    text = "; ".join(
        f"{row['what']} is {row['verdict']}: {row['compute_percent']:.0f}% of the compute limit, "
        f"{row['memory_percent']:.0f}% of the memory limit, {row['idle_percent']:.0f}% launch gaps"
        for row in bounds
    )
    if far:
        reason = f"{' and '.join(far)} came near neither limit: the model or the prompt is too small to show one"
        return not_applicable("P1", reason, text)
    expected = prefill["verdict"] == "compute-bound" and decode["verdict"] in ("memory-bound", "launch-bound")
    return judge("P1", expected, text)

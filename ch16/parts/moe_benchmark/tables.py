"""What the MoE benchmark prints: the columns of its tables, rows made of measurements, the claims M1 and M2."""

from collections.abc import Mapping, Sequence

import torch

from ch16.parts.moe_benchmark.experts import Routing
from ch16.parts.moe_benchmark.planner import Link, Workload, gpus_needed
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.routing import CAPACITY_FACTOR, RANKS, expert_load, load_balance
from common.gpu import DTYPE_NAMES, Machine
from common.results import Column, Verdict, judge, not_applicable

ERROR_TARGET_PERCENT = 15.0  # of the predicted throughput of a whole model
COST_TARGET_PERCENT = 5.0  # from here on imbalance "costs throughput"

LAYER_COLUMNS = (
    Column("layer", "layer"),
    Column("tokens", "tokens", ",d"),
    Column("active_experts", "active experts", "d"),
    Column("loop_ms", "loop ms", ".2f"),
    Column("grouped_ms", "grouped ms", ".3f"),
    Column("fp8_ms", "FP8 ms", ".3f"),
    Column("vllm_ms", "vLLM ms", ".3f"),
    Column("over_loop", "speed-up vs. loop", ".2f"),
    Column("over_vllm", "speed-up vs. vLLM", ".2f", detail=True),
    Column("fp8_over_grouped", "FP8 speed-up", ".2f", detail=True),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("tflops", "TFLOP/s", ".3g", detail=True),
    Column("gb_per_s", "GB/s", ",.0f", detail=True),
    Column("compute_limit_ms", "compute limit ms", ".3f", detail=True),
    Column("memory_limit_ms", "memory limit ms", ".3f", detail=True),
    Column("limit_percent", "% of roofline", ".0f"),
)
BALANCE_COLUMNS = (
    Column("max_mean", "load max / mean", ".2f"),
    Column("cv", "CV", ".2f", detail=True),
    Column("entropy", "entropy", ".3f", detail=True),
    Column("empty_percent", "empty %", ".1f", detail=True),
    Column("dropped_percent", "dropped %", ".1f"),
)
TRAINED_COLUMNS = (Column("layer", "layer", "d"), *BALANCE_COLUMNS)
PATTERN_COLUMNS = (
    Column("pattern", "routing"),
    Column("tokens", "tokens", ",d"),
    *BALANCE_COLUMNS,
    Column("ms", "ms", ".3f"),
    Column("cost_percent", "cost %", "+.1f"),
    Column("spread_percent", "spread %", ".1f"),
    Column("rank_max_mean", "rank max / mean", ".2f"),
    Column("rank_ms", "rank ms", ".3f", detail=True),
    Column("rank_cost_percent", "rank cost %", "+.1f"),
    Column("rank_spread_percent", "rank spread %", ".1f"),
)
PLAN_COLUMNS = (
    Column("gpus", "GPUs", "d"),
    Column("weights_gb", "weights GB per GPU", ".1f"),
    Column("kv_gb", "KV cache GB per GPU", ".1f"),
    Column("fits", "fits"),
    Column("prefill_layer_ms", "prefill layer ms", ".3f"),
    Column("layer_ms", "decode layer ms", ".3f"),
    Column("experts_ms", "experts ms", ".3f"),
    Column("exchange_ms", "exchange ms", ".3f"),
    Column("head_ms", "head ms", ".2f"),
    Column("decode_step_ms", "decode step ms", ".2f"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
)
VALIDATION_COLUMNS = (
    Column("what", "figure"),
    Column("predicted", "predicted", ",.2f"),
    Column("measured", "measured", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)
RANK_COLUMNS = (
    Column("pattern", "routing"),
    Column("tokens", "tokens per rank", ",d"),
    Column("rank_max_mean", "max / mean", ".2f"),
    Column("step_ms", "layer ms", ".3f"),
    Column("compute_ms", "compute ms", ".3f"),
    Column("imbalance_ms", "imbalance ms", ".3f"),
    Column("exchange_ms", "exchange ms", ".3f"),
    Column("rest_ms", "rest ms", ".3f"),
    Column("gb_per_s", "exchange GB/s, busiest rank", ".2f", detail=True),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("rank_cost_percent", "cost %", "+.1f"),
    Column("rank_spread_percent", "spread %", ".0f"),
)


def layer_row(
    preset: Preset, x: torch.Tensor, routing: Routing, seconds: Mapping[str, float], machine: Machine, why_no_vllm: str
) -> dict:
    """A row of LAYER_COLUMNS from the seconds of each dispatch; from `tokens_per_s` on it is about grouped dispatch.

    Its bytes are those that must move: weights of active experts, and the tokens x in and out, once. Also
    `why_no_vllm` where `seconds` has no "vllm".
    """
    tokens, grouped = len(x), seconds["grouped"]
    active = int((expert_load(routing, preset.experts) > 0).sum())
    moved = x.element_size() * (active * preset.sizes.parameters + 2 * tokens * preset.hidden)
    flops, peak = preset.sizes.flops(tokens * preset.top_k), machine.peak
    row = {
        "layer": preset.name.replace("gated experts", "gated"),
        "tokens": tokens,
        "active_experts": active,
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "over_loop": seconds["loop"] / grouped,
        "tokens_per_s": tokens / grouped,
        "tflops": flops / grouped / 1e12,
        "gb_per_s": moved / grouped / 1e9,
    }
    row |= {"over_vllm": seconds["vllm"] / grouped} if "vllm" in seconds else {"why_no_vllm": why_no_vllm}
    if "fp8" in seconds:
        row["fp8_over_grouped"] = grouped / seconds["fp8"]
    if peak.bf16_flops and peak.bytes_per_s:
        limits = flops / peak.bf16_flops, moved / peak.bytes_per_s
        row |= {"compute_limit_ms": 1e3 * limits[0], "memory_limit_ms": 1e3 * limits[1]}
        row["limit_percent"] = 100 * max(limits) / grouped
    return row


def routing_title(layer: Preset) -> str:
    """Above PATTERN_COLUMNS."""
    return (
        f"What routing costs, {layer.name}, grouped dispatch: time over balanced routing on one device, and on the "
        f"busiest of {RANKS} ranks (emulated); dropped: beyond {CAPACITY_FACTOR}x the mean; all but trained routing is "
        "simulated"
    )


def plan_title(preset: Preset, machine: Machine, workload: Workload, dispatch: str) -> str:
    """Above PLAN_COLUMNS."""
    return (
        f"Plan for {preset.name} in {DTYPE_NAMES[machine.dtype]}, {workload.sequences} sequences at once, "
        f"{workload.tokens_in} tokens in and {workload.tokens_out} out; from one layer, experts by {dispatch}"
    )


def plan_notes(plan: Sequence[dict], link: Link, target: int | None) -> str:
    """Below PLAN_COLUMNS: how several GPUs were emulated, and how many reach `target` tok/s."""
    notes = "  one device only: the link to further devices is unknown; --link-gb-s N adds 2, 4 and 8"
    if len(plan) > 1:
        notes = f"  several GPUs: emulated one by one, uniform routing\n  exchange: {link.source}"
    if target:
        notes += f"\n  {target:,} output tok/s need {gpus_needed(plan, target)}"
    return notes


def balance_rows(layers: Sequence[Routing], experts: int) -> list[dict]:
    """Load balance of each layer of a trained model: rows of TRAINED_COLUMNS."""
    return [{"layer": i, **load_balance(expert_load(routing, experts))} for i, routing in enumerate(layers)]


def validation_rows(predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[dict]:
    """Rows of VALIDATION_COLUMNS: prediction beside measurement; the error is relative to the measurement."""
    pairs = (
        ("output tok/s", predicted["tokens_per_s"], measured["tokens_per_s"]),
        ("decode step ms (ITL P50)", predicted["decode_step_ms"], measured["itl_p50_ms"]),
        ("prefill s (to the last first token)", predicted["prefill_s"], measured["prefill_s"]),
    )
    return [{"what": w, "predicted": p, "measured": m, "error_percent": 100 * (p / m - 1)} for w, p, m in pairs]


def prediction_claim(validation: Sequence[dict], why_not: str) -> Verdict:
    """M1 from the rows of VALIDATION_COLUMNS; without any, n/a with the reason."""
    if not validation:
        return not_applicable("M1", why_not)
    throughput = validation[0]
    error, text = throughput["error_percent"], "predicted {predicted:,.0f}, measured {measured:,.0f} output tok/s"
    return judge("M1", abs(error) <= ERROR_TARGET_PERCENT, f"{text.format(**throughput)}: {error:+.1f}%")


def uneven_load_claim(patterns: Sequence[dict], on_ranks: str) -> Verdict:
    """M2 by trained routers if there are any, else by simulated Zipf routing, where the cost is highest.

    A cost larger than its own spread has priority over larger costs that are not.
    """
    trained = [row for row in patterns if row["pattern"].startswith("trained")]
    candidates = trained or [row for row in patterns if row["pattern"] == "zipf"]
    places = {"": "on one device", "rank_": on_ranks}
    costs = [
        (row[f"{prefix}cost_percent"], row.get(f"{prefix}spread_percent", 0.0), row, place)
        for row in candidates
        for prefix, place in places.items()
        if f"{prefix}cost_percent" in row
    ]
    cost, spread, row, place = max(costs, key=lambda found: (found[0] >= max(COST_TARGET_PERCENT, found[1]), found[0]))
    text = (
        f"{row['pattern']} routing{'' if trained else ' (simulated)'}, {row['tokens']:,} tokens: busiest expert "
        f"{row['max_mean']:.1f}x the mean, time over balanced routing {cost:+.0f}% {place}"
    )
    if abs(cost) < spread:
        return not_applicable("M2", f"that is less than repeated runs differ ({spread:.0f}%)", text)
    return judge("M2", cost >= COST_TARGET_PERCENT, text)

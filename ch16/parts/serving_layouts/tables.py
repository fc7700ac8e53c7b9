"""What serving_layouts.py prints: the plan, the starts, the loads, and the claims S1 to S4."""

from collections.abc import Mapping, Sequence

from common import targets
from common.gpu import Machine
from common.models import Model
from common.results import Column, Verdict, judge, not_applicable

SEQUENCE_TOKENS = 1024  # per request in the dry run's table
PLAN_COLUMNS = (
    Column("machine", "machine"),
    Column("layout", "layout"),
    Column("processes", "processes", "d"),
    Column("weights_gib", "weights GiB per GPU", ".1f"),
    Column("cache_gib", "KV cache GiB per GPU", ".1f"),
    Column("cache_tokens", "KV tokens, all replicas", ",d"),
    Column("sequences", f"sequences of {SEQUENCE_TOKENS:,} tokens", ",d"),
    Column("fits", "fits"),
    Column("problem", "why not", detail=True),
)
START_COLUMNS = (
    Column("layout", "layout"),
    Column("start_s", "ready after s", ".0f"),
    Column("cache_tokens", "KV tokens planned", ",d"),
    Column("measured_cache_tokens", "KV tokens of vLLM", ",d"),
    Column("error_percent", "error %", "+.1f"),
)


def plan_row(machine: Machine, layout: object, plan: object, working_bytes: int, problem: str) -> dict[str, object]:
    """A row of PLAN_COLUMNS, with the memory of a GPU for the picture. Layout and plan: those of the script."""
    return {
        "machine": machine.title,
        "layout": str(layout),
        "processes": layout.processes,
        "memory_gib": machine.memory_bytes / 2**30,
        "working_gib": working_bytes / 2**30,
        "weights_gib": plan.weights / 2**30,
        "cache_gib": plan.cache / 2**30,
        "cache_tokens": plan.tokens,
        "sequences": plan.tokens // SEQUENCE_TOKENS,
        "fits": "no" if problem else "yes",
        "problem": problem,
    }


def layout_columns(rows: Sequence[Mapping], machine: Machine) -> list[Column]:
    """Columns of the table of loads, without those that this run has no values for."""
    columns = [
        Column("layout", "layout"),
        Column("at_once", "requests at once", ",d"),
        Column("tokens_per_s", "output tok/s", ",.0f"),
        Column("tokens_per_s_device", "per GPU" if machine.device == "cuda" else "per core", ",.0f"),
        Column("tpot_p50_ms", "TPOT P50 ms", ".1f"),
        Column("tpot_p99_ms", "TPOT P99 ms", ".1f"),
        Column("ttft_p50_ms", "TTFT P50 ms", ",.0f", detail=True),
        Column("ttft_p99_ms", "TTFT P99 ms", ",.0f"),
        Column("utilization", "GPU busy %", ".0f"),
        Column("goodput", "goodput req/s", ",.2f", detail=True),
        Column("good_percent", "good %", ".0f"),
        Column("price", "price of 1M", ".3f"),
        Column("errors", "errors", "d", detail=True),
        Column("late_ms", "client late P99 ms", ".1f", detail=True),
        Column("best", ""),
    ]
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]


def claims(best: Mapping, layout: str, gpus: int, model: Model | None, machine: Machine) -> list[Verdict]:
    """S1 to S4 by the best row of all layouts; the claims are about eight GPUs and a 33B model."""
    throughput = best["tokens_per_s"]
    s1 = judge("S1", throughput >= targets.TOKENS_PER_S, f"{throughput:,.0f} tok/s as {layout}")
    verdicts = [s1, *targets.judged(best)]
    reason = "the replicas were stand-ins" if model is None else targets.why_not_judged(model, machine)
    if not reason and gpus < targets.GPUS:
        reason = f"the claim is about {targets.GPUS} GPUs, this was measured on {gpus}"
    if not reason:
        return verdicts
    return [not_applicable(v.claim, v.reason or reason, v.measured) for v in verdicts]

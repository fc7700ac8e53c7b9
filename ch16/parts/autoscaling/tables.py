"""The tables: their columns, the rows that need no simulation, and the claim."""

from collections.abc import Mapping, Sequence

import numpy as np

from ch16.parts.autoscaling.search import Tried, best, missed_at_price
from ch16.parts.autoscaling.signals import Signal
from ch16.parts.autoscaling.simulate import Outcome
from common.costs import Costs, check_columns
from common.results import Column, Verdict, judge, not_applicable
from common.timing import percentile

LOADS = (0.5, 1.0, 2.0, 5.0)  # over the capacity of two replicas
SETTLED = (0.5, 1.0, 1.5)  # steady loads, in busy replicas
BUDGETS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # over replica-hours of replicas that are always full
COUNTS = ("queue", "active", "larger")  # the signals that count requests
FEWER = 1 / 5  # misses of the best signal, over those of GPU utilization for the same replica-hours

COST_COLUMNS = (
    Column("source", "step of"),
    Column("slots", "slots"),
    Column("tokens_in", "tokens in"),
    Column("tokens_out", "tokens out"),
    Column("base_ms", "base ms", ".2f"),
    Column("sequence_ms", "+ per request ms", ".3f"),
    Column("prompt_token_ms", "+ per prompt token ms", ".4f"),
    Column("requests_per_s", "capacity, requests/s", ".2f"),
)
CHECK_COLUMNS = check_columns("twice the slots, all at once")
OUTCOME_COLUMNS = (
    Column("signal", "signal"),
    Column("target", "target", ",.3g"),
    Column("missed_percent", "SLO misses %", ".2f"),
    Column("ttft_p99_s", "TTFT P99 s", ",.2f"),
    Column("hours", "replica hours", ",.1f"),
    Column("mean", "replicas, mean", ".2f"),
    Column("largest", "most", "d"),
    Column("flaps", "flaps", "d"),
)
SEEN_COLUMNS = (
    Column("signal", "mean over replicas"),
    *(Column(f"x{load:g}", f"{load:g}x", ",.3g") for load in LOADS),
    Column("ratio", "5x over 1x", ",.2f"),
)
COLD_COLUMNS = (
    Column("cold_start_s", "cold start s"),
    Column("rise_s", "bursts rise in s"),
    *OUTCOME_COLUMNS[2:5],
    Column("gpu_missed_percent", "GPU utilization: misses %", ".2f"),
    Column("gpu_hours", "replica hours", ",.1f"),
)
VALUE_COLUMNS = (
    Column("how", "target of the pool's sum"),
    Column("target", "number", ",.3g"),
    *(Column(f"load{load:g}", f"replicas at a load of {load:g}", "d") for load in SETTLED),
)
RULES_COLUMNS = (Column("rules", "windows and policies"), *OUTCOME_COLUMNS[1:])
FRONTIER_COLUMNS = (OUTCOME_COLUMNS[0], OUTCOME_COLUMNS[1], OUTCOME_COLUMNS[2], OUTCOME_COLUMNS[4])
PRICE_COLUMNS = (OUTCOME_COLUMNS[0], *(Column(f"b{budget:g}", f"{budget:g}x", ".2f") for budget in BUDGETS))


def cost_row(source: str, costs: Costs, slots: int, tokens_in: int, tokens_out: int, scale: float) -> dict:
    """A row of COST_COLUMNS, with what `read_costs` needs."""
    row = {"source": source, "slots": slots, "tokens_in": tokens_in, "tokens_out": tokens_out}
    row |= {f"{part}_ms": 1e3 * getattr(costs, f"{part}_s") for part in ("base", "sequence", "prompt_token")}
    return row | {"requests_per_s": 1 / costs.slot_s(slots, tokens_in, tokens_out), "scale": scale}


def outcome_row(outcome: Outcome, slo_s: float) -> dict:
    """A row of OUTCOME_COLUMNS, without signal and target."""
    return {
        "missed_percent": 100 * float(np.mean(outcome.ttft_s > slo_s)),
        "ttft_p99_s": percentile(outcome.ttft_s, 99),
        "hours": outcome.replica_hours,
        "mean": float(outcome.asked.mean()),
        "largest": int(outcome.asked.max()),
        "flaps": outcome.flaps,
    }


def price_rows(frontier: Mapping[str, Sequence[Tried]], chosen: Mapping[str, Signal], full_h: float) -> list[dict]:
    """Rows of PRICE_COLUMNS: the fewest misses of any target within each budget; None if nothing is so cheap."""
    rows = []
    for name, tried in frontier.items():
        row: dict = {"signal": chosen[name].title}
        for budget in BUDGETS:
            found = best(tried, budget * full_h)
            row[f"b{budget:g}"] = found.missed_percent if found.hours <= budget * full_h else None
        rows.append(row)
    return rows


def claim(rows: Mapping[str, Mapping], frontier: Sequence[Tried]) -> Verdict:
    """A1 from the bursty rows by signal; `frontier`: all that utilization gave, which may mix two targets."""
    counts = [rows[name] for name in COUNTS if name in rows]
    if "gpu" not in rows or not counts:
        return not_applicable("A1", "--signals left out GPU utilization or all that count requests")
    counted = min(counts, key=lambda row: (row["missed_percent"], row["hours"]))
    gpu, same_price = rows["gpu"], missed_at_price(frontier, counted["hours"])
    text = (
        f"simulated, bursty: {counted['missed_percent']:.2f}% misses for {counted['hours']:.1f} replica-hours on "
        f"{counted['signal']}. GPU utilization: {gpu['missed_percent']:.2f}% for {gpu['hours']:.1f}, and "
        f"{same_price:.2f}% for as many replica-hours, if two targets may take turns"
    )
    if alone := rows.get("queue"):
        text += f". Queue depth alone: {alone['missed_percent']:.2f}% for {alone['hours']:.1f}"
    return judge("A1", counted["missed_percent"] <= FEWER * same_price and same_price > 0, text)

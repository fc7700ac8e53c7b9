"""The chapter's performance targets, claims S1 to S4: what they ask for, of which models, and the best row.

The 33B model of the claims is dense. A mixture of experts counts by the parameters that a token uses: they decide how
much there is to compute per token. A 30B model whose tokens use 3B parameters says nothing about 33B.
"""

from collections.abc import Callable, Sequence

from common.gpu import Machine
from common.models import Model, parameter_count
from common.results import Verdict, judge, not_applicable

GPUS = 8
PARAMETERS = 30e9  # at least
TOKENS_PER_S = 15_000  # S1: output tokens, on all GPUs together
TPOT_P50_MS, TPOT_P99_MS = 50.0, 100.0  # S2, S3: under
UTILIZATION = (85.0, 95.0)  # S4: percent
BEST = "<- best"


def best_row(rows: Sequence[dict], good: Callable[[dict], bool]) -> dict:
    """The highest throughput among the good rows; if there are none, the lowest TPOT P99."""
    if kept := [row for row in rows if good(row)]:
        return max(kept, key=lambda row: row["tokens_per_s"])
    return min(rows, key=lambda row: row["tpot_p99_ms"])


def marked(rows: Sequence[dict], good: Callable[[dict], bool], missed: str) -> list[dict]:
    """The rows, `best` in each: "<- best" in the best one, or `missed` if none is good."""
    best = best_row(rows, good)
    return [row | {"best": (BEST if good(best) else missed) if row is best else ""} for row in rows]


def judged(row: dict[str, float | None]) -> list[Verdict]:
    """S2, S3 and S4 by `tpot_p50_ms`, `tpot_p99_ms`, and `utilization` in percent, None where it was not sampled."""
    p50, p99, busy = row["tpot_p50_ms"], row["tpot_p99_ms"], row["utilization"]
    low, high = UTILIZATION
    s2, s3 = judge("S2", p50 < TPOT_P50_MS, f"{p50:.1f} ms"), judge("S3", p99 < TPOT_P99_MS, f"{p99:.1f} ms")
    if busy is None:
        return [s2, s3, not_applicable("S4", "no GPU was sampled")]
    return [s2, s3, judge("S4", low <= busy <= high, f"{busy:.0f}%")]


def why_not_judged(model: Model, machine: Machine) -> str:
    """Why the claims are not about this model on this machine; empty if they are."""
    if machine.device == "cpu":
        return f"the claim is about GPUs and a 33B model; this is a CPU and {model.name}"
    active, total = parameter_count(model.config, active=True), parameter_count(model.config)
    if active is not None and active >= PARAMETERS:
        return ""
    reason = f"the claim is about a 33B model; this is {model.name}"
    if active is None:
        return f"{reason}, of unknown size"
    return reason if active == total else f"{reason}, of which a token uses {active / 1e9:.0f}B parameters"

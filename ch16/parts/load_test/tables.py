"""What load_test.py prints: tables of loads and of capacity, the claim W1."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.results import Column, Verdict, judge

W1_PERCENT = 15.0
RATE_COLUMNS = (
    Column("load", "load"),
    Column("offered", "offered req/s", ",.2f"),
    Column("answered", "answered req/s", ",.2f"),
    Column("goodput", "goodput req/s", ",.2f"),
    Column("good_percent", "good %", ".0f"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("errors", "errors"),
    Column("late_ms", "client late P99 ms", ".1f"),
)


def _latencies(quantiles: Sequence[int], detail: bool) -> tuple[Column, ...]:
    return tuple(
        Column(f"{key}_p{q}_ms", f"{title} P{q} ms", ",.1f" if key in ("tpot", "itl") else ",.0f", detail)
        for key, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E"))
        for q in quantiles
    )


LATENCY_COLUMNS = (RATE_COLUMNS[0], *_latencies((50, 99), detail=False), *_latencies((90,), detail=True))
SHAPE_COLUMNS = (
    *RATE_COLUMNS[:6],
    *(column for column in LATENCY_COLUMNS if column.key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms")),
    *(replace(column, detail=True) for column in RATE_COLUMNS[6:]),
)
CAPACITY_COLUMNS = (
    Column("what", "capacity"),
    Column("synthetic", "from synthetic requests", ",.2f"),
    Column("trace", "with the trace", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)


def capacity_row(what: str, synthetic: float, trace: float) -> dict:
    """A row of CAPACITY_COLUMNS: what synthetic requests predict beside what the trace gave."""
    error = 100 * (synthetic / trace - 1) if trace else None
    return {"what": what, "synthetic": synthetic, "trace": trace, "error_percent": error}


def claim(capacity: Sequence[Mapping]) -> Verdict:
    """W1 asks for two things: the requests/s of a full server, and the rate up to which the objective is kept."""
    _, full, knee = capacity
    error = full["error_percent"]
    answers = f"{full['synthetic']:.2f} requests/s predicted, {full['trace']:.2f} with the trace ({error:+.1f}%)"
    kept = f"{knee['synthetic']:.2f}/s predicted, {knee['trace']:.2f}/s with the trace"
    holds = abs(error) <= W1_PERCENT and knee["trace"] > 0 and abs(knee["error_percent"]) <= W1_PERCENT
    return judge("W1", holds, f"a full server answers {answers}; the objective is kept up to {kept}")

"""What load_test.py prints: tables of loads and of capacity, the claim W1."""

from collections.abc import Mapping, Sequence

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
    Column("ttft_p50_ms", "TTFT P50 ms", ",.0f"),
    Column("ttft_p99_ms", "TTFT P99 ms", ",.0f"),
    Column("tpot_p50_ms", "TPOT P50 ms", ",.1f"),
    Column("errors", "errors", detail=True),
    Column("late_ms", "client late P99 ms", ".1f", detail=True),
)
CAPACITY_COLUMNS = (
    Column("what", "capacity"),
    Column("synthetic", "from synthetic requests", ",.2f"),
    Column("trace", "with the trace", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)


def capacity_rows(synthetic: Mapping[str, float], trace: Mapping[str, float]) -> list[dict]:
    """Rows of CAPACITY_COLUMNS: what synthetic requests predict beside what the trace gave.

    Args:
        synthetic, trace: `tokens_per_s` of a full server, `tokens_out` per request, and the `knee` in requests/s.
    """
    pairs = [
        ("full server, output tok/s", *(load["tokens_per_s"] for load in (synthetic, trace))),
        ("full server, requests/s", *(load["tokens_per_s"] / load["tokens_out"] for load in (synthetic, trace))),
        ("knee, requests/s", *(load["knee"] for load in (synthetic, trace))),
    ]
    return [
        {"what": what, "synthetic": a, "trace": b, "error_percent": 100 * (a / b - 1) if b else None}
        for what, a, b in pairs
    ]


def claim(capacity: Sequence[Mapping]) -> Verdict:
    """W1 asks for two things: the requests/s of a full server, and the rate up to which the objective is kept."""
    _, full, knee = capacity
    error = full["error_percent"]
    measured = (
        f"a full server answers {full['synthetic']:.2f} requests/s predicted, {full['trace']:.2f} with the trace "
        f"({error:+.1f}%); the objective is kept up to {knee['synthetic']:.2f}/s predicted, "
        f"{knee['trace']:.2f}/s with the trace"
    )
    keeps = knee["trace"] > 0 and abs(knee["error_percent"]) <= W1_PERCENT
    return judge("W1", abs(error) <= W1_PERCENT and keeps, measured)

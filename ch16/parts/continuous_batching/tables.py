"""Columns of the tables, and their rows. The keys of a row are those of its columns."""

import math
from collections.abc import Mapping, Sequence

from ch16.parts.continuous_batching.bounds import bound, bound_by_time
from ch16.parts.continuous_batching.claims import SIZES_OF_CHAPTER, knee_of, span
from ch16.parts.continuous_batching.interference import NONE, WHOLE, PrefillMode, StreamRun
from ch16.parts.continuous_batching.sizes import AdmissionLoad
from common.load import Timeline
from common.results import Column
from common.timing import percentile

ADMISSION_COLUMNS = (
    Column("admission", "admission"),
    Column("tokens_per_s", "output tok/s", ",.1f"),
    Column("running", "running, mean", ".2f"),
    Column("wait_p50_s", "wait P50 s", ",.2f"),
    Column("wait_p99_s", "wait P99 s", ",.2f"),
    Column("e2e_p50_s", "E2E P50 s", ",.2f"),
    Column("e2e_p99_s", "E2E P99 s", ",.2f"),
)
GAIN_COLUMNS = (
    Column("bound", "upper bound of the gain"),
    Column("at_most", "bound", ".2f"),
    Column("measured", "measured", ".2f"),
    Column("share", "share", ".2f"),
)
FIT_COLUMNS = (
    Column("how", "KV memory per request"),
    Column("blocks", "blocks each", ".1f"),
    Column("fit", "requests that fit", ",d"),
)
POWER_COLUMNS = (Column("power", "tok/s per ms", ",.1f"), Column("mark", ""))
DECODE_COLUMNS = (
    Column("batch", "sequences", "d"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("ms", "ms per token", ",.1f"),
    *POWER_COLUMNS,
)
PREFILL_COLUMNS = (
    Column("batch", "prompts", "d"),
    Column("tokens_per_s", "prompt tok/s", ",.0f"),
    Column("ms", "ms to first tokens", ",.1f"),
    *POWER_COLUMNS,
)
KNEE_COLUMNS = (
    Column("phase", "phase"),
    Column("knee", "batches at the knee"),
    Column("share", "% of highest tok/s", detail=True),
    Column("chapter", "chapter says"),
    Column("crossover", "compute-bound from batch", ",.0f"),
    Column("why", "basis"),
)
INTERFERENCE_COLUMNS = (
    Column("how", "long prompts"),
    Column("where", "computed on"),
    Column("budget", "tokens per step", ",d"),
    Column("steps", "steps per prompt", ".0f", detail=True),
    Column("itl_p50_ms", "ITL P50 ms", ",.1f"),
    Column("itl_p99_ms", "ITL P99 ms", ",.1f"),
    Column("itl_max_ms", "ITL max ms", ",.1f", detail=True),
    Column("p99_ratio", "vs. whole", ".2f"),
    Column("ttft_ms", "TTFT P50 ms", ",.0f"),
    Column("tokens_per_s", "tok/s, in + out", ",.0f"),
    Column("throughput_ratio", "vs. whole", ".2f"),
)


def admission_row(name: str, timeline: Timeline) -> dict:
    """A row of ADMISSION_COLUMNS. A request waits until it is given to the engine; all were there at the start."""
    start = min(timeline.sent.values())
    waits = [sent - start for sent in timeline.sent.values()]
    e2e = [tokens[-1] - start for tokens in timeline.arrived.values()]
    return {
        "admission": name,
        "tokens_per_s": sum(map(len, timeline.arrived.values())) / max(e2e),
        "running": sum(step.requests for step in timeline.steps) / len(timeline.steps),
        "wait_p50_s": percentile(waits, 50),
        "wait_p99_s": percentile(waits, 99),
        "e2e_p50_s": percentile(e2e, 50),
        "e2e_p99_s": percentile(e2e, 99),
    }


def gain_rows(measured: float, lengths: Sequence[int], slots: int, step_s: Mapping[int, float]) -> list[dict]:
    """Rows of GAIN_COLUMNS: the measured gain beside both bounds."""
    bounds = {
        "E[longest of a batch] / E[length]": bound(lengths, slots),
        "the same, at the step times of these runs": bound_by_time(lengths, slots, step_s),
    }
    return [{"bound": n, "at_most": b, "measured": measured, "share": measured / b} for n, b in bounds.items()]


def fit_rows(load: AdmissionLoad, lengths: Sequence[int], blocks: int, block_size: int, longest: int) -> list[dict]:
    """Rows of FIT_COLUMNS, computed: the longest sequence reserved for each, or blocks as each needs them (K2)."""
    reserved = math.ceil(longest / block_size)
    paged = sum(math.ceil((load.tokens_in + length) / block_size) for length in lengths) / len(lengths)
    needs = {f"reserved: {longest:,} tokens": reserved, "paged: as many as it has tokens for": paged}
    return [{"how": how, "blocks": needed, "fit": int(blocks / needed)} for how, needed in needs.items()]


def size_row(batch: int, tokens: int, seconds: float) -> dict:
    """A row of DECODE_COLUMNS or PREFILL_COLUMNS, without `power` and `mark`."""
    return {"batch": batch, "tokens_per_s": tokens / seconds, "ms": 1e3 * seconds}


def knee_row(phase: str, rows: Sequence[Mapping], crossover: tuple[float | None, str]) -> dict:
    """A row of KNEE_COLUMNS."""
    _, low, high = SIZES_OF_CHAPTER[phase]
    first, last = knee_of(rows)
    highest = max(row["tokens_per_s"] for row in rows)
    batch, why = crossover
    return {
        "phase": phase,
        "knee": span(first["batch"], last["batch"]),
        "share": span(*(round(100 * row["tokens_per_s"] / highest) for row in (first, last))),
        "chapter": span(low, high),
        "crossover": None if batch is None or math.isinf(batch) else math.ceil(batch),
        "why": why,
    }


def interference_rows(runs: Mapping[PrefillMode, Sequence[StreamRun]]) -> list[dict]:
    """Rows of INTERFERENCE_COLUMNS: medians over the rounds."""
    rows = []
    for mode, done in runs.items():
        itl = [[gap for gaps in run.gaps_s for gap in gaps] for run in done]
        row = {
            "how": mode.name,
            "where": mode.where,
            "budget": mode.budget,
            "itl_p50_ms": 1e3 * percentile([percentile(gaps, 50) for gaps in itl], 50),
            "itl_p99_ms": 1e3 * percentile([percentile(gaps, 99) for gaps in itl], 50),
            "itl_max_ms": 1e3 * percentile([max(gaps) for gaps in itl], 50),
            "tokens_per_s": percentile([run.tokens / run.seconds for run in done], 50),
        }
        if mode.prompts:
            row["ttft_ms"] = 1e3 * percentile([t for run in done for t in run.ttft_s], 50)
        if mode.prompts and not mode.separate:
            row["steps"] = percentile([n for run in done for n in run.steps], 50)
        rows.append(row)
    whole = next(row for row in rows if row["how"] == WHOLE)
    for row in rows:
        row["p99_ratio"] = row["itl_p99_ms"] / whole["itl_p99_ms"]
        if row["how"] != NONE:
            row["throughput_ratio"] = row["tokens_per_s"] / whole["tokens_per_s"]
    return rows

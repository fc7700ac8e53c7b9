"""Columns of the tables, and their rows, whose keys are those of the columns; the verdicts on B1 to B4."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from ch16.parts.continuous_batching.bounds import bound, bound_by_time
from ch16.parts.continuous_batching.interference import CHUNKED, NONE, SEPARATE, WHOLE, PrefillMode, StreamRun
from ch16.parts.continuous_batching.workload import AdmissionLoad
from common.load import Timeline
from common.results import Column, Verdict, judge, not_applicable
from common.timing import percentile

GAIN_TARGET = 0.9  # of what continuous batching can gain over fixed batches
IMPOSSIBLE = 1.05  # a share of the possible gain that no noise explains
SIZES_OF_CHAPTER = {"decode": ("B2", 32, 128), "prefill": ("B3", 1, 8)}
THROUGHPUT_TARGET = 0.95  # chunked over whole
TOO_CLOSE = 0.1  # two P99 that differ by less

# ---- columns ----

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

# ---- rows ----


def admission_row(name: str, timeline: Timeline) -> dict:
    """A row of ADMISSION_COLUMNS. A request waits until it is given to the engine; all were there at the start."""
    start = min(timeline.sent.values())
    waits = [sent - start for sent in timeline.sent.values()]
    e2e = [tokens[-1] - start for tokens in timeline.arrived.values()]
    row = {"admission": name, "tokens_per_s": sum(map(len, timeline.arrived.values())) / max(e2e)}
    row["running"] = fmean(step.requests for step in timeline.steps)
    for key, values in (("wait", waits), ("e2e", e2e)):
        row |= {f"{key}_p50_s": percentile(values, 50), f"{key}_p99_s": percentile(values, 99)}
    return row


def gain_rows(measured: float, lengths: Sequence[int], slots: int, step_s: Mapping[int, float]) -> list[dict]:
    """Rows of GAIN_COLUMNS: the measured gain beside both bounds."""
    bounds = {"E[longest of a batch] / E[length]": bound(lengths, slots)}
    bounds["the same, at the step times of these runs"] = bound_by_time(lengths, slots, step_s)
    return [{"bound": n, "at_most": b, "measured": measured, "share": measured / b} for n, b in bounds.items()]


def fit_rows(load: AdmissionLoad, lengths: Sequence[int], blocks: int, block_size: int, longest: int) -> list[dict]:
    """Rows of FIT_COLUMNS, computed: the longest sequence reserved for each, or blocks as each needs them (K2)."""
    reserved = math.ceil(longest / block_size)
    paged = sum(math.ceil((load.tokens_in + length) / block_size) for length in lengths) / len(lengths)
    needs = {f"reserved: {longest:,} tokens": reserved, "paged: as many as it has tokens for": paged}
    return [{"how": how, "blocks": needed, "fit": int(blocks / needed)} for how, needed in needs.items()]


def knee_row(phase: str, rows: Sequence[Mapping], crossover: tuple[float | None, str]) -> dict:
    """A row of KNEE_COLUMNS."""
    _, low, high = SIZES_OF_CHAPTER[phase]
    first, last = knee_of(rows)
    highest = max(row["tokens_per_s"] for row in rows)
    batch, why = crossover
    row = {"phase": phase, "knee": span(first["batch"], last["batch"])}
    row["share"] = span(*(round(100 * row["tokens_per_s"] / highest) for row in (first, last)))
    batch = None if batch is None or math.isinf(batch) else math.ceil(batch)
    return row | {"chapter": span(low, high), "crossover": batch, "why": why}


def interference_rows(runs: Mapping[PrefillMode, Sequence[StreamRun]]) -> list[dict]:
    """Rows of INTERFERENCE_COLUMNS: medians over the rounds."""
    rows = []
    for mode, done in runs.items():
        itl = [[gap for gaps in run.gaps_s for gap in gaps] for run in done]
        row = {"how": mode.name, "where": mode.where, "budget": mode.budget}
        for name, q in (("p50", 50), ("p99", 99), ("max", 100)):
            row[f"itl_{name}_ms"] = 1e3 * percentile([percentile(gaps, q) for gaps in itl], 50)
        row["tokens_per_s"] = percentile([run.tokens / run.seconds for run in done], 50)
        if mode.name != NONE:
            row["ttft_ms"] = 1e3 * percentile([t for run in done for t in run.ttft_s], 50)
        if mode.name not in (NONE, SEPARATE):
            row["steps"] = percentile([n for run in done for n in run.steps], 50)
        rows.append(row)
    whole = next(row for row in rows if row["how"] == WHOLE)
    for row in rows:
        row["p99_ratio"] = row["itl_p99_ms"] / whole["itl_p99_ms"]
        if row["how"] != NONE:
            row["throughput_ratio"] = row["tokens_per_s"] / whole["tokens_per_s"]
    return rows


def knee_of(rows: Sequence[Mapping]) -> tuple[Mapping, Mapping]:
    """The first and the last row at the knee."""
    knee = [row for row in rows if row["mark"]]
    return knee[0], knee[-1]


def span(first: float, last: float) -> str:
    """A range in words."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


# ---- claims ----


def admission_claim(rows: Sequence[Mapping], gains: Sequence[Mapping]) -> Verdict:
    """B1: latency and throughput of both policies, and the share of the possible gain."""
    fixed, free = rows
    equal, timed = (gain["share"] for gain in gains)
    met = "" if equal >= GAIN_TARGET else f" (target {GAIN_TARGET}; at these step times {timed:.2f})"
    text = (
        f"{gains[0]['measured']:.2f} times the output tok/s, {equal:.2f} of the most possible{met}; E2E "
        f"P99 {free['e2e_p99_s']:.2f} s instead of {fixed['e2e_p99_s']:.2f} s, wait P50 {free['wait_p50_s']:.2f} s "
        f"instead of {fixed['wait_p50_s']:.2f} s"
    )
    if equal > IMPOSSIBLE:
        return not_applicable("B1", "it is more than possible: other programs disturbed a run; try again", text)
    faster = all(free[key] < fixed[key] for key in ("wait_p50_s", "e2e_p50_s", "e2e_p99_s"))
    return judge("B1", faster and free["tokens_per_s"] > fixed["tokens_per_s"], text)


def size_claim(phase: str, rows: Sequence[Mapping]) -> Verdict:
    """B2 or B3: is a batch of the knee where the chapter says?"""
    name, low, high = SIZES_OF_CHAPTER[phase]
    first, last = knee_of(rows)
    text = f"knee at {span(first['batch'], last['batch'])}, {span(round(first['ms'], 1), round(last['ms'], 1))} ms"
    if last is rows[-1] and last["batch"] < low:
        return not_applicable(name, f"{last['batch']} was the largest batch measured: the knee may be beyond", text)
    return judge(name, any(row["mark"] and low <= row["batch"] <= high for row in rows), text)


def best_chunked(rows: Sequence[Mapping]) -> Mapping:
    """The smallest P99 among the chunk sizes that keep the throughput of whole prompts, or among all if none does."""
    chunked = [row for row in rows if row["how"] == CHUNKED]
    good = [row for row in chunked if row["throughput_ratio"] >= THROUGHPUT_TARGET]
    return min(good or chunked, key=lambda row: row["itl_p99_ms"])


def interference_claim(rows: Sequence[Mapping], cannot: str) -> Verdict:
    """B4: does a separate prefill engine disturb the streams less than the best chunk size of one engine?"""
    by_name = {row["how"]: row for row in reversed(rows)}
    alone, whole, best = by_name[NONE], by_name[WHOLE], best_chunked(rows)
    text = (
        f"ITL P99 {alone['itl_p99_ms']:,.1f} ms without long prompts, {whole['itl_p99_ms']:,.1f} with whole ones, "
        f"{best['itl_p99_ms']:,.1f} in chunks ({best['budget']:,} tokens per step: {best['p99_ratio']:.2f} of whole at "
        f"{best['throughput_ratio']:.2f} of its throughput)"
    )
    if cannot:
        return not_applicable("B4", cannot, text)
    separate = by_name[SEPARATE]["itl_p99_ms"]
    text += f", {separate:,.1f} on separate engines"
    if abs(separate / best["itl_p99_ms"] - 1) < TOO_CLOSE:
        return not_applicable("B4", f"chunks and separate engines differ by less than {100 * TOO_CLOSE:.0f}%", text)
    return judge("B4", separate < best["itl_p99_ms"], text)

"""B1 to B4: the chapter's claims, judged by the rows of the tables."""

from collections.abc import Mapping, Sequence

from ch16.parts.continuous_batching.interference import CHUNKED, NONE, SEPARATE, WHOLE
from common.results import Verdict, judge, not_applicable

GAIN_TARGET = 0.9  # of what continuous batching can gain over fixed batches
IMPOSSIBLE = 1.05  # a share of the possible gain that no noise explains
SIZES_OF_CHAPTER = {"decode": ("B2", 32, 128), "prefill": ("B3", 1, 8)}
THROUGHPUT_TARGET = 0.95  # chunked over whole
TOO_CLOSE = 0.1  # two P99 that differ by less


def verdicts(tables: Mapping[str, Sequence[Mapping]], cannot: str) -> list[Verdict]:
    """All claims.

    Args:
        tables: rows by the name of the table.
        cannot: why there is no separate prefill engine; empty if there is.
    """
    return [
        admission_claim(tables["admission"], tables["gain"]),
        *(size_claim(phase, tables[phase]) for phase in SIZES_OF_CHAPTER),
        interference_claim(tables["interference"], cannot),
    ]


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


def knee_of(rows: Sequence[Mapping]) -> tuple[Mapping, Mapping]:
    """The first and the last row at the knee."""
    knee = [row for row in rows if row["mark"]]
    return knee[0], knee[-1]


def size_claim(phase: str, rows: Sequence[Mapping]) -> Verdict:
    """B2 or B3: is a batch of the knee where the chapter says?"""
    name, low, high = SIZES_OF_CHAPTER[phase]
    first, last = knee_of(rows)
    text = f"knee at {span(first['batch'], last['batch'])}, {span(round(first['ms'], 1), round(last['ms'], 1))} ms"
    if last is rows[-1] and last["batch"] < low:
        return not_applicable(name, f"{last['batch']} was the largest batch measured: the knee may be beyond", text)
    return judge(name, any(row["mark"] and low <= row["batch"] <= high for row in rows), text)


def span(first: float, last: float) -> str:
    """A range in words."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def best_chunked(rows: Sequence[Mapping]) -> Mapping:
    """The smallest P99 among the chunk sizes that keep the throughput of whole prompts, or among all if none does."""
    chunked = [row for row in rows if row["how"] == CHUNKED]
    good = [row for row in chunked if row["throughput_ratio"] >= THROUGHPUT_TARGET]
    return min(good or chunked, key=lambda row: row["itl_p99_ms"])


def interference_claim(rows: Sequence[Mapping], cannot: str) -> Verdict:
    """B4: does a separate prefill engine disturb the streams less than the best chunk size of one engine?

    Args:
        cannot: why there is no separate engine; empty if there is.
    """
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

"""What a long prompt does to those whose answers are being written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.continuous_batching.drive import Course, Request, drive
from ch16.parts.continuous_batching.separate import PrefillEngine, on_half_the_cores
from common.gpu import Machine
from common.load import random_prompts
from common.results import Column, Verdict, judge, not_applicable
from common.timing import percentile

if TYPE_CHECKING:
    from vllm import LLM

INTERFERENCE_COLUMNS = (
    Column("how", "long prompts"),
    Column("where", "computed on"),
    Column("budget", "tokens a step", ",d"),
    Column("steps", "steps a prompt", ".0f"),
    Column("itl_p50_ms", "ITL P50 ms", ",.1f"),
    Column("itl_p99_ms", "ITL P99 ms", ",.1f"),
    Column("itl_max_ms", "ITL max ms", ",.1f"),
    Column("p99_ratio", "P99 over whole", ".2f"),
    Column("ttft_ms", "long prompt TTFT P50 ms", ",.0f"),
    Column("tokens_per_s", "in and out tok/s", ",.0f"),
    Column("throughput_ratio", "over whole", ".2f"),
)
NONE, WHOLE, CHUNKED, SEPARATE = "none", "whole", "in chunks", "on an engine of their own"
THROUGHPUT_TARGET = 0.95  # chunked over whole
TOO_CLOSE = 0.1  # two P99 that differ by less


@dataclass(frozen=True)
class Traffic:
    """Streams that get `tokens` each, a long prompt after every `every` of them, in chunks by these budgets."""

    streams: int
    tokens: int
    prompt: int  # tokens of a long one
    every: int
    budgets: tuple[int, ...]  # tokens a step, prompts and streams together
    rounds: int

    @property
    def prompts(self) -> int:
        """Long prompts of a run; after the last one the streams go on for as long as before it."""
        return self.tokens // self.every - 1


@dataclass(frozen=True)
class Way:
    """One way to read the long prompts, on which hardware; no budget: as many tokens a step as there may be."""

    name: str
    where: str
    budget: int | None = None
    prompts: bool = True
    half: bool = False  # this process's engine has half the cores
    separate: bool = False


@dataclass(frozen=True)
class Run:
    """One run of a way: what became of its streams and prompts; seconds from the first gap's beginning to the end."""

    gaps_s: list[list[float]]  # between the tokens of each stream
    steps: list[int]  # until the first token of each long prompt
    ttft_s: list[float]  # of each long prompt
    seconds: float
    tokens: int  # read and written


# ---- mechanism ----


@contextlib.contextmanager
def token_budget(llm: "LLM", tokens: int | None) -> Iterator[None]:
    """The engine takes at most so many tokens a step: `max_num_batched_tokens`, without a new engine for each value.

    The scheduler reads the attribute at each step; it is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).

    Args:
        tokens: None for what the engine was started with.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = tokens or before
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before


def traffic_requests(traffic: Traffic, vocab_size: int, seed: int) -> tuple[list[Request], list[Request]]:
    """The streams, and the long prompts, which ask for one token: the reading is what disturbs."""
    # The first token of a stream comes before its first gap.
    streams = random_prompts(traffic.streams, 8, vocab_size, seed)
    long = random_prompts(traffic.prompts, traffic.prompt, vocab_size, seed + 1)
    return (
        [Request(f"stream {i}", prompt, traffic.tokens + 1) for i, prompt in enumerate(streams)],
        [Request(f"long {i}", prompt, 1) for i, prompt in enumerate(long)],
    )


def run(
    llm: "LLM", streams: Sequence[Request], long: Sequence[Request], every: int, elsewhere: PrefillEngine | None = None
) -> Run:
    """Let the streams run, with a long prompt after every `every` tokens of theirs, by counting, not by the clock.

    Args:
        elsewhere: an engine that reads the long prompts, instead of the one with the streams.
    """
    sent: list[float] = []

    def due(course: Course) -> Sequence[Request]:
        if not course.sent:
            return streams
        written = min(len(course.arrived[stream.name]) for stream in streams) - 1
        if len(sent) == len(long) or written < every * (len(sent) + 1):
            return []
        request = long[len(sent)]
        sent.append(course.steps[-1][0])
        if elsewhere is None:
            return [request]
        elsewhere.send(request.prompt)
        return []

    course = drive(llm, due)
    answers = [course.arrived[stream.name] for stream in streams]
    start = max(tokens[0] for tokens in answers)
    firsts = [elsewhere.finished() if elsewhere else course.arrived[request.name][0] for request in long]
    both = list(zip(sent, firsts, strict=True))
    return Run(
        gaps_s=[[later - earlier for earlier, later in pairwise(tokens)] for tokens in answers],
        steps=[sum(at < end <= first for end, _ in course.steps) - course.ahead for at, first in both],
        ttft_s=[first - at for at, first in both],
        seconds=max([tokens[-1] for tokens in answers] + firsts) - start,
        tokens=sum(len(tokens) - 1 for tokens in answers) + sum(len(request.prompt) + 1 for request in long),
    )


# ---- measurement ----


def ways(traffic: Traffic, machine: Machine, separate: bool) -> list[Way]:
    """All ways that this machine has."""
    on_cpu = machine.device == "cpu"
    here = f"{machine.cores} cores" if on_cpu else "1 GPU"
    found = [Way(NONE, here, prompts=False), Way(WHOLE, here)]
    found += [Way(CHUNKED, here, budget) for budget in traffic.budgets]
    if separate and on_cpu:
        one, two = machine.cores // 2, machine.cores - machine.cores // 2
        found.append(Way(NONE, f"{one} of them", prompts=False, half=True))
        found.append(Way(SEPARATE, f"{one} + {two}", half=True, separate=True))
    elif separate:
        found.append(Way(SEPARATE, "1 + 1 GPU", separate=True))
    return found


def measure_interference(
    llm: "LLM", traffic: Traffic, machine: Machine, elsewhere: PrefillEngine | None, vocab_size: int, seed: int
) -> dict[Way, list[Run]]:
    """The same streams and prompts in every way, turn by turn: `traffic.rounds` runs of each."""
    runs: dict[Way, list[Run]] = {way: [] for way in ways(traffic, machine, elsewhere is not None)}
    warm_up = replace(traffic, tokens=8, every=4)  # one prompt: kernels and the other engine run once
    for round_ in tqdm(range(-1, traffic.rounds), desc="interference", leave=False, disable=None):
        load = warm_up if round_ < 0 else traffic
        streams, long = traffic_requests(load, vocab_size, seed)
        for way, done in runs.items():
            cores = on_half_the_cores(machine) if way.half else contextlib.nullcontext()
            with token_budget(llm, way.budget), cores:
                run_ = run(llm, streams, long if way.prompts else [], load.every, elsewhere if way.separate else None)
            if round_ >= 0:
                done.append(run_)
    return runs


def interference_rows(runs: Mapping[Way, Sequence[Run]]) -> list[dict]:
    """Rows of INTERFERENCE_COLUMNS: medians over the rounds."""
    rows = []
    for way, done in runs.items():
        itl = [[gap for gaps in run.gaps_s for gap in gaps] for run in done]
        row = {
            "how": way.name,
            "where": way.where,
            "budget": way.budget,
            "itl_p50_ms": 1e3 * percentile([percentile(gaps, 50) for gaps in itl], 50),
            "itl_p99_ms": 1e3 * percentile([percentile(gaps, 99) for gaps in itl], 50),
            "itl_max_ms": 1e3 * percentile([max(gaps) for gaps in itl], 50),
            "tokens_per_s": percentile([run.tokens / run.seconds for run in done], 50),
        }
        if way.prompts:
            row["ttft_ms"] = 1e3 * percentile([t for run in done for t in run.ttft_s], 50)
        if way.prompts and not way.separate:
            row["steps"] = percentile([n for run in done for n in run.steps], 50)
        rows.append(row)
    whole = next(row for row in rows if row["how"] == WHOLE)
    for row in rows:
        row["p99_ratio"] = row["itl_p99_ms"] / whole["itl_p99_ms"]
        if row["how"] != NONE:
            row["throughput_ratio"] = row["tokens_per_s"] / whole["tokens_per_s"]
    return rows


def best_chunked(rows: Sequence[Mapping]) -> Mapping:
    """The smallest P99 among the chunk sizes that keep the throughput of whole prompts; if none does, of all."""
    chunked = [row for row in rows if row["how"] == CHUNKED]
    good = [row for row in chunked if row["throughput_ratio"] >= THROUGHPUT_TARGET]
    return min(good or chunked, key=lambda row: row["itl_p99_ms"])


def interference_claim(rows: Sequence[Mapping], cannot: str) -> Verdict:
    """B4: are streams disturbed less by prompts on an engine of their own than by the best that one engine can do?

    Args:
        cannot: why there is no separate engine; empty if there is.
    """
    by_name = {row["how"]: row for row in reversed(rows)}
    alone, whole, best = by_name[NONE], by_name[WHOLE], best_chunked(rows)
    text = (
        f"ITL P99 {alone['itl_p99_ms']:,.1f} ms without long prompts, {whole['itl_p99_ms']:,.1f} with whole ones, "
        f"{best['itl_p99_ms']:,.1f} in chunks ({best['budget']:,} tokens a step: {best['p99_ratio']:.2f} of whole at "
        f"{best['throughput_ratio']:.2f} of its throughput)"
    )
    if cannot:
        return not_applicable("B4", cannot, text)
    separate = by_name[SEPARATE]["itl_p99_ms"]
    text += f", {separate:,.1f} on separate engines"
    if abs(separate / best["itl_p99_ms"] - 1) < TOO_CLOSE:
        return not_applicable("B4", f"chunks and separate engines differ by less than {100 * TOO_CLOSE:.0f}%", text)
    return judge("B4", separate < best["itl_p99_ms"], text)

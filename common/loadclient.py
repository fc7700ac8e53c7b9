"""vLLM's benchmark client (`vllm bench serve`) as a function: the load and every figure are its own.

Only two things are added: how late this process was (a client that is too busy measures itself), and one row of figures
for a table.
"""

import asyncio
import contextlib
import io
import itertools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import CannotRun
from common.timing import percentile
from common.traces import Arrival, write_timed_trace

QUANTILES = (50, 90, 99)
FIGURES = ("ttft", "tpot", "itl", "e2el")
HEARTBEAT_S = 0.01


@dataclass(frozen=True)
class Target:
    """A server: its URL, the model it calls by this name, and the tokenizer that makes prompts for it."""

    url: str
    model: str
    tokenizer: str


@dataclass(frozen=True)
class Objective:
    """A service level objective: a request is good if neither is exceeded."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Load:
    """What is sent.

    rate: requests/s of an open loop; math.inf sends all at once. at_once: users of a closed loop, who wait for their
    answer. burstiness: 1 is Poisson; less is burstier (arrivals a gamma process of that shape). tokens_in: of a prompt,
    the first `tokens_shared` of which are the same in all. trace: replayed instead.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    rate: float = math.inf
    at_once: int | None = None
    burstiness: float = 1.0
    tokens_shared: int = 0
    trace: Sequence[Arrival] = ()
    block_tokens: int = 16

    def with_(self, **changes: object) -> "Load":
        """The same with changes."""
        return replace(self, **changes)


def flags_for(target: Target, load: Load, objective: Objective | None, seed: int, trace_file: Path) -> list[str]:
    """The command line of `vllm bench serve` for a load."""
    flags = [
        *("--backend", "vllm", "--base-url", target.url, "--model", target.model, "--tokenizer", target.tokenizer),
        *("--num-prompts", str(load.requests), "--seed", str(seed), "--ignore-eos", "--disable-tqdm"),
        "--save-detailed",  # in the result, not in a file
        *("--percentile-metrics", ",".join(FIGURES), "--metric-percentiles", ",".join(map(str, QUANTILES))),
    ]
    if load.trace:
        write_timed_trace(load.trace, trace_file, load.block_tokens)
        flags += ["--dataset-name", "timed_trace", "--dataset-path", str(trace_file)]
        flags += ["--timed-trace-chunk-hash-size", str(load.block_tokens)]
    else:
        own = load.tokens_in - load.tokens_shared
        flags += [
            "--dataset-name",
            "random",
            "--random-input-len",
            str(own),
            "--random-output-len",
            str(load.tokens_out),
        ]
        flags += ["--random-prefix-len", str(load.tokens_shared)]
        flags += ["--request-rate", str(load.rate), "--burstiness", str(load.burstiness)]
    if load.at_once:
        flags += ["--max-concurrency", str(load.at_once)]
    if objective:
        flags += ["--goodput", f"ttft:{objective.ttft_ms}", f"tpot:{objective.tpot_ms}"]
    return flags


def run_load(target: Target, load: Load, objective: Objective | None = None, seed: int = 0) -> dict[str, float]:
    """Send a load, wait for all answers, and return one row of figures.

    Keys: `offered` and `answered` (requests/s), `tokens_per_s`, `steady_tokens_per_s` (of the middle half of the
    tokens: without the beginning and the end, when the server is not full), `goodput` (good requests/s, if there is an
    objective), `good_percent` of those sent, `errors`, `seconds`, `late_ms` (P99 of how late this process's event loop
    was), and `ttft_p50_ms` ... `e2el_p99_ms`.

    Raises:
        CannotRun: not one request was answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = flags_for(target, load, objective, seed, Path(folder) / "trace.jsonl")
        result, late_ms = asyncio.run(_run(flags))
    if not result["completed"]:
        error = next((error for error in result.get("errors", []) if error), "no answer")
        raise CannotRun(f"no request was answered by {target.url}: {str(error).strip().splitlines()[-1]}")
    row = {
        "offered": _offered(load, result["start_times"]),
        "answered": result["request_throughput"],
        "tokens_per_s": result["output_throughput"],
        "steady_tokens_per_s": _steady(result),
        "errors": load.requests - result["completed"],
        "seconds": result["duration"],
        "late_ms": late_ms,
    }
    if objective:
        row["goodput"] = result["request_goodput"]
        row["good_percent"] = 100 * result["request_goodput"] * result["duration"] / load.requests
    for figure in FIGURES:
        row |= {f"{figure}_p{q}_ms": result[f"p{q}_{figure}_ms"] for q in QUANTILES}
    return row


def _offered(load: Load, sent: Sequence[float]) -> float | None:
    """Requests/s as they were sent, in an open loop."""
    span = max(sent) - min(sent)
    open_loop = not load.at_once and (load.trace or math.isfinite(load.rate))
    return (len(sent) - 1) / span if open_loop and span > 0 else None


def _steady(result: Mapping) -> float:
    """Tokens/s between the first and the third quarter of the tokens.

    The result has the time of each event, which may hold several tokens: those of a request are spread evenly over its
    events. A request that failed has no tokens.
    """
    times = []
    columns = (result[key] for key in ("start_times", "ttfts", "itls", "output_lens"))
    for start, ttft, gaps, tokens in zip(*columns, strict=True):
        events = list(itertools.accumulate(gaps, initial=start + ttft))
        times += [events[i * len(events) // tokens] for i in range(tokens)]
    times.sort()
    first, last = len(times) // 4, 3 * len(times) // 4
    span = times[last] - times[first] if times else 0.0
    return (last - first) / span if span > 0 else result["output_throughput"]


async def _run(flags: Sequence[str]) -> tuple[Mapping, float]:
    """vLLM's client beside a clock that notices when it is late."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    late: list[tuple[float, float]] = []  # when, and by how much

    async def heartbeat() -> None:
        while True:
            due = time.perf_counter() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            now = time.perf_counter()
            late.append((now, 1e3 * (now - due)))

    beat = asyncio.create_task(heartbeat())
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.setdefault("OPENAI_API_KEY", "")
        try:
            result = await main_async(parser.parse_args(flags))
        finally:
            beat.cancel()
    begin = min(result["start_times"], default=0.0)  # before that, prompts were made
    counted = [by for at, by in late if at - HEARTBEAT_S > begin]
    return result, percentile(counted, 99) if counted else 0.0

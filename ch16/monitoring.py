"""Monitoring: the chapter's four metrics and `process_request`, on a server that answers.

A small HTTP server generates with vLLM. Every request goes through the decorated `process_request`. Clients send some
one by one, some at once, and one that fails, while a scraper reads /metrics as Prometheus does. Afterwards the metrics
must agree with what the clients counted. `inference_serving.py --serve` exports the same series in production.

    python3 ch16/monitoring.py
    python3 ch16/monitoring.py --quick --plot monitoring.png

How to read it: counters only grow, gauges show the moment of the scrape, and a histogram counts per bucket. Quantiles
are computed from the buckets as Prometheus' `histogram_quantile` does, so they are only as fine as the buckets.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest

from ch16.parts.monitoring import tables
from ch16.parts.monitoring.client import Reply, Scrape, Scraper, send
from ch16.parts.monitoring.picture import plot
from ch16.parts.monitoring.server import Handler, SharedEngine, serving
from common import cli, models
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.metrics import InferenceMetrics
from common.results import Report

# ---- configuration ----

PROMPT = "Once upon a time"
SCRAPE_S = 0.25  # Prometheus: 15 s or more
WINDOW_S = math.inf  # throughput of the whole run, which clients can check; in production of the last 10 s


@dataclass(frozen=True)
class MonitoringSizes:
    """Clients at once, in turn; the requests of each client; the fewest and most tokens of an answer."""

    clients: tuple[int, ...]
    requests: int
    tokens: tuple[int, int]


def sizes_for(machine: Machine, quick: bool) -> MonitoringSizes:
    """A load of some seconds on a GPU or two CPU cores."""
    if machine.device == "cuda":
        return MonitoringSizes((1, 16, 64), 2 if quick else 8, (32, 256))
    return MonitoringSizes((1, 4, 8), 2 if quick else 6, (8, 48))


# ---- mechanism ----

registry = CollectorRegistry()
metrics = InferenceMetrics(registry)  # as the production server has them
requests_total = metrics.requests
latency_histogram = metrics.latency
active_requests = metrics.active
throughput = metrics.throughput

EXPLAINED = {
    requests_total: "Counter. It only grows: its rate() is requests/s by outcome. Alert on the share of errors.",
    latency_histogram: "Histogram. Buckets of several servers add up; their averages and quantiles do not.",
    active_requests: "Gauge. The load at the moment of a scrape; the chapter's HPA holds it at 50 per replica.",
    throughput: "Gauge. When more active requests no longer raise it, the server is saturated.",
}


# The chapter increments by hand and misses requests that fail; the decorator counts those as `error`.
@metrics.process_request
def process_request(request: Handler) -> dict[str, object]:
    """Answer one HTTP request: counted, active and timed from here to its return or exception."""
    asked = request.read_json()
    return request.server.engine.generate(asked["prompt"], asked["max_tokens"])


class InferenceHandler(Handler):
    """POST generates, GET is /metrics."""

    def do_POST(self) -> None:
        """Generate; an exception becomes an answer, after the decorator has counted it."""
        try:
            self.answer(200, json.dumps(process_request(self)).encode())
        except Exception as error:
            self.answer(500, cli.first_line(error).encode())

    def do_GET(self) -> None:
        """Write all series. The rate is computed at the scrape: set at the last answer, it would never fall."""
        throughput.set(self.server.rate.update(time.perf_counter(), self.server.engine.tokens))
        self.answer(200, generate_latest(registry))


# ---- measurement ----


def measure(
    engine: SharedEngine, sizes: MonitoringSizes, seed: int, results: Report
) -> tuple[list[Reply], list[Scrape]]:
    """Send the requests while /metrics is scraped; compare what the server and the clients counted."""
    rng, answers = random.Random(seed), []
    with serving(InferenceHandler, engine, WINDOW_S) as url, Scraper(f"{url}/metrics", SCRAPE_S) as scraper:
        for clients in sizes.clients:
            lengths = [rng.randint(*sizes.tokens) for _ in range(clients * sizes.requests)]
            answers += send(url, [{"prompt": PROMPT, "max_tokens": length} for length in lengths], clients)
        if errors := [answer.error for answer in answers if answer.error]:
            raise cli.CannotRun(f"{len(errors)} of {len(answers)} requests failed: {errors[0]}")
        answers += send(url, [{"prompt": PROMPT, "max_tokens": 0}], clients=1)  # vLLM refuses it
    tables.fill(results, EXPLAINED, scraper.scrapes, answers)
    return answers, scraper.scrapes


def report(args: argparse.Namespace, results: Report, answers: Sequence[Reply], scrapes: Sequence[Scrape]) -> None:
    """Write JSON and picture. The chapter claims nothing about metrics, but wrong ones are a failure."""
    results.save(args.json)
    if args.plot:
        plot(args.plot, answers, scrapes, results)
    if wrong := [row["what"] for row in results.tables["agreement"]["rows"] if row["agrees"] != "yes"]:
        raise cli.CannotRun(f"metrics and clients disagree on: {', '.join(wrong)}")


# ---- main ----


def main() -> int:
    """Parse the flags, start the engine, measure."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    args = parser.parse_args()
    machine = detect(args.device)
    prepare_environment(machine)
    quiet()
    model, sizes = models.resolve(args.model, machine), sizes_for(machine, args.quick)
    settings = {"model": model.name, "seed": args.seed, "clients": sizes.clients, "tokens": sizes.tokens}
    results = Report("monitoring.py", machine, settings, wide=args.wide)
    results.print_card()
    llm, _ = start_engine(engine_args(model, machine, max_model_len=512, max_num_seqs=max(sizes.clients)))
    try:
        with SharedEngine(llm) as engine:
            answers, scrapes = measure(engine, sizes, args.seed, results)
    finally:
        stop_engine(llm)
    report(args, results, answers, scrapes)
    return 0


if __name__ == "__main__":
    cli.run(main)

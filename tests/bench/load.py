"""Does `load_test.py` report what `vllm bench serve` reports? (`make bench-load`)

The production server gets the same load with the same seed from both, in turn, round after round; the figures are
medians over the rounds. (They run the same measuring code, one in our process and one in its own: this checks the way
there.)

    python3 tests/bench/load.py --json results/cpu/bench_load.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from common import cli, models
from common.engine import prepare_environment, quiet
from common.gpu import detect
from common.loadclient import Endpoint, Objective, RequestLoad, flags_for, run_load
from common.results import Column, Report
from tests.servers import Server

CLI = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
file, *flags = sys.argv[1:]
json.dump(main(parser.parse_args(flags)), open(file, "w"))
"""
FIGURES = {  # ours: vLLM's
    "answered": "request_throughput",
    "tokens_per_s": "output_throughput",
    "goodput": "request_goodput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "itl_p99_ms": "p99_itl_ms",
    "e2el_p99_ms": "p99_e2el_ms",
}
COLUMNS = (
    Column("figure", "figure"),
    Column("ours", "load_test.py", ",.2f"),
    Column("vllm", "vllm bench serve", ",.2f"),
    Column("error_percent", "difference %", "+.1f"),
    Column("spread_percent", "vLLM's own spread %", ".1f"),
)
TARGET_PERCENT = 3.0


def main() -> int:
    """Start the server, take turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=5, help="default: 5")
    parser.add_argument("--requests", type=cli.positive_int, default=100, help="a round; default: 100")
    parser.add_argument("--rate", type=cli.positive_float, default=8.0, help="requests/s; default: 8")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write what was measured to FILE")
    args = parser.parse_args()

    machine = detect()
    quiet()
    prepare_environment(machine)
    model = models.bundled()
    load, objective = RequestLoad(args.requests, 64, 16, rate=args.rate), Objective(500, 50)
    report = Report("tests/bench/load.py", machine, {"model": model.name} | vars(args))
    report.print_card()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name, Server(Path(name)) as server:
        target, file = Endpoint(server.url, model.name, model.path), Path(name) / "result.json"
        run_load(target, load)  # warm up
        for number in range(args.rounds):
            for who in ("ours", "vllm") if number % 2 else ("vllm", "ours"):
                # A seed of its own for each round and client: a prompt seen before would come from the prefix cache.
                # Both clients see the same seeds, in other rounds.
                seed = 100 + (number if who == "ours" else (number + 1) % args.rounds)
                server.post("/reset_prefix_cache")
                if who == "ours":
                    ours.append(run_load(target, load, objective, seed))
                else:
                    flags = flags_for(target, load, objective, seed, Path(name) / "unused")
                    subprocess.run([sys.executable, "-c", CLI, str(file), *flags], capture_output=True, check=True)
                    theirs.append(json.loads(file.read_text()))
            print(f"round {number + 1}/{args.rounds}", file=sys.stderr, flush=True)
    rows = []
    for mine, its in FIGURES.items():
        values = [run[its] for run in theirs]
        a, b = statistics.median(run[mine] for run in ours), statistics.median(values)
        spread = 100 * (max(values) - min(values)) / b
        rows.append(
            {"figure": mine, "ours": a, "vllm": b, "error_percent": 100 * (a / b - 1), "spread_percent": spread}
        )
    report.table("load", f"Medians of {args.rounds} rounds, {args.rate:g} requests/s", rows, COLUMNS)
    worst = max(rows, key=lambda row: abs(row["error_percent"]))
    print(f"  largest difference {worst['error_percent']:+.1f}% ({worst['figure']}), target {TARGET_PERCENT:.0f}%")
    report.save(args.json)
    return 0


if __name__ == "__main__":
    cli.run(main)

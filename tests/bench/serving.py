"""What does `inference_serving.py --serve` cost beside plain vLLM? (`make bench-serving`)

Two servers with the same engine settings run side by side; vLLM's own benchmark client sends each the same
load in turn, round after round (A B, B A, ...), so that whatever else the machine does hits both. The figures
are ratios of medians over the rounds.

    python3 tests/bench/serving.py --json results/cpu/bench_serving.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import contextlib
import io
import statistics
import sys
import tempfile

from common import cli, models
from common.engine import as_flags, engine_args, prepare_environment, quiet
from common.gpu import detect
from common.results import Column, Report
from tests.servers import Server

TARGETS = {"output_throughput": (0.97, ">="), "p99_ttft_ms": (1.05, "<=")}
COLUMNS = (
    Column("server", "server"),
    Column("output_throughput", "output tok/s", ",.1f"),
    Column("median_ttft_ms", "TTFT P50 ms", ",.1f"),
    Column("p99_ttft_ms", "TTFT P99 ms", ",.1f"),
    Column("median_tpot_ms", "TPOT P50 ms", ".2f"),
    Column("p99_tpot_ms", "TPOT P99 ms", ".2f"),
)
FIGURES = [column.key for column in COLUMNS[1:]]


def send_load(client: argparse.ArgumentParser, url: str, model: models.Model, args: argparse.Namespace, seed: int):
    """One run of vLLM's benchmark client; its figures."""
    from vllm.benchmarks.serve import main

    flags = [
        *("--backend", "vllm", "--base-url", url, "--model", model.name, "--tokenizer", model.path),
        *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "64", "--ignore-eos"),
        *("--num-prompts", str(args.prompts), "--max-concurrency", str(args.concurrency)),
        *("--percentile-metrics", "ttft,tpot", "--seed", str(seed), "--disable-tqdm"),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        figures = main(client.parse_args(flags))
    if figures["completed"] != args.prompts:
        raise cli.CannotRun(f"{figures['completed']} of {args.prompts} requests were answered by {url}")
    return {key: figures[key] for key in FIGURES}


def main() -> int:
    """Start both servers, alternate the load, print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=9, help="default: 9")
    parser.add_argument("--prompts", type=cli.positive_int, default=48, help="requests a round; default: 48")
    parser.add_argument("--concurrency", type=cli.positive_int, default=16, help="requests at once; default: 16")
    parser.add_argument("--json", metavar="FILE", help="also write what was measured to FILE")
    args = parser.parse_args()

    machine = detect()
    quiet()
    prepare_environment(machine)
    model = models.bundled()
    shared = ("--scheduling-policy", "priority", "--disable-uvicorn-access-log", "--enable-request-id-headers")
    flags = (*as_flags(engine_args(model, machine)), "--served-model-name", model.name, *shared)
    memory = ("--gpu-memory-utilization", "0.4") if machine.device == "cuda" else ()
    plain_command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1")

    settings = {"model": model.name, "rounds": args.rounds, "prompts": args.prompts, "concurrency": args.concurrency}
    report = Report("tests/bench/serving.py", machine, settings)
    report.print_card()
    print("starting both servers ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        plain = Server(Path(folder), *flags, *memory, command=plain_command).start()
        ours = Server(Path(folder), *memory)
        try:
            plain.wait_ready("/health")  # one after the other: each measures the free memory as it starts
            ours.start().wait_ready()
            runs = alternate({"plain vLLM": plain.url, "--serve": ours.url}, model, args)
        finally:
            plain.stop()
            ours.stop()

    rows = [{"server": name} | medians(measured) for name, measured in runs.items()]
    rows.append({"server": "ratio"} | {key: rows[1][key] / rows[0][key] for key in FIGURES})
    report.table("overhead", f"Medians of {args.rounds} rounds, {args.concurrency} requests at once", rows[:2], COLUMNS)
    ratio_columns = (COLUMNS[0], *(Column(c.key, c.title.removesuffix(" ms"), ".3f") for c in COLUMNS[1:]))
    report.table("ratio", "--serve over plain vLLM", rows[2:], ratio_columns)
    for key, (bound, relation) in TARGETS.items():
        met = rows[2][key] >= bound if relation == ">=" else rows[2][key] <= bound
        print(f"  {key}: {rows[2][key]:.3f}, target {relation} {bound}: {'met' if met else 'missed'}")
    report.save(args.json)
    return 0


def alternate(urls: dict[str, str], model: models.Model, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Every server gets the same load in every round; who goes first alternates."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    client = FlexibleArgumentParser()
    add_cli_args(client)
    runs: dict[str, list[dict]] = {name: [] for name in urls}
    for url in urls.values():
        send_load(client, url, model, args, seed=1000)  # warm up
    for round_number in range(args.rounds):
        for name in sorted(urls, reverse=bool(round_number % 2)):
            # The seed changes with the round: a prompt seen before would be served from the prefix cache.
            runs[name].append(send_load(client, urls[name], model, args, seed=round_number))
        latest = ", ".join(f"{name} {measured[-1]['output_throughput']:.0f} tok/s" for name, measured in runs.items())
        print(f"round {round_number + 1}/{args.rounds}: {latest}", file=sys.stderr, flush=True)
    return runs


def medians(measured: list[dict]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {key: statistics.median(run[key] for run in measured) for key in FIGURES}


if __name__ == "__main__":
    cli.run(main)

"""How fast is the simulated fleet of `autoscaling.py`? (`make bench-fleet`)

A day of a million requests on one core: the search for targets simulates dozens of days.

    python3 tests/bench/fleet.py --json results/cpu/bench_fleet.json
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
runpy.run_path(str(ROOT / "common" / "environment.py"))

import argparse
import time

import numpy as np

from ch16.autoscaling import DAY_REQUESTS, DAY_S, Lab
from ch16.parts.autoscaling.signals import by_pods, signals
from ch16.parts.autoscaling.simulate import Pool
from ch16.parts.autoscaling.workload import DAY_MEAN, diurnal
from common import cli
from common.costs import Costs
from common.gpu import detect
from common.results import Column, Report
from common.traces import BUNDLED, mean_lengths, read_trace, shrink

COLUMNS = (
    Column("requests", "requests", ",d"),
    Column("hours", "hours of traffic", ".1f"),
    Column("seconds", "simulated in s, one core", ".2f"),
    Column("per_s", "requests/s of simulation", ",.0f"),
)
COSTS, SLOTS, TARGET = Costs(0.0126, 0.0006, 0.0003), 8, 2.5  # about those of SmolLM2-135M on two cores


def measure(seed: int) -> dict:
    """A row of COLUMNS: a day scaled on active requests, whatever load a million requests are."""
    lengths = shrink(read_trace(BUNDLED), 0.4, max_tokens=4096)
    request_s = COSTS.slot_s(SLOTS, *mean_lengths(lengths))
    lab = Lab(Pool(COSTS, SLOTS, 4096 * SLOTS, 120.0), lengths, request_s, 1.2, np.random.default_rng(seed))
    load, curve = DAY_REQUESTS * request_s / DAY_S / DAY_MEAN, diurnal(DAY_S)
    requests = lab.traffic(lambda at: load * curve(at), DAY_S)
    scaler = by_pods(signals(SLOTS)["active"], TARGET)
    lab.simulate(requests[:100], scaler)  # compiles
    started = time.process_time()
    lab.simulate(requests, scaler)
    seconds = time.process_time() - started
    return {"requests": len(requests), "hours": DAY_S / 3600, "seconds": seconds, "per_s": len(requests) / seconds}


def main() -> int:
    """Simulate a day; print how long that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="default: 3")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write what was measured to FILE")
    args = parser.parse_args()
    report = Report("tests/bench/fleet.py", detect("cpu"), {"rounds": args.rounds})
    report.print_card()
    report.table("speed", "The simulation itself", [measure(seed) for seed in range(args.rounds)], COLUMNS)
    report.save(args.json)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Load testing: what can a server take, before real users find out?

A closed loop (a number of users, each of whom waits for an answer) cannot overload a server: when it is slow, they ask
less. Real traffic is an open loop: requests arrive in bursts, whether or not the server keeps up. So this test raises
the rate of an open loop until too few requests meet the objective. That rate is the knee. The load and every figure
come from vLLM's own benchmark client.

Then the chapter's question: does the capacity measured with synthetic requests hold for real ones? A trace of real
traffic is replayed with its lengths and its bursts (the first minute of Azure's conversation trace; lengths divided to
fit the machine).

    python3 ch16/load_test.py                                       # its own server, the knee, a trace, claim W1
    python3 ch16/load_test.py --quick --plot load.png               # on a stand-in for a server (simulated)
    python3 ch16/load_test.py --url http://127.0.0.1:8000 --slo-ttft-ms 500 --slo-tpot-ms 50
    python3 ch16/load_test.py --url http://127.0.0.1:8000 --rates 2 4 8 --burstiness 0.3
    python3 ch16/load_test.py --url http://127.0.0.1:8000 --trace mooncake.jsonl

How to read it: goodput counts requests that met the objective. `client late` is the lag of this process's own event
loop: where it comes near the latencies, the client is the bottleneck.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from tqdm import tqdm

from ch16.parts.load_test import flags, tables
from ch16.parts.load_test.endpoint import described, serving
from ch16.parts.load_test.flags import LoadSizes, sizes_for
from ch16.parts.load_test.picture import plot
from ch16.parts.load_test.tables import capacity_row
from common import cli
from common.engine import prepare_environment, quiet
from common.gpu import detect
from common.loadclient import Endpoint, Objective, RequestLoad, run_load
from common.results import Report
from common.traces import BLOCK_TOKENS, Arrival, at_rate, mean_lengths

# ---- configuration ----

GOOD_PERCENT = 90.0  # of the requests must meet the objective
TTFT_SLACK, TPOT_SLACK = 10, 3  # the default objective: multiples of the medians of an unloaded server
SHAPES_AT = 0.8  # of the knee

# ---- mechanism ----


def find_knee(run_at: Callable[[float], dict], rates: Sequence[float], refine: int) -> tuple[float, list[dict]]:
    """The highest rate at which enough requests meet the objective, as at every lower rate that was tried.

    `run_at` sends an open loop at a rate; its row has `good_percent`. Rates are tried from the lowest on until two in a
    row fail; then the gap between the last good and the first bad one is halved `refine` times. Returns the rate (0.0
    if none is good), and the rows by rate.
    """
    rows: dict[float, dict] = {}

    def bracket() -> tuple[float, float | None]:
        """The highest good rate below the first bad one, and that bad one (None: all are good)."""
        low = 0.0
        for rate in sorted(rows):
            if rows[rate]["good_percent"] < GOOD_PERCENT:
                return low, rate
            low = rate
        return low, None

    failed = 0
    for rate in sorted(rates):
        rows[rate] = run_at(rate)
        failed = failed + 1 if rows[rate]["good_percent"] < GOOD_PERCENT else 0
        if failed == 2:
            break
    for _ in range(refine):
        low, high = bracket()
        if high is None:
            break
        middle = (low + high) / 2
        rows[middle] = run_at(middle)
    return bracket()[0], [rows[rate] for rate in sorted(rows)]


class LoadTester:
    """Loads on one server, each with a name and a row of figures."""

    def __init__(self, endpoint: Endpoint, base: RequestLoad, seed: int, runs: int) -> None:
        self.endpoint, self.base, self._seed = endpoint, base, seed
        self.objective: Objective | None = None
        self.progress = tqdm(total=runs, desc="runs", leave=False, disable=None)

    def run(self, name: str, **changes: object) -> dict:
        """One run. Its prompts are new: a prompt seen before would come from the prefix cache."""
        self._seed += 1
        row = {"load": name} | run_load(self.endpoint, replace(self.base, **changes), self.objective, self._seed)
        self.progress.update()
        return row

    def at(self, rate: float) -> dict:
        """An open loop at a rate."""
        return self.run(f"{shape_of(self.base)}, {rate:.2f}/s", rate=rate) | {"rate": rate}


def shape_of(load: RequestLoad) -> str:
    """What an open loop's arrivals are called."""
    return "Poisson" if load.burstiness == 1 else f"gamma {load.burstiness:g}"


# ---- measurement ----


def search(
    tester: LoadTester, sizes: LoadSizes, at_once: int, args: argparse.Namespace
) -> tuple[list[dict], float, dict]:
    """One user, all requests at once, the rates between. Returns all rows, the knee, the row of all at once."""
    unloaded = tester.run("one user", at_once=1, requests=8)
    ttft_ms = args.slo_ttft_ms or TTFT_SLACK * unloaded["ttft_p50_ms"]
    tester.objective = Objective(ttft_ms, args.slo_tpot_ms or TPOT_SLACK * unloaded["tpot_p50_ms"])
    full = tester.run("all at once", requests=max(tester.base.requests, at_once))
    capacity = full["steady_tokens_per_s"] / tester.base.tokens_out
    knee, rows = find_knee(tester.at, [fraction * capacity for fraction in sizes.fractions], sizes.refine)
    return [unloaded, full, *rows], knee, full


def shapes(tester: LoadTester, rate: float) -> list[dict]:
    """The same rate in other shapes: burstier, with a shared prefix, as a closed loop."""
    half = tester.base.tokens_in // 2
    steady = tester.run(shape_of(tester.base), rate=rate)
    users = max(1, round(rate * steady["e2el_p50_ms"] / 1e3))  # Little's law
    return [
        steady,
        tester.run("bursty (gamma 0.25)", rate=rate, burstiness=0.25),
        tester.run(f"{half} tokens shared", rate=rate, tokens_shared=half),
        tester.run(f"{users} users", at_once=users),
    ]


def replay(
    tester: LoadTester, trace: list[Arrival], block_tokens: int, knee: float, full: dict, refine: int
) -> tuple[list[dict], list[dict]]:
    """The trace all at once, then at the synthetic knee; if that is too much, the trace's own knee is searched below.

    Returns rows of loads, and rows of CAPACITY_COLUMNS.
    """

    def at(rate: float, name: str) -> dict:
        arrivals = at_rate(trace, len(trace), rate)
        changes = {"trace": arrivals, "requests": len(arrivals), "block_tokens": block_tokens}
        return tester.run(name, **changes) | {"rate": rate}

    flood = at(1e6, "trace, all at once")
    kept, rows = find_knee(lambda rate: at(rate, f"trace, {rate:.2f}/s"), [knee] if knee else [], refine)
    tokens, trace_tokens = full["steady_tokens_per_s"], flood["steady_tokens_per_s"]
    answered, trace_answered = tokens / tester.base.tokens_out, trace_tokens / mean_lengths(trace)[1]
    return [flood, *rows], [
        capacity_row("full server, output tok/s", tokens, trace_tokens),
        capacity_row("full server, requests/s", answered, trace_answered),
        capacity_row("knee, requests/s", knee, kept),
    ]


def given_loads(tester: LoadTester, args: argparse.Namespace) -> list[dict]:
    """The loads that the user named."""
    if args.slo_ttft_ms or args.slo_tpot_ms:
        tester.objective = Objective(args.slo_ttft_ms or 1e9, args.slo_tpot_ms or 1e9)
    rows = [tester.at(rate) for rate in args.rates or ()]
    return rows + [tester.run(f"{users} users", at_once=users) for users in args.users or ()]


def measure(
    results: Report, tester: LoadTester, trace: list[Arrival], sizes: LoadSizes, args: argparse.Namespace
) -> tuple[list[dict], float | None, list[dict]]:
    """The knee, other shapes of load, the trace (or only the loads that the user named, which have no knee).

    Returns rows of rates, the knee, rows of capacity.
    """
    if args.rates or args.users:
        rows, knee, full = given_loads(tester, args), None, None
    else:
        rows, knee, full = search(tester, sizes, len(trace), args)
    base, what = tester.base, described(tester.endpoint.model)
    lengths = f"{base.tokens_in} tokens in and {base.tokens_out} out, {what}"
    tester.progress.clear()
    results.table("rates", f"Rates, {lengths}", rows, tables.RATE_COLUMNS)
    results.table("latencies", f"Latencies, {lengths}", rows, tables.LATENCY_COLUMNS)
    if knee is None:
        return rows, knee, []

    slo = tester.objective
    results.settings = {**results.settings, "slo_ttft_ms": slo.ttft_ms, "slo_tpot_ms": slo.tpot_ms}
    print(f"\nobjective: TTFT {slo.ttft_ms:,.0f} ms, TPOT {slo.tpot_ms:,.0f} ms; at least {GOOD_PERCENT:.0f}% good")
    print(f"knee: {knee:.2f} requests/s" if knee else "knee: none, the lowest rate was too much", flush=True)
    variants = shapes(tester, SHAPES_AT * knee) if knee else []
    block_tokens = max(1, round(BLOCK_TOKENS * results.settings["trace_scale"]))
    replayed, capacity = replay(tester, trace, block_tokens, knee, full, sizes.trace_refine)
    tester.progress.clear()
    title = f"Other shapes of load at {SHAPES_AT:g} of the knee, and the trace, {what}"
    results.table("shapes", title, [*variants, *replayed], tables.SHAPE_COLUMNS)
    results.table("capacity", f"Capacity, predicted and with the trace, {what}", capacity, tables.CAPACITY_COLUMNS)
    return rows, knee, capacity


# ---- main ----


def report(results: Report, args: argparse.Namespace, rows: list[dict], knee: float | None, capacity: list) -> None:
    """Print the claim, write JSON and picture."""
    if capacity:
        results.claims([tables.claim(capacity)])
    results.save(args.json)
    if args.plot:
        plot(args.plot, rows, knee, results)


def main() -> int:
    """Find the server, run the loads, print what it can take."""
    parser, args = flags.parse(__doc__)
    machine = detect(args.device)
    sizes = sizes_for(machine, args.quick)
    trace = flags.trace_for(args, sizes)
    base = flags.synthetic_load(args, sizes, trace)
    if base.tokens_shared >= base.tokens_in:
        parser.error(f"--shared-tokens must be less than the {base.tokens_in} tokens of a prompt")
    quiet()
    prepare_environment(machine)
    with serving(args, machine) as endpoint:
        settings = flags.recorded(args, sizes, endpoint.model, base)
        results = Report("load_test.py", machine, settings, wide=args.wide)
        results.print_card()
        tester = LoadTester(endpoint, base, args.seed, sizes.runs)
        with tester.progress:
            rows, knee, capacity = measure(results, tester, trace, sizes, args)
    report(results, args, rows, knee, capacity)
    return 0


if __name__ == "__main__":
    cli.run(main)

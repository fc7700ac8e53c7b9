"""Load testing: what can a server take, before real users find out?

A closed loop (so many users, each of whom waits for an answer) cannot overload a server: when it is slow, they ask
less. Real traffic is an open loop, which does not wait, and comes in bursts. So this raises the rate of an open loop
until too few requests meet the objective: that is the knee. The load and every figure come from vLLM's own benchmark
client.

Then the question of the chapter: does the capacity measured with synthetic requests hold for real ones? A trace of real
traffic is replayed, with its lengths and its bursts (Azure's conversation trace, its first minute; lengths divided to
fit the machine).

    python3 ch16/load_test.py                                       # its own server, the knee, a trace, claim W1
    python3 ch16/load_test.py --quick --plot load.png               # on a stand-in for a server (simulated)
    python3 ch16/load_test.py --url http://127.0.0.1:8000 --slo-ttft-ms 500 --slo-tpot-ms 50
    python3 ch16/load_test.py --url http://127.0.0.1:8000 --rates 2 4 8 --burstiness 0.3
    python3 ch16/load_test.py --url http://127.0.0.1:8000 --trace mooncake.jsonl

How to read it: goodput counts requests that met the objective. `client late` is how late this process's own clock was:
if it comes near the latencies, the client is too slow and the figures are its own.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import requests
from tqdm import tqdm

from ch16.parts.load_test.knee import GOOD_PERCENT, find_knee
from ch16.parts.load_test.picture import plot
from common import cli, models
from common.engine import prepare_environment, quiet
from common.gpu import Machine, detect
from common.loadclient import Load, Objective, Target, run_load
from common.results import Column, Report, Verdict, judge
from common.server import ServerProcess
from common.standin import MODEL as STANDIN
from common.standin import standin_command
from common.traces import BLOCK_TOKENS, BUNDLED, Arrival, at_rate, mean_lengths, read_trace, shrink

# ---- configuration ----

TTFT_SLACK, TPOT_SLACK = 10, 3  # the objective, if none is given: so many times the medians of a server without load
W1_PERCENT = 15.0
FIGURE_COLUMNS = tuple(
    Column(f"{key}_p{q}_ms", f"{title} P{q} ms", ",.1f" if key in ("tpot", "itl") else ",.0f")
    for key, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E"))
    for q in (50, 90, 99)
)
RATE_COLUMNS = (
    Column("load", "load"),
    Column("offered", "offered req/s", ",.2f"),
    Column("answered", "answered req/s", ",.2f"),
    Column("goodput", "goodput req/s", ",.2f"),
    Column("good_percent", "good %", ".0f"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("errors", "errors"),
    Column("late_ms", "client late P99 ms", ".1f"),
)
CAPACITY_COLUMNS = (
    Column("what", "capacity"),
    Column("synthetic", "from synthetic requests", ",.2f"),
    Column("trace", "with the trace", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)


@dataclass(frozen=True)
class Sizes:
    """Requests a run and of the trace, by how much its lengths are multiplied, and how the knee is sought."""

    requests: int
    trace_requests: int
    scale: float
    fractions: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # of the throughput when all requests come at once
    refine: int = 2  # halvings around the knee
    trace_refine: int = 4  # halvings below it, if it is too much for the trace: 1/16 of the knee, less than W1_PERCENT


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """Some seconds a run, so that a queue that grows is seen to grow."""
    if quick:
        return Sizes(64, 108, 1 / 16, (0.5, 0.8, 1.0), 1, 3)
    if machine.device == "cuda":
        return Sizes(400, 648, 1.0)
    return Sizes(120, 108, 1 / 16, (0.4, 0.6, 0.8, 1.0))


# ---- mechanism: the server ----


@contextlib.contextmanager
def server(args: argparse.Namespace, machine: Machine) -> Iterator[Target]:
    """The server to test: the one at --url, a stand-in with --quick, else our own with its defaults."""
    if args.url:
        yield target_at(args.url.rstrip("/"), args)
        return
    if args.quick:
        command = standin_command("--step-ms", "3", "--sequence-us", "300", "--prefill-us", "10", "--slots", "16")
    else:
        model = models.resolve(args.model, machine)
        script = Path(__file__).with_name("inference_serving.py")
        command = [sys.executable, str(script), "--serve", "--model", model.absolute_path]
        command += ["--device", machine.device]
    with tempfile.TemporaryDirectory() as folder, ServerProcess(command, Path(folder)) as process:
        print("the server is ready", flush=True)
        yield target_at(process.url, args)


def target_at(url: str, args: argparse.Namespace) -> Target:
    """What the server at a URL serves, and a tokenizer for it.

    Raises:
        CannotRun: nobody answers there, or not as an OpenAI-compatible server does.
    """
    try:
        answer = requests.get(f"{url}/v1/models", headers=auth_headers(), timeout=10)
        answer.raise_for_status()
        served = answer.json()["data"][0]
        name, root = served["id"], served.get("root") or ""
    except requests.RequestException as error:
        raise cli.CannotRun(f"{url}/v1/models gives no answer: {reason(error)}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise cli.CannotRun(f"{url}/v1/models does not answer as an OpenAI-compatible server does") from None
    tokenizer = args.tokenizer or (root if Path(root, "config.json").exists() else "")
    if not tokenizer:
        tokenizer = models.bundled().path
        if name != STANDIN:
            print(f"prompts are made with the bundled model's tokenizer; --tokenizer names that of {name}", flush=True)
    return Target(url, name, tokenizer)


def auth_headers() -> dict[str, str]:
    """As vLLM's client sends it: the key in OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def reason(error: requests.RequestException) -> str:
    """Why a request failed, without the library's nesting."""
    if error.response is not None:
        return f"status {error.response.status_code}"
    return "it refused the connection" if "refused" in str(error) else type(error).__name__


# ---- measurement ----


class Tester:
    """Loads on one server, each with a row of figures and a name."""

    def __init__(self, target: Target, base: Load, seed: int, total: int) -> None:
        self.target, self.base, self._seed = target, base, seed
        self.objective: Objective | None = None
        self._bar = tqdm(total=total, desc="runs", leave=False, disable=not sys.stderr.isatty())

    def run(self, name: str, **changes: object) -> dict:
        """One run. Each has other prompts than the last: a prompt seen before would come from the prefix cache."""
        self._seed += 1
        row = {"load": name} | run_load(self.target, self.base.with_(**changes), self.objective, self._seed)
        self._bar.update()
        return row

    def at(self, rate: float) -> dict:
        """An open loop at a rate."""
        return self.run(f"{shape_of(self.base)}, {rate:.2f}/s", rate=rate) | {"rate": rate}

    def close(self) -> None:
        """No more runs."""
        self._bar.close()


def shape_of(load: Load) -> str:
    """What an open loop's arrivals are called."""
    return "Poisson" if load.burstiness == 1 else f"gamma {load.burstiness:g}"


def objective_for(light: dict, args: argparse.Namespace) -> Objective:
    """What the user asked for, else a multiple of what a server without load takes."""
    return Objective(
        args.slo_ttft_ms or TTFT_SLACK * light["ttft_p50_ms"], args.slo_tpot_ms or TPOT_SLACK * light["tpot_p50_ms"]
    )


def search(tester: Tester, sizes: Sizes, at_once: int, args: argparse.Namespace) -> tuple[list[dict], float, dict]:
    """Light load, full load, the rates between them. Returns all rows, the knee in requests/s, the row of full load."""
    light = tester.run("one user", at_once=1, requests=8)
    tester.objective = objective_for(light, args)
    full = tester.run("all at once", requests=max(tester.base.requests, at_once))
    capacity = full["steady_tokens_per_s"] / tester.base.tokens_out
    knee, rows = find_knee(tester.at, [fraction * capacity for fraction in sizes.fractions], sizes.refine)
    return [light, full, *rows], knee, full


def shapes(tester: Tester, rate: float) -> list[dict]:
    """The same rate in other shapes: burstier, with a common beginning, as a closed loop."""
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
    tester: Tester, trace: list[Arrival], block: int, knee: float, full: dict, refine: int
) -> tuple[list, list, float]:
    """The trace all at once, and at the knee of the synthetic requests: if that is too much, its own is sought below.

    Returns:
        Rows of loads, rows of capacity, and the rate up to which the trace kept the objective (0.0: at none).
    """

    def at(rate: float, name: str) -> dict:
        arrivals = at_rate(trace, len(trace), rate)
        return tester.run(name, trace=arrivals, requests=len(arrivals), block_tokens=block) | {"rate": rate}

    flood = at(1e6, "trace, all at once")
    kept, rows = find_knee(lambda rate: at(rate, f"trace, {rate:.2f}/s"), [knee] if knee else [], refine)
    tokens, real_tokens = full["steady_tokens_per_s"], flood["steady_tokens_per_s"]
    capacity = [
        ("full server, output tok/s", tokens, real_tokens),
        ("full server, requests/s", tokens / tester.base.tokens_out, real_tokens / mean_lengths(trace)[1]),
        ("knee, requests/s", knee, kept),
    ]
    table = [
        {"what": what, "synthetic": ours, "trace": real, "error_percent": 100 * (ours / real - 1) if real else None}
        for what, ours, real in capacity
    ]
    return [flood, *rows], table, kept


def claim(capacity: list[dict], knee: float, kept: float) -> Verdict:
    """W1 asks for both: the requests/s of a full server, and the rate at which the objective is kept."""
    full, error = capacity[1], capacity[1]["error_percent"]
    measured = (
        f"a full server answers {full['synthetic']:.2f} requests/s predicted, {full['trace']:.2f} with the trace "
        f"({error:+.1f}%); the objective is kept up to {knee:.2f}/s predicted, {kept:.2f}/s with the trace"
    )
    keeps = kept > 0 and 100 * abs(knee / kept - 1) <= W1_PERCENT
    return judge("W1", abs(error) <= W1_PERCENT and keeps, measured)


def given_loads(tester: Tester, args: argparse.Namespace) -> list[dict]:
    """The loads that the user named."""
    if args.slo_ttft_ms or args.slo_tpot_ms:
        tester.objective = Objective(args.slo_ttft_ms or 1e9, args.slo_tpot_ms or 1e9)
    rows = [tester.at(rate) for rate in args.rates or ()]
    return rows + [tester.run(f"{users} users", at_once=users) for users in args.users or ()]


def main() -> int:
    """Find the server, run the loads, print what it can take."""
    parser = cli.standard_parser(
        __doc__, model_help="served if there is no --url: auto, bundled, a folder, or a hub id"
    )
    tests = parser.add_argument_group("load")
    tests.add_argument("--url", help="a running OpenAI-compatible server (its key, if any, in OPENAI_API_KEY)")
    tests.add_argument("--tokenizer", help="of the served model: a folder or a hub id")
    tests.add_argument("--requests", type=cli.positive_int, help="in each run")
    tests.add_argument("--tokens-in", type=cli.positive_int, help="of a prompt; default: the trace's mean")
    tests.add_argument("--tokens-out", type=cli.positive_int, help="of an answer; default: the trace's mean")
    tests.add_argument(
        "--rates", type=cli.positive_float, nargs="+", metavar="R", help="only these open loops, requests/s"
    )
    tests.add_argument("--users", type=cli.positive_int, nargs="+", metavar="N", help="only closed loops of N")
    tests.add_argument("--burstiness", type=cli.positive_float, default=1.0, help="below 1: burstier than Poisson")
    tests.add_argument("--shared-tokens", type=cli.non_negative_int, default=0, help="that all prompts begin with")
    tests.add_argument("--trace", default=str(BUNDLED), metavar="FILE", help="Azure's .csv or Mooncake's .jsonl")
    tests.add_argument("--trace-scale", type=cli.positive_float, help="times the trace's lengths; default: by machine")
    tests.add_argument(
        "--slo-ttft-ms", type=cli.positive_float, help="objective; default: 10 times the unloaded median"
    )
    tests.add_argument("--slo-tpot-ms", type=cli.positive_float, help="objective; default: 3 times the unloaded median")
    args = parser.parse_args()
    if args.plot and args.users and not args.rates:
        parser.error("--plot draws open loops by their rate, and --users are none: name --rates, too")

    machine = detect(args.device)
    sizes = sizes_for(machine, args.quick)
    scale = args.trace_scale or sizes.scale
    trace = shrink(read_trace(args.trace)[: sizes.trace_requests], scale, max_tokens=2048)
    tokens_in, tokens_out = map(round, mean_lengths(trace))
    base = Load(
        args.requests or sizes.requests,
        args.tokens_in or tokens_in,
        max(2, args.tokens_out or tokens_out),
        burstiness=args.burstiness,
        tokens_shared=args.shared_tokens,
    )
    if base.tokens_shared >= base.tokens_in:
        parser.error(f"--shared-tokens must be less than the {base.tokens_in} tokens of a prompt")
    quiet()
    prepare_environment(machine)
    with server(args, machine) as target:
        what = "a stand-in (simulated)" if target.model == STANDIN else target.model
        settings = {"model": target.model, "requests": base.requests, "tokens_in": base.tokens_in} | {
            "tokens_out": base.tokens_out,
            "tokens_shared": base.tokens_shared,
            "burstiness": base.burstiness,
            "slo_ttft_ms": args.slo_ttft_ms,
            "slo_tpot_ms": args.slo_tpot_ms,
            "trace": Path(args.trace).name,
            "trace_scale": scale,
            "seed": args.seed,
        }
        report = Report("load_test.py", machine, settings)
        report.print_card()
        tester = Tester(target, base, args.seed, total=8 + len(sizes.fractions) + sizes.refine + sizes.trace_refine)
        try:
            if args.rates or args.users:
                rows, knee = given_loads(tester, args), 0.0
            else:
                rows, knee, full = search(tester, sizes, len(trace), args)
                variants = shapes(tester, 0.8 * knee) if knee else []
                block = max(1, round(BLOCK_TOKENS * scale))
                replayed, capacity, kept = replay(tester, trace, block, knee, full, sizes.trace_refine)
                slo = tester.objective
                settings |= {"slo_ttft_ms": slo.ttft_ms, "slo_tpot_ms": slo.tpot_ms}  # as the light load has set them
        finally:
            tester.close()

    lengths = f"{base.tokens_in} tokens in and {base.tokens_out} out, {what}"
    report.table("rates", f"Rates, {lengths}", rows, RATE_COLUMNS)
    report.table("latencies", f"Latencies, {lengths}", rows, (RATE_COLUMNS[0], *FIGURE_COLUMNS))
    if not (args.rates or args.users):
        print(f"\nobjective: TTFT {slo.ttft_ms:,.0f} ms, TPOT {slo.tpot_ms:,.0f} ms; at least {GOOD_PERCENT:.0f}% good")
        print(f"knee: {knee:.2f} requests/s" if knee else "knee: none, the lowest rate was too much")
        columns = (
            *RATE_COLUMNS,
            *(c for c in FIGURE_COLUMNS if c.key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms")),
        )
        title = f"Other shapes of load at 0.8 of the knee, and the trace, {what}"
        report.table("shapes", title, [*variants, *replayed], columns)
        report.table("capacity", f"Capacity, predicted and with the trace, {what}", capacity, CAPACITY_COLUMNS)
        report.claims([claim(capacity, knee, kept)])
    report.save(args.json)
    if args.plot:
        plot(args.plot, [row for row in rows if "rate" in row], knee)
    return 0


if __name__ == "__main__":
    cli.run(main)

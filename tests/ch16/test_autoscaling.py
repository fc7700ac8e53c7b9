"""The autoscaler against cases worked by hand from its documentation, by property, and against a brute-force twin; the
lab's tables; the command line."""

import json
import math
import sys

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ch16 import autoscaling
from ch16.autoscaling import decide, recommend
from ch16.parts.autoscaling.emit import read_spec
from ch16.parts.autoscaling.flags import FleetSizes
from ch16.parts.autoscaling.hpa import SCALE_DOWN, SCALE_UP, History, PodsMetric, Policy, PoolMetric, Rules, Spec
from ch16.parts.autoscaling.signals import by_pods, signals
from ch16.parts.autoscaling.simulate import Pool
from ch16.parts.autoscaling.tables import SETTLED
from common.cli import CannotRun
from common.costs import Costs
from common.traces import Arrival

# ---- the mechanism, by hand ----

WIDE = Spec(1, 1000)


def pods(target, *values, missing=0, unready=0):
    return PodsMetric(target, values, missing, unready)


# Each case: replicas now, the metric, replicas recommended, and the sentence of "Algorithm details" it follows from.
# https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/
BY_HAND = [
    (3, pods(0.1, 0.2, 0.2, 0.2), 6, "current 200m, desired 100m: the number of replicas will be doubled"),
    (4, pods(0.1, *[0.05] * 4), 2, "if the current value is instead 50m, you'll halve the number of replicas"),
    (3, pods(50, 60, 60, 60), 4, "ceil: 3 x 60/50 = 3.6"),
    (10, pods(50, *[55] * 10), 10, "skips any scaling action if the ratio is within the tolerance, 0.1: 55/50 = 1.1"),
    (10, pods(50, *[45] * 10), 10, "the same below: 45/50 = 0.9"),
    (10, pods(50, *[56] * 10), 12, "beyond the tolerance: 10 x 1.12 = 11.2"),
    (10, pods(50, *[44] * 10), 9, "beyond it below: 10 x 0.88 = 8.8"),
    (2, pods(50, 10, 90), 2, "currentMetricValue is the average across all Pods: (10 + 90) / 2 = 50"),
    (4, pods(50, 20, 20, 20, missing=1), 3, "missing: 100% of the desired value in case of a scale down: 4 x 27.5/50"),
    (4, pods(50, 100, 100, 100, missing=1), 6, "missing: 0% in case of a scale up: 4 x 75/50"),
    (3, pods(50, 60, 60, missing=1), 3, "the new ratio reverses the scale direction: 1.2, then 40/50"),
    (6, pods(50, 150, 150, missing=4), 6, "the new ratio is within the tolerance: 3.0, then 50/50"),
    (4, pods(50, 100, 100, unready=2), 4, "not-yet-ready pods are consuming 0% on a scale up: 2.0, then 50/50"),
    (4, pods(50, 200, 200, unready=2), 8, "further dampening the magnitude: 4 x 100/50, not 4 x 200/50"),
    (5, pods(50, 20, 20, 20, 20, unready=1), 2, "set aside, and no scale up: 4 x 20/50"),
    (3, pods(50, missing=3), None, "no pod gave a value: no replica count can be told"),
    (2, PoolMetric(100, 300, ready=2, per_pod=False), 6, "Value: the metric is compared to the target: 2 x 300/100"),
    (2, PoolMetric(100, 300, ready=2, per_pod=True), 3, "AverageValue: divided by the number of Pods before: 300/100"),
    (6, PoolMetric(100, 300, ready=2, per_pod=False), 6, "Value: based on the number of Running and Ready Pods: 2 x 3"),
    (3, PoolMetric(100, 300, ready=1, per_pod=True), 3, "AverageValue: 300 over 3 Pods is the target"),
    (3, PoolMetric(100, 109, ready=3, per_pod=False), 3, "Value: within the tolerance"),
    (3, PoolMetric(100, None, ready=3, per_pod=True), None, "an error fetching the metric"),
]


@pytest.mark.parametrize(("current", "metric", "expected", "rule"), BY_HAND, ids=[case[3] for case in BY_HAND])
def test_a_metric_by_hand(current, metric, expected, rule):
    assert recommend(WIDE, current, metric) == expected


def asks_for(count):
    """A metric that asks for so many, if that is far enough from what there is."""
    return PoolMetric(1, count, ready=0, per_pod=True)


def replay(spec, current, turns):
    """Replicas after each of the turns (seconds, replicas asked for)."""
    history, result = History(), []
    for now, wanted in turns:
        current, history = decide(spec, history, now, current, [asks_for(wanted)])
        result.append(current)
    return result


def down(*policies, select="Max", window_s=0):
    return Spec(1, 1000, SCALE_UP, Rules(policies, window_s, select))


PODS_4, PERCENT_10, PODS_5 = Policy("Pods", 4, 60), Policy("Percent", 10, 60), Policy("Pods", 5, 60)

# Each case: the spec, replicas at first, turns, replicas after each, and the words of "Configurable scaling behavior".
TURNS_BY_HAND = [
    (down(PODS_4, PERCENT_10), 80, [(0, 10), (60, 10), (120, 10)], [72, 64, 57], "80: 8 are reduced; 72: 7.2, so 8"),
    (down(PODS_4, PERCENT_10), 40, [(0, 10), (60, 10)], [36, 32], "40 or less: the first policy, 4 at a time"),
    (down(PODS_4, PERCENT_10), 80, [(0, 10), (45, 10), (60, 10)], [72, 72, 64], "must hold true for periodSeconds"),
    (down(PERCENT_10, PODS_5, select="Min"), 80, [(0, 10), (60, 10)], [75, 70], "Min: no more than 5 Pods a minute"),
    (down(PERCENT_10, PODS_5, select="Min"), 20, [(0, 10), (60, 10)], [18, 16], "Min: 10% of 20"),
    (down(PODS_4, select="Disabled"), 80, [(0, 10), (600, 1)], [80, 80], "Disabled turns off scaling the direction"),
    (Spec(1, 1000), 2, [(0, 100), (15, 100), (30, 100)], [6, 12, 24], "4 pods or 100% every 15 seconds, the highest"),
    (Spec(1, 1000), 2, [(0, 100), (10, 100), (15, 100)], [6, 6, 12], "the same, asked more often"),
    (Spec(1, 1000), 10, [(0, 2), (300, 2), (315, 2)], [2, 2, 2], "100% of the running replicas may be removed"),
    (Spec(1, 1000), 10, [(0, 10), (285, 2), (300, 2)], [10, 10, 2], "300 s: the highest desired state is used"),
    (Spec(1, 1000), 10, [(0, 10), (150, 6), (300, 2), (450, 2)], [10, 10, 6, 2], "a rolling maximum"),
    (
        Spec(1, 50, Rules(SCALE_UP.policies, 60), SCALE_DOWN),
        10,
        [(0, 10), (45, 14), (60, 12)],
        [10, 10, 12],
        "scaleUp window: the lowest of the last minute",
    ),
    (Spec(2, 5), 3, [(0, 100), (600, 1), (900, 1)], [5, 2, 2], "minReplicas and maxReplicas"),
    (Spec(2, 5), 9, [(0, 9)], [5], "more than maxReplicas: brought back"),
    (Spec(2, 5), 1, [(0, 1)], [2], "fewer than minReplicas: brought up"),
]


@pytest.mark.parametrize(("spec", "current", "turns", "expected", "rule"), TURNS_BY_HAND)
def test_turns_by_hand(spec, current, turns, expected, rule):
    assert replay(spec, current, turns) == expected, rule


def test_several_metrics():
    """The largest of the desired replica counts is chosen; one that fails blocks scaling down, not up."""
    lost = PoolMetric(1, None, 3, per_pod=True)
    assert decide(WIDE, History(), 0, 3, [asks_for(5), asks_for(6), asks_for(1)])[0] == 6
    assert decide(WIDE, History(), 0, 3, [asks_for(1), lost]) == (3, History())
    assert decide(WIDE, History(), 0, 3, [asks_for(6), lost])[0] == 6
    assert decide(WIDE, History(), 0, 3, [lost]) == (3, History())


def test_a_target_that_is_not_above_zero_is_refused():
    with pytest.raises(ValueError):
        recommend(WIDE, 1, pods(0, 5))


# ---- by property ----

policies = st.builds(Policy, st.sampled_from(["Pods", "Percent"]), st.integers(1, 120), st.sampled_from([15, 40, 60]))
rules = st.builds(
    Rules,
    st.lists(policies, min_size=1, max_size=3).map(tuple),
    st.sampled_from([0, 30, 60]),
    st.sampled_from(["Max", "Min", "Disabled"]),
    st.sampled_from([0.0, 0.1, 0.3]),
)
specs = st.builds(
    lambda low, more, up, down: Spec(low, low + more, up, down), st.integers(1, 5), st.integers(0, 30), rules, rules
)
turns = st.lists(st.tuples(st.sampled_from([5, 15, 30]), st.integers(0, 60)), min_size=1, max_size=25)


def timed(turns):
    now = 0
    for pause, wanted in turns:
        now += pause
        yield now, wanted


@given(specs, st.integers(1, 40), turns)
def test_never_outside_min_and_max(spec, current, turns):
    assert all(spec.min_replicas <= count <= spec.max_replicas for count in replay(spec, current, timed(turns)))


@given(
    specs,
    turns,
    st.lists(st.tuples(st.floats(0, 99), st.floats(0, 99)), min_size=1, max_size=8),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_more_load_never_asks_for_fewer(spec, turns, loads, missing, unready):
    current, history, now = spec.min_replicas, History(), 0
    for now, wanted in timed(turns):
        current, history = decide(spec, history, now, current, [asks_for(wanted)])
    count = len(loads) + missing + unready
    if spec.min_replicas <= count <= spec.max_replicas:
        less, more = (
            decide(spec, history, now + 15, count, [pods(20, *map(choose, loads), missing=missing, unready=unready)])[0]
            for choose in (min, max)
        )
        assert less <= more


@given(specs, st.integers(1, 8), st.integers(0, 3), st.integers(0, 3), st.floats(0.01, 100), turns)
def test_stable_at_the_target(spec, seen, missing, unready, target, turns):
    current = seen + missing + unready
    history = History(tuple(timed(turns)))
    metric = pods(target, *[target] * seen, missing=missing, unready=unready)
    wanted, _ = decide(spec, history, 1000, current, [metric])
    assert wanted == min(max(current, spec.min_replicas), spec.max_replicas)


# ---- against a twin that looks at everything ----


class Twin:
    """The rules as the documentation words them, over the whole past: what was asked for, how many there were."""

    def __init__(self, spec, current):
        self.spec, self.asked, self.counts = spec, [], [(-math.inf, current)]

    def turn(self, now, wanted):
        spec, current = self.spec, self.counts[-1][1]
        if current < spec.min_replicas or current > spec.max_replicas:
            result = spec.min_replicas if current < spec.min_replicas else spec.max_replicas
        else:
            if 1 - spec.down.tolerance <= wanted / current <= 1 + spec.up.tolerance:
                wanted = current
            up = [count for at, count in self.asked if now - at < spec.up.window_s] + [wanted]
            lately = [count for at, count in self.asked if now - at < spec.down.window_s] + [wanted]
            if all(count > current for count in up):
                goals = range(current, min(up) + 1)
            elif all(count < current for count in lately):
                goals = range(current, max(lately) - 1, -1)
            else:
                goals = [current]
            self.asked.append((now, wanted))
            allowed = [goal for goal in goals if goal == current or self.allows(now, current, goal)]
            result = allowed[-1]
        self.counts.append((now, result))
        return result

    def allows(self, now, current, goal):
        up = goal > current
        rules = self.spec.up if up else self.spec.down
        if rules.select == "Disabled" or not self.spec.min_replicas <= goal <= self.spec.max_replicas:
            return False
        verdicts = []
        for policy in rules.policies:
            start = [count for at, count in self.counts if at <= now - policy.period_s][-1]
            sign = 1 if up else -1
            # In floating point, as the controller: 50 x 1.1 is a little more than 55, and rounded up to 56.
            percent = start * (1 + sign * policy.value / 100)
            limit = percent if policy.kind == "Percent" else start + sign * policy.value
            verdicts.append(goal <= math.ceil(limit) if up else goal >= int(limit))
        return any(verdicts) if rules.select == "Max" else all(verdicts)


@settings(max_examples=400)
@given(specs, st.integers(1, 40), turns)
def test_windows_and_policies_as_the_twin(spec, current, turns):
    twin = Twin(spec, current)
    turns = list(timed(turns))
    assert replay(spec, current, turns) == [twin.turn(now, wanted) for now, wanted in turns]


# ---- the tables ----

COSTS = {"source": "a test", "slots": 8, "scale": 0.4, "base_ms": 12.6, "sequence_ms": 0.6, "prompt_token_ms": 0.3}


@pytest.fixture
def costs(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"tables": {"costs": {"rows": [COSTS]}}}))
    return str(file)


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["autoscaling.py", *flags])
    return autoscaling.main()


def lab(cold_start_s=120.0):
    costs, lengths = Costs(0.0126, 0.0006, 0.0003), [Arrival(0.0, 300, 80), Arrival(1.0, 400, 120)]
    pool = Pool(costs, 8, 8 * 520, cold_start_s)
    return autoscaling.Lab(pool, lengths, costs.slot_s(8, 350, 100), 1.2, np.random.default_rng(0))


def test_utilization_saturates_where_the_queue_tells():
    """A1 in short: at five times the load one says the same, the other does not."""
    rows = {row["signal"]: row for row in autoscaling.seen_rows(lab(), signals(8))}
    gpu, active, kv = rows["GPU utilization"], rows["active requests = queue + running"], rows["KV usage"]
    assert gpu["x0.5"] > 0.8 and gpu["x5"] == pytest.approx(1.0) and gpu["ratio"] < 1.1
    assert active["x2"] > 5 * active["x1"] and active["x5"] > 2 * active["x2"]
    assert kv["ratio"] < 1.5
    assert rows["queue or running, the larger"]["x0.5"] > rows["queue depth"]["x0.5"]


def test_value_has_no_steady_state_between_the_ends():
    same, as_number, four = autoscaling.value_rows(lab(), 4.0)
    assert 2 < same["load1.5"] < 10 and same["load0.5"] <= same["load1"] <= same["load1.5"]
    assert [as_number[f"load{load:g}"] for load in SETTLED] == [10, 10, 10]
    assert four["load0.5"] == 2


def test_longer_cold_starts_miss_more():
    rows = autoscaling.cold_rows(lab(), 1.0, by_pods(signals(8)["active"], 2.5), None)
    missed = {(row["cold_start_s"], row["rise_s"]): row["missed_percent"] for row in rows}
    assert missed[0, 480] < missed[300, 480] and missed[120, 960] < missed[120, 120]


def test_rules_that_scale_down_slowly_pay_for_more_replicas(tmp_path):
    """Bursts of which the defaults give replicas back after five minutes, and the manifest one in an hour."""
    file = tmp_path / "hpa.yaml"
    down = {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 1800}]}
    spec = {"minReplicas": 2, "maxReplicas": 10, "behavior": {"scaleDown": down}}
    file.write_text(yaml.safe_dump({"kind": "HorizontalPodAutoscaler", "spec": spec}))
    fleet, signal, seconds = lab(), signals(8)["active"], 7200
    requests = fleet.traffic(autoscaling.bursty(seconds, fleet.rng), seconds)
    defaults, same, own = autoscaling.rules_rows(
        fleet, requests, signal, 2.5, "x.yaml", read_spec(file), FleetSizes(8, 1.0, 0.5, 2)
    )
    assert defaults == {"rules": "Kubernetes' defaults", "target": 2.5} | fleet.run(requests, by_pods(signal, 2.5))
    assert same["rules"] == "x.yaml, same target" and same["target"] == 2.5
    assert same["hours"] > 1.1 * defaults["hours"] and own["target"] != 2.5


# ---- the command line ----


def test_emit_prints_the_manifest_and_nothing_else(monkeypatch, capsys, costs):
    assert call(monkeypatch, "--quick", "--costs", costs, "--emit", "--cold-start-s", "60") == 0
    out, err = capsys.readouterr()
    content = yaml.safe_load(out)
    assert content["metadata"]["name"] == "inference-hpa"
    target = content["spec"]["metrics"][0]["pods"]["target"]["averageValue"]
    assert float(target.removesuffix("m")) > 0 and "a test, 8 slots" in out and "cold start 60 s" in out
    assert "Simulated, 2 h of bursts" in err and "machine:" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--signals", "cpu"], "invalid choice: 'cpu' (choose from"),
        (["--cold-start-s", "-1"], "--cold-start-s must be at least 0"),
        (["--cold-start-s", "nan"], "--cold-start-s must be at least 0"),
        (["--slo-ttft-ms", "0"], "must be above 0"),
        (["--emit", "--plot", "x.png"], "--plot draws what --emit leaves out"),
        (["--emit", "--hpa", "x.yaml"], "and not those of --hpa"),
    ],
)
def test_wrong_flags(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, *flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_cannot_be_used_is_found_before_the_engine_starts(monkeypatch, tmp_path):
    day = tmp_path / "day.csv"
    hours = ("00", "01", "03")
    day.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"2026-01-01 {h}:00:00,5,4\n" for h in hours))
    with pytest.raises(CannotRun, match=r"has a gap: no request for 2\.0 h"):
        call(monkeypatch, "--quick", "--trace", str(day))
    with pytest.raises(CannotRun, match="cannot read /nowhere"):
        call(monkeypatch, "--quick", "--trace", "/nowhere.csv")
    with pytest.raises(CannotRun, match="cannot read /nowhere"):
        call(monkeypatch, "--quick", "--costs", "/nowhere.json")
    with pytest.raises(CannotRun, match="cannot read /nowhere"):
        call(monkeypatch, "--quick", "--hpa", "/nowhere.yaml")


@pytest.mark.slow
def test_the_script(quick_run):
    done = quick_run("python3", "ch16/autoscaling.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = done.json["tables"]
    assert all(abs(row["error_percent"]) < 60 for row in tables["check"]["rows"])  # the engine shares two busy cores
    for name in ("bursty", "diurnal"):
        assert tables[name]["title"].startswith("Simulated")
        assert [row["signal"] for row in tables[name]["rows"]] == [signal.title for signal in signals(8).values()]
        assert all(0 <= row["missed_percent"] <= 100 and 2 <= row["mean"] <= 10 for row in tables[name]["rows"])
    first, second, _ = tables["rules"]["rows"]
    assert first["target"] == second["target"] and second["rules"] == "hpa.yaml, same target"
    assert done.json["claims"][0]["claim"] == "A1"

import json
import sys

import numpy as np
import pytest
import yaml

from ch16 import autoscaling
from ch16.parts.autoscaling.emit import read_spec
from ch16.parts.autoscaling.search import Tried
from ch16.parts.autoscaling.signals import by_pods, signals
from ch16.parts.autoscaling.simulate import Pool
from common.cli import CannotRun
from common.costs import Costs
from common.traces import Arrival

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


# ---- the claim ----


def row(name, missed, hours):
    return {"signal": name, "missed_percent": missed, "hours": hours}


FRONTIER = [Tried(0.9, 90.0, 10.0), Tried(0.5, 0.0, 40.0)]  # taking turns: 30% for 30 hours


@pytest.mark.parametrize(("missed", "verdict"), [(5.9, "holds"), (6.1, "fails")])
def test_the_claim_is_judged_at_the_same_price(missed, verdict):
    rows = {"queue": row("queue depth", 50.0, 20.0), "active": row("active", missed, 30.0), "gpu": row("gpu", 90.0, 10)}
    found = autoscaling.claim(rows, FRONTIER)
    assert found.verdict == verdict
    assert "30.00% for as many replica-hours" in found.measured and "Queue depth alone: 50.00%" in found.measured


def test_nothing_to_win_is_no_win():
    rows = {"active": row("active", 0.0, 40.0), "gpu": row("gpu", 0.0, 40.0)}
    assert autoscaling.claim(rows, FRONTIER).verdict == "fails"


@pytest.mark.parametrize("names", [["active"], ["gpu", "kv"]])
def test_without_both_sides_there_is_no_verdict(names):
    assert autoscaling.claim({name: row(name, 1.0, 1.0) for name in names}, []).verdict == "n/a"


# ---- the tables ----


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
    assert [as_number[f"load{load:g}"] for load in autoscaling.SETTLED] == [10, 10, 10]
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
        fleet, requests, signal, 2.5, "x.yaml", read_spec(file), autoscaling.Sizes(8, 1.0, 0.5, 2)
    )
    assert defaults == {"rules": "Kubernetes' defaults", "target": 2.5} | fleet.run(requests, by_pods(signal, 2.5))
    assert same["rules"] == "x.yaml, the same target" and same["target"] == 2.5
    assert same["hours"] > 1.1 * defaults["hours"] and own["target"] != 2.5


def test_budgets_buy_fewer_misses():
    (row,) = autoscaling.price_rows({"gpu": FRONTIER}, signals(8), full_h=6.0)
    assert row["b1.5"] is None and row["b2"] == row["b3.5"] == 90.0
    (row,) = autoscaling.price_rows({"gpu": FRONTIER}, signals(8), full_h=10.0)
    assert row["b1.5"] == 90.0 and row["b4"] == 0.0


def test_the_speed_is_that_of_a_day_of_a_million_requests():
    speed = autoscaling.speed_row(lab(), by_pods(signals(8)["active"], 2.5))
    assert speed["requests"] == pytest.approx(1_000_000, rel=0.01) and speed["hours"] == 24
    assert speed["per_s"] == pytest.approx(speed["requests"] / speed["seconds"])


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
    assert first["target"] == second["target"] and second["rules"] == "k8s/base/hpa.yaml, the same target"
    assert done.json["claims"][0]["claim"] == "A1"

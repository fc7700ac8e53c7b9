import contextlib
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16 import load_test
from ch16.load_test import GOOD_PERCENT, find_knee
from common.loadclient import Endpoint, Objective, RequestLoad
from common.traces import Arrival
from tests.upstream import Upstream, reply, says

SCRIPT = load_test.__file__


# ---- the search for the knee ----


def server_with(capacity, tried=None):
    def run_at(rate):
        if tried is not None:
            tried.append(rate)
        return {"rate": rate, "good_percent": 100.0 if rate <= capacity else GOOD_PERCENT - 1}

    return run_at


@given(st.floats(0.5, 12), st.integers(0, 6))
def test_lies_between_the_last_good_and_the_first_bad(capacity, refine):
    knee, rows = find_knee(server_with(capacity), [1, 2, 4, 8], refine)
    assert knee <= capacity
    assert [row["rate"] for row in rows] == sorted(row["rate"] for row in rows)
    good = [row["rate"] for row in rows if row["rate"] <= capacity]
    assert knee == max(good, default=0.0)
    if capacity < 8 and refine:
        bad = min(row["rate"] for row in rows if row["rate"] > capacity)
        widest = max(1, 4 if capacity >= 4 else 2 if capacity >= 2 else 1)
        assert bad - knee == pytest.approx(widest / 2**refine)


def test_two_bad_rates_are_enough():
    tried = []
    find_knee(server_with(1.5, tried), [1, 2, 4, 8], 0)
    assert tried == [1, 2, 4]


def test_a_good_rate_above_a_bad_one_is_luck():
    good = {1: 100, 2: 80, 3: 100}
    knee, rows = find_knee(lambda rate: {"good_percent": good[rate]}, [1, 2, 3], 0)
    assert knee == 1 and len(rows) == 3


# ---- the loads ----


def row(**figures):
    return {"steady_tokens_per_s": 100.0, "good_percent": 95.0, "e2el_p50_ms": 500.0, **figures}


class Recorder:
    """A tester that only remembers what it was asked for."""

    def __init__(self, steady, keeps=math.inf):
        self.base, self.objective, self.asked = RequestLoad(10, 40, 20), Objective(1, 1), []
        self._steady, self._keeps = steady, keeps

    def run(self, name, **changes):
        self.asked.append((name, changes))
        trace = changes.get("trace")
        rate = (len(trace) - 1) / trace[-1].at_s if trace else 0.0
        good = 95.0 if rate <= self._keeps else 89.0
        return row(load=name, steady_tokens_per_s=self._steady, good_percent=good)


TRACE = [Arrival(0.0, 30, 10), Arrival(2.0, 50, 30)]  # 20 tokens out in the mean, as in the synthetic requests


def test_the_capacity_is_compared_in_requests_of_the_same_lengths():
    tester = Recorder(steady=120.0, keeps=1e5)
    _, (tokens, requests, knee) = load_test.replay(tester, TRACE, 16, 4.0, row(), 3)
    assert (tokens["synthetic"], tokens["trace"]) == (100, 120)
    assert (requests["synthetic"], requests["trace"]) == (5, 6)
    assert requests["error_percent"] == pytest.approx(-100 / 6)
    assert (knee["synthetic"], knee["trace"], knee["error_percent"]) == (4, 4, 0)
    flood, calm = (changes["trace"] for _, changes in tester.asked)
    assert calm[-1].at_s == pytest.approx(1 / 4.0) and flood[-1].at_s < 1e-5


def test_the_knee_of_the_trace_is_sought_below_that_of_the_synthetic_requests():
    tester = Recorder(steady=120.0, keeps=2.6)
    rows, capacity = load_test.replay(tester, TRACE, 16, 4.0, row(), 3)
    assert [row["rate"] for row in rows[1:]] == [2, 2.5, 3, 4] and capacity[2]["trace"] == 2.5
    assert capacity[2]["error_percent"] == pytest.approx(60)
    rows, capacity = load_test.replay(Recorder(120.0, keeps=0.4), TRACE, 16, 4.0, row(), 3)
    assert rows[1]["rate"] == 0.5 and capacity[2]["trace"] == 0 and capacity[2]["error_percent"] is None
    rows, capacity = load_test.replay(Recorder(120.0), TRACE, 16, 0.0, row(), 3)
    assert len(rows) == 1 and capacity[2]["trace"] == 0  # no knee: nothing to compare


def test_users_of_the_closed_loop_follow_from_littles_law():
    tester = Recorder(steady=1.0)
    load_test.shapes(tester, rate=8.0)
    assert [changes for _, changes in tester.asked] == [
        {"rate": 8.0},
        {"rate": 8.0, "burstiness": 0.25},
        {"rate": 8.0, "tokens_shared": 20},
        {"at_once": 4},
    ]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script with an invented server, which keeps the objective up to 4 requests/s. Returns its JSON."""

    @contextlib.contextmanager
    def serving(args, machine):
        yield Endpoint("http://a:1", "m", "t")

    def run_load(endpoint, load, objective, seed):
        loads.append(load)
        figures = {f"{figure}_p{q}_ms": 100.0 for figure in ("ttft", "tpot", "itl", "e2el") for q in (50, 90, 99)}
        numbers = dict.fromkeys(("answered", "goodput", "tokens_per_s", "errors", "late_ms"), 1.0)
        rate = load.rate if math.isfinite(load.rate) else 5.0
        return figures | numbers | row(offered=rate, good_percent=95.0 if rate <= 4 else 80.0)

    def call(*flags):
        file = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["load_test.py", "--device", "cpu", "--json", str(file), *flags])
        load_test.main()
        return json.loads(file.read_text())

    loads = call.loads = []
    monkeypatch.setattr(load_test, "serving", serving)
    monkeypatch.setattr(load_test, "run_load", run_load)
    return call


def test_a_row_is_called_after_its_arrivals(run, capsys):
    assert [row["load"] for row in run("--rates", "2")["tables"]["rates"]["rows"]] == ["Poisson, 2.00/s"]
    rows = run("--rates", "2", "--burstiness", "0.3", "--users", "3")["tables"]["rates"]["rows"]
    assert [row["load"] for row in rows] == ["gamma 0.3, 2.00/s", "3 users"] and run.loads[-1].burstiness == 0.3
    tables = run("--burstiness", "0.3")["tables"]
    assert "Poisson" not in capsys.readouterr().out.split("gamma 0.3", 1)[1]
    assert tables["shapes"]["rows"][0]["load"] == "gamma 0.3"


def test_the_settings_say_what_was_asked_for(run):
    settings = run("--rates", "2", "--burstiness", "0.3", "--slo-tpot-ms", "40", "--shared-tokens", "4")["settings"]
    expected = {"burstiness": 0.3, "slo_ttft_ms": None, "slo_tpot_ms": 40, "tokens_shared": 4, "seed": 0}
    assert expected.items() <= settings.items()
    settings = run("--slo-ttft-ms", "250")["settings"]  # the other limit comes from the light load
    assert (settings["slo_ttft_ms"], settings["slo_tpot_ms"], settings["burstiness"]) == (250, 300, 1)


def test_a_picture_needs_rates(run, tmp_path, capsys):
    file = tmp_path / "load.png"
    with pytest.raises(SystemExit) as stopped:
        run("--users", "3", "--plot", str(file))
    assert stopped.value.code == 2 and "name --rates, too" in capsys.readouterr().err and not run.loads
    run("--users", "3", "--rates", "2", "3", "--plot", str(file))
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--rates", "0"], 2, "must be above 0"),
        (["--users", "1.5"], 2, "invalid positive_int"),
        (["--shared-tokens", "5000"], 2, "--shared-tokens must be less than"),
        (["--json", "/dev/null/x.json"], 2, "cannot write to"),
        (["--trace", "/nowhere.csv"], 1, "cannot read /nowhere.csv: No such file"),
        (["--url", "http://127.0.0.1:9"], 1, "http://127.0.0.1:9/v1/models gives no answer: it refused the connection"),
    ],
)
def test_bad_input_is_one_line(flags, status, message):
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status and message in done.stderr, done.stderr
    assert status == 2 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)


@pytest.mark.parametrize(("body", "status"), [(b"[]", b"200 OK"), (b"<html>", b"200 OK"), (b"{}", b"401 Unauthorized")])
def test_a_url_that_is_no_such_server(body, status):
    with Upstream(says(reply(body, status))) as server:
        command = [sys.executable, SCRIPT, "--url", f"http://{server.address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_script(quick_run):
    done = quick_run("python3", "ch16/load_test.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = done.json["tables"]
    assert all(row["errors"] == 0 for table in ("rates", "shapes") for row in tables[table]["rows"])
    assert [row["what"] for row in tables["capacity"]["rows"]] == [
        "full server, output tok/s",
        "full server, requests/s",
        "knee, requests/s",
    ]
    assert "simulated" in tables["rates"]["title"] and done.json["claims"][0]["claim"] == "W1"
    one, full, *rates = tables["rates"]["rows"]
    assert one["tokens_per_s"] < full["tokens_per_s"]
    assert [row["rate"] for row in rates] == sorted(row["rate"] for row in rates)


@pytest.mark.slow
def test_on_a_running_server(server, tmp_path):
    """The real one; only the loads that were named."""
    file = tmp_path / "l.json"
    loads = ("--rates", "5", "--users", "2", "--requests", "6", "--tokens-in", "16", "--tokens-out", "4")
    command = [sys.executable, SCRIPT, "--url", server.url, *loads, "--slo-ttft-ms", "1e6", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["tables"]["rates"]["rows"]
    assert [row["load"] for row in rows] == ["Poisson, 5.00/s", "2 users"]
    assert all(row["errors"] == 0 and row["good_percent"] == pytest.approx(100) for row in rows)

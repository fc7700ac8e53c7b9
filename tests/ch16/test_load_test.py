import json
import math
import subprocess
import sys

import pytest

from ch16 import load_test
from common.loadclient import Load, Objective
from common.traces import Arrival
from tests.upstream import Upstream, reply, says

SCRIPT = load_test.__file__


def row(**figures):
    return {"steady_tokens_per_s": 100.0, "good_percent": 95.0, "e2el_p50_ms": 500.0, **figures}


class Recorder:
    """A tester that only remembers what it was asked for."""

    def __init__(self, steady, keeps=math.inf):
        self.base, self.objective, self.asked = Load(10, 40, 20), Objective(1, 1), []
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
    _, capacity, kept = load_test.replay(tester, TRACE, 16, 4.0, row())
    tokens, requests, knee = capacity
    assert (tokens["synthetic"], tokens["trace"]) == (100, 120)
    assert (requests["synthetic"], requests["trace"]) == (5, 6)
    assert requests["error_percent"] == pytest.approx(-100 / 6)
    assert (knee["synthetic"], knee["trace"], knee["error_percent"], kept) == (4, 4, 0, 4)
    flood, calm = (changes["trace"] for _, changes in tester.asked)
    assert calm[-1].at_s == pytest.approx(1 / 4.0) and flood[-1].at_s < 1e-5


def test_the_trace_goes_slower_until_it_keeps_the_objective():
    tester = Recorder(steady=120.0, keeps=2.0)
    rows, capacity, kept = load_test.replay(tester, TRACE, 16, 4.0, row())
    assert [row["rate"] for row in rows[1:]] == [4, 3, 2] and kept == 2
    assert capacity[2]["error_percent"] == pytest.approx(100)
    rows, capacity, kept = load_test.replay(Recorder(120.0, keeps=0.5), TRACE, 16, 4.0, row())
    assert rows[-1]["rate"] == 1 and kept == 0 and capacity[2]["error_percent"] is None
    assert load_test.replay(Recorder(120.0), TRACE, 16, 0.0, row())[2] == 0  # no knee: nothing to compare


@pytest.mark.parametrize(
    ("error", "knee", "kept", "verdict"),
    [(14.0, 4, 4, "holds"), (-16.0, 4, 4, "fails"), (1.0, 4, 3, "fails"), (1.0, 0, 0, "fails")],
)
def test_the_claim_asks_for_both(error, knee, kept, verdict):
    capacity = [{}, {"synthetic": 5.0, "trace": 5.0, "error_percent": error}]
    judged = load_test.claim(capacity, knee, kept)
    assert judged.verdict == verdict and f"{error:+.1f}%" in judged.measured


def test_users_of_the_closed_loop_follow_from_littles_law():
    tester = Recorder(steady=1.0)
    load_test.shapes(tester, rate=8.0)
    assert [changes for _, changes in tester.asked] == [
        {"rate": 8.0}, {"rate": 8.0, "burstiness": 0.25}, {"rate": 8.0, "tokens_shared": 20}, {"at_once": 4},
    ]  # fmt: skip


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
        "full server, output tok/s", "full server, requests/s", "knee, requests/s"
    ]  # fmt: skip
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

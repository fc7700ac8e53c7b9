import json
import subprocess
import sys

import pytest

from ch16 import load_test
from ch16.loadtest.client import Load, Objective
from common.traces import Arrival
from tests.upstream import Upstream, reply, says

SCRIPT = load_test.__file__


def row(**figures):
    return {"steady_tokens_per_s": 100.0, "good_percent": 95.0, "e2el_p50_ms": 500.0, **figures}


class Recorder:
    """A tester that only remembers what it was asked for."""

    def __init__(self, steady):
        self.base, self.objective, self.asked, self._steady = Load(10, 40, 20), Objective(1, 1), [], steady

    def run(self, name, **changes):
        self.asked.append((name, changes))
        return row(load=name, steady_tokens_per_s=self._steady)


def test_the_capacity_is_compared_in_requests_of_the_same_lengths():
    trace = [Arrival(0.0, 30, 10), Arrival(2.0, 50, 30)]  # 20 tokens out in the mean, as in the synthetic requests
    tester = Recorder(steady=120.0)
    rows, capacity = load_test.replay(tester, trace, 16, 4.0, row())
    tokens, requests = capacity
    assert (tokens["synthetic"], tokens["trace"]) == (100, 120)
    assert (requests["synthetic"], requests["trace"]) == (5, 6)
    assert requests["error_percent"] == pytest.approx(-100 / 6)
    calm, flood = (changes["trace"] for _, changes in tester.asked)
    assert calm[-1].at_s == pytest.approx(1 / 4.0) and flood[-1].at_s < 1e-5
    assert load_test.claim(capacity, rows[0], 4.0).verdict == "fails"
    capacity[1]["error_percent"] = 14.0
    verdict = load_test.claim(capacity, rows[0], 4.0)
    assert verdict.verdict == "holds" and "+14.0%" in verdict.measured and "95%" in verdict.measured


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
    assert [row["what"] for row in tables["capacity"]["rows"]] == ["output tok/s", "requests/s"]
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

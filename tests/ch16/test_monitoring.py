import threading
from dataclasses import replace

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from ch16 import monitoring
from ch16.monitoring import MonitoringSizes
from ch16.parts.monitoring.client import Scraper, ask, send
from ch16.parts.monitoring.server import serving
from ch16.parts.monitoring.tables import agreement_rows
from common.cli import CannotRun
from common.gpu import Machine
from common.results import Report

ACTIVE = "inference_active_requests"
BODY = {"prompt": "a", "max_tokens": 3}


class FakeEngine:
    """Answers at once, or when `go` is set; refuses requests for no tokens."""

    def __init__(self):
        self.tokens, self.broken = 0, False
        self.go, self.waiting, self._lock = threading.Event(), threading.Semaphore(0), threading.Lock()
        self.go.set()

    def generate(self, prompt, max_tokens):
        if max_tokens < 1 or self.broken:
            raise ValueError("max_tokens must be at least 1")
        self.waiting.release()
        self.go.wait()
        with self._lock:
            self.tokens += max_tokens
        return {"text": prompt * max_tokens, "tokens": max_tokens}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def url(engine):
    with serving(monitoring.InferenceHandler, engine, monitoring.WINDOW_S) as url:
        yield url


def page(url):
    text = requests.get(f"{url}/metrics", timeout=10).text
    return {(s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples}


def gained(before, after):
    keys = [key for key in after if not key[0].endswith(("_bucket", "_created", "_sum"))]
    return {key: after[key] - before[key] for key in keys if after[key] != before[key]}


def test_the_chapters_names():
    assert monitoring.process_request.__name__ == "process_request"
    names = [next(iter(metric.describe())).name for metric in monitoring.EXPLAINED]
    assert names == ["inference_requests", "inference_latency_seconds", ACTIVE, "inference_throughput_tokens_per_sec"]


def test_a_request_is_answered_and_counted(url):
    before = page(url)
    answer = requests.post(url, json=BODY, timeout=10)
    assert answer.json() == {"text": "aaa", "tokens": 3}
    counts = gained(before, page(url))
    assert counts.pop(("inference_throughput_tokens_per_sec",)) > 0
    assert counts == {("inference_requests_total", "ok"): 1, ("inference_latency_seconds_count",): 1}


@pytest.mark.parametrize("body", [b'{"prompt": "a", "max_tokens": 0}', b"{}", b"no JSON"])
def test_a_request_that_fails_is_counted_as_well(url, body):
    before = page(url)
    answer = requests.post(url, data=body, timeout=10)
    assert answer.status_code == 500 and "Traceback" not in answer.text
    assert gained(before, page(url)) == {
        ("inference_requests_total", "error"): 1,
        ("inference_latency_seconds_count",): 1,
    }


def test_requests_are_active_until_they_are_answered(url, engine):
    engine.go.clear()
    clients = threading.Thread(target=lambda: send(url, [BODY] * 3, clients=3))
    clients.start()
    for _ in range(3):
        assert engine.waiting.acquire(timeout=20)
    assert page(url)[ACTIVE,] == 3
    engine.go.set()
    clients.join()
    assert page(url)[ACTIVE,] == 0


@pytest.fixture
def results():
    return Report("monitoring.py", Machine("cpu", "a machine", 1, 2**30, 2, None, False, False), {"model": "none"})


def test_server_and_clients_agree(engine, results, capsys):
    answers, scrapes = monitoring.measure(engine, MonitoringSizes((1, 8), 5, (1, 9)), 0, results)
    rows = {row["what"]: row for row in results.tables["agreement"]["rows"]}
    assert {row["agrees"] for row in rows.values()} == {"yes"}
    assert rows["requests answered"]["server"] == 45 and rows["requests failed"]["server"] == 1
    assert sum(answer.tokens for answer in answers) == engine.tokens and len(scrapes) >= 2
    assert sum(row["requests"] for row in results.tables["buckets"]["rows"]) == len(answers) == 46
    printed = capsys.readouterr().out
    assert all(text in printed for text in monitoring.EXPLAINED.values())


def test_wrong_metrics_are_noticed(url):
    with Scraper(f"{url}/metrics", 60) as scraper:
        answers = send(url, [BODY] * 4, clients=2)
    wrong = {
        "requests answered": answers[:-1],
        "requests failed": [*answers[:-1], replace(answers[-1], error="500")],
        "requests timed": answers * 2,
        "latencies, sum in s": [replace(answer, arrived=answer.sent) for answer in answers],
        "output tokens/s": [replace(answer, tokens=300) for answer in answers],
    }
    assert {row["agrees"] for row in agreement_rows(scraper.scrapes, answers)} == {"yes"}
    for what, tampered in wrong.items():
        rows = agreement_rows(scraper.scrapes, tampered)
        assert what in [row["what"] for row in rows if row["agrees"] == "no"], what


def test_a_script_whose_metrics_are_wrong_fails(results):
    results.keep("agreement", "", [{"what": "a", "agrees": "no"}, {"what": "b", "agrees": "yes"}], ())
    with pytest.raises(CannotRun, match=r"disagree on: a$"):
        monitoring.report(type("Flags", (), {"json": None, "plot": None}), results, [], [])


def test_an_engine_that_fails_ends_the_script(engine, results):
    engine.broken = True
    with pytest.raises(CannotRun, match=r"2 of 2 requests failed: 500 max_tokens must"):
        monitoring.measure(engine, MonitoringSizes((1,), 2, (1, 9)), 0, results)


def test_a_client_keeps_the_error(url):
    answer = ask(url, {})
    assert answer.error.startswith("500 ") and answer.tokens == 0 and answer.latency_s > 0


@pytest.mark.slow
def test_the_script(quick_run):
    """On the real engine: all requests but the one that vLLM refuses are answered, and the counts agree."""
    done = quick_run("python3", "ch16/monitoring.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = done.json["tables"]
    series = {row["series"]: row["value"] for row in tables["series"]["rows"]}
    sizes = done.json["settings"]
    assert series['inference_requests_total{outcome="ok"}'] == 2 * sum(sizes["clients"])
    assert series['inference_requests_total{outcome="error"}'] == 1 and series[ACTIVE] == 0
    assert series["inference_throughput_tokens_per_sec"] > 0
    assert {row["agrees"] for row in tables["agreement"]["rows"]} == {"yes"}
    assert done.json["claims"] == [] and done.plot.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, done.out.splitlines())) <= 100

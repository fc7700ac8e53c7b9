import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.load_balancer.dashboard import INTERVAL_S, POINTS, Dashboard, Reading, figures, gained, parse
from common.server import ServerProcess
from common.standin import standin_command
from tests.servers import ROOT

CHROMIUM = shutil.which("chromium")
LE = (0.1, 0.5, 1.0, math.inf)


def page(tokens=0.0, running=1, usage=(0.5,), ttft=(), queries=0, hits=0):
    """A /metrics of vLLM, with an engine for each usage."""
    lines = ["# HELP vllm:num_requests_running Number", "# TYPE vllm:num_requests_running gauge"]
    for engine, value in enumerate(usage):
        labels = f'engine="{engine}",model_name="a}}\\"{{b"'
        lines += [f"vllm:kv_cache_usage_perc{{{labels}}} {value}", f"vllm:num_requests_running{{{labels}}} {running}"]
    lines += [f'vllm:generation_tokens_total{{engine="0"}} {tokens}', "vllm:generation_tokens_created 1.7e+09"]
    lines += [f"vllm:prefix_cache_queries_total {queries}", f"vllm:prefix_cache_hits_total {hits}"]
    for bound in LE:
        le = "+Inf" if bound == math.inf else bound
        lines.append(f'vllm:time_to_first_token_seconds_bucket{{le="{le}"}} {sum(t <= bound for t in ttft)}')
    return "\n".join([*lines, 'vllm:time_to_first_token_seconds_sum{le="no"} 9', "vllm:num_requests_waiting NaN", ""])


# ---- arithmetic ----


def test_parse_adds_engines_up():
    reading = parse(page(tokens=12.5, running=2, usage=(0.2, 0.4), ttft=(0.3, 0.3, 2)))
    assert reading.gauges == pytest.approx({"vllm:kv_cache_usage_perc": 0.3, "vllm:num_requests_running": 4})
    assert reading.counters["vllm:generation_tokens_total", 0.0] == 12.5
    buckets = [reading.counters["vllm:time_to_first_token_seconds_bucket", bound] for bound in LE]
    assert buckets == [0, 2, 2, 3]


@given(st.text() | st.text(alphabet='vllm:generation_tokens_total{le="} 1.e\n'))
def test_parse_takes_anything(text):
    parse(text + "\nvllm:generation_tokens_total 1e\nvllm:generation_tokens_total{le=\n")


def test_a_restarted_server_has_gained_what_it_says_now():
    key = ("vllm:generation_tokens_total", 0.0), ("vllm:prefix_cache_hits_total", 0.0)
    before, after = Reading({}, {key[0]: 100, key[1]: 1}), Reading({}, {key[0]: 30, key[1]: 2})
    assert gained(before, after) == {key[0]: 30, key[1]: 2}
    assert gained(Reading({}, {key[0]: 10}), after) == {key[0]: 20, key[1]: 2}


def test_figures_of_two_servers():
    before = [parse(page(tokens=100, queries=100, hits=50)), None]
    after = [parse(page(tokens=300, ttft=(0.2,) * 99 + (0.7,), queries=200, hits=125)), parse(page(tokens=1000))]
    got = figures(list(zip(before, after, strict=True)), 2.0)
    assert got["tokens_per_s"] == 100 and got["hit_rate"] == 0.75  # the second server has no reading before
    assert got["running"] == 2 and got["waiting"] is None and got["kv"] == 0.5
    assert 0.1 < got["ttft_p50"] < 0.5 and got["ttft_p99"] == 0.5 and got["itl_p50"] is None
    assert set(figures([], 2.0).values()) == {None}


# ---- when it reads ----


class Replicas:
    """Two replicas whose metrics are read, on a clock of our own."""

    def __init__(self):
        self.now, self.reads, self.tokens = 1000.0, 0, 0
        self.up = {"a:1": True, "b:2": True}
        self.dashboard = Dashboard(self.read, self.states, lambda: self.now)
        self.runner = asyncio.Runner()

    async def read(self, server):
        self.reads += 1
        await asyncio.sleep(0)
        return page(tokens=self.tokens) if self.up[server] else None

    def states(self):
        return {server: {"ready": up, "in_flight": 3, "breaker_open": False} for server, up in self.up.items()}

    def data(self, viewers=1):
        async def all_at_once():
            return await asyncio.gather(*(self.dashboard.data() for _ in range(viewers)))

        return self.runner.run(all_at_once())[-1]


@pytest.fixture
def replicas():
    replicas = Replicas()
    yield replicas
    replicas.runner.close()


def test_many_viewers_cost_one_reading(replicas):
    replicas.data(viewers=20)
    assert replicas.reads == 2
    replicas.now += INTERVAL_S / 2
    replicas.data(viewers=20)
    assert replicas.reads == 2
    replicas.now += INTERVAL_S / 2
    assert len(replicas.data(viewers=20)["points"]) == 2 and replicas.reads == 4


def test_a_replica_that_goes_and_one_that_is_gone(replicas):
    for step in range(4):
        replicas.tokens += 100
        data = replicas.data()
        assert [server["name"] for server in data["servers"]] == list(replicas.up)
        if step == 1:
            assert data["points"][-1]["tokens_per_s"] == 200 / INTERVAL_S
            replicas.up["b:2"] = False
        if step == 2:
            assert data["servers"][1] | {"ready": False, "answers": False} == data["servers"][1]
            assert data["points"][-1]["tokens_per_s"] == 100 / INTERVAL_S and data["servers"][0]["running"] == 1
            del replicas.up["b:2"]
        replicas.now += INTERVAL_S
    assert [point["age_s"] for point in data["points"]] == [6, 4, 2, 0]


def test_a_pause_is_no_point_and_old_points_go(replicas):
    replicas.data()
    replicas.now += 3600  # nobody looked for an hour
    replicas.tokens = 10_000_000
    assert replicas.data()["points"][-1]["tokens_per_s"] is None
    for _ in range(2 * POINTS):
        replicas.now += INTERVAL_S
        data = replicas.data()
    assert len(data["points"]) == POINTS and data["points"][0]["age_s"] < 301
    json.dumps(data, allow_nan=False)


# ---- over HTTP ----

HOSTILE = "<img src=x onerror=document.title='broken'>:9"


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    with ServerProcess(standin_command("--step-ms", "5"), tmp_path_factory.mktemp("standin")) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(standin, tmp_path_factory):
    servers = f"{standin.address},{HOSTILE}"
    command = [sys.executable, str(ROOT / "ch16" / "load_balancer.py"), "--servers", servers]
    with ServerProcess(command, tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway
        assert "Traceback" not in gateway.log.read_text()


def test_the_page_is_closed_to_everything_else(gateway):
    answer = requests.get(gateway.url + "/dashboard", timeout=10)
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|innerHTML|https?://(?!www\.w3\.org/2000/svg)", answer.text)


def test_data_asks_for_the_key_and_the_page_does_not(standin, tmp_path):
    command = [sys.executable, str(ROOT / "ch16" / "load_balancer.py"), "--servers", standin.address]
    with ServerProcess(command, tmp_path, {"GATEWAY_API_KEY": "secret"}) as gateway:
        assert requests.get(gateway.url + "/dashboard", timeout=10).status_code == 200
        for key in ("", "Bearer wrong", "secret"):
            refused = requests.get(gateway.url + "/dashboard/data", headers={"authorization": key}, timeout=10)
            assert refused.status_code == 401 and standin.address not in refused.text
        good = requests.get(gateway.url + "/dashboard/data", headers={"authorization": "Bearer secret"}, timeout=10)
        assert good.json()["servers"][0]["name"] == standin.address


def test_looking_costs_nobody_a_request(gateway):
    text = requests.get(gateway.url + "/metrics", timeout=10).text
    requests.get(gateway.url + "/dashboard", timeout=10)
    requests.get(gateway.url + "/dashboard/data", timeout=10)
    counts = re.findall(r"^gateway_requests_total.*", text, re.MULTILINE)
    assert counts and counts == re.findall(
        r"^gateway_requests_total.*", requests.get(gateway.url + "/metrics", timeout=10).text, re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser(gateway, standin, tmp_path):
    """Under load, the page shows figures; names are text; the script runs without an error."""

    def users():
        while not done.is_set():
            body = {"prompt": "the same for all of us", "max_tokens": 20}
            requests.post(gateway.url + "/v1/completions", json=body, timeout=30)

    done = threading.Event()
    threads = [threading.Thread(target=users) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 30
        while True:  # two readings, by which figures can be made
            data = requests.get(gateway.url + "/dashboard/data", timeout=10).json()
            if data["points"][-1]["ttft_p99"] and data["points"][-1]["hit_rate"]:
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", gateway.url + "/dashboard"]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    dom = seen.stdout
    assert "1 of 2 replicas take requests" in dom and "<title>Inference gateway</title>" in dom
    assert f"<td>{standin.address}</td>" in dom and "<td>&lt;img src=x onerror=" in dom and "<img" not in dom
    shown = re.findall(r"<b>([^<]*)</b>", dom)
    assert len(shown) == 9 and all(re.fullmatch(r"[\d.,]+( ms| s| %)?", text) for text in shown), shown
    lines = re.findall(r'<path class="line-\w+" d="([^"]*)"', dom)
    assert len(lines) == 9 and all(line.startswith("M") and "NaN" not in line for line in lines)
    labels = re.findall(r'<svg[^>]*aria-label="([^"]*)"', dom)
    assert len(labels) == 6 and re.match(r"Time to first token: P50 [\d.]+ ms, P99 [\d.]+ ms", labels[0])

"""The production server, for real: vLLM on the bundled model, over HTTP."""

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import requests

from tests.servers import Server

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
COMPLETION = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
LONG = COMPLETION | {"max_tokens": 3000, "ignore_eos": True}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After every test on the shared server, no request is active and a good one is answered."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        wait_for(lambda: server.metric("inference_active_requests") == 0)
        wait_for(lambda: server.metric("vllm:num_requests_running", model_name=MODEL) == 0)
        assert server.post("/v1/completions", COMPLETION).status_code == 200


def wait_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# ---- what users call ----


def test_openai_client_works_unchanged(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.completions.create(**COMPLETION)
    assert answer.choices[0].text and answer.usage.completion_tokens == 8
    chat = client.chat.completions.create(**CHAT)
    assert chat.choices[0].message.content
    streamed = client.completions.create(**COMPLETION, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 8


def test_generate_is_completions_in_short(server):
    whole = server.post("/v1/completions", COMPLETION).json()
    request = {"prompt": COMPLETION["prompt"], "max_tokens": 8, "temperature": 0}
    short = server.post("/generate", request).json()
    assert short == {
        "text": whole["choices"][0]["text"],
        "prompt_tokens": whole["usage"]["prompt_tokens"],
        "completion_tokens": 8,
        "finish_reason": "length",
    }
    lines = server.post("/generate", request | {"stream": True}, stream=True).iter_lines()
    events = [line.removeprefix(b"data: ") for line in lines if line]
    assert events.pop() == b"[DONE]"
    events = [json.loads(event) for event in events]
    assert "".join(event["text"] for event in events) == short["text"]
    assert events[-1] == {"text": "", **{key: short[key] for key in short if key != "text"}}


def test_request_ids_are_echoed(server):
    answer = server.post("/v1/completions", COMPLETION, headers={"x-request-id": "from-the-client"})
    assert answer.headers["x-request-id"] == "from-the-client"


def test_probes(server):
    assert requests.get(server.url + "/health", timeout=10).status_code == 200
    assert requests.get(server.url + "/ready", timeout=10).json() == {"status": "ready"}


def test_metrics_of_the_chapter(server):
    before = server.metric("inference_requests_total", outcome="ok")
    timed = server.metric("inference_latency_seconds_count")
    server.post("/v1/completions", COMPLETION)
    server.post("/generate", {"prompt": "a", "max_tokens": 2})
    assert server.metric("inference_requests_total", outcome="ok") == before + 2
    assert server.metric("inference_latency_seconds_count") == timed + 2
    text = requests.get(server.url + "/metrics", timeout=10).text
    for line in (
        "# TYPE inference_requests_total counter",
        "# TYPE inference_latency_seconds histogram",
        "# TYPE inference_active_requests gauge",
        "# TYPE inference_throughput_tokens_per_sec gauge",
        'inference_latency_seconds_bucket{le="0.01"}',
        'inference_latency_seconds_bucket{le="60.0"}',
        "vllm:num_requests_running",
    ):
        assert line in text


def test_throughput_gauge_follows_the_load(server):
    server.post("/v1/completions", LONG | {"max_tokens": 300})
    wait_for(lambda: server.metric("inference_throughput_tokens_per_sec") > 0)


# ---- bad input: a 4xx with a JSON error, never a 500 ----

BAD_BODIES = {
    "malformed": b"{",
    "empty": b"",
    "not an object": b"[1]",
    "invalid utf-8": b'{"prompt": "\xff"}',
    "nested too deep": b"[" * 100_000,
    "nested deep": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "NaN": json.dumps(COMPLETION | {"temperature": float("nan")}).encode(),
    "too large": json.dumps(COMPLETION | {"prompt": "a" * 400_000}).encode(),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bad_body(server, path, body):
    answer = requests.post(server.url + path, data=body, headers={"content-type": "application/json"}, timeout=30)
    assert_refused(answer, 413 if len(body) > 300_000 else 400)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": -1},
        {"max_tokens": 10**9},
        {"max_tokens": 10**30},
        {"max_tokens": "many"},
        {"max_tokens": 1.5},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [10**8]},
        {"prompt": [-1]},
        {"prompt": [1, "a"]},
        {"prompt": {}},
        {"prompt": "hello " * 5000},
        {"prompt": "x" * 200_000},
        {"prompt": "\ud800"},
        {"bad_words": ["\ud800"]},
        {"n": 0},
        {"n": 9},
        {"n": 10**9},
        {"temperature": -1},
        {"temperature": 1e300},
        {"top_p": 0},
        {"top_k": -7},
        {"logprobs": 1000},
        {"logit_bias": {"99999999": 1}},
        {"stop": [""]},
        {"seed": 2**70},
        {"min_tokens": 100},
        {"priority": "high"},
        {"allowed_token_ids": []},
        {"structured_outputs": {"regex": "([a"}},
        {"response_format": {"type": "poem"}},
        {"prompt_embeds": "zzz"},
        {"typo_max_tokens": 5},
    ],
    ids=str,
)
def test_bad_completion(server, change):
    assert_refused(server.post("/v1/completions", COMPLETION | change), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hello"},
        {"max_tokens": -1},
        {"max_completion_tokens": 10**9},
        {"foo": 1},
        {"top_logprobs": 99, "logprobs": True},
        {"tool_choice": "required"},
        {"chat_template": "{{ 1/0 }}"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    ],
    ids=str,
)
def test_bad_chat(server, change):
    assert_refused(server.post("/v1/chat/completions", CHAT | change), 400)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": ""},
        {"prompt": 5},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "max_tokens": True},
        {"prompt": "a", "max_tokens": 10**6},
        {"prompt": "a", "temperature": 3},
        {"prompt": "a", "top_p": 0},
        {"prompt": "a", "priority": 2**40},
        {"prompt": "a", "stream": "yes"},
        {"prompt": "a", "model": MODEL},
        {"prompt": "hello " * 5000},
    ],
    ids=str,
)
def test_bad_generate(server, body):
    assert_refused(server.post("/generate", body), 400)


def test_unknown_model_route_and_content_type(server):
    assert_refused(server.post("/v1/completions", COMPLETION | {"model": "nope"}), 404)
    assert server.post("/v1/nope", {}).status_code == 404
    assert requests.get(server.url + "/generate", timeout=10).status_code in (404, 405)
    answer = requests.post(
        server.url + "/v1/completions", data="prompt=a", headers={"content-type": "text/plain"}, timeout=10
    )
    assert_refused(answer, 415)


def assert_refused(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["code"] == status


# ---- clients that leave, and too many of them ----


def test_client_leaves_in_mid_stream(server):
    cancelled = server.metric("inference_requests_total", outcome="cancelled")
    with server.post("/v1/completions", LONG | {"stream": True}, stream=True) as answer:
        lines = answer.iter_lines()  # kept: a dropped iterator closes the connection
        next(lines)
        assert server.metric("inference_active_requests") == 1
    wait_for(lambda: server.metric("inference_requests_total", outcome="cancelled") == cancelled + 1)


def test_client_leaves_before_the_answer(server):
    cancelled = server.metric("inference_requests_total", outcome="cancelled")
    body = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        connection.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(lambda: server.metric("inference_active_requests") == 1)
    wait_for(lambda: server.metric("inference_requests_total", outcome="cancelled") == cancelled + 1)


def test_client_leaves_in_mid_body(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        connection.sendall(b'content-length: 1000\r\n\r\n{"prompt": "a')
    assert server.metric("inference_active_requests") == 0


def test_full_queue_answers_429_and_serves_the_rest(server):
    """4 sequences run, 4 wait, the others are told to come back."""
    body = LONG | {"max_tokens": 150}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/completions", body), range(16)))
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 8
    for answer in refused:
        assert_refused(answer, 429)
        assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_one_request_can_fill_the_queue(server):
    """Places are counted in sequences: 8 prompts take all there are."""
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(server.post, "/v1/completions", LONG | {"prompt": ["a"] * 8, "max_tokens": 100})
        wait_for(lambda: server.metric("inference_active_requests") == 1)
        assert_refused(server.post("/v1/completions", COMPLETION), 429)
        assert len(batch.result().json()["choices"]) == 8


def test_priority_goes_first(server):
    """With all slots busy, a request of high priority (lower number) overtakes those that wait."""
    order, lock = [], threading.Lock()

    def ask(name, priority, tokens):
        server.post("/generate", {"prompt": "Count:", "max_tokens": tokens, "priority": priority})
        with lock:
            order.append(name)

    with ThreadPoolExecutor(8) as pool:
        for i in range(4):
            pool.submit(ask, f"running {i}", 0, 250)
        wait_for(lambda: server.metric("vllm:num_requests_running", model_name=MODEL) == 4)
        for i in range(3):
            pool.submit(ask, f"low {i}", 20, 250)
        wait_for(lambda: server.metric("inference_active_requests") == 7)
        pool.submit(ask, "high", -5, 1)
    waited = [name for name in order if not name.startswith("running")]
    assert waited[0] == "high", order


# ---- the life of the process: one server for key, loading and draining, one to kill ----


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A server that may be harmed, started beside the one of another test: starting one keeps one core busy."""
    server = Server(tmp_path_factory.mktemp("victim")).start()
    yield server
    server.stop()


def test_key_loading_and_drain(tmp_path, victim):
    server = Server(tmp_path, "--max-num-seqs", "4", "--drain-timeout", "60", env={"VLLM_API_KEY": "secret"})
    server.start()
    try:
        answers = {}
        wait_for(lambda: loading(server, answers), 60)
        assert (answers["/health"].status_code, answers["/ready"].status_code) == (200, 503)
        assert answers["/generate"].status_code == 503 and answers["/generate"].headers["retry-after"]

        server.wait_ready()
        request = {"prompt": "Once upon a time", "max_tokens": 300}
        key = {"authorization": "Bearer secret"}
        for path in ("/generate", "/v1/completions", "/invocations", "/tokenize"):
            assert_refused(server.post(path, request), 401)
            assert_refused(server.post(path, request, headers={"authorization": "Bearer wrong"}), 401)
        assert requests.get(server.url + "/v1/models", timeout=10).status_code == 401
        assert requests.get(server.url + "/metrics", timeout=10).status_code == 200

        with ThreadPoolExecutor(1) as pool:
            in_flight = pool.submit(server.post, "/generate", request, headers=key)
            wait_for(lambda: server.metric("inference_active_requests") == 1)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: requests.get(server.url + "/ready", timeout=10).status_code == 503)
            assert_refused(server.post("/generate", request, headers=key), 503)
            answer = in_flight.result()
        assert answer.status_code == 200 and answer.json()["completion_tokens"] > 0
        assert server.process.wait(60) == 0, server.tail()
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def loading(server, answers):
    try:
        for path in ("/health", "/ready"):
            answers[path] = requests.get(server.url + path, timeout=5)
        answers["/generate"] = server.post("/generate", {"prompt": "a"})
    except requests.ConnectionError:
        return False
    return True


def test_sigterm_while_loading_ends_everything(tmp_path):
    server = Server(tmp_path).start()
    try:
        wait_for(lambda: loading(server, {}), 60)
        wait_for(lambda: psutil.Process(server.process.pid).children(), 60)  # the engine is being started
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert server.stop(signal.SIGTERM) == 0, server.tail()
        assert psutil.wait_procs(family, timeout=30)[1] == []
    finally:
        server.stop()


def test_dead_engine_is_unhealthy_and_ends_the_server(victim):
    server = victim.wait_ready()
    parent = psutil.Process(server.process.pid)
    engines = [p for p in parent.children(recursive=True) if "EngineCore" in " ".join((p.name(), *p.cmdline()))]
    assert engines, [p.name() for p in parent.children(recursive=True)]
    engines[0].kill()

    def unhealthy():
        try:
            return requests.get(server.url + "/health", timeout=10).status_code == 503
        except requests.ConnectionError:
            return True

    wait_for(unhealthy)
    assert server.process.wait(60) == 1, server.tail()
    assert "\nerror: the engine died (its log is above)\n" in server.log.read_text()


def test_a_taken_port_is_one_line(server):
    second = Server(server.log.parent)
    second._command[second._command.index("--port") + 1] = str(server.port)
    second.start()
    assert second.process.wait(60) == 1
    assert second.log.read_text().splitlines() == [
        f"error: cannot listen on 127.0.0.1:{server.port}: Address already in use; choose another --port"
    ]

"""The gateway as a process, in front of servers that misbehave on purpose."""

import contextlib
import json
import threading

import psutil
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ch16.parts.load_balancer.gateways import (
    BODY,
    gateway_for,
    metric,
    post,
    raw,
    request_bytes,
    two_standins,
    wait_for,
)
from tests.upstream import END, STREAM_HEAD, Upstream, chunk, event, reply, says


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    with two_standins(tmp_path_factory.mktemp("standins"), "--step-ms", "2") as servers:
        yield servers


@pytest.fixture(scope="module")
def gateway(standins, tmp_path_factory):
    flags = ("--max-body-bytes", "10000", "--request-timeout", "1")
    with gateway_for(tmp_path_factory.mktemp("gateway"), *standins, flags=flags) as gateway:
        yield gateway


# ---- what passes ----


def test_answers_are_those_of_a_server(gateway, standins):
    for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
        for stream in (False, True):
            body = {**BODY, "stream": stream}
            direct = requests.post(standins[0].url + path, json=body, timeout=30)
            answer = post(gateway, path, body)
            assert (answer.status_code, answer.content) == (200, direct.content)
            assert answer.headers["content-type"] == direct.headers["content-type"]
            assert answer.headers["x-served-by"] in [server.address for server in standins]
    assert requests.get(gateway.url + "/v1/models", timeout=10).json()["data"][0]["id"] == "simulated"
    assert post(gateway, body={**BODY, "max_tokens": -1}).status_code == 400


def test_a_stream_is_not_held_back(tmp_path):
    """The server goes on only when the client has the first event."""
    seen = threading.Event()

    def script(request):
        request.connection.sendall(STREAM_HEAD + event(b"one"))
        assert seen.wait(20)
        request.connection.sendall(event(b"two") + END)

    with Upstream(script) as server, gateway_for(tmp_path, server) as gateway, post(gateway, stream=True) as answer:
        parts = answer.iter_content(None)
        first = next(parts)
        seen.set()
        assert first.count(b"data:") == 1 and b"one" in first
        assert b"".join(parts).endswith(b"data: [DONE]\n\n")


def test_headers(tmp_path):
    answer = reply(
        headers=(b"connection: x-secret", b"x-secret: 1", b"set-cookie: a=1", b"set-cookie: b=2", b"keep-alive: 5")
    )
    with Upstream(says(answer)) as server, gateway_for(tmp_path, server) as gateway:
        got = raw(
            gateway,
            b"POST /v1/completions?a=%2F&b HTTP/1.1\r\nhost: me\r\nconnection: close, x-mine\r\nx-mine: 1\r\n"
            b"te: trailers\r\n"
            b"x-forwarded-for: 10.0.0.1\r\nx-request-id: my-id-7\r\naccept: a\r\nauthorization: Bearer k\r\n"
            b"content-length: 2\r\n\r\n{}",
        ).decode()
        (request,) = server.requests
        assert request.head.startswith("POST /v1/completions?a=%2F&b HTTP/1.1\r\n") and request.body == b"{}"
        assert request.header("x-mine") is None and request.header("te") is None
        assert request.header("host") == server.address
        assert request.header("x-forwarded-for") == "10.0.0.1, 127.0.0.1"
        assert request.header("x-request-id") == "my-id-7" and request.header("accept") == "a"
        assert request.header("authorization") == "Bearer k" and request.header("user-agent") is None
        head = got.split("\r\n\r\n")[0].lower()
        assert "x-secret" not in head and "keep-alive" not in head and head.count("set-cookie: ") == 2
        assert "x-request-id: my-id-7" in head and head.count("content-length") == 1

        raw(gateway, b"GET /v1/models HTTP/1.1\r\nconnection: close\r\nhost: x\r\nx-request-id: a b\r\n\r\n")
        made = server.requests[1].header("x-request-id")
        assert made and made != "a b"


def test_keys_of_both_sides(tmp_path):
    env = {"GATEWAY_API_KEY": "outer", "VLLM_API_KEY": "inner"}
    with Upstream(says(reply())) as server, gateway_for(tmp_path, server, env=env) as gateway:
        for headers in ({}, {"authorization": "Bearer inner"}, {"authorization": "outer"}):
            answer = post(gateway, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "AuthenticationError"
        assert server.requests == []
        assert post(gateway, headers={"authorization": "Bearer outer"}).status_code == 200
        assert server.requests[0].header("authorization") == "Bearer inner"
        for path in ("/health", "/ready", "/metrics"):
            assert requests.get(gateway.url + path, timeout=10).status_code == 200


@pytest.mark.parametrize("path", ["/", "/sleep", "/v1", "/v1/../sleep", "/v1/%2e%2e/sleep", "/metrics/x"])
def test_only_inference_is_passed_on(gateway, path):
    got = raw(gateway, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert got.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(("path", "status"), [("/v1/responses", b"200 OK"), ("/v1/completions", b"400 Bad Request")])
def test_a_stream_without_one_whole_event_passes_as_it_is(tmp_path, path, status):
    said = STREAM_HEAD.replace(b"200 OK", status) + chunk(b"data: half") + b"0\r\n\r\n"
    with Upstream(says(said)) as server, gateway_for(tmp_path, server) as gateway:
        answer = post(gateway, path)
        assert (answer.status_code, answer.content) == (int(status[:3]), b"data: half")
        assert answer.headers["content-type"] == "text/event-stream"
        assert metric(gateway, 'gateway_requests_total{outcome="ok"}') == 1


# ---- what fails before the client has seen a byte ----

FAILURES = {
    "hangs up": b"",
    "hangs up after the headers": STREAM_HEAD,
    "hangs up within the headers": b"HTTP/1.1 200 OK\r\ncontent-",
    "speaks no HTTP": b"220 smtp ready\r\n\r\n",
    "is draining": reply(b'{"error": 1}', b"503 Service Unavailable"),
    "is full": reply(b'{"error": 1}', b"429 Too Many Requests"),
    "ends a stream without a word": STREAM_HEAD + b"0\r\n\r\n",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_another_server_is_tried(tmp_path, failure):
    good = STREAM_HEAD + event(b"one") + END
    with Upstream(says(FAILURES[failure])) as bad, Upstream(says(good)) as well:  # noqa: SIM117
        with gateway_for(tmp_path, bad, well) as gateway:
            answers = [post(gateway, body={**BODY, "stream": True}) for _ in range(4)]
            assert {answer.status_code for answer in answers} == {200}
            assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
            assert len(bad.requests) == metric(gateway, "gateway_retries_total") > 0
            assert answers[0].headers["x-retries"] == "1"
            assert len(well.requests) == 4 == metric(gateway, 'gateway_requests_total{outcome="ok"}')
            assert metric(gateway, "gateway_first_byte_seconds_count") == 4  # a refusal is no answer


def test_if_all_fail_the_client_hears_it(tmp_path):
    full = reply(b'{"error": "full"}', b"429 Too Many Requests", [b"retry-after: 7"])
    with Upstream(says(full)) as server, gateway_for(tmp_path, server) as gateway:
        answer = post(gateway)
        assert (answer.status_code, answer.text, answer.headers["retry-after"]) == (429, '{"error": "full"}', "7")
        server.script = says(b"")
        answer = post(gateway)
        assert answer.status_code == 502 and "closed the connection" in answer.json()["error"]["message"]
        server.ready = False
        wait_for(lambda: requests.get(gateway.url + "/ready", timeout=10).status_code == 503)
        answer = post(gateway)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert len(server.requests) == 2


def test_a_request_that_kills_servers_does_not_kill_all(tmp_path):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Upstream(says(b""))) for _ in range(4)]
        gateway = stack.enter_context(gateway_for(tmp_path, *servers, flags=("--retries", "1")))
        assert post(gateway).status_code == 502
        assert sum(len(server.requests) for server in servers) == 2


def test_an_answer_that_has_begun_is_not_asked_for_again(tmp_path):
    half = reply(b"x" * 1000)[:-500]
    with Upstream(says(half)) as first, Upstream(says(half)) as second, gateway_for(tmp_path, first, second) as gateway:
        answer = post(gateway)
        assert answer.status_code == 502 and "broke off" in answer.json()["error"]["message"]
        assert len(first.requests) + len(second.requests) == 1


def test_slow_is_not_dead(tmp_path):
    """A server that only takes its time is not asked a second time, nor is another one."""
    done = threading.Event()
    with Upstream(lambda _: done.wait(20)) as first, Upstream(lambda _: done.wait(20)) as second:  # noqa: SIM117
        with gateway_for(tmp_path, first, second, flags=("--first-byte-timeout", "0.3")) as gateway:
            answer = post(gateway)
            done.set()
            assert answer.status_code == 504 and len(first.requests) + len(second.requests) == 1


def test_server_errors_pass_and_open_the_breaker(tmp_path):
    broken = reply(b'{"error": "engine"}', b"500 Internal Server Error")
    with Upstream(says(broken)) as server, gateway_for(tmp_path, server) as gateway:
        answers = [post(gateway).status_code for _ in range(5)]
        assert answers == [500, 500, 500, 503, 503] and len(server.requests) == 3
        assert metric(gateway, "gateway_breaker_open") == 1
        server.script = says(reply())
        wait_for(lambda: post(gateway).status_code == 200)  # after the cooldown one request finds out
        assert [post(gateway).status_code for _ in range(3)] == [200, 200, 200]


# ---- what breaks in the middle ----

BREAKS = {
    "hangs up": event(b"one") + event(b"two"),
    "hangs up within an event": event(b"one") + event(b"two") + chunk(b'data: {"half'),
    "hangs up within a chunk": event(b"one") + event(b"two") + event(b"three")[:-9],
    "ends without [DONE]": event(b"one") + event(b"two") + b"0\r\n\r\n",
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_stream_that_breaks_is_no_normal_end(tmp_path, how):
    with Upstream(says(STREAM_HEAD + BREAKS[how])) as server, gateway_for(tmp_path, server) as gateway:
        got = raw(gateway, request_bytes({**BODY, "stream": True}))
        assert got.startswith(b"HTTP/1.1 200 ") and b"one" in got and b"two" in got
        last = got.rpartition(b"event: error\ndata: ")[2].split(b"\n\n")[0]
        assert json.loads(last)["error"]["code"] == 502
        assert b'{"half' not in got and not got.endswith(b"0\r\n\r\n") and b"[DONE]" not in got
        assert len(server.requests) == 1  # not asked for again
        assert metric(gateway, 'gateway_requests_total{outcome="truncated"}') == 1
        for _ in range(2):
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                post(gateway, body={**BODY, "stream": True})
        assert metric(gateway, "gateway_breaker_open") == 1  # although every stream began well


def test_a_silent_stream_is_cut(tmp_path):
    done = threading.Event()

    def script(request):
        request.connection.sendall(STREAM_HEAD + event(b"one"))
        done.wait(20)

    with Upstream(script) as server, gateway_for(tmp_path, server, flags=("--idle-timeout", "0.3")) as gateway:
        got = raw(gateway, request_bytes({**BODY, "stream": True}))
        done.set()
        assert b"event: error" in got and b"silent for too long" in got


def test_an_error_event_of_the_server_passes_and_counts(tmp_path):
    said = STREAM_HEAD + event(b"one") + chunk(b'data: {"error": {"message": "engine"}}\n\n') + END
    with Upstream(says(said)) as server, gateway_for(tmp_path, server) as gateway:
        answers = [post(gateway, body={**BODY, "stream": True}) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 503]
        assert '{"error": {"message": "engine"}}' in answers[0].text


def test_the_openai_client_raises_on_a_broken_stream(tmp_path):
    import openai

    with Upstream(says(STREAM_HEAD + event(b"one"))) as server, gateway_for(tmp_path, server) as gateway:
        client = openai.OpenAI(base_url=gateway.url + "/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.completions.create(model="m", prompt="a", stream=True))


# ---- clients ----


def test_a_client_that_leaves_stops_the_work(tmp_path):
    gone = threading.Event()

    def script(request):
        request.connection.sendall(STREAM_HEAD + event(b"one"))
        with contextlib.suppress(ConnectionError):
            while request.connection.recv(1):
                pass
        gone.set()

    with Upstream(script) as server, gateway_for(tmp_path, server) as gateway:
        with post(gateway, body={**BODY, "stream": True}, stream=True) as answer:
            next(answer.iter_content(None))
        assert gone.wait(20)
        wait_for(lambda: metric(gateway, "gateway_in_flight") == 0)
        assert metric(gateway, 'gateway_requests_total{outcome="cancelled"}') == 1
        assert metric(gateway, "gateway_breaker_open") == 0
        server.script = lambda request: gone.wait(20)  # leaves before anything came
        gone.clear()
        raw(gateway, request_bytes(), hang_up=True)
        wait_for(lambda: metric(gateway, 'gateway_requests_total{outcome="cancelled"}') == 2)
        gone.set()


def test_sizes(gateway):
    answer = post(gateway, body={**BODY, "prompt": "x" * 20_000})
    assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]["message"]
    chunked = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + 3 * chunk(b"x" * 5000)
    assert raw(gateway, chunked).startswith(b"HTTP/1.1 413 ")
    headers = b"".join(b"x-%d: %b\r\n" % (i, b"y" * 1000) for i in range(400))
    got = raw(gateway, b"GET /health HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n")
    assert got.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))


def test_slow_clients_do_not_stay(gateway):
    assert raw(gateway, b"") == b""  # a connection that says nothing is closed
    assert raw(gateway, b"POST /generate HTTP/1.1\r\nhost: x\r\n") == b""
    got = raw(gateway, b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n{}")
    assert got.startswith(b"HTTP/1.1 408 ")


def test_pipelined_requests_are_answered_in_order(gateway):
    requests_ = [request_bytes({**BODY, "max_tokens": n}, close=n == 3) for n in (7, 1, 3)]
    got = raw(gateway, b"".join(requests_)).decode()
    texts = [part.split('"')[0] for part in got.split('"text": "')[1:]]
    assert texts == [" 1 2 3 4 5 6 7", " 1", " 1 2 3"]


MALFORMED = [
    b"\x00\x01\x02\xff\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET http:// HTTP/1.1\r\n\r\n",
    b"GET //[ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: \xff\xfe\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
    b"POST /generate HTTP/1.1\r\nhost: x\r\nauthorization: \xff\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
    b"GET /v1/%ff%fe%00 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /v1/\xff HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\na : b\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_requests_get_an_answer_or_a_closed_door(gateway, data):
    got = raw(gateway, data)
    assert got == b"" or (got.startswith(b"HTTP/1.") and b" 500 " not in got.split(b"\r\n")[0])
    assert requests.get(gateway.url + "/health", timeout=10).status_code == 200


@settings(max_examples=60)
@given(st.binary(max_size=300), st.booleans(), st.integers(0, 200))
def test_random_bytes_harm_nothing(gateway, data, http, cut):
    raw(gateway, (request_bytes(path="/generate")[:cut] if http else b"") + data, hang_up=True)
    assert requests.get(gateway.url + "/health", timeout=10).status_code == 200
    assert gateway.process.poll() is None


@pytest.mark.slow
def test_memory_is_flat_and_nothing_leaks(gateway):
    """10,000 requests, of which a fifth leave early or are refused."""
    process = psutil.Process(gateway.process.pid)

    def some(count):
        with requests.Session() as session:
            for number in range(count):
                if number % 10 == 0:
                    raw(gateway, request_bytes({**BODY, "stream": True, "max_tokens": 50}), hang_up=True)
                elif number % 10 == 1:
                    session.get(gateway.url + "/nothing", timeout=20)
                else:
                    body = {**BODY, "max_tokens": 1, "stream": number % 2 == 0}
                    assert session.post(gateway.url + "/generate", json=body, timeout=20).status_code == 200

    def round_(count):
        threads = [threading.Thread(target=some, args=(count // 8,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: metric(gateway, "gateway_in_flight") == 0)
        return process.memory_info().rss

    before = round_(2_000)
    files = process.num_fds()
    after = round_(10_000)
    assert after - before < 8 << 20
    assert process.num_fds() < files + 50


@pytest.mark.slow
def test_in_front_of_the_real_server(server, tmp_path):
    """vLLM answers the same through the gateway, whole and streamed."""
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0.0}
    with gateway_for(tmp_path, server) as gateway:
        direct = server.post("/generate", body).json()
        assert post(gateway, "/generate", body).json()["text"] == direct["text"]
        events = post(gateway, "/generate", {**body, "stream": True}).text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert "".join(json.loads(e.removeprefix("data: "))["text"] for e in events[:-2]) == direct["text"]

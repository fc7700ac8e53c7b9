"""The layer around vLLM's server, with a stand-in for the server: fast, and every path is reached."""

import asyncio
import json
import types

import pytest
from prometheus_client import CollectorRegistry

from ch16.parts.inference_serving import layer as layer_module
from ch16.parts.inference_serving.layer import ServerSettings, ServingLayer
from common.metrics import OUTCOMES, InferenceMetrics

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class StandIn:
    """Plays vLLM: answers after `gate` opens; `script` says how."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.status = 200
        self.body = json.dumps({"choices": [{"text": "t", "finish_reason": "stop"}], "usage": USAGE})
        self.raises = None
        self.seen = []

    async def __call__(self, scope, receive, send):
        request = await receive()
        self.seen.append((scope["path"], request["body"]))
        waiting = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(receive())]
        done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if self.raises:
            raise self.raises
        if waiting[0] not in done:
            return  # the client left first
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.body.encode()})


@pytest.fixture
def engine():
    return StandIn()


@pytest.fixture
def layer(engine, monkeypatch):
    registry = CollectorRegistry()
    monkeypatch.setattr(layer_module, "InferenceMetrics", lambda: InferenceMetrics(registry))
    layer = ServingLayer(engine)
    layer.registry = registry
    layer._settings = ServerSettings(max_queue=1, max_body_bytes=1000)
    layer._server = types.SimpleNamespace(should_exit=False)
    layer._engine = types.SimpleNamespace(errored=False)
    layer._model_name, layer._context, layer._max_num_seqs, layer._max_prompt_chars = "m", 100, 2, 500
    layer._key_digests = []
    layer._fields = {"/v1/completions": frozenset({"model", "prompt", "max_tokens", "n"})}
    return layer


def outcomes(layer):
    """The counts that are not zero."""
    values = {o: layer.registry.get_sample_value("inference_requests_total", {"outcome": o}) for o in OUTCOMES}
    return {outcome: value for outcome, value in values.items() if value}


class Client:
    """One request through the layer; `leave()` is a client that hangs up."""

    def __init__(self, layer, path="/v1/completions", body=b'{"prompt": "a"}', method="POST", chunks=None, **headers):
        names = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in names.items()],
        }
        self.layer, self.sent, self.left = layer, [], asyncio.Event()
        pieces = chunks if chunks is not None else [body]
        self.incoming = [
            {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)} for i, piece in enumerate(pieces)
        ]

    async def receive(self):
        if self.incoming:
            return self.incoming.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    def leave(self):
        self.left.set()

    async def run(self):
        await self.layer(self.scope, self.receive, self.send)
        return self

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def json(self):
        return json.loads(b"".join(m.get("body", b"") for m in self.sent))

    @property
    def headers(self):
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}


def run(coroutine):
    return asyncio.run(coroutine)


def test_ok_and_generate(layer, engine):
    assert run(Client(layer).run()).status == 200
    answer = run(Client(layer, "/generate", b'{"prompt": "a", "max_tokens": 2}').run())
    assert answer.json == {"text": "t", "prompt_tokens": 3, "completion_tokens": 2, "finish_reason": "stop"}
    assert answer.headers["content-length"] == str(len(json.dumps(answer.json)))
    path, body = engine.seen[-1]
    assert path == "/v1/completions" and json.loads(body)["model"] == "m"
    assert outcomes(layer) == {"ok": 2}
    assert layer.registry.get_sample_value("inference_latency_seconds_count") == 2


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ({"body": b"{"}, 400),
        ({"content_type": "text/plain"}, 415),
        ({"body": b'{"prompt": "a", "promt": 1}'}, 400),
        ({"body": b"x" * 1001}, 413),
        ({"chunks": [b"x" * 600, b"x" * 600]}, 413),
        ({"content_length": "99999"}, 413),
        ({"body": b'{"prompt": "a", "max_tokens": 101}'}, 400),
        ({"body": b'{"prompt": "a", "n": 4}'}, 400),
        ({"body": b'{"prompt": "' + b"x" * 501 + b'"}'}, 400),
        ({"body": b'{"prompt": "a", "temperature": 1e400}'}, 400),
        ({"path": "/generate", "body": b'{"max_tokens": 1}'}, 400),
    ],
)
def test_invalid_requests_never_reach_the_engine(layer, engine, client, status):
    answer = run(Client(layer, **client).run())
    assert answer.status == status and answer.json["error"]["code"] == status
    assert not engine.seen and outcomes(layer) == {"invalid": 1}
    assert layer.registry.get_sample_value("inference_latency_seconds_count") == 0
    assert layer.registry.get_sample_value("inference_active_requests") == 0


@pytest.mark.parametrize(("status", "outcome"), [(500, "error"), (404, "invalid"), (429, "rejected"), (200, "ok")])
def test_outcomes_follow_the_engines_answer(layer, engine, status, outcome):
    engine.status = status
    run(Client(layer).run())
    assert outcomes(layer) == {outcome: 1}


def test_an_error_in_mid_stream_is_an_error(layer, engine):
    engine.body = 'data: {"error": {"message": "gone"}}\n\n'
    run(Client(layer).run())
    assert outcomes(layer) == {"error": 1}


def test_a_crash_in_the_server_leaks_nothing(layer, engine):
    engine.raises = RuntimeError("crash")
    with pytest.raises(RuntimeError):
        run(Client(layer).run())
    assert outcomes(layer) == {"error": 1} and layer._in_flight == 0
    assert layer.registry.get_sample_value("inference_active_requests") == 0


def test_the_queue_is_bounded(layer, engine):
    """2 run, 1 waits, the fourth is refused; when one is answered there is room again."""

    async def scenario():
        engine.gate.clear()
        clients = [Client(layer) for _ in range(4)]
        tasks = [asyncio.ensure_future(client.run()) for client in clients]
        await asyncio.sleep(0.05)
        assert [client.status for client in clients] == [None, None, None, 429]
        assert 1 <= int(clients[3].headers["retry-after"]) <= 60
        assert layer.registry.get_sample_value("inference_active_requests") == 3
        engine.gate.set()
        await asyncio.gather(*tasks)
        assert (await Client(layer).run()).status == 200

    run(scenario())
    assert outcomes(layer) == {"ok": 4, "rejected": 1} and layer._in_flight == 0


def test_a_full_queue_refuses_before_it_reads(layer, engine):
    layer._in_flight = 3
    client = Client(layer, chunks=[])  # its body never comes
    assert run(client.run()).status == 429


@pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions/batch", "/v1/something/new"])
def test_other_inference_routes_take_their_places_too(layer, engine, path):
    assert run(Client(layer, path, b'{"prompt": ["a", "b", "c", "d"]}').run()).status == 400
    assert run(Client(layer, path, b'{"prompt": ["a", "b"], "anything": 1}').run()).status == 200


@pytest.mark.parametrize("path", ["/ping", "/v1/responses/abc/cancel", "/tokenize"])
def test_control_takes_no_place(layer, engine, path):
    layer._in_flight = 3
    assert run(Client(layer, path).run()).status == 200
    assert outcomes(layer) == {}


def test_a_dead_engine_is_not_ready(layer):
    layer._engine.errored = True
    assert run(Client(layer, "/ready", method="GET").run()).status == 503


def test_a_client_that_leaves_frees_its_place(layer, engine):
    async def scenario():
        engine.gate.clear()
        client = Client(layer)
        task = asyncio.ensure_future(client.run())
        await asyncio.sleep(0.05)
        client.leave()
        await task

    run(scenario())
    assert outcomes(layer) == {"cancelled": 1} and layer._in_flight == 0


def test_a_client_that_leaves_in_mid_body(layer, engine):
    client = Client(layer, chunks=[])
    client.leave()
    run(client.run())
    assert not client.sent and not engine.seen and outcomes(layer) == {"cancelled": 1}


def test_a_client_too_slow_with_its_body(layer, engine, monkeypatch):
    monkeypatch.setattr(layer_module, "BODY_TIMEOUT_S", 0.05)
    assert run(Client(layer, chunks=[]).run()).status == 408
    assert not engine.seen


def test_drain_waits_for_what_is_in_flight(layer, engine):
    async def scenario():
        engine.gate.clear()
        inside = asyncio.ensure_future(Client(layer).run())
        await asyncio.sleep(0.05)
        assert layer.registry.get_sample_value("inference_draining") == 0
        layer._stop(60.0)
        await asyncio.sleep(0.05)
        assert not layer._server.should_exit and layer.registry.get_sample_value("inference_draining") == 1
        assert (await Client(layer).run()).status == 503
        ready = await Client(layer, "/ready", method="GET").run()
        assert (ready.status, ready.json) == (503, {"status": "draining"})
        engine.gate.set()
        assert (await inside).status == 200
        await asyncio.sleep(0.05)
        assert layer._server.should_exit and layer._settings.stopped_by_signal

    run(scenario())
    assert outcomes(layer) == {"ok": 1, "rejected": 1}


@pytest.mark.parametrize("end", ["timeout", "second signal"])
def test_drain_ends_without_the_last_answer(layer, engine, end):
    async def scenario():
        engine.gate.clear()
        inside = asyncio.ensure_future(Client(layer).run())
        await asyncio.sleep(0.05)
        layer._stop(0.1 if end == "timeout" else 60.0)
        if end == "second signal":
            layer._stop(60.0)
        await asyncio.sleep(0.2)
        assert layer._server.should_exit
        inside.cancel()

    run(scenario())


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/completions", None, 401),
        ("/v1/completions", "Bearer no", 401),
        ("/v1/completions", "Basic yes", 401),
        ("/v1/completions", "Bearer yes", 200),
        ("/generate", None, 401),
        ("/invocations", None, 401),
        ("/tokenize", None, 401),
        ("/start_profile", None, 401),
        ("/ready", None, 200),
        ("/metrics", None, 200),
    ],
)
def test_api_key(layer, path, key, status):
    layer._key_digests = [layer_module.hashlib.sha256(b"yes").digest()]
    method = "GET" if path in layer_module.OPEN_PATHS else "POST"
    headers = {"authorization": key} if key else {}
    client = Client(layer, path, method=method, **headers)
    if path == "/metrics":
        client.leave()
        client.incoming = [{"type": "http.request", "body": b""}]
    assert run(client.run()).status == status

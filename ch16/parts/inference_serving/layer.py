"""The ASGI middleware around vLLM's OpenAI-compatible server.

vLLM accepts middleware by import path (`--middleware`). This one adds what a production server needs and
vLLM's does not have, and touches the engine nowhere:

    POST /generate     a short spelling of /v1/completions
    GET  /ready        takes traffic? 503 while draining (and while loading, see process.py)
    /metrics           the chapter's inference_* metrics beside vLLM's own
    429, 413, 400      a bound on queued work, on body and prompt size; unknown fields are refused
    SIGTERM            no new requests, those in flight finish, exit 0

A request goes: API key? -> draining? queue full? -> body -> JSON and limits -> still not draining, and a place in the
queue for each of its sequences? -> vLLM.
"""

import asyncio
import hashlib
import json
import math
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from prometheus_client import REGISTRY
from pydantic import ValidationError

from ch16.parts.inference_serving import bodies
from ch16.parts.inference_serving.asgi import Message, Receive, Scope, Send, header, redirect, replay, send_json
from ch16.parts.inference_serving.bodies import GenerateEvents, GenerateRequest, Refused
from common.metrics import InferenceMetrics, Rate

OPEN_PATHS = {"/health", "/ready", "/ping", "/version", "/metrics"}  # probes and scrapers carry no key
# Every other POST is inference work: a route added by a new vLLM is bounded and counted as well.
MANAGEMENT = (
    *("/tokenize", "/detokenize", "/count_tokens", "/start_profile", "/stop_profile", "/cancel", "/abort_requests"),
    *("/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/render", "_lora_adapter"),
)
BODY_TIMEOUT_S = 30.0


@dataclass
class ServerSettings:
    """What `--serve` was told about its limits; vLLM carries it to the layer as `args.chapter`."""

    max_queue: int = 256  # sequences that may wait beyond those the engine decodes together
    max_body_bytes: int = 4 << 20
    max_prompt_chars: int = 0  # 0: 32 characters for each token of the context
    drain_timeout_s: float = 30.0
    on_ready: Callable[[], None] = lambda: None
    stopped_by_signal: bool = field(default=False, init=False)  # set on SIGTERM or SIGINT: exit 0


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class ServingLayer:
    """ASGI middleware; one instance serves all requests of the process."""

    def __init__(self, app: Callable) -> None:
        self._app = app
        self._metrics = InferenceMetrics()
        self._in_flight = 0  # sequences, not requests
        self._finished = Rate()
        self._finished_count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection: the process's lifespan, or an HTTP request."""
        if scope["type"] == "lifespan":
            return await self._lifespan(scope, receive, send)
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return await self._app(scope, receive, send)
        path = scope["path"]
        try:
            if path == "/ready":
                return await self._ready(send)
            if path not in OPEN_PATHS:
                self._authenticate(scope)
            if scope["method"] != "POST":
                return await self._app(scope, receive, send)
            if path in OPEN_PATHS or path.endswith(MANAGEMENT):
                body = await self._read_body(scope, receive)
                return await self._app(scope, replay(body, receive), send)
        except ClientGone:
            return None
        except Refused as refusal:
            return await send_error(send, refusal)
        return await self._infer(scope, receive, send)

    # ---- one inference request ----

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.request(accepted=False) as request:
            try:
                scope, body, answer, places = await self._accept(scope, receive, send)
                request.accept()
                request.outcome = await self._forward(scope, replay(body, receive), answer, places)
            except ClientGone:
                request.outcome = "cancelled"
            except Refused as refusal:
                request.outcome = "rejected" if refusal.status in (429, 503) else "invalid"
                await send_error(send, refusal)

    async def _accept(self, scope: Scope, receive: Receive, send: Send) -> tuple[Scope, bytes, Send, int]:
        """Read, check and admit a request. Returns what goes on to vLLM, and the places it takes.

        Raises:
            Refused: with the answer.
            ClientGone: nobody waits for one.
        """
        self._admit(1)  # at once, before an overloaded server reads and parses what it will refuse
        body, places = await self._read_body(scope, receive), 1
        known = scope["path"] in self._fields or scope["path"] == "/generate"
        if known or "json" in header(scope, b"content-type"):  # audio comes in other types
            scope, body, send, places = self._check(scope, body, send)
        self._admit(places)
        return scope, body, send, places

    async def _forward(self, scope: Scope, receive: Receive, send: Send, places: int) -> str:
        """Let vLLM answer, and return what became of it (see common.metrics.OUTCOMES)."""
        status, failed, finished, gone = 0, False, False, False

        async def watched_send(message: Message) -> None:
            nonlocal status, failed, finished
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                failed |= message.get("body", b"").startswith(b'data: {"error"')
                finished = not message.get("more_body", False)
            await send(message)

        async def watched_receive() -> Message:
            nonlocal gone
            message = await receive()
            gone |= message["type"] == "http.disconnect" and not finished
            return message

        self._in_flight += places
        self._idle.clear()
        try:
            await self._app(scope, watched_receive, watched_send)
        finally:
            self._in_flight -= places
            self._finished_count += places
            if self._in_flight == 0:
                self._idle.set()
        if gone or not finished:
            return "cancelled"
        if status >= 500 or failed:
            return "rejected" if status == 503 else "error"
        if status >= 400:
            return "rejected" if status == 429 else "invalid"
        return "ok"

    def _check(self, scope: Scope, body: bytes, send: Send) -> tuple[Scope, bytes, Send, int]:
        """Parse and limit a JSON request; rewrite /generate. Returns what goes on to vLLM, and its places."""
        content_type = header(scope, b"content-type").split(";")[0].strip().lower()
        if content_type != "application/json":
            raise Refused(415, f"content-type must be application/json, not {content_type or 'missing'}")
        content = bodies.parse_body(body)
        if scope["path"] == "/generate":
            try:
                request = GenerateRequest.model_validate(content)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                where = ".".join(str(part) for part in problem["loc"])
                raise Refused(400, f"{where}: {problem['msg']}") from None
            content = request.as_completion(self._model_name)
            body = json.dumps(content).encode()
            send = translate(send, request.stream)
            scope = redirect(scope, "/v1/completions", len(body))
        elif unknown := sorted(content.keys() - self._fields.get(scope["path"], content.keys())):
            raise Refused(400, f"unknown field{'s' * (len(unknown) > 1)}: {', '.join(unknown)[:200]}")

        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            value = content.get(name)
            if isinstance(value, int) and value > self._context:
                raise Refused(400, f"{name} is {value}, the context has {self._context} tokens")
        if (length := bodies.prompt_chars(content)) > self._max_prompt_chars:
            raise Refused(400, f"the prompt has {length} characters, at most {self._max_prompt_chars} are taken")
        return scope, body, send, bodies.sequences(content)

    def _admit(self, places: int) -> None:
        """Refuse what comes during the drain, or would wait in a queue that is full already.

        Nothing is awaited between this check and the count in `_forward`, so the bound holds exactly.
        """
        if self._draining:
            raise Refused(503, "the server is draining", {"retry-after": "1", "connection": "close"})
        bound = self._max_num_seqs + self._settings.max_queue
        if places > bound:
            raise Refused(400, f"the request asks for {places} sequences, at most {bound} are taken at once")
        if self._in_flight + places > bound:
            rate = self._finished.update(time.monotonic(), self._finished_count)
            wait = math.ceil(min(60, max(1, (self._in_flight + places - bound) / rate if rate else 1)))
            raise Refused(429, f"the queue is full ({bound} sequences); try again later", {"retry-after": str(wait)})

    def _authenticate(self, scope: Scope) -> None:
        if not self._key_digests:
            return
        scheme, _, key = header(scope, b"authorization").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._key_digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Refused(401, "a valid API key is needed", {"www-authenticate": "Bearer"})

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        too_large = Refused(413, f"the body has more than {limit} bytes", {"connection": "close"})
        if (declared := header(scope, b"content-length")).isdigit() and int(declared) > limit:
            raise too_large
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refused(408, f"no complete body within {BODY_TIMEOUT_S:.0f} s", {"connection": "close"}) from None
        return b"".join(chunks)

    async def _ready(self, send: Send) -> None:
        state = "draining" if self._draining else "dead" if self._engine.errored else "ready"
        await send_json(send, 200 if state == "ready" else 503, {"status": state})

    # ---- the life of the process ----

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched_send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._start(scope["app"].state)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            for task in self._tasks:
                task.cancel()

    def _start(self, state: object) -> None:
        """The engine is loaded and the first request is about to come."""
        args, config = state.args, state.vllm_config
        self._settings: ServerSettings = args.chapter
        self._server = state.server
        self._engine = state.engine_client
        self._model_name = args.served_model_name[0]
        self._context = config.model_config.max_model_len
        self._max_num_seqs = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        self._max_prompt_chars = self._settings.max_prompt_chars or 32 * self._context
        keys = args.api_key or [os.environ.get("VLLM_API_KEY", "")]
        self._key_digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]
        self._fields = bodies.known_fields()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, self._settings.drain_timeout_s)
        loop.add_signal_handler(signal.SIGINT, self._stop, 0.0)
        self._spawn(self._watch_throughput())
        self._settings.on_ready()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self, timeout_s: float) -> None:
        if self._draining:  # a second signal: now
            self._server.should_exit = True
            return
        self._draining = self._settings.stopped_by_signal = True
        self._metrics.draining.set(1)
        self._spawn(self._drain(timeout_s))

    async def _drain(self, timeout_s: float) -> None:
        """Wait until the last accepted request is answered, then let uvicorn stop."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass  # uvicorn cancels what is left, and vLLM then frees its KV blocks
        self._server.should_exit = True

    async def _watch_throughput(self) -> None:
        counter = REGISTRY.restricted_registry(["vllm:generation_tokens_total"])
        rate = Rate()
        while True:
            tokens = sum(
                sample.value
                for metric in counter.collect()
                for sample in metric.samples
                if sample.name == "vllm:generation_tokens_total"
            )
            now = time.monotonic()
            self._metrics.throughput.set(rate.update(now, tokens))
            self._finished.update(now, self._finished_count)
            await asyncio.sleep(1.0)


def translate(send: Send, stream: bool) -> Send:
    """A `send` that turns an answer of /v1/completions into one of /generate; errors pass unchanged."""
    start: Message = {}
    body = bytearray()
    events = GenerateEvents()

    async def rewrite(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            if stream and message["status"] == 200:
                await send(message)
        elif stream and start["status"] == 200:
            await send({**message, "body": events.feed(message.get("body", b""))})
        else:
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                content = bytes(body)
                if start["status"] == 200:
                    content = json.dumps(bodies.generate_answer(json.loads(content))).encode()
                headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
                headers.append((b"content-length", str(len(content)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": content})

    return rewrite


async def send_error(send: Send, refusal: Refused) -> None:
    """An error in the OpenAI API's form, as vLLM sends its own."""
    kind = {401: "AuthenticationError", 429: "RateLimitError", 503: "ServiceUnavailableError"}
    error = {"message": str(refusal), "type": kind.get(refusal.status, "BadRequestError"), "code": refusal.status}
    await send_json(send, refusal.status, {"error": error | {"param": None}}, refusal.headers)

"""The gateway: an HTTP proxy around a balancer, for answers that are streamed for a minute.

A request goes: API key? -> body -> a server -> the first bytes of its answer -> the rest of it.

Until the first bytes of an answer arrive, the client gets nothing, not even headers: another server can be tried
unnoticed. After that a retry is impossible: if the stream breaks, the client gets an error event, and a connection that
ends without the end of a stream.
"""

import asyncio
import contextlib
import gc
import hashlib
import json
import logging
import re
import secrets
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from ch16.parts.load_balancer.breaker import Lease, NoServer
from ch16.parts.load_balancer.dashboard import PAGE, PAGE_HEADERS, Dashboard
from ch16.parts.load_balancer.wire import ENDS_WITH_DONE, PatientServer, WholeEvents, end_to_end, prefix_of
from common.metrics import GatewayMetrics

logger = logging.getLogger("gateway")

TRY_ANOTHER = (429, 503)  # this server cannot take the request now; another one may
MAX_WHOLE_BYTES = 8 << 20  # answers up to this size are read whole before they are passed on: none breaks off halfway
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
REASONS = (
    (aiohttp.ConnectionTimeoutError, "the server cannot be connected to"),
    (aiohttp.ClientConnectorError, "the server cannot be connected to"),
    (aiohttp.ClientPayloadError, "the server's answer broke off"),
    (aiohttp.ClientResponseError, "the server's answer is not HTTP"),
    (TimeoutError, "the server was silent for too long"),
    (Exception, "the server closed the connection"),
)
OWN_HEADERS = ("host", "content-length", "expect", "x-request-id", "x-forwarded-for")


@dataclass(frozen=True)
class GatewayLimits:
    """The gateway's timeouts in seconds, and its bounds."""

    connect_s: float = 1.0
    first_byte_s: float = 120.0  # the server's queue included; a server that is down is noticed sooner
    idle_s: float = 30.0  # between two parts of an answer; also for a client that does not read
    request_s: float = 30.0  # for a client to send its request
    check_s: float = 0.25  # between two checks of /ready
    check_timeout_s: float = 1.0
    find_s: float = 2.0  # between two look-ups of the servers
    drain_s: float = 30.0
    retries: int = 2  # a request that kills its server must not kill all of them
    max_body_bytes: int = 4 << 20


class Balancer(Protocol):
    """What the gateway asks of a balancer; `LoadBalancer` of the script is one, with a docstring for each method."""

    servers: tuple[str, ...]
    policy: str

    def take(self, prefix: str, exclude: Collection[str]) -> Lease: ...  # noqa: D102
    def give_back(self, lease: Lease, ok: bool | None) -> None: ...  # noqa: D102
    def add(self, server: str) -> None: ...  # noqa: D102
    def remove(self, server: str) -> None: ...  # noqa: D102
    def set_ready(self, server: str, ready: bool) -> bool: ...  # noqa: D102
    def any_ready(self) -> bool: ...  # noqa: D102
    def states(self) -> Mapping[str, Mapping[str, float]]: ...  # noqa: D102


class Rejected(Exception):
    """The gateway itself answers, with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Failed(Exception):
    """A server gave no answer that counts; the client has seen nothing of it."""

    def __init__(self, reason: str, again: bool, status: int = 502, answer: web.Response | None = None) -> None:
        super().__init__(reason)
        self.again, self.status, self.answer = again, status, answer


@dataclass(eq=False)
class Call:
    """One request of a client."""

    name: str  # x-request-id
    body: bytes = b""
    prefix: str = ""
    retries: int = 0
    outcome: str = "cancelled"
    came: float = field(default_factory=time.perf_counter)


@dataclass(eq=False)
class Attempt:
    """A call at one server."""

    lease: Lease
    patience: asyncio.Timeout
    begun: bool = False  # the server has sent the first bytes of a body
    response: web.StreamResponse | None = None  # the client may have seen some of it
    writing: bool = False  # waiting for the client
    ok: bool | None = None  # what it says about the server


class Gateway:
    """Passes requests on to the servers (`host:port`) of a balancer.

    Args:
        key: clients must send it as a bearer token; "": no key is needed.
        server_key: sent to the servers; "": what the client sent, if no `key` is needed.
        ready_path: answers 200 if the server takes requests.
        find: looks up the servers where they come and go; None: those of the balancer, always.
    """

    def __init__(
        self,
        balancer: Balancer,
        limits: GatewayLimits = GatewayLimits(),
        key: str = "",
        server_key: str = "",
        ready_path: str = "/ready",
        find: Callable[[], Awaitable[set[str] | None]] | None = None,
    ) -> None:
        self._balancer, self._limits, self._ready_path, self._find = balancer, limits, ready_path, find
        self._key, self._server_key = key and hashlib.sha256(key.encode()).digest(), server_key
        self._metrics = GatewayMetrics()
        self._dashboard = Dashboard(self._metrics_of, balancer.states)
        self._waiting: dict[str, set[asyncio.Timeout]] = defaultdict(set)
        self._checks: dict[str, asyncio.Task] = {}
        self._down: set[str] = set()
        self._in_flight = 0
        self._idle, self._stopped = asyncio.Event(), asyncio.Event()
        self._draining: asyncio.Task | None = None

    # ---- the life of the process ----

    async def run(self, listener: socket.socket) -> None:
        """Serve on a bound socket until SIGTERM, after which requests in flight finish, or SIGINT."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stopped.set)
        # uvicorn closes idle connections after 5 s: never send on one that is about to be.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_s)
        as_sent = {"auto_decompress": False, "cookie_jar": aiohttp.DummyCookieJar()}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, **as_sent) as self._session:
            await self._look_for_servers()
            await asyncio.gather(*(self._check(server) for server in self._balancer.servers))
            options = {"handler_cancellation": True, "auto_decompress": False, "lingering_time": 1.0}
            self._server = PatientServer(self._handle, self._limits.request_s, access_log=None, **options)
            runner = web.ServerRunner(self._server, shutdown_timeout=0.5)
            await runner.setup()
            await web.SockSite(runner, listener, backlog=1024).start()
            for server in self._balancer.servers:
                self._checks[server] = asyncio.create_task(self._keep_checking(server))
            looking = asyncio.create_task(self._keep_looking())
            gc.collect()
            gc.freeze()  # scanning the long-lived objects again and again would delay tokens by milliseconds
            await self._stopped.wait()
            for task in (looking, *self._checks.values()):
                task.cancel()
            await runner.cleanup()

    def _stop(self) -> None:
        if self._draining:  # a second signal: now
            self._stopped.set()
        else:
            self._draining = asyncio.create_task(self._drain())
            self._metrics.draining.set(1)

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                while self._in_flight:
                    self._idle.clear()
                    await self._idle.wait()
        self._stopped.set()

    # ---- servers and their checks ----

    async def _keep_looking(self) -> None:
        while self._find:
            await asyncio.sleep(self._limits.find_s)
            for server in await self._look_for_servers():
                self._checks[server] = asyncio.create_task(self._keep_checking(server))

    async def _look_for_servers(self) -> set[str]:
        """Tell the balancer of new servers, which are returned, and of servers that are gone."""
        found, known = await self._find() if self._find else None, set(self._balancer.servers)
        if found is None:
            return set()
        for server in known - found:
            self._balancer.remove(server)
            self._checks.pop(server).cancel()
            self._waiting.pop(server, None)
            self._down.discard(server)
            logger.warning("%s is gone", server)
        for server in found - known:
            self._balancer.add(server)
            logger.warning("%s is new", server)
        return found - known

    async def _keep_checking(self, server: str) -> None:
        silent = 0
        while True:
            await asyncio.sleep(self._limits.check_s)
            silent = await self._check(server, silent)

    async def _check(self, server: str, silent: int = 1) -> int:
        """Ask a server whether it is ready. Returns the number of checks in a row without an answer."""
        down = ready = False
        try:
            async with asyncio.timeout(self._limits.check_timeout_s):
                async with self._session.get(f"http://{server}{self._ready_path}", allow_redirects=False) as answer:
                    ready, silent = answer.status == 200, 0
        except TimeoutError:
            silent += 1
            if silent < 2:  # a busy server may miss one
                return silent
            down = True
        except (aiohttp.ClientError, OSError):  # refused
            down = True
        (self._down.add if down else self._down.discard)(server)
        if down:
            for patience in self._waiting[server]:  # without a byte of an answer: another server can take them
                patience.reschedule(asyncio.get_running_loop().time())
        if self._balancer.set_ready(server, ready):
            logger.warning("%s is %s", server, "ready" if ready else "down" if down else "not ready")
        return silent

    async def _metrics_of(self, server: str) -> str | None:
        """A server's /metrics, for the dashboard; None if it gives none."""
        plain = {"accept-encoding": "identity"}  # this session passes bodies on as they are
        try:
            async with asyncio.timeout(self._limits.check_timeout_s):
                url = f"http://{server}/metrics"
                async with self._session.get(url, headers=plain, allow_redirects=False) as answer:
                    return await answer.text(errors="replace") if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    # ---- one request ----

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._server.heard_from(request.protocol)
        path = request.path
        if path == "/health":
            return json_answer(200, {"status": "ok"})
        if path == "/ready":
            ready = not self._draining and self._balancer.any_ready()
            state = "ready" if ready else "draining" if self._draining else "no server is ready"
            return json_answer(200 if ready else 503, {"status": state})
        if path == "/metrics":
            page = self._metrics.render(self._balancer.states())
            return web.Response(body=page, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})
        if path == "/dashboard/data":
            if not self._has_key(request):
                return json_answer(401, {"status": "a valid API key is needed"})
            return json_answer(200, await self._dashboard.data(), {"cache-control": "no-store"})
        if path == "/dashboard":  # needs no key: it is empty until the key is given
            return web.Response(text=PAGE, headers=PAGE_HEADERS)

        name = request.headers.get("x-request-id", "")
        call = Call(name if REQUEST_ID.fullmatch(name) else secrets.token_hex(8))
        self._in_flight += 1
        try:
            await self._accept(request, call)
            return await self._answer(request, call)
        except Rejected as rejection:
            call.outcome = "rejected"
            return error_answer(rejection.status, str(rejection), call)
        except Exception:  # a bug of the gateway
            call.outcome = "error"
            logger.exception("%s: internal error", call.name)
            request.protocol.force_close()
            return error_answer(500, "internal error", call)
        finally:
            self._in_flight -= 1
            self._idle.set()
            self._metrics.requests.labels(call.outcome).inc()

    async def _accept(self, request: web.BaseRequest, call: Call) -> None:
        """All checks before a request reaches a server. Raises Rejected."""
        if self._draining:
            raise Rejected(503, "the gateway is draining")
        if not self._has_key(request):
            raise Rejected(401, "a valid API key is needed")
        if not (request.path == "/generate" or request.path.startswith("/v1/")) or ".." in request.path.split("/"):
            raise Rejected(404, "only /generate and /v1/ are passed on")
        limit, parts, size = self._limits.max_body_bytes, [], 0
        too_large = Rejected(413, f"the body has more than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.request_s):
                while part := await request.content.readany():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise too_large
        except TimeoutError:
            raise Rejected(408, f"no complete body within {self._limits.request_s:g} s") from None
        except aiohttp.ClientPayloadError as error:
            raise Rejected(400, f"the body cannot be read: {error}") from None
        call.body = b"".join(parts)
        if self._balancer.policy == "prefix":
            call.prefix = prefix_of(call.body)

    def _has_key(self, request: web.BaseRequest) -> bool:
        if not self._key:
            return True
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        return scheme.lower() == "bearer" and secrets.compare_digest(digest, self._key)

    async def _answer(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        """Try servers until one answers, as long as that is safe."""
        tried: list[str] = []
        failure = Failed("no server is ready", again=True, status=503)
        while failure.again and len(tried) <= self._limits.retries:
            try:
                lease = self._balancer.take(call.prefix, tried)
            except NoServer:
                break
            call.retries = len(tried)
            self._metrics.retries.inc(bool(tried))
            tried.append(lease.server)
            try:
                return await self._attempt(request, call, lease)
            except Failed as why:
                failure = why
                logger.info("%s: %s: %s", call.name, lease.server, why)
        call.outcome = "error"
        return failure.answer or error_answer(failure.status, str(failure), call)

    async def _attempt(self, request: web.BaseRequest, call: Call, lease: Lease) -> web.StreamResponse:
        """Let one server answer. Raises Failed if it did not and the client has received nothing."""
        attempt = Attempt(lease, asyncio.timeout(self._limits.first_byte_s))
        waiting = self._waiting[lease.server]
        try:
            async with attempt.patience:
                waiting.add(attempt.patience)
                await self._relay(request, call, attempt)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if attempt.writing:  # the client left, or does not read
                request.protocol.force_close()
                return attempt.response
            attempt.ok = False
            late = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError)
            reason = next(reason for kind, reason in REASONS if isinstance(error, kind))
            if attempt.response is None:
                # Slow is not dead: a second server would repeat the work when load is highest.
                again = not attempt.begun and (not late or lease.server in self._down)
                raise Failed(reason, again, 504 if late else 502) from None
            await self._break_off(request, call, attempt.response, reason)
        finally:
            waiting.discard(attempt.patience)
            self._balancer.give_back(lease, attempt.ok)
        return attempt.response

    async def _relay(self, request: web.BaseRequest, call: Call, attempt: Attempt) -> None:
        """Pass the request on to the server, and its answer to the client as it comes."""
        loop, server, patience = asyncio.get_running_loop(), attempt.lease.server, attempt.patience
        async with self._session.request(
            request.method,
            URL(f"http://{server}{request.rel_url.raw_path_qs}", encoded=True),
            data=call.body or None,
            headers=self._request_headers(request, call),
            skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
            allow_redirects=False,
        ) as upstream:
            chunk = await upstream.content.readany()
            attempt.begun = bool(chunk)
            self._waiting[server].discard(patience)
            patience.reschedule(loop.time() + self._limits.idle_s)
            headers = CIMultiDict(end_to_end(upstream.headers, ("content-length", "x-request-id", "date", "server")))
            headers.update({"x-request-id": call.name, "x-served-by": server, "x-retries": str(call.retries)})
            status = upstream.status
            if chunk and status not in TRY_ANOTHER:  # otherwise another server may give the answer
                self._metrics.first_byte.observe(time.perf_counter() - call.came)
            if status in TRY_ANOTHER or (upstream.content_length or MAX_WHOLE_BYTES + 1) <= MAX_WHOLE_BYTES:
                body = chunk + await upstream.content.read()
                attempt.ok = status < 500
                answer = web.Response(status=status, reason=upstream.reason, headers=headers, body=body)
                if status in TRY_ANOTHER:
                    raise Failed(f"status {status}", again=True, answer=answer)
                attempt.response, call.outcome = answer, "ok" if attempt.ok else "error"
                return

            response = web.StreamResponse(status=status, reason=upstream.reason, headers=headers)
            events = WholeEvents() if upstream.content_type == "text/event-stream" else None
            set_at = loop.time()
            while chunk:
                if data := events.feed(chunk) if events else chunk:
                    await self._write(request, attempt, response, data)
                if (now := loop.time()) > set_at + self._limits.idle_s / 10:  # too costly for each token
                    set_at = now
                    patience.reschedule(now + self._limits.idle_s)
                chunk = await upstream.content.readany()
            if events and request.path in ENDS_WITH_DONE and status == 200 and not events.finished:
                raise aiohttp.ClientPayloadError("the stream ended without [DONE]")
            attempt.response = response
            if events and events.rest:
                await self._write(request, attempt, response, events.rest)
            attempt.ok = status < 500 and not (events and events.failed)
            call.outcome = "ok" if attempt.ok else "error"

    @staticmethod
    async def _write(request: web.BaseRequest, attempt: Attempt, response: web.StreamResponse, data: bytes) -> None:
        """Send a part of an answer to the client, before the first one its headers."""
        attempt.writing, attempt.response = True, response
        if not response.prepared:
            await response.prepare(request)
        await response.write(data)
        attempt.writing = False

    async def _break_off(self, request: web.BaseRequest, call: Call, response: web.StreamResponse, reason: str) -> None:
        """Tell a client in the middle of an answer that the rest will not come."""
        call.outcome = "truncated"
        logger.warning("%s: %s", call.name, reason)
        if response.content_type == "text/event-stream":
            error = {"message": reason, "type": "UpstreamError", "code": 502, "param": None}
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(self._limits.idle_s):
                    await response.write(f"event: error\ndata: {json.dumps({'error': error})}\n\n".encode())
        request.protocol.force_close()  # what was written goes out, the end of a stream does not

    def _request_headers(self, request: web.BaseRequest, call: Call) -> list[tuple[str, str]]:
        drop = (*OWN_HEADERS, "authorization") if self._key or self._server_key else OWN_HEADERS
        headers = list(end_to_end(request.headers, drop))
        seen = request.headers.get("x-forwarded-for")
        headers.append(("x-forwarded-for", f"{seen}, {request.remote}" if seen else str(request.remote)))
        headers.append(("x-request-id", call.name))
        if self._server_key:
            headers.append(("authorization", f"Bearer {self._server_key}"))
        return headers


def json_answer(status: int, content: object, headers: Mapping[str, str] | None = None) -> web.Response:
    """A small JSON answer."""
    body = json.dumps(content).encode()
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def error_answer(status: int, message: str, call: Call) -> web.Response:
    """An error in the OpenAI API's form, as the servers send theirs."""
    usual = "BadRequestError" if status < 500 else "UpstreamError"
    kind = {401: "AuthenticationError", 503: "ServiceUnavailableError"}.get(status, usual)
    headers = {"x-request-id": call.name, "x-retries": str(call.retries)}
    if status == 503:
        headers["retry-after"] = "1"
    answer = json_answer(status, {"error": {"message": message, "type": kind, "code": status, "param": None}}, headers)
    if status in (408, 413, 400):  # the rest of the body may still be on its way
        answer.force_close()
    return answer

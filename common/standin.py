"""A stand-in for the production server: the same HTTP, tokens by a clock instead of a model. All its answers are
simulated, and carry `x-simulated: 1`.

It has the property of an engine that matters to clients and gateways: all running requests advance together, a step
takes longer the more requests run, and the others wait.

    python3 common/standin.py --port 8001 --step-ms 20 --slots 64
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("environment.py")))

import argparse
import asyncio
import bisect
import collections
import contextlib
import itertools
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from common import cli
from common.metrics import InferenceMetrics, Rate, TrackedRequest
from common.server import listen

MODEL = "simulated"
KV_TOKENS = 512  # of the KV cache, per slot
MAX_TOKENS = 1 << 17  # per answer
PROMPTS = 1000  # in the prefix cache
# A part of vLLM's buckets, in seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


def standin_command(*flags: str) -> list[str]:
    """The command line of a stand-in, for `ServerProcess`."""
    return [sys.executable, str(Path(__file__).resolve()), *flags]


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    content: dict
    text: str
    prompt_tokens: int
    tokens: int  # of its answer

    @property
    def options(self) -> dict:
        """`stream_options`."""
        return self.content.get("stream_options") or {}


def read_body(body: bytes) -> Asked:
    """Parse the body of a request; a ValueError says in one line why it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {cli.first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError("the body is no JSON object")
    messages, prompt = content.get("messages"), content.get("prompt")
    if messages is None and prompt is None:
        raise ValueError("there are neither messages nor a prompt")
    if messages is not None and not is_list_of(messages, dict):
        raise ValueError("messages must be a list of objects")
    if messages is None and not (isinstance(prompt, str) or is_list_of(prompt, int)):
        raise ValueError("prompt must be a text or a list of token ids")
    limits = [content[key] for key in ("max_completion_tokens", "max_tokens") if content.get(key) is not None]
    tokens = limits[0] if limits else 16
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"max_tokens must be a whole number from 1 to {MAX_TOKENS}")
    if not isinstance(content.get("stream_options"), dict | None):
        raise ValueError("stream_options must be an object")
    text = str(prompt if messages is None else messages)
    ids = messages is None and isinstance(prompt, list)
    return Asked(content, text, max(1, len(prompt) if ids else len(text) // 4), tokens)


def is_list_of(value: object, kind: type) -> bool:
    """Whether it is a list of this kind only."""
    return isinstance(value, list) and all(isinstance(part, kind) for part in value)


@dataclass(eq=False)
class Running:
    """A request at the stand-in engine."""

    name: str
    prompt_tokens: int
    left: int
    tokens: asyncio.Queue = field(default_factory=asyncio.Queue)  # for each token, the number still to come
    made: int = 0
    came: float = 0.0  # when it was added, and when it got its first token
    first: float = 0.0

    def usage(self, tokens: int) -> dict[str, int]:
        """The `usage` of an answer with this number of tokens."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens}
        return counts | {"total_tokens": sum(counts.values())}


class Latencies:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BUCKETS) + 1), 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Add a latency this number of times."""
        self._counts[bisect.bisect_left(BUCKETS, seconds)] += times
        self._sum += seconds * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Upper bounds with the observations up to them, and the sum of all."""
        bounds = [*(str(float(bound)) for bound in BUCKETS), "+Inf"]
        return list(zip(bounds, itertools.accumulate(self._counts), strict=True)), self._sum


class Engine:
    """Continuous batching by the clock: a step gives each running request one token. It counts as vLLM does."""

    def __init__(self, step_s: float, sequence_s: float, prefill_s: float, slots: int) -> None:
        self._step_s, self._sequence_s, self._prefill_s, self._slots = step_s, sequence_s, prefill_s, slots
        self.generated = self.queried = self.hit = 0  # tokens: of answers, of prompts, of prompts seen before
        self.ttft, self.itl, self.tpot, self.e2e = Latencies(), Latencies(), Latencies(), Latencies()
        self._seen: dict[int, None] = {}  # hashes of the last prompts, least recently used first
        self.waiting: collections.deque[Running] = collections.deque()
        self.running: list[Running] = []
        self._work = asyncio.Event()

    def add(self, request: Running, prompt: object = None) -> None:
        """Queue a request for a slot. A prompt that is still in the prefix cache counts as a hit."""
        request.came = asyncio.get_running_loop().time()
        self.queried += request.prompt_tokens
        key = hash(prompt)  # prompts may be long
        if key in self._seen:
            self.hit += request.prompt_tokens - 1  # the last one has to be computed
            del self._seen[key]
        elif len(self._seen) == PROMPTS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None
        self.waiting.append(request)
        self._work.set()

    def abort(self, request: Running) -> None:
        """The client has left: drop the request."""
        for place in (self.waiting, self.running):
            with contextlib.suppress(ValueError):
                place.remove(request)

    async def run(self) -> None:
        """Step for ever."""
        loop = asyncio.get_running_loop()
        due = now = loop.time()
        while True:
            if not (self.running or self.waiting):
                self._work.clear()
                await self._work.wait()
            new = [self.waiting.popleft() for _ in range(min(self._slots - len(self.running), len(self.waiting)))]
            self.running += new
            prefill = sum(request.prompt_tokens for request in new) * self._prefill_s
            step = self._step_s + len(self.running) * self._sequence_s + prefill
            due = max(due, loop.time() - step) + step  # a delay of less than a step is made up for in the next
            await asyncio.sleep(max(0.0, due - loop.time()))
            now, before = loop.time(), now
            self.itl.observe(now - before, sum(request.made > 0 for request in self.running))
            for request in self.running:
                request.left -= 1
                request.made += 1
                request.tokens.put_nowait(request.left)
                if request.made == 1:
                    request.first = now
                    self.ttft.observe(now - request.came)
                if not request.left:
                    self.e2e.observe(now - request.came)
                    self.tpot.observe((now - request.first) / max(1, request.made - 1))
            self.generated += len(self.running)
            self.running = [request for request in self.running if request.left > 0]

    def usage(self) -> float:
        """The share of the KV cache that the running requests hold."""
        held = sum(request.prompt_tokens + request.made for request in self.running)
        return min(1.0, held / (self._slots * KV_TOKENS))

    def collect(self) -> Iterator[Metric]:
        """The series of vLLM that dashboards and alerts read, for a Prometheus registry."""
        labels = {"model_name": MODEL, "engine": "0"}
        gauges = {"num_requests_running": len(self.running), "num_requests_waiting": len(self.waiting)}
        gauges |= {"kv_cache_usage_perc": self.usage()}
        counters = {"prefix_cache_queries": self.queried, "prefix_cache_hits": self.hit}
        counters |= {"generation_tokens": self.generated, "num_preemptions": 0}
        histograms = {
            "time_to_first_token_seconds": self.ttft,
            "inter_token_latency_seconds": self.itl,
            "request_time_per_output_token_seconds": self.tpot,
            "e2e_request_latency_seconds": self.e2e,
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                family = kind(f"vllm:{name}", "Simulated", labels=labels)
                family.add_metric(labels.values(), value)
                yield family
        for name, latencies in histograms.items():
            family = HistogramMetricFamily(f"vllm:{name}", "Simulated", labels=labels)
            family.add_metric(labels.values(), *latencies.buckets())
            yield family


class StandIn:
    """The HTTP side."""

    def __init__(self, engine: Engine, journal: Path | None, count_always: bool = False) -> None:
        self._engine, self._journal, self._count_always = engine, journal, count_always
        self._draining, self._in_flight = False, 0
        self.stopped = asyncio.Event()
        self._registry = CollectorRegistry()
        self._registry.register(engine)
        self._counts, self._rate = InferenceMetrics(self._registry), Rate()

    def app(self) -> web.Application:
        """Routes as of `inference_serving.py --serve`."""
        app = web.Application(client_max_size=4 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._infer)
        return app

    def stop(self) -> None:
        """No new requests; those in flight finish."""
        self._draining = True
        self._counts.draining.set(1)
        if not self._in_flight:
            self.stopped.set()

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        state = "draining" if self._draining else "ready"
        return web.json_response({"status": state}, status=503 if self._draining else 200)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        self._counts.throughput.set(self._rate.update(now, self._engine.generated))
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=generate_latest(self._registry), headers=headers)

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        with self._counts.request(accepted=False) as counted:
            answer = await self._answer(request, counted)
            if answer.status >= 400:
                counted.outcome = "rejected" if answer.status == 503 else "invalid"
            return answer

    async def _answer(self, request: web.Request, counted: TrackedRequest) -> web.StreamResponse:
        if self._draining:
            return self._refusal("the server is draining", 503)
        try:
            asked = read_body(await request.read())
        except ValueError as error:
            return self._refusal(str(error), 400)
        running = Running(request.headers.get("x-request-id", ""), asked.prompt_tokens, asked.tokens)
        self._in_flight += 1
        counted.accept()
        self._note(running, "started")
        self._engine.add(running, asked.text)
        try:
            answer = await (self._stream if asked.content.get("stream") else self._whole)(request, running, asked)
            self._note(running, "finished")
            return answer
        finally:
            self._engine.abort(running)
            self._in_flight -= 1
            if self._draining and not self._in_flight:
                self.stopped.set()

    def _note(self, running: Running, event: str) -> None:
        if self._journal:
            with open(self._journal, "a") as journal:
                journal.write(json.dumps({"id": running.name, "event": event}) + "\n")

    @staticmethod
    def _refusal(message: str, status: int) -> web.Response:
        return web.json_response({"error": {"message": message, "code": status}}, status=status)

    @staticmethod
    def _content(path: str, text: str, chat: dict, last: bool, usage: dict | None) -> dict:
        """An answer, or an event of one, as the path has it; `chat`: its text as a chat has it."""
        if path == "/generate":
            return {"text": text} | (usage or {})
        part = {"text": text} if path == "/v1/completions" else chat
        choice = {"index": 0, **part, "finish_reason": "length" if last else None}
        return {"model": MODEL, "choices": [choice]} | ({"usage": usage} if usage else {})

    async def _stream(self, request: web.Request, running: Running, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-simulated": "1"})
        await response.prepare(request)  # before the first token, as vLLM does
        tokens = left = asked.tokens
        every = self._count_always or asked.options.get("continuous_usage_stats")
        while left:
            left = await running.tokens.get()
            counted = every or (not left and request.path == "/generate")
            usage = running.usage(tokens - left) if counted else None
            text = f" {tokens - left}"  # of a token: its number
            event = self._content(request.path, text, {"delta": {"content": text}}, not left, usage)
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if asked.options.get("include_usage"):
            end = {"model": MODEL, "choices": [], "usage": running.usage(tokens)}
            await response.write(f"data: {json.dumps(end)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _whole(self, request: web.Request, running: Running, asked: Asked) -> web.Response:
        tokens = asked.tokens
        while await running.tokens.get():
            pass
        text = "".join(f" {number}" for number in range(1, tokens + 1))
        chat = {"message": {"role": "assistant", "content": text}}
        body = self._content(request.path, text, chat, True, running.usage(tokens))
        return web.json_response(body, headers={"x-simulated": "1"})


async def serve(args: argparse.Namespace) -> None:
    """Listen until a signal."""
    engine = Engine(args.step_ms / 1e3, args.sequence_us / 1e6, args.prefill_us / 1e6, args.slots)
    standin = StandIn(engine, args.journal, args.count_always)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, standin.stop)
    loop.add_signal_handler(signal.SIGINT, standin.stopped.set)
    steps = asyncio.create_task(engine.run())
    runner = web.AppRunner(standin.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.SockSite(runner, listen(args.host, args.port), backlog=1024).start()
    await standin.stopped.wait()
    steps.cancel()
    await runner.cleanup()


def main() -> int:
    """Parse the flags and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--step-ms", type=float, default=20.0, help="a step of the engine; default: 20")
    parser.add_argument("--sequence-us", type=float, default=0.0, help="more for each running request; default: 0")
    parser.add_argument("--prefill-us", type=float, default=0.0, help="more for each new prompt token; default: 0")
    parser.add_argument("--slots", type=cli.positive_int, default=64, help="requests that run together; default: 64")
    parser.add_argument(  # vllm-router drops the client's stream_options
        "--count-always", action="store_true", help="usage in every event, even without stream_options"
    )
    parser.add_argument("--journal", type=Path, help="a file that gets a line when a request starts and finishes")
    args = parser.parse_args()
    import uvloop

    uvloop.run(serve(args))
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Live figures: the page of /dashboard draws the JSON of /dashboard/data.

The servers' /metrics are read only while the page is open, at most every INTERVAL_S for all viewers together. A point
of the charts is what the counters and histograms gained between two readings.
"""

import asyncio
import base64
import hashlib
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.metrics import histogram_quantile

INTERVAL_S = 2.0
POINTS = 150  # five minutes
LATENCIES = {"ttft": "vllm:time_to_first_token_seconds", "itl": "vllm:inter_token_latency_seconds"}
GAUGES = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"}
USAGE = "vllm:kv_cache_usage_perc"
TOKENS = "vllm:generation_tokens_total"
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
NAMES = [USAGE, *GAUGES.values(), TOKENS, QUERIES, HITS, *(f"{name}_bucket" for name in LATENCIES.values())]
# The client library's parser takes 30 times as long, which would delay the tokens that the gateway passes on.
SERIES = re.compile(
    rf"^({'|'.join(NAMES)})"
    r'(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? (-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?!\S)',
    re.MULTILINE,
)
LE = re.compile(r'\ble="([^"]+)"')

PAGE = Path(__file__).with_name("dashboard.html").read_text()
_script, _style = (re.search(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1] for tag in ("script", "style"))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    # Only this script runs on the page, and it connects to the gateway alone.
    "content-security-policy": f"default-src 'none'; script-src {_hash(_script)}; style-src {_hash(_style)}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Reading:
    """One server's /metrics, summed over its engines."""

    gauges: Mapping[str, float]  # the usage is a mean over the engines
    counters: Mapping[tuple[str, float], float]  # by name and, for a histogram's bucket, its upper bound


def parse(page: str) -> Reading:
    """The series that the charts need, from a page of /metrics, as far as it has them."""
    gauges, counters, engines = Counter(), Counter(), 0
    for name, labels, value in SERIES.findall(page):
        if name in (USAGE, *GAUGES.values()):
            gauges[name] += float(value)
            engines += name == USAGE
        else:
            bound = LE.search(labels)
            counters[name, float(bound[1]) if bound else 0.0] += float(value)
    if engines:
        gauges[USAGE] /= engines
    return Reading(gauges, counters)


def gained(before: Reading, after: Reading) -> Mapping[tuple[str, float], float]:
    """What each counter gained. If one went down, the server has restarted, and all began at zero."""
    if any(after.counters.get(key, 0.0) < value for key, value in before.counters.items()):
        return after.counters
    return {key: value - before.counters.get(key, 0.0) for key, value in after.counters.items()}


def figures(pairs: Sequence[tuple[Reading | None, Reading]], seconds: float) -> dict[str, float | None]:
    """The figures of some servers together; None where there are no data.

    `pairs`: of each server the reading before (None: this is the first) and the one now, `seconds` later.
    """
    now = [after for _, after in pairs]
    totals = {name: [r.gauges[name] for r in now if name in r.gauges] for name in (*GAUGES.values(), USAGE)}
    point = {key: sum(totals[name]) if totals[name] else None for key, name in GAUGES.items()}
    point["kv"] = sum(totals[USAGE]) / len(totals[USAGE]) if totals[USAGE] else None
    gains = Counter()
    for before, after in pairs:
        if before is not None:
            gains.update(gained(before, after))
    point["tokens_per_s"] = gains[TOKENS, 0.0] / seconds if (TOKENS, 0.0) in gains else None
    point["hit_rate"] = gains[HITS, 0.0] / gains[QUERIES, 0.0] if gains[QUERIES, 0.0] else None
    for key, name in LATENCIES.items():
        buckets = [(bound, count) for (series, bound), count in gains.items() if series == f"{name}_bucket"]
        for percent in (50, 99):
            point[f"{key}_p{percent}"] = histogram_quantile(percent / 100, buckets)
    return point


class Dashboard:
    """The content of /dashboard/data, from `read`, a server's /metrics (or None), and the balancer's `states`."""

    def __init__(
        self,
        read: Callable[[str], Awaitable[str | None]],
        states: Callable[[], Mapping[str, Mapping[str, float]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._states, self._clock = read, states, clock
        self._lock = asyncio.Lock()
        self._read_at = -float("inf")
        self._readings: dict[str, Reading] = {}
        self._points: deque[tuple[float, dict[str, float | None]]] = deque(maxlen=POINTS)  # with its time
        self._servers: list[dict[str, object]] = []

    async def data(self) -> dict[str, object]:
        """Points, oldest first, with `age_s` before now, and the servers; read again if the interval is over."""
        async with self._lock:
            if self._clock() - self._read_at > 0.9 * INTERVAL_S:
                await self._take()
        points = [{"age_s": self._read_at - at, **point} for at, point in self._points]
        return {"interval_s": INTERVAL_S, "points": points, "servers": self._servers}

    async def _take(self) -> None:
        states = self._states()
        pages = await asyncio.gather(*(self._read(server) for server in states))
        now = self._clock()
        seconds, self._read_at = now - self._read_at, now
        known = self._readings if seconds < 3 * INTERVAL_S else {}  # no viewer for a while: begin again
        self._readings = {server: parse(page) for server, page in zip(states, pages, strict=True) if page is not None}
        pairs = {server: (known.get(server), reading) for server, reading in self._readings.items()}
        self._points.append((now, figures(list(pairs.values()), seconds)))
        self._servers = [
            {"name": server, "answers": server in pairs, **state}
            | (figures([pairs[server]], seconds) if server in pairs else {})
            for server, state in states.items()
        ]

"""A client that records what became of each request, as its user would see it."""

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from ch16.parts.load_balancer.wire import WholeEvents

COUNT = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class StreamedAnswer:
    """What a client received for one request; times in seconds of `time.perf_counter`."""

    name: str  # x-request-id
    sent: float
    counts: list[int] = field(default_factory=list)  # tokens so far, by the events of the stream
    times: list[float] = field(default_factory=list)  # when each count came
    wanted: int = 0
    status: int = 0
    complete: bool = False  # the stream ended with [DONE]
    told: bool = False  # it ended with an error event
    ended: float = 0.0
    server: str = ""
    retries: int = 0

    @property
    def outcome(self) -> str:
        """`answered`, `cut off, told`, `cut off, not told`, `lost` (no byte of an answer), or `duplicated` (tokens
        twice)."""
        if any(later <= earlier for earlier, later in itertools.pairwise(self.counts)) or self.tokens > self.wanted:
            return "duplicated"
        if self.complete and self.tokens == self.wanted:
            return "answered"
        if not self.counts:
            return "lost"
        return "cut off, told" if self.told else "cut off, not told"

    @property
    def tokens(self) -> int:
        """Tokens that came."""
        return self.counts[-1] if self.counts else 0

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.times[0] - self.sent


async def ask(
    session: aiohttp.ClientSession, url: str, name: str, body: Mapping[str, object], patience_s: float
) -> StreamedAnswer:
    """Send one completion request and read its stream to the end, whatever that is. Servers cause no exception.

    `body` has `max_tokens`; streaming and usage in every event are added. `patience_s`: for each part of the answer.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    answer = StreamedAnswer(name, time.perf_counter(), wanted=body["max_tokens"])
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience_s, sock_read=patience_s)
    events = WholeEvents()
    try:
        async with session.post(
            f"{url}/v1/completions", json=body, headers={"x-request-id": name}, timeout=timeout
        ) as response:
            answer.status = response.status
            answer.server = response.headers.get("x-served-by", "")
            answer.retries = int(response.headers.get("x-retries", 0))
            async for chunk in response.content.iter_any():
                for count in map(int, COUNT.findall(events.feed(chunk))):
                    if count != answer.tokens:  # the last event of a stream repeats the count
                        answer.times.append(time.perf_counter())
                        answer.counts.append(count)
    except (aiohttp.ClientError, OSError, TimeoutError):
        pass
    answer.complete = answer.status == 200 and events.finished
    answer.told = events.failed
    answer.ended = time.perf_counter()
    return answer


async def steady(
    choose: Callable[[], str],  # the URL of the next request
    name: str,
    body: Callable[[int], Mapping[str, object]],
    rate: float,
    stop: asyncio.Event,
    patience_s: float,
) -> Sequence[StreamedAnswer]:
    """An open loop: `rate` requests/s until `stop`, whatever becomes of earlier ones; the i-th is called `name-i`."""
    tasks = []
    start = asyncio.get_running_loop().time()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for number in itertools.count():
            pause = start + number / rate - asyncio.get_running_loop().time()
            if pause > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause)
            if stop.is_set():
                break
            work = ask(session, choose(), f"{name}-{number}", body(number), patience_s)
            tasks.append(asyncio.create_task(work))
        return await asyncio.gather(*tasks)

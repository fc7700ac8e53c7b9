"""A closed loop of the lab's client, for the benchmarks: users that send a request when the last one is answered."""

import asyncio
import itertools
from collections.abc import Callable, Mapping

import aiohttp

from ch16.parts.load_balancer.client import StreamedAnswer, ask


async def closed_loop(
    url: str,
    body: Callable[[int], Mapping[str, object]],
    requests: int,
    at_once: int,
    ramp_s: float,
    patience_s: float = 60.0,
) -> list[StreamedAnswer]:
    """A closed loop: `at_once` users, each sends a request when the last one is answered, until `requests` were sent.

    Args:
        body: of the i-th request.
        ramp_s: the users start one after another within this time, not all at the same moment.
    """
    numbers = iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def user(place: int) -> list[StreamedAnswer]:
            await asyncio.sleep(ramp_s * place / at_once)
            return [await ask(session, url, f"closed-{i}", body(i), patience_s) for i in numbers]

        answers = await asyncio.gather(*(user(place) for place in range(at_once)))
    return list(itertools.chain.from_iterable(answers))

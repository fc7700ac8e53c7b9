"""The lab: replicas are killed, stopped and drained while three kinds of clients ask them, all at the same time.

one server           every request to the first replica
plain round robin    the chapter's balancer in the client: one after another, whatever became of the last
gateway              every request to the gateway
"""

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from ch16.parts.load_balancer.client import Answer, steady
from common.results import Column, Verdict, judge
from common.server import ServerProcess
from common.timing import percentile

PATHS = ("one server", "plain round robin", "gateway")
OUTCOME_COLUMNS = (
    Column("path", "clients ask"),
    Column("sent", "sent", ","),
    Column("answered", "answered", ","),
    Column("retried", "of them retried", ","),
    Column("cut off, told", "cut off, told", ","),
    Column("cut off, not told", "cut off, not told", ","),
    Column("lost", "lost", ","),
    Column("duplicated", "duplicated", ","),
    Column("ttft_p50_ms", "TTFT P50 ms", ",.0f"),
    Column("ttft_p99_ms", "TTFT P99 ms", ",.0f"),
)
FAULT_COLUMNS = (
    Column("fault", "fault"),
    Column("at_s", "at s", ".1f"),
    Column("retried", "retried", ","),
    Column("cut off, told", "cut off, told", ","),
    Column("lost", "lost", ","),
    Column("away_s", "away s", ".1f"),
    Column("back_s", "in use again after s", ".2f"),
)


@dataclass(frozen=True)
class Plan:
    """What happens when, in seconds, and the load meanwhile."""

    rate: float  # requests/s of each kind of clients
    tokens: int
    gap_s: float  # without any fault
    down_s: float  # a killed replica stays away so long before it is started again
    hang_s: float
    patience_s: float  # of a client

    @property
    def idle_s(self) -> float:
        """How long the gateway waits for the next part of an answer: less than a replica hangs."""
        return self.hang_s / 2


@dataclass
class Fault:
    """Something that happened to a replica; times by `time.perf_counter`."""

    name: str
    server: str
    at: float
    ready_at: float = float("nan")


async def run_lab(
    replicas: Sequence[ServerProcess],
    gateway_url: str,
    choose: Callable[[], str],
    body: Callable[[int], Mapping[str, object]],
    plan: Plan,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[dict[str, list[Answer]], list[Fault]]:
    """Load on all paths while the faults happen one after another.

    Args:
        replicas: three that are ready.
        choose: the next server of plain round robin, `host:port`.
        body: of the i-th request.
        say: told of each fault.

    Returns:
        The answers on each path, and the faults.
    """
    stop = asyncio.Event()
    urls = (lambda: replicas[0].url, lambda: f"http://{choose()}", lambda: gateway_url)
    loads = [
        asyncio.create_task(steady(url, name.replace(" ", "-"), body, plan.rate, stop, plan.patience_s))
        for name, url in zip(PATHS, urls, strict=True)
    ]
    faults: list[Fault] = []

    def note(name: str, replica: ServerProcess) -> Fault:
        say(name)
        faults.append(Fault(name, replica.address, time.perf_counter()))
        return faults[-1]

    try:
        first, second, third = replicas
        await asyncio.sleep(plan.gap_s)

        fault = note("SIGKILL, started again", first)
        first.signal_all(signal.SIGKILL)
        await asyncio.to_thread(first.process.wait)
        await asyncio.sleep(plan.down_s)
        first.start()
        fault.ready_at = await ready(first)
        await asyncio.sleep(plan.gap_s)

        fault = note("SIGSTOP, continued", second)
        second.signal_all(signal.SIGSTOP)
        await asyncio.sleep(plan.hang_s)
        second.signal_all(signal.SIGCONT)
        fault.ready_at = await ready(second)
        await asyncio.sleep(plan.gap_s)

        fault = note("SIGTERM, started again", third)
        third.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(third.process.wait)
        third.start()
        fault.ready_at = await ready(third)
        await asyncio.sleep(plan.gap_s)
    finally:
        stop.set()
        answers = await asyncio.gather(*loads)
    return dict(zip(PATHS, answers, strict=True)), faults


async def ready(replica: ServerProcess) -> float:
    """Wait until a replica takes requests. Returns when that was; CannotRun if it ended instead."""
    timeout = aiohttp.ClientTimeout(total=1)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while replica.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get(replica.url + "/ready") as answer:
                    if answer.status == 200:
                        return time.perf_counter()
            await asyncio.sleep(0.02)
    replica.wait_ready()  # says why it cannot be
    raise AssertionError


def outcome_rows(answers: Mapping[str, Sequence[Answer]]) -> list[dict]:
    """Rows of OUTCOME_COLUMNS."""
    rows = []
    for path, seen in answers.items():
        counts = {column.key: 0 for column in OUTCOME_COLUMNS[2:8]}
        for answer in seen:
            counts[answer.outcome] += 1
            counts["retried"] += answer.outcome == "answered" and answer.retries > 0
        ttft = [1e3 * answer.ttft_s for answer in seen if answer.times]
        figures = {f"ttft_p{q}_ms": percentile(ttft, q) if ttft else None for q in (50, 99)}
        rows.append({"path": path, "sent": len(seen)} | counts | figures)
    return rows


def fault_rows(answers: Sequence[Answer], faults: Sequence[Fault]) -> list[dict]:
    """Rows of FAULT_COLUMNS: what each fault did to the gateway's requests.

    `back_s`: from the replica's return to the first request that was sent and that it answered.
    """
    start, end = min(answer.sent for answer in answers), max(answer.ended for answer in answers)
    rows = []
    for fault, until in itertools.zip_longest(faults, [later.at for later in faults[1:]], fillvalue=end):
        hit = [answer for answer in answers if fault.at <= answer.ended <= until]
        after = [a.sent for a in answers if a.server == fault.server and a.sent >= fault.ready_at and a.complete]
        rows.append(
            {
                "fault": fault.name,
                "at_s": fault.at - start,
                "retried": sum(answer.retries > 0 and answer.complete for answer in hit),
                **{kind: sum(answer.outcome == kind for answer in hit) for kind in ("cut off, told", "lost")},
                "away_s": fault.ready_at - fault.at,
                "back_s": min(after) - fault.ready_at if after else None,
            }
        )
    return rows


def claim(rows: Sequence[dict], faults: Sequence[dict]) -> Verdict:
    """L1 from the rows of the two tables."""
    one, _, gateway = rows
    bad = {row["path"]: row["sent"] - row["answered"] for row in rows}
    measured = (
        f"unanswered: {bad['one server']:,} of {one['sent']:,} with one server, {bad['plain round robin']:,} with "
        f"plain round robin, {bad['gateway']:,} behind the gateway, of which {gateway['cut off, told']:,} had begun "
        "and were told"
    )
    back = [row["back_s"] for row in faults if row["back_s"] is not None]
    if back:
        measured += f"; returned replicas in use after {max(back):.1f} s at most"
    if never := len(faults) - len(back):
        measured += f"; {never} of {len(faults)} replicas not used again"
    safe = gateway["lost"] == gateway["duplicated"] == gateway["cut off, not told"] == 0
    return judge("L1", bad["one server"] > 0 and safe and bad["gateway"] < bad["plain round robin"], measured)

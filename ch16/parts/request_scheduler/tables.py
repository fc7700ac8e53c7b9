"""The tables, waits by class and by tenant; the claim, and what the picture shows."""

from collections.abc import Callable, Sequence

from ch16.parts.request_scheduler.mix import CLASSES, HEAVY, Answer, Job
from common.costs import check_columns, check_rows
from common.results import Column, Verdict, judge
from common.timing import percentile

# The policies on the real engine.
FCFS, PRIORITY, AGEING = LIVE = ("vLLM, first come first served", "vLLM, priority", "InferenceScheduler, ageing")
WAIT_COLUMNS = (
    Column("policy", "policy"),
    Column("group", "requests"),
    Column("count", "number", ",d"),
    Column("p50_s", "TTFT P50 s", ",.2f"),
    Column("p99_s", "TTFT P99 s", ",.2f"),
    Column("max_s", "TTFT max s", ",.2f"),
    Column("bound_s", "bound s", ",.2f"),
    Column("over_bound", "over the bound", ",d"),
    Column("tokens_per_s", "output tok/s", ",.1f"),
)
CHECK_COLUMNS = check_columns("first come, first served")
TTFT_TARGET = 0.25  # P99 time to first token of high priority, over that of first come, first served
THROUGHPUT_TARGET = 0.97


def by_class(job: Job) -> str:
    """Priority, as a group of rows."""
    return f"{list(CLASSES).index(job.kind) + 1} {job.kind}"


def by_tenant(job: Job) -> str:
    """The tenant that sends most, or one of the others."""
    return "heavy tenant" if job.tenant == HEAVY else "light tenants"


def wait_rows(
    policy: str, answers: Sequence[Answer], group: Callable[[Job], str], bound_s: Callable[[Job], float] | None = None
) -> list[dict]:
    """Rows of WAIT_COLUMNS, sorted by the `group` of a job; with `bound_s` how many waited longer than that."""
    end = max(answer.last_s for answer in answers)
    throughput = sum(answer.job.tokens_out for answer in answers) / end
    rows = []
    for name in sorted({group(answer.job) for answer in answers}):
        inside = [answer for answer in answers if group(answer.job) == name]
        waits = [answer.ttft_s for answer in inside]
        row = {"policy": policy, "group": name, "count": len(waits), "tokens_per_s": throughput}
        row |= {"p50_s": percentile(waits, 50), "p99_s": percentile(waits, 99), "max_s": max(waits)}
        if bound_s:
            row["bound_s"] = max(bound_s(answer.job) for answer in inside)
            row["over_bound"] = sum(answer.ttft_s > bound_s(answer.job) for answer in inside)
        rows.append(row)
    return rows


def check(real: Sequence[Answer], simulated: Sequence[Answer]) -> list[dict]:
    """Rows of CHECK_COLUMNS: waits and throughput of the same jobs on both engines."""
    (real_row,), (simulated_row,) = (wait_rows("", answers, lambda job: "all") for answers in (real, simulated))
    titles = {"p50_s": "TTFT P50 s", "p99_s": "TTFT P99 s", "tokens_per_s": "output tok/s"}
    return check_rows({title: (real_row[key], simulated_row[key]) for key, title in titles.items()})


def _by_policy(rows: Sequence[dict]) -> list[dict[str, dict]]:
    """Live rows by class, for each policy of LIVE."""
    by_name = {(row["policy"], row["group"][2:]): row for row in rows}
    return [{kind: by_name[policy, kind] for kind in CLASSES} for policy in LIVE]


def claim(rows: Sequence[dict]) -> Verdict:
    """Q1 from the live rows."""
    fcfs, strict, aged = _by_policy(rows)
    ratio, throughput = (strict["high"][key] / fcfs["high"][key] for key in ("p99_s", "tokens_per_s"))
    text = (
        f"P99 TTFT of high priority {ratio:.2f} of first come, first served, at {throughput:.2f} of its throughput; "
        f"low priority waited up to {strict['low']['max_s']:.1f} s instead of {fcfs['low']['max_s']:.1f} s. With "
        f"ageing: {aged['high']['p99_s'] / fcfs['high']['p99_s']:.2f}, and up to {aged['low']['max_s']:.1f} s"
    )
    return judge("Q1", ratio <= TTFT_TARGET and throughput >= THROUGHPUT_TARGET, text)


def message(rows: Sequence[dict]) -> str:
    """What the picture shows, from the live rows."""
    fcfs, strict, _ = _by_policy(rows)
    high, low = (strict[kind]["p99_s"] / fcfs[kind]["p99_s"] for kind in ("high", "low"))
    return f"With priorities, high priority has {high:.2g}x the P99 TTFT of FCFS, and low priority {low:.2g}x"

"""The tables: waits by class and by tenant."""

from collections.abc import Callable, Sequence

from ch16.parts.request_scheduler.mix import CLASSES, HEAVY, Answer, Job
from common.costs import check_columns, check_rows
from common.results import Column
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


def by_class(job: Job) -> str:
    """Priority, as a group of rows."""
    return f"{list(CLASSES).index(job.kind) + 1} {job.kind}"


def by_tenant(job: Job) -> str:
    """The tenant that sends most, or one of the others."""
    return "heavy tenant" if job.tenant == HEAVY else "light tenants"


def wait_rows(
    policy: str, answers: Sequence[Answer], group: Callable[[Job], str], bound_s: Callable[[Job], float] | None = None
) -> list[dict]:
    """Rows of WAIT_COLUMNS: time to first token by group, and how many requests waited longer than `bound_s`.

    Args:
        answers: at least one.
        group: the name of a job's row; rows are sorted by it.
        bound_s: seconds that a job may wait.
    """
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

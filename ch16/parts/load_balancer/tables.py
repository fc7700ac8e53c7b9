"""The lab's tables and its verdict: what became of the requests, and what each fault did."""

import itertools
from collections.abc import Mapping, Sequence

from ch16.parts.load_balancer.client import StreamedAnswer
from ch16.parts.load_balancer.lab import Fault
from common.results import Column, Verdict, judge
from common.timing import percentile

OUTCOME_COLUMNS = (
    Column("path", "clients ask"),
    Column("sent", "sent", ","),
    Column("answered", "answered", ","),
    Column("retried", "after a retry", ","),
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
    Column("away_s", "down s", ".1f"),
    Column("back_s", "back in use after s", ".2f"),
)


def outcome_rows(answers: Mapping[str, Sequence[StreamedAnswer]]) -> list[dict]:
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


def fault_rows(answers: Sequence[StreamedAnswer], faults: Sequence[Fault]) -> list[dict]:
    """Rows of FAULT_COLUMNS: what each fault did to the gateway's requests.

    `back_s`: from the replica's return to the sending of the first request that it answered.
    """
    start, end = min(answer.sent for answer in answers), max(answer.ended for answer in answers)
    rows = []
    for fault, until in itertools.zip_longest(faults, [later.at for later in faults[1:]], fillvalue=end):
        hit = [answer for answer in answers if fault.at <= answer.ended <= until]
        after = [a.sent for a in answers if a.server == fault.server and a.sent >= fault.ready_at and a.complete]
        row = {"fault": fault.name, "at_s": fault.at - start, "away_s": fault.ready_at - fault.at}
        row["retried"] = sum(answer.retries > 0 and answer.complete for answer in hit)
        row |= {kind: sum(answer.outcome == kind for answer in hit) for kind in ("cut off, told", "lost")}
        rows.append(row | {"back_s": min(after) - fault.ready_at if after else None})
    return rows


def claim(rows: Sequence[dict], faults: Sequence[dict]) -> Verdict:
    """L1 from the rows of the two tables."""
    single, _, gateway = rows
    bad = {row["path"]: row["sent"] - row["answered"] for row in rows}
    measured = (
        f"unanswered: {bad['one server']:,} of {single['sent']:,} with one server, {bad['plain round robin']:,} with "
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

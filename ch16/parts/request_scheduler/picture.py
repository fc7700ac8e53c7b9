"""The picture: every live request with and without priorities, and the simulated waits by class."""

import textwrap
from collections.abc import Mapping, Sequence

from ch16.parts.request_scheduler.mix import CLASSES, Answer
from ch16.parts.request_scheduler.tables import FCFS, PRIORITY
from common.plots import COLOURS, draw, legend_below, save_plot
from common.results import Report


def plot(path: str, runs: Mapping[str, Sequence[Answer]], results: Report, message: str) -> None:
    """Left: time to first token of each live request over its arrival. Right: simulated P99 by policy and class.

    `runs`: the answers of the real engine by policy. In the table "simulated" a policy may lack a class.
    """
    simulated = results.tables["simulated"]["rows"]
    figure, (live, waits) = draw(2)
    for policy in (FCFS, PRIORITY):
        for kind in CLASSES:
            shown = [answer for answer in runs[policy] if answer.job.kind == kind]
            arrivals, ttfts = [answer.job.arrival_s for answer in shown], [answer.ttft_s for answer in shown]
            colour = COLOURS["quiet"] if policy == FCFS else COLOURS[kind]
            live.plot(arrivals, ttfts, "o", markersize=6, color=colour)
    for kind in CLASSES:
        live.plot([], [], "o", color=COLOURS[kind], label=f"{kind} priority")
    live.plot([], [], "o", color=COLOURS["quiet"], label="all, without priorities")
    live.set(title="vLLM, measured", xlabel="arrival, s", ylabel="time to first token, s", ylim=(0, None))
    legend_below(live)
    policies = list(dict.fromkeys(row["policy"] for row in simulated))
    for i, kind in enumerate(CLASSES):
        shown = [row for row in simulated if row["group"].endswith(kind)]
        places = [policies.index(row["policy"]) + (i - 1) / 5 for row in shown]
        p99 = [row["p99_s"] for row in shown]
        waits.plot(p99, places, "o", markersize=10, color=COLOURS[kind], label=f"{kind} priority")
    waits.set(title="simulated engine, bursts of minutes", xlabel="time to first token, P99, s", xscale="log")
    waits.set_yticks(range(len(policies)), [textwrap.fill(policy, 14) for policy in policies])
    waits.xaxis.set_major_formatter("{x:g}")
    waits.invert_yaxis()
    waits.grid(axis="x", alpha=0.3)
    legend_below(waits, 3)
    model = results.settings["model"]
    save_plot(figure, path, message=message, model=model, machine=results.machine, simulated=True)

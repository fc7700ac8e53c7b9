"""The picture of load_test.py: what becomes of a rising request rate."""

from collections.abc import Mapping, Sequence

from common.gpu import Machine
from common.loadclient import Objective
from common.plots import COLOURS, draw, legend_below, save_plot


def plot(
    path: str,
    rows: Sequence[Mapping],
    knee: float | None,
    objective: Objective | None,
    model: str,
    machine: Machine,
    simulated: bool,
) -> None:
    """Requests answered and good, and latencies, over the offered rate. Rows: those with a `rate`, see `run_load`."""
    from matplotlib.ticker import LogFormatter

    figure, (requests, latency) = draw(2)
    offered = [row["rate"] for row in rows]
    requests.plot(offered, offered, color=COLOURS["limit"], linewidth=1, label="offered")
    requests.plot(offered, [row["answered"] for row in rows], "o-", color=COLOURS["baseline"], label="answered")
    if all("goodput" in row for row in rows):  # there is an objective
        requests.plot(offered, [row["goodput"] for row in rows], "o-", color=COLOURS["good"], label="good")
    for figure_name, colour in (("ttft", COLOURS["baseline"]), ("tpot", COLOURS["variant"])):
        for quantile, style in ((50, "o--"), (99, "o-")):
            values = [row[f"{figure_name}_p{quantile}_ms"] for row in rows]
            latency.plot(offered, values, style, color=colour, label=f"{figure_name.upper()} P{quantile}")
        if objective and (limit := getattr(objective, f"{figure_name}_ms")) < 1e9:
            latency.axhline(limit, color=colour, linestyle=":", label=f"{figure_name.upper()} objective")
    if knee:
        requests.axvline(knee, color=COLOURS["quiet"], linestyle="--", label="knee")
        latency.axvline(knee, color=COLOURS["quiet"], linestyle="--")
    requests.set(title="throughput", xlabel="offered requests/s", ylabel="requests/s", ylim=(0, None))
    latency.set(title="latency", xlabel="offered requests/s", ylabel="ms", yscale="log")
    latency.yaxis.set_major_formatter(LogFormatter())
    latency.yaxis.set_minor_formatter(LogFormatter())
    legend_below(requests)
    legend_below(latency)
    save_plot(figure, path, message=_message(offered, knee), model=model, machine=machine, simulated=simulated)


def _message(offered: Sequence[float], knee: float | None) -> str:
    if knee is None:
        return "Requests answered, and latency, at the rates asked for"
    if not knee:
        return f"Too few requests meet the objective even at {min(offered):.1f} requests/s"
    above = [rate for rate in offered if rate > knee]
    beyond = f"; at {min(above):.1f} too few requests meet it" if above else ", the highest rate tried"
    return f"The objective is kept up to {knee:.1f} requests/s{beyond}"
